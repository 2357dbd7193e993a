"""The web pages of the server: templates and static files, without external resources. See docs/page.md."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

FOLDER = Path(__file__).parent
STATIC = FOLDER / "static"
VIEWS = ("data", "train", "runs", "compare", "models", "try")
LANGUAGES = ("en", "de")
FIRST_MODULES = ("dom.js", "api.js", "i18n.js", "preferences.js", "session.js")  # imports of app.js, preloaded with it

_templates = Environment(
    loader=FileSystemLoader(FOLDER / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class PageFiles(StaticFiles):
    """The static files of the page. Browsers cache them but check each time whether they have changed."""

    def __init__(self) -> None:
        super().__init__(directory=STATIC)

    def file_response(self, *args: object, **kwargs: object) -> Response:
        response = super().file_response(*args, **kwargs)  # type: ignore[arg-type]
        response.headers["Cache-Control"] = "no-cache"
        return response


def render(template: str, **values: object) -> str:
    """Render a template; all values are escaped as HTML."""
    return _templates.get_template(template).render(**values)


def main_page(accept_language: str, asked: str = "") -> str:
    """Return the page at ``/`` in the language `asked` for, else in the one that the browser prefers among those of the page."""
    language = asked if asked in LANGUAGES else language_of(accept_language)
    return render("index.html", language=language, words=strings(language), views=VIEWS, modules=FIRST_MODULES)


@functools.cache
def strings(language: str) -> dict[str, str | dict[str, str]]:
    """Return all texts of the page in a language, by key."""
    found: dict[str, str | dict[str, str]] = json.loads((STATIC / "strings" / f"{language}.json").read_text(encoding="utf-8"))
    return found


def language_of(accept_language: str) -> str:
    """Return the language that the header ``Accept-Language`` prefers among those of the page."""
    wanted = []
    for part in accept_language.split(","):
        tag, _, quality = part.partition(";q=")
        try:
            wanted.append((-float(quality or 1.0), tag.strip().lower().partition("-")[0]))
        except ValueError:
            continue
    return next(
        (tag for quality, tag in sorted(wanted, key=lambda one: one[0]) if tag in LANGUAGES and quality < 0), LANGUAGES[0]
    )
