"""The dialect of Ollama's Go runner: bytes on the wire <-> requests and events. Pure.

Rules of the wire, from Go's encoding/json:
Rule 1: only the first JSON value of a body is read; what follows it is ignored.
Rule 2: names of fields match in any case, unknown ones are ignored, null leaves the default, the last duplicate wins.
Rule 3: an integer is written as one (1.0 and 1e3 are not), and true is not 1.
Rule 4: each answer is one compact line, with <, >, &, U+2028 and U+2029 escaped.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import msgspec
import numpy as np

from trio_runner.errors import EngineBusy, InvalidImage, InvalidRequest, LoadError, RequestError, RunnerError
from trio_runner.events import Embedded, Event, Finished, PromptProgress, SampledToken, TextPiece, TokenInfo, Usage
from trio_runner.image_source import MAX_IMAGE_BYTES
from trio_runner.request import (
    MAX_ADAPTER_SCALE,
    MAX_DOCUMENTS,
    MAX_IMAGES,
    MAX_TEXT_BYTES,
    AdapterChoice,
    EmbedRequest,
    GenerateRequest,
    RerankRequest,
)
from trio_runner.sampling import MAX_LOGPROBS, SamplingParams
from trio_runner.server.problems import Problem, problem, problem_text

if TYPE_CHECKING:
    from trio_runner.info import AdapterInfo, Capabilities, EngineStatistics, ModelInfo, Placement

NO_SEQUENCE = "Failed to create new sequence: "
NO_SLOT = "Failed to load cache: no available cache slots"

# --- JSON in --------------------------------------------------------------------------------------------------------

MAX_VALUES = 1 << 16
"""Lists, objects and strings in one body. The parser is one call into C, in which no other thread may run: it makes
three million of each second. Numbers do not count, for they are made one by one in Python, which lets others run."""

MAX_FILE_NAME_BYTES = 255
"""What file systems allow."""

Check: TypeAlias = Callable[[str, Any], Any]
"""(name of the field, its JSON value) -> the value to use. Raises `InvalidRequest` that names the field."""


_KINDS = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def _wrong(name: str, wanted: str, value: object) -> NoReturn:
    raise InvalidRequest(f"{name} must be {wanted}, not {_KINDS[type(value)]}", param=name)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        _wrong(name, "a string", value)
    try:
        n_bytes = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name} contains half of a surrogate pair, which is no character", param=name) from None
    if n_bytes > MAX_TEXT_BYTES:
        raise InvalidRequest(f"{name} has {n_bytes} bytes, but at most {MAX_TEXT_BYTES} are allowed", param=name)
    return value


def _integer(name: str, value: Any) -> int:
    if type(value) is not int:
        _wrong(name, "an integer", value)
    if not -(2**63) <= value < 2**63:
        raise InvalidRequest(f"{name} must fit in 64 bits", param=name)
    return value


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float):
        _wrong(name, "a number", value)
    return float(value)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        _wrong(name, "true or false", value)
    return value


def _list_of(check: Check, what: str) -> Check:
    def check_list(name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            _wrong(name, f"a list of {what}", value)
        return tuple(check(name, item) for item in value)

    return check_list


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        _wrong(name, "a list of integers", value)
    for token in value:  # of which there may be millions
        if type(token) is not int:
            _wrong(name, "an integer", token)
        if not 0 <= token < 2**31:
            raise InvalidRequest(f"{name} must be between 0 and 2147483647", param=name)
    return tuple(value)


def _go_text(name: str, value: Any) -> str:
    return "" if value is None else _text(name, value)  # null in a list is Go's zero value


_BASE64_PIECE = 1 << 20
"""Characters that are decoded in one go, a multiple of four; see `MAX_VALUES`."""


def _image(name: str, value: Any) -> tuple[int, bytes]:
    if not isinstance(value, dict):
        _wrong(name, "an object", value)
    image_id, data = _integer(f"{name}.id", value.get("id", 0)), value.get("data", "")
    if not isinstance(data, str):
        _wrong(f"{name}.data", "a string", data)
    if not data:
        raise InvalidImage(f"{name}.data is empty", param=f"{name}.data")
    if len(data) > MAX_IMAGE_BYTES * 3 // 2:  # with line breaks
        raise InvalidImage(f"{name}.data has more than {MAX_IMAGE_BYTES} bytes", param=f"{name}.data")
    data = data.replace("\r", "").replace("\n", "")
    try:
        pieces = [
            base64.b64decode(data[start : start + _BASE64_PIECE], validate=True)
            for start in range(0, len(data), _BASE64_PIECE)
        ]
    except ValueError:
        raise InvalidRequest(f"{name}.data must be base64", param=f"{name}.data") from None
    return image_id, b"".join(pieces)


def _images(name: str, value: Any) -> tuple[tuple[int, bytes], ...]:
    if not isinstance(value, list):
        _wrong(name, "a list of objects", value)
    if len(value) > MAX_IMAGES:
        raise InvalidRequest(f"{name} has {len(value)} images, but at most {MAX_IMAGES} are allowed", param=name)
    return tuple(_image(f"{name}[{index}]", item) for index, item in enumerate(value))


def _adapter(name: str, value: Any) -> AdapterChoice:
    if not isinstance(value, dict):
        _wrong(name, "a list of objects", value)
    if "name" not in value:
        raise InvalidRequest(f"{name} must have a name", param=name)
    return AdapterChoice(_text(f"{name}.name", value["name"]), _number(f"{name}.scale", value.get("scale", 1.0)))


def _logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Both [[token, bias], ...] and {"token": bias, ...}; a bias of false forbids the token."""
    if isinstance(value, dict):
        value = [[int(token) if re.fullmatch("[0-9]{1,10}", token) else token, bias] for token, bias in value.items()]
    if not isinstance(value, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in value):
        _wrong(name, "a list of [token, bias] or an object", value)
    return tuple((_integer(name, token), -math.inf if bias is False else _number(name, bias)) for token, bias in value)


