"""Requests in Ollama's dialect: bytes of a body -> request values. Pure.

Every function raises `RequestError`, which names the field at fault.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from trio_runner.errors import InvalidRequest, RequestError, Unsupported
from trio_runner.image_source import IMAGE_TAG
from trio_runner.request import Chat, EmbedRequest, GenerateRequest, Infill, Prompt
from trio_runner.server.dialects.ollama.bodies import CHAT, EMBED, EMBEDDINGS, GENERATE, PULL, SHOW
from trio_runner.server.dialects.ollama.options import CONTEXTS_OF_TEXT, MAX_INT32, OPTIONS, settings
from trio_runner.server.dialects.ollama.thinking import template_variables, thinking_style
from trio_runner.server.dialects.places import renamed

Idle: TypeAlias = Literal["load", "unload"]
PromptName: TypeAlias = Literal["prompt", "messages"]
"""The field that the prompt is made of."""

_IMAGE: Final = re.compile(r"messages\[(\d+)\]\.content\[(\d+)\](?:\.image)?")
"""What the engine calls an image of a conversation. Here, images stand before all that is said in their message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """What a request to /api/generate or /api/chat asks for."""

    model: str | None
    """The name that the client gave."""
    prompt_name: PromptName
    stream: bool
    idle: Idle | None
    """Nothing is to be generated. Clients load and unload a model so."""
    think: bool | str | None
    num_ctx: int | None
    request: GenerateRequest
    """Without its bound on tokens, if the client gave none, and without the variables of the chat template."""
    plain: Prompt | None = None
    """The prompt for a model that has no chat template. None: then this model cannot serve the request, or the prompt
    of `request` is for every model."""

    @property
    def thinks(self) -> bool:
        """Whether the thinking is to be told apart from the answer."""
        return bool(self.think)

    def prepare(self, *, chat_template: str | None, n_ctx: int) -> GenerateRequest:
        """The request to a model with this chat template and context. Raises `RequestError`."""
        if self.thinks and not thinking_style(chat_template).thinks:
            raise Unsupported("thinking", "think: this model's chat template has no thinking", param="think")
        prompt, limit = self.request.prompt, min(CONTEXTS_OF_TEXT * n_ctx, MAX_INT32)
        if chat_template is None and self.plain is not None:
            prompt = self.plain
        elif isinstance(prompt, Chat) and self.think is not None:
            prompt = replace(prompt, variables=template_variables(self.think))
        max_tokens = limit if self.request.max_tokens is None else min(self.request.max_tokens, limit)
        return replace(self.request, prompt=prompt, max_tokens=max_tokens)

    def renamed(self, error: RequestError) -> RequestError:
        """`error` of the engine, with the field at fault called what it is called in the request."""
        return _renamed(error, self.prompt_name)


def generate(body: bytes) -> GenerateCall:
    """What the body of POST /api/generate asks for."""
    given = GENERATE.read(body)
    text, suffix, images = given.get("prompt", ""), given.get("suffix", ""), given.get("images", ())
    if given.get("raw") and given.get("system"):
        raise InvalidRequest("system cannot be combined with raw, which takes the prompt as it is", param="system")
    if suffix and (images or given.get("think")):
        name = "images" if images else "think"
        raise InvalidRequest(f"{name} cannot be combined with suffix", param=name)
    is_idle = not (text or suffix or images)
    if suffix:
        return _call("prompt", given, Infill(prefix=text, suffix=suffix))
    if given.get("raw") or is_idle:
        return _call("prompt", given, text, is_idle=is_idle, image_data=_numbered(text, images))
    system = given.get("system", "")
    messages = [{"role": "system", "content": system}] if system else []
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    chat = Chat(messages=(*messages, {"role": "user", "content": content if images else text}))
    plain = f"{system}\n\n{text}" if system else text
    return _call("prompt", given, chat, plain=(*images, plain) if images else plain)


def chat(body: bytes) -> GenerateCall:
    """What the body of POST /api/chat asks for."""
    given = CHAT.read(body)
    messages = tuple(map(_template_message, given.get("messages", ())))
    return _call("messages", given, Chat(messages=messages), is_idle=not messages)


