"""The drop-in mode's command line, up to the point where a server would start."""

from __future__ import annotations

import dataclasses
import logging
import math

import pytest

from trio_runner.cli import dropin, service
from trio_runner.cli.logs import SlogFormatter
from trio_runner.cli.main import main
from trio_runner.config import AdapterConfig, EngineConfig, ModelConfig
from trio_runner.errors import LoadError


def read(*arguments: str) -> dropin.Settings:
    values, _ = dropin.FLAGS.parse(arguments)
    return dropin.read_settings(values)


def test_the_defaults_are_the_originals() -> None:
    assert read("-model", "m.gguf") == dropin.Settings(
        ModelConfig(path="m.gguf", gpu_layers=0),
        EngineConfig(slots=1, context_length=2048, batch_size=512, embedding_batch_size=2048),
        port=8080,
    )


def test_every_flag_of_an_old_server_arrives() -> None:
    command = "--model m.gguf --ctx-size 8192 --batch-size 512 --embedding --log-disable --n-gpu-layers 33 --verbose"
    command += " --main-gpu 1 --lora a.gguf --threads 8 --memory-f32 --flash-attn --no-mmap --mlock --numa distribute"
    command += " --parallel 4 --tensor-split 3,1 --multiuser-cache --port 43210 --mmproj p.gguf"
    assert read(*command.split()) == dropin.Settings(
        ModelConfig(
            path="m.gguf",
            projector="p.gguf",
            adapters=(AdapterConfig("a.gguf", 1.0),),
            gpu_layers=33,
            main_gpu=1,
            tensor_split=(3.0, 1.0),
            mmap=False,
            mlock=True,
        ),
        EngineConfig(
            slots=4,
            context_length=2048,
            batch_size=512,
            embedding_batch_size=2048,
            threads=8,
            flash_attention="on",
        ),
        port=43210,
    )


def test_every_flag_sets_a_field_or_is_known_to_set_none() -> None:
    without = set()
    for flag in dropin.FLAGS.flags:
        assert isinstance(flag, dropin.DropinFlag)
        for setting in flag.settings:
            assert setting.field in {field.name for field in dataclasses.fields(setting.config)}
        if not flag.settings:
            without.add(flag.name)
    read_elsewhere, ignored = {"verbose", "requirements"}, {"embedding", "log-disable", "memory-f32", "numa"}
    assert without == read_elsewhere | ignored | {"multiuser-cache"}


def test_an_adapter_turns_mmap_off() -> None:
    assert read("-model", "m").model.mmap
    assert not read("-model", "m", "-lora", "a").model.mmap


def test_the_context_is_divided_among_the_slots() -> None:
    assert read("-model", "m", "-ctx-size", "1000", "-parallel", "3").engine.context_length == 333


@pytest.mark.parametrize(("flags", "limit"), [([], 8 << 20), (["-mmproj", ""], 8 << 20), (["-mmproj", "p"], 64 << 20)])
def test_bodies_may_be_larger_if_the_model_takes_images(
    flags: list[str], limit: int, monkeypatch: pytest.MonkeyPatch, restored_logging: None
) -> None:
    limits = []

    async def run_service(model: ModelConfig, engine: EngineConfig, options: service.ServiceConfig) -> None:
        limits.append(options.max_body_bytes)

    monkeypatch.setattr(service, "run_service", run_service)
    assert dropin.main(["-model", "m", *flags]) == 0
    assert limits == [limit]


@pytest.mark.parametrize(
    ("text", "split"),
    [("", ()), ("1", (1.0,)), ("1,x,2", (1.0, 0.0, 2.0)), ("nan,inf,-1,1e999", (0.0,) * 4), (",", (0.0, 0.0))],
)
def test_the_tensor_split_is_read(text: str, split: tuple[float, ...]) -> None:
    assert dropin.read_tensor_split(text) == split
    assert all(math.isfinite(share) for share in split)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--model is missing"),
        (("-model", "m", "-parallel", "0"), "parallel must be"),
        (("-model", "m", "-parallel", "1000"), "slots must be"),
        (("-model", "m", "-ctx-size", "0"), "context_length must be"),
        (("-model", "m", "-port", "70000"), "port must be"),
        (("-model", "m", "-batch-size", "0"), "batch_size must be"),
    ],
)
def test_values_that_no_engine_can_have_are_refused(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], restored_logging: None
) -> None:
    with pytest.raises((ValueError, LoadError), match=message):
        read(*arguments)
    assert dropin.main(arguments) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_the_context_of_a_slot_needs_a_slot() -> None:
    """Whichever of the two flags is read first."""
    (flag,) = (flag for flag in dropin.FLAGS.flags if flag.name == "ctx-size")
    assert isinstance(flag, dropin.DropinFlag)
    assert len(flag.settings) == 2
    for setting in flag.settings:
        with pytest.raises(ValueError, match="parallel must be 1 or more"):
            setting.read(flag.default, {"parallel": 0})


@pytest.mark.parametrize(
    ("arguments", "code", "first_line"),
    [
        (["-h"], 0, "Usage of trio-runner:"),
        (["-help"], 0, "Usage of trio-runner:"),
        (["-no-such-flag"], 2, "flag provided but not defined: -no-such-flag"),
        (["-model"], 2, "flag needs an argument: -model"),
        (["--port", "x"], 2, 'invalid value "x" for flag -port: parse error'),
    ],
)
def test_a_dash_at_the_start_chooses_the_dropin_mode(
    arguments: list[str], code: int, first_line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(first_line + "\n")
    assert "  -ctx-size int\n" in err


def test_the_features_of_the_cpu_are_read() -> None:
    line = "CPU : SSE3 = 1 | SSSE3 = 1 | AVX512 = 0 | AVX = 1 | REPACK = 1 | "
    assert dropin.cpu_features(line) == "sse3,ssse3,avx"
    assert dropin.cpu_features("") == ""


def test_log_lines_have_the_format_of_slog() -> None:
    record = logging.LogRecord("x", logging.WARNING, "/a/b.py", 7, "say %s", ('"hi"\n',), None)
    line = SlogFormatter().format(record)
    assert line.startswith("time=2")
    assert line.endswith(r' level=WARN source=b.py:7 msg="say \"hi\"\n"')
