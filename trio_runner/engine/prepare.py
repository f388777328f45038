"""From a request to a sequence: tokenise, fit, compile the sampler. Runs on a helper thread, before any slot is taken,
so that whatever is wrong with a request is found here and costs nobody else anything."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from trio_runner.core.ports import EncodedImage, EncodedMedia, Model, Runtime
from trio_runner.core.prompt import Item, Media, fit_prompt
from trio_runner.core.sequence import SequenceSpec
from trio_runner.engine.mailbox import Submit
from trio_runner.errors import InvalidRequest, PromptTooLong, Unsupported
from trio_runner.image_source import ImageSource
from trio_runner.info import ModelInfo
from trio_runner.request import MAX_IMAGES, AdapterChoice, Chat, EmbedRequest, GenerateRequest, Part

if TYPE_CHECKING:
    from trio_runner.core.chat import ChatTemplate

_IMAGE_TAG = re.compile(r"\[img-([0-9]{1,10})\]")


@dataclass(frozen=True, slots=True)
class PairRequest:
    """One document to score, of a `RerankRequest`."""

    query: str
    document: str
    truncate: bool
    adapters: tuple[AdapterChoice, ...] | None
    param: str
    """What to call the document when something is wrong with it."""


class NamedImage(NamedTuple):
    """An image in a prompt, and what to call it when something is wrong with it."""

    param: str
    source: ImageSource


AnyRequest: TypeAlias = GenerateRequest | EmbedRequest | PairRequest
Parts: TypeAlias = tuple[str | NamedImage, ...]


def size(request: AnyRequest) -> int:
    """About how many characters there are to tokenise."""
    if isinstance(request, PairRequest):
        return len(request.query) + len(request.document)
    content = request.content if isinstance(request, EmbedRequest) else request.prompt
    if isinstance(content, Chat):
        return sum(map(len, _texts(content)))
    if isinstance(content, str):
        return len(content)
    return len(content) + sum(len(part) for part in content if isinstance(part, str))


def _texts(chat: Chat) -> Iterator[str]:
    """What is said in a conversation, as far as it is one; nothing of what images there are is looked at."""
    for message in chat.messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, (list, tuple)) else (content,):
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                yield text


# --- prompts of several parts ---------------------------------------------------------------------------------------


def has_parts(request: AnyRequest, runtime: Runtime) -> bool:
    """Whether the prompt is to be taken apart before it is tokenised."""
    if not isinstance(request, GenerateRequest):
        return False
    if isinstance(request.prompt, str):
        return bool(request.image_data) or (runtime.projector is not None and "[img-" in request.prompt)
    return isinstance(request.prompt, Chat) or not isinstance(next(iter(request.prompt), 0), int)


def parts_of(request: GenerateRequest, runtime: Runtime) -> Parts:
    """The texts and images of a prompt that has such parts. Raises `RequestError`."""
    prompt = request.prompt
    if isinstance(prompt, str):
        parts = _tagged(prompt, request.image_data) if runtime.projector is not None else (prompt,)
        names_images = bool(request.image_data)
        param = "image_data"
    else:
        if isinstance(prompt, Chat):
            parts, param = _rendered(prompt, runtime.model.info), "messages"
        else:
            parts, param = _named(prompt), "prompt"
        names_images = any(isinstance(part, NamedImage) for part in parts)
    if names_images and runtime.projector is None:
        raise Unsupported("images", f"{param} has images, which need a model with a projector", param=param)
    n_images = sum(isinstance(part, NamedImage) for part in parts)
    if n_images > MAX_IMAGES:
        raise InvalidRequest(f"{param} has {n_images} images, but at most {MAX_IMAGES} are allowed", param=param)
    return parts


def _tagged(prompt: str, image_data: Sequence[tuple[int, ImageSource]]) -> Parts:
    """Cut a text at its tags; of two images with one id the first counts."""
    images = {
        number: NamedImage(f"image_data[{index}]", source)
        for index, (number, source) in reversed(list(enumerate(image_data)))
    }
    parts: list[str | NamedImage] = []
    named: set[int] = set()
    for index, piece in enumerate(_IMAGE_TAG.split(prompt)):
        if index % 2 == 0:
            parts.append(piece)
            continue
        number = int(piece)
        if number not in images:
            raise InvalidRequest(f"prompt names [img-{number}], but image_data has no such id", param="prompt")
        named.add(number)
        parts.append(images[number])
    for index, (number, _) in enumerate(image_data):
        if number not in named:
            raise InvalidRequest(
                f"image_data[{index}] has the id {number}, but prompt has no [img-{number}]", param="image_data"
            )
    return tuple(part for part in parts if part)


def _named(prompt: Sequence[Part | int]) -> Parts:
    named: list[str | NamedImage] = []
    for index, part in enumerate(prompt):
        if isinstance(part, str):
            named.append(part)
        elif isinstance(part, int):
            raise InvalidRequest("prompt has a token beside texts and images", param="prompt")
        else:
            named.append(NamedImage(f"prompt[{index}]", part))
    return tuple(named)


def _rendered(chat: Chat, info: ModelInfo) -> Parts:
    if info.chat_template is None:
        raise Unsupported("chat", "there is no chat template in the model's file", param="messages")
    for name in ("tools", "documents", "add_generation_prompt", "now"):
        if name in chat.variables:
            raise InvalidRequest(f"{name} cannot be a variable of a chat template", param=name)
    template = _template(info.chat_template, info.bos_text, info.eos_text)
    parts = template.render(
        chat.messages,
        add_generation_prompt=chat.add_generation_prompt,
        tools=chat.tools,
        documents=chat.documents,
        now=datetime.now(),
        **chat.variables,
    )
    places = _places(chat)
    if len(places) != sum(not isinstance(part, str) for part in parts):
        places = ["messages"] * len(parts)
    remaining = iter(places)
    return tuple(part if isinstance(part, str) else NamedImage(next(remaining), part) for part in parts)


def _places(chat: Chat) -> list[str]:
    """Where the images of a conversation are, which is one: in the order of the messages, as templates have them."""
    return [
        f"messages[{index}].content[{at}]"
        for index, message in enumerate(chat.messages)
        if isinstance(message.get("content"), (list, tuple))
        for at, part in enumerate(message["content"])
        if part.get("type") != "text"
    ]


@functools.lru_cache(maxsize=8)
def _template(source: str, bos_token: str, eos_token: str) -> ChatTemplate:
    from trio_runner.core.chat import ChatTemplate  # and with it all of Jinja

    return ChatTemplate(source, bos_token=bos_token, eos_token=eos_token)


def _joined(
    parts: Sequence[str | EncodedImage], model: Model, *, param: str, parse_special: bool, is_chat: bool
) -> tuple[list[Item], dict[Media, EncodedMedia]]:
    """The items of all parts, and the rows of their images. What the model has around a text stands around all of
    them; of a conversation only before it, unless it is there already, as in a chat template that has it."""
    begin, end = _around(model, param)
    items: list[Item] = [] if is_chat and _begins_itself(parts, model.info) else [*begin]
    media: dict[Media, EncodedMedia] = {}
    for part in parts:
        if isinstance(part, EncodedImage):
            items += part.items
            media.update(part.media)
        else:
            items += tokenize(model, part, param=param, add_special=False, parse_special=parse_special)
    return [*items, *([] if is_chat else end)], media


def _begins_itself(parts: Sequence[str | EncodedImage], info: ModelInfo) -> bool:
    first = parts[0] if parts else ""
    return bool(info.bos_text) and isinstance(first, str) and first.startswith(info.bos_text)


# --- sequences ------------------------------------------------------------------------------------------------------


def prepare(
    request: AnyRequest, runtime: Runtime, uid: int, parts: Sequence[str | EncodedImage] | None = None
) -> Submit:
    """The sequence that the request asks for, ready to run but for its adapters. `parts`: of its prompt, if it has
    any. Raises `RequestError`."""
    match request:
        case GenerateRequest():
            return _prepare_generation(request, runtime, uid, parts)
        case EmbedRequest():
            return _prepare_embedding(request, runtime, uid)
        case PairRequest():
            return _prepare_pair(request, runtime, uid)


def _prepare_generation(
    request: GenerateRequest, runtime: Runtime, uid: int, parts: Sequence[str | EncodedImage] | None
) -> Submit:
    model, capabilities = runtime.model, runtime.context.capabilities
    if not capabilities.can_generate:
        raise Unsupported("generation", "this model makes embeddings, it cannot generate text")
    param = "messages" if isinstance(request.prompt, Chat) else "prompt"
    items: Sequence[Item]
    media: dict[Media, EncodedMedia] = {}
    if parts is not None:
        is_chat = isinstance(request.prompt, Chat)
        items, media = _joined(parts, model, param=param, parse_special=request.parse_special, is_chat=is_chat)
    else:
        items = _tokens(model, request.prompt, param=param, parse_special=request.parse_special)
    reads = capabilities.decoder_start is not None
    fitted = fit_prompt(
        items,
        n_ctx=capabilities.max_rows if reads else capabilities.n_ctx,
        n_keep=request.n_keep,
        adds_bos=model.info.adds_bos,
        truncate=request.truncate,
        param=param,
    )
    tokens = tuple(item for item in fitted.items if isinstance(item, int))
    spec = SequenceSpec(
        uid=uid,
        prompt=fitted.items if capabilities.decoder_start is None else (capabilities.decoder_start,),
        encoder_tokens=tokens if reads else (),
        n_keep=1 if reads else fitted.n_keep,
        max_tokens=request.max_tokens,
        stop=request.stop,
        cache_prompt=request.cache_prompt,
        shift=request.shift,
        background=request.priority == "background",
        progress=request.progress,
        logprobs=request.sampling.logprobs >= 0,
    )
    return Submit(spec, model.sampler(request.sampling, tokens), media)


def _prepare_embedding(request: EmbedRequest, runtime: Runtime, uid: int) -> Submit:
    model, capabilities = runtime.model, runtime.context.capabilities
    if capabilities.ranks:
        raise Unsupported("embeddings", "this model ranks documents for a query, it makes no embeddings")
    if capabilities.decoder_start is not None:
        raise Unsupported("embeddings", "a model with an encoder and a decoder makes no embeddings here")
    if request.dimensions is not None and request.dimensions > capabilities.n_vector:
        raise InvalidRequest(
            f"dimensions must be at most {capabilities.n_vector}, not {request.dimensions}", param="dimensions"
        )
    tokens = _tokens(model, request.content, param="content", parse_special=True)
    longest = min(capabilities.n_ctx, capabilities.max_rows)
    if request.truncate and len(tokens) > longest:
        tokens = _truncated(tokens, longest, model, ends=isinstance(request.content, str))
    fitted = fit_prompt(tokens, n_ctx=longest, n_keep=0, adds_bos=False, truncate=False, param="content")
    return Submit(SequenceSpec(uid=uid, prompt=fitted.items, embedding=True), None)


def _truncated(tokens: list[int], longest: int, model: Model, *, ends: bool) -> list[int]:
    """Without the last ones; what ends a text, such as BERT's [SEP], still does, if there is such a thing."""
    end = _around(model, "content")[1] if ends else []
    return tokens[: max(longest - len(end), 0)] + end[:longest]


