"""Two halves of the particles averaged apart: how far they agree is what the data say by themselves.

`run_halves` for one structure, from one common, low-passed start. `refine_halves` for a run that has found such starts,
one in each class: it must not have used anything finer than their low-pass (`common_lowpass`), or else what the halves
show beyond it is not their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from faml_gpu import faml, fourier, maximization, metrics, symmetry
from faml_gpu.array_backend import use_device
from faml_gpu.data import (
    Batch,
    BestPoses,
    Checkpoint,
    Groups,
    ParticleSource,
    Poses,
    Posterior,
    Progress,
    Result,
    frames_of,
    progress_of,
)
from faml_gpu.device_info import choose_device
from faml_gpu.errors import InputError
from faml_gpu.fsc import (
    FscCurves,
    check_b_factor,
    final_map,
    fsc_with_mask,
    observed_voxels,
    resolution_at,
)
from faml_gpu.geometry import euler_to_matrix
from faml_gpu.io.star import StarTable
from faml_gpu.masks import independent_share
from faml_gpu.options import Options
from faml_gpu.plan import Plan, resolve
from faml_gpu.posteriors import best_poses, gathered, in_frame, scattered
from faml_gpu.resolution import LEAK
from faml_gpu.starting import average_sums, start
from faml_gpu.threads import cpu_threads
from faml_gpu.unfinished import Unfinished

__all__ = [
    "GOLD_STANDARD",
    "HalfMaps",
    "HalvesResult",
    "Subset",
    "common_lowpass",
    "refine_halves",
    "run_halves",
    "split_halves",
    "stated_halves",
    "together_options",
]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

GOLD_STANDARD = 0.143
TELLING = 2  # times the coarsest band that tells orientations apart: the low-pass of a common start
SURE = 3.0  # standard errors by which shells beyond the start must agree


@dataclass(frozen=True)
class Subset:
    """Some particles of a source, as a ParticleSource.

    Attributes
    ----------
    source : ParticleSource
    indices : (n,) int64, which of its particles, in this order
    """

    source: ParticleSource
    indices: Int64

    @property
    def box(self) -> int:
        """N, voxels."""
        return self.source.box

    @property
    def voxel_size(self) -> float:
        """Angstrom."""
        return self.source.voxel_size

    @property
    def poses(self) -> Poses | None:
        """Those of the source's particles."""
        poses = self.source.poses
        return None if poses is None else poses.take(self.indices)

    @property
    def groups(self) -> Mapping[str, Groups]:
        """Those of the source, of its particles."""
        return {kind: Groups(g.names, g.index[self.indices]) for kind, g in self.source.groups.items()}

    @property
    def frames(self) -> Float64:
        """Those of the source's particles, see `data.frames_of`."""
        return frames_of(self.source)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: Int64) -> Batch:
        """See `faml_gpu.data.ParticleSource`."""
        return self.source.read(self.indices[indices])


def split_halves(n: int, seed: int) -> Int64:
    """Half 1 or 2 of each of n particles, (n,) int64: at random, of equal size or one more in half 1."""
    half = np.arange(n) % 2 + 1
    return np.random.default_rng([seed, 2]).permutation(half)


def stated_halves(particles: ParticleSource) -> Int64 | None:
    """The halves the input says (rlnRandomSubset of its STAR file), (n,) int64, or None.

    Particles that were refined in separate halves before stay separate: a new split would mix what they learned.

    Raises
    ------
    InputError
        A value that is neither 1 nor 2.
    """
    if isinstance(particles, Subset):
        whole = stated_halves(particles.source)
        return None if whole is None else whole[particles.indices]
    table = getattr(particles, "table", None)
    if not isinstance(table, StarTable) or "rlnRandomSubset" not in table.columns:
        return None
    values = table.floats("rlnRandomSubset")
    wrong = np.flatnonzero((values != 1) & (values != 2))
    if len(wrong):
        row = int(wrong[0])
        raise InputError(f"{table.row_name(row)}: rlnRandomSubset is {values[row]:g}, expected 1 or 2")
    return values.astype(np.int64)


