"""Trains mmproj-shapes.gguf, a small encoder of pictures with which the default model names coloured shapes.

    pip install torch
    python -m tests.data.train_shapes       # five minutes on one core

No language model takes part. A picture becomes 16 rows. Each row is trained to equal the model's own embedding of one
token of a caption,

    Image description: a red circle on a white background. The circle is red.

so that the model sees the picture as if it were this text.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from tests.real.pictures import COLOURS, SHAPES, Colour, Shape, draw
from trio_runner import ModelConfig
from trio_runner.llama.model import Model
from trio_runner.models import resolve_model

TARGET: Final = Path(__file__).with_name("mmproj-shapes.gguf")

SIZE: Final = 64
PATCH: Final = 16
N_ROWS: Final = (SIZE // PATCH) ** 2
N_EMBD: Final = 96
N_FF: Final = 192
N_LAYER: Final = 3
N_HEAD: Final = 4
N_HIDDEN: Final = 160
"""Elements between the two layers that project."""
EPS: Final = 1e-5

N_PICTURES: Final = 8000
N_HELD_OUT: Final = 300
BATCH: Final = 64
N_STEPS: Final = 3000
LEARNING_RATE: Final = 2e-3


# ---- pictures and captions -------------------------------------------------------------------------------------------


def caption(colour: str, shape: str, background: str) -> str:
    return f"Image description: a {colour} {shape} on a {background} background. The {shape} is {colour}."


def random_picture(random: np.random.Generator, colour: str, shape: Shape, background: str) -> Image.Image:
    def shade(name: str) -> Colour:
        red, green, blue = np.clip(np.array(COLOURS[name]) + random.integers(-18, 19, 3), 0, 255)
        return int(red), int(green), int(blue)

    width = int(random.integers(64, 257))
    height = int(np.clip(width * 2 ** random.uniform(-1, 1), 48, 256))
    radius = min(width, height) * random.uniform(0.3, 0.475)
    middle = random.uniform(radius, width - radius), random.uniform(radius, height - radius)
    turn = random.uniform(-0.12, 0.12)
    return draw(shape, shade(colour), shade(background), (width, height), middle, radius, turn=turn)


def fitted(image: Image.Image) -> NDArray[np.uint8]:
    """Scale an image into the middle of a grey square, as llama.cpp does for this kind of projector."""
    scale = min(SIZE / image.width, SIZE / image.height)
    width, height = (min(math.ceil(length * scale), SIZE) for length in image.size)
    square = Image.new("RGB", (SIZE, SIZE), (122, 116, 104))
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(small, ((SIZE - width) // 2, (SIZE - height) // 2))
    return np.asarray(square)


def examples(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures as bytes, and the tokens of their captions."""
    random = np.random.default_rng(0)
    kinds = [
        (colour, shape, ground) for colour in COLOURS for ground in COLOURS if ground != colour for shape in SHAPES
    ]
    tokens = [model.tokenize(caption(*kind), add_special=False, parse_special=False) for kind in kinds]
    which = random.permutation(np.resize(np.arange(len(kinds)), N_PICTURES))
    pictures = [fitted(random_picture(random, *kinds[kind])) for kind in which]
    return torch.from_numpy(np.stack(pictures)), torch.tensor(tokens)[which]


