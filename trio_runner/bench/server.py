"""A server that is measured: what it is, how to send it requests, and what it reports about itself."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

import trio

from trio_runner.bench.client import Address, Connection, CutShort, Refused, Stream, fetch, requesting
from trio_runner.bench.dialects import DIALECTS, OUR_BASES, Dialect, DialectName, Request, Runner
from trio_runner.bench.processes import listener
from trio_runner.errors import RunnerError

Statistics: TypeAlias = Mapping[str, Any]

DEFAULT_SLOTS: Final = 4
"""Slots that a server is taken to have if it does not tell."""
POLL_SECONDS: Final = 0.002
"""Seconds between two looks at a server's statistics: the precision of what is measured with them."""
READY_SECONDS: Final = 120.0
"""Seconds that a server may take to load its model."""
QUIET_SECONDS: Final = 60.0
"""Seconds that a server may take until nothing runs and nothing waits."""

_ENDS: Final = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
    "<|end|>",
    "<|return|>",
)
"""Special tokens that end a text in one vocabulary or another."""

_COUNT: Final = re.compile(
    r"^trio_runner_(?P<name>\w+_total)(?:\{model_name=\"[^\"]*\"\})? (?P<value>\S+)$", re.MULTILINE
)


class Unavailable(RunnerError):
    """The server cannot do what a scenario needs, in this round or any other. The message is for the report."""


class Overdue(RunnerError):
    """The server has not done in time what it is able to do."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server. It runs `slots` requests at once. `pid` is its process, if that is on this machine and known."""

    url: str
    address: Address
    dialect: Dialect
    slots: int
    pid: int | None = None
    tokenizes: bool = True
    """Whether the server has /tokenize."""
    is_ours: bool = False
    """Whether it is trio-runner, which speaks several dialects, and has /statistics beside all of them."""
    fresh: Callable[[], AbstractAsyncContextManager[Server]] | None = field(default=None, compare=False)
    """Starts another server like this one, which ends with the block. None for a server that others have started."""

    @property
    def key(self) -> tuple[str, str]:
        """What tells it apart from the others that are measured: one server may be measured in several dialects."""
        return self.url, self.dialect.name

    @property
    def _has_statistics(self) -> bool:
        return self.is_ours or isinstance(self.dialect, Runner)

    def requesting(self, request: Request, *, receive_buffer: int | None = None) -> AbstractAsyncContextManager[Stream]:
        """A completion that is requested when the block begins and abandoned when it ends. See `client.requesting`."""
        return requesting(self.address, self.dialect, request, receive_buffer=receive_buffer)

    async def complete(self, request: Request) -> Stream:
        """Return the whole answer. Raises `Refused`, `CutShort` and OSError."""
        async with self.requesting(request) as stream:
            return await stream.finish()

    async def get(self, path: str) -> Any:
        """Return the JSON at `path`. Raises `Refused`, `CutShort`, ValueError if it is not JSON, and OSError."""
        with await Connection.open(self.address) as connection:
            return await fetch(connection, "GET", path)

    async def post(self, path: str, fields: Mapping[str, Any]) -> Any:
        """Post `fields` to `path` and return the JSON of the answer. Raises the same as `get`."""
        with await Connection.open(self.address) as connection:
            return await fetch(connection, "POST", path, fields)

    async def counted(self) -> dict[str, float]:
        """What a server of ours has counted since it started, by the names in docs/metrics.md without their beginning.
        Empty for other servers. Raises `CutShort` and OSError."""
        if not self.is_ours:
            return {}
        with await Connection.open(self.address) as connection:
            await connection.send(connection.encode("GET", "/metrics"))
            head = await connection.head()
            text = (await connection.read()).decode()
        found = _COUNT.finditer(text) if head.status == 200 else ()
        return {match["name"]: float(match["value"]) for match in found}

    async def count_tokens(self, text: str) -> int:
        """Tokens of `text`, with the special ones that a prompt begins with. Raises the same as `get`."""
        return len((await self.post("/tokenize", {"content": text, "add_special": True}))["tokens"])

    async def quiet(self) -> None:
        """Wait until nothing runs and nothing waits, as far as the server can tell.

        Raises `Overdue` after `QUIET_SECONDS`.
        """
        with trio.move_on_after(QUIET_SECONDS):
            if self._has_statistics:
                async with watching(self) as watch:
                    if await watch.look() is not None:
                        await watch.until(lambda statistics: not any(_held(statistics).values()))
                        return
            elif await self.held():
                while any((await self.held()).values()):  # noqa: ASYNC110
                    await trio.sleep(10 * POLL_SECONDS)
                return
            # The server does not tell. But when every slot has completed a request, nothing from before is left.
            async with trio.open_nursery() as nursery:
                for _ in range(self.slots):
                    nursery.start_soon(self.complete, Request(prompt=" the", max_tokens=1))
            return
        raise Overdue(f"still busy after {QUIET_SECONDS:g} s")

    async def held(self) -> dict[str, int]:
        """Slots and other things that requests still hold, by a name for people. Empty if the server does not tell."""
        if self._has_statistics:
            async with watching(self) as watch:
                statistics = await watch.look()
            return {} if statistics is None else _held(statistics)
        try:
            slots = await self.get("/slots")
        except (Refused, ValueError):
            return {}
        return {"slots still taken": sum(slot["is_processing"] for slot in slots)} if isinstance(slots, list) else {}


def _held(statistics: Statistics) -> dict[str, int]:
    return {
        "slots still taken": statistics["running"],
        "requests still waiting": statistics["waiting"],
        "generations still open": statistics["generations"],
    }


