"""Runs made by hand, of which everything is known, and what `evaluate` says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.spatial.transform import Rotation

from faml_gpu import metrics
from faml_gpu.errors import InputError
from faml_gpu.evaluation import Evaluation, evaluate, make_folder, tables, write_evaluation
from faml_gpu.fsc import lowpass
from faml_gpu.geometry import matrix_to_relion
from faml_gpu.io.mrc import read_mrc, write_mrc
from faml_gpu.io.star import FreshTable, write_particles_star
from faml_gpu.masks import soft_sphere
from faml_gpu.run_folder import OutputError
from faml_gpu.simulate import density, groel, ribosome, simulate_particles

VOXEL, BOX = 12.0, 32


def write_star(
    path: Path,
    names: list[str],
    rotations: np.ndarray | None,
    shifts: np.ndarray | None = None,
    classes: np.ndarray | None = None,
) -> Path:
    """Poses (R, t in voxels) and classes from 0 as RELION has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {}
    if rotations is not None:
        angles = matrix_to_relion(rotations)
        columns |= dict(zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), angles.T, strict=True))
    if shifts is not None:
        columns |= dict(zip(("rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginZAngst"), -VOXEL * shifts.T, strict=True))
    if classes is not None:
        columns["rlnClassNumber"] = classes + 1
    write_particles_star(path, FreshTable(tuple(names), VOXEL, BOX), columns)
    return path


def write_run(
    folder: Path,
    names: list[str],
    maps: list[np.ndarray],
    rotations: np.ndarray,
    shifts: np.ndarray,
    classes: np.ndarray,
    **about: Any,
) -> Path:
    """The files of a finished run that `evaluate` looks at."""
    write_star(folder / "run_data.star", names, rotations, shifts, classes)
    for k, volume in enumerate(maps, 1):
        write_mrc(folder / f"run_class{k:03d}.mrc", volume, VOXEL)
    (folder / "run.json").write_text(json.dumps({"status": "finished", "iterations": [], **about}))
    return folder


def names_of(n: int) -> list[str]:
    return [f"boxes/{i:03d}.mrc" for i in range(n)]


def angle(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.rad2deg(Rotation.from_matrix(np.asarray(a).T @ np.asarray(b)).magnitude()))


# --- maps ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, np.ndarray, np.ndarray, Path]:
    """A known pose of a ribosome with a little noise, and the mirror image of another structure, against the truth."""
    folder = tmp_path_factory.mktemp("maps")
    rng = np.random.default_rng(4)
    rotation, shift = Rotation.from_euler("ZYZ", [40, 75, -120], degrees=True).as_matrix(), np.array([2.2, -1.4, 0.7])
    truth = density(ribosome(), BOX, VOXEL)
    moved = density(ribosome(), BOX, VOXEL, rotation, shift)
    noise = 0.05 * rng.standard_normal((2, BOX, BOX, BOX)).astype(np.float32)
    write_mrc(folder / "truth.mrc", truth, VOXEL)
    write_mrc(folder / "average.mrc", moved + noise[0], VOXEL)
    write_mrc(folder / "flipped.mrc", metrics.mirrored(moved) + noise[1], VOXEL)
    return (
        evaluate([folder / "average.mrc", folder / "flipped.mrc"], truth_maps=[folder / "truth.mrc"]),
        rotation,
        shift,
        folder,
    )


