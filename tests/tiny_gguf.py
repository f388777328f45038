"""Building blocks for tiny GGUF files: what the writers of tiny models and of tiny projectors share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

N_CTX: Final = 2048
N_EMBD: Final = 64
N_FF: Final = 128

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS: Final = ("hello", "world", "the", "and", "model", "count", "story", "user", "assistant", "system", "answer")


class ModelFile:
    """A model file that is being written."""

    def __init__(self, path: Path, architecture: str, name: str, *, seed: int) -> None:
        self.writer = gguf.GGUFWriter(str(path), architecture)
        self.writer.add_name(name)
        self._random = np.random.default_rng(seed)

    def random(self, *shape: int, gain: float = 1.0) -> Array:
        """A random matrix of shape (out, in). It scales the length of its input by about `gain`."""
        values: Array = self._random.standard_normal(shape, np.float32)
        return values * np.float32(gain / np.sqrt(shape[-1]))

    def add(self, tensors: dict[str, Array]) -> None:
        for name, values in tensors.items():
            self.writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))

    def add_layer(self, layer: int, tensors: dict[str, Array], *, prefix: str = "") -> None:
        self.add({f"{prefix}blk.{layer}.{name}": values for name, values in tensors.items()})

    def write(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()

    def add_sizes(self, *, n_layer: int, n_ctx: int = N_CTX, n_ff: int = N_FF, n_embd: int = N_EMBD) -> None:
        self.writer.add_context_length(n_ctx)
        self.writer.add_embedding_length(n_embd)
        self.writer.add_block_count(n_layer)
        self.writer.add_feed_forward_length(n_ff)

    def add_attention(self, n_head: int, n_head_kv: int | Sequence[int]) -> None:
        self.writer.add_head_count(n_head)
        self.writer.add_head_count_kv(n_head_kv)
        self.writer.add_layer_norm_rms_eps(1e-5)
        self.writer.add_rope_freq_base(10000.0)


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


def zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


def _byte_characters() -> list[str]:
    """The visible character that stands for each byte in a byte-level BPE vocabulary."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(spare)) for byte in range(256)]


class Bpe:
    """A byte-level BPE vocabulary: control tokens, the 256 bytes, then every prefix of every word.

    Each prefix is merged from the one before it and one more character.
    """

    def __init__(self, words: Sequence[str] = WORDS, whole: Sequence[str] = ()) -> None:
        self.of_byte = _byte_characters()
        self.tokens = [*CONTROL_TOKENS, *self.of_byte]
        self.merges: list[str] = []
        for word in words:
            characters = [self.of_byte[byte] for byte in f" {word}".encode()]
            for end in range(1, len(characters)):
                left, right = "".join(characters[:end]), characters[end]
                if left + right not in self.tokens:
                    self.tokens.append(left + right)
                    self.merges.append(f"{left} {right}")
        n_normal = len(self.tokens) - len(CONTROL_TOKENS)
        self.tokens += whole
        self.types = (
            [gguf.TokenType.CONTROL] * len(CONTROL_TOKENS)
            + [gguf.TokenType.NORMAL] * n_normal
            + [gguf.TokenType.USER_DEFINED] * len(whole)
        )

    def add_to(self, model: ModelFile) -> None:
        writer = model.writer
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template(CHAT_TEMPLATE)
        writer.add_vocab_size(len(self.tokens))

    def output(self, model: ModelFile, *, n_embd: int = N_EMBD) -> Array:
        """An output matrix under which only printable ASCII is ever the most probable token."""
        rows = model.random(len(self.tokens), n_embd, gain=5.0)
        printable = {self.of_byte[byte] for byte in range(0x20, 0x7F)}
        for token, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind != gguf.TokenType.NORMAL or not printable.issuperset(text):
                rows[token] = 0
        return rows


def attention(model: ModelFile, *, n_head: int, n_head_kv: int, n_embd: int = N_EMBD) -> dict[str, Array]:
    head = n_embd // n_head
    sizes = {"q": n_head * head, "k": n_head_kv * head, "v": n_head_kv * head}
    return {
        "attn_norm.weight": ones(n_embd),
        **{f"attn_{part}.weight": model.random(size, n_embd, gain=2.0) for part, size in sizes.items()},
        "attn_output.weight": model.random(n_embd, n_head * head, gain=2.0),
    }


def feed_forward(model: ModelFile, *, n_embd: int = N_EMBD, n_ff: int = N_FF) -> dict[str, Array]:
    return {
        "ffn_norm.weight": ones(n_embd),
        "ffn_gate.weight": model.random(n_ff, n_embd, gain=2.0),
        "ffn_up.weight": model.random(n_ff, n_embd),
        "ffn_down.weight": model.random(n_embd, n_ff),
    }


def add_llama_layer(model: ModelFile, layer: int, *, n_head: int, n_head_kv: int) -> None:
    model.add_layer(layer, attention(model, n_head=n_head, n_head_kv=n_head_kv) | feed_forward(model))
