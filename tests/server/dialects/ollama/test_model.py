"""What Ollama's dialect tells about the model."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.server.fake_engine import INFO
from trio_runner.core.chat import ChatTemplate
from trio_runner.info import Capabilities, Device, MemoryUse, ModelInfo, Placement
from trio_runner.server.dialects.ollama.model import ServedModel, no_file, short_count, with_tag
from trio_runner.server.model_file import ModelFile

FILE = ModelFile("fake.gguf", 2000, 1_700_000_000_000_000_005, "ab" * 32)
DETAILS = {
    "parent_model": "",
    "format": "gguf",
    "family": "fake",
    "families": ["fake"],
    "parameter_size": "2.4B",
    "quantization_level": "Q4_K_M",
}


def served(info: ModelInfo = INFO, **more: Any) -> ServedModel:
    capabilities = Capabilities(n_slots=1, n_ctx=100, max_rows=32, can_generate=more.pop("can_generate", True))
    defaults = {"name": "fake", "placement": None, "has_projector": False, "file": FILE}
    return ServedModel(info=info, capabilities=capabilities, **{**defaults, **more})


def shown(info: ModelInfo = INFO, **more: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(served(info, **more).show())
    return answer


def test_tags_have_an_entry_for_each_name() -> None:
    entry = {
        "modified_at": "2023-11-14T22:13:20.000000005Z",
        "size": 2000,
        "digest": "ab" * 32,
        "details": DETAILS,
    }
    assert json.loads(served().tags(("fake", "llama3.2:1b"))) == {
        "models": [{"name": name, "model": name, **entry} for name in ("fake:latest", "llama3.2:1b")]
    }


def test_processes() -> None:
    expected = {
        "name": "fake:latest",
        "model": "fake:latest",
        "size": 1500,
        "digest": "ab" * 32,
        "details": DETAILS,
        "expires_at": "9999-12-31T23:59:59Z",
        "size_vram": 0,
        "context_length": 100,
    }
    assert json.loads(served().processes()) == {"models": [expected]}
    device = Device(3, "GPU", "", "Vulkan", "GPU", 0, 0)
    placement = Placement(2, 1, (device,), (MemoryUse(3, 10, 20, 30), MemoryUse(None, 1, 2, 3)))
    on_device = {**expected, "size": 66, "size_vram": 60}
    assert json.loads(served(placement=placement).processes()) == {"models": [on_device]}


def test_show() -> None:
    template = INFO.chat_template
    assert shown() == {
        "license": "mit",
        "modelfile": f'FROM fake.gguf\nTEMPLATE """{template}"""\nPARAMETER num_ctx 100\n',
        "parameters": "num_ctx                        100",
        "template": template,
        "details": DETAILS,
        "model_info": {
            "general.file_type": 15,
            "general.size_label": "2B",
            "general.license": "mit",
            "fake.context_length": 100,
            "fake.rope.freq_base": 10000.0,
            "tokenizer.ggml.add_bos_token": True,
            "general.architecture": "fake",
            "general.basename": "fake",
            "general.parameter_count": 2_400_000_000,
            "fake.embedding_length": 3,
            "fake.block_count": 2,
        },
        "capabilities": ["completion"],
        "modified_at": "2023-11-14T22:13:20.000000005Z",
    }


def test_the_context_that_editors_read_is_the_one_that_is_served() -> None:
    assert shown()["model_info"]["fake.context_length"] == 100 != INFO.n_ctx_train


def test_capabilities() -> None:
    def with_metadata(**more: str) -> ModelInfo:
        return dataclasses.replace(
            INFO, metadata={**INFO.metadata, **{k.replace("_dot_", "."): v for k, v in more.items()}}
        )

    thinker = dataclasses.replace(INFO, chat_template="{{ x.split('</think>') }}")
    assert shown(thinker)["capabilities"] == ["completion", "thinking"]
    assert shown(has_projector=True)["capabilities"] == ["completion", "vision"]
    assert shown(with_metadata(fake_dot_pooling_type="1"))["capabilities"] == ["embedding"]
    assert shown(can_generate=False)["capabilities"] == ["embedding"]


def test_a_model_that_fills_gaps_says_so_where_editors_look() -> None:
    filler = dataclasses.replace(INFO, token_fim_pre=1, token_fim_suf=2, token_fim_mid=3)
    assert shown(filler)["capabilities"] == ["completion", "insert"]
    assert ".Suffix" in shown(filler)["template"]
    assert ".Suffix" not in shown()["template"]
    assert ChatTemplate(shown(filler)["template"], bos_token="", eos_token="").render(
        [{"role": "user", "content": "x"}]
    ) == ("x",)


def test_a_model_about_which_little_is_known() -> None:
    bare = ModelInfo(name="", architecture="odd", description="", n_vocab=1, n_ctx_train=1, n_embd=1)
    answer = shown(bare)
    assert "license" not in answer
    assert answer["template"] == "{{ .Prompt }}"
    assert answer["details"]["quantization_level"] == "unknown"
    assert answer["details"]["parameter_size"] == "0"
    odd = dataclasses.replace(bare, metadata={"general.file_type": "9999", "odd.x": "-1", "odd.y": "1.5e-05"})
    assert shown(odd)["details"]["quantization_level"] == "unknown"
    assert (shown(odd)["model_info"]["odd.x"], shown(odd)["model_info"]["odd.y"]) == (-1, 1.5e-05)


@pytest.mark.parametrize(
    ("number", "text"),
    [(134515008, "134.52M"), (8_000_000_000, "8B"), (8_030_261_248, "8.0B"), (2_000_000, "2M"), (1500, "2K"), (7, "7")],
)
def test_numbers_of_parameters(number: int, text: str) -> None:
    assert short_count(number) == text


@pytest.mark.parametrize(
    ("name", "tagged"), [("a", "a:latest"), ("a:1b", "a:1b"), ("h:80/a", "h:80/a:latest"), ("a:latest", "a:latest")]
)
def test_tags_of_names(name: str, tagged: str) -> None:
    assert with_tag(name) == tagged


def test_the_digest_stays_as_long_as_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"x" * 3_000_000)
    first = ModelFile.read(path)
    assert (first.name, first.size, first.modified_ns) == ("m.gguf", 3_000_000, path.stat().st_mtime_ns)
    assert len(first.digest) == 64
    assert ModelFile.read(path) == first
    os.utime(path, ns=(1, 1))
    assert ModelFile.read(path).digest != first.digest
    path.write_bytes(b"y" + b"x" * 2_999_999)
    os.utime(path, ns=(1, 1))
    changed = ModelFile.read(path)
    assert changed.digest != ModelFile.read(Path(path.rename(tmp_path / "n.gguf"))).digest


def test_a_split_model_is_as_large_as_all_its_parts(tmp_path: Path) -> None:
    for part in (1, 2, 3):
        (tmp_path / f"m-0000{part}-of-00003.gguf").write_bytes(b"x" * part)
    (tmp_path / "m.gguf").write_bytes(b"x" * 50)
    assert ModelFile.read(tmp_path / "m-00001-of-00003.gguf").size == 6


def test_a_model_without_a_file() -> None:
    file = no_file(INFO, 5)
    assert (file.size, file.modified_ns, len(file.digest)) == (1500, 5, 64)
    assert no_file(INFO, 6).digest == file.digest
