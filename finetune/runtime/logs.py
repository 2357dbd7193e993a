"""The log of the server and of workers on standard error, as text or as JSON lines. Torch-free."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from typing import Any

from finetune.errors import InvalidInput

FORMAT_VARIABLE = "FINETUNE_LOG_FORMAT"
_FORMATS = ("text", "json")
_TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class JsonFormatter(logging.Formatter):
    """Formats records as JSON lines; the items of ``extra={"fields": {…}}`` are added beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def wants_json(environment: Mapping[str, str]) -> bool:
    """Return whether the environment asks for JSON lines.

    Raises:
        InvalidInput: it asks for a format that does not exist.
    """
    value = environment.get(FORMAT_VARIABLE, "") or "text"
    if value not in _FORMATS:
        raise InvalidInput(f"{FORMAT_VARIABLE}={value!r}: must be one of {', '.join(_FORMATS)}")
    return value == "json"


def configure_logs(*informative: str, as_json: bool) -> None:
    """Log to standard error: warnings of all loggers, and info messages of the loggers `informative` and those below them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in informative:
        logging.getLogger(name).setLevel(logging.INFO)
