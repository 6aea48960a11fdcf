"""Pictures of a run's averages, and files to see them in ChimeraX."""

from __future__ import annotations

import os
from pathlib import Path

from faml_gpu.io.atomic import atomic_path
from faml_gpu.report.chimerax import write_chimerax
from faml_gpu.report.figures import class_averages
from faml_gpu.report.summary import read_summary

__all__ = ["write_views"]


def write_views(folder: str | os.PathLike[str], iteration: int | None = None) -> list[Path]:
    """Write run_classes.png, run.cxc and run_class001_angdist.bild ... into a run's folder.

    Parameters
    ----------
    folder : of the run; of one that has not ended the last iteration is shown, under run_it007...
    iteration : from 1; None is the final result

    Raises
    ------
    InputError
        No run is there, or a file of it is damaged.
    OSError
        A file cannot be written.
    """
    run = read_summary(folder, iteration)
    picture = run.files.folder / f"{run.files.stem}_classes.png"
    with atomic_path(picture) as temporary:
        class_averages(run).savefig(temporary, format="png", dpi=150)
    return [picture, *write_chimerax(run)]
