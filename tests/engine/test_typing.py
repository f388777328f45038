"""What a type checker tells programs that use the package: good calls pass, and misspelt ones are errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """\
import numpy as np
from numpy.typing import NDArray

from trio_runner import AdapterChoice, Chat, EngineConfig, GenerateRequest, RerankRequest, SamplingParams, open_engine


async def good() -> None:
    async with open_engine("model.gguf", slots=2, context_length=None, flash_attention="on", max_queue=None) as engine:
        text: str = await engine.generate("hello", temperature=0.5, max_tokens=5, stop="\\n", seed=1).collect()
        await engine.generate([1, 2, 3], sampling=SamplingParams(top_k=1), adapters=[AdapterChoice("one")]).collect()
        await engine.generate(["see ", b"a picture"], priority="background", deadline=1.5).collect()
        await engine.generate(GenerateRequest(prompt="hello")).collect()
        await engine.generate(Chat(messages=({"role": "user", "content": text},)), logit_bias=[(5, -1.0)]).collect()
        await engine.chat([{"role": "user", "content": text}], tools=[], top_p=0.9).collect()
        async with engine.generate("hello", image_data=[(1, b"a picture")]) as generation:
            async for event in generation:
                print(event.text, generation.usage)
        vectors: NDArray[np.float32] = await engine.embed(["one", "two"], normalize=True)
        scores: NDArray[np.float32] = await engine.rerank("query", ["one"])
        await engine.rerank_request(RerankRequest(query="query", documents=("one",)))
        print(vectors, scores, engine.info.name, engine.statistics().busy)
    async with open_engine("model.gguf", EngineConfig(slots=2), wait=False, cancel_when_broken=False) as engine:
        await engine.wait_ready()


async def bad() -> None:
    async with open_engine("model.gguf", slot=3) as engine:  # error: call-arg
        engine.generate("hello", temprature=1)  # error: call-arg
        engine.generate("hello", temperature="hot")  # error: arg-type
        engine.generate("hello", priority="urgent")  # error: arg-type
        engine.generate(5)  # error: arg-type
        engine.chat([{"role": "user"}], image_data=[])  # error: call-arg
        engine.chat([{"role": "user"}], max_token=5)  # error: call-arg
        await engine.embed(5)  # error: arg-type
        await engine.rerank("query", [1])  # error: list-item
        engine.submit("hello")  # error: attr-defined
        engine.generate("hello").uid  # error: attr-defined
    async with open_engine("model.gguf", slots="four") as engine:  # error: arg-type
        pass
    async with open_engine("model.gguf", kv_type="f17") as engine:  # error: arg-type
        pass
"""


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str]]:
    """The line and the code of each error that mypy finds in the program."""
    folder = tmp_path_factory.mktemp("program")
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--no-pretty"]
    # A cache of its own: with other options than the project's, it would throw that of the project away.
    command += ["--config-file=", f"--cache-dir={ROOT / '.mypy_cache' / 'programs'}", "--python-version=3.11"]
    found = subprocess.run(
        [*command, str(folder / "program.py")],
        cwd=ROOT,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not found.stderr, found.stderr
    errors = [re.search(r"program\.py:(\d+): error: .*\[([a-z-]+)\]$", line) for line in found.stdout.splitlines()]
    return [(int(error[1]), error[2]) for error in errors if error is not None]


def test_a_type_checker_finds_each_mistake_and_nothing_else(complaints: list[tuple[int, str]]) -> None:
    marked = [(number, line) for number, line in enumerate(PROGRAM.splitlines(), 1) if "  # error: " in line]
    assert complaints == [(number, line.partition("  # error: ")[2]) for number, line in marked]
