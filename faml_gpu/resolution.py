"""How far the band of the alignment may reach: as far as two halves of the particles show the same.

Shells that take part in the alignment agree between halves of the particles even where there is nothing but noise: all
particles were turned to fit the same references. Shells beyond them took no part. What agrees there is signal
(Scheres & Chen 2012, Nat. Methods 9, 853, on why the halves must not share what they are compared by).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

__all__ = ["LOOK_AHEAD", "half_agreement", "next_r_max"]

Float64 = NDArray[np.float64]

LOOK_AHEAD = 4  # shells beyond the band whose agreement is known
LEAK = 1  # shells beyond the band into which the mask spreads what the alignment fitted
FARTHEST = 3  # shells the band grows by at most, in an iteration
AGREED = 0.143  # Rosenthal & Henderson 2003, J. Mol. Biol. 333, 721
SURE = 3.0  # standard errors the agreement must be above 0: it is asked in every iteration, and once passed for good
CHANCE = ndtr(-SURE)
IN_BAND = 0.5  # asked for where no shell is left beyond the band: what takes part in the alignment agrees too well


def half_agreement(sums: NDArray[np.complex128], shell: NDArray[np.int64]) -> Float64:
    """Correlation per Fourier shell of two halves of the particles, all classes together, (S,).

    Of the sums of P R^-1(w X), not divided by their weights: a voxel counts as it was observed. The weights of the
    halves being nearly the same, it is the Fourier shell correlation of the halves' averages.

    Parameters
    ----------
    sums : (2, K, M)
    shell : (M,)
    """
    first, second = sums

    def per_shell(values: Float64) -> Float64:
        return np.asarray(np.bincount(shell, values.sum(axis=0)), np.float64)

    power = per_shell(np.abs(first) ** 2) * per_shell(np.abs(second) ** 2)
    cross = per_shell((first * second.conj()).real)
    return np.asarray(cross / np.sqrt(np.maximum(power, np.finfo(np.float64).tiny)))


def next_r_max(agreement: Float64, numbers: Float64, r_max: int, least: int, most: int) -> int:
    """Shells up to which a band is backed by what an iteration with a band of `r_max` shows.

    It grows to the last of the shells beyond `LEAK` up to which all agree, `FARTHEST` at most; it shrinks by one where
    not even its own last two shells do; else it stays: a shell that takes part, or is next to one that does, cannot
    be asked. No schedule is asked: as fast as the data show detail, as slowly, or back.

    A shell agrees by `AGREED`, and by more than chance: itself, or together with those next beyond it. What agrees
    there agrees here, and where a point group leaves a shell a handful of numbers none could be sure alone.

    Parameters
    ----------
    agreement : (S,), see `half_agreement`
    numbers : (S,) independent numbers in each shell
    r_max : of this iteration
    least, most : where the band begins and may end
    """
    beyond = np.arange(r_max + 1 + LEAK, len(agreement))
    if r_max >= most:
        grown = r_max
    elif len(beyond) == 0:
        grown = r_max + int(_mean(agreement, numbers, [r_max - 1, r_max]) >= IN_BAND)
    else:
        grown = r_max
        for j in beyond[:FARTHEST]:
            wider = [np.arange(j, k) for k in range(j + 1, len(agreement) + 1)]
            if agreement[j] < AGREED or not any(_sure(agreement, numbers, shells) for shells in wider):
                break
            grown = min(int(j), r_max + FARTHEST)
    if grown == r_max and _mean(agreement, numbers, [r_max - 1, r_max]) < AGREED:
        grown -= 1
    return int(np.clip(grown, least, max(least, most)))


def _sure(agreement: Float64, numbers: Float64, shells: NDArray[np.int64]) -> bool:
    """Whether so much agreement on average, of nothing but noise, is as rare as `SURE` standard errors are, asked once.

    Of n independent pairs without a common signal r sqrt((n - 1) / (1 - r^2)) has Student's distribution of n - 1
    degrees of freedom; of many pairs r is within 1 / sqrt(n).
    """
    free = numbers[shells].sum() - 1
    if free <= 0:
        return False
    t = -stdtrit(free, CHANCE)
    return bool(_mean(agreement, numbers, shells) >= t / np.hypot(t, np.sqrt(free)))


def _mean(agreement: Float64, numbers: Float64, shells: list[int] | NDArray[np.int64]) -> float:
    return float(np.average(agreement[shells], weights=numbers[shells]))