def _call(
    prompt_name: PromptName,
    given: Mapping[str, Any],
    prompt: Prompt,
    *,
    plain: Prompt | None = None,
    is_idle: bool = False,
    image_data: tuple[tuple[int, bytes], ...] = (),
) -> GenerateCall:
    if given.get("think") and given.get("format"):
        raise InvalidRequest("think cannot be combined with format, which holds from the first token", param="think")
    options = given.get("options", {})
    logprobs = given.get("top_logprobs", 0) if given.get("logprobs") else -1
    try:
        request = GenerateRequest(
            **{
                "prompt": prompt,
                "image_data": image_data,
                "shift": given.get("shift", True),
                "truncate": given.get("truncate", True),
                **settings(options, logprobs=logprobs, json_schema=given.get("format", "")),
            }
        )
    except RequestError as error:
        raise _renamed(error, prompt_name) from None
    return GenerateCall(
        model=given.get("model"),
        prompt_name=prompt_name,
        stream=given.get("stream", True),
        idle=("unload" if given.get("keep_alive") else "load") if is_idle else None,
        think=given.get("think"),
        num_ctx=options.get("num_ctx"),
        request=request,
        plain=plain,
    )


def _renamed(error: RequestError, prompt_name: PromptName) -> RequestError:
    param = name = error.param
    if param is None:
        return error
    if image := _IMAGE.fullmatch(param):
        place = f"messages[{image[1]}]." if prompt_name == "messages" else ""
        name = f"{place}images[{image[2]}]"
    elif param == "messages":
        name = prompt_name
    elif param == "json_schema":
        name = "format"
    return _about(error, name)


def _about(error: RequestError, name: str | None) -> RequestError:
    """`error` with the field at fault called `name`; or as an option, if it is one."""
    if error.param is None or name is None:
        return error
    other = renamed(error, {error.param: f"options.{name}" if name in OPTIONS else name})
    # A 404, as of an adapter, would say that there is no such model.
    return error if other is error else InvalidRequest(str(other), param=other.param)


def _numbered(text: str, images: Sequence[bytes]) -> tuple[tuple[int, bytes], ...]:
    """The images of a raw prompt, which has to say where each stands."""
    named = {int(number) for number in IMAGE_TAG.findall(text)}
    for index in range(len(images)):
        if index not in named:
            raise InvalidRequest(f"images[{index}] has no [img-{index}] in prompt", param=f"images[{index}]")
    return tuple(enumerate(images))


def _template_message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message as chat templates read it."""
    content: Any = message.get("content", "")
    if images := message.get("images"):
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": content}]
    others = {name: message[name] for name in ("tool_calls", "tool_call_id") if message.get(name)}
    if message.get("thinking"):  # templates read either name
        others |= {"thinking": message["thinking"], "reasoning_content": message["thinking"]}
    if message.get("tool_name"):
        others |= {"tool_name": message["tool_name"], "name": message["tool_name"]}
    return {"role": message["role"], "content": content, **others}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedCall:
    """What a request to /api/embed or /api/embeddings asks for."""

    model: str | None
    text_name: Literal["input", "prompt"]
    """The field that has the texts."""
    requests: tuple[EmbedRequest, ...]

    def renamed(self, error: RequestError) -> RequestError:
        """`error` of the engine, with the field at fault called what it is called in the request."""
        return _about(error, self.text_name if error.param == "content" else error.param)


def embed(body: bytes) -> EmbedCall:
    """What the body of POST /api/embed asks for."""
    given = EMBED.read(body)
    return _embed_call(
        "input",
        given,
        given.get("input", ()),
        normalize=True,
        truncate=given.get("truncate", True),
        dimensions=given.get("dimensions") or None,
    )


def embeddings(body: bytes) -> EmbedCall:
    """What the body of POST /api/embeddings asks for. It has one text, or none."""
    given = EMBEDDINGS.read(body)
    return _embed_call("prompt", given, (given["prompt"],) if given.get("prompt") else ())


def _embed_call(
    text_name: Literal["input", "prompt"], given: Mapping[str, Any], texts: Sequence[str], **more: Any
) -> EmbedCall:
    adapters = given.get("options", {}).get("adapters")
    requests = tuple(EmbedRequest(content=text, adapters=adapters, **more) for text in texts)
    return EmbedCall(model=given.get("model"), text_name=text_name, requests=requests)


def show(body: bytes) -> str | None:
    """The name of the model in the body of POST /api/show."""
    return _name(SHOW.read(body))


def pull(body: bytes) -> tuple[str | None, bool]:
    """The name of the model in the body of POST /api/pull, and whether to answer line by line."""
    given = PULL.read(body)
    return _name(given), given.get("stream", True)


def _name(given: Mapping[str, Any]) -> str | None:
    return given.get("model") or given.get("name")
