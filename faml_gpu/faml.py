"""Algorithm 1 of FAML: fast alignment, Voronoi weights, expectation-maximisation, until converged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faml_gpu import fast_alignment, fourier, masks, maximization, voronoi
from faml_gpu.array_backend import cpu_threads
from faml_gpu.data import (
    Batch,
    Checkpoint,
    IterationRecord,
    ParticleSource,
    Posterior,
    Progress,
    Result,
    State,
    best_poses,
)
from faml_gpu.errors import InputError
from faml_gpu.expectation import BatchPosterior, expectation, log_normaliser
from faml_gpu.fast_alignment import Candidates, Observation, Reference, ShiftWindow
from faml_gpu.fourier import Support
from faml_gpu.geometry import rotation_angle
from faml_gpu.options import Options

__all__ = ["Plan", "resolve", "run"]

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

BATCH_BYTES = 1 << 30  # of working memory a batch of particles may take
BATCH_PARTICLES = 32
CONVERGED_CHANGES = 0.01  # share of particles that change class
CONVERGED_CORRELATION = 0.999  # of each average with its predecessor
REFINED = 3  # candidates per particle and class that are refined, and earlier poses taken among them
SOFT_EDGE = 3.0  # voxels over which masks fall to 0


# ---------------------------------------------------------------------------------------------- Algorithm 1


def run(
    particles: ParticleSource,
    options: Options,
    *,
    reference: Float32 | None = None,
    initial_lowpass: float | None = None,
    use_poses: bool = False,
    checkpoint: Checkpoint | None = None,
    on_iteration: Callable[[Checkpoint], None] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Average (K = 1) or classify subtomograms: Algorithm 1.

    Parameters
    ----------
    particles : ParticleSource
    options : Options
    reference : (N, N, N) float32, optional
        Start from this map, low-passed to `initial_lowpass` Angstrom, instead of a random one.
    use_poses : bool
        Start from the average in the poses (and classes) the particles came with.
    checkpoint : Checkpoint, optional
        Go on from there; the result is that of the unbroken run.
    on_iteration : callable, optional
        Gets a checkpoint after each iteration.
    progress : callable, optional
        progress(step, done, total).

    Returns
    -------
    Result

    Raises
    ------
    InputError
        for options that do not fit the particles.
    """
    plan = Plan.make(particles, options)
    with cpu_threads(options.threads):
        if checkpoint is None:
            checkpoint = start(plan, particles, reference, initial_lowpass, use_poses)
        while checkpoint.state.iteration < options.iterations and not _converged(checkpoint.history):
            checkpoint = iterate(plan, particles, checkpoint, progress)
            if on_iteration is not None:
                on_iteration(checkpoint)
        maps = final_averages(plan, particles, checkpoint.posterior, progress)
    return Result(
        maps=maps,
        best=best_poses(checkpoint.posterior),
        posterior=checkpoint.posterior,
        state=checkpoint.state,
        history=checkpoint.history,
        converged_at=next((h.iteration for h in checkpoint.history if h.converged), None),
        options=resolve(options, particles.box, particles.voxel_size),
        voxel_size=particles.voxel_size,
    )


