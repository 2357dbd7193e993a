"""Say what to write instead of a keyword argument that a function of the Python API does not have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

from finetune.errors import did_you_mean
from finetune.spec import fields_called

P = ParamSpec("P")
R = TypeVar("R")


def explains_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Name the right argument, or the field of the job spec, in the TypeError for an unknown keyword argument.

    Fields of the job spec are the keys of the argument `settings`. Nothing else about the function changes.
    """
    known = list(inspect.signature(function).parameters)

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if unknown := [name for name in kwargs if name not in known]:
            raise TypeError(" ".join(_advice(function.__name__, name, kwargs[name], known) for name in unknown))
        return function(*args, **kwargs)

    return called


def _advice(function: str, name: str, value: object, known: Sequence[str]) -> str:
    said = f"finetune.{function}() has no argument {name!r}."
    spelled = did_you_mean(name, known)
    fields = fields_called(name) if "settings" in known else []
    if fields and (not spelled or name in (field.rpartition(".")[2] for field in fields)):
        return f"{said} Give the field of the job spec: settings={{{fields[0]!r}: {value!r}}}"
    if spelled:
        return f"{said}{spelled}"
    more = "; settings takes the fields of the job spec (docs/spec.md)" if "settings" in known else ""
    return f"{said} It takes {', '.join(known)}{more}."
