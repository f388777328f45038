"""The options of the commands: what they become, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import pytest

from tests.cli.calls import Call
from trio_runner.cli.main import main
from trio_runner.cli.options import EngineChoice, engine_options, table_options
from trio_runner.cli.service import ServiceConfig
from trio_runner.config import AdapterConfig, EngineConfig, ModelConfig, read_adapter, read_scaled_adapter
from trio_runner.parameters import Option, number, other, parameters_of
from trio_runner.sampling import SamplingParams
from trio_runner.server.names import ModelNames


def test_the_defaults_are_those_of_the_configuration(call: Call) -> None:
    assert main(["serve"]) == 0
    assert call.model == ModelConfig(path="/fetched/SmolLM2-135M-Instruct")
    assert call.engine == EngineConfig(load_wait=120)
    assert call.service == ServiceConfig(
        names=ModelNames("SmolLM2-135M-Instruct"), model_path=Path("/fetched/SmolLM2-135M-Instruct")
    )
    assert main(["run", "hello"]) == 0
    assert call.engine == EngineConfig(slots=1, stall_timeout=float("inf"))
    for command in (["embed", "hello"], ["rerank", "hello", "you"]):
        assert main(command) == 0
        assert call.model == ModelConfig(path="/fetched/SmolLM2-135M-Instruct")
        assert call.engine == EngineConfig()


def test_every_option_arrives(call: Call, tmp_path: Path) -> None:
    command = "serve -m m.gguf --slots 2 --context-length 100 --batch-size 32 --threads 3 --gpu-layers 7 --main-gpu 1"
    command += " --tensor-split 3,1.5 --lora a.gguf --lora-scaled b.gguf=0.5 --lora c.gguf --lora-scaled d=1=-2"
    command += " --device Vulkan0,RPC1 --rpc 127.0.0.1:50052,box.example:1 --split-mode row"
    command += f" --mmproj p.gguf --flash-attention on --kv-type q8_0 --no-mmap --adapter-dir {tmp_path}"
    command += " --mlock --check-tensors --step-target 40 --pooling mean --max-queue 9 --host ::1 --port 0"
    command += " --drain-timeout 2.5 --allowed-host a.example --allowed-origin https://b.example -v"
    command += " --allowed-origin app://- --model-name small --alias gpt-4o --alias tiny --any-model --load-wait 3"
    assert main(command.split()) == 0
    assert call.model == ModelConfig(
        path="/fetched/m.gguf",
        projector="p.gguf",
        adapters=(
            AdapterConfig("a.gguf"),
            AdapterConfig("c.gguf"),
            AdapterConfig("b.gguf", 0.5),
            AdapterConfig("d=1", -2.0),
        ),
        gpu_layers=7,
        devices=("Vulkan0", "RPC1"),
        rpc=("127.0.0.1:50052", "box.example:1"),
        split_mode="row",
        main_gpu=1,
        tensor_split=(3.0, 1.5),
        mmap=False,
        mlock=True,
        check_tensors=True,
    )
    assert call.engine == EngineConfig(
        slots=2,
        context_length=100,
        batch_size=32,
        threads=3,
        flash_attention="on",
        kv_type="q8_0",
        step_target=0.04,
        pooling="mean",
        max_queue=9,
        load_wait=3,
    )
    assert call.service == ServiceConfig(
        host="::1",
        port=0,
        drain_timeout=2.5,
        allowed_hosts=("a.example",),
        allowed_origins=("https://b.example", "app://-"),
        names=ModelNames("small", ("gpt-4o", "tiny"), any_model=True),
        model_path=Path("/fetched/m.gguf"),
        adapter_dir=tmp_path,
        max_body_bytes=64 << 20,
    )


@pytest.mark.parametrize(
    ("options", "host", "port", "path"),
    [
        ("", "127.0.0.1", 8080, None),
        ("--socket s", "127.0.0.1", None, "s"),
        ("--socket s --port 1", "127.0.0.1", 1, "s"),
        ("--socket s --host ::1", "::1", 8080, "s"),
        ("--host ::1 --port 0", "::1", 0, None),
    ],
)
def test_a_port_is_opened_unless_there_is_only_a_socket(
    options: str, host: str, port: int | None, path: str | None, call: Call
) -> None:
    assert main(["serve", *options.split()]) == 0
    assert call.service is not None
    assert (call.service.host, call.service.port) == (host, port)
    assert call.service.socket == (None if path is None else Path(path))


@pytest.mark.parametrize(
    ("options", "layers", "devices"),
    [
        ("", "auto", None),
        ("--gpu-layers auto --device none", "auto", ()),
        ("--n-gpu-layers -1 --device Metal", -1, ("Metal",)),
        ("-ngl 0", 0, None),
    ],
)
def test_layers_and_devices_arrive(
    options: str, layers: int | Literal["auto"], devices: tuple[str, ...] | None, call: Call
) -> None:
    assert main(["serve", *options.split()]) == 0
    assert call.model == ModelConfig(path="/fetched/SmolLM2-135M-Instruct", gpu_layers=layers, devices=devices)


TOLD = "--slots 2 --context-length 100 --batch-size 32 --threads 3 --gpu-layers 7 --main-gpu 1 --mlock --no-mmap"
TOLD += " --tensor-split 3,1.5 --lora a.gguf --lora-scaled b.gguf=0.5 --lora c:1 --lora-scaled d=1=-2"
TOLD += " --mmproj p.gguf --flash-attention on --kv-type q8_0 --check-tensors --step-target 40 --pooling mean"


@pytest.mark.parametrize(
    "more", ["", " --device none", " --device A,B --rpc a:1,b:2 --split-mode none --gpu-layers auto"]
)
def test_bench_gives_its_server_the_same_engine(more: str, call: Call) -> None:
    given: list[EngineChoice] = []

    @click.command()
    @engine_options()
    def bench(options: EngineChoice, /) -> None:
        given.append(options)

    command = f"{TOLD}{more}".split()
    bench.main(command, standalone_mode=False)
    assert main(["serve", *given[0].serve_arguments()]) == 0
    told = call.model, call.engine
    assert main(["serve", *command]) == 0
    assert told == (call.model, call.engine)


@pytest.mark.parametrize(
    "command",
    [
        "serve --port 65536",
        "serve --allowed-origin http://localhost:3000/app",
        "serve --allowed-origin *",
        "serve --model-name=",
        "serve --alias=",
        "serve --port x",
        "serve --parent-pid 0",
        "serve --slots 0",
        "serve --slots 1000",
        "serve --context-length 1",
        "serve --threads 0",
        "serve --kv-type f64",
        "serve --flash-attention maybe",
        "serve --gpu-layers all",
        "serve --gpu-layers -2",
        "serve --rpc nonsense",
        "serve --rpc a:0",
        "serve --rpc a:1,:2",
        "serve --split-mode tensor",
        "serve --main-gpu -1",
        "serve --tensor-split 1,x",
        "serve --tensor-split 1,-1",
        "serve --mmproj=",
        "serve --lora=",
        "serve --lora-scaled a",
        "serve --lora-scaled a=",
        "serve --lora-scaled =1",
        "serve --lora-scaled a=b",
        "serve --lora-scaled a=nan",
        "serve --lora-scaled a=-inf",
        "serve --lora-scaled a:1",
        "serve --lora x/a.gguf --lora y/a.gguf",
        "serve --lora a.gguf --lora-scaled a.gguf=2",
        "serve --adapter-dir /no/such/directory",
        f"serve --adapter-dir {__file__}",
        "serve --drain-timeout -1",
        "serve --max-queue -1",
        "serve --max-queue none",
        "serve --step-target 0",
        "serve --step-target nan",
        "serve --step-target fast",
        "serve --cache-policy best",
        "serve --model=",
        "serve --api-key-file /no/such/file",
        "serve x",
        "run x --temperature hot",
        "run x --temperature nan",
        "run x --min-p 2",
        "run x --seed -1",
        "run x -n -1",
        "run x --stop " + "y" * 2000,
        "run x --grammar-file /no/such/file",
        "run x y",
        "run x --image /no/such/file",
        "run x --image /",
        "embed",
        "embed x --dimensions 0",
        "embed x --dimensions few",
        "rerank",
        "rerank x",
        "rerank x y --normalize",
        "fetch x y",
        "nonsense",
        "bench --rounds 0",
    ],
)
def test_a_wrong_command_line_is_a_usage_error(command: str, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split(" ")) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "Usage: trio-runner" in err
    assert "Error: " in err
    assert call == Call()


@pytest.mark.parametrize("path", ["a.gguf", "a.gguf:0.25", "C:a.gguf", "C:\\a.gguf", "a=1", "a=b=", "dir=1/é", "=2"])
@pytest.mark.parametrize(("text", "scale"), [("0.25", 0.25), ("-1", -1.0), ("+2e-1", 0.2), ("0", 0.0)])
def test_adapters_are_read(path: str, text: str, scale: float) -> None:
    assert read_adapter(path) == AdapterConfig(path, 1.0)
    assert read_scaled_adapter(f"{path}={text}") == AdapterConfig(path, scale)


# ---- options from tables ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Extended(SamplingParams):
    """A copy of the table with new entries."""

    warmth: float = number(0.5, 0, 2, doc="How warm the text is.")
    delay: float | None = number(
        None,
        0.001,
        60,
        unit="seconds",
        options=(Option(metavar="MS", scale=0.001, unit="milliseconds"),),
        doc="Time to wait.",
        default_text="none",
    )
    colours: tuple[str, ...] = other(
        (),
        doc="Colours.",
        options=(
            Option(flags=("--colour", "-c"), parse=str.upper, repeated=True),
            Option(flags=("--grey",), parse=lambda text: f"grey {int(text)}", repeated=True, doc="Shades of grey."),
        ),
    )
    hidden: float = number(0.5, 0, 2, doc="Not for people.", options=())


def choose(*arguments: str) -> dict[str, Any]:
    """What a command with the options of `Extended` gets."""
    got: list[dict[str, Any]] = []

    @click.command()
    @table_options(Extended)
    def command(chosen: dict[str, Any], /) -> None:
        got.append(chosen)

    command.main(list(arguments), standalone_mode=False)
    return got[0] if got else {}


def test_a_new_entry_of_a_table_is_an_option() -> None:
    assert choose() == {}
    assert choose("--warmth", "1.5", "--top-k", "3") == {"warmth": 1.5, "top_k": 3}
    assert choose("--delay", "40") == {"delay": 0.04}
    assert choose("--colour", "red", "--grey", "7", "-c", "blue") == {"colours": ("RED", "BLUE", "grey 7")}


def test_the_help_of_an_option_is_the_text_of_its_entry(capsys: pytest.CaptureFixture[str]) -> None:
    choose("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--warmth FLOAT How warm the text is. [default: 0.5]" in text
    assert "--delay MS Time to wait. [default: none]" in text
    assert "--seed INTEGER Seed of the random draw. The same seed gives" in text
    assert "-c, --colour TEXT Colours. --grey TEXT Shades of grey." in text
    assert "hidden" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--warmth", "3"], "Invalid value for '--warmth': it must be between 0 and 2, not 3.0"),
        (["--warmth", "x"], "Invalid value for '--warmth': 'x' is not a number"),
        (["--top-k", "1.5"], "Invalid value for '--top-k': '1.5' is not an integer"),
        (["--delay", "0"], "Invalid value for '--delay': it must be between 1 and 60000 milliseconds, not 0.0"),
        (["--grey", "x"], "Invalid value for '--grey': invalid literal for int() with base 10: 'x'"),
        (["--hidden", "1"], "No such option"),
    ],
)
def test_a_value_outside_its_range_is_refused_in_the_units_of_the_option(arguments: list[str], message: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        choose(*arguments)
    assert message in caught.value.format_message()


@pytest.mark.parametrize("table", [ModelConfig, EngineConfig, SamplingParams])
def test_every_parameter_of_an_engine_is_an_option_or_says_that_it_is_none(table: type[Any]) -> None:
    without = {name for name, parameter in parameters_of(table).items() if not parameter.options}
    lists = {"logit_bias", "dry_sequence_breakers"}
    assert without <= lists | {"penalize_nl", "grammar", "json_schema", "logprobs", "post_sampling_probs"}
