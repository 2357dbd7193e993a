"""The log of the server and of workers on standard error, as text or as JSON lines. Torch-free."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from typing import Any

from finetune.errors import InvalidInput

FORMAT_VARIABLE = "FINETUNE_LOG_FORMAT"
_FORMATS = ("text", "json")
_TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
MAX_MESSAGE = 4096  # characters; the end of a child's error output, 2,000 of them, is a message in full
MAX_FIELD = 256
_SECRETS = re.compile(r"(ft_[0-9a-f]{12}_)[0-9A-Za-z_-]{16,}|(whsec_)[0-9A-Za-z+/=]{16,}")  # API keys, and webhooks' secrets


def without_secrets(text: str) -> str:
    """Return `text` with the secret part of API keys and of webhooks' secrets replaced by an ellipsis."""
    return _SECRETS.sub(r"\1\2…", text)


def shown(text: str, longest: int = MAX_FIELD) -> str:
    """Return text that a client sent, as a log line shows it: without secrets, and of bounded length."""
    text = without_secrets(text)
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text):,} characters)"


class TextFormatter(logging.Formatter):
    """Formats records as lines of text, with bounded messages and without secrets."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = shown(record.message, MAX_MESSAGE)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return without_secrets(super().formatException(ei))


class JsonFormatter(logging.Formatter):
    """Formats records as JSON lines, with bounded values and without secrets.

    The items of ``extra={"fields": {…}}`` are added beside the message.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": shown(record.getMessage(), MAX_MESSAGE),
            **{name: shown(value) if isinstance(value, str) else value for name, value in getattr(record, "fields", {}).items()},
        }
        if record.exc_info:
            entry["exception"] = without_secrets(self.formatException(record.exc_info))
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
    """Log to standard error: warnings of all loggers, and info messages of the loggers `informative` and those below them.

    What `warnings.warn` says is logged as well, so that JSON lines are not interrupted by text.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)
    for name in informative:
        logging.getLogger(name).setLevel(logging.INFO)