def test_a_known_rotation_is_found(flipped: tuple[Evaluation, np.ndarray, np.ndarray, Path]) -> None:
    result, rotation, shift, _ = flipped
    score = next(s for s in result.maps if s.map.endswith("average.mrc"))
    assert angle(score.as_is.rotation, rotation) < 1.0
    assert np.linalg.norm(np.array(score.as_is.shift) - VOXEL * shift) < 1.5
    assert score.hand == "as is"
    assert score.matched
    assert not any("average.mrc" in note and "MIRROR" in note for note in result.notes)
    # 0.05 of noise on a density of variance 0.25 inside the sphere: r = 0.995.
    unfiltered, _, thirty = score.as_is.correlations
    assert (unfiltered.lowpass, thirty.lowpass) == (None, 30.0)
    assert unfiltered.r > 0.98
    assert unfiltered.r_chimera > unfiltered.r
    truth, _ = read_mrc(score.truth_map)
    inside = soft_sphere(BOX, score.radius / VOXEL, 0) > 0
    first, second = (lowpass(volume, 30.0, VOXEL)[inside] for volume in (score.aligned, truth))
    assert thirty.r == pytest.approx(np.corrcoef(first, second)[0, 1], abs=1e-5)
    assert thirty.r > unfiltered.r
    assert score.resolution_05 is not None
    assert score.resolution_05 < 26.0


def test_the_flipped_hand_is_told(flipped: tuple[Evaluation, np.ndarray, np.ndarray, Path]) -> None:
    result, *_ = flipped
    score = next(s for s in result.maps if s.map.endswith("flipped.mrc"))
    assert score.hand == "mirrored"
    assert score.mirrored.correlations[0].r > 0.98
    assert score.as_is.correlations[0].r < 0.9
    notes = [note for note in result.notes if "flipped.mrc" in note and "MIRROR IMAGE fits" in note]
    assert len(notes) == 1
    assert "hand is flipped" in notes[0]
    assert not score.matched  # there is one truth, and the other map fits it better


def test_radius_is_found_and_stated(flipped: tuple[Evaluation, np.ndarray, np.ndarray, Path]) -> None:
    result, *_ = flipped
    assert {s.radius_from for s in result.maps} == {"from truth.mrc"}
    assert result.maps[0].radius == pytest.approx(ribosome().radius, abs=VOXEL)


def test_files_of_an_evaluation(flipped: tuple[Evaluation, np.ndarray, np.ndarray, Path], tmp_path: Path) -> None:
    result, *_, folder = flipped
    written = write_evaluation(result, tmp_path / "new" / "folder", save_maps=True)
    assert [path.name for path in written] == [
        "evaluation.json",
        "evaluation_fsc.png",
        "evaluation_class001_aligned.mrc",
        "evaluation_class002_aligned.mrc",
    ]
    content = json.loads(written[0].read_text())
    assert set(content) == {
        *("format", "faml_gpu", "settings", "classification", "poses", "maps", "snr", "symmetry", "notes")
    }
    assert content["maps"][0]["as_is"]["correlations"][0]["r"] == result.maps[0].as_is.correlations[0].r
    assert len(content["maps"][0]["fsc"]) == len(content["maps"][0]["frequency"]) == BOX // 2 + 1
    assert "aligned" not in content["maps"][0]
    assert imread(written[1]).std() > 0.05
    aligned, voxel = read_mrc(written[2])
    assert voxel == VOXEL
    assert metrics.correlation(aligned, read_mrc(folder / "truth.mrc")[0]) > 0.95


def test_an_empty_average_is_no_error(tmp_path: Path) -> None:
    write_mrc(tmp_path / "empty.mrc", np.zeros((BOX,) * 3), VOXEL)
    write_mrc(tmp_path / "truth.mrc", density(groel(), BOX, VOXEL), VOXEL)
    result = evaluate(tmp_path / "empty.mrc", truth_maps=[tmp_path / "truth.mrc"], radius=100.0)
    assert result.maps[0].as_is.r == 0.0
    assert result.maps[0].hand == "undecided"
    assert result.maps[0].resolution_05 is None
    assert (result.maps[0].radius, result.maps[0].radius_from) == (100.0, "given")
    json.dumps(result.to_json(), allow_nan=False)


def test_json_has_no_infinity() -> None:
    result = Evaluation({"snr": np.inf, "pairs": (1, float("nan"))}, None, [], [], [], [], [])
    assert result.to_json()["settings"] == {"snr": None, "pairs": [1, None]}


