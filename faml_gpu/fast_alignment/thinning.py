"""Few weighted items that stand for many: which cells of rotations, and which poses, sampler `joint` goes on with."""

from __future__ import annotations

import numpy as np

from faml_gpu.array_backend import Array, namespace

__all__ = ["thinned"]


def thinned(log_mass: Array, n: int, n_heaviest: int) -> tuple[Array, Array]:
    """Which n items of each row go on, and how many times its own mass each of them stands for.

    With c such that sum min(m / c, 1) = n, items heavier than c go on as they are. Of the others each goes on with
    probability m / c and then has mass c: sums over items keep their expectation, and no choice of n does so with less
    variance (Fearnhead and Clifford 2003, J. R. Stat. Soc. B 65, 887). They are drawn systematically in the order
    given, at the middles of equal steps of their summed mass: where neighbours in the list are alike that is a rule of
    quadrature, and the same every time.

    Parameters
    ----------
    log_mass : (B, m) float64
        Each row must hold something finite; -inf is nothing.
    n : int
        If m is less, all go on.
    n_heaviest : int
        At most n: so many go on as they are, however light.

    Returns
    -------
    chosen : (B, min(n, m)) int64
        In the order given.
    log_factor : (B, min(n, m)) float64
        0 for what goes on as it is, log(c / m) for what was drawn, -inf at places nothing was left for.
    """
    xp = namespace(log_mass)
    b, m = log_mass.shape
    n = min(n, m)
    mass = xp.exp(log_mass - log_mass.max(axis=1, keepdims=True))
    mass /= mass.sum(axis=1, keepdims=True)
    # The n heaviest, in order, and what each and all lighter ones hold. (To sort them all would take most of the time.)
    order = xp.argpartition(mass, m - n, axis=1)[:, m - n :] if n < m else xp.argsort(mass, axis=1)
    order = xp.take_along_axis(order, xp.argsort(-xp.take_along_axis(mass, order, axis=1), axis=1), axis=1)
    heaviest, others = xp.take_along_axis(mass, order, axis=1), mass.copy()
    others[xp.arange(b)[:, None], order] = 0
    left = xp.cumsum(heaviest[:, ::-1], axis=1)[:, ::-1] + others.sum(axis=1, keepdims=True)
    # Heavy if it is at least its part of what it and all lighter ones hold; the first that is not ends them.
    heavy = heaviest * (n - xp.arange(n)) >= left
    heavy = xp.cumprod(heavy | (xp.arange(n) < n_heaviest), axis=1).astype(bool)
    n_drawn = n - heavy.sum(axis=1)
    kept = xp.zeros((b, m), bool)
    kept[xp.arange(b)[:, None], order] = heavy

    light = xp.where(kept, 0, mass)
    tiny = np.finfo(np.float64).tiny
    c = xp.maximum(light.sum(axis=1) / xp.maximum(n_drawn, 1), tiny)[:, None]
    steps = xp.floor(xp.cumsum(light, axis=1) / c + 0.5)
    drawn = steps > xp.pad(steps[:, :-1], ((0, 0), (1, 0)))
    drawn &= xp.cumsum(drawn, axis=1) <= n_drawn[:, None]  # rounding may make it one more

    rank = -(2 * kept + drawn.astype(np.int8))
    chosen = xp.sort(xp.argpartition(rank, n - 1, axis=1)[:, :n], axis=1)
    was_kept, was_drawn = (xp.take_along_axis(x, chosen, axis=1) for x in (kept, drawn))
    own = xp.maximum(xp.take_along_axis(mass, chosen, axis=1), tiny)
    return chosen, xp.where(was_kept, 0, xp.where(was_drawn, xp.log(c / own), -np.inf))
