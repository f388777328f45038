"""Which requests are let in."""

from __future__ import annotations

import pytest

from trio_runner.server.access import Access, allowed_headers, host_names, read_origin


def status(access: Access, path: str = "/completion", method: str = "POST", **headers: bytes) -> int | None:
    refusal = access.refusal(method, path, {name.replace("_", "-").encode(): value for name, value in headers.items()})
    return None if refusal is None else refusal.status


@pytest.mark.parametrize("host", [b"localhost", b"LOCALHOST:8080", b"127.0.0.1", b"127.0.0.1:1", b"[::1]", b"[::1]:80"])
def test_loopback_names_in_host_are_let_in(host: bytes) -> None:
    assert status(Access(), host=host) is None


@pytest.mark.parametrize(
    "host",
    [
        *[
            b"",
            b"evil.example",
            b"localhost.evil.example",
            b"localhost:80:80",
            b"127.0.0.1.evil",
            b"::1",
            b"localhost.",
        ],
        *[b"\xff", b"localhost\x00", b"localhost:", b"[::1", b"user@localhost", b"localhost:x", b"0.0.0.0", b"127.1"],
    ],
)
def test_other_names_in_host_are_refused(host: bytes) -> None:
    assert status(Access(), host=host) == 403
    assert status(Access(), "/health", "GET", host=host) == 403
    assert status(Access(hosts=None), host=host) is None


def test_configured_names_in_host_are_let_in() -> None:
    access = Access(hosts=host_names(["My.Box"]))
    assert status(access, host=b"my.box:8080") is None
    assert status(access, host=b"localhost") is None
    assert status(access, host=b"other.box") == 403


def test_a_request_of_http_1_0_may_have_no_host() -> None:
    assert status(Access()) is None


def test_web_pages_need_a_configured_origin() -> None:
    assert status(Access(), origin=b"http://localhost:3000") == 403
    assert status(Access(), origin=b"null") == 403
    assert status(Access(origins=frozenset({"http://localhost:3000"})), origin=b"http://localhost:3000") is None
    assert status(Access(origins=frozenset({"http://localhost:3000"})), origin=b"http://localhost:3001") == 403


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        (b"Bearer key", None),
        (b"bearer  key ", None),
        (b"Bearer Key", 401),
        (b"Basic key", 401),
        (b"key", 401),
        (b"", 401),
    ],
)
def test_the_api_key_comes_as_a_bearer_token(authorization: bytes, expected: int | None) -> None:
    assert status(Access(api_key="key"), authorization=authorization) == expected


@pytest.mark.parametrize(("given", "expected"), [(b"key", None), (b" key ", None), (b"Key", 401), (b"", 401)])
def test_the_api_key_comes_in_a_header_of_its_own(given: bytes, expected: int | None) -> None:
    access = Access(api_key="key")
    assert status(access, x_api_key=given) == expected
    assert status(access, x_api_key=given, authorization=b"Bearer other") == expected
    assert status(access, x_api_key=given, authorization=b"Bearer key") is None


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("http://localhost:3000", "http://localhost:3000"),
        ("https://Example.ORG", "https://example.org"),
        ("http://localhost:80", "http://localhost"),
        ("https://a.example:443", "https://a.example"),
        ("https://a.example:80", "https://a.example:80"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("tauri://localhost", "tauri://localhost"),
        ("http://tauri.localhost", "http://tauri.localhost"),
        ("app://-", "app://-"),
        ("app://.", "app://."),
        ("app://obsidian.md", "app://obsidian.md"),
        ("chrome-extension://abcdefghijklmnopabcdefghijklmnop", "chrome-extension://abcdefghijklmnopabcdefghijklmnop"),
        ("vscode-webview://*", "vscode-webview://*"),
    ],
)
def test_origins(text: str, origin: str) -> None:
    assert read_origin(text) == origin
    access = Access(origins=frozenset({read_origin(text)}))
    assert status(access, origin=origin.replace("*", "1u5hb2").encode()) is None
    assert status(access, origin=origin.replace("*", "1u5hb2").upper().encode()) is None
    for other in (b"null", b"", b"*", b"://", origin.encode() + b".evil", b"x" + origin.encode(), b"https://evil"):
        assert status(access, origin=other) == (None if b"webview://*." in other else 403)


@pytest.mark.parametrize(
    "text",
    [
        *[
            "",
            "localhost",
            "localhost:3000",
            "http://",
            "http:///",
            "http://localhost/",
            "http://localhost/app",
            "app:",
        ],
        *["app://", "http://user@host", "http://host:x", "http://host:", "http://a b", "file://", "file://x", "//host"],
        *["http://a,http://b", "http://é", "http://host?x", "http://host#x", "1http://x", "data:text/html,x"],
    ],
)
def test_what_is_no_origin_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match=r"http://localhost:3000, tauri://localhost, app://name or chrome-extension"):
        read_origin(text)


@pytest.mark.parametrize("text", ["*", "null", "NULL", "http://*", "https://*", "https://*:8443"])
def test_an_origin_of_anybody_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="every"):
        read_origin(text)


def test_the_headers_of_sdks_are_allowed() -> None:
    sent = "authorization,content-type,x-api-key,x-stainless-os,X-Stainless-Retry-Count,openai-organization,openai-beta"
    sent += ",anthropic-version,anthropic-dangerous-direct-browser-access,user-agent"
    assert allowed_headers(sent.encode()) == sent.lower().replace(",", ", ")
    assert allowed_headers(b"Accept, cookie, x-forwarded-for , Content-Type,host") == "accept, content-type"
    for nothing in (b"", b",", b"*", b"x-stainless-\xe9", b"x-stainless-a b", b"openai", b"x-stainless-\x00"):
        assert allowed_headers(nothing) == ""
    assert allowed_headers(b"accept,accept,ACCEPT") == "accept"


def test_health_the_front_page_and_preflights_need_no_key() -> None:
    access = Access(api_key="key", origins=frozenset({"http://a"}))
    assert status(access, "/health") is None
    assert [status(access, "/", method) for method in ("GET", "HEAD", "POST", "OPTIONS")] == [None, None, 401, 401]
    assert status(access, "/", "GET", host=b"evil.example") == 403
    assert status(access, "/", "GET", origin=b"http://b") == 403
    assert status(access) == 401
    post = b"POST"
    assert status(access, method="OPTIONS", origin=b"http://a", access_control_request_method=post) is None
    assert status(access, origin=b"http://a", access_control_request_method=post) == 401
    assert status(access, method="OPTIONS", origin=b"http://b", access_control_request_method=post) == 403
