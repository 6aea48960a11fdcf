"""Noise that differs between groups of particles, and scales that differ between particles.

A group (optics group, tomogram) has a curve sigma_g^2 of its own, a particle a scale s: X = s RA + noise. No other step
knows of either. With the weight w' = w s sigma / sigma_g, shell by shell, and X' = X / s, the residual
w'^2 |X' - RA|^2 / sigma^2 is w^2 |X - s RA|^2 / sigma_g^2, as the likelihood has it, and the sums P R^-1(w'^2 X') and
P R^-1 w'^2 of the M-step make the average that maximises it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from faml_gpu.array_backend import Array, device_of, namespace, to_device, to_host
from faml_gpu.data import Batch, Groups, ParticleSource, State
from faml_gpu.errors import InputError
from faml_gpu.fourier import shells_of_half
from faml_gpu.options import Options

__all__ = ["COMMON", "FEWEST", "NoiseGroups", "new_scale", "noise_groups"]

Int64 = NDArray[np.int64]

# Particles of a group that has a curve of its own: 20 give the variance of shell 1 to some 7 %, of shell 4 to 2 %.
FEWEST = 20
SCALES = (0.3, 3.0)  # none is smaller or larger: a particle that does not fit at all has a scale of 0 or less
COMMON = "all"  # name of the first curve: that of all particles, which those of small groups take
_KINDS = {"optics": "rlnOpticsGroup", "tomogram": "rlnTomoName or rlnMicrographName"}


@dataclass(frozen=True)
class NoiseGroups:
    """Which noise curve each particle has.

    Attributes
    ----------
    names : of the G curves; the first is that of all particles
    row : (n,) int64, curve of each particle, 0 .. G - 1
    """

    names: tuple[str, ...]
    row: Int64

    def __len__(self) -> int:
        return len(self.names)

    def members(self, g: int) -> Int64:
        """The particles that curve g is estimated from: all for the first."""
        return np.arange(len(self.row)) if g == 0 else np.flatnonzero(self.row == g)

    def weigh(self, batch: Batch, spectra: Array, numbers: NDArray[np.int64], state: State) -> tuple[Batch, Array]:
        """A batch with weights relative to each particle's noise and scale, and its spectra over the scale.

        Where all share one curve and have the scale 1, both are what they were.

        Parameters
        ----------
        batch : Batch
        spectra : (B, N, N, N//2 + 1) complex64
        numbers : (B,) of its particles
        state : State

        Returns
        -------
        Batch
            `noise_rows` and `scale` say what curve and scale each particle has.
        (B, N, N, N//2 + 1) complex64
        """
        if state.relative_noise is None and state.scale is None:
            return batch, spectra
        xp, device, n = namespace(batch.weights), device_of(batch.weights), len(spectra)
        rows = self.row[numbers]
        # With scales, no two particles have the same weight.
        own = np.zeros(n, np.int64) if state.scale is None else numbers
        scale = np.ones(len(self.row)) if state.scale is None else state.scale
        keys = np.stack([to_host(batch.weight_index), rows, own], axis=1)
        distinct, index = np.unique(keys, axis=0, return_inverse=True)
        which = xp.asarray(distinct[:, 0])
        relative = np.ones((1, 1)) if state.relative_noise is None else state.relative_noise
        factor = relative[distinct[:, 1]] ** -0.5
        if state.scale is not None:
            factor = factor * scale[distinct[:, 2], None]
            spectra = spectra / to_device(scale[own].astype(np.float32), device)[:, None, None, None]
        shell = xp.minimum(_shells(batch.weights.shape[1], device), factor.shape[1] - 1)
        batch = replace(
            batch,
            weights=batch.weights[which] * to_device(factor.astype(np.float32), device)[:, shell],
            weight_index=xp.asarray(index.reshape(-1).astype(np.int64)),
            weight_ids=tuple(f"{batch.weight_ids[w]} {row} {i}" for w, row, i in distinct),
            multiplied=None if batch.multiplied is None else batch.multiplied[which],
            noise_rows=rows,
            scale=None if state.scale is None else scale[own],
        )
        return batch, spectra


def noise_groups(particles: ParticleSource, options: Options, state: State | None = None) -> NoiseGroups:
    """The groups that have a noise curve of their own, as the options say.

    Groups of fewer than `FEWEST` particles take the curve of all. With fewer than two larger ones there is one curve,
    and so where a `state` to go on from has one.

    Raises
    ------
    InputError
        Groups asked for that the input does not tell of; others than those of `state`.
    """
    groups = _found(particles, options)
    if state is None:
        return groups
    if state.noise_groups is None:
        return _one(particles)
    before = tuple(str(name) for name in state.noise_groups)
    if before != groups.names:
        raise InputError(
            f"option noise-groups: found the groups {', '.join(groups.names)}, expected {', '.join(before)} as in the "
            "run resumed"
        )
    return groups


def new_scale(old: NDArray[np.float64] | None, change: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scales (n,) of the particles: the old ones times their `change` (n,), with the median 1 and none far from it.

    Scales that are all larger and an average that is as much smaller explain the same.
    """
    scale = np.nan_to_num(change if old is None else old * change, nan=1.0, posinf=1.0, neginf=1.0)
    median = np.median(scale)
    return np.clip(scale / median if median > 0 else np.ones_like(scale), *SCALES)


def _one(particles: ParticleSource) -> NoiseGroups:
    return NoiseGroups((COMMON,), np.zeros(len(particles), np.int64))


def _found(particles: ParticleSource, options: Options) -> NoiseGroups:
    chosen, one = options.choices.noise_groups, _one(particles)
    # Boxes brought to one background differ in the strength of their signal, not in their noise: without a scale, what
    # is left of the stronger ones would count as noise of their group (README, Presets: .921 for .928).
    alike = options.normalize and not options.scale_correction
    if chosen == "none" or (chosen == "auto" and alike):
        return one
    groups: Groups | None = particles.groups.get("optics" if chosen == "auto" else chosen)
    if groups is None:
        if chosen == "auto":
            return one
        raise InputError(f"option noise-groups: found {chosen!r}, but the particles have no {_KINDS[chosen]}")
    sizes = np.bincount(groups.index, minlength=len(groups.names))
    large = np.flatnonzero(sizes >= FEWEST)
    if len(large) < 2:
        return one
    rows = np.zeros(len(groups.names), np.int64)
    rows[large] = 1 + np.arange(len(large))
    return NoiseGroups((COMMON, *(groups.names[g] for g in large)), rows[groups.index])


@lru_cache(maxsize=2)
def _shells(box: int, device: str) -> Array:
    return to_device(shells_of_half(box), device)
