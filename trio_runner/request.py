"""What a caller asks for: frozen values, checked once when they are made.

Every check raises `InvalidRequest` with `param` set to the field's name, so a bad request never takes a slot. The
bounds are wide for people and tight for machines: each keeps a value away from something in llama.cpp that aborts,
allocates without limit, or silently samples nonsense. `sampling.py` has the parameters of sampling.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

from trio_runner.errors import InvalidRequest
from trio_runner.image_source import ImageSource, is_image_source
from trio_runner.json_schema import schema_text
from trio_runner.parameters import (
    boolean,
    first_complaint,
    integer,
    integer_complaint,
    number,
    number_complaint,
    one_of,
    other,
    parameters_of,
    text_complaint,
)
from trio_runner.sampling import MAX_LOGPROBS, SamplingParams, as_tuple

MAX_TEXT_BYTES = 4 << 20
"""Bytes of one prompt or content. Longer ones are refused before tokenising, which takes seconds per megabyte."""
MAX_STOP_STRINGS = 64
"""Stop strings of one request."""
MAX_STOP_BYTES = 1024
"""Bytes of one stop string."""
MAX_IMAGES = 16
"""Images of one prompt."""
MAX_ADAPTERS = 16
"""Adapters that one request may choose."""
MAX_ADAPTER_SCALE = 1e3
"""Largest scale of an adapter, and smallest if negative."""
MAX_ADAPTER_NAME_BYTES = 256
"""Bytes of an adapter's name in a request. No adapter has so long a name, and the error repeats it."""
MAX_DOCUMENTS = 4096
"""Documents that one request may rank, or texts that it may embed."""
MAX_EXTRA_FILES = 256
"""Other files that come with a gap to fill."""
MAX_FILE_NAME_BYTES = 1024
"""Bytes of the name of such a file."""
MAX_DEADLINE = 86400 * 365.0
"""Seconds of the longest deadline: a year."""

Priority: TypeAlias = Literal["interactive", "background"]


def _refuse(complaint: str | None, param: str) -> None:
    if complaint is not None:
        raise InvalidRequest(complaint, param=param)


def _check_parameters(request: object) -> None:
    complaint = first_complaint(request)
    if complaint is not None:
        raise InvalidRequest(complaint[1], param=complaint[0])


def _check_int(name: str, value: object, low: int, high: int) -> None:
    _refuse(integer_complaint(name, value, low, high), name)


def _check_text(name: str, value: object, max_bytes: int | None = None) -> None:
    _refuse(text_complaint(name, value, max_bytes), name)


def _check_content(name: str, value: object) -> None:
    if isinstance(value, str):
        _check_text(name, value)
    elif isinstance(value, tuple):
        for token in value:
            _check_int(name, token, 0, 2**31 - 1)
    else:
        raise InvalidRequest(f"{name} must be text or a list of tokens, not {type(value).__name__}", param=name)


def _check_prompt(name: str, value: object) -> None:
    if isinstance(value, (Chat, Infill)):
        return
    if not isinstance(value, tuple) or all(isinstance(part, int) for part in value):
        _check_content(name, value)
        return
    for index, part in enumerate(value):
        if isinstance(part, str):
            _check_text(f"{name}[{index}]", part)
        elif not is_image_source(part):
            raise InvalidRequest(f"{name}[{index}] must be text or an image, not {type(part).__name__}", param=name)
    n_images = sum(not isinstance(part, str) for part in value)
    if n_images > MAX_IMAGES:
        raise InvalidRequest(f"{name} has {n_images} images, but at most {MAX_IMAGES} are allowed", param=name)


@dataclass(frozen=True, slots=True)
class AdapterChoice:
    """An adapter of the engine by its name, and how strongly it applies. At scale 0 it does not apply."""

    name: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_text("adapters.name", self.name, MAX_ADAPTER_NAME_BYTES)
        _refuse(number_complaint("adapters.scale", self.scale, -MAX_ADAPTER_SCALE, MAX_ADAPTER_SCALE), "adapters.scale")


def _check_adapters(value: object) -> tuple[AdapterChoice, ...] | None:
    if value is None:
        return None
    choices = as_tuple("adapters", value, MAX_ADAPTERS)
    for choice in choices:
        if not isinstance(choice, AdapterChoice):
            raise InvalidRequest("adapters must be a list of AdapterChoice", param="adapters")
    if len({choice.name for choice in choices}) < len(choices):
        raise InvalidRequest("adapters names one of them twice", param="adapters")
    return choices


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation. The chat template in the model's file makes a prompt of it; see `core.chat`."""

    messages: tuple[Mapping[str, Any], ...]
    """The messages, each with `role` and `content`, and whatever else the template reads."""
    tools: tuple[Mapping[str, Any], ...] | None = None
    """Descriptions of tools that the model may call, as the template expects them."""
    documents: tuple[Mapping[str, Any], ...] | None = None
    """Documents to answer from, as the template expects them."""
    add_generation_prompt: bool = True
    """End the prompt with what begins an answer of the assistant."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template."""

    def __post_init__(self) -> None:
        if isinstance(self.messages, (str, bytes, Mapping)) or not isinstance(self.messages, Sequence):
            raise InvalidRequest("messages must be a list", param="messages")
        object.__setattr__(self, "messages", tuple(self.messages))


