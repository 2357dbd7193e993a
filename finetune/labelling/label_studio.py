"""Export suggestions for Label Studio: one task per image, with the model's prediction as pre-annotation. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from finetune.labelling.suggest import Suggestion

CONTROL, OBJECT = "label", "image"  # names in the labelling configuration, to which the pre-annotations refer
_LOCAL_FILES = "/data/local-files/?d="  # URL under which Label Studio serves local files


def tasks_of(suggestions: Sequence[Suggestion], model: str, *, exclusive: bool = True) -> list[dict[str, Any]]:
    """Return the tasks. Image URLs are paths relative to the given folder, which Label Studio must serve as local files.

    Args:
        exclusive: whether every image has exactly one label.
    """
    return [
        {
            "data": {
                OBJECT: _LOCAL_FILES + quote(str(PurePosixPath(one.relative)), safe="/", errors="surrogateescape"),
                "file": one.relative,
                "rank": one.rank,
                "reason": one.reason,
            },
            "predictions": [
                {
                    "model_version": model,
                    "score": round(one.probabilities[0] if exclusive else one.margin, 6),
                    "result": [
                        {
                            "from_name": CONTROL,
                            "to_name": OBJECT,
                            "type": "choices",
                            "value": {"choices": list(one.given)},
                        }
                    ]
                    if one.given
                    else [],
                }
            ],
        }
        for one in suggestions
    ]


def labelling_page(classes: Sequence[str], *, exclusive: bool = True) -> str:
    """Return Label Studio's labelling configuration (XML) for the tasks."""
    choice = "single" if exclusive else "multiple"
    choices = "\n".join(f"    <Choice value={quoteattr(name)}/>" for name in classes)
    return (
        f'<View>\n  <Image name="{OBJECT}" value="${OBJECT}"/>\n'
        f'  <Choices name="{CONTROL}" toName="{OBJECT}" choice="{choice}" showInline="true">\n{choices}\n  </Choices>\n</View>\n'
    )
