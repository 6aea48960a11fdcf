"""Whole simulated data sets: what the files hold against the truth they state."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.fft
import starfile

from faml_gpu.data import Posterior
from faml_gpu.errors import InputError
from faml_gpu.fourier import full_band, inverse_transform, make_support, transform
from faml_gpu.fsc import fsc, lowpass
from faml_gpu.io.mrc import read_mrc
from faml_gpu.io.particles import open_particles
from faml_gpu.masks import soft_sphere
from faml_gpu.maximization import direct_average, rotate_back
from faml_gpu.simulate import (
    DataSet,
    Optics,
    SimulationOptions,
    TiltSeries,
    density,
    groel,
    load_structure,
    ribosome,
    simulate_data_set,
)
from faml_gpu.simulate.data_set import FastBoxes, TiltSeriesBoxes, _batch_size
from faml_gpu.simulate.gridding import fourier_grid

SMALL = {"box": 24, "voxel_size": 14.0, "tilt_step": 10.0}


def simulate(folder: Path, structures: Any = ("groel", "ribosome"), counts: Any = (2, 3), **changes: Any) -> DataSet:
    call = {key: changes.pop(key) for key in ("threads", "overwrite", "progress", "say", "device") if key in changes}
    options = SimulationOptions(**(SMALL | {"snr": 0.1} | changes))
    return simulate_data_set(structures, counts, folder, options, **({"device": "cpu"} | call))


def boxes(made: DataSet) -> np.ndarray:
    return np.stack([read_mrc(path)[0] for path in sorted((made.star.parent / "particles").iterdir())])


def average(made: DataSet, padding: int = 3) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Class averages in the poses that truth.star states, by the package's own maximisation step.

    And the truth as the weights say the averages have it: a box holds its weight w of the signal, the averages are
    sums of w^2 X over those of w^2, so they hold the sum of w^3 over that of w^2, voxel by voxel.
    """
    particles = open_particles(made.truth_star, use_poses=True)
    poses, n = particles.poses, len(particles)
    batch = particles.read(np.arange(n))
    support = make_support(particles.box, full_band(particles.box))
    one = np.ones(n)
    posterior = Posterior(
        *(np.arange(n), poses.classes, poses.rotations, poses.shifts, one, one, np.ones(n, np.int64)),
        np.eye(len(made.structures))[poses.classes],
    )

    def back(weights: np.ndarray) -> Any:
        spectra = transform(batch.boxes)
        return rotate_back(
            spectra, weights, batch.weight_index, None, posterior, support, padding, len(made.structures)
        )

    sums, weights = back(batch.weights)
    cubes = back(batch.weights**1.5)[1]
    mass = np.bincount(poses.classes).astype(float)
    truth = np.stack([read_mrc(made.star.parent / f"truth_class{k + 1:03d}.mrc")[0] for k in range(len(mass))])
    left = direct_average(cubes.astype(np.complex128), weights, mass) * support.gather(transform(truth))
    return tuple(
        list(inverse_transform(support.scatter(spectra), particles.box))
        for spectra in (direct_average(sums, weights, mass), left)
    )


@pytest.mark.parametrize(
    "changes",
    [{"fast": True}, {"ctf": False, "mtf": False, "tilt_axis": "x", "tilt_range": (-50.0, 70.0)}],
    ids=["fast", "tilt series"],
)
def test_noise_free_particles_average_to_the_truth(tmp_path: Path, changes: dict[str, Any]) -> None:
    """In the true poses, below half the band: trilinear interpolation in the averaging errs above."""
    settings = {"box": 32, "voxel_size": 12.0, "tilt_step": 3.0, "snr": math.inf, "max_shift": 24.0} | changes
    made = simulate(tmp_path, ["ribosome", "groel"], [20, 12], **settings)
    mask = soft_sphere(32, 13.0, 2.0) > 0.5
    for k, found in enumerate(average(made)[0]):
        truth = read_mrc(tmp_path / f"truth_class{k + 1:03d}.mrc")[0]
        a, b = (lowpass(volume, 48.0, 12.0)[mask] for volume in (found, truth))
        assert np.corrcoef(a, b)[0, 1] > 0.99
        assert (a @ b) / (b @ b) == pytest.approx(1.0, abs=0.15)
        # The phantom itself, not only what was written of it.
        phantom = (ribosome, groel)[k]()
        np.testing.assert_allclose(
            np.corrcoef(density(phantom, 32, 12.0, resolution=36.0).ravel(), truth.ravel())[0, 1], 1.0, atol=1e-3
        )


