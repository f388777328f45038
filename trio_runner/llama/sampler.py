"""Sampler: chooses the tokens of one sequence, as `SamplingParams` say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from trio_runner.core.grammar import check_grammar
from trio_runner.errors import EngineClosed
from trio_runner.llama.library import check, native
from trio_runner.parameters import parameters_of
from trio_runner.sampling import SamplingParams

_BY_NAME: Final = tuple(
    name
    for name, parameter in parameters_of(SamplingParams).items()
    if parameter.kind in ("number", "integer", "boolean") and name != "logprobs"
)
"""Parameters that the native struct has under the same name."""


class Sampler:
    """A sampler of one sequence, for one thread at a time. `Model.sampler` creates it, and checks the tokens first.

    Raises `InvalidGrammar` for a grammar that does not parse or would cost too much.
    """

    def __init__(
        self, model: Any, params: SamplingParams, prompt: Sequence[int] = (), *, n_vocab: int, schema: Any = None
    ) -> None:
        """`schema` is the shim's trio_schema for `params.json_schema`, if that is not empty."""
        if params.grammar:
            check_grammar(params.grammar)
        loaded = native()
        ffi, lib = loaded.ffi, loaded.lib
        self.grammar_param = "json_schema" if params.json_schema else "grammar"
        """The parameter at fault if no token is possible."""
        self.n_top = min(params.logprobs, n_vocab)
        breakers = [ffi.new("char[]", breaker.encode()) for breaker in params.dry_sequence_breakers]
        breaker_pointers = ffi.new("char *[]", breakers)
        bias_tokens = ffi.new("int32_t[]", [token for token, _ in params.logit_bias])
        bias_values = ffi.new("float[]", [bias for _, bias in params.logit_bias])
        grammar = ffi.new("char[]", params.grammar.encode())
        native_params = ffi.new("trio_sampler_params *")
        for name in _BY_NAME:
            setattr(native_params, name, getattr(params, name))
        native_params.grammar = grammar
        native_params.json_schema = ffi.NULL if schema is None else schema
        native_params.dry_breakers = ffi.cast("char const * const *", breaker_pointers)
        native_params.n_dry_breakers = len(breakers)
        native_params.bias_tokens, native_params.bias_values = bias_tokens, bias_values
        native_params.n_bias = len(params.logit_bias)
        native_params.n_top = self.n_top
        out = ffi.new("trio_sampler **")
        check("trio_sampler_open", lib.trio_sampler_open(model, native_params, out))
        self._handle: Any = ffi.gc(out[0], lib.trio_sampler_free)
        if prompt:
            tokens = ffi.new("int32_t[]", list(prompt))
            check("trio_sampler_accept_prompt", lib.trio_sampler_accept_prompt(self._handle, tokens, len(prompt)))

    @property
    def handle(self) -> Any:
        """The shim's trio_sampler. Raises `EngineClosed` after close()."""
        if self._handle is None:
            raise EngineClosed("the sampler has been closed")
        return self._handle

    def close(self) -> None:
        """Free the sampler. May be called more than once."""
        self._handle = None
