"""From a request to a sequence: tokenise, fit, compile the sampler. Runs on a helper thread, before any slot is taken,
so that whatever is wrong with a request is found here and costs nobody else anything."""

from __future__ import annotations

from trio_runner.core.prompt import fit_prompt
from trio_runner.core.sequence import SequenceSpec
from trio_runner.engine.mailbox import Submit
from trio_runner.engine.runtime import Model, Runtime
from trio_runner.errors import InvalidRequest, Unsupported
from trio_runner.request import EmbedRequest, GenerateRequest


def prepare(request: GenerateRequest | EmbedRequest, runtime: Runtime, uid: int) -> Submit:
    """The sequence that the request asks for, ready to run. Raises `RequestError`."""
    if isinstance(request, GenerateRequest):
        return _prepare_generation(request, runtime, uid)
    return _prepare_embedding(request, runtime, uid)


def _prepare_generation(request: GenerateRequest, runtime: Runtime, uid: int) -> Submit:
    model, limits = runtime.model, runtime.context.limits
    if not limits.can_generate:
        raise Unsupported("generation", "this model makes embeddings, it cannot generate text")
    fitted = fit_prompt(
        _tokens(model, request.prompt, param="prompt", parse_special=request.parse_special),
        n_ctx=limits.n_ctx,
        n_keep=request.n_keep,
        adds_bos=model.info.adds_bos,
        truncate=request.truncate,
    )
    spec = SequenceSpec(
        uid=uid,
        prompt=fitted.items,
        n_keep=fitted.n_keep,
        max_tokens=request.max_tokens,
        stop=request.stop,
        cache_prompt=request.cache_prompt,
        shift=request.shift,
        background=request.priority == "background",
        progress=request.progress,
        logprobs=request.sampling.logprobs >= 0,
    )
    return Submit(spec, model.sampler(request.sampling, fitted.items))


def _prepare_embedding(request: EmbedRequest, runtime: Runtime, uid: int) -> Submit:
    model, limits = runtime.model, runtime.context.limits
    fitted = fit_prompt(
        _tokens(model, request.content, param="content", parse_special=True),
        n_ctx=min(limits.n_ctx, limits.max_rows),
        n_keep=0,
        adds_bos=False,
        truncate=False,
        param="content",
    )
    return Submit(SequenceSpec(uid=uid, prompt=fitted.items, embedding=True), None)


def tokenize(model: Model, text: str, *, param: str, add_special: bool, parse_special: bool) -> list[int]:
    """The tokens of `text`. Raises `InvalidRequest` that names the field `param`."""
    try:
        return model.tokenize(text, add_special=add_special, parse_special=parse_special)
    except InvalidRequest as error:
        raise InvalidRequest(str(error), param=param) from error


def _tokens(model: Model, prompt: str | tuple[int, ...], *, param: str, parse_special: bool) -> list[int]:
    if isinstance(prompt, str):
        return tokenize(model, prompt, param=param, add_special=True, parse_special=parse_special)
    last = model.info.n_vocab - 1
    for token in prompt:
        if not 0 <= token <= last:
            raise InvalidRequest(f"{param} has token {token}, but the vocabulary ends at {last}", param=param)
    return list(prompt)
