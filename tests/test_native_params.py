"""The native struct of sampling parameters has a field for each entry of the table."""

from __future__ import annotations

import re
from pathlib import Path

from trio_runner.parameters import parameters_of
from trio_runner.sampling import SamplingParams

HEADER = Path(__file__).parent.parent / "native" / "trio_llama.h"

OTHER_NAMES = {
    "logit_bias": {"bias_tokens", "bias_values", "n_bias"},
    "dry_sequence_breakers": {"dry_breakers", "n_dry_breakers"},
    "logprobs": {"n_top"},
}
"""Fields of the struct for parameters that it has under other names: C has no lists."""


def fields_of(struct: str) -> set[str]:
    """The names of the fields of a struct in the header."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(encoding="utf-8"), flags=re.DOTALL)
    body = re.search(rf"typedef struct {struct} {{(.*?)}}", text, re.DOTALL)
    assert body is not None, f"native/trio_llama.h declares no struct {struct}"
    return {name for line in body[1].split(";") for name in re.findall(r"(\w+)\s*(?=,|$)", line.strip())}


def test_the_native_struct_has_the_parameters_of_the_table() -> None:
    wanted = {name for parameter in parameters_of(SamplingParams) for name in OTHER_NAMES.get(parameter, {parameter})}
    fields = fields_of("trio_sampler_params")
    missing, unknown = sorted(wanted - fields), sorted(fields - wanted)
    assert not missing, (
        f"trio_runner/sampling.py has {', '.join(missing)}, and trio_sampler_params in native/trio_llama.h has not: "
        "add the field there, and the sampler that uses it in native/"
    )
    assert not unknown, (
        f"trio_sampler_params in native/trio_llama.h has {', '.join(unknown)}, and trio_runner/sampling.py has not: "
        "add the entry there, or remove the field"
    )
