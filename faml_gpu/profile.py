"""Where the time goes: seconds of each step of an iteration, next to what the machine could not beat.

`profiling` collects what `array_backend.step` times and what the operations say they move and compute (`tally`). The
bound of a step is the larger of its bytes over the machine's copy rate and of its operations over the rate of its
matrix product, both measured in the same run. Bytes are counted as if caches were perfect: each array of an operation
read or written once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
from threadpoolctl import threadpool_limits

__all__ = ["Machine", "Profile", "Step", "profiling", "tally", "timed"]


@dataclass
class Step:
    """Of one step: seconds (of all threads together where it runs in several), calls, bytes moved, operations."""

    seconds: float = 0.0
    calls: int = 0
    moved: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Machine:
    """Bytes and floating-point operations a second that a copy and a matrix product reach on the device."""

    copy: float
    gemm: float

    @classmethod
    def measured(cls, xp: Any, synchronize: Callable[[], None], *, size: int = 2048, repeats: int = 3) -> Machine:
        """The best of some runs, with the arrays of `xp` (numpy or cupy)."""
        source = xp.ones(16 * size * size // 8, np.float32)
        target, a = xp.empty_like(source), xp.ones((size, size), np.float32)

        def best(work: Callable[[], Any]) -> float:
            found = []
            for _ in range(repeats + 1):
                synchronize()
                begin = time.perf_counter()
                work()
                synchronize()
                found.append(time.perf_counter() - begin)
            return min(found[1:])

        copied = best(lambda: xp.copyto(target, source))
        with threadpool_limits(limits=numba.get_num_threads(), user_api="blas"):
            return cls(2 * source.nbytes / copied, 2 * size**3 / best(lambda: a @ a))


@dataclass
class Profile:
    """Steps by their path, such as ("pose integral", "joint: cells"); those within a step are in its seconds too."""

    synchronize: Callable[[], None]
    steps: dict[tuple[str, ...], Step] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, path: tuple[str, ...], other: Step) -> None:
        """Add to a step and, but for the seconds and calls, to those around it."""
        with self.lock:
            for length in range(1, len(path) + 1):
                found = self.steps.setdefault(path[:length], Step())
                found.moved += other.moved
                found.flops += other.flops
            found = self.steps.setdefault(path, Step())
            found.seconds += other.seconds
            found.calls += other.calls

    def table(self, machine: Machine) -> list[str]:
        """Lines to print: steps in the order they ran, with share, bound, and what of its time the bound is."""
        whole = sum(s.seconds for path, s in self.steps.items() if len(path) == 1) or 1.0
        lines = [
            f"machine: copy {machine.copy / 1e9:.1f} GB/s, matrix product {machine.gemm / 1e9:.0f} GFLOP/s",
            f"{'step':<34}{'s':>9}{'share':>8}{'calls':>8}{'GB':>9}{'GFLOP':>10}{'bound, s':>10}{'of it':>7}",
        ]
        for path, s in self._in_order():
            bound = max(s.moved / machine.copy, s.flops / machine.gemm)
            known = f"{bound:>10.3f}{bound / s.seconds if s.seconds else 0:>7.0%}" if s.moved or s.flops else ""
            lines.append(
                f"{'  ' * (len(path) - 1) + path[-1]:<34}{s.seconds:>9.2f}{s.seconds / whole:>8.0%}{s.calls:>8}"
                f"{s.moved / 1e9:>9.2f}{s.flops / 1e9:>10.1f}{known}"
            )
        return lines

    def _in_order(self) -> Iterator[tuple[tuple[str, ...], Step]]:
        """Depth first: a step, then those within it, as they first ran."""

        def below(parent: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Step]]:
            for path, s in self.steps.items():
                if path[:-1] == parent:
                    yield path, s
                    yield from below(path)

        yield from below(())


_CURRENT: ContextVar[tuple[Profile, tuple[str, ...]] | None] = ContextVar("profile", default=None)


@contextmanager
def profiling(synchronize: Callable[[], None] = lambda: None) -> Iterator[Profile]:
    """Collect inside the block, on this thread and those that `threads.map_threads` starts.

    synchronize : waits for the device, at the end of each step, so that its time is that of its work.
    """
    profile = Profile(synchronize)
    token = _CURRENT.set((profile, ()))
    try:
        yield profile
    finally:
        _CURRENT.reset(token)


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Time a step, if anyone collects."""
    current = _CURRENT.get()
    if current is None:
        yield
        return
    profile, path = current[0], (*current[1], name)
    token = _CURRENT.set((profile, path))
    profile.add(path, Step())  # steps stand in the order they begin
    begin = time.perf_counter()
    try:
        yield
        profile.synchronize()
    finally:
        _CURRENT.reset(token)
        profile.add(path, Step(time.perf_counter() - begin, 1))


def tally(*arrays: Any, flops: float = 0.0) -> None:
    """Say of the step that is running that it read or wrote these arrays once, and how many operations it took."""
    current = _CURRENT.get()
    if current is not None and current[1]:
        current[0].add(current[1], Step(moved=float(sum(a.nbytes for a in arrays)), flops=float(flops)))
