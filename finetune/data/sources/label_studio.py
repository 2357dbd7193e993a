"""Read exports of Label Studio, in JSON or JSON-MIN: choices become labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from finetune.data.dataset import NAMES_NO_FILE, NO_SUCH_FILE, BadImage
from finetune.data.names import class_name
from finetune.data.notes import Notes
from finetune.data.places.tree import IMAGE_SUFFIXES, Node, Place, shown_path
from finetune.data.reading import Reading
from finetune.data.sources.documents import json_files, mentions, read_document, text_of
from finetune.data.sources.lookup import Lookup
from finetune.data.sources.source import Listing, Record, refuse_columns
from finetune.errors import DataError
from finetune.messages import natural_list, plural, printable

_FULL, _SHORT = (b'"data"', b'"annotations"', b'"result"'), (b'"annotator"', b'"annotation_id"')
_ABOUT_THE_TASK = frozenset(
    {
        *(
            "id",
            "annotator",
            "annotation_id",
            "created_at",
            "updated_at",
            "lead_time",
            "agreement",
            "inner_id",
            "total_predictions",
        ),
        *("file_upload", "project", "meta", "comment_count", "unresolved_comment_count", "last_comment_updated_at"),
    }
)


class LabelStudioSource:
    """The source for an export beside its images; nothing is downloaded."""

    name: ClassVar[str] = "a Label Studio export"

    def expected(self, shown: str) -> str:
        return "a JSON or JSON-MIN export of Label Studio with a choice for each image, and the images beside it"

    def recognises(self, place: Place) -> bool:
        return any(_is_export(node) for node in json_files(place))

    def read(self, place: Place, reading: Reading, notes: Notes) -> Listing:
        refuse_columns(reading, notes, "Label Studio exports", used=("label",))
        files = [node for node in json_files(place) if _is_export(node)]
        shown = shown_path(place.tree, files[0].path)
        if len(files) > 1:
            names = natural_list(printable(node.path) for node in files)
            notes.problem(place.tree.shown, f"several exports: {names}; give the one that is meant as the data")
            return Listing()
        try:
            tasks = list(_tasks(read_document(files[0])))
        except DataError as error:
            notes.problem(shown, error.message.partition(": ")[2] or error.message)
            return Listing()
        control = _control(tasks, shown, reading, notes)
        if control is None:
            return Listing()
        records, several = _records(tasks, control, files[0], place, shown, notes)
        return Listing(records, {}, {None: shown}, several=several)


def _is_export(node: Node) -> bool:
    return node.suffix == ".json" and (mentions(node, *_FULL) or mentions(node, *_SHORT))


@dataclass
class _Task:
    """One image, and the choices of each annotator under each control of the labelling configuration."""

    image: str | None
    answers: list[dict[str, tuple[str, ...]]] = field(default_factory=list)


def _tasks(document: Any) -> Iterator[_Task]:
    if not isinstance(document, list):
        raise DataError(": must be a list of tasks")
    for task in document:
        if not isinstance(task, Mapping):
            raise DataError(": must be a list of tasks, each an object")
        data = task.get("data")
        if isinstance(data, Mapping):
            yield _Task(_image(data), [answer for one in _annotations(task) if (answer := _choices(one)) is not None])
        else:
            yield _Task(_image(task), [_short_choices(task)])


def _image(data: Mapping[str, Any]) -> str | None:
    """Return the value that names the image, found by its key, else by its suffix."""
    texts = {key: value for key, value in data.items() if isinstance(value, str)}
    for key in ("image", "img", "photo", "picture"):
        if key in texts:
            return texts[key]
    return next((value for value in texts.values() if f".{value.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES), None)


def _annotations(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the annotations to use: those marked as ground truth, else all that were not cancelled."""
    given = task.get("annotations") or task.get("completions") or []
    whole = [one for one in given if isinstance(one, Mapping) and not one.get("was_cancelled")] if isinstance(given, list) else []
    return [one for one in whole if one.get("ground_truth")] or whole


def _choices(annotation: Mapping[str, Any]) -> dict[str, tuple[str, ...]] | None:
    """Return the labels under each control; None if there are none."""
    found: dict[str, tuple[str, ...]] = {}
    result = annotation.get("result")
    for one in result if isinstance(result, list) else ():
        value = one.get("value") if isinstance(one, Mapping) else None
        if not isinstance(value, Mapping):
            continue
        chosen = value.get("choices")
        if chosen is None and isinstance(value.get("taxonomy"), list):
            chosen = [path[-1] for path in value["taxonomy"] if isinstance(path, list) and path]
        if isinstance(chosen, list):
            found[str(one.get("from_name", "choice"))] = _names(chosen)
    return found or None


def _short_choices(task: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    image = _image(task)
    for key, value in task.items():
        if key in _ABOUT_THE_TASK or value == image:
            continue
        if isinstance(value, Mapping):
            value = value.get("choices")
        names = _names(value if isinstance(value, list) else [value])
        if names:
            found[key] = names
    return found


def _names(values: Sequence[Any]) -> tuple[str, ...]:
    return tuple(class_name(text) for value in values if (text := text_of(value)) is not None and text.strip())


def _control(tasks: Sequence[_Task], shown: str, reading: Reading, notes: Notes) -> str | None:
    """Return the control whose choices are the labels; note a problem if there are several."""
    controls = Counter(name for task in tasks for answer in task.answers for name in answer)
    asked = reading.columns.label
    if asked is not None and asked in controls:
        return asked
    if len(controls) == 1 and asked is None:
        return next(iter(controls))
    if not controls:
        notes.problem(shown, "no task has a choice, which would be its label")
    else:
        notes.problem(
            shown, f"several controls were answered: {natural_list(controls)}; name one with --set data.label_column=NAME"
        )
    return None


def _records(
    tasks: Sequence[_Task], control: str, node: Node, place: Place, shown: str, notes: Notes
) -> tuple[tuple[Record, ...], bool]:
    """Return the samples, and whether images have several labels. If annotators differ, the majority decides."""
    lookup = Lookup(place.tree, node.path.rpartition("/")[0])
    records: list[Record] = []
    unlabelled = divided = undecided = 0
    for task in tasks:
        votes = Counter(tuple(sorted(answer[control])) for answer in task.answers if control in answer)
        if not votes:
            unlabelled += 1
            continue
        (labels, most), *others = votes.most_common()
        divided += bool(others)
        if others and others[0][1] == most:
            undecided += 1
            continue
        found = None if task.image is None else lookup.find(task.image)
        if found is None:
            what = f"{NO_SUCH_FILE}; export the images and put them beside the export" if task.image else NAMES_NO_FILE
            notes.bad.append(BadImage(f"{printable(node.path)}: {printable(task.image or 'a task')}", what))
            continue
        records.append(Record(printable(found.path), found.file, labels))
    if unlabelled:
        notes.left_out.append(f"{shown}: {plural(unlabelled, 'task')} without a label left out")
    if divided:
        notes.left_out.append(
            f"{shown}: annotators differ on {plural(divided, 'image')}; most of them decide, and {undecided:,} without a "
            "majority are left out"
        )
    lookup.say(notes)
    return tuple(records), any(len(record.labels) != 1 for record in records)
