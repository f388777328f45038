"""How a model is loaded and how an engine runs it: frozen values, checked once when they are made.

To add an option, add one field here. The check of its bounds, the option of every command with its help, the keyword
argument of `open_engine` (which `ci/options` writes down for type checkers) and the table in the documentation are made
from it. Only a flag of the drop-in mode needs an entry of its own, in cli/dropin.py.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from operator import index
from os import fspath
from pathlib import PurePath
from types import NoneType
from typing import Literal, TypeAlias

from trio_runner.parameters import Option, boolean, first_complaint, integer, number, one_of, other, parameters_of

KvType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
Pooling: TypeAlias = Literal["model", "none", "mean", "cls", "last"]
FlashAttention: TypeAlias = Literal["auto", "on", "off"]
SplitMode: TypeAlias = Literal["none", "layer", "row"]

KV_TYPES: tuple[KvType, ...] = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
SPLIT_MODES: tuple[SplitMode, ...] = ("none", "layer", "row")
POOLINGS: tuple[Pooling, ...] = ("model", "none", "mean", "cls", "last")

MAX_SLOTS = 128
"""Half of the sequences that one llama.cpp context can hold: each slot comes with one for embeddings."""
MAX_BATCH_ROWS = 2**16
"""Rows that one step may have."""
MAX_THREADS = 512
MAX_ADAPTER_NAME = 64
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_adapter_name(name: str) -> None:
    """Raises ValueError for a name that no adapter can have. The names are also parts of URLs."""
    if not isinstance(name, str) or len(name) > MAX_ADAPTER_NAME or not _ADAPTER_NAME.fullmatch(name):
        raise ValueError(
            f"the name of an adapter has up to {MAX_ADAPTER_NAME} letters, digits, dots, dashes and underscores, "
            "and begins with a letter or digit"
        )


def check_endpoint(endpoint: str) -> None:
    """Raises ValueError unless `endpoint` is "host:port", with a name or an IPv4 address as host."""
    host, _, port = endpoint.rpartition(":")
    if not host or re.search(r"[\s:]", host) or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise ValueError(f"rpc: {endpoint!r} is not host:port")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A LoRA adapter file.

    `scale` is how strongly it applies to requests that choose no adapters. `name` is what requests choose it by; the
    default is the name of the file without its ending. Raises ValueError for a value outside its bounds.
    """

    path: str
    scale: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", fspath(self.path))
        if not self.path:
            raise ValueError("path must name an adapter file")
        if not math.isfinite(self.scale):
            raise ValueError(f"the scale of adapter {self.path} must be finite")
        if not self.name:
            stem = re.sub(r"[^A-Za-z0-9._-]", "_", PurePath(self.path).stem).lstrip("._-")
            object.__setattr__(self, "name", stem[:MAX_ADAPTER_NAME] or "adapter")
        check_adapter_name(self.name)


# ---- what people write on the command line ---------------------------------------------------------------------------


def read_adapter(text: str) -> AdapterConfig:
    """An adapter at scale 1, from "FILE". Raises ValueError."""
    return AdapterConfig(text)


def read_scaled_adapter(text: str) -> AdapterConfig:
    """An adapter from "FILE=SCALE"; the last "=" counts. Raises ValueError."""
    path, _, scale = text.rpartition("=")
    try:
        factor = float(scale)
    except ValueError:
        path = ""
    if not path:
        raise ValueError(f"{text!r} is not a file, = and a number")
    return AdapterConfig(path, factor)


def read_layers(text: str) -> int | Literal["auto"]:
    """A number of layers, or "auto". Raises ValueError."""
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither auto nor a number") from None


