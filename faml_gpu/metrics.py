"""How far a result is from the truth: poses up to their common gauge, classes up to their names, maps up to their pose.

Arrays in, numbers out. Maps are compared in real space with scipy's splines and its optimiser, which the method does
not use; single particles (`aligned_spectrum`) in Fourier space, where their missing wedge is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft, ndimage, optimize
from scipy.spatial.transform import Rotation

from faml_gpu.errors import InputError
from faml_gpu.fourier import (
    Support,
    full_band,
    interpolation_grid,
    inverse_transform,
    make_support,
    transform,
    weight_grid,
)
from faml_gpu.fsc import lowpass
from faml_gpu.geometry import rotation_angle
from faml_gpu.masks import soft_sphere
from faml_gpu.ops import rotate
from faml_gpu.symmetry import point_group

__all__ = [
    "PairSnr",
    "align_map",
    "aligned_spectrum",
    "best_labels",
    "common_gauge",
    "confusion_matrix",
    "correlation",
    "f1_score",
    "mirrored",
    "pair_snr",
    "point_group",
    "pose_errors",
    "precision",
    "principal_axis",
    "random_pairs",
    "recall",
    "rotate_map",
    "structure_radius",
    "symmetry_score",
]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

GAUGE_REACH = 20.0  # degrees: poses farther than this from a gauge do not speak for it
SEARCH_STEP = 15.0  # degrees between the rotations of the global search
SEARCH_KEPT = 10  # rotations of the global search that are refined
SEARCH_PADDING = 2  # of what is turned in Fourier space
SEARCH_AT_ONCE = 256  # rotations
PAIR_PADDING = 2  # of the boxes that are turned in Fourier space
STRUCTURE_LEVEL = 0.25  # of the way from the background to the brightest voxels: above it is structure


def correlation(
    first: ArrayLike, second: ArrayLike, mask: ArrayLike | None = None, *, about_mean: bool = True
) -> float:
    """Correlation of two maps, each voxel weighted by a mask.

    Parameters
    ----------
    first, second : (N, N, N) arrays
    mask : (N, N, N) array >= 0, or None for all voxels alike
    about_mean : Pearson's, each map less its mean inside the mask; False is the plain overlap Σab / sqrt(Σa² Σb²),
        which Chimera's "Fit in Map" calls correlation, and which a constant background raises

    Returns
    -------
    float
        -1 .. 1; 0 if a map is constant (plain overlap: zero) inside the mask.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    w = np.ones_like(a) if mask is None else np.asarray(mask, dtype=np.float64)
    w = w / w.sum()
    if about_mean:
        a, b = a - np.sum(w * a), b - np.sum(w * b)
    power = np.sum(w * a * a) * np.sum(w * b * b)
    return float(np.sum(w * a * b) / np.sqrt(power)) if power > 0 else 0.0


# --- poses --------------------------------------------------------------------------------------------------


def common_gauge(
    rotations: ArrayLike,
    shifts: ArrayLike,
    true_rotations: ArrayLike,
    true_shifts: ArrayLike,
    symmetry: ArrayLike | None = None,
) -> tuple[Float64, Float64]:
    """The gauge (Q, u) that best takes found poses to the true ones: R_i Q S_i ≈ R*_i, t_i + R_i u ≈ t*_i.

    Poses found without a reference are known up to the pose (Q, u) of the average with respect to the
    true structure (what `align_map(average, truth)` returns), and up to the structure's symmetry S.
    Robust: the candidates are the gauges of single particles, each particle votes for those within 20
    degrees of its own, and only the voters for the winner enter the mean (Tukey's weights, SVD).

    Parameters
    ----------
    rotations, true_rotations : (n, 3, 3) arrays
    shifts, true_shifts : (n, 3) arrays, voxels
    symmetry : (g, 3, 3) array, the point group of the true structure, with its centre at the box centre; None is C1

    Returns
    -------
    Q : (3, 3) float64 array
    u : (3,) float64 array, voxels

    Raises
    ------
    InputError
        If there is no pose, or the numbers of poses differ.
    """
    r, t, r_true, t_true = _pose_arrays(rotations, shifts, true_rotations, true_shifts)
    group = _group(symmetry)
    own = np.swapaxes(r, -1, -2) @ r_true  # (n, 3, 3), the gauge each particle alone would have
    # At most 200 candidates, taken evenly: enough for one of them to be good.
    candidates = own[np.unique(np.linspace(0, len(own) - 1, min(len(own), 200)).astype(int))]
    votes = [np.sum(_tukey(_nearest(candidate, own, group)[1])) for candidate in candidates]
    gauge = candidates[int(np.argmax(votes))]
    for _ in range(50):
        equivalent, angles = _nearest(gauge, own, group)
        weights = _tukey(angles)
        left, _, right = np.linalg.svd(np.einsum("n,nij->ij", weights, equivalent))
        updated = left @ np.diag([1.0, 1.0, np.linalg.det(left @ right)]) @ right
        done = rotation_angle(updated, gauge) < 1e-6
        gauge = updated
        if done:
            break
    voters = _nearest(gauge, own, group)[1] < GAUGE_REACH
    offsets = np.einsum("nji,nj->ni", r, t_true - t)[voters]
    distances = np.linalg.norm(offsets - np.median(offsets, axis=0), axis=1)
    near = distances <= max(1e-6, 3 * float(np.median(distances)))
    return gauge, offsets[near].mean(axis=0)


