"""How far a result is from the truth: poses up to their common gauge, classes up to their names, maps up to their pose.

Nothing here knows the method: maps are compared in real space with scipy's splines and its optimiser.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft, ndimage, optimize
from scipy.spatial.transform import Rotation

from faml_gpu.errors import InputError
from faml_gpu.fsc import lowpass
from faml_gpu.geometry import rotation_angle
from faml_gpu.masks import soft_sphere

__all__ = [
    "align_map",
    "best_labels",
    "common_gauge",
    "correlation",
    "f1_score",
    "pose_errors",
    "precision",
    "recall",
    "rotate_map",
]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

GAUGE_REACH = 20.0  # degrees: poses farther than this from a gauge do not speak for it
SEARCH_STEP = 15.0  # degrees between the rotations of the global search
SEARCH_KEPT = 10  # rotations of the global search that are refined


def correlation(first: ArrayLike, second: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Pearson correlation of two maps about their means, each voxel weighted by a mask.

    Parameters
    ----------
    first, second : (N, N, N) arrays
    mask : (N, N, N) array >= 0, or None for all voxels alike

    Returns
    -------
    float
        -1 .. 1; 0 if a map is constant inside the mask.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    w = np.ones_like(a) if mask is None else np.asarray(mask, dtype=np.float64)
    w = w / w.sum()
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
    target = fft.rfftn(_resample(lowpass(average, resolution, voxel_size), size))
    # Shifts beyond a quarter of the box are no alignment of two centred maps but wrap around.
    away = soft_sphere(size, size / 4, 0) == 0
    rotations = _rotation_grid(SEARCH_STEP)
    scores, peaks = np.empty(len(rotations)), np.empty((len(rotations), 3))
    for i, rotation in enumerate(rotations):
        moved = rotate_map(moving, rotation, order=1)
        # Linear interpolation damps some rotations more than others.
        moved /= np.linalg.norm(moved)
        spectrum = fft.rfftn(moved)
        match = fft.fftshift(fft.irfftn(target * spectrum.conj(), s=(size,) * 3))
        match[away] = -np.inf
        best = np.unravel_index(np.argmax(match), match.shape)
        scores[i] = match[best]
        peaks[i] = (np.array(best[::-1]) - size // 2) * scale
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
