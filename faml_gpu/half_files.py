"""Half maps and their Fourier shell correlation as files: of a run, and of any two maps."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faml_gpu.errors import InputError
from faml_gpu.fsc import FscCurves, check_b_factor, final_map, fsc_with_mask, resolution_at
from faml_gpu.halves import GOLD_STANDARD, HalfMaps
from faml_gpu.io.mrc import read_mrc, write_mrc
from faml_gpu.masks import soft_sphere
from faml_gpu.plan import SOFT_EDGE
from faml_gpu.run_folder import writing

__all__ = [
    "Comparison",
    "compare_files",
    "half_line",
    "half_summary",
    "read_mask",
    "write_comparison",
    "write_halves",
]

Float32 = NDArray[np.float32]
PathLike = str | os.PathLike[str]

VOXEL_TOLERANCE = 0.01  # relative, between voxel sizes in headers


def write_halves(
    result: HalfMaps,
    folder: PathLike,
    *,
    class_number: int = 1,
    root: str = "postprocess",
    mask_name: str | None = None,
) -> list[Path]:
    """Write half maps, final map and FSC under RELION's names.

    run_half1_class001_unfil.mrc and run_half2_class001_unfil.mrc are what RELION's postprocessing takes;
    run_class001.mrc is the average of all particles, not filtered; ROOT.mrc the final map; ROOT.star, ROOT_fsc.json and
    ROOT_fsc.png the curves.

    Parameters
    ----------
    result : of `run_halves`
    folder : exists
    class_number : from 1, in the names
    root : one for each class where there are several
    mask_name : file of the mask of the FSC, for ROOT.star

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    OutputError
        A file cannot be written.
    """
    from faml_gpu.report.fsc import write_fsc  # with matplotlib, which not every command waits for

    folder = Path(folder)
    tail = f"class{class_number:03d}"
    maps = {
        f"run_half1_{tail}_unfil.mrc": result.maps[0],
        f"run_half2_{tail}_unfil.mrc": result.maps[1],
        f"run_{tail}.mrc": result.average,
        f"{root}.mrc": result.final,
    }
    halves = list(maps)[:2]
    summary = half_summary(result)
    with writing(folder):
        for name, volume in maps.items():
            write_mrc(folder / name, volume, result.voxel_size)
        curves = write_fsc(
            folder,
            result.curves,
            result.voxel_size,
            {
                # Not where the curve falls: within the start's band it says nothing.
                "rlnFinalResolution": result.resolution,
                **({"rlnBfactorUsedForSharpening": result.b_factor} if result.b_factor else {}),
                "rlnUnfilteredMapHalf1": halves[0],
                "rlnUnfilteredMapHalf2": halves[1],
                **({} if mask_name is None else {"rlnMaskName": mask_name}),
            },
            root=root,
            facts=summary,
            start=result.start_resolution,
            verdict=None if result.beyond_start else "nothing beyond the start",
        )
    return [*(folder / name for name in maps), *curves]


def half_summary(result: HalfMaps) -> dict[str, Any]:
    """What halves found, JSON-ready: `resolution` at FSC 0.143 and `resolution_05`, Angstrom.

    Both are the low-pass of the common start where the halves agree on nothing finer; the second also where the curve
    falls below 0.5 before.
    """
    start = result.start_resolution
    half = resolution_at(result.curves.corrected, 0.5, result.voxel_size, result.curves.box)
    return {
        "resolution": result.resolution,
        "resolution_05": min(half, start) if result.beyond_start else start,
        "start_resolution": start,
        "beyond_start": result.beyond_start,
        "particles": [int((result.half == number).sum()) for number in (1, 2)],
        "iterations": [run.state.iteration for run in result.results],
        "b_factor": result.b_factor,
    }


def half_line(result: HalfMaps) -> str:
    """The same for people."""
    summary = half_summary(result)
    first, second = summary["particles"]
    start = summary["start_resolution"]
    if not result.beyond_start:
        return f"halves of {first} and {second} particles agree on nothing beyond their common start, {start:.1f} Å"
    bound = "" if (result.curves.corrected[1:] < GOLD_STANDARD).any() else "≤ "
    half = summary["resolution_05"]
    at_half = f"{half:.1f} Å at FSC = 0.5" if half < start else "FSC = 0.5 not beyond the start"
    return (
        f"halves of {first} and {second} particles: {bound}{result.resolution:.1f} Å at FSC = 0.143, {at_half}; "
        f"the common start had {start:.1f} Å"
    )


@dataclass(frozen=True)
class Comparison:
    """FSC of two files, and the map they make together.

    Attributes
    ----------
    curves : FscCurves
    voxel_size : Angstrom
    names : what `data_general` says of the input
    final : (N, N, N) float32, the mean of the two, see `fsc.final_map`; 0 where there is no resolution
    masked : (N, N, N) float32, that times the mask; None without one
    inputs : files that were read
    """

    curves: FscCurves
    voxel_size: float
    names: dict[str, Any]
    final: Float32
    masked: Float32 | None
    inputs: tuple[Path, ...]

    def lines(self) -> list[str]:
        """For printing."""
        from faml_gpu.report.fsc import fsc_lines

        return fsc_lines(self.curves, self.voxel_size)


def compare_files(
    first: PathLike,
    second: PathLike,
    *,
    mask: PathLike | None = None,
    radius: float | None = None,
    voxel_size: float | None = None,
    b_factor: float | None = None,
    seed: int = 0,
) -> Comparison:
    """Fourier shell correlation of two map files that lie on each other, and the map they make together.

    Parameters
    ----------
    first, second : MRC files
    mask : MRC file, 0 .. 1
    radius : Angstrom, of a soft sphere about the box centre, instead of a mask
    voxel_size : Angstrom, where the files do not say it
    b_factor : square Angstrom, for the final map; negative sharpens, see `fsc.final_map`
    seed : of the random phases that measure what the mask adds

    Raises
    ------
    InputError
        Files that cannot be read, are not cubes, or differ in box or voxel size; both or an impossible mask; a B-factor
        out of reach.
    """
    if mask is not None and radius is not None:
        raise InputError("options mask and radius: found both, expected at most one")
    one, voxel = _read(first, voxel_size)
    two, other = _read(second, voxel_size)
    _same(second, two, other, first, len(one), voxel)
    check_b_factor(b_factor or 0.0, voxel)
    window: Float32 | None = None
    names: dict[str, Any] = {"rlnBfactorUsedForSharpening": b_factor} if b_factor else {}
    names |= {"rlnUnfilteredMapHalf1": os.fspath(first), "rlnUnfilteredMapHalf2": os.fspath(second)}
    if mask is not None:
        window = read_mask(mask, len(one), voxel, first)
        names["rlnMaskName"] = os.fspath(mask)
    elif radius is not None:
        widest = len(one) / 2 - SOFT_EDGE
        if not 0 < radius / voxel <= widest:
            raise InputError(
                f"option radius: found {radius:g} A, expected more than 0 and at most {widest * voxel:g} A"
            )
        window = soft_sphere(len(one), radius / voxel, SOFT_EDGE)
    curves = fsc_with_mask(one, two, window, seed=seed)
    resolution = resolution_at(curves.corrected, GOLD_STANDARD, voxel, len(one))
    final = final_map((one + two) / 2, curves.corrected, resolution, voxel, b_factor)
    inputs = tuple(Path(path) for path in (first, second, mask) if path is not None)
    return Comparison(curves, voxel, names, final, None if window is None else final * window, inputs)


def write_comparison(comparison: Comparison, folder: PathLike) -> list[Path]:
    """Write postprocess.mrc, postprocess_masked.mrc (with a mask), and the curves, see `write_fsc`; the folder is made.

    Raises
    ------
    InputError
        One of the files would replace what was read.
    OutputError
        The folder cannot be made, or a file cannot be written.
    """
    from faml_gpu.report.fsc import write_fsc

    folder = Path(folder)
    maps = {"postprocess.mrc": comparison.final}
    if comparison.masked is not None:
        maps["postprocess_masked.mrc"] = comparison.masked
    for path in comparison.inputs:
        if path.resolve() in {(folder / name).resolve() for name in maps}:
            raise InputError(
                f"output {folder}: {path.name} there was read and would be replaced; expected another folder"
            )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, volume in maps.items():
            write_mrc(folder / name, volume, comparison.voxel_size)
        curves = write_fsc(folder, comparison.curves, comparison.voxel_size, comparison.names)
    return [*(folder / name for name in maps), *curves]


def read_mask(mask: PathLike | Float32, box: int, voxel_size: float, other: PathLike) -> Float32:
    """A mask, (N, N, N) float32, from a file or an array, that lies on the grid of a map.

    Parameters
    ----------
    mask : MRC file, or (N, N, N) array; a file that does not say its voxel size has that of the map
    box, voxel_size : N, and Angstrom, of the map
    other : what the map is called

    Raises
    ------
    InputError
        Another box or voxel size, values that are not within 0 .. 1, or 0 everywhere.
    """
    name: PathLike = "mask"
    if isinstance(mask, (str, os.PathLike)):
        name, (volume, size) = mask, _cube(*read_mrc(mask), mask)
    else:
        volume, size = _cube(np.ascontiguousarray(mask, dtype=np.float32), None, name)
    _same(name, volume, voxel_size if size is None else size, other, box, voxel_size)
    if volume.min() < 0 or volume.max() > 1 or not volume.any():
        raise InputError(f"{name}: found values {volume.min():g} to {volume.max():g}, expected a mask of 0 to 1")
    return volume


def _cube(volume: Float32, voxel: float | None, name: PathLike) -> tuple[Float32, float | None]:
    if volume.ndim != 3 or len(set(volume.shape)) != 1:
        raise InputError(f"{name}: {' x '.join(map(str, volume.shape[::-1]))} voxels, expected a cube")
    if not np.isfinite(volume).all():
        raise InputError(f"{name}: found NaN or Inf, expected numbers")
    return volume, voxel


def _read(path: PathLike, stated: float | None) -> tuple[Float32, float]:
    """A cubic map and its voxel size."""
    volume, voxel = _cube(*read_mrc(path), path)
    if stated is not None and not (np.isfinite(stated) and stated > 0):
        raise InputError(f"option voxel-size: found {stated:g} A, expected more than 0")
    if voxel is None:
        voxel = stated
    if voxel is None:
        raise InputError(f"{path}: no voxel size in its header; give --voxel-size")
    if stated is not None and not abs(voxel / stated - 1) <= VOXEL_TOLERANCE:
        raise InputError(f"{path}: found a voxel size of {voxel:g} A, expected {stated:g} A as --voxel-size says")
    return volume, voxel


def _same(path: PathLike, volume: Float32, voxel: float, other: PathLike, box: int, size: float) -> None:
    """Refuse maps on different grids."""
    if len(volume) != box:
        raise InputError(f"{path}: found a box of {len(volume)} voxels, expected {box} as in {other}")
    if not abs(voxel / size - 1) <= VOXEL_TOLERANCE:
        raise InputError(f"{path}: found a voxel size of {voxel:g} A, expected {size:g} A as in {other}")
