"""Rotations, residuals, normal equations, correlations and sums on every executor, against float64 sums written out."""

from importlib import import_module

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from faml_gpu import kernels
from faml_gpu.fourier import make_support
from faml_gpu.geometry import random_rotations

# Norm-relative. Single precision: positions on the grid are of size c (up to 15), so a sample's fractions are good to
# 15 * 2^-24 = 9e-7 of a step, in which a random grid changes by as much as its values are large; phases add as much.
BOUND = {np.complex64: 5e-6, np.complex128: 1e-13}
DTYPES = list(BOUND)


def real(dtype):
    return np.zeros(0, dtype).real.dtype


def case(oracles, rng, box, r_max, padding, dtype, n_particles, n_poses):
    """Random grid, particles, weights and poses for `residual`."""
    support = make_support(box, r_max)
    m = len(support)
    return {
        "grid": oracles.random_grid(rng, padding * r_max + 1).astype(dtype),
        "spectra": (rng.standard_normal((n_particles, m)) + 1j * rng.standard_normal((n_particles, m))).astype(dtype),
        "weights": (rng.random((2, m)) * (rng.random((2, m)) < 0.8)).astype(real(dtype)),
        "weight_index": rng.integers(0, 2, n_particles),
        "rotations": random_rotations(n_particles * n_poses, rng).reshape(n_particles, n_poses, 3, 3),
        "shifts": rng.uniform(-3, 3, (n_particles, n_poses, 3)),
        "count": rng.integers(1, n_poses + 1, n_particles),
        "support": support,
        "padding": padding,
    }


SIZES = [(12, 5, 2), (13, 6, 1), (9, 1, 3), (15, 7, 2)]  # box, r_max, padding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("r_max", "padding"), [(5, 2), (6, 1), (1, 3)])
@pytest.mark.parametrize(("n", "m"), [(3, 101), (1, 1), (17, 7), (0, 5), (2, 0)])
def test_rotate(run, n, m, r_max, padding, dtype, rng, oracles):
    grid = oracles.random_grid(rng, padding * r_max + 1).astype(dtype)
    rotations = random_rotations(n, rng)
    coords = rng.standard_normal((m, 3))
    coords *= (r_max * rng.random(m) / np.maximum(np.linalg.norm(coords, axis=1), 1e-9))[:, None]
    found = run("rotate", grid, rotations, coords, padding)
    assert found.shape == (n, m)
    assert found.dtype == dtype
    cube = oracles.cube_of_grid(grid.astype(complex))
    expected = np.array([oracles.sample(cube, padding * coords @ r) for r in rotations]).reshape(n, m)
    assert np.linalg.norm(found - expected) <= BOUND[dtype] * np.linalg.norm(expected)


def test_rotate_more_poses_than_a_grid_has_rows(run, rng, oracles, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_ROWS", 2)
    grid, rotations = oracles.random_grid(rng, 4).astype(np.complex64), random_rotations(7, rng)
    found = run("rotate", grid, rotations, make_support(7, 3).coords, 1)
    for r, values in zip(rotations, found, strict=True):
        np.testing.assert_array_equal(run("rotate", grid, r[None], make_support(7, 3).coords, 1)[0], values)


def test_rotate_on_the_lattice_is_exact(run, oracles, rng):
    support = make_support(13, 6)
    grid = oracles.random_grid(rng, 7).astype(np.complex64)
    found = run("rotate", grid, oracles.cube_rotations(), support.coords, 1)
    cube = oracles.cube_of_grid(grid)
    for r, values in zip(oracles.cube_rotations(), found, strict=True):
        np.testing.assert_array_equal(values, oracles.at(cube, np.rint(support.coords @ r).astype(int)))


def literal_residual(oracles, c):
    cube = oracles.cube_of_grid(c["grid"].astype(complex))
    support, xi = c["support"], c["support"].coords.astype(float)
    shell = np.rint(np.linalg.norm(xi, axis=1)).astype(int)
    out = np.zeros((*c["shifts"].shape[:2], support.r_max + 1))
    for b, i in np.ndindex(out.shape[:2]):
        if i < c["count"][b]:
            a = oracles.sample(cube, c["padding"] * xi @ c["rotations"][b, i])
            a = a * oracles.phase(xi, c["shifts"][b, i], support.box)
            squared = np.abs(c["weights"][c["weight_index"][b]] * (c["spectra"][b] - a)) ** 2
            out[b, i] = 2 * np.bincount(shell, squared, minlength=support.r_max + 1)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("box", "r_max", "padding"), SIZES)
