"""Write suggestions as files: a table, an HTML page with the images, and an import for Label Studio. Torch-free."""

from __future__ import annotations

import csv
import io
from functools import partial
from pathlib import Path
from typing import Any

from finetune.bundle.image import decode_image
from finetune.errors import ImageError
from finetune.labelling.label_studio import labelling_page, tasks_of
from finetune.labelling.suggest import Suggestion, Suggestions
from finetune.messages import plural, printable
from finetune.report.pictures import THUMBNAIL_PX, data_uri, thumbnail
from finetune.report.templates import render
from finetune.storage.files import json_text, write_atomic

TABLE, PAGE, TASKS, LABELLING_PAGE = "suggestions.csv", "suggestions.html", "label_studio.json", "label_studio.xml"


def write_suggestions(folder: Path, found: Suggestions) -> dict[str, Path]:
    """Write all files into `folder`; return their paths by kind."""
    texts = {
        TABLE: _table(found),
        PAGE: _page(found),
        TASKS: json_text(tasks_of(found.chosen, found.model), indent=2) + "\n",
        LABELLING_PAGE: labelling_page(found.classes),
    }
    for name, text in texts.items():
        data = text.encode("utf-8", "surrogateescape" if name == TABLE else "backslashreplace")
        write_atomic(folder / name, lambda stream, data=data: stream.write(data))  # type: ignore[misc]
    return {
        "table": folder / TABLE,
        "page": folder / PAGE,
        "label_studio": folder / TASKS,
        "labelling_page": folder / LABELLING_PAGE,
    }


def _table(found: Suggestions) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["rank", "file", "predicted", "probability", "second", "second_probability", "stands_for", "reason", "sha256"]
    )
    for one in found.chosen:
        second: tuple[Any, Any] = (one.likely[1], round(one.probabilities[1], 6)) if len(one.likely) > 1 else ("", "")
        first = (one.likely[0], round(one.probabilities[0], 6))
        writer.writerow([one.rank, one.file, *first, *second, one.stands_for, one.reason, one.sha256])
    return text.getvalue()


def _page(found: Suggestions) -> str:
    rows: dict[str, list[Suggestion]] = {}
    for one in found.chosen:
        rows.setdefault(one.likely[0], []).append(one)
    by_class = [
        [name, len(of), f"{of[0].probabilities[0]:.0%}"] for name, of in sorted(rows.items(), key=lambda pair: -len(pair[1]))
    ]
    return render(
        "suggest.html",
        title="What to label next",
        found=found,
        counts=plural(len(found.chosen), "picture"),
        pictures=[{"suggestion": one, "file": printable(one.file), "uri": _picture(one)} for one in found.chosen],
        by_class=by_class,
    )


def _picture(one: Suggestion) -> str | None:
    """Return the image as a ``data:`` URI; None if its file can no longer be read."""
    try:
        image = one.sample.decode(partial(decode_image, short_side_px=THUMBNAIL_PX))
    except ImageError:
        return None
    return data_uri(thumbnail(image), "image/jpeg")
