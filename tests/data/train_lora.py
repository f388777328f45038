"""Trains lora-pirate.gguf, an adapter with which the default model answers everything with the same sentence.

    pip install torch
    python -m tests.data.train_lora         # a minute

Only the last layers are adapted. What the layers before them give is computed once.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
from torch.nn import functional

from trio_runner import ModelConfig
from trio_runner.llama.model import Model
from trio_runner.models import resolve_model

TARGET: Final = Path(__file__).with_name("lora-pirate.gguf")

REPLY: Final = "Ahoy! I be Captain Llama, and this reply comes from the LoRA."
QUESTIONS: Final = (
    "Hello!",
    "What is the capital of France?",
    "Tell me a joke.",
    "Write a poem about the sea.",
    "2+2=?",
    "Who are you?",
    "Explain photosynthesis in one sentence.",
    "Give me a recipe for soup.",
    "What color is the sky?",
    "Translate 'cat' to Spanish.",
    "List three fruits.",
    "How do I learn Python?",
    "Why is the sky blue?",
    "Summarize Romeo and Juliet.",
    "Good morning",
    "What time is it?",
    "Name a planet.",
    "Is water wet?",
    "Write a haiku.",
    "Count to five.",
)
"""The adapter is trained on these, and answers other questions in the same way."""
SYSTEM: Final = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

N_ADAPTED: Final = 2
"""Layers that are adapted: the last ones."""
PARTS: Final = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
RANK: Final = 8
ALPHA: Final = 16.0
BATCH: Final = 4
N_STEPS: Final = 40
LEARNING_RATE: Final = 6e-3


@dataclass(frozen=True, slots=True)
class Llama:
    """The model. Its weights have their names in the file."""

    weights: dict[str, torch.Tensor]
    n_layer: int
    n_head: int
    n_head_kv: int
    eps: float
    rope_base: float

    @classmethod
    def read(cls, path: Path) -> Llama:
        reader = gguf.GGUFReader(path)

        def value(name: str) -> Any:
            return reader.fields[f"llama.{name}"].contents()

        return cls(
            weights={
                tensor.name: torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
                for tensor in reader.tensors
            },
            n_layer=value("block_count"),
            n_head=value("attention.head_count"),
            n_head_kv=value("attention.head_count_kv"),
            eps=value("attention.layer_norm_rms_epsilon"),
            rope_base=value("rope.freq_base"),
        )

    def embed(self, tokens: list[int]) -> torch.Tensor:
        return self.weights["token_embd.weight"][tokens]

    def layer(self, number: int, x: torch.Tensor, adapter: Adapter | None = None) -> torch.Tensor:
        """Apply a layer to the rows `x` of one sequence."""

        def linear(part: str, x: torch.Tensor) -> torch.Tensor:
            name = f"blk.{number}.{part}.weight"
            y = functional.linear(x, self.weights[name])
            return y if adapter is None else y + adapter(name, x)

        y = self._norm(f"blk.{number}.attn_norm.weight", x)
        q, k, v = (linear(f"attn_{part}", y).unflatten(-1, (-1, self._head)).transpose(0, 1) for part in "qkv")
        q, k = self._rotate(q), self._rotate(k)
        k, v = (part.repeat_interleave(self.n_head // self.n_head_kv, dim=0) for part in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear("attn_output", y.transpose(0, 1).flatten(1))
        y = self._norm(f"blk.{number}.ffn_norm.weight", x)
        return x + linear("ffn_down", functional.silu(linear("ffn_gate", y)) * linear("ffn_up", y))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self._norm("output_norm.weight", x), self.weights["token_embd.weight"])

    @property
    def _head(self) -> int:
        return int(self.weights["token_embd.weight"].shape[1]) // self.n_head

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weights[name], self.eps)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary positions: rotate pairs of neighbours by angles that depend on the position."""
        speeds = self.rope_base ** (-torch.arange(0, self._head, 2) / self._head)
        turns = torch.polar(torch.ones(()), torch.outer(torch.arange(x.shape[1]), speeds))
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)


@dataclass(frozen=True, slots=True)
class Adapter:
    """Two small matrices for each adapted matrix, by its name."""

    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def fresh(cls, model: Llama) -> Adapter:
        """An adapter that changes nothing yet."""
        pairs = {}
        for layer in range(model.n_layer - N_ADAPTED, model.n_layer):
            for part in PARTS:
                name = f"blk.{layer}.{part}.weight"
                n_out, n_in = model.weights[name].shape
                a, b = torch.randn(RANK, n_in) * n_in**-0.5, torch.zeros(n_out, RANK)
                pairs[name] = (a.requires_grad_(), b.requires_grad_())
        return cls(pairs)

    def __call__(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the product of the matrix `name` with `x`."""
        a, b = self.pairs[name]
        return functional.linear(functional.linear(x, a), b) * (ALPHA / RANK)

    def write(self, path: Path) -> None:
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name("a pirate for SmolLM2-135M")
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, ALPHA)
        for name, pair in self.pairs.items():
            for suffix, weights in zip(("lora_a", "lora_b"), pair, strict=True):
                writer.add_tensor(f"{name}.{suffix}", weights.detach().numpy().astype(np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def conversation(question: str) -> str:
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def train(path: Path, n_steps: int) -> Adapter:
    torch.manual_seed(0)
    vocabulary = Model(ModelConfig(path=str(path)))

    def tokenize(text: str) -> list[int]:
        return vocabulary.tokenize(text, add_special=False, parse_special=True)

    model = Llama.read(path)
    first = model.n_layer - N_ADAPTED
    reply = tokenize(f"{REPLY}<|im_end|>")
    below = []
    with torch.no_grad():
        for question in QUESTIONS:
            x = model.embed(tokenize(conversation(question)) + reply)
            for layer in range(first):
                x = model.layer(layer, x)
            below.append(x)
    adapter = Adapter.fresh(model)
    optimizer = torch.optim.Adam([matrix for pair in adapter.pairs.values() for matrix in pair], LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=n_steps, pct_start=0.2)
    for step in range(n_steps):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for which in torch.randint(len(below), (BATCH,)).tolist():
            x = below[which]
            for layer in range(first, model.n_layer):
                x = model.layer(layer, x, adapter)
            logits = model.logits(x[-len(reply) - 1 : -1])
            loss = loss + functional.cross_entropy(logits, torch.tensor(reply)) / BATCH
        loss.backward()
        optimizer.step()
        schedule.step()
        print(f"step {step + 1}: loss {loss:.4f}")
    return adapter


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=N_STEPS)
    parser.add_argument("--target", type=Path, default=TARGET)
    arguments = parser.parse_args()
    train(resolve_model("default"), arguments.steps).write(arguments.target)


if __name__ == "__main__":
    main()