def test_symmetry_score_without_truth(tmp_path: Path) -> None:
    write_mrc(tmp_path / "map.mrc", density(groel(), 40, 8.0), 8.0)
    turn = Rotation.from_euler("ZYZ", [20, 50, 0], degrees=True).as_matrix()
    write_mrc(tmp_path / "turned.mrc", density(groel(), 40, 8.0, turn, (1.0, 0.0, -1.0)), 8.0)
    for axis, scores in (("principal", (1, 1)), ("z", (1, 0))):
        result = evaluate(
            [tmp_path / "map.mrc", tmp_path / "turned.mrc"],
            symmetry_order=7,
            symmetry_axis=axis,  # type: ignore[arg-type]
            radius=100.0,
        )
        found = [score.score for score in result.symmetry]
        assert [value > 0.9 for value in found] == [bool(score) for score in scores], (axis, found)


# --- classes ------------------------------------------------------------------------------------------------


@pytest.fixture
def flat(tmp_path: Path) -> Callable[..., Evaluation]:
    """Evaluates labels only: maps without structure, poses all the identity."""

    def run(found: list[int], truth: list[int], n_maps: int) -> Evaluation:
        n, rng = len(found), np.random.default_rng(0)
        same = np.broadcast_to(np.eye(3), (n, 3, 3))
        maps = [rng.standard_normal((12, 12, 12)).astype(np.float32) for _ in range(n_maps)]
        write_run(tmp_path / "run", names_of(n), maps, same, np.zeros((n, 3)), np.array(found))
        star = write_star(tmp_path / "truth.star", names_of(n), None, None, np.array(truth))
        return evaluate(tmp_path / "run", truth=star, pairs=0)

    return run


def test_permuted_labels_are_matched(flat: Callable[..., Evaluation]) -> None:
    """The case of `test_best_labels_and_scores_by_hand`."""
    result = flat([2, 2, 2, 0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1, 1, 2, 2, 2], 3).classification
    assert result is not None
    assert result.confusion == [[1, 3, 0], [0, 0, 2], [3, 0, 1]]
    assert [(c.number, c.label, c.particles) for c in result.classes] == [(1, 3, 4), (2, 1, 3), (3, 2, 3)]
    np.testing.assert_allclose([c.precision for c in result.classes], [3 / 4, 3 / 4, 1])
    np.testing.assert_allclose([c.recall for c in result.classes], [3 / 4, 1, 2 / 3])
    np.testing.assert_allclose([c.f1 for c in result.classes], [3 / 4, 6 / 7, 4 / 5])
    assert result.macro_f1 == pytest.approx((3 / 4 + 6 / 7 + 4 / 5) / 3)
    assert result.accuracy == pytest.approx(0.8)


def test_more_found_classes_than_true_ones(flat: Callable[..., Evaluation]) -> None:
    """True class 1 is split 3 + 2, true class 2 is found whole; a fourth found class is empty."""
    result = flat([0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1], 4).classification
    assert result is not None
    assert result.confusion == [[3, 0], [2, 0], [0, 3], [0, 0]]
    assert [c.label for c in result.classes] == [1, 3]
    assert [c.recall for c in result.classes] == [pytest.approx(3 / 5), 1.0]
    assert result.macro_precision == 1.0
    assert result.macro_f1 == pytest.approx((3 / 4 + 1) / 2)


def test_fewer_found_classes_than_true_ones(flat: Callable[..., Evaluation]) -> None:
    result = flat([0, 0, 0, 0, 0], [0, 0, 0, 1, 1], 1).classification
    assert result is not None
    assert [(c.label, c.f1) for c in result.classes] == [(1, pytest.approx(3 / 4)), (None, 0.0)]
    assert result.macro_f1 == pytest.approx(3 / 8)


def test_a_class_is_not_matched_to_one_it_has_nothing_of(flat: Callable[..., Evaluation]) -> None:
    """[[5, 1], [2, 0]]: the best assignment would give true class 2 an empty overlap."""
    result = flat([0] * 6 + [1] * 2, [0] * 5 + [1] + [0] * 2, 2).classification
    assert result is not None
    assert result.confusion == [[5, 1], [2, 0]]
    assert [c.label for c in result.classes] == [1, None]


