"""Which requests are let in. Pure.

A web page in the user's own browser can reach a loopback port, so an address proves nothing. There are three guards,
each on something that a web page cannot forge:

- Host must name a loopback address or a configured host, or a page could rebind its own name to 127.0.0.1.
- Origin, which browsers send with every cross-site POST, must be configured; no Origin means no browser.
- The API key, if there is one, must come with everything but the two paths of health and the front page.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from trio_runner.server.problems import Problem

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})

ALLOWED_HEADERS = frozenset(
    {"accept", "accept-language", "api-key", "authorization", "baggage", "cache-control", "content-language"}
    | {"content-type", "http-referer", "idempotency-key", "last-event-id", "traceparent", "tracestate", "user-agent"}
    | {"x-api-key", "x-request-id", "x-requested-with", "x-title"}
)
"""Headers, in lower case, that scripts of an allowed origin may send. The clients of OpenAI, Anthropic and Ollama send
some of them, routers and tracing the others. None of them decides here, except the two that carry the API key."""
ALLOWED_HEADER_PREFIXES = ("anthropic-", "openai-", "x-stainless-")
"""Beginnings of further ones."""

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", re.ASCII)
_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>\*|\[[0-9a-f:.]+\]|[a-z0-9._~-]+)(?::[0-9]{1,5})?", re.ASCII
)
_HEADER = re.compile(r"[a-z0-9-]+", re.ASCII)
_DEFAULT_PORTS = {"http": "80", "https": "443"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The guards. With `hosts` None any Host is let in, for servers that are reached by names of their own."""

    api_key: str | None = None
    hosts: frozenset[str] | None = LOOPBACK_HOSTS
    origins: frozenset[str] = frozenset()
    """Origins as `read_origin` returns them."""

    def refusal(
        self, method: str, path: str, headers: Mapping[bytes, bytes], *, by_unix_socket: bool = False
    ) -> Problem | None:
        """Why a request with these headers (names in lower case) is refused; None if it is let in.

        No name of a host leads to a Unix socket, so a client that came by one may write into Host what it likes.
        """
        if not by_unix_socket and not self._host_allowed(headers.get(b"host")):
            return Problem(403, "this server does not answer to the name in the Host header")
        origin = headers.get(b"origin")
        if origin is not None and not self.origin_allowed(origin):
            return Problem(403, "this server does not serve web pages of this Origin")
        if needs_no_key(method, path) or self.is_preflight(method, headers) or self._has_key(headers):
            return None
        text = "this server wants its API key as a bearer token, or in the X-Api-Key header"
        return Problem(401, text, {"WWW-Authenticate": "Bearer"})

    def origin_allowed(self, origin: bytes) -> bool:
        text = origin.decode("latin-1").lower()
        return text in self.origins or f"{text.partition('://')[0]}://*" in self.origins

    def is_preflight(self, method: str, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a browser asks if it may send the real request. It never sends the API key with this question."""
        return method == "OPTIONS" and b"origin" in headers and b"access-control-request-method" in headers

    def _host_allowed(self, host: bytes | None) -> bool:
        if self.hosts is None or host is None:  # only HTTP/1.0 may leave it out, and no browser speaks that
            return True
        match = _HOST.fullmatch(host.decode("latin-1").lower())
        return match is not None and match["name"] in self.hosts

    def _has_key(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether one of the two headers has the API key. It always looks at both."""
        if self.api_key is None:
            return True
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        as_bearer = self._is_key(token) and scheme.lower() == b"bearer"
        return self._is_key(headers.get(b"x-api-key", b"")) or as_bearer

    def _is_key(self, given: bytes) -> bool:
        # Digests, because the time of compare_digest tells the lengths of what it compares.
        wanted = sha256((self.api_key or "").encode()).digest()
        return hmac.compare_digest(sha256(given.strip()).digest(), wanted)


def needs_no_key(method: str, path: str) -> bool:
    """Whether a request needs no API key. Clients ask these, which tell nothing secret, before they know a key."""
    return path in ("/health", "/llama/health") or (path == "/" and method in ("GET", "HEAD"))


def host_names(extra: Iterable[str]) -> frozenset[str]:
    """The loopback names and `extra`, as `Access.hosts` needs them."""
    return LOOPBACK_HOSTS | {name.lower() for name in extra}


def read_origin(text: str) -> str:
    """The origin `text` as a browser sends it: in lower case, without a port that its scheme implies.

    A host of `*` stands for every host of a scheme, but not for every web site: some programs make up a new host for
    each of their windows, as in vscode-webview://*. Raises ValueError, whose message is for the user, if `text` is no
    origin, or stands for pages of anybody.
    """
    origin = text.strip().lower()
    if origin == "null":
        raise ValueError("'null' is the origin of every page that hides its own: give the page a scheme and a host")
    match = _ORIGIN.fullmatch(origin)
    if origin == "*" or (match is not None and match["host"] == "*" and match["scheme"] in _DEFAULT_PORTS):
        raise ValueError(f"{text!r} would let every web page use the model: name the origins that may, one by one")
    if match is None or match["scheme"] == "file":
        raise ValueError(
            f"{text!r} is no origin, which is a scheme and a host without a path, such as http://localhost:3000, "
            "tauri://localhost, app://name or chrome-extension://id"
        )
    return origin.removesuffix(f":{_DEFAULT_PORTS.get(match['scheme'], '-')}")


def allowed_headers(requested: bytes) -> str:
    """Those of the headers named in an Access-Control-Request-Headers that a script may send, as a list with commas."""
    names = dict.fromkeys(name.strip().lower() for name in requested.decode("latin-1").split(","))
    return ", ".join(
        name
        for name in names
        if name in ALLOWED_HEADERS or (_HEADER.fullmatch(name) and name.startswith(ALLOWED_HEADER_PREFIXES))
    )
