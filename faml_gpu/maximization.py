"""Step 3, maximization: new class averages, proportions, noise and shift widths (Eq. 10-13)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from faml_gpu import ops
from faml_gpu.array_backend import Array, namespace, to_device, to_host
from faml_gpu.data import Posterior
from faml_gpu.expectation import BatchPosterior
from faml_gpu.fourier import Support, interpolation_grid, inverse_transform, weight_grid
from faml_gpu.weights import centred_from_half

__all__ = [
    "COVERAGE_FLOOR",
    "Accumulators",
    "coverage_planes",
    "covered",
    "direct_average",
    "new_relative_noise",
    "new_sigma2",
    "new_zeta",
    "noise_sums",
    "rotate_back",
    "update_average",
    "wiener_factor",
]

# A voxel seen by less than this share of a class's particles is left 0. What leaks there through masks and
# interpolation would otherwise be divided by next to nothing.
COVERAGE_FLOOR = 0.02
ZETA_FLOOR = 0.5  # voxels: a width of 0 could never grow again
SIGMA2_FLOOR = 1e-6  # of the mean over shells


@dataclass
class Accumulators:
    """Additive sums an E-step over any part of the particles leaves; `merge` adds in a fixed order.

    sums (K, M) complex128: sum of P R^-1(w X); weights (K, M) float64: sum of P R^-1 w; mass (K,): sum of P; K rows for
    each of the `parts` of the particles whose sums are kept apart;
    residual, observed (G, r_max + 1): see `noise_sums`, per noise curve and Fourier shell;
    shift2: sum of P E|t|^2, voxels^2; log_evidence: sum of logsumexp; candidates: poses; n: particles.
    `sums` and `weights` are on the device of the E-step, the rest is NumPy's.
    """

    sums: Array
    weights: Array
    mass: NDArray[np.float64]
    residual: NDArray[np.float64]
    observed: NDArray[np.float64]
    shift2: float
    log_evidence: float
    candidates: int
    n: int
    parts: int = 1

    @classmethod
    def zero(
        cls, n_classes: int, n_voxels: int, r_max: int, device: str = "cpu", n_curves: int = 1, parts: int = 1
    ) -> Accumulators:
        """Sums over no particle."""
        return cls(
            to_device(np.zeros((parts * n_classes, n_voxels), np.complex128), device),
            to_device(np.zeros((parts * n_classes, n_voxels)), device),
            np.zeros(parts * n_classes),
            np.zeros((n_curves, r_max + 1)),
            np.zeros((n_curves, r_max + 1)),
            0.0,
            0.0,
            0,
            0,
            parts,
        )

    def emptied(self) -> Accumulators:
        """Sums over no particle, of the same shape, on the same device."""
        names = ("sums", "weights", "mass", "residual", "observed")
        zeros = {name: namespace(array).zeros_like(array) for name in names for array in [getattr(self, name)]}
        return replace(self, **zeros, shift2=0.0, log_evidence=0.0, candidates=0, n=0)

    def merge(self, other: Accumulators, part: int = 0) -> None:
        """Add the sums over other particles, all of one part."""
        rows = slice(part * len(other.mass), (part + 1) * len(other.mass))
        self.sums[rows] += other.sums
        self.weights[rows] += other.weights
        self.mass[rows] += other.mass
        self.residual += other.residual
        self.observed += other.observed
        self.shift2 += other.shift2
        self.log_evidence += other.log_evidence
        self.candidates += other.candidates
        self.n += other.n

    def by_part(self) -> NDArray[np.complex128]:
        """`sums` (parts, K, M) of each part of the particles."""
        return self.sums.reshape(self.parts, -1, self.sums.shape[1])  # type: ignore[no-any-return]

    def together(self) -> Accumulators:
        """The sums over all particles."""
        if self.parts == 1:
            return self
        added = {name: self._rows(name).sum(axis=0) for name in ("sums", "weights", "mass")}
        return replace(self, parts=1, **added)

    def without(self, part: int) -> Accumulators:
        """Sums, weights and mass of all parts but one; the rest is that of all particles."""
        others = [p for p in range(self.parts) if p != part]
        added = {name: self._rows(name)[others].sum(axis=0) for name in ("sums", "weights", "mass")}
        return replace(self, parts=1, **added)

    def scatter(self) -> tuple[NDArray[np.complex128], NDArray[np.float64]]:
        """How far the sums of each part differ from what the averages of all say, (parts, K, M), and the freedom (M,).

        S_p - W_p S / W: noise of variance v in each particle leaves v W_p (1 - W_p / W) of it in a voxel. The second is
        that of all parts and classes together, for v = 1. 0 where next to nothing was observed.
        """
        sums, weights = self._rows("sums"), self._rows("weights")
        whole, mass = weights.sum(axis=0), self._rows("mass").sum(axis=0)
        averages = direct_average(sums.sum(axis=0), whole, mass)
        seen = whole >= COVERAGE_FLOOR * mass[:, None]
        free = np.where(seen, weights * (1 - weights / np.where(whole > 0, whole, 1)), 0)
        return np.where(seen, sums - weights * averages, 0), free.sum(axis=(0, 1))

    def _rows(self, name: str) -> Array:
        rows: Array = getattr(self, name)
        return rows.reshape(self.parts, -1, *rows.shape[1:])

    def on_host(self) -> Accumulators:
        """The same with NumPy arrays only, for the M-step."""
        return replace(self, sums=to_host(self.sums), weights=to_host(self.weights))

    def on_device(self, device: str) -> Accumulators:
        """The same with `sums` and `weights` where the E-step adds to them."""
        return replace(self, sums=to_device(self.sums, device), weights=to_device(self.weights, device))


def rotate_back(
    spectra: Array,
    weights: Array,
    weight_index: Array,
    mask: Array | None,
    posterior: BatchPosterior | Posterior,
    support: Support,
    padding: int,
    n_classes: int,
    *,
    weigh_twice: bool = False,
    compensate: bool = True,
) -> tuple[Array, Array]:
    """Sums of P R^-1(w X) and P R^-1 w over a batch, per class, on `support`, with w^2 for w (same for 0 and 1).

    The likelihood weighs residuals by w^2, so its maximum over A does too: with a w between 0 and 1, Eq. 10 as
    printed would not be the maximisation step of Eq. 15. The product w X is interpolated once: X is already masked
    by the wedge, so interpolating w and w X apart and multiplying (`weigh_twice`, Eq. 10 as printed) weighs the
    wedge's edge twice.

    Parameters
    ----------
    spectra : (B, N, N, N//2 + 1) complex64
        Transforms of the particles.
    weights : (W, N, N, N//2 + 1) float32; weight_index : (B,) int64
    mask : (N, N, N) float32 or None
        Applied to w X in real space before padding.
    posterior
        Its `particle` indexes the batch.
    """
    xp = namespace(spectra)
    squared = weights**2
    volumes = inverse_transform(spectra * squared[weight_index], support.box)
    if mask is not None:
        volumes *= mask
    grids = interpolation_grid(volumes, support.r_max, padding, compensate=compensate)
    return ops.accumulate(
        grids,
        weight_grid(squared, support.r_max),
        weight_index,
        xp.asarray(posterior.particle),
        xp.asarray(posterior.class_index),
        xp.asarray(posterior.rotations),
        xp.asarray(posterior.shifts),
        xp.asarray(posterior.probability),
        support,
        padding,
        n_classes,
        weigh_twice=weigh_twice,
    )


def noise_sums(
    posterior: BatchPosterior,
    weights: Array,
    weight_index: Array,
    support: Support,
    *,
    premultiplied: bool = False,
    rows: NDArray[np.int64] | None = None,
    relative: NDArray[np.float64] | None = None,
    scale: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per noise curve and Fourier shell, (G, r_max + 1): sum of P w^2 |X - RA|^2, and of w^2, over a batch.

    What they are divided by each other for is the variance of X's noise where w = 1. Noise of the same variance
    everywhere adds w^2 of it to the first. That of premultiplied boxes has the variance 1 / w^2 of it: so every voxel
    adds it once, and the second is the number of voxels with w > 0.

    Parameters
    ----------
    posterior : its `particle` indexes the batch
    weights : (W, M) float32; weight_index : (B,) int64
    premultiplied : bool
    rows : (B,) int64, noise curve of each particle
    relative : (G, S) float64
        The variance of each curve, over the common one, that the weights are relative to: both sums are of the weights
        before that. None is one curve for all.
    scale : (B,) float64
        Scale of each particle that the weights are relative to; None is 1.
    """
    part = weights > 0 if premultiplied else weights**2
    seen = to_host(support.shell_sums(part))[to_host(weight_index)]  # (B, r_max + 1)
    if scale is not None and not premultiplied:
        seen = seen / scale[:, None] ** 2
    if rows is None or relative is None:
        return (posterior.probability @ posterior.residual)[None], seen.sum(axis=0)[None]
    relative = relative[:, : support.r_max + 1]
    residual, observed = np.zeros_like(relative), np.zeros_like(relative)
    for g in np.unique(rows):
        mine = rows[posterior.particle] == g
        residual[g] = posterior.probability[mine] @ posterior.residual[mine] * relative[g]
        observed[g] = seen[rows == g].sum(axis=0) * (1.0 if premultiplied else relative[g])
    return residual, observed


def update_average(
    sums: NDArray[np.complex128],
    weights: NDArray[np.float64],
    mass: NDArray[np.float64],
    old: NDArray[np.complex64] | NDArray[np.complex128],
    inside: NDArray[np.bool_],
) -> NDArray[np.complex128]:
    """New class averages (K, M) on the output support (Eq. 10).

    Inside the active support the missing part is filled by the old average,
    A = sum P [R^-1(w X) + (1 - R^-1 w) A_old] / sum P. Outside it no A_old took part in the E-step: there A is the
    average divided by its coverage, and so it is where weights above 1 leave nothing to fill. A class without mass
    keeps its old average.

    Parameters
    ----------
    sums, weights : (K, M); mass : (K,)
    old : (K, M)
        Old averages on the output support.
    inside : (M,) bool
        Voxels of the active support.
    """
    new = direct_average(sums, weights, mass)
    for k in np.nonzero(mass > 0)[0]:
        whole = np.maximum(mass[k], weights[k])
        filled = (sums[k] + (whole - weights[k]) * old[k]) / whole
        new[k, inside] = filled[inside]
    for k in np.nonzero(mass <= 0)[0]:
        new[k] = old[k]
    return new


def direct_average(
    sums: NDArray[np.complex128], weights: NDArray[np.float64], mass: NDArray[np.float64]
) -> NDArray[np.complex128]:
    """Wedge-weighted averages, sum P R^-1(w X) / sum P R^-1 w, and 0 where next to nothing was observed."""
    floor = np.maximum(COVERAGE_FLOOR * mass, np.finfo(np.float64).tiny)[:, None]
    return np.where(weights >= floor, sums / np.maximum(weights, floor), 0)


def wiener_factor(
    averages: NDArray[np.complex128] | NDArray[np.complex64],
    weights: NDArray[np.float64],
    mass: NDArray[np.float64],
    noise: NDArray[np.float64],
    shell: NDArray[np.int64],
    caution: float = 1.0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """C = W / (W + noise / tau^2), which holds averages down where they are mostly noise.

    tau^2 is the power of the signal in a Fourier shell: that of the averages less the noise's, noise / weights (Scheres
    2012, J. Mol. Biol. 415, 406, takes it from the FSC of half sets). Averages and noise are those within the mask: a
    particle that fills a tenth of the box is alone there with a tenth of the noise, and taken for noise if it has to
    stand out from all of it. W are the weights of a class of average size: were they those of each class, the larger
    ones would explain more of any particle, and take all of them.

    A voxel that is poorly determined (C < 1) explains less of a particle. So a particle scores best where it lies as
    those before it did, whichever way it points, and the missing wedge of the first average stays missing for good.
    The right orientation is expected to lower a particle's residual by C tau^2 / sigma^2 at each of its voxels, summed
    and halved; given (1 - C) tau^2 besides, the second result, it is expected to score the same wherever it points.

    Parameters
    ----------
    averages, weights : (K, M); mass : (K,)
        Averages within the mask, see `direct_average`.
    noise : (S,)
        Noise variance per Fourier shell of a particle within the mask.
    shell : (M,)
        Shell of each voxel, below S.
    caution : float
        The noise in C counts so many times (in tau^2 it is what it is), see `Plan.caution`.

    Returns
    -------
    factor : (M,) float64
        C, of all classes.
    unseen : (M,) float64
        tau^2 (1 - C).
    """
    variance, tiny = noise[shell], np.finfo(np.float64).tiny
    seen = np.where(weights >= COVERAGE_FLOOR * mass[:, None], weights, 0)
    excess = np.where(seen > 0, seen * np.abs(averages) ** 2 - variance, 0)
    tau2 = np.bincount(shell, excess.sum(axis=0)) / np.maximum(np.bincount(shell, seen.sum(axis=0)), tiny)
    signal = np.maximum(tau2, 0)[shell]
    each = weights.mean(axis=0) * signal
    determined = each / np.maximum(each + caution * variance, tiny)
    return determined, signal * (1 - determined)


def covered(weights: NDArray[np.float64], mass: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of each class's Fourier voxels that were observed at all, (K,)."""
    return np.asarray((weights > COVERAGE_FLOOR * np.maximum(mass, np.finfo(np.float64).tiny)[:, None]).mean(axis=1))


def coverage_planes(weights: NDArray[np.float64], mass: NDArray[np.float64], support: Support) -> NDArray[np.float32]:
    """Mean weight of the particles of each class in the central planes xy, xz, yz of Fourier space: (K, 3, N, N).

    Parameters
    ----------
    weights : (K, M), sums of P R^-1 w; mass : (K,), sums of P
    support : of M voxels

    Returns
    -------
    (K, 3, N, N) float32 array
        Zero frequency at N//2, the second axis named is the row. NaN off the support; less than `COVERAGE_FLOOR` is a
        gap. 0 all over in a class without mass.
    """
    box, centre = support.box, support.box // 2
    planes = np.empty((len(mass), 3, box, box), np.float32)
    inside = centred_from_half(support.scatter(np.ones(len(support))), box) > 0
    for k, total in enumerate(mass):
        mean = weights[k] / total if total > 0 else np.zeros_like(weights[k])
        cube = np.where(inside, centred_from_half(support.scatter(mean), box), np.float32(np.nan))
        planes[k] = cube[centre], cube[:, centre], cube[:, :, centre]
    return planes


def new_sigma2(
    residual: NDArray[np.float64], observed: NDArray[np.float64], old: NDArray[np.float64], *, per_shell: bool
) -> NDArray[np.float64]:
    """Noise variance per Fourier shell (Eq. 12); where no voxel is observed it keeps the old value.

    residual, observed (r_max + 1,); old (S,). A single sigma is the same value on all S shells.
    """
    new = old.copy()
    if not per_shell:
        if observed.sum() > 0:
            new[:] = residual.sum() / observed.sum()
    else:
        seen = np.nonzero(observed > 0)[0]
        new[seen] = residual[seen] / observed[seen]
    return np.maximum(new, max(SIGMA2_FLOOR * new[1:].mean(), np.finfo(np.float64).tiny))


def new_relative_noise(
    residual: NDArray[np.float64],
    observed: NDArray[np.float64],
    old: NDArray[np.float64],
    sigma2: NDArray[np.float64],
    *,
    per_shell: bool,
) -> NDArray[np.float64]:
    """Noise variance of each group over the common one, (G, S); the first is the common one itself.

    residual, observed (G, r_max + 1), each group's; old (G, S), its variance before, kept where none of its voxels is
    observed; sigma2 (S,), the new common variance.
    """
    curves = [new_sigma2(r, o, was, per_shell=per_shell) for r, o, was in zip(residual, observed, old, strict=True)]
    return np.stack([sigma2, *curves[1:]]) / sigma2


def new_zeta(shift2: float, n: int) -> float:
    """Standard deviation of the shifts along an axis, voxels (Eq. 13), not under half a voxel."""
    return max(float(np.sqrt(shift2 / (3 * n))), ZETA_FLOOR)
