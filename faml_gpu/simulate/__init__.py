"""Simulated data with known truth: phantoms made of Gaussian blobs, and noisy boxes of them behind a missing wedge."""

from faml_gpu.simulate.forward import Simulation, simulate_particle, simulate_particles
from faml_gpu.simulate.phantoms import Phantom, density, groel, point_group, ribosome

__all__ = [
    "Phantom",
    "Simulation",
    "density",
    "groel",
    "point_group",
    "ribosome",
    "simulate_particle",
    "simulate_particles",
]
