"""Whole runs on a GPU, emulated and real, against the same on the CPU: same start, same answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import faml_gpu
from faml_gpu import array_backend, dry_run, faml, fourier, noise, plan, voronoi
from faml_gpu.data import Groups, Result
from faml_gpu.errors import InputError
from faml_gpu.geometry import rotation_angle
from faml_gpu.io.particles import ArrayParticles, open_particles
from faml_gpu.options import Options
from faml_gpu.simulate import SimulationOptions, groel, ribosome, simulate_data_set, simulate_particles
from faml_gpu.stopping import Stopping

BOX, VOXEL, BANDWIDTH = 20, 16.0, 10
FAST = SimulationOptions(box=BOX, voxel_size=VOXEL, snr=1.0, max_shift=16.0, fast=True, seed=3)


@pytest.fixture(scope="module")
def particles() -> ArrayParticles:
    made = simulate_particles([groel(), ribosome()], [4, 3], box=BOX, voxel_size=VOXEL, snr=1.0, max_shift=3.0, seed=3)
    return ArrayParticles(made.boxes, VOXEL, made.weight)


pytestmark = pytest.mark.usefixtures("nothing_drawn")


@pytest.fixture(params=["emulated", "cuda"])
def device(request: pytest.FixtureRequest) -> Any:
    """A GPU that `device="cuda"` means: what happens on the emulated one, None of a real one its name."""
    return request.getfixturevalue("emulated_gpu") if request.param == "emulated" else request.getfixturevalue("gpu")


def run(particles: ArrayParticles, device: str, **options: Any) -> Result:
    chosen = {"n_classes": 2, "iterations": 3, "candidates": 6, "bandwidth": BANDWIDTH} | options
    return faml.run(particles, Options(device=device, **chosen))


def assert_same(found: Result, expected: Result) -> None:
    """The issue's bounds: same classes, poses within a quarter of the grid step, averages correlate to 0.999."""
    np.testing.assert_array_equal(found.best.classes, expected.best.classes)
    assert rotation_angle(found.best.rotations, expected.best.rotations).max() < 0.25 * 180 / BANDWIDTH
    assert np.abs(found.best.shifts - expected.best.shifts).max() < 0.1
    for a, b in zip(found.maps, expected.maps, strict=True):
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.999
    for a, b in zip(found.history, expected.history, strict=True):
        # float32 on both sides, summed in another order.
        assert a.log_likelihood == pytest.approx(b.log_likelihood, rel=1e-6)
        assert a.sigma == pytest.approx(b.sigma, rel=1e-5)
        assert a.candidates == b.candidates


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preset": "paper"},
        # Of seven particles in as many folds two poses tie, by averages of six: rounding decides, and the next
        # iteration shows it. The default has folds.
        {"sampler": "magnitude", "folds": 1},
        {"method": "fa"},
        {"n_classes": 1, "normalize": False, "invert": True, "padding": 1},
    ],
    ids=["default", "paper", "magnitude", "fa", "average"],
)
def test_a_run_on_a_gpu_is_that_on_the_cpu(particles: ArrayParticles, device: Any, options: dict[str, Any]) -> None:
    assert_same(run(particles, "cuda", **options), run(particles, "cpu", **options))


def test_a_start_from_a_map_on_a_gpu(particles: ArrayParticles, device: Any) -> None:
    reference = run(particles, "cpu").maps[0]
    chosen = Options(n_classes=2, iterations=2, candidates=6, bandwidth=BANDWIDTH)

    def from_map(device: str) -> Result:
        return faml.run(particles, replace(chosen, device=device), reference=reference, initial_lowpass=80.0)

    assert_same(from_map("cuda"), from_map("cpu"))