@pytest.mark.parametrize(("n_particles", "n_poses"), [(3, 5), (1, 1), (5, 1)])
def test_residual(run, n_particles, n_poses, box, r_max, padding, dtype, rng, oracles):
    c = case(oracles, rng, box, r_max, padding, dtype, n_particles, n_poses)
    found = run("residual", *c.values())
    expected = literal_residual(oracles, c)
    assert found.dtype == np.float64
    assert oracles.relative(found, expected) < BOUND[dtype]
    for b, n in enumerate(c["count"]):
        assert (found[b, n:] == 0).all()


def test_residual_of_shells_larger_than_a_block(run, rng, oracles):
    c = case(oracles, rng, 24, 11, 1, np.complex64, 1, 2)
    assert oracles.relative(run("residual", *c.values()), literal_residual(oracles, c)) < BOUND[np.complex64]


def test_residual_keeps_the_fraction_of_a_far_shift(run, rng, oracles):
    c = case(oracles, rng, 12, 5, 2, np.complex64, 1, 1)
    c["shifts"] += 5000
    assert oracles.relative(run("residual", *c.values()), literal_residual(oracles, c)) < BOUND[np.complex64]


def test_residual_without_candidates(run, rng, oracles):
    c = case(oracles, rng, 12, 5, 2, np.complex64, 3, 4)
    c["count"][:] = [0, 4, 0]
    found = run("residual", *c.values())
    assert (found[[0, 2]] == 0).all()
    assert (found[1, :, 1:] > 0).all()
    c["rotations"][[0, 2]] = np.nan  # never read
    np.testing.assert_array_equal(run("residual", *c.values()), found)
    c["count"][1] = 9  # more than there are
    np.testing.assert_array_equal(run("residual", *c.values()), found)
    for name in ("spectra", "weight_index", "rotations", "shifts", "count"):
        c[name] = c[name][:0]
    assert run("residual", *c.values()).shape == (0, 4, 6)


def gradients(cube, points, step=1e-6):
    """Of the trilinear interpolant, (n, 3): what its cells' corners say, by differences within a cell."""
    low = np.floor(points)
    inside = np.clip(points, low + 2 * step, low + 1 - 2 * step)
    sides = [step * e for e in np.eye(3)]
    return np.stack([(cube(inside + e) - cube(inside - e)) / (2 * step) for e in sides], axis=-1)


def literal_equations(oracles, c):
    """By the chain rule: the model at exp([omega]) R and t + tau, differentiated by omega and tau at 0."""
    cube = oracles.cube_of_grid(c["grid"].astype(complex))
    support, xi = c["support"], c["support"].coords.astype(float)
    out = np.zeros((*c["shifts"].shape[:2], 7, 7))
    for b, i in np.ndindex(out.shape[:2]):
        if i < c["count"][b]:
            r, w = c["rotations"][b, i], c["weights"][c["weight_index"][b]].astype(float)
            points = c["padding"] * xi @ r
            phase = oracles.phase(xi, c["shifts"][b, i], support.box)
            model = oracles.sample(cube, points) * phase
            slope = gradients(lambda x: oracles.sample(cube, x), points)
            g = []
            for axis in np.eye(3):
                moved = c["padding"] * np.cross(xi, axis) @ r  # exp(-[omega]) xi = xi + xi x omega
                g.append((slope * moved).sum(axis=1) * phase)
            g += [-2j * np.pi / support.box * xi[:, axis] * model for axis in range(3)]
            g = w * np.stack([*g, c["spectra"][b] - model])
            out[b, i] = 2 * (g.conj() @ g.T).real
    return out


