"""Writes trio_runner/options.py from the tables of parameters. With --check: exit with 1 if the file is out of date.

Python has no way to tell a type checker "the fields of this dataclass, as keyword arguments". A TypedDict can, but its
keys must stand in the source. So the source is written from the tables, and a test compares.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trio_runner.config import EngineConfig  # noqa: E402
from trio_runner.parameters import Parameter, parameters_of  # noqa: E402
from trio_runner.request import GenerateRequest  # noqa: E402
from trio_runner.sampling import SamplingParams  # noqa: E402

TARGET = ROOT / "trio_runner" / "options.py"

HEAD = '''"""Keyword arguments of `open_engine`, `Engine.generate` and `Engine.chat`, for type checkers and editors.

Written by ci/options from the tables in sampling.py, request.py and config.py. Do not edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from trio_runner.config import FlashAttention, KvType, Pooling
from trio_runner.image_source import ImageSource
from trio_runner.json_schema import JsonSchema
from trio_runner.request import AdapterChoice, Priority
from trio_runner.sampling import SamplingParams
'''

LOOSER = {
    "logit_bias": "Sequence[tuple[int, float]]",
    "dry_sequence_breakers": "Sequence[str]",
    "image_data": "Sequence[tuple[int, ImageSource]]",
    "adapters": "Sequence[AdapterChoice] | None",
    "stop": "str | Sequence[str]",
    "json_schema": "JsonSchema",
}
"""Types of the arguments where they are wider than those of the fields: any sequence becomes a tuple."""


def described(parameter: Parameter) -> str:
    """What the parameter does, with its unit."""
    unit_missing = parameter.unit and parameter.unit not in parameter.doc.lower()
    return f"{parameter.doc} In {parameter.unit}." if unit_missing else parameter.doc


def typed_dict(
    name: str, doc: str, *classes: type[Any], base: str = "TypedDict", leave_out: tuple[str, ...] = ()
) -> str:
    lines = [f"class {name}({base}, total=False):", f'    """{doc}"""', ""]
    for cls in classes:
        parameters = parameters_of(cls)
        for field in dataclasses.fields(cls):
            if field.name in leave_out:
                continue
            lines.append(f"    {field.name}: {LOOSER.get(field.name, field.type)}")
            text = (
                described(parameters[field.name])
                if field.name in parameters
                else "How tokens are chosen, as one value."
            )
            quoted = text.replace("\\", "\\\\").replace('"', '\\"') if text.endswith('"') else text
            lines += textwrap.wrap(
                f'"""{quoted}"""', 112, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
            )
    return "\n".join(lines)


def source() -> str:
    parts = [
        HEAD,
        typed_dict("SamplingOptions", "The fields of `SamplingParams`.", SamplingParams),
        typed_dict(
            "ChatOptions",
            "The fields of `GenerateRequest` that go with a conversation, and those of `SamplingParams`.",
            GenerateRequest,
            base="SamplingOptions",
            leave_out=("prompt", "image_data"),
        ),
        typed_dict(
            "GenerateOptions",
            "The fields of `GenerateRequest` and those of `SamplingParams`.",
            GenerateRequest,
            base="ChatOptions",
            leave_out=tuple(field.name for field in dataclasses.fields(GenerateRequest) if field.name != "image_data"),
        ),
        typed_dict("EngineOptions", "The fields of `EngineConfig`.", EngineConfig),
    ]
    formatted = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(TARGET), "-"],
        input="\n\n\n".join(parts) + "\n",
        text=True,
        capture_output=True,
        check=True,
    )
    return formatted.stdout


def main() -> int:
    wanted = source()
    if "--check" in sys.argv[1:]:
        if TARGET.read_text(encoding="utf-8") == wanted:
            return 0
        print("trio_runner/options.py is out of date: run ci/options", file=sys.stderr)
        return 1
    TARGET.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
