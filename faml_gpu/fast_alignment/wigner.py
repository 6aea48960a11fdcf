"""Wigner's small d, d^l_mm'(beta) = <l m| exp(-i beta J_y) |l m'>."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from faml_gpu.array_backend import Array, to_device
from faml_gpu.threads import Once

__all__ = ["folded_d_table", "small_d", "small_d_table"]


def small_d(l: int, beta: NDArray[np.float64]) -> NDArray[np.float64]:
    """d^l(beta), from the eigenvectors of J_y, whose eigenvalues -l .. l are known exactly.

    Parameters
    ----------
    l : int
    beta : (n,) float64, radians

    Returns
    -------
    (n, 2l + 1, 2l + 1) float64
        Axes [beta, m + l, m' + l].
    """
    m = np.arange(-l, l)
    raising = np.sqrt(l * (l + 1) - m * (m + 1))  # <m + 1| J_+ |m>
    j_y = np.diag(raising, -1) / 2j - np.diag(raising, 1) / 2j
    vectors = np.linalg.eigh(j_y)[1]
    phases = np.exp(-1j * beta[:, None] * np.arange(-l, l + 1))
    return np.asarray(((vectors * phases[:, None, :]) @ vectors.conj().T).real)


@partial(Once, keep=4)
def small_d_table(bandwidth: int, n_beta: int, *, even: bool = True, device: str = "cpu") -> Array:
    """d^l_mm'(beta_j) for m >= 0 at beta_j = pi (j + 1/2) / n_beta.

    Returns
    -------
    (L, 2L - 1, n_beta, n_l) float32
        Axes [m, m' + L - 1, j, l], 0 where l < max(m, |m'|).
    """
    used = np.arange(0, bandwidth, 2 if even else 1)
    beta = np.pi * (np.arange(n_beta) + 0.5) / n_beta
    table = np.zeros((bandwidth, 2 * bandwidth - 1, n_beta, len(used)), np.float32)
    for i, l in enumerate(used):
        d = small_d(int(l), beta)[:, l:, :]  # m >= 0
        table[: l + 1, bandwidth - 1 - l : bandwidth + l, :, i] = d.transpose(1, 2, 0)
    return to_device(table, device)


@partial(Once, keep=4)
def folded_d_table(bandwidth: int) -> NDArray[np.float32]:
    """d^l_mm'(beta_j) of the even degrees with |m'| <= m at beta_j = pi (j + 1/2) / 2L below pi / 2.

    The rest of `small_d_table` follows from these by symmetry; of 36 degrees they are less than a tenth of it.

    Returns
    -------
    (n, L) float32
        Axes [row, j]. Rows by m, then |m'| = 0 .. m, then m' = |m'| and m' = -|m'|, then even l from m to L - 1.
    """
    beta = np.pi * (np.arange(bandwidth) + 0.5) / (2 * bandwidth)
    of_degree = {l: small_d(l, beta) for l in range(0, bandwidth, 2)}
    rows = [
        of_degree[l][:, m + l, sign * k + l]
        for m in range(bandwidth)
        for k in range(m + 1)
        for sign in (1, -1)
        for l in range(m + m % 2, bandwidth, 2)
    ]
    return np.array(rows, np.float32)