# Differences of values and a fraction of a step that is a difference too: each costs a digit of `BOUND`'s.
EQUATIONS = {np.complex64: 5e-5, np.complex128: 1e-8}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("box", "r_max", "padding"), SIZES)
@pytest.mark.parametrize(("n_particles", "n_poses"), [(3, 5), (1, 1)])
def test_normal_equations(run, n_particles, n_poses, box, r_max, padding, dtype, rng, oracles):
    c = case(oracles, rng, box, r_max, padding, dtype, n_particles, n_poses)
    found, expected = run("normal_equations", *c.values()), literal_equations(oracles, c)
    assert found.dtype == np.float64
    assert found.shape == (n_particles, n_poses, 7, 7)
    for p, q in np.ndindex(7, 7):
        size = np.sqrt(expected[..., p, p] * expected[..., q, q]).max()
        assert abs(found[..., p, q] - expected[..., p, q]).max() <= EQUATIONS[dtype] * size, (p, q)
    for b, n in enumerate(c["count"]):
        assert (found[b, n:] == 0).all()


def test_normal_equations_of_more_voxels_than_a_run(run, rng, oracles):
    c = case(oracles, rng, 24, 11, 1, np.complex64, 1, 2)
    assert oracles.relative(run("normal_equations", *c.values()), literal_equations(oracles, c)) < 5e-5


def test_normal_equations_end_with_the_residual(run, rng, oracles):
    c = case(oracles, rng, 12, 5, 2, np.complex64, 3, 4)
    found = run("normal_equations", *c.values())[..., 6, 6]
    assert oracles.relative(found, literal_residual(oracles, c).sum(axis=-1)) < BOUND[np.complex64]


def test_normal_equations_find_the_way_back(run, rng, oracles):
    """A step of them from nearby ends nearer; of a grid that is smooth, so that its slope says where things lie."""
    support, padding = make_support(16, 5), 2
    centre = np.arange(-11, 12)
    z, y, x = np.meshgrid(centre, centre, np.arange(12), indexing="ij")
    waves = rng.standard_normal((6, 3)) * 0.25
    grid = sum(np.exp(1j * (k[0] * x + k[1] * y + k[2] * z)) for k in waves)
    r, t = random_rotations(1, rng)[0], rng.uniform(-1, 1, 3)
    cube = oracles.cube_of_grid(grid)
    xi = support.coords.astype(float)
    spectra = oracles.sample(cube, padding * xi @ r) * oracles.phase(xi, t, 16)
    omega, tau = np.array([0.02, -0.015, 0.01]), np.array([0.1, -0.05, 0.08])
    turned = Rotation.from_rotvec(-omega).as_matrix() @ r
    found = run(
        "normal_equations", grid, spectra[None], np.ones((1, len(support))), np.zeros(1, np.int64), turned[None, None],
        (t - tau)[None, None], np.ones(1, np.int64), support, padding,
    )[0, 0]  # fmt: skip
    step = np.linalg.solve(found[:6, :6], found[:6, 6])
    for part, whole in ((step[:3], omega), (step[3:], tau)):
        assert np.linalg.norm(part - whole) < 0.25 * np.linalg.norm(whole)


@pytest.mark.parametrize("op", ["residual", "normal_equations", "correlations"])
def test_unobserved_voxels_are_ignored(run, op, rng, oracles):
    make = correlations_case if op == "correlations" else case
    c = make(oracles, rng, 12, 5, 2, np.complex64, 2, 2)
    found = run(op, *c.values())
    c["spectra"][c["weights"][c["weight_index"]] == 0] = np.nan
    for before, after in zip(found, run(op, *c.values()), strict=True):
        np.testing.assert_array_equal(after, before)


def test_residual_of_an_exact_model_is_rounding(run, rng, oracles):
    c = case(oracles, rng, 13, 6, 2, np.complex64, 1, 1)
    xi = c["support"].coords.astype(float)
    cube = oracles.cube_of_grid(c["grid"].astype(complex))
    a = oracles.sample(cube, 2 * xi @ c["rotations"][0, 0]) * oracles.phase(xi, c["shifts"][0, 0], 13)
    c["spectra"] = a[None].astype(np.complex64)
    c["weights"][:] = 1
    # A difference of equal numbers: squares of 1e-6 of the values.
    assert run("residual", *c.values()).sum() < 1e-10 * 2 * (np.abs(a) ** 2).sum()