def _alternatives(name: str, value: Any) -> int:
    count = _integer(name, value)
    if count > MAX_LOGPROBS:
        raise InvalidRequest(f"{name} must be at most {MAX_LOGPROBS}, not {count}", param=name)
    return max(count, -1)


_SAMPLING: dict[str, Check] = {
    "grammar": _text,
    "penalize_nl": _boolean,
    "logit_bias": _logit_bias,
    "dry_sequence_breakers": _list_of(_text, "strings"),
    **dict.fromkeys(
        ["top_k", "repeat_last_n", "seed", "mirostat", "dry_allowed_length", "dry_penalty_last_n"], _integer
    ),
    **dict.fromkeys(["temperature", "dynatemp_range", "dynatemp_exponent", "mirostat_tau", "mirostat_eta"], _number),
    **dict.fromkeys(["top_p", "min_p", "tfs_z", "typical_p", "top_n_sigma"], _number),
    **dict.fromkeys(["xtc_probability", "xtc_threshold", "dry_multiplier", "dry_base"], _number),
    **dict.fromkeys(["repeat_penalty", "presence_penalty", "frequency_penalty"], _number),
}
"""Fields of the wire that `SamplingParams` has under the same name."""

_MODEL_OPTIONS: dict[str, Check] = {
    **dict.fromkeys(["num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread"], _integer),
    **dict.fromkeys(["low_vram", "f16_kv", "logits_all", "vocab_only", "use_mmap", "use_mlock"], _boolean),
}
"""Sent with every request, but settled when the model was loaded: checked and ignored."""

_COMPLETION: dict[str, Check] = {
    "prompt": _text,
    "image_data": _images,
    "adapters": _list_of(_adapter, "objects"),
    "n_predict": _integer,
    "n_keep": _integer,
    "stop": _list_of(_go_text, "strings"),
    "cache_prompt": _boolean,
    "shift": _boolean,
    "truncate": _boolean,
    "priority": _text,
    "deadline": _number,
    "n_probs": _alternatives,
    "logprobs": _alternatives,
    **_SAMPLING,
    **_MODEL_OPTIONS,
}


def _texts(name: str, value: Any) -> str | tuple[str, ...]:
    """One text, or a list of them."""
    if isinstance(value, str):
        return _text(name, value)
    if not isinstance(value, list):
        _wrong(name, "a string or a list of strings", value)
    return _documents(name, value)


