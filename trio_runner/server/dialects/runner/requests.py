"""Requests in the dialect of Ollama's Go runner: bytes of a body -> request values. Pure.

Every function raises `RequestError`, which names the field at fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trio_runner.errors import InvalidRequest
from trio_runner.image_source import IMAGE_TAG
from trio_runner.parameters import parameters_of
from trio_runner.request import (
    MAX_ADAPTER_SCALE,
    MAX_DOCUMENTS,
    MAX_IMAGES,
    EmbedRequest,
    GenerateRequest,
    RerankRequest,
)
from trio_runner.sampling import MAX_LOGPROBS, SamplingParams
from trio_runner.server.dialects import json_in
from trio_runner.server.dialects.fields import (
    ADAPTERS,
    BOOLEAN,
    INTEGER,
    NUMBER,
    STRING,
    Body,
    Fields,
    array,
    either,
    field,
    fields_of,
    ignored,
)
from trio_runner.server.dialects.json_in import fold, list_of, wrong

NO_SEQUENCE = "Failed to create new sequence: "
"""How the original begins the refusal of a request that it could read."""

MAX_FILE_NAME_BYTES = 255
"""What file systems allow."""


# --- Fields ----------------------------------------------------------------------------------------------------------


def _go_text(name: str, value: Any) -> str:
    return "" if value is None else json_in.check_text(name, value)  # null in a list is Go's zero value


def _image(name: str, value: Any) -> tuple[int, bytes]:
    given = fold(json_in.check_object(name, value))
    # The bounds are checked here, as an image that the prompt does not name gets no further.
    image_id = json_in.integer_between(0, 2**31 - 1)(f"{name}.id", given.get("id", 0))
    return image_id, json_in.image_file(f"{name}.data", given.get("data", ""))


def _images(name: str, value: Any) -> tuple[tuple[int, bytes], ...]:
    if not isinstance(value, list):
        wrong(name, "a list of objects", value)
    if len(value) > MAX_IMAGES:
        raise InvalidRequest(f"{name} has {len(value)} images, but at most {MAX_IMAGES} are allowed", param=name)
    return tuple(_image(f"{name}[{index}]", item) for index, item in enumerate(value))


def _alternatives(name: str, value: Any) -> int:
    count = json_in.check_integer(name, value)
    if count > MAX_LOGPROBS:
        raise InvalidRequest(f"{name} must be at most {MAX_LOGPROBS}, not {count}", param=name)
    return max(count, -1)


def _documents(name: str, value: Any) -> tuple[str, ...]:
    return json_in.check_texts(name, value, MAX_DOCUMENTS)


def _text_or_texts(name: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return json_in.check_text(name, value)
    if not isinstance(value, list):
        wrong(name, "a string or a list of strings", value)
    return _documents(name, value)


_SAMPLING = fields_of(SamplingParams)

_SETTLED_INTEGERS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread")
_SETTLED_BOOLEANS = ("low_vram", "f16_kv", "logits_all", "vocab_only", "use_mmap", "use_mlock")
_SETTLED = "Checked and ignored: this is settled when the model is loaded."
_LOAD_OPTIONS: Fields = {
    **{name: ignored(INTEGER, _SETTLED) for name in _SETTLED_INTEGERS},
    **{name: ignored(BOOLEAN, _SETTLED) for name in _SETTLED_BOOLEANS},
}
"""Sent with every request of Ollama's server."""

