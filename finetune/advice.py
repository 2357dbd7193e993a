"""Phrase advice for the interface that a user works with: the command line, Python or HTTP.

A message gives its advice once, as it is written on the command line (``--set data.label_column=species``,
``finetune train photos --folds 5``). The command line shows it unchanged; `for_python` and `for_http` replace it by what has the
same effect there.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from finetune.errors import FinetuneError, Problem
from finetune.spec.reading import setting_value

_FIELDS = {
    "--folds": "data.folds",
    "--epochs": "hyperparameters.n_epochs",
    "--seed": "seed",
    "--method": "method.type",
    "--model": "model.backbone",
    "--name": "suffix",
    "--validation": "validation_file",
    "--test": "test_file",
}
_KEYWORDS = {"--folds", "--epochs", "--seed", "--method", "--model", "--name", "--fix"}
_WORD = r"(?:'[^']*'|[^\s'(),;]*[^\s'(),;.:])"
_SETTING = re.compile(rf"--set (?P<value>'[^']*'|{_WORD}=?{_WORD}?)")
_OPTION = re.compile(rf"(?P<name>{'|'.join(_FIELDS)})(?: (?P<value>{_WORD}))(?=[\s,;.:)]|$)")
_COMMAND = re.compile(rf"finetune (?P<verb>train|check|compare) (?P<rest>(?!-){_WORD}(?: --[a-z]+ {_WORD})*)")
_CODE = re.compile(r"(`[^`]*`)")  # a command in backquotes is typed as it is there
_PREDICT = re.compile(rf"finetune predict (?P<picture>{_WORD}) --model (?P<model>{_WORD})")


def for_python(text: str) -> str:
    """Return a message with its advice as calls and keyword arguments of `finetune`'s functions."""
    text = _PREDICT.sub(
        lambda found: f"finetune.load({_unquoted(found['model'])!r}).predict({_unquoted(found['picture'])!r})", text
    )
    text = _COMMAND.sub(_call, text)
    text = _SETTING.sub(lambda found: _replaced(found, _python_setting), text)
    return _OPTION.sub(
        lambda found: (
            _keyword(found["name"], _value(_unquoted(found["value"])))
            if found["name"] in _KEYWORDS
            else f"settings={{{_FIELDS[found['name']]!r}: {_value(_unquoted(found['value']))!r}}}"
        ),
        text,
    )


def for_http(text: str) -> str:
    """Return a message with its advice as fields of a request's body. Text in backquotes stays, and so do other commands."""
    if _PREDICT.search(text):  # a picture is sent to the address of a model
        return text
    return "".join(part if part.startswith("`") else _plain_text_for_http(part) for part in _CODE.split(text))


def _plain_text_for_http(text: str) -> str:
    text = _COMMAND.sub(lambda found: _replaced(found, _body_of_command), text)
    text = _SETTING.sub(lambda found: _replaced(found, _http_setting), text)
    return _OPTION.sub(lambda found: _body({_FIELDS[found["name"]]: _value(_unquoted(found["value"]))}), text)


@contextmanager
def worded_for(words: Callable[[str], str]) -> Iterator[None]:
    """Rephrase the advice of an error that the block raises; the error and its class stay the same."""
    try:
        yield
    except FinetuneError as error:
        error.message = words(error.message)
        error.problems = tuple(Problem(one.where, words(one.message)) for one in error.problems)
        error.args = (error.message, *error.args[1:])
        raise


def _replaced(found: re.Match[str], words: Callable[[re.Match[str]], str | None]) -> str:
    """Return the replacement by `words`; the matched text itself if it only looks like advice, so that there is none."""
    try:
        return words(found) or found[0]
    except (ValueError, yaml.YAMLError):
        return found[0]


def _unquoted(word: str) -> str:
    return word[1:-1] if word.startswith("'") and word.endswith("'") and len(word) > 1 else word


def _value(text: str) -> Any:
    return setting_value(text) if text else text


def _setting(found: re.Match[str]) -> tuple[str, Any] | None:
    """Return the field and the value of ``--set field=value``; None if it is no such text."""
    field, equals, value = _unquoted(found["value"]).partition("=")
    return (field, _value(value)) if equals and re.fullmatch(r"[a-z_.]+", field) else None


def _python_setting(found: re.Match[str]) -> str | None:
    asked = _setting(found)
    return None if asked is None else f"settings={{{asked[0]!r}: {asked[1]!r}}}"


def _http_setting(found: re.Match[str]) -> str | None:
    asked = _setting(found)
    return None if asked is None else _body({asked[0]: asked[1]})


def _keyword(option: str, value: Any) -> str:
    return f"{option.removeprefix('--')}={value!r}"


def _options(words: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the options of a command with their values, from the words after its data."""
    yield from zip(words[1::2], words[2::2], strict=True)


def _call(found: re.Match[str]) -> str:
    words = shlex.split(found["rest"])
    keywords, settings = [], {}
    for option, value in _options(words):
        field, equals, setting = value.partition("=")
        if option == "--set" and equals:
            settings[field] = _value(setting)
        elif option in _KEYWORDS:
            keywords.append(_keyword(option, value if option == "--fix" else _value(value)))
        elif option in _FIELDS:
            settings[_FIELDS[option]] = value
        else:
            return found[0]
    if settings:
        keywords.append(f"settings={settings!r}")
    data = words[0] if words[0].isupper() else repr(words[0])
    return f"finetune.{found['verb']}({', '.join([data, *keywords])})"


def _body_of_command(found: re.Match[str]) -> str | None:
    fields: dict[str, Any] = {}
    for option, value in _options(shlex.split(found["rest"])):
        field, equals, setting = value.partition("=")
        if option == "--set" and equals:
            fields[field] = _value(setting)
        elif option in _FIELDS:
            fields[_FIELDS[option]] = _value(value)
        else:
            return None
    return f"a request with {_body(fields)}" if fields else None


def _body(fields: dict[str, Any]) -> str:
    """Return fields, whose names may have dots, as a nested JSON object."""
    body: dict[str, Any] = {}
    for name, value in fields.items():
        *above, last = name.split(".")
        inner = body
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return json.dumps(body, ensure_ascii=False)