def _documents(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        _wrong(name, "a list of strings", value)
    if len(value) > MAX_DOCUMENTS:
        raise InvalidRequest(f"{name} has {len(value)} texts, but at most {MAX_DOCUMENTS} are allowed", param=name)
    return tuple(_text(f"{name}[{index}]", item) for index, item in enumerate(value))


_EMBEDDING: dict[str, Check] = {
    "content": _texts,
    "cache_prompt": _boolean,
    "normalize": _boolean,
    "truncate": _boolean,
    "dimensions": _integer,
    "adapters": _list_of(_adapter, "objects"),
}
_RERANK: dict[str, Check] = {
    "query": _text,
    "documents": _documents,
    "top_n": _integer,
    "truncate": _boolean,
    "adapters": _list_of(_adapter, "objects"),
}
_ADAPTER: dict[str, Check] = {"file": _text, "name": _text, "scale": _number}
_TOKENIZE: dict[str, Check] = {"content": _text, "add_special": _boolean, "parse_special": _boolean}
_DETOKENIZE: dict[str, Check] = {"tokens": _tokens}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name.casefold(): value for name, value in pairs if value is not None}


def _parse_int(digits: str) -> int | float:
    """Longer ones are out of every range anyway, and Python's own limit on digits would hide which field it was."""
    return int(digits) if len(digits) <= 20 else float(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse_float(digits: str) -> float:
    """`float` itself would make a list of millions of numbers in one go; see `MAX_VALUES`."""
    return float(digits)


_DECODER = json.JSONDecoder(
    parse_int=_parse_int, parse_float=_parse_float, parse_constant=_refuse_constant, object_pairs_hook=_object
)
_SPACE = re.compile(r"[ \t\r\n]*")


def _n_values(body: bytes) -> int:
    """How many lists, objects and strings begin in `body`. Brackets in a string are text, however many."""
    data = np.frombuffer(body.replace(rb"\\", b"").replace(rb"\"", b""), np.uint8)
    quotes = data == ord('"')
    opening = (data == ord("[")) | (data == ord("{"))
    in_text = np.logical_xor.accumulate(quotes)
    return int(np.count_nonzero(opening & ~in_text) + np.count_nonzero(quotes & in_text))


def _decode(body: bytes, fields: Mapping[str, Check], *, refusal: str) -> dict[str, Any]:
    """The known fields of the object that `body` starts with, each checked. `refusal` is said if there is none."""
    if len(body) > MAX_VALUES and (n_values := _n_values(body)) > MAX_VALUES:
        raise InvalidRequest(
            f"the body has {n_values} lists, objects and strings, but at most {MAX_VALUES} are allowed"
        )
    text = body.decode("utf-8", errors="replace")
    space = _SPACE.match(text)
    try:
        value, _ = _DECODER.raw_decode(text, space.end() if space else 0)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(refusal.format(error)) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(refusal.format("the body must be a JSON object"))
    return {name: check(name, value[name]) for name, check in fields.items() if name in value}


# --- Requests -------------------------------------------------------------------------------------------------------


def completion(body: bytes) -> GenerateRequest:
    """The request in the body of POST /completion. Raises `RequestError` that names the field."""
    given = _decode(body, _COMPLETION, refusal="Bad request")
    if not given.get("prompt"):
        raise InvalidRequest(f"{NO_SEQUENCE}no input provided: prompt is empty", param="prompt")
    n_predict = given.get("n_predict", -1)
    return GenerateRequest(
        prompt=given["prompt"],
        image_data=given.get("image_data", ()),
        adapters=given.get("adapters"),
        max_tokens=min(n_predict, 2**31 - 1) if n_predict > 0 else None,
        stop=given.get("stop", ()),
        sampling=_sampling(given),
        cache_prompt=given.get("cache_prompt", False),
        n_keep=max(-1, min(given.get("n_keep", 4), 2**31 - 1)),
        shift=given.get("shift", True),
        truncate=given.get("truncate", True),
        priority=given.get("priority", "interactive"),
        deadline=given.get("deadline"),
    )


def _sampling(given: Mapping[str, Any]) -> SamplingParams:
    params = {name: given[name] for name in _SAMPLING if name in given}
    params["seed"] = params.get("seed", -1) & 0xFFFFFFFF
    if params.get("repeat_last_n", 0) < 0:
        params["repeat_last_n"] = 64
    if "logprobs" in given:
        params["logprobs"] = given["logprobs"]
    elif given.get("n_probs", 0) > 0:
        params["logprobs"] = given["n_probs"]
    return SamplingParams(**params)


def embedding(body: bytes) -> EmbedRequest | tuple[EmbedRequest, ...]:
    """The request in the body of POST /embedding; several, if its content is a list. Raises `RequestError` that names
    the field."""
    given = _decode(body, _EMBEDDING, refusal="bad request: {}")
    content = given.get("content")
    if not content:
        raise InvalidRequest(f"{NO_SEQUENCE}no input provided: content is empty", param="content")

    def request(text: str) -> EmbedRequest:
        return EmbedRequest(
            content=text,
            normalize=given.get("normalize", False),
            truncate=given.get("truncate", False),
            dimensions=given.get("dimensions"),
            adapters=given.get("adapters"),
        )

    return request(content) if isinstance(content, str) else tuple(map(request, content))


def rerank(body: bytes) -> tuple[RerankRequest, int | None]:
    """The request in the body of POST /rerank, and how many of the best are wanted. Raises `RequestError` that names
    the field."""
    given = _decode(body, _RERANK, refusal="bad request: {}")
    for name in ("query", "documents"):
        if not given.get(name):
            raise InvalidRequest(f"{name} is missing or empty", param=name)
    top_n: int | None = given.get("top_n")
    if top_n is not None and top_n < 1:
        raise InvalidRequest(f"top_n must be 1 or more, not {top_n}", param="top_n")
    request = RerankRequest(
        query=given["query"],
        documents=given["documents"],
        truncate=given.get("truncate", False),
        adapters=given.get("adapters"),
    )
    return request, top_n


def adapter(body: bytes) -> tuple[str, str | None, float]:
    """(file, name, scale) of POST /adapters. Raises `RequestError` that names the field."""
    given = _decode(body, _ADAPTER, refusal="bad request: {}")
    file = given.get("file", "")
    # The name of a file and nothing else: what else is on this machine is none of a client's business.
    if not 0 < len(file.encode()) <= MAX_FILE_NAME_BYTES or file.startswith(".") or set(file) & set("/\\\0"):
        raise InvalidRequest("file must be the name of a file in the directory of adapters", param="file")
    scale = given.get("scale", 0.0)
    if abs(scale) > MAX_ADAPTER_SCALE:
        raise InvalidRequest(
            f"scale must be between {-MAX_ADAPTER_SCALE:g} and {MAX_ADAPTER_SCALE:g}, not {scale}", param="scale"
        )
    return file, given.get("name"), scale


def adapter_problem(error: LoadError, file: str) -> Problem:
    """Of a file that is no adapter for this model; where it stands is not said."""
    reason = error.reason if error.path is None else error.reason.replace(error.path, file)
    return Problem(422, f"file: {file}: {' '.join(reason.split())}")


def tokenize(body: bytes) -> tuple[str, bool, bool]:
    """(text, add_special, parse_special) of POST /tokenize. Raises `RequestError` that names the field."""
    given = _decode(body, _TOKENIZE, refusal="bad request: {}")
    return given.get("content", ""), given.get("add_special", False), given.get("parse_special", True)


def detokenize(body: bytes) -> tuple[int, ...]:
    """The tokens of POST /detokenize. Raises `RequestError` that names the field."""
    tokens: tuple[int, ...] = _decode(body, _DETOKENIZE, refusal="bad request: {}").get("tokens", ())
    return tokens


def not_admitted(error: RunnerError) -> Problem:
    """The problem of a request that was well formed, but got no sequence or no slot, in the words of the original."""
    refusal = problem(error)
    if isinstance(error, EngineBusy):
        return replace(refusal, text=NO_SLOT)
    if isinstance(error, RequestError):
        return replace(refusal, text=NO_SEQUENCE + refusal.text)
    return refusal


# --- JSON out -------------------------------------------------------------------------------------------------------

PIECE = 1 << 16
"""Characters or tokens of a long answer that are written in one go; between two of them other threads may run."""
_LOWEST = -3.4028234663852886e38
"""The lowest float32: what stands for the logarithm of zero, since JSON has no infinity."""


def _quoted(text: str) -> str:
    try:
        quoted = msgspec.json.encode(text).decode()
    except UnicodeEncodeError:  # half of a surrogate pair, which is no character
        quoted = msgspec.json.encode(text.encode(errors="replace").decode()).decode()
    # Five passes, but each at the speed of memchr, while a regular expression calls back for every match.
    quoted = quoted.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")
    return quoted.replace("\u2028", r"\u2028").replace("\u2029", r"\u2029")


def _float32(value: Any) -> str:
    return str(np.float32(value)).removesuffix(".0")


def _timings(usage: Usage, more: str = "") -> str:
    return (
        f'"timings":{{"predicted_n":{usage.completion_tokens},"predicted_ms":{int(usage.completion_seconds * 1000)},'
        f'"prompt_n":{usage.prompt_tokens},"prompt_ms":{int(usage.prompt_seconds * 1000)}{more}}}'
    )


def _token(info: TokenInfo) -> str:
    logprob = info.logprob if info.logprob > _LOWEST else _LOWEST  # NaN compares false
    text = _quoted(info.piece.decode("utf-8", errors="replace"))
    piece = ",".join(map(str, info.piece))
    return f'"id":{info.token},"token":{text},"bytes":[{piece}],"logprob":{_float32(logprob)}'


def _probabilities(tokens: Sequence[SampledToken]) -> str:
    if not tokens:
        return ""
    entries = (
        f'{{{_token(token)},"top_logprobs":[{",".join(f"{{{_token(other)}}}" for other in token.top)}]}}'
        for token in tokens
    )
    return f'"completion_probabilities":[{",".join(entries)}],'


_NO_TIMINGS = _timings(Usage())
_STOPPED = {"length": '"stopped_limit":true,', "deadline": '"stopped_deadline":true,'}


class CompletionLines:
    """Writes the events of one generation as the lines of its answer."""

    def event(self, event: Event) -> bytes:
        match event:
            case PromptProgress():
                return b""
            case TextPiece(text=text, tokens=tokens):
                line = f'{{"content":{_quoted(text)},"stop":false,{_probabilities(tokens)}{_NO_TIMINGS}}}\n'
            case Finished(reason=reason, usage=usage, tokens=tokens):
                timings = _timings(usage, f',"cache_n":{usage.cached_tokens}')
                line = f'{{"content":"","stop":true,{_STOPPED.get(reason, "")}{_probabilities(tokens)}{timings}}}\n'
        return line.encode()

    def failure(self, error: Exception) -> bytes:
        """The last line of an answer that cannot go on: its status is long sent, so the error comes in band."""
        return f'{{"error":{_quoted(problem_text(error))},"content":"","stop":true,{_NO_TIMINGS}}}\n'.encode()


def embedding_line(embedded: Embedded) -> bytes:
    """The answer of /embedding. Raises `RunnerError` if a value is not finite, which JSON cannot say."""
    return f'{{"embedding":{_vector(embedded)}}}\n'.encode()


def embeddings_line(embedded: Sequence[Embedded]) -> bytes:
    """The answer of /embedding to a list. Raises as `embedding_line`."""
    return f'{{"embeddings":[{",".join(map(_vector, embedded))}]}}\n'.encode()


def _vector(embedded: Embedded) -> str:
    vector = np.asarray(embedded.vector, dtype=np.float32)
    if not np.isfinite(vector).all():
        raise RunnerError("the embedding contains a value that is not finite")
    return f"[{','.join(map(str, vector))}]"  # str of a float32 is its shortest form


def rerank_line(scores: Sequence[float], top_n: int | None) -> bytes:
    """The answer of /rerank: the best first, of equal ones the earlier. Raises `RunnerError` if a score is not
    finite."""
    if not np.isfinite(scores).all():
        raise RunnerError("a score is not finite")
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_n]
    results = (f'{{"index":{index},"relevance_score":{_float32(scores[index])}}}' for index in best)
    return f'{{"results":[{",".join(results)}]}}\n'.encode()


