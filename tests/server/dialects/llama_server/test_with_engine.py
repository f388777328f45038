"""llama-server's dialect with a real engine on the toy model."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.engine.toys import prompts
from tests.server.client import WAYS, Leave, Server, post, serving, until
from tests.server.dialects.llama_server.events import parts, text_of
from trio_runner.config import AdapterConfig
from trio_runner.core.batch import Batch
from trio_runner.front_door import open_engine
from trio_runner.testing import END, ToyLoader, toy_cache_key, toy_continuation, toy_text

TEXT = prompts(1, 40)[0]
TOKENS = list(TEXT.encode())


async def complete(server: Server, **fields: Any) -> Any:
    answer = await server.ask(post("/llama/completion", {"prompt": TEXT, "n_predict": 10, **fields}))
    assert answer.status == 200, answer.body
    return answer.json


async def test_a_whole_answer_and_a_stream_have_the_same_text() -> None:
    async with open_engine(ToyLoader(), slots=2) as engine, serving(engine) as server:
        whole = await complete(server)
        stream = await server.ask(post("/llama/completion", {"prompt": TEXT, "n_predict": 10, "stream": True}))
        assert whole["content"] == text_of(stream) == toy_text(TEXT, 10)
        assert stream.body.startswith(b":\n\n")
        last = parts(stream)[-1]
        assert last.keys() == whole.keys()
        for answer in (whole, last):
            assert (answer["tokens_predicted"], answer["tokens_evaluated"], answer["tokens_cached"]) == (10, 10, 19)
            assert (answer["stop_type"], answer["truncated"], answer["prompt"]) == ("limit", False, TEXT)
        assert (whole["timings"]["cache_n"], whole["timings"]["prompt_n"]) == (0, 10)
        assert last["timings"]["cache_n"] == 9  # by default the cache is used, and the last token is decoded again
        assert last["timings"]["prompt_n"] == 1


async def test_prompts_of_every_form() -> None:
    forms: list[Any] = [TEXT, TOKENS, [*TOKENS[:3], TEXT[3:7], *TOKENS[7:]], {"prompt_string": TEXT}]
    async with open_engine(ToyLoader(), slots=2) as engine, serving(engine) as server:
        for form in forms:
            answer = await complete(server, prompt=form)
            assert (answer["content"], answer["prompt"]) == (toy_text(TEXT, 10), TEXT)
        answers = await complete(server, prompt=forms)
        assert [answer["index"] for answer in answers] == [0, 1, 2, 3]
        assert {answer["content"] for answer in answers} == {toy_text(TEXT, 10)}
        assert "content" in await complete(server, prompt=["x"])  # a list of one is answered with one object


async def test_several_completions_of_one_prompt_decode_it_once() -> None:
    async with open_engine(ToyLoader(), slots=3) as engine, serving(engine) as server:
        answers = await complete(server, n_cmpl=3)
        assert [answer["content"] for answer in answers] == [toy_text(TEXT, 10)] * 3
        assert sum(answer["timings"]["prompt_n"] for answer in answers) == len(TOKENS) + 2
        stream = await server.ask(post("/llama/completion", {"prompt": TEXT, "n": 2, "n_predict": 4, "stream": True}))
        texts = ["", ""]
        for part in parts(stream):
            texts[part["index"]] += part["content"]
        assert texts == [toy_text(TEXT, 4)] * 2


async def test_progress_of_a_long_prompt() -> None:
    async with open_engine(ToyLoader(), slots=1, batch_size=32) as engine, serving(engine) as server:
        fields = {"prompt": "a" * 100, "n_predict": 1, "stream": True, "return_progress": True}
        progress = [part["prompt_progress"] for part in parts(await server.ask(post("/llama/completion", fields)))[:-2]]
        assert [(one["total"], one["cache"]) for one in progress] == [(100, 0)] * len(progress)
        processed = [one["processed"] for one in progress]
        assert len(processed) >= 4
        assert processed == sorted(processed)
        assert processed[-1] == 100
        assert all(one["time_ms"] >= 0 for one in progress)


async def test_warming_the_cache() -> None:
    async with open_engine(ToyLoader(), slots=1) as engine, serving(engine) as server:
        warm = await complete(server, n_predict=0)
        assert (warm["content"], warm["tokens_predicted"], warm["tokens_evaluated"]) == ("", 0, 10)
        assert (warm["stop_type"], warm["truncated"]) == ("limit", False)
        assert (await complete(server))["timings"]["cache_n"] == 9
        assert (await complete(server, cache_prompt=False))["timings"]["cache_n"] == 0


async def test_tokens_and_probabilities() -> None:
    tokens = toy_continuation(TOKENS, 10)
    async with open_engine(ToyLoader(), slots=1) as engine, serving(engine) as server:
        answer = await complete(server, return_tokens=True, n_probs=2)
        assert answer["tokens"] == tokens
        assert [entry["id"] for entry in answer["completion_probabilities"]] == tokens
        assert bytes(byte for entry in answer["completion_probabilities"] for byte in entry["bytes"]) == bytes(tokens)
        fields = {"prompt": TEXT, "n_predict": 10, "stream": True, "timings_per_token": True}
        *pieces, _ = parts(await server.ask(post("/llama/completion", fields)))
        assert [token for part in pieces for token in part["tokens"]] == tokens
        assert pieces[-1]["tokens_predicted"] == pieces[-1]["timings"]["predicted_n"] == 10


@pytest.mark.parametrize("stream", [False, True])
async def test_the_end_token_is_among_the_probabilities(stream: bool) -> None:
    async with open_engine(ToyLoader(), slots=1) as engine, serving(engine) as server:
        fields = {"prompt": "hello", "n_probs": 1, "stream": stream, "return_tokens": True}
        answer = await server.ask(post("/llama/completion", fields))
        found = parts(answer) if stream else [answer.json]
        ids = [entry["id"] for part in found for entry in part.get("completion_probabilities", ())]
        assert ids == toy_continuation(list(b"hello"), 1000)
        assert ids[-1] == END
        assert found[-1]["stop_type"] == "eos"


async def test_stop_texts() -> None:
    text = toy_text(TEXT, 20)
    async with open_engine(ToyLoader(), slots=1) as engine, serving(engine) as server:
        for stop in (text[3:5], [text[3:5]]):
            answer = await complete(server, stop=stop, n_predict=20)
            assert answer["content"] == text[: text.index(text[3:5])]
            assert (answer["stop_type"], answer["stopping_word"]) == ("word", text[3:5])


async def test_a_full_context_ends_the_text() -> None:
    async with open_engine(ToyLoader(), slots=1, context_length=32) as engine, serving(engine) as server:
        answer = await complete(server, n_predict=-1)
        assert (answer["stop_type"], answer["truncated"]) == ("limit", True)
        assert answer["tokens_evaluated"] + answer["tokens_predicted"] in (32, 33)
        refused = await server.ask(post("/llama/completion", {"prompt": "x" * 40}))
        assert refused.json["error"] == {
            "code": 400,
            "message": "prompt has 40 tokens, but at most 32 fit",
            "type": "exceed_context_size_error",
            "n_prompt_tokens": 40,
            "n_ctx": 32,
        }


@pytest.mark.parametrize("leave", WAYS)
@pytest.mark.parametrize("fields", [{"stream": True}, {}, {"stream": True, "n_indent": 1}, {"n_cmpl": 2}])
async def test_a_client_that_leaves_frees_its_slots(fields: dict[str, Any], leave: Leave) -> None:
    def slowly(batch: Batch) -> None:
        time.sleep(0.002)

    async with open_engine(ToyLoader(on_decode=slowly), slots=2) as engine, serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(post("/llama/completion", {"prompt": TEXT, **fields}))
        await until(lambda: engine.statistics().scheduler.n_sampled > 2)
        await leave(client)
        await until(lambda: engine.statistics().generations == engine.statistics().busy == 0)
        assert (await complete(server))["content"] == toy_text(TEXT, 10)


async def test_a_client_that_leaves_in_prefill_and_in_the_queue() -> None:
    def slowly(batch: Batch) -> None:
        time.sleep(0.002)

    async with (
        open_engine(ToyLoader(on_decode=slowly), slots=1, batch_size=8) as engine,
        serving(engine) as server,
    ):
        for _ in range(2):
            running, waiting = await server.connect(), await server.connect()
            await running.stream.send_all(post("/llama/completion", {"prompt": "y" * 2000, "stream": True}))
            await running.head()
            await waiting.stream.send_all(post("/llama/completion", {"prompt": "z", "stream": True}))
            await waiting.head()
            waiting.reset()
            await until(lambda: engine.statistics().generations == 1)
            running.reset()
            await until(lambda: engine.statistics().generations == 0)
        assert (await complete(server))["content"] == toy_text(TEXT, 10)


async def test_adapters_are_chosen_by_their_numbers() -> None:
    loader = ToyLoader(adapters=(AdapterConfig("one.gguf"), AdapterConfig("two.gguf")))
    async with open_engine(loader, slots=1) as engine, serving(engine) as server:
        keys = {
            ((1, 0.5),): toy_cache_key([("two.gguf", 0.5)]),
            (): "",
            ((0, 1.0), (1, 2.0)): toy_cache_key([("one.gguf", 1.0), ("two.gguf", 2.0)]),
        }
        for chosen, key in keys.items():
            answer = await complete(server, lora=[{"id": number, "scale": scale} for number, scale in chosen])
            assert answer["content"] == toy_text(TEXT, 10, key)
        refused = await server.ask(post("/llama/completion", {"prompt": "x", "lora": [{"id": 2, "scale": 1}]}))
        assert (refused.status, refused.json["error"]["message"]) == (400, "lora: there is no adapter with id 2")


async def test_more_completions_than_there_will_ever_be_room_for() -> None:
    async with open_engine(ToyLoader(), slots=1, max_queue=2) as engine, serving(engine) as server:
        assert len(await complete(server, n_cmpl=3)) == 3
        for fields, name in (({"n_cmpl": 4}, "n_cmpl"), ({"prompt": ["a"] * 4}, "prompt")):
            answer = await server.ask(post("/llama/completion", {"prompt": TEXT, "n_predict": 2, **fields}))
            assert (answer.status, answer.json["error"]["message"]) == (
                400,
                f"{name}: 4 answers at once are more than the 3 that fit",
            )
