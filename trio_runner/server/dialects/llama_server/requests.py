"""Completions in llama-server's dialect: bytes of a body -> request values. Pure.

Every function raises `RequestError`, which names the field at fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trio_runner.errors import InvalidRequest
from trio_runner.request import AdapterChoice, GenerateRequest, Prompt
from trio_runner.sampling import RANDOM_SEED, SamplingParams
from trio_runner.server.dialects.llama_server.completion_fields import COMPLETION, DEFAULTS, MAX_COMPLETIONS, SAMPLING
from trio_runner.server.dialects.llama_server.prompts import GivenPrompt
from trio_runner.server.dialects.llama_server.samplers import OFF, switched_off

# --- What is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the answer is to tell."""

    stream: bool = False
    n_probs: int = 0
    post_sampling_probs: bool = False
    return_tokens: bool = False
    progress: bool = False
    timings_per_token: bool = False
    response_fields: tuple[str, ...] = ()
    """() means all of them."""
    comments: bool = True
    """A stream says that it is still there while nothing else is to be said."""
    settings: Mapping[str, Any]
    """What the answer repeats of the request."""

    @property
    def needs_tokens(self) -> bool:
        """Whether the tokens of the text must be known."""
        return self.n_probs > 0 or self.return_tokens or self.timings_per_token

    def wants(self, name: str) -> bool:
        """Whether the last object of the answer has the field `name`."""
        return not self.response_fields or any(path.partition("/")[0] == name for path in self.response_fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a body asks for. Texts and adapters in it need the engine before they are values of a request."""

    request: GenerateRequest
    """All of the request but what follows."""
    prompts: tuple[GivenPrompt, ...]
    n_choices: int = 1
    """Completions of each prompt."""
    biased_texts: tuple[tuple[str, float], ...] = ()
    """Texts whose tokens get a bias."""
    lora: tuple[tuple[int, float], ...] | None = None
    """(number, scale) of adapters."""
    report: Report
    min_indent: int = 0
    max_seconds: float | None = None
    """See `line_rules.LineRules`."""
    id_slot: int | None = None
    """The slot to take if it is free."""
    model: str | None = None

    def settled(self, biases: tuple[tuple[int, float], ...], adapters: tuple[AdapterChoice, ...] | None) -> Completion:
        """The same, with the biases of the tokens of its texts, and with its adapters."""
        sampling = replace(self.request.sampling, logit_bias=self.request.sampling.logit_bias + biases)
        settings = {**self.report.settings, "logit_bias": _biases(sampling)}
        return replace(
            self,
            request=replace(self.request, sampling=sampling, adapters=adapters),
            report=replace(self.report, settings=settings),
        )

    def requests(self, prompts: Sequence[Prompt]) -> list[GenerateRequest]:
        """A request for each completion of each prompt. They differ in their seeds, unless those are random."""
        sampling, seed = self.request.sampling, self.request.sampling.seed
        seeds = [seed if seed == RANDOM_SEED else (seed + i) % RANDOM_SEED for i in range(self.n_choices)]
        variants = [replace(self.request, sampling=replace(sampling, seed=one)) for one in seeds]
        variants[0] = replace(variants[0], preferred_slot=self.id_slot)
        return [replace(variant, prompt=prompt) for prompt in prompts for variant in variants]


# --- Requests --------------------------------------------------------------------------------------------------------


def completion(body: bytes) -> Completion:
    """The request in the body of POST /completion."""
    given = COMPLETION.read(body)
    return completion_of(given, given["prompt"])


def completion_of(given: Mapping[str, Any], prompts: Sequence[GivenPrompt], *, truncate: bool = False) -> Completion:
    """The request with the fields `given`. Raises `InvalidRequest` for what they may not be together."""
    n_choices = _first(given, "n_cmpl", "n", default=1)
    if len(prompts) * n_choices > MAX_COMPLETIONS:
        raise InvalidRequest(
            f"n_cmpl: {len(prompts)} prompts with {n_choices} completions each are more than {MAX_COMPLETIONS}",
            param="n_cmpl",
        )
    n_predict = _first(given, "n_predict", "max_completion_tokens", "max_tokens", default=-1)
    milliseconds = given.get("t_max_predict_ms", -1)
    sampling = _sampling(given)
    request = GenerateRequest(
        prompt="",
        max_tokens=n_predict if n_predict >= 0 else None,
        stop=given.get("stop", ()),
        sampling=sampling,
        cache_prompt=given.get("cache_prompt", True),
        share_prompt=n_choices > 1,
        n_keep=0,
        shift=False,
        truncate=truncate,
        progress=True,
        priority=given.get("priority", "interactive"),
        deadline=given.get("deadline"),
    )
    return Completion(
        request=request,
        prompts=tuple(prompts),
        n_choices=n_choices,
        biased_texts=tuple((token, bias) for token, bias in given.get("logit_bias", ()) if isinstance(token, str)),
        lora=given.get("lora"),
        report=_report(given, sampling, n_predict),
        min_indent=given.get("n_indent", 0),
        max_seconds=milliseconds / 1000 if milliseconds > 0 else None,
        id_slot=given["id_slot"] if given.get("id_slot", -1) >= 0 else None,
        model=given.get("model"),
    )


def _first(given: Mapping[str, Any], *names: str, default: Any) -> Any:
    return next((given[name] for name in names if name in given), default)


def _sampling(given: Mapping[str, Any]) -> SamplingParams:
    values = {**DEFAULTS, **{name: given[name] for name in SAMPLING if name in given}}
    if "samplers" in given and not values.get("mirostat", 0):  # which brings its own samplers
        values |= switched_off(given["samplers"])
    values["seed"] = given.get("seed", -1) & 0xFFFFFFFF
    values["logit_bias"] = tuple(pair for pair in given.get("logit_bias", ()) if isinstance(pair[0], int))
    values["logprobs"] = _logprobs(given)
    return SamplingParams(**values)


def _logprobs(given: Mapping[str, Any]) -> int:
    """How many log-probabilities the engine is asked for: also 0, which only tells the tokens."""
    n_probs = int(_first(given, "n_probs", "logprobs", default=0))
    needs_tokens = any(given.get(name) for name in ("return_tokens", "timings_per_token", "n_indent"))
    needs_tokens = needs_tokens or given.get("t_max_predict_ms", -1) > 0
    return n_probs if n_probs > 0 or needs_tokens else -1


def _report(given: Mapping[str, Any], sampling: SamplingParams, n_predict: int) -> Report:
    n_probs = int(_first(given, "n_probs", "logprobs", default=0))
    return Report(
        stream=given.get("stream", False),
        n_probs=n_probs,
        post_sampling_probs=sampling.post_sampling_probs,
        return_tokens=given.get("return_tokens", False),
        progress=given.get("return_progress", False),
        timings_per_token=given.get("timings_per_token", False),
        response_fields=given.get("response_fields", ()),
        comments=given.get("sse_ping_interval", 0) >= 0,
        settings=_settings(given, sampling, n_predict),
    )


def _settings(given: Mapping[str, Any], sampling: SamplingParams, n_predict: int) -> dict[str, Any]:
    """What an answer repeats as its `generation_settings`, in the order of llama-server."""
    own = {
        name: getattr(sampling, name)
        for name in SAMPLING
        if name not in ("logit_bias", "logprobs", "seed", "penalize_nl", "tfs_z", "json_schema")
    }
    return {
        "seed": sampling.seed,
        **own,
        "stop": given.get("stop", ()),
        "max_tokens": n_predict,
        "n_predict": n_predict,
        "n_keep": given.get("n_keep", 0),
        "n_discard": given.get("n_discard", 0),
        "stream": given.get("stream", False),
        "logit_bias": _biases(sampling),
        "n_probs": _first(given, "n_probs", "logprobs", default=0),
        "min_keep": given.get("min_keep", 0),
        "samplers": given.get("samplers", tuple(OFF)),
        "timings_per_token": given.get("timings_per_token", False),
        "lora": [{"id": number, "scale": scale} for number, scale in given.get("lora", ())],
    }


def _biases(sampling: SamplingParams) -> list[dict[str, float]]:
    return [{"bias": bias, "token": token} for token, bias in sampling.logit_bias]


def default_settings() -> dict[str, Any]:
    """The settings of a request that says nothing."""
    return _settings({}, _sampling({}), -1)