def pose_errors(
    rotations: ArrayLike,
    shifts: ArrayLike,
    true_rotations: ArrayLike,
    true_shifts: ArrayLike,
    symmetry: ArrayLike | None = None,
) -> tuple[Float64, Float64]:
    """Errors of found poses after the best common gauge (`common_gauge`, same parameters), modulo symmetry.

    Returns
    -------
    angles : (n,) float64 array, degrees
    distances : (n,) float64 array, voxels
    """
    r, t, r_true, t_true = _pose_arrays(rotations, shifts, true_rotations, true_shifts)
    gauge, offset = common_gauge(r, t, r_true, t_true, symmetry)
    angles = _nearest(gauge, np.swapaxes(r, -1, -2) @ r_true, _group(symmetry))[1]
    return angles, np.linalg.norm(t + r @ offset - t_true, axis=-1)


def _pose_arrays(
    rotations: ArrayLike, shifts: ArrayLike, true_rotations: ArrayLike, true_shifts: ArrayLike
) -> tuple[Float64, Float64, Float64, Float64]:
    r, t, r_true, t_true = (np.asarray(a, np.float64) for a in (rotations, shifts, true_rotations, true_shifts))
    n = len(r)
    if n == 0 or r.shape != (n, 3, 3) or r_true.shape != r.shape or t.shape != (n, 3) or t_true.shape != t.shape:
        raise InputError(
            f"poses: found shapes {r.shape}, {t.shape} and (truth) {r_true.shape}, {t_true.shape}, "
            "expected (n, 3, 3), (n, 3) twice with the same n > 0"
        )
    return r, t, r_true, t_true


def _group(symmetry: ArrayLike | None) -> Float64:
    return np.eye(3)[None] if symmetry is None else np.asarray(symmetry, dtype=np.float64)


def _nearest(gauge: Float64, own: Float64, group: Float64) -> tuple[Float64, Float64]:
    """Of each particle's equivalent gauges (n, g), the one nearest to `gauge` (n, 3, 3), and the angle (n,)."""
    # own_i = Q S_i: the symmetry acts from the right, tr(gauge^T own S^T) = cos of the angle.
    products = np.einsum("ji,njk->nik", gauge, own).reshape(len(own), 9)
    best = np.argmax(products @ group.reshape(-1, 9).T, axis=1)
    equivalent = own @ np.swapaxes(group[best], -1, -2)
    return equivalent, rotation_angle(equivalent, gauge)


def _tukey(angles: Float64) -> Float64:
    return np.square(np.maximum(0.0, 1.0 - np.square(angles / GAUGE_REACH)))


# --- classes ------------------------------------------------------------------------------------------------


def best_labels(found: ArrayLike, truth: ArrayLike) -> Int64:
    """Found classes renamed, one to one, so that as many particles as possible agree with the truth.

    Parameters
    ----------
    found, truth : (n,) integer arrays, labels from 0

    Returns
    -------
    (n,) int64 array
        Found classes in excess of the true ones get labels beyond the true ones.
    """
    a, b = _labels(found, truth)
    size = int(max(a.max(), b.max())) + 1
    counts = np.bincount(a * size + b, minlength=size * size).reshape(size, size)
    _, name = optimize.linear_sum_assignment(counts, maximize=True)
    return np.asarray(name, dtype=np.int64)[a]


