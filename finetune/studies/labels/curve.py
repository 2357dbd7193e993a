"""The learning curve: error against the number of training images, as an inverse power law, and what it says of more images.

The law is error(n) = a + b n^-c with a, b ≥ 0: what no number of images takes away, and what each doubling takes a fixed share
of (Hestness et al. 2017; Viering & Loog 2021). A few sizes do not tell a, b and c apart, and different laws that fit equally well
go on differently, so no single fit is extrapolated: all laws on a grid count, each as much as it fits, and the interval holds
what they say (Bayesian averaging; the prior of c is flat, that of a is half at 0 and else flat).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, norm

EXPONENTS = tuple(float(one) for one in np.linspace(0.1, 1.2, 45))
FLOORS = 41  # values of a that are tried, from 0 to the lowest error that was measured
NO_FLOOR = 0.5  # prior probability of a = 0; with a flat prior alone, intervals miss laws that fall without end
MISFIT = 0.002  # standard deviation of what the law leaves out, at every size
SHRINKAGE = 0.3  # of correlations between sizes, which few repetitions tell badly
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
    """Errors by training size, several times over.

    Args:
        sizes: (S,) numbers of training images, ascending.
        errors: (R, S) each row with other images held out, and its training images of one size among those of the next.
        held_out_share: held-out images for each training image of the largest size.
    """

    sizes: tuple[int, ...]
    errors: Floats
    held_out_share: float

    @property
    def mean(self) -> Floats:
        """(S,)"""
        return np.asarray(self.errors.mean(axis=0))

    @cached_property
    def covariance(self) -> Floats:
        """(S, S) of the mean errors.

        The repetitions share images, so their mean is less certain than that of independent ones: the variance is multiplied by
        1/R + held-out over training images (Nadeau & Bengio 2003).
        """
        n = len(self.errors)
        found = np.cov(self.errors, rowvar=False) if n > 1 else np.diag(self.mean * (1 - self.mean) / max(self.sizes))
        diagonal = np.diag(np.diag(found))
        shrunk = (1 - SHRINKAGE) * found + SHRINKAGE * diagonal
        return np.asarray((1 / n + self.held_out_share) * shrunk + MISFIT**2 * np.eye(len(self.sizes)))

    @property
    def standard_errors(self) -> Floats:
        """(S,) of the mean errors."""
        return np.asarray(np.sqrt(np.diag(self.covariance)))

    @property
    def fits(self) -> bool:
        """Whether any law is consistent with what was measured (chi-squared test of the best one, p > 0.001)."""
        free = max(len(self.sizes) - 3, 1)
        return bool(chi2.sf(self._laws.least_misfit, free) > LEAST_P)

    @cached_property
    def _laws(self) -> _Laws:
        return _fitted(np.array(self.sizes, float), self.mean, self.covariance)

    def error(self, n: int) -> Estimate:
        """Return the error that the laws expect of `n` training images."""
        return self._laws.estimate(float(n) ** -self._laws.c, self._laws.a)

    def gain(self, start: int, end: int) -> Estimate:
        """Return by how much the error falls from `start` to `end` training images."""
        return self._laws.estimate(float(start) ** -self._laws.c - float(end) ** -self._laws.c, np.zeros_like(self._laws.c))


@dataclass(frozen=True)
class _Laws:
    """Laws on the grid, each with its weight, and b as a normal distribution that is cut off at 0."""

    a: Floats  # (L,)
    c: Floats  # (L,)
    b: Floats  # (L, Q) equally likely values
    weight: Floats  # (L,) sums to one
    least_misfit: float  # chi-squared of the best law

    def estimate(self, times: Floats, plus: Floats) -> Estimate:
        """Return mean and interval of plus + times · b over all laws."""
        values = (plus[:, None] + times[:, None] * self.b).ravel()
        weights = np.repeat(self.weight / self.b.shape[1], self.b.shape[1])
        order = np.argsort(values)
        reached = np.cumsum(weights[order])
        low, high = (float(values[order[min(int(np.searchsorted(reached, q)), len(order) - 1)]]) for q in _TAILS)
        return Estimate(float(weights @ values), low, high)


_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_NORMAL = norm.ppf((np.arange(15) + 0.5) / 15)  # equally likely values of a standard normal distribution


def _fitted(sizes: Floats, mean: Floats, covariance: Floats) -> _Laws:
    """Weigh every law on the grid by its likelihood; b is integrated out."""
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
    if not weight.sum():  # no law that falls fits better than one that does not
        weight = np.ones_like(weight)
    return _Laws(a, c, b, weight / weight.sum(), float(misfit.min()))


def training_sizes(n_images: int, n_classes: int, n_sizes: int) -> tuple[int, ...]:
    """Return sizes in equal ratios up to all images, the smallest with a few images a class."""
    smallest = max(n_images // 12, 4 * n_classes)
    if smallest * 2 > n_images:
        return ()
    return tuple(int(one) for one in np.unique(np.geomspace(smallest, n_images, n_sizes).round()))


def nested(labels: NDArray[np.integer], sizes: Sequence[int], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Return the positions of training images for each size, each among those of the next, with all classes in proportion."""
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        # A class's images are spread evenly over the order; its first one comes early, so that every size has every class.
        place[rng.permutation(members)] = (np.arange(len(members)) + rng.uniform(0, 1)) / len(members)
        place[members] = np.where(place[members] == place[members].min(), -1.0, place[members])
    order = np.lexsort((rng.uniform(size=len(labels)), place))
    return [np.sort(order[:size]) for size in sizes]
