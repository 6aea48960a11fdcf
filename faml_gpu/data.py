"""What is passed between the steps: particles, parameters, posteriors, results. No files, no algorithms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Batch",
    "Checkpoint",
    "Groups",
    "IterationRecord",
    "ParticleSource",
    "Poses",
    "Posterior",
    "Result",
    "State",
    "frames_of",
]

Float32 = NDArray[np.float32]
Boxes = NDArray[np.float32] | NDArray[np.float16]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Boxes read together, with the distinct Fourier weights they need.

    Attributes
    ----------
    boxes : (B, N, N, N) float32, or float16 where they are stored so, `[z, y, x]`, as read (not yet normalised)
    weights : (W, N, N, N//2 + 1) float32, 0 or more; in [0, 1] where the boxes are not premultiplied
        rfftn layout (not shifted), axes `[kz, ky, kx]`; one per distinct weight of the batch.
    weight_index : (B,) int64
        Row of `weights` for each box.
    weight_ids : W hashable names
        The same name means the same weight in any batch (what is computed from it can be kept).
    multiplied : as `weights`, or None
        What the transforms of premultiplied boxes were multiplied by, 0 where it is too small to divide by. Their
        noise has a variance in proportion to it, that of others is the same wherever they were observed.
    noise_rows : (B,) int64, or None
        Where the weights are relative to each particle's noise (`noise.NoiseGroups.weigh`): which curve it has.
    scale : (B,) float64, or None
        Where they are relative to its scale too: the scale.
    """

    boxes: Boxes
    weights: Float32
    weight_index: Int64
    weight_ids: tuple[str, ...]
    multiplied: Float32 | None = None
    noise_rows: Int64 | None = None
    scale: Float64 | None = None


@dataclass(frozen=True)
class Groups:
    """Which particles belong together: `names` of the G groups, `index` (n,) int64 the group of each particle."""

    names: tuple[str, ...]
    index: Int64


@dataclass(frozen=True)
class Poses:
    """One pose per particle: `rotations` (n, 3, 3) float64, `shifts` (n, 3) float64 in voxels, (x, y, z).

    `classes` (n,) int64 from 0 where the input gives them, else None.
    """

    rotations: Float64
    shifts: Float64
    classes: Int64 | None = None

    def take(self, rows: Int64) -> Poses:
        """Those of some particles."""
        classes = None if self.classes is None else self.classes[rows]
        return Poses(self.rotations[rows], self.shifts[rows], classes)


class ParticleSource(Protocol):
    """Where the E-step reads its particles from: a STAR file, a folder of boxes, or arrays."""

    @property
    def box(self) -> int: ...

    @property
    def voxel_size(self) -> float:
        """Angstrom per voxel."""

    @property
    def poses(self) -> Poses | None:
        """The poses the input came with, or None."""

    @property
    def groups(self) -> Mapping[str, Groups]:
        """Groups the input tells of, by kind: "optics", "tomogram"; empty where it tells of none."""

    def __len__(self) -> int: ...

    def read(self, indices: Int64) -> Batch: ...


def frames_of(source: ParticleSource) -> Float64:
    """A_sub of each box, (n, 3, 3): `source.frames`, the identity where a source has none.

    It takes vectors in the frame a box was cut in to that of its tomogram. Poses are in the box, weights too: it is
    wanted only where something of the tomogram's counts, such as the direction of its beam.
    """
    frames: Float64 | None = getattr(source, "frames", None)
    return np.tile(np.eye(3), (len(source), 1, 1)) if frames is None else frames