@pytest.mark.parametrize(
    ("box", "voxel_size", "optics"), [(40, 8.0, {}), (32, 12.0, {"defocus": 3.0})], ids=["defaults", "3 um"]
)
def test_with_a_ctf_the_averages_are_the_truth_as_far_as_the_weights_say(
    tmp_path: Path, box: int, voxel_size: float, optics: dict[str, float]
) -> None:
    """The CTF is the same for all particles: what it leaves little of stays little, whatever their poses.

    The lowest frequencies, and with the defaults the first zero at 34.7 A, which half the band (32 A) reaches beyond.
    """
    settings = {"box": box, "voxel_size": voxel_size, "tilt_step": 3.0, "snr": math.inf}
    made = simulate(tmp_path, ["ribosome", "groel"], [16, 12], **settings, max_shift=2 * voxel_size, **optics)
    soft = soft_sphere(box, 13 / 32 * box, 4.0)
    mask = soft > 0.5
    for k, (found, expected) in enumerate(zip(*average(made), strict=True)):
        truth = read_mrc(tmp_path / f"truth_class{k + 1:03d}.mrc")[0]
        a, b, whole = (lowpass(volume, 4 * voxel_size, voxel_size)[mask] for volume in (found, expected, truth))
        # Not 1: the edge of a box cuts off some of what the CTF spreads, and the averaging interpolates.
        assert np.corrcoef(a, b)[0, 1] > 0.99
        assert (a @ b) / (b @ b) == pytest.approx(1.0, abs=0.1)
        # The whole truth is neither in their shape nor in their size.
        assert np.corrcoef(a, whole)[0, 1] < 0.99
        assert (a @ whole) / (whole @ whole) < 0.8
        # Also where little is left: at the zero 0.97, and beyond it, up to 3/4 of the band, 0.96 (interpolation). Were
        # the phases between the zeros not turned round, it would be -0.9 there.
        assert fsc(found, expected, soft)[1 : 3 * box // 8].min() > 0.9


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "tilt series"])
def test_the_snr_is_that_asked_for(tmp_path: Path, fast: bool) -> None:
    """Variance over variance in the files: with the same seed, the boxes without noise are the signal of those with."""
    asked = 0.04
    noisy = simulate(tmp_path / "a", counts=[12, 12], fast=fast, snr=asked, seed=5)
    clean = simulate(tmp_path / "b", counts=[12, 12], fast=fast, snr=math.inf, seed=5)
    for k in range(2):
        signal = boxes(clean)[clean.classes == k].astype(np.float64)
        with_noise = boxes(noisy)[noisy.classes == k].astype(np.float64)
        # Truth maps are on the scale of the boxes: so the signal can be taken away.
        truth = [read_mrc(made.star.parent / f"truth_class{k + 1:03d}.mrc")[0] for made in (noisy, clean)]
        scale = truth[0].std() / truth[1].std()
        signal *= scale
        found = signal.var(axis=(1, 2, 3)).mean() / (with_noise - signal).var(axis=(1, 2, 3)).mean()
        assert found == pytest.approx(asked, rel=0.05)
        assert noisy.snr[k] == pytest.approx(found, rel=1e-3)
        assert (with_noise - signal).var() == pytest.approx(1.0, rel=0.05)
    assert np.all(np.isinf(clean.snr))
    report = json.loads((tmp_path / "a" / "simulation.json").read_text())
    assert [entry["snr_measured"] for entry in report["classes"]] == pytest.approx(noisy.snr.tolist())
    assert report["snr_asked"] == asked