def confusion_matrix(found: ArrayLike, truth: ArrayLike, shape: tuple[int, int] | None = None) -> Int64:
    """How many particles of each true class (columns) are in each found class (rows).

    Parameters
    ----------
    found, truth : (n,) integer arrays, labels from 0
    shape : numbers of found and of true classes, where some may be empty; None takes the largest labels

    Returns
    -------
    (K_found, K_true) int64 array
    """
    a, b = _labels(found, truth)
    rows, columns = shape or (int(a.max()) + 1, int(b.max()) + 1)
    return np.bincount(a * columns + b, minlength=rows * columns).reshape(rows, columns).astype(np.int64)


def precision(found: ArrayLike, truth: ArrayLike) -> Float64:
    """Share of the particles put in each class that belong there, (K,) float64; 0 for an empty class.

    Labels as from `best_labels`; K is the number of labels in either array.
    """
    hits, found_sizes, _ = _hits(found, truth)
    return hits / np.maximum(found_sizes, 1)


def recall(found: ArrayLike, truth: ArrayLike) -> Float64:
    """Share of the particles of each class that were put there, (K,) float64; 0 for a class the truth lacks."""
    hits, _, true_sizes = _hits(found, truth)
    return hits / np.maximum(true_sizes, 1)


def f1_score(found: ArrayLike, truth: ArrayLike) -> Float64:
    """F1 of each class, the harmonic mean of its precision and recall, (K,) float64; its mean is the macro F1."""
    hits, found_sizes, true_sizes = _hits(found, truth)
    return np.asarray(2 * hits / np.maximum(found_sizes + true_sizes, 1))


def _labels(found: ArrayLike, truth: ArrayLike) -> tuple[Int64, Int64]:
    a, b = np.asarray(found, dtype=np.int64), np.asarray(truth, dtype=np.int64)
    if a.ndim != 1 or a.shape != b.shape or len(a) == 0 or min(a.min(), b.min()) < 0:
        raise InputError(f"classes: found labels of shape {a.shape} and {b.shape}, expected (n,) from 0, same n > 0")
    return a, b


def _hits(found: ArrayLike, truth: ArrayLike) -> tuple[Int64, Int64, Int64]:
    a, b = _labels(found, truth)
    size = int(max(a.max(), b.max())) + 1
    return (
        np.bincount(a[a == b], minlength=size),
        np.bincount(a, minlength=size),
        np.bincount(b, minlength=size),
    )


# --- maps ---------------------------------------------------------------------------------------------------


def rotate_map(
    volume: ArrayLike,
    rotation: ArrayLike,
    shift: ArrayLike = (0.0, 0.0, 0.0),
    order: Literal[0, 1, 2, 3, 4, 5] = 3,
) -> Float32:
    """A map in the pose (R, t): X(x) = A(R⁻¹(x − t)), by real-space splines; 0 outside the box.

    Parameters
    ----------
    volume : (N, N, N) array, `[z, y, x]`
    rotation : (3, 3) array R, (x, y, z) order
    shift : (3,) array t, voxels, (x, y, z)
    order : of the spline (1 linear, 3 cubic)

    Returns
    -------
    (N, N, N) float32 array
    """
    values = np.asarray(volume, dtype=np.float32)
    # scipy asks where an output index comes from: R^-1 = R^T, and both axes flipped for (z, y, x) order.
    inverse = np.asarray(rotation, dtype=np.float64).T[::-1, ::-1]
    centre = np.asarray(values.shape) // 2
    offset = centre - inverse @ (centre + np.asarray(shift, dtype=np.float64)[::-1])
    return np.asarray(ndimage.affine_transform(values, inverse, offset, order=order), dtype=np.float32)


