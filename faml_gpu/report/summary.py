"""What a report tells of a run, read from its folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from faml_gpu.data import Poses
from faml_gpu.errors import InputError
from faml_gpu.geometry import beam_directions, rotation_angle
from faml_gpu.io.mrc import read_mrc
from faml_gpu.io.particles import star_poses
from faml_gpu.io.positions import box_frames
from faml_gpu.io.star import read_particles_star
from faml_gpu.run_reader import RunFiles, open_run
from faml_gpu.uncertainty import evenness, preferred_orientations, shifts_at_limit

__all__ = ["RunSummary", "read_summary"]

Float64 = NDArray[np.float64]

MISFIT = 5.0  # median absolute deviations (times 1.4826) below the median of the log-likelihoods
ALL_BUT_ALL = 0.95  # of the particles in one class
NEXT_TO_NONE = 0.01

# What a report needs of run.json.
EXPECTED: dict[str, type | tuple[type, ...]] = {
    "command": list, "status": str, "started": (str, type(None)), "versions": dict, "machine": dict, "device": str,
    "threads": int, "seed": int, "input": dict, "start": dict, "options": dict, "resolved": dict, "iterations": list,
}  # fmt: skip
EXPECTED_WITHIN = {
    "input": ("path", "particles", "box", "voxel_size"),
    "start": ("use_poses", "reference"),
    "resolved": ("iterations", "mask_radius", "max_shift", "resolution"),
}
IN_RECORD = (
    "iteration", "log_likelihood", "sigma", "zeta", "class_sizes", "r_max", "resolution", "changed_class",
    "pose_change", "coverage", "seconds", "converged",
)  # fmt: skip
LOCKED = 0.3  # share of the orientations within 10 degrees of the tomogram's own; of random ones it is 0.0006
NEAR = 10.0  # degrees


@dataclass(frozen=True)
class HalfRun:
    """What a half (1 or 2) of a class (from 1) went through: `history` has a record of each iteration."""

    class_number: int
    half: int
    history: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return f"class {self.class_number}, half {self.half}"


@dataclass(frozen=True)
class RunSummary:
    """A run, or an iteration of it; n particles, K classes.

    Attributes
    ----------
    files : what was read
    maps : (K, N, N, N) float32, averages
    voxel_size : Angstrom
    poses : rotations (n, 3, 3), shifts (n, 3) in voxels, classes (n,) from 0: the best of each particle, in its box
    frames : (n, 3, 3), A_sub of each box, see `io.positions.box_frames`
    confidence : (n,) posterior of the best pose
    class_probability : (n, K), or None where an iteration is read: only the final result has it
    log_likelihood : (n,) contribution of each particle
    planes : (K, 3, N, N) float32, what was measured of the averages, see `maximization.coverage_planes`; or None
    fsc : of each class (or of all, K = 1) that has halves: number of the class, and what postprocess_fsc.json holds
    """

    files: RunFiles
    maps: NDArray[np.float32]
    voxel_size: float
    poses: Poses
    frames: Float64
    confidence: Float64
    class_probability: Float64 | None
    log_likelihood: Float64
    planes: NDArray[np.float32] | None
    fsc: list[tuple[int, dict[str, Any]]]

    @property
    def about(self) -> dict[str, Any]:
        return self.files.about

    @property
    def history(self) -> list[dict[str, Any]]:
        """A record of each iteration up to the one that is read, see `data.IterationRecord`."""
        records: list[dict[str, Any]] = self.about["iterations"]
        return records if self.final else records[: self.iteration]

    @property
    def latest(self) -> bool:
        """Whether it is all that there is by now: what the folder has of later times belongs to it."""
        return self.final or (
            self.about.get("status") != "finished" and self.iteration == len(self.about["iterations"])
        )

    @property
    def halves(self) -> list[HalfRun]:
        """The runs of the halves, as far as they belong to what is read; `history` is that of all particles before."""
        parts = self.about.get("iterations_of_halves", []) if self.latest else []
        return [HalfRun(part["class"], part["half"], part["iterations"]) for part in parts]

    @property
    def final(self) -> bool:
        """Whether it is the result of the whole run."""
        return self.files.stem == "run"

    @property
    def iteration(self) -> int:
        """The one that is read; of the final result the last."""
        return len(self.about["iterations"]) if self.final else int(self.files.stem.removeprefix("run_it"))

    @property
    def options(self) -> dict[str, Any]:
        """As resolved; lengths in Angstrom."""
        resolved: dict[str, Any] = self.about["resolved"]
        return resolved

    @property
    def classes(self) -> NDArray[np.int64]:
        assert self.poses.classes is not None
        return self.poses.classes

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Particles of each class, (K,)."""
        return np.bincount(self.classes, minlength=len(self.maps))

    @cached_property
    def directions(self) -> Float64:
        """Where the beam comes from in the frame of the average, (n, 3), x, y, z.

        RELION's rot and tilt of the pose in the tomogram, A_sub R; where boxes lie as it does, those of the pose.
        """
        return beam_directions(self.poses.rotations, self.frames)

    @cached_property
    def off_centre(self) -> Float64:
        """How far each particle lies off the centre of its box, (n,) Angstrom."""
        return np.asarray(np.linalg.norm(self.poses.shifts, axis=1) * self.voxel_size)

    @cached_property
    def misfit(self) -> Float64:
        """By how many deviations each particle's log-likelihood lies below the median, (n,).

        The deviation is 1.4826 times the median absolute one: that of a normal distribution, whatever the outliers.
        """
        median = np.median(self.log_likelihood)
        spread = 1.4826 * np.median(abs(self.log_likelihood - median))
        return np.asarray((median - self.log_likelihood) / max(spread, np.finfo(np.float64).tiny))

    @property
    def misfits(self) -> NDArray[np.int64]:
        """Particles that fit nowhere, the worst first."""
        worst = np.argsort(-self.misfit, kind="stable")
        return worst[self.misfit[worst] > MISFIT]

    def coverage_of_angles(self, k: int) -> float:
        """How evenly class k was seen: 1 from all sides, 0 from one, see `uncertainty.evenness`."""
        mine = self.directions[self.classes == k]
        return evenness(mine, np.ones(len(mine)))

    @property
    def converged(self) -> bool:
        return self.about.get("converged_at") is not None

    def doubts(self) -> list[str]:
        """What to know before using the result: what the run warned of, and what its figures say."""
        # Of a run that goes on the warnings are of its input; those of one that ended, of its result too.
        told = self.final or self.about.get("status") != "finished"
        found = list(self.about.get("warnings", [])) if told else []
        if not self.final:
            found += self._warnings()
        if not self.final and self.about.get("status") == "finished":
            found.append(f"This is iteration {self.iteration} of {len(self.about['iterations'])}, not the result.")
        elif self.about.get("status") != "finished":
            found.append(
                f"The run has not ended: this is iteration {self.iteration} of at most {self.options['iterations']}."
            )
        elif not self.converged:
            last = self.history[-1]
            found.append(
                f"The run was ended by its {self.options['iterations']} iterations, before it stood still: in the last "
                f"one particles turned by {last['pose_change']:.1f}° (median), {100 * last['changed_class']:.0f} % "
                f"changed class, averages correlated with those before by {min(last['map_correlation']):.4f}"
                f"{self._rise()}. --resume with more --iterations goes on."
            )
        unsettled = [part.name for part in self.halves if not part.history[-1]["converged"]]
        if self.final and unsettled:
            found.append(
                f"These halves were ended by their {self.options['iterations']} iterations, before they stood still: "
                f"{'; '.join(unsettled)}. --resume with more --iterations goes on."
            )
        found += [
            f"{len(self.misfits)} of {len(self.classes)} particles fit nowhere: their likelihood lies more than "
            f"{MISFIT:g} deviations below that of the others. They are listed below."
        ] * bool(len(self.misfits))
        return found + self._class_doubts() + self._pose_doubts()

    def _warnings(self) -> list[str]:
        """What a run warns of only at its end, of an iteration: by the best poses, there by the whole posterior."""
        views = [self.coverage_of_angles(k) for k in range(len(self.maps))]
        found = preferred_orientations(views, self.history[-1]["coverage"], self.sizes.astype(np.float64))
        return found + shifts_at_limit(self.poses.shifts, self.options["max_shift"], self.voxel_size)

    def _rise(self) -> str:
        if len(self.history) < 2 or self.history[-1]["r_max"] != self.history[-2]["r_max"]:
            return ""
        before, after = (record["log_likelihood"] for record in self.history[-2:])
        return f", and the log-likelihood {'rose' if after > before else 'fell'} by {abs(after - before):.1f}"

    def _class_doubts(self) -> list[str]:
        share = self.sizes / self.sizes.sum()
        if len(share) == 1:
            return []
        if share.max() > ALL_BUT_ALL:
            return [
                f"Class {share.argmax() + 1} has taken {100 * share.max():.0f} % of the particles. Either they are all "
                "alike, or the classes have collapsed: try another --seed, or more --regularization."
            ]
        return [
            f"Class {k + 1} has only {self.sizes[k]} of {self.sizes.sum()} particles."
            for k in np.nonzero(share < NEXT_TO_NONE)[0]
        ]

    def _pose_doubts(self) -> list[str]:
        found, half_box = [], len(self.maps[0]) * self.voxel_size / 2
        radius, far = self.options["mask_radius"], float(np.percentile(self.off_centre, 95))
        if radius + far > half_box:
            found.append(
                f"The box is tight: a particle of radius {radius:.0f} Å (the mask), {far:.0f} Å off the centre as one "
                f"in twenty is, reaches beyond the {half_box:.0f} Å from centre to edge. Cut larger boxes, or check "
                "--mask-radius."
            )
        start = self.about["start"]
        # In the tomogram, whose wedge they would be locked to: in boxes cut in turned frames the wedge is turned too.
        near = float((rotation_angle(self.frames @ self.poses.rotations, np.eye(3)) < NEAR).mean())
        if near > LOCKED and not start["use_poses"] and start["reference"] is None:
            found.append(
                f"{100 * near:.0f} % of the orientations lie within 10° of one another. Unless the particles do lie "
                "so, they are locked to the missing wedge: compare with other seeds."
            )
        return found


