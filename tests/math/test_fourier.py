"""Supports, transforms and interpolation grids against whole cubes of NumPy's transform."""

import numpy as np
import pytest

from faml_gpu import fourier, ops
from faml_gpu.geometry import random_rotations

BOXES = [12, 13]


@pytest.mark.parametrize("box", BOXES)
def test_origin_is_voxel_n_half(box):
    # A delta at the box centre has transform 1; one a voxel along x has exp(-2 pi i kx / N).
    centre = box // 2
    delta = np.zeros((2, box, box, box))
    delta[0, centre, centre, centre] = 1
    delta[1, centre, centre, centre + 1] = 1
    found = fourier.transform(delta)
    np.testing.assert_allclose(found[0], 1, atol=1e-12)
    kx = np.arange(box // 2 + 1)
    np.testing.assert_allclose(found[1], np.broadcast_to(np.exp(-2j * np.pi * kx / box), found[1].shape), atol=1e-12)


@pytest.mark.parametrize("box", BOXES)
def test_transform_is_the_direct_sum(box, rng, oracles):
    volume = rng.standard_normal((box, box, box))
    found = fourier.transform(volume)
    k = np.arange(box) - box // 2
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    for kx, ky, kz in [(0, 0, 0), (1, 0, 0), (2, -3, 4), (5, 5, -5), (0, -1, 2)]:
        direct = (volume * np.exp(-2j * np.pi * (kx * x + ky * y + kz * z) / box)).sum()
        np.testing.assert_allclose(found[kz % box, ky % box, kx], direct, atol=1e-10)
    np.testing.assert_allclose(fourier.inverse_transform(found, box), volume, atol=1e-12)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("r_max", [1, 4, None])
def test_support_is_one_of_each_pair(box, r_max, oracles):
    r_max = r_max or fourier.full_band(box)
    support = fourier.make_support(box, r_max)
    points, _ = oracles.ball(r_max)
    both = np.concatenate([support.coords, -support.coords])
    assert len(both) == len(points)
    assert {tuple(p) for p in both} == {tuple(p) for p in points}
    np.testing.assert_array_equal(support.shell, np.rint(np.linalg.norm(support.coords, axis=1)))
    for s in range(r_max + 1):
        part = support.shell[support.shell_start[s] : support.shell_start[s + 1]]
        assert (part == s).all()
        assert len(part) == (support.shell == s).sum()


@pytest.mark.parametrize("box", BOXES)
def test_full_band_keeps_out_the_nyquist_planes(box):
    r_max = fourier.full_band(box)
    assert r_max == int(np.ceil(box / 2)) - 1
    for bad in (0, r_max + 1):
        with pytest.raises(ValueError, match="r_max"):
            fourier.make_support(box, bad)


@pytest.mark.parametrize("box", BOXES)
def test_gather_takes_and_scatter_puts_back(box, rng, oracles):
    volumes = rng.standard_normal((2, box, box, box))
    support = fourier.make_support(box, fourier.full_band(box))
    values = support.gather(fourier.transform(volumes))
    for i in range(2):
        np.testing.assert_allclose(values[i], oracles.at(oracles.centred_cube(volumes[i]), support.coords), atol=1e-10)
    # The volume that comes back is the band-limited one, taken over the whole cube.
    back = fourier.inverse_transform(support.scatter(values), box)
    k = np.arange(box) - box // 2
    square = k[:, None, None] ** 2 + k[:, None] ** 2 + k**2
    for i in range(2):
        cube = oracles.centred_cube(volumes[i]) * ((square > 0) & (square <= support.r_max**2))
        np.testing.assert_allclose(back[i], oracles.centred_volume(cube), atol=1e-12)
    np.testing.assert_array_equal(support.gather(support.scatter(values)), values)
    assert support.scatter(values.astype(np.complex64)).dtype == np.complex64


@pytest.mark.parametrize("box", BOXES)
def test_shell_sums_count_both_of_a_pair(box, rng, oracles):
    volume = rng.standard_normal((box, box, box))
    support = fourier.make_support(box, 4)
    found = support.shell_sums(np.abs(support.gather(fourier.transform(volume))) ** 2)
    points, shell = oracles.ball(4)
    power = np.abs(oracles.at(oracles.centred_cube(volume), points)) ** 2
    np.testing.assert_allclose(found, np.bincount(shell, power, minlength=5), rtol=1e-12)
    assert found[0] == 0


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("padding", [1, 2, 3])
def test_interpolation_grid_is_the_padded_transform(box, padding, rng, oracles):
    volume = rng.standard_normal((box, box, box))
    r_max = 4
    found = oracles.cube_of_grid(fourier.interpolation_grid(volume, r_max, padding))
    cube = oracles.padded_cube(volume, padding, compensate=True)
    c, middle = padding * r_max + 1, box * padding // 2
    expected = cube[(slice(middle - c, middle + c + 1),) * 3]
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("box", [24, 25])
@pytest.mark.parametrize(
    ("padding", "bound"),
    # DESIGN section 3: 2.2 % at padding 2 and .9 % at 3, 5.6 % and 2.4 % without compensation. The error of a blob
    # grows as the square of its distance from the centre; these fill a sphere of .6 of half the box.
    [(2, 0.024), (3, 0.011)],
)
def test_generic_rotations_against_the_analytic_transform(box, padding, bound, rng, oracles):
    structure = oracles.blobs(rng, 60, 0.3 * box, 1.3)
    volume = oracles.blob_volume(box, *structure)
    r_max = fourier.full_band(box)
    support = fourier.make_support(box, r_max)
    rotations = random_rotations(8, rng)
    expected = np.stack([oracles.blob_transform(box, support.coords @ r, *structure) for r in rotations])
    found = ops.rotate(fourier.interpolation_grid(volume, r_max, padding), rotations, support.coords, padding)
    error = oracles.relative(found, expected)
    assert error < bound
    plain = fourier.interpolation_grid(volume, r_max, padding, compensate=False)
    assert error < 0.5 * oracles.relative(ops.rotate(plain, rotations, support.coords, padding), expected)


@pytest.mark.parametrize("box", BOXES)
def test_lattice_rotations_are_exact_without_padding(box, rng, oracles):
    volume = rng.standard_normal((box, box, box))
    r_max = fourier.full_band(box)
    support = fourier.make_support(box, r_max)
    grid = fourier.interpolation_grid(volume, r_max, 1, compensate=False)
    rotations = oracles.cube_rotations()
    found = ops.rotate(grid, rotations, support.coords, 1)
    cube = oracles.centred_cube(volume)
    for r, values in zip(rotations, found, strict=True):
        # A(R^T xi), R^T xi = xi R with xi as a row.
        np.testing.assert_allclose(values, oracles.at(cube, np.rint(support.coords @ r).astype(int)), atol=1e-10)


@pytest.mark.parametrize("box", BOXES)
def test_a_rotated_blob_moves_as_the_pose_says(box, rng, oracles):
    # Real space, no Fourier code on the expected side: a blob at p ends at R p.
    structure = oracles.blobs(rng, 3, 0.25 * box, 1.4)
    r_max = fourier.full_band(box)
    support = fourier.make_support(box, r_max)
    rotation = random_rotations(1, rng)
    grid = fourier.interpolation_grid(oracles.blob_volume(box, *structure), r_max, 3)
    moved = ops.rotate(grid, rotation, support.coords, 3)
    found = fourier.inverse_transform(support.scatter(moved), box)[0]
    centres, widths, masses = structure
    expected = oracles.blob_volume(box, centres @ rotation[0].T, widths, masses)
    found, expected = found - found.mean(), expected - expected.mean()
    # The band is a sphere, the blob volume has the corners too: a few percent.
    assert oracles.relative(found, expected) < 0.05


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("r_max", [3, None])
def test_weight_grid_is_the_centred_weight(box, r_max, rng, oracles):
    r_max = r_max or fourier.full_band(box)
    cube = oracles.wedge_cube(box, [0.2, 0.1, 1], 0.8) * 0.7
    half = oracles.half_of_cube(cube)
    grid = oracles.cube_of_grid(fourier.weight_grid(half[None], r_max)[0])
    assert grid.shape == (2 * r_max + 3,) * 3
    points, _ = oracles.ball(r_max)
    np.testing.assert_array_equal(oracles.at(grid, points), oracles.at(cube, points))


@pytest.mark.parametrize(("box", "r_max", "inner"), [(12, 5, None), (13, 6, 4), (16, 7, 5), (9, 4, 3)])
def test_rows_hold_each_voxel_once(box, r_max, inner):
    support = fourier.make_support(box, r_max)
    support = support if inner is None else support.within(inner)
    assert inner is None or len(support) > len(fourier.make_support(box, inner))  # of its last shell all
    order, rows = fourier.support_rows(support)
    assert sorted(order) == list(range(len(support)))
    found = [(kx, ky, first + j - start, order[j]) for kx, ky, first, start, stop in rows for j in range(start, stop)]
    assert len(found) == len(support)
    for *voxel, j in found:
        np.testing.assert_array_equal(support.coords[j], voxel)
    assert len({(kx, ky) for kx, ky, *_ in rows}) == len(rows)
