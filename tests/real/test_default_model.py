"""The default model from end to end: real weights, real sockets, a real client."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import trio

from tests.real.conftest import DEADLINE, Service, serving
from tests.server.client import post, request, until
from trio_runner import Finished, LoadError, PromptTooLong, SamplingParams, open_engine

FRANCE = "The capital of France is"
STORY = "Once upon a time, in a village by the sea, there lived a fisherman who could not swim. "


@pytest.fixture
async def service(default_model: Path) -> AsyncIterator[Service]:
    async with serving(default_model, slots=4, context_length=1024) as service:
        yield service


async def test_the_example_in_the_readme(service: Service) -> None:
    lines = await service.lines("/completion", prompt=FRANCE, n_predict=8, temperature=0)
    assert " Paris" in "".join(line["content"] for line in lines)
    assert [line["stop"] for line in lines] == [False] * (len(lines) - 1) + [True]
    last = lines[-1]
    assert last["stopped_limit"] is True
    assert last["timings"]["predicted_n"] == 8
    assert last["timings"]["prompt_n"] == len(await service.engine.tokenize(FRANCE))


class City(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    country: str


async def test_an_answer_obeys_a_schema(service: Service) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    messages = [{"role": "user", "content": "Which city is the capital of France? Answer in JSON."}]
    text = await service.engine.chat(messages, json_schema=City, temperature=0, max_tokens=60).collect()
    assert msgspec.json.decode(text, type=City).name == "Paris"
    schema = {"type": "object", "properties": {"capital": {"type": "string"}}, "required": ["capital"]}
    answer = await service.complete(prompt=FRANCE, n_predict=60, temperature=0, json_schema=json.dumps(schema))
    assert isinstance(json.loads(answer)["capital"], str)


async def test_five_requests_share_four_slots(service: Service) -> None:
    texts: dict[int, str] = {}

    async def ask(number: int) -> None:
        texts[number] = await service.complete(prompt=f"{STORY} Chapter {number}:", n_predict=16, seed=number)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(ask, number)
    assert all(texts[number] for number in range(5))
    assert len(set(texts.values())) == 5


async def test_a_client_that_disconnects_during_prefill_frees_its_slot_but_not_its_rows(
    service: Service,
) -> None:
    engine = service.engine
    prompt = await engine.detokenize((await engine.tokenize(STORY * 60))[:900])
    client = await service.server.connect()
    await client.stream.send_all(post("/completion", {"prompt": prompt, "n_predict": 4, "cache_prompt": True}))
    await until(lambda: engine.statistics().scheduler.n_cached_tokens >= 128)
    await client.stream.aclose()
    await until(lambda: engine.statistics().busy == 0)
    assert 128 <= engine.statistics().scheduler.n_cached_tokens < 900
    async with engine.generate(prompt, max_tokens=4, temperature=0) as retry:
        await retry.collect()
    assert retry.usage is not None
    assert retry.usage.cached_tokens >= 128


async def test_a_client_that_disconnects_during_a_stream_frees_its_slot(service: Service) -> None:
    client = await service.server.connect()
    await client.stream.send_all(post("/completion", {"prompt": STORY, "temperature": 0}))
    await client.head()
    await client.chunk()
    assert service.engine.statistics().busy == 1
    client.reset()
    await until(lambda: service.engine.statistics().busy == 0)
    assert await service.complete(prompt=FRANCE, n_predict=2, temperature=0) == " Paris."


async def test_health_answers_during_a_long_prefill(service: Service) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(service.complete, prompt=STORY * 60, n_predict=1))
        await until(lambda: service.engine.statistics().busy == 1)
        assert (await service.server.ask(request("GET", "/health"))).json == {"status": "ok", "progress": 1}
        assert service.engine.statistics().busy == 1
        nursery.cancel_scope.cancel()


async def test_a_deadline_ends_an_answer_in_time(service: Service) -> None:
    *pieces, last = await service.lines("/completion", prompt=STORY, temperature=0, deadline=1.5)
    assert last["stopped_deadline"] is True
    assert last["timings"]["predicted_n"] > 0
    assert "".join(line["content"] for line in pieces)
    # In the middle of a prompt there is no text yet.
    (last,) = await service.lines("/completion", prompt=STORY * 40, deadline=0.05)
    assert last["stopped_deadline"] is True
    assert last["timings"]["predicted_n"] == 0
    await until(lambda: service.engine.statistics().busy == 0)


async def test_background_requests_give_way_and_lose_nothing(default_model: Path) -> None:
    async with serving(default_model, slots=1, context_length=512) as service:
        # A text that rounding does not change. Rows that are decoded again in wider batches differ in the last digits.
        prompt = ", ".join(map(str, range(1, 31)))
        background = {"prompt": prompt, "n_predict": 60, "temperature": 0, "repeat_penalty": 1}
        background["priority"] = "background"
        expected = await service.complete(**background)
        assert ", 31, 32, 33, 34" in expected
        n_done = 0
        async with trio.open_nursery() as nursery:

            async def run_in_the_background() -> None:
                nonlocal n_done
                assert await service.complete(**background) == expected
                n_done += 1

            nursery.start_soon(run_in_the_background)
            await until(lambda: service.engine.statistics().busy == 1)
            for _ in range(3):
                assert await service.complete(prompt=FRANCE, n_predict=2, temperature=0) == " Paris."
                assert n_done == 0


async def test_statistics_during_many_requests(service: Service) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(partial(service.complete, prompt=f"{STORY}{number}", n_predict=200))
        await until(lambda: service.engine.statistics().busy == 4)
        statistics = (await service.server.ask(request("GET", "/statistics"))).json
        assert (statistics["status"], statistics["slots"]) == ("ok", 4)
        assert (statistics["running"], statistics["waiting"], statistics["generations"]) == (4, 2, 6)
        vector = (await service.server.ask(post("/embedding", {"content": FRANCE}))).json["embedding"]
        assert len(vector) == service.engine.info.n_embd
        assert service.engine.statistics().generations == 6  # none of them had ended before
        nursery.cancel_scope.cancel()
    await until(lambda: service.engine.statistics().generations == 0)


async def test_the_same_seed_gives_the_same_text_and_another_seed_does_not(default_model: Path) -> None:
    """In the same slot: elsewhere in the KV cache, sums have another order, and their last digits differ."""

    def fields(seed: int) -> dict[str, object]:
        return {"prompt": STORY, "n_predict": 24, "seed": seed, "temperature": 1.0}

    async with serving(default_model, slots=1, context_length=1024) as service:
        first, again, other = [await service.complete(**fields(seed)) for seed in (7, 7, 8)]
    assert first == again != other


async def test_every_sampler_works(service: Service) -> None:
    fields = {
        "prompt": STORY, "n_predict": 12, "seed": 1, "tfs_z": 0.9, "typical_p": 0.9, "min_p": 0.02, "top_n_sigma": 3.0,
        "xtc_probability": 0.5, "xtc_threshold": 0.05, "dry_multiplier": 0.8, "dynatemp_range": 0.3,
        "repeat_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": 0.1, "penalize_nl": False,
        "logit_bias": [[260, -5.0]],
    }  # fmt: skip
    assert await service.complete(**fields)
    for version in (1, 2):
        assert await service.complete(prompt=STORY, n_predict=12, seed=1, mirostat=version)


async def test_a_stop_string_cuts_the_text_wherever_the_tokens_end(service: Service) -> None:
    whole = await service.complete(prompt=FRANCE, n_predict=24, temperature=0)
    assert len(whole) > 12
    for start, end in ((2, 4), (5, 9), (9, 10)):
        stop = whole[start:end]
        lines = await service.lines("/completion", prompt=FRANCE, n_predict=24, temperature=0, stop=[stop])
        assert "".join(line["content"] for line in lines) == whole[: whole.index(stop)]
        assert "stopped_limit" not in lines[-1]


async def test_a_grammar_is_followed(service: Service) -> None:
    grammar = r'root ::= "{\"city\": \"" [A-Z] [a-z]{2,9} "\"}"'
    text = await service.complete(prompt=f"{FRANCE}\nJSON: ", n_predict=64, seed=3, temperature=1.5, grammar=grammar)
    assert re.fullmatch("[A-Z][a-z]{2,9}", json.loads(text)["city"])
    refused = await service.server.ask(post("/completion", {"prompt": FRANCE, "grammar": "root ::= ("}))
    assert refused.status == 400
    assert b"grammar" in refused.body


async def test_a_full_context_shifts_and_continues(default_model: Path) -> None:
    async with serving(default_model, slots=1, context_length=128) as service:
        endless = {"prompt": STORY, "n_predict": 200, "seed": 5, "logit_bias": [[0, False], [2, False]]}
        lines = await service.lines("/completion", **endless)
        assert lines[-1]["timings"]["predicted_n"] == 200
        assert await service.complete(prompt=STORY * 20, n_predict=1)  # this dialect truncates long prompts
        async with service.engine.generate(STORY, shift=False, logit_bias=((0, -1e6), (2, -1e6))) as generation:
            *_, last = [event async for event in generation]
        assert isinstance(last, Finished)
        assert last.reason == "length"
        with pytest.raises(PromptTooLong):
            await service.engine.generate(STORY * 20).start()


async def test_logprobs_are_those_of_the_model_in_order(service: Service) -> None:
    lines = await service.lines("/completion", prompt=FRANCE, n_predict=4, temperature=0, n_probs=3, repeat_penalty=1)
    tokens = [token for line in lines for token in line.get("completion_probabilities", [])]
    assert len(tokens) == 4
    assert tokens[0]["token"] == " Paris"
    for token in tokens:
        top = [entry["logprob"] for entry in token["top_logprobs"]]
        assert len(top) == 3
        assert token["logprob"] == top[0] == max(top) <= 0


async def test_a_text_survives_tokens_and_back(service: Service) -> None:
    text = "Grüße aus 東京 🙂, <b>bold</b>"
    [answer] = await service.lines("/tokenize", content=text)
    assert await service.lines("/detokenize", tokens=answer["tokens"]) == [{"content": text}]


async def test_embeddings_differ_by_meaning_and_are_the_same_beside_others(service: Service) -> None:
    texts = ["one", STORY, "one", "two three"]
    vectors = await service.engine.embed(texts, normalize=True)
    assert vectors.shape == (4, service.engine.info.n_embd)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(vectors[0], vectors[2])
    [answer] = await service.lines("/embedding", content="one")
    over_http = np.array(answer["embedding"], np.float32)
    np.testing.assert_allclose(over_http / np.linalg.norm(over_http), vectors[0], rtol=1e-6)


async def test_a_copied_prefix_gives_the_same_text_as_a_new_one(default_model: Path) -> None:
    greedy = SamplingParams(temperature=0)
    with trio.fail_after(DEADLINE):
        async with open_engine(default_model, slots=2, context_length=512, threads=1) as engine:
            endings = [" The fisherman said:", " His wife said:"]
            fresh = [
                await engine.generate(STORY + ending, max_tokens=8, cache_prompt=False, sampling=greedy).collect()
                for ending in endings
            ]
            async with engine.generate(STORY, max_tokens=400, sampling=greedy) as busy:
                async for _ in busy:
                    break
                async with engine.generate(STORY + endings[0], max_tokens=8, sampling=greedy) as forked:
                    assert await forked.collect() == fresh[0]
            assert forked.usage is not None
            assert forked.usage.cached_tokens > 10
            assert await engine.generate(STORY + endings[1], max_tokens=8, sampling=greedy).collect() == fresh[1]


@pytest.fixture
def cut_off(default_model: Path, tmp_path: Path) -> Path:
    """A file with the first half of the default model."""
    path = tmp_path / "cut.gguf"
    path.write_bytes(default_model.read_bytes()[:50_000_000])
    return path


async def test_a_model_file_that_was_cut_off_is_refused(cut_off: Path) -> None:
    with trio.fail_after(DEADLINE), pytest.raises(LoadError, match="truncated"):
        async with open_engine(cut_off):
            pass