def read_summary(folder: str | os.PathLike[str], iteration: int | None = None) -> RunSummary:
    """Read the final result of a run, that of an iteration, or of the last one where the run has not ended.

    Raises
    ------
    InputError
        No run is there, no iteration has ended, or a file is damaged.
    """
    files = open_run(folder, iteration, unfinished=True)
    about, table = files.about, files.particles
    _check_contents(about, files.folder / "run.json")
    voxel_size = float(about["input"]["voxel_size"])
    maps = np.stack([read_mrc(path)[0] for path in files.maps])
    poses = star_poses(table, voxel_size)
    if poses.classes is None or poses.classes.max() >= len(maps):
        raise InputError(f"{table.path}: expected an rlnClassNumber from 1 to {len(maps)} for each particle")
    return RunSummary(
        files=files,
        maps=maps,
        voxel_size=voxel_size,
        poses=poses,
        frames=box_frames(table),
        confidence=table.floats("rlnMaxValueProbDistribution"),
        class_probability=_class_probability(files, len(maps)),
        log_likelihood=table.floats("rlnLogLikeliContribution"),
        planes=_read_planes(files, len(maps)),
        fsc=_read_fsc(files.folder, len(maps)) if files.stem == "run" else [],
    )


def _check_contents(about: dict[str, Any], path: Path) -> None:
    """Refuse a run.json that lacks something, as one that was edited may."""
    missing = [name for name, kind in EXPECTED.items() if not isinstance(about.get(name), kind)]
    for name, parts in EXPECTED_WITHIN.items():
        inner = about.get(name)
        missing += [f"{name}.{part}" for part in parts if isinstance(inner, dict) and part not in inner]
    records = about.get("iterations")
    if records == []:
        raise InputError(f"{path.parent}: found no iteration in run.json, expected at least one")
    missing += _missing_of_records("iterations", records)
    of_halves = about.get("iterations_of_halves", [])
    if not isinstance(of_halves, list):
        missing.append("iterations_of_halves")
    for number, part in enumerate(of_halves if isinstance(of_halves, list) else [], 1):
        place, found = f"iterations_of_halves[{number}]", part if isinstance(part, dict) else {}
        missing += [f"{place}.{name}" for name in ("class", "half") if not isinstance(found.get(name), int)]
        if not isinstance(found.get("iterations"), list) or not found["iterations"]:
            missing.append(f"{place}.iterations")
        missing += _missing_of_records(f"{place}.iterations", found.get("iterations"))
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(f"{path}: found nothing of {some}, expected what a run writes")


