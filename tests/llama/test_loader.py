"""Loading: progress, cancellation, and errors that name the file."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trio_runner.config import AdapterConfig, EngineConfig, ModelConfig
from trio_runner.errors import EngineClosed, LoadError, NativeError
from trio_runner.llama import LlamaLoader, Model, Projector, devices, drain_log, system_info
from trio_runner.llama import loader as loader_module
from trio_runner.llama.library import check, logger, native
from trio_runner.llama.model import LoadProgress

Models = Callable[[str], Path]

SMALL = EngineConfig(slots=1, context_length=64, batch_size=16, threads=1)


def load(loader: LlamaLoader, cancelled: Callable[[], bool] = lambda: False) -> list[float]:
    seen: list[float] = []
    runtime = loader(SMALL, progress=seen.append, cancelled=cancelled)
    runtime.context.close()
    runtime.model.close()
    return seen


def test_progress_ends_at_one(models: Models) -> None:
    seen = load(LlamaLoader(ModelConfig(path=str(models("llama")))))
    assert seen[-1] == 1.0
    assert seen == sorted(seen)


def test_info_comes_from_the_file(models: Models) -> None:
    info = Model(ModelConfig(path=str(models("llama")))).info
    assert (info.name, info.architecture, info.n_layer, info.n_embd, info.n_ctx_train) == (
        "tiny-llama",
        "llama",
        2,
        64,
        2048,
    )
    assert not info.adds_bos
    assert info.causal
    assert info.chat_template is not None
    assert info.chat_template.startswith("{% for message")
    assert info.metadata["general.architecture"] == "llama"
    assert info.size > 400_000
    assert not Model(ModelConfig(path=str(models("bert")))).info.causal
    assert Model(ModelConfig(path=str(models("spm")))).info.adds_bos


def test_cancelled_before_it_begins(models: Models) -> None:
    with pytest.raises(EngineClosed):
        load(LlamaLoader(ModelConfig(path=str(models("llama")))), cancelled=lambda: True)


def test_native_load_stops_when_cancelled(models: Models) -> None:
    progress = LoadProgress()
    progress.cancel()
    with pytest.raises(EngineClosed):
        Model(ModelConfig(path=str(models("llama"))), progress)


def test_native_load_of_a_projector_stops_when_cancelled(models: Models) -> None:
    progress = LoadProgress()
    progress.cancel()
    model = Model(ModelConfig(path=str(models("llama"))))
    with pytest.raises(EngineClosed):
        Projector(model, str(models("mmproj")), max_rows=64, progress=progress)


def test_watcher_cancels_a_load_that_runs(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The load waits until the watching thread has seen the cancellation, as a long load would."""
    monkeypatch.setattr(loader_module, "POLL_SECONDS", 0.001)
    cancelled_native = threading.Event()

    class Progress(LoadProgress):
        def cancel(self) -> None:
            super().cancel()
            cancelled_native.set()

    class SlowModel(Model):
        def __init__(self, config: ModelConfig, progress: LoadProgress | None = None, **placement: Any) -> None:
            wanted.set()
            assert cancelled_native.wait(10)
            super().__init__(config, progress, **placement)

    wanted = threading.Event()
    monkeypatch.setattr(loader_module, "LoadProgress", Progress)
    monkeypatch.setattr(loader_module, "Model", SlowModel)
    with pytest.raises(EngineClosed):
        load(LlamaLoader(ModelConfig(path=str(models("llama")))), cancelled=wanted.is_set)


def test_errors_name_the_file(models: Models, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.gguf")
    with pytest.raises(LoadError, match="no such file") as error:
        load(LlamaLoader(ModelConfig(path=missing)))
    assert error.value.path == missing
    with pytest.raises(LoadError, match="no such file") as error:
        load(LlamaLoader(ModelConfig(path=str(models("llama")), adapters=(AdapterConfig(missing),))))
    assert error.value.path == missing
    with pytest.raises(LoadError, match="is for llama") as error:
        load(LlamaLoader(ModelConfig(path=str(models("mamba")), adapters=(AdapterConfig(str(models("lora"))),))))
    assert error.value.path == str(models("lora"))


@pytest.mark.parametrize(
    ("name", "words"), [("lora", "an adapter, not a model"), ("mmproj", "projector .*, not a model")]
)
def test_adapters_and_projectors_are_refused_as_models(models: Models, name: str, words: str) -> None:
    with pytest.raises(LoadError, match=words) as error:
        load(LlamaLoader(ModelConfig(path=str(models(name)))))
    assert error.value.path == str(models(name))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama", r"a model \(llama\), not a projector"),
        ("lora", r"an? adapter \(llama\), not a projector"),
        ("mmproj-wide", "n_embd = 64.*n_embd = 128"),
    ],
)
def test_other_files_are_refused_as_projectors(models: Models, name: str, words: str) -> None:
    path = str(models(name))
    with pytest.raises(LoadError, match=words) as error:
        load(LlamaLoader(ModelConfig(path=str(models("llama")), projector=path)))
    assert error.value.path == path


def test_a_model_that_takes_tokens_only_has_no_projector(models: Models) -> None:
    config = ModelConfig(path=str(models("bert")), projector=str(models("mmproj")))
    with pytest.raises(LoadError, match="tokens only"):
        load(LlamaLoader(config))


def test_progress_covers_all_files(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "POLL_SECONDS", 0.001)
    adapters = (AdapterConfig(str(models("lora")), name="one"), AdapterConfig(str(models("lora")), 0.0, name="other"))
    seen: list[float] = []
    config = ModelConfig(path=str(models("llama")), projector=str(models("mmproj")), adapters=adapters)
    runtime = LlamaLoader(config)(SMALL, progress=seen.append, cancelled=lambda: False)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert runtime.projector is not None
    assert [(loaded.name, loaded.scale, loaded.path) for loaded in runtime.adapters] == [
        ("one", 1.0, str(models("lora"))),
        ("other", 0.0, str(models("lora"))),
    ]


@pytest.fixture
def renamed(models: Models, tmp_path: Path) -> str:
    """A model without one of its tensors."""
    data = models("llama").read_bytes().replace(b"blk.0.attn_norm.weight", b"blk.0.attn_morn.weight")
    path = tmp_path / "renamed.gguf"
    path.write_bytes(data)
    return str(path)


def test_errors_of_a_load_contain_llama_cpps_message(renamed: str) -> None:
    with pytest.raises(LoadError, match=r"blk\.0\.attn_norm\.weight"):
        load(LlamaLoader(ModelConfig(path=renamed)))


def test_the_native_log_goes_to_the_logger(renamed: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger.name), pytest.raises(LoadError):
        load(LlamaLoader(ModelConfig(path=renamed)))
    drain_log()
    assert any(record.name == logger.name for record in caplog.records)


def test_the_library_finds_the_cpu() -> None:
    assert any(device.kind == "CPU" for device in devices())
    assert "CPU" in system_info()


def test_error_codes_become_exceptions() -> None:
    assert check("anything", 3) == 3
    with pytest.raises(NativeError) as error:
        check("trio_seq_remove", native().lib.trio_seq_remove(native().ffi.NULL, 0, 0, 0))
    assert error.value.function == "trio_seq_remove"
    assert error.value.code == native().lib.TRIO_E_INVALID
    assert error.value.message == "context is NULL"