def read_names(text: str) -> tuple[str, ...]:
    """Names separated by commas; "none" means no names."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    return () if names == ("none",) else names


def read_proportions(text: str) -> tuple[float, ...]:
    """Numbers separated by commas. Raises ValueError."""
    try:
        return tuple(float(item) for item in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is not a list of numbers separated by commas") from None


# ---- the tables ------------------------------------------------------------------------------------------------------

_SERVE = (Option(commands=("serve",)),)
"""Options of `serve` only."""
FLASH_ATTENTIONS: tuple[FlashAttention, ...] = ("auto", "on", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which file to load and where its weights go. Raises ValueError for a value outside its bounds."""

    path: str
    """The model, a GGUF file."""
    projector: str | None = other(
        None,
        doc="File (mmproj) that turns images into rows for this model. With it, prompts may have images.",
        options=(Option(flags=("--mmproj",), metavar="FILE"),),
        default_text="none",
    )
    adapters: tuple[AdapterConfig, ...] = other(
        (),
        doc="LoRA adapters to load with the model.",
        options=(
            Option(
                flags=("--lora",),
                metavar="FILE",
                parse=read_adapter,
                repeated=True,
                doc="LoRA adapter to load with the model, at scale 1. May be repeated.",
            ),
            Option(
                flags=("--lora-scaled",),
                metavar="FILE=SCALE",
                parse=read_scaled_adapter,
                repeated=True,
                doc="The same at another scale. At scale 0 it applies only to requests that choose it.",
            ),
        ),
        default_text="none",
    )
    gpu_layers: int | Literal["auto"] = other(
        "auto",
        doc="Layers to put on devices, counted from the last. auto: as many as fit, with their KV cache, into the free "
        "memory; -1: all, whether they fit or not.",
        options=(Option(flags=("--gpu-layers", "--n-gpu-layers", "-ngl"), metavar="auto|N", parse=read_layers),),
    )
    devices: tuple[str, ...] | None = other(
        None,
        doc="Names of the devices that layers go to, in this order, as `trio-runner info` lists them. none: only the "
        "CPU.",
        options=(Option(flags=("--device",), metavar="NAME,...", parse=read_names),),
        default_text="all GPUs, and all devices of --rpc",
    )
    rpc: tuple[str, ...] = other(
        (),
        doc="rpc-servers of llama.cpp whose devices take layers too. Nothing is encrypted or authenticated: use them "
        "only in a network that you trust.",
        options=(Option(metavar="HOST:PORT,...", parse=read_names),),
        default_text="none",
    )
    split_mode: SplitMode = one_of(
        "layer",
        SPLIT_MODES,
        doc="How to divide the model among several devices: by layers, by rows where the backend can, or not at all.",
    )
    main_gpu: int = integer(
        0,
        0,
        2**31 - 1,
        doc="With split mode none, the number of the device that takes everything, counted from 0.",
    )
    tensor_split: tuple[float, ...] = other(
        (),
        doc="Proportion of the model for each device.",
        options=(Option(metavar="A,B,...", parse=read_proportions),),
        default_text="by their free memory",
    )
    mmap: bool = boolean(True, doc="Map the model file into memory instead of reading it.")
    mlock: bool = boolean(False, doc="Keep the model in RAM: never swap it out.")
    check_tensors: bool = boolean(
        False, doc="Read every tensor while loading, and refuse a model with NaN or infinity among its scales."
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", fspath(self.path))
        if not self.path:
            raise ValueError("path must name a model file")
        if self.projector is not None:
            object.__setattr__(self, "projector", fspath(self.projector))
            if not self.projector:
                raise ValueError("projector must name a file")
        names = [adapter.name for adapter in self.adapters]
        if len(set(names)) < len(names):
            raise ValueError(f"two adapters have the same name: {', '.join(sorted(names))}")
        if self.gpu_layers != "auto" and not -1 <= self.gpu_layers <= 2**31 - 1:
            raise ValueError('gpu_layers must be "auto", or -1 or more')
        for endpoint in self.rpc:
            check_endpoint(endpoint)
        if any(not math.isfinite(share) or share < 0 for share in self.tensor_split):
            raise ValueError("tensor_split must be finite and not negative")
        _check_parameters(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How many sequences run at once, and with what. Raises ValueError for a value outside its bounds."""

    slots: int = integer(4, 1, MAX_SLOTS, doc="Requests that run at once. Each takes one slot of the KV cache.")
    context_length: int | None = integer(
        None,
        4,
        2**26,
        doc="Tokens that each slot can hold.",
        default_text="what the model was trained with, at most 4096",
    )
    batch_size: int = integer(
        512,
        1,
        MAX_BATCH_ROWS,
        doc="Rows of one step at most. With rpc-servers or recurrent state, a cancelled request never interrupts a "
        "step. A text to embed must fit into one step, unless the model embeds the last row.",
    )
    embedding_batch_size: int | None = integer(
        None,
        1,
        MAX_BATCH_ROWS,
        doc="Longest text to embed, in tokens, for encoders and other models that read a text in one step. More takes "
        "more memory. The larger of the batch size and this number, which is cut to the context.",
        default_text="the batch size",
    )
    threads: int | None = integer(
        None,
        1,
        MAX_THREADS,
        doc="Threads that compute.",
        default_text="one per core for prefill, one fewer for decoding",
    )
    flash_attention: FlashAttention = one_of(
        "auto",
        FLASH_ATTENTIONS,
        doc="Flash attention. auto: on where the backend supports it. Without it, each step attends to every cell of "
        "the KV cache that is in use, those of other slots and of cached prompts included.",
    )
    kv_type: KvType = one_of(
        "f16",
        KV_TYPES,
        doc="Element type of the KV cache. Quantised types need flash attention.",
    )
    pooling: Pooling = one_of(
        "model",
        POOLINGS,
        doc="How the rows of a text become one embedding. model: as the file says; if it says nothing, the last row.",
    )
    step_target: float | None = number(
        None,
        0.001,
        60,
        unit="seconds",
        options=(Option(metavar="MS", scale=0.001, unit="milliseconds"),),
        doc="Time that a step may take if it carries rows of a prompt beside sequences that decode. It bounds "
        "the gap that a prompt makes in every stream.",
        default_text="2.5 times a step that only decodes, as measured, but at least 25 ms",
    )
    image_cache_bytes: int = integer(
        256 << 20,
        0,
        2**62,
        options=_SERVE,
        doc="Bytes of encoded images to keep, so that an image that is asked for again need not be encoded again.",
    )
    max_queue: int | None = integer(
        128,
        0,
        2**31 - 1,
        optional=True,
        options=(
            Option(
                commands=("serve",),
                doc="Requests that may wait for a slot. Further ones are refused and told when to come back.",
            ),
        ),
        doc="Requests that may wait for a slot. Further ones are refused and told when to come back. None means no "
        "bound.",
    )
    load_wait: float = number(
        math.inf,
        0,
        math.inf,
        unit="seconds",
        options=(
            Option(
                commands=("serve",),
                doc="Seconds that a request may wait for the model to load. Then it is refused and told when to come "
                "back. Longer than proxies and clients wait is of no use.",
            ),
        ),
        doc="Seconds that a request may wait for the model to load. Then it ends with `EngineLoading`.",
    )
    max_backlog: int = integer(
        256,
        1,
        2**31 - 1,
        options=_SERVE,
        doc="Unread events after which a generation is paused until its reader catches up.",
    )
    stall_timeout: float = number(
        30.0,
        0.001,
        math.inf,
        unit="seconds",
        options=(
            Option(
                commands=("serve",),
                doc="Seconds that a paused generation waits for its reader before it ends with an error. A client that "
                "takes nothing of its answer for so long is disconnected.",
            ),
        ),
        doc="Seconds that a paused generation waits for its reader. Then it ends with the error `ReaderStalled`. In "
        "`serve`, a client that takes nothing of its answer for so long is disconnected, too.",
    )

    def __post_init__(self) -> None:
        _check_parameters(self)
        if self.context_length is not None and self.slots * self.context_length >= 2**31:
            raise ValueError("slots and context_length must multiply to less than 2147483648")


def _check_parameters(config: ModelConfig | EngineConfig) -> None:
    for name, parameter in parameters_of(type(config)).items():
        value = getattr(config, name)
        if parameter.kind == "integer" and not isinstance(value, (int, NoneType)):
            with suppress(TypeError):  # of a float, for example; the complaint below says so
                object.__setattr__(config, name, index(value))  # numpy's integers, for example
    complaint = first_complaint(config)
    if complaint is not None:
        raise ValueError(complaint[1])