def test_no_energy_outside_the_weight(tmp_path: Path) -> None:
    made = simulate(tmp_path, tilt_range=(-40.0, 60.0))
    particles = open_particles(made.star)
    batch = particles.read(np.arange(5))
    power = np.abs(scipy.fft.rfftn(batch.boxes, axes=(1, 2, 3)))
    assert len(batch.weights) == 1
    outside = batch.weights[0] == 0
    assert 0.2 < outside.mean() < 0.8
    assert power[:, outside].max() < 1e-5 * power.max()
    # Opened without poses there is nothing the wedge check has to say; it would of the other sign.
    assert particles.warnings == ()
    assert open_particles(made.star, tilt_range=None).poses is None


def test_the_files_are_what_other_programs_read(tmp_path: Path) -> None:
    made = simulate(tmp_path, seed=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("particles", "particles.star", "simulation.json", "truth.star"),
        *("truth_class001.mrc", "truth_class002.mrc", "weight.mrc"),
    ]
    without, truth = (starfile.read(path) for path in (made.star, made.truth_star))
    assert list(without["particles"].columns) == ["rlnImageName", "rlnCtfImage", "rlnOpticsGroup"]
    optics = without["optics"]
    assert optics["rlnImagePixelSize"].item() == 14.0
    assert optics["rlnAmplitudeContrast"].item() == 0.07
    table = truth["particles"]
    assert table["rlnClassNumber"].tolist() == [1, 1, 2, 2, 2]
    assert table["rlnImageName"].tolist() == [f"particles/{i:06d}.mrc" for i in range(1, 6)]
    particles = open_particles(made.truth_star, use_poses=True)
    np.testing.assert_allclose(particles.poses.rotations, made.rotations, atol=1e-8)
    np.testing.assert_allclose(particles.poses.shifts, made.shifts, atol=1e-8)
    assert np.abs(made.shifts).max() <= 2
    np.testing.assert_array_equal(particles.poses.classes, made.classes)
    np.testing.assert_allclose(particles.read(np.arange(1)).weights[0], made.weight, atol=1e-6)
    report = json.loads((tmp_path / "simulation.json").read_text())
    assert report["options"]["seed"] == 3
    assert report["options"]["resolution"] == 42.0
    assert report["options"]["max_shift"] == 28.0
    assert report["classes"][1]["name"] == "ribosome"
    assert report["tilts"][:2] == [-60.0, -50.0]
    assert report["versions"]["gemmi"]


