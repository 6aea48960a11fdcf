"""Point groups against RELION's definitions, averages over copies, asymmetric units, helices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from faml_gpu import fourier, maximization
from faml_gpu.errors import InputError
from faml_gpu.expectation import BatchPosterior
from faml_gpu.geometry import random_rotations, rotation_angle
from faml_gpu.masks import soft_sphere
from faml_gpu.metrics import correlation
from faml_gpu.posteriors import one_hot
from faml_gpu.simulate import Phantom, density, groel, simulate_particles
from faml_gpu.symmetry import (
    distinct,
    helical_operators,
    impose_helix,
    nearest_copies,
    point_group,
    symmetrise,
    unique_rotations,
)

GROUPS = {"C1": 1, "C7": 7, "D1": 2, "D2": 4, "D7": 14, "T": 12, "O": 24, "I1": 60, "I2": 60}
BOX, R_MAX = 16, 6


def axes(group: np.ndarray, order: int) -> np.ndarray:
    """Unit vectors (both directions) that the group's rotations by 360 / order degrees turn about."""
    vectors = Rotation.from_matrix(group).as_rotvec()
    angles = np.linalg.norm(vectors, axis=1)
    found = vectors[np.abs(angles - 2 * np.pi / order) < 1e-6] * order / (2 * np.pi)
    return np.concatenate([found, -found])


def expand(posterior: Any, group: np.ndarray) -> Any:
    """Every entry (particle, class, R, t, P) of a posterior as its g copies (R S, t, P / g)."""
    g = len(group)
    names = ("particle", "class_index", "shifts", "residual")
    copied = {n: np.repeat(getattr(posterior, n), g, axis=0) for n in names if hasattr(posterior, n)}
    rotations = (posterior.rotations[:, None] @ group).reshape(-1, 3, 3)
    return replace(posterior, **copied, rotations=rotations, probability=np.repeat(posterior.probability / g, g))


def has(vectors: np.ndarray, axis: Any) -> bool:
    unit = np.asarray(axis, dtype=float) / np.linalg.norm(axis)
    return bool(len(vectors)) and bool(np.abs(vectors - unit).max(axis=1).min() < 1e-6)


# --- groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_is_a_group_of_the_right_order(name: str) -> None:
    group = point_group(name.lower())
    assert group.shape == (GROUPS[name], 3, 3)
    np.testing.assert_array_equal(group[0], np.eye(3))
    np.testing.assert_allclose(np.linalg.det(group), 1, atol=1e-12)
    np.testing.assert_allclose(group @ np.swapaxes(group, 1, 2), np.broadcast_to(np.eye(3), group.shape), atol=1e-12)
    products = np.einsum("aij,bjk->abik", group, group).reshape(-1, 1, 3, 3)
    distance = np.abs(products - group).max(axis=(2, 3))
    assert distance.min(axis=1).max() < 1e-12  # closed
    assert (distance < 1e-6).sum() == len(group) ** 2  # no element twice


@pytest.mark.parametrize(
    ("name", "fold", "along", "not_along"),
    [
        # RELION, "Conventions", section "Symmetry".
        ("C7", 7, [(0, 0, 1)], [(1, 0, 0)]),
        ("D7", 7, [(0, 0, 1)], [(1, 0, 0)]),
        ("D7", 2, [(1, 0, 0)], [(0, 1, 0), (0, 0, 1)]),
        ("D3", 2, [(1, 0, 0)], [(0, 1, 0)]),
        ("T", 3, [(0, 0, 1)], [(1, 1, 1)]),
        # The two-fold of RELION's table of operators for T.
        ("T", 2, [(0, 0.816496, 0.577350)], [(0, 0, 1), (0, -0.816496, 0.577350)]),
        ("O", 4, [(0, 0, 1), (1, 0, 0), (0, 1, 0)], []),
        ("O", 3, [(1, 1, 1)], [(0, 0, 1)]),
        ("I1", 2, [(0, 0, 1), (1, 0, 0), (0, 1, 0)], []),
        ("I1", 5, [(0.85065080702670, 0, -0.5257311142635)], [(0.525731114, 0, 0.850650807)]),
        ("I1", 3, [(0.9341723640, 0.3568220765, 0)], [(0, 0.356822076, 0.934172364)]),
        ("I2", 2, [(0, 0, 1), (1, 0, 0), (0, 1, 0)], []),
        ("I2", 5, [(0.525731114, 0, 0.850650807)], [(0.85065080702670, 0, -0.5257311142635)]),
        ("I2", 3, [(0, 0.356822076, 0.934172364)], [(0.9341723640, 0.3568220765, 0)]),
        ("I", 5, [(0.525731114, 0, 0.850650807)], []),  # a bare I is I2
    ],
)
def test_axes_lie_where_relion_has_them(name: str, fold: int, along: list[Any], not_along: list[Any]) -> None:
    found = axes(point_group(name), fold)
    assert all(has(found, axis) for axis in along)
    assert not any(has(found, axis) for axis in not_along)