def lattice_waves(box, r_max, reach, spacing, dtype):
    """Shifts along an axis, and their waves."""
    line = spacing * np.arange(-reach, reach + 1)
    return line, np.exp(2j * np.pi / box * line[:, None] * np.arange(-r_max, r_max + 1)).astype(dtype)


def correlations_case(oracles, rng, box, r_max, padding, dtype, n_particles, n_entries, reach=2, spacing=0.7):
    c = case(oracles, rng, box, r_max, padding, dtype, n_particles, 1)
    particle = rng.integers(0, n_particles, n_entries)
    centres = rng.uniform(-3, 3, (n_entries, 3)) * (np.arange(n_entries) % 3 > 0)[:, None]  # of three one about 0
    if n_entries > 6:  # what one entry shares with that before it: all, the centre only, the particle only
        particle[3], centres[3] = particle[2], centres[2]
        particle[4], centres[4] = (particle[3] + 1) % n_particles, centres[3]
        particle[5], centres[5] = particle[4], centres[4] + [0, 0, 1e-3]
    return {name: c[name] for name in ("grid", "spectra", "weights", "weight_index")} | {
        "particle": particle,
        "rotations": random_rotations(n_entries, rng),
        "centres": centres,
        "waves": lattice_waves(box, r_max, reach, spacing, dtype)[1],
        "support": c["support"],
        "padding": padding,
    }


def literal_correlations(oracles, c, line):
    """Sums over the voxels written out at each shift, float64."""
    xi, box, padding = c["support"].coords.astype(float), c["support"].box, c["padding"]
    cube = oracles.cube_of_grid(c["grid"].astype(complex))
    shifts = np.stack(np.meshgrid(line, line, line, indexing="ij"), axis=-1)
    expected, power = np.zeros((len(c["particle"]), *shifts.shape[:3])), np.zeros(len(c["particle"]))
    for e, (b, r, centre) in enumerate(zip(c["particle"], c["rotations"], c["centres"], strict=True)):
        v = c["weights"][c["weight_index"][b]].astype(float)
        a = oracles.sample(cube, padding * (xi @ r))  # A(R^T xi)
        values = v * c["spectra"][b] * a.conj()
        for index in np.ndindex(shifts.shape[:3]):
            # `phase` is that of a shift, exp(-2 pi i xi.t / N).
            expected[(e, *index)] = 2 * (values * oracles.phase(xi, centre + shifts[index], box).conj()).sum().real
        power[e] = 2 * (v * abs(a) ** 2).sum()
    return expected, power


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("box", "r_max", "padding"), SIZES)
@pytest.mark.parametrize(("n_particles", "n_entries"), [(3, 11), (1, 1), (2, 0)])
def test_correlations(run, n_particles, n_entries, box, r_max, padding, dtype, rng, oracles):
    c = correlations_case(oracles, rng, box, r_max, padding, dtype, n_particles, n_entries)
    found, power = run("correlations", *c.values())
    expected, expected_power = literal_correlations(oracles, c, lattice_waves(box, r_max, 2, 0.7, dtype)[0])
    assert found.dtype == real(dtype)
    assert found.shape == expected.shape
    assert power.dtype == np.float64
    assert np.linalg.norm(found - expected) <= BOUND[dtype] * np.linalg.norm(expected)
    assert np.linalg.norm(power - expected_power) <= BOUND[dtype] * np.linalg.norm(expected_power)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("reach", "spacing"), [(0, 1.0), (1, 1.0), (7, 0.4), (8, 0.4), (9, 1.0)])
def test_correlations_at_few_and_many_shifts(run, reach, spacing, dtype, rng, oracles):
    """One, and more than the CPU's vectors hold."""
    c = correlations_case(oracles, rng, 12, 5, 2, dtype, 2, 3, reach, spacing)
    found, _ = run("correlations", *c.values())
    expected, _ = literal_correlations(oracles, c, lattice_waves(12, 5, reach, spacing, dtype)[0])
    assert np.linalg.norm(found - expected) <= BOUND[dtype] * np.linalg.norm(expected)


