"""`trio-runner info`: facts about the model, the devices and the libraries."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from trio_runner import __version__
from trio_runner.cli.logs import set_up_logging
from trio_runner.cli.options import EngineChoice, engine_options
from trio_runner.info import MIB

if TYPE_CHECKING:
    from trio_runner.info import Device, Placement
    from trio_runner.interface import EngineInterface


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@engine_options(slots=1)
def info(options: EngineChoice, /, as_json: bool) -> int:
    """Print facts about the model, the devices and the libraries."""
    set_up_logging(options.verbose)
    configs = options.configs()

    from trio_runner.cli.running import run_with_engine

    async def print_facts(engine: EngineInterface) -> None:
        facts = collect_facts(engine)
        if as_json:
            click.echo(json.dumps(facts, ensure_ascii=False, default=str))
            return
        width = max(len(name) for section in facts.values() for name in section)
        for title, section in facts.items():
            click.echo(f"{title}:")
            for name, value in section.items():
                click.echo(f"  {name:<{width}} {value}")

    return run_with_engine(configs, print_facts)


def collect_facts(engine: EngineInterface) -> dict[str, dict[str, object]]:
    """Sections of names and values, in the order to print them in."""
    from trio_runner.llama import backends, library

    model, capabilities, placement = engine.info, engine.capabilities, engine.placement
    remote = [device.number for device in placement.devices if device.is_remote] if placement else []
    return {
        "model": {
            "name": model.name,
            "architecture": model.architecture,
            "description": model.description,
            "parameters": model.n_params,
            "bytes": model.size,
            "layers": model.n_layer,
            "embedding length": model.n_embd,
            "vocabulary": model.n_vocab,
            "trained context": model.n_ctx_train,
            "causal": model.causal,
            "chat template": model.chat_template is not None,
        },
        "context": {
            "tokens per slot": capabilities.n_ctx,
            "generates text": capabilities.can_generate,
            "takes images": engine.has_projector,
            "ranks": capabilities.ranks,
            "reads with an encoder": capabilities.decoder_start is not None,
            "can go back in a text": capabilities.can_trim,
            "can shift": capabilities.can_shift,
        },
        "placement": placement_facts(placement),
        "devices": {device.name: describe_device(device) for device in backends.devices(remote)},
        "backends": {
            plugin.name: "opened" if plugin.problem is None else f"cannot be opened: {plugin.problem}"
            for plugin in backends.plugins()
        },
        "library": {"trio-runner": __version__, "binding ABI": library.ABI, "system": library.system_info()},
    }


def placement_facts(placement: Placement | None) -> dict[str, object]:
    """Which memory the model and its context take, and where."""
    if placement is None:
        return {}
    facts: dict[str, object] = {"layers on devices": f"{placement.n_device_layers} of {placement.n_layers}"}
    for device, use in placement.places:
        facts["this machine" if device is None else device.name] = f"{use.total / MIB:.0f} MiB: {use}"
    return facts


def describe_device(device: Device) -> str:
    """The kind of a device, its memory, and the types of weights and of KV caches that it computes with by itself."""
    from trio_runner.llama.backends import kv_types, weight_types

    text = f"{device.kind}, {device.description} ({device.backend})"
    if device.memory_total:
        text += f", {device.memory_free / MIB:.0f} of {device.memory_total / MIB:.0f} MiB free"
    if device.kind == "CPU":
        return text
    if device.is_remote:
        return f"{text}, computes with what its backend has"
    return f"{text}; weights: {' '.join(weight_types(device))}; KV cache: {' '.join(kv_types(device))}"
