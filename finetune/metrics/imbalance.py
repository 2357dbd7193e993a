"""When classes are so unequal in size that a mean over images hides the small ones. One rule, for everything that asks."""

from __future__ import annotations

from collections.abc import Iterable

UNEQUAL = 5.0  # times as many images in the largest class as in the smallest
LEAST_OF_THE_LARGEST = (
    20  # images: where no class has more, equal classes are as unequal as that by chance, in a split for example
)


def are_unequal(counts: Iterable[int]) -> bool:
    """Return whether accuracy over all images hides what happens to the small ones of classes with so many images.

    Classes without an image do not count: nothing was measured of them.
    """
    present = [count for count in counts if count]
    return bool(present) and max(present) >= max(UNEQUAL * min(present), LEAST_OF_THE_LARGEST)
