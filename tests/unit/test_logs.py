"""The log: every line bounded, no secret in it, and nothing but JSON where JSON is asked for."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from finetune.runtime.logs import MAX_FIELD, MAX_MESSAGE, JsonFormatter, TextFormatter, shown, without_secrets

KEY = "ft_0123456789ab_" + "Abc-_xyz" * 5 + "123"


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("service.access", logging.INFO, __file__, 1, message, (), None)
    made.fields = fields
    return made


def test_a_key_is_shown_without_its_secret_part() -> None:
    assert (
        without_secrets(f"GET /v1/files/{KEY}/check?key={KEY}") == "GET /v1/files/ft_0123456789ab_…/check?key=ft_0123456789ab_…"
    )
    assert without_secrets("whsec_" + "a1b2" * 8) == "whsec_…"
    for harmless in ("/v1/models/ft_flowers_2024_of_the_summer", "ftjob-06c4x02f5yyar15v84c15tn2wz"):
        assert without_secrets(harmless) == harmless


def test_what_a_client_sent_is_cut_with_its_length() -> None:
    assert shown("a" * MAX_FIELD) == "a" * MAX_FIELD
    assert shown("a" * 60_000) == "a" * MAX_FIELD + "… (60,000 characters)"


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_a_line_is_bounded_and_has_no_secret(formatter: logging.Formatter) -> None:
    line = formatter.format(record(f"{KEY} " + "x" * 60_000, path=f"/{KEY}/" + "y" * 60_000, status=404))
    assert len(line) < MAX_MESSAGE + 3 * MAX_FIELD
    assert KEY[16:] not in line


def test_numbers_and_missing_values_stay_what_they_are_in_json() -> None:
    entry = json.loads(JsonFormatter().format(record("m", status=404, milliseconds=0.5, owner=None)))
    assert (entry["status"], entry["milliseconds"], entry["owner"], entry["message"]) == (404, 0.5, None, "m")


def test_an_exception_is_logged_without_secrets() -> None:
    for formatter in (TextFormatter(), JsonFormatter()):
        try:
            raise ValueError(KEY)
        except ValueError:
            failed = logging.LogRecord("service", logging.ERROR, __file__, 1, "m", (), sys.exc_info())
        line = formatter.format(failed)
        assert "ValueError" in line
        assert KEY[16:] not in line


def test_warnings_are_json_lines_too() -> None:
    program = (
        "import warnings; from finetune.runtime.logs import configure_logs; configure_logs(as_json=True);"
        "warnings.warn('this is old', FutureWarning)"
    )
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stderr.splitlines()
    (entry,) = map(json.loads, said)
    assert entry["logger"] == "py.warnings"
    assert "FutureWarning: this is old" in entry["message"]