def align_map(
    volume: ArrayLike,
    reference: ArrayLike,
    *,
    voxel_size: float,
    mask_radius: float,
    resolution: float = 30.0,
) -> tuple[Float64, Float64, float, Float32]:
    """Pose of a finished average with respect to a true map, found globally, and how well they then agree.

    Both are low-passed to `resolution`. About 4,400 rotations 15 degrees apart are tried on a coarse grid, each with
    all translations by FFT; the best 10 are refined by the correlation itself (Powell), the best 2 of these at full
    resolution.

    Parameters
    ----------
    volume : (N, N, N) array, the average
    reference : (N, N, N) array, the true map, its structure within `mask_radius` of the box centre
    voxel_size : Angstrom
    mask_radius : Angstrom, radius of the structure
    resolution : Angstrom

    Returns
    -------
    R : (3, 3) float64 array
    t : (3,) float64 array, voxels
        volume(x) ≈ reference(R⁻¹(x − t)).
    r : float
        Pearson about the mean in the sphere of `mask_radius`, both maps at `resolution`.
    aligned : (N, N, N) float32 array
        The average (not low-passed) moved onto the reference.

    Raises
    ------
    InputError
        If the maps differ in shape.
    """
    average, truth = np.asarray(volume, dtype=np.float32), np.asarray(reference, dtype=np.float32)
    if average.shape != truth.shape:
        raise InputError(f"map alignment: found maps of shape {average.shape} and {truth.shape}, expected the same")
    smooth_average = lowpass(average, resolution, voxel_size)
    smooth_truth = lowpass(truth, resolution, voxel_size)
    rotation, shift = np.eye(3), np.zeros(3)
    if smooth_average.std() > 0 and smooth_truth.std() > 0:
        radius = mask_radius / voxel_size
        # 15 degrees move the rim of the structure by radius / 8 at most: finer detail would only mislead the search.
        coarse = max(resolution, mask_radius / 3)
        starts = _search(average, truth, radius, voxel_size, coarse)
        better = _refine(average, truth, radius, voxel_size, coarse, starts)
        rotation, shift = _refine(average, truth, radius, voxel_size, resolution, better[:2])[0]
    r = correlation(
        rotate_map(smooth_average, rotation.T, -rotation.T @ shift),
        smooth_truth,
        soft_sphere(len(truth), mask_radius / voxel_size, 0),
    )
    return rotation, shift, r, rotate_map(average, rotation.T, -rotation.T @ shift)


def mirrored(volume: ArrayLike) -> Float32:
    """A map of the other hand: x → −x about the box centre, voxel N // 2; (N, N, N) float32.

    For even N the plane x = −N/2, which has no partner, stays where it is.
    """
    values = np.asarray(volume, dtype=np.float32)
    return np.ascontiguousarray(np.roll(values[:, :, ::-1], 1 - values.shape[2] % 2, axis=2))


def _structure(volume: ArrayLike, voxel_size: float) -> tuple[NDArray[np.bool_], Float32]:
    """Where the structure of a map is: its largest connected part above a level; and the smoothed map, background 0."""
    values = np.asarray(volume, dtype=np.float32)
    smooth = lowpass(values, max(30.0, 3 * voxel_size), voxel_size)
    smooth -= np.median(smooth)
    # Not the maximum: one bright voxel (a gold bead, an ion) is no structure.
    bright = smooth > STRUCTURE_LEVEL * np.percentile(smooth, 99.9)
    parts, count = ndimage.label(bright)
    if count == 0 or not np.ptp(values) > 0:
        return np.ones(values.shape, dtype=bool), smooth
    return np.asarray(parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])), smooth


