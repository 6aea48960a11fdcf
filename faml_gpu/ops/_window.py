"""Cross spectra to correlations at the shifts of a small lattice: the CPU's sums over kz, ky and kx, row by row.

With a = Re C and b = Im C of a row of voxels along kz, the sums of a cos, b cos, a sin and b sin over kz at shifts
t >= 0, eight at a time, are one vector of 32 numbers; those at -t follow by signs. Multiples of it by cos and sin of
ky t_y are summed over ky, multiples of these by cos and sin of kx t_x over kx, and of the whole the signs are left.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils as _cgutils
from numba.core import types
from numpy.typing import NDArray

from faml_gpu.ops._trilinear import CONTRACT, all_of, intrinsic

__all__ = ["LANES", "add_plane", "add_rows", "correlations_of", "wave_tables"]

cgutils: Any = _cgutils  # it has no types
LANES = 8  # shifts that one vector holds
SUMS = 4 * LANES  # a cos, b cos, a sin, b sin of each


def wave_tables(waves: NDArray[Any], real: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """cos and sin of 2 pi k t / N at shifts t >= 0 from exp(2 pi i k t / N), (T, 2r + 1), T odd, t symmetric about 0.

    Returns
    -------
    along : (2, 2r + 1, H)
        [cos or sin, k + r, t], H = (T + 1) / 2.
    tables : (blocks, (2r + 1) * 2 * LANES)
        The same in blocks of `LANES` shifts, [block, k, cos or sin, lane] flat, 0 beyond the last.
    """
    half = waves[len(waves) // 2 :].T
    along = np.ascontiguousarray(np.stack([half.real, half.imag]), real)
    blocks = -(-along.shape[2] // LANES)
    tables = np.zeros((blocks, along.shape[1], 2, LANES), real)
    for i in range(blocks):
        part = along[:, :, i * LANES : (i + 1) * LANES]
        tables[i, :, :, : part.shape[2]] = part.transpose(1, 0, 2)
    return along, tables.reshape(blocks, -1)


def _vector_of(context: Any, array_type: Any) -> tuple[Any, int]:
    """The type of eight of an array's numbers, and what they are aligned to in memory."""
    return ir.VectorType(context.get_value_type(array_type.dtype), LANES), array_type.dtype.bitwidth // 8


def _place(builder: Any, data: Any, index: Any, vector: Any) -> Any:
    return builder.bitcast(builder.gep(data, [index], inbounds=True), vector.as_pointer())


@intrinsic
def _add_row(typing: Any, sums: Any, table: Any, re: Any, im: Any, first: Any, start: Any, count: Any) -> Any:
    """Add to sums (32,) those over `count` voxels of a row: of re and im from `start`, of the table from k = `first`.

    The four vectors stay in registers; LLVM, left to itself, would not make vectors of them.
    """

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        vector, align = _vector_of(context, signature.args[0])
        out, waves, a, b = (context.make_array(signature.args[i])(context, builder, given[i]).data for i in range(4))
        i64 = ir.IntType(64)

        def load(data: Any, index: Any) -> Any:
            value = builder.load(_place(builder, data, index, vector))
            value.align = align
            return value

        places = [i64(q * LANES) for q in range(4)]
        totals = [cgutils.alloca_once_value(builder, load(out, place)) for place in places]
        with cgutils.for_range(builder, given[6]) as loop:
            voxel = builder.add(given[5], loop.index)
            wave = builder.mul(builder.add(given[4], loop.index), i64(2 * LANES))
            parts = [all_of(builder, builder.load(builder.gep(x, [voxel], inbounds=True)), vector) for x in (a, b)]
            cosine, sine = load(waves, wave), load(waves, builder.add(wave, i64(LANES)))
            pairs = ((part, function) for function in (cosine, sine) for part in parts)
            for total, pair in zip(totals, pairs, strict=True):
                product = builder.fmul(*pair, flags=CONTRACT)
                builder.store(builder.fadd(builder.load(total), product, flags=CONTRACT), total)
        for total, place in zip(totals, places, strict=True):
            builder.store(builder.load(total), _place(builder, out, place, vector)).align = align
        return context.get_dummy_value()

    at: Any = types.int64
    return types.none(sums, table, re, im, at, at, at), generate


