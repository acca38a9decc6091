"""``/docs``: the routes and fields on one plain page, out of the OpenAPI schema. Nothing is loaded from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

EXAMPLE = """curl http://127.0.0.1:8000/v1/images/generations \\
  -H 'Content-Type: application/json' -d '{"n": 2, "seed": 7, "steps": 25}'"""
STATUSES = {
    400: "a field cannot be used; <code>param</code> names it",
    401: "no key, or another",
    404: "no such model or route",
    406: "the model draws no pixels: ask for application/x-npy",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is not application/json",
    429: "too much waits; Retry-After says how long",
    500: "the engine failed, or images became NaN",
    503: "engines are loading, or the service shuts down",
    504: "not drawn before the deadline",
}


def manual(schema: dict[str, Any]) -> str:
    """The page, as HTML."""
    routes, fields = [], []
    for path, methods in sorted(schema["paths"].items()):
        for method, about in methods.items():
            words = about.get("description", about.get("summary", ""))
            routes.append(_row(f"<code>{method.upper()} {escape(path)}</code>", escape(words)))
            body = about.get("requestBody")
            if body:
                fields = _fields(body["content"]["application/json"]["schema"])
    errors = [_row(str(status), words) for status, words in STATUSES.items()]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>sparse-engine: the API</title>
<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="/page/page.css"></head>
<body><main><h1>sparse-engine {escape(schema["info"]["version"])}</h1>
<p><a href="/">Draw pictures</a> · <a href="/openapi.json">openapi.json</a></p>
<h2>Routes</h2><table>{"".join(routes)}</table>
<h2>Fields of a request for images</h2><table>{"".join(fields)}</table>
<p>With <code>Accept: image/png</code> or <code>application/x-npy</code> the answer is the bytes of one image, and its
seed, index and label are in the headers <code>x-sparse-engine-seed</code>, <code>-index</code> and <code>-label</code>.
The header <code>x-deadline-seconds</code> asks for less time than the service's own deadline.</p>
<pre>{escape(EXAMPLE)}</pre>
<h2>Errors</h2><p><code>{{"error": {{"message", "type", "param", "code"}}}}</code></p><table>{"".join(errors)}</table>
<p>No safety checker is built in: what the model draws is what is sent.</p></main></body></html>
"""


def _fields(schema: dict[str, Any]) -> list[str]:
    return [
        _row(f"<code>{escape(name)}</code>", _type(about), escape(about.get("description", "")))
        for name, about in schema["properties"].items()
    ]


def _type(about: dict[str, Any]) -> str:
    kinds = [each for each in about.get("anyOf", [about]) if each.get("type") != "null"]
    return " or ".join(
        f"{each['items'].get('type', '')}s" if each.get("type") == "array" else str(each.get("const", each.get("type")))
        for each in kinds
    )


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
