from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.config import KV_TYPES, MAX_SLOTS, MAX_THREADS, POOLINGS, AdapterConfig, EngineConfig, ModelConfig

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
    ("max_queue", -1),
    ("max_backlog", 0),
    ("stall_timeout", 0.0),
    ("stall_timeout", -1.0),
    ("stall_timeout", math.nan),
]
BAD_MODEL: list[tuple[str, Any]] = [
    ("path", ""),
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
def test_adapter_scale(scale: float) -> None:
    with pytest.raises(ValueError, match=r"lora\.gguf"):
        AdapterConfig("lora.gguf", scale)


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
        max_queue=st.none() | st.integers(0, 10**6),
        max_backlog=st.integers(1, 10**6),
        stall_timeout=st.floats(min_value=0, exclude_min=True, allow_nan=False),
    )
)
def test_whatever_is_in_range_is_taken(config: EngineConfig) -> None:
    hash(config)


def test_all_slots_together_have_a_bound() -> None:
    EngineConfig(slots=31, context_length=2**26)
    with pytest.raises(ValueError, match="slots and context_length"):
        EngineConfig(slots=32, context_length=2**26)


def test_a_path_becomes_text() -> None:
    assert ModelConfig(path=Path("a") / "b.gguf").path == str(Path("a", "b.gguf"))  # type: ignore[arg-type]
