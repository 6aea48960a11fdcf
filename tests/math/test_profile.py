"""What a profile collects: seconds within seconds, what operations say, from every thread."""

import time

import numpy as np
import pytest

from faml_gpu import ops
from faml_gpu.array_backend import step
from faml_gpu.fourier import make_support
from faml_gpu.profile import Machine, profiling, tally
from faml_gpu.threads import cpu_threads, in_order, map_threads


def test_steps_hold_those_within_them():
    with profiling() as profile:
        with step("outer"):
            tally(np.zeros(10, np.float32), flops=3)
            for _ in range(2):
                with step("inner"):
                    time.sleep(0.01)
                    tally(np.zeros(5), flops=1)
        with step("other"):
            pass
    assert list(profile.steps) == [("outer",), ("outer", "inner"), ("other",)]
    outer, inner = profile.steps["outer",], profile.steps["outer", "inner"]
    assert (outer.calls, inner.calls) == (1, 2)
    assert 0.02 <= inner.seconds <= outer.seconds
    assert (inner.moved, inner.flops) == (80, 2)
    assert (outer.moved, outer.flops) == (40 + 80, 3 + 2)


def test_without_a_profile_nothing_is_kept():
    with step("alone"):
        tally(np.zeros(10), flops=3)
    with profiling() as profile:
        tally(np.zeros(10), flops=3)  # of no step
    assert profile.steps == {}


def test_a_device_is_waited_for():
    waited = []
    with profiling(lambda: waited.append(1)), step("some"):
        assert not waited
    assert waited == [1]


def test_threads_add_to_the_step_that_started_them():
    def work(i):
        with step("piece"):
            tally(flops=i)

    with cpu_threads(2), profiling() as profile, step("whole"):
        map_threads(work, range(5), np.zeros(1))
        list(in_order(work, range(5), 2))
    assert profile.steps["whole", "piece"].calls == 10
    assert profile.steps["whole",].flops == 20


@pytest.mark.parametrize("n", [0, 3])
def test_correlations_count_their_samples(n, rng):
    support = make_support(9, 3)
    m, origin = len(support), np.zeros((n, 3))
    grid, spectra = np.ones((9, 9, 5), np.complex64), np.ones((1, m), np.complex64)
    arguments = np.zeros(n, np.int64), np.tile(np.eye(3), (n, 1, 1)), origin, np.ones((3, 7), np.complex64), support, 1
    with profiling() as profile, step("correlations"):
        ops.correlations(grid, spectra, abs(spectra), np.zeros(1, np.int64), *arguments)
    found = profile.steps["correlations",]
    # 50 of a trilinear sample, 30 of what is done with it (as counted in ops/correlations.py); and three sums along an
    # axis to three shifts: of 4 x 7 x 7 voxels, of 4 x 7 x 3, of 4 x 3 x 3.
    assert found.flops == n * (80 * m + 8 * 3 * 4 * (49 + 21 + 9))
    assert found.moved == 8 * (9 * 9 * 5) + (8 + 4) * m + 4 * n * 27


def test_table_shows_what_bounds():
    with profiling() as profile:
        with step("copies"):
            tally(np.zeros(1000, np.float32), flops=1)
        with step("counts"):
            tally(flops=5e6)
    for s in profile.steps.values():
        s.seconds = 2.0
    lines = profile.table(Machine(copy=4e3, gemm=5e6))
    copies, counts = (next(line.split() for line in lines if line.startswith(name)) for name in ("copies", "counts"))
    assert copies[1:4] == ["2.00", "50%", "1"]
    assert copies[-2:] == ["1.000", "50%"]  # 4000 bytes at 4000 a second, in 2 s
    assert counts[-2:] == ["1.000", "50%"]


def test_machine_reaches_something():
    found = Machine.measured(np, lambda: None, size=64, repeats=1)
    assert found.copy > 0
    assert found.gemm > 0
