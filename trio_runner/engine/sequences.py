"""From a request to a sequence: tokenise, fit into the context, compile the sampler.

All of it happens on a helper thread before the request takes a slot. So whatever is wrong with a request is found here,
and costs other requests nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from trio_runner.core.ports import EncodedImage, EncodedMedia, Model, Runtime
from trio_runner.core.prompt import Item, Media, cut_before, fit_prompt
from trio_runner.core.sequence import SequenceSpec, takes_embed_slot
from trio_runner.engine.chat_window import ChatWindow
from trio_runner.engine.infill import infill_tokens
from trio_runner.engine.mailbox import Submit
from trio_runner.engine.prompt_parts import EncodedParts, join_parts
from trio_runner.engine.requests import AnyRequest, PairRequest
from trio_runner.engine.tokens import pair_tokens, special_tokens, tokens_of
from trio_runner.errors import InvalidRequest, PromptTooLong, Unsupported
from trio_runner.info import Capabilities
from trio_runner.request import Chat, EmbedRequest, GenerateRequest, Infill

NO_IMAGES: Final[Mapping[str, EncodedImage]] = MappingProxyType({})


def prepare_sequence(
    request: AnyRequest,
    runtime: Runtime,
    uid: int,
    parts: EncodedParts | None = None,
    images: Mapping[str, EncodedImage] = NO_IMAGES,
) -> Submit:
    """The mail that submits the sequence of a request. Only its adapters are missing.

    `parts` are those of the prompt, if it has any, and `images` the images among them, by their names. Raises a
    `RequestError` for whatever is wrong with the request.
    """
    match request:
        case GenerateRequest():
            return _generation(request, runtime, uid, parts, images)
        case EmbedRequest():
            return _embedding(request, runtime, uid)
        case PairRequest():
            return _pair(request, runtime, uid)


def _generation(
    request: GenerateRequest,
    runtime: Runtime,
    uid: int,
    parts: EncodedParts | None,
    images: Mapping[str, EncodedImage],
) -> Submit:
    model, capabilities = runtime.model, runtime.context.capabilities
    if not capabilities.can_generate:
        raise Unsupported("generation", "this model makes embeddings, it cannot generate text")
    if request.preferred_slot is not None and request.preferred_slot >= capabilities.n_slots:
        last = capabilities.n_slots - 1
        raise InvalidRequest(
            f"preferred_slot must be between 0 and {last}, not {request.preferred_slot}", param="preferred_slot"
        )
    has_encoder = capabilities.decoder_start is not None
    if request.prompt_logprobs >= 0 and has_encoder:
        message = "a model with an encoder gives the tokens of a prompt no probabilities"
        raise Unsupported("prompt_logprobs", message, param="prompt_logprobs")
    n_ctx = capabilities.max_rows if has_encoder else capabilities.n_ctx
    items, media = _items(request, model, n_ctx, parts, images)
    is_chat = isinstance(request.prompt, Chat)
    fitted = fit_prompt(
        items,
        n_ctx=n_ctx,
        n_keep=request.n_keep,
        adds_bos=model.info.adds_bos,
        truncate=request.truncate and not is_chat,
        param="messages" if is_chat else "prompt",
    )
    tokens = tuple(item for item in fitted.items if isinstance(item, int))
    prompt = fitted.items if capabilities.decoder_start is None else (capabilities.decoder_start,)
    samples = request.max_tokens != 0
    if not samples and not capabilities.can_trim and request.prompt_logprobs < 0:
        # The same prompt later needs the state before its last token, and this memory cannot go back to it.
        prompt = prompt[: cut_before(prompt, len(prompt) - 1)] or prompt
    spec = SequenceSpec(
        uid=uid,
        prompt=prompt,
        encoder_tokens=tokens if has_encoder else (),
        n_keep=1 if has_encoder else fitted.n_keep,
        max_tokens=request.max_tokens,
        stop=request.stop,
        cache_prompt=request.cache_prompt,
        share_prompt=request.share_prompt,
        preferred_slot=request.preferred_slot,
        shift=request.shift,
        background=request.priority == "background",
        progress=request.progress,
        logprobs=request.sampling.logprobs >= 0,
        prompt_logprobs=request.prompt_logprobs,
        tells_first_token=request.decode_seconds is not None,
    )
    return Submit(spec, model.sampler(request.sampling, tokens) if samples else None, media)


def _items(
    request: GenerateRequest,
    model: Model,
    n_ctx: int,
    parts: EncodedParts | None,
    images: Mapping[str, EncodedImage],
) -> tuple[Sequence[Item], dict[Media, EncodedMedia]]:
    """The items of a prompt, and the rows of their images. With `truncate`, those of a conversation fit `n_ctx`, and so
    do those of a gap to fill; others are yet to be cut."""
    prompt, special = request.prompt, request.parse_special
    if isinstance(prompt, Infill):
        infill = infill_tokens(model, prompt, n_ctx=n_ctx, max_tokens=request.max_tokens, truncate=request.truncate)
        return infill, {}
    if parts is None:
        return tokens_of(model, prompt, param="prompt", parse_special=special), {}
    if not isinstance(prompt, Chat):
        return join_parts(parts, model, param="prompt", parse_special=special, is_chat=False)
    items, media = join_parts(parts, model, param="messages", parse_special=special, is_chat=True)
    if len(items) > n_ctx and request.truncate:
        return ChatWindow(prompt, images, model, n_ctx=n_ctx, parse_special=special).find(len(items))
    return items, media


def _longest_text(capabilities: Capabilities) -> int:
    """Tokens of the longest text that can be embedded. If its last row is its embedding, the rows before it may be in
    several batches."""
    if capabilities.embeds_last_row:
        return capabilities.n_ctx
    return min(capabilities.n_ctx, capabilities.max_rows)


def _embedding(request: EmbedRequest, runtime: Runtime, uid: int) -> Submit:
    model, capabilities = runtime.model, runtime.context.capabilities
    if capabilities.ranks:
        raise Unsupported("embeddings", "this model ranks documents for a query, it makes no embeddings")
    if capabilities.decoder_start is not None:
        raise Unsupported("embeddings", "a model with an encoder and a decoder makes no embeddings here")
    if request.dimensions is not None and request.dimensions > capabilities.embedding_size:
        raise InvalidRequest(
            f"dimensions must be at most {capabilities.embedding_size}, not {request.dimensions}", param="dimensions"
        )
    tokens = tokens_of(model, request.content, param="content", parse_special=True)
    longest = _longest_text(capabilities)
    if request.truncate and len(tokens) > longest:
        tokens = _truncated(tokens, longest, model, is_text=isinstance(request.content, str))
    fitted = fit_prompt(tokens, n_ctx=longest, n_keep=0, adds_bos=False, truncate=False, param="content")
    return _submit_text(fitted.items, capabilities, uid)


def _submit_text(items: tuple[Item, ...], capabilities: Capabilities, uid: int) -> Submit:
    """The mail for a text that is embedded. If it takes a slot from generations, it runs in the background: it gives
    the slot up to a interactive generation, and goes on later."""
    spec = SequenceSpec(uid=uid, prompt=items, embedding=True, cache_prompt=False)
    return Submit(replace(spec, background=not takes_embed_slot(spec, capabilities)), None)


def _truncated(tokens: list[int], longest: int, model: Model, *, is_text: bool) -> list[int]:
    """The first tokens. Special tokens that end every text of the model, such as BERT's [SEP], stay at its end."""
    end = special_tokens(model, "content")[1] if is_text else []
    return tokens[: max(longest - len(end), 0)] + end[:longest]


def _pair(request: PairRequest, runtime: Runtime, uid: int) -> Submit:
    model, capabilities = runtime.model, runtime.context.capabilities
    if not capabilities.ranks:
        raise Unsupported("reranking", "this model does not rank documents")
    longest = _longest_text(capabilities)
    document = request.document
    tokens = pair_tokens(model, request.query, document, param=request.param)
    # A text has at most as many tokens as bytes, and about a constant number of tokens per character: a cut in
    # proportion is enough after a few turns.
    while len(tokens) > longest and request.truncate and document:
        document = document[: len(document) * longest // (len(tokens) + 1)]
        tokens = pair_tokens(model, request.query, document, param=request.param)
    if len(tokens) > longest:
        n_query = len(pair_tokens(model, request.query, "", param=request.param))
        if n_query > longest:
            raise PromptTooLong(n_query, longest, param="query")
        raise PromptTooLong(len(tokens), longest, param=request.param)
    if not tokens:
        raise InvalidRequest(f"query and {request.param} are empty: no input provided", param=request.param)
    return _submit_text(tuple(tokens), capabilities, uid)
