"""The posterior over all rotations, summed over shifts, by harmonics of complex functions: where sampler `joint` looks.

For one shift t the sum c0(R, t) = sum w^2 / sigma^2 Re[X exp(2 pi i xi.t / N) conj RA] is one correlation on SO(3), and
c1^2(R) = sum w^2 / sigma^2 |RA|^2 does not depend on t.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from faml_gpu import ops
from faml_gpu.array_backend import Array, device_of, namespace, to_device, to_host, working_bytes
from faml_gpu.fast_alignment.align import Observation, Reference
from faml_gpu.fast_alignment.harmonics import sphere_grid
from faml_gpu.fast_alignment.wigner import small_d_table
from faml_gpu.fourier import Support, make_support
from faml_gpu.profile import tally
from faml_gpu.threads import Once

__all__ = [
    "JointReference",
    "coarse_shifts",
    "cube",
    "forget_tables",
    "likely_shifts",
    "log_marginal",
    "make_joint_reference",
    "make_tables",
    "shift_grid",
]

COARSE_R, COARSE_L = 10, 12  # largest band and bandwidth of the search over all rotations
PER_VOXEL = 2  # shells per Fourier voxel: A's phase turns too fast along r to be linear over a whole one
INNER_R, INNER_L = 6, 6  # of a first look at the shifts
WORTHWHILE = 27  # shifts from which on such a look pays
COARSE_STEP = 2.5  # shifts in units of N / r: Nyquist is 2, and exp of the correlation is narrower
TRANSFORMED = 96  # functions whose harmonics are made at once, or more where more go through all of it at once


@dataclass(frozen=True)
class JointReference(Reference):
    """A class average ready for `integrate`; what magnitudes need is left empty.

    phases (P, 2L, S) complex64: conj q_lm'(r) for each pair (m, l) and m' in FFT order, of A;
    powers: the same of |A|^2 less the unseen power. coarse_r: band of these.
    """

    phases: Array
    powers: Array
    coarse_r: int

    @cached_property
    def inner(self) -> JointReference | None:
        """By the innermost shells and lowest degrees, for a first look at the shifts; None where that does not pay."""
        if self.coarse_r < INNER_R + 2 or self.bandwidth <= INNER_L:
            return None
        # Of the m' in FFT order the Nyquist line counts for nothing, whatever is there.
        m = np.arange(-INNER_L, INNER_L)
        whole, pairs = _pairs(self.bandwidth), _pairs(INNER_L)
        place = {pair: i for i, pair in enumerate(zip(whole.m.tolist(), whole.l.tolist(), strict=True))}
        rows = np.array([place[pair] for pair in zip(pairs.m.tolist(), pairs.l.tolist(), strict=True)])
        xp, shells = namespace(self.phases), np.arange(PER_VOXEL * (INNER_R - 1) + 1)
        at = tuple(xp.asarray(i) for i in np.ix_(rows, np.roll(m, INNER_L) % (2 * self.bandwidth), shells))
        phases, powers = (xp.ascontiguousarray(x[at]) for x in (self.phases, self.powers))
        return replace(self, bandwidth=INNER_L, phases=phases, powers=powers, coarse_r=INNER_R)


@dataclass(frozen=True)
class Pairs:
    """The pairs 0 <= m <= l < L: those of even l first, then those of odd l."""

    m: NDArray[np.int64]
    l: NDArray[np.int64]
    n_even: int


@lru_cache(maxsize=8)
def _pairs(bandwidth: int) -> Pairs:
    m, l = np.nonzero(np.arange(bandwidth)[:, None] <= np.arange(bandwidth))
    order = np.argsort(l % 2, kind="stable")
    return Pairs(m[order], l[order], int((l % 2 == 0).sum()))


@dataclass(frozen=True)
class PhaseHarmonics:
    """Harmonics of complex functions at the voxels |xi| <= r of a support.

    f(-xi) = conj f(xi), and Y_lm(-n) = (-1)^l Y_lm(n): even degrees come from Re f, odd ones from i Im f. The i is left
    out, on both sides of a correlation it cancels. So P_lm = 2 sum over half the voxels of (Re f or Im f) conj Y_lm are
    the coefficients of real functions, and half the tables do.

    order (M',): the voxels, sorted by radius, as indices into the support. tables: per bin of radii the slice of
    `order`, and for even and odd degrees the rows (to the shell below: Re, Im; to the shell above: Re, Im) of
    conj Y_lm, times how far the voxel belongs there.
    """

    bandwidth: int
    n_shells: int
    order: Array
    tables: tuple[tuple[int, int, Array, Array], ...]

    def coefficients(self, values: Array) -> Array:
        """P_lm(r), (S, P, n) complex64, of n functions (M', n) complex64 at the voxels `order`."""
        xp = namespace(values)
        pairs = _pairs(self.bandwidth)
        n_even, n_odd, n = pairs.n_even, len(pairs.m) - pairs.n_even, values.shape[1]
        out = xp.zeros((self.n_shells + 1, 2, len(pairs.m), n), np.float32)
        for s, (start, stop, even, odd) in enumerate(self.tables):
            for rows, table, part in (
                (slice(0, n_even), even, values[start:stop].real),
                (slice(n_even, n_even + n_odd), odd, values[start:stop].imag),
            ):
                sums = (table @ xp.ascontiguousarray(part)).reshape(2, 2, -1, n)
                tally(table, part, sums, flops=2 * sums.size * len(part))
                out[s, :, rows] += sums[0]
                out[s + 1, :, rows] += sums[1]
        out = out[: self.n_shells]
        return 2 * (out[:, 0] + 1j * out[:, 1])


def _inside(box: int, r_max: int, r: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The voxels |xi| <= r of a support, by radius, as indices into it; and their radii."""
    radius = np.sqrt((make_support(box, r_max).coords.astype(np.float64) ** 2).sum(axis=1))
    inside = np.nonzero(radius <= r)[0]
    order = inside[np.argsort(radius[inside], kind="stable")]
    return order, radius[order]


@partial(Once, keep=2)  # of two bands; those of the bands before are of no use any more, and large
def _phase_harmonics(box: int, r_max: int, r: int, bandwidth: int, device: str) -> PhaseHarmonics:
    coords = make_support(box, r_max).coords
    order, radius = _inside(box, r_max, r)
    position = (radius - 1) * PER_VOXEL
    lower = np.floor(position).astype(np.int64)
    n_shells = PER_VOXEL * (r - 1) + 1
    pairs, bins = _pairs(bandwidth), np.searchsorted(lower, np.arange(n_shells + 1))
    tables = []
    for s in range(n_shells):
        start, stop = int(bins[s]), int(bins[s + 1])
        directions = np.ascontiguousarray(coords[order[start:stop]], np.float64)
        table = ops.harmonics(directions, bandwidth, even=False)[:, :, pairs.m, pairs.l]  # (voxels, 2, P)
        upper = (position[start:stop] - s).astype(np.float32)[:, None, None, None]
        both = np.concatenate([(1 - upper) * table[:, None], upper * table[:, None]], axis=1)
        rows = (both[..., : pairs.n_even], both[..., pairs.n_even :])
        even, odd = (np.ascontiguousarray(part.reshape(stop - start, -1).T) for part in rows)
        tables.append((start, stop, to_device(even, device), to_device(odd, device)))
    return PhaseHarmonics(bandwidth, n_shells, to_device(order, device), tuple(tables))


@partial(Once, keep=4)
def _d_table(bandwidth: int, device: str) -> Array:
    """d^l_mm'(beta_j), (2L, L + 1, 2L, L) float32, axes [m' in FFT order, m, j, l]; the Nyquist lines are 0."""
    narrow = to_host(small_d_table(bandwidth, 2 * bandwidth, even=False, device="cpu")).transpose(1, 0, 2, 3)
    table = np.zeros((2 * bandwidth, bandwidth + 1, 2 * bandwidth, bandwidth), np.float32)
    table[:bandwidth, :bandwidth] = narrow[bandwidth - 1 :]
    table[bandwidth + 1 :, :bandwidth] = narrow[: bandwidth - 1]
    return to_device(table, device)


def forget_tables() -> None:
    """Let go of the tables kept for later calls, where memory is short."""
    for cached in (_phase_harmonics, _d_table, _turns, _lattice_phases):
        cached.cache_clear()


def make_tables(support: Support, reference: JointReference, radius: float) -> None:
    """The tables that `log_marginal` keeps; radius: of the shifts."""
    device, shifts = device_of(reference.phases), coarse_shifts(support.box, reference, radius)
    for of_band in (reference, reference.inner):
        if of_band is not None:
            _phase_harmonics(support.box, support.r_max, of_band.coarse_r, of_band.bandwidth, device)
            _d_table(of_band.bandwidth, device)
            _turns(of_band.bandwidth, device)
            _lattice_phases(support.box, support.r_max, of_band.coarse_r, shifts.tobytes(), device)


def coarse_shifts(box: int, reference: JointReference, radius: float) -> NDArray[np.float64]:
    return shift_grid(radius, box / (COARSE_STEP * reference.coarse_r))


def make_joint_reference(
    grid: Array, padding: int, r_max: int, bandwidth: int, unseen: Array | None = None
) -> JointReference:
    """Harmonic coefficients of A and |A|^2 on shells half a Fourier voxel apart, up to the coarse band.

    unseen: `fourier.weight_grid` of the power that is still unseen; it is taken off |A|^2 (see `UnseenGain`).
    """
    xp = namespace(grid)
    r, bandwidth = min(r_max, COARSE_R), min(bandwidth, COARSE_L)
    sphere = sphere_grid(bandwidth, even=False, device=device_of(grid))
    n_shells = PER_VOXEL * (r - 1) + 1
    radii = 1 + xp.arange(n_shells, dtype=np.float64) / PER_VOXEL
    points = (radii[:, None, None] * sphere.directions).reshape(-1, 3)
    values = ops.rotate(grid, xp.eye(3)[None], points, padding)[0].reshape(n_shells, -1)
    power = abs(values) ** 2
    if unseen is not None:
        power -= ops.rotate(unseen.astype(np.complex64), xp.eye(3)[None], points, 1)[0].real.reshape(n_shells, -1)
    even = (xp.arange(bandwidth) % 2 == 0)[None, None, :]

    def all_m(coefficients: Array) -> Array:
        """conj q_lm' as (P, 2L, S), by c_l,-m = (-1)^m conj c_lm."""
        out = xp.zeros((bandwidth, 2 * bandwidth, n_shells), np.complex64)  # [l, m', s]
        conjugate = coefficients.transpose(2, 1, 0).conj()
        out[:, :bandwidth] = conjugate
        sign = (1 - 2 * (xp.arange(bandwidth - 1, 0, -1) % 2)).astype(np.float32)[:, None]
        out[:, bandwidth + 1 :] = sign * conjugate[:, :0:-1].conj()
        return xp.ascontiguousarray(out[xp.asarray(_pairs(bandwidth).l)])

    phases = xp.where(even, sphere.coefficients(values.real), sphere.coefficients(values.imag))
    powers = xp.where(even, sphere.coefficients(power), 0)
    empty = xp.zeros(0, np.complex64)
    return JointReference(grid, padding, bandwidth, empty, empty, all_m(phases), all_m(powers), r)


def shift_grid(radius: float, spacing: float) -> NDArray[np.float64]:
    """Shifts (T, 3) on a cubic lattice about 0 within `radius`, voxels."""
    reach = int(np.floor(radius / spacing))
    line = spacing * np.arange(-reach, reach + 1)
    points = cube(line)
    return np.asarray(points[(points**2).sum(axis=1) <= radius**2])


def cube(line: Array) -> Array:
    """The points (T^3, 3) of a lattice whose coordinates along each axis are those of `line` (T,), x slowest."""
    xp = namespace(line)
    return xp.stack(xp.meshgrid(line, line, line, indexing="ij"), axis=-1).reshape(-1, 3)


def log_marginal(
    observation: Observation,
    references: Sequence[JointReference],
    precision: Array,
    shifts: NDArray[np.float64],
    zeta: float,
    looked_at: NDArray[np.bool_] | None = None,
) -> tuple[list[Array], list[Array]]:
    """log of the sum over t of exp(c0(R, t) - c1^2(R) / 2 - |t|^2 / (2 zeta^2)) on the Euler grid, for each class.

    c0 = sum w^2 / sigma^2 Re[X exp(2 pi i xi.t / N) conj RA], c1^2 = sum w^2 / sigma^2 |RA|^2, both over the voxels
    |xi| <= `coarse_r` of the references, by harmonics: they select, the voxels decide. Shifts stream by a few at a
    time; what is 87 nats below the best of a particle is not told apart.

    Parameters
    ----------
    observation
        B particles.
    references : K of JointReference
    precision : (M,) float32
        1 / sigma^2 of each voxel's shell.
    shifts : (T, 3) float64, voxels
    zeta : float, voxels
    looked_at : (B, T) bool, optional
        The shifts summed over, one at least of each particle (default: all).

    Returns
    -------
    marginals : K of (B, 2L, 2L, 2L) float32
        Axes [particle, gamma, alpha, beta] at `so3.grid_angles(L)`.
    round_part : K of (B,) float32
        Mean of c0 over all rotations, at the shift of the best of them: what a particle and a reference have in common
        however it is turned.
    """
    xp, b = namespace(observation.spectra), len(observation.spectra)
    n = 2 * references[0].bandwidth
    if looked_at is None:
        looked_at = np.ones((b, len(shifts)), bool)
    particle, shift = np.nonzero(looked_at)
    sums = [xp.zeros((b, n**3), np.float32) for _ in references]
    highest = [xp.full(b, -np.inf, np.float32) for _ in references]
    round_part = [xp.zeros(b, np.float32) for _ in references]
    for k, some, scores, means in _correlations(observation, references, precision, shifts, zeta, particle, shift):
        of = particle[some]
        these = slice(int(of[0]), int(of[-1]) + 1)
        own = xp.asarray(of - of[0])[:, None] == xp.arange(these.stop - these.start)  # of which particle each is
        maxima = xp.where(own, _maxima(scores)[:, None], -np.inf)
        top = xp.maximum(highest[k][these], maxima.max(axis=0))
        round_part[k][these] = xp.where(top > highest[k][these], means[maxima.argmax(axis=0)], round_part[k][these])
        sums[k][these] *= xp.exp(highest[k][these] - top)[:, None]
        scores -= own @ top
        # Sums over the shifts as a product: a few columns are slow to add up.
        sums[k][these] += (xp.exp(scores, out=scores).reshape(n**3, -1) @ own.astype(np.float32)).T
        highest[k][these] = top
    marginals = [
        (xp.log(xp.maximum(total, np.finfo(np.float32).tiny)) + top[:, None]).reshape(b, n, n, n)
        for total, top in zip(sums, highest, strict=True)
    ]
    return marginals, round_part


def likely_shifts(
    observation: Observation,
    references: Sequence[JointReference],
    precision: Array,
    shifts: NDArray[np.float64],
    zeta: float,
) -> NDArray[np.bool_]:
    """Which shifts (B, T) may matter for a particle, against any class: by the innermost shells and few degrees.

    Those whose best rotation is not far behind that of another, or ahead of the others of that class. (The likelihood
    ratio of a wrong pose to the right one has mean 1 in any set of shells, see `screen_band`.)
    """
    all_of_them = np.ones((len(observation.spectra), len(shifts)), bool)
    if (inner := [r.inner for r in references if r.inner is not None]) == [] or len(shifts) < WORTHWHILE:
        return all_of_them
    best = namespace(precision).empty((len(inner), all_of_them.size), np.float32)
    for k, some, scores, _ in _correlations(observation, inner, precision, shifts, zeta, *np.nonzero(all_of_them)):
        best[k, some] = _maxima(scores)
    ahead = to_host(best).reshape(len(inner), *all_of_them.shape)
    of_class, of_all = ahead.max(axis=2, keepdims=True), ahead.max(axis=(0, 2), keepdims=True)
    worth = (ahead >= of_all - _tolerance(of_all)) | (ahead == of_class)
    return np.asarray(worth.any(axis=0))


def _tolerance(gain: Array) -> Array:
    """Nats by which a shift may be behind the best by the innermost shells and still come out ahead."""
    return 10 + 0.05 * np.maximum(gain, 0)


def _correlations(
    observation: Observation,
    references: Sequence[JointReference],
    precision: Array,
    shifts: NDArray[np.float64],
    zeta: float,
    particle: NDArray[np.int64],
    shift: NDArray[np.int64],
) -> Iterator[tuple[int, slice, Array, Array]]:
    """c0(R, t) - c1^2(R) / 2 - |t|^2 / (2 zeta^2) of listed particles and shifts, a few at a time and class by class.

    Each time the class, which of the list, (2L, 2L, 2L, some) float32, axes [gamma, alpha, beta], and the mean (some,)
    of c0 over all R.
    """
    xp, support, l_max = namespace(observation.spectra), observation.support, references[0].bandwidth
    r, device, n = references[0].coarse_r, device_of(observation.spectra), 2 * references[0].bandwidth
    harmonics = _phase_harmonics(support.box, support.r_max, r, l_max, device)
    phases = _lattice_phases(support.box, support.r_max, r, shifts.tobytes(), device)
    squared = (observation.weights**2 * precision)[:, harmonics.order]
    of_weights = harmonics.coefficients(squared.T.astype(np.complex64))
    base = [-0.5 * _place(of_weights, reference.powers, l_max) for reference in references]
    weighted = (squared[observation.weight_index] * observation.spectra[:, harmonics.order]).T  # (M', B)
    prior = xp.asarray(((shifts**2).sum(axis=1) / (2 * zeta**2)).astype(np.float32))
    # Per function: its values, coefficients, T, d T and the correlation. Few at a time stay in a CPU's caches.
    at_once = max(1, working_bytes(weighted) // (32 * (8 * len(weighted) + 24 * n**3)))
    transformed = at_once * max(1, TRANSFORMED // at_once)
    for start in range(0, len(particle), transformed):
        of, at = (xp.asarray(x[start : start + transformed]) for x in (particle, shift))
        functions = harmonics.coefficients(phases[:, at] * weighted[:, of])
        for first in range(0, len(of), at_once):
            some = slice(first, first + at_once)
            index, own_prior = observation.weight_index[of[some]], prior[at[some]]
            where = slice(start + first, start + first + len(own_prior))
            for k, reference in enumerate(references):
                terms = _place(functions[:, :, some], reference.phases, l_max)
                means = terms[0, 0, 0].real.copy()
                terms += base[k] if base[k].shape[-1] == 1 else base[k][..., index]
                terms[0, 0, 0] -= own_prior  # a constant is the term l = 0
                yield k, where, _synthesis(terms, l_max), means


def _maxima(scores: Array) -> Array:
    """Over all rotations: of (n, n, n, some) the largest of each, (some,)."""
    n, some = len(scores), scores.shape[-1]  # in two steps: few columns are slow to go through
    return scores.reshape(n * n, -1).max(axis=0).reshape(n, some).max(axis=0)


@partial(Once, keep=2)  # of two bands
def _lattice_phases(box: int, r_max: int, r: int, shifts: bytes, device: str) -> Array:
    """exp(2 pi i xi.t / N), (M', T) complex64, at the voxels of `_phase_harmonics`: of every particle the same."""
    points = np.frombuffer(shifts).reshape(-1, 3)
    coords = make_support(box, r_max).coords[_inside(box, r_max, r)[0]].astype(np.float64)
    return to_device(np.exp((2j * np.pi / box) * (coords @ points.T)).astype(np.complex64), device)


def _place(p: Array, q: Array, bandwidth: int) -> Array:
    """T^l_mm' = sum_r P_lm conj Q_lm' of (S, P, n) and (P, 2L, S): (2L, L + 1, L, n) complex64, axes [m', m, l]."""
    xp = namespace(p)
    pairs = _pairs(bandwidth)
    t = q @ xp.ascontiguousarray(p.transpose(1, 0, 2))
    tally(p, q, t, flops=8 * t.size * len(p))
    out = xp.zeros((2 * bandwidth, bandwidth + 1, bandwidth, p.shape[2]), np.complex64)
    out[:, xp.asarray(pairs.m), xp.asarray(pairs.l)] = t.transpose(1, 0, 2)
    return out


def _synthesis(t: Array, bandwidth: int) -> Array:
    """sum_lmm' T^l_mm' d^l_mm'(beta) exp(i m alpha) exp(i m' gamma): (2L, 2L, 2L, n) float32 [gamma, alpha, beta]."""
    # d is real: the complex T goes through one real GEMM with (function, Re/Im) as columns.
    spectrum = (_d_table(bandwidth, device_of(t)) @ t.view(np.float32)).view(np.complex64)
    n, xp = 2 * bandwidth, namespace(t)
    # Lines so short are transformed faster by a matrix than by an FFT.
    about_gamma, about_alpha = _turns(bandwidth, device_of(t))
    turned = (about_gamma @ spectrum.reshape(n, -1)).reshape(n, bandwidth + 1, -1)
    out = about_alpha @ xp.concatenate([turned.real, turned.imag], axis=1)
    tally(t, spectrum, turned, out, flops=spectrum.size * (4 * bandwidth + 8 * n) + out.size * 4 * (bandwidth + 1))
    return out.reshape(n, n, n, -1)


@partial(Once, keep=4)
def _turns(bandwidth: int, device: str) -> tuple[Array, Array]:
    """exp(i m' gamma), (2L, 2L) complex64, m' in FFT order; and (2L, 2L + 2) float32, what Re and Im of m >= 0 give."""
    n = 2 * bandwidth
    steps, m = np.arange(n), np.arange(bandwidth + 1)
    gamma = np.exp(2j * np.pi / n * np.outer(steps, np.where(steps < bandwidth, steps, steps - n)))
    # Each m > 0 stands for -m too; the Nyquist line is 0.
    alpha = np.exp(2j * np.pi / n * np.outer(steps, m)) * np.where(m == 0, 1, 2)
    parts = np.concatenate([alpha.real, -alpha.imag], axis=1)
    return to_device(gamma.astype(np.complex64), device), to_device(parts.astype(np.float32), device)
