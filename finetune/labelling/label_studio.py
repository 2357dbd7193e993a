"""Export suggestions for Label Studio: one task per image, with the model's prediction as pre-annotation. Torch-free."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from finetune.labelling.queries import query_of
from finetune.labelling.suggestion import Suggestions

CONTROL, OBJECT = "label", "image"  # names in the labelling configuration, to which the pre-annotations refer
_LOCAL_FILES = "/data/local-files/?d="  # URL under which Label Studio serves local files


def tasks_of(found: Suggestions) -> list[dict[str, Any]]:
    """Return the tasks. Image URLs are paths relative to the given folder, which Label Studio must serve as local files."""
    query = query_of(found.task)
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
                    "model_version": found.model,
                    "score": round(query.score(one), 6),
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
        for one in found.chosen
    ]


def labelling_page(found: Suggestions) -> str:
    """Return Label Studio's labelling configuration (XML) for the tasks."""
    choice = query_of(found.task).choice
    choices = "\n".join(f"    <Choice value={quoteattr(name)}/>" for name in found.classes)
    return (
        f'<View>\n  <Image name="{OBJECT}" value="${OBJECT}"/>\n'
        f'  <Choices name="{CONTROL}" toName="{OBJECT}" choice="{choice}" showInline="true">\n{choices}\n  </Choices>\n</View>\n'
    )
