"""Structures as sums of isotropic Gaussian blobs: evaluated, not interpolated, in any pose and at any voxel size.

Both phantoms are drawn by hand after textbook dimensions of the molecules they are named for; they are
no models of them.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from faml_gpu.errors import InputError

__all__ = ["Phantom", "density", "groel", "point_group", "ribosome"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

# A Gaussian of this many times the resolution falls to 1/e of its transform at 1 / resolution
# (the rule of ChimeraX `molmap`): 1 / (pi sqrt 2).
SIGMA_PER_RESOLUTION = 1.0 / (np.pi * np.sqrt(2.0))


@dataclass(frozen=True)
class Phantom:
    """A structure of Gaussian blobs.

    Attributes
    ----------
    name : short name, for files and labels
    centres : (n, 3) float64, Angstrom, (x, y, z) from the centre of the structure
    widths : (n,) float64, Angstrom, standard deviation of each blob
    weights : (n,) float64, Dalton, integral of each blob
    symmetry : Schoenflies name, "C1", "C7", "D7" ...; the main axis is z, a two-fold axis of Dn is x
    radius : Angstrom, of a sphere that holds the structure
    """

    name: str
    centres: Float64
    widths: Float64
    weights: Float64
    symmetry: str
    radius: float

    def rotations(self) -> Float64:
        """Rotations S that leave the structure as it is, (g, 3, 3) float64, the identity first."""
        return point_group(self.symmetry)


def point_group(symmetry: str) -> Float64:
    """Rotations of a cyclic or dihedral point group.

    Parameters
    ----------
    symmetry : "Cn" or "Dn"
        The n-fold axis is z, a two-fold axis of Dn is x.

    Returns
    -------
    (n, 3, 3) or (2n, 3, 3) float64 array, the identity first

    Raises
    ------
    InputError
        For any other name.
    """
    match = re.fullmatch(r"([CD])([1-9]\d*)", symmetry)
    if match is None:
        raise InputError(f"symmetry: found {symmetry!r}, expected C1, C2 ... or D1, D2 ...")
    order = int(match[2])
    angles = 2 * np.pi * np.arange(order) / order
    group = np.zeros((order, 3, 3))
    group[:, 0, 0] = group[:, 1, 1] = np.cos(angles)
    group[:, 1, 0] = np.sin(angles)
    group[:, 0, 1] = -group[:, 1, 0]
    group[:, 2, 2] = 1.0
    if match[1] == "D":
        group = np.concatenate([group, group @ np.diag([1.0, -1.0, -1.0])])
    return group


def density(
    phantom: Phantom,
    box: int,
    voxel_size: float,
    rotation: ArrayLike | None = None,
    shift: ArrayLike = (0.0, 0.0, 0.0),
    resolution: float | None = None,
) -> Float32:
    """Density of a phantom in the pose (R, t): a blob of the reference at p ends at R p + t.

    The blobs are moved and evaluated at the voxel centres: nothing is interpolated, so two poses
    differ by exactly what the pose says. What is finer than two voxels aliases; give a `resolution`
    of about three voxels where the blobs are narrower than 0.8 voxel.

    Parameters
    ----------
    phantom : the structure
    box : N, voxels; the structure's centre is at voxel N // 2 on each axis
    voxel_size : Angstrom
    rotation : (3, 3) array R, (x, y, z) order; None is the identity
    shift : (3,) array t, voxels, (x, y, z)
    resolution : Angstrom; blurs by a Gaussian whose transform is 1/e at 1 / resolution. None: as it is

    Returns
    -------
    (N, N, N) float32 array, `[z, y, x]`, Dalton per cubic Angstrom
    """
    matrix = np.eye(3) if rotation is None else np.asarray(rotation, dtype=np.float64)
    centres = phantom.centres @ matrix.T + voxel_size * np.asarray(shift, dtype=np.float64)
    widths = phantom.widths
    if resolution is not None:
        widths = np.hypot(widths, SIGMA_PER_RESOLUTION * resolution)
    grid = voxel_size * (np.arange(box) - box // 2)
    profiles = np.exp(-0.5 * ((grid - centres[:, :, None]) / widths[:, None, None]) ** 2)  # (n, xyz, N)
    profiles[profiles < 1e-10] = 0.0  # products of the tails would be denormal float32, which are slow
    x, y, z = np.moveaxis(profiles.astype(np.float32), 1, 0)
    peak = (phantom.weights / ((2 * np.pi) ** 1.5 * widths**3)).astype(np.float32)
    # A Gaussian is the product of its profiles: the sum over the blobs is one matrix product.
    planes = (y[:, :, None] * x[:, None, :]).reshape(len(peak), box * box)
    volume: Float32 = ((z * peak[:, None]).T @ planes).reshape(box, box, box)
    return volume


def groel() -> Phantom:
    """A chaperonin after GroEL: two rings of seven, back to back, about 135 Angstrom wide and 145 tall; D7 about z.

    Each subunit has an equatorial domain (at the waist, next to the other ring), a slim intermediate
    one on the outside, and an apical one at the mouth of the cavity.
    """
    # Cylinder coordinates of one subunit: radius (A), angle (degrees), height (A), width (A), mass (kDa).
    subunit = np.array(
        [
            # equatorial
            [36.0, 3.0, 13.0, 8.0, 5.5],
            [35.0, 8.0, 26.0, 7.0, 4.5],
            [50.0, -10.0, 12.0, 8.0, 6.0],
            [58.0, 2.0, 11.0, 8.0, 5.5],
            [50.0, 1.0, 24.0, 7.5, 5.0],
            # intermediate
            [60.0, 11.0, 35.0, 6.5, 4.5],
            [56.0, 14.0, 44.0, 6.5, 4.0],
            # apical
            [31.0, -2.0, 56.0, 6.5, 4.5],
            [42.0, 3.0, 52.0, 7.0, 5.5],
            [45.0, -7.0, 62.0, 7.0, 6.0],
            [59.0, -7.0, 57.0, 6.5, 4.5],
        ]
    )
    radius, angle, height, width, mass = subunit.T
    # A quarter of the step between subunits off the two-fold axis x: the rings are staggered by half a step.
    phi = np.deg2rad(angle + 360.0 / 28.0)
    one = np.stack([radius * np.cos(phi), radius * np.sin(phi), height], axis=-1)
    group = point_group("D7")
    centres = np.einsum("gij,nj->gni", group, one).reshape(-1, 3)
    copies = len(group)
    return Phantom("groel", centres, np.tile(width, copies), np.tile(1e3 * mass, copies), "D7", 92.0)


def ribosome() -> Phantom:
    """An asymmetric particle after the 70S ribosome, about 250 Angstrom across.

    A large subunit (x > 0) with a central protuberance, two stalks at opposite ends of y and a tunnel; a
    small one (x < 0) with head, beak, platform and spur; a gap between them.
    """
    # Solid parts, ellipsoids along x, y, z: centre (A), half axes (A), number of blobs, width (A), mass (kDa).
    solid = [
        ((40.0, 0.0, -10.0), (56.0, 88.0, 80.0), 130, 10.0, 1450.0),  # body of the large subunit
        ((-54.0, 6.0, -38.0), (32.0, 56.0, 62.0), 46, 10.0, 430.0),  # body of the small subunit
        ((-52.0, -6.0, 64.0), (29.0, 44.0, 28.0), 20, 9.5, 150.0),  # head
    ]
    # Protrusions: rows of blobs from one point to another (A), number, width (A), mass (kDa).
    rows = [
        ((28.0, 4.0, 76.0), (16.0, 4.0, 100.0), 4, 10.0, 45.0),  # central protuberance
        ((14.0, 78.0, 36.0), (4.0, 114.0, 48.0), 5, 9.0, 55.0),  # L1 stalk
        ((16.0, -80.0, 16.0), (18.0, -122.0, 8.0), 5, 7.5, 40.0),  # L7/L12 stalk
        ((-56.0, -46.0, 68.0), (-54.0, -78.0, 60.0), 4, 8.0, 32.0),  # beak
        ((-42.0, 46.0, 6.0), (-36.0, 80.0, 22.0), 4, 9.5, 60.0),  # platform
        ((-58.0, -28.0, -92.0), (-64.0, -44.0, -110.0), 3, 8.0, 24.0),  # spur
    ]
    blobs = []
    for centre, axes, count, width, mass in solid:
        points, uneven = _ball(count)
        # Uneven masses give the texture that tells orientations apart.
        share = 0.5 + uneven
        position = np.asarray(centre) + 0.97 * points * np.asarray(axes)
        blobs.append(_blobs(position, np.full(count, width), 1e3 * mass * share / share.sum()))
    for start, end, count, width, mass in rows:
        position = np.linspace(start, end, count)
        blobs.append(_blobs(position, np.full(count, width), np.full(count, 1e3 * mass / count)))
    table = np.concatenate(blobs)
    # The tunnel runs along x through the large subunit, a little off its centre.
    in_tunnel = (table[:, 0] > 5.0) & (np.hypot(table[:, 1] + 12.0, table[:, 2] - 4.0) < 16.0)
    table = table[~in_tunnel]
    table[:, :3] -= np.average(table[:, :3], axis=0, weights=table[:, 4])
    return Phantom("ribosome", table[:, :3], table[:, 3], table[:, 4], "C1", 135.0)


def _blobs(position: Float64, width: Float64, mass: Float64) -> Float64:
    return np.column_stack([position, width, mass])


def _ball(count: int) -> tuple[Float64, Float64]:
    """`count` evenly but irregularly spread points of the unit ball, (count, 3), and a number of [0, 1) for each.

    Mitchell's best candidate: each point is the farthest from those before it among 10 random ones. Python's
    own generator, whose `random()` is promised to stay the same between versions.
    """
    dice = random.Random(count)
    points: list[Float64] = []
    while len(points) < count:
        candidates = np.array([[dice.uniform(-1, 1) for _ in range(3)] for _ in range(20)])
        candidates = candidates[np.linalg.norm(candidates, axis=1) < 1.0][:10]
        if not points:
            points.append(candidates[0])
            continue
        nearest = np.linalg.norm(candidates[:, None] - np.array(points), axis=-1).min(axis=1)
        points.append(candidates[np.argmax(nearest)])
    return np.array(points), np.array([dice.random() for _ in range(count)])
