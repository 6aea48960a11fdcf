"""Step 1, fast alignment: for each particle the set of candidate poses against one class average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from faml_gpu import ops
from faml_gpu.array_backend import Array, device_of, namespace, step, to_host
from faml_gpu.fast_alignment.harmonics import shell_harmonics, sphere_grid
from faml_gpu.fast_alignment.so3 import correlate, interpolate
from faml_gpu.fast_alignment.translations import ShiftWindow
from faml_gpu.fourier import Support
from faml_gpu.geometry import euler_to_matrix
from faml_gpu.symmetry import point_group, unique_rotations
from faml_gpu.threads import map_threads

__all__ = [
    "UNSEEN_BANDWIDTH",
    "Candidates",
    "Matched",
    "Observation",
    "Reference",
    "UnseenGain",
    "align",
    "make_reference",
    "margin",
    "match",
    "normalised_scores",
    "screen_band",
    "single_best",
    "unseen_gain",
    "weight_harmonics",
]

# c1^2 is a truncated harmonic series: where it should be near 0 it may ring below. Floor, relative to its maximum.
FLOOR = 1e-3
SCREEN_R = 12  # band at which poses are compared first, so wide that poses as far apart as candidates are told apart
SCREEN_SHARE = 0.6  # of narrower bands: a fifth of the voxels
SCREENED = 10  # bands from which on it pays
UNSEEN_BANDWIDTH = 16  # of tables of the unseen, enough for wedges, which are smooth over some degrees
KEPT_BYTES = 1 << 28  # kept by weight for later batches: memory must not grow with the number of weights


@dataclass(frozen=True)
class UnseenGain:
    """Nats by which what is still unseen of an average is expected to lower the residual: 1/2 sum w^2 / sigma^2 R(v).

    v is the unseen power. An average explains of a particle only what it has been shown. Were that all, each particle
    would score best where the others lie, and an average that starts with a missing wedge would keep it. The right
    orientation is expected to gain as much from the unseen part as from the seen (`maximization.wiener_factor`), so
    this is added wherever orientations are compared; to the reported likelihood it is not.

    table (W, 2L, 2L, 2L) on an SO(3) grid for W weights; index (B,): that of each particle; low: table of the inner
    shells, for comparisons by these alone (None: not kept). harmonics (r_max, L, n_l): of v, for rotational matching.
    """

    table: Array
    index: Array
    low: Array | None = None
    harmonics: Array | None = None

    def at(self, rotations: Array) -> Array:
        """(B, n) for rotations (B, n, 3, 3)."""
        b, n = rotations.shape[:2]
        xp = namespace(rotations)
        return interpolate(self.table, xp.repeat(self.index, n), rotations.reshape(b * n, 3, 3)).reshape(b, n)


@dataclass(frozen=True)
class Matched:
    """Harmonic coefficients of what a batch brings to rotational matching, the same for all classes and folds.

    magnitudes (B, r_max, L, n_l): of w^2 |X| / sigma^2; weights (W, r_max, L, n_l): of w^2 / sigma^2.
    """

    magnitudes: Array
    weights: Array


@dataclass(frozen=True)
class Observation:
    """A batch of particles on the active support.

    spectra (B, M) complex64: X; weights (W, M) float32: w, of particle b the row weight_index[b] (B,) int64;
    weight_ids: W names, the same for the same weight in any batch. magnitudes (B, M) float32: what rotational
    matching takes for |X|, where that is not just |X| (of masked particles). unseen: None where all is seen. matched:
    None where it is worked out when needed.
    """

    support: Support
    spectra: Array
    weights: Array
    weight_index: Array
    weight_ids: tuple[str, ...]
    magnitudes: Array | None = None
    unseen: UnseenGain | None = None
    matched: Matched | None = None

    def alone(self, i: int) -> Observation:
        """One particle of the batch, with its weight; no copies, on the host."""
        w = int(self.weight_index[i])
        index, unseen = np.zeros(1, np.int64), self.unseen
        if unseen is not None:
            unseen = UnseenGain(unseen.table[w : w + 1], index, None if unseen.low is None else unseen.low[w : w + 1])
        magnitudes = None if self.magnitudes is None else self.magnitudes[i : i + 1]
        spectra, weights = self.spectra[i : i + 1], self.weights[w : w + 1]
        return Observation(self.support, spectra, weights, index, self.weight_ids[w : w + 1], magnitudes, unseen)

    def within(self, r_max: int) -> Observation:
        """By the shells up to a radius only; what is unseen by the table of these, where there is one."""
        support, xp = self.support.within(r_max), namespace(self.spectra)
        m, unseen = len(support), self.unseen
        spectra, weights = (xp.ascontiguousarray(x[:, :m]) for x in (self.spectra, self.weights))
        magnitudes = None if self.magnitudes is None else xp.ascontiguousarray(self.magnitudes[:, :m])
        if unseen is not None and unseen.low is not None:
            unseen = replace(unseen, table=unseen.low)
        return Observation(support, spectra, weights, self.weight_index, self.weight_ids, magnitudes, unseen)

    def expected_gain(self, rotations: Array) -> Array:
        """(B, n) of what is unseen, for rotations (B, n, 3, 3)."""
        if self.unseen is None:
            return namespace(rotations).zeros(rotations.shape[:2])
        return self.unseen.at(rotations)


@dataclass(frozen=True)
class Reference:
    """One class average, ready to be matched.

    grid: its `fourier.interpolation_grid`; magnitude, power: coefficients (r_max, L, n_l) of |A| and |A|^2
    on shells of integer radius.
    """

    grid: Array
    padding: int
    bandwidth: int
    magnitude: Array
    power: Array


@dataclass(frozen=True)
class Candidates:
    """The set of poses per particle: rotations (B, n, 3, 3), shifts (B, n, 3) voxels, count (B,) how many.

    correlation (B, n): wedge-constrained correlation coefficient of each, what `fa` ranks by.
    gain (B, n): by how many nats each lowers -1/2 sum w^2 |X - RA|^2 / sigma^2 against no reference at all, inf where
    that is not known. Known to the parabolas of the shift search, it is no posterior, but tells what cannot matter.
    -inf, and correlation 0, where the inner shells alone already told so (`screen_band`).
    shift2 (B, n): mean of |t|^2 over the shifts that each stands for, voxels^2; None where that is its own.
    """

    rotations: Array
    shifts: Array
    correlation: Array
    count: Array
    gain: Array | None = None
    shift2: Array | None = None

    @classmethod
    def joined(cls, parts: Sequence[Candidates]) -> Candidates:
        """Those of several batches, one after the other."""
        if len(parts) == 1:
            return parts[0]
        xp = namespace(parts[0].rotations)
        rotations, shifts, correlation, count = (
            xp.concatenate([getattr(p, name) for p in parts])
            for name in ("rotations", "shifts", "correlation", "count")
        )
        gain = None if parts[0].gain is None else xp.concatenate([p.gain for p in parts])
        shift2 = None if parts[0].shift2 is None else xp.concatenate([p.shift2 for p in parts])
        return cls(rotations, shifts, correlation, count, gain, shift2)

    def known_gain(self) -> Array:
        """`gain`, a copy: inf where it is not known, -inf where there is no candidate."""
        xp = namespace(self.rotations)
        n = self.rotations.shape[1]
        gain = xp.full(self.rotations.shape[:2], np.inf) if self.gain is None else self.gain
        return xp.where(xp.arange(n) < self.count[:, None], gain, -np.inf)


def margin(gain: Array) -> Array:
    """Nats by which a pose may be behind one of this gain and still matter: 30, and what the shift search may be off.

    Its parabola through lattice shifts misses the maximum of the correlation by a few per cent at most.
    """
    xp = namespace(gain)
    return 30 + 0.05 * xp.maximum(xp.where(xp.isfinite(gain), gain, 0), 0)


def screen_band(r_max: int) -> int | None:
    """Band at which poses are compared before they are at r_max; None where that is not done.

    The likelihood ratio of a wrong pose to the right one has mean 1 in any set of shells: that it is e^30 in the inner
    ones has a probability of e^-30 (Markov's inequality), whatever the outer ones hold.
    """
    return min(SCREEN_R, round(SCREEN_SHARE * r_max)) if r_max >= SCREENED else None


def make_reference(grid: Array, padding: int, r_max: int, bandwidth: int) -> Reference:
    """Harmonic coefficients of |A| and |A|^2 from the class average's interpolation grid."""
    xp = namespace(grid)
    sphere = sphere_grid(bandwidth, device=device_of(grid))
    radii = xp.arange(1, r_max + 1, dtype=np.float64)
    points = (radii[:, None, None] * sphere.directions).reshape(-1, 3)
    values = abs(ops.rotate(grid, xp.eye(3)[None], points, padding)[0]).reshape(r_max, -1)
    return Reference(grid, padding, bandwidth, sphere.coefficients(values), sphere.coefficients(values**2))


def unseen_harmonics(unseen: Array, r_max: int, bandwidth: int) -> Array:
    """Coefficients (r_max, L, n_l) of the unseen power, a `fourier.weight_grid`, on shells of integer radius."""
    xp = namespace(unseen)
    sphere = sphere_grid(bandwidth, device=device_of(unseen))
    radii = xp.arange(1, r_max + 1, dtype=np.float64)
    points = (radii[:, None, None] * sphere.directions).reshape(-1, 3)
    values = ops.rotate(unseen.astype(np.complex64), xp.eye(3)[None], points, 1)[0].real
    return sphere.coefficients(xp.ascontiguousarray(values).reshape(r_max, -1))


def unseen_gain(weights: Array, index: Array, unseen: Array, low: int | None = None) -> UnseenGain:
    """Of the weights of a batch, from their coefficients (`weight_harmonics`) and those of `unseen_harmonics`.

    low: shells of the table so named.
    """

    def table(shells: int | None) -> Array:
        smooth = (slice(UNSEEN_BANDWIDTH), slice((UNSEEN_BANDWIDTH + 1) // 2))  # degrees below it, the even ones
        return 0.5 * correlate(weights[:, :shells, *smooth], unseen[:shells, *smooth])

    return UnseenGain(table(None), index, None if low is None else table(low), unseen)


def weight_harmonics(
    observation: Observation, precision: Array, bandwidth: int, kept: dict[str, Array] | None = None
) -> Array:
    """Coefficients (W, r_max, L, n_l) of w^2 / sigma^2 for the weights of a batch.

    kept: those of other batches of the same band, noise and bandwidth, by weight name; filled and used. On the CPU they
    are the same to the last bit whichever weights they are computed beside: a run that was stopped between two batches
    has none kept when it goes on.
    """
    xp = namespace(observation.spectra)

    def made(missing: list[int]) -> list[Array]:
        squared = xp.stack([observation.weights[i] for i in missing]) ** 2 * precision
        harmonics = shell_harmonics(observation.support, bandwidth)
        rows = [squared[i : i + 1] for i in range(len(missing))] if xp is np else [squared]
        return [row for some in rows for row in harmonics.coefficients(some)]

    return xp.stack(_by_weight(observation.weight_ids, {} if kept is None else kept, made))


def match(
    observation: Observation,
    precision: Array,
    bandwidth: int,
    *,
    centred: bool,
    kept: dict[str, Array] | None = None,
) -> Matched:
    """What a batch brings to `normalised_scores`; kept: see `weight_harmonics`.

    centred : subtract from |X| its mean per shell over the observed voxels. A noisy |X| has a positive mean (Rician),
    so without this c~0 mostly measures sum w |RA|.
    """
    xp, support = namespace(observation.spectra), observation.support
    magnitude = abs(observation.spectra) if observation.magnitudes is None else observation.magnitudes
    weight = observation.weights[observation.weight_index]
    if centred:
        total, observed = support.shell_sums(magnitude * weight), support.shell_sums(weight)
        mean = total / xp.maximum(observed, np.finfo(np.float32).tiny)
        magnitude = magnitude - mean[:, support.shell].astype(np.float32)
    of_magnitudes = shell_harmonics(support, bandwidth).coefficients(magnitude * weight**2 * precision)
    return Matched(of_magnitudes, weight_harmonics(observation, precision, bandwidth, kept))


def _by_weight(
    names: Sequence[str], kept: dict[str, Array], made: Callable[[list[int]], Sequence[Array]]
) -> list[Array]:
    """What is kept of each weight; of those of which nothing is, `made` of their numbers is from now on.

    The oldest go where it takes too much memory. Threads may share what is kept.
    """
    found = [kept.get(name) for name in names]
    if missing := [i for i, known in enumerate(found) if known is None]:
        for i, new in zip(missing, made(missing), strict=True):
            found[i] = kept[names[i]] = new
        for name in list(kept)[: max(0, len(kept) - KEPT_BYTES // new.nbytes)]:
            kept.pop(name, None)
    return found


def normalised_scores(
    observation: Observation,
    reference: Reference,
    precision: Array,
    *,
    centred: bool,
    kept: dict[str, Array] | None = None,
) -> Array:
    """c~ = c~0 / c~1 (Eq. 1-2 with magnitudes) on the SO(3) grid.

    c~0 = sum w^2 |X| |RA| bounds the correlation from above whatever the shift (triangle inequality);
    c~1^2 = sum w^2 R(|A|^2). Both are weighted by the precision, 1 / sigma^2 of each voxel's shell.
    What is unseen of the average counts as if it matched: its share is added to both.

    Parameters
    ----------
    observation : Observation
    reference : Reference
    precision : (M,) float32
    centred : bool
        See `match`; of no account where `observation.matched` is given.
    kept : dict, optional
        c~1 by weight name, filled and used: c~1 depends on the class and the weight only.

    Returns
    -------
    (B, 2L, 2L, 2L) float32
        Axes [b, beta, gamma, alpha].
    """
    xp = namespace(observation.spectra)
    matched = observation.matched or match(observation, precision, reference.bandwidth, centred=centred)
    unseen = observation.unseen

    def made(missing: list[int]) -> list[Array]:
        power = reference.power if unseen is None else reference.power + unseen.harmonics
        squared = correlate(xp.stack([matched.weights[i] for i in missing]), power)
        return [xp.sqrt(xp.maximum(c1, FLOOR * c1.max() + np.finfo(np.float32).tiny)) for c1 in squared]

    c1 = _by_weight(observation.weight_ids, {} if kept is None else kept, made)
    magnitudes, magnitude = matched.magnitudes, reference.magnitude
    if unseen is not None:  # as if on shells of their own
        magnitudes = xp.concatenate([magnitudes, matched.weights[unseen.index]], axis=1)
        magnitude = xp.concatenate([magnitude, unseen.harmonics])
    scores = correlate(magnitudes, magnitude)
    scores /= xp.stack(c1)[observation.weight_index]
    return scores


def align(
    observation: Observation,
    reference: Reference,
    precision: Array,
    window: ShiftWindow,
    n_candidates: int,
    *,
    centred: bool,
    kept: dict[str, Array] | None = None,
    symmetry: str = "C1",
    screened: ShiftWindow | None = None,
) -> Candidates:
    """At most `n_candidates` good poses of each particle: local maxima of c~, each with its best shift.

    Parameters
    ----------
    observation, reference, precision, centred, kept
        As for `normalised_scores`.
    window : ShiftWindow
        The shifts searched.
    n_candidates : int
    symmetry : str
        Point group that the reference has: of poses that are copies of each other one is a candidate.
    screened : ShiftWindow, optional
        The shifts searched by the inner shells first. Candidates too far behind the best there are not looked at in the
        whole band; for a posterior they do not matter.

    Returns
    -------
    Candidates
        Best c~ first.
    """
    xp = namespace(observation.spectra)
    with step("rotational matching"):
        scores = normalised_scores(observation, reference, precision, centred=centred, kept=kept)
    with step("peaks"):
        # Closer than one step of alpha is one candidate.
        apart, group = 180 / reference.bandwidth, point_group(symmetry)
        angles, _, count = ops.peaks(scores, n_candidates * len(group), apart)
        rotations = euler_to_matrix(to_host(angles))
        if len(group) > 1:
            rotations, found = unique_rotations(rotations, to_host(count), group, n_candidates, angle=apart)
            count = xp.asarray(found)
        rotations = xp.asarray(rotations)
    with step("translations"):
        considered, first = xp.arange(rotations.shape[1]) < count[:, None], None
        if screened is not None:
            inner = observation.within(screened.r_max)
            first = _best_shifts(inner, reference, precision[: len(inner.support)], screened, rotations, considered)
            worth = xp.where(considered, first[2] + inner.expected_gain(rotations), -np.inf)
            considered &= worth >= (highest := worth.max(axis=1, keepdims=True)) - margin(highest)
        shifts, correlation, gain = _best_shifts(observation, reference, precision, window, rotations, considered)
        if first is not None:
            shifts = xp.where(considered[..., None], shifts, first[0])
    return Candidates(rotations, shifts, correlation, count, gain)


def _best_shifts(
    observation: Observation,
    reference: Reference,
    precision: Array,
    window: ShiftWindow,
    rotations: Array,
    considered: Array,
) -> tuple[Array, Array, Array]:
    """Best shift (B, n, 3) of each candidate rotation (B, n, 3, 3); constrained correlation and gain (B, n) there.

    Of those that are `considered` (B, n): else 0, 0, -inf.
    """
    xp = namespace(observation.spectra)
    b, n = rotations.shape[:2]
    squared = observation.weights**2 * precision
    own = 2 * (squared[observation.weight_index] * abs(observation.spectra) ** 2).sum(axis=1, dtype=np.float64)
    shifts, correlation, gain = xp.zeros((b * n, 3)), xp.zeros(b * n), xp.full(b * n, -np.inf)
    # One list over all particles, in pieces that fill the device: few candidates of many particles cost no more.
    listed = np.nonzero(to_host(considered))

    def some(first: int) -> None:
        particle, pose = (xp.asarray(np.ascontiguousarray(i[first : first + window.at_once])) for i in listed)
        correlations, power = ops.correlations(
            reference.grid,
            observation.spectra,
            squared,
            observation.weight_index,
            particle,
            rotations[particle, pose],
            xp.zeros((len(particle), 3)),
            window.waves,
            observation.support,
            reference.padding,
        )
        entry = particle * n + pose
        shifts[entry], cross = window.best(correlations)
        correlation[entry] = cross / xp.sqrt(xp.maximum(power * own[particle], np.finfo(np.float64).tiny))
        gain[entry] = cross - 0.5 * power

    map_threads(some, range(0, len(listed[0]), window.at_once), squared)
    return shifts.reshape(b, n, 3), correlation.reshape(b, n), gain.reshape(b, n)


def single_best(candidates: list[Candidates]) -> list[Candidates]:
    """`fa`: of all classes and poses of a particle only the one of highest constrained correlation."""
    xp = namespace(candidates[0].rotations)
    score = xp.stack([xp.where(xp.arange(c.correlation.shape[1]) < c.count[:, None], c.correlation, -np.inf)
                      for c in candidates])  # fmt: skip
    pose = score.argmax(axis=2)  # (K, B)
    rows = xp.arange(score.shape[1])
    classes = score.max(axis=2).argmax(axis=0)
    return [
        Candidates(
            xp.ascontiguousarray(c.rotations[rows, pose[k]][:, None]),
            xp.ascontiguousarray(c.shifts[rows, pose[k]][:, None]),
            c.correlation[rows, pose[k]][:, None],
            (classes == k).astype(np.int64),
            c.known_gain()[rows, pose[k]][:, None],
        )
        for k, c in enumerate(candidates)
    ]
