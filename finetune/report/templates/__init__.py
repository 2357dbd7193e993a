"""HTML templates (Jinja2, autoescaped) and the formatting of numbers on pages."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from finetune.messages import duration
from finetune.metrics import Metric
from finetune.report.text import cost_text


def render(name: str, **values: Any) -> str:
    """Render a template of this package with `values`; all text is escaped."""
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
    environment.filters |= {"points": points, "cost": cost_text, "count": count, "pvalue": pvalue, "duration": duration}
    return environment


def points(difference: float | None, metric: Metric[Any], *, signed: bool = True) -> str:
    """Format a difference, in percentage points if the metric is shown as a percentage."""
    if difference is None:
        return "–"
    sign = "+" if signed else ""
    return f"{100 * difference:{sign}.1f}" if metric.percent else f"{difference:{sign}.3f}"


def count(value: float | None) -> str:
    """Format a number of images; a dash for None."""
    return "–" if value is None else f"{value:,.0f}"


def pvalue(value: float | None) -> str:
    """Format a p value; a dash for None."""
    if value is None:
        return "–"
    return "< 0.0001" if value < 0.0001 else f"{value:.2g}"
