"""The band by evidence: agreement of halves against its definition, the rule's cases, runs on noise and on signal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from faml_gpu import fourier
from faml_gpu.data import Result
from faml_gpu.faml import begin, iterate, run
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
    assert next_r_max(*arguments, 3, 15) == expected
    assert next_r_max(*arguments, 3, r_max) == min(expected, r_max)
    assert next_r_max(*arguments, r_max, 15) == max(expected, r_max)


def test_what_could_be_chance_is_no_evidence():
    agreement = curve(0.9, 0.3, 0.3, 0.3)
    assert next_r_max(agreement, np.full(10, 1000.0), 5, 3, 15) == 8
    assert next_r_max(agreement, np.full(10, 20.0), 5, 3, 15) == 5  # 3 / sqrt(60) is .39, of all three together
    assert next_r_max(curve(0.9, 0.7, 0.1, 0.9), np.full(10, 1000.0), 5, 3, 15) == 7  # sure, but not enough


def test_shells_that_agree_vouch_for_those_before_them():
    """Not the other way: the first of them may be all there is."""
    numbers = np.full(10, 12.0)
    assert next_r_max(curve(0.9, 0.6, 0.6, 0.6), numbers, 5, 3, 15) == 8  # 8 and 9 together are sure
    assert next_r_max(curve(0.9, 0.6), numbers[:8], 5, 3, 15) == 5
    assert next_r_max(curve(0.9, 0.95, 0.2, 0.2), numbers, 5, 3, 15) == 7


def test_few_numbers_agree_by_chance_as_rarely_as_many():
    """Gaussian noise without a common signal, 3 standard errors: 1.35 times in 1000."""
    rng, n = np.random.default_rng(1), 8
    a, b = rng.standard_normal((2, 40000, n))
    chance = (a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    numbers = np.full(8, float(n))
    found = sum(next_r_max(curve(0.9, r), numbers, 5, 3, 15) > 5 for r in chance[chance > 0.5])
    assert 54 - 22 < found < 54 + 22  # three standard deviations


def ribosomes(snr: float, seed: int = 4) -> tuple[ArrayParticles, np.ndarray]:
    """24 boxes, and the truth; with an SNR of 0 noise of a seed."""
    data = simulate_particles(
        [ribosome()], [24], box=20, voxel_size=18.0, snr=0.3, tilt_range=(-60.0, 60.0), seed=2, resolution=40.0
    )
    boxes = data.boxes
    if snr == 0:
        noise = np.random.default_rng(seed).standard_normal(boxes.shape).astype(np.float32)
        boxes = fourier.inverse_transform(fourier.transform(noise) * data.weight, 20)
    return ArrayParticles(boxes, data.voxel_size, data.weight), data.truth[0]


def averaged(snr: float, reference: bool = False, **options) -> tuple[Result, Plan]:
    particles, truth = ribosomes(snr)
    chosen = Options(iterations=6, mask_radius=130.0, band="evidence", device="cpu", **options)
    start = {"reference": truth, "initial_lowpass": 80.0} if reference else {}
    return run(particles, chosen, **start), Plan.make(particles, chosen, 80.0 if reference else None, "cpu")


@pytest.mark.parametrize(("reference", "symmetry"), [(False, "C1"), (True, "C1"), (True, "D7")])
def test_noise_shows_nothing_finer_than_the_start(reference, symmetry):
    """Neither from nothing nor from a map of what is not there; nor where each voxel stands for 14."""
    result, plan = averaged(0, reference, symmetry=symmetry)
    assert plan.r_start < plan.r_final - 2
    assert {row.r_max for row in result.history} == {plan.r_start}


def test_a_chance_that_many_iterations_have_is_none():
    """The same noise is looked at again and again in poses that drift: here it once agrees by two standard errors."""
    particles, _ = ribosomes(0, seed=102)
    options = Options(iterations=16, mask_radius=130.0, band="evidence", method="fa", seed=2, device="cpu")
    plan = Plan.make(particles, options)
    history = run(particles, options).history
    asked = [row.agreement[plan.r_start + 2] for row in history]
    assert max(asked) > 0.15 > np.mean(asked)  # or else there is nothing to be asked
    assert {row.r_max for row in history} == {plan.r_start}


@pytest.mark.parametrize(("method", "resolution"), [("faml", 45.0), ("fa", None)])
def test_signal_is_followed_whatever_the_schedule(method, resolution):
    """The data decide, and `resolution` caps; not the schedule, which stood above them before: what the data showed
    early waited for it, and how long by the number of iterations asked for.

    In five of 30 iterations the schedule has come one shell beyond the start, if that.
    """
    particles = ribosomes(0.3)[0]
    options = Options(
        iterations=30, mask_radius=130.0, resolution=resolution, band="evidence", method=method, device="cpu"
    )
    plan, scheduled = (Plan.make(particles, replace(options, band=band)) for band in ("evidence", "growing"))
    checkpoint = begin(plan, particles, None, False)
    for _ in range(5):
        checkpoint = iterate(plan, particles, checkpoint)
    bands = [row.r_max for row in checkpoint.history]
    assert bands[0] == plan.r_start
    assert bands[-1] >= scheduled.r_max(5) + 2
    assert checkpoint.history[-1].agreement[plan.r_start] > 0.5
    if resolution is not None:
        assert max(*bands, checkpoint.state.r_max) == 8 == plan.r_final  # a box of 360 Angstrom
        assert checkpoint.history[-1].agreement[8] > 0.143  # and there is more


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
