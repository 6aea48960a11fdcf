"""Sampler `joint`: the pose integral itself, over rotations and shifts together and with the phases kept.

Beyond the paper, which matches magnitudes because it holds the integral to be out of reach. For one shift t the sum
c0(R, t) = sum w^2 / sigma^2 Re[X exp(2 pi i xi.t / N) conj RA] is one correlation on SO(3), and c1^2(R) = sum w^2 /
sigma^2 |RA|^2 does not depend on t, so the log-posterior c0 - c1^2 / 2 - |t|^2 / (2 zeta^2) is known on a whole grid:

1. at a low band and a coarse grid of shifts, summed over the shifts as they stream by (`log_marginal`);
2. the equal-volume cells of SO(3) that are heaviest by that, and some drawn from the others to stand for them all
   (`thinned`), are scored from the voxels, over all shifts at once: up to a band that their width allows, and those
   that are not far behind at the whole band, near the shifts found;
3. the most massive of them are split in eight, at finer shifts where those are too coarse, a few times over.

What comes out are (rotation, shift) points of the finest cells, the heaviest and some drawn from the others, with the
log of the volume each stands for: with these in place of the Voronoi shares, the log-sum-exp of `expectation` is the
integral over all rotations and shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from faml_gpu import ops
from faml_gpu.array_backend import Array, device_of, namespace, step, to_device, to_host
from faml_gpu.fast_alignment import marginal
from faml_gpu.fast_alignment.align import Candidates, Observation, screen_band
from faml_gpu.fast_alignment.cells import all_cells, cell_children, cell_rotations, cell_width
from faml_gpu.fast_alignment.marginal import (
    COARSE_STEP,
    JointReference,
    coarse_shifts,
    cube,
    likely_shifts,
    log_marginal,
)
from faml_gpu.fast_alignment.so3 import at_places, interpolate
from faml_gpu.fast_alignment.thinning import thinned
from faml_gpu.fast_alignment.translations import correlated_at_once, shift_waves
from faml_gpu.fourier import Support
from faml_gpu.symmetry import point_group, unit_share
from faml_gpu.threads import Once, map_threads

__all__ = ["forget_tables", "integrate", "make_tables"]

FINE_STEP = 5.0  # shifts in units of N / r, as `COARSE_STEP`
FINE_OF_PRIOR = 1.5  # shifts in standard deviations of the prior: the sum over them is off by 2 exp(-2 (pi / 1.5)^2)
REACH = 4.0  # standard deviations of the prior beyond which no shift is looked at
SELECTED = 96  # cells scored from the voxels; half of them the heaviest, others drawn where many more hold mass
SCREEN_STEPS = 2  # of the lattice of shifts there to either side of the best, within which all shifts are then
SCREENED_KIN = 8  # cells close together are told apart by the inner shells only where these have so much less voxels
FOREMOST = 4  # cells of a class that cannot matter are scored at the whole band all the same
SPLIT = 12  # at most so many of them are split in eight, in each round
FINEST = 52.0  # degrees over r_max, as wide as the finest cells may be: two radians of phase there within 0.35 boxes
ROUNDS = 3  # at least, of splitting
SPREAD = 12.0  # effective number of cells from which on a posterior counts as resolved: if normal, 1.5 sigma apart
LOCAL_REACH = 3  # points of a finer lattice to either side of the best shift
MASS = 0.99  # of the posterior, held by the candidates
OUTSIDE = 1e-6  # what a pose beyond the widened asymmetric unit counts for: its copy inside has the mass


def forget_tables() -> None:
    """Let go of the tables kept for later calls, where memory is short."""
    marginal.forget_tables()
    _first_cells.cache_clear()


def make_tables(support: Support, reference: JointReference, symmetry: str, max_shift: float, zeta: float) -> None:
    """The tables that `integrate` keeps, made before several threads at once find that there are none."""
    marginal.make_tables(support, reference, min(max_shift, REACH * zeta))
    bandwidth = reference.bandwidth
    _first_cells(bandwidth, _first_level(bandwidth), symmetry, device_of(reference.phases))


@partial(Once, keep=2)
def _first_cells(bandwidth: int, level: int, symmetry: str, device: str) -> tuple[Array, Array, Array, Array, Array]:
    """The cells of a level (pixel, turn) that cover the widened asymmetric unit, and the log of each one's share.

    For the Euler grid's values in their centres 8 places and weights (cells, 8).
    """
    n = 2 * bandwidth
    levels, pixel, turn = all_cells(level)
    r = cell_rotations(levels, pixel, turn)
    group, width = point_group(symmetry), cell_width(level)
    inside, _ = unit_share(r, group, 2 * width)
    pixel, turn, r = pixel[inside], turn[inside], r[inside]
    share = _log_share(r, group, width)
    beta = np.arccos(np.clip(r[:, 2, 2], -1, 1))
    alpha, gamma = np.arctan2(r[:, 1, 2], r[:, 0, 2]), np.arctan2(r[:, 2, 1], -r[:, 2, 0])
    where = [gamma * n / (2 * np.pi), alpha * n / (2 * np.pi), beta * n / np.pi - 0.5]
    low = [np.floor(w).astype(np.int64) for w in where]
    places, weights = [], []
    for corner in range(8):
        bits = [corner >> axis & 1 for axis in range(3)]
        g, a, j = (i + bit for i, bit in zip(low, bits, strict=True))
        fractions = [w - i for w, i in zip(where, low, strict=True)]
        weight = np.prod([f if bit else 1 - f for f, bit in zip(fractions, bits, strict=True)], axis=0)
        # No centre of `_first_level` lies nearer to a pole than the first beta.
        places.append(((g % n) * n + a % n) * n + j)
        weights.append(weight)
    found = pixel, turn, share, np.stack(places, axis=1), np.stack(weights, axis=1).astype(np.float32)
    return tuple(to_device(x, device) for x in found)


@dataclass
class _Cells:
    """Cells of rotations that were scored, (B, n) each, -inf in `mass` where there is none.

    level, pixel, turn: which; factor: log of how many cells like it each stands for; mass: log of the integral of
    exp(log-posterior) over these and the shifts.
    shift (B, n, k, 3), value (B, n, k): the best shifts of each and the log-posterior there; spacing (B, n): of the
    lattice they are from; spread (B, n): effective number of its points; power (B, n): c1^2; shift2 (B, n): mean of
    |t|^2 over all shifts.
    """

    level: Array
    pixel: Array
    turn: Array
    factor: Array
    mass: Array
    shift: Array
    value: Array
    spacing: Array
    spread: Array
    power: Array
    shift2: Array

    def joined(self, other: _Cells) -> _Cells:
        xp = namespace(self.mass)
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Cells(*(xp.concatenate(pair, axis=1) for pair in pairs))


@dataclass(frozen=True)
class _Scorer:
    """Log-posteriors from the voxels, for rotations at all shifts of a lattice."""

    observation: Observation
    reference: JointReference
    weight: Array  # (W, M): w^2 / sigma^2
    radius: float  # of the shifts
    zeta: float
    fine: float  # spacing of the lattice that covers all shifts
    n_shifts: int  # best shifts kept of each rotation
    group: Array  # (g, 3, 3): of the reference
    slack: float  # degrees outside the asymmetric unit up to which there are cells
    round_part: Array  # (B,): mean of c0 over all rotations, of `log_marginal`

    def within(self, r_max: int) -> _Scorer:
        """By the shells up to a radius only, at shifts as far apart as these allow."""
        observation = self.observation.within(r_max)
        return replace(
            self,
            observation=observation,
            weight=namespace(self.weight).ascontiguousarray(self.weight[:, : len(observation.support)]),
            fine=_fine(observation.support.box, r_max, self.radius, self.zeta),
        )

    @cached_property
    def coarse(self) -> _Scorer | None:
        """That of the inner shells, by which cells are compared first; None where that does not pay."""
        inner = screen_band(self.observation.support.r_max)
        return None if inner is None else self.within(inner)

    def told_by_turning(self, cells: _Cells) -> Array:
        """c0 of the best cell less `round_part`, (B,): what is lost of c0 within a cell is part of this.

        What is round of the particle stays whatever the rotation. (Without it and without noise this is twice the gain
        over no signal at all.) It is known up to the band of `log_marginal`: what is round beyond counts as told by
        turning, which is to the safe side; the inner shells, if they end before, are made a little stricter by it.
        """
        xp = namespace(cells.mass)
        best = cells.mass.argmax(axis=1)[:, None]
        value, power = (xp.take_along_axis(x, best, axis=1)[:, 0] for x in (cells.value[:, :, 0], cells.power))
        return xp.maximum(value + 0.5 * power - self.round_part, 0)

    @property
    def reach(self) -> int:
        """Points of the lattice to either side that cover all shifts."""
        return int(np.ceil(self.radius / self.fine))

    def lattice(self, centre: Array, width: Array, n: int) -> tuple[Array, Array]:
        """For n rotations of each particle centre (B, n, 3) and reach (B, n) of the points within a cube of shifts.

        centre (B, 3), width (B,) to either side. On the points of the lattice that covers all shifts, about 0 where the
        cube is no smaller: a sum over these is that over all, less what was ruled out.
        """
        reach = np.minimum(np.ceil(width / self.fine).astype(np.int64), self.reach)
        on_lattice = np.where((reach < self.reach)[:, None], self.fine * np.rint(centre / self.fine), 0)
        b, device = len(reach), device_of(self.weight)
        return (
            to_device(np.broadcast_to(on_lattice[:, None], (b, n, 3)), device),
            to_device(np.broadcast_to(reach[:, None], (b, n)), device),
        )

    def score(self, particle: Array, rotations: Array, centre: Array, spacing: float, reach: int) -> tuple[Array, ...]:
        """For a list of n rotations the log of the integral over the shifts, and the rest of `_Cells` but the spacing.

        particle (n,), rotations (n, 3, 3), centre (n, 3) of the lattice of (2 reach + 1)^3 points.
        """
        xp = namespace(particle)
        o, n, t = self.observation, len(particle), 2 * reach + 1
        waves = shift_waves(o.support, spacing * np.arange(-reach, reach + 1))
        line = spacing * xp.arange(-reach, reach + 1)
        mass, spread, power, shift2 = (xp.empty(n) for _ in range(4))
        places = cube(line)  # from the centre
        of_places = xp.concatenate([places, (places**2).sum(axis=1, keepdims=True)], axis=1).astype(np.float32)
        shift, value = xp.empty((n, self.n_shifts, 3)), xp.empty((n, self.n_shifts))
        at_once = correlated_at_once(waves)
        still = not bool((centre != 0).any())
        about_origin = self._prior(centre[:1], line) if still else None

        def some(first: int) -> None:
            part = slice(first, first + at_once)
            log_p, power[part] = ops.correlations(
                self.reference.grid,
                o.spectra,
                self.weight,
                o.weight_index,
                particle[part],
                rotations[part],
                centre[part],
                waves,
                o.support,
                self.reference.padding,
            )
            log_p += self._prior(centre[part], line) if about_origin is None else about_origin
            log_p = log_p.reshape(-1, t**3)
            row, left = xp.arange(len(log_p)), log_p if self.n_shifts == 1 else log_p.copy()
            for k in range(self.n_shifts):
                best = left.argmax(axis=1)
                index = xp.stack([best // (t * t), best // t % t, best % t], axis=1)
                shift[part, k] = line[index] + centre[part]
                value[part, k] = left[row, best]
                if k + 1 < self.n_shifts:
                    left[row, best] = -np.inf
            log_p -= value[part, :1].astype(np.float32)
            e = xp.exp(log_p, out=log_p)
            total = e.sum(axis=1, dtype=np.float64)
            mass[part] = value[part, 0] + xp.log(total) + (3 * np.log(spacing) if self.radius else 0)
            spread[part] = total**2 / xp.einsum("nt,nt->n", e, e)
            means = (e @ of_places) / total[:, None]
            shift2[part] = (centre[part] ** 2).sum(axis=1) + 2 * (centre[part] * means[:, :3]).sum(axis=1) + means[:, 3]

        map_threads(some, range(0, n, at_once), particle)
        worth = -0.5 * power
        if o.unseen is not None:
            worth += interpolate(o.unseen.table, o.unseen.index[particle], rotations)
        return mass + worth, shift, value + worth[:, None], spread, power, shift2

    def _prior(self, centre: Array, line: Array) -> Array:
        """-|t|^2 / (2 zeta^2) at the shifts c + line, (n, T, T, T) float32; -inf beyond the radius."""
        x, y, z = (((centre[:, axis, None] + line) ** 2).astype(np.float32) for axis in range(3))  # (n, t)
        squared = x[:, :, None, None] + y[:, None, :, None] + z[:, None, None, :]
        # The shift at the very radius counts, rounded or not.
        outside = squared > np.float32(self.radius**2 * (1 + 1e-6))
        squared *= np.float32(-0.5 / self.zeta**2)
        squared[outside] = -np.inf
        return squared


def integrate(
    observation: Observation,
    references: Sequence[JointReference],
    precision: Array,
    *,
    max_shift: float,
    zeta: float,
    n_candidates: int,
    n_shifts: int = 1,
    rounds: int | None = None,
    symmetry: str = "C1",
) -> list[tuple[Candidates, Array]]:
    """The posterior over rotations and shifts as weighted poses, against each of K classes.

    A class whose best cell is too far behind that of another for finer cells to make up for it is not looked at more
    closely for that particle.

    Parameters
    ----------
    observation : Observation
        B particles.
    references : K of JointReference
        Of one bandwidth.
    precision : (M,) float32
        1 / sigma^2 of each voxel's shell.
    max_shift : float, voxels
    zeta : float, voxels
        Of the prior of the shifts.
    n_candidates : int
        At most so many per particle; as many as hold 99 % of the mass, if that is fewer.
    n_shifts : int
        At most so many of them with the same rotation.
    rounds : int, optional
        How often cells are split at most (default: until they are as narrow as the band can tell).
    symmetry : str
        Point group that the references have: poses are looked for in its asymmetric unit, each stands for its copies.

    Returns
    -------
    For each class:

    candidates : Candidates
        Most massive first.
    log_volumes : (B, n) float64
        Log of what each stands for, in units of SO(3) times cubic voxels. The mass of what was left out (of the
        shifts to the best of the same rotation, of rotations to all) is in them: sum v exp(log-posterior) is the
        integral. Of a class that is far behind another it is a rough one.
    """
    xp = namespace(observation.spectra)
    radius, support = min(max_shift, REACH * zeta), observation.support
    fine, slack = _fine(support.box, support.r_max, radius, zeta), cell_width(_first_level(references[0].bandwidth))
    group, squared = xp.asarray(point_group(symmetry)), observation.weights**2 * precision
    with step("joint: all rotations"):
        shifts = coarse_shifts(support.box, references[0], radius)
        likely = likely_shifts(observation, references, precision, shifts, zeta)
        marginals, round_parts = log_marginal(observation, references, precision, shifts, zeta, likely)
    scorers = [
        _Scorer(observation, reference, squared, radius, zeta, fine, n_shifts, group, slack, round_part)
        for reference, round_part in zip(references, round_parts, strict=True)
    ]
    region = _region(shifts, likely, support.box / (COARSE_STEP * references[0].coarse_r))
    first = _search(scorers, marginals, region, symmetry)
    hopeful = _not_behind(scorers, first, _tolerance)
    found = []
    for scorer, cells, close in zip(scorers, first, hopeful, strict=True):
        with step("joint: refine"):
            cells = _refined(scorer, cells, close, region, _rounds(references[0].bandwidth, support.r_max, rounds))
        found.append(_candidates(observation, scorer, cells, n_candidates))
    return found


def _region(shifts: Array, likely: Array, spacing: float) -> tuple[Array, Array]:
    """The cube about the likely ones (B, T) of shifts (T, 3): centre (B, 3), how far to either side (B,)."""
    low, high = (
        pick(np.where(likely[..., None], shifts, away), axis=1) for pick, away in ((np.min, np.inf), (np.max, -np.inf))
    )
    return (low + high) / 2, (high - low).max(axis=1) / 2 + spacing


def _search(
    scorers: Sequence[_Scorer], marginals: Sequence[Array], region: tuple[Array, Array], symmetry: str
) -> list[_Cells]:
    """Cells of the first level that stand for all of them, scored, against each class.

    region: centre (B, 3) and half width (B,) of the cube of shifts to look at.
    Of a class that by the inner shells is too far behind another to matter only the foremost.
    """
    with step("joint: cells"):
        found = [
            _Selected.of(scorer, marginal, region, symmetry)
            for scorer, marginal in zip(scorers, marginals, strict=True)
        ]
        worth = [x.worth for x in found]
        if inner := [x.by_inner for x in found if x.by_inner is not None]:
            xp = namespace(worth[0])
            by_inner = [scorer.coarse for scorer in scorers if scorer.coarse is not None]
            for k, (cells, hopeful) in enumerate(
                zip(inner, _not_behind(by_inner, inner, _screen_tolerance), strict=True)
            ):
                rank = xp.argsort(xp.argsort(-cells.mass, axis=1), axis=1)
                worth[k] = worth[k] & (hopeful[:, None] | (rank < FOREMOST))
        return [
            _score_cells(scorer, x.which, some, x.centre, namespace(some).full(some.shape, scorer.fine), x.reach)
            for scorer, x, some in zip(scorers, found, worth, strict=True)
        ]


def _not_behind(scorers: Sequence[_Scorer], cells: Sequence[_Cells], tolerance: Callable[[Array], Array]) -> Array:
    """Classes (K, B) whose best cell is not far behind that of another."""
    xp = namespace(cells[0].mass)
    best = xp.stack([c.mass.max(axis=1) for c in cells])
    told_by_turning = xp.stack([s.told_by_turning(c) for s, c in zip(scorers, cells, strict=True)])
    return best > best.max(axis=0) - tolerance(told_by_turning.max(axis=0))


@dataclass(frozen=True)
class _Selected:
    """Cells of the first level chosen for scoring: which, whether they are `worth` it, the shifts to look at.

    by_inner: scored by the inner shells; None where that is not done.
    """

    which: tuple[Array, Array, Array, Array]
    worth: Array
    centre: Array
    reach: Array
    by_inner: _Cells | None

    @classmethod
    def of(cls, scorer: _Scorer, marginal: Array, region: tuple[Array, Array], symmetry: str) -> _Selected:
        """The heaviest by `log_marginal`, and some drawn from the others."""
        xp, device = namespace(marginal), device_of(marginal)
        b, level = len(marginal), _first_level(scorer.reference.bandwidth)
        pixel, turn, part, places, weights = _first_cells(scorer.reference.bandwidth, level, symmetry, device)
        coarse_mass = at_places(marginal.reshape(b, -1), places, weights).astype(np.float64)  # (B, cells)
        # Without those drawn, a particle that says little would have all its mass in the few cells looked at.
        chosen, factor = thinned(coarse_mass + part, SELECTED, SELECTED // 2)
        of_chosen = xp.take_along_axis(coarse_mass, chosen, axis=1)
        best = of_chosen.max(axis=1, keepdims=True)
        worth = of_chosen + factor > best - _coarse_tolerance(best)
        which = (xp.full(chosen.shape, level), pixel[chosen], turn[chosen], factor)
        centre, reach = (coarse := scorer.coarse or scorer).lattice(*region, chosen.shape[1])
        cells = None
        if coarse is not scorer:
            cells, worth = _screen(coarse, which, worth, centre, reach)
            centre, reach = _near(coarse, scorer, cells, worth, region)
        return cls(which, worth, centre, reach, cells)


def _refined(scorer: _Scorer, cells: _Cells, close: Array, region: tuple[Array, Array], rounds: int) -> _Cells:
    """The most massive cells split, a few times over, of the particles (B,) that are worth it.

    Where the shifts' lattice stays as it is all of the region is looked at, else what is near the parent's best.
    """
    xp = namespace(cells.mass)
    b, support = len(cells.mass), scorer.observation.support
    for i in range(rounds):
        parents, worth = _divide(scorer, cells, i)
        worth &= close[:, None]
        if not bool(worth.any()):
            break
        # Shifts on a lattice too coarse for their posterior: half its spacing, about the best.
        best = cells.mass.argmax(axis=1)[:, None]
        narrow = xp.take_along_axis(cells.spread, best, axis=1) < 6
        spacing = xp.take_along_axis(cells.spacing, best, axis=1) * xp.where(narrow, 0.5, 1.0)
        level, pixel, turn, factor = (
            xp.take_along_axis(x, parents, axis=1) for x in (cells.level, cells.pixel, cells.turn, cells.factor)
        )
        kin = *cell_children(level, pixel, turn), xp.broadcast_to(factor[..., None], (*factor.shape, 8))
        kin_worth = xp.broadcast_to(worth[..., None], kin[0].shape).reshape(b, -1)
        centre = xp.take_along_axis(cells.shift[:, :, 0], parents[..., None], axis=1)
        everywhere, whole = scorer.lattice(*region, 1)
        centre = xp.where(spacing[..., None] < scorer.fine, centre, everywhere)
        centre = xp.broadcast_to(centre[:, :, None], (*kin[0].shape, 3)).reshape(b, -1, 3)
        kin = tuple(x.reshape(b, -1) for x in kin)
        spacing = xp.broadcast_to(spacing, kin_worth.shape)
        reach = xp.where(spacing < scorer.fine, LOCAL_REACH if scorer.reach else 0, whole)
        if (coarse := scorer.coarse) is not None and len(coarse.observation.support) * SCREENED_KIN < len(support):
            _, kin_worth = _screen(coarse, kin, kin_worth, centre, xp.ceil(reach * spacing / coarse.fine).astype(int))
        children = _score_cells(scorer, kin, kin_worth, centre, spacing, reach)
        rows = xp.arange(b)[:, None]
        cells.mass[rows, parents] = xp.where(worth, -np.inf, cells.mass[rows, parents])
        cells = cells.joined(children)
    return cells


def _first_level(bandwidth: int) -> int:
    """Level whose cells are finer than half a wave of the highest degree, 180 / L."""
    return max(1, int(np.ceil(np.log2(bandwidth / 2))))


def _rounds(bandwidth: int, r_max: int, asked: int | None) -> int:
    """How often cells of the first level are split, so that the finest are no wider than `FINEST` / r_max."""
    finest = int(np.ceil(np.log2(cell_width(0) * r_max / FINEST)))
    return asked if asked is not None else max(ROUNDS, finest - _first_level(bandwidth))


def _fine(box: int, r_max: int, radius: float, zeta: float) -> float:
    """Spacing of shifts that a sum over them can do with: for the correlation, the prior and the ball they lie in."""
    spacing = min(box / (FINE_STEP * r_max), FINE_OF_PRIOR * zeta)
    return min(spacing, radius / 2) if radius else spacing


def _log_share(rotations: Array, group: Array, slack: float) -> Array:
    """Log of `unit_share`; outside it is small enough, but a number."""
    xp = namespace(rotations)
    return xp.log(xp.maximum(unit_share(rotations, group, slack)[1], OUTSIDE))


def _coarse_tolerance(gain: Array) -> Array:
    """Nats by which a cell of the first level may be behind the best by `log_marginal` and still come out ahead.

    Between shifts as far apart as there, all of the correlation may fall by a good part, and by less where a turn makes
    up for it.
    """
    return 6 + 0.3 * namespace(gain).maximum(gain, 0)


def _tolerance(told_by_turning: Array) -> Array:
    """Nats by which a class may be behind another by cells of the first level and still come out ahead."""
    return 6 + 0.2 * told_by_turning


def _tolerance_of_round(told_by_turning: Array, i: int) -> Array:
    """Nats by which a cell may be behind the best in round i and be worth splitting: it is off by part of its c0.

    Within a cell the correlation falls with the square of its width, so each round needs a quarter of it. Those that
    are not split keep the mass they have.
    """
    return 4 + 0.15 * told_by_turning / 4 ** (i + 1)


def _divide(scorer: _Scorer, cells: _Cells, i: int) -> tuple[Array, Array]:
    """The cells to be split in round i, (B, SPLIT) indices and which of them count."""
    xp = namespace(cells.mass)
    n = min(SPLIT, cells.mass.shape[1])
    parents = xp.argsort(-cells.mass, axis=1)[:, :n]
    mass = xp.take_along_axis(cells.mass, parents, axis=1)
    worth = mass > mass[:, :1] - _tolerance_of_round(scorer.told_by_turning(cells)[:, None], i)
    share = cells.mass - _logsumexp(cells.mass)[:, None]
    return parents, worth & (xp.exp(-_logsumexp(2 * share)) < SPREAD)[:, None]


def _screen(
    coarse: _Scorer, which: tuple[Array, ...], worth: Array, centre: Array, reach: Array
) -> tuple[_Cells, Array]:
    """Cells (B, n) scored by the inner shells, `coarse`, and which of them are not far behind the best by that."""
    xp = namespace(worth)
    cells = _score_cells(coarse, which, worth, centre, xp.full(worth.shape, coarse.fine), reach)
    best = cells.mass.max(axis=1, keepdims=True)
    return cells, worth & (cells.mass > best - _screen_tolerance(coarse.told_by_turning(cells)[:, None]))


def _screen_tolerance(told_by_turning: Array) -> Array:
    """Nats by which cells or classes may be behind the best by the inner shells and still come out ahead."""
    return 10 + 0.025 * told_by_turning


def _near(
    coarse: _Scorer, scorer: _Scorer, cells: _Cells, worth: Array, region: tuple[Array, Array]
) -> tuple[Array, Array]:
    """About which shifts (B, n, 3) the posterior lies, and how far to either side of them it reaches (B, n).

    By what the inner shells say of cells, or where that is too little all of the region; in steps of the whole band's
    lattice.
    """
    xp = namespace(worth)
    narrow = xp.where(worth, cells.spread, 1).max(axis=1, keepdims=True) < 6
    centre, reach = scorer.lattice(*region, worth.shape[1])
    near = int(np.ceil(SCREEN_STEPS * coarse.fine / scorer.fine))
    nearer = narrow & (near < reach)
    about_best = scorer.fine * xp.rint(cells.shift[:, :, 0] / scorer.fine)
    return xp.where(nearer[..., None], about_best, centre), xp.where(nearer, near, reach)


def _score_cells(
    scorer: _Scorer, which: tuple[Array, ...], worth: Array, centre: Array, spacing: Array, reach: Array
) -> _Cells:
    """Cells (B, n), those that are `worth` it scored at (2 reach + 1)^3 shifts `spacing` apart about `centre`."""
    *cell, factor = which
    level, pixel, turn = cell
    xp = namespace(pixel)
    b, n = pixel.shape
    mass, spread, power, shift2 = xp.full(b * n, -np.inf), xp.ones(b * n), xp.ones(b * n), xp.zeros(b * n)
    k = scorer.n_shifts
    shift, value = xp.zeros((b * n, k, 3)), xp.full((b * n, k), -np.inf)
    # One list over all particles: few cells of many particles cost no more. Lattices of one spacing go together.
    host_worth, host_spacing, host_reach = to_host(worth), to_host(spacing), to_host(reach)
    for width, steps in sorted({*zip(host_spacing[host_worth].tolist(), host_reach[host_worth].tolist(), strict=True)}):
        particle, place = np.nonzero(host_worth & (host_spacing == width) & (host_reach == steps))
        entry = xp.asarray(particle * n + place)
        rotations = cell_rotations(*(x.reshape(-1)[entry] for x in cell))
        where = centre.reshape(-1, 3)[entry]
        found = scorer.score(xp.asarray(np.ascontiguousarray(particle)), rotations, where, width, steps)
        mass[entry], shift[entry], value[entry], spread[entry], power[entry], shift2[entry] = found
        mass[entry] += _log_share(rotations, scorer.group, scorer.slack)
    mass += factor.reshape(-1) - np.log(72.0) - level.reshape(-1) * np.log(8.0)
    return _Cells(
        level, pixel, turn, factor, mass.reshape(b, n), shift.reshape(b, n, k, 3), value.reshape(b, n, k), spacing,
        spread.reshape(b, n), power.reshape(b, n), shift2.reshape(b, n),
    )  # fmt: skip


def _candidates(
    observation: Observation, scorer: _Scorer, cells: _Cells, n_candidates: int
) -> tuple[Candidates, Array]:
    """Points that stand for all, the most massive first, and the log-volumes that give them all the mass."""
    xp = namespace(cells.mass)
    b, k = len(cells.mass), scorer.n_shifts
    # All the mass of a cell, all shifts that were looked at included, is that of its best shifts.
    alive = xp.isfinite(cells.mass)
    of_cell = xp.where(alive, _logsumexp(xp.where(alive[..., None], cells.value, 0)), 0)
    volume = xp.where(alive, cells.mass - of_cell, -np.inf)
    value = xp.where(alive[..., None], cells.value, -np.inf).reshape(b, -1)
    chosen, factor = thinned(value + xp.repeat(volume, k, axis=1), n_candidates, (n_candidates + 1) // 2)
    rows = xp.arange(b)[:, None]
    mass = value[rows, chosen] + volume[rows, chosen // k] + factor
    order = xp.argsort(-mass, axis=1)
    chosen, factor, mass = chosen[rows, order], factor[rows, order], mass[rows, order]
    cell, shifts, value = chosen // k, cells.shift.reshape(b, -1, 3)[rows, chosen], value[rows, chosen]
    total = _logsumexp(cells.mass)
    share = xp.exp(mass - total[:, None])
    kept = (xp.cumsum(share, axis=1) - share < MASS) & xp.isfinite(mass)
    count = kept.sum(axis=1)
    # What is left out adds to all; of the asymmetric unit's copies each has its part.
    missing = total - _logsumexp(xp.where(kept, mass, -np.inf)) + np.log(len(scorer.group))
    log_volumes = xp.where(kept, volume[rows, cell] + factor + missing[:, None], -np.inf)
    rotations = cell_rotations(*(xp.take_along_axis(x, cell, axis=1) for x in (cells.level, cells.pixel, cells.turn)))
    gain = value + (shifts**2).sum(axis=-1) / (2 * scorer.zeta**2)
    gain -= observation.expected_gain(rotations)
    gain = xp.where(kept, gain, -np.inf)
    power = xp.take_along_axis(cells.power, cell, axis=1)
    own = 2 * (scorer.weight[observation.weight_index] * abs(observation.spectra) ** 2).sum(axis=1, dtype=np.float64)
    scale = xp.sqrt(xp.maximum(power * own[:, None], np.finfo(np.float64).tiny))
    correlation = xp.where(kept, (gain + 0.5 * power) / scale, 0)
    # As wide for every class, however many cells there were.
    wide = max(0, n_candidates - order.shape[1])

    def padded(x: Array, value: float) -> Array:
        return xp.pad(x, [(0, 0), (0, wide)] + [(0, 0)] * (x.ndim - 2), constant_values=value)

    candidates = Candidates(
        padded(rotations, 0.0), padded(shifts, 0.0), padded(correlation, 0.0), count, padded(gain, -np.inf),
        padded(xp.take_along_axis(cells.shift2, cell, axis=1), 0.0),
    )  # fmt: skip
    return candidates, padded(log_volumes, -np.inf)


def _logsumexp(x: Array) -> Array:
    """Over the last axis, float64; rows must hold something finite."""
    xp = namespace(x)
    top = x.max(axis=-1)
    return top + xp.log(xp.exp(x - top[..., None]).sum(axis=-1, dtype=np.float64))
