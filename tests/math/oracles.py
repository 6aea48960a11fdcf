"""Slow float64 definitions that tests of the numerical core are held against.

Everything is written over whole, centred Fourier cubes and with NumPy's own transforms, without the half lists,
half grids and phase tables of the package; the only things taken from it are the documented layouts of what goes in
and out (`half_grid`: (2c + 1, 2c + 1, c + 1), axes [kz + c, ky + c, kx]; vectors in (x, y, z) order).
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import map_coordinates


def blobs(rng, n, spread, width):
    """Gaussian blobs: centres (n, 3) voxels within `spread` of the box centre, standard deviations, masses."""
    centres = rng.standard_normal((n, 3))
    centres *= (spread * rng.random(n) ** (1 / 3) / np.linalg.norm(centres, axis=1))[:, None]
    return centres, width * rng.uniform(0.9, 1.2, n), rng.uniform(0.5, 1.5, n)


def blob_volume(box, centres, widths, masses):
    """[z, y, x] float64: each blob a Gaussian of integral `mass` about its centre, from voxel N // 2."""
    k = np.arange(box) - box // 2
    out = np.zeros((box, box, box))
    for p, s, mass in zip(centres, widths, masses, strict=True):
        x, y, z = (np.exp(-((k - p[axis]) ** 2) / (2 * s * s)) for axis in range(3))
        out += mass / (2 * np.pi * s * s) ** 1.5 * z[:, None, None] * y[:, None] * x
    return out


def blob_transform(box, points, centres, widths, masses):
    """The blobs' transform at points (n, 3), in Fourier voxels of the box: mass exp(-2 pi^2 s^2 q^2 - 2 pi i q.p)."""
    q = np.asarray(points, float) / box
    out = np.zeros(len(q), complex)
    for p, s, mass in zip(centres, widths, masses, strict=True):
        out += mass * np.exp(-2 * np.pi**2 * s * s * (q**2).sum(axis=1) - 2j * np.pi * q @ p)
    return out


def centred_cube(volume):
    """Unscaled DFT of [z, y, x] about voxel N // 2, with frequency 0 at N // 2 too; every voxel stored."""
    return np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(volume)))


def centred_volume(cube):
    """The volume of `centred_cube`."""
    return np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(cube))).real