@pytest.mark.parametrize(("piece", "together"), [(1, 1), (20, 3), (40, 8)])
def test_correlations_in_pieces(run, piece, together, rng, oracles, monkeypatch):
    """On the CPU of the rows of a plane, and of rotations; on a GPU of as many as there is memory for."""
    c = correlations_case(oracles, rng, 13, 6, 2, np.complex64, 3, 11)
    module = import_module("faml_gpu.ops.correlations")
    whole = run("correlations", *c.values())
    monkeypatch.setattr(module, "PIECE", piece)
    monkeypatch.setattr(module, "TOGETHER", together)
    monkeypatch.setattr(module, "working_bytes", lambda array: 24 * 7 * 13**2 * together)
    for one, other in zip(whole, run("correlations", *c.values()), strict=True):
        assert np.linalg.norm(one - other) <= 1e-6 * np.linalg.norm(one)


def accumulate_case(oracles, rng, box, r_max, padding, dtype, n_particles, n_entries):
    weight = [oracles.random_grid(rng, r_max + 1, real=True) for _ in range(2)]
    return {
        "grids": np.stack([oracles.random_grid(rng, padding * r_max + 1) for _ in range(n_particles)]).astype(dtype),
        "weight_grids": np.stack(weight).astype(real(dtype)),
        "weight_index": rng.integers(0, 2, n_particles),
        "particle": np.sort(rng.integers(0, n_particles, n_entries)),
        "class_index": rng.integers(0, 2, n_entries),
        "rotations": random_rotations(n_entries, rng),
        "shifts": rng.uniform(-3, 3, (n_entries, 3)),
        "probability": rng.random(n_entries),
        "support": make_support(box, r_max),
        "padding": padding,
        "n_classes": 3,
    }


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("box", "r_max", "padding"), SIZES)
@pytest.mark.parametrize(("n_particles", "n_entries"), [(3, 8), (1, 1), (2, 0), (4, 40)])
def test_accumulate(run, n_particles, n_entries, box, r_max, padding, dtype, twice, rng, oracles):
    c = accumulate_case(oracles, rng, box, r_max, padding, dtype, n_particles, n_entries)
    sums, weights = run("accumulate", *c.values(), weigh_twice=twice)
    xi = c["support"].coords.astype(float)
    expected, expected_w = np.zeros((3, len(xi)), complex), np.zeros((3, len(xi)))
    for b, k, r, t, p in zip(
        c["particle"], c["class_index"], c["rotations"], c["shifts"], c["probability"], strict=True
    ):
        there = xi @ r.T  # R xi
        w = oracles.sample(oracles.cube_of_grid(c["weight_grids"][c["weight_index"][b]].astype(float)), there)
        x = oracles.sample(oracles.cube_of_grid(c["grids"][b].astype(complex)), padding * there)
        x = x * np.conj(oracles.phase(there, t, box))
        expected[k] += p * x * (w if twice else 1)
        expected_w[k] += p * w
    assert sums.dtype == np.complex128
    assert weights.dtype == np.float64
    assert np.linalg.norm(sums - expected) <= BOUND[dtype] * np.linalg.norm(expected)
    assert np.linalg.norm(weights - expected_w) <= BOUND[dtype] * np.linalg.norm(expected_w)
    assert (sums[2] == 0).all()  # a class nobody is in


def test_accumulate_adds_in_the_order_of_the_list(run, rng, oracles):
    c = accumulate_case(oracles, rng, 13, 6, 2, np.complex64, 3, 20)
    first = run("accumulate", *c.values())
    for found, again in zip(first, run("accumulate", *c.values()), strict=True):
        np.testing.assert_array_equal(found, again)


WRONG_RESIDUAL = ["spectra", "weights", "weight_index", "rotations", "shifts", "count"]
WRONG_CORRELATIONS = ["spectra", "weights", "weight_index", "particle", "rotations", "centres", "waves"]
WRONG_ACCUMULATE = ["weight_index", "particle", "class_index", "rotations", "shifts", "probability"]


def spoiled(array, how):
    if how == "dtype":
        other = {"c": np.complex128, "f": np.float32 if array.dtype == np.float64 else np.float64, "i": np.int32}
        return array.astype(other[array.dtype.kind])
    if how == "strided":
        return np.repeat(array, 2, axis=-1)[..., ::2]
    return array[..., :-1].copy()