def adapters_line(adapters: Sequence[AdapterInfo]) -> bytes:
    """The answer of GET /adapters."""
    return f'{{"adapters":[{",".join(map(_adapter_object, adapters))}]}}\n'.encode()


def adapter_line(info: AdapterInfo) -> bytes:
    """The answer of POST and DELETE /adapters."""
    return _adapter_object(info).encode() + b"\n"


def _adapter_object(info: AdapterInfo) -> str:
    file = _quoted(info.path.replace("\\", "/").rpartition("/")[2])
    return f'{{"name":{_quoted(info.name)},"file":{file},"scale":{_float32(info.scale)}}}'


def tokens_line(tokens: Sequence[int]) -> bytes:
    pieces = (msgspec.json.encode(tokens[i : i + PIECE])[1:-1] for i in range(0, len(tokens), PIECE))
    return b'{"tokens":[%b]}\n' % b",".join(pieces)


def content_line(text: str) -> bytes:
    pieces = (_quoted(text[i : i + PIECE])[1:-1].encode() for i in range(0, len(text), PIECE))
    return b'{"content":"%b"}\n' % b"".join(pieces)


def health_line(status: str, progress: float, failure: BaseException | None = None) -> bytes:
    """The answer of /health for an engine in `status`; `progress` of the load from 0 to 1, `failure` what broke it."""
    error = ""
    if failure is not None:
        # Whoever asks needs no key, and so is not told where files stand.
        reason = failure.reason if isinstance(failure, LoadError) else str(failure)
        error = f',"error":{_quoted(" ".join(reason.split()) or type(failure).__name__)}'
    return f'{{"status":"{_status(status)}","progress":{_float32(progress)}{error}}}\n'.encode()


