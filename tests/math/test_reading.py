"""Reading ahead: the same batches, one of them before it is asked for, and errors in their place."""

import threading
import weakref
from itertools import pairwise

import numpy as np
import pytest

from faml_gpu.array_backend import Sender
from faml_gpu.data import Batch
from faml_gpu.errors import InputError
from faml_gpu.reading import Ahead

WAIT = 10.0  # seconds, for what takes none


class Source:
    """Boxes of one voxel that hold their number; what was read, and by which thread, is noted."""

    def __init__(self, n=12, bad=()):
        self.n, self.bad, self.asked, self.threads = n, bad, [], set()
        self.read_now = threading.Condition()

    def __len__(self):
        return self.n

    def read(self, numbers):
        with self.read_now:
            self.asked.append(numbers.tolist())
            self.threads.add(threading.current_thread())
            self.read_now.notify_all()
        if set(self.bad) & set(numbers.tolist()):
            raise InputError(f"boxes {numbers.tolist()}: found one that is gone")
        boxes = numbers.astype(np.float32)[:, None, None, None]
        return Batch(boxes, np.ones((1, 1, 1, 1), np.float32), np.zeros(len(numbers), np.int64), ("one",))

    def wait_for(self, count):
        with self.read_now:
            return self.read_now.wait_for(lambda: len(self.asked) >= count, WAIT)


def numbers_of(batch):
    return batch.boxes[:, 0, 0, 0].astype(int).tolist()


PARTS = [np.arange(0, 5), np.arange(5, 10), np.arange(10, 12), np.arange(0)]


def test_each_batch_is_read_once_and_one_ahead():
    source = Source()
    with Ahead(source, "cpu") as ahead:
        assert len(ahead) == 12
        for i, (part, following) in enumerate(pairwise(PARTS)):
            assert numbers_of(ahead.read(part, following)) == part.tolist()
            # While this one is worked on, the next is read: nobody has asked for it yet.
            assert source.wait_for(min(i + 2, 3))
    assert source.asked == [p.tolist() for p in PARTS[:-1]]
    assert threading.main_thread() not in source.threads
    assert len(source.threads) == 1
    assert not source.threads.pop().is_alive()


def test_what_was_not_foretold_is_read_all_the_same():
    """Smaller batches after memory ran out."""
    source = Source()
    with Ahead(source, "cpu") as ahead:
        assert numbers_of(ahead.read(PARTS[0], PARTS[1])) == PARTS[0].tolist()
        assert numbers_of(ahead.read(PARTS[0][:3], PARTS[0][3:])) == [0, 1, 2]
        assert numbers_of(ahead.read(PARTS[0][3:], PARTS[1])) == [3, 4]


def test_what_goes_wrong_is_told_with_its_own_batch():
    source = Source(bad=[7])
    with Ahead(source, "cpu") as ahead:
        assert numbers_of(ahead.read(PARTS[0], PARTS[1])) == PARTS[0].tolist()
        with pytest.raises(InputError, match=r"\[5, 6, 7, 8, 9\]"):
            ahead.read(PARTS[1], PARTS[2])


def test_to_a_gpu_on_a_stream_beside(emulated_gpu, monkeypatch):
    """From page-locked memory; there when it is asked for; written only where the device is through with what lay."""
    import cupy
    import cupyx

    made, streams = [], []
    empty, stream = cupyx.empty_pinned, cupy.cuda.Stream
    monkeypatch.setattr(cupyx, "empty_pinned", lambda *a: made.append(a[0]) or empty(*a))
    monkeypatch.setattr(cupy.cuda, "Stream", lambda **k: streams.append(stream(**k)) or streams[-1])
    marks = []
    record = stream.record
    monkeypatch.setattr(stream, "record", lambda self: marks.append((self, record(self))) or marks[-1][1])
    with Ahead(Source(), "cuda:0") as ahead:
        for i, (part, following) in enumerate(pairwise(PARTS)):
            # The next is marked only once this one is given: after all that was done with the one before.
            assert len(marks) == (i + 1 if i else 0)
            batch = ahead.read(part, following)
            assert isinstance(batch.boxes, cupy.ndarray)
            np.testing.assert_array_equal(batch.boxes[:, 0, 0, 0].get(), part)
            np.testing.assert_array_equal(batch.weights.get(), 1)
            np.testing.assert_array_equal(batch.weight_index.get(), 0)
    (side,) = streams
    assert len(made) == 9
    assert all(on is stream.null for on, _ in marks)
    assert side.waited == [mark for _, mark in marks]


def test_a_batch_is_kept_until_the_next_was_sent(emulated_gpu, monkeypatch):
    """Its memory is that of the stream it was sent on: let go sooner, the next batch could be written over it."""
    source, go, send, alive = Source(), threading.Event(), Sender.send, []
    read = source.read

    def late(numbers):
        if numbers[0] == PARTS[1][0]:
            go.wait(WAIT)
        return read(numbers)

    def noted(self, arrays, after):
        alive.append(given is not None and given() is not None)
        return send(self, arrays, after)

    monkeypatch.setattr(source, "read", late)
    monkeypatch.setattr(Sender, "send", noted)
    given = None
    with Ahead(source, "cuda:0") as ahead:
        given = weakref.ref(ahead.read(PARTS[0], PARTS[1]).boxes)
        threading.Timer(0.2, go.set).start()  # when the next has been asked for
        ahead.read(PARTS[1], PARTS[3])
    assert alive == [False, True]
    assert given() is None
