"""The paper's Figure 2: what a box looks like at each signal-to-noise ratio and tilt range."""

from __future__ import annotations

import tempfile
from pathlib import Path

from cases import Case
from figures import _figure, save
from particles import structure_file

from faml_gpu.io.mrc import read_mrc
from faml_gpu.simulate import SimulationOptions, simulate_data_set

__all__ = ["figure_2"]

SNRS = (float("inf"), 0.1, 0.05, 0.01, 0.003)
TILTS = (60.0, 50.0, 40.0)


def figure_2(case: Case, folder: Path, work: Path) -> None:
    """x-z slices through the middle of the same particle, a row per tilt range, a column per SNR."""
    work.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    specimen = case.specimens[0]
    figure = _figure(1.6 * len(SNRS), 1.75 * len(TILTS))
    grid = figure.subplots(len(TILTS), len(SNRS))
    for row, tilt in zip(grid, TILTS, strict=True):
        for axes, snr in zip(row, SNRS, strict=True):
            options = SimulationOptions(
                box=case.box, voxel_size=case.voxel_size, snr=snr, tilt_range=(-tilt, tilt), max_shift=0.0, seed=1
            )
            with tempfile.TemporaryDirectory(dir=work) as output:
                simulate_data_set([structure_file(specimen, work)], [1], output, options, device="cpu", overwrite=True)
                volume, _ = read_mrc(Path(output) / "particles" / "000001.mrc")
            axes.imshow(volume[:, case.box // 2], cmap="gray", origin="lower")
            axes.set_axis_off()
            name = "no noise" if snr == float("inf") else f"SNR {snr:g}"
            axes.set_title(f"{name}, ±{tilt:.0f}°", fontsize=8)
    save(figure, folder / "figure-2.png")
    print(f"{case.name}: {folder / 'figure-2.png'}", flush=True)
