"""The bodies of requests in Ollama's dialect: each field with its check. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from trio_runner.errors import InvalidRequest
from trio_runner.parameters import parameters_of
from trio_runner.request import MAX_DOCUMENTS, MAX_IMAGES, EmbedRequest, GenerateRequest
from trio_runner.server.dialects import json_in
from trio_runner.server.dialects.fields import (
    BOOLEAN,
    INTEGER,
    NUMBER,
    OBJECT,
    STRING,
    Body,
    Fields,
    array,
    check_model_name,
    either,
    field,
    fields_of,
    ignored,
    object_of,
    object_schema,
)
from trio_runner.server.dialects.json_in import Object, wrong
from trio_runner.server.dialects.ollama.formats import closed
from trio_runner.server.dialects.ollama.options import OPTIONS

MAX_TOP_LOGPROBS: Final = 20
"""Alternatives to each token, as in Ollama."""
THINKING_LEVELS: Final = ("low", "medium", "high", "max")
ANY_OBJECT: Final = '{"type":"object"}'
"""The schema of `"format": "json"`. Ollama's grammar for it allows objects only."""

# --- Checks ----------------------------------------------------------------------------------------------------------

_DURATION = re.compile(r"[-+]?((\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h))+|[-+]?\d+(\.\d*)?", re.ASCII)


def _keep_alive(name: str, value: Any) -> bool:
    """Whether the model is to be unloaded."""
    if isinstance(value, str):
        if len(value) > 100 or not _DURATION.fullmatch(value):
            raise InvalidRequest(f'{name} must be a number of seconds or a duration such as "5m"', param=name)
        return not re.search("[1-9]", value)
    return json_in.check_number(name, value) == 0


def _format(name: str, value: Any) -> str:
    """The JSON text of a schema; empty for none."""
    if isinstance(value, Object):
        try:
            return json.dumps(closed(value), allow_nan=False)
        except (ValueError, RecursionError):
            raise InvalidRequest(
                f"{name} has a number that is too large, or is nested too deeply", param=name
            ) from None
    if value not in ("", "json"):
        raise InvalidRequest(f'{name} must be "json" or a JSON schema, which is an object', param=name)
    return ANY_OBJECT if value else ""


def _think(name: str, value: Any) -> bool | str:
    if not isinstance(value, bool) and value not in THINKING_LEVELS:
        levels = ", ".join(f'"{level}"' for level in THINKING_LEVELS)
        raise InvalidRequest(f"{name} must be true, false, or one of {levels}", param=name)
    return bool(value) if isinstance(value, bool) else str(value)


def _images(name: str, value: Any) -> tuple[bytes, ...]:
    if not isinstance(value, list):
        wrong(name, "a list of strings", value)
    if len(value) > MAX_IMAGES:
        raise InvalidRequest(f"{name} has {len(value)} images, but at most {MAX_IMAGES} are allowed", param=name)
    return tuple(json_in.image_file(f"{name}[{index}]", item) for index, item in enumerate(value))


def _template(name: str, value: Any) -> str:
    if json_in.check_text(name, value):
        raise InvalidRequest(
            f"{name} is not supported: prompts are made with the chat template in the model's file, or with `raw`",
            param=name,
        )
    return ""


def _context(name: str, value: Any) -> tuple[int, ...]:
    if json_in.check_tokens(name, value):
        raise InvalidRequest(
            f"{name} is not supported, and no answer has one: send the conversation to /api/chat", param=name
        )
    return ()


