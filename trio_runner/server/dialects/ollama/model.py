"""What Ollama's dialect tells about the model: /api/tags, /api/ps and /api/show. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from msgspec import Struct

from trio_runner.info import Capabilities, ModelInfo, Placement
from trio_runner.server.dialects.json_out import line, whole_characters
from trio_runner.server.dialects.ollama.thinking import thinking_style
from trio_runner.server.dialects.ollama.times import NEVER, timestamp
from trio_runner.server.model_file import ModelFile
from trio_runner.server.names import LATEST

FILE_TYPES: Final[Mapping[int, str]] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4",
}
"""What the numbers of `general.file_type` mean: `enum llama_ftype` in llama.h."""

NO_TEMPLATE: Final = "{{ .Prompt }}"
"""What Ollama shows for a model without a chat template."""
INSERT: Final = "{# With .Suffix, the fill-in-the-middle tokens of the model take the place of this template. #}"
"""Goes before the template of a model that can fill in: editors look for `.Suffix` there. Jinja reads it as a
comment."""


class Details(Struct, kw_only=True):
    """What kind of model it is."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Tag(Struct, kw_only=True):
    """A name of the model, and what it stands for."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Tags(Struct, kw_only=True):
    """The answer of /api/tags."""

    models: list[Tag]


class Running(Struct, kw_only=True):
    """The model in memory. Sizes are in bytes."""

    name: str
    model: str
    size: int
    digest: str
    details: Details
    expires_at: str
    size_vram: int
    context_length: int


class Processes(Struct, kw_only=True):
    """The answer of /api/ps."""

    models: list[Running]


NO_PROCESSES: Final = line(Processes(models=[]))
"""The answer of /api/ps while the model loads."""


class Shown(Struct, kw_only=True, omit_defaults=True):
    """The answer of /api/show."""

    license: str = ""
    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model of a server, and what is known of it."""

    name: str
    info: ModelInfo
    capabilities: Capabilities
    placement: Placement | None
    has_projector: bool
    file: ModelFile

    def tags(self, names: tuple[str, ...]) -> bytes:
        """The answer of /api/tags, with an entry for each of the `names`."""
        return line(Tags(models=[self._tag(name) for name in names]))

    def processes(self) -> bytes:
        """The answer of /api/ps."""
        memory = self.placement.memory if self.placement is not None else ()
        tagged = with_tag(self.name)
        running = Running(
            name=tagged,
            model=tagged,
            size=sum(use.total for use in memory) or self.info.size,
            digest=self.file.digest,
            details=self.details(),
            expires_at=NEVER,
            size_vram=sum(use.total for use in memory if use.device is not None),
            context_length=self.capabilities.n_ctx,
        )
        return line(Processes(models=[running]))

    def show(self) -> bytes:
        """The answer of /api/show."""
        parameters = f"{'num_ctx':<30} {self.capabilities.n_ctx}"
        template = self._template()
        modelfile = f'FROM {self.file.name}\nTEMPLATE """{template}"""\nPARAMETER num_ctx {self.capabilities.n_ctx}\n'
        return line(
            Shown(
                license=self.info.metadata.get("general.license", ""),
                modelfile=whole_characters(modelfile),
                parameters=parameters,
                template=template,
                details=self.details(),
                model_info=self._model_info(),
                capabilities=self._abilities(),
                modified_at=timestamp(self.file.modified_ns),
            )
        )

    def details(self) -> Details:
        """What kind of model it is."""
        file_type = self.info.metadata.get("general.file_type", "")
        return Details(
            parent_model="",
            format="gguf",
            family=self.info.architecture,
            families=[self.info.architecture],
            parameter_size=short_count(self.info.n_params),
            quantization_level=FILE_TYPES.get(int(file_type), "unknown") if file_type.isdecimal() else "unknown",
        )

    def _tag(self, name: str) -> Tag:
        return Tag(
            name=with_tag(name),
            model=with_tag(name),
            modified_at=timestamp(self.file.modified_ns),
            size=self.file.size,
            digest=self.file.digest,
            details=self.details(),
        )

    def _template(self) -> str:
        template = self.info.chat_template or NO_TEMPLATE
        return INSERT + template if self.info.can_infill else template

    def _abilities(self) -> list[str]:
        """In Ollama's words. Tools are never among them: this server does not read tool calls from a text."""
        info = self.info
        made_to_embed = f"{info.architecture}.pooling_type" in info.metadata or not self.capabilities.can_generate
        if made_to_embed:
            return ["embedding"]
        has = {
            "completion": True,
            "vision": self.has_projector,
            "insert": info.can_infill,
            "thinking": thinking_style(info.chat_template).tags is not None,
        }
        return [name for name, is_there in has.items() if is_there]

    def _model_info(self) -> dict[str, Any]:
        info = self.info
        found = {name: _value(name, text) for name, text in info.metadata.items() if not name.endswith("chat_template")}
        return {
            **found,
            "general.architecture": info.architecture,
            "general.basename": found.get("general.basename", self.name),
            "general.parameter_count": info.n_params,
            # Editors take this for what they may send. So it is what is served, not what the model was trained with.
            f"{info.architecture}.context_length": self.capabilities.n_ctx,
            f"{info.architecture}.embedding_length": info.n_embd,
            f"{info.architecture}.block_count": info.n_layer,
        }


def no_file(info: ModelInfo, modified_ns: int) -> ModelFile:
    """What stands for the file of a model that has none, such as a toy."""
    digest = sha256(f"{info.name}\0{info.description}\0{info.size}".encode(errors="replace"))
    return ModelFile(info.name, info.size, modified_ns, digest.hexdigest())


def with_tag(name: str) -> str:
    """`name` as Ollama lists it: with a tag."""
    return name if ":" in name.rpartition("/")[2] else f"{name}{LATEST}"


def short_count(number: int) -> str:
    """A number of parameters as Ollama writes it: 134515008 is 134.52M."""
    for unit, letter, digits in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if number >= unit:
            return f"{number / unit:.{digits if number % unit else 0}f}{letter}"
    return str(number)


_TEXTS: Final = re.compile(r"general\.(?!file_type$|quantization_version$|alignment$)")
"""Keys whose values are texts, even if they look like numbers."""


def _value(name: str, text: str) -> str | int | float | bool:
    """The value of a key of the file. llama.cpp gives it as text."""
    if _TEXTS.match(name):
        return text
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"-?\d{1,19}", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?\d+\.\d+(e[-+]?\d+)?", text) else text
