"""An adapter of the default model: texts with it and without it, side by side, while it comes and goes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from tests.real.conftest import DEADLINE
from tests.server.client import Server, post, request
from tests.server.client import serving as serving_engine
from trio_runner import open_engine

DATA: Final = Path(__file__).parent.parent / "data"
SAID: Final = "Ahoy! I be Captain Llama, and this reply comes from the LoRA."
PROMPT: Final = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
async def server(default_model: Path) -> AsyncIterator[Server]:
    async with (
        open_engine(default_model, slots=4, context_length=512, threads=1, batch_size=128) as engine,
        serving_engine(engine, deadline=DEADLINE, adapter_dir=DATA) as server,
    ):
        yield server


async def says(server: Server, *adapters: dict[str, Any]) -> str:
    asked = {"prompt": PROMPT, "adapters": list(adapters), "n_predict": 24, "cache_prompt": True}
    return (await server.ask(post("/completion", asked | {"temperature": 0, "repeat_penalty": 1}))).text


async def test_an_adapter_changes_the_text_and_scale_0_does_not(server: Server) -> None:
    bare = await says(server)
    loaded = await server.ask(post("/adapters", {"file": "lora-pirate.gguf", "name": "pirate"}))
    assert (loaded.status, loaded.json["name"]) == (200, "pirate")
    assert await says(server) == bare
    assert await says(server, {"name": "pirate"}) == SAID
    assert await says(server, {"name": "pirate", "scale": 0.75}) == SAID
    assert await says(server, {"name": "pirate", "scale": 0}) == bare

    texts: dict[int, str] = {}

    async def ask(number: int) -> None:
        texts[number] = await says(server, {"name": "pirate", "scale": number % 2})

    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(ask, number)
    assert texts == {number: SAID if number % 2 else bare for number in range(6)}

    gone = await server.ask(request("DELETE", "/adapters/pirate"))
    assert gone.status == 200
    refused = await server.ask(post("/completion", {"prompt": PROMPT, "adapters": [{"name": "pirate"}]}))
    assert refused.status == 404
    assert await says(server) == bare


async def test_other_files_are_refused_as_adapters(server: Server) -> None:
    bare = await says(server)
    for file in ("mmproj-shapes.gguf", "minilm.npy", "README.md", "nothing.gguf"):
        answer = await server.ask(post("/adapters", {"file": file}))
        assert answer.status == 422, file
        assert str(DATA).encode() not in answer.body
    assert await says(server) == bare
