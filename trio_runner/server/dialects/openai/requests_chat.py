"""The body of POST /v1/chat/completions. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from trio_runner.errors import InvalidRequest, Unsupported
from trio_runner.request import Chat
from trio_runner.sampling import MAX_LOGPROBS
from trio_runner.server.dialects import json_in
from trio_runner.server.dialects.fields import BOOLEAN, OBJECT, STRING, Body, array, either, field, ignored
from trio_runner.server.dialects.json_in import Object, check_object, fold, wrong
from trio_runner.server.dialects.openai import requests_messages
from trio_runner.server.dialects.openai.requests import (
    EXTRAS,
    GENERATION,
    HARMLESS,
    Asked,
    bounded_integer,
    check_items,
    check_word,
    generations,
    schema_text,
)
from trio_runner.server.dialects.places import naming, places_of_variables

RESERVED: Final = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "now")
"""Variables that every chat template gets, so that a request cannot define them."""
ANY_OBJECT: Final = '{"type":"object"}'
"""The schema of `json_object`."""


def _tools(name: str, value: Any) -> tuple[Any, ...]:
    return check_items(name, value, "objects", check_object)


def _choice(name: str, value: Any) -> Any:
    if not isinstance(value, (str, Object)):
        wrong(name, "a string or an object", value)
    return value


def _modalities(name: str, value: Any) -> tuple[Any, ...]:
    wanted = check_items(name, value, "strings", json_in.check_text)
    if set(wanted) - {"text"}:
        raise Unsupported("modalities", f'{name} must be ["text"]: this server writes nothing else', param=name)
    return wanted


def _refused(name: str, value: Any) -> None:
    raise Unsupported(name, f"{name}: this server cannot do that", param=name)


def _variables(name: str, value: Any) -> Object:
    variables = check_object(name, value)
    for variable in variables:
        if variable in RESERVED:
            raise InvalidRequest(f"{name}.{variable} is what every chat template gets", param=f"{name}.{variable}")
        if variable.startswith("_") or not variable.isidentifier():
            raise InvalidRequest(f"{name}: {variable[:40]!a} is no name of a variable", param=name)
    return variables


def _response_format(name: str, value: Any) -> tuple[str, str]:
    """The path of the schema that the answer must obey, and its text; empty if there is none."""
    given = fold(check_object(name, value))
    if "type" not in given:
        raise InvalidRequest(f"{name}.type is missing", param=f"{name}.type")
    match check_word(f"{name}.type", given["type"], "text", "json_object", "json_schema"):
        case "text":
            return name, ""
        case "json_object":
            place = f"{name}.schema"  # as llama-server and others have it
            return (
                (place, schema_text(place, check_object(place, given["schema"])))
                if "schema" in given
                else (name, ANY_OBJECT)
            )
    place = f"{name}.json_schema"
    if "json_schema" not in given:
        raise InvalidRequest(f"{place} is missing", param=place)
    described = fold(check_object(place, given["json_schema"]))
    for text in ("name", "description"):
        json_in.check_text(f"{place}.{text}", described.get(text, ""))
    json_in.check_boolean(f"{place}.strict", described.get("strict", True))
    if "schema" not in described:
        raise InvalidRequest(f"{place}.schema is missing", param=f"{place}.schema")
    place = f"{place}.schema"
    return place, schema_text(place, check_object(place, described["schema"]))


_TOOLS_DOC: Final = (
    "Descriptions of tools. Answers are not searched for tool calls, so a request with tools is refused, unless "
    '{} is `"none"`. Then they are left out of the prompt.'
)

CHAT: Final = Body(
    {
        "messages": field(
            requests_messages.SCHEMA,
            "The conversation. The chat template in the model's file makes a prompt of it.",
            check=requests_messages.check_messages,
            required=True,
        ),
        **GENERATION,
        "max_completion_tokens": field(
            GENERATION["max_tokens"].schema,
            "The newer name of `max_tokens`. It counts if both are given.",
            check=GENERATION["max_tokens"].check,
        ),
        "logprobs": field(BOOLEAN, "Report the log-probability of every token.", default=False),
        "top_logprobs": bounded_integer(
            0, MAX_LOGPROBS, "Number of most probable alternatives to report with every token. Needs `logprobs`."
        ),
        "response_format": field(
            {**OBJECT, "properties": {"type": {**STRING, "enum": ["text", "json_object", "json_schema"]}}},
            '`{"type": "json_schema", "json_schema": {"schema": {...}}}` makes the answer obey a JSON schema, whatever '
            '`strict` says. `{"type": "json_object"}` makes it any JSON object.',
            check=_response_format,
            default_text='`{"type": "text"}`',
        ),
        "tools": field(array(OBJECT), _TOOLS_DOC.format("`tool_choice`"), check=_tools, default_text="none"),
        "tool_choice": field(either(STRING, OBJECT), "See `tools`.", check=_choice),
        "functions": field(array(OBJECT), _TOOLS_DOC.format("`function_call`"), check=_tools, default_text="none"),
        "function_call": field(either(STRING, OBJECT), "See `functions`.", check=_choice),
        "reasoning_effort": field(STRING, "A variable of the chat template, for models that read it."),
        "chat_template_kwargs": field(
            OBJECT, "Further variables of the chat template, such as `enable_thinking`.", check=_variables
        ),
        "modalities": field(array(STRING), 'Only `["text"]`.', check=_modalities, default_text='`["text"]`'),
        "audio": field(OBJECT, "Refused: this server writes only text.", check=_refused),
        "web_search_options": field(OBJECT, "Refused: nothing is searched.", check=_refused),
        **EXTRAS,
        **HARMLESS,
        "parallel_tool_calls": ignored(BOOLEAN, "Accepted and ignored; see `tools`."),
        "verbosity": ignored(STRING, "Accepted and ignored: no model here reads it."),
        "prediction": field(
            OBJECT,
            "Accepted and ignored: a prediction changes only the speed.",
            check=check_object,
            default_text="ignored",
            ignored=True,
        ),
    },
    {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 16},
)


def chat(body: bytes) -> Asked:
    """What the body of POST /v1/chat/completions asks for."""
    given = CHAT.read(body)
    _refuse_tools(given, "tools", "tool_choice")
    _refuse_tools(given, "functions", "function_call")
    top = given.get("top_logprobs")
    if top and not given.get("logprobs"):
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    variables = dict(given.get("chat_template_kwargs", {}))
    if "reasoning_effort" in given:
        variables.setdefault("reasoning_effort", given["reasoning_effort"])
    prompt = Chat(messages=given["messages"], variables=variables)
    n_top = (top or 0) if given.get("logprobs") else -1
    place, schema = given.get("response_format", ("", ""))
    if schema and (given.get("grammar") or given.get("json_schema")):
        message = "response_format cannot be combined with grammar or json_schema"
        raise InvalidRequest(message, param="response_format")
    places = {"json_schema": place} if schema else {}
    places |= places_of_variables(given.get("chat_template_kwargs", ()), CHAT.fields)
    forced = {"json_schema": schema} if schema else {}
    with naming(places):
        requests = generations(given, (prompt,), logprobs=n_top, **forced)
    return Asked(
        generations=requests,
        places=places,
        n_top=n_top,
        n=given.get("n", 1),
        model=given.get("model"),
        stream=given.get("stream", False),
        include_usage=given.get("stream_options", False),
    )


def _refuse_tools(given: Mapping[str, Any], tools: str, choice: str) -> None:
    if given.get(tools) and given.get(choice) != "none":
        message = (
            f"{tools}: this server does not read tool calls out of answers. Send no {tools}, or {choice} as "
            '"none", which leaves them out of the prompt'
        )
        raise Unsupported("tools", message, param=tools)
