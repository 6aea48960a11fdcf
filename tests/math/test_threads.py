"""Pieces of work on several threads: in order, each alone with its libraries, and the same as one after the other."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pytest
import scipy.fft
from threadpoolctl import threadpool_info

from faml_gpu.fast_alignment import Candidates, Observation, UnseenGain
from faml_gpu.fourier import make_support
from faml_gpu.plan import Clock
from faml_gpu.threads import Once, cpu_threads, in_order, map_threads

TWO = numba.config.NUMBA_NUM_THREADS >= 2  # type: ignore[attr-defined]
needs_two = pytest.mark.skipif(not TWO, reason="one thread here: run by test_with_two_threads")
HOST = np.zeros(1)


@pytest.mark.skipif(TWO, reason="two threads here")
def test_with_two_threads() -> None:
    """Beside other workers of pytest a process has one thread: those that need two in a process of their own."""
    tests = Path(__file__).resolve().parents[1]
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | dict.fromkeys(names, "2")
    # What is installed, not what lies in the working directory.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:xdist", "-o", "addopts=--import-mode=importlib"]
    command += [str(Path(__file__)), str(tests / "e2e" / "test_reproducible.py"), "-k", "thread"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@needs_two
def test_pieces_run_beside_each_other_in_order() -> None:
    both = threading.Barrier(2, timeout=60)  # would break if one piece waited for the other

    def work(item: int) -> tuple[int, int]:
        if item < 2:
            both.wait()
        return item**2, threading.get_ident()

    with cpu_threads(2):
        found = map_threads(work, range(7), HOST)
    assert [value for value, _ in found] == [item**2 for item in range(7)]
    assert threading.get_ident() not in {thread for _, thread in found}


@needs_two
def test_a_piece_has_one_thread_of_each_library() -> None:
    def threads(_: object) -> list[int]:
        inside = map_threads(lambda _: threading.get_ident(), range(3), HOST)
        assert set(inside) == {threading.get_ident()}  # pieces of pieces are not shared out
        found = [numba.get_num_threads(), scipy.fft.get_workers()]
        return found + [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    with cpu_threads(2):
        before = numba.get_num_threads(), scipy.fft.get_workers(), threadpool_info()
        for found in map_threads(threads, range(3), HOST):
            assert found == [1] * len(found)
        assert (numba.get_num_threads(), scipy.fft.get_workers(), threadpool_info()) == before
        assert before[0] == 2


@needs_two
def test_blas_has_one_thread_beside_those_of_the_rest() -> None:
    """Its idle threads would spin on the cores that the next step wants."""
    with cpu_threads(2):
        assert {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"} == {1}
        assert numba.get_num_threads() == scipy.fft.get_workers() == 2


@needs_two
def test_an_error_in_a_piece_is_that_of_the_whole() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise KeyError("piece 3")
        return item

    with cpu_threads(2):
        with pytest.raises(KeyError, match="piece 3"):
            map_threads(work, range(5), HOST)
        assert numba.get_num_threads() == 2


@pytest.mark.parametrize("threads", [1, 2])
def test_one_piece_or_one_thread_stays_here(threads: int) -> None:
    here = threading.get_ident()
    with cpu_threads(threads):
        items = range(1) if threads == 2 else range(3)
        assert map_threads(lambda item: (item, threading.get_ident()), items, HOST) == [(i, here) for i in items]


def test_what_is_on_a_gpu_stays_in_one_thread(emulated_gpu: object) -> None:
    import cupy  # type: ignore[import-not-found]

    here = threading.get_ident()
    with cpu_threads(2):
        found = map_threads(lambda _: threading.get_ident(), range(4), cupy.zeros(1))
    assert set(found) == {here}


@needs_two
def test_several_at_a_time_share_the_threads_and_come_in_order() -> None:
    both = threading.Barrier(2, timeout=60)

    def work(item: int) -> tuple[int, int, int, list[int]]:
        if item < 2:
            both.wait()
        of_piece = map_threads(lambda _: threading.get_ident(), range(2), HOST)
        return item**2, numba.get_num_threads(), scipy.fft.get_workers(), of_piece

    with cpu_threads(2):
        found = list(in_order(work, range(7), 4))
        assert numba.get_num_threads() == scipy.fft.get_workers() == 2
    assert [value for value, *_ in found] == [item**2 for item in range(7)]
    assert {(threads, workers) for _, threads, workers, _ in found} == {(1, 1)}
    threads = [set(idents) for *_, idents in found]
    assert all(len(idents) == 1 for idents in threads)  # pieces of what has one thread are not shared out
    assert threading.get_ident() not in set().union(*threads)


@needs_two
def test_items_are_taken_as_results_are() -> None:
    """However many there are, a few are in memory."""
    taken = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    with cpu_threads(2):
        results = in_order(lambda item: item, items(), 2)
        for n in range(10):
            assert next(results) == n
            assert len(taken) <= n + 4
        results.close()


@needs_two
def test_an_error_among_several_ends_all() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise KeyError("item 3")
        return item

    with cpu_threads(2):
        results = in_order(work, range(50), 2)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(KeyError, match="item 3"):
            next(results)
        assert len(begun) < 10


@pytest.mark.parametrize(("threads", "at_once"), [(1, 4), (2, 1)])
def test_one_at_a_time_stays_here_with_all_threads(threads: int, at_once: int) -> None:
    here, all_of_them = threading.get_ident(), min(threads, 2 if TWO else 1)
    with cpu_threads(threads):
        found = list(in_order(lambda _: (threading.get_ident(), numba.get_num_threads()), range(3), at_once))
    assert found == [(here, all_of_them)] * 3


def test_what_two_threads_ask_for_is_made_once() -> None:
    made, asked = [], threading.Barrier(2, timeout=60)

    def make(item: int, *, sign: int = 1) -> list[int]:
        made.append(item)
        time.sleep(0.05)  # the other asks meanwhile
        return [sign * item]

    once = Once(make, keep=2)

    def ask(_: int) -> list[int]:
        asked.wait()
        return once(5, sign=-1)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ask, range(2))
    assert first is second
    assert first == [-5]
    assert made == [5]
    once(5)
    assert made == [5, 5]  # another sign
    once(5, sign=-1)
    once(7)
    assert made == [5, 5, 7]
    once(5, sign=-1)
    assert made == [5, 5, 7]
    once(5)  # asked for longest ago, and let go of
    assert made == [5, 5, 7, 5]
    once.cache_clear()
    once(5)
    assert made == [5, 5, 7, 5, 5]


def test_what_could_not_be_made_is_tried_again() -> None:
    tries, asked = [], threading.Barrier(2, timeout=60)

    class Large:
        pass

    large = []

    def make() -> int:
        tries.append(None)
        if len(tries) == 1:
            held = Large()
            large.append(weakref.ref(held))
            asked.wait()
            time.sleep(0.05)  # the other waits for what will not come
            raise MemoryError("first")
        return 3

    once = Once(make, keep=1)

    def ask(wait: bool) -> int | None:
        try:
            if wait:
                asked.wait()
            return once()
        except MemoryError:
            return None

    gc.disable()
    try:
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(ask, [False, True])) == [None, 3]
        assert large[0]() is None  # what the failed try held is gone at once
    finally:
        gc.enable()
    assert once() == 3
    assert len(tries) == 2


def test_steps_in_several_threads_take_the_time_that_passes() -> None:
    clock, beside = Clock(), Clock()

    def work(seconds: float) -> None:
        with beside("long" if seconds > 0.15 else "short"):
            time.sleep(seconds)

    begin = time.perf_counter()
    clock.take(beside)
    assert clock.seconds == {}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, [0.2, 0.1, 0.1]))
    clock.take(beside)
    passed = time.perf_counter() - begin
    assert sum(clock.seconds.values()) == pytest.approx(passed, abs=0.01)
    assert clock.seconds["long"] == pytest.approx(clock.seconds["short"], rel=0.2)
    before = dict(clock.seconds)
    clock.take(beside)
    assert clock.seconds == before


def test_a_particle_alone_and_joined_again(rng: np.random.Generator) -> None:
    support = make_support(9, 3)
    m = len(support)
    weights, index = rng.random((2, m)).astype(np.float32), np.array([1, 0, 1])
    unseen = UnseenGain(rng.random((2, 4, 4, 4)), index, rng.random((2, 4, 4, 4)))
    spectra = rng.standard_normal((3, m)).astype(np.complex64)
    magnitudes = rng.random((3, m)).astype(np.float32)
    batch = Observation(support, spectra, weights, index, ("a", "b"), magnitudes, unseen)
    rotations = np.broadcast_to(np.eye(3), (3, 2, 3, 3))
    for i in range(3):
        one = batch.alone(i)
        assert one.weight_ids == (("a", "b")[index[i]],)
        np.testing.assert_array_equal(one.spectra, spectra[i : i + 1])
        np.testing.assert_array_equal(one.weights[one.weight_index], weights[index[i : i + 1]])
        assert one.magnitudes is not None
        np.testing.assert_array_equal(one.magnitudes, magnitudes[i : i + 1])
        np.testing.assert_array_equal(one.expected_gain(rotations[:1]), batch.expected_gain(rotations)[i : i + 1])
        assert one.unseen is not None
        assert one.unseen.low is not None
        np.testing.assert_array_equal(one.unseen.low[0], unseen.low[index[i]])
    parts = [
        Candidates(
            rng.random((b, 2, 3, 3)), rng.random((b, 2, 3)), rng.random((b, 2)), np.full(b, 2), rng.random((b, 2))
        )
        for b in (2, 1)
    ]
    whole = Candidates.joined(parts)
    for name in ("rotations", "shifts", "correlation", "count", "gain"):
        np.testing.assert_array_equal(getattr(whole, name), np.concatenate([getattr(p, name) for p in parts]))
