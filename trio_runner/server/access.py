"""Which requests are let in. Pure.

A web page in the user's own browser can reach a loopback port, so an address proves nothing. There are three guards,
each on something that a web page cannot forge:

- Host must name a loopback address or a configured host, or a page could rebind its own name to 127.0.0.1.
- Origin, which browsers send with every cross-site POST, must be configured; no Origin means no browser.
- The API key, if there is one, must come with everything but /health.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from trio_runner.server.problems import Problem

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The guards. With `hosts` None any Host is let in, for servers that are reached by names of their own."""

    api_key: str | None = None
    hosts: frozenset[str] | None = LOOPBACK_HOSTS
    origins: frozenset[str] = frozenset()

    def refusal(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> Problem | None:
        """Why a request with these headers (names in lower case) is refused; None if it is let in."""
        if not self._host_allowed(headers.get(b"host")):
            return Problem(403, "this server does not answer to the name in the Host header")
        origin = headers.get(b"origin")
        if origin is not None and not self.origin_allowed(origin):
            return Problem(403, "this server does not serve web pages of this Origin")
        if path == "/health" or self.is_preflight(method, headers) or self._key_matches(headers.get(b"authorization")):
            return None
        return Problem(401, "this server wants its API key as a bearer token", {"WWW-Authenticate": "Bearer"})

    def origin_allowed(self, origin: bytes) -> bool:
        return origin.decode("latin-1").lower() in self.origins

    def is_preflight(self, method: str, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a browser asks if it may send the real request. It never sends the API key with this question."""
        return method == "OPTIONS" and b"origin" in headers and b"access-control-request-method" in headers

    def _host_allowed(self, host: bytes | None) -> bool:
        if self.hosts is None or host is None:  # only HTTP/1.0 may leave it out, and no browser speaks that
            return True
        match = _HOST.fullmatch(host.decode("latin-1").lower())
        return match is not None and match["name"] in self.hosts

    def _key_matches(self, authorization: bytes | None) -> bool:
        if self.api_key is None:
            return True
        scheme, _, token = (authorization or b"").partition(b" ")
        # Digests, because the time of compare_digest tells the lengths of what it compares.
        given, wanted = sha256(token.strip()).digest(), sha256(self.api_key.encode()).digest()
        return scheme.lower() == b"bearer" and hmac.compare_digest(given, wanted)


def host_names(extra: Iterable[str]) -> frozenset[str]:
    """The loopback names and `extra`, as `Access.hosts` needs them."""
    return LOOPBACK_HOSTS | {name.lower() for name in extra}
