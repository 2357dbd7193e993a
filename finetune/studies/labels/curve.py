"""Fit a learning curve, the error against the number of training images, and extrapolate it to more images.

The curve is an inverse power law error(n) = a + b n^-c with a, b ≥ 0 (Hestness et al. 2017; Viering & Loog 2021). The floor a
remains with any number of images; the rest shrinks by a fixed factor with each doubling of n. A few sizes do not determine a, b
and c: many laws fit equally well and differ in their extrapolation. Therefore the prediction averages over all laws on a grid,
weighted by their posterior probability (Bayesian model averaging), and the interval is that of the mixture. The prior of c is
uniform; the prior of a has probability `NO_FLOOR` at 0 and is uniform elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, norm

EXPONENTS = tuple(float(one) for one in np.linspace(0.1, 1.2, 45))
FLOORS = 41  # grid points for a, from 0 to the lowest measured error
NO_FLOOR = 0.5  # prior probability of a = 0; a uniform prior alone gives intervals that miss laws without a floor
MISFIT = 0.002  # standard deviation of the deviation from a power law, at every size
SHRINKAGE = 0.3  # of correlations between sizes, which cannot be estimated well from few repetitions
LEVEL = 0.95
LEAST_P = 0.001

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LearningCurve:
    """Measured errors for S training set sizes in R repetitions, and the power laws fitted to them.

    Args:
        sizes: (S,) numbers of training images, ascending.
        errors: (R, S). Each repetition holds out other images; within it, the training images of a size are a subset of those of
            the next size.
        held_out_share: number of held-out images divided by the number of training images of the largest size.
    """

    sizes: tuple[int, ...]
    errors: Floats
    held_out_share: float

    @property
    def mean(self) -> Floats:
        """(S,) the mean error over the repetitions."""
        return np.asarray(self.errors.mean(axis=0))

    @cached_property
    def covariance(self) -> Floats:
        """(S, S) the covariance of the mean errors.

        The repetitions share images, so their mean varies more than that of independent repetitions. The covariance is multiplied
        by 1/R + `held_out_share` instead of 1/R (Nadeau & Bengio 2003).
        """
        n = len(self.errors)
        found = np.cov(self.errors, rowvar=False) if n > 1 else np.diag(self.mean * (1 - self.mean) / max(self.sizes))
        diagonal = np.diag(np.diag(found))
        shrunk = (1 - SHRINKAGE) * found + SHRINKAGE * diagonal
        return np.asarray((1 / n + self.held_out_share) * shrunk + MISFIT**2 * np.eye(len(self.sizes)))

    @property
    def standard_errors(self) -> Floats:
        """(S,) the standard errors of the mean errors."""
        return np.asarray(np.sqrt(np.diag(self.covariance)))

    @property
    def fits(self) -> bool:
        """Whether some law is consistent with the measured errors (chi-squared test of the best law, p > `LEAST_P`)."""
        free = max(len(self.sizes) - 3, 1)
        return bool(chi2.sf(self._laws.least_misfit, free) > LEAST_P)

    @cached_property
    def _laws(self) -> _Laws:
        return _fitted(np.array(self.sizes, float), self.mean, self.covariance)

    def error(self, n: int) -> Estimate:
        """Return the predicted error with `n` training images."""
        return self._laws.estimate(float(n) ** -self._laws.c, self._laws.a)

    def gain(self, start: int, end: int) -> Estimate:
        """Return the predicted reduction of the error from `start` to `end` training images."""
        return self._laws.estimate(float(start) ** -self._laws.c - float(end) ** -self._laws.c, np.zeros_like(self._laws.c))


@dataclass(frozen=True)
class _Laws:
    """The laws on the grid of a and c with their posterior probabilities; b has a normal distribution that is clipped at 0."""

    a: Floats  # (L,)
    c: Floats  # (L,)
    b: Floats  # (L, Q) quantiles of the distribution of b, equally likely
    weight: Floats  # (L,) posterior probability
    least_misfit: float  # chi-squared of the best law

    def estimate(self, times: Floats, plus: Floats) -> Estimate:
        """Return mean and 95 % interval of plus + times · b over all laws; both arguments are (L,)."""
        values = (plus[:, None] + times[:, None] * self.b).ravel()
        weights = np.repeat(self.weight / self.b.shape[1], self.b.shape[1])
        order = np.argsort(values)
        reached = np.cumsum(weights[order])
        low, high = (float(values[order[min(int(np.searchsorted(reached, q)), len(order) - 1)]]) for q in _TAILS)
        return Estimate(float(weights @ values), low, high)


_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_NORMAL = norm.ppf((np.arange(15) + 0.5) / 15)  # equally likely values of a standard normal distribution


def _fitted(sizes: Floats, mean: Floats, covariance: Floats) -> _Laws:
    """Compute the posterior of the laws on the grid, from sizes (S,), mean errors (S,) and their covariance (S, S).

    For given a and c the errors are linear in b, so the posterior of b is normal around its generalised least squares estimate.
    """
    inverse = np.linalg.inv(covariance)
    a, c = (one.ravel() for one in np.meshgrid(np.linspace(0.0, float(mean.min()), FLOORS), EXPONENTS, indexing="ij"))
    falling = sizes[None, :] ** -c[:, None]  # (L, S)
    rest = mean[None, :] - a[:, None]  # (L, S)
    precision = np.einsum("ls,st,lt->l", falling, inverse, falling)
    best = np.einsum("ls,st,lt->l", falling, inverse, rest) / precision
    spread = 1 / np.sqrt(precision)
    left = rest - best[:, None] * falling
    misfit = np.einsum("ls,st,lt->l", left, inverse, left)
    prior = np.where(a == 0, NO_FLOOR / (1 - NO_FLOOR) * (FLOORS - 1), 1.0)
    weight = prior * np.exp(-0.5 * (misfit - misfit.min())) * (best > 0)
    b = np.maximum(best[:, None] + spread[:, None] * _NORMAL, 0.0)
    if not weight.sum():  # the errors do not fall with the number of images
        weight = np.ones_like(weight)
    return _Laws(a, c, b, weight / weight.sum(), float(misfit.min()))


def training_sizes(n_images: int, n_classes: int, n_sizes: int) -> tuple[int, ...]:
    """Return `n_sizes` geometrically spaced sizes up to `n_images`, the smallest with at least four images per class on average.

    Returns:
        An empty tuple if there are too few images.
    """
    smallest = max(n_images // 12, 4 * n_classes)
    if smallest * 2 > n_images:
        return ()
    return tuple(int(one) for one in np.unique(np.geomspace(smallest, n_images, n_sizes).round()))


def nested(labels: NDArray[np.integer], sizes: Sequence[int], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Return the positions of stratified training images for each size; those of a size are a subset of those of the next."""
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        # The images of a class are spread evenly over the order. Its first one is moved to the front: every size has all classes.
        place[rng.permutation(members)] = (np.arange(len(members)) + rng.uniform(0, 1)) / len(members)
        place[members] = np.where(place[members] == place[members].min(), -1.0, place[members])
    order = np.lexsort((rng.uniform(size=len(labels)), place))
    return [np.sort(order[:size]) for size in sizes]
