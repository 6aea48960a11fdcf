"""Algorithm 1 of FAML: fast alignment, Voronoi weights, expectation-maximisation, until converged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from faml_gpu import maximization, voronoi
from faml_gpu.array_backend import Array, use_device
from faml_gpu.data import Batch, Checkpoint, ParticleSource, Poses, Progress, Result, State, progress_of
from faml_gpu.device_info import choose_device
from faml_gpu.errors import InputError
from faml_gpu.expectation import BatchPosterior, expectation, fitted_scale, log_normaliser
from faml_gpu.fast_alignment import Reference, single_best
from faml_gpu.history import converged, record
from faml_gpu.noise import new_scale, noise_groups
from faml_gpu.options import Options
from faml_gpu.plan import Band, Clock, Plan, resolve, start_lowpass
from faml_gpu.posteriors import best_poses, gathered, join, scattered, unfolded
from faml_gpu.reading import Ahead
from faml_gpu.reseeding import reseed
from faml_gpu.starting import final_averages, onto_axes, start
from faml_gpu.symmetry import point_group
from faml_gpu.threads import Once, cpu_threads, in_order
from faml_gpu.unfinished import Starts, Unfinished

__all__ = ["begin", "iterate", "run"]

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


def run(
    particles: ParticleSource,
    options: Options,
    *,
    reference: Float32 | None = None,
    initial_lowpass: float | None = None,
    use_poses: bool = False,
    checkpoint: Checkpoint | None = None,
    on_iteration: Callable[[Checkpoint], None] | None = None,
    on_begin: Callable[[Unfinished], None] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Average (K = 1) or classify subtomograms: Algorithm 1.

    Parameters
    ----------
    particles : ParticleSource
    options : Options
    reference : (N, N, N) float32, optional
        Start from this map instead of a random one.
    initial_lowpass : float, optional
        Low-pass of a start from a map or from poses, Angstrom (default: none); the band begins there too.
    use_poses : bool
        Start from the average in the poses (and classes) the particles came with.
    checkpoint : Checkpoint, optional
        Go on from there, or with an `Unfinished` iteration; the result is that of the unbroken run.
    on_iteration : callable, optional
        Gets a checkpoint after each iteration.
    on_begin : callable, optional
        Gets each iteration as it begins; what it gets grows with each batch, before `progress` is told of it.
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
    initial_lowpass = start_lowpass(initial_lowpass, particles.voxel_size, known=reference is not None or use_poses)
    device, _ = choose_device(options.device)
    with cpu_threads(options.threads), use_device(device):
        plan = Plan.make(particles, options, initial_lowpass, device)
        trying = checkpoint is None and options.starts > 1 and initial_lowpass is None
        if trying or (isinstance(checkpoint, Unfinished) and checkpoint.starts is not None):
            checkpoint = likeliest_start(plan, particles, checkpoint, progress, on_begin)
            if on_iteration is not None:
                on_iteration(checkpoint)
        elif checkpoint is None:
            checkpoint = begin(plan, particles, reference, use_poses, progress)
        while checkpoint.state.iteration < options.iterations and not converged(checkpoint.history):
            checkpoint = iterate(plan, particles, checkpoint, progress, on_begin)
            if on_iteration is not None:
                on_iteration(checkpoint)
        maps = final_averages(plan, particles, checkpoint.posterior, progress, checkpoint.state)
        empty = np.bincount(checkpoint.posterior.class_index, minlength=options.n_classes) == 0
        maps[empty] = checkpoint.state.maps[empty]
    return Result(
        maps=maps,
        best=best_poses(checkpoint.posterior),
        posterior=checkpoint.posterior,
        state=checkpoint.state,
        history=checkpoint.history,
        converged_at=next((h.iteration for h in checkpoint.history if h.converged), None),
        options=resolve(options, particles.box, particles.voxel_size, initial_lowpass),
        voxel_size=particles.voxel_size,
    )


def begin(
    plan: Plan,
    particles: ParticleSource,
    reference: Float32 | None,
    use_poses: bool,
    progress: Progress | None = None,
) -> Checkpoint:
    """Theta before the first iteration."""
    poses, told = particles.poses if use_poses else None, progress_of("start", progress)
    if use_poses and poses is None:
        raise InputError("option use-poses: the input has no poses, expected rlnAngle* and rlnOrigin* columns")
    if reference is not None and plan.options.n_classes > 1:
        # One map cannot tell K classes apart: align everything to it, then split at random.
        single = Plan.make(particles, replace(plan.options, n_classes=1), plan.initial_lowpass, plan.device)
        lying = start(single, particles, reference, poses, told)
        aligned = best_poses(iterate(single, particles, lying, told).posterior)
        reference, poses = None, Poses(aligned.rotations, aligned.shifts)
    return start(plan, particles, reference, poses, told)


def likeliest_start(
    plan: Plan,
    particles: ParticleSource,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
    on_begin: Callable[[Unfinished], None] | None = None,
) -> Checkpoint:
    """Of several random starts that which has the highest likelihood after its first, coarse iterations.

    All in the same bands (`Plan.r_max`): the likelihood is a sum over Fourier voxels, and that of more is another.

    checkpoint, on_begin : see `run`
    """
    starts = checkpoint.starts if isinstance(checkpoint, Unfinished) else None
    starts = starts or Starts()

    def noted(begun: Unfinished) -> None:
        begun.starts = Starts([*starts.likelihoods], starts.best)  # a copy: this one itself will be added
        if on_begin is not None:
            on_begin(begun)

    while len(starts.likelihoods) < plan.options.starts:
        of_trial = replace(plan, trial=len(starts.likelihoods))
        told = progress_of(f"start {of_trial.trial + 1}/{plan.options.starts}", progress)
        tried, checkpoint = checkpoint or begin(of_trial, particles, None, False, told), None
        while tried.state.iteration < plan.tried:
            tried = iterate(of_trial, particles, tried, told, noted)
        starts.add(tried)
    assert starts.best is not None
    starts.best.history[-1] = replace(starts.best.history[-1], starts=starts.likelihoods)
    return starts.best


def iterate(
    plan: Plan,
    particles: ParticleSource,
    checkpoint: Checkpoint,
    progress: Progress | None = None,
    on_begin: Callable[[Unfinished], None] | None = None,
) -> Checkpoint:
    """One iteration of Algorithm 1, or the rest of one: Theta and the averages in, new Theta and the posterior out."""
    state = checkpoint.state
    band, groups = plan.band(state), noise_groups(particles, plan.options, state)
    parts, name = plan.parts(len(particles)), f"iteration {state.iteration + 1}"
    size = plan.options.n_classes, len(band.output), band.r_max
    so_far = Unfinished.of(checkpoint, size, n_curves=len(groups), parts=len(parts), device=plan.device)
    clock = Clock(plan.device, so_far.seconds)
    beside = Clock(plan.device)  # of batches that are worked on at the same time
    if on_begin is not None:
        on_begin(so_far)
    if not band.joint:
        rng = plan.rng(state.iteration + 1)
        points = voronoi.draw_points(voronoi.N_POINTS, plan.options.choices.measure, rng, plan.device)

    def without(fold: int | None) -> tuple[list[Reference], Array | None, list[dict[str, Array]]]:
        with beside("references"):
            references = band.references(fold)
            return references, band.unseen(fold), [{} for _ in references]

    against = Once(without, keep=plan.at_once)

    def e_step(
        part: int, batch: Batch, spectra: Array, numbers: Int64
    ) -> tuple[BatchPosterior, maximization.Accumulators]:
        references, unseen, kept = against(part if state.apart is not None else None)
        with beside("pose integral" if band.joint else "fast alignment"):
            batch, spectra = groups.weigh(batch, spectra, numbers, state)
            observation = band.observe(batch, spectra, unseen)
            if band.joint:
                candidates, volumes = band.integrate(observation, references)
            else:
                candidates = [band.align(observation, r, c) for r, c in zip(references, kept, strict=True)]
                if plan.options.method == "fa":
                    candidates = single_best(candidates)
                elif plan.options.choices.poses == "refined":
                    earlier = gathered(checkpoint.posterior, numbers)
                    candidates = band.refine(observation, references, candidates, earlier)
        if not band.joint:
            with beside("voronoi"):
                volumes = [voronoi.log_volumes(points, c.rotations, c.shifts, c.count) for c in candidates]
        with beside("expectation"):
            posterior = expectation(observation, references, candidates, volumes, state.alpha, state.sigma2, state.zeta)
            posterior = unfolded(posterior, point_group(band.symmetry))
        if plan.options.scale_correction:
            posterior = replace(posterior, scale=fitted_scale(posterior, observation, references, state.sigma2))
        with beside("rotate back"):
            return posterior, band.accumulate(posterior, observation, batch, spectra)

    so_far.close_part(parts)  # it may have been left at the end of one
    with Ahead(particles, plan.device) as ahead:
        for posterior, sums in plan.over_batches(ahead, e_step, beside, progress, name, parts, so_far.done):
            so_far.add(posterior, sums)
            so_far.close_part(parts)
            clock.take(beside)

    with clock("maximization"):
        order, posteriors = np.concatenate(parts), so_far.posteriors
        total, merged = band.symmetrise(so_far.total), scattered([(order, join(posteriors))])
        agreement, r_max = band.evidence(so_far.total, total)
        new = replace(maximize(plan, band, state, total), r_max=r_max)
        total = total.together()
        if plan.options.scale_correction:
            scales = np.concatenate([p.scale for p in posteriors if p.scale is not None])
            new.scale = new_scale(state.scale, scales[np.argsort(order)])
        reseeded: list[int] = []
        if plan.reseeds(new.iteration):
            gain = np.concatenate([p.gain for p in posteriors])[np.argsort(order)]
            new, reseeded = reseed(plan, particles, new, merged, gain, progress)
        likelihood = total.log_evidence + log_normaliser(total.observed, state.group_sigma2, state.zeta, total.n)
    row = record(plan, band, checkpoint, new, merged, total, likelihood, clock)
    row = replace(row, agreement=None if agreement is None else [round(float(a), 4) for a in agreement])
    row = replace(row, reseeded=reseeded)
    if plan.finds_axes(new.iteration):
        new, merged = onto_axes(plan, band, new, merged)
    return Checkpoint(new, merged, [*checkpoint.history, row])


def maximize(plan: Plan, band: Band, old: State, by_part: maximization.Accumulators) -> State:
    """New A, alpha, sigma, zeta from the sums of the E-step (Eq. 10-13)."""
    total, apart = by_part.together(), None
    noise = band.noise_of_averages(by_part)
    maps, unseen = new_averages(plan, band, total, noise)
    if plan.options.choices.folds > 1:

        def without(fold: int) -> tuple[Float32, Float32 | None]:
            return new_averages(plan, band, by_part.without(fold), noise, fold)

        held_out = list(in_order(without, range(by_part.parts), plan.at_once))
        apart = np.stack([averages for averages, _ in held_out])
        if unseen is not None:
            unseen = np.concatenate([power for _, power in held_out if power is not None])
    per_shell, relative = plan.options.choices.noise == "shell", None
    sigma2 = maximization.new_sigma2(
        total.residual.sum(axis=0), total.observed.sum(axis=0), old.sigma2, per_shell=per_shell
    )
    if old.relative_noise is not None:
        relative = maximization.new_relative_noise(
            total.residual, total.observed, old.group_sigma2, sigma2, per_shell=per_shell
        )
    return State(
        iteration=old.iteration + 1,
        maps=maps,
        # Half a particle at least, so that a class without particles is not out for good.
        alpha=np.maximum(total.mass, 0.5) / np.maximum(total.mass, 0.5).sum(),
        sigma2=sigma2,
        zeta=maximization.new_zeta(total.shift2, total.n),
        apart=apart,
        unseen=unseen,
        relative_noise=relative,
        noise_groups=old.noise_groups,
        seen=maximization.coverage_planes(total.weights, total.mass, band.output.to("cpu")),
    )


def new_averages(
    plan: Plan,
    band: Band,
    total: maximization.Accumulators,
    noise: NDArray[np.float64],
    fold: int | None = None,
) -> tuple[Float32, Float32 | None]:
    """New A (K, N, N, N) (Eq. 10), and what is unseen of them (1, N, N, N//2 + 1) where that counts.

    fold: of the particles, which `total` leaves out.
    """
    unseen = None
    if plan.update == "ratio":
        averages = maximization.direct_average(total.sums, total.weights, total.mass)
    elif plan.update == "wiener":
        averages = maximization.direct_average(total.sums, total.weights, total.mass)
        factor, unseen = band.wiener(averages, total, noise)
        averages *= factor
    else:
        averages = maximization.update_average(total.sums, total.weights, total.mass, band.averages(fold), band.inside)
    maps = plan.helical(plan.to_maps(averages, band.output))
    for k in np.nonzero(total.mass <= 0)[0]:
        maps[k] = band.unmasked(fold)[k]  # an empty class keeps its average, to be won back
    return plan.regularise(maps, total.mass, band.state.iteration + 1), unseen
