"""The page ``/docs``: the OpenAPI schema as HTML, without scripts or anything from another host."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from jinja2 import Environment
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse

PATH = "/docs"
HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "length ≥ {}",
    "maxLength": "length ≤ {}",
    "minItems": "items ≥ {}",
    "maxItems": "items ≤ {}",
}

CODE = re.compile("``(.+?)``")

Schema = Mapping[str, Any]


def add_documentation(app: FastAPI) -> None:
    """Add the page to ``app``. It is made at its first request, in a thread, and kept."""

    @functools.cache
    def page() -> str:
        return page_of(app.openapi(), needs_keys=getattr(app.state, "needs_keys", False))

    def show(request: Request) -> HTMLResponse:
        return HTMLResponse(page(), headers=HEADERS)

    app.add_route(PATH, show, include_in_schema=False)


def page_of(schema: Schema, *, needs_keys: bool) -> str:
    """Return the page of an OpenAPI schema. It leaves out the summary, which names the model."""
    source = files("jaxdeploy.server").joinpath("documentation.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["marked"] = marked
    return environment.from_string(source).render(
        title=schema["info"]["title"],
        version=schema["info"]["version"],
        needs_keys=needs_keys,
        routes=list(_routes(schema)),
        objects=list(_objects(schema)),
    )


def _routes(schema: Schema) -> Iterator[dict[str, Any]]:
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            yield {
                "id": route["operationId"],
                "method": method,
                "path": path,
                "description": route.get("description", ""),
                "parameters": [
                    _field(given["name"], given["schema"], required=given["required"])
                    for given in route.get("parameters", ())
                ],
                "body": _content_type(route.get("requestBody", {})),
                "replies": [
                    {"status": status, "description": reply["description"], "type": _content_type(reply)}
                    for status, reply in route["responses"].items()
                ],
            }


def _objects(schema: Schema) -> Iterator[dict[str, Any]]:
    for name, described in sorted(schema.get("components", {}).get("schemas", {}).items(), key=_by_name):
        required = described.get("required", ())
        yield {
            "id": f"object-{name}",
            "name": _short(name),
            "description": described.get("description", ""),
            "type": type_of(described),
            "fields": [
                _field(field, about, required=field in required)
                for field, about in described.get("properties", {}).items()
            ],
        }


def _by_name(item: tuple[str, Schema]) -> str:
    return _short(item[0]).lower()


def _field(name: str, about: Schema, *, required: bool) -> dict[str, Any]:
    default = json.dumps(about["default"], ensure_ascii=False) if about.get("default") is not None else ""
    return {
        "name": name,
        "type": type_of(about),
        "default": "required" if required else default,
        "description": about.get("description", ""),
    }


def _content_type(message: Schema) -> Markup:
    """Return the types of a body, one for each media type."""
    return _joined([type_of(content.get("schema", {"type": media})) for media, content in _contents(message)], " or ")


def _contents(message: Schema) -> Iterator[tuple[str, Schema]]:
    yield from message.get("content", {}).items()


def type_of(schema: Schema) -> Markup:
    """Return the type that a JSON schema describes, as HTML with links to objects."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return Markup('<a href="#object-{}">{}</a>').format(name, _short(name))
    for word, between in (("anyOf", " or "), ("oneOf", " or "), ("allOf", " and ")):
        if word in schema:
            return _joined([type_of(part) for part in schema[word]], between)
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return _joined([Markup("<code>{}</code>").format(json.dumps(value)) for value in values], " or ")
    kind = Markup("{}").format(schema.get("type", "any"))
    if kind == "array" and schema.get("items"):
        kind = Markup("array of {}").format(type_of(schema["items"]))
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        kind = Markup("object of {}").format(type_of(schema["additionalProperties"]))
    bounds = [text.format(f"{schema[word]:.12g}") for word, text in BOUNDS.items() if word in schema]
    return kind + Markup(" ({})").format(", ".join(bounds)) if bounds else kind


def marked(text: str) -> Markup:
    """Return ``text`` as HTML, with the words that a docstring marks as code."""
    return Markup(CODE.sub(r"<code>\1</code>", str(Markup.escape(text))))


def _short(name: str) -> str:
    """Return the name of an object without the module that the schema adds when two objects share a name."""
    return name.rpartition("__")[2]


def _joined(parts: list[Markup], between: str) -> Markup:
    return Markup(between).join(parts)
