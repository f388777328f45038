"""Filling a gap in a text: the prompt that a model was trained for, made with its own fill-in-the-middle tokens.

    REP myproject SEP name text ... SEP filename   PRE prefix prompt SUF suffix MID
    '------------ other files -----------------'

The layout, its fixed names, and the shares of prefix and suffix are those of llama.cpp's server (POST /infill), so that
models and editors that were tried with it do the same here. That server always shortens, to the size of a batch; here
everything stays that fits the context. BOS, if the model has one, comes first and not behind the other files. All texts
are read without special tokens: source code may well contain their names.
"""

from __future__ import annotations

from typing import Final

from trio_runner.core.ports import Model
from trio_runner.engine.tokens import tokenize
from trio_runner.errors import PromptTooLong, Unsupported
from trio_runner.info import ModelInfo
from trio_runner.request import Infill

REPOSITORY: Final = "myproject\n"
"""The name of the repository, which no editor tells."""
CURRENT_FILE: Final = "filename\n"
"""The name of the file with the gap, which no editor tells."""
BETWEEN_FILES: Final = "\n\n--- snippet ---\n\n"
"""What stands before another file where the model has no token for it."""
SUFFIX_SHARE: Final = 4
"""One in so many tokens is for the suffix, if prefix and suffix are too long together."""


def infill_tokens(
    model: Model, infill: Infill, *, n_ctx: int, max_tokens: int | None, truncate: bool, param: str = "prompt"
) -> list[int]:
    """The tokens of a prompt of at most `n_ctx` tokens.

    With `truncate`, too long a prompt is shortened, so that `max_tokens` tokens have room after it; at most half of the
    context is kept free, and a quarter if `max_tokens` is None; less if `infill.prompt`, which is never shortened,
    needs that. Tokens far from the gap go first: those of other files, then the beginning of the prefix and the end of
    the suffix.

    Raises `Unsupported` if the model has no such tokens, and `PromptTooLong` for what does not fit.
    """
    info = model.info
    if not info.can_infill:
        message = "this model has no tokens for filling in the middle, so it cannot take a suffix"
        raise Unsupported("infill", message, param="suffix")
    prefix, begun, suffix = (_tokens(model, text, param) for text in (infill.prefix, infill.prompt, infill.suffix))
    files = _files(model, infill, param)
    bos = [info.token_bos] if info.adds_bos and info.token_bos is not None else []
    n_fixed = len(bos) + 3 + len(begun)
    n_all = n_fixed + len(files) + len(prefix) + len(suffix)
    if n_all > n_ctx:
        n_reserved = min(n_ctx // 4 if max_tokens is None else max_tokens, n_ctx // 2)
        if not truncate or n_fixed > n_ctx:
            raise PromptTooLong(n_all if not truncate else n_fixed, n_ctx, param=param)
        room = max(n_ctx - n_reserved - n_fixed, 0)
        n_suffix = min(len(suffix), max(room // SUFFIX_SHARE, room - len(prefix)))
        n_prefix = min(len(prefix), room - n_suffix)
        n_files = min(len(files), room - n_suffix - n_prefix)
        prefix, suffix, files = prefix[len(prefix) - n_prefix :], suffix[:n_suffix], files[len(files) - n_files :]
    before, after, middle = _marks(info)
    return [*bos, *files, before, *prefix, *begun, after, *suffix, middle]


def _files(model: Model, infill: Infill, param: str) -> list[int]:
    """The other files, and the name of this one, as far as the model has tokens for that."""
    info = model.info
    tokens: list[int] = []
    if info.token_fim_rep is not None:
        tokens += [info.token_fim_rep, *_tokens(model, REPOSITORY, param)]
    for name, text in infill.extra:
        if info.token_fim_sep is not None:
            tokens += [info.token_fim_sep, *_tokens(model, f"{name}\n", param)]
        else:
            tokens += _tokens(model, BETWEEN_FILES, param)
        tokens += _tokens(model, text, param)
    if info.token_fim_sep is not None:
        tokens += [info.token_fim_sep, *_tokens(model, CURRENT_FILE, param)]
    return tokens


def _marks(info: ModelInfo) -> tuple[int, int, int]:
    """The tokens before the prefix, before the suffix, and before what fills the gap."""
    assert info.token_fim_pre is not None
    assert info.token_fim_suf is not None
    assert info.token_fim_mid is not None
    return info.token_fim_pre, info.token_fim_suf, info.token_fim_mid


def _tokens(model: Model, text: str, param: str) -> list[int]:
    return tokenize(model, text, param=param, add_special=False, parse_special=False) if text else []
