"""Theta before the first iteration (section 2.4), and averages over a given posterior."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from faml_gpu import fourier, maximization, symmetry
from faml_gpu.array_backend import Array, to_host
from faml_gpu.data import Batch, Checkpoint, ParticleSource, Poses, Posterior, Progress, State
from faml_gpu.geometry import random_rotations
from faml_gpu.noise import noise_groups
from faml_gpu.plan import Band, Clock, Plan
from faml_gpu.posteriors import gathered, in_frame, one_hot
from faml_gpu.reading import Ahead
from faml_gpu.symmetry_axes import find_axes, moved_onto_axes

__all__ = ["average_sums", "final_averages", "fold_averages", "onto_axes", "start"]

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


def start(
    plan: Plan,
    particles: ParticleSource,
    reference: Float32 | None,
    poses: Poses | None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Random equal split into K classes, each average the mean of its boxes as they lie, divided by its coverage.

    Of several random starts, all but the first take the boxes turned at random: for one class there is no other.
    With `poses`, the boxes lie in these (and in their classes, where those are 1 .. K). A `reference` takes the place
    of the averages. Both are low-passed as the plan says. Noise from random particles; shifts as wide as the box.
    """
    n, n_classes = len(particles), plan.options.n_classes
    rng = plan.rng(0)
    classes = rng.permutation(np.arange(n) % n_classes)
    rotations, shifts = np.tile(np.eye(3), (n, 1, 1)), np.zeros((n, 3))
    if plan.trial:
        rotations = random_rotations(n, rng)
    if poses is not None:
        rotations, shifts = poses.rotations, poses.shifts
        if poses.classes is not None and set(poses.classes) == set(range(n_classes)):
            classes = poses.classes
    posterior = one_hot(classes, rotations, shifts, n_classes, known=poses is not None)
    maps, apart = fold_averages(plan.with_symmetry(plan.symmetry(0)), particles, posterior, progress)
    # The paper takes one random particle and class; a curve per shell needs a few of them to be smooth.
    most, groups = 1 if plan.options.choices.noise == "single" else 20, noise_groups(particles, plan.options)
    curves = []
    for members in map(groups.members, range(len(groups))):
        chosen = np.sort(rng.choice(members, min(len(members), most), replace=False))
        curves.append(_initial_sigma2(plan, particles, chosen, maps, posterior))
    if reference is not None:
        maps, apart = np.repeat(plan.scaled_like(reference, maps.mean(axis=0))[None], n_classes, axis=0), None

    def prepared(maps: Float32, members: Int64) -> Float32:
        if reference is not None or poses is not None:
            maps = plan.lowpass(maps)
        return plan.regularise(maps, np.bincount(classes[members], minlength=n_classes).astype(np.float64), 0)

    everyone = np.arange(n)
    maps = prepared(maps, everyone)
    if apart is not None:
        others = [np.setdiff1d(everyone, part) for part in plan.parts(n)]
        apart = np.stack([prepared(without, members) for without, members in zip(apart, others, strict=True)])
    state = State(0, maps, np.full(n_classes, 1 / n_classes), curves[0], float(plan.box), apart=apart)
    if len(groups) > 1:
        state.relative_noise, state.noise_groups = np.stack(curves) / curves[0], np.array(groups.names)
    return Checkpoint(state, posterior, [])


def _initial_sigma2(
    plan: Plan, particles: ParticleSource, chosen: Int64, maps: Float32, posterior: Posterior
) -> NDArray[np.float64]:
    """Mean of w^2 |X - A|^2 over the observed voxels (see `noise_sums`), per Fourier shell or over all of them."""
    support = fourier.make_support(plan.box, fourier.full_band(plan.box))
    batch = particles.read(chosen)
    spectra = support.gather(plan.spectra(batch))
    weights = support.gather(batch.weights)[batch.weight_index]
    average = support.gather(fourier.transform(maps * plan.mask))
    phases = np.exp(-2j * np.pi / plan.box * posterior.shifts[chosen] @ support.coords.T)
    lies = np.abs(posterior.rotations[chosen] - np.eye(3)).max(axis=(1, 2)) < 1e-9
    # A box that does not lie as its average does has no simple difference: all its power counts as noise.
    model = average[posterior.class_index[chosen]] * phases * lies[:, None]
    residual = support.shell_sums(weights**2 * np.abs(spectra - model) ** 2).sum(axis=0)
    observed = support.shell_sums(weights**2 if batch.multiplied is None else weights > 0).sum(axis=0)
    flat = np.full(plan.n_shells, residual.sum() / max(observed.sum(), 1.0))
    if plan.options.choices.noise == "single":
        return flat
    return maximization.new_sigma2(residual, observed, flat, per_shell=True)