def iterate(
    plan: Plan, particles: ParticleSource, checkpoint: Checkpoint, progress: Progress | None = None
) -> Checkpoint:
    """One iteration of Algorithm 1: Theta and the averages in, new Theta and the posterior out."""
    state, clock = checkpoint.state, Clock()
    band = plan.band(state.iteration + 1)
    precision = band.precision(state.sigma2)
    points = voronoi.draw_points(voronoi.N_POINTS, plan.options.choices.measure, plan.rng(state.iteration + 1))
    with clock("references"):
        references, old = band.references(state.maps)
    total = maximization.Accumulators.zero(len(state.maps), len(band.output), band.support.r_max)
    posteriors, n_candidates, kept = [], 0, [{} for _ in references]  # type: ignore[var-annotated]

    for batch, spectra in plan.batches(particles, clock, progress, f"iteration {state.iteration + 1}"):
        observation = band.observe(batch, spectra)
        with clock("fast alignment"):
            candidates = [band.align(observation, r, precision, c) for r, c in zip(references, kept, strict=True)]
            if plan.options.method == "fa":
                candidates = single_best(candidates)
            elif plan.options.choices.poses == "refined":
                earlier = select(checkpoint.posterior, total.n, total.n + len(spectra)) if checkpoint.history else None
                candidates = band.refine(observation, references, candidates, precision, earlier)
        n_candidates += sum(int(c.count.sum()) for c in candidates)
        with clock("voronoi"):
            volumes = [voronoi.log_volumes(points, c.rotations, c.shifts, c.count) for c in candidates]
        with clock("expectation"):
            posterior = expectation(observation, references, candidates, volumes, state.alpha, state.sigma2, state.zeta)
        with clock("rotate back"):
            total.merge(band.accumulate(posterior, observation, batch, spectra))
        posteriors.append(posterior)

    with clock("maximization"):
        new = maximize(plan, band, state, total, old)
        merged = join(posteriors)
        likelihood = total.log_evidence + log_normaliser(total.observed, state.sigma2, state.zeta, total.n)
    record = report(plan, band, checkpoint, new, merged, total, likelihood, n_candidates, clock)
    return Checkpoint(new, merged, [*checkpoint.history, record])


def maximize(
    plan: Plan, band: Band, old: State, total: maximization.Accumulators, old_averages: NDArray[np.complex64]
) -> State:
    """New A, alpha, sigma, zeta from the sums of the E-step (Eq. 10-13)."""
    options, choices = plan.options, plan.options.choices
    if options.method == "fa" or choices.update == "ratio":
        averages = maximization.direct_average(total.sums, total.weights, total.mass)
    else:
        averages = maximization.update_average(total.sums, total.weights, total.mass, old_averages, band.inside)
    maps = plan.to_maps(averages, band.output)
    for k in np.nonzero(total.mass <= 0)[0]:
        maps[k] = old.maps[k]  # an empty class keeps its average, to be won back
    pull = options.regularization * max(0.0, 1 - old.iteration / options.iterations)
    maps += np.float32(pull) * (maps.mean(axis=0) - maps)
    return State(
        iteration=old.iteration + 1,
        maps=maps,
        alpha=total.mass / total.mass.sum(),
        sigma2=maximization.new_sigma2(total.residual, total.observed, old.sigma2, per_shell=choices.noise == "shell"),
        zeta=maximization.new_zeta(total.shift2, total.n),
    )


# ---------------------------------------------------------------------------------------------- start and end


def start(
    plan: Plan,
    particles: ParticleSource,
    reference: Float32 | None,
    initial_lowpass: float | None,
    use_poses: bool,
) -> Checkpoint:
    """Theta before the first iteration (section 2.4).

    Random equal split into K classes, each average the mean of its boxes as they lie (or in their poses), divided by
    its Fourier coverage; noise from random particles; shifts as wide as the box.
    """
    n, n_classes = len(particles), plan.options.n_classes
    rng = plan.rng(0)
    classes = rng.permutation(np.arange(n) % n_classes)
    rotations, shifts = np.tile(np.eye(3), (n, 1, 1)), np.zeros((n, 3))
    if reference is not None and n_classes > 1:
        # One map cannot tell K classes apart: align everything to it, then split at random.
        single = Plan.make(particles, replace(plan.options, n_classes=1))
        aligned = iterate(single, particles, start(single, particles, reference, initial_lowpass, use_poses))
        best = best_poses(aligned.posterior)
        rotations, shifts, reference = best.rotations, best.shifts, None
    elif use_poses:
        if particles.poses is None:
            raise InputError("--use-poses: the input has no poses, expected rlnAngle* and rlnOrigin* columns")
        rotations, shifts = particles.poses.rotations, particles.poses.shifts
        if particles.poses.classes is not None and set(particles.poses.classes) == set(range(n_classes)):
            classes = particles.poses.classes
    posterior = one_hot(classes, rotations, shifts, n_classes)
    support = fourier.make_support(plan.box, fourier.full_band(plan.box))
    maps = _direct_averages(plan, particles, posterior, support, None)
    # The paper takes one random particle and class; a curve per shell needs a few of them to be smooth.
    chosen = np.sort(rng.choice(n, min(n, 1 if plan.options.choices.noise == "single" else 20), replace=False))
    sigma2 = _initial_sigma2(plan, particles, chosen, maps, posterior, support)
    if reference is not None:
        low = reference if initial_lowpass is None else plan.lowpass(reference, initial_lowpass)
        maps = np.repeat(plan.scaled_like(low, maps.mean(axis=0))[None], n_classes, axis=0)
    state = State(0, maps, np.full(n_classes, 1 / n_classes), sigma2, float(plan.box))
    return Checkpoint(state, posterior, [])


