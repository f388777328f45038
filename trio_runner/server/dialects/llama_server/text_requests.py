"""Requests in llama-server's dialect that generate nothing: bytes of a body -> request values. Pure.

Every function raises `RequestError`, which names the field at fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from trio_runner.errors import InvalidRequest, Unsupported
from trio_runner.request import MAX_DOCUMENTS, Chat, RerankRequest
from trio_runner.server.dialects import json_in
from trio_runner.server.dialects.fields import BOOLEAN, INTEGER, OBJECT, STRING, Body, array, field
from trio_runner.server.dialects.json_in import check_object, integer_between, list_of
from trio_runner.server.dialects.llama_server.completion_fields import MODEL
from trio_runner.server.dialects.llama_server.prompts import (
    PROMPTS,
    TEXT_OR_TOKENS,
    Mixed,
    Pictured,
    PromptForm,
    check_prompts,
    check_text_or_tokens,
)
from trio_runner.server.dialects.openai.requests_messages import SCHEMA as MESSAGES
from trio_runner.server.dialects.openai.requests_messages import check_messages

Content: TypeAlias = str | tuple[int, ...] | Mixed

MAX_NORM: Final = 1000
"""The highest p of a p-norm."""
EUCLIDEAN: Final = 2


# --- Fields ----------------------------------------------------------------------------------------------------------


def _contents(name: str, value: Any) -> tuple[Content, ...]:
    prompts = check_prompts(name, value, MAX_DOCUMENTS)
    return tuple(
        _content(f"{name}[{index}]" if len(prompts) > 1 else name, prompt) for index, prompt in enumerate(prompts)
    )


def _content(name: str, prompt: PromptForm) -> Content:
    if isinstance(prompt, Pictured):
        raise Unsupported("embeddings of images", f"{name} has images, which are not embedded here", param=name)
    if prompt in ("", ()):
        raise InvalidRequest(f"{name} must not be empty", param=name)
    return prompt


def _documents(name: str, value: Any) -> tuple[str, ...]:
    documents = json_in.check_texts(name, value, MAX_DOCUMENTS)
    if not documents:
        raise InvalidRequest(f"{name} must not be empty", param=name)
    return documents


def _encoding(name: str, value: Any) -> str:
    if json_in.check_text(name, value) != "float":
        raise InvalidRequest(f"{name} must be float: only /v1/embeddings has other formats", param=name)
    return "float"


EMBEDDING: Final = Body(
    {
        "content": field(
            PROMPTS,
            "The text to embed: a string, a list of tokens, or a list of strings and tokens. A list of these is "
            "several texts.",
            check=_contents,
            default_text="required",
        ),
        "input": field(
            PROMPTS,
            "Another name of `content`. If both are given, this one counts.",
            check=_contents,
            default_text="`content`",
        ),
        "embd_normalize": field(
            {**INTEGER, "minimum": -1, "maximum": MAX_NORM},
            "How the embedding is scaled: -1 not at all, 0 to a largest element of 32,760, 1 to a sum of 1, 2 to "
            "Euclidean length 1, p above 2 to a p-norm of 1.",
            check=integer_between(-1, MAX_NORM),
            default=EUCLIDEAN,
        ),
        "encoding_format": field(
            {**STRING, "enum": ["float"]},
            "The format of the numbers, which is always float.",
            check=_encoding,
            default="float",
        ),
        "model": MODEL,
    },
    {"content": "The sky is blue."},
)
RERANK: Final = Body(
    {
        "query": field(STRING, "The question.", required=True),
        "documents": field(
            array(STRING, minItems=1, maxItems=MAX_DOCUMENTS),
            "The texts to score.",
            check=_documents,
            default_text="required",
        ),
        "texts": field(
            array(STRING, minItems=1, maxItems=MAX_DOCUMENTS),
            "Another name of `documents`. With it, the answer is a list, as in Text Embeddings Inference.",
            check=_documents,
            default_text="`documents`",
        ),
        "top_n": field(
            {**INTEGER, "minimum": 0},
            "Return only this many of the best documents.",
            check=integer_between(0, 2**31 - 1),
            default_text="all",
        ),
        "return_text": field(BOOLEAN, "Repeat each text in the answer. Only with `texts`.", default=False),
        "model": MODEL,
    },
    {"query": "Who wrote Faust?", "documents": ["Goethe did.", "It rains."]},
)
TOKENIZE: Final = Body(
    {
        "content": field(
            TEXT_OR_TOKENS,
            "The text to tokenise, or a list of texts and tokens.",
            check=check_text_or_tokens,
            default=[],
        ),
        "add_special": field(BOOLEAN, "Add the tokens that the model has around a text, such as BOS.", default=False),
        "parse_special": field(
            BOOLEAN, "Read special tokens such as `<|im_end|>` as the tokens they name.", default=True
        ),
        "with_pieces": field(
            BOOLEAN, "Report each token with its text, or its bytes if that is no text.", default=False
        ),
    },
    {"content": "Hello"},
)
TEMPLATE: Final = Body(
    {
        "messages": field(MESSAGES, "The conversation.", check=check_messages, required=True),
        "tools": field(
            array(OBJECT),
            "Tools that the template may describe.",
            check=list_of(check_object, "objects"),
            default_text="none",
        ),
        "add_generation_prompt": field(BOOLEAN, "End with what begins an answer of the assistant.", default=True),
        "chat_template_kwargs": field(
            OBJECT, "Further variables of the template.", check=check_object, default_text="none"
        ),
    },
    {"messages": [{"role": "user", "content": "Hello"}]},
)
DETOKENIZE: Final = Body(
    {"tokens": field(array(INTEGER), "The tokens.", check=json_in.check_tokens, default=[])}, {"tokens": [1, 2, 3]}
)


# --- Requests --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """What POST /embedding asks for."""

    contents: tuple[Content, ...]
    norm: int
    """See `embd_normalize`."""
    model: str | None
    place: str
    """The field that has the texts."""


def embedding(body: bytes) -> Embedding:
    """The request in the body of POST /embedding."""
    given = EMBEDDING.read(body)
    if "input" not in given and "content" not in given:
        raise InvalidRequest("content is missing", param="content")
    place = "input" if "input" in given else "content"
    norm = given.get("embd_normalize", EUCLIDEAN)
    return Embedding(contents=given[place], norm=norm, model=given.get("model"), place=place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """What POST /rerank asks for."""

    request: RerankRequest
    top_n: int | None
    is_plain: bool
    """The answer is only a list, as in Text Embeddings Inference."""
    returns_texts: bool
    model: str | None


def rerank(body: bytes) -> Ranking:
    """The request in the body of POST /rerank."""
    given = RERANK.read(body)
    documents = given.get("documents", given.get("texts"))
    if documents is None:
        raise InvalidRequest("documents is missing", param="documents")
    return Ranking(
        request=RerankRequest(query=given["query"], documents=documents),
        top_n=given.get("top_n"),
        is_plain="texts" in given,
        returns_texts="texts" in given and given.get("return_text", False),
        model=given.get("model"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizing:
    """What POST /tokenize asks for."""

    content: Content
    add_special: bool
    parse_special: bool
    with_pieces: bool


def tokenize(body: bytes) -> Tokenizing:
    """The request in the body of POST /tokenize."""
    given = TOKENIZE.read(body)
    return Tokenizing(
        content=given.get("content", ()),
        add_special=given.get("add_special", False),
        parse_special=given.get("parse_special", True),
        with_pieces=given.get("with_pieces", False),
    )


def template(body: bytes) -> Chat:
    """The conversation in the body of POST /apply-template."""
    given = TEMPLATE.read(body)
    return Chat(
        messages=given["messages"],
        tools=given.get("tools"),
        add_generation_prompt=given.get("add_generation_prompt", True),
        variables=given.get("chat_template_kwargs", {}),
    )


def detokenize(body: bytes) -> tuple[int, ...]:
    """The tokens of POST /detokenize."""
    tokens: tuple[int, ...] = DETOKENIZE.read(body).get("tokens", ())
    return tokens
