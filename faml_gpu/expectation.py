"""Step 3, expectation: log-likelihoods of the candidate poses and their posterior probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from faml_gpu import ops
from faml_gpu.array_backend import Array, namespace, step, to_host
from faml_gpu.fast_alignment import Candidates, Observation, Reference, margin

__all__ = ["BatchPosterior", "expectation", "fitted_scale", "log_normaliser"]

KEPT_MASS = 0.999  # poses of a particle are kept, best first, up to this posterior mass


@dataclass(frozen=True)
class BatchPosterior:
    """Poses of a batch that carry posterior mass, flat and sorted by particle (host arrays).

    particle, class_index (n,) int64; rotations (n, 3, 3); shifts (n, 3); probability (n,), sums to 1 per particle.
    residual (n, r_max + 1): w^2 |X - RA|^2 per Fourier shell of each kept pose. shift2 (n,): mean of |t|^2 over the
    shifts it stands for, voxels^2.
    log_likelihood (B,): logsumexp over classes and poses; class_probability (B, K), of all poses.
    candidates: how many poses of all classes there were. gain (B,): nats by which the likeliest pose is likelier than
    no signal at all. scale (B,): see `fitted_scale`; None where not asked for.
    """

    particle: NDArray[np.int64]
    class_index: NDArray[np.int64]
    rotations: NDArray[np.float64]
    shifts: NDArray[np.float64]
    probability: NDArray[np.float64]
    residual: NDArray[np.float64]
    shift2: NDArray[np.float64]
    log_likelihood: NDArray[np.float64]
    class_probability: NDArray[np.float64]
    candidates: int
    gain: NDArray[np.float64]
    scale: NDArray[np.float64] | None = None


def expectation(
    observation: Observation,
    references: list[Reference],
    candidates: list[Candidates],
    log_volumes: list[Array],
    alpha: NDArray[np.float64],
    sigma2: NDArray[np.float64],
    zeta: float,
) -> BatchPosterior:
    """Posterior over (class, pose), Eq. 14-15, with the pose integral replaced by the weighted candidates.

    log P = log alpha_k + log v~ - sum_j w_j^2 |X_j - (RA)_j|^2 / (2 sigma_j^2) - |t|^2 / (2 zeta^2) + const,
    the sum over the full Fourier volume (each coefficient and its conjugate). Candidates whose `gain` already says that
    their share of the posterior is less than exp(-30) get 0, and no sum. What is unseen of the averages is expected to
    add its share (`fast_alignment.UnseenGain`): that counts in the posterior, not in the reported likelihood.

    Parameters
    ----------
    observation : Observation
        B particles.
    references, candidates, log_volumes : K each
    alpha : (K,)
    sigma2 : (S,), S > r_max
        Noise variance per Fourier shell.
    zeta : float, voxels
    """
    b = len(observation.spectra)
    r_max = observation.support.r_max
    precision = np.zeros(r_max + 1)
    precision[1:] = 1 / sigma2[1 : r_max + 1]
    priors = []
    for k, c in enumerate(candidates):
        prior = np.log(max(alpha[k], np.finfo(np.float64).tiny)) + log_volumes[k]
        priors.append(prior - 0.5 * (c.shifts**2).sum(axis=-1) / zeta**2)
    n_candidates = sum(int(c.count.sum()) for c in candidates)
    expected = [observation.expected_gain(c.rotations) for c in candidates]
    candidates, priors, expected = _that_matter(candidates, priors, expected)
    residuals, logits = [], []
    with step("residuals"):
        for k, c in enumerate(candidates):
            shells = ops.residual(
                references[k].grid,
                observation.spectra,
                observation.weights,
                observation.weight_index,
                c.rotations,
                c.shifts,
                c.count,
                observation.support,
                references[k].padding,
            )
            xp = namespace(shells)
            logit = priors[k] - 0.5 * (shells @ xp.asarray(precision))
            logit[xp.arange(logit.shape[1])[None] >= c.count[:, None]] = -np.inf
            residuals.append(to_host(shells))
            logits.append(to_host(logit))
    with step("posterior"):
        logit = np.stack(logits, axis=1)  # (B, K, n)
        evidence = logsumexp(logit.reshape(b, -1), axis=1)
        logit = logit + np.stack([to_host(e) for e in expected], axis=1)
        probability = np.exp(logit - logsumexp(logit.reshape(b, -1), axis=1)[:, None, None])
        kept = _kept(probability.reshape(b, -1)).reshape(probability.shape)
        particle, class_index, pose = np.nonzero(kept)
        p = probability[kept]
        p /= np.bincount(particle, p, minlength=b)[particle]
        residual = np.stack(residuals, axis=1)  # (B, K, n, r_max + 1)
        least = np.where(kept, residual @ precision, np.inf).reshape(b, -1).min(axis=1)
        weight = observation.weights[observation.weight_index] ** 2
        power = to_host(observation.support.shell_sums(weight * abs(observation.spectra) ** 2))
        rotations = np.stack([to_host(c.rotations) for c in candidates])
        shifts = np.stack([to_host(c.shifts) for c in candidates])
        own = [(c.shifts**2).sum(axis=-1) if c.shift2 is None else c.shift2 for c in candidates]
        shift2 = np.stack([to_host(x) for x in own])
        return BatchPosterior(
            particle.astype(np.int64),
            class_index.astype(np.int64),
            rotations[class_index, particle, pose],
            shifts[class_index, particle, pose],
            p,
            residual[particle, class_index, pose],
            shift2[class_index, particle, pose],
            evidence,
            probability.sum(axis=2),
            n_candidates,
            0.5 * (power @ precision - least),
        )


def fitted_scale(
    posterior: BatchPosterior, observation: Observation, references: list[Reference], sigma2: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What to multiply the average by, (B,), to explain each particle best in its likeliest pose and class.

    The least residual w^2 |X - s RA|^2 / sigma^2 is that of s = sum w^2 Re(X conj RA) / sigma^2 over P = sum w^2 |RA|^2
    / sigma^2. The first sum is `gain` + P / 2.

    Parameters
    ----------
    posterior, observation, references : as in `expectation`
    sigma2 : (S,)
    """
    b, support = len(observation.spectra), observation.support
    xp = namespace(observation.spectra)
    precision = np.zeros(support.r_max + 1)
    precision[1:] = 1 / sigma2[1 : support.r_max + 1]
    order = np.lexsort((posterior.residual @ precision, posterior.particle))
    best = order[np.searchsorted(posterior.particle[order], np.arange(b))]
    power = np.zeros(b)
    for k, reference in enumerate(references):
        here = posterior.class_index[best] == k
        shells = ops.residual(
            reference.grid,
            xp.zeros_like(observation.spectra),
            observation.weights,
            observation.weight_index,
            xp.asarray(posterior.rotations[best][:, None]),
            xp.asarray(posterior.shifts[best][:, None]),
            xp.asarray(here.astype(np.int64)),
            support,
            reference.padding,
        )
        power[here] = to_host(shells)[here, 0] @ precision
    return np.asarray((posterior.gain + 0.5 * power) / np.maximum(power, np.finfo(np.float64).tiny))


