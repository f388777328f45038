"""Scores of documents for a query."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import trio

from tests.engine.special_tokens import SPECIALS, around
from tests.engine.toys import Gate, Toy, until_idle
from trio_runner.errors import InvalidRequest, PromptTooLong, Unsupported
from trio_runner.request import RerankRequest
from trio_runner.testing import toy_vector

QUERY, DOCUMENTS = "what?", ["this", "that, which is longer", "é", "this"]


def ranking(toy: Toy, **info: object) -> None:
    toy.capabilities, toy.info = {"ranks": True}, info


@pytest.mark.parametrize("special", SPECIALS)
async def test_a_score_is_that_of_the_query_and_the_document(toy: Toy, special: str) -> None:
    ranking(toy, **SPECIALS[special])
    end = [token for token in around(b"", special) if token == 3]
    # A separator ends the query as well, if the model has no other end.
    between = {"all": [3, 4], "around": [4], "after": [3]}.get(special, [])
    begin = [token for token in around(b"", special) if token == 2]
    async with toy.engine(slots=2) as engine:
        scores = await engine.rerank(QUERY, DOCUMENTS)
    expected = [toy_vector([*begin, *QUERY.encode(), *between, *document.encode(), *end])[0] for document in DOCUMENTS]
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, expected)


async def test_a_model_may_have_a_template_for_pairs(toy: Toy) -> None:
    ranking(toy, metadata={"tokenizer.chat_template.rerank": "Q: {query} D: {document}."}, token_bos=2, adds_bos=True)
    async with toy.engine() as engine:
        scores = await engine.rerank(QUERY, ["{query}"])
    np.testing.assert_array_equal(scores, [toy_vector(list(f"Q: {QUERY} D: {{query}}.".encode()))[0]])


async def test_many_documents_over_few_slots(toy: Toy) -> None:
    ranking(toy)
    documents = [f"document {'x' * (n % 13)} {n}" for n in range(60)]
    async with toy.engine(slots=2, max_queue=1, batch_size=64) as engine:
        scores = await engine.rerank_request(RerankRequest(query=QUERY, documents=tuple(documents)))
        assert engine.statistics().generations == 0
    np.testing.assert_array_equal(scores, [toy_vector(list((QUERY + document).encode()))[0] for document in documents])


async def test_no_documents_give_no_scores(toy: Toy) -> None:
    ranking(toy)
    async with toy.engine(wait=False) as engine:
        scores = await engine.rerank(QUERY, [])
    assert scores.shape == (0,)
    assert scores.dtype == np.float32


@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("document", ["x" * 1000, "é" * 500, "xé" * 200])
async def test_truncation_cuts_the_end_of_a_document(toy: Toy, special: str, document: str) -> None:
    """It cuts neither the query nor the special tokens at the end."""
    ranking(toy, **SPECIALS[special])
    async with toy.engine(batch_size=50) as engine:
        with pytest.raises(PromptTooLong) as caught:
            await engine.rerank(QUERY, ["short", document])
        assert caught.value.param == "documents[1]"
        assert len(await engine.rerank(QUERY, ["short", document], truncate=True)) == 2
        with pytest.raises(PromptTooLong) as caught:  # nothing of a document is left to cut
            await engine.rerank("q" * 51, [document], truncate=True)
        assert caught.value.param == "query"
    tokens = max((chunk.items for batch in toy.context.batches for chunk in batch.chunks), key=len)
    assert 25 < len(tokens) <= 50
    text = bytes(token for token in tokens if isinstance(token, int) and token > 4).decode()
    assert text.startswith(QUERY)
    assert document.startswith(text.removeprefix(QUERY))
    assert tokens[-1] == 3 or special in ("none", "before", "around")


async def test_an_empty_query_and_an_empty_document_are_refused(toy: Toy) -> None:
    ranking(toy)
    async with toy.engine() as engine:
        with pytest.raises(InvalidRequest):
            await engine.rerank("", [""])
        assert (await engine.rerank("", ["x"])).shape == (1,)


@pytest.mark.parametrize("ranks", [False, True])
async def test_a_model_makes_either_embeddings_or_scores(toy: Toy, ranks: bool) -> None:
    toy.capabilities = {"ranks": ranks}
    async with toy.engine() as engine:
        with pytest.raises(Unsupported) as caught:
            await (engine.embed(["x"]) if ranks else engine.rerank("x", ["y"]))
        assert caught.value.feature == ("embeddings" if ranks else "reranking")
        assert toy.context.batches == []


async def test_cancelling_a_reranking(toy: Toy) -> None:
    ranking(toy)
    toy.on_decode = gate = Gate(toy)
    async with toy.engine(slots=1) as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.rerank, QUERY, DOCUMENTS)
            await gate.reached(1)
            nursery.cancel_scope.cancel()
        assert engine.statistics().generations == 0
        gate.open()
        await until_idle(engine)
        assert len(gate.batches) == 1


@pytest.mark.parametrize("documents", ["one document", b"one document"])
async def test_one_document_is_not_a_list_of_documents(toy: Toy, documents: Any) -> None:
    """Otherwise each letter would be scored."""
    ranking(toy)
    async with toy.engine() as engine:
        with pytest.raises(TypeError, match="list of documents"):
            await engine.rerank(QUERY, documents)
        assert toy.context.batches == []


async def test_a_whole_request_is_not_a_query(toy: Toy) -> None:
    ranking(toy)
    request: Any = RerankRequest(query=QUERY, documents=("one",))
    async with toy.engine() as engine:
        with pytest.raises(TypeError, match="rerank_request"):
            await engine.rerank(request, DOCUMENTS)
        with pytest.raises(TypeError, match="rerank_request"):
            await engine.rerank(request)
        with pytest.raises(TypeError, match="a list of documents"):
            await engine.rerank(QUERY)
        assert toy.context.batches == []
