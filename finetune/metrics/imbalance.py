"""The rule that decides when class sizes are so unequal that a mean over images hides the small classes."""

from __future__ import annotations

from collections.abc import Iterable

UNEQUAL = 5.0  # times as many images in the largest class as in the smallest
LEAST_OF_THE_LARGEST = 20  # images; in smaller samples equal classes may differ by this factor by chance


def are_unequal(counts: Iterable[int]) -> bool:
    """Return whether, for these numbers of images by class, accuracy over all images would hide the small classes.

    Classes without an image are ignored.
    """
    present = [count for count in counts if count]
    return bool(present) and max(present) >= max(UNEQUAL * min(present), LEAST_OF_THE_LARGEST)
