"""Lists of texts to embed, and documents to rank."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
import trio

from tests.engine.toys import Gate, Toy, prompts, until_idle
from tests.server.client import WAYS, Leave, post, serving
from trio_runner.core.batch import Batch
from trio_runner.testing import toy_text, toy_vector

TEXTS = ["one", "two", "é" * 40, "one", "a" * 100, " "]


def embedding(content: str | Sequence[str], **fields: object) -> bytes:
    return post("/embedding", {"content": content, **fields})


def ranking(query: str, documents: Sequence[str], **fields: object) -> bytes:
    return post("/rerank", {"query": query, "documents": documents, **fields})


def vector(text: str) -> list[float]:
    return [float(number) for number in toy_vector([*text.encode()])]


@pytest.fixture
def ranker(toy: Toy) -> Toy:
    toy.capabilities = {"ranks": True}
    return toy


def score(query: str, document: str) -> float:
    return vector(query + document)[0]


# --- lists of texts -------------------------------------------------------------------------------------------------


async def test_a_list_of_texts_has_their_embeddings_in_order(toy: Toy) -> None:
    async with toy.engine() as engine, serving(engine) as server:
        assert (await server.ask(embedding(TEXTS))).json == {"embeddings": [vector(text) for text in TEXTS]}
        assert (await server.ask(embedding(["one"]))).json == {"embeddings": [vector("one")]}
        assert (await server.ask(embedding("one"))).json == {"embedding": vector("one")}


async def test_more_texts_than_slots_and_places_in_the_queue(toy: Toy) -> None:
    texts = [f"text {number}" * (number % 7 + 1) for number in range(300)]
    async with toy.engine(slots=2, max_queue=0) as engine, serving(engine) as server:
        assert (await server.ask(embedding(texts))).json == {"embeddings": [vector(text) for text in texts]}
        await until_idle(engine)


@pytest.mark.parametrize("content", ["one", ["one", "two"]])
async def test_dimensions_and_normalising(toy: Toy, content: str | list[str]) -> None:
    async with toy.engine() as engine, serving(engine) as server:
        for dimensions in (1, 3, 8):
            for normalize in (False, True):
                answer = await server.ask(embedding(content, dimensions=dimensions, normalize=normalize))
                given = answer.json["embeddings"] if isinstance(content, list) else [answer.json["embedding"]]
                for text, got in zip([content] if isinstance(content, str) else content, given, strict=True):
                    expected = np.array(vector(text)[:dimensions])
                    expected /= np.linalg.norm(expected) if normalize else 1.0
                    assert got == pytest.approx(expected)
        refusal = await server.ask(embedding(content, dimensions=9))
        assert (refusal.status, b"dimensions must be at most 8" in refusal.body) == (400, True)


async def test_a_text_that_is_too_long(toy: Toy) -> None:
    async with toy.engine(slots=2, context_length=32, batch_size=16) as engine, serving(engine) as server:
        for content in ("x" * 17, ["y", "x" * 17, "z"]):
            refusal = await server.ask(embedding(content))
            assert (refusal.status, b"content has 17 tokens" in refusal.body) == (400, True)
        assert (await server.ask(embedding("x" * 50, truncate=True))).json == {"embedding": vector("x" * 16)}
        answer = await server.ask(embedding(["x" * 16, "y" * 99, "z"], truncate=True))
        assert answer.json == {"embeddings": [vector(text) for text in ("x" * 16, "y" * 16, "z")]}


async def test_one_bad_text_refuses_the_whole_list(toy: Toy) -> None:
    async with toy.engine() as engine, serving(engine) as server:
        for texts in (["", "a"], ["a", ""], ["a"] * 50 + [""]):
            refusal = await server.ask(embedding(texts))
            assert (refusal.status, b"content is empty" in refusal.body) == (400, True)
            await until_idle(engine)


@pytest.mark.parametrize("leave", WAYS)
@pytest.mark.parametrize("path", ["/embedding", "/rerank"])
async def test_a_client_that_disconnects_leaves_nothing_running(toy: Toy, path: str, leave: Leave) -> None:
    gate = toy.on_decode = Gate(toy)
    toy.capabilities = {"ranks": path == "/rerank"}
    texts = [f"text {number}" for number in range(200)]
    async with toy.engine(slots=2) as engine, serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(ranking("q", texts) if path == "/rerank" else embedding(texts))
        await gate.reached(1)
        assert engine.statistics().generations > 0
        await leave(client)
        await until_idle(engine)
        gate.open()
        (prompt,) = prompts(1, 12)
        answer = await server.ask(post("/completion", {"prompt": prompt, "n_predict": 12}))
        assert answer.text == toy_text(prompt, 12)
        assert len(gate.batches) < 30


# --- documents ------------------------------------------------------------------------------------------------------


async def test_the_best_document_comes_first(ranker: Toy) -> None:
    documents = [f"document {number}" for number in range(50)]
    scores = [score("query", document) for document in documents]
    async with ranker.engine() as engine, serving(engine) as server:
        results = (await server.ask(ranking("query", documents))).json["results"]
        assert sorted(result["index"] for result in results) == list(range(50))
        assert [result["relevance_score"] for result in results] == sorted(scores, reverse=True)
        assert all(result["relevance_score"] == scores[result["index"]] for result in results)
        for top_n in (1, 7, 50, 51, 2**63 - 1):
            best = (await server.ask(ranking("query", documents, top_n=top_n))).json["results"]
            assert best == results[:top_n]


async def test_of_equal_documents_the_earlier_comes_first(ranker: Toy) -> None:
    async with ranker.engine() as engine, serving(engine) as server:
        results = (await server.ask(ranking("q", ["b", "a", "b", "a", "b"]))).json["results"]
        order = [1, 3, 0, 2, 4] if score("q", "a") > score("q", "b") else [0, 2, 4, 1, 3]
        assert [result["index"] for result in results] == order


async def test_a_document_that_is_too_long(ranker: Toy) -> None:
    async with ranker.engine(slots=2, context_length=32, batch_size=16) as engine, serving(engine) as server:
        refusal = await server.ask(ranking("query", ["short", "d" * 12]))
        assert (refusal.status, refusal.body) == (400, b"documents[1] has 17 tokens, but at most 16 fit\n")
        answer = await server.ask(ranking("query", ["d" * 99], truncate=True))
        assert answer.status == 200
        assert answer.json["results"][0]["relevance_score"] in [score("query", "d" * n) for n in range(1, 12)]
        refusal = await server.ask(ranking("q" * 17, ["d"], truncate=True))
        assert (refusal.status, refusal.body) == (400, b"query has 17 tokens, but at most 16 fit\n")
        refusal = await server.ask(post("/rerank", {"query": "q", "documents": ["d", 1]}))
        assert (refusal.status, refusal.body) == (400, b"documents[1] must be a string, not an integer\n")


async def test_a_model_that_embeds_does_not_rank(toy: Toy) -> None:
    async with toy.engine() as engine, serving(engine) as server:
        refusal = await server.ask(ranking("q", ["a"]))
        assert (refusal.status, refusal.body) == (422, b"this model does not rank documents\n")


async def test_a_model_that_ranks_does_not_embed(ranker: Toy) -> None:
    async with ranker.engine() as engine, serving(engine) as server:
        for content in ("x", ["x", "y"]):
            refusal = await server.ask(embedding(content))
            assert (refusal.status, b"it makes no embeddings" in refusal.body) == (422, True)


async def test_ranking_does_not_wait_for_a_stream(ranker: Toy) -> None:
    def slowly(batch: Batch) -> None:
        time.sleep(0.002)

    ranker.on_decode = slowly
    (prompt,) = prompts(1, 400)
    async with ranker.engine(slots=1) as engine, serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(post("/completion", {"prompt": prompt, "n_predict": 400}))
        await client.head()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(server.ask, ranking("q", ["a", "b", "c"]))
        assert engine.statistics().busy == 1
        assert len(await client.chunk()) > 0