def test_same_seed_same_files_whatever_the_threads(
    tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    for name, options in {"a": {"threads": 1}, "b": {"threads": 2}, "c": {"seed": 1}}.items():
        simulate(tmp_path / name, **options)
    first, second, other = (contents(tmp_path / name / "particles") for name in "abc")
    assert first == second
    assert all(first[name] != other[name] for name in first)
    # More particles leave the poses of those before as they are.
    more = simulate(tmp_path / "d", counts=[2, 5])
    np.testing.assert_array_equal(more.rotations[:5], simulate(tmp_path / "e").rotations)


@pytest.mark.parametrize("axis", ["x", "y", "z"])
def test_turns_about_an_axis_only(tmp_path: Path, axis: str) -> None:
    made = simulate(tmp_path, ["groel", "ribosome"], [60], about_axis=axis, fast=True, box=20, voxel_size=18.0)
    target = np.eye(3)["xyz".index(axis)]
    for k, structure in enumerate(made.structures):
        own = made.rotations[made.classes == k]
        np.testing.assert_allclose(own @ structure.axis, np.tile(target, (60, 1)), atol=1e-9)
        turns = own @ own[0].T
        np.testing.assert_allclose(np.linalg.det(turns), 1.0)
        # Uniform: mean of exp(i angle) is near 0, 1 / sqrt(60) in the mean.
        plane = [i for i in range(3) if target[i] == 0]
        angles = np.arctan2(turns[:, plane[1], plane[0]], turns[:, plane[0], plane[0]])
        assert abs(np.exp(1j * angles).mean()) < 0.35
    assert (tmp_path / "simulation.json").read_text().count("principal_axis") == 2


def test_any_orientation_is_haar(tmp_path: Path) -> None:
    made = simulate(tmp_path, ["groel"], [200], fast=True, box=16, voxel_size=20.0)
    # E R = 0 and E R_ij^2 = 1/3.
    assert np.abs(made.rotations.mean(axis=0)).max() < 4 / math.sqrt(3 * 200)
    np.testing.assert_allclose((made.rotations**2).mean(axis=0), 1 / 3, atol=0.1)


def test_overwriting_leaves_other_files(tmp_path: Path) -> None:
    simulate(tmp_path, fast=True)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "particles" / "mine.mrc").write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        simulate(tmp_path, fast=True)
    simulate(tmp_path, ["groel"], [1], fast=True, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "particles").iterdir()) == ["000001.mrc", "mine.mrc"]
    assert not (tmp_path / "truth_class002.mrc").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"snr": 0.0}, "--snr: found 0, expected more than 0"),
        ({"snr": -1.0}, "--snr"),
        ({"snr": math.nan}, "--snr"),
        ({"tilt_step": 121.0}, "--tilt-step: found 121 degrees"),
        ({"tilt_range": (60.0, -60.0)}, "--tilt-range"),
        ({"tilt_step": 121.0, "fast": True}, "--tilt-step"),
        ({"box": 9}, "--box: found 9"),
        ({"voxel_size": 0.0}, "--voxel-size"),
        ({"resolution": 20.0}, "--resolution: found 20 A, expected 28 A"),
        ({"max_shift": -1.0}, "--max-shift"),
        ({"max_shift": 150.0}, "--max-shift"),
        ({"counts": [0, 2]}, "--count: found 0"),
        ({"counts": [1, 2, 3]}, "--count: given 3 times for 2 structures"),
        ({"structures": []}, "structures: found none"),
        ({"structures": ["groel", "nonsense"]}, "no phantom of that name"),
        ({"about_axis": "w"}, "--about-axis"),
        ({"tilt_axis": "z"}, "--tilt-axis"),
        ({"defocus": math.nan}, "--defocus"),
        ({"voltage": 0.0}, "--voltage"),
        ({"cs": -1.0}, "--cs"),
        ({"amplitude_contrast": 7.0}, "--amplitude-contrast"),
        ({"wiener": 0.0}, "--wiener"),
        ({"seed": -1}, "--seed"),
        ({"device": "gpu"}, "option device"),
    ],
)
def test_faults_are_named_before_anything_is_written(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        simulate(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file_or_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="found a file"):
        simulate(tmp_path / "file")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("faml_gpu.simulate.data_set.write_mrc", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left"):
        simulate(tmp_path / "out", fast=True)
    assert not (tmp_path / "out" / "particles.star").exists()


def test_a_ctf_wider_than_the_images_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="spreads detail of 42 A over 5"):
        simulate(tmp_path, ["groel"], [1], defocus=120.0)


def test_an_odd_box_and_a_filament(tmp_path: Path) -> None:
    made = simulate(tmp_path, ["tmv"], [1], box=21, voxel_size=14.0)
    found = boxes(made)
    assert found.shape == (1, 21, 21, 21)
    assert read_mrc(tmp_path / "truth_class001.mrc")[0].shape == (21, 21, 21)


def test_progress_is_told(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    lines: list[str] = []
    simulate(tmp_path, fast=True, progress=lambda *call: calls.append(call), say=lines.append)
    assert calls[-5:] == [("boxes", i, 5) for i in range(1, 6)]
    assert any("principal axis" in line for line in lines)
    assert sum("measured on the boxes" in line for line in lines) == 2


class HostMatrix:
    """Stands in for CuPy's sparse matrix, which the emulated GPU does not have."""

    def __init__(self, matrix: Any) -> None:
        self._matrix = matrix

    def __matmul__(self, dense: Any) -> Any:
        import cupy

        assert isinstance(dense, cupy.ndarray)
        return cupy.asarray(self._matrix @ dense.get())


@pytest.fixture
def sparse_gpu(emulated_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The emulated GPU with a sparse matrix."""
    sparse = ModuleType("cupyx.scipy.sparse")
    sparse.csr_matrix = HostMatrix  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupyx.scipy.sparse", sparse)
    monkeypatch.setattr(sys.modules["cupyx.scipy"], "sparse", sparse, raising=False)
    return emulated_gpu


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "tilt series"])
def test_on_an_emulated_gpu(tmp_path: Path, sparse_gpu: Any, fast: bool) -> None:
    options = {"structures": ["groel"], "counts": [2], "box": 20, "fast": fast, "tilt_step": 20.0}
    found = boxes(simulate(tmp_path / "a", device="cuda", **options))
    expected = boxes(simulate(tmp_path / "b", **options))
    # float32 in both, summed in another order; the noise has variance 1.
    np.testing.assert_allclose(found, expected, atol=1e-4)


loaded_once = functools.cache(load_structure)


def in_batches(folder: Path, size: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> np.ndarray:
    monkeypatch.setattr("faml_gpu.simulate.data_set._batch_size", lambda *_: size)
    monkeypatch.setattr("faml_gpu.simulate.data_set.load_structure", loaded_once)
    # A filament is cut out of a larger field; five are not a whole number of twos.
    settings = {"structures": ["groel", "tmv"], "counts": [5], "box": 20, "tilt_step": 20.0, "snr": 1.0}
    return boxes(simulate(folder / str(size), **settings, **options))


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "tilt series"])
def test_boxes_do_not_depend_on_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    one = in_batches(tmp_path, 1, monkeypatch, fast=fast)
    assert len(one) == 10
    assert np.abs(one[:5] - one[5:]).max() > 1  # particles of the same number share nothing
    for size in (2, 5):
        # Rounding of float32: noise and signal have variance 1.
        np.testing.assert_allclose(in_batches(tmp_path, size, monkeypatch, fast=fast), one, atol=1e-5)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "tilt series"])
def test_a_gpu_works_batch_by_batch(
    tmp_path: Path, sparse_gpu: Any, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    """The same boxes, and as few steps as there are batches: what waits for a GPU is the number of launches."""
    fourier = sys.modules["cupyx.scipy.fft"]
    sizes, real = [], fourier.irfftn

    def counted(spectra: Any, *arguments: Any, **options: Any) -> Any:
        sizes.append(spectra.shape[0])
        return real(spectra, *arguments, **options)

    monkeypatch.setattr(fourier, "irfftn", counted)
    one = in_batches(tmp_path, 1, monkeypatch, fast=fast, device="cuda")
    singly = len(sizes)
    np.testing.assert_allclose(in_batches(tmp_path, 5, monkeypatch, fast=fast, device="cuda"), one, atol=1e-5)
    assert set(sizes[:singly]) == {1}
    assert set(sizes[singly:]) == {5}
    assert singly == 5 * (len(sizes) - singly) > 0


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "tilt series"])
def test_batches_fit_the_memory(sparse_gpu: Any, fast: bool) -> None:
    """Many particles on a GPU that has room, one where there is none, and what a batch takes is as foretold."""
    import cupy

    series = TiltSeries(24, 14.0, np.arange(-60.0, 61.0, 20.0), optics=Optics(), xp=cupy)
    model = FastBoxes(24, 24, (-60.0, 60.0), "y", cupy) if fast else TiltSeriesBoxes(series)
    grid = fourier_grid(cupy.asarray(density(groel(), 24, 14.0)))
    assert _batch_size(model, grid.values.get()) == 1
    size = 8
    before, sparse_gpu.peak = sparse_gpu.used, sparse_gpu.used
    model.noise([np.random.default_rng(i) for i in range(size)])
    assert 0.3 * size * model.particle_bytes < sparse_gpu.peak - before < size * model.particle_bytes
    sparse_gpu.memory = before + 16 * (size * model.particle_bytes + 1)
    assert _batch_size(model, grid.values) == size
    sparse_gpu.memory = before + 1
    assert _batch_size(model, grid.values) == 1


def test_on_a_gpu(tmp_path: Path, gpu: str) -> None:
    for fast in (True, False):
        options = {"structures": ["groel", "tmv"], "counts": [2], "fast": fast}
        found = boxes(simulate(tmp_path / f"a{fast}", device=gpu, **options))
        expected = boxes(simulate(tmp_path / f"b{fast}", **options))
        np.testing.assert_allclose(found, expected, atol=1e-3)
