"""What the server says in English has the page's other languages by its code, a warning by a pattern; here is what has none."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import finetune.data
import finetune.doctor
import service
from finetune.data.check import _warnings as check_warnings
from finetune.data.dataset import Dataset, LocalFile, Sample, unmeasured
from finetune.data.notes import Notes
from finetune.data.split import split_dataset
from finetune.doctor.classes import class_warnings
from finetune.errors import FinetuneError
from finetune.events import Event
from finetune.jobs import store
from service.problems import CODES
from service.web import LANGUAGES, STATIC

# Errors of the command line and of other programs, and those that the page never causes. Whoever adds a code decides here.
NOT_TRANSLATED = {
    "bad_request", "checkpoint_invalid", "client_closed_request", "error", "executor_unavailable", "http_error", "internal_error",
    "invalid_bundle", "job_failed", "method_not_allowed", "missing_extra", "mlflow_server_failed", "port_taken",
    "request_refused", "run_busy", "server_failed", "server_unreachable", "unsupported_media_type",
}  # fmt: skip
FINDINGS_NOT_TRANSLATED = {"formats", "framing"}  # notes whose sentence is a list of figures
PARTS = ("title", "evidence", "advice")


def words(language: str) -> dict[str, str | dict[str, str]]:
    found: dict[str, str | dict[str, str]] = json.loads(
        (STATIC / "strings" / f"server.{language}.json").read_text(encoding="utf-8")
    )
    return found


def codes_of_errors() -> set[str]:
    """Return the codes of all errors, found in the source, whether it is imported or not."""
    found = set(CODES.values())
    for package in (Path(finetune.doctor.__path__[0]).parent, Path(service.__path__[0])):
        for file in package.rglob("*.py"):
            if "diagnose" in file.parts:  # codes of diagnoses, which the page does not show
                continue
            found |= set(
                re.findall(r'^    code(?:: ClassVar\[str\])?(?:, \w+)* = "(\w+)"', file.read_text(encoding="utf-8"), re.M)
            )
    assert FinetuneError.code in found
    return found


def kinds_of_findings() -> Iterator[str]:
    """Yield the first argument of each finding that the doctor makes."""
    for file in Path(finetune.doctor.__path__[0]).rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            position = {"Finding": 0, "_those": 1}.get(name)
            if position is not None and isinstance(call.args[position] if len(call.args) > position else None, ast.Constant):
                yield call.args[position].value  # type: ignore[attr-defined]


def patterns(language: str) -> list[re.Pattern[str]]:
    """Return the patterns of warnings, which are written for browsers."""
    found = json.loads((STATIC / "strings" / f"warnings.{language}.json").read_text(encoding="utf-8"))
    return [re.compile(pattern.replace("(?<", "(?P<"), re.DOTALL) for pattern in found]


def noted_warnings() -> Iterator[str]:
    """Yield each sentence that a source of data appends to what was left out, with 3 for every number and name in it."""
    for file in Path(finetune.data.__path__[0]).rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match call:
                case ast.Call(ast.Attribute(ast.Attribute(attr="left_out"), "append"), [ast.JoinedStr(parts)]):
                    yield "".join(map(_filled, parts))


def _filled(part: ast.expr) -> str:
    """Return a part of an f-string with 3 for what is computed, and the noun of `plural`."""
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    call = part.value
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "plural":
        assert isinstance(call.args[1], ast.Constant)
        return f"3 {call.args[1].value}s"
    return "'3'" if part.conversion == ord("r") else "3"


def warnings_of_checked_data() -> tuple[str, ...]:
    """Return the warnings about copies in two classes and on both sides of a split, and about names and sizes of classes."""

    def sample(name: str, target: int, split: str, sha256: str = "") -> Sample:
        return Sample(name, LocalFile(Path(name)), target, split, sha256=sha256 or name)

    many = [sample(f"many {number}", 0, "train") for number in range(300)]
    copies = [sample(f"copy {at}", at % 2, split, "same") for at, split in enumerate(("train", "val", "test"))]
    classes = ("a dog|red", "a cat|red", "a dog|blue", "dark red", "dark-red")
    dataset = Dataset("photos", "photos", classes, (*many, *copies, *(sample(f"few {one}", one, "train") for one in (2, 3, 4))))
    notes = Notes(not_images=["notes.txt"])
    found = (*check_warnings(dataset, dataset.samples), *class_warnings(dataset), *notes.warnings(), unmeasured("val", ["a"]))
    assert len(found) == 10, found
    return found


def scarce_classes() -> tuple[str, ...]:
    """Return the warnings about classes of which the split leaves one image to train on, with and without folds as a way out."""
    found = []
    for rare in (2, 3):
        counts = {"many": 30, "rare": rare}
        samples = [
            Sample(f"{name} {at}", LocalFile(Path(name)), label, sha256=f"{name} {at}")
            for label, (name, count) in enumerate(counts.items())
            for at in range(count)
        ]
        found += split_dataset(Dataset("photos", "photos", tuple(counts), tuple(samples))).warnings
    assert len(found) == 2
    return tuple(found)


def test_plainer_words_for_warnings_are_for_warnings_that_there_are() -> None:
    for pattern in patterns("en"):
        assert any(pattern.pattern == other.pattern for other in patterns("de")), pattern


@pytest.mark.parametrize("language", [one for one in LANGUAGES if one != "en"])
def test_warnings_are_translated(language: str) -> None:
    known = patterns(language)
    noted = list(noted_warnings())
    assert len(noted) >= 9
    labels = unmeasured("val", ["a", "b"], "label")
    for warning in (*noted, *warnings_of_checked_data(), unmeasured("test", ["a", "b"]), labels, *scarce_classes()):
        assert any(pattern.search(warning) for pattern in known), warning
    for pattern, sentence in json.loads((STATIC / "strings" / f"warnings.{language}.json").read_text(encoding="utf-8")).items():
        forms = " ".join(sentence.values()) if isinstance(sentence, dict) else sentence
        assert set(re.findall(r"\{(\w+)\}", forms)) <= set(re.findall(r"\(\?<(\w+)>", pattern)), pattern


@pytest.mark.parametrize("language", [one for one in LANGUAGES if one != "en"])
def test_events_are_translated_by_their_kind(language: str) -> None:
    translated = {key.removeprefix("event.") for key in words(language) if key.startswith("event.")}
    kinds = {kind.kind for kind in Event.__subclasses__()} | set(
        re.findall(r'record_event\(connection, [^)]*?now, "(\w+)"', Path(store.__file__).read_text(encoding="utf-8"))
    )
    assert {"planned", "queued", "running", "cancelled"} <= kinds
    assert kinds - translated == {"warning", "failed"}  # warnings have patterns, failures the codes of their errors


@pytest.mark.parametrize("language", [one for one in LANGUAGES if one != "en"])
def test_findings_verdicts_and_events_have_plain_words_in_every_language(language: str) -> None:
    plain, other = words("en"), words(language)
    assert plain.keys() == {key for key in other if key.startswith(("event.", "finding.", "check.", "verdict."))}
    for key, sentence in plain.items():
        assert isinstance(sentence, dict) == isinstance(other[key], dict), key


@pytest.mark.parametrize("language", [one for one in LANGUAGES if one != "en"])
def test_what_the_server_says_is_translated_or_listed_as_not_translated(language: str) -> None:
    found = words(language)
    translated = {key.removeprefix("error.") for key in found if key.startswith("error.")}
    assert codes_of_errors() - translated == NOT_TRANSLATED & codes_of_errors()
    assert translated <= codes_of_errors()
    kinds = set(kinds_of_findings())
    assert len(kinds) > 15
    findings = {key.split(".")[1] for key in found if key.startswith("finding.")}
    assert kinds - findings == FINDINGS_NOT_TRANSLATED
    assert {f"finding.{kind}.{part}" for kind in findings for part in PARTS} <= found.keys()
    assert findings <= kinds
    assert {f"verdict.{outcome}" for outcome in ("better", "equivalent", "undecided", "short")} <= found.keys()
    for key, sentence in found.items():
        forms = sentence if isinstance(sentence, dict) else {"other": sentence}
        allowed = {"n"} if key.startswith(("finding.", "check.")) else set() if key.startswith("error.") else None
        for form in forms.values():
            assert allowed is None or set(re.findall(r"\{(\w+)\}", form)) <= allowed, key
