"""Halves of the particles: apart, in register, and honest about what they show."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gemmi import cif
from scipy.spatial.transform import Rotation

from faml_gpu import halves
from faml_gpu.data import ParticleSource, Poses, Posterior, Result, State
from faml_gpu.errors import InputError
from faml_gpu.fsc import lowpass
from faml_gpu.geometry import rotation_angle
from faml_gpu.half_files import write_halves
from faml_gpu.halves import (
    HalfMaps,
    Subset,
    common_lowpass,
    run_halves,
    split_halves,
    stated_halves,
    together_options,
)
from faml_gpu.io.mrc import read_mrc
from faml_gpu.io.particles import ArrayParticles, open_particles
from faml_gpu.io.star import write_particles_star
from faml_gpu.metrics import correlation, rotate_map
from faml_gpu.options import Options
from faml_gpu.plan import resolve
from faml_gpu.posteriors import best_poses, gathered, one_hot, scattered
from faml_gpu.run_folder import OutputError
from faml_gpu.simulate import density, ribosome, simulate_particles
from faml_gpu.weights import missing_wedge

BOX, VOXEL = 16, 24.0
OPTIONS = Options(iterations=3, threads=2, bandwidth=8, candidates=8)


def noise(seed: int, n: int = 20) -> ArrayParticles:
    """White noise seen through a missing wedge."""
    weight = missing_wedge(BOX, (-60.0, 60.0))
    boxes = np.random.default_rng(seed).standard_normal((n, BOX, BOX, BOX))
    seen = np.fft.irfftn(np.fft.rfftn(boxes, axes=(1, 2, 3)) * weight, s=(BOX,) * 3, axes=(1, 2, 3))
    return ArrayParticles(seen, VOXEL, weight)


# --- subsets ------------------------------------------------------------------------------------------------


def test_a_subset_is_those_particles() -> None:
    weights = np.stack([missing_wedge(BOX, (-60.0, 60.0)), missing_wedge(BOX, (-40.0, 50.0))])
    boxes = np.random.default_rng(0).standard_normal((6, BOX, BOX, BOX))
    poses = Poses(Rotation.random(6, 1).as_matrix(), np.arange(18.0).reshape(6, 3), np.array([0, 0, 0, 1, 1, 1]))
    whole = ArrayParticles(boxes, VOXEL, weights, [0, 1, 0, 1, 0, 1], poses)
    part = Subset(whole, np.array([4, 1, 3]))
    assert (len(part), part.box, part.voxel_size) == (3, BOX, VOXEL)
    batch = part.read(np.array([2, 0]))
    np.testing.assert_array_equal(batch.boxes, boxes[[3, 4]].astype(np.float32))
    np.testing.assert_array_equal(batch.weights[batch.weight_index], weights[[1, 0]])
    assert part.poses is not None
    assert part.poses.classes is not None
    np.testing.assert_array_equal(part.poses.shifts, poses.shifts[[4, 1, 3]])
    np.testing.assert_array_equal(part.poses.rotations, poses.rotations[[4, 1, 3]])
    np.testing.assert_array_equal(part.poses.classes, [1, 0, 1])
    assert Subset(ArrayParticles(boxes, VOXEL), np.array([0])).poses is None


@pytest.mark.parametrize("n", [2, 7, 40])
def test_a_split_is_even_and_the_seeds(n: int) -> None:
    half = split_halves(n, 3)
    assert sorted(np.bincount(half, minlength=3)[1:]) == [n // 2, (n + 1) // 2]
    np.testing.assert_array_equal(split_halves(n, 3), half)
    if n == 40:
        assert (split_halves(n, 4) != half).any()
        assert np.diff(half).any()
        assert (half != np.arange(n) % 2 + 1).any()  # not by turns


def test_halves_the_star_file_states(small_star: Path, tmp_path: Path) -> None:
    source = open_particles(small_star, tilt_range=(-60, 60))
    assert stated_halves(source) is None
    stated = [2, 1, 1, 2, 2, 2]

    def with_subsets(values: list[Any]) -> Any:
        path = small_star.with_name("stated.star")
        write_particles_star(path, source.table, {"rlnRandomSubset": values})
        return open_particles(path, tilt_range=(-60, 60))

    found = with_subsets(stated)
    np.testing.assert_array_equal(stated_halves(found), stated)
    np.testing.assert_array_equal(stated_halves(Subset(found, np.array([1, 4]))), [1, 2])
    with pytest.raises(InputError, match=r"particle 3\): rlnRandomSubset is 3, expected 1 or 2"):
        stated_halves(with_subsets([1, 2, 3, 1, 2, 1]))


def test_a_posterior_taken_apart_and_put_together_is_itself() -> None:
    rng = np.random.default_rng(4)
    count = np.array([2, 1, 3, 1, 2])
    rows = int(count.sum())
    whole = Posterior(
        particle=np.repeat(np.arange(5), count),
        class_index=rng.integers(0, 2, rows),
        rotations=Rotation.random(rows, 5).as_matrix(),
        shifts=rng.standard_normal((rows, 3)),
        probability=rng.random(rows),
        log_likelihood=rng.standard_normal(5),
        n_significant=count,
        class_probability=rng.random((5, 2)),
    )
    sets = [np.array([1, 4]), np.array([0, 2]), np.array([], np.int64), np.array([3])]
    part = gathered(whole, sets[0])
    np.testing.assert_array_equal(part.particle, [0, 1, 1])
    np.testing.assert_array_equal(part.shifts, whole.shifts[[2, 7, 8]])
    np.testing.assert_array_equal(part.log_likelihood, whole.log_likelihood[[1, 4]])
    again = scattered([(members, gathered(whole, members)) for members in sets])
    for field in fields(Posterior):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(whole, field.name), field.name)


# --- the common start ---------------------------------------------------------------------------------------


def test_the_common_start_leaves_shells_to_compare() -> None:
    # A mask of 100 A: a third of its diameter is shell 9.6 of 640 A, twice that is 19; at most half of those the
    # alignment uses, but not less than what tells orientations apart.
    size = 64 * 10.0
    for options, shells in [
        (Options(mask_radius=200.0), 10),
        (Options(mask_radius=100.0), 15),  # half of 31
        (Options(mask_radius=100.0, resolution=size / 15), 10),
        (Options(mask_radius=200.0, resolution=size / 14, starts=5, preset="paper"), 7),
    ]:
        found = common_lowpass(options, 64, 10.0)
        assert int(size / found) == shells
        together = together_options(options, 64, 10.0, found)
        assert resolve(together, 64, 10.0)["r_max"] == shells
    assert common_lowpass(Options(), 64, 10.0, 75.0) == 75.0
    assert resolve(together_options(Options(), 64, 10.0, 75.0), 64, 10.0)["r_max"] == 8
    # Coarser is left as it is.
    assert resolve(together_options(Options(resolution=100.0), 64, 10.0, 75.0), 64, 10.0)["r_max"] == 6
    for wrong in (0.0, -1.0, 21.0, 214.0):
        with pytest.raises(InputError, match="initial-lowpass: found"):
            common_lowpass(Options(), 64, 10.0, wrong)
    assert common_lowpass(Options(), 64, 10.0, size / 29) == size / 29


@pytest.mark.parametrize(
    ("symmetry", "helix", "degrees", "expected"),
    [
        ("C1", None, [0, 0, 25], "as found"),
        ("C7", None, [0, 0, 25], 25.0),
        ("C7", None, [4, -3, 25], 25.0),
        ("C1", (20.0, 30.0), [0, 0, -70], -70.0),
        ("D7", None, [0, 0, 51], 0.0),
        ("O", None, [3, 2, 88], 0.0),
    ],
)
def test_registration_leaves_the_axes_of_an_imposed_symmetry(
    symmetry: str, helix: Any, degrees: list[float], expected: Any
) -> None:
    found, shift = Rotation.from_rotvec(np.deg2rad(degrees)).as_matrix(), np.array([0.5, -0.2, 0.9])
    rotation, moved = halves._keeping_axes(found, shift, Options(symmetry=symmetry, helix=helix))
    if expected == "as found":
        np.testing.assert_array_equal(rotation, found)
        np.testing.assert_array_equal(moved, shift)
        return
    np.testing.assert_allclose(rotation[2], [0, 0, 1], atol=1e-12)
    about = Rotation.from_rotvec([0, 0, np.deg2rad(expected)]).as_matrix()
    assert rotation_angle(rotation, about) < 0.2  # of a tilt of 5 degrees, second order
    np.testing.assert_allclose(moved, [0, 0, 0.9 if expected else 0])


def test_registration_may_turn_a_cyclic_structure_over() -> None:
    over = Rotation.from_rotvec([np.pi * np.cos(0.3), np.pi * np.sin(0.3), 0]).as_matrix()
    tilted = over @ Rotation.from_rotvec(np.deg2rad([3.0, 2.0, 0.0])).as_matrix()
    rotation, _ = halves._keeping_axes(tilted, np.zeros(3), Options(symmetry="C7"))
    np.testing.assert_allclose(rotation[:, 2], [0, 0, -1], atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)
    assert rotation_angle(rotation, over) < 0.2


# --- runs ---------------------------------------------------------------------------------------------------


class Runs:
    """`faml.run` with its arguments written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: Any = None) -> None:
        self.calls: list[dict[str, Any]] = []
        original = run or halves.faml.run

        def recorded(particles: ParticleSource, options: Options, **rest: Any) -> Result:
            self.calls.append({"particles": particles, "options": options, **rest})
            return original(particles, options, **rest)

        monkeypatch.setattr(halves.faml, "run", recorded)


