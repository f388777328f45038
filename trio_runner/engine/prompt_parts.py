"""Prompts of several parts: texts with images among them, and conversations.

First such a prompt is taken apart into texts and images (`parts_of`). Then the images are encoded. Then everything is
joined into the items of one sequence (`join_parts`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from trio_runner.core.ports import EncodedImage, EncodedMedia, Model, Runtime
from trio_runner.core.prompt import Item, Media
from trio_runner.engine.tokens import special_tokens, tokenize
from trio_runner.errors import InvalidRequest, Unsupported
from trio_runner.image_source import IMAGE_MARKER, IMAGE_TAG, ImageSource
from trio_runner.info import ModelInfo
from trio_runner.request import MAX_IMAGES, Chat, GenerateRequest, Infill

if TYPE_CHECKING:
    from trio_runner.core.chat import ChatTemplate


class NamedImage(NamedTuple):
    """An image in a prompt, with its name in error messages, such as "prompt[3]"."""

    param: str
    source: ImageSource


Parts: TypeAlias = tuple[str | NamedImage, ...]
"""The texts and images of a prompt, in order."""
EncodedParts: TypeAlias = Sequence[str | EncodedImage]
"""The same after its images were encoded."""


def has_parts(request: GenerateRequest, runtime: Runtime) -> bool:
    """Whether the prompt must be taken apart before it is tokenised."""
    if isinstance(request.prompt, str):
        return bool(request.image_data) or (runtime.projector is not None and "[img-" in request.prompt)
    if isinstance(request.prompt, Infill):
        return False
    return isinstance(request.prompt, Chat) or not isinstance(next(iter(request.prompt), 0), int)


def parts_of(request: GenerateRequest, runtime: Runtime) -> Parts:
    """The texts and images of a prompt that has parts. A conversation goes through the model's chat template.

    Raises `InvalidRequest` for tags and images that do not match, for too many images, and for a conversation that the
    template refuses, and `Unsupported` for what the model cannot do.
    """
    prompt = request.prompt
    if isinstance(prompt, str):
        parts = _tagged(prompt, request.image_data) if runtime.projector is not None else (prompt,)
        names_images = bool(request.image_data)
        param = "image_data"
    else:
        if isinstance(prompt, Chat):
            parts, param = render_chat(prompt, runtime.model.info), "messages"
        else:
            assert not isinstance(prompt, Infill), "it has no parts"
            parts, param = _named(prompt), "prompt"
        names_images = any(isinstance(part, NamedImage) for part in parts)
    if names_images and runtime.projector is None:
        raise Unsupported("images", f"{param} has images, which need a model with a projector", param=param)
    n_images = sum(isinstance(part, NamedImage) for part in parts)
    if n_images > MAX_IMAGES:
        raise InvalidRequest(f"{param} has {n_images} images, but at most {MAX_IMAGES} are allowed", param=param)
    return parts


def rendered_text(request: GenerateRequest, runtime: Runtime) -> str:
    """The prompt of a conversation as text, with a marker for each image. Raises what `parts_of` raises."""
    return "".join(part if isinstance(part, str) else IMAGE_MARKER for part in parts_of(request, runtime))


def join_parts(
    parts: EncodedParts, model: Model, *, param: str, parse_special: bool, is_chat: bool
) -> tuple[list[Item], dict[Media, EncodedMedia]]:
    """The items of all parts, and the rows of their images.

    The special tokens that the model has around a text go around all parts together. A conversation gets only those
    before it, because the answer follows, and not even those if the chat template has written BOS itself.
    """
    begin, end = special_tokens(model, param)
    items: list[Item] = [] if is_chat and _begins_with_bos(parts, model.info) else [*begin]
    media: dict[Media, EncodedMedia] = {}
    for part in parts:
        if isinstance(part, EncodedImage):
            items += part.items
            media.update(part.media)
        else:
            items += tokenize(model, part, param=param, add_special=False, parse_special=parse_special)
    return [*items, *([] if is_chat else end)], media


def _begins_with_bos(parts: EncodedParts, info: ModelInfo) -> bool:
    first = parts[0] if parts else ""
    return bool(info.bos_text) and isinstance(first, str) and first.startswith(info.bos_text)


def _tagged(prompt: str, image_data: Sequence[tuple[int, ImageSource]]) -> Parts:
    """Cut a text at its tags. If two images have the same id, the first one counts."""
    images = {
        number: NamedImage(f"image_data[{index}]", source)
        for index, (number, source) in reversed(list(enumerate(image_data)))
    }
    parts: list[str | NamedImage] = []
    named: set[int] = set()
    for index, piece in enumerate(IMAGE_TAG.split(prompt)):
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


def _named(prompt: Sequence[str | int | ImageSource]) -> Parts:
    named: list[str | NamedImage] = []
    for index, part in enumerate(prompt):
        assert not isinstance(part, int), "GenerateRequest refuses tokens among texts and images"
        named.append(part if isinstance(part, str) else NamedImage(f"prompt[{index}]", part))
    return tuple(named)


def render_chat(
    chat: Chat, info: ModelInfo, *, kept: Sequence[int] | None = None, now: datetime | None = None
) -> Parts:
    """The texts and images of a conversation, as the chat template of the model writes them.

    `kept` has the numbers of the messages to render, in order, if not all. `now` is the time that the template may
    write. Raises `Unsupported` without a template or if it fails, and `InvalidRequest` if it refuses the conversation.
    """
    if info.chat_template is None:
        raise Unsupported("chat", "there is no chat template in the model's file", param="messages")
    for name in ("tools", "documents", "add_generation_prompt", "now"):
        if name in chat.variables:
            raise InvalidRequest(f"{name} cannot be a variable of a chat template", param=name)
    template = _template(info.chat_template, info.bos_text, info.eos_text)
    parts = template.render(
        chat.messages if kept is None else [chat.messages[index] for index in kept],
        add_generation_prompt=chat.add_generation_prompt,
        tools=chat.tools,
        documents=chat.documents,
        now=now or datetime.now(),
        **chat.variables,
    )
    places = [name for index, name in named_images(chat) if kept is None or index in kept]
    if len(places) != sum(not isinstance(part, str) for part in parts):
        places = ["messages"] * len(parts)
    remaining = iter(places)
    return tuple(part if isinstance(part, str) else NamedImage(next(remaining), part) for part in parts)


def named_images(chat: Chat) -> list[tuple[int, str]]:
    """The images of a conversation that was checked, each as the number of its message and its name in error messages.
    They are in the order of the messages, which is the order of most templates."""
    return [
        (index, f"messages[{index}].content[{at}]")
        for index, message in enumerate(chat.messages)
        if isinstance(message.get("content"), (list, tuple))
        for at, part in enumerate(message["content"])
        if isinstance(part, Mapping) and part.get("type") != "text"
    ]


@functools.lru_cache(maxsize=8)
def _template(source: str, bos_token: str, eos_token: str) -> ChatTemplate:
    from trio_runner.core.chat import ChatTemplate  # imports Jinja, which is slow

    return ChatTemplate(source, bos_token=bos_token, eos_token=eos_token)