def health_status(status: str) -> int:
    """The HTTP status of /health. The original has but one, which its server ignores; others go by it: 503 from an
    engine that takes no more requests."""
    return 200 if status in _STATUS else 503


def props_line(info: ModelInfo, capabilities: Capabilities, placement: Placement | None) -> bytes:
    """The answer of /props: what does not change while the engine lives. Memory in bytes."""
    fields: dict[str, object] = {
        "model": {
            "name": info.name,
            "architecture": info.architecture,
            "description": info.description,
            "parameters": info.n_params,
            "bytes": info.size,
        },
        "slots": capabilities.n_slots,
        "context_length": capabilities.n_ctx,
    }
    if placement is not None:
        fields["placement"] = {
            "layers": placement.n_layers,
            "device_layers": placement.n_device_layers,
            "devices": [
                {
                    "name": device.name,
                    "description": device.description,
                    "backend": device.backend,
                    "kind": device.kind,
                    "memory_total": device.memory_total,
                    "memory_free_before": device.memory_free,
                    "memory_used": _used(placement, device.number),
                }
                for device in placement.devices
            ],
            "host": {"memory_used": _used(placement, None)},
        }
    return msgspec.json.encode(fields) + b"\n"


def _used(placement: Placement, device: int | None) -> dict[str, int]:
    use = placement.used(device)
    return {"model": use.model, "context": use.context, "compute": use.compute}


def statistics_line(statistics: EngineStatistics) -> bytes:
    """The answer of /statistics: how full the engine is, and counters that only rise while it lives."""
    scheduler = statistics.scheduler
    fields = {
        "status": _status(statistics.status),
        "slots": statistics.slots,
        "running": scheduler.n_running,
        "waiting": scheduler.n_waiting,
        "paused": scheduler.n_paused,
        "preempted": scheduler.n_preempted,
        "cached_tokens": scheduler.n_cached_tokens,
        "generations": statistics.generations,
        "batches": scheduler.n_batches,
        "aborted": scheduler.n_aborted,
        "prompt_rows": scheduler.n_prompt_rows,
        "sampled": scheduler.n_sampled,
        "images_encoded": statistics.images_encoded,
        "images_found": statistics.images_found,
        "image_bytes": statistics.image_bytes,
    }
    return msgspec.json.encode(fields) + b"\n"


_STATUS = {"loading": "loading model", "ready": "ok"}


def _status(status: str) -> str:
    return _STATUS.get(status, "server error")
