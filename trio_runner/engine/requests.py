"""The requests that the parts of the engine pass on: those of callers, and one document of a reranking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from trio_runner.request import AdapterChoice, Chat, EmbedRequest, GenerateRequest, Infill


@dataclass(frozen=True, slots=True)
class PairRequest:
    """One document of a `RerankRequest`, to be scored for the query."""

    query: str
    document: str
    truncate: bool
    adapters: tuple[AdapterChoice, ...] | None
    param: str
    """The name of the document in error messages, such as "documents[3]"."""


AnyRequest: TypeAlias = GenerateRequest | EmbedRequest | PairRequest


def n_characters(request: AnyRequest) -> int:
    """About how many characters of a request there are to tokenise."""
    if isinstance(request, PairRequest):
        return len(request.query) + len(request.document)
    content = request.content if isinstance(request, EmbedRequest) else request.prompt
    if isinstance(content, Chat):
        return sum(len(text) for message in content.messages for text in texts_of(message))
    if isinstance(content, Infill):
        texts = (content.prefix, content.suffix, content.prompt, *(text for _, text in content.extra))
        return sum(map(len, texts))
    if isinstance(content, str):
        return len(content)
    return len(content) + sum(len(part) for part in content if isinstance(part, str))


def texts_of(message: object) -> Iterator[str]:
    """The texts of a message. It need not be checked yet: whatever is no text is skipped."""
    content = message.get("content") if isinstance(message, Mapping) else None
    for part in content if isinstance(content, (list, tuple)) else (content,):
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(text, str):
            yield text