def test_groups_and_premultiplied_boxes_on_a_gpu(
    particles: ArrayParticles, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "FEWEST", 3)
    read = particles.read(np.arange(len(particles)))
    product = 3 * read.weights[0] * (1 + np.cos(0.5 * fourier.shells_of_half(BOX))).astype(np.float32)
    boxes = fourier.inverse_transform(fourier.transform(read.boxes) * product, BOX)
    groups = {"optics": Groups(("a", "b"), np.arange(len(particles)) % 2)}
    multiplied = ArrayParticles(boxes, VOXEL, product, groups=groups, premultiplied=True)
    # Two or more particles a fold: compared with one another only, so few noisy ones end as rounding has it.
    found, expected = (run(multiplied, device, scale_correction=True, folds=3) for device in ("cuda", "cpu"))
    assert_same(found, expected)
    assert expected.state.group_sigma2.shape == (3, BOX // 2)
    np.testing.assert_allclose(found.state.group_sigma2, expected.state.group_sigma2, rtol=1e-4)
    np.testing.assert_allclose(found.state.scale, expected.state.scale, rtol=1e-3)


def test_stopped_between_two_batches_on_a_gpu(
    particles: ArrayParticles, device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums so far come from the device into a file, and back from there."""
    monkeypatch.setitem(plan.BATCH_PARTICLES, "cuda", 2)
    monkeypatch.setattr("faml_gpu.pipeline._write_pictures", lambda folder: None)
    options = {"iterations": 1, "candidates": 6, "bandwidth": BANDWIDTH, "preset": "paper"}
    stopping = Stopping()

    def stop(*step: Any) -> None:
        if step == ("iteration 1", 4, len(particles)):
            stopping.ask(KeyboardInterrupt())

    with pytest.raises(KeyboardInterrupt):
        faml_gpu.classify(particles, 2, tmp_path, device="cuda", progress=stop, stopping=stopping, **options)
    told: list[tuple[str, int]] = []
    resumed = faml_gpu.classify(
        particles, 2, tmp_path, device="cuda", resume=True, progress=lambda *s: told.append(s[:2]), **options
    )
    assert told[0] == ("iteration 1", 4)
    assert_same(resumed, run(particles, "cpu", **options))


def test_too_little_memory_halves_the_batch(
    particles: ArrayParticles, emulated_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plan.BATCH_SHARE, "cuda", 1e6)  # the batch is as large as the card seems
    options = {"sampler": "magnitude", "folds": 1}  # a batch of them all
    expected = run(particles, "cpu", **options)
    run(particles, "cuda", **options)
    for share in (0.8, 0.6):
        emulated_gpu.memory = int(share * emulated_gpu.peak)
        freed = emulated_gpu.pool_freed
        assert_same(run(particles, "cuda", **options), expected)
        assert emulated_gpu.pool_freed > freed


def test_far_too_little_memory_is_an_error(particles: ArrayParticles, emulated_gpu: Any) -> None:
    emulated_gpu.memory = 1 << 20
    with pytest.raises(InputError, match=r"option device: .*memory on cuda:0"):
        run(particles, "cuda")


@pytest.mark.parametrize(
    ("error", "yes"),
    [
        (MemoryError("std::bad_alloc"), True),
        (RuntimeError("CUFFT_ALLOC_FAILED"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cudaErrorMemoryAllocation: out of memory"), True),
        (RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"), True),
        (RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS"), False),
        (ValueError("shape"), False),
    ],
)
def test_what_counts_as_too_little_memory(error: Exception, yes: bool) -> None:
    """As the libraries word it: CuPy's pool and Thrust, cuFFT, cuBLAS, CUDA's runtime and driver."""
    assert array_backend.out_of_memory(error) == yes


def test_boxes_cross_once_and_sums_come_back_once(particles: ArrayParticles, emulated_gpu: Any) -> None:
    """One iteration more costs one copy of the boxes to the device, and less than that back."""

    def crossed(iterations: int) -> tuple[int, int]:
        to_device, to_host = emulated_gpu.to_device.bytes, emulated_gpu.to_host.bytes
        run(particles, "cuda", iterations=iterations, preset="paper")
        return emulated_gpu.to_device.bytes - to_device, emulated_gpu.to_host.bytes - to_host

    crossed(1)  # tables that are kept from then on
    (first_in, first_out), (second_in, second_out) = crossed(1), crossed(2)
    boxes, points = len(particles) * BOX**3 * 4, voronoi.N_POINTS * (9 + 3) * 8
    # Beside both the averages, the support and its mask, of the size of a box each.
    assert boxes <= second_in - first_in - points < 3 * boxes
    assert second_out - first_out < 3 * boxes


def test_profiler_ranges_carry_the_names_of_the_steps(particles: ArrayParticles, emulated_gpu: Any) -> None:
    run(particles, "cuda", iterations=1)
    run(particles, "cuda", iterations=1, sampler="magnitude")
    steps = [
        "pose integral",
        "joint: all rotations",
        "joint: cells",
        "joint: refine",
        "references",
        "read",
        "fast alignment",
        "rotational matching",
        "peaks",
        "translations",
        "refine",
        "voronoi",
    ]
    for name in [*steps, "expectation", "residuals", "posterior", "rotate back", "maximization"]:
        assert name in emulated_gpu.ranges
    assert emulated_gpu.open_ranges == 0


def test_a_forecast_on_a_gpu(particles: ArrayParticles, device: Any) -> None:
    """It goes through, on the device, and tells of its memory."""
    options = Options(n_classes=2, candidates=6, bandwidth=BANDWIDTH)
    found = dry_run.forecast(particles, options, 100, device="cuda:0")
    assert 0 < found.first < found.total
    assert found.device is not None
    assert found.device > 0


def test_float16_boxes_cross_as_such_and_average_to_the_same(
    particles: ArrayParticles, emulated_gpu: Any, tmp_path: Path
) -> None:
    """Half the bytes of the boxes to the device; averages and likelihood as they were, to a few of 2^-11."""
    found, crossed = {}, {}
    for half in (False, False, True):  # the first makes tables that are kept
        folder = tmp_path / str(half)
        made = simulate_data_set(
            ["groel", "ribosome"], [4, 3], folder, replace(FAST, float16=half), device="cpu", threads=1, overwrite=True
        )
        opened = open_particles(made.star)
        crossed[half] = -emulated_gpu.to_device.bytes
        found[half] = run(opened, "cuda", iterations=1, sampler="magnitude", folds=1)
        crossed[half] += emulated_gpu.to_device.bytes
    # Read three times: by the start, by the iteration and for the maps of all shells.
    assert crossed[False] - crossed[True] == 3 * 2 * len(particles) * BOX**3
    for half, full in zip(found[True].maps, found[False].maps, strict=True):
        assert np.corrcoef(half.ravel(), full.ravel())[0, 1] > 1 - 1e-5
    assert found[True].history[0].log_likelihood == pytest.approx(found[False].history[0].log_likelihood, rel=1e-5)