def test_halves_share_no_particle_and_one_start(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, source, seen = Runs(monkeypatch), noise(0, 9), []
    result = run_halves(
        source,
        replace(OPTIONS, iterations=1),
        initial_lowpass=120.0,
        on_iteration=lambda half, checkpoint: seen.append((half, checkpoint.state.iteration)),
    )
    first, second = runs.calls
    a, b = set(first["particles"].indices), set(second["particles"].indices)
    assert not a & b
    assert a | b == set(range(9))
    assert abs(len(a) - len(b)) == 1
    np.testing.assert_array_equal(np.flatnonzero(result.half == 1), sorted(a))
    np.testing.assert_array_equal(first["reference"], second["reference"])
    assert first["initial_lowpass"] == second["initial_lowpass"] == 120.0
    assert first["options"].seed != second["options"].seed
    assert seen == [(1, 1), (2, 1)]
    # The start is that of all particles, and holds nothing beyond its low-pass.
    assert np.abs(first["reference"]).max() > 0
    outside = first["reference"] - lowpass(first["reference"], 16 * 24.0 / 3.5, 24.0, edge=0)
    assert np.abs(outside).max() < 1e-3 * np.abs(first["reference"]).max()


def test_given_halves_are_kept(monkeypatch: pytest.MonkeyPatch, small_star: Path) -> None:
    source = open_particles(small_star, tilt_range=(-60, 60))
    path = small_star.with_name("stated.star")
    write_particles_star(path, source.table, {"rlnRandomSubset": [2, 1, 1, 2, 2, 2]})
    stated = open_particles(path, tilt_range=(-60, 60))
    options = replace(OPTIONS, iterations=1)
    np.testing.assert_array_equal(run_halves(stated, options).half, [2, 1, 1, 2, 2, 2])
    given = np.array([1, 1, 1, 1, 2, 2])
    np.testing.assert_array_equal(run_halves(stated, options, half=given).half, given)


@pytest.fixture(scope="module")
def signal() -> HalfMaps:
    """24 boxes of a ribosome at a high signal-to-noise ratio, started from it low-passed."""
    data = simulate_particles([ribosome()], [24], box=BOX, voxel_size=VOXEL, snr=0.5, seed=3, max_shift=1.0)
    source = ArrayParticles(data.boxes, VOXEL, data.weight)
    return run_halves(
        source,
        replace(OPTIONS, iterations=4, candidates=12, mask_radius=130.0),
        reference=density(ribosome(), BOX, VOXEL),
        initial_lowpass=110.0,
        b_factor=-500.0,
    )


def test_a_structure_shows_more_than_its_start(signal: HalfMaps) -> None:
    assert signal.beyond_start
    assert signal.resolution < 60  # Nyquist is 48, the start 110
    truth, mask = density(ribosome(), BOX, VOXEL), np.ones((BOX,) * 3)
    assert correlation(signal.average, truth, mask) > max(correlation(m, truth, mask) for m in signal.maps) - 0.01
    # Of the whole box, noise around the structure and all; which cells `joint` draws makes it 0.8995 or 0.902.
    assert correlation(signal.average, truth, mask) > 0.89
    assert correlation(*signal.maps) > 0.8


@pytest.mark.parametrize("start", ["random", "wrong"])
@pytest.mark.parametrize("seed", [0, 1])
def test_noise_shows_nothing_beyond_its_start(start: str, seed: int) -> None:
    """Model bias: the halves do agree, on the start they share. Nothing finer than its low-pass may be reported."""
    reference = None if start == "random" else density(ribosome(), BOX, VOXEL)
    lowest = 120.0  # shell 3
    result = run_halves(noise(seed), replace(OPTIONS, seed=seed), reference=reference, initial_lowpass=lowest)
    assert result.curves.corrected[2] > 0.5  # the bias is there
    assert not result.beyond_start
    assert result.resolution == result.start_resolution == lowest
    finer = result.final - lowpass(result.final, 16 * 24.0 / 4.5, 24.0, edge=0)
    assert np.abs(finer).max() < 0.01 * np.abs(result.final).max()


def known_poses(data: Any, gauge: np.ndarray, offset: np.ndarray) -> Any:
    """A run that finds the true poses; those of the second half with respect to a turned and moved average."""

    def run(particles: Subset, options: Options, **rest: Any) -> Result:
        i = particles.indices
        rotations, shifts, volume = data.rotations[i], data.shifts[i], data.truth[0]
        if 0 not in i:  # half 2: average = (Q, u) truth, so that R' Q = R and t' + R' u = t
            rotations = rotations @ gauge.T
            shifts = shifts - rotations @ offset
            volume = rotate_map(volume, gauge, offset)
        posterior = one_hot(np.zeros(len(i), np.int64), rotations, shifts, 1, known=True)
        state = State(1, volume[None], np.ones(1), np.ones(9), 1.0)
        return Result(volume[None], best_poses(posterior), posterior, state, [], None, {}, VOXEL)

    return run


def test_the_second_half_is_brought_into_the_frame_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    data = simulate_particles([ribosome()], [16], box=BOX, voxel_size=VOXEL, snr=5.0, seed=2, max_shift=1.0)
    gauge = Rotation.from_rotvec(np.deg2rad([20.0, -35.0, 60.0])).as_matrix()
    offset = np.array([0.8, -0.5, 0.3])
    Runs(monkeypatch, known_poses(data, gauge, offset))
    source = ArrayParticles(data.boxes, VOXEL, data.weight)
    half = np.arange(16) % 2 + 1
    result = run_halves(source, OPTIONS, half=half, initial_lowpass=80.0)
    # Splines on a turned map of a box this small: a few degrees.
    assert rotation_angle(result.pose[0], gauge) < 4
    np.testing.assert_allclose(result.pose[1], offset, atol=0.2)
    assert rotation_angle(result.best.rotations, data.rotations).max() < 4
    np.testing.assert_allclose(result.best.shifts, data.shifts, atol=0.25)
    assert correlation(*result.maps) > 0.9
    assert correlation(result.average, data.truth[0]) > 0.9


@pytest.mark.parametrize(
    ("half", "message"),
    [([1, 1, 1, 1], "found 4 and 0"), ([1, 2, 3, 1], "expected 1 or 2"), ([1, 2], "expected 1 or 2")],
)
def test_impossible_halves_are_refused(half: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_halves(noise(0, 4), OPTIONS, half=np.array(half))


def test_a_mask_of_another_box_and_a_low_pass_of_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="mask: found a box of"):
        run_halves(noise(0, 4), OPTIONS, mask=np.ones((8, 8, 8), np.float32))
    with pytest.raises(InputError, match="initial-lowpass: found -1"):
        run_halves(noise(0, 4), OPTIONS, initial_lowpass=-1.0)
    with pytest.raises(InputError, match="b-factor: found 1e"):
        run_halves(noise(0, 4), OPTIONS, b_factor=1e9)


def test_one_particle_cannot_be_halved() -> None:
    with pytest.raises(InputError, match="found 1 and 0"):
        run_halves(noise(0, 1), OPTIONS)


# --- files --------------------------------------------------------------------------------------------------


def test_files_have_relions_names(signal: HalfMaps, tmp_path: Path) -> None:
    written = write_halves(signal, tmp_path)
    assert {path.name for path in written} == {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in written} == {
        "run_half1_class001_unfil.mrc",
        "run_half2_class001_unfil.mrc",
        "run_class001.mrc",
        "postprocess.mrc",
        "postprocess.star",
        "postprocess_fsc.json",
        "postprocess_fsc.png",
    }
    volume, voxel = read_mrc(tmp_path / "run_half2_class001_unfil.mrc")
    np.testing.assert_array_equal(volume, signal.maps[1])
    assert voxel == pytest.approx(VOXEL)
    star = cif.read_file(str(tmp_path / "postprocess.star"))
    general = star.find_block("general")
    assert float(general.find_value("_rlnFinalResolution")) == pytest.approx(signal.resolution)
    assert cif.as_string(general.find_value("_rlnUnfilteredMapHalf1")) == "run_half1_class001_unfil.mrc"
    assert float(general.find_value("_rlnBfactorUsedForSharpening")) == -500.0
    assert general.find_value("_rlnMaskName") is None
    curve = [float(v) for v in star.find_block("fsc").find_values("_rlnFourierShellCorrelationCorrected")]
    np.testing.assert_allclose(curve, signal.curves.corrected, atol=1e-9)
    second = write_halves(signal, tmp_path, class_number=2, root="postprocess_class002", mask_name="my mask.mrc")
    general = cif.read_file(str(tmp_path / "postprocess_class002.star")).find_block("general")
    assert cif.as_string(general.find_value("_rlnMaskName")) == "my mask.mrc"
    assert not {path.name for path in second} & {path.name for path in written}
    with pytest.raises(OutputError, match="cannot write"):
        write_halves(signal, tmp_path / "nowhere")


def test_the_final_map_is_weighted_and_sharpened(signal: HalfMaps) -> None:
    """Per shell: gain sqrt(2 F / (1 + F)) exp(-B s² / 4), s = shell / extent, until the resolution's shell."""
    weight = np.sqrt(2 * signal.curves.corrected / (1 + signal.curves.corrected))
    end = int(BOX * VOXEL / signal.resolution)
    for shell in range(2, end - 1):
        # A coefficient on an axis: |xi| is the shell's number, so its gain is known exactly.
        before, after = (np.fft.rfftn(v)[0, 0, shell] for v in (signal.average, signal.final))
        s = shell / (BOX * VOXEL)
        assert after / before == pytest.approx(weight[shell] * np.exp(500.0 * s**2 / 4), rel=1e-3)