def _tools(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        wrong(name, "a list of objects", value)
    if value:
        raise InvalidRequest(f"{name} are not supported: this server does not read tool calls from a text", param=name)
    return ()


def _tool_call(name: str, value: Any) -> dict[str, Any]:
    """A tool call in the form that chat templates read, which is OpenAI's."""
    if not isinstance(value, Object):
        wrong(name, "an object", value)
    function = value.get("function")
    if not isinstance(function, Object):
        wrong(f"{name}.function", "an object", function)
    if not isinstance(function.get("name"), str):
        wrong(f"{name}.function.name", "a string", function.get("name"))
    return {"type": "function", **value}


def _tool_calls(name: str, value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list):
        wrong(name, "a list of objects", value)
    return tuple(_tool_call(f"{name}[{index}]", item) for index, item in enumerate(value))


def _messages(name: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list):
        wrong(name, "a list of objects", value)
    messages = tuple(_message(f"{name}[{index}]", item) for index, item in enumerate(value))
    n_images = sum(len(message.get("images", ())) for message in messages)
    if n_images > MAX_IMAGES:
        raise InvalidRequest(f"{name} has {n_images} images, but at most {MAX_IMAGES} are allowed", param=name)
    return messages


def _input(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (json_in.check_text(name, value),) if value else ()
    if not isinstance(value, list):
        wrong(name, "a string or a list of strings", value)
    return json_in.check_texts(name, value, MAX_DOCUMENTS)


MESSAGE: Final[Fields] = {
    "role": field(STRING, "Who speaks: `system`, `user`, `assistant` or `tool`.", required=True),
    "content": field(STRING, "What is said.", default=""),
    "images": field(
        array(STRING, maxItems=MAX_IMAGES),
        "Image files in base64. They stand before the content.",
        check=_images,
        default_text="none",
    ),
    "thinking": field(STRING, "The thinking of an earlier answer, for chat templates that read it."),
    "tool_calls": field(
        array(OBJECT), "Calls in an earlier answer, for chat templates that read them.", check=_tool_calls
    ),
    "tool_name": field(STRING, "The tool that answers, in a message of the role `tool`."),
    "tool_call_id": field(STRING, "The call that is answered, in a message of the role `tool`."),
}
_message = object_of(MESSAGE)


# --- Fields ----------------------------------------------------------------------------------------------------------

_MODEL: Final[Fields] = {
    "model": field(
        STRING,
        "A name of the model, with or without `:latest`.",
        check=check_model_name,
        default_text="the model that there is",
    )
}
_NAME: Final[Fields] = {**_MODEL, "name": field(STRING, "An older name for `model`.", check=check_model_name)}
_KEEP_ALIVE: Final[Fields] = {
    "keep_alive": field(
        either(NUMBER, STRING),
        'Seconds, or a duration such as "5m", that the model should stay loaded. It is checked and changes nothing: '
        "the model stays loaded as long as the server runs.",
        check=_keep_alive,
        default_text="for ever",
    )
}
_OPTIONS: Final[Fields] = {
    "options": field(object_schema(OPTIONS), "See the options.", check=object_of(OPTIONS), default_text="none")
}
_LOADING: Final[Fields] = {
    **_KEEP_ALIVE,
    "options": field(
        object_schema(OPTIONS),
        "Checked. Only `adapters` has a meaning here.",
        check=object_of(OPTIONS),
        default_text="none",
    ),
}
_COMMON: Final[Fields] = {
    **_MODEL,
    "stream": field(BOOLEAN, "Send the answer line by line while it is generated.", default=True),
    "format": field(
        either({"enum": ["", "json"]}, OBJECT),
        'What the answer must be: "json" means any JSON object, an object is a JSON schema. As in Ollama, an object '
        "has only the properties that the schema names, unless it has `additionalProperties`.",
        check=_format,
        default_text="any text",
    ),
    **_OPTIONS,
    "think": field(
        either(BOOLEAN, {"enum": list(THINKING_LEVELS)}),
        "True: have the model think first, and tell its thinking apart from the answer. A level does the same, and is "
        "passed on. False: ask the model not to think. Not given: the chat template decides, and the answer has all "
        "that the model writes.",
        check=_think,
    ),
    "truncate": field(
        BOOLEAN,
        "Drop the oldest messages of a conversation that does not fit, except system messages and the last one. Of a "
        "`raw` prompt, cut out the middle. Otherwise, what does not fit is refused.",
        default=True,
    ),
    **fields_of(GenerateRequest, "shift"),
    "logprobs": field(BOOLEAN, "Report the log-probability of every token.", default=False),
    "top_logprobs": field(
        {**INTEGER, "minimum": 0, "maximum": MAX_TOP_LOGPROBS},
        "Number of most probable alternatives to report with every token; only with `logprobs`.",
        check=json_in.integer_between(0, MAX_TOP_LOGPROBS),
        default=0,
    ),
    **_KEEP_ALIVE,
}

GENERATE: Final = Body(
    {
        "prompt": field(
            STRING, "What to answer, or with `raw` the text to continue. Without it, nothing is generated.", default=""
        ),
        "suffix": field(
            STRING,
            "What comes after the text that is wanted: the model fills in between `prompt` and `suffix`. This takes no "
            "chat template.",
            default="",
        ),
        "system": field(STRING, "The system message before the prompt.", default=""),
        "images": field(
            array(STRING, maxItems=MAX_IMAGES),
            "Image files in base64. They stand before the prompt; with `raw`, where the prompt has `[img-N]`.",
            check=_images,
            default_text="none",
        ),
        "raw": field(BOOLEAN, "Continue `prompt` as it is, without the chat template.", default=False),
        "template": field(STRING, "Refused unless it is empty.", check=_template, default=""),
        "context": field(array(INTEGER), "Refused unless it is empty.", check=_context, default=[]),
        **_COMMON,
    },
    {"prompt": "Why is the sky blue?", "options": {"num_predict": 8}},
)
CHAT: Final = Body(
    {
        "messages": field(
            array(object_schema(MESSAGE)),
            "The conversation. Without messages, nothing is generated.",
            check=_messages,
            default=[],
        ),
        "tools": field(array(OBJECT), "Refused unless it is empty.", check=_tools, default=[]),
        **_COMMON,
    },
    {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "options": {"num_predict": 8}},
)
EMBED: Final = Body(
    {
        "input": field(
            either(STRING, array(STRING, maxItems=MAX_DOCUMENTS)),
            "The text to embed, or several texts. Without any, nothing is embedded.",
            check=_input,
            default=[],
        ),
        **_MODEL,
        **fields_of(EmbedRequest, "truncate", truncate=True),
        "dimensions": field(
            {**INTEGER, "minimum": 0}, parameters_of(EmbedRequest)["dimensions"].doc, default_text="all"
        ),
        **_LOADING,
    },
    {"input": ["one", "two"]},
)
EMBEDDINGS: Final = Body(
    {
        "prompt": field(STRING, "The text to embed. Without it, nothing is embedded.", default=""),
        **_MODEL,
        **_LOADING,
    },
    {"prompt": "one"},
)
SHOW: Final = Body(
    {
        **_NAME,
        "verbose": ignored(BOOLEAN, "Checked and ignored: lists such as the vocabulary are never shown."),
        "system": ignored(STRING, "Checked and ignored."),
        "options": field(
            OBJECT, "Checked and ignored.", check=json_in.check_object, default_text="ignored", ignored=True
        ),
    },
    {},
)
PULL: Final = Body(
    {
        **_NAME,
        "stream": field(BOOLEAN, "Answer line by line.", default=True),
        "insecure": ignored(BOOLEAN, "Checked and ignored."),
    },
    {},
)