@dataclass(frozen=True, slots=True, kw_only=True)
class Infill:
    """A gap in a text that is to be filled. Only for models with tokens for it; see `ModelInfo.can_infill`."""

    prefix: str
    """The text before the gap."""
    suffix: str
    """The text behind the gap."""
    prompt: str = ""
    """What the filling begins with, such as the line up to the cursor. It is never shortened."""
    extra: tuple[tuple[str, str], ...] = ()
    """Other files of the same project, as pairs of a name and a text."""

    def __post_init__(self) -> None:
        for name in ("prefix", "suffix", "prompt"):
            _check_text(name, getattr(self, name), MAX_TEXT_BYTES)
        object.__setattr__(self, "extra", as_tuple("extra", self.extra, MAX_EXTRA_FILES))
        for index, pair in enumerate(self.extra):
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise InvalidRequest(f"extra[{index}] must be (name, text)", param="extra")
            _check_text(f"extra[{index}].name", pair[0], MAX_FILE_NAME_BYTES)
            _check_text(f"extra[{index}].text", pair[1], MAX_TEXT_BYTES)
        texts = (self.prefix, self.suffix, self.prompt, *(text for _, text in self.extra))
        n_bytes = sum(len(text.encode()) for text in texts)
        if n_bytes > MAX_TEXT_BYTES:
            names = "prefix, suffix, prompt and extra"
            raise InvalidRequest(
                f"{names} have {n_bytes} bytes together, but at most {MAX_TEXT_BYTES} are allowed", param="extra"
            )