@dataclass
class State:
    """The parameters Theta of the model.

    Attributes
    ----------
    iteration : number of completed iterations
    maps : (K, N, N, N) float32, the class averages A_k
    alpha : (K,) float64, class proportions, sum 1
    sigma2 : (S,) float64, noise variance per Fourier shell |xi| = 0 .. S - 1 (all equal for a single sigma),
        of the complex coefficient of the unscaled DFT, over all particles
    zeta : standard deviation of the shifts, voxels
    unseen : (F or 1, N, N, N//2 + 1) float32 or None, the power the averages (those without each fold) are expected to
        have at a Fourier voxel beside what the particles have told, see `maximization.wiener_factor`
    apart : (F, K, N, N, N) float32 or None, the class averages without the particles of each fold
    seen : (K, 3, N, N) float32 or None, what was measured of each average, see `maximization.coverage_planes`: to be
        looked at, nothing follows from it
    r_max : Fourier shells the data back, where they decide how far the band may reach, see `resolution`
    relative_noise : (G, S) float64 or None, noise variance of each group of particles over `sigma2`, see `noise`; None
        where all share one curve
    noise_groups : (G,) str or None, names of these groups
    scale : (n,) float64 or None, what the average is multiplied by in each particle; None is 1
    """

    iteration: int
    maps: Float32
    alpha: Float64
    sigma2: Float64
    zeta: float
    unseen: Float32 | None = None
    relative_noise: Float64 | None = None
    noise_groups: NDArray[np.str_] | None = None
    scale: Float64 | None = None
    r_max: int | None = None
    apart: Float32 | None = None
    seen: Float32 | None = None

    @property
    def group_sigma2(self) -> Float64:
        """Noise variance (G, S) of each group, (1, S) where all share one curve."""
        return self.sigma2[None] if self.relative_noise is None else self.sigma2 * self.relative_noise


@dataclass
class Posterior:
    """Poses that carry posterior mass, flat over all particles, sorted by particle.

    particle (n,) int64; class_index (n,) int64 from 0; rotations (n, 3, 3); shifts (n, 3) voxels;
    probability (n,), summing to 1 per particle. Per particle, N long: `log_likelihood` (N,) its
    contribution to L; `n_significant` (N,) int64 the number of poses kept for it;
    `class_probability` (N, K).
    """

    particle: Int64
    class_index: Int64
    rotations: Float64
    shifts: Float64
    probability: Float64
    log_likelihood: Float64
    n_significant: Int64
    class_probability: Float64


@dataclass(frozen=True)
class BestPoses:
    """Most probable class per particle and the best pose in it, see `posteriors.best_poses`; arrays of length N.

    `probability` is the largest of a pose of that class (rlnMaxValueProbDistribution).
    """

    classes: Int64
    rotations: Float64
    shifts: Float64
    probability: Float64


@dataclass
class IterationRecord:
    """What one iteration did: a row of the history, JSON-ready through `dataclasses.asdict`."""

    iteration: int
    log_likelihood: float
    sigma: float  # root of the mean noise variance over the active support
    zeta: float  # voxels
    alpha: list[float]
    class_sizes: list[int]  # particles whose most probable class it is
    r_max: int  # Fourier voxels
    resolution: float  # Angstrom, N * voxel / r_max
    bandwidth: int
    candidates: float  # mean per particle and class
    changed_class: float  # share of particles
    pose_change: float  # median angle to the nearest pose of the iteration before, degrees
    map_correlation: list[float]  # with the previous averages, per class
    near_identity: float  # share of poses within 10 degrees of the identity
    coverage: list[float]  # share of each class's Fourier voxels observed at least once
    converged: bool
    seconds: dict[str, float] = field(default_factory=dict)
    agreement: list[float] | None = None  # of two halves of the particles, per Fourier shell, see `resolution`
    reseeded: list[int] = field(default_factory=list)  # classes, from 0, begun anew after it, see `reseeding`
    starts: list[float] | None = None  # log-likelihood of each random start after this iteration; the highest goes on
    part: str = ""  # of a run in several parts (`halves`): which this is


@dataclass
class Checkpoint:
    """All that is needed to go on after an iteration (all randomness derives from the seed and the iteration)."""

    state: State
    posterior: Posterior
    history: list[IterationRecord]


@dataclass
class Result:
    """What `average` and `classify` return.

    `maps` (K, N, N, N) float32: the final class averages at full band, background near 0;
    `best`: class and pose per particle; `history`: one record per iteration;
    `converged_at`: the iteration at which the stopping rule first held, or None;
    `options`: every option as resolved (JSON-ready); `state`, `posterior`: for going on from Python.
    """

    maps: Float32
    best: BestPoses
    posterior: Posterior
    state: State
    history: list[IterationRecord]
    converged_at: int | None
    options: dict[str, Any]
    voxel_size: float


Progress = Callable[[str, int, int], None]  # (step name, done, total)


def progress_of(part: str, progress: Progress | None) -> Progress | None:
    """Progress within a part of a run: the part's name before each step's."""
    if progress is None:
        return None
    return lambda name, done, total: progress(f"{part}, {name}", done, total)