@pytest.mark.parametrize(("name", "five", "three"), [("I1", 0, 1), ("I2", 1, 0)])
def test_the_front_most_axes_of_the_icosahedron(name: str, five: int, three: int) -> None:
    """I1: the five-folds nearest to z in the plane yz (x = 0), the three-folds in xz (y = 0). I2: the other way."""
    for order, zero in ((5, five), (3, three)):
        found = axes(point_group(name), order)
        front = found[found[:, 2] > found[:, 2].max() - 1e-6]
        np.testing.assert_allclose(front[:, zero], 0, atol=1e-9)
        assert np.abs(front[:, 1 - zero]).min() > 0.1


@pytest.mark.parametrize("name", ["T", "O", "I"])
def test_a_polyhedral_group_is_scipys_up_to_a_rotation(name: str) -> None:
    """The angles between all pairs of elements, which no common rotation changes."""

    def angles(group: np.ndarray) -> np.ndarray:
        return np.sort(rotation_angle(group[:, None], group[None]), axis=None)

    np.testing.assert_allclose(angles(point_group(name)), angles(Rotation.create_group(name).as_matrix()), atol=1e-5)


@pytest.mark.parametrize("name", ["", "C", "C0", "D0", "X", "I3", "C1234", "Oh", "D7x", "C 7"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"point group: found .*, expected C1"):
        point_group(name)


# --- averages -----------------------------------------------------------------------------------------------


class Small:
    """Three noisy particles with a missing wedge and a posterior of several entries each."""

    def __init__(self, box: int = BOX, r_max: int = R_MAX) -> None:
        rng = np.random.default_rng(5)
        mask = soft_sphere(box, box / 2 - 4, 3)
        weight = np.ones((1, box, box, box // 2 + 1), np.float32)
        weight[:, : box // 4] = 0.25
        self.support = fourier.make_support(box, r_max)
        self.spectra = fourier.transform(rng.standard_normal((3, box, box, box)).astype(np.float32) * mask)
        self.weight, self.mask = weight, mask
        particle = np.array([0, 0, 1, 2, 2, 2])
        n = len(particle)
        self.posterior = BatchPosterior(
            particle=particle,
            class_index=np.array([0, 1, 1, 0, 0, 1]),
            rotations=random_rotations(n, rng),
            shifts=rng.uniform(-1, 1, (n, 3)),
            probability=np.array([0.4, 0.6, 1.0, 0.2, 0.3, 0.5]),
            residual=rng.random((n, r_max + 1)),
            shift2=np.zeros(n),
            log_likelihood=np.zeros(3),
            class_probability=np.full((3, 2), 0.5),
            candidates=12,
            gain=np.zeros(3),
        )

    def accumulated(self, posterior: BatchPosterior) -> tuple[np.ndarray, np.ndarray]:
        return maximization.rotate_back(
            self.spectra, self.weight, np.zeros(3, np.int64), self.mask, posterior, self.support, 2, 2
        )


@pytest.mark.parametrize("box", [16, 17])
def test_copies_on_the_grid_are_exact(box: int) -> None:
    """The octahedral group maps the voxel grid onto itself: the average over it is that of permuted full cubes."""
    small, group = Small(box), point_group("O")
    sums, weights = small.accumulated(small.posterior)
    found, found_weights = symmetrise(sums, weights, small.support, group)
    x, y, z = small.support.coords.T
    for values, result in ((sums, found), (weights, found_weights)):
        size = 2 * R_MAX + 1
        cube = np.zeros((2, size, size, size), np.complex128)
        cube[:, z + R_MAX, y + R_MAX, x + R_MAX] = values
        cube[:, R_MAX - z, R_MAX - y, R_MAX - x] = values.conj()
        expected = np.zeros_like(values)
        for element in np.rint(group).astype(int):
            turned = small.support.coords @ element  # rows: xi^T S = (S^T xi)^T
            expected = expected + cube[:, turned[:, 2] + R_MAX, turned[:, 1] + R_MAX, turned[:, 0] + R_MAX]
        np.testing.assert_allclose(result, expected / 24, rtol=1e-10)


@pytest.mark.parametrize("name", ["C7", "T", "I1"])
def test_averaged_sums_are_nearly_those_of_the_expansion(name: str) -> None:
    """What is interpolated twice differs from what is interpolated once by the interpolation's own error.

    Below the outermost shells, which mix with what is beyond the support: DESIGN gives the interpolation 2.2 % at
    generic rotations with padding 2, for structures; white noise fills the mask to its rim and errs most. The weights
    have a step, which a second trilinear sample widens (4 % here).
    """
    small, group = Small(24, 9), point_group(name)
    sums, weights = symmetrise(*small.accumulated(small.posterior), small.support, group)
    exact_sums, exact_weights = small.accumulated(expand(small.posterior, group))
    inner = small.support.shell <= 6
    for found, exact, bound in ((sums, exact_sums, 0.1), (weights, exact_weights, 0.06)):
        error = np.linalg.norm((found - exact)[:, inner]) / np.linalg.norm(exact[:, inner])
        assert error < bound
    # And as far from the sums before as the copies say.
    before = small.accumulated(small.posterior)[0]
    assert np.linalg.norm((before - exact_sums)[:, inner]) > 0.5 * np.linalg.norm(exact_sums[:, inner])


def test_no_symmetry_changes_nothing() -> None:
    small = Small()
    sums, weights = small.accumulated(small.posterior)
    same = symmetrise(sums, weights, small.support, point_group("C1"))
    np.testing.assert_array_equal(same[0], sums)
    np.testing.assert_array_equal(same[1], weights)


@pytest.mark.parametrize("way", ["symmetrise", "expand"])
def test_a_seven_fold_average_is_better_with_its_symmetry(way: str) -> None:
    """Same data, poses known: averaging the seven copies takes noise away and nothing of the structure."""
    phantom, box, voxel, n = groel(), 24, 15.0, 20
    data = simulate_particles([phantom], [n], box=box, voxel_size=voxel, snr=0.01, seed=4)
    support, mask = fourier.make_support(box, 10), soft_sphere(box, 9, 3)
    posterior = one_hot(np.zeros(n, np.int64), data.rotations, data.shifts, 1, known=True)
    group = point_group("C7")

    def average(posterior: Any, symmetric: bool) -> float:
        sums, weights = maximization.rotate_back(
            fourier.transform(data.boxes), data.weight[None], np.zeros(n, np.int64), mask, posterior, support, 2, 1
        )
        if symmetric:
            sums, weights = symmetrise(sums, weights, support, group)
        mean = maximization.direct_average(sums, weights, np.array([float(n)]))
        volume = fourier.inverse_transform(support.scatter(mean), box)[0]
        return correlation(volume, density(phantom, box, voxel), mask)

    r_c1 = average(posterior, False)
    r_c7 = average(posterior, True) if way == "symmetrise" else average(expand(posterior, group), False)
    assert r_c1 < 0.93  # the case is one where there is something to win
    assert r_c7 > r_c1 + 0.03


# --- poses --------------------------------------------------------------------------------------------------


def test_of_copies_the_first_is_kept() -> None:
    rng, group = np.random.default_rng(3), point_group("C7")
    poses = random_rotations(3, rng)
    near = Rotation.from_rotvec(np.deg2rad([[0, 3.0, 0]])).as_matrix()[0]
    candidates = np.stack([poses[0], poses[1], poses[0] @ group[3], near @ poses[1] @ group[5], poses[0], poses[2]])
    shifts = np.zeros((6, 3))
    shifts[4] = [0, 0, 2.0]  # the same rotation elsewhere is another pose
    keep = distinct(candidates[None], shifts[None], np.array([5]), group, angle=5.0, distance=1.0)
    np.testing.assert_array_equal(keep, [[True, True, False, False, True, False]])
    strict = distinct(candidates[None], shifts[None], np.array([5]), group, angle=2.0, distance=1.0)
    np.testing.assert_array_equal(strict, [[True, True, False, True, True, False]])
    alone = distinct(candidates[None], shifts[None], np.array([5]), point_group("C1"), angle=5.0, distance=1.0)
    np.testing.assert_array_equal(alone, [[True, True, True, True, True, False]])


@pytest.mark.parametrize("name", ["C1", "C7", "D7", "O", "I2"])
def test_candidates_are_reduced_to_one_of_each_orbit(name: str) -> None:
    """All copies of six poses, best pose first, each off by up to a degree: of five one copy each is left."""
    rng, group = np.random.default_rng(6), point_group(name)
    poses = random_rotations(6, rng)
    copies = (poses[:, None] @ group).reshape(-1, 3, 3)
    jitter = Rotation.from_rotvec(np.deg2rad(rng.uniform(-0.5, 0.5, (len(copies), 3)))).as_matrix()
    candidates = np.tile(jitter @ copies, (2, 1, 1, 1))
    found, count = unique_rotations(candidates, np.array([len(copies), 3 * len(group)]), group, 5, angle=2.0)
    assert found.shape == (2, 5, 3, 3)
    np.testing.assert_array_equal(count, [5, 3])
    for b in range(2):
        for i in range(count[b]):
            assert rotation_angle(found[b, i] @ group, poses[i]).min() < 1.0
            assert rotation_angle(found[b, i], np.eye(3)) < rotation_angle(poses[i] @ group, np.eye(3)).min() + 3.0
    np.testing.assert_array_equal(found[1, 3:], np.tile(np.eye(3), (2, 1, 1)))


# --- helices ------------------------------------------------------------------------------------------------


def helix(rise: float, twist: float, length: float, box: int) -> np.ndarray:
    """A filament of blobs, one a subunit, beyond or within the box (voxels)."""
    steps = np.arange(-int(length / rise), int(length / rise) + 1)
    angle = np.deg2rad(twist * steps)
    centres = np.stack([6 * np.cos(angle), 6 * np.sin(angle), rise * steps], axis=1)
    n = len(steps)
    return density(Phantom("helix", centres, np.full(n, 1.5), np.ones(n), "C1", 20.0), box, 1.0)


def test_operators_take_one_subunit_to_the_next() -> None:
    rotations, shifts = helical_operators(3.0, 40.0, 4)
    assert rotations.shape == (9, 3, 3)
    start = np.array([6.0, 0.0, 0.0])
    for j, place in zip(range(-4, 5), rotations @ start + shifts, strict=True):
        angle = np.deg2rad(40.0 * j)
        np.testing.assert_allclose(place, [6 * np.cos(angle), 6 * np.sin(angle), 3.0 * j], atol=1e-12)


@pytest.mark.parametrize("box", [32, 33])
def test_a_filament_whose_ends_are_missing_is_made_whole(box: int) -> None:
    whole, short = helix(3.0, 40.0, 60.0, box), helix(3.0, 40.0, 10.0, box)
    cylinder = np.hypot(*np.meshgrid(*2 * [np.arange(box) - box // 2])) < 10
    mask = np.broadcast_to(cylinder, whole.shape).astype(float)
    made = impose_helix(short, 3.0, 40.0)
    np.testing.assert_allclose(made[:, cylinder], whole[:, cylinder], atol=0.02 * whole.max())
    assert correlation(short, whole, mask) < 0.9
    assert correlation(impose_helix(short, 3.0, -40.0), whole, mask) < 0.7  # the other hand


def test_copies_from_beyond_the_box_are_not_made_up() -> None:
    whole = helix(3.0, 40.0, 60.0, 32)
    cylinder = np.hypot(*np.meshgrid(*2 * [np.arange(32) - 16])) < 10
    made = impose_helix(whole, 3.0, 40.0, central=1.0)
    np.testing.assert_allclose(made[2:-2, cylinder], whole[2:-2, cylinder], atol=0.03 * whole.max())


def test_noise_falls_with_the_number_of_copies() -> None:
    """Central part of 0.5 x 32 = 16 voxels and its soft ends, rise 2: about nine copies, noise down to about 1/3."""
    clean = helix(2.0, 55.0, 60.0, 32)
    noise = np.random.default_rng(1).standard_normal(clean.shape)
    cylinder = np.hypot(*np.meshgrid(*2 * [np.arange(32) - 16])) < 10
    noisy, smooth = (impose_helix(volume, 2.0, 55.0, central=0.5) for volume in (noise + clean, clean))
    assert 0.15 < (noisy - smooth)[:, cylinder].std() < 0.4


@pytest.mark.parametrize(("rise", "central"), [(0.0, 0.3), (9.0, 0.25), (2.0, 0.0), (2.0, 1.5)])
def test_a_helix_that_does_not_fit_is_refused(rise: float, central: float) -> None:
    with pytest.raises(InputError, match=r"helix: found"):
        impose_helix(np.zeros((32, 32, 32)), rise, 20.0, central=central)


@pytest.mark.parametrize("name", ["C1", "C4", "D7", "O"])
def test_copies_in_the_asymmetric_unit(name, rng):
    group, rotations = point_group(name), random_rotations(40, rng).reshape(8, 5, 3, 3)
    found = nearest_copies(rotations, np.eye(3), group)
    turned = np.swapaxes(rotations, -1, -2) @ found
    assert rotation_angle(turned[:, :, None], group).min(axis=-1).max() < 1e-5  # degrees: a copy
    least = rotation_angle(rotations[:, :, None] @ group, np.eye(3)).min(axis=-1)
    np.testing.assert_allclose(rotation_angle(found, np.eye(3)), least, atol=1e-5)
