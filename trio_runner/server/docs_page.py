"""/docs: what the server serves, for people. Pure: one page of HTML, made from the document of /openapi.json.

The page needs no script and nothing from elsewhere, so it works without a network, and nothing on it can run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any, Final

_STYLE: Final = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8886; }
details { margin: .4rem 0; } summary { cursor: pointer; }
code, pre { font: .875rem/1.45 ui-monospace, monospace; }
pre { overflow-x: auto; padding: .6rem .8rem; background: #8882; border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; vertical-align: top; padding: .25rem .6rem;
border-bottom: 1px solid #8884; } th { font-weight: 600; } td:first-child { white-space: nowrap; }
.method { display: inline-block; min-width: 4.5rem; font-weight: 600; }
"""


def docs_page(document: Mapping[str, Any], *, url: str) -> str:
    """The page. `url` is where the server is, for the examples."""
    info = document["info"]
    sections = [
        f"<h2 id='{escape(tag['name'])}'>{escape(tag['name'])}</h2><p>{escape(tag['description'])}</p>"
        + "".join(_operations(document, tag["name"], url))
        for tag in document["tags"]
    ]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style></head>"
        f"<body><h1>{title}</h1><p>{escape(info['description'])} For programs, the same is at "
        f"<a href='/openapi.json'>/openapi.json</a>.</p>{''.join(sections)}</body></html>"
    )


def _operations(document: Mapping[str, Any], tag: str, url: str) -> Iterable[str]:
    needs_key = "security" in document
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if tag in operation["tags"]:
                with_key = needs_key and operation.get("security") != []
                yield _operation(path, method.upper(), operation, _example(path, method, operation, url, with_key))


def _operation(path: str, method: str, operation: Mapping[str, Any], example: str) -> str:
    return (
        f"<details><summary><code><span class='method'>{method}</span>{escape(path)}</code> "
        f"{escape(operation['summary'])}</summary><pre>{escape(example)}</pre>{_fields(operation)}</details>"
    )


def _example(path: str, method: str, operation: Mapping[str, Any], url: str, needs_key: bool) -> str:
    words = ["curl"]
    if method != "get" and "requestBody" not in operation:
        words.append(f"-X {method.upper()}")
    if needs_key:
        words.append('-H "Authorization: Bearer $KEY"')
    if "requestBody" in operation:
        body = json.dumps(operation["requestBody"]["content"]["application/json"]["example"])
        words.append("-d '" + body.replace("'", "'\\''") + "'")
    return " ".join([*words, url + path])


def _fields(operation: Mapping[str, Any]) -> str:
    if "requestBody" not in operation:
        return ""
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(type_words(field))}</td>"
        f"<td>{'required' if name in required else _default(field)}</td><td>{escape(field['description'])}</td></tr>"
        for name, field in schema["properties"].items()
    )
    return f"<table><tr><th>field<th>type<th>default<th>meaning</tr>{rows}</table>"


def _default(field: Mapping[str, Any]) -> str:
    return f"<code>{escape(json.dumps(field['default']))}</code>" if "default" in field else ""


def type_words(schema: Mapping[str, Any]) -> str:
    """The type that a JSON schema describes, in a few words."""
    if "anyOf" in schema:
        return " or ".join(type_words(one) for one in schema["anyOf"])
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return " or ".join(map(json.dumps, schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {type_words(schema['items'])}" if "items" in schema else "list"
    return str(schema.get("type", "any value"))
