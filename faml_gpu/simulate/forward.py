"""Boxes as a tomogram would give them, with known truth.

In memory, of phantoms, by the fast model box = W (density + white noise), W the missing wedge: what the method's data
model says, without CTF or reconstruction. The signal-to-noise ratio here is counted per box and before the wedge; that
of `simulate_data_set`, which goes through a tilt series, is counted on the boxes as they are, behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft

from faml_gpu.errors import InputError
from faml_gpu.geometry import random_rotations
from faml_gpu.simulate.phantoms import Phantom, density
from faml_gpu.weights import missing_wedge

__all__ = ["Simulation", "simulate_particle", "simulate_particles"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Simulation:
    """Simulated particles, class by class, and the truth about them.

    Attributes
    ----------
    boxes : (N_p, N, N, N) float32, `[z, y, x]`, bright protein
    weight : (N, N, N//2 + 1) float32, the missing wedge all boxes share, rfftn layout
    rotations : (N_p, 3, 3) float64, true R
    shifts : (N_p, 3) float64, true t, voxels, (x, y, z)
    classes : (N_p,) int64, row of `truth`
    truth : (K, N, N, N) float32, the phantoms at the identity
    phantoms : the K phantoms
    voxel_size : Angstrom
    """

    boxes: Float32
    weight: Float32
    rotations: Float64
    shifts: Float64
    classes: NDArray[np.int64]
    truth: Float32
    phantoms: tuple[Phantom, ...]
    voxel_size: float


def simulate_particle(
    phantom: Phantom,
    rotation: ArrayLike,
    shift: ArrayLike,
    weight: Float32,
    rng: np.random.Generator,
    *,
    box: int,
    voxel_size: float,
    snr: float,
    resolution: float | None = None,
) -> Float32:
    """One box: the phantom in a pose, plus white noise, both seen through a Fourier weight.

    Parameters
    ----------
    phantom, rotation, shift, box, voxel_size, resolution : as for `density`
    weight : (N, N, N//2 + 1) float32, rfftn layout
    rng : source of the noise
    snr : variance of the signal in the box over the variance of the noise, both before the weight; infinity: no noise

    Returns
    -------
    (N, N, N) float32 array
    """
    volume = density(phantom, box, voxel_size, rotation, shift, resolution)
    noise = np.sqrt(volume.var(dtype=np.float64) / snr)
    volume += np.float32(noise) * rng.standard_normal(volume.shape, dtype=np.float32)
    # The weight is real and even: the transform needs no centring.
    return np.asarray(fft.irfftn(fft.rfftn(volume) * weight, s=volume.shape), dtype=np.float32)


def simulate_particles(
    phantoms: Sequence[Phantom],
    counts: Sequence[int],
    *,
    box: int,
    voxel_size: float,
    snr: float,
    tilt_range: tuple[float, float] = (-60.0, 60.0),
    tilt_axis: Literal["x", "y"] = "y",
    max_shift: float | None = None,
    seed: int = 0,
    rotations: ArrayLike | None = None,
    resolution: float | None = None,
) -> Simulation:
    """Particles of each phantom in random poses, with noise and a missing wedge.

    Each particle draws from its own stream, named by (seed, class, number within the class): a
    particle is the same whatever other particles are made.

    Parameters
    ----------
    phantoms, counts : structures, and how many particles of each
    box : N, voxels
    voxel_size : Angstrom
    snr : variance of the signal in the box over that of the white noise, before the wedge
    tilt_range : lowest and highest tilt, degrees
    tilt_axis : "x" or "y"
    max_shift : voxels; shifts are uniform in ± this on each axis; None is 3 of a box of 64, and as much of others
    seed : of all randomness
    rotations : (N_p, 3, 3) array to use, class by class; None draws them from the Haar measure
    resolution : Angstrom, see `density`

    Returns
    -------
    Simulation

    Raises
    ------
    InputError
        For counts, SNR or rotations that do not fit.
    """
    if len(counts) != len(phantoms) or len(phantoms) == 0 or min(counts) < 0:
        raise InputError(f"simulation: found counts {list(counts)} for {len(phantoms)} phantoms, expected one each")
    if not snr > 0:
        raise InputError(f"simulation: found an SNR of {snr}, expected more than 0")
    classes = np.repeat(np.arange(len(phantoms)), counts)
    n = len(classes)
    given = None if rotations is None else np.asarray(rotations, dtype=np.float64)
    if given is not None and given.shape != (n, 3, 3):
        raise InputError(f"simulation: found rotations of shape {given.shape}, expected ({n}, 3, 3)")
    weight = missing_wedge(box, tilt_range, tilt_axis)
    boxes = np.empty((n, box, box, box), dtype=np.float32)
    true_rotations, true_shifts = np.empty((n, 3, 3)), np.empty((n, 3))
    widest = 3 * box / 64 if max_shift is None else max_shift
    first = np.concatenate([[0], np.cumsum(counts)])
    for i, k in enumerate(classes.tolist()):
        rng = np.random.default_rng([seed, k, i - first[k]])
        drawn = random_rotations(1, rng)[0]
        true_rotations[i] = drawn if given is None else given[i]
        true_shifts[i] = rng.uniform(-widest, widest, 3)
        boxes[i] = simulate_particle(
            phantoms[k],
            true_rotations[i],
            true_shifts[i],
            weight,
            rng,
            box=box,
            voxel_size=voxel_size,
            snr=snr,
            resolution=resolution,
        )
    truth = np.stack([density(phantom, box, voxel_size, resolution=resolution) for phantom in phantoms])
    return Simulation(
        boxes, weight, true_rotations, true_shifts, classes.astype(np.int64), truth, tuple(phantoms), voxel_size
    )