def _initial_sigma2(
    plan: Plan, particles: ParticleSource, chosen: Int64, maps: Float32, posterior: Posterior, support: Support
) -> NDArray[np.float64]:
    """Mean of w^2 |X - A|^2 over the observed voxels, per Fourier shell or over all of them."""
    batch = particles.read(chosen)
    spectra = support.gather(plan.spectra(batch))
    weights = support.gather(batch.weights)[batch.weight_index]
    average = support.gather(fourier.transform(maps * plan.mask))
    phases = np.exp(-2j * np.pi / plan.box * posterior.shifts[chosen] @ support.coords.T)
    lies = np.abs(posterior.rotations[chosen] - np.eye(3)).max(axis=(1, 2)) < 1e-9
    # A box that does not lie as its average does has no simple difference: all its power counts as noise.
    model = average[posterior.class_index[chosen]] * phases * lies[:, None]
    residual = support.shell_sums(weights**2 * np.abs(spectra - model) ** 2).sum(axis=0)
    observed = support.shell_sums(weights**2).sum(axis=0)
    flat = np.full(plan.n_shells, residual.sum() / max(observed.sum(), 1.0))
    if plan.options.choices.noise == "single":
        return flat
    return maximization.new_sigma2(residual, observed, flat, per_shell=True)


def final_averages(
    plan: Plan, particles: ParticleSource, posterior: Posterior, progress: Progress | None = None
) -> Float32:
    """Wedge-weighted averages at full band over the last posterior, (K, N, N, N)."""
    support = fourier.make_support(plan.box, fourier.full_band(plan.box))
    return _direct_averages(plan, particles, posterior, support, progress)


def _direct_averages(
    plan: Plan, particles: ParticleSource, posterior: Posterior, support: Support, progress: Progress | None
) -> Float32:
    n_classes = posterior.class_probability.shape[1]
    sums = np.zeros((n_classes, len(support)), np.complex128)
    weights = np.zeros((n_classes, len(support)))
    done = 0
    for batch, spectra in plan.batches(particles, Clock(), progress, "averages"):
        part = select(posterior, done, done + len(spectra))
        s, w = plan.rotate_back(part, batch, spectra, support, n_classes)
        sums += s
        weights += w
        done += len(spectra)
    mass = np.bincount(posterior.class_index, posterior.probability, minlength=n_classes).astype(np.float64)
    return plan.to_maps(maximization.direct_average(sums, weights, mass), support)


