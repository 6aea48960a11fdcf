"""The one trilinear sample all CPU voxel loops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import extending
from numba.core import types

__all__ = [
    "CONTRACT",
    "GATHER_FLOPS",
    "U",
    "all_of",
    "empty_cells",
    "fill_cells",
    "fill_gradients",
    "fill_real",
    "fill_samples",
    "intrinsic",
    "sample_complex",
]

GATHER_FLOPS = 50  # 15 to rotate, 8 for the cell and its weights, 28 for the two sums of eight; one way of counting

# Numba adds float32 and integers in float64, and asks of every signed index whether it is negative: numbers of the
# coordinates' own type and unsigned indices make these loops twice as fast. (Numba keeps what it compiled by the date
# of the caller's file alone: after a change here, delete *.nbi and *.nbc in __pycache__.)
U = np.uint32
# By Numba's own types its result would be called with the typing context, which Numba adds.
intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = extending.intrinsic
CONTRACT = ("contract",)  # products and sums may become one instruction, as they may in the loops around


@numba.njit(inline="always", cache=True)
def _cell(c: int, x: Any, y: Any, z: Any) -> Any:
    """Where (x, y, z) lies, turned to x >= 0 by `sign`: first corner of the cell, weights of its edges along x, place.

    The edges lie at (y0, z0), (y0 + 1, z0), (y0, z0 + 1) and (y0 + 1, z0 + 1).
    """
    real = type(x)
    one = real(1)
    sign = -one if x < 0 else one
    x, y, z = sign * x, sign * y + real(c), sign * z + real(c)
    ix, iy, iz = np.int32(x), np.int32(y), np.int32(z)
    fx, fy, fz = x - real(ix), y - real(iy), z - real(iz)
    a, b, d, e = (one - fz) * (one - fy), (one - fz) * fy, fz * (one - fy), fz * fy
    return sign, ix, iy, iz, a, b, d, e, fx


def _taken(builder: Any, vector: Any, places: list[int]) -> Any:
    """Some numbers of a vector."""
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def all_of(builder: Any, value: Any, kind: Any) -> Any:
    """A vector of one number."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return _taken(builder, one, [0] * kind.count)


def _sum_of_edges(context: Any, builder: Any, signature: Any, given: Any) -> Any:
    """The vector (re, im at x0, re, im at x1): the sum over four edges of weight times value at each of them.

    given: flat grid, place of each edge, weight of each. Both values of an edge are complex, next to each other, and
    come in one load; four multiplications make one instruction. LLVM does not find that by itself.
    """
    data, real = context.make_array(signature.args[0])(context, builder, given[0]).data, signature.args[0].dtype
    edge = ir.VectorType(context.get_value_type(real), 4)

    def weighted(place: Any, weight: Any) -> Any:
        pointer = builder.bitcast(builder.gep(data, [place], inbounds=True), edge.as_pointer())
        loaded = builder.load(pointer)
        loaded.align = real.bitwidth // 8
        return builder.fmul(loaded, all_of(builder, weight, edge), flags=CONTRACT)

    total = weighted(given[1], given[5])
    for place, weight in zip(given[2:5], given[6:9], strict=True):
        total = builder.fadd(total, weighted(place, weight), flags=CONTRACT)
    return total


def _as_tuple(context: Any, builder: Any, signature: Any, vector: Any) -> Any:
    parts = [builder.extract_element(vector, ir.Constant(ir.IntType(32), i)) for i in range(vector.type.count)]
    return context.make_tuple(builder, signature.return_type, parts)


@intrinsic
def _between_columns(
    typing: Any, grid: Any, at00: Any, at10: Any, at01: Any, at11: Any, a: Any, b: Any, d: Any, e: Any, fx: Any
) -> Any:
    """(re, im) between x0 and x1. at: places of the edges in the flat grid; a, b, d, e: their weights."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        total = _sum_of_edges(context, builder, signature, given)
        low, high = _taken(builder, total, [0, 1]), _taken(builder, total, [2, 3])
        step = builder.fmul(
            all_of(builder, given[9], low.type), builder.fsub(high, low, flags=CONTRACT), flags=CONTRACT
        )
        return _as_tuple(context, builder, signature, builder.fadd(low, step, flags=CONTRACT))

    two: Any = types.UniTuple
    return two(grid.dtype, 2)(grid, at00, at10, at01, at11, a, b, d, e, fx), generate


@intrinsic
def _two_columns(
    typing: Any, grid: Any, at00: Any, at10: Any, at01: Any, at11: Any, a: Any, b: Any, d: Any, e: Any
) -> Any:
    """(re, im) at x0 and (re, im) at x1."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return _as_tuple(context, builder, signature, _sum_of_edges(context, builder, signature, given))

    four: Any = types.UniTuple
    return four(grid.dtype, 4)(grid, at00, at10, at01, at11, a, b, d, e), generate


@numba.njit(inline="always", cache=True)
def _edges(c: int, line: Any, column: Any) -> Any:
    """Places in the flat complex grid of the four edges of a cell, from its `column` x0 and its `line`, (y0, z0)."""
    width = np.int64(2 * (c + 1))
    plane = width * np.int64(2 * c + 1)
    at = np.int64(line) * width + np.int64(2 * column)
    return at, at + width, at + plane, at + plane + width


