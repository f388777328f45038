"""The command `llm`, unmodified, against the default model, with its configuration for servers like OpenAI's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from llm.cli import cli

from tests.clients.served import MODEL, Served
from tests.real.pictures import picture


@pytest.fixture(scope="module")
def home(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a user with two models, both of them ours."""
    path = tmp_path_factory.mktemp("llm")
    model = {"model_name": MODEL, "api_base": f"{server.url}/v1", "supports_schema": True, "vision": True}
    models = [{"model_id": "smol"} | model, {"model_id": "text", "completion": True} | model]
    (path / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML too
    return path


def llm(home: Path, *arguments: str, status: int = 0) -> str:
    """What the command prints. It runs in this process, as it takes seconds to start."""
    environment = {"LLM_USER_PATH": str(home), "OPENAI_API_KEY": "any"}
    done = CliRunner().invoke(cli, arguments, env=environment)
    assert done.exit_code == status, done.output
    return done.output


GREEDY = ("-o", "temperature", "0", "-o", "max_tokens", "12")


def test_prompts(home: Path) -> None:
    streamed = llm(home, "-m", "smol", *GREEDY, "Count from one to ten.")
    assert streamed.strip()
    assert llm(home, "-m", "smol", "--no-stream", *GREEDY, "Count from one to ten.") == streamed
    logged = json.loads(llm(home, "logs", "--json", "-n", "1"))[0]
    assert logged["response"].strip() == streamed.strip()
    assert logged["output_tokens"] == 12


def test_a_conversation_and_a_system_prompt(home: Path) -> None:
    assert llm(home, "-m", "smol", *GREEDY, "-s", "You are a parrot.", "Hello").strip()
    assert llm(home, "-c", *GREEDY, "And again").strip()


def test_a_schema(home: Path) -> None:
    schema = json.dumps({"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]})
    answer = llm(home, "-m", "smol", "-o", "temperature", "0", "--schema", schema, "Anna is 30 years old.")
    assert isinstance(json.loads(answer)["age"], int)


def test_an_image(home: Path) -> None:
    file = home / "picture.png"
    file.write_bytes(picture("red", "circle", "white"))
    assert llm(home, "-m", "smol", *GREEDY, "Describe the image.", "-a", str(file)).strip()


def test_errors_are_shown(home: Path) -> None:
    shown = llm(home, "-m", "smol", "-o", "temperature", "0", "-o", "max_tokens", "-7", "x", status=1)
    assert "max_tokens" in shown