class Watch:
    """Requests /statistics over one connection, again and again."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._connection: Connection | None = None

    async def look(self) -> Statistics | None:
        """The server's statistics, or None if it has none. Raises `CutShort` and OSError if it does not answer."""
        again = self._connection is not None  # the server may have closed it while it was idle
        try:
            return await self._fetch()
        except (CutShort, OSError):
            if not again:
                raise
            return await self._fetch()

    async def _fetch(self) -> Statistics | None:
        if self._connection is None:
            self._connection = await Connection.open(self._address)
        try:
            statistics: Statistics = await fetch(self._connection, "GET", "/statistics")
        except Refused:
            return None
        except BaseException:  # the rest of an answer may be left in it
            self.close()
            raise
        return statistics

    async def until(self, condition: Callable[[Statistics], bool], seconds: float | None = None) -> float:
        """Wait until the statistics meet `condition`. Returns the moment at which they were seen to do so.

        Raises `Unavailable` if the server has no statistics, and `Overdue` after `seconds`, or else `QUIET_SECONDS`.
        """
        seconds = QUIET_SECONDS if seconds is None else seconds
        with trio.move_on_after(seconds):
            while (statistics := await self.look()) is not None:
                moment = time.perf_counter()
                if condition(statistics):
                    return moment
                await trio.sleep(POLL_SECONDS)
            raise Unavailable("no /statistics")
        raise Overdue(f"not within {seconds:g} s")

    def close(self) -> None:
        """Close the connection. A later look opens another one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@asynccontextmanager
async def watching(server: Server) -> AsyncIterator[Watch]:
    """Yield a watch of the server, and close it when the block ends."""
    watch = Watch(server.address)
    try:
        yield watch
    finally:
        watch.close()


# ---- getting acquainted ----------------------------------------------------------------------------------------------


def parse_url(url: str) -> Address:
    """The address in `url`. Raises ValueError if `url` is not http://HOST:PORT."""
    parts = urlsplit(url if "//" in url else f"//{url}", scheme="http")
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ValueError(f"{url} is not http://HOST:PORT")
    return Address(parts.hostname, parts.port or 80)


async def meet(
    url: str, dialect: DialectName | None = None, *, slots: int | None = None, pid: int | None = None
) -> Server:
    """Return the server at `url` once it is ready. Asks the server for whatever is not given.

    Raises ValueError if `url` is not http://HOST:PORT, and `Unavailable` if nothing answers there or the kind of server
    is not recognised.
    """
    address = parse_url(url)
    server = Server(f"http://{address}", address, DIALECTS[dialect or "openai"](), slots or DEFAULT_SLOTS, pid)
    await _wait_ready(server)
    props = await _try(server.get, "/props")
    health = await _try(server.get, "/health")
    models = await _try(server.get, "/v1/models")
    is_ours = isinstance(health, dict) and "progress" in health
    if dialect is None:
        if isinstance(props, dict) and "total_slots" in props:
            dialect = "llama"
        elif is_ours:
            dialect = "runner"
        elif isinstance(models, dict) and "data" in models:
            dialect = "openai"
        else:
            raise Unavailable(f"{url}: the kind of server is not recognised: name its dialect")
    if slots is None:
        statistics = await _try(server.get, "/statistics") or {}
        told = statistics.get("slots") or (props or {}).get("total_slots")
        slots = told if isinstance(told, int) else DEFAULT_SLOTS
    model = str(models["data"][0]["id"]) if isinstance(models, dict) and models.get("data") else ""
    forbidden = await _ends(server) if dialect == "runner" else ()
    tokenized = await _try(server.post, "/tokenize", {"content": "a"})
    return replace(
        server,
        dialect=DIALECTS[dialect](forbidden=forbidden, model=model, base=OUR_BASES.get(dialect, "") if is_ours else ""),
        is_ours=is_ours,
        slots=slots,
        pid=pid if pid is not None else await trio.to_thread.run_sync(listener, address.host, address.port),
        tokenizes=isinstance(tokenized, dict) and "tokens" in tokenized,
    )


async def _wait_ready(server: Server) -> None:
    """Wait while /health answers 503 or says that the model is loading.

    Raises `Unavailable` if the server is broken, about to end, or does not answer.
    """
    with trio.move_on_after(READY_SECONDS):
        while True:
            try:
                health = await server.get("/health")
            except Refused as refusal:
                if refusal.status != 503:
                    return
                if '"server error"' in str(refusal):
                    raise Unavailable(f"{server.url}: {refusal}") from refusal
            except ValueError:
                return  # it answers, though not in JSON
            except (OSError, CutShort) as error:
                raise Unavailable(f"{server.url}: {error}") from error
            else:
                if not isinstance(health, dict) or health.get("status") != "loading model":
                    return
            await trio.sleep(0.05)
    raise Unavailable(f"{server.url}: not ready within {READY_SECONDS:g} s")


async def _try(call: Callable[..., Any], *arguments: object) -> Any:
    """Return the answer, or None if the server refused or sent no JSON."""
    try:
        return await call(*arguments)
    except (Refused, CutShort, ValueError):
        return None


async def _ends(server: Server) -> tuple[int, ...]:
    """The numbers of the special tokens that end a text in this server's vocabulary."""
    ends = set()
    for text in _ENDS:
        answer = await _try(server.post, "/tokenize", {"content": text, "add_special": False, "parse_special": True})
        if answer and len(answer["tokens"]) == 1:
            ends.add(answer["tokens"][0])
    return tuple(sorted(ends))
