"""Point groups and helices: their operators, averages that obey them, poses that differ by them only.

A structure A of symmetry G is its own copy under each S of G, A(S^-1 x) = A(x), about the box centre. The poses (R, t)
and (R S, t) of a particle then say the same: S acts on the structure, before the pose. Helices run along z.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from faml_gpu import ops
from faml_gpu.array_backend import Array, namespace
from faml_gpu.errors import InputError
from faml_gpu.fourier import Support, interpolation_grid, inverse_transform, weight_grid

__all__ = [
    "check_helix",
    "distinct",
    "helical_operators",
    "impose_helix",
    "nearest_copies",
    "order",
    "point_group",
    "symmetrise",
    "unique_rotations",
    "unit_share",
]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

GOLDEN = (1 + 5**0.5) / 2
LARGEST = 999  # n of Cn and Dn
CENTRAL = 0.3  # of the box, along z: where a filament is neither cut by the box nor by the mask
HELIX_EDGE = 3.0  # voxels over which the central part of a filament fades out, beyond its ends

# Axis (x, y, z) and order of rotations that generate each group.
Generators = tuple[tuple[tuple[float, float, float], int], ...]
_POLYHEDRAL: dict[str, Generators] = {
    "T": (((0, 0, 1), 3), ((0, 2**0.5, 1), 2)),
    "O": (((0, 0, 1), 4), ((1, 1, 1), 3)),
    "I1": (((0, 0, 1), 2), ((0, 1, GOLDEN), 5)),
    "I2": (((0, 0, 1), 2), ((1, 0, GOLDEN), 5)),
}


def point_group(name: str) -> Float64:
    """Rotations of a point group about the origin, with RELION's axes.

    ========  =====================================================================================================
    Cn        the n-fold along z
    Dn        the n-fold along z, a two-fold along x
    T         a three-fold along z, a two-fold along (0, √2, 1)
    O         four-folds along x, y and z
    I1        two-folds along x, y and z; the five-folds nearest to z in the plane yz, along (0, ±1, φ), φ the golden
              ratio; the three-folds nearest to z in the plane xz
    I2, I     two-folds along x, y and z; the five-folds nearest to z in the plane xz, the three-folds in the plane yz
    ========  =====================================================================================================

    Source: RELION's documentation, "Conventions", section "Symmetry". As it says there, T deviates from the common
    convention (Heymann, Chagoyen & Belnap 2005, J. Struct. Biol. 151, 196: two-folds along x, y and z), and I1 is what
    that convention calls I. RELION's programs take a bare I for I2, so it is that here. RELION prints its operators
    with `relion_refine --sym T --print_symmetry_ops`.

    Parameters
    ----------
    name : "C1", "C7", "D2", "T", "O", "I1", "I2" ..., in either case

    Returns
    -------
    (g, 3, 3) float64 array, read-only
        The identity first, then by increasing angle. Made by closing the group's generators under multiplication.

    Raises
    ------
    InputError
        For any other name.
    """
    wanted = name.strip().upper()
    if re.fullmatch(r"[CD][1-9]\d{0,2}|T|O|I[12]?", wanted) is None:
        raise InputError(
            f"point group: found {name!r}, expected C1, C2 ... C{LARGEST}, D1 ... D{LARGEST}, T, O, I1 or I2"
        )
    return _closed("I2" if wanted == "I" else wanted)


def order(name: str) -> int:
    """Number of rotations in a point group."""
    return len(point_group(name))


@cache
def _closed(name: str) -> Float64:
    generators: Generators
    if name[0] in "CD":
        generators = (((0, 0, 1), int(name[1:])), ((1, 0, 0), 2))[: 1 + (name[0] == "D")]
    else:
        generators = _POLYHEDRAL[name]
    steps = [
        Rotation.from_rotvec(2 * np.pi / order * np.array(axis) / np.linalg.norm(axis)).as_matrix()
        for axis, order in generators
    ]
    found, new = np.eye(3)[None], np.eye(3)[None]
    while len(new):
        fresh: list[Float64] = []
        for candidate in np.concatenate([new @ step for step in steps]):
            known = np.concatenate([found, fresh]) if fresh else found
            # Different elements of the largest group, D999, are 2e-5 apart in squared distance.
            if ((known - candidate) ** 2).sum(axis=(1, 2)).min() > 1e-6:
                fresh.append(candidate)
        new = np.array(fresh)
        found = np.concatenate([found, fresh]) if fresh else found
    group = found[np.argsort(-np.round(np.trace(found, axis1=1, axis2=2), 9), kind="stable")]
    group.flags.writeable = False
    return group


# --- averages -----------------------------------------------------------------------------------------------


def symmetrise(
    sums: Array, weights: Array, support: Support, group: Float64, *, padding: int = 2
) -> tuple[Array, Array]:
    """Sums of the M-step averaged over the copies of the structure: both, so that their quotient stays a maximum.

    With each particle in all its g equivalent poses the likelihood over A is largest at
    A = sum_S S^-1 (sum P R^-1 w X) / sum_S S^-1 (sum P R^-1 w): numerator and denominator are averaged alike, before
    the division. (The average of the finished maps would weigh a copy that was hardly observed as much as any other.)
    The mass, sum P, stays what it is.

    Copies under rotations that map the voxel grid onto itself (the identity, 90 and 180 degrees about the axes ...) are
    looked up, so exact; others are interpolated: the sums as references are (padded, in the kernel's compensation), the
    weights like particles' weights. This costs g rotations of one volume per class, where copies of every
    entry before the accumulation would cost g times that.

    Parameters
    ----------
    sums : (K, M) complex
    weights : (K, M) real
    support : Support
        Of both, on the same device. Beyond it they count as 0: on the outermost shell a copy that is not looked up
        mixes with that.
    group : (g, 3, 3) array
    padding : of the sums, before they are interpolated

    Returns
    -------
    sums, weights : as given
    """
    xp = namespace(sums)
    on_grid = np.abs(group - np.rint(group)).max(axis=(1, 2)) < 1e-6
    new_sums, new_weights = xp.zeros_like(sums), xp.zeros_like(weights)
    for element in np.rint(group[on_grid]).astype(np.int64):
        row, conjugate = _lookup(support, xp.asarray(element))
        new_sums += xp.where(conjugate, sums[:, row].conj(), sums[:, row])
        new_weights += weights[:, row]
    turned = xp.asarray(np.ascontiguousarray(group[~on_grid]))
    if len(turned):
        for k in range(len(sums)):  # one at a time: there are as many as folds times classes, and grids are large
            volume = inverse_transform(support.scatter(sums[k]), support.box)
            grid = interpolation_grid(volume, support.r_max, padding)
            weight = weight_grid(support.scatter(weights[k]), support.r_max).astype(grid.dtype)
            for rotation in turned:
                # (S A)(xi) = A(S^T xi): with S the inverses too are in the group, and the order does not matter.
                new_sums[k] += ops.rotate(grid, rotation[None], support.coords, padding)[0]
                new_weights[k] += ops.rotate(weight, rotation[None], support.coords, 1)[0].real
    return new_sums / len(group), new_weights / len(group)


def _lookup(support: Support, rotation: Array) -> tuple[Array, Array]:
    """Row of S^T xi for each xi of the support, and whether it is that of -S^T xi (the conjugate), (M,) each."""
    xp = namespace(rotation)
    coords = support.coords.astype(np.int64)
    width = 2 * support.r_max + 1
    base = xp.asarray([1, width, width * width])
    order = xp.argsort(coords @ base)
    keys = (coords @ base)[order]
    wanted = (coords @ rotation) @ base
    place = xp.searchsorted(keys, wanted).clip(0, len(keys) - 1)
    conjugate = keys[place] != wanted
    mirrored = xp.searchsorted(keys, -wanted).clip(0, len(keys) - 1)
    return order[xp.where(conjugate, mirrored, place)], conjugate


# --- poses --------------------------------------------------------------------------------------------------


def nearest_copies(rotations: Float64, to: Float64, group: Float64) -> Float64:
    """Of the copies of rotations (..., 3, 3) under a group (g, 3, 3) those nearest `to`, (..., 3, 3).

    Nearest to the identity they are in the asymmetric unit.
    """
    copies = rotations[..., None, :, :] @ group
    nearest = (copies * to[..., None, :, :]).sum(axis=(-2, -1)).argmax(axis=-1)
    return np.take_along_axis(copies, nearest[..., None, None, None], axis=-3)[..., 0, :, :]


def unit_share(rotations: Array, group: Array, slack: float) -> tuple[Array, Array]:
    """Whether rotations lie in the asymmetric unit or up to `slack` outside, and what each counts for.

    That is one over the number of its equivalents that lie there, and 0 outside: a sum over the widened unit, each
    rotation times its share, is the sum over the unit, without the jump at its border.

    Parameters
    ----------
    rotations : (..., 3, 3) array
    group : (g, 3, 3) array, the identity first
    slack : degrees; how much farther from the identity than its nearest equivalent a rotation may be

    Returns
    -------
    inside : (...) bool array
    share : (...) float64 array, 0 to 1
    """
    xp = namespace(rotations)
    traces = rotations.reshape(*rotations.shape[:-2], 9) @ group.swapaxes(-1, -2).reshape(-1, 9).T
    angles = xp.degrees(xp.arccos(xp.clip((traces - 1) / 2, -1, 1)))
    inside = angles <= angles.min(axis=-1, keepdims=True) + slack
    return inside[..., 0], inside[..., 0] / inside.sum(axis=-1)


def distinct(
    rotations: ArrayLike, shifts: ArrayLike, count: ArrayLike, group: Float64, *, angle: float, distance: float
) -> NDArray[np.bool_]:
    """Which of each particle's candidate poses are no copies of one before them.

    Parameters
    ----------
    rotations : (B, n, 3, 3) array, best first
    shifts : (B, n, 3) array, voxels
    count : (B,) array; candidates from count[b] on are none
    group : (g, 3, 3) array
    angle : degrees; two poses are copies if the angle between equivalents is below it
    distance : voxels; and their shifts differ by less

    Returns
    -------
    (B, n) bool array
    """
    r, t = np.asarray(rotations, dtype=np.float64), np.asarray(shifts, dtype=np.float64)
    b, n = r.shape[:2]
    between = np.einsum("bnji,bmjk->bnmik", r, r).reshape(b, n, n, 9)
    cosine = (between @ np.swapaxes(group, -1, -2).reshape(-1, 9).T).max(axis=-1)
    near = np.linalg.norm(t[:, :, None] - t[:, None], axis=-1) < distance
    copies = near & (cosine > 1 + 2 * np.cos(np.deg2rad(angle)))
    kept = np.arange(n) < np.asarray(count)[:, None]
    for i in range(1, n):
        kept[:, i] &= ~(copies[:, i, :i] & kept[:, :i]).any(axis=1)
    return kept


def unique_rotations(
    rotations: ArrayLike, count: ArrayLike, group: Float64, n: int, *, angle: float
) -> tuple[Float64, NDArray[np.int64]]:
    """The n best candidate rotations of each particle that are no copies of each other, all in one asymmetric unit.

    A score against a symmetric reference has every peak g times. Give this the peaks of all copies, or as many as one
    has (up to g n): of each orbit it takes the copy in the asymmetric unit.

    Parameters
    ----------
    rotations : (B, m, 3, 3) array, best first
    count : (B,) array; candidates from count[b] on are none
    group : (g, 3, 3) array
    n : rotations wanted
    angle : degrees; how far copies of one peak may be off each other (a step of the grid they were found on)

    Returns
    -------
    rotations : (B, n, 3, 3) float64 array, best first; the identity where there is none
    count : (B,) int64 array, at least 1 where there was a candidate
    """
    r = np.asarray(rotations, dtype=np.float64)
    traces = r.reshape(*r.shape[:2], 9) @ np.swapaxes(group, -1, -2).reshape(-1, 9).T
    angles = np.rad2deg(np.arccos(np.clip((traces - 1) / 2, -1, 1)))
    # What lies just outside may be the one copy that the grid has of a peak on the border.
    listed = np.arange(r.shape[1]) < np.asarray(count)[:, None]
    kept = (angles[..., 0] <= angles.min(axis=-1) + angle) & listed
    kept[:, 0] |= ~kept.any(axis=1) & listed[:, 0]
    r, found = _first(r, kept, 2 * n)
    kept = distinct(r, np.zeros((*r.shape[:2], 3)), found, group, angle=angle, distance=1.0)
    return _first(r, kept, n)


def _first(rotations: Float64, kept: NDArray[np.bool_], n: int) -> tuple[Float64, NDArray[np.int64]]:
    """The first n kept ones of each row, (B, n, 3, 3), the identity behind them; and how many."""
    order = np.argsort(~kept, axis=1, kind="stable")[:, :n]
    count = np.minimum(kept.sum(axis=1), n).astype(np.int64)
    out = np.tile(np.eye(3), (len(rotations), n, 1, 1))
    chosen = np.take_along_axis(rotations, order[:, :, None, None], axis=1)
    filled = np.arange(chosen.shape[1]) < count[:, None]
    out[:, : chosen.shape[1]][filled] = chosen[filled]
    return out, count


# --- helices ------------------------------------------------------------------------------------------------


def helical_operators(rise: float, twist: float, n: int) -> tuple[Float64, Float64]:
    """The operators j = -n .. n of a helix along z: turned by j twist about z, moved by j rise along z.

    Parameters
    ----------
    rise : any length, per subunit
    twist : degrees per subunit; positive from x to y as z grows (a right-handed helix)
    n : operators in each direction

    Returns
    -------
    rotations : (2n + 1, 3, 3) float64 array
    shifts : (2n + 1, 3) float64 array, in the unit of `rise`
        Operator j takes x to rotations[n + j] x + shifts[n + j].
    """
    steps = np.arange(-n, n + 1)
    axis = np.array([0.0, 0.0, 1.0])
    rotations = Rotation.from_rotvec(np.deg2rad(steps * twist)[:, None] * axis).as_matrix()
    return np.asarray(rotations), steps[:, None] * rise * axis


def check_helix(rise: float, box: int, central: float = CENTRAL) -> None:
    """Refuse a rise (voxels) with which the central part of the box does not hold a subunit.

    Raises
    ------
    InputError
    """
    if not 0 < central <= 1:
        raise InputError(f"helix: found a central part of {central:g} of the box, expected more than 0 and at most 1")
    longest = min(central * box, box - 1)
    if not 0 < abs(rise) <= longest:
        raise InputError(
            f"helix: found a rise of {rise:g} voxels, expected at most the central part of {longest:.1f} voxels, not 0"
        )


def impose_helix(volume: ArrayLike, rise: float, twist: float, *, central: float = CENTRAL) -> Float32:
    """A filament along z whose every part is the mean of the copies of the box's central part.

    Only the middle of a box holds all of a filament: its ends are cut by the box and the mask. Each voxel becomes the
    mean over the operators j of the map at the place it comes from, R_j^-1 (x - j rise), as far as that lies in the
    central part. So the result is the same under every operator, and fills the box.

    In real space, on a finished average (cubic splines), as helical reconstruction does (Egelman 2000,
    Ultramicroscopy 85, 225; He & Scheres 2017, J. Struct. Biol. 198, 163).

    Parameters
    ----------
    volume : (N, N, N) array, `[z, y, x]`, axis of the helix through the box centre
    rise : voxels per subunit, not 0
    twist : degrees per subunit, see `helical_operators`
    central : share of the box along z that is used

    Returns
    -------
    (N, N, N) float32 array

    Raises
    ------
    InputError
        If the central part is empty, longer than the box, or shorter than the rise.
    """
    values = np.asarray(volume, dtype=np.float32)
    box = len(values)
    check_helix(rise, box, central)
    half = central * box / 2
    line = np.arange(box) - box // 2
    y, x = np.meshgrid(line, line, indexing="ij")
    spline = ndimage.spline_filter(values, order=3, output=np.float64)
    last = int(np.ceil((box / 2 + half + HELIX_EDGE) / abs(rise)))
    rotations, shifts = helical_operators(rise, twist, last)
    total, norm = np.zeros(values.shape), np.zeros(box)
    for rotation, shift in zip(rotations, shifts, strict=True):
        source = line - shift[2]
        share = 0.5 + 0.5 * np.cos(np.pi * np.clip((np.abs(source) - half) / HELIX_EDGE, 0.0, 1.0))
        # Within the map's own planes only: what is outside the box is not known.
        share[(source < line[0]) | (source > line[-1])] = 0
        planes = np.flatnonzero(share > 1e-3)
        if len(planes) == 0:
            continue
        back = rotation.T
        sx, sy = back[0, 0] * x + back[0, 1] * y, back[1, 0] * x + back[1, 1] * y
        at = np.empty((3, len(planes), box, box))
        at[0], at[1], at[2] = (source[planes] + box // 2)[:, None, None], sy + box // 2, sx + box // 2
        copies = ndimage.map_coordinates(spline, at, order=3, prefilter=False)
        total[planes] += share[planes, None, None] * copies
        norm[planes] += share[planes]
    return np.asarray(total / norm[:, None, None], dtype=np.float32)
