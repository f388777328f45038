"""What a caller asks for: frozen values, checked once when they are made.

Every check raises `InvalidRequest` with `param` set to the field's name, so that a bad request never reaches a slot.
The bounds are generous for people and tight for machines: each keeps a value away from something in llama.cpp that
aborts, allocates without limit, or quietly samples rubbish.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

from trio_runner.errors import InvalidRequest
from trio_runner.image_source import ImageSource, is_image_source

MAX_TEXT_BYTES = 4 << 20
"""Bytes of one prompt or content, which are refused before they are tokenised: that takes seconds per megabyte."""
MAX_STOP_STRINGS = 64
MAX_STOP_BYTES = 1024
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 100
MAX_DRY_BREAKERS = 16
MAX_DRY_BREAKER_BYTES = 64
MAX_GRAMMAR_BYTES = 64 * 1024
MAX_WINDOW = 1 << 20
"""Tokens a repetition penalty may look back; llama.cpp allocates the window at once."""

MAX_IMAGES = 16
"""Of one prompt."""
MAX_ADAPTERS = 16
"""That one request may choose."""
MAX_ADAPTER_SCALE = 1e3
MAX_ADAPTER_NAME_BYTES = 256
"""No adapter has a name as long as that, and a refusal repeats it."""
MAX_DOCUMENTS = 4096
"""To be ranked by one request, or texts to be embedded."""

MAX_DEADLINE = 86400 * 365.0
"""Seconds."""
Priority: TypeAlias = Literal["interactive", "background"]

RANDOM_SEED = 0xFFFFFFFF
"""The seed that means "choose one", as in llama.cpp."""


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(f"{name} must be a number, not {type(value).__name__}", param=name)
    if not low <= value <= high:  # NaN is in no range
        raise InvalidRequest(f"{name} must be between {low:g} and {high:g}, not {_shown(value)}", param=name)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer, not {type(value).__name__}", param=name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low} and {high}, not {_shown(value)}", param=name)


def _shown(value: float) -> str:
    """`value` for a message: Python refuses to print integers of some thousand digits."""
    return "a huge number" if isinstance(value, int) and value.bit_length() > 64 else str(value)


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, not {type(value).__name__}", param=name)


def _check_text(name: str, value: object, max_bytes: int | None = None) -> None:
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a string, not {type(value).__name__}", param=name)
    try:
        n_bytes = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name} contains half of a surrogate pair, which is no character", param=name) from None
    if max_bytes is not None and n_bytes > max_bytes:
        raise InvalidRequest(f"{name} has {n_bytes} bytes, but at most {max_bytes} are allowed", param=name)


def _check_list(name: str, value: object, max_items: int) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        raise InvalidRequest(f"{name} must be a list, not {type(value).__name__}", param=name)
    if len(value) > max_items:
        raise InvalidRequest(f"{name} may have at most {max_items} entries, not {len(value)}", param=name)
    return tuple(value)


def _check_content(name: str, value: object) -> None:
    if isinstance(value, str):
        _check_text(name, value)
    elif isinstance(value, tuple):
        for token in value:
            _check_int(name, token, 0, 2**31 - 1)
    else:
        raise InvalidRequest(f"{name} must be text or a list of tokens, not {type(value).__name__}", param=name)


def _check_prompt(name: str, value: object) -> None:
    if isinstance(value, Chat):
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
    """An adapter of the engine by its name, and how strongly it applies; 0 not at all."""

    name: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_text("adapters.name", self.name, MAX_ADAPTER_NAME_BYTES)
        _check_number("adapters.scale", self.scale, -MAX_ADAPTER_SCALE, MAX_ADAPTER_SCALE)


def _check_adapters(value: object) -> tuple[AdapterChoice, ...] | None:
    if value is None:
        return None
    choices = _check_list("adapters", value, MAX_ADAPTERS)
    for choice in choices:
        if not isinstance(choice, AdapterChoice):
            raise InvalidRequest("adapters must be a list of AdapterChoice", param="adapters")
    if len({choice.name for choice in choices}) < len(choices):
        raise InvalidRequest("adapters names one of them twice", param="adapters")
    return choices


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation, which the chat template in the model's file makes a prompt of; see `core.chat`."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    documents: tuple[Mapping[str, Any], ...] | None = None
    add_generation_prompt: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template."""

    def __post_init__(self) -> None:
        if isinstance(self.messages, (str, bytes, Mapping)) or not isinstance(self.messages, Sequence):
            raise InvalidRequest("messages must be a list", param="messages")
        object.__setattr__(self, "messages", tuple(self.messages))


