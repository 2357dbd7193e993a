"""Write suggestions as files: a table, an HTML page with the images, and an import for Label Studio. Torch-free."""

from __future__ import annotations

import csv
import io
from collections import Counter
from functools import partial
from pathlib import Path

from finetune.bundle.image import decode_image
from finetune.errors import ImageError
from finetune.labelling.label_studio import labelling_page, tasks_of
from finetune.labelling.queries import query_of
from finetune.labelling.suggestion import Suggestion, Suggestions
from finetune.messages import plural, printable
from finetune.report.pictures import THUMBNAIL_PX, data_uri, thumbnail
from finetune.report.templates import render
from finetune.storage.files import json_text, write_atomic
from finetune.tasks import NO_LABEL, task_named

TABLE, PAGE, TASKS, LABELLING_PAGE = "suggestions.csv", "suggestions.html", "label_studio.json", "label_studio.xml"


def write_suggestions(folder: Path, found: Suggestions) -> dict[str, Path]:
    """Write all files into `folder`; return their paths by kind."""
    texts = {
        TABLE: _table(found),
        PAGE: _page(found),
        TASKS: json_text(tasks_of(found), indent=2) + "\n",
        LABELLING_PAGE: labelling_page(found),
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
    query = query_of(found.task)
    writer.writerow(["rank", "file", *query.columns, "stands_for", "reason", "sha256"])
    for one in found.chosen:
        writer.writerow([one.rank, one.file, *query.cells(one), one.stands_for, one.reason, one.sha256])
    return text.getvalue()


def _page(found: Suggestions) -> str:
    counts = Counter(label for one in found.chosen for label in one.given or (NO_LABEL,))
    query = query_of(found.task)
    return render(
        "suggest.html",
        title="What to label next",
        found=found,
        counts=plural(len(found.chosen), "picture"),
        pictures=[
            {"suggestion": one, "names": query.names(one), "file": printable(one.file), "uri": _picture(one)}
            for one in found.chosen
        ],
        noun=task_named(found.task).noun,
        by_class=[[name, count] for name, count in counts.most_common()],
    )


def _picture(one: Suggestion) -> str | None:
    """Return the image as a ``data:`` URI; None if its file can no longer be read."""
    try:
        image = one.sample.decode(partial(decode_image, short_side_px=THUMBNAIL_PX))
    except ImageError:
        return None
    return data_uri(thumbnail(image), "image/jpeg")
