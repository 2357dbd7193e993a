"""What the server says in English has the page's other languages by its code; here is which codes have none."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import finetune.doctor
import service
from finetune.errors import FinetuneError
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
