"""Structures as sums of isotropic Gaussian blobs: evaluated, not interpolated, in any pose and at any voxel size.

The phantoms are drawn by hand after textbook dimensions of the molecules they are named for; they are
no models of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from faml_gpu.errors import InputError
from faml_gpu.symmetry import point_group

__all__ = [
    "PHANTOMS",
    "Phantom",
    "density",
    "groel",
    "groel_es",
    "proteasome",
    "ribosome",
    "tmv",
    "tric",
]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

# A Gaussian of this many times the resolution falls to 1/e of its transform at 1 / resolution
# (the rule of ChimeraX `molmap`): 1 / (pi sqrt 2).
SIGMA_PER_RESOLUTION = 1.0 / (np.pi * np.sqrt(2.0))
_BLOBS_AT_ONCE = 512


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
    # A Gaussian is the product of its profiles: the sum over the blobs is a matrix product, in parts that fit memory.
    volume = np.zeros((box, box * box), dtype=np.float32)
    for start in range(0, len(peak), _BLOBS_AT_ONCE):
        part = slice(start, start + _BLOBS_AT_ONCE)
        planes = (y[part, :, None] * x[part, None, :]).reshape(-1, box * box)
        volume += (z[part] * peak[part, None]).T @ planes
    return volume.reshape(box, box, box)


# Cylinder coordinates of one subunit: radius (A), angle (degrees), height (A), width (A), mass (kDa).
_GROEL_SUBUNIT = np.array(
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


def groel() -> Phantom:
    """A chaperonin after GroEL: two rings of seven, back to back, about 135 Angstrom wide and 145 tall; D7 about z.

    Each subunit has an equatorial domain (at the waist, next to the other ring), a slim intermediate
    one on the outside, and an apical one at the mouth of the cavity.
    """
    centres, widths, masses = _ring(_GROEL_SUBUNIT, "D7", turn=360.0 / 28.0)
    return Phantom("groel", centres, widths, masses, "D7", 92.0)


def groel_es() -> Phantom:
    """A bullet after GroEL-GroES: two rings, the upper with its apical domains swung up and outwards, under a dome of
    seven smaller subunits; about 140 Angstrom wide and 190 tall; C7 about z, the dome at the top.
    """
    # The lower ring is one of GroEL's; its equatorial domains also make the waist of the upper ring.
    lower = _GROEL_SUBUNIT * [1, -1, -1, 1, 1]
    equatorial = _GROEL_SUBUNIT[:5]
    opened = np.array(
        [
            # intermediate
            [60.0, 13.0, 37.0, 6.5, 4.5],
            [61.0, 8.0, 47.0, 6.5, 4.0],
            # apical, turned by a quarter and raised by 60 degrees
            [46.0, 22.0, 62.0, 6.5, 4.5],
            [51.0, 14.0, 68.0, 7.0, 5.5],
            [56.0, 6.0, 61.0, 7.0, 6.0],
            [46.0, 4.0, 77.0, 6.5, 4.5],
            # GroES: wall, then roof
            [35.0, 16.0, 88.0, 6.5, 4.5],
            [31.0, 8.0, 98.0, 6.5, 4.0],
            [12.0, 20.0, 107.0, 6.0, 1.8],
        ]
    )
    # The rings are staggered as in GroEL.
    parts = [
        _ring(lower, "C7", turn=-360.0 / 28.0),
        _ring(np.concatenate([equatorial, opened]), "C7", turn=360.0 / 28.0),
    ]
    centres, widths, masses = (np.concatenate(items) for items in zip(*parts, strict=True))
    return Phantom("groel-es", _centred(centres, masses), widths, masses, "C7", 126.0)


def tric() -> Phantom:
    """A closed chaperonin after TRiC (CCT): two rings of eight with lids of their own, 160 Angstrom wide, 155 tall.

    D8 about z: the eight kinds of subunit of the real one are drawn alike.
    """
    subunit = np.array(
        [
            # equatorial
            [42.0, 4.0, 12.0, 8.0, 6.5],
            [58.0, -6.0, 12.0, 8.5, 7.5],
            [67.0, 3.0, 13.0, 8.0, 6.0],
            [56.0, 2.0, 26.0, 8.0, 6.5],
            # intermediate
            [68.0, 8.0, 33.0, 7.0, 5.5],
            [64.0, 10.0, 44.0, 7.0, 5.5],
            # apical, leaning in
            [50.0, 2.0, 51.0, 7.5, 6.5],
            [36.0, -4.0, 57.0, 7.5, 6.0],
            [52.0, -9.0, 56.0, 7.0, 5.0],
            # its tip: a plate of the lid
            [20.0, 6.0, 65.0, 6.5, 4.0],
        ]
    )
    centres, widths, masses = _ring(subunit, "D8", turn=360.0 / 32.0)
    return Phantom("tric", centres, widths, masses, "D8", 94.0)


def proteasome() -> Phantom:
    """A particle after the 26S proteasome with one cap: the 20S core, four rings of seven, 115 Angstrom wide and 150
    long, and on top of it the 19S cap, a ring of six under a lid that lies to one side; about 300 Angstrom; C1.
    """
    # The core: outer and inner ring, staggered a little. It keeps its D7 until the cap comes.
    core = np.array(
        [
            [38.0, 4.0, 17.0, 8.0, 9.0],
            [45.0, -8.0, 22.0, 8.0, 9.0],
            [33.0, -4.0, 28.0, 7.0, 6.0],
            [38.0, 10.0, 55.0, 8.0, 9.5],
            [46.0, -3.0, 60.0, 8.0, 9.0],
            [32.0, 0.0, 67.0, 7.5, 7.5],
            [20.0, 12.0, 71.0, 7.0, 3.5],
        ]
    )
    parts = [_ring(core, "D7", turn=5.0)]
    # Six ATPases, tilted against the core by putting the ring a little aside.
    motor = np.array([[34.0, 0.0, 92.0, 9.0, 24.0], [31.0, 14.0, 110.0, 8.5, 16.0], [22.0, 4.0, 128.0, 8.0, 7.0]])
    centres, widths, masses = _ring(motor, "C6", turn=10.0)
    parts.append((centres + np.array([8.0, 3.0, 0.0]), widths, masses))
    # The lid and its neighbours: ellipsoids and rods to one side. Centre, half axes (A), number, width (A), mass (kDa).
    solid = [
        ((60.0, 10.0, 134.0), (26.0, 42.0, 46.0), 26, 9.0, 330.0),  # lid
        ((22.0, -8.0, 186.0), (40.0, 26.0, 26.0), 18, 9.0, 210.0),  # Rpn1, Rpn2 and Rpn13
        ((-40.0, -32.0, 144.0), (20.0, 26.0, 30.0), 10, 9.0, 110.0),
    ]
    for centre, axes, count, width, mass in solid:
        points, uneven = _ball(count)
        share = 0.5 + uneven
        parts.append((np.asarray(centre) + points * axes, np.full(count, width), 1e3 * mass * share / share.sum()))
    rod = np.linspace((70.0, 38.0, 82.0), (58.0, 16.0, 30.0), 5)  # Rpn6, down along the core
    parts.append((rod, np.full(5, 8.0), np.full(5, 9e3)))
    centres, widths, masses = (np.concatenate(items) for items in zip(*parts, strict=True))
    return Phantom("proteasome", _centred(centres, masses), widths, masses, "C1", 172.0)


def tmv(length: float = 700.0) -> Phantom:
    """A piece of a tube after tobacco mosaic virus: a right-handed helix about z, 49 subunits in three turns, rise
    1.408 Angstrom each, from the channel at 20 to the surface at 90 Angstrom.

    Rise and turn: Sachse et al., J. Mol. Biol. 371 (2007) 812. Turning by 3/49 of 360 degrees and rising by 1.408 maps
    the endless helix onto itself; the piece has two ends.

    Parameters
    ----------
    length : Angstrom
    """
    if not length > 0:
        raise InputError(f"tmv: found a length of {length} A, expected more than 0")
    rise, twist = 1.408, 3 * 360.0 / 49.0
    # Cylinder coordinates of one subunit, as in `_ring`: a wedge that slopes a little, uneven along the radius.
    subunit = np.array(
        [
            [26.0, 0.0, 3.0, 5.0, 2.2],
            [38.0, 2.0, 0.0, 5.5, 3.6],
            [50.0, -1.5, 4.0, 5.5, 3.0],
            [62.0, 1.0, -1.0, 6.0, 3.9],
            [74.0, -1.0, 2.0, 6.0, 3.0],
            [83.0, 1.0, -1.0, 5.5, 1.8],
        ]
    )
    count = max(1, round(length / rise))
    step = np.arange(count) - (count - 1) / 2
    radius, angle, height, width, mass = subunit.T
    phi = np.deg2rad(angle + twist * step[:, None])
    z = height + rise * step[:, None]
    centres = np.stack([radius * np.cos(phi), radius * np.sin(phi), z], axis=-1).reshape(-1, 3)
    centres[:, 2] -= np.average(height, weights=mass)
    masses = np.tile(1e3 * mass, count)
    reach = float(np.hypot(96.0, length / 2 + 12.0))
    return Phantom("tmv", centres, np.tile(width, count), masses, "C1", reach)


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


def _ring(subunit: Float64, symmetry: str, turn: float) -> tuple[Float64, Float64, Float64]:
    """Centres, widths and masses (Dalton) of all copies of a subunit.

    Parameters
    ----------
    subunit : (n, 5): radius (A), angle (degrees), height (A), width (A), mass (kDa), in cylinder coordinates about z
    symmetry : of `symmetry.point_group`
    turn : degrees added to all angles; a quarter of the step between subunits off the two-fold axis x staggers the
        two rings of Dn by half a step
    """
    radius, angle, height, width, mass = subunit.T
    phi = np.deg2rad(angle + turn)
    one = np.stack([radius * np.cos(phi), radius * np.sin(phi), height], axis=-1)
    group = point_group(symmetry)
    centres = np.einsum("gij,nj->gni", group, one).reshape(-1, 3)
    return centres, np.tile(width, len(group)), np.tile(1e3 * mass, len(group))


def _centred(centres: Float64, masses: Float64) -> Float64:
    return np.asarray(centres - np.average(centres, axis=0, weights=masses))


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


# By the names users give.
PHANTOMS: dict[str, Callable[[], Phantom]] = {
    "groel": groel,
    "groel-es": groel_es,
    "proteasome": proteasome,
    "ribosome": ribosome,
    "tmv": tmv,
    "tric": tric,
}
