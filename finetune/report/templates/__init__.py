"""HTML templates (Jinja2, autoescaped) and how numbers read on a page."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from finetune.metrics import Metric


def render(name: str, **values: Any) -> str:
    """Return a template of this package with `values` filled in; every text is escaped."""
    return _environment().get_template(name).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("finetune.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"points": points, "seconds": seconds, "mebibytes": mebibytes, "count": count, "pvalue": pvalue}
    return environment


def points(difference: float | None, metric: Metric[Any], *, signed: bool = True) -> str:
    """Return a difference as people read it: in points where the metric is a percentage."""
    if difference is None:
        return "–"
    sign = "+" if signed else ""
    return f"{100 * difference:{sign}.1f}" if metric.percent else f"{difference:{sign}.3f}"


def seconds(value: float | None) -> str:
    """Return ``3.2 ms``, ``8.3 s``, ``4 min 10 s`` or ``2 h 05 min``."""
    if value is None:
        return "–"
    if value < 1:
        return f"{1000 * value:.1f} ms"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def mebibytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:,.1f} MiB"


def count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def pvalue(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.0001" if value < 0.0001 else f"{value:.2g}"