def structure_radius(volume: ArrayLike, voxel_size: float) -> float:
    """Radius in Angstrom of the sphere about the box centre that holds the structure of a map.

    The map (bright structure on a background that fills most of the box) is low-passed to 30 Å or three voxels; the
    structure is the largest connected part above a quarter of the way from the median to the brightest thousandth.
    At most half the box less a voxel.

    Parameters
    ----------
    volume : (N, N, N) array
    voxel_size : Angstrom
    """
    inside, _ = _structure(volume, voxel_size)
    box = len(inside)
    distance = float(np.linalg.norm(np.stack(np.nonzero(inside)) - box // 2, axis=0).max())
    return float(np.clip(distance, 1.0, box // 2 - 1.0)) * voxel_size


def principal_axis(volume: ArrayLike, voxel_size: float) -> tuple[Float64, Float64]:
    """The axis a structure is long, or flat, along: the principal axis of its density that differs from the other two.

    Parameters
    ----------
    volume : (N, N, N) array, bright structure
    voxel_size : Angstrom

    Returns
    -------
    axis : (3,) float64 array, unit vector, (x, y, z); its largest component is positive
    centre : (3,) float64 array, centre of the density, voxels from the box centre
    """
    inside, smooth = _structure(volume, voxel_size)
    points = np.stack(np.nonzero(inside))[::-1] - len(inside) // 2  # (3, n), x y z
    weights = np.maximum(smooth[inside].astype(np.float64), 1e-6)
    centre = np.average(points, axis=1, weights=weights)
    spread, axes = np.linalg.eigh(np.cov(points, aweights=weights))  # ascending
    axis = axes[:, 2] if spread[2] - spread[1] > spread[1] - spread[0] else axes[:, 0]
    return axis * np.sign(axis[np.argmax(np.abs(axis))]), centre


def symmetry_score(
    volume: ArrayLike,
    order: int,
    axis: ArrayLike = (0.0, 0.0, 1.0),
    *,
    mask_radius: float,
    centre: ArrayLike = (0.0, 0.0, 0.0),
) -> float:
    """Mean pairwise Pearson correlation of a map turned by 0, 1 .. n − 1 times 360°/n about an axis.

    Parameters
    ----------
    volume : (N, N, N) array
    order : n, at least 2
    axis : (3,) array, (x, y, z), of any length
    mask_radius : voxels, of the sphere about `centre` that is compared
    centre : (3,) array, a point of the axis, voxels from the box centre, (x, y, z)

    Returns
    -------
    float
        1 for a map with that symmetry; for a noisy one, its power share that has it.
    """
    if order < 2:
        raise InputError(f"symmetry score: found an order of {order}, expected 2 or more")
    values = np.asarray(volume, dtype=np.float32)
    direction = np.asarray(axis, dtype=np.float64)
    direction = direction / np.linalg.norm(direction)
    inside = soft_sphere(len(values), mask_radius, 0) > 0
    turns = Rotation.from_rotvec(np.outer(2 * np.pi * np.arange(order) / order, direction)).as_matrix()
    # x → A(S⁻¹x + centre): the axis goes through the box centre of what is compared.
    turned = np.stack([rotate_map(values, turn, -turn @ np.asarray(centre, np.float64))[inside] for turn in turns])
    if np.any(turned.std(axis=1) == 0):
        return 0.0
    correlations: Float64 = np.corrcoef(turned.astype(np.float64))
    return float(correlations[np.triu_indices(order, 1)].mean())


def _resample(volume: Float32, size: int) -> Float32:
    """Fourier crop to (size)³, the box centre staying the centre voxel of the smaller box."""
    box = len(volume)
    spectrum = fft.fftshift(fft.fftn(fft.ifftshift(volume)))
    start = box // 2 - size // 2
    middle = slice(start, start + size)
    cropped = fft.ifftshift(spectrum[middle, middle, middle])
    return np.asarray(fft.fftshift(fft.ifftn(cropped).real), dtype=np.float32)


def _coarse_size(box: int, voxel_size: float, resolution: float, oversampling: float) -> int:
    """Box size whose Nyquist frequency is `oversampling` times the resolution's (with the filter's edge)."""
    band = box * voxel_size / resolution + 1
    return min(box, 2 * int(np.ceil(oversampling * band)))


def _search(
    average: Float32, truth: Float32, radius: float, voxel_size: float, resolution: float
) -> list[tuple[Float64, Float64]]:
    """The best rotations of a global grid, each with its best translation (voxels of the full grid)."""
    box = len(truth)
    size = _coarse_size(box, voxel_size, resolution, 1.2)
    scale = box / size
    moving = _resample(lowpass(truth, resolution, voxel_size), size)
    mask = soft_sphere(size, radius / scale, 1.0)
    moving = mask * (moving - np.sum(mask * moving) / np.sum(mask))
    support = make_support(size, full_band(size))
    grid = interpolation_grid(moving[None], support.r_max, SEARCH_PADDING)[0]
    target = support.gather(transform(_resample(lowpass(average, resolution, voxel_size), size)))
    # Shifts beyond a quarter of the box are no alignment of two centred maps but wrap around.
    away = soft_sphere(size, size / 4, 0) == 0
    rotations = _rotation_grid(SEARCH_STEP)
    scores, peaks = np.empty(len(rotations)), np.empty((len(rotations), 3))
    for first in range(0, len(rotations), SEARCH_AT_ONCE):
        some = slice(first, first + SEARCH_AT_ONCE)
        moved = rotate(grid, rotations[some], support.coords, SEARCH_PADDING)
        # Linear interpolation damps some rotations more than others.
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        match = inverse_transform(support.scatter(target * moved.conj()), size)
        match[:, away] = -np.inf
        flat = match.reshape(len(match), -1)
        best = flat.argmax(axis=1)
        scores[some] = flat.max(axis=1)
        peaks[some] = (np.stack(np.unravel_index(best, away.shape)[::-1], axis=1) - size // 2) * scale
    chosen = np.argsort(-scores, kind="stable")[:SEARCH_KEPT]
    return [(rotations[i], peaks[i]) for i in chosen]


def _refine(
    average: Float32,
    truth: Float32,
    radius: float,
    voxel_size: float,
    resolution: float,
    starts: list[tuple[Float64, Float64]],
) -> list[tuple[Float64, Float64]]:
    """The starts with rotation and translation refined by the masked correlation at a resolution, best first."""
    box = len(truth)
    average, truth = (lowpass(volume, resolution, voxel_size) for volume in (average, truth))
    size = _coarse_size(box, voxel_size, resolution, 1.5)
    scale = box / size
    fixed, coefficients = _resample(truth, size), ndimage.spline_filter(_resample(average, size), order=3)
    inside = np.stack(np.nonzero(soft_sphere(size, radius / scale, 0)))  # (3, n), z y x
    wanted = fixed[tuple(inside)].astype(np.float64)
    wanted -= wanted.mean()
    wanted /= np.linalg.norm(wanted)
    points = (inside[::-1] - size // 2).astype(np.float64)  # (3, n), x y z

    def pose(parameters: Float64, start: tuple[Float64, Float64]) -> tuple[Float64, Float64]:
        """Parameters: rotation vector in units of the rim's displacement, and shift, both in coarse voxels."""
        turn = Rotation.from_rotvec(parameters[:3] / (radius / scale)).as_matrix()
        return turn @ start[0], parameters[3:] * scale + start[1]

    def loss(parameters: Float64, start: tuple[Float64, Float64]) -> float:
        rotation, shift = pose(parameters, start)
        where = rotation @ points + shift[:, None] / scale  # reference point y is found in the average at R y + t
        values = ndimage.map_coordinates(coefficients, where[::-1] + size // 2, order=3, prefilter=False)
        values = values - values.mean()
        norm = float(np.linalg.norm(values))
        return -float(values @ wanted) / norm if norm > 0 else 1.0

    found = [
        optimize.minimize(loss, np.zeros(6), args=(start,), method="Powell", options={"xtol": 0.01, "ftol": 1e-6})
        for start in starts
    ]
    order = np.argsort([result.fun for result in found], kind="stable")
    return [pose(found[i].x, starts[i]) for i in order]


def _rotation_grid(step: float) -> Float64:
    """Near-uniform rotations about `step` degrees apart, (n, 3, 3): the super-Fibonacci spiral.

    M. Alexa, "Super-Fibonacci Spirals: Fast, Low-Discrepancy Sampling of SO(3)", CVPR 2022.
    """
    n = int(np.ceil(8 * np.pi**2 / np.deg2rad(step) ** 3))  # volume of SO(3), with angles as lengths
    phi, psi = np.sqrt(2.0), 1.533751168755204288118041  # psi^4 = psi + 4
    s = np.arange(n) + 0.5
    inner, outer = np.sqrt(s / n), np.sqrt(1.0 - s / n)
    alpha, beta = 2 * np.pi * s / phi, 2 * np.pi * s / psi
    quaternions = np.stack(
        [inner * np.sin(alpha), inner * np.cos(alpha), outer * np.sin(beta), outer * np.cos(beta)], -1
    )
    return np.asarray(Rotation.from_quat(quaternions).as_matrix())


# --- signal to noise ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairSnr:
    """Signal-to-noise ratio from correlations of pairs (`pair_snr`).

    Attributes
    ----------
    correlation, correlation_error : mean Pearson correlation c of the pairs, and its standard error
    snr, snr_error : c / (1 − c), and its standard error
    pairs, particles : how many
    """

    correlation: float
    correlation_error: float
    snr: float
    snr_error: float
    pairs: int
    particles: int


def aligned_spectrum(
    volume: ArrayLike,
    weight: ArrayLike,
    rotation: ArrayLike,
    shift: ArrayLike,
    mask: ArrayLike,
    support: Support,
) -> tuple[NDArray[np.complex64], NDArray[np.bool_]]:
    """A particle turned and shifted back to the reference's pose, in Fourier space.

    The box is shifted back, less its mean, times the mask; then X(Rξ) and w(Rξ) are interpolated.

    Parameters
    ----------
    volume : (N, N, N) array, `[z, y, x]`
    weight : (N, N, N//2 + 1) array in [0, 1], rfftn layout: what was observed
    rotation, shift : pose (R, t) of the particle, t in voxels
    mask : (N, N, N) array about the box centre
    support : Fourier voxels to give, of the same box

    Returns
    -------
    (M,) complex64 array, values on the support's list
    (M,) bool array, where the particle was observed (w > ½)
    """
    window = np.asarray(mask, dtype=np.float32)
    turn = np.ascontiguousarray(np.asarray(rotation, dtype=np.float64).T)[None]  # ops.rotate samples at turn^T ξ = Rξ
    frequency = np.fft.fftfreq(support.box)
    x, y, z = (frequency * component for component in np.asarray(shift, dtype=np.float64))
    phase = z[:, None, None] + y[:, None] + x[: support.box // 2 + 1]
    spectrum = transform(np.asarray(volume, dtype=np.float32)) * np.exp(2j * np.pi * phase).astype(np.complex64)
    centred = inverse_transform(spectrum, support.box)
    centred = window * (centred - centred.mean())
    grid = interpolation_grid(np.asarray(centred, dtype=np.float32), support.r_max, PAIR_PADDING)
    weights = weight_grid(np.asarray(weight, dtype=np.float32), support.r_max).astype(np.complex64)
    return (
        rotate(grid, turn, support.coords, PAIR_PADDING)[0],
        rotate(weights, turn, support.coords, 1)[0].real > 0.5,
    )


def random_pairs(n: int, count: int, rng: np.random.Generator) -> Int64:
    """At most `count` different pairs (i, j), i < j < n, drawn without replacement, (pairs, 2) int64."""
    total = n * (n - 1) // 2
    number = np.sort(rng.choice(total, size=min(count, total), replace=False))
    first, second = np.triu_indices(n, 1)
    return np.stack([first[number], second[number]], axis=1).astype(np.int64)


def pair_snr(spectra: ArrayLike, observed: ArrayLike, pairs: ArrayLike) -> PairSnr:
    """Signal-to-noise ratio c / (1 − c), c the mean Pearson correlation of pairs of aligned particles.

    J. Frank & L. Al-Ali, "Signal-to-noise ratio of electron micrographs obtained by cross correlation", Nature 256
    (1975) 376. Each pair is correlated over the Fourier voxels that both observed. Pairs that share a particle are
    not independent: the standard error counts them (the dyadic-robust variance of M. Fafchamps & F. Gubert, 2007).

    Parameters
    ----------
    spectra : (n, M) complex array of `aligned_spectrum`, without the mean (ξ = 0)
    observed : (n, M) bool array
    pairs : (P, 2) int array

    Returns
    -------
    PairSnr

    Raises
    ------
    InputError
        No pair has a Fourier voxel in common.
    """
    values, seen, chosen = np.asarray(spectra), np.asarray(observed, dtype=bool), np.asarray(pairs, dtype=np.int64)
    found = []
    for i, j in chosen:
        both = seen[i] & seen[j]
        a, b = values[i][both], values[j][both]
        power = float(np.vdot(a, a).real) * float(np.vdot(b, b).real)
        found.append(float(np.vdot(a, b).real) / np.sqrt(power) if power > 0 else np.nan)
    correlations = np.array(found)
    valid = np.isfinite(correlations)
    if not valid.any():
        raise InputError("signal-to-noise ratio: found no pair of particles that observed the same Fourier voxels")
    correlations, chosen = correlations[valid], chosen[valid]
    n, mean = len(correlations), float(correlations.mean())
    rest = correlations - mean
    per_particle = np.bincount(chosen.ravel(), weights=np.repeat(rest, 2), minlength=len(values))
    alone = float(np.sum(rest**2))
    # The sum over particles counts each pair with itself twice, hence once less; never below independent pairs.
    error = float(np.sqrt(max(alone, float(np.sum(per_particle**2)) - alone))) / n
    snr = mean / (1 - mean) if mean < 1 else np.inf
    snr_error = error / (1 - mean) ** 2 if mean < 1 else np.inf
    return PairSnr(mean, error, snr, snr_error, n, len(np.unique(chosen)))