def cube_of_half(half, box):
    """A centred cube (N, N, N) of the rfftn-layout array (N, N, N // 2 + 1), by f(-xi) = conj f(xi)."""
    out = np.zeros((box, box, box), half.dtype)
    for kx in range(-(box // 2), (box + 1) // 2):
        for ky in range(-(box // 2), (box + 1) // 2):
            for kz in range(-(box // 2), (box + 1) // 2):
                value = half[kz % box, ky % box, kx] if kx >= 0 else np.conj(half[-kz % box, -ky % box, -kx])
                out[kz + box // 2, ky + box // 2, kx + box // 2] = value
    return out


def half_of_cube(cube):
    """The rfftn-layout array (N, N, N // 2 + 1) of a centred cube."""
    return np.fft.ifftshift(cube)[:, :, : cube.shape[0] // 2 + 1]


def cube_of_grid(grid):
    """A centred cube (2c + 1)^3 of a half grid (2c + 1, 2c + 1, c + 1)."""
    c = grid.shape[-1] - 1
    out = np.zeros((2 * c + 1,) * 3, grid.dtype)
    out[:, :, c:] = grid
    out[:, :, :c] = np.conj(grid[::-1, ::-1, :0:-1])
    return out


def random_grid(rng, c, *, real=False):
    """A random half grid of a Hermitian (real: point-symmetric) function."""
    shape = (2 * c + 1,) * 3
    cube = rng.random(shape) if real else rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    cube = (cube + np.conj(cube[::-1, ::-1, ::-1])) / 2
    return np.ascontiguousarray(cube[:, :, c:])


def sample(cube, points):
    """Trilinear samples of a centred cube at points (n, 3) = (x, y, z) from its centre; 0 outside."""
    where = (np.asarray(points, float) + cube.shape[0] // 2).T[::-1]
    values = map_coordinates(cube.real, where, order=1)
    return values + 1j * map_coordinates(cube.imag, where, order=1) if np.iscomplexobj(cube) else values


def padded_cube(volume, padding, *, compensate):
    """Transform of a volume padded with zeros about its centre, to be sampled at `padding` times xi."""
    n = volume.shape[0]
    size = n * padding
    if compensate:
        line = np.sinc((np.arange(n) - n // 2) / size) ** 2
        volume = volume / (line[:, None, None] * line[:, None] * line)
    padded = np.zeros((size,) * 3)
    low = size // 2 - n // 2
    padded[low : low + n, low : low + n, low : low + n] = volume
    return centred_cube(padded)


def ball(r_max):
    """All (x, y, z) with 0 < |xi| <= r_max, both of each pair, and |xi| rounded."""
    k = np.arange(-r_max, r_max + 1)
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    points = np.stack([x.ravel(), y.ravel(), z.ravel()], axis=1)
    square = (points**2).sum(axis=1)
    points = points[(square > 0) & (square <= r_max**2)]
    return points, np.rint(np.sqrt((points**2).sum(axis=1))).astype(int)


def at(cube, points):
    """Values of a centred cube at lattice points (n, 3) = (x, y, z)."""
    x, y, z = (np.asarray(points) + cube.shape[0] // 2).T
    return cube[z, y, x]


def phase(points, shift, box):
    """exp(-2 pi i xi.t / N)."""
    return np.exp(-2j * np.pi * np.asarray(points) @ np.asarray(shift) / box)


def cube_rotations():
    """The 24 rotations of a cube: signed permutation matrices of determinant 1."""
    from itertools import permutations, product

    out = []
    for order in permutations(range(3)):
        for signs in product((-1.0, 1.0), repeat=3):
            matrix = np.eye(3)[list(order)] * np.array(signs)[:, None]
            if np.linalg.det(matrix) > 0:
                out.append(matrix)
    return np.array(out)


def wedge_cube(box, normal, tangent):
    """0/1 centred cube, point-symmetric: unobserved within a double cone of that half-angle tangent about `normal`."""
    k = np.arange(box) - box // 2
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    points = np.stack([x, y, z], axis=-1).astype(float)
    along = points @ (np.asarray(normal) / np.linalg.norm(normal))
    across = np.sqrt(np.maximum((points**2).sum(axis=-1) - along**2, 0))
    return 1.0 - (across < tangent * np.abs(along) - 1e-9)


def relative(found, expected):
    """||found - expected|| / ||expected||."""
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


class Lattice:
    """R A for rotations of the lattice: values of the cube itself, nothing interpolated."""

    padding = 1
    compensate = False

    def __init__(self, volume):
        self.cube = centred_cube(volume)

    def turned(self, points):
        return at(self.cube, np.rint(points).astype(int))


class Padded:
    """R A for any rotation: trilinear in the transform of the padded volume."""

    padding = 2
    compensate = True

    def __init__(self, volume):
        self.cube = padded_cube(volume, self.padding, compensate=self.compensate)

    def turned(self, points):
        return sample(self.cube, self.padding * np.asarray(points, float))


def model(sampler, points, rotation, shift, box):
    """A(R^T xi) exp(-2 pi i xi.t / N): rows xi R are R^T xi."""
    return sampler.turned(points @ rotation) * phase(points, shift, box)


def log_joint(box, r_max, particle, weight, sampler, rotation, shift, log_volume, alpha, sigma2, zeta):
    """Eq. 14-15 for one (class, pose), over every voxel of the full Fourier volume; and w^2 |X - RA|^2 per shell."""
    points, shell = ball(r_max)
    x, w = at(centred_cube(particle), points), at(weight, points)
    squared = w**2 * np.abs(x - model(sampler, points, rotation, shift, box)) ** 2
    value = np.log(alpha) + log_volume - (squared / (2 * sigma2[shell])).sum() - (shift**2).sum() / (2 * zeta**2)
    return value, np.bincount(shell, squared, minlength=r_max + 1)


class Toy:
    """A dozen voxels, two classes, three particles, four poses for each (particle, class)."""

    def __init__(self, rng, box, sampler, *, fractional=False, n_particles=3, n_poses=4):
        self.box, self.r_max, self.sampler = box, (box + 1) // 2 - 1, sampler
        self.maps = np.stack([blob_volume(box, *blobs(rng, 6, 0.22 * box, 1.2)) * box**1.5 for _ in range(2)])
        # Any real volume is a particle here; with much in common with a map, so that posteriors spread over poses.
        self.particles = self.maps[rng.integers(0, 2, n_particles)] + rng.standard_normal((n_particles, box, box, box))
        self.weights = np.stack([wedge_cube(box, n, 0.6) for n in rng.standard_normal((2, 3))])
        if fractional:
            soft = rng.uniform(0.2, 1.0, self.weights.shape)
            paired = soft[:, 1 - box % 2 :, 1 - box % 2 :, 1 - box % 2 :]
            paired[:] = (paired + paired[:, ::-1, ::-1, ::-1]) / 2
            self.weights = self.weights * soft
        if box % 2 == 0:  # what lies at -N/2 has no partner; w X there would not be a real volume's
            self.weights[:, 0] = self.weights[:, :, 0] = self.weights[:, :, :, 0] = 0
        self.weight_index = np.arange(n_particles) % 2
        shape = (2, n_particles, n_poses)
        if sampler is Lattice:
            self.rotations = cube_rotations()[rng.integers(0, 24, shape)]
        else:
            q = np.linalg.qr(rng.standard_normal((*shape, 3, 3)))[0]
            self.rotations = q * np.linalg.det(q)[..., None, None]
        self.shifts = rng.uniform(-1.5, 1.5, (*shape, 3))
        self.count = rng.integers(2, n_poses + 1, (2, n_particles))
        self.log_volumes = np.log(rng.dirichlet(np.ones(n_poses), (2, n_particles)))
        self.alpha = np.array([0.3, 0.7])
        self.sigma2 = box**3 * rng.uniform(15.0, 25.0, (box + 1) // 2)
        self.zeta = 1.3

    def entries(self):
        """(particle, class, pose) of every candidate, sorted by particle."""
        n_classes, n, _ = self.shifts.shape[:3]
        return [(i, k, p) for i in range(n) for k in range(n_classes) for p in range(self.count[k, i])]