@dataclass(frozen=True)
class HalfMaps:
    """What `run_halves` finds. Maps are in the frame of half 1.

    Attributes
    ----------
    half : (n,) int64, 1 or 2: the half of each particle
    maps : (2, N, N, N) float32, the halves' averages, not filtered
    average : (N, N, N) float32, of all particles in the poses found in their halves, not filtered
    final : (N, N, N) float32, `average` weighted by the FSC, cut off where it ends, sharpened if asked for
    b_factor : by which it is, square Angstrom; None where it is not
    curves : FscCurves, over the voxels both halves observed, corrected for the mask
    resolution : Angstrom, at FSC 0.143; that of the start where nothing finer is shown
    start_resolution : Angstrom, low-pass of the common start
    beyond_start : the halves agree on more than the start gave them, see `run_halves`
    pose : (R, t) of half 2 with respect to half 1, t in voxels, as found
    posterior : poses of each particle with respect to `average`
    best : the best of them; arrays of length n
    results : of the two runs, each in its own frame
    voxel_size : Angstrom
    """

    half: Int64
    maps: Float32
    average: Float32
    final: Float32
    b_factor: float | None
    curves: FscCurves
    resolution: float
    start_resolution: float
    beyond_start: bool
    pose: tuple[Float64, Float64]
    posterior: Posterior
    best: BestPoses
    results: tuple[Result, Result]
    voxel_size: float