# ---------------------------------------------------------------------------------------------- the plan of a run


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
    particle_mask: Float32
    batch_size: int

    @classmethod
    def make(cls, particles: ParticleSource, options: Options) -> Plan:
        """Resolve the options for these particles; `InputError` where they do not fit."""
        n = len(particles)
        if options.n_classes > n:
            raise InputError(f"option n_classes: found {options.n_classes}, expected at most the {n} particles")
        box, resolved = particles.box, resolve(options, particles.box, particles.voxel_size)
        radius, shift = resolved["mask_radius"] / particles.voxel_size, resolved["max_shift"] / particles.voxel_size
        reach = min(radius + shift, box / 2 - SOFT_EDGE)
        padded = (box * options.padding) ** 3
        grid = (4 * resolved["bandwidth"]) * (2 * resolved["bandwidth"]) ** 2
        each = 4 * (6 * box**3 + 5 * padded + 6 * grid * options.n_classes)
        return cls(
            options,
            box,
            particles.voxel_size,
            radius,
            shift,
            resolved["r_max"],
            resolved["r_start"],
            masks.soft_sphere(box, radius, SOFT_EDGE),
            masks.soft_sphere(box, max(reach, radius), SOFT_EDGE),
            int(np.clip(BATCH_BYTES // each, 1, BATCH_PARTICLES)),
        )

    @property
    def n_shells(self) -> int:
        """Fourier shells 0 .. ceil(N/2) - 1 of the noise curve."""
        return fourier.full_band(self.box) + 1

    def rng(self, iteration: int) -> np.random.Generator:
        """The random numbers of an iteration: from the seed and its number alone, so that a run can be resumed."""
        return np.random.default_rng([self.options.seed, iteration])

    def r_max(self, iteration: int) -> int:
        """Radius of the active support: grows linearly over the first 60 % of the iterations, or full at once."""
        if self.options.choices.band == "full":
            return self.r_final
        last = max(1, round(0.6 * self.options.iterations))
        grown = self.r_start + (self.r_final - self.r_start) * (iteration - 1) / max(1, last - 1)
        return int(min(self.r_final, np.floor(grown + 1e-9)))

    def bandwidth(self, r_max: int) -> int:
        """L: given, 36 (`paper`), or enough for the band and the mask, at most 36."""
        return _bandwidth(self.options, r_max, self.mask_radius / self.box)

    def band(self, iteration: int) -> Band:
        """What an iteration needs of its band; its averages reach to the band of the next."""
        return Band(self, self.r_max(iteration), self.r_max(min(iteration + 1, self.options.iterations)))

    def batches(
        self, particles: ParticleSource, clock: Clock, progress: Progress | None, name: str
    ) -> Iterator[tuple[Batch, NDArray[np.complex64]]]:
        """Batches in order, each with the transforms of its normalised boxes."""
        n = len(particles)
        for first in range(0, n, self.batch_size):
            with clock("read"):
                batch = particles.read(np.arange(first, min(first + self.batch_size, n)))
                spectra = self.spectra(batch)
            yield batch, spectra
            if progress is not None:
                progress(name, min(first + self.batch_size, n), n)

    def spectra(self, batch: Batch) -> NDArray[np.complex64]:
        """Transforms (B, N, N, N//2 + 1) of the boxes, normalised and with bright protein."""
        boxes = -batch.boxes if self.options.invert else batch.boxes
        if self.options.normalize:
            boxes = masks.normalise(boxes, self.mask)
        return np.asarray(fourier.transform(boxes))

    def to_maps(self, averages: NDArray[np.complex128], support: Support) -> Float32:
        """Maps (K, N, N, N) float32 from averages (K, M); the constant left free puts the background at 0."""
        maps = fourier.inverse_transform(support.scatter(averages.astype(np.complex64)), self.box)
        outside = self.mask == 0
        return np.asarray(maps - maps[:, outside].mean(axis=1)[:, None, None, None])

    def rotate_back(
        self,
        posterior: BatchPosterior | Posterior,
        batch: Batch,
        spectra: NDArray[np.complex64],
        support: Support,
        n_classes: int,
        *,
        weigh_twice: bool = False,
    ) -> tuple[NDArray[np.complex128], NDArray[np.float64]]:
        """Sums of the M-step over a batch, see `maximization.rotate_back`."""
        return maximization.rotate_back(
            spectra,
            batch.weights,
            batch.weight_index,
            self.particle_mask,
            posterior,
            support,
            self.options.padding,
            n_classes,
            weigh_twice=weigh_twice,
        )

    def lowpass(self, volume: Float32, resolution: float) -> Float32:
        """A map cut off at `resolution` Angstrom."""
        r = int(np.clip(self.box * self.voxel_size / resolution, 1, fourier.full_band(self.box)))
        support = fourier.make_support(self.box, r)
        values = support.gather(fourier.transform(volume.astype(np.float32)))
        return np.asarray(self.to_maps(values[None], support)[0])

    def scaled_like(self, volume: Float32, average: Float32) -> Float32:
        """A map on the particles' grey scale.

        The boxes' poses are not known yet, so what can be matched is the shell-wise mean amplitude near the origin,
        where the average of unaligned boxes still has the particle's: least squares over the lowest shells.
        """
        support = fourier.make_support(self.box, min(2, fourier.full_band(self.box)))
        a = np.abs(support.gather(fourier.transform(volume * self.mask)))
        b = np.abs(support.gather(fourier.transform(average * self.mask)))
        return np.asarray(volume * np.float32((a * b).sum() / max((a * a).sum(), np.finfo(np.float32).tiny)))


@dataclass(frozen=True)
class Band:
    """One iteration's active support and what hangs on it."""

    plan: Plan
    r_max: int
    r_output: int
    support: Support = field(init=False)
    output: Support = field(init=False)
    inside: NDArray[np.bool_] = field(init=False)
    window: ShiftWindow = field(init=False)

    def __post_init__(self) -> None:
        support = fourier.make_support(self.plan.box, self.r_max)
        output = fourier.make_support(self.plan.box, max(self.r_max, self.r_output))
        object.__setattr__(self, "support", support)
        object.__setattr__(self, "output", output)
        object.__setattr__(self, "inside", (output.coords.astype(np.int64) ** 2).sum(axis=1) <= self.r_max**2)
        object.__setattr__(self, "window", fast_alignment.shift_window(support, self.plan.max_shift))

    def precision(self, sigma2: NDArray[np.float64]) -> Float32:
        """1 / sigma^2 at each voxel of the support."""
        return (1 / sigma2[self.support.shell]).astype(np.float32)

    def references(self, maps: Float32) -> tuple[list[Reference], NDArray[np.complex64]]:
        """The averages ready to be matched, and their transforms (K, M) on the output support."""
        masked = maps * self.plan.mask
        padding, bandwidth = self.plan.options.padding, self.plan.bandwidth(self.r_max)
        grids = fourier.interpolation_grid(masked, self.r_max, padding)
        references = [fast_alignment.make_reference(g, padding, self.r_max, bandwidth) for g in grids]
        return references, self.output.gather(fourier.transform(masked))

    def observe(self, batch: Batch, spectra: NDArray[np.complex64]) -> Observation:
        """The batch on the active support."""
        gather = self.support.gather
        return Observation(self.support, gather(spectra), gather(batch.weights), batch.weight_index, batch.weight_ids)

    def align(
        self, observation: Observation, reference: Reference, precision: Float32, kept: dict[str, Any]
    ) -> Candidates:
        """Step 1 against one class."""
        centred = self.plan.options.choices.magnitudes == "centred"
        n = self.plan.options.candidates
        return fast_alignment.align(observation, reference, precision, self.window, n, centred=centred, kept=kept)

    def refine(
        self,
        observation: Observation,
        references: list[Reference],
        candidates: list[Candidates],
        precision: Float32,
        earlier: Posterior | None,
    ) -> list[Candidates]:
        """Likeliest candidates moved to the likelihood's maximum, the particles' earlier poses among them."""
        refined = []
        for k, (reference, found) in enumerate(zip(references, candidates, strict=True)):
            if earlier is not None:
                found = fast_alignment.carry_over(found, *likeliest(earlier, k, REFINED))
            refined.append(fast_alignment.refine(observation, reference, found, precision, REFINED))
        return refined

    def accumulate(
        self, posterior: BatchPosterior, observation: Observation, batch: Batch, spectra: NDArray[np.complex64]
    ) -> maximization.Accumulators:
        """What a batch adds to the sums of the M-step."""
        n_classes = posterior.class_probability.shape[1]
        printed = self.plan.options.choices.update == "printed"
        sums, weights = self.plan.rotate_back(posterior, batch, spectra, self.output, n_classes, weigh_twice=printed)
        residual, observed = maximization.noise_sums(
            posterior, observation.weights, observation.weight_index, self.support
        )
        return maximization.Accumulators(
            sums,
            weights,
            np.bincount(posterior.class_index, posterior.probability, minlength=n_classes).astype(np.float64),
            residual,
            observed,
            float(posterior.probability @ (posterior.shifts**2).sum(axis=1)),
            float(posterior.log_likelihood.sum()),
            len(spectra),
        )


def resolve(options: Options, box: int, voxel_size: float) -> dict[str, Any]:
    """Every option as it will be used, JSON-ready; lengths in Angstrom.

    Raises
    ------
    InputError
        for options that do not fit the box.
    """
    resolved: dict[str, Any] = asdict(options) | {"choices": asdict(options.choices)}
    size = box * voxel_size
    radius = options.mask_radius if options.mask_radius is not None else 0.4 * size
    if radius / voxel_size > box / 2 - SOFT_EDGE + 0.5 or radius / voxel_size < 2:
        high = (box / 2 - SOFT_EDGE + 0.5) * voxel_size
        raise InputError(
            f"option mask-radius: found {radius:g} A, expected {2 * voxel_size:g} to {high:g} A in a box of {size:g} A"
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
    if options.choices.band == "full":
        r_start = r_max
    return resolved | {
        "mask_radius": radius,
        "max_shift": shift,
        "resolution": size / r_max,
        "r_max": r_max,
        "r_start": r_start,
        "bandwidth": _bandwidth(options, r_max, radius / size),
        "box": box,
        "voxel_size": voxel_size,
    }


def _bandwidth(options: Options, r_max: int, relative_radius: float) -> int:
    if options.bandwidth is not None:
        return options.bandwidth
    if options.choices.bandwidth == "fixed":
        return 36
    return int(min(36, np.ceil(2 * np.pi * r_max * relative_radius + 2)))


class Clock:
    """Seconds spent per step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


# ---------------------------------------------------------------------------------------------- posteriors


def single_best(candidates: list[Candidates]) -> list[Candidates]:
    """`fa`: of all classes and poses of a particle only the one of highest constrained correlation."""
    score = np.stack([np.where(np.arange(c.correlation.shape[1]) < c.count[:, None], c.correlation, -np.inf)
                      for c in candidates])  # fmt: skip
    pose = score.argmax(axis=2)  # (K, B)
    rows = np.arange(score.shape[1])
    classes = score.max(axis=2).argmax(axis=0)
    return [
        Candidates(
            np.ascontiguousarray(c.rotations[rows, pose[k]][:, None]),
            np.ascontiguousarray(c.shifts[rows, pose[k]][:, None]),
            c.correlation[rows, pose[k]][:, None],
            (classes == k).astype(np.int64),
        )
        for k, c in enumerate(candidates)
    ]


def one_hot(classes: Int64, rotations: NDArray[np.float64], shifts: NDArray[np.float64], n_classes: int) -> Posterior:
    """A posterior with all mass of each particle on one class and pose."""
    n = len(classes)
    return Posterior(
        particle=np.arange(n),
        class_index=classes.astype(np.int64),
        rotations=np.ascontiguousarray(rotations, np.float64),
        shifts=np.ascontiguousarray(shifts, np.float64),
        probability=np.ones(n),
        log_likelihood=np.zeros(n),
        n_significant=np.ones(n, np.int64),
        class_probability=np.eye(n_classes)[classes],
    )


def join(parts: list[BatchPosterior]) -> Posterior:
    """The posterior of all particles from those of the batches, in order."""
    sizes = [len(p.log_likelihood) for p in parts]
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    particle = np.concatenate([p.particle + f for p, f in zip(parts, first, strict=True)])

    def together(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(p, name) for p in parts])

    return Posterior(
        particle=particle,
        class_index=together("class_index"),
        rotations=together("rotations"),
        shifts=together("shifts"),
        probability=together("probability"),
        log_likelihood=together("log_likelihood"),
        n_significant=np.bincount(particle, minlength=sum(sizes)).astype(np.int64),
        class_probability=together("class_probability"),
    )


def likeliest(
    posterior: Posterior, k: int, n: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """The n likeliest poses of each particle in class k: rotations (B, n, 3, 3), shifts (B, n, 3), how many (B,)."""
    mine = np.nonzero(posterior.class_index == k)[0]
    mine = mine[np.lexsort((-posterior.probability[mine], posterior.particle[mine]))]
    particle = posterior.particle[mine]
    rank = np.arange(len(mine)) - np.searchsorted(particle, particle)
    mine, particle, rank = mine[rank < n], particle[rank < n], rank[rank < n]
    size = len(posterior.log_likelihood)
    rotations, shifts = np.tile(np.eye(3), (size, n, 1, 1)), np.zeros((size, n, 3))
    rotations[particle, rank], shifts[particle, rank] = posterior.rotations[mine], posterior.shifts[mine]
    return rotations, shifts, np.bincount(particle, minlength=size)


def select(posterior: Posterior, first: int, last: int) -> Posterior:
    """The part of a posterior that belongs to particles first .. last - 1, numbered from 0."""
    a, b = np.searchsorted(posterior.particle, [first, last])
    return Posterior(
        particle=posterior.particle[a:b] - first,
        class_index=posterior.class_index[a:b],
        rotations=posterior.rotations[a:b],
        shifts=posterior.shifts[a:b],
        probability=posterior.probability[a:b],
        log_likelihood=posterior.log_likelihood[first:last],
        n_significant=posterior.n_significant[first:last],
        class_probability=posterior.class_probability[first:last],
    )


# ---------------------------------------------------------------------------------------------- report and stop


def report(
    plan: Plan,
    band: Band,
    before: Checkpoint,
    new: State,
    posterior: Posterior,
    total: maximization.Accumulators,
    likelihood: float,
    n_candidates: int,
    clock: Clock,
) -> IterationRecord:
    """The record of an iteration, and whether the stopping rule holds."""
    last, now = best_poses(before.posterior), best_poses(posterior)
    bandwidth = plan.bandwidth(band.r_max)
    changed = float((last.classes != now.classes).mean())
    pose_change = float(np.median(rotation_angle(last.rotations, now.rotations)))
    correlation = [_correlation(a, b, plan.mask) for a, b in zip(before.state.maps, new.maps, strict=True)]
    # The grid step is that of alpha and gamma, 180 / L degrees.
    settled = (
        band.r_max == plan.r_final
        and changed < CONVERGED_CHANGES
        and pose_change < 0.25 * 180 / bandwidth
        and min(correlation) >= CONVERGED_CORRELATION
    )
    observed = max(total.observed.sum(), 1.0)
    return IterationRecord(
        iteration=new.iteration,
        log_likelihood=likelihood,
        sigma=float(np.sqrt((total.observed * new.sigma2[: len(total.observed)]).sum() / observed)),
        zeta=new.zeta,
        alpha=[float(a) for a in new.alpha],
        class_sizes=np.bincount(now.classes, minlength=len(new.maps)).tolist(),
        r_max=band.r_max,
        resolution=plan.box * plan.voxel_size / band.r_max,
        bandwidth=bandwidth,
        candidates=n_candidates / (total.n * len(new.maps)),
        changed_class=changed,
        pose_change=pose_change,
        map_correlation=correlation,
        near_identity=float((rotation_angle(now.rotations, np.eye(3)) < 10).mean()),
        coverage=[float(c) for c in maximization.covered(total.weights, total.mass)],
        converged=bool(settled),
        seconds={name: round(s, 4) for name, s in clock.seconds.items()},
    )


def _converged(history: list[IterationRecord]) -> bool:
    return bool(history) and history[-1].converged


def _correlation(a: Float32, b: Float32, mask: Float32) -> float:
    x, y = (a * mask).ravel().astype(np.float64), (b * mask).ravel().astype(np.float64)
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / max(np.sqrt((x @ x) * (y @ y)), np.finfo(np.float64).tiny))