def _that_matter(
    candidates: list[Candidates], priors: list[Array], expected: list[Array]
) -> tuple[list[Candidates], list[Array], list[Array]]:
    """The candidates that by their gain may carry mass, moved to the front, their priors and expected gains."""
    if any(c.gain is None for c in candidates):
        return candidates, priors, expected
    xp = namespace(candidates[0].rotations)
    gains = xp.stack([c.known_gain() for c in candidates])  # (K, B, n)
    worth = gains + xp.stack(priors) + xp.stack(expected)
    known = xp.where(xp.isfinite(worth), worth, -np.inf)
    limit = known.max(axis=(0, 2)) - margin(xp.where(xp.isfinite(gains), gains, 0).max(axis=(0, 2)))
    kept = (worth >= limit[:, None]) & (gains > -np.inf)
    count = kept.sum(axis=2)
    n, widest = gains.shape[2], max(1, int(count.max()))
    order = xp.argsort(xp.where(kept, 0, n) + xp.arange(n), axis=2)[:, :, :widest]
    rows = xp.arange(gains.shape[1])[:, None]
    front = [
        Candidates(
            xp.ascontiguousarray(c.rotations[rows, o]),
            xp.ascontiguousarray(c.shifts[rows, o]),
            c.correlation[rows, o],
            m,
            g[rows, o],
            None if c.shift2 is None else c.shift2[rows, o],
        )
        for c, o, m, g in zip(candidates, order, count, gains, strict=True)
    ]
    priors, expected = ([x[rows, o] for x, o in zip(xs, order, strict=True)] for xs in (priors, expected))
    return front, priors, expected


def _kept(probability: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The largest entries of each row (B, n), until their sum reaches KEPT_MASS; the largest always."""
    order = np.argsort(-probability, axis=1, kind="stable")
    sorted_p = np.take_along_axis(probability, order, axis=1)
    before = np.cumsum(sorted_p, axis=1) - sorted_p
    keep = (before < KEPT_MASS) & (sorted_p > 0)
    out = np.zeros(probability.shape, bool)
    np.put_along_axis(out, order, keep, axis=1)
    return out


def log_normaliser(observed: NDArray[np.float64], sigma2: NDArray[np.float64], zeta: float, n: int) -> float:
    """What belongs to the objective beside the log-sum-exp: -1/2 sum J log sigma^2 - (3 n / 2) log zeta^2.

    observed (..., r_max + 1): sum of w^2 over the particles' voxels of each shell (J°), of one or several groups with
    sigma2 (..., S); without this term the likelihood falls as sigma shrinks.
    """
    logs = np.log(sigma2[..., 1 : observed.shape[-1]])
    return float(-0.5 * (observed[..., 1:] * logs).sum() - 1.5 * n * np.log(zeta**2))