def final_averages(
    plan: Plan,
    particles: ParticleSource,
    posterior: Posterior,
    progress: Progress | None = None,
    state: State | None = None,
) -> Float32:
    """Wedge-weighted averages (K, N, N, N) at full band over a posterior, divided by their coverage.

    With the `state` the posterior belongs to, particles are also weighted by their noise and scale.
    """
    averages = maximization.direct_average(*average_sums(plan, particles, posterior, progress, state))
    support = fourier.make_support(plan.box, fourier.full_band(plan.box)).to(plan.device)
    return plan.helical(plan.to_maps(averages, support))


def fold_averages(
    plan: Plan,
    particles: ParticleSource,
    posterior: Posterior,
    progress: Progress | None = None,
    state: State | None = None,
    *,
    r_max: int | None = None,
    members: Int64 | None = None,
) -> tuple[Float32, Float32 | None]:
    """The same, and those without each fold of the particles (F, K, N, N, N); None where there is one fold.

    Up to `r_max`, if given, and of `members` only.
    """
    n = len(particles)
    wanted = np.arange(n) if members is None else members
    parts = plan.parts(n) if plan.options.choices.folds > 1 else [np.arange(n)]
    parts, sums, done = [np.intersect1d(p, wanted) for p in parts], [], 0
    for part in parts:
        told = None if progress is None else _out_of(len(wanted), done, progress)
        sums.append(average_sums(plan, particles, posterior, told, state, part))
        done += len(part)
    total = [np.sum([s[i] for s in sums], axis=0) for i in range(3)]
    support = fourier.make_support(plan.box, fourier.full_band(plan.box)).to(plan.device)
    inside = to_host(support.shell) <= (plan.box if r_max is None else r_max)

    def averages(sums: NDArray[np.complex128], weights: NDArray[np.float64], mass: NDArray[np.float64]) -> Float32:
        return plan.helical(plan.to_maps(maximization.direct_average(sums, weights, mass) * inside, support))

    if len(parts) == 1:
        return averages(*total), None
    apart = [averages(*(t - o for t, o in zip(total, own, strict=True))) for own in sums]
    return averages(*total), np.stack(apart)


def _out_of(total: int, before: int, progress: Progress) -> Progress:
    """Progress within a part of the particles as that of all, `before` of them being done."""
    return lambda name, done, _: progress(name, before + done, total)


def average_sums(
    plan: Plan,
    particles: ParticleSource,
    posterior: Posterior,
    progress: Progress | None = None,
    state: State | None = None,
    members: Int64 | None = None,
) -> tuple[NDArray[np.complex128], NDArray[np.float64], NDArray[np.float64]]:
    """Sums and weights (K, M) and mass (K,) of the M-step at full band, symmetry imposed; `state` as above.

    Of all particles, or of `members`.
    """
    support = fourier.make_support(plan.box, fourier.full_band(plan.box)).to(plan.device)
    n_classes = posterior.class_probability.shape[1]
    sums = np.zeros((n_classes, len(support)), np.complex128)
    weights = np.zeros((n_classes, len(support)))
    clock = Clock(plan.device)
    groups = None if state is None else noise_groups(particles, plan.options, state)

    def add(_: int, batch: Batch, spectra: Array, numbers: Int64) -> tuple[Array, Array]:
        part = gathered(posterior, numbers)
        if state is not None and groups is not None:
            batch, spectra = groups.weigh(batch, spectra, numbers, state)
        with clock("rotate back"):
            return plan.rotate_back(part, batch, spectra, support, n_classes)

    parts = None if members is None else [members]
    with Ahead(particles, plan.device) as ahead:
        for s, w in plan.over_batches(ahead, add, clock, progress, "averages", parts):
            sums += to_host(s)
            weights += to_host(w)
    counted = posterior if members is None else gathered(posterior, members)
    mass = np.bincount(counted.class_index, counted.probability, minlength=n_classes).astype(np.float64)
    return *plan.symmetrise(sums, weights, support, plan.options.symmetry), mass


def onto_axes(plan: Plan, band: Band, state: State, posterior: Posterior) -> tuple[State, Posterior]:
    """Averages and poses moved so that the axes of the structure's point group are where `symmetry` has them."""
    group = symmetry.point_group(plan.options.symmetry)
    support = fourier.make_support(plan.box, max(band.r_max, band.r_output))
    maps, apart = state.maps.copy(), None if state.apart is None else state.apart.copy()
    for k, volume in enumerate(state.maps):
        if not volume.any():
            continue
        axes = find_axes(volume, plan.mask, band.r_max, plan.bandwidth(band.r_max), group)
        maps[k] = plan.to_maps(moved_onto_axes(volume, axes, group, support)[None], support)[0]
        if apart is not None:
            moved = [moved_onto_axes(m, axes, group, support) for m in apart[:, k]]
            apart[:, k] = plan.to_maps(np.stack(moved), support)
        posterior = in_frame(posterior, axes.rotation, axes.shift, k)
    return replace(state, maps=maps, apart=apart, unseen=None, seen=None), posterior