def common_lowpass(options: Options, box: int, voxel_size: float, asked: float | None = None) -> float:
    """Low-pass of the start that two halves share, Angstrom.

    Unless asked for, a sixth of the mask's diameter, twice the detail that tells orientations apart at the coarsest;
    but at most half of the Fourier shells that the alignment uses, so that finer ones are left to be compared.

    Raises
    ------
    InputError
        Asked for less than three Fourier shells, or for so many that none is left to be compared.
    """
    size, full = box * voxel_size, fourier.full_band(box)
    resolved = resolve(replace(options, starts=1), box, voxel_size, 2 * voxel_size)
    if asked is None:
        coarsest = size / (2 * resolved["mask_radius"] / 3)
        shells = int(np.clip(round(TELLING * coarsest), 3, max(round(coarsest), resolved["r_max"] // 2)))
        return float(size / shells * (1 - 1e-9))
    if not (asked > 0 and 3 <= int(size / asked) <= full - LEAK - 1):
        raise InputError(
            f"option initial-lowpass: found {asked:g} A, expected {size / (full - LEAK - 1):.4g} to {size / 3:.4g} A "
            "for halves, which are compared beyond it"
        )
    return asked


def run_halves(
    particles: ParticleSource,
    options: Options,
    *,
    reference: Float32 | None = None,
    initial_lowpass: float | None = None,
    half: Int64 | None = None,
    mask: Float32 | None = None,
    b_factor: float | None = None,
    checkpoints: tuple[Checkpoint | None, Checkpoint | None] = (None, None),
    on_iteration: Callable[[int, Checkpoint], None] | None = None,
    on_begin: Callable[[int, Unfinished], None] | None = None,
    progress: Progress | None = None,
) -> HalfMaps:
    """Average two halves of the particles independently, and compare.

    Both runs begin at the same map low-passed to `initial_lowpass`, so that they end near the same pose; beyond that
    low-pass nothing is shared, and what agrees there comes from the data. Half 2 is then brought into register with
    half 1 by the shells the start gave (`metrics.align_map`): its particles' poses are changed, and both halves are
    averaged from the particles again, so that no finished map is interpolated. The averages are divided by their
    coverage; FSC is taken over the Fourier voxels that a tenth of the particles of each half observed.

    Agreement within the start's band says nothing: `beyond_start` asks whether the shells from two beyond it up to the
    crossing of 0.143 agree by three standard errors together, with 1 / sqrt(n) for n independent numbers in the mask.
    Where they do not, the resolution is that of the start, and the final map holds no more.

    Parameters
    ----------
    particles : ParticleSource
        Of one structure: all, or a `Subset` with those of one class.
    options : Options
        n_classes is taken as 1.
    reference : (N, N, N) float32, common start; None is the average of all particles as they lie
    initial_lowpass : Angstrom; None as `common_lowpass` says
    half : (n,) 1 or 2 for each particle; None takes the STAR file's rlnRandomSubset, or else a split by the seed
    mask : (N, N, N) for the FSC; None is the soft sphere of the alignment
    b_factor : square Angstrom, for the final map; negative sharpens
    checkpoints : of the two runs, to go on from
    on_iteration : gets the half, 1 or 2, and its checkpoint after each iteration
    on_begin : gets the half and each iteration as it begins, see `faml.run`
    progress : progress(step, done, total)

    Returns
    -------
    HalfMaps

    Raises
    ------
    InputError
        Fewer than two particles, an empty half, options, maps or a B-factor that do not fit.
    """
    options = replace(options, n_classes=1, starts=1, halves=True)
    half = _halves(particles, half, options.seed)
    box, voxel = particles.box, particles.voxel_size
    check_b_factor(b_factor or 0.0, voxel)
    if mask is not None and mask.shape != (box,) * 3:
        raise InputError(f"mask: found a box of {mask.shape} voxels, expected {(box,) * 3} as the particles")
    initial_lowpass = common_lowpass(options, box, voxel, initial_lowpass)
    device, _ = choose_device(options.device)
    with cpu_threads(options.threads), use_device(device):
        plan = Plan.make(particles, options, initial_lowpass, device)
        if reference is None:
            reference = plan.lowpass(start(plan, particles, None, None).state.maps)[0]
    runs = []
    for number, checkpoint in zip((1, 2), checkpoints, strict=True):
        runs.append(
            faml.run(
                Subset(particles, np.flatnonzero(half == number)),
                replace(options, seed=2 * options.seed + number - 1),
                reference=reference,
                initial_lowpass=initial_lowpass,
                checkpoint=checkpoint,
                on_iteration=None if on_iteration is None else partial(on_iteration, number),
                on_begin=None if on_begin is None else partial(on_begin, number),
                progress=progress_of(f"half {number}", progress),
            )
        )
    radius = plan.mask_radius * voxel
    rotation, shift, _, _ = metrics.align_map(
        runs[1].maps[0], runs[0].maps[0], voxel_size=voxel, mask_radius=radius, resolution=initial_lowpass
    )
    rotation, shift = _keeping_axes(rotation, shift, options)
    moved = in_frame(runs[1].posterior, rotation, shift)
    with cpu_threads(options.threads), use_device(device):
        sums = [
            average_sums(plan, Subset(particles, np.flatnonzero(half == number)), posterior, progress, run.state)
            for number, posterior, run in ((1, runs[0].posterior, runs[0]), (2, moved, runs[1]))
        ]
    support = fourier.make_support(box, fourier.full_band(box))
    together = [a + b for a, b in zip(*sums, strict=True)]
    averages = [plan.to_maps(maximization.direct_average(*s), support)[0] for s in (*sums, together)]
    averages = list(plan.helical(np.stack(averages)))
    maps, average = np.stack(averages[:2]), averages[2]
    seen = [support.scatter(weights / mass[:, None])[0] for _, weights, mass in sums]
    window = plan.mask if mask is None else mask
    curves = fsc_with_mask(maps[0], maps[1], window, observed=observed_voxels(seen[0], seen[1]), seed=options.seed)
    beyond = _beyond(curves, int(box * voxel / initial_lowpass), window, symmetry.order(options.symmetry))
    resolution = resolution_at(curves.corrected, GOLD_STANDARD, voxel, box) if beyond else initial_lowpass
    members = [np.flatnonzero(half == number) for number in (1, 2)]
    posterior = scattered(list(zip(members, (runs[0].posterior, moved), strict=True)))
    return HalfMaps(
        half=half,
        maps=maps,
        average=average,
        final=final_map(average, curves.corrected, resolution, voxel, b_factor),
        b_factor=b_factor or None,
        curves=curves,
        resolution=resolution,
        start_resolution=initial_lowpass,
        beyond_start=beyond,
        pose=(rotation, shift),
        posterior=posterior,
        best=best_poses(posterior),
        results=(runs[0], runs[1]),
        voxel_size=voxel,
    )


@dataclass
class HalvesResult(Result):
    """A run and the halves of its classes: `Result` with what the halves found in place of what they began with.

    `maps`, `best` and `posterior` are those of all particles in the poses found in their halves, where a class has
    halves; `history`, `converged_at` and `state` belong to the run of all particles that came before.

    Attributes
    ----------
    half : (n,) int64, 1 or 2: the half of each particle
    halves : of each class; None where the class had no particle for one of them
    """

    half: Int64
    halves: list[HalfMaps | None]


def refine_halves(
    particles: ParticleSource,
    options: Options,
    together: Result,
    *,
    initial_lowpass: float,
    mask: Float32 | None = None,
    checkpoint: Callable[[int, int], Checkpoint | None] | None = None,
    on_iteration: Callable[[int, int, Checkpoint], None] | None = None,
    on_begin: Callable[[int, int, Unfinished], None] | None = None,
    progress: Progress | None = None,
) -> HalvesResult:
    """Average two halves of each class independently, see `run_halves`.

    Parameters
    ----------
    particles : ParticleSource
    options : Options
    together : the run of all particles, which used nothing finer than `initial_lowpass` (`together_options`)
    initial_lowpass : Angstrom, of its averages, with which both halves begin
    mask : (N, N, N) for the FSC of every class; None is the soft sphere of the alignment
    checkpoint : gets class (from 0) and half (1 or 2), gives what to go on from
    on_iteration : gets class, half and the checkpoint after each iteration
    on_begin : gets class, half and each iteration as it begins, see `faml.run`
    progress : progress(step, done, total)
    """
    stated = stated_halves(particles)
    half = np.ones(len(particles), np.int64)
    maps, halves = together.maps.copy(), list[HalfMaps | None]()
    parts: list[tuple[Int64, Posterior]] = []
    for k in range(len(maps)):
        members = np.flatnonzero(together.best.classes == k)
        half[members] = split_halves(len(members), options.seed) if stated is None else stated[members]
        if len(np.unique(half[members])) < 2:
            halves.append(None)
            parts.append((members, gathered(together.posterior, members)))
            continue
        found = run_halves(
            Subset(particles, members),
            options,
            reference=together.maps[k],
            initial_lowpass=initial_lowpass,
            half=half[members],
            mask=mask,
            b_factor=options.b_factor,
            checkpoints=(None, None) if checkpoint is None else (checkpoint(k, 1), checkpoint(k, 2)),
            on_iteration=None if on_iteration is None else partial(on_iteration, k),
            on_begin=None if on_begin is None else partial(on_begin, k),
            progress=progress if len(maps) == 1 else progress_of(f"class {k + 1}", progress),
        )
        halves.append(found)
        # Which class a particle belongs to stays what the run of all particles says.
        of_class = replace(
            found.posterior,
            class_index=np.full_like(found.posterior.class_index, k),
            class_probability=together.posterior.class_probability[members],
        )
        parts.append((members, of_class))
        maps[k] = found.average
    posterior = scattered(parts)
    return HalvesResult(
        maps=maps,
        best=best_poses(posterior),
        posterior=posterior,
        state=together.state,
        history=together.history,
        converged_at=together.converged_at,
        options=resolve(options, particles.box, particles.voxel_size, initial_lowpass),
        voxel_size=together.voxel_size,
        half=half,
        halves=halves,
    )


def together_options(options: Options, box: int, voxel_size: float, initial_lowpass: float) -> Options:
    """Options of the run of all particles before that of their halves: nothing finer than `initial_lowpass` is used.

    Poses and classes that all particles found together by finer detail would fit the noise of that detail in both
    halves alike, and the halves, which begin with an average in these poses, would agree on it.
    """
    size = box * voxel_size
    return replace(options, resolution=max(size / int(size / initial_lowpass), options.resolution or 0.0))


def _halves(particles: ParticleSource, given: Int64 | None, seed: int) -> Int64:
    n = len(particles)
    if given is None:
        given = stated_halves(particles)
    half = split_halves(n, seed) if given is None else np.asarray(given, np.int64)
    if half.shape != (n,) or not np.isin(half, (1, 2)).all():
        raise InputError(f"halves: expected 1 or 2 for each of {n} particles")
    sizes = [int((half == number).sum()) for number in (1, 2)]
    if min(sizes) == 0:
        raise InputError(f"halves: found {sizes[0]} and {sizes[1]} particles, expected some in each")
    return half


def _keeping_axes(rotation: Float64, shift: Float64, options: Options) -> tuple[Float64, Float64]:
    """Of the pose of one average to another, what leaves the axes of a symmetry imposed on both where they are."""
    if options.helix is None and symmetry.order(options.symmetry) == 1:
        return rotation, shift
    if options.symmetry.strip().upper()[0] != "C":
        return np.eye(3), np.zeros(3)
    over = np.diag([1.0, -1.0, -1.0]) if rotation[2, 2] < 0 else np.eye(3)
    about = rotation @ over
    angle = np.arctan2(about[1, 0] - about[0, 1], about[0, 0] + about[1, 1])
    return euler_to_matrix([angle, 0.0, 0.0]) @ over, shift * [0, 0, 1]


def _beyond(curves: FscCurves, shell: int, mask: Float32, copies: int) -> bool:
    """Whether the halves agree from two shells beyond the start's last one up to the crossing of 0.143.

    `copies` : of each independent number, that a symmetry makes
    """
    below = np.flatnonzero(curves.corrected[1:] < GOLD_STANDARD) + 1
    end = int(below[0]) if len(below) else len(curves.corrected)
    looked = slice(shell + LEAK + 1, end)
    radius = np.arange(len(curves.corrected)) + 0.5
    numbers = 4 / 3 * np.pi * np.diff(radius**3, prepend=0.0) * independent_share(mask) * curves.observed / copies
    total = numbers[looked].sum()
    return bool(total > 0 and (curves.corrected * numbers)[looked].sum() > SURE * np.sqrt(total))
