"""An image that was chosen for labelling with the reason, and the result of a choice. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune.data.dataset import Sample
from finetune.evaluation.predict import UnreadableSample
from finetune.messages import plural, printable


@dataclass(frozen=True)
class Suggestion:
    """One image to label, and why it was chosen.

    Args:
        file: its path as found.
        relative: its path relative to the given folder.
        given: the labels that the model predicts: exactly one, or any number if images may have several.
        likely: the most probable classes, with their `probabilities`; if images may have several labels, the least certain ones.
        margin: difference of the two highest probabilities, or 1 minus the uncertainty of the labels; 0 is maximal uncertainty.
        stands_for: number of images of the pool to which it is the nearest suggestion, including itself.
        reason: probabilities and `stands_for` as a sentence.
    """

    rank: int
    file: str
    relative: str
    sha256: str
    given: tuple[str, ...]
    likely: tuple[str, ...]
    probabilities: tuple[float, ...]
    margin: float
    stands_for: int
    reason: str
    sample: Sample = field(repr=False)

    @property
    def first_two(self) -> tuple[str | float, ...]:
        """The first two of `likely`, each with its probability, as four cells of a table; empty texts if there is one alone."""
        pairs = zip(self.likely[:2], self.probabilities[:2], strict=True)
        cells = [cell for name, probability in pairs for cell in (name, round(probability, 6))]
        return (*cells, *[""] * (4 - len(cells)))

    def to_dict(self) -> dict[str, Any]:
        """Return the suggestion as JSON values."""
        return {
            "rank": self.rank,
            "file": printable(self.file),
            "sha256": self.sha256,
            "labels": list(self.given),
            "predictions": [
                {"label": label, "probability": probability}
                for label, probability in zip(self.likely, self.probabilities, strict=True)
            ],
            "margin": self.margin,
            "stands_for": self.stands_for,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Suggestions:
    """The images to label next, least certain first, and the counts of those that were left out."""

    model: str
    classes: tuple[str, ...]
    task: str  # the name of the model's task
    n_pictures: int  # size of the pool
    chosen: tuple[Suggestion, ...]
    unreadable: tuple[UnreadableSample, ...] = ()
    same_bytes: int = 0  # exact duplicates
    seen: int = 0  # files that the model was trained or validated on, or that are in the labelled data
    blank: int = 0  # images that would have been chosen but show nothing: one colour throughout
    near_copies: int = 0  # images that would have been chosen but are near duplicates of a chosen or labelled one

    def to_dict(self) -> dict[str, Any]:
        """Return the suggestions as JSON values."""
        return {
            "model": self.model,
            "n_pictures": self.n_pictures,
            "suggestions": [one.to_dict() for one in self.chosen],
            "left_out": {
                "unreadable": [{"file": printable(bad.sample.id), "reason": bad.error.message} for bad in self.unreadable],
                "same_bytes": self.same_bytes,
                "already_labelled": self.seen,
                "blank": self.blank,
                "near_copies": self.near_copies,
            },
        }

    @property
    def left_out(self) -> tuple[str, ...]:
        """The reasons and counts of what was left out, as text."""
        said = (
            (len(self.unreadable), "cannot be read"),
            (self.seen, "labelled already"),
            (self.same_bytes, "the same bytes as another"),
            (self.blank, "one colour throughout, so there is nothing to label"),
            (self.near_copies, "a near copy of a suggested or labelled picture"),
        )
        return tuple(f"{plural(count, 'file')}: {what}" for count, what in said if count)