COMPLETION = Body(
    {
        "prompt": field(
            STRING,
            "The text to continue. `[img-N]` in it stands for the image of that id.",
            default_text="required",
        ),
        "image_data": field(
            array({"type": "object", "properties": {"id": INTEGER, "data": STRING}}, maxItems=MAX_IMAGES),
            'Images of the prompt, as `{"id": N, "data": "..."}`: `data` is a file in base64.',
            check=_images,
            default_text="none",
        ),
        "adapters": ADAPTERS,
        "n_predict": field(
            INTEGER,
            "Tokens to generate at most. 0 and below: until the model ends the text or, with `shift` false, the "
            "context is full.",
            default=-1,
        ),
        **fields_of(GenerateRequest, "n_keep"),
        "stop": field(
            array(STRING),
            parameters_of(GenerateRequest)["stop"].doc,
            check=list_of(_go_text, "strings"),
            default_text="none",
        ),
        "cache_prompt": field(
            BOOLEAN,
            "Continue from the longest beginning of the prompt that a slot still holds. As in the original runner, "
            "this is off unless you ask for it.",
            default=False,
        ),
        **fields_of(GenerateRequest, "shift", "truncate", "priority", "deadline", truncate=True),
        "n_probs": field(
            INTEGER,
            "Number of most probable alternatives to report with every token; `logprobs` overrules it. 0 reports "
            "nothing.",
            check=_alternatives,
            default=0,
        ),
        **_SAMPLING,
        "repeat_last_n": field(
            INTEGER,
            "Tokens that the repeat, frequency and presence penalties look back on, the prompt included. 0 turns "
            "them off, below 0 means 64.",
            default=64,
        ),
        "seed": field(
            INTEGER, "Seed of the random draw. Only the lowest 32 bits count; -1 chooses a seed.", default=-1
        ),
        "logprobs": field(INTEGER, _SAMPLING["logprobs"].doc, check=_alternatives, default=-1),
        **_LOAD_OPTIONS,
    },
    {"prompt": "The capital of France is", "n_predict": 4, "temperature": 0},
    "Bad request",
)
_REFUSAL = "bad request: the body is not a JSON object: {}"
EMBEDDING = Body(
    {
        "content": field(
            either(STRING, array(STRING, maxItems=MAX_DOCUMENTS)),
            "The text to embed, or several texts.",
            check=_text_or_texts,
            default_text="required",
        ),
        "cache_prompt": ignored(BOOLEAN, "Accepted and ignored: embeddings use no prompt cache."),
        **fields_of(EmbedRequest, "normalize", "truncate", "dimensions"),
        "adapters": ADAPTERS,
    },
    {"content": ["one", "two"], "normalize": True},
    _REFUSAL,
)
RERANK = Body(
    {
        "query": field(STRING, "The question.", default_text="required"),
        "documents": field(
            array(STRING, maxItems=MAX_DOCUMENTS), "The texts to score.", check=_documents, default_text="required"
        ),
        "top_n": field(INTEGER, "Return only this many of the best documents.", default_text="all"),
        **fields_of(RerankRequest, "truncate"),
        "adapters": ADAPTERS,
    },
    {"query": "Who wrote Faust?", "documents": ["Goethe did.", "It rains."]},
    _REFUSAL,
)
ADAPTER = Body(
    {
        "file": field(
            STRING,
            "Name of a file in the directory that `--adapter-dir` names, without a path.",
            default_text="required",
        ),
        "name": field(
            STRING, "What requests choose the adapter by.", default_text="the file's name without its ending"
        ),
        "scale": field(NUMBER, "How strongly it applies to requests that choose no adapters.", default=0),
    },
    {"file": "style.gguf", "name": "style"},
    _REFUSAL,
)
TOKENIZE = Body(
    {
        "content": field(STRING, "The text to tokenise.", default=""),
        "add_special": field(BOOLEAN, "Add the tokens that the model has around a text, such as BOS.", default=False),
        "parse_special": field(
            BOOLEAN, "Read special tokens such as `<|im_end|>` as the tokens they name.", default=True
        ),
    },
    {"content": "Hello"},
    _REFUSAL,
)
DETOKENIZE = Body(
    {"tokens": field(array(INTEGER), "The tokens.", check=json_in.check_tokens, default=[])},
    {"tokens": [1, 2, 3]},
    _REFUSAL,
)


# --- Requests --------------------------------------------------------------------------------------------------------


def completion(body: bytes) -> GenerateRequest:
    """The request in the body of POST /completion.

    An image that the prompt does not name is left out, as in the original: its server sends all images of a
    conversation, and a raw prompt or a suffix may name none of them.
    """
    given = COMPLETION.read(body)
    if not given.get("prompt"):
        raise InvalidRequest(f"{NO_SEQUENCE}no input provided: prompt is empty", param="prompt")
    named = {int(number) for number in IMAGE_TAG.findall(given["prompt"])}
    n_predict = given.get("n_predict", -1)
    return GenerateRequest(
        prompt=given["prompt"],
        image_data=tuple(pair for pair in given.get("image_data", ()) if pair[0] in named),
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
    if "logprobs" not in given and given.get("n_probs", 0) > 0:
        params["logprobs"] = given["n_probs"]
    return SamplingParams(**params)


def embedding(body: bytes) -> EmbedRequest | tuple[EmbedRequest, ...]:
    """The request in the body of POST /embedding; several if its content is a list."""
    given = EMBEDDING.read(body)
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
    """The request in the body of POST /rerank, and how many of the best documents to return; None for all."""
    given = RERANK.read(body)
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
    """(file, name, scale) of POST /adapters."""
    given = ADAPTER.read(body)
    file = given.get("file", "")
    # The name of a file in one directory, and never a path: clients must not learn which files this machine has.
    if not 0 < len(file.encode()) <= MAX_FILE_NAME_BYTES or file.startswith(".") or set(file) & set("/\\\0"):
        raise InvalidRequest("file must be the name of a file in the directory of adapters", param="file")
    scale = given.get("scale", 0.0)
    if abs(scale) > MAX_ADAPTER_SCALE:
        raise InvalidRequest(
            f"scale must be between {-MAX_ADAPTER_SCALE:g} and {MAX_ADAPTER_SCALE:g}, not {scale}", param="scale"
        )
    return file, given.get("name"), scale


def tokenize(body: bytes) -> tuple[str, bool, bool]:
    """(text, add_special, parse_special) of POST /tokenize."""
    given = TOKENIZE.read(body)
    return given.get("content", ""), given.get("add_special", False), given.get("parse_special", True)


def detokenize(body: bytes) -> tuple[int, ...]:
    """The tokens of POST /detokenize."""
    tokens: tuple[int, ...] = DETOKENIZE.read(body).get("tokens", ())
    return tokens
