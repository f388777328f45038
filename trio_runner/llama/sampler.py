"""Sampler: chooses the tokens of one sequence, as `SamplingParams` say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trio_runner.core.grammar import check_grammar
from trio_runner.errors import EngineClosed
from trio_runner.llama.library import check, native
from trio_runner.request import SamplingParams


class Sampler:
    """A sampler of one sequence, for one thread at a time. `Model.sampler` creates it, and checks the tokens first.

    Raises `InvalidGrammar` for a grammar that does not parse or would cost too much.
    """

    def __init__(self, model: Any, params: SamplingParams, prompt: Sequence[int] = (), *, n_vocab: int) -> None:
        if params.grammar:
            check_grammar(params.grammar)
        loaded = native()
        ffi, lib = loaded.ffi, loaded.lib
        self.n_top = min(params.logprobs, n_vocab)
        breakers = [ffi.new("char[]", breaker.encode()) for breaker in params.dry_sequence_breakers]
        breaker_pointers = ffi.new("char *[]", breakers)
        bias_tokens = ffi.new("int32_t[]", [token for token, _ in params.logit_bias])
        bias_values = ffi.new("float[]", [bias for _, bias in params.logit_bias])
        grammar = ffi.new("char[]", params.grammar.encode())
        native_params = ffi.new(
            "trio_sampler_params *",
            {
                "seed": params.seed,
                "temperature": params.temperature,
                "dynatemp_range": params.dynatemp_range,
                "dynatemp_exponent": params.dynatemp_exponent,
                "top_k": params.top_k,
                "top_p": params.top_p,
                "min_p": params.min_p,
                "typical_p": params.typical_p,
                "tfs_z": params.tfs_z,
                "top_n_sigma": params.top_n_sigma,
                "xtc_probability": params.xtc_probability,
                "xtc_threshold": params.xtc_threshold,
                "repeat_last_n": params.repeat_last_n,
                "repeat_penalty": params.repeat_penalty,
                "frequency_penalty": params.frequency_penalty,
                "presence_penalty": params.presence_penalty,
                "penalize_nl": params.penalize_nl,
                "dry_multiplier": params.dry_multiplier,
                "dry_base": params.dry_base,
                "dry_allowed_length": params.dry_allowed_length,
                "dry_penalty_last_n": params.dry_penalty_last_n,
                "dry_breakers": ffi.cast("char const * const *", breaker_pointers),
                "n_dry_breakers": len(breakers),
                "mirostat": params.mirostat,
                "mirostat_tau": params.mirostat_tau,
                "mirostat_eta": params.mirostat_eta,
                "bias_tokens": bias_tokens,
                "bias_values": bias_values,
                "n_bias": len(params.logit_bias),
                "grammar": grammar,
                "n_top": self.n_top,
            },
        )
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
