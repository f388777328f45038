"""Render a conversation into a prompt, with the chat template that is in the model's file.

Templates differ in what they accept: text or a list of parts, the arguments of a tool call as text or as an object.
What a template accepts is found out once, by trying it on a few words. Conversations are then given in that form.

A template's own placeholders for images are not used, because libmtmd puts the model's tokens around an image itself.
Instead a marker word stands for each image, and the rendered text is cut at the markers. The word contains a digest of
all other texts of the conversation and of the template, so that none of them can contain the word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from trio_runner.core.conversation import ConversationChecker, Message, MessageImage
from trio_runner.core.template import BoundedTemplate, Refusal, TemplateError, TooLong
from trio_runner.errors import InvalidRequest, RequestError, Unsupported
from trio_runner.request import MAX_TEXT_BYTES, Part

_TRIAL_WORK: Final = 1 << 22
"""Units of work (see `trio_runner.core.template`) that one trial of a template may take."""


class Moment(Protocol):
    """What a template can be told about the time, such as a `datetime`."""

    def strftime(self, layout: str, /) -> str: ...


class ChatTemplate:
    """A compiled chat template of a model. Several threads may use it at once.

    `bos_token` and `eos_token` are the texts of those tokens. Raises `Unsupported` if the template does not compile.
    """

    style: Final[TemplateStyle]

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        try:
            self._template = BoundedTemplate(source)
        except TemplateError as error:
            raise Unsupported("chat", f"the model's chat template does not compile: {error}") from error
        self._source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self.style = self._find_style()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        now: Moment | None = None,
        **variables: Any,
    ) -> tuple[Part, ...]:
        """The prompt: texts, none of them empty, and the images as they were given, in the order of the template.

        A message has a `role`, a `content`, and other fields that the template knows, such as `tool_calls`. Its
        content is text, None, or a list of parts:

            {"type": "text", "text": ...}
            {"type": "image", "image": ImageSource}
            {"type": "image_url", "image_url": {"url": "data:image/...;base64,..."}}

        `now` is the time, which the template may write into the prompt. If it is None, some templates use a date of
        their own, and some fail.

        The text contains BOS if the template writes it, so tokenise it without adding another. Special tokens in the
        text are to be parsed. The text of a message is not distinguished from the template's own, as in every similar
        program, so a message that contains `<|im_end|>` can speak as another role. A caller that does not trust its
        messages must remove such texts first.

        Raises `InvalidRequest` with `messages[i].field` for a conversation that is malformed or that the template
        refuses, and `Unsupported` if the template fails with it.
        """
        checker = ConversationChecker()
        said = checker.messages(messages)
        given = {
            "tools": checker.optional_list("tools", tools),
            "documents": checker.optional_list("documents", documents),
            "add_generation_prompt": bool(add_generation_prompt),
            **checker.variables(variables),
        }
        checker.digest.update(self._source.encode(errors="surrogatepass"))
        marker = _Marker(checker.digest.hexdigest())
        try:
            text = self._render([self.style.apply(message, marker) for message in said], given, now)
        except RequestError:
            # For a message that says nothing, some templates want None and some an empty text.
            if all(message.content is not None for message in said):
                raise
            said = [replace(message, content="") if message.content is None else message for message in said]
            text = self._render([self.style.apply(message, marker) for message in said], given, now)
        return marker.cut(text, said)

    def _render(
        self,
        messages: list[dict[str, Any]],
        given: Mapping[str, Any],
        now: Moment | None = None,
        **bounds: int,
    ) -> str:
        try:
            return self._template.render(
                {**self._tokens, "messages": messages, **given},
                max_characters=MAX_TEXT_BYTES,
                strftime_now=None if now is None else now.strftime,
                **bounds,
            )
        except Refusal as refusal:
            message = f"the model's chat template refuses messages: {refusal}"
            raise InvalidRequest(message, param="messages") from None
        except TooLong:
            message = f"messages make a prompt of more than {MAX_TEXT_BYTES} characters"
            raise InvalidRequest(message, param="messages") from None
        except TemplateError as error:
            message = f"the model's chat template fails with these messages: {error}"
            raise Unsupported("chat", message, param="messages") from error

    # Trials.

    def _find_style(self) -> TemplateStyle:
        first, second = "firstneedle", "secondneedle"
        parts = self._try([{"role": "user", "content": [_text_part(first), _text_part(second)]}])
        takes_parts = 0 <= parts.find(first) < parts.find(second) and not _is_quoted(first, parts)
        takes_text = first in self._try([{"role": "user", "content": first}]) or not takes_parts

        arguments = {"needle": "found"}
        as_text = self._try_call(json.dumps(arguments))
        as_object = self._try_call(arguments)
        return TemplateStyle(
            takes_parts=takes_parts,
            takes_text=takes_text,
            takes_json=json.dumps(arguments) in as_text,
            takes_objects="needle" in as_object and str(arguments) not in as_object,
        )

    def _try_call(self, arguments: str | dict[str, str]) -> str:
        """The prompt for a conversation with a tool call, or an empty text if the template fails."""
        for content in (None, ""):  # templates differ in which of the two may stand beside a call
            output = self._try(_tool_conversation(content, arguments))
            if "needle" in output:
                break
        return output

    def _try(self, messages: list[dict[str, Any]]) -> str:
        """The prompt for `messages`, or an empty text if the template fails."""
        given = {"tools": [_TOOL], "documents": None, "add_generation_prompt": False}
        for tools in ({}, {"tools": None}):
            try:
                return self._render(messages, {**given, **tools}, _SomeDay(), max_work=_TRIAL_WORK)
            except RequestError:
                continue
        return ""


class _SomeDay:
    """The time during a trial."""

    def strftime(self, layout: str, /) -> str:
        return "2024-07-26"


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _is_quoted(text: str, output: str) -> bool:
    """Whether `text` was written out as an element of a list in Python or JSON."""
    return f"'{text}'" in output or f'"{text}"' in output


_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "tool",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "A key."}}},
    },
}


def _tool_conversation(content: str | None, arguments: str | dict[str, str]) -> list[dict[str, Any]]:
    function = {"name": "tool", "arguments": arguments}
    call = {"id": "call12345", "type": "function", "function": function}  # nine characters, as some templates demand
    return [
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "name": "tool", "tool_call_id": "call12345", "content": "result"},
        {"role": "assistant", "content": "assistant"},
        {"role": "user", "content": "user"},
    ]


class _Marker:
    """The words that stand for the images of one conversation."""

    def __init__(self, digest: str) -> None:
        # Lower-case letters and digits only, because templates strip, split and escape.
        self._word = f"image{digest}n"

    def word(self, image: MessageImage) -> str:
        """The word for `image`."""
        return f"{self._word}{image.index}e"

    def cut(self, text: str, messages: Sequence[Message]) -> tuple[Part, ...]:
        """`text`, cut at the words of the images in `messages`. Raises `Unsupported` if one of the words is missing."""
        images = [part for message in messages for part in message.content or () if isinstance(part, MessageImage)]
        if not images:
            return (text,) if text else ()
        parts: list[Part] = []
        seen: set[int] = set()
        for position, piece in enumerate(re.split(f"{self._word}([0-9]+)e", text)):
            if position % 2:
                seen.add(int(piece))
                parts.append(images[int(piece)].source)
            elif piece:
                parts.append(piece)
        for image in images:
            if image.index not in seen:
                message = f"the model's chat template leaves out {image.place}"
                raise Unsupported("images", message, param=image.place)
        return tuple(parts)


@dataclass(frozen=True, slots=True)
class TemplateStyle:
    """What a template accepts."""

    takes_parts: bool
    """The content of a user's message may be a list of typed parts."""
    takes_text: bool
    """The content may be text."""
    takes_json: bool
    """The arguments of a tool call may be JSON text."""
    takes_objects: bool
    """The arguments of a tool call may be an object."""

    def apply(self, message: Message, marker: _Marker) -> dict[str, Any]:
        """The message in the form that the template accepts."""
        others = message.others
        if isinstance(others.get("tool_calls"), list):
            others = {**others, "tool_calls": [self._tool_call(call) for call in others["tool_calls"]]}
        return {"role": message.role, "content": self._content(message, marker), **others}

    def _content(self, message: Message, marker: _Marker) -> Any:
        content = message.content
        if content is None:
            return None
        if isinstance(content, str):
            return content if self.takes_text else [_text_part(content)]
        if self.takes_parts and (message.role == "user" or not self.takes_text):
            return [_text_part(marker.word(part) if isinstance(part, MessageImage) else part) for part in content]
        # As in llama-server: each text is a line, and nothing is added around an image.
        pieces: list[str] = []
        for index, part in enumerate(content):
            if isinstance(part, MessageImage):
                pieces.append(marker.word(part))
            else:
                pieces += ["\n", part] if index and isinstance(content[index - 1], str) else [part]
        return "".join(pieces)

    def _tool_call(self, call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str) and self.takes_objects and not self.takes_json:
            try:
                value = json.loads(arguments)
            except (ValueError, RecursionError):
                return call
            if not isinstance(value, dict):
                return call
            arguments = value
        elif isinstance(arguments, dict) and self.takes_json and not self.takes_objects:
            arguments = json.dumps(arguments, ensure_ascii=False)
        else:
            return call
        return {**call, "function": {**call["function"], "arguments": arguments}}
