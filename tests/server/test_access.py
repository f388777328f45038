"""Which requests are let in."""

from __future__ import annotations

import pytest

from trio_runner.server.access import Access, host_names


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


def test_health_and_preflights_need_no_key() -> None:
    access = Access(api_key="key", origins=frozenset({"http://a"}))
    assert status(access, "/health") is None
    assert status(access) == 401
    post = b"POST"
    assert status(access, method="OPTIONS", origin=b"http://a", access_control_request_method=post) is None
    assert status(access, origin=b"http://a", access_control_request_method=post) == 401
    assert status(access, method="OPTIONS", origin=b"http://b", access_control_request_method=post) == 403