@pytest.mark.parametrize("how", ["dtype", "strided", "shape"])
@pytest.mark.parametrize("name", WRONG_RESIDUAL)
@pytest.mark.parametrize("op", ["residual", "normal_equations"])
def test_residual_refuses(run, op, name, how, rng, oracles):
    c = case(oracles, rng, 12, 5, 2, np.complex64, 3, 4)
    c[name] = spoiled(c[name], how)
    with pytest.raises((TypeError, ValueError), match=name):
        run(op, *c.values())


@pytest.mark.parametrize("how", ["dtype", "strided", "shape"])
@pytest.mark.parametrize("name", WRONG_CORRELATIONS)
def test_correlations_refuses(run, name, how, rng, oracles):
    c = correlations_case(oracles, rng, 12, 5, 2, np.complex64, 3, 4)
    if (name, how) == ("particle", "shape"):
        c["rotations"] = c["rotations"][:-1]  # the length of `particle` is what the others are held against
        name = "rotations"
    else:
        c[name] = spoiled(c[name], how)
    with pytest.raises((TypeError, ValueError), match=name):
        run("correlations", *c.values())


@pytest.mark.parametrize("how", ["dtype", "strided", "shape"])
@pytest.mark.parametrize("name", WRONG_ACCUMULATE)
def test_accumulate_refuses(run, name, how, rng, oracles):
    c = accumulate_case(oracles, rng, 12, 5, 2, np.complex64, 3, 4)
    if (name, how) == ("particle", "shape"):
        c["class_index"] = c["class_index"][:-1]  # the length of `particle` is what the others are held against
        name = "class_index"
    else:
        c[name] = spoiled(c[name], how)
    with pytest.raises((TypeError, ValueError), match=name):
        run("accumulate", *c.values())


@pytest.mark.parametrize("how", ["dtype", "strided", "shape"])
def test_rotate_refuses_rotations(run, how, rng, oracles):
    grid = oracles.random_grid(rng, 5).astype(np.complex64)
    with pytest.raises((TypeError, ValueError), match="rotations"):
        run("rotate", grid, spoiled(random_rotations(3, rng), how), rng.standard_normal((4, 3)), 1)


@pytest.mark.parametrize("op", ["rotate", "residual", "correlations", "accumulate"])
def test_grids_are_refused_strided_or_real(run, op, rng, oracles):
    if op == "rotate":
        c = {"grid": oracles.random_grid(rng, 5), "r": random_rotations(3, rng), "c": np.zeros((4, 3)), "p": 1}
    elif op == "residual":
        c = case(oracles, rng, 12, 5, 2, np.complex128, 3, 4)
    elif op == "correlations":
        c = correlations_case(oracles, rng, 12, 5, 2, np.complex128, 3, 4)
    else:
        c = accumulate_case(oracles, rng, 12, 5, 2, np.complex128, 3, 4)
    name = next(iter(c))
    whole = c[name]
    for wrong in (np.repeat(whole, 2, axis=-1)[..., ::2], whole.real.copy()):
        c[name] = wrong
        with pytest.raises((TypeError, ValueError)):
            run(op, *c.values())


@pytest.mark.parametrize(
    ("op", "name", "spoil"),
    [
        ("accumulate", "weight_grids", lambda a: a.astype(np.float64)),
        ("accumulate", "weight_grids", lambda a: np.repeat(a, 2, axis=-1)[..., ::2]),
        ("accumulate", "weight_grids", lambda a: a[:, :-2, :-2, :-1].copy()),
        ("accumulate", "grids", lambda a: a[:, :-1].copy()),
        ("accumulate", "grids", lambda a: a[:, :-2, :-2, :-1].copy()),
        ("correlations", "grid", lambda a: a[:-2, :-2, :-1].copy()),
        ("normal_equations", "grid", lambda a: a[:-1].copy()),
        ("residual", "grid", lambda a: a[:-1].copy()),
        ("residual", "grid", lambda a: a[:-2, :-2, :-1].copy()),
    ],
)
def test_grids_of_another_size_or_type_are_refused(run, op, name, spoil, rng, oracles):
    make = {"accumulate": accumulate_case, "correlations": correlations_case}.get(op, case)
    c = make(oracles, rng, 12, 5, 2, np.complex64, 3, 4)
    c[name] = spoil(c[name])
    with pytest.raises((TypeError, ValueError), match=name):
        run(op, *c.values())
