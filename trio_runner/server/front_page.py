"""What `/` answers: Ollama's sentence to programs, which look for it before they speak, and a page to browsers."""

from __future__ import annotations

from quart import Response, request

_SENTENCE = "Ollama is running"
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>trio-runner</title>
<style>body { font: 1rem/1.5 system-ui, sans-serif; margin: 3rem auto; max-width: 40rem; padding: 0 1rem; }</style>
<h1>trio-runner</h1>
<p>This server runs a language model for programs.</p>
<ul>
<li><a href="/docs">/docs</a> says what programs can ask for.</li>
<li><a href="/health">/health</a> says whether the model is loaded.</li>
</ul>
</html>
"""
_HEADERS = {"Vary": "Accept", "X-Content-Type-Options": "nosniff"}
_PAGE_HEADERS = {
    **_HEADERS,
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
}


async def front_page() -> Response:
    """The answer tells nothing that is secret: it needs no API key."""
    if any(name == "text/html" and quality > 0 for name, quality in request.accept_mimetypes):
        return Response(_PAGE, content_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)
    return Response(_SENTENCE, content_type="text/plain; charset=utf-8", headers=_HEADERS)