def test_a_true_class_without_particles_does_not_count(flat: Callable[..., Evaluation]) -> None:
    result = flat([0, 0, 1], [0, 0, 2], 2).classification
    assert result is not None
    assert [(c.number, c.f1) for c in result.classes] == [(1, 1.0), (3, 1.0)]
    assert result.macro_f1 == 1.0


# --- poses and particles ------------------------------------------------------------------------------------


@pytest.fixture
def posed(tmp_path: Path) -> tuple[Path, Path]:
    """40 + 30 particles of D7 and C1, found with 5 degrees and 0.5 voxel of error, each class in a gauge of its own."""
    rng, n = np.random.default_rng(7), 70
    truth = np.repeat([0, 1], [40, 30])
    true_r, true_t = Rotation.random(n, rng).as_matrix(), rng.uniform(-2, 2, (n, 3))
    axes = rng.standard_normal((n, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    error = Rotation.from_rotvec(np.deg2rad(5.0) * axes).as_matrix()
    found_r, found_t = np.empty_like(true_r), np.empty_like(true_t)
    for k, name in enumerate(("D7", "C1")):
        of_k = truth == k
        group = metrics.point_group(name)
        pick = group[rng.integers(len(group), size=of_k.sum())]
        gauge, u = Rotation.random(None, rng).as_matrix(), rng.uniform(-3, 3, 3)
        found_r[of_k] = error[of_k] @ true_r[of_k] @ pick @ gauge.T
        found_t[of_k] = true_t[of_k] - found_r[of_k] @ u + 0.5 * axes[of_k]
    maps = [rng.standard_normal((12, 12, 12)).astype(np.float32) for _ in range(2)]
    labels = 1 - truth
    labels[:2] = 0  # two of the first structure are in the other's class, where their poses mean nothing
    run = write_run(tmp_path / "run", names_of(n), maps, found_r, found_t, labels)
    rows = rng.permutation(n)
    names = [f"/elsewhere/{names_of(n)[i]}" for i in rows]
    star = write_star(tmp_path / "data" / "truth.star", names, true_r[rows], true_t[rows], truth[rows])
    return run, star


def test_pose_errors_of_each_class_modulo_its_group(posed: tuple[Path, Path]) -> None:
    """Rows in another order and in another folder: matched by file name."""
    run, star = posed
    result = evaluate(run, truth=star, point_group=["D7", "C1"], pairs=0)
    ribosome_score, groel_score, both = result.poses
    assert (ribosome_score.label, ribosome_score.truth, ribosome_score.particles) == (1, 2, 30)
    assert (groel_score.label, groel_score.truth, groel_score.particles) == (2, 1, 38)
    assert (both.label, both.particles) == (None, 68)
    for score in result.poses:
        # 5 degrees about random axes; the gauge of 30 takes little of it.
        assert score.angle[0] == pytest.approx(5.0, abs=0.6)
        assert score.angle[1] < score.angle[0] < score.angle[2]
        assert (score.within_10, score.within_20) == (1.0, 1.0)
        assert score.shift[0] == pytest.approx(0.5 * VOXEL, abs=2.0)
    assert result.classification is not None
    assert result.classification.confusion == [[2, 30], [38, 0]]
    # As an asymmetric structure, the first is all wrong.
    wrong = evaluate(run, truth=star, pairs=0).poses[1]
    assert wrong.within_20 < 0.5


def test_particles_that_do_not_match_are_refused(posed: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = posed
    same = np.broadcast_to(np.eye(3), (70, 3, 3))
    other = write_star(tmp_path / "other.star", [f"boxes/x{i}.mrc" for i in range(70)], same)
    with pytest.raises(InputError, match=r"other\.star.*70 of the run's 70 particles are not there"):
        evaluate(run, truth=other)
    missing = write_star(tmp_path / "missing.star", names_of(69), same[:69])
    with pytest.raises(InputError, match=r"1 of the run's 70 particles are not there \(boxes/069\.mrc\)"):
        evaluate(run, truth=missing)
    twice = [*(f"/data/a/{name}" for name in names_of(70)), "/data/b/000.mrc"]
    with pytest.raises(InputError, match="file names alone are not unique"):
        evaluate(run, truth=write_star(tmp_path / "twice.star", twice, np.broadcast_to(np.eye(3), (71, 3, 3))))
    # More particles than the run has are fine.
    more = write_star(tmp_path / "more.star", [*names_of(80)[::-1]], np.broadcast_to(np.eye(3), (80, 3, 3)))
    assert evaluate(run, truth=more, pairs=0).poses


def test_same_file_names_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    """Tomogram a's 1.mrc is not b's; the truth has absolute paths, the run paths relative to its STAR file."""
    names = [f"{tomogram}/{i}.mrc" for tomogram in "ab" for i in range(5)]
    truth = np.repeat([0, 1], 5)
    same, zeros = np.broadcast_to(np.eye(3), (10, 3, 3)), np.zeros((10, 3))
    maps = [np.random.default_rng(k).standard_normal((12, 12, 12)).astype(np.float32) for k in range(2)]
    source = {"path": str(tmp_path / "data" / "particles.star")}
    run = write_run(tmp_path / "run", names, maps, same, zeros, truth, input=source)
    absolute = [str(tmp_path / "data" / name) for name in names]
    star = write_star(tmp_path / "elsewhere" / "truth.star", absolute[::-1], same, zeros, truth[::-1])
    result = evaluate(run, truth=star, pairs=0).classification
    assert result is not None
    assert result.macro_f1 == 1.0
    nowhere = [f"/nowhere/{name}" for name in names]
    with pytest.raises(InputError, match="file names alone are not unique"):
        evaluate(run, truth=write_star(tmp_path / "b.star", nowhere, same), pairs=0)


def test_snr_of_a_run(tmp_path: Path) -> None:
    """Boxes of known SNR in known poses: as true, as found in another gauge, and not with wrong poses."""
    simulation = simulate_particles([groel()], [24], box=BOX, voxel_size=VOXEL, snr=0.2, max_shift=1.0, seed=2)
    names = names_of(24)
    (tmp_path / "boxes").mkdir()
    for name, box in zip(names, simulation.boxes, strict=True):
        write_mrc(tmp_path / name, box, VOXEL)
    zeros = np.zeros(24, np.int64)
    star = write_star(tmp_path / "particles.star", names, simulation.rotations, simulation.shifts, zeros)
    gauge = Rotation.from_euler("ZYZ", [10, 80, 30], degrees=True).as_matrix()
    source = {"path": str(star), "reading": {"tilt_range": [-60, 60], "tilt_axis": "y", "voxel_size": None}}
    arguments = (names, [simulation.truth[0]], simulation.rotations @ gauge, simulation.shifts, zeros)
    run = write_run(tmp_path / "run", *arguments, input=source)
    found, true = evaluate(run, truth=star, pairs=150).snr
    assert (found.poses, found.pairs, found.particles, true.poses) == ("found", 150, 24, "true")
    # White noise and a structure well inside: 0.2, less a tenth at the wedge's edge, less what is off the band.
    for score in (found, true):
        assert score.snr_box == pytest.approx(0.2 * 0.9, rel=0.15)
        assert 0 < score.snr_error < 0.1 * score.snr
    other = np.random.default_rng(0).permutation(24)
    wrong = (names, [simulation.truth[0]], simulation.rotations[other], simulation.shifts, zeros)
    write_run(tmp_path / "wrong", *wrong, input=source)
    assert evaluate(tmp_path / "wrong", truth=star).snr[0].snr_box < 0.1
    # The same seed gives the same pairs, another one others.
    assert evaluate(run, truth=star, pairs=150).snr == [found, true]
    assert evaluate(run, truth=star, pairs=150, seed=1).snr[0].correlation != found.correlation
    # Particles that are gone are no reason not to tell the rest.
    (tmp_path / names[3]).unlink()
    gone = evaluate(run, truth=star)
    assert gone.snr == []
    assert any("particles cannot be read" in note for note in gone.notes)
    assert gone.poses


def test_tables_hold_what_was_found(posed: tuple[Path, Path]) -> None:
    run, star = posed
    confusion, classes, poses = tables(evaluate(run, truth=star, point_group=["D7", "C1"], pairs=0))
    assert confusion.rows == [["1", "2", "30"], ["2", "38", "0"]]
    # Precision 1 and 30/32, recall 38/40 and 1, F1 76/78 and 60/62.
    assert classes.rows[-1] == ["mean", "", "", "0.969", "0.975", "0.971"]
    assert [row[0] for row in poses.rows] == ["1 (true 2)", "2 (true 1)", "all"]


# --- bad input ----------------------------------------------------------------------------------------------


def test_bad_input_is_refused(posed: tuple[Path, Path], tmp_path: Path) -> None:
    run, star = posed
    rng = np.random.default_rng(0)
    small, other = tmp_path / "small.mrc", tmp_path / "other.mrc"
    write_mrc(small, rng.standard_normal((10, 10, 10)), VOXEL)
    write_mrc(other, rng.standard_normal((12, 12, 12)), 10.0)
    write_mrc(tmp_path / "flat.mrc", np.ones((12, 12, 12)), VOXEL)
    write_mrc(tmp_path / "slab.mrc", rng.standard_normal((12, 12, 10)), VOXEL)
    average = run / "run_class001.mrc"
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        (r"nowhere: does not exist, expected a run folder or a map", tmp_path / "nowhere", {}),
        (r"data: no run\.json", tmp_path / "data", {}),
        (r"small\.mrc: found a box of 10 voxels, expected 12", average, {"truth_maps": [small]}),
        (r"other\.mrc: found a voxel size of 10 A, expected 12 A", average, {"truth_maps": [other]}),
        (r"--voxel-size|found a voxel size of 12 A, expected 10 A", average, {"voxel_size": 10.0, "symmetry_order": 2}),
        (r"flat\.mrc: found the same value in every voxel", average, {"truth_maps": [tmp_path / "flat.mrc"]}),
        (r"slab\.mrc: 10 x 12 x 12 voxels, expected a cube", average, {"truth_maps": [tmp_path / "slab.mrc"]}),
        (r"missing\.mrc: cannot be read", average, {"truth_maps": [tmp_path / "missing.mrc"]}),
        (r"missing\.star: cannot be read", run, {"truth": tmp_path / "missing.star"}),
        (r"truth\.star: true poses and classes need a run folder", average, {"truth": star}),
        (r"nothing to evaluate", average, {}),
        (r"nothing to evaluate", run, {"pairs": 0}),
        (r"nothing to evaluate", [], {}),
        (r"point group: found 'X9'", run, {"truth": star, "point_group": ["X9"]}),
        (r"point group: found 3, expected one, or one for each of 2", run, {"truth": star, "point_group": ["C1"] * 3}),
        (r"class numbers up to 2, but 1 truth map", run, {"truth": star, "truth_maps": [average]}),
        (r"no run_it007_class001\.mrc", run, {"truth": star, "iteration": 7}),
        (r"--iteration: belongs to a run folder", average, {"truth_maps": [average], "iteration": 1}),
        (r"--radius: found -1", run, {"truth": star, "radius": -1.0}),
        (r"--lowpass: found 0", run, {"truth": star, "filters": [0.0]}),
        (r"--pairs: found -1", run, {"truth": star, "pairs": -1}),
        (r"--symmetry-order: found 1", run, {"truth": star, "symmetry_order": 1}),
        (r"--symmetry-axis: found 'w'", run, {"truth": star, "symmetry_axis": "w"}),
    ]
    for message, found, options in cases:
        with pytest.raises(InputError, match=message):
            evaluate(found, **options)


def test_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="found a file, expected a folder"):
        make_folder(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot write"):
        make_folder(tmp_path / "file" / "below")
