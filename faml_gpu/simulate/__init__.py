"""Simulated data with known truth: structures, tilt series and the subtomograms reconstructed from them.

`simulate_data_set` is what `faml-gpu simulate` does. `simulate_particles` makes boxes of phantoms in memory by the
fast model (density and noise behind a missing wedge).
"""

from faml_gpu.simulate.data_set import DataSet, SimulationOptions, simulate_data_set
from faml_gpu.simulate.forward import Simulation, simulate_particle, simulate_particles
from faml_gpu.simulate.phantoms import (
    PHANTOMS,
    Phantom,
    density,
    groel,
    groel_es,
    proteasome,
    ribosome,
    tmv,
    tric,
)
from faml_gpu.simulate.structures import Structure, load_structure, principal_axis
from faml_gpu.simulate.tilt_series import Optics, TiltSeries, ctf, mtf

__all__ = [
    "PHANTOMS",
    "DataSet",
    "Optics",
    "Phantom",
    "Simulation",
    "SimulationOptions",
    "Structure",
    "TiltSeries",
    "ctf",
    "density",
    "groel",
    "groel_es",
    "load_structure",
    "mtf",
    "principal_axis",
    "proteasome",
    "ribosome",
    "simulate_data_set",
    "simulate_particle",
    "simulate_particles",
    "tmv",
    "tric",
]
