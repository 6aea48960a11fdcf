"""The plan of a run: the band's schedule, what is matched, the pull between classes."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest

from faml_gpu.data import State
from faml_gpu.errors import InputError
from faml_gpu.fast_alignment import make_reference
from faml_gpu.fast_alignment.align import Observation, match, normalised_scores
from faml_gpu.fourier import interpolation_grid, make_support
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.maximization import Accumulators
from faml_gpu.options import Options
from faml_gpu.plan import Band, Plan, resolve

N, VOXEL = 20, 10.0


@pytest.fixture
def particles(rng) -> ArrayParticles:
    weights = (rng.random((N, N, N // 2 + 1)) > 0.3).astype(np.float32)
    return ArrayParticles(rng.standard_normal((3, N, N, N)).astype(np.float32), VOXEL, weights)


def test_band_grows_over_six_tenths_of_the_iterations(particles):
    plan = Plan.make(particles, Options(iterations=20, mask_radius=60))
    radii = [plan.r_max(i) for i in range(1, 21)]
    assert radii[0] == 5 == round(N * VOXEL / (120 / 3))  # a third of the mask's diameter, 40 A, in a box of 200 A
    assert radii == sorted(radii)
    assert radii[10] < 9 == radii[11] == radii[-1]
    assert {Plan.make(particles, Options(preset="paper")).r_max(i) for i in (1, 5, 20)} == {9}


def test_a_band_by_evidence_is_what_the_data_said(particles):
    """At any iteration; where nothing was asked yet, the start's. Of several starts none goes ahead of the others."""
    options = Options(iterations=20, mask_radius=60, band="evidence")
    plan = Plan.make(particles, options)
    state = State(0, np.zeros((1, N, N, N), np.float32), np.ones(1), np.ones(N // 2), 1.0)
    assert (plan.r_start, plan.r_final) == (5, 9)
    assert plan.band(state).r_max == 5
    for iteration, r_max in ((1, 9), (2, 7), (19, 5), (19, 9)):
        band = plan.band(replace(state, iteration=iteration, r_max=r_max))
        assert (band.r_max, band.r_output) == (r_max, min(r_max + 4, 9))
        # A run ends no sooner than it could by the schedule, which has the whole band from the 12th iteration on.
        assert plan.settled(replace(state, iteration=iteration, r_max=r_max), r_max) == (iteration >= 12)
        assert not plan.settled(replace(state, iteration=iteration, r_max=r_max), r_max - 1)
    assert [plan.r_max(i) for i in range(1, 5)] == [5, 8, 9, 9]  # the most there can be
    several = Plan.make(particles, replace(options, starts=3))
    assert several.tried == 5
    assert [several.r_max(i) for i in range(1, 9)] == [5, 5, 5, 5, 5, 8, 9, 9]
    for plan in (several, Plan.make(particles, replace(options, starts=3, iterations=4))):
        ends = max(plan.tried, round(0.6 * plan.options.iterations))
        assert not plan.settled(replace(state, iteration=ends - 1, r_max=5), 5)
        assert plan.settled(replace(state, iteration=ends, r_max=5), 5)


@pytest.mark.parametrize(
    ("name", "together", "symmetric", "r_max"),
    [
        ("D7", 0.0, 0.9, 8),  # agreement of the sums beyond the band, and under the group
        ("D7", 0.9, 0.0, 8),  # where a shell has a handful of numbers the sums without it may be the surer
        ("D7", 0.0, 0.0, 5),
        ("C1", 0.9, 0.0, 5),  # no group: the second are the first
        ("C1", 0.0, 0.9, 8),
    ],
)
def test_under_a_group_the_sums_with_it_and_without_are_asked(particles, rng, name, together, symmetric, r_max):
    plan = Plan.make(particles, Options(iterations=20, mask_radius=75, band="evidence", symmetry=name), 40.0)
    band = plan.band(State(5, np.zeros((1, N, N, N), np.float32), np.ones(1), np.ones(N // 2), 1.0, r_max=5))
    empty = Accumulators.zero(1, len(band.output), 5, parts=2)

    def sums(agreement: float) -> Accumulators:
        common, *own = rng.standard_normal((3, len(band.output))) + 1j * rng.standard_normal((3, len(band.output)))
        beyond = np.where(band.output.shell > 5, agreement, 1.0)
        return replace(empty, sums=np.stack([np.sqrt(beyond) * common + np.sqrt(1 - beyond) * x for x in own]))

    assert band.evidence(sums(together), sums(symmetric))[1] == r_max


@pytest.mark.parametrize(
    ("asked", "start", "rule"),
    [
        ({}, None, "growing"),
        ({}, 60.0, "evidence"),
        ({"method": "fa"}, 60.0, "evidence"),
        ({"halves": True}, 60.0, "growing"),
        ({"band": "growing"}, 60.0, "growing"),
        ({"band": "evidence"}, None, "evidence"),
        ({"preset": "paper"}, 60.0, "full"),
    ],
)
def test_what_a_start_shows_decides_unless_asked_otherwise(particles, asked, start, rule):
    options = Options(mask_radius=60, **asked)
    assert Plan.make(particles, options, start).band_rule == rule
    assert resolve(options, N, VOXEL, start)["choices"]["band"] == rule


def test_a_low_passed_start_begins_at_its_resolution(particles):
    assert Plan.make(particles, Options(mask_radius=60), 28.0).r_max(1) == 7
    assert Plan.make(particles, Options(mask_radius=60, resolution=40), 20.0).r_max(1) == 5  # not past the limit


@pytest.mark.parametrize("box", [10, 11, 16, 24, 64])
def test_defaults_fit_every_box(box):
    resolved = resolve(Options(), box, VOXEL)
    assert 2 * VOXEL <= resolved["mask_radius"] <= box * VOXEL / 2
    assert 1 <= resolved["r_start"] <= resolved["r_max"] == (box + 1) // 2 - 1


@pytest.mark.parametrize(
    "change", [{"mask_radius": 5.0}, {"mask_radius": 99.0}, {"max_shift": 95.0}, {"resolution": 150.0}]
)
def test_options_that_do_not_fit_the_box(change):
    with pytest.raises(InputError, match=f"option {next(iter(change)).replace('_', '-')}: found"):
        resolve(Options(**change), N, VOXEL)


def test_matched_magnitudes_are_those_of_the_masked_box(particles):
    """By plain NumPy on the whole cube: |F[mask F^-1(w X)]|; not |X|, and for the paper nothing but |X|."""
    plan = Plan.make(particles, Options(mask_radius=50, max_shift=20, sampler="magnitude"))
    batch = particles.read(np.arange(3))
    spectra = plan.spectra(batch)
    state = State(0, np.zeros((1, N, N, N), np.float32), np.ones(1), np.ones(N // 2), 1.0)
    band = Band(plan, state, 6, 6)
    found = band.observe(batch, spectra)
    mask = plan.reach_mask(1.0)
    assert mask[N // 2, N // 2, N // 2 + 6] == 1  # 5 voxels and a shift of 1
    assert mask[N // 2, N // 2, N // 2 + 9] == 0  # and an edge of 3
    index = band.support.coords[:, ::-1] % N
    for b in range(3):
        seen = np.fft.fftshift(np.fft.irfftn(spectra[b] * batch.weights[0], s=(N, N, N), axes=(0, 1, 2)))
        cube = np.fft.fftn(np.fft.ifftshift(seen * mask))
        np.testing.assert_allclose(found.magnitudes[b], abs(cube[tuple(index.T)]), rtol=1e-4)
    printed = Plan.make(particles, Options(preset="paper"))
    assert Band(printed, state, 6, 6).observe(batch, spectra).magnitudes is None


def test_pull_counts_in_particles(particles, rng):
    plan = Plan.make(particles, Options(n_classes=2, iterations=10, regularization=1.0))
    maps = rng.standard_normal((2, N, N, N)).astype(np.float32)
    mass = np.array([30.0, 10.0])
    mean = 0.75 * maps[0] + 0.25 * maps[1]
    # A class of average size has 20: at the start each leans on 20 more that show the mean, half-way through on 10.
    for iteration, extra in ((0, 20.0), (3, 10.0)):
        for k, found in enumerate(plan.regularise(maps, mass, iteration)):
            np.testing.assert_allclose(found, (mass[k] * maps[k] + extra * mean) / (mass[k] + extra), atol=1e-5)
    np.testing.assert_array_equal(plan.regularise(maps, mass, 6), maps)
    empty = plan.regularise(maps, np.array([40.0, 0.0]), 0)
    np.testing.assert_allclose(empty[1], maps[0], atol=1e-6)
    bare = Plan.make(particles, Options(n_classes=2, preset="paper"))
    np.testing.assert_array_equal(bare.regularise(maps, mass, 0), maps)


def test_kept_scores_are_bounded_and_right(rng, monkeypatch):
    """c1 of other batches' weights is dropped past a bound; what is kept is that of its own weight."""
    # The package's name `align` is the function.
    monkeypatch.setattr(import_module("faml_gpu.fast_alignment.align"), "KEPT_BYTES", 2 * 16**3 * 4)
    support = make_support(N, 5)
    reference = make_reference(interpolation_grid(rng.standard_normal((N, N, N)), 5, 2), 2, 5, 8)
    precision = np.ones(len(support), np.float32)
    kept: dict[str, np.ndarray] = {}
    every = (rng.random((6, len(support))) > 0.4).astype(np.float32)
    # One weight after another, all of a batch beyond the bound, the same batch again, and half of it.
    for names in ([0], [1], [2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1], [5]):
        n = len(names)
        spectra = (rng.standard_normal((n, len(support))) + 0j).astype(np.complex64)
        seen = Observation(support, spectra, every[names], np.arange(n), tuple(f"w{i}" for i in names))
        with_kept = normalised_scores(seen, reference, precision, centred=True, kept=kept)
        # Of one weight or of five at a time the GEMM rounds otherwise.
        np.testing.assert_allclose(
            with_kept, normalised_scores(seen, reference, precision, centred=True), rtol=1e-4, atol=1e-4
        )
        assert len(kept) == min(len(set(kept) | set(seen.weight_ids)), 2)


@pytest.mark.parametrize("sampler", ["magnitude", "joint"])
def test_folds_share_what_is_known_of_the_weights(sampler, particles, rng, monkeypatch):
    """The coefficients of w^2 / sigma^2 are of no fold and no class: worked out once, they are those of each."""
    plan = Plan.make(particles, Options(mask_radius=60, sampler=sampler))
    maps = rng.standard_normal((1, N, N, N)).astype(np.float32)
    unseen = rng.random((2, N, N, N // 2 + 1)).astype(np.float32)
    sigma2 = 1.0 + np.arange(N // 2)
    state = State(0, maps, np.ones(1), sigma2, 1.0, apart=np.stack([maps, -maps]), unseen=unseen)
    whole, batch = Band(plan, state, 6, 6), particles.read(np.arange(3))
    spectra, align = plan.spectra(batch), import_module("faml_gpu.fast_alignment.align")
    calls = []
    of_support = align.shell_harmonics

    def counted(support, bandwidth):
        calls.append(bandwidth)
        return of_support(support, bandwidth)

    monkeypatch.setattr(align, "shell_harmonics", counted)
    first, second = (whole.observe(batch, spectra, whole.unseen(fold)) for fold in (0, 1))
    # Of the magnitudes for each fold: these are the particles'; of the weights once.
    assert len(calls) == {"magnitude": 3, "joint": 1}[sampler]
    other = Band(plan, state, 6, 6)
    alone = other.observe(batch, spectra, other.unseen(1))
    np.testing.assert_array_equal(second.unseen.table, alone.unseen.table)
    assert (first.unseen.table != second.unseen.table).any()
    if sampler == "magnitude":
        seen = replace(alone, matched=None)
        np.testing.assert_array_equal(first.matched.weights, alone.matched.weights)
        bandwidth = plan.bandwidth(6)
        again = match(seen, whole.precision, bandwidth, centred=True)
        np.testing.assert_allclose(first.matched.magnitudes, again.magnitudes, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "wiener"),
        ({"update": "ratio"}, "ratio"),
        ({"preset": "paper"}, "printed"),
        ({"preset": "paper", "update": "explore"}, "wiener"),
        ({"method": "fa"}, "ratio"),
    ],
)
def test_update(particles, options, expected):
    assert Plan.make(particles, Options(mask_radius=50, max_shift=20, **options)).update == expected


def test_a_random_start_is_less_and_less_wary_while_the_band_grows(particles):
    """From the noise of the whole box in the mask to what there is, by equal ratios; from nothing only."""
    options = Options(mask_radius=50, max_shift=20, iterations=20)
    plan = Plan.make(particles, options)
    caution = [plan.caution(i) for i in range(20)]
    assert caution[0] == pytest.approx(1 / np.mean(plan.mask**2), rel=1e-6)
    np.testing.assert_allclose(np.diff(np.log(caution[:13])), -np.log(caution[0]) / 12, rtol=1e-5)
    assert caution[12:] == [1.0] * 8
    assert plan.r_max(12) == plan.r_final > plan.r_max(11)
    assert {replace(plan, initial_lowpass=60.0).caution(i) for i in range(20)} == {1.0}  # from a map or from poses
    for update in ("wiener", "ratio"):
        assert replace(plan, options=replace(options, update=update)).caution(0) == 1
    assert replace(plan, options=replace(options, iterations=1)).caution(1) == 1


def test_fa_takes_the_magnitude_sampler():
    assert Options(method="fa").choices.sampler == "magnitude"
    assert Options().choices.sampler == "joint"
    assert Options(preset="paper").choices.sampler == "magnitude"
    assert Options(preset="paper", sampler="joint").choices.sampler == "joint"
    for name in ("sampler", "update"):
        with pytest.raises(InputError, match=f"option {name}"):
            Options(**{name: "best"})
    with pytest.raises(InputError, match="option sampler: found 'joint'"):
        Options(method="fa", sampler="joint")
