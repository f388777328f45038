"""The body of POST /v1/embeddings. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from trio_runner.errors import InvalidRequest, Unsupported
from trio_runner.request import MAX_DOCUMENTS, EmbedRequest
from trio_runner.server.dialects import json_in
from trio_runner.server.dialects.fields import ADAPTERS, STRING, Body, array, either, field, fields_of
from trio_runner.server.dialects.json_in import wrong
from trio_runner.server.dialects.openai.requests import GENERATION, HARMLESS, check_word


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedEmbeddings:
    """What a client asks for: embeddings, and how they are written."""

    requests: tuple[EmbedRequest, ...]
    model: str | None = None
    base64: bool = False
    """Each embedding is written as base64 of little-endian float32, and not as a list of numbers."""


def _input(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (json_in.check_text(name, value),)
    if not isinstance(value, list):
        wrong(name, "a string or a list of strings", value)
    if not value:
        raise InvalidRequest(f"{name} is empty", param=name)
    if isinstance(value[0], (int, list)) and not isinstance(value[0], bool):
        message = (
            f"{name} must be text: tokens of another model's tokenizer mean nothing here. In LangChain, set "
            "check_embedding_ctx_length=False"
        )
        raise Unsupported("tokens", message, param=name)
    return json_in.check_texts(name, value, MAX_DOCUMENTS)


def _format(name: str, value: Any) -> str:
    return check_word(name, value, "float", "base64")


EMBEDDINGS: Final = Body(
    {
        "input": field(
            either(STRING, array(STRING, minItems=1, maxItems=MAX_DOCUMENTS)),
            "The text to embed, or several texts. Lists of tokens are refused: the clients that send them use the "
            "tokenizer of another model.",
            check=_input,
            required=True,
        ),
        "model": GENERATION["model"],
        "encoding_format": field(
            {**STRING, "enum": ["float", "base64"]},
            "How an embedding is written: a list of numbers, or base64 of its float32, little-endian.",
            check=_format,
            default="float",
        ),
        **fields_of(EmbedRequest, "dimensions", "normalize", "truncate", normalize=True),
        "adapters": ADAPTERS,
        "user": HARMLESS["user"],
    },
    {"input": ["one", "two"]},
)


def embeddings(body: bytes) -> AskedEmbeddings:
    """What the body of POST /v1/embeddings asks for."""
    given = EMBEDDINGS.read(body)
    requests = tuple(
        EmbedRequest(
            content=text,
            normalize=given.get("normalize", True),
            truncate=given.get("truncate", False),
            dimensions=given.get("dimensions"),
            adapters=given.get("adapters"),
        )
        for text in given["input"]
    )
    return AskedEmbeddings(requests=requests, model=given.get("model"), base64=given.get("encoding_format") == "base64")
