"""What programs send that were written for llama-server, byte by byte, and what they read of the answers.

The requests are made from what the clients' sources say: llama.vim and llama.vscode for /infill, Continue's `llama.cpp`
provider for /completion.
"""

from __future__ import annotations

import json
import time

import pytest

from tests.engine.toys import Toy
from tests.server.client import Client, post, request, serving, until
from trio_runner.core.batch import Batch
from trio_runner.testing import toy_text

MARKS: dict[str, object] = {"token_fim_pre": 1, "token_fim_suf": 2, "token_fim_mid": 3, "token_fim_sep": 5}

EDITOR = {
    "id_slot": 0,
    "input_prefix": "def f():\n",
    "input_suffix": "\n\nf()\n",
    "input_extra": [{"text": "x = 1\n", "filename": "other.py", "time": 1.5}],
    "prompt": "    return ",
    "n_predict": 16,
    "stop": [],
    "n_indent": 0,
    "top_k": 40,
    "top_p": 0.9,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 500,
    "response_fields": [
        *["content", "timings/prompt_n", "timings/prompt_ms", "timings/prompt_per_token_ms", "timings/predicted_n"],
        *["timings/prompt_per_second", "timings/predicted_ms", "timings/predicted_per_token_ms"],
        *["timings/predicted_per_second", "truncated", "tokens_cached"],
    ],
}
LAID_OUT = [5, *b"other.py\nx = 1\n", 5, *b"filename\n", 1, *b"def f():\n    return ", 2, *b"\n\nf()\n", 3]


def slowly(batch: Batch) -> None:
    time.sleep(0.002)


async def test_an_editor_warms_the_cache_asks_and_leaves() -> None:
    toy = Toy()
    toy.info, toy.on_decode = {**MARKS}, slowly
    async with toy.engine(slots=2, batch_size=64) as engine, serving(engine) as server:
        client = await server.connect()
        # Other files first, without a text: it only waits for the answer.
        warming = {**EDITOR, "input_prefix": "", "input_suffix": "", "prompt": "", "n_predict": 0}
        warming |= {"samplers": [], "t_max_prompt_ms": 1, "t_max_predict_ms": 1, "response_fields": [""]}
        assert (await client.ask(post("/llama/infill", warming))).json == {}
        answer = (await client.ask(post("/llama/infill", EDITOR))).json
        assert list(answer) == EDITOR["response_fields"]
        assert answer["content"] == toy_text(LAID_OUT, 16)
        assert answer["timings/prompt_n"] < len(LAID_OUT) - len(b"other.py\nx = 1\nfilename\n")
        # The person types on: the request is dropped in the middle, and the next one is served at once.
        for _ in range(3):
            leaving = await server.connect()
            await leaving.stream.send_all(post("/llama/infill", {**EDITOR, "n_predict": 4000, "t_max_predict_ms": 0}))
            await until(lambda: engine.statistics().busy == 1)
            await leaving.stream.aclose()
            await until(lambda: engine.statistics().generations == 0)
        assert (await client.ask(post("/llama/infill", EDITOR))).json["content"] == toy_text(LAID_OUT, 16)


async def test_a_late_completion_ends_with_its_line() -> None:
    """The toy writes no newline, so the text goes on to its length: an editor gets no line that is cut in two."""
    toy = Toy()
    toy.info, toy.on_decode = {**MARKS}, slowly
    async with toy.engine(slots=1) as engine, serving(engine) as server:
        answer = await server.ask(post("/llama/infill", {**EDITOR, "t_max_predict_ms": 1}))
        assert answer.json["content"] == toy_text(LAID_OUT, 16)
        assert answer.json["timings/predicted_n"] == 16


CHAT = b"""POST /llama/completion HTTP/1.1\r
Content-Type: application/json\r
Accept: */*\r
Accept-Encoding: gzip,deflate\r
Host: localhost\r
Connection: close\r
Content-Length: %d\r
\r
%b"""


async def events(client: Client) -> list[str]:
    """The data of the events, read as Continue does: line by line, and what does not begin with "data:" is no data."""
    found = []
    while chunk := await client.chunk():
        found += [line[len("data: ") :] for line in chunk.decode().splitlines() if line.startswith("data: ")]
    return found


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_chat_that_streams(leaves: bool) -> None:
    toy = Toy()
    toy.on_decode = slowly
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    fields = {"prompt": prompt, "stream": True, "n_predict": 24, "temperature": 0.5, "stop": ["<|im_end|>"]}
    fields |= {"top_p": 1, "top_k": 40, "frequency_penalty": 0, "presence_penalty": 0, "mirostat": 0}
    body = json.dumps(fields).encode()
    async with toy.engine(slots=1) as engine, serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(CHAT % (len(body), body))
        status, headers = await client.head()
        assert (status, headers["content-type"]) == (200, "text/event-stream")
        if leaves:
            await until(lambda: engine.statistics().scheduler.n_sampled > 3)
            client.reset()
        else:
            found = [json.loads(data) for data in await events(client)]
            assert "".join(part["content"] for part in found) == toy_text(prompt, 24)
            assert [part["stop"] for part in found[-2:]] == [False, True]
        await until(lambda: engine.statistics().generations == 0)


async def test_a_monitor() -> None:
    toy = Toy()
    toy.on_decode = slowly
    async with toy.engine(slots=2, context_length=512) as engine, serving(engine) as server:
        client = await server.connect()
        assert (await client.ask(request("GET", "/llama/health"))).json == {"status": "ok"}
        props = (await client.ask(request("GET", "/llama/props"))).json
        assert props["total_slots"] == 2
        assert props["default_generation_settings"]["n_ctx"] == 512
        assert props["default_generation_settings"]["params"]["min_p"] == 0.05
        assert props["modalities"] == {"vision": False, "audio": False, "video": False}
        idle = (await client.ask(request("GET", "/llama/slots"))).json
        slot = {"n_ctx": 512, "speculative": False, "is_processing": False}
        assert idle == [{"id": number, **slot} for number in range(2)]
        running = [await server.connect() for _ in range(2)]
        for one in running:
            await one.stream.send_all(post("/llama/completion", {"prompt": "x", "n_predict": 4000, "stream": True}))
        await until(lambda: engine.statistics().busy == 2)
        busy = (await client.ask(request("GET", "/llama/slots"))).json
        assert [one["is_processing"] for one in busy] == [True, True]
        full = await client.ask(request("GET", "/llama/slots?fail_on_no_slot=1"))
        assert (full.status, full.json["error"]["type"]) == (503, "unavailable_error")
        metrics = await client.ask(request("GET", "/llama/metrics"))
        assert b"\nllamacpp:requests_processing 2.0\n" in metrics.body
