"""The plan of a run: options resolved for the particles, masks, and what each iteration's band needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from threading import Lock
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from faml_gpu import fast_alignment, fourier, masks, maximization, resolution, symmetry
from faml_gpu.array_backend import (
    Array,
    device_of,
    free_memory,
    namespace,
    on_host,
    out_of_memory,
    release_memory,
    step,
    synchronize,
    to_device,
    to_host,
)
from faml_gpu.data import Batch, ParticleSource, Posterior, Progress, State
from faml_gpu.errors import InputError
from faml_gpu.expectation import BatchPosterior
from faml_gpu.fast_alignment import Candidates, JointReference, Observation, Reference, ShiftWindow
from faml_gpu.fourier import Support
from faml_gpu.options import GROWING, Options
from faml_gpu.posteriors import likeliest
from faml_gpu.reading import Ahead
from faml_gpu.threads import in_order, map_threads

__all__ = ["Band", "BatchSize", "Clock", "Plan", "resolve", "start_lowpass"]

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Done = TypeVar("Done")

# A batch may take this share of the free memory (`array_backend.free_memory`), and have so many particles. On a CPU
# several are worked on at a time, in numbers that its threads have no part in: results should not depend on these.
BATCH_SHARE = {"cpu": 0.25, "cuda": 0.4}
BATCH_PARTICLES = {"cpu": 16, "cuda": 256}
AT_ONCE = {"cpu": 4, "cuda": 1}
REFINED = 3  # candidates per particle and class that are refined, and earlier poses taken among them
EXPLORED = 0.25  # of the iterations, see `Plan.explored`
RESEED_EVERY, RESEED_LAST = 3, 0.8  # iterations, and share of them, see `Plan.reseeds`
UNSYMMETRIC = 0.4  # of the iterations, see `Plan.finds_axes`
EVIDENCE_PARTS = 10
FOLDS = 2**31  # no iteration has this number: which particles are in which fold is drawn once, see `Plan.rng`
LEAST_LEFT = 0.1  # see `Band.left`; of one voxel with a small mask around it less would be left
SOFT_EDGE = 3.0  # voxels over which masks fall to 0


@dataclass(frozen=True)
class Plan:
    """What stays the same through a run: resolved options, masks, the schedule of the band."""

    options: Options
    box: int
    voxel_size: float
    mask_radius: float  # voxels
    max_shift: float  # voxels
    r_final: int
    r_start: int
    mask: Float32
    batch: BatchSize
    at_once: int  # batches
    initial_lowpass: float | None
    regularization: float
    device: str
    trial: int = 0  # number of the random start

    @classmethod
    def make(
        cls,
        particles: ParticleSource,
        options: Options,
        initial_lowpass: float | None = None,
        device: str = "cpu",
    ) -> Plan:
        """Resolve the options for these particles; `InputError` where they do not fit."""
        n = len(particles)
        if options.n_classes > n:
            raise InputError(f"option n_classes: found {options.n_classes}, expected at most the {n} particles")
        box, resolved = particles.box, resolve(options, particles.box, particles.voxel_size, initial_lowpass)
        radius, shift = resolved["mask_radius"] / particles.voxel_size, resolved["max_shift"] / particles.voxel_size
        padded = (box * options.padding) ** 3
        grid = (4 * resolved["bandwidth"]) * (2 * resolved["bandwidth"]) ** 2
        each = 4 * (6 * box**3 + 5 * padded + 6 * grid)
        kind = device.partition(":")[0]
        free = free_memory(device)
        size = int(np.clip(BATCH_SHARE[kind] * free / each, 1, BATCH_PARTICLES[kind]))
        if kind == "cuda":
            # What is free changes a little from run to run; the batches, and with them the rounding, should not.
            size = 1 << (size.bit_length() - 1)
        return cls(
            options,
            box,
            particles.voxel_size,
            radius,
            shift,
            resolved["r_max"],
            resolved["r_start"],
            masks.soft_sphere(box, radius, SOFT_EDGE),
            BatchSize(size),
            int(np.clip(free // (each * size), 1, AT_ONCE[kind])),
            initial_lowpass,
            resolved["regularization"],
            device,
        )

    @property
    def n_shells(self) -> int:
        """Fourier shells 0 .. ceil(N/2) - 1 of the noise curve."""
        return fourier.full_band(self.box) + 1

    def rng(self, iteration: int) -> np.random.Generator:
        """The random numbers of an iteration: from the seed and its number alone, so that a run can be resumed."""
        return np.random.default_rng([self.options.seed, iteration, *([self.trial] if self.trial else [])])

    def r_max(self, iteration: int) -> int:
        """Largest radius of the active support: grows over the first 60 % of the iterations, or is full at once.

        By evidence, the largest it can be: of several starts that are tried none goes beyond where all begin, so that
        their likelihoods are of the same data.
        """
        if self.band_rule == "full":
            return self.r_final
        if self.by_evidence:
            growing = max(0, iteration - max(1, self.tried))
            return min(self.r_final, self.r_start + resolution.FARTHEST * growing)
        grown = self.r_start + (self.r_final - self.r_start) * (iteration - 1) / max(1, self._last_growing - 1)
        return int(min(self.r_final, np.floor(grown + 1e-9)))

    @property
    def _last_growing(self) -> int:
        """Iteration from which on a band that goes by the schedule is whole, and nothing is held back any more."""
        return max(1, round(GROWING * self.options.iterations))

    @property
    def explored(self) -> int:
        """Iterations of a random start in which it finds its structure, whatever it has seen of it."""
        return int(EXPLORED * self.options.iterations)

    @property
    def tried(self) -> int:
        """Iterations of each of several starts, before the likeliest goes on."""
        return max(1, self.explored) if self.options.starts > 1 else 0

    @property
    def update(self) -> Literal["ratio", "wiener", "printed"]:
        """How the averages are made."""
        chosen = self.options.choices.update
        return "wiener" if chosen == "explore" else chosen

    @property
    def searches(self) -> bool:
        """Whether the run has to find orientations from nothing; a start from a map or from poses knows some."""
        return self.options.choices.update == "explore" and self.initial_lowpass is None

    def caution(self, iteration: int) -> float:
        """How many times its variance the noise in the averages of an iteration counts (`maximization.wiener_factor`).

        An average that is sure of what it has seen keeps particles where they lie, and its missing wedge for good. So a
        random start begins as if the noise of the whole box lay within the mask, and is less and less wary over the
        first 60 % of the iterations: what comes at once sends all particles to what is unseen, and back. So too where
        the band goes by evidence: detail that comes early is then held down the more.
        """
        if not self.searches:
            return 1.0
        left = max(0.0, 1 - iteration / self._last_growing)
        return float(np.mean(self.mask**2) ** -left)

    def reseeds(self, iteration: int) -> bool:
        """Whether classes that are empty after an iteration are begun anew, see `reseeding`.

        Every few iterations, so that a new class has the time to show that it is one; not at the end, nor before the
        first structures are there.
        """
        due = iteration > self.explored and (iteration - self.explored) % RESEED_EVERY == 0
        return self.options.choices.reseed and due and iteration <= RESEED_LAST * self.options.iterations

    def bandwidth(self, r_max: int) -> int:
        """L: given, 36 (`paper`), or enough for the band and the mask, at most 36."""
        return _bandwidth(self.options, r_max, self.mask_radius / self.box)

    def band(self, state: State) -> Band:
        """What the next iteration needs of its band; its averages reach to the band of the one after."""
        iteration = state.iteration + 1
        if self.by_evidence:
            r_max = self.r_start if state.r_max is None else state.r_max
            return Band(self, state, r_max, min(r_max + resolution.LOOK_AHEAD, fourier.full_band(self.box)))
        return Band(self, state, self.r_max(iteration), self.r_max(min(iteration + 1, self.options.iterations)))

    @property
    def by_evidence(self) -> bool:
        """The data decide how far the band reaches."""
        return self.band_rule == "evidence"

    @property
    def band_rule(self) -> Literal["evidence", "growing", "full"]:
        """How far the band reaches by the iteration."""
        return band_rule(self.options, self.initial_lowpass)

    def settled(self, state: State, r_max: int) -> bool:
        """Whether the band r_max of the last iteration is the next one's and, as far as is known, all others'.

        By evidence it may be so early, and all else stand still too, where averages that are the same all around an
        axis hide a symmetry from the next shells: out of there likelihood grows from iteration to iteration, from next
        to nothing. So no run ends sooner than one that goes by the schedule.
        """
        if not self.by_evidence:
            return r_max == self.r_final
        return state.r_max == r_max and state.iteration >= max(self.tried, self._last_growing)

    def over_batches(
        self,
        particles: Ahead,
        work: Callable[[int, Batch, Array, Int64], Done],
        clock: Clock,
        progress: Progress | None,
        name: str,
        parts: Sequence[Int64] | None = None,
        before: int = 0,
    ) -> Iterator[Done]:
        """Map over the particles: `work(part, batch, spectra, numbers)` for each batch on the device, in order.

        `spectra` are the transforms of its normalised boxes, `numbers` those of its particles, all of one of the
        `parts` (default: all are one). The first `before` have been done. Several batches are worked on at a time
        where that is on the CPU (`at_once`).
        A batch for which the device has too little memory is done again in halves, and so are all after it.
        """
        parts = [np.arange(len(particles))] if parts is None else parts
        if progress is not None:
            progress(name, before, len(particles))

        def read(numbers: Int64, following: Int64) -> list[Batch]:
            with clock("read"):
                return [particles.read(numbers, following[: self.batch.size])]

        def batches() -> Iterator[tuple[int, Int64, list[Batch]]]:
            done = before
            for part, left in enumerate(parts):
                done, left = max(0, done - len(left)), left[done:]
                while len(left):
                    numbers, left = left[: self.batch.size], left[self.batch.size :]
                    following = left if len(left) else (*parts, left)[part + 1]
                    yield part, numbers, read(numbers, following)

        def tried(part: int, numbers: Int64, given: list[Batch]) -> Done | None:
            try:
                batch = given.pop()  # no one else holds it: where memory runs out it is to be let go
                with clock("read"):
                    spectra = self.spectra(batch)
                return work(part, batch, spectra, numbers)
            except Exception as error:
                if len(numbers) == 1 or not out_of_memory(error):
                    raise
            return None

        def attempt(item: tuple[int, Int64, list[Batch]]) -> list[tuple[int, Done]]:
            part, numbers, given = item
            found, left = [], [numbers]
            while left:
                numbers, *left = left
                done = tried(part, numbers, given or read(numbers, left[0] if left else numbers[:0]))
                if done is not None:
                    found.append((len(numbers), done))
                    continue
                # Only now are the arrays of the failed attempt gone.
                fast_alignment.forget_tables()
                release_memory(self.device)
                self.batch.size = half = -(-len(numbers) // 2)
                left = [numbers[:half], numbers[half:], *left]
            return found

        for several in in_order(attempt, batches(), self.at_once):
            for n, done in several:
                yield done
                before += n
                if progress is not None:
                    progress(name, before, len(particles))

    def spectra(self, batch: Batch) -> Array:
        """Transforms (B, N, N, N//2 + 1) complex64 of the boxes, normalised and with bright protein.

        Those of premultiplied boxes X' = W RA + noise of variance sigma^2 W are divided by W: X = X' / W has noise of
        variance sigma^2 / W, and with w^2 = W the same likelihood, |X' - W RA|^2 / (sigma^2 W) = w^2 |X - RA|^2 /
        sigma^2; where W is 0 there is nothing to know. X' is normalised before, when its background is that of the box,
        and then has the variance 1 for mean W sigma^2, so that it is sigma that all boxes share.
        """
        xp = namespace(batch.boxes)
        boxes = batch.boxes.astype(np.float32, copy=False)
        boxes = -boxes if self.options.invert else boxes
        level = masks.normalise if self.options.normalize else masks.without_offset
        boxes = level(boxes, xp.asarray(self.mask))
        spectra = fourier.transform(boxes)
        if batch.multiplied is None:
            return spectra
        by = batch.multiplied
        inverse = xp.where(by > 0, 1 / xp.where(by > 0, by, 1), 0).astype(np.float32)
        if self.options.normalize:
            inverse *= xp.sqrt(fourier.mean_of_half(by))[:, None, None, None].astype(np.float32)
        return spectra * inverse[batch.weight_index]

    def to_maps(self, averages: NDArray[np.complex128] | NDArray[np.complex64], support: Support) -> Float32:
        """Maps (K, N, N, N) float32 from averages (K, M); the constant left free puts the background at 0."""
        spectra = support.scatter(to_device(averages.astype(np.complex64), device_of(support.coords)))
        maps = to_host(fourier.inverse_transform(spectra, self.box))
        outside = maps.reshape(len(maps), -1).take(self.outside, axis=1)
        return np.asarray(maps - outside.mean(axis=1)[:, None, None, None])

    def rotate_back(
        self,
        posterior: BatchPosterior | Posterior,
        batch: Batch,
        spectra: Array,
        support: Support,
        n_classes: int,
        *,
        weigh_twice: bool = False,
    ) -> tuple[Array, Array]:
        """Sums of the M-step over a batch, see `maximization.rotate_back`."""
        return maximization.rotate_back(
            spectra,
            batch.weights,
            batch.weight_index,
            self.wide_mask,
            posterior,
            support,
            self.options.padding,
            n_classes,
            weigh_twice=weigh_twice,
        )

    def parts(self, n: int) -> list[Int64]:
        """The n particles in parts whose sums are kept apart: folds, or what halves for the evidence are made of.

        At random: they may lie in the file sorted by class, and each part is to have some of each.
        """
        wanted = self.options.choices.folds
        if self.by_evidence:
            wanted = max(wanted, EVIDENCE_PARTS)
        order = np.random.default_rng([self.options.seed, FOLDS]).permutation(n)
        return [np.sort(part) for part in np.array_split(order, min(wanted, n))]

    def finds_axes(self, iteration: int) -> bool:
        """Whether the averages are brought onto the axes of the point group at the end of an iteration.

        In a start from nothing, once it has a structure: imposed on what is none yet, a symmetry makes its own, about
        axes that need not be the particle's.
        """
        free = self.initial_lowpass is None and symmetry.order(self.options.symmetry) > 1
        return free and iteration == self._without_symmetry

    def symmetry(self, iteration: int) -> str:
        """Point group that is imposed in an iteration."""
        free = self.initial_lowpass is None and iteration <= self._without_symmetry
        return "C1" if free else self.options.symmetry

    @property
    def _without_symmetry(self) -> int:
        return max(1, round(UNSYMMETRIC * self.options.iterations))

    def with_symmetry(self, name: str) -> Plan:
        """The same plan for another point group."""
        return replace(self, options=replace(self.options, symmetry=name))

    def symmetrise(
        self, sums: NDArray[np.complex128], weights: NDArray[np.float64], support: Support, name: str
    ) -> tuple[NDArray[np.complex128], NDArray[np.float64]]:
        """Sums and weights (K, M) of the M-step (on the host), as if particles lay in all copies under a group."""
        group = symmetry.point_group(name)
        if len(group) == 1:
            return sums, weights
        sums, weights = symmetry.symmetrise(sums, weights, support.to("cpu"), group, padding=self.options.padding)
        return sums, weights

    def helical(self, maps: Float32) -> Float32:
        """Maps (K, N, N, N) with the helix imposed, if there is one."""
        if self.options.helix is None:
            return maps
        rise, twist = self.options.helix
        return np.stack([symmetry.impose_helix(m, rise / self.voxel_size, twist) for m in maps])

    def regularise(self, maps: Float32, mass: NDArray[np.float64], iteration: int) -> Float32:
        """Averages pulled towards their common mean (Scheres 2009), as if each had some more particles that show it.

        How many falls to 0 over the iterations in which the band may grow. A class with few particles is pulled most:
        its own noise would otherwise count against it for every particle, and it could win none back.
        """
        last = GROWING * self.options.iterations
        weight = self.regularization * max(0.0, 1 - iteration / last)
        if weight == 0 or len(maps) == 1:
            return maps
        extra = weight * mass.sum() / len(maps)
        mean = np.tensordot((mass / mass.sum()).astype(np.float32), maps, axes=1)
        pull = (extra / (mass + extra)).astype(np.float32)[:, None, None, None]
        return np.asarray(maps + pull * (mean - maps))

    def reach_mask(self, shift: float) -> Float32:
        """Soft sphere (N, N, N) that holds the particle wherever a shift of so many voxels puts it."""
        widest = self.box / 2 - SOFT_EDGE
        radius = max(self.mask_radius, min(self.mask_radius + min(shift, self.max_shift), widest))
        return masks.soft_sphere(self.box, radius, SOFT_EDGE)

    @cached_property
    def outside(self) -> Int64:
        """Flat indices of the voxels where the mask is 0."""
        return np.flatnonzero(self.mask == 0)

    @cached_property
    def wide_mask(self) -> Array:
        """`reach_mask` for every shift searched, on the device."""
        return to_device(self.reach_mask(self.max_shift), self.device)

    def lowpass(self, maps: Float32) -> Float32:
        """Maps (K, N, N, N) cut off at the initial low-pass, if there is one."""
        if self.initial_lowpass is None:
            return maps
        r = int(np.clip(self.box * self.voxel_size / self.initial_lowpass, 1, fourier.full_band(self.box)))
        support = fourier.make_support(self.box, r)
        return self.to_maps(support.gather(fourier.transform(maps)), support)

    def scaled_like(self, volume: Float32, average: Float32) -> Float32:
        """A map on the particles' grey scale.

        The boxes' poses are not known yet, so what can be matched is the shell-wise mean amplitude near the origin,
        where the average of unaligned boxes still has the particle's: least squares over the lowest shells.
        """
        support = fourier.make_support(self.box, min(2, fourier.full_band(self.box)))
        a = np.abs(support.gather(fourier.transform(volume * self.mask)))
        b = np.abs(support.gather(fourier.transform(average * self.mask)))
        return np.asarray(volume * np.float32((a * b).sum() / max((a * a).sum(), np.finfo(np.float32).tiny)))


@dataclass
class BatchSize:
    """Particles of a batch; fewer once memory has run out."""

    size: int


@dataclass(frozen=True)
class Band:
    """One iteration's active support and what hangs on it; its arrays are on the plan's device."""

    plan: Plan
    state: State
    r_max: int
    r_output: int
    of_weights: dict[str, Array] = field(default_factory=dict)  # `weight_harmonics`, the same for all folds
    support: Support = field(init=False)
    output: Support = field(init=False)
    inside: NDArray[np.bool_] = field(init=False)  # on the host, as the M-step
    window: ShiftWindow = field(init=False)

    def __post_init__(self) -> None:
        device = self.plan.device
        output = fourier.make_support(self.plan.box, max(self.r_max, self.r_output))
        object.__setattr__(self, "support", fourier.make_support(self.plan.box, self.r_max).to(device))
        object.__setattr__(self, "output", output.to(device))
        object.__setattr__(self, "inside", (output.coords.astype(np.int64) ** 2).sum(axis=1) <= self.r_max**2)
        object.__setattr__(self, "window", fast_alignment.shift_window(self.support, self.plan.max_shift))

    @cached_property
    def precision(self) -> Array:
        """1 / sigma^2 (M,) float32 at each voxel of the support."""
        return to_device((1 / self.state.sigma2).astype(np.float32), self.plan.device)[self.support.shell]

    @property
    def inner(self) -> int | None:
        """Band by which poses are compared first."""
        return fast_alignment.screen_band(self.r_max)

    @cached_property
    def inner_window(self) -> ShiftWindow | None:
        """The shifts by the inner shells, where candidates are compared by these first.

        Not by the paper, nor where the best is that of highest correlation (`fa`).
        """
        if self.inner is None or self.plan.options.choices.poses != "refined" or self.plan.options.method == "fa":
            return None
        return fast_alignment.shift_window(self.support.within(self.inner), self.plan.max_shift)

    @cached_property
    def reach(self) -> Array:
        """Mask around what shifts as wide as the last iteration found them leave of the particle."""
        return to_device(self.plan.reach_mask(self.state.zeta), self.plan.device)

    def evidence(
        self, total: maximization.Accumulators, symmetric: maximization.Accumulators
    ) -> tuple[NDArray[np.float64] | None, int | None]:
        """Agreement of the halves per shell, and how far the next iteration's band reaches by that.

        A point group leaves less noise in the sums, and fewer independent numbers: where those are a handful, the sums
        without it may show more. Whichever does is believed.
        """
        if not self.plan.by_evidence:
            return None, None
        shell = to_host(self.output.shell)
        n_classes = len(self.state.maps)
        # The sums are within `wide_mask`, and have more independent numbers than this: what is asked for is some five
        # standard errors, not three, of each of several windows of shells.
        voxels = 2 * masks.independent_share(self.plan.mask) * np.bincount(shell) * n_classes
        least, most = self.plan.r_start, self.plan.r_max(self.state.iteration + 2)

        def backed(sums: NDArray[np.complex128], order: int) -> tuple[NDArray[np.float64], int]:
            agreement = resolution.half_agreement(np.stack([sums[::2].sum(axis=0), sums[1::2].sum(axis=0)]), shell)
            return agreement, resolution.next_r_max(agreement, voxels / order, self.r_max, least, most)

        agreement, r_max = backed(symmetric.by_part(), symmetry.order(self.symmetry))
        return agreement, r_max if self.symmetry == "C1" else max(r_max, backed(total.by_part(), 1)[1])

    @property
    def symmetry(self) -> str:
        """Point group of the averages."""
        return self.plan.symmetry(self.state.iteration + 1)

    @property
    def joint(self) -> bool:
        """Poses come from the joint grid, not from matched magnitudes."""
        return self.plan.options.choices.sampler == "joint"

    def unmasked(self, fold: int | None = None) -> Float32:
        """Averages (K, N, N, N): of all particles, or those that a fold of them has no part in.

        At the start there are none of these yet: then a fold, too, is compared with what there is.
        """
        apart = self.state.apart
        return self.state.maps if apart is None or fold is None else apart[fold]

    def masked(self, fold: int | None = None) -> Array:
        """What the particles are compared with: averages (K, N, N, N) masked, on the device."""
        return to_device(self.unmasked(fold) * self.plan.mask, self.plan.device)

    def averages(self, fold: int | None = None) -> NDArray[np.complex64]:
        """Their transforms (K, M) on the output support (on the host)."""
        return to_host(self.output.gather(fourier.transform(self.masked(fold))))

    def references(self, fold: int | None = None) -> list[Reference]:
        """The averages ready to be matched."""
        masked = self.masked(fold)
        padding, bandwidth = self.plan.options.padding, self.plan.bandwidth(self.r_max)
        grids = fourier.interpolation_grid(masked, self.r_max, padding)
        if self.joint:
            unseen = self.unseen_grid(fold)
            return [fast_alignment.make_joint_reference(g, padding, self.r_max, bandwidth, unseen) for g in grids]
        return [fast_alignment.make_reference(g, padding, self.r_max, bandwidth) for g in grids]

    def unseen_grid(self, fold: int | None = None) -> Array | None:
        """The power the averages are expected to have beside what they show, ready to be interpolated."""
        if self.state.unseen is None:
            return None
        unseen = self.state.unseen[fold or 0]
        return fourier.weight_grid(to_device(unseen, self.plan.device), self.r_max)

    @property
    def of_shells(self) -> int:
        """Bandwidth of what is expanded on Fourier shells."""
        bandwidth = self.plan.bandwidth(self.r_max)
        return min(bandwidth, fast_alignment.UNSEEN_BANDWIDTH) if self.joint else bandwidth

    def unseen(self, fold: int | None = None) -> Array | None:
        """Harmonics of `unseen_grid`: of all degrees where they are added to those of magnitudes."""
        grid = self.unseen_grid(fold)
        return None if grid is None else fast_alignment.unseen_harmonics(grid, self.r_max, self.of_shells)

    def observe(self, batch: Batch, spectra: Array, harmonics: Array | None = None) -> Observation:
        """The batch on the active support; harmonics: of what is unseen, from `unseen`, if anything is."""
        gather, centred = self.support.gather, self.plan.options.choices.magnitudes == "centred"
        weights, magnitudes = gather(batch.weights), None
        if centred and not self.joint:
            # Without phases nothing says where in the box a signal lies: what is outside the particle's reach, noise
            # and neighbours, would add to |X| all the same.
            inside = fourier.inverse_transform(spectra * batch.weights[batch.weight_index], self.plan.box)
            magnitudes = abs(gather(fourier.transform(inside * self.reach)))
        index, matched, unseen = batch.weight_index, None, None
        seen = Observation(self.support, gather(spectra), weights, index, batch.weight_ids, magnitudes)
        arguments = seen, self.precision, self.of_shells
        if not self.joint:
            matched = fast_alignment.match(*arguments, centred=centred, kept=self.of_weights)
        if harmonics is not None:
            low = self.inner if self.joint or self.inner_window is not None else None
            of_weights = matched.weights if matched else fast_alignment.weight_harmonics(*arguments, self.of_weights)
            unseen = fast_alignment.unseen_gain(of_weights, index, harmonics, low)
        return replace(seen, unseen=unseen, matched=matched)

    def align(self, observation: Observation, reference: Reference, kept: dict[str, Any]) -> Candidates:
        """Step 1 against one class."""
        centred = self.plan.options.choices.magnitudes == "centred"
        n = self.plan.options.candidates
        return fast_alignment.align(
            observation,
            reference,
            self.precision,
            self.window,
            n,
            centred=centred,
            kept=kept,
            symmetry=self.symmetry,
            screened=self.inner_window,
        )

    def integrate(self, observation: Observation, references: list[Reference]) -> tuple[list[Candidates], list[Array]]:
        """Steps 1 and 2 in one: the pose integral against each class as weighted poses."""

        joint = [r for r in references if isinstance(r, JointReference)]

        def work(some: Observation) -> list[tuple[Candidates, Array]]:
            return fast_alignment.integrate(
                some,
                joint,
                self.precision,
                max_shift=self.plan.max_shift,
                zeta=self.state.zeta,
                n_candidates=self.plan.options.candidates,
                symmetry=self.symmetry,
            )

        # On the CPU particle by particle: short lists stay in its caches, and its threads have something to share.
        pieces = [observation]
        if on_host(observation.spectra):
            pieces = [observation.alone(i) for i in range(len(observation.spectra))]
        fast_alignment.make_tables(self.support, joint[0], self.symmetry, self.plan.max_shift, self.state.zeta)
        of_class = list(zip(*map_threads(work, pieces, observation.spectra), strict=True))
        candidates = [Candidates.joined([c for c, _ in parts]) for parts in of_class]
        xp = namespace(observation.spectra)
        return candidates, [xp.concatenate([v for _, v in parts]) for parts in of_class]

    def refine(
        self,
        observation: Observation,
        references: list[Reference],
        candidates: list[Candidates],
        earlier: Posterior,
    ) -> list[Candidates]:
        """Likeliest candidates moved to the likelihood's maximum, the particles' earlier poses among them."""
        refined = []
        for k, (reference, found) in enumerate(zip(references, candidates, strict=True)):
            rotations, shifts, count = likeliest(earlier, k, REFINED)
            # In the asymmetric unit, where the others are.
            rotations = symmetry.nearest_copies(rotations, np.eye(3), symmetry.point_group(self.symmetry))
            found = fast_alignment.carry_over(found, rotations, shifts, count)
            refined.append(
                fast_alignment.refine(observation, reference, found, self.precision, REFINED, self.plan.max_shift)
            )
        return refined

    def symmetrise(self, total: maximization.Accumulators) -> maximization.Accumulators:
        """Sums over all particles (on the host) as if these lay in all their symmetric copies."""
        sums, weights = self.plan.symmetrise(total.sums, total.weights, self.output, self.symmetry)
        return replace(total, sums=sums, weights=weights)

    def noise_of_averages(self, by_part: maximization.Accumulators) -> NDArray[np.float64]:
        """Variance (S,) per Fourier shell of what a particle adds to the averages beside signal, see `wiener_factor`.

        Measured by how far the parts of the particles differ within the mask. Poses that are not sure average the noise
        as well as the signal: to count it as if they were sure holds averages back, which makes poses less sure, until
        nothing is left of fine detail. A random start does count it so, and takes the mask's share of the noise of the
        box: what it is not sure of it has still to find.
        """
        noise = self.state.sigma2 * float(np.mean(self.plan.mask**2))
        if self.plan.searches or by_part.parts == 1:
            return noise
        residuals, freedom = by_part.scatter()

        def spread(residual: NDArray[np.complex128]) -> NDArray[np.float32]:
            return np.asarray((abs(self._within_mask(residual)) ** 2).sum(axis=0))

        spreads = np.stack(list(in_order(spread, residuals, self.plan.at_once)))
        shell = to_host(self.output.shell)
        power, free = (np.bincount(shell, x, len(noise)) for x in (spreads.sum(axis=0), freedom))
        copies = symmetry.order(self.symmetry)
        # Where parts differ by rounding only there is nothing to compare; the mask spreads power there all the same.
        return np.divide(copies * power, free, out=noise, where=free > 1e-9 * free.max())

    def wiener(
        self, averages: NDArray[np.complex128], total: maximization.Accumulators, noise: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], Float32]:
        """Factor (M,) for the averages (K, M) on the output support, and the power that leaves unseen (1, half cube).

        noise (S,): see `noise_of_averages`.
        """
        copies = symmetry.order(self.symmetry)  # each particle shows the structure in so many poses
        factor, power = maximization.wiener_factor(
            self._within_mask(averages),
            copies * total.weights,
            copies * total.mass,
            noise,
            to_host(self.output.shell),
            self.plan.caution(self.state.iteration + 1),
        )
        unseen = self.output.scatter(to_device(power[None].astype(np.complex64), self.plan.device)).real
        return factor, to_host(unseen)

    def _within_mask(self, averages: NDArray[np.complex128]) -> NDArray[np.complex64]:
        """Averages (K, M) on the output support, masked, with the power that this spreads beyond the support."""
        masked = to_device(self.plan.to_maps(averages, self.output) * self.plan.mask, self.plan.device)
        seen = to_host(self.output.gather(fourier.transform(masked)))
        return np.asarray(seen / np.sqrt(np.maximum(self.left, LEAST_LEFT)))

    @cached_property
    def left(self) -> NDArray[np.float64]:
        """Share (M,) of the power of a masked map that is left at each voxel of the output support.

        The mask spreads each voxel over its neighbours, and beyond the support there are none to spread it back: with
        M the mask's transform, sum |M(xi - eta)|^2 over eta in the support, over that over all.
        """
        support = self.output.to("cpu")
        box = self.plan.box
        spread = fourier.inverse_transform(abs(fourier.transform(self.plan.mask)).astype(np.float64) ** 2, box)
        inside = fourier.inverse_transform(support.scatter(np.ones(len(support), np.complex64)), box)
        both = fourier.transform(spread * inside).real * box**3
        return np.asarray(support.gather(both) / (spread[(box // 2,) * 3] * box**3))

    def accumulate(
        self, posterior: BatchPosterior, observation: Observation, batch: Batch, spectra: Array
    ) -> maximization.Accumulators:
        """What a batch adds to the sums of the M-step."""
        n_classes = posterior.class_probability.shape[1]
        # To multiply by the weight twice, as printed, makes sense of 0 and 1.
        plain = batch.multiplied is None and batch.noise_rows is None
        twice = self.plan.options.choices.update == "printed" and plain
        sums, weights = self.plan.rotate_back(posterior, batch, spectra, self.output, n_classes, weigh_twice=twice)
        residual, observed = maximization.noise_sums(
            posterior,
            observation.weights,
            observation.weight_index,
            self.support,
            premultiplied=batch.multiplied is not None,
            rows=batch.noise_rows,
            relative=self.state.relative_noise,
            scale=batch.scale,
        )
        return maximization.Accumulators(
            sums,
            weights,
            np.bincount(posterior.class_index, posterior.probability, minlength=n_classes).astype(np.float64),
            residual,
            observed,
            float(posterior.probability @ posterior.shift2),
            float(posterior.log_likelihood.sum()),
            posterior.candidates,
            len(spectra),
        )


def start_lowpass(asked: float | None, voxel_size: float, *, known: bool) -> float | None:
    """Low-pass of the start, Angstrom; one from a map or from poses (`known`) is taken as it is, nothing cut off."""
    return 2 * voxel_size if asked is None and known else asked


def resolve(options: Options, box: int, voxel_size: float, initial_lowpass: float | None = None) -> dict[str, Any]:
    """Every option as it will be used, JSON-ready; lengths in Angstrom.

    Raises
    ------
    InputError
        for options that do not fit the box.
    """
    rule = band_rule(options, initial_lowpass)
    resolved: dict[str, Any] = asdict(options) | {"choices": asdict(options.choices) | {"band": rule}}
    size = box * voxel_size
    widest = (box / 2 - SOFT_EDGE + 0.5) * voxel_size
    radius = options.mask_radius if options.mask_radius is not None else min(0.4 * size, widest)
    if not 2 * voxel_size <= radius <= widest:
        raise InputError(
            f"option mask-radius: found {radius:g} A, expected {2 * voxel_size:g} to {widest:g} A (box of {size:g} A)"
        )
    shift = options.max_shift if options.max_shift is not None else size / 8
    if shift / voxel_size > box / 2 - 1:
        raise InputError(f"option max-shift: found {shift:g} A, expected less than half the box of {size:g} A")
    nyquist = size / fourier.full_band(box)
    if options.resolution is not None and not size / options.resolution >= 3:
        raise InputError(f"option resolution: found {options.resolution:g} A, expected {nyquist:g} to {size / 3:g} A")
    full = fourier.full_band(box)
    r_max = full if options.resolution is None else min(full, int(np.floor(size / options.resolution + 1e-6)))
    # A third of the mask's diameter: what tells orientations apart at the coarsest.
    r_start = int(np.clip(round(size / (2 * radius / 3)), min(3, r_max), r_max))
    if initial_lowpass is not None:
        # A start that knows this much is not thrown back to less.
        r_start = int(np.clip(size / initial_lowpass, r_start, r_max))
    if rule == "full":
        r_start = r_max
    if options.starts > 1 and initial_lowpass is not None:
        raise InputError(f"option starts: found {options.starts} with a start from poses or from a map, expected 1")
    symmetry.point_group(options.symmetry)
    if options.helix is not None:
        if initial_lowpass is None:
            raise InputError(
                "option helix: found a start from nothing, expected one from poses or from a map, filament along z"
            )
        symmetry.check_helix(options.helix[0] / voxel_size, box)
        if options.symmetry.strip().upper()[0] not in "CD":
            raise InputError(f"option symmetry: found {options.symmetry!r} with a helix, expected Cn or Dn")
    return resolved | {
        "mask_radius": radius,
        "regularization": options.choices.regularization if options.regularization is None else options.regularization,
        "max_shift": shift,
        "resolution": size / r_max,
        "r_max": r_max,
        "r_start": r_start,
        "bandwidth": _bandwidth(options, r_max, radius / size),
        "box": box,
        "voxel_size": voxel_size,
    }


def band_rule(options: Options, initial_lowpass: float | None) -> Literal["evidence", "growing", "full"]:
    """How far the band reaches by the iteration, where the preset leaves it to the start ("auto").

    From a map or from poses, what the particles show decides: they are roughly aligned, and agree where there is
    something to agree on. From nothing they agree on little until the structure is there: a schedule takes them on; so
    too each of two `halves`, where it would be a quarter of the particles that vouches for the other.
    """
    rule = options.choices.band
    if rule != "auto":
        return rule
    return "growing" if initial_lowpass is None or options.halves else "evidence"


def _bandwidth(options: Options, r_max: int, relative_radius: float) -> int:
    if options.bandwidth is not None:
        return options.bandwidth
    if options.choices.bandwidth == "fixed":
        return 36
    return int(min(36, np.ceil(2 * np.pi * r_max * relative_radius + 2)))


class Clock:
    """Seconds spent per step, each a range in a profiler; a GPU is waited for, so that the time is that of the step."""

    def __init__(self, device: str = "cpu", seconds: dict[str, float] | None = None) -> None:
        self.seconds = {} if seconds is None else seconds  # those there are: it goes on
        self.device = device
        self._lock, self._taken = Lock(), time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        with step(name):
            yield
            synchronize(self.device)
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def take(self, other: Clock) -> None:
        """Add what another has measured of steps in several threads: of the time that has passed, the share of each."""
        now = time.perf_counter()
        with other._lock:
            spent, other.seconds, passed = other.seconds, {}, now - other._taken
            other._taken = now
        whole = sum(spent.values())
        for name, seconds in spent.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + passed * seconds / whole