Part: TypeAlias = str | ImageSource
Prompt: TypeAlias = str | tuple[int, ...] | tuple[Part, ...] | Chat


_FLOATS: dict[str, tuple[float, float]] = {
    "temperature": (-1e6, 1e6),
    "dynatemp_range": (0, 1e6),
    "dynatemp_exponent": (0, 1e3),
    "top_p": (0, 1e6),
    "min_p": (0, 1),
    "typical_p": (0, 1e6),
    "tfs_z": (0, 1e6),
    "top_n_sigma": (-1, 1e6),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "repeat_penalty": (1e-3, 1e3),
    "frequency_penalty": (-1e3, 1e3),
    "presence_penalty": (-1e3, 1e3),
    "dry_multiplier": (0, 1e3),
    "dry_base": (1, 1e3),
    "mirostat_tau": (0, 1e3),
    "mirostat_eta": (0, 1e3),
}

_INTS: dict[str, tuple[int, int]] = {
    "top_k": (-(2**31), 2**31 - 1),
    "repeat_last_n": (-1, MAX_WINDOW),
    "dry_allowed_length": (1, MAX_WINDOW),
    "dry_penalty_last_n": (-1, MAX_WINDOW),
    "mirostat": (0, 2),
    "seed": (0, RANDOM_SEED),
    "logprobs": (-1, MAX_LOGPROBS),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. The order in which the samplers run is the order of the fields.

    A sampler is off at the value its comment gives. Raises `InvalidRequest` for a value outside its range.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit); negative infinity forbids the token."""
    repeat_last_n: int = 64
    """Tokens the three penalties look back on, prompt included; 0 off, -1 the whole context."""
    repeat_penalty: float = 1.1  # 1
    frequency_penalty: float = 0.0  # 0
    presence_penalty: float = 0.0  # 0
    penalize_nl: bool = True
    dry_multiplier: float = 0.0  # 0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    top_n_sigma: float = -1.0  # -1
    top_k: int = 40  # 0 and below
    tfs_z: float = 1.0  # 1 and above
    typical_p: float = 1.0  # 1 and above
    top_p: float = 0.9  # 1 and above
    min_p: float = 0.0  # 0
    xtc_probability: float = 0.0  # 0
    xtc_threshold: float = 0.1
    temperature: float = 0.8
    """0 and below: always the most probable token."""
    dynatemp_range: float = 0.0  # 0
    dynatemp_exponent: float = 1.0
    mirostat: int = 0
    """1 or 2 replaces every truncating sampler, from top_n_sigma to xtc, by that version of Mirostat."""
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int = RANDOM_SEED
    grammar: str = ""
    """GBNF with a rule `root`; a token that the rest of the samplers chose against it is chosen anew under it."""
    logprobs: int = -1
    """Alternatives to report with every token; 0 only the chosen token's own, -1 nothing."""

    def __post_init__(self) -> None:
        for name, (low, high) in _FLOATS.items():
            _check_number(name, getattr(self, name), low, high)
        for name, (int_low, int_high) in _INTS.items():
            _check_int(name, getattr(self, name), int_low, int_high)
        _check_bool("penalize_nl", self.penalize_nl)
        _check_text("grammar", self.grammar, MAX_GRAMMAR_BYTES)
        if "\0" in self.grammar:
            raise InvalidRequest("grammar must not contain a NUL character", param="grammar")
        # Lists are taken as tuples: a frozen value does not change when the caller's list does.
        pairs = [
            _check_list("logit_bias", pair, 2) for pair in _check_list("logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
        ]
        object.__setattr__(self, "logit_bias", tuple(pairs))
        for pair in pairs:
            if len(pair) != 2:
                raise InvalidRequest("logit_bias must be a list of (token, bias)", param="logit_bias")
            token, bias = pair
            _check_int("logit_bias", token, 0, 2**31 - 1)
            if bias != -math.inf:
                _check_number("logit_bias", bias, -1e6, 1e6)
        breakers = _check_list("dry_sequence_breakers", self.dry_sequence_breakers, MAX_DRY_BREAKERS)
        object.__setattr__(self, "dry_sequence_breakers", breakers)
        for breaker in breakers:
            _check_text("dry_sequence_breakers", breaker, MAX_DRY_BREAKER_BYTES)
            if not breaker or "\0" in breaker:
                raise InvalidRequest(
                    "dry_sequence_breakers must not be empty or contain NUL", param="dry_sequence_breakers"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Text to continue, and when to stop. Raises `InvalidRequest` for a value outside its range."""

    prompt: Prompt
    """Text, or tokens, or a mixture of texts and images, or a conversation."""
    image_data: tuple[tuple[int, ImageSource], ...] = ()
    """(N, image): what `[img-N]` stands for in a prompt that is text."""
    adapters: tuple[AdapterChoice, ...] | None = None
    """None: all that the engine has, at the scales it was given for them."""
    max_tokens: int | None = None
    """Exactly so many tokens at most; None goes on until the model ends or the context is full."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these to be completed in the text; empty strings are ignored."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    cache_prompt: bool = True
    """Go on from the longest prefix of the prompt that some slot still holds."""
    n_keep: int = 4
    """Tokens at the start that truncation and context shift leave in place, after BOS; below 0: the whole prompt."""
    shift: bool = True
    """A full context drops its older half after n_keep and goes on; False ends the generation with "length"."""
    truncate: bool = False
    """A prompt longer than the context loses its middle; False refuses it with `PromptTooLong`."""
    parse_special: bool = True
    """Read special tokens such as <|im_end|> in the prompt's text as what they are."""
    progress: bool = False
    """Send `PromptProgress` events."""
    priority: Priority = "interactive"
    """"background": interactive requests go first in the queue, and may take its slot; it goes on later, and loses
    nothing of its text."""
    deadline: float | None = None
    """Seconds from the start of the request, waiting included, after which it ends with the text it has."""

    def __post_init__(self) -> None:
        _check_prompt("prompt", self.prompt)
        object.__setattr__(self, "image_data", _check_list("image_data", self.image_data, MAX_IMAGES))
        for index, pair in enumerate(self.image_data):
            if not isinstance(pair, tuple) or len(pair) != 2 or not is_image_source(pair[1]):
                raise InvalidRequest(f"image_data[{index}] must be (id, image)", param="image_data")
            _check_int(f"image_data[{index}].id", pair[0], 0, 2**31 - 1)
        if self.image_data and not isinstance(self.prompt, str):
            raise InvalidRequest("image_data is for a prompt of text: others have their images in them", param="prompt")
        object.__setattr__(self, "adapters", _check_adapters(self.adapters))
        if not isinstance(self.sampling, SamplingParams):
            raise InvalidRequest("sampling must be SamplingParams", param="sampling")
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_int("n_keep", self.n_keep, -(2**31), 2**31 - 1)
        object.__setattr__(self, "stop", _check_list("stop", self.stop, MAX_STOP_STRINGS))
        for stop in self.stop:
            _check_text("stop", stop, MAX_STOP_BYTES)
        for name in ("cache_prompt", "shift", "truncate", "parse_special", "progress"):
            _check_bool(name, getattr(self, name))
        if self.priority not in ("interactive", "background"):
            raise InvalidRequest('priority must be "interactive" or "background"', param="priority")
        if self.deadline is not None:
            _check_number("deadline", self.deadline, 0.001, MAX_DEADLINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """Text to turn into one vector. Raises `InvalidRequest` for a value of the wrong type."""

    content: str | tuple[int, ...]
    normalize: bool = False
    """Scale the vector to length 1."""
    dimensions: int | None = None
    """Only so many elements, the first ones, for models that were trained for it; before it is normalised."""
    truncate: bool = False
    """A text that is too long loses its end; False refuses it with `PromptTooLong`."""
    adapters: tuple[AdapterChoice, ...] | None = None
    """As in `GenerateRequest`."""

    def __post_init__(self) -> None:
        _check_content("content", self.content)
        _check_bool("normalize", self.normalize)
        _check_bool("truncate", self.truncate)
        if self.dimensions is not None:
            _check_int("dimensions", self.dimensions, 1, 2**31 - 1)
        object.__setattr__(self, "adapters", _check_adapters(self.adapters))


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankRequest:
    """Documents to score by how well each answers a query. Raises `InvalidRequest` for a value of the wrong type."""

    query: str
    documents: tuple[str, ...]
    truncate: bool = False
    """A document that is too long, together with the query, loses its end."""
    adapters: tuple[AdapterChoice, ...] | None = None

    def __post_init__(self) -> None:
        _check_text("query", self.query, MAX_TEXT_BYTES)
        object.__setattr__(self, "documents", _check_list("documents", self.documents, MAX_DOCUMENTS))
        for index, document in enumerate(self.documents):
            _check_text(f"documents[{index}]", document, MAX_TEXT_BYTES)
        _check_bool("truncate", self.truncate)
        object.__setattr__(self, "adapters", _check_adapters(self.adapters))


def as_prompt(value: str | Chat | Sequence[int | Part]) -> Prompt:
    """Text and conversations unchanged; any other sequence as a tuple, ready for a request."""
    return value if isinstance(value, (str, Chat)) else cast(Prompt, tuple(value))
