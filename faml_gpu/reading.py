"""Particles read ahead: the next batch comes from the disk to the device while the one before is worked on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from faml_gpu.array_backend import Sender
from faml_gpu.data import Batch, ParticleSource

__all__ = ["Ahead"]

Int64 = NDArray[np.int64]


class Ahead:
    """A source of particles that reads one batch ahead, in a thread of its own; a context that ends with the thread.

    Parameters
    ----------
    source : ParticleSource
        No one else should read from it meanwhile.
    device : str
        Where the batches go.
    """

    def __init__(self, source: ParticleSource, device: str) -> None:
        self._source, self._sender = source, Sender(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reading")
        self._next: tuple[bytes, Future[Batch]] | None = None
        self._given: Batch | None = None
        self._asked = Lock()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, numbers: Int64, following: Int64) -> Batch:
        """The batch of these particles, its arrays on the device.

        Those `following` are read from now on, and had better be asked for next. What goes wrong with a batch is raised
        when it is asked for.
        """
        with self._asked:
            if self._next is None or self._next[0] != numbers.tobytes():
                self._begin(numbers)
            assert self._next is not None
            batch = self._next[1].result()
            # The one before is let go only now, between two sendings: so the mark of the next comes after all its work.
            self._given, self._next = batch, None
            if len(following):
                self._begin(following)
            return batch

    def _begin(self, numbers: Int64) -> None:
        self._next = numbers.tobytes(), self._thread.submit(self._read, numbers, self._sender.mark())

    def _read(self, numbers: Int64, after: object) -> Batch:
        batch = self._source.read(numbers)
        names = ["boxes", "weights", "weight_index", *(["multiplied"] if batch.multiplied is not None else [])]
        sent = self._sender.send([getattr(batch, name) for name in names], after)
        return replace(batch, **dict(zip(names, sent, strict=True)))