def _prepare_pair(request: PairRequest, runtime: Runtime, uid: int) -> Submit:
    model, capabilities = runtime.model, runtime.context.capabilities
    if not capabilities.ranks:
        raise Unsupported("reranking", "this model does not rank documents")
    longest = min(capabilities.n_ctx, capabilities.max_rows)
    document = request.document
    tokens = _pair(model, request.query, document, param=request.param)
    # Tokens of a text are no longer than its characters are many: what is cut is more than enough, in few turns.
    while len(tokens) > longest and request.truncate and document:
        document = document[: len(document) * longest // (len(tokens) + 1)]
        tokens = _pair(model, request.query, document, param=request.param)
    if len(tokens) > longest:
        alone = len(_pair(model, request.query, "", param=request.param))
        if alone > longest:
            raise PromptTooLong(alone, longest, param="query")
        raise PromptTooLong(len(tokens), longest, param=request.param)
    if not tokens:
        raise InvalidRequest(f"query and {request.param} are empty: no input provided", param=request.param)
    return Submit(SequenceSpec(uid=uid, prompt=tuple(tokens), embedding=True), None)


def _pair(model: Model, query: str, document: str, *, param: str) -> list[int]:
    """A query and a document as models are trained on them: by the file's own template, if it has one, else with the
    model's special tokens before, between and after (as llama.cpp's server does it)."""
    info = model.info
    template = info.metadata.get("tokenizer.chat_template.rerank")
    if template is not None:
        text = template.replace("{query}", query).replace("{document}", document)
        return tokenize(model, text, param=param, add_special=False, parse_special=True)
    texts = [
        tokenize(model, text, param=name, add_special=False, parse_special=False)
        for text, name in ((query, "query"), (document, param))
    ]
    end = info.token_eos if info.token_eos is not None else info.token_sep
    before = [info.token_bos] if info.adds_bos else []
    after = [end] if info.adds_eos else []
    between = [*after, *([info.token_sep] if info.adds_sep else [])]
    tokens = [*before, *texts[0], *between, *texts[1], *after]
    return [token for token in tokens if token is not None]


def tokenize(model: Model, text: str, *, param: str, add_special: bool, parse_special: bool) -> list[int]:
    """The tokens of `text`. Raises `InvalidRequest` that names the field `param`."""
    try:
        return model.tokenize(text, add_special=add_special, parse_special=parse_special)
    except InvalidRequest as error:
        raise InvalidRequest(str(error), param=param) from error


def _around(model: Model, param: str) -> tuple[list[int], list[int]]:
    """What the model has before and after a text, such as BOS, or BERT's [CLS] and [SEP]."""
    around = tokenize(model, "", param=param, add_special=True, parse_special=False)
    return around[: model.info.adds_bos], around[model.info.adds_bos :]


def _tokens(model: Model, prompt: object, *, param: str, parse_special: bool) -> list[int]:
    if isinstance(prompt, str):
        return tokenize(model, prompt, param=param, add_special=True, parse_special=parse_special)
    assert isinstance(prompt, tuple)
    last = model.info.n_vocab - 1
    for token in prompt:
        if not 0 <= token <= last:
            raise InvalidRequest(f"{param} has token {token}, but the vocabulary ends at {last}", param=param)
    return list(prompt)
