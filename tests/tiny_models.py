"""Tiny GGUF models, written on the spot: one for each kind of memory and vocabulary that tests must tell apart. Each
has about half a megabyte.

The weights are random, from fixed seeds. So the text is gibberish, but it is always the same gibberish, and it depends
on every token before it. Only "chain" says something: `CHAIN_TEXT` and then the end, whatever the prompt.

    llama         two layers of grouped-query attention, byte-level BPE, a chat template; never ends by itself
    single        llama with one layer: what a position holds does not depend on the positions before it
    tiles         llama with the tokens that stand between the tiles of an image
    fim           llama with tokens to fill in the middle
    chain         each token has exactly one successor
    spm           llama with a SentencePiece vocabulary with byte fallback; text begins with BOS
    swa           gemma3: five of six layers see only a window of the last 32 tokens
    swa-short     gemma3 with two layers, one of each kind
    mrope         qwen2vl: positions have several components and cannot be renumbered
    mamba         recurrent: its state cannot be rolled back
    lfm2          hybrid: one layer of attention between two recurrent layers
    gpt2          positions are a table of 96 entries
    t5            encoder and decoder: a prompt ends with EOS, the generated text begins with token 0
    bert          encoder with mean pooling: embeddings only, nothing is kept between steps
    bert-cls      bert with the embedding of the first token
    qwen-embed    qwen3 with the embedding of the last token, which is EOS
    rerank        bert with a classification head
    rerank-causal qwen3 with a classification head and a template for query and document
    lora          an adapter for "llama" that changes its text
    lora-b        another adapter for "llama"
    lora-zero     an adapter that changes nothing
    mmproj...     projectors, see tests/tiny_projectors.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import gguf
import numpy as np

from tests.tiny_encoders import (
    write_bert,
    write_bert_cls,
    write_qwen_embed,
    write_rerank,
    write_rerank_causal,
    write_t5,
)
from tests.tiny_gguf import N_EMBD, N_FF, Array, Bpe, ModelFile, add_llama_layer, attention, feed_forward, ones, zeros
from tests.tiny_projectors import PROJECTORS

CHAIN_WORDS: Final = (" one", " two", " three", " four", " five", " six", " seven", " eight", " nine", " ten")
CHAIN_TAIL: Final = " \N{SLIGHTLY SMILING FACE}."
"""The character is spread over four tokens, one for each of its bytes."""
CHAIN_TEXT: Final = "".join(CHAIN_WORDS) + CHAIN_TAIL
FIM_TOKENS: Final = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>")
"""llama.cpp knows them by their names."""


def tiny_model(name: str, directory: Path) -> Path:
    """The file of the model `name` in `directory`. It is written if it is not there yet."""
    path = directory / f"tiny-{name}.gguf"
    if not path.exists():
        partial = path.with_suffix(".partial")
        MODELS[name](partial)
        partial.rename(path)
    return path


def _write_llama(
    path: Path, *, name: str = "tiny-llama", n_layer: int = 2, seed: int = 1, whole: Sequence[str] = ()
) -> None:
    model, vocabulary = ModelFile(path, "llama", name, seed=seed), Bpe(whole=whole)
    model.add_sizes(n_layer=n_layer)
    model.add_attention(4, 2)
    vocabulary.add_to(model)
    model.add({"token_embd.weight": model.random(len(vocabulary.tokens), N_EMBD, gain=8.0)})
    for layer in range(n_layer):
        add_llama_layer(model, layer, n_head=4, n_head_kv=2)
    model.add({"output_norm.weight": ones(N_EMBD), "output.weight": vocabulary.output(model)})
    model.write()


def _write_single(path: Path) -> None:
    _write_llama(path, name="tiny-single", n_layer=1, seed=2)


def _write_tiles(path: Path) -> None:
    _write_llama(path, name="tiny-tiles", seed=10, whole=("\n\n", "<fake_token_around_image>", "<global-img>"))


def _write_fim(path: Path) -> None:
    _write_llama(path, name="tiny-fim", seed=17, whole=FIM_TOKENS)


def _write_chain(path: Path) -> None:
    """Write the model that counts.

    Attention and feed-forward add nothing, so the next token depends on the last token alone. Each link of the chain
    has a direction of its own in the embedding. All other tokens share one direction, which points to the first link.
    """
    model, vocabulary = ModelFile(path, "llama", "tiny-chain", seed=3), Bpe(words=("hello",), whole=CHAIN_WORDS)
    tail = [vocabulary.tokens.index(vocabulary.of_byte[byte]) for byte in CHAIN_TAIL.encode()]
    links = [vocabulary.tokens.index(word) for word in CHAIN_WORDS] + tail
    n_vocab = len(vocabulary.tokens)
    directions = np.linalg.qr(model.random(N_EMBD, N_EMBD))[0].astype(np.float32)
    embedding = np.tile(directions[0], (n_vocab, 1))
    output = zeros(n_vocab, N_EMBD)
    output[links[0]] = directions[0]
    for index, (link, successor) in enumerate(zip(links, [*links[1:], 2], strict=True), start=1):
        embedding[link] = directions[index]
        output[successor] += directions[index]

    model.add_sizes(n_layer=1)
    model.add_attention(2, 2)  # heads of 32, as quantised KV caches need
    vocabulary.add_to(model)
    model.add({"token_embd.weight": embedding})
    layer = attention(model, n_head=2, n_head_kv=2) | feed_forward(model)
    silent = {"attn_output.weight": zeros(N_EMBD, N_EMBD), "ffn_down.weight": zeros(N_EMBD, N_FF)}
    model.add_layer(0, layer | silent)
    model.add({"output_norm.weight": ones(N_EMBD), "output.weight": output * 2.5})
    model.write()


def _write_spm(path: Path) -> None:
    model = ModelFile(path, "llama", "tiny-spm", seed=4)
    model.add_sizes(n_layer=2)
    model.add_attention(4, 4)
    pieces = ["\u2581", *(chr(code) for code in range(0x21, 0x7F)), "\u2581the", "\u2581a", "\u2581t", "th", "he", "in"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer = model.writer
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([*kinds, *[gguf.TokenType.BYTE] * 256, *[gguf.TokenType.NORMAL] * len(pieces)])
    writer.add_token_scores([*[0.0] * 259, *(-float(rank) for rank in range(1, len(pieces) + 1))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_vocab_size(len(tokens))
    output = model.random(len(tokens), N_EMBD, gain=5.0)
    output[:259] = 0
    model.add({"token_embd.weight": model.random(len(tokens), N_EMBD, gain=8.0)})
    for layer in range(2):
        add_llama_layer(model, layer, n_head=4, n_head_kv=4)
    model.add({"output_norm.weight": ones(N_EMBD), "output.weight": output})
    model.write()


def _write_swa(path: Path, *, name: str = "tiny-swa", n_layer: int = 6) -> None:
    n_head, head = 2, 32
    model, vocabulary = ModelFile(path, "gemma3", name, seed=5), Bpe()
    model.add_sizes(n_layer=n_layer)
    model.add_attention(n_head, 1)
    model.writer.add_key_length(head)
    model.writer.add_value_length(head)
    model.writer.add_sliding_window(32)
    model.writer.add_sliding_window_pattern(n_layer)
    vocabulary.add_to(model)
    model.add({"token_embd.weight": model.random(len(vocabulary.tokens), N_EMBD)})
    for layer in range(n_layer):
        tensors = {
            **{f"{norm}.weight": ones(N_EMBD) for norm in ("attn_norm", "post_attention_norm")},
            **{f"{norm}.weight": ones(N_EMBD) for norm in ("ffn_norm", "post_ffw_norm")},
            "attn_q_norm.weight": ones(head) * 2,
            "attn_k_norm.weight": ones(head) * 2,
            "attn_q.weight": model.random(n_head * head, N_EMBD),
            "attn_k.weight": model.random(head, N_EMBD),
            "attn_v.weight": model.random(head, N_EMBD),
            "attn_output.weight": model.random(N_EMBD, n_head * head),
            "ffn_gate.weight": model.random(N_FF, N_EMBD),
            "ffn_up.weight": model.random(N_FF, N_EMBD),
            "ffn_down.weight": model.random(N_EMBD, N_FF),
        }
        model.add_layer(layer, tensors)
    model.add({"output_norm.weight": ones(N_EMBD), "output.weight": vocabulary.output(model)})
    model.write()


def _write_swa_short(path: Path) -> None:
    _write_swa(path, name="tiny-swa-short", n_layer=2)


def _write_mrope(path: Path) -> None:
    model, vocabulary = ModelFile(path, "qwen2vl", "tiny-mrope", seed=6), Bpe()
    model.add_sizes(n_layer=2)
    model.add_attention(2, 1)
    model.writer.add_rope_dimension_sections([4, 6, 6, 0])
    vocabulary.add_to(model)
    model.add({"token_embd.weight": model.random(len(vocabulary.tokens), N_EMBD, gain=8.0)})
    for layer in range(2):
        add_llama_layer(model, layer, n_head=2, n_head_kv=1)
        biases = {"q": N_EMBD, "k": N_EMBD // 2, "v": N_EMBD // 2}
        model.add_layer(layer, {f"attn_{part}.bias": model.random(size) for part, size in biases.items()})
    model.add({"output_norm.weight": ones(N_EMBD), "output.weight": vocabulary.output(model)})
    model.write()


def _write_mamba(path: Path) -> None:
    n_layer, n_inner, n_state, n_conv, rank = 2, 2 * N_EMBD, 16, 4, 4
    model, vocabulary = ModelFile(path, "mamba", "tiny-mamba", seed=7), Bpe()
    model.add_sizes(n_layer=n_layer, n_ff=0)
    writer = model.writer
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(n_conv)
    writer.add_ssm_inner_size(n_inner)
    writer.add_ssm_state_size(n_state)
    writer.add_ssm_time_step_rank(rank)
    vocabulary.add_to(model)
    model.add({"token_embd.weight": model.random(len(vocabulary.tokens), N_EMBD, gain=8.0)})
    for layer in range(n_layer):
        tensors = {
            "attn_norm.weight": ones(N_EMBD),
            "ssm_in.weight": model.random(2 * n_inner, N_EMBD),
            "ssm_conv1d.weight": model.random(n_inner, n_conv),
            "ssm_conv1d.bias": zeros(n_inner),
            "ssm_x.weight": model.random(rank + 2 * n_state, n_inner),
            "ssm_dt.weight": model.random(n_inner, rank),
            "ssm_dt.bias": ones(n_inner) * -2,
            "ssm_a": -np.tile(np.arange(1, n_state + 1, dtype=np.float32), (n_inner, 1)),
            "ssm_d": ones(n_inner),
            "ssm_out.weight": model.random(N_EMBD, n_inner, gain=2.0),
        }
        model.add_layer(layer, tensors)
    model.add({"output_norm.weight": ones(N_EMBD), "output.weight": vocabulary.output(model)})
    model.write()


def _write_lfm2(path: Path) -> None:
    n_conv, n_head, n_head_kv = 3, 2, (0, 1, 0)
    model, vocabulary = ModelFile(path, "lfm2", "tiny-lfm2", seed=11), Bpe()
    model.add_sizes(n_layer=len(n_head_kv))
    model.add_attention(n_head, n_head_kv)
    model.writer.add_shortconv_l_cache(n_conv)
    vocabulary.add_to(model)
    model.add({"token_embd.weight": model.random(len(vocabulary.tokens), N_EMBD, gain=8.0)})
    for layer, n_kv_heads in enumerate(n_head_kv):
        if n_kv_heads:
            tensors = attention(model, n_head=n_head, n_head_kv=n_kv_heads)
            tensors |= {f"attn_{part}_norm.weight": ones(N_EMBD // n_head) * 2 for part in "qk"}
        else:
            tensors = {
                "attn_norm.weight": ones(N_EMBD),
                "shortconv.in_proj.weight": model.random(3 * N_EMBD, N_EMBD),
                "shortconv.conv.weight": model.random(N_EMBD, n_conv),
                "shortconv.out_proj.weight": model.random(N_EMBD, N_EMBD, gain=2.0),
            }
        model.add_layer(layer, tensors | feed_forward(model))
    model.add({"token_embd_norm.weight": ones(N_EMBD), "output.weight": vocabulary.output(model)})
    model.write()


def _write_gpt2(path: Path) -> None:
    n_ctx, n_layer = 96, 2
    model, vocabulary = ModelFile(path, "gpt2", "tiny-gpt2", seed=12), Bpe()
    model.add_sizes(n_layer=n_layer, n_ctx=n_ctx)
    model.writer.add_head_count(4)
    model.writer.add_layer_norm_eps(1e-5)
    vocabulary.add_to(model)
    model.add({"token_embd.weight": model.random(len(vocabulary.tokens), N_EMBD, gain=8.0)})
    model.add({"position_embd.weight": model.random(n_ctx, N_EMBD, gain=8.0)})
    shapes = {"attn_qkv": (3 * N_EMBD, N_EMBD), "attn_output": (N_EMBD, N_EMBD)}
    shapes |= {"ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF)}
    for layer in range(n_layer):
        tensors: dict[str, Array] = {}
        for norm in ("attn_norm", "ffn_norm"):
            tensors |= {f"{norm}.weight": ones(N_EMBD), f"{norm}.bias": zeros(N_EMBD)}
        for part, shape in shapes.items():
            tensors |= {f"{part}.weight": model.random(*shape, gain=2.0), f"{part}.bias": zeros(shape[0])}
        model.add_layer(layer, tensors)
    model.add({"output_norm.weight": ones(N_EMBD), "output_norm.bias": zeros(N_EMBD)})
    model.add({"output.weight": vocabulary.output(model)})
    model.write()


def _write_lora(path: Path, *, name: str = "tiny-lora", seed: int = 9, gain: float = 4.0) -> None:
    rank = 4
    model = ModelFile(path, "llama", name, seed=seed)
    model.writer.add_type(gguf.GGUFType.ADAPTER)
    model.writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    model.writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for layer in range(2):
        a, b = model.random(rank, N_FF), model.random(N_EMBD, rank, gain=gain)
        model.add_layer(layer, {"ffn_down.weight.lora_a": a, "ffn_down.weight.lora_b": b})
    model.write()


def _write_lora_b(path: Path) -> None:
    _write_lora(path, name="tiny-lora-b", seed=16)


def _write_lora_zero(path: Path) -> None:
    _write_lora(path, name="tiny-lora-zero", gain=0.0)


MODELS: Final[dict[str, Callable[[Path], None]]] = {
    "llama": _write_llama,
    "single": _write_single,
    "tiles": _write_tiles,
    "fim": _write_fim,
    "chain": _write_chain,
    "spm": _write_spm,
    "swa": _write_swa,
    "swa-short": _write_swa_short,
    "mrope": _write_mrope,
    "mamba": _write_mamba,
    "lfm2": _write_lfm2,
    "gpt2": _write_gpt2,
    "t5": write_t5,
    "bert": write_bert,
    "bert-cls": write_bert_cls,
    "qwen-embed": write_qwen_embed,
    "rerank": write_rerank,
    "rerank-causal": write_rerank_causal,
    "lora": _write_lora,
    "lora-b": _write_lora_b,
    "lora-zero": _write_lora_zero,
    **PROJECTORS,
}
GENERATIVE: Final = ("llama", "single", "chain", "spm", "swa", "mrope", "mamba", "lfm2", "gpt2")