Part: TypeAlias = str | ImageSource
Prompt: TypeAlias = str | tuple[int, ...] | tuple[Part, ...] | Chat | Infill


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A prompt to continue, and when to stop.

    Raises `InvalidRequest`, which names the field, for a value outside its bounds.
    """

    prompt: Prompt
    """Text, or tokens, or a list of texts and images, or a conversation, or a gap in a text."""
    image_data: tuple[tuple[int, ImageSource], ...] = other(
        (), doc="Pairs of a number N and an image, which stands where a prompt that is text has `[img-N]`."
    )
    adapters: tuple[AdapterChoice, ...] | None = other(
        None,
        doc="LoRA adapters to apply. Without it, all adapters apply at the scales they were loaded with; an empty list "
        "means the bare model.",
    )
    max_tokens: int | None = integer(
        None,
        0,
        2**31 - 1,
        doc="Tokens to generate at most. 0 only decodes the prompt, so that later requests find it in the cache. "
        "Without it, generation goes on until the model ends it, or, with `shift` off, until the context is full.",
    )
    stop: tuple[str, ...] = other(
        (),
        doc="Generation ends before the first of these texts to be completed. Empty texts are ignored.",
    )
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How tokens are chosen."""
    cache_prompt: bool = boolean(
        True,
        doc="Continue from the longest beginning of the prompt that a slot still holds, instead of decoding it again. "
        "On by default in Python and on the command line. The HTTP endpoints of the runner dialect have it off unless "
        "the request says so, as the original had.",
    )
    share_prompt: bool = boolean(
        False,
        doc="Wait for a running request that decodes the same beginning of the prompt, however short it is, and then "
        "continue from there. For several answers to one prompt, which is then decoded once. `cache_prompt` has no "
        "effect beside it. With recurrent state, which cannot be copied in part, each request decodes its own prompt.",
    )
    preferred_slot: int | None = integer(
        None,
        0,
        2**31 - 1,
        doc="Number of the slot to take if it is free: below `slots` of the engine. Otherwise the request takes "
        "another one.",
    )
    n_keep: int = integer(
        4,
        -(2**31),
        2**31 - 1,
        doc="Tokens at the start of the prompt, after BOS, that truncation and context shift leave in place. Below 0 "
        "means the whole prompt.",
    )
    shift: bool = boolean(
        True,
        doc="When the context is full, drop the older half after `n_keep` and go on. Otherwise generation ends there.",
    )
    truncate: bool = boolean(
        False,
        doc="Shorten a prompt that is longer than the context. Otherwise it is refused. Text loses its middle. A "
        "conversation loses its oldest messages, but never system messages or the last one. A gap to fill loses what "
        "is far from it.",
    )
    parse_special: bool = boolean(
        True, doc="Read special tokens such as `<|im_end|>` in the text of the prompt as the tokens they name."
    )
    progress: bool = boolean(False, doc="Report how much of the prompt is decoded, as `PromptProgress` events.")
    prompt_logprobs: int = integer(
        -1,
        -1,
        MAX_LOGPROBS,
        doc="Number of most probable alternatives to report with every token of the prompt but the first, in "
        "`Finished`. 0 reports the log-probability of the prompt's own token, -1 reports nothing. To report them, the "
        "whole prompt is decoded anew, whatever is in the cache.",
    )
    priority: Priority = one_of(
        "interactive",
        ("interactive", "background"),
        doc="Interactive requests go before background requests in the queue, and may take over the slot of one. The "
        "background request goes on later and loses nothing of its text.",
    )
    deadline: float | None = number(
        None,
        0.001,
        MAX_DEADLINE,
        unit="seconds",
        doc="Seconds from the start of the request, waiting included, after which it ends with the text it has.",
    )
    decode_seconds: float | None = number(
        None,
        0.001,
        MAX_DEADLINE,
        unit="seconds",
        doc="Seconds from the first token after which generation ends with the text it has. The time that the prompt "
        "takes does not count.",
    )

    def __post_init__(self) -> None:
        _check_prompt("prompt", self.prompt)
        object.__setattr__(self, "image_data", as_tuple("image_data", self.image_data, MAX_IMAGES))
        for index, pair in enumerate(self.image_data):
            if not isinstance(pair, tuple) or len(pair) != 2 or not is_image_source(pair[1]):
                raise InvalidRequest(f"image_data[{index}] must be (id, image)", param="image_data")
            _check_int(f"image_data[{index}].id", pair[0], 0, 2**31 - 1)
        if self.image_data and not isinstance(self.prompt, str):
            raise InvalidRequest("image_data is for a prompt of text: others have their images in them", param="prompt")
        object.__setattr__(self, "adapters", _check_adapters(self.adapters))
        if not isinstance(self.sampling, SamplingParams):
            raise InvalidRequest("sampling must be SamplingParams", param="sampling")
        object.__setattr__(self, "stop", as_tuple("stop", self.stop, MAX_STOP_STRINGS))
        for stop in self.stop:
            _check_text("stop", stop, MAX_STOP_BYTES)
        _check_parameters(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """A text to embed. Raises `InvalidRequest`, which names the field, for a value outside its bounds."""

    content: str | tuple[int, ...]
    """Text, or tokens."""
    normalize: bool = boolean(False, doc="Scale the embedding to Euclidean length 1.")
    dimensions: int | None = integer(
        None,
        1,
        2**31 - 1,
        doc="Keep only the first N elements of the embedding, for models that were trained for it. Normalising comes "
        "after it.",
    )
    truncate: bool = boolean(False, doc="Cut off the end of a text that is too long. Otherwise it is refused.")
    adapters: tuple[AdapterChoice, ...] | None = other(
        None, doc="LoRA adapters to apply. Without it, all adapters apply at the scales they were loaded with."
    )

    def __post_init__(self) -> None:
        _check_content("content", self.content)
        _check_parameters(self)
        object.__setattr__(self, "adapters", _check_adapters(self.adapters))


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankRequest:
    """Documents to score by how well each of them answers a query.

    Raises `InvalidRequest`, which names the field, for a value outside its bounds.
    """

    query: str
    documents: tuple[str, ...]
    truncate: bool = boolean(
        False, doc="Cut off the end of a document that is too long together with the query. Otherwise it is refused."
    )
    adapters: tuple[AdapterChoice, ...] | None = other(
        None, doc="LoRA adapters to apply. Without it, all adapters apply at the scales they were loaded with."
    )

    def __post_init__(self) -> None:
        _check_text("query", self.query, MAX_TEXT_BYTES)
        object.__setattr__(self, "documents", as_tuple("documents", self.documents, MAX_DOCUMENTS))
        for index, document in enumerate(self.documents):
            _check_text(f"documents[{index}]", document, MAX_TEXT_BYTES)
        _check_parameters(self)
        object.__setattr__(self, "adapters", _check_adapters(self.adapters))


def as_prompt(value: str | Chat | Infill | Sequence[int | Part]) -> Prompt:
    """The prompt of a request: a list of tokens or of texts and images as a tuple, everything else unchanged.

    Raises `InvalidRequest` for bytes, which would be taken for a list of tokens, and for other values that are no such
    list.
    """
    if isinstance(value, (str, Chat, Infill)):
        return value
    if isinstance(value, (bytes, bytearray, memoryview, Mapping, Set)) or not isinstance(value, Iterable):
        kind = type(value).__name__
        raise InvalidRequest(
            f"prompt must be text, a list of tokens, or a list of texts and images, not {kind}", param="prompt"
        )
    return cast(Prompt, tuple(value))


def make_request(prompt: Prompt, options: Mapping[str, Any]) -> GenerateRequest:
    """A request from a prompt and the fields of `GenerateRequest` and `SamplingParams` by name. `stop` may be one text,
    and `json_schema` an object or a class.

    Raises `InvalidRequest` for a value outside its bounds, and TypeError for a name that is no field.
    """
    given = dict(options)
    sampling = {name: given.pop(name) for name in parameters_of(SamplingParams) if name in given}
    if sampling and "sampling" in given:
        raise TypeError(f"give either sampling or its fields by name: {', '.join(sorted(sampling))}")
    if "json_schema" in sampling:
        sampling["json_schema"] = schema_text(sampling["json_schema"])
    if sampling:
        given["sampling"] = SamplingParams(**sampling)
    if "stop" in given:
        stop = given["stop"]
        given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return GenerateRequest(prompt=prompt, **given)
