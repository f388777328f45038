"""The program over HTTP, with a model on a device."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.cli.programs import program
from tests.server.client import Answer, Client, post, request

Models = Callable[[str], Path]

OPTIONS = ["--threads", "1", "--slots", "1", "--context-length", "512", "--batch-size", "64"]
PROMPT = "the story and the model and the answer of the user " * 20


async def ask(port: int, raw: bytes) -> Answer:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        return await Client(stream).ask(raw)


async def statistics(port: int) -> Mapping[str, Any]:
    facts: Mapping[str, Any] = (await ask(port, request("GET", "/statistics"))).json
    return facts


async def until(port: int, condition: Callable[[Mapping[str, Any]], bool]) -> None:
    """Request the statistics until they meet `condition`."""
    while not condition(await statistics(port)):  # noqa: ASYNC110
        await trio.sleep(0.005)


def is_idle(facts: Mapping[str, Any]) -> bool:
    return bool(facts["generations"] == facts["running"] == 0)


async def test_a_server_on_a_device(models: Models, device: str) -> None:
    arguments = ["serve", "--model", str(models("llama")), "--port", "0", "--device", device, *OPTIONS]
    async with program(*arguments, toy=False) as runner:
        port = await runner.listening()
        await runner.logged("model loaded")
        placement = (await ask(port, request("GET", "/props"))).json["placement"]
        assert placement["device_layers"] == placement["layers"] == 3
        (there,) = placement["devices"]
        assert there["name"] == device
        assert min(there["memory_used"].values()) > 0
        assert placement["host"]["memory_used"]["context"] == 0

        fields = {"prompt": PROMPT, "temperature": 0, "n_predict": 24, "cache_prompt": True}
        first = await ask(port, post("/completion", fields))
        assert len(first.lines) > 3  # a stream
        assert first.text
        # The same request again takes nearly all of its prompt from the cache.
        again = await ask(port, post("/completion", fields))
        assert again.text == first.text
        n_prompt = again.lines[-1]["timings"]["prompt_n"]
        assert again.lines[-1]["timings"]["cache_n"] == n_prompt - 1

        vectors = [(await ask(port, post("/embedding", {"content": PROMPT[:60]}))).json["embedding"] for _ in range(2)]
        assert len(vectors[0]) == 64
        assert vectors[0] == pytest.approx(vectors[1], abs=1e-3)

        # A client disconnects during a stream. Its slot is free, and its rows stay in the cache for the retry.
        endless = {**fields, "prompt": "hello " + PROMPT, "n_predict": -1, "shift": True}
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            client = Client(stream)
            await stream.send_all(post("/completion", endless))
            assert (await client.head())[0] == 200
            await client.chunk()
        await until(port, is_idle)
        retry = await ask(port, post("/completion", {**endless, "n_predict": 4}))
        timings = retry.lines[-1]["timings"]
        assert timings["cache_n"] == timings["prompt_n"] - 1

        # The same in the middle of a prompt.
        rows = (await statistics(port))["prompt_rows"]
        fields["prompt"] = "a world " + PROMPT
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(post("/completion", fields))
            await until(port, lambda facts: facts["prompt_rows"] > rows)
        await until(port, is_idle)
        cut_off = await ask(port, post("/completion", fields))
        assert cut_off.lines[-1]["timings"]["cache_n"] > 0
        assert cut_off.text == (await ask(port, post("/completion", {**fields, "cache_prompt": False}))).text

        runner.terminate()
        assert await runner.ended() == 0
        assert "Traceback" not in runner.log


async def test_info_shows_the_placement(models: Models, device: str) -> None:
    arguments = ["-m", str(models("chain")), "--device", device, "--threads", "1"]
    async with program("info", "--json", *arguments, toy=False) as runner:
        assert await runner.ended() == 0, runner.log
        facts = json.loads(runner.output)
    assert facts["placement"]["layers on devices"] == "2 of 2"
    assert device in facts["placement"]
    assert device in facts["devices"]
