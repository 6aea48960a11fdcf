"""Symmetry in the search for poses: one copy of each, the same integral; and the axes of a map that lies anyhow."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp

from faml_gpu import fourier
from faml_gpu.data import Posterior, State
from faml_gpu.fast_alignment import Observation, align, joint, make_reference, marginal, shift_window
from faml_gpu.geometry import random_rotations, rotation_angle
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.masks import soft_sphere
from faml_gpu.options import Options
from faml_gpu.plan import Plan
from faml_gpu.posteriors import in_frame, one_hot
from faml_gpu.starting import onto_axes
from faml_gpu.symmetry import point_group, unit_share
from faml_gpu.symmetry_axes import find_axes, moved_onto_axes

BOX, R_MAX, L = 20, 5, 12
ZETA, MAX_SHIFT = 1.0, 2.0


def copies(structure, name):
    """The blobs of a structure, repeated under a point group."""
    group = point_group(name)
    centres, widths, masses = structure
    turned = np.einsum("gij,nj->gni", group, centres).reshape(-1, 3)
    return turned, np.tile(widths, len(group)), np.tile(masses, len(group)) / len(group)


class Case:
    """Three particles of a structure with symmetry, one noise-free, in a box of 20, seen through a wedge."""

    def __init__(self, oracles, name, gain=12.0, seed=3):
        rng = np.random.default_rng(seed)
        self.structure = copies(oracles.blobs(rng, 4, 6.0, 1.0), name)
        self.support = fourier.make_support(BOX, R_MAX)
        volume = oracles.blob_volume(BOX, *self.structure).astype(np.float32)
        self.grid = fourier.interpolation_grid(volume[None], R_MAX, 3)[0]
        cube = oracles.half_of_cube(oracles.wedge_cube(BOX, [0, 0, 1], 0.6))
        weights = self.support.gather(cube[None]).astype(np.float32)
        self.rotations, self.shifts = random_rotations(3, rng), rng.uniform(-1, 1, (3, 3))
        points = self.support.coords
        clean = np.stack(
            [
                oracles.blob_transform(BOX, points @ r, *self.structure) * oracles.phase(points, t, BOX)
                for r, t in zip(self.rotations, self.shifts, strict=True)
            ]
        )
        sigma2 = (weights[0] ** 2 * abs(clean[0]) ** 2).sum() / gain
        self.precision = np.full(len(points), 1 / sigma2, np.float32)
        noise = np.sqrt(sigma2 / 2) * (rng.standard_normal(clean.shape) + 1j * rng.standard_normal(clean.shape))
        noise[0] = 0
        spectra = (clean + noise).astype(np.complex64)
        self.observation = Observation(self.support, spectra, weights, np.zeros(3, np.int64), ("w",))

    def integrate(self, symmetry, n=400):
        reference = marginal.make_joint_reference(self.grid, 3, R_MAX, L)
        return joint.integrate(
            self.observation, [reference], self.precision, max_shift=MAX_SHIFT, zeta=ZETA, n_candidates=n,
            symmetry=symmetry,
        )[0]  # fmt: skip


def evidence(candidates, volumes):
    return logsumexp(candidates.gain - (candidates.shifts**2).sum(axis=-1) / (2 * ZETA**2) + volumes, axis=1)


@pytest.mark.parametrize("name", ["C1", "C7", "D2", "O", "I2"])
@pytest.mark.parametrize("slack", [0.0, 8.0])
def test_shares_of_the_copies_in_the_widened_unit_sum_to_one(name, slack):
    group = point_group(name)
    orbit = random_rotations(300, np.random.default_rng(1))[:, None] @ group
    inside, share = unit_share(orbit, group, slack)
    np.testing.assert_allclose((inside * share).sum(axis=1), 1, rtol=1e-12)
    if slack == 0:
        np.testing.assert_array_equal(inside.sum(axis=1), 1)
        angles = rotation_angle(orbit, np.eye(3))
        np.testing.assert_array_equal(inside.argmax(axis=1), angles.argmin(axis=1))
    elif name != "C1":
        assert inside.sum(axis=1).max() > 1


@pytest.mark.parametrize("name", ["C4", "D2", "O"])
def test_the_integral_over_the_unit_is_that_over_all_rotations(oracles, name, monkeypatch):
    case = Case(oracles, name)
    monkeypatch.setattr(joint, "SELECTED", 1000)  # so that few cells stand for others
    whole, unit = case.integrate("C1"), case.integrate(name)
    # Each is off by up to 0.2 nats, as its grid falls on the peaks; a copy counted twice would be log 2.
    np.testing.assert_allclose(evidence(*unit), evidence(*whole), atol=0.3)
    group = point_group(name)
    for b in range(3):
        rotations = unit[0].rotations[b, : unit[0].count[b]]
        nearest = rotation_angle(rotations[:, None] @ group, np.eye(3)).min(axis=1)
        # Whole cells of 7.5 degrees, and one to either side.
        assert (rotation_angle(rotations, np.eye(3)) <= nearest + 12).all()
    monkeypatch.undo()
    case = Case(oracles, name, gain=300.0)
    found, _ = case.integrate(name)
    best = found.rotations[0, found.gain.argmax(axis=1)[0]]
    assert rotation_angle(best @ group, case.rotations[0]).min() < 4
    assert rotation_angle(best, np.eye(3)) <= rotation_angle(case.rotations[0] @ group, np.eye(3)).min() + 12


@pytest.mark.parametrize("name", ["C4", "D2"])
def test_matched_magnitudes_have_one_candidate_of_each_pose(oracles, name):
    case, group = Case(oracles, name), point_group(name)
    reference = make_reference(case.grid, 3, R_MAX, L)
    window = shift_window(case.support, MAX_SHIFT)
    arguments = case.observation, reference, case.precision, window, 12
    whole = align(*arguments, centred=True)
    unit = align(*arguments, centred=True, symmetry=name)
    for found, distinct in ((whole, False), (unit, True)):
        for b in range(3):
            r = found.rotations[b, : found.count[b]]
            between = np.array([rotation_angle(r @ s, r[:, None]) for s in group]).min(axis=0)
            apart = between[np.triu_indices(len(r), 1)].min()
            assert (apart >= 180 / L - 1e-6) == distinct
    best = unit.gain.argmax(axis=1)[0]
    assert rotation_angle(unit.rotations[0, best] @ group, case.rotations[0]).min() < 10


# --- axes of a map ------------------------------------------------------------------------------------------


class Tilted:
    """A symmetric map that lies in a known pose, with noise."""

    def __init__(self, oracles, name, box=24, noise=0.3):
        rng = np.random.default_rng(8)
        self.group = point_group(name)
        structure = copies(oracles.blobs(rng, 3, 6.0, 1.3), name)
        self.rotation = random_rotations(1, rng)[0]
        self.shift = np.array([1.3, -0.6, 0.9])
        centres, widths, masses = structure
        self.clean = oracles.blob_volume(box, centres @ self.rotation.T + self.shift, widths, masses)
        self.untilted = oracles.blob_volume(box, *structure)
        self.mask = soft_sphere(box, 9.0, 3.0)
        volume = self.clean + noise * self.clean[self.mask > 0].std() * rng.standard_normal(self.clean.shape)
        self.volume = volume.astype(np.float32)
        self.found = find_axes(self.volume, self.mask, 8, 16, self.group)
        self.support = fourier.make_support(box, 8)

    def moved(self, group):
        return moved_onto_axes(self.clean.astype(np.float32), self.found, group, self.support)


@pytest.mark.parametrize("name", ["C2", "C7", "D3", "T", "O", "I1"])
def test_axes_are_found(oracles, name):
    case = Tilted(oracles, name)
    moved, alone = case.moved(case.group), case.moved(case.group[:1])
    # Averaged over the copies in the frame that was found, the structure is what it was: the copies coincide.
    assert abs(np.vdot(moved, alone)) / np.linalg.norm(moved) / np.linalg.norm(alone) > 0.98
    assert case.found.agreement > 0.5
    axis = case.found.rotation[:, 2] @ case.rotation[:, 2]
    if name in ("C2", "C7", "D3"):
        assert np.rad2deg(np.arccos(min(1.0, abs(axis)))) < 2.5
        # What moves along the axis of a Cn stays free, all else is found.
        error = case.found.rotation.T @ (case.found.shift - case.shift)
        assert np.abs(error[: 2 if name[0] == "C" else 3]).max() < 0.5


def test_no_symmetry_is_told_from_symmetry(oracles):
    rng = np.random.default_rng(2)
    volume = oracles.blob_volume(24, *oracles.blobs(rng, 12, 8.0, 1.3)).astype(np.float32)
    mask = soft_sphere(24, 9.0, 3.0)
    assert find_axes(volume, mask, 8, 16, point_group("O")).agreement < 0.4


def test_poses_go_along_with_the_map(oracles):
    case = Tilted(oracles, "C3")
    moved = case.moved(case.group[:1])
    rng = np.random.default_rng(4)
    rotations, shifts = random_rotations(2, rng), rng.uniform(-1, 1, (2, 3))
    before: Posterior = one_hot(np.array([0, 1]), rotations, shifts, 2, known=True)
    after = in_frame(before, case.found.rotation, case.found.shift, 0)
    np.testing.assert_array_equal(after.rotations[1], rotations[1])
    np.testing.assert_array_equal(after.shifts[1], shifts[1])
    volume = fourier.inverse_transform(case.support.scatter(moved[None]), 24)[0].astype(float)
    volume -= volume[case.mask == 0].mean()

    def posed(volume, rotation, shift):
        """A(R^-1 (x - t)) band-limited, by summing over voxels."""
        k = np.arange(24) - 12
        points = case.support.coords @ rotation
        phase = [np.exp(-2j * np.pi / 24 * points[:, i, None] * k) for i in range(3)]
        spectrum = np.einsum("zyx,mx,my,mz->m", volume, *phase, optimize=True)
        return spectrum * np.exp(-2j * np.pi / 24 * case.support.coords @ shift)

    first = posed(case.clean, before.rotations[0], before.shifts[0])
    second = posed(volume, after.rotations[0], after.shifts[0])
    assert (abs(first - second) ** 2).sum() < 0.02 * (abs(first) ** 2).sum()


def test_averages_of_folds_move_with_the_whole(oracles):
    """By the axes of the whole average, whatever those of a fold's would be; what was unseen lies elsewhere then."""
    case = Tilted(oracles, "C3")
    particles = ArrayParticles(np.stack([case.volume] * 2), 10.0)
    plan = Plan.make(particles, Options(n_classes=2, symmetry="C3", mask_radius=90.0, device="cpu"))
    turned = np.ascontiguousarray(case.volume[::-1])
    maps = np.stack([case.volume, np.zeros_like(case.volume)])  # the second class is empty
    state = State(1, maps, np.full(2, 0.5), np.ones(plan.n_shells), 1.0, apart=np.stack([maps, np.stack([turned] * 2)]))
    state.unseen = np.ones((2, 24, 24, 13), np.float32)
    state.seen = np.ones((1, 3, 24, 24), np.float32)
    posterior = one_hot(np.array([0, 1]), np.tile(np.eye(3), (2, 1, 1)), np.zeros((2, 3)), 2, known=True)
    moved, after = onto_axes(plan, plan.band(state), state, posterior)
    assert moved.unseen is None
    assert moved.seen is None
    np.testing.assert_allclose(moved.apart[0], moved.maps, atol=1e-5 * abs(moved.maps).max())
    np.testing.assert_array_equal(moved.maps[1], 0)
    np.testing.assert_array_equal(moved.apart[1, 1], turned)  # its class did not move
    band = plan.band(state)
    axes = find_axes(case.volume, plan.mask, band.r_max, plan.bandwidth(band.r_max), case.group)
    support = fourier.make_support(24, max(band.r_max, band.r_output))
    expected = plan.to_maps(moved_onto_axes(turned, axes, case.group, support)[None], support)[0]
    np.testing.assert_allclose(moved.apart[1, 0], expected, atol=1e-5 * abs(expected).max())
    assert abs(moved.apart[1, 0] - moved.maps[0]).max() > 0.1 * abs(expected).max()
    np.testing.assert_allclose(after.rotations[0], axes.rotation, atol=1e-12)
    np.testing.assert_array_equal(after.rotations[1], np.eye(3))
