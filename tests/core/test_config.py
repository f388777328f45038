"""What a configuration may be, and which field an error names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.config import (
    KV_TYPES,
    MAX_ADAPTER_NAME,
    MAX_SLOTS,
    MAX_THREADS,
    POOLINGS,
    AdapterConfig,
    EngineConfig,
    ModelConfig,
    check_adapter_name,
)
from trio_runner.parameters import parameters_of

BAD_ENGINE: list[tuple[str, Any]] = [
    ("slots", 0),
    ("slots", -1),
    ("slots", MAX_SLOTS + 1),
    ("context_length", 3),
    ("context_length", 0),
    ("context_length", 2**26 + 1),
    ("batch_size", 0),
    ("batch_size", 2**16 + 1),
    ("threads", 0),
    ("threads", MAX_THREADS + 1),
    ("flash_attention", "yes"),
    ("kv_type", "f17"),
    ("pooling", "rank"),
    ("step_target", 0.0),
    ("step_target", -1.0),
    ("step_target", 61.0),
    ("step_target", math.nan),
    ("image_cache_bytes", -1),
    ("max_queue", -1),
    ("max_backlog", 0),
    ("stall_timeout", 0.0),
    ("stall_timeout", -1.0),
    ("stall_timeout", math.nan),
]
BAD_MODEL: list[tuple[str, Any]] = [
    ("path", ""),
    ("projector", ""),
    ("adapters", (AdapterConfig("a/x.gguf"), AdapterConfig("b/x.gguf"))),
    ("adapters", (AdapterConfig("a.gguf", name="x"), AdapterConfig("b.gguf", 0.5, name="x"))),
    ("gpu_layers", -2),
    ("gpu_layers", 2**31),
    ("main_gpu", -1),
    ("tensor_split", (1.0, -1.0)),
    ("tensor_split", (math.nan,)),
    ("tensor_split", (math.inf,)),
]


@pytest.mark.parametrize(("name", "value"), BAD_ENGINE)
def test_engine_config_names_the_bad_field(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), BAD_MODEL)
def test_model_config_names_the_bad_field(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        ModelConfig(**{"path": "model.gguf", name: value})


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_an_adapter_needs_a_path_and_a_finite_scale(scale: float) -> None:
    with pytest.raises(ValueError, match=r"lora\.gguf"):
        AdapterConfig("lora.gguf", scale)
    with pytest.raises(ValueError, match="path"):
        AdapterConfig("", scale)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a.gguf", "a"),
        ("dir/v1.2-b_C.gguf", "v1.2-b_C"),
        ("dir.d/plain", "plain"),
        ("C:x y.gguf", "C_x_y"),
        ("é.gguf", "adapter"),
        ("-.gguf", "adapter"),
        ("_a.gguf", "a"),
        ("a" * 200, "a" * MAX_ADAPTER_NAME),
    ],
)
def test_an_adapter_is_named_after_its_file(path: str, name: str) -> None:
    assert AdapterConfig(path).name == name
    assert AdapterConfig(path, name="other").name == "other"


@given(st.text(min_size=1))
def test_every_adapter_gets_a_name_that_fits_into_urls(path: str) -> None:
    name = AdapterConfig(path).name
    check_adapter_name(name)
    assert quote(name, safe="") == name


@pytest.mark.parametrize(
    "name", [".", "..", "../x", "a/b", "a b", "-a", ".a", "_a", "é", "a\n", "a\0", "a" * (MAX_ADAPTER_NAME + 1)]
)
def test_names_that_no_adapter_can_have_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        AdapterConfig("a.gguf", name=name)


@given(
    st.builds(
        EngineConfig,
        slots=st.integers(1, 31),
        context_length=st.none() | st.integers(4, 2**26),
        batch_size=st.integers(1, 2**16),
        threads=st.none() | st.integers(1, MAX_THREADS),
        flash_attention=st.sampled_from(["auto", "on", "off"]),
        kv_type=st.sampled_from(KV_TYPES),
        step_target=st.none() | st.floats(0.001, 60),
        pooling=st.sampled_from(POOLINGS),
        image_cache_bytes=st.integers(0, 2**40),
        max_queue=st.none() | st.integers(0, 10**6),
        max_backlog=st.integers(1, 10**6),
        stall_timeout=st.floats(min_value=0.001, allow_nan=False),
    )
)
def test_every_value_in_range_is_accepted(config: EngineConfig) -> None:
    hash(config)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        (name, bound)
        for name, parameter in parameters_of(EngineConfig).items()
        if parameter.kind in ("number", "integer")
        for bound in (parameter.low, parameter.high)
    ],
)
def test_the_bounds_of_the_table_are_allowed(name: str, bound: float) -> None:
    assert getattr(EngineConfig(**{name: bound}), name) == bound  # type: ignore[arg-type]


def test_numpys_integers_become_ordinary_ones() -> None:
    config = EngineConfig(slots=np.int64(2), context_length=np.uint16(512))  # type: ignore[arg-type]
    assert (type(config.slots), type(config.context_length)) == (int, int)
    assert config == EngineConfig(slots=2, context_length=512)
    assert type(ModelConfig(path="m", main_gpu=np.int32(1)).main_gpu) is int  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [4.0, np.float64(4), np.bool_(True), True, "4"])
def test_only_integers_are_integers(value: object) -> None:
    with pytest.raises(ValueError, match="slots must be an integer"):
        EngineConfig(slots=value)  # type: ignore[arg-type]


def test_the_context_of_all_slots_together_is_bounded() -> None:
    EngineConfig(slots=31, context_length=2**26)
    with pytest.raises(ValueError, match="slots and context_length"):
        EngineConfig(slots=32, context_length=2**26)


def test_a_path_becomes_text() -> None:
    path = Path("a") / "b.gguf"
    assert ModelConfig(path=path).path == str(path)  # type: ignore[arg-type]
    assert ModelConfig(path="m", projector=path).projector == str(path)  # type: ignore[arg-type]
    assert AdapterConfig(path).path == str(path)  # type: ignore[arg-type]
