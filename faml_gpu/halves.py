"""Two halves of the particles averaged apart: how far they agree is what the data say by themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from faml_gpu import faml, fourier, maximization, metrics
from faml_gpu.array_backend import cpu_threads, use_device
from faml_gpu.data import Batch, BestPoses, Checkpoint, Groups, ParticleSource, Poses, Posterior, Progress, Result
from faml_gpu.device_info import choose_device
from faml_gpu.errors import InputError
from faml_gpu.fsc import (
    FscCurves,
    fsc_weight,
    fsc_with_mask,
    lowpass,
    observed_voxels,
    resolution_at,
    sharpen,
    shell_filter,
)
from faml_gpu.io.star import StarTable
from faml_gpu.options import Options
from faml_gpu.plan import Plan, resolve
from faml_gpu.starting import average_sums, start

__all__ = [
    "HalfMaps",
    "Subset",
    "run_halves",
    "split_halves",
    "stated_halves",
]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

GOLD_STANDARD = 0.143
LEAK = 1  # shells beyond the start's band into which the particle's mask spreads it
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
        if poses is None:
            return None
        classes = None if poses.classes is None else poses.classes[self.indices]
        return Poses(poses.rotations[self.indices], poses.shifts[self.indices], classes)

    @property
    def groups(self) -> Mapping[str, Groups]:
        """Those of the source, of its particles."""
        return {kind: Groups(g.names, g.index[self.indices]) for kind, g in self.source.groups.items()}

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
    curves : FscCurves, over the voxels both halves observed, corrected for the mask
    resolution : Angstrom, at FSC 0.143; that of the start where nothing finer is shown
    start_resolution : Angstrom, low-pass of the common start
    beyond_start : the halves agree on more than the start gave them, see `run_halves`
    pose : (R, t) of half 2 with respect to half 1, t in voxels, as found
    best : pose of each particle with respect to `average`; arrays of length n
    results : of the two runs, each in its own frame
    voxel_size : Angstrom
    """

    half: Int64
    maps: Float32
    average: Float32
    final: Float32
    curves: FscCurves
    resolution: float
    start_resolution: float
    beyond_start: bool
    pose: tuple[Float64, Float64]
    best: BestPoses
    results: tuple[Result, Result]
    voxel_size: float


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
    initial_lowpass : Angstrom; None is the band at which a run from nothing begins
    half : (n,) 1 or 2 for each particle; None takes the STAR file's rlnRandomSubset, or else a split by the seed
    mask : (N, N, N) for the FSC; None is the soft sphere of the alignment
    b_factor : square Angstrom, for the final map; negative sharpens
    checkpoints : of the two runs, to go on from
    on_iteration : gets the half, 1 or 2, and its checkpoint after each iteration
    progress : progress(step, done, total)

    Returns
    -------
    HalfMaps

    Raises
    ------
    InputError
        Fewer than two particles, an empty half, options or maps that do not fit.
    """
    options = replace(options, n_classes=1, starts=1)
    half = _halves(particles, half, options.seed)
    box, voxel = particles.box, particles.voxel_size
    if mask is not None and mask.shape != (box,) * 3:
        raise InputError(f"mask: found a box of {mask.shape} voxels, expected {(box,) * 3} as the particles")
    if initial_lowpass is None:
        initial_lowpass = box * voxel / resolve(options, box, voxel)["r_start"] * (1 - 1e-9)
    if not initial_lowpass > 0:
        raise InputError(f"option initial-lowpass: found {initial_lowpass!r}, expected more than 0 A")
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
                on_iteration=None if on_iteration is None else _numbered(on_iteration, number),
                progress=progress,
            )
        )
    radius = plan.mask_radius * voxel
    rotation, shift, _, _ = metrics.align_map(
        runs[1].maps[0], runs[0].maps[0], voxel_size=voxel, mask_radius=radius, resolution=initial_lowpass
    )
    moved = _in_frame(runs[1].posterior, rotation, shift)
    with cpu_threads(options.threads), use_device(device):
        sums = [
            average_sums(plan, Subset(particles, np.flatnonzero(half == number)), posterior, progress)
            for number, posterior in ((1, runs[0].posterior), (2, moved))
        ]
    support = fourier.make_support(box, fourier.full_band(box))
    maps = np.concatenate([plan.to_maps(maximization.direct_average(*s), support) for s in sums])
    average = plan.to_maps(maximization.direct_average(*(a + b for a, b in zip(*sums, strict=True))), support)[0]
    seen = [support.scatter(weights / mass[:, None])[0] for _, weights, mass in sums]
    window = plan.mask if mask is None else mask
    curves = fsc_with_mask(maps[0], maps[1], window, observed=observed_voxels(seen[0], seen[1]), seed=options.seed)
    beyond = _beyond(curves, int(box * voxel / initial_lowpass), window)
    resolution = resolution_at(curves.corrected, GOLD_STANDARD, voxel, box) if beyond else initial_lowpass
    return HalfMaps(
        half=half,
        maps=maps,
        average=average,
        final=_final(average, curves, resolution, voxel, b_factor),
        curves=curves,
        resolution=resolution,
        start_resolution=initial_lowpass,
        beyond_start=beyond,
        pose=(rotation, shift),
        best=_joint_poses(half, runs[0].best, runs[1].best, rotation, shift),
        results=(runs[0], runs[1]),
        voxel_size=voxel,
    )


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


def _numbered(call: Callable[[int, Checkpoint], None], number: int) -> Callable[[Checkpoint], None]:
    return lambda checkpoint: call(number, checkpoint)


def _in_frame(posterior: Posterior, rotation: Float64, shift: Float64) -> Posterior:
    """Poses with respect to the reference of which the average they belong to is a copy in the pose (R, t)."""
    return replace(
        posterior,
        rotations=np.ascontiguousarray(posterior.rotations @ rotation),
        shifts=posterior.shifts + posterior.rotations @ shift,
    )


def _joint_poses(half: Int64, first: BestPoses, second: BestPoses, rotation: Float64, shift: Float64) -> BestPoses:
    """The poses of all particles in their order, in the frame of half 1."""
    place = np.concatenate([np.flatnonzero(half == 1), np.flatnonzero(half == 2)])
    order = np.argsort(place)
    shifts = np.concatenate([first.shifts, second.shifts + second.rotations @ shift])
    return BestPoses(
        np.concatenate([first.classes, second.classes])[order],
        np.concatenate([first.rotations, second.rotations @ rotation])[order],
        shifts[order],
        np.concatenate([first.probability, second.probability])[order],
    )


def _beyond(curves: FscCurves, shell: int, mask: Float32) -> bool:
    """Whether the halves agree from two shells beyond the start's last one up to the crossing of 0.143."""
    below = np.flatnonzero(curves.corrected[1:] < GOLD_STANDARD) + 1
    end = int(below[0]) if len(below) else len(curves.corrected)
    looked = slice(shell + LEAK + 1, end)
    # Multiplying by a mask leaves as many independent numbers as it has voxels.
    square = np.asarray(mask, np.float64) ** 2
    inside = square.sum() ** 2 / (square**2).sum() / mask.size
    radius = np.arange(len(curves.corrected)) + 0.5
    numbers = 4 / 3 * np.pi * np.diff(radius**3, prepend=0.0) * inside * curves.observed
    total = numbers[looked].sum()
    return bool(total > 0 and (curves.corrected * numbers)[looked].sum() > SURE * np.sqrt(total))


def _final(average: Float32, curves: FscCurves, resolution: float, voxel: float, b_factor: float | None) -> Float32:
    """The average of all particles, FSC-weighted, nothing of it finer than the resolution."""
    weighted = shell_filter(average, fsc_weight(curves.corrected))
    if b_factor is not None:
        weighted = sharpen(weighted, b_factor, voxel)
    return lowpass(weighted, resolution, voxel) if np.isfinite(resolution) else np.zeros_like(weighted)
