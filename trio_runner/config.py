"""How a model is loaded and how an engine runs it: frozen values, checked once when they are made."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from os import fspath
from pathlib import PurePath
from typing import Literal, TypeAlias

KvType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
Pooling: TypeAlias = Literal["model", "none", "mean", "cls", "last"]
FlashAttention: TypeAlias = Literal["auto", "on", "off"]
SplitMode: TypeAlias = Literal["none", "layer", "row"]

KV_TYPES: tuple[KvType, ...] = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
SPLIT_MODES: tuple[SplitMode, ...] = ("none", "layer", "row")
POOLINGS: tuple[Pooling, ...] = ("model", "none", "mean", "cls", "last")

MAX_SLOTS = 128
"""Half of the sequences one llama.cpp context can hold: each slot comes with one for embeddings."""
MAX_THREADS = 512


MAX_ADAPTER_NAME = 64
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_adapter_name(name: str) -> None:
    """Raises ValueError for what cannot be the name of an adapter, which also stands in paths of URLs."""
    if not isinstance(name, str) or len(name) > MAX_ADAPTER_NAME or not _ADAPTER_NAME.fullmatch(name):
        raise ValueError(
            f"the name of an adapter has up to {MAX_ADAPTER_NAME} letters, digits, dots, dashes and underscores, "
            "and begins with a letter or digit"
        )


def check_endpoint(endpoint: str) -> None:
    """Raises ValueError for what is no "host:port"; the host is a name or an address of IPv4."""
    host, _, port = endpoint.rpartition(":")
    if not host or re.search(r"[\s:]", host) or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise ValueError(f"rpc: {endpoint!r} is not host:port")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A LoRA adapter file, how strongly it applies to requests that choose no adapters, and its name to those that do:
    the file's, without its ending, unless given."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which file to load and where its weights go. Raises ValueError for a value outside its range."""

    path: str
    projector: str | None = None
    """A file (mmproj) with what turns images into rows for this model."""
    adapters: tuple[AdapterConfig, ...] = ()
    gpu_layers: int | Literal["auto"] = "auto"
    """Layers to put on devices, counted from the last; -1 all, whether they fit or not. "auto": as many as fit with
    their KV cache into the free memory, and fewer where a device then has less than it said."""
    devices: tuple[str, ...] | None = None
    """Names of those that layers go to, in this order; None: all GPUs, and all devices of `rpc`. Empty: the CPU does
    everything."""
    rpc: tuple[str, ...] = ()
    """rpc-servers of llama.cpp, "host:port", whose devices take layers too. Nothing is encrypted or checked between us
    and them: for networks that are trusted."""
    split_mode: SplitMode = "layer"
    """Over several devices: by layers, by rows where the backend can, or not at all."""
    main_gpu: int = 0
    """With split mode "none": which of the devices, counted from 0, takes everything."""
    tensor_split: tuple[float, ...] = ()
    """Proportion of the model for each device; empty: by their free memory."""
    mmap: bool = True
    mlock: bool = False
    check_tensors: bool = False
    """Read every tensor at load and refuse NaN and infinity in quantisation scales."""

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
        if self.split_mode not in SPLIT_MODES:
            raise ValueError(f"split_mode must be one of {', '.join(SPLIT_MODES)}")
        if self.main_gpu < 0:
            raise ValueError("main_gpu must be 0 or more")
        if any(not math.isfinite(share) or share < 0 for share in self.tensor_split):
            raise ValueError("tensor_split must be finite and not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How many sequences run at once and with what. Raises ValueError for a value outside its range."""

    slots: int = 4
    """Sequences that run at once; each is a lane of the one KV cache and a place of the prompt cache."""
    context_length: int | None = None
    """Tokens each slot holds; None: what the model was trained for, at most 4096."""
    batch_size: int = 512
    """Rows of one step, and of one micro-batch: the longest stretch of work that nothing interrupts on a GPU."""
    threads: int | None = None
    """Threads that compute; None: a core fewer than there are for decoding, all of them for prefill."""
    flash_attention: FlashAttention = "auto"
    """"auto": on, where the backend can. Without it a step attends to every cell in use, of all slots, also of those
    that only keep a prompt: worse, the more they keep."""
    kv_type: KvType = "f16"
    """Element type of the KV cache; quantised types need flash attention for the V half."""
    pooling: Pooling = "model"
    """How the vectors of a prompt's tokens become one; "model": as the file says, else the last token's."""
    step_target: float | None = None
    """Seconds that a step may take which carries rows of a prompt beside sequences that decode: the gap it tears into
    every stream. None: 2.5 times a step that only decodes, as measured, but no less than 25 ms."""
    image_cache_bytes: int = 256 << 20
    """Rows of images that are kept, so that an image is encoded once."""
    max_queue: int | None = 128
    """Requests that may wait for a slot before `EngineBusy`; None: no bound."""
    max_backlog: int = 256
    """Unread events after which a generation is paused until its reader catches up."""
    stall_timeout: float = 30.0
    """Seconds a paused generation waits for its reader before it is dropped with `ReaderStalled`."""

    def __post_init__(self) -> None:
        if not 1 <= self.slots <= MAX_SLOTS:
            raise ValueError(f"slots must be between 1 and {MAX_SLOTS}")
        if self.context_length is not None and not 4 <= self.context_length <= 2**26:
            raise ValueError("context_length must be between 4 and 67108864")
        if self.context_length is not None and self.slots * self.context_length >= 2**31:
            raise ValueError("slots and context_length must multiply to less than 2147483648")
        if not 1 <= self.batch_size <= 2**16:
            raise ValueError("batch_size must be between 1 and 65536")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise ValueError(f"threads must be between 1 and {MAX_THREADS}")
        if self.kv_type not in KV_TYPES:
            raise ValueError(f"kv_type must be one of {', '.join(KV_TYPES)}")
        if self.flash_attention not in ("auto", "on", "off"):
            raise ValueError("flash_attention must be auto, on or off")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}")
        if self.step_target is not None and not 0.001 <= self.step_target <= 60:
            raise ValueError("step_target must be between 0.001 and 60 seconds")
        if self.image_cache_bytes < 0:
            raise ValueError("image_cache_bytes must not be negative")
        if self.max_queue is not None and self.max_queue < 0:
            raise ValueError("max_queue must not be negative")
        if self.max_backlog < 1:
            raise ValueError("max_backlog must be 1 or more")
        if not self.stall_timeout > 0:
            raise ValueError("stall_timeout must be more than 0 seconds")
