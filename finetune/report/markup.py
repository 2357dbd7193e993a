"""The pieces that a report page is made of: sections, tables, facts, and the page around them.

Knows HTML and how a person likes to read a number; knows nothing of what the numbers mean. Every text is escaped here, so callers
pass plain text.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any


def section(title: str, *parts: str) -> str:
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def details(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if body else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """Columns after the first `text_columns` hold numbers and stand right-aligned."""

    def cells(texts: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{'' if i < text_columns else ' class=n'}>{escape(text)}</{tag}>" for i, text in enumerate(texts))

    header = f"<thead><tr>{cells(head, 'th')}</tr></thead>" if any(head) else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="table"><table>{header}<tbody>{body}</tbody></table></div>'


def drawing(svg: str, caption: str, *, wide: bool = False) -> str:
    """The SVG as an image of its own, so that the ids inside it cannot meet those of another one. A wide one scrolls."""
    data = base64.b64encode(svg.encode()).decode()
    return (
        f'<figure class="drawn{" wide" if wide else ""}"><img src="data:image/svg+xml;base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def warning(text: str) -> str:
    return f'<p class="warning">{escape(text)}</p>'


def page(title: str, opening: str, body: str) -> str:
    """The whole document; its policy forbids the browser to fetch anything."""
    return _PAGE.format(title=escape(title), style=_STYLE, opening=opening, body=body)


def facts(values: Mapping[str, Any], show: Callable[[str, Any], str] | None = None) -> str:
    """Names and values, one a row; nothing when there are none."""
    rows = [[path, show(path, value) if show else value_text(value)] for path, value in flat(values)]
    return table(["", ""], rows, text_columns=2) if rows else ""


def flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def value_text(value: Any) -> str:
    if value is None or value == {} or value == [] or value == ():
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def cost_text(name: str, value: float) -> str:
    """A cost as a person reads it; the unit is in its name."""
    if name.endswith("_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if not name.endswith("_seconds"):
        return value_text(value)
    if value < 1:
        return f"{value * 1000:.1f} ms"
    return f"{int(value) // 60} min {int(value) % 60} s" if value >= 60 else f"{value:.1f} s"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>{opening}</header>
<main>{body}</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark;
  --ink: #24292f; --faint: #59636e; --line: #d8dee4; --ground: #fff; --panel: #f6f8fa; --warn: #9a6700; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe5ea; --faint: #9aa5b1; --line: #333b44; --ground: #12161b; --panel: #1a2027; --warn: #e3b341; }
  .drawn img { filter: invert(0.9) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
.warning { border-left: 3px solid var(--warn); padding: .3rem .75rem; background: var(--panel); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .75rem; margin-bottom: 1rem; }
.cards div { background: var(--panel); border-radius: .5rem; padding: .75rem 1rem; }
.cards h3 { margin: 0; font-size: .85rem; font-weight: 500; color: var(--faint); }
.cards strong { font-size: 1.7rem; font-variant-numeric: tabular-nums; }
.cards p { margin: 0; font-size: .8rem; color: var(--faint); }
.table { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; }
td:first-child { white-space: nowrap; }
th { font-weight: 600; color: var(--faint); white-space: nowrap; }
.n { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0; }
.drawn img { display: block; max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
.wide img { max-width: none; }
figcaption { font-size: .82rem; color: var(--faint); margin-top: .25rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
.gallery figure { margin: 0; }
.gallery img { max-width: 100%; height: auto; border-radius: .35rem; }
.gallery b { color: var(--ink); }
.file { font-size: .75rem; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--faint); }
@media print { details { display: none; } body { max-width: none; } }
"""
