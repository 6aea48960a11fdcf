"""Noise that differs between groups of particles: one curve sigma_g^2 per optics group or tomogram.

No other step knows of it. With a particle's weight w' = w sigma / sigma_g, shell by shell, its residual
w'^2 |X - RA|^2 / sigma^2 is w^2 |X - RA|^2 / sigma_g^2, as the likelihood has it, and the sums P R^-1(w'^2 X) and
P R^-1 w'^2 of the M-step make the average weighted by the inverse of each particle's noise, which maximises it.
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

__all__ = ["COMMON", "FEWEST", "NoiseGroups", "noise_groups"]

Int64 = NDArray[np.int64]

# Particles of a group that has a curve of its own: 20 give the variance of shell 1 to some 7 %, of shell 4 to 2 %.
FEWEST = 20
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

    def weigh(self, batch: Batch, first: int, state: State) -> Batch:
        """The batch, whose first particle has the number `first`, with weights relative to each particle's noise.

        `noise_rows` says which curve each particle has. Of one curve for all, the batch is what it was.
        """
        if state.relative_noise is None:
            return batch
        xp = namespace(batch.weights)
        rows = self.row[first : first + len(batch.weight_index)]
        pairs = np.stack([to_host(batch.weight_index), rows], axis=1)
        distinct, index = np.unique(pairs, axis=0, return_inverse=True)
        shell = _shells(batch.weights.shape[1], device_of(batch.weights))
        which = xp.asarray(distinct[:, 0])
        factor = to_device((state.relative_noise[distinct[:, 1]] ** -0.5).astype(np.float32), device_of(batch.weights))
        return replace(
            batch,
            weights=batch.weights[which] * factor[:, xp.minimum(shell, factor.shape[1] - 1)],
            weight_index=xp.asarray(index.reshape(-1).astype(np.int64)),
            weight_ids=tuple(f"{batch.weight_ids[w]} {row}" for w, row in distinct),
            multiplied=None if batch.multiplied is None else batch.multiplied[which],
            noise_rows=rows,
        )


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


def _one(particles: ParticleSource) -> NoiseGroups:
    return NoiseGroups((COMMON,), np.zeros(len(particles), np.int64))


def _found(particles: ParticleSource, options: Options) -> NoiseGroups:
    chosen, one = options.choices.noise_groups, _one(particles)
    if chosen == "none":
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