# ---- the encoder -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Encoder:
    """A vision transformer and two layers that project. Its weights have their names in the file."""

    weights: dict[str, torch.Tensor]

    @classmethod
    def fresh(cls, n_out: int) -> Encoder:
        weights = {"v.position_embd.weight": 0.2 * torch.randn(N_ROWS, N_EMBD)}

        def add_linear(name: str, n_out: int, *n_in: int) -> None:
            bound = math.prod(n_in) ** -0.5
            weights[f"{name}.weight"] = torch.empty(n_out, *n_in).uniform_(-bound, bound)
            weights[f"{name}.bias"] = torch.empty(n_out).uniform_(-bound, bound)

        def add_norm(name: str) -> None:
            weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.ones(N_EMBD), torch.zeros(N_EMBD)

        add_linear("v.patch_embd", N_EMBD, 3, PATCH, PATCH)
        for layer in range(N_LAYER):
            for name in ("ln1", "ln2"):
                add_norm(f"v.blk.{layer}.{name}")
            for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
                add_linear(f"v.blk.{layer}.{name}", N_EMBD, N_EMBD)
            add_linear(f"v.blk.{layer}.ffn_up", N_FF, N_EMBD)
            add_linear(f"v.blk.{layer}.ffn_down", N_EMBD, N_FF)
        add_norm("v.post_ln")
        add_linear("mm.0", N_HIDDEN, N_EMBD)
        add_linear("mm.2", n_out, N_HIDDEN)
        return cls({name: values.requires_grad_() for name, values in weights.items()})

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """The rows of pictures of shape (n, 3, SIZE, SIZE), with values between -1 and 1."""
        x = functional.conv2d(pixels, *self._of("v.patch_embd"), stride=PATCH).flatten(2).transpose(1, 2)
        x = x + self.weights["v.position_embd.weight"]
        for layer in range(N_LAYER):
            block = f"v.blk.{layer}"
            y = self._norm(f"{block}.ln1", x)
            q, k, v = (
                self._linear(f"{block}.attn_{part}", y).unflatten(-1, (N_HEAD, -1)).transpose(1, 2) for part in "qkv"
            )
            y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self._linear(f"{block}.attn_out", y)
            x = x + self._perceptron(f"{block}.ffn_up", f"{block}.ffn_down", self._norm(f"{block}.ln2", x))
        return self._perceptron("mm.0", "mm.2", self._norm("v.post_ln", x))

    def _of(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, *self._of(name))

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (N_EMBD,), *self._of(name), eps=EPS)

    def _perceptron(self, up: str, down: str, x: torch.Tensor) -> torch.Tensor:
        return self._linear(down, functional.gelu(self._linear(up, x), approximate="tanh"))

    def write(self, path: Path) -> None:
        writer = gguf.GGUFWriter(str(path), "clip")
        writer.add_type(gguf.GGUFType.MMPROJ)
        writer.add_name("coloured shapes for SmolLM2-135M")
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_projector_type("mlp")
        writer.add_vision_use_gelu(True)
        writer.add_vision_image_size(SIZE)
        writer.add_vision_patch_size(PATCH)
        writer.add_vision_image_mean([0.5, 0.5, 0.5])
        writer.add_vision_image_std([0.5, 0.5, 0.5])
        writer.add_vision_embedding_length(N_EMBD)
        writer.add_vision_feed_forward_length(N_FF)
        writer.add_vision_projection_dim(len(self.weights["mm.2.bias"]))
        writer.add_vision_block_count(N_LAYER)
        writer.add_vision_head_count(N_HEAD)
        writer.add_vision_attention_layernorm_eps(EPS)
        writer.add_array("clip.vision.feature_layer", [N_LAYER])  # without it, mtmd leaves out the last layer
        for name, weights in self.weights.items():
            is_small = weights.ndim == 1 or name in ("v.patch_embd.weight", "v.position_embd.weight")
            writer.add_tensor(name, weights.detach().numpy().astype(np.float32 if is_small else np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


# ---- learning --------------------------------------------------------------------------------------------------------


def token_table(path: Path) -> torch.Tensor:
    """The embeddings of all tokens of the model at `path`."""
    [table] = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "token_embd.weight"]
    return torch.tensor(gguf.quants.dequantize(table.data, table.tensor_type))


def train(path: Path, n_steps: int) -> Encoder:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # with such small matrices, more threads are not faster
    table = token_table(path)
    scale = 1 / table.std()
    pictures, tokens = examples(Model(ModelConfig(path=str(path))))
    words, targets = tokens.unique(return_inverse=True)  # the tokens that the rows must tell apart
    table = table[words]
    encoder = Encoder.fresh(table.shape[1])
    optimizer = torch.optim.AdamW(encoder.weights.values(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=n_steps, pct_start=0.08)

    def encode(which: torch.Tensor, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of some pictures, and the distance of each row to each word."""
        pixels = pictures[which].permute(0, 3, 1, 2) / 127.5 - 1
        rows = encoder(pixels + noise * torch.randn_like(pixels)) * scale
        return rows, torch.cdist(rows, table * scale).square() / table.shape[1]

    for step in range(n_steps):
        batch = torch.randint(N_HELD_OUT, N_PICTURES, (BATCH,))
        rows, distances = encode(batch, noise=0.03)
        loss = functional.mse_loss(rows, table[targets[batch]] * scale)
        loss += functional.cross_entropy(-8 * distances.flatten(0, 1), targets[batch].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.weights.values(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == n_steps - 1:
            with torch.no_grad():
                _, distances = encode(torch.arange(N_HELD_OUT))
            is_right = (distances.argmin(-1) == targets[:N_HELD_OUT]).all(-1)
            print(f"step {step + 1}: loss {loss:.4f}, {is_right.float().mean():.1%} of new pictures told whole")
    return encoder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=N_STEPS)
    parser.add_argument("--target", type=Path, default=TARGET)
    arguments = parser.parse_args()
    train(resolve_model("default"), arguments.steps).write(arguments.target)


if __name__ == "__main__":
    main()
