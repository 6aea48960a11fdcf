"""Candidates compared by the inner shells first: what is left out does not matter, and is cheaper."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest

from faml_gpu import fourier
from faml_gpu.data import State
from faml_gpu.fast_alignment import (
    Observation,
    align,
    make_reference,
    screen_band,
    shift_window,
    unseen_gain,
    unseen_harmonics,
    weight_harmonics,
)
from faml_gpu.geometry import random_rotations
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.options import Options
from faml_gpu.plan import Band, Plan

ALIGN = import_module("faml_gpu.fast_alignment.align")  # the package has a function of this name
BOX, R_MAX, INNER, L, N = 24, 9, 5, 16, 6


class Scene:
    """Noisy particles with a missing wedge in known poses, at the noise that the precision tells."""

    def __init__(self, oracles):
        rng = np.random.default_rng(4)
        structure = oracles.blobs(rng, 14, 6.0, 1.2)
        self.support = support = fourier.make_support(BOX, R_MAX)
        grid = fourier.interpolation_grid(oracles.blob_volume(BOX, *structure).astype(np.float32), R_MAX, 2)
        self.reference = make_reference(grid, 2, R_MAX, L)
        self.rotations, self.shifts = random_rotations(N, rng), rng.uniform(-2, 2, (N, 3))
        clean = np.stack(
            [
                oracles.blob_transform(BOX, support.coords @ r, *structure) * oracles.phase(support.coords, t, BOX)
                for r, t in zip(self.rotations, self.shifts, strict=True)
            ]
        )
        weight = support.gather(oracles.half_of_cube(oracles.wedge_cube(BOX, [0, 0, 1], np.tan(np.deg2rad(30)))))
        # So much noise that the right pose leads by some hundred nats: then the screen has to judge.
        sigma2 = (abs(clean) ** 2).sum(axis=1).mean() / 150
        noise = rng.standard_normal((2, *clean.shape)) * np.sqrt(sigma2 / 2)
        spectra = (weight * (clean + noise[0] + 1j * noise[1])).astype(np.complex64)
        index = np.zeros(N, np.int64)
        self.precision = np.full(len(support), 1 / sigma2, np.float32)
        self.plain = Observation(support, spectra, weight.astype(np.float32)[None], index, ("w",))
        line = np.fft.fftfreq(BOX, 1 / BOX)
        z, _, x = np.meshgrid(line, line, np.arange(BOX // 2 + 1), indexing="ij")
        unseen = fourier.weight_grid((0.2 * sigma2 * (abs(z) > abs(x))).astype(np.float32), R_MAX)
        harmonics = unseen_harmonics(unseen, R_MAX, L)
        gain = unseen_gain(weight_harmonics(self.plain, self.precision, L), index, harmonics, INNER)
        self.observation = replace(self.plain, unseen=gain)

    def align(self, observation, screened):
        windows = [shift_window(self.support.within(r), 3.5) for r in (R_MAX, INNER)]
        screen = windows[1] if screened else None
        return align(observation, self.reference, self.precision, windows[0], 40, centred=True, screened=screen)


@pytest.fixture(scope="module")
def scene(oracles):
    return Scene(oracles)


@pytest.mark.parametrize("unseen", [False, True])
def test_what_is_left_out_has_no_posterior(scene, unseen):
    observation = scene.observation if unseen else scene.plain
    every, found = (scene.align(observation, screened) for screened in (False, True))
    np.testing.assert_array_equal(found.rotations, every.rotations)
    np.testing.assert_array_equal(found.count, every.count)
    valid = np.arange(40) < every.count[:, None]
    out = valid & (found.gain == -np.inf)
    assert 0.3 < out.sum() / valid.sum() < 0.98  # it judges, and leaves more than the best
    assert (found.gain[~valid] == -np.inf).all()
    np.testing.assert_array_equal(found.correlation[out], 0)
    for name in ("shifts", "correlation", "gain"):
        np.testing.assert_allclose(getattr(found, name)[valid & ~out], getattr(every, name)[valid & ~out], rtol=1e-6)
    worth = np.where(valid, every.gain + observation.expected_gain(every.rotations), -np.inf)
    posterior = np.exp(worth - worth.max(axis=1, keepdims=True))
    posterior /= posterior.sum(axis=1, keepdims=True)
    # Gains are the shift search's parabolas', of some per cent: beyond e^-10 they tell nothing.
    assert (posterior * out).sum(axis=1).max() < np.exp(-10)


def test_what_is_unseen_counts_in_the_screen(scene):
    """A pose that is behind by the particle's own shells, but may show what no particle has, stays."""
    found = scene.align(scene.observation, True)
    strong = replace(scene.observation.unseen, low=scene.observation.unseen.low * 100)
    other = scene.align(replace(scene.observation, unseen=strong), True)
    assert ((found.gain == -np.inf) != (other.gain == -np.inf)).any()


def test_left_out_candidates_have_the_shift_of_the_inner_shells(scene):
    found = scene.align(scene.plain, True)
    out = (np.arange(40) < found.count[:, None]) & (found.gain == -np.inf)
    spread = np.linalg.norm(found.shifts[out], axis=-1)
    assert (spread > 0).all()
    assert (spread < 3.5 * np.sqrt(3)).all()


def test_the_inner_shells_of_an_observation(scene):
    inner = scene.observation.within(INNER)
    m = (scene.support.shell <= INNER).sum()
    assert inner.support.r_max == INNER
    np.testing.assert_array_equal(inner.support.coords, scene.support.coords[scene.support.shell <= INNER])
    np.testing.assert_array_equal(inner.spectra, scene.observation.spectra[:, :m])
    np.testing.assert_array_equal(inner.weights, scene.observation.weights[:, :m])
    assert inner.unseen is not None
    np.testing.assert_array_equal(inner.unseen.table, scene.observation.unseen.low)
    assert scene.plain.within(INNER).unseen is None
    magnitudes = abs(scene.plain.spectra)
    own = replace(scene.plain, magnitudes=magnitudes).within(INNER)
    np.testing.assert_array_equal(own.magnitudes, magnitudes[:, :m])


def test_from_which_band_on():
    assert screen_band(ALIGN.SCREENED - 1) is None
    assert screen_band(ALIGN.SCREENED) == 6
    assert screen_band(15) == 9
    assert screen_band(31) == ALIGN.SCREEN_R


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sampler": "magnitude"}, True),
        ({"preset": "paper"}, False),
        ({"method": "fa"}, False),
    ],
)
def test_who_screens(options, expected, rng, monkeypatch):
    """Not the paper, nor where the best is that of highest correlation, which is no likelihood."""
    monkeypatch.setattr(ALIGN, "SCREENED", 6)
    particles = ArrayParticles(rng.standard_normal((3, 16, 16, 16)).astype(np.float32), 10.0)
    plan = Plan.make(particles, Options(mask_radius=50, **options))
    state = State(0, np.zeros((1, 16, 16, 16), np.float32), np.ones(1), np.ones(8), 1.0)
    assert Band(plan, state, 5, 7).inner_window is None  # too narrow a band
    window = Band(plan, state, 7, 7).inner_window
    assert (window is not None) == expected
    if window is not None:
        assert window.r_max == 4