def _missing_of_records(place: str, records: Any) -> list[str]:
    missing = []
    for number, record in enumerate(records if isinstance(records, list) else [], 1):
        found = record if isinstance(record, dict) else {}
        missing += [f"{place}[{number}].{name}" for name in IN_RECORD if name not in found]
    return missing


def _class_probability(files: RunFiles, n_classes: int) -> Float64 | None:
    path = files.folder / "run_class_posteriors.star"
    if files.stem != "run" or not path.is_file():
        return None
    table = read_particles_star(path)
    return np.stack([table.floats(f"famlClassProbability{k:03d}") for k in range(1, n_classes + 1)], axis=1)


def _read_planes(files: RunFiles, n_classes: int) -> NDArray[np.float32] | None:
    path = files.folder / f"{files.stem}_coverage.npz"
    if not path.is_file():
        return None
    try:
        with np.load(BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            planes: NDArray[np.float32] = arrays["planes"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InputError(f"{path}: cannot be read ({error}), expected the Fourier coverage a run writes") from None
    if planes.ndim != 4 or planes.shape[:2] != (n_classes, 3):
        raise InputError(f"{path}: found an array of shape {planes.shape}, expected ({n_classes}, 3, N, N)")
    return planes


def _read_fsc(folder: Path, n_classes: int) -> list[tuple[int, dict[str, Any]]]:
    found = []
    for k in range(1, n_classes + 1):
        for name in (f"postprocess_class{k:03d}_fsc.json", "postprocess_fsc.json"):
            if (folder / name).is_file() and (k == 1 or "class" in name):
                found.append((k, _fsc_of(folder / name)))
                break
    return found


def _fsc_of(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = found["levels"]["0.143"]["resolution"], found["levels"]["0.5"], found["shells"]["corrected"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: cannot be read ({error}), expected the FSC a run writes") from None
    return found
