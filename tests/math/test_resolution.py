"""The band by evidence: agreement of halves against its definition, the rule's cases, runs on noise and on signal."""

from __future__ import annotations

import numpy as np
import pytest

from faml_gpu import fourier
from faml_gpu.data import Result
from faml_gpu.faml import iterate, run
from faml_gpu.fsc import fsc
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.options import Options
from faml_gpu.plan import Plan
from faml_gpu.resolution import half_agreement, next_r_max
from faml_gpu.simulate import ribosome, simulate_particles
from faml_gpu.starting import start

PLENTY = np.full(20, 1e4)


def test_agreement_is_the_fourier_shell_correlation():
    rng, box = np.random.default_rng(1), 16
    support = fourier.make_support(box, 7)
    common = rng.standard_normal((box,) * 3)
    volumes = np.stack([common + rng.standard_normal((box,) * 3) for _ in range(2)]).astype(np.float32)
    sums = support.gather(fourier.transform(volumes)).astype(complex)
    found = half_agreement(sums[:, None], support.shell)
    np.testing.assert_allclose(found[1:7], fsc(volumes[0], volumes[1])[1:7], atol=1e-6)  # of shell 7 the ball has half
    # Classes count by their power: a second one a thousand times weaker changes nothing.
    weak = np.stack([sums, 1e-3 * sums[::-1] * np.exp(1j)], axis=1)
    np.testing.assert_allclose(half_agreement(weak, support.shell)[1:7], found[1:7], atol=1e-5)


def curve(*values: float) -> np.ndarray:
    """Agreement 1 up to shell 5, then as given."""
    return np.array([1.0] * 6 + list(values))


@pytest.mark.parametrize(
    ("agreement", "r_max", "expected"),
    [
        (curve(0.9, 0.9, 0.9, 0.9), 5, 8),  # three at most
        (curve(0.9, 0.4, 0.0, 0.9), 5, 7),  # not past a shell that does not
        (curve(0.9, 0.0, 0.0, 0.0), 5, 5),  # shell 6 is what the mask brings over from 5
        (curve(0.5, 0.3, 0.05, 0.05), 7, 7),
        (curve(0.2, 0.05, 0.0, 0.0), 7, 6),  # what is fitted does not agree: back
        (curve(0.9, 0.9), 7, 8),  # the end of what is known
        (curve(0.4, 0.3), 7, 7),
    ],
)
def test_where_the_band_goes(agreement, r_max, expected):
    arguments = agreement, PLENTY[: len(agreement)], r_max
    assert next_r_max(*arguments, r_max, 3, 15) == expected
    assert next_r_max(*arguments, r_max, 3, r_max) == min(expected, r_max)
    assert next_r_max(*arguments, r_max, r_max, 15) == max(expected, r_max)
    # Two shells further were shown before: they count, until more is.
    assert next_r_max(*arguments, r_max + 2, 3, 15) == max(expected, r_max + 2)


def test_what_could_be_chance_is_no_evidence():
    agreement = curve(0.9, 0.3, 0.3, 0.3)
    assert next_r_max(agreement, np.full(10, 1000.0), 5, 5, 3, 15) == 8
    assert next_r_max(agreement, np.full(10, 30.0), 5, 5, 3, 15) == 5  # 2 / sqrt(30) is .37


def averaged(snr: float, reference: bool = False, **options) -> tuple[Result, Plan]:
    data = simulate_particles(
        [ribosome()], [24], box=20, voxel_size=18.0, snr=0.3, tilt_range=(-60.0, 60.0), seed=2, resolution=40.0
    )
    boxes = data.boxes
    if snr == 0:
        noise = np.random.default_rng(4).standard_normal(boxes.shape).astype(np.float32)
        boxes = fourier.inverse_transform(fourier.transform(noise) * data.weight, 20)
    particles = ArrayParticles(boxes, data.voxel_size, data.weight)
    chosen = Options(iterations=6, mask_radius=130.0, band="evidence", device="cpu", **options)
    start = {"reference": data.truth[0], "initial_lowpass": 80.0} if reference else {}
    return run(particles, chosen, **start), Plan.make(particles, chosen, 80.0 if reference else None, "cpu")


@pytest.mark.parametrize(("reference", "symmetry"), [(False, "C1"), (True, "C1"), (True, "D7")])
def test_noise_shows_nothing_finer_than_the_start(reference, symmetry):
    """Neither from nothing nor from a map of what is not there; nor where each voxel stands for 14."""
    result, plan = averaged(0, reference, symmetry=symmetry)
    assert plan.r_start < plan.r_final - 2
    assert {row.r_max for row in result.history} == {plan.r_start}


@pytest.mark.parametrize("method", ["faml", "fa"])
def test_signal_is_followed(method):
    result, plan = averaged(0.3, method=method)
    assert result.history[-1].r_max >= plan.r_start + 2
    assert result.history[-1].agreement[plan.r_start] > 0.5
    assert all(a.r_max <= plan.r_max(a.iteration) for a in result.history)


def test_halves_together_are_the_whole():
    data = simulate_particles([ribosome()], [9], box=20, voxel_size=18.0, snr=0.3, seed=2, resolution=40.0)
    particles = ArrayParticles(data.boxes, data.voxel_size, data.weight)
    new = []
    for band in ("evidence", "full"):
        options = Options(iterations=6, mask_radius=130.0, band=band, device="cpu", resolution=72.0, update="ratio")
        plan = Plan.make(particles, options, 72.0, "cpu")
        plan.batch.size = 4  # 4, 4, 1: the halves go by the number among all
        new.append(iterate(plan, particles, start(plan, particles, None, None)).state)
    support = fourier.make_support(20, plan.r_final)
    found, expected = (support.gather(fourier.transform(state.maps)) for state in new)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert new[0].r_max is not None
    assert new[1].r_max is None