@intrinsic
def _add_multiple(typing: Any, out: Any, to: Any, factor: Any, source: Any, at: Any) -> Any:
    """Add `factor` times source[at : at + 32] to out[to : to + 32]."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        vector, align = _vector_of(context, signature.args[0])
        out, source = (context.make_array(signature.args[i])(context, builder, given[i]).data for i in (0, 3))
        factor = all_of(builder, given[2], vector)
        for q in range(4):
            offset = ir.IntType(64)(q * LANES)
            there = _place(builder, out, builder.add(given[1], offset), vector)
            before, value = (
                builder.load(p) for p in (there, _place(builder, source, builder.add(given[4], offset), vector))
            )
            before.align = value.align = align
            product = builder.fmul(factor, value, flags=CONTRACT)
            builder.store(builder.fadd(before, product, flags=CONTRACT), there).align = align
        return context.get_dummy_value()

    place: Any = types.int64
    return types.none(out, place, factor, source, place), generate


@numba.njit(nogil=True, cache=True)
def add_rows(cross: Any, rows: Any, r_max: int, along: Any, tables: Any, sums: Any, of_y: Any) -> None:
    """Add rows of one kx to of_y, flat (blocks, 2H, 32) with axes [block, cos or sin of ky t_y]; sums (32,) is scratch.

    rows (n, 5): as `fourier.support_rows`; cross: their voxels, real and imaginary parts (2, m).
    """
    h, re, im = along.shape[2], cross[0], cross[1]
    for i in range(len(rows)):
        _, ky, first, start, stop = rows[i]
        for block in range(len(tables)):
            sums[:] = 0
            _add_row(
                sums,
                tables[block],
                re,
                im,
                np.int64(first + r_max),
                np.int64(start - rows[0, 3]),
                np.int64(stop - start),
            )
            for part in range(2):
                for t in range(h):
                    _add_multiple(
                        of_y, np.int64(((block * 2 + part) * h + t) * SUMS), along[part, ky + r_max, t], sums, 0
                    )


@numba.njit(nogil=True, cache=True)
def add_plane(at: int, along: Any, of_y: Any, of_x: Any) -> None:
    """Add the plane of kx = at - r_max to of_x, flat (blocks, 2H, 2H, 32), axes [block, x, y, sum]."""
    h = along.shape[2]
    blocks = len(of_y) // (2 * h * SUMS)
    for block in range(blocks):
        for part in range(2):
            for t in range(h):
                for y in range(2 * h):
                    to = ((block * 2 * h + part * h + t) * 2 * h + y) * SUMS
                    _add_multiple(of_x, np.int64(to), along[part, at, t], of_y, np.int64((block * 2 * h + y) * SUMS))


@numba.njit(nogil=True, cache=True)
def correlations_of(of_x: Any, out: Any) -> None:
    """Twice the real parts of sum C exp(2 pi i xi.t / N), (T, T, T) with axes [x, y, z], from the sums of `add_plane`.

    Of (a + i b) (cos + i sin)(cos + i sin)(cos + i sin), the signs of the sines being those of the shifts.
    """
    reach = out.shape[0] // 2
    h, one = reach + 1, type(of_x[0])(1)
    for x in range(-reach, reach + 1):
        for y in range(-reach, reach + 1):
            sx, sy = (one if x >= 0 else -one), (one if y >= 0 else -one)
            for z in range(h):
                block, lane = z // LANES, z % LANES
                # In cos cos, cos sin, sin cos, sin sin of x and y: a cos, b cos, a sin, b sin of z.
                cc = ((block * 2 * h + abs(x)) * 2 * h + abs(y)) * SUMS + lane
                cs, sc = cc + h * SUMS, cc + 2 * h * h * SUMS
                ss = sc + h * SUMS
                b_cos, a_sin, b_sin = LANES, 2 * LANES, 3 * LANES
                even = of_x[cc] - sx * sy * of_x[ss] - sx * of_x[sc + b_cos] - sy * of_x[cs + b_cos]
                odd = sx * sy * of_x[ss + b_sin] - of_x[cc + b_sin] - sx * of_x[sc + a_sin] - sy * of_x[cs + a_sin]
                out[x + reach, y + reach, reach + z] = 2 * (even + odd)
                out[x + reach, y + reach, reach - z] = 2 * (even - odd)
