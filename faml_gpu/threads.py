"""The cores of a CPU: one knob for all libraries, and work shared out among threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import lru_cache, partial
from threading import Lock
from typing import Any, Generic, ParamSpec, TypeVar

import numba
import numpy as np
import scipy.fft
from threadpoolctl import ThreadpoolController, threadpool_limits

from faml_gpu.array_backend import Array, on_host

__all__ = ["Once", "cpu_count", "cpu_threads", "in_order", "map_threads"]

Item = TypeVar("Item")
Done = TypeVar("Done")
Given = ParamSpec("Given")


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


@contextmanager
def cpu_threads(n: int | None) -> Iterator[int]:
    """One knob for the threads of Numba, FFT and `map_threads` inside the block; None takes every core allowed.

    BLAS has one: its products are small, or come in pieces. Its idle threads would spin on the cores the next step
    wants.
    """
    count = min(n or cpu_count(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    before = numba.get_num_threads()
    numba.set_num_threads(count)
    try:
        with threadpool_limits(limits={"blas": 1, "openmp": count}), scipy.fft.set_workers(count):
            yield count
    finally:
        numba.set_num_threads(before)


def map_threads(work: Callable[[Item], Done], items: Sequence[Item], array: Array) -> list[Done]:
    """`work` of each item, in order: by the CPU threads of `cpu_threads`, each with one of Numba, BLAS and FFT.

    Small products and short loops gain nothing from several threads each; pieces of the work do. What comes of a piece
    does not depend on how many run at a time. Inside a piece, and where `array` is on a GPU, one after the other.
    """
    count = min(numba.get_num_threads(), len(items))
    if count < 2 or not on_host(array) or not _numba_is_threadsafe():
        return [work(item) for item in items]
    with _libraries().limit(limits=1), ThreadPoolExecutor(count, initializer=partial(numba.set_num_threads, 1)) as pool:
        # Each in a copy of the context, so that what is profiled here is there too.
        contexts = [copy_context() for _ in items]
        return list(pool.map(lambda context, item: context.run(work, item), contexts, items))


def in_order(work: Callable[[Item], Done], items: Iterable[Item], at_once: int) -> Iterator[Done]:
    """`work` of each item, in order, so many at a time, among which the CPU threads of `cpu_threads` are shared out.

    For work that is in several threads only here and there: what of one item is not goes on beside what of others is.
    What comes of an item should not depend on how many threads it has. Items are taken as their turn comes.
    """
    threads = numba.get_num_threads()
    at_once = min(at_once, threads)
    if at_once < 2 or not _numba_is_threadsafe():
        yield from map(work, items)
        return
    shares = iter([threads // at_once + (i < threads % at_once) for i in range(at_once)])

    def alone(item: Item) -> Done:
        with scipy.fft.set_workers(numba.get_num_threads()):
            return work(item)

    waiting: deque[Future[Done]] = deque()
    pool = ThreadPoolExecutor(at_once, initializer=lambda: numba.set_num_threads(next(shares)))
    try:
        for item in items:
            waiting.append(pool.submit(copy_context().run, alone, item))
            if len(waiting) > at_once:  # one in reserve, so that no thread has to wait for who takes the results
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Once(Generic[Given, Done]):
    """A function whose latest few results are kept, as `lru_cache` does, each made by one thread while others wait."""

    def __init__(self, make: Callable[Given, Done], keep: int) -> None:
        self._make, self._keep = make, keep
        self._made: dict[Any, Future[Done]] = {}
        self._lock = Lock()

    def __call__(self, *args: Given.args, **kwargs: Given.kwargs) -> Done:
        key = args, tuple(sorted(kwargs.items()))
        with self._lock:
            known = self._made.pop(key, None)
            found = self._made[key] = known or Future()
            while len(self._made) > self._keep:
                del self._made[next(iter(self._made))]
        if known is None:
            try:
                found.set_result(self._make(*args, **kwargs))
            finally:
                if not found.done():  # of the error the future holds nothing: it would keep all that went wrong alive
                    with self._lock:
                        if self._made.get(key) is found:
                            del self._made[key]
                    found.cancel()
        try:
            return found.result()
        except CancelledError:
            return self(*args, **kwargs)

    def cache_clear(self) -> None:
        """Let go of all."""
        with self._lock:
            self._made.clear()


@lru_cache(maxsize=1)
def _libraries() -> ThreadpoolController:
    """The BLAS libraries that are loaded: to look for them takes longer than a small batch."""
    return ThreadpoolController()


@lru_cache(maxsize=1)
def _numba_is_threadsafe() -> bool:
    """Whether Numba's loops may be called from several threads: not where it has neither OpenMP nor TBB."""
    try:
        _nothing(np.zeros(1))
        return numba.threading_layer() in ("omp", "tbb")  # type: ignore[attr-defined]
    except ValueError:
        return False


@numba.njit(parallel=True, nogil=True, cache=True)
def _nothing(x: Any) -> None:
    for i in numba.prange(len(x)):
        x[i] = 0
