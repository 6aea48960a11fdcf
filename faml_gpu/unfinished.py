"""An iteration that has begun: what its E-step has summed up so far, to go on with after any batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from faml_gpu.data import Checkpoint
from faml_gpu.expectation import BatchPosterior
from faml_gpu.maximization import Accumulators

__all__ = ["Starts", "Unfinished"]


@dataclass
class Starts:
    """Random starts that have been tried: the log-likelihood each came to, and the best of them."""

    likelihoods: list[float] = field(default_factory=list)
    best: Checkpoint | None = None

    def add(self, tried: Checkpoint) -> None:
        """One more."""
        likelihood = tried.history[-1].log_likelihood
        if self.best is None or likelihood > self.best.history[-1].log_likelihood:
            self.best = tried
        self.likelihoods.append(likelihood)


@dataclass
class Unfinished(Checkpoint):
    """What an iteration began with, and what it has done: between two batches of its E-step, or after the last.

    Attributes
    ----------
    total : sums over the parts of the particles that are done, by part, on the host
    of_part : sums over what is done of the part being done, on the device
    part : number of this part, from 0
    posteriors : of what is done, in order
    seconds : spent per step
    starts : where a random start is being tried, those tried before it
    """

    total: Accumulators
    of_part: Accumulators
    part: int = 0
    posteriors: list[BatchPosterior] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    starts: Starts | None = None

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, size: tuple[int, int, int], *, n_curves: int, parts: int, device: str
    ) -> Unfinished:
        """The iteration after a checkpoint, or one that has begun, ready for its next batch on a device.

        size, n_curves, parts, device : see `Accumulators.zero`
        """
        if isinstance(checkpoint, Unfinished):
            return replace(checkpoint, of_part=checkpoint.of_part.on_device(device))
        total = Accumulators.zero(*size, n_curves=n_curves, parts=parts)
        of_part = Accumulators.zero(*size, n_curves=n_curves, device=device)
        return cls(checkpoint.state, checkpoint.posterior, checkpoint.history, total, of_part)

    @property
    def iteration(self) -> int:
        """Its number, from 1."""
        return self.state.iteration + 1

    @property
    def done(self) -> int:
        """Particles done."""
        return self.total.n + self.of_part.n

    def add(self, posterior: BatchPosterior, sums: Accumulators) -> None:
        """A batch more."""
        self.of_part.merge(sums)
        # The residuals are in the sums by now; those of all particles would take much memory.
        self.posteriors.append(replace(posterior, residual=posterior.residual[:, :0]))

    def close_part(self, parts: list[NDArray[np.int64]]) -> None:
        """If all of the part being done is, of the `parts` of the particles, go on to the next."""
        if self.part < len(parts) and self.of_part.n == len(parts[self.part]):
            self.total.merge(self.of_part.on_host(), self.part)
            self.of_part = self.of_part.emptied()
            self.part += 1