@numba.njit(inline="always", cache=True)
def sample_complex(grid: Any, c: int, x: Any, y: Any, z: Any) -> Any:
    """(re, im) at (x, y, z) of a centred half grid (2c + 1, 2c + 1, c + 1, 2); x < 0 by Hermitian symmetry."""
    sign, x0, y0, z0, a, b, d, e, fx = _cell(c, x, y, z)
    at00, at10, at01, at11 = _edges(c, np.int64(z0) * np.int64(2 * c + 1) + np.int64(y0), x0)
    re, im = _between_columns(grid, at00, at10, at01, at11, a, b, d, e, fx)
    return re, sign * im


@numba.njit(nogil=True, cache=True)
def empty_cells(n: int, grid: Any) -> Any:
    """Room for the cells of n points: numbers of the grid's lines at y0 and z0, columns x0, and (6, n) for each cell
    the weights of its four edges, the place between the columns, and -1 where x was turned.
    """
    return np.empty(n, np.int32), np.empty(n, np.int32), np.empty((6, n), grid.dtype)


@numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz"})
def fill_cells(c: int, r: Any, coords: Any, n: int, cells: Any) -> None:
    """Where n points (3, n) are that `r` turns, all at once: one step of `sample_complex` that is done in vectors."""
    line, column, edges = cells
    xs, ys, zs = coords[0], coords[1], coords[2]
    lines = np.int32(2 * c + 1)
    for j in range(n):
        x, y, z = xs[j], ys[j], zs[j]
        sign, x0, y0, z0, a, b, d, e, fx = _cell(
            c,
            r[0, 0] * x + r[1, 0] * y + r[2, 0] * z,
            r[0, 1] * x + r[1, 1] * y + r[2, 1] * z,
            r[0, 2] * x + r[1, 2] * y + r[2, 2] * z,
        )
        line[j], column[j] = np.int32(z0) * lines + np.int32(y0), np.int32(x0)
        edges[0, j], edges[1, j], edges[2, j], edges[3, j], edges[4, j], edges[5, j] = a, b, d, e, fx, sign


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def fill_samples(grid: Any, c: int, w: Any, n: int, cells: Any, out: Any) -> None:
    """The samples of `fill_cells`, (re, im), out (2, n); 0 where the weight w is 0."""
    line, column, edges = cells
    a, b, d, e, fx, sign = edges[0], edges[1], edges[2], edges[3], edges[4], edges[5]
    re, im = out[0], out[1]
    for i in range(n):
        j = U(i)
        if w[j] == 0:
            re[j], im[j] = 0, 0
            continue
        at00, at10, at01, at11 = _edges(c, line[j], column[j])
        re[j], turned = _between_columns(grid, at00, at10, at01, at11, a[j], b[j], d[j], e[j], fx[j])
        im[j] = sign[j] * turned


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def fill_gradients(grid: Any, c: int, w: Any, n: int, cells: Any, out: Any) -> None:
    """Samples as `fill_samples`, and their derivatives along x, y and z: (re, im) of each of the four, out (8, n)."""
    line, column, edges = cells
    for i in range(n):
        j = U(i)
        if w[j] == 0:
            for k in range(8):
                out[k, j] = 0
            continue
        at00, at10, at01, at11 = _edges(c, line[j], column[j])
        a, b, d, e, fx, sign = edges[0, j], edges[1, j], edges[2, j], edges[3, j], edges[4, j], edges[5, j]
        low_re, low_im, high_re, high_im = _two_columns(grid, at00, at10, at01, at11, a, b, d, e)
        x_re, x_im = high_re - low_re, high_im - low_im
        # What multiplies a difference along y, and one along z.
        below, above, back, front = a + b, d + e, a + d, b + e
        y0_re, y0_im, y1_re, y1_im = _two_columns(grid, at00, at10, at01, at11, -below, below, -above, above)
        z0_re, z0_im, z1_re, z1_im = _two_columns(grid, at00, at10, at01, at11, -back, -front, back, front)
        # f(-u) = conj f(u): of the derivatives the real part changes its sign.
        out[0, j], out[1, j] = low_re + fx * x_re, sign * (low_im + fx * x_im)
        out[2, j], out[3, j] = sign * x_re, x_im
        out[4, j], out[5, j] = sign * (y0_re + fx * (y1_re - y0_re)), y0_im + fx * (y1_im - y0_im)
        out[6, j], out[7, j] = sign * (z0_re + fx * (z1_re - z0_re)), z0_im + fx * (z1_im - z0_im)


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def fill_real(grid: Any, c: int, n: int, cells: Any, out: Any) -> None:
    """Samples of a centred half grid (2c + 1, 2c + 1, c + 1) of a point-symmetric real function, flat."""
    line, column, edges = cells
    width = np.int64(c + 1)
    plane = width * np.int64(2 * c + 1)
    a, b, d, e, fx = edges[0], edges[1], edges[2], edges[3], edges[4]
    for i in range(n):
        j = U(i)
        at00 = np.uint64(np.int64(line[j]) * width + np.int64(column[j]))
        at10, at01, at11 = at00 + np.uint64(width), at00 + np.uint64(plane), at00 + np.uint64(plane + width)
        one = np.uint64(1)
        v0 = a[j] * grid[at00] + b[j] * grid[at10] + d[j] * grid[at01] + e[j] * grid[at11]
        v1 = a[j] * grid[at00 + one] + b[j] * grid[at10 + one] + d[j] * grid[at01 + one] + e[j] * grid[at11 + one]
        out[j] = v0 + fx[j] * (v1 - v0)
