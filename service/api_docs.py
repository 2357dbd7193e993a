"""The API documentation as an HTML page made from the OpenAPI document, without scripts and external resources."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from service.web import render

_METHODS = ("get", "post", "put", "patch", "delete")
_EXAMPLES = {
    "file_id": "file-…",
    "job_id": "ftjob-…",
    "comparison_id": "ftcmp-…",
    "run_name": "full-seed0",
    "batch_id": "batch-…",
    "check_id": "ftchk-…",
    "name": "flowers",
    "version": "1",
    "alias": "champion",
}


def docs_page(document: Mapping[str, Any], base_url: str) -> str:
    """Return the page of an OpenAPI document; its example commands use the server at `base_url`."""
    schemas = document["components"]["schemas"]
    operations = [
        (operation.get("tags", ["other"])[0], _operation(method, path, operation, document, base_url))
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in _METHODS
    ]
    names = list(dict.fromkeys(tag for tag, _ in operations))
    groups = [{"name": name, "operations": [one for tag, one in operations if tag == name]} for name in names]
    described = [
        {"name": name, "description": schema.get("description", ""), "fields": _fields(schema)}
        for name, schema in sorted(schemas.items())
    ]
    needs_key = {} not in document.get("security", [{}])
    return render("docs.html", info=document["info"], groups=groups, schemas=described, needs_key=needs_key)


def _operation(
    method: str, path: str, operation: Mapping[str, Any], document: Mapping[str, Any], base_url: str
) -> dict[str, Any]:
    body = operation.get("requestBody", {})
    bodies = [
        {
            "media_type": media_type,
            "schema": _reference(content.get("schema", {})),
            "fields": _fields(content.get("schema", {})),
            "description": body.get("description", "") if position == 0 else "",
        }
        for position, (media_type, content) in enumerate(body.get("content", {}).items())
    ]
    answers = []
    for status, answer in operation["responses"].items():
        content = answer.get("content", {})
        found = [name for one in content.values() for name in _references(one.get("schema", {}))]
        description = "" if answer.get("description") == "Successful Response" else answer.get("description", "")
        answers.append({"status": status, "schemas": found, "media_type": ", ".join(content), "description": description})
    return {
        "id": operation["operationId"],
        "method": method.upper(),
        "path": path,
        "open": operation.get("security") == [],
        "description": operation.get("description") or operation.get("summary", ""),
        "parameters": [
            {
                "name": one["name"],
                "place": one["in"],
                "required": one.get("required", False),
                "type": "".join(str(part["text"] or part["schema"]) for part in _type(one.get("schema", {}))),
                "description": one.get("description", ""),
            }
            for one in operation.get("parameters", ())
        ],
        "bodies": bodies,
        "answers": answers,
        "curl": _curl(method, path, list(body.get("content", {})), base_url),
    }


def _curl(method: str, path: str, media_types: list[str], base_url: str) -> str:
    """Return an example curl command for this route."""
    parts = ["curl"]
    if "multipart/form-data" in media_types:
        parts += ["-F purpose=fine-tune -F file=@photos.zip" if path == "/v1/files" else "-F image=@cat.jpg"]
    elif "application/json" in media_types:
        body = '{"training_file": "file-…"}' if path.endswith("/jobs") else "{…}"
        parts += [*([] if method == "post" else [f"-X {method.upper()}"]), f"--json '{body}'"]
    elif method != "get":
        parts += [f"-X {method.upper()}"]
    shown = path
    for name, example in _EXAMPLES.items():
        shown = shown.replace(f"{{{name}}}", example)
    return " ".join([*parts, f"{base_url}{shown}"])


def _fields(schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    required = schema.get("required", ())
    return [
        {"name": name, "required": name in required, "type": _type(field), "description": field.get("description", "")}
        for name, field in schema.get("properties", {}).items()
    ]


def _type(schema: Mapping[str, Any]) -> list[dict[str, str | None]]:
    """Return the description of a type, as a list of texts and names of schemas."""
    if (name := _reference(schema)) is not None:
        return [_named(name)]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return list(_joined(" or ", [_type(one) for one in schema[key]]))
    if "const" in schema:
        return [_text(f'"{schema["const"]}"')]
    if "enum" in schema:
        return [_text(" | ".join(str(value) for value in schema["enum"]))]
    kind = schema.get("type", "any")
    if kind == "array":
        return [_text("list of "), *_type(schema.get("items", {}))]
    if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return [_text("object of "), *_type(schema["additionalProperties"])]
    words = " or ".join(kind) if isinstance(kind, list) else str(kind)
    bounds = [f"{sign} {schema[key]}" for key, sign in (("minimum", "≥"), ("maximum", "≤")) if key in schema]
    return [_text(" ".join([words, *bounds]))]


def _joined(word: str, pieces: list[list[dict[str, str | None]]]) -> Iterable[dict[str, str | None]]:
    for position, piece in enumerate(pieces):
        if position:
            yield _text(word)
        yield from piece


def _text(text: str) -> dict[str, str | None]:
    return {"text": text, "schema": None}


def _named(name: str) -> dict[str, str | None]:
    return {"text": None, "schema": name}


def _reference(schema: Mapping[str, Any]) -> str | None:
    return schema["$ref"].rpartition("/")[2] if "$ref" in schema else None


def _references(schema: Mapping[str, Any]) -> list[str]:
    name = _reference(schema)
    if name is not None:
        return [name]
    return [found for one in schema.get("anyOf", ()) for found in _references(one)]
