"""Tokens of texts, and the special tokens that a model has around a text."""

from __future__ import annotations

from collections.abc import Sequence

from trio_runner.core.ports import Model
from trio_runner.errors import InvalidRequest


def tokenize(model: Model, text: str, *, param: str, add_special: bool, parse_special: bool) -> list[int]:
    """The tokens of `text`. Raises `InvalidRequest`, with `param` as the field at fault, for a text that the model
    cannot take."""
    try:
        return model.tokenize(text, add_special=add_special, parse_special=parse_special)
    except InvalidRequest as error:
        raise InvalidRequest(str(error), param=param) from error


def special_tokens(model: Model, param: str) -> tuple[list[int], list[int]]:
    """The special tokens that the model has before and after a text, such as BOS, or BERT's [CLS] and [SEP]."""
    around = tokenize(model, "", param=param, add_special=True, parse_special=False)
    return around[: model.info.adds_bos], around[model.info.adds_bos :]


def tokens_of(model: Model, prompt: object, *, param: str, parse_special: bool) -> list[int]:
    """The tokens of a prompt that is text or a tuple of tokens. Raises `InvalidRequest`, with `param` as the field at
    fault, for a token outside the vocabulary."""
    if isinstance(prompt, str):
        return tokenize(model, prompt, param=param, add_special=True, parse_special=parse_special)
    assert isinstance(prompt, tuple)
    last = model.info.n_vocab - 1
    for token in prompt:
        if not 0 <= token <= last:
            raise InvalidRequest(f"{param} has token {token}, but the vocabulary ends at {last}", param=param)
    return list(prompt)


def pieces_of(model: Model, tokens: Sequence[int]) -> list[bytes]:
    """The bytes of each token. Raises `InvalidRequest` for a token outside the vocabulary."""
    try:
        return [model.piece(token) for token in tokens]
    except InvalidRequest as error:
        raise InvalidRequest(str(error), param="tokens") from error


def pair_tokens(model: Model, query: str, document: str, *, param: str) -> list[int]:
    """The tokens of a query and a document, laid out as the model was trained for: by the template in its file, or else
    with its special tokens before, between and after the two, as in llama.cpp's server."""
    info = model.info
    template = info.metadata.get("tokenizer.chat_template.rerank")
    if template is not None:
        text = template.replace("{query}", query).replace("{document}", document)
        return tokenize(model, text, param=param, add_special=False, parse_special=True)
    query_tokens = tokenize(model, query, param="query", add_special=False, parse_special=False)
    document_tokens = tokenize(model, document, param=param, add_special=False, parse_special=False)
    end = info.token_eos if info.token_eos is not None else info.token_sep
    before = [info.token_bos] if info.adds_bos else []
    after = [end] if info.adds_eos else []
    between = [*after, *([info.token_sep] if info.adds_sep else [])]
    tokens = [*before, *query_tokens, *between, *document_tokens, *after]
    return [token for token in tokens if token is not None]
