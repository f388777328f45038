"""Models from a hub: the real client library in a process of its own, against a small hub on loopback."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = b"GGUF" + bytes(range(256)) * 40


@dataclass
class Hub:
    """Serves `files` like a hub; their keys are "repository/revision/path"."""

    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""
    home: Path = Path()
    status: int = 200
    """If not 200, the status of every answer."""

    def fetch(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `trio-runner fetch`."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        command = [sys.executable, "-m", "trio_runner", "fetch", *arguments]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return subprocess.run(
            command, env=inherited | own | environment, capture_output=True, text=True, timeout=60, check=False
        )


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub({"owner/repo/main/q4/model.gguf": CONTENT}, home=tmp_path / "hf")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            repository, _, place = self.path.lstrip("/").partition("/resolve/")
            data = hub.files.get(f"{repository}/{place}")
            if hub.status != 200:
                self.reply(hub.status, {"X-Error-Code": "GatedRepo"} if hub.status == 403 else {})
            elif not any(name.startswith(repository + "/") for name in hub.files):
                self.reply(401, {"X-Error-Code": "RepoNotFound"})
            elif data is not None:
                etag = hashlib.sha256(data).hexdigest()
                self.reply(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, data)
            elif place.startswith("main/"):
                self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            else:
                self.reply(404, {"X-Error-Code": "RevisionNotFound"})

        def reply(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join(10)


def test_a_fetched_file_is_used_without_asking_the_hub_again(hub: Hub) -> None:
    first = hub.fetch("hf:owner/repo/q4/model.gguf")
    assert first.returncode == 0, first.stderr
    path = Path(first.stdout.removesuffix("\n"))
    assert path.name == "model.gguf"
    assert path.read_bytes() == CONTENT
    assert hub.requests
    hub.requests.clear()
    again = hub.fetch("hf:owner/repo/q4/model.gguf", HF_ENDPOINT="http://127.0.0.1:9")
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr


def test_all_parts_of_a_split_model_are_fetched_at_the_given_revision(hub: Hub) -> None:
    names = [f"big-0000{index}-of-00002.gguf" for index in (1, 2)]
    hub.files |= {f"owner/repo/v1/{name}": CONTENT + name.encode() for name in names}
    done = hub.fetch(f"hf:owner/repo@v1/{names[0]}")
    assert done.returncode == 0, done.stderr
    first = Path(done.stdout.removesuffix("\n"))
    assert [(first.parent / name).read_bytes() for name in names] == [CONTENT + name.encode() for name in names]


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("hf:owner/repo/other.gguf", "there is no such file in the repository"),
        ("hf:owner/repo@v9/q4/model.gguf", "there is no such revision of the repository"),
        ("hf:owner/nothing/model.gguf", "there is no such repository, or it is private and HF_TOKEN is not set"),
        ("hf:owner/--bad--/model.gguf", "this is not the name of a repository"),
    ],
)
def test_a_missing_file_revision_or_repository_is_reported(hub: Hub, reference: str, reason: str) -> None:
    done = hub.fetch(reference)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {reference}: {reason}\n"


@pytest.mark.parametrize(
    ("status", "environment", "reason"),
    [
        (403, {}, "the repository asks for consent; get access and set HF_TOKEN"),
        (200, {"HF_HUB_OFFLINE": "1"}, "it is not in the cache, and fetching is off"),
    ],
)
def test_a_forbidden_fetch_is_reported(hub: Hub, status: int, environment: dict[str, str], reason: str) -> None:
    hub.status = status
    done = hub.fetch("hf:owner/repo/q4/model.gguf", **environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: hf:owner/repo/q4/model.gguf: {reason}\n"
