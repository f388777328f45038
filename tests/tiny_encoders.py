"""Tiny models that embed, rank, or read their prompt with an encoder. tests/tiny_models.py lists them all."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import gguf

from tests.tiny_gguf import N_EMBD, N_FF, WORDS, Array, Bpe, ModelFile, add_llama_layer, ones, zeros

RERANK_TEMPLATE: Final = "<|im_start|>user\nquery: {query}\ndocument: {document}<|im_end|>\n<|im_start|>assistant\n"


def write_t5(path: Path) -> None:
    n_layer, n_head, n_buckets = 2, 4, 32
    model, vocabulary = ModelFile(path, "t5", "tiny-t5", seed=14), Bpe()
    model.add_sizes(n_layer=n_layer)
    model.add_attention(n_head, n_head)
    model.writer.add_relative_attn_buckets_count(n_buckets)
    model.writer.add_decoder_start_token_id(0)
    model.writer.add_add_eos_token(True)
    vocabulary.add_to(model)
    model.add({"token_embd.weight": model.random(len(vocabulary.tokens), N_EMBD, gain=8.0)})
    for half, attentions in {"enc": ("attn",), "dec": ("attn", "cross_attn")}.items():
        model.add({f"{half}.blk.0.attn_rel_b.weight": model.random(n_buckets, n_head, gain=16.0)})
        for layer in range(n_layer):
            tensors: dict[str, Array] = {}
            for attention in attentions:
                tensors |= {f"{attention}_{part}.weight": model.random(N_EMBD, N_EMBD, gain=2.0) for part in "qkvo"}
                tensors |= {f"{attention}_norm.weight": ones(N_EMBD)}
            tensors |= {
                "ffn_norm.weight": ones(N_EMBD),
                "ffn_up.weight": model.random(N_FF, N_EMBD, gain=2.0),
                "ffn_down.weight": model.random(N_EMBD, N_FF),
            }
            model.add_layer(layer, tensors, prefix=f"{half}.")
        model.add({f"{half}.output_norm.weight": ones(N_EMBD)})
    model.add({"output.weight": vocabulary.output(model)})
    model.write()


def write_bert(path: Path, *, name: str = "tiny-bert", pooling: gguf.PoolingType = gguf.PoolingType.MEAN) -> None:
    n_ctx, n_layer = 512, 2
    letters = [chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper()]
    words = [f"\u2581{word}" for word in (*letters, *WORDS)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters]
    model = ModelFile(path, "bert", name, seed=8)
    model.add_sizes(n_layer=n_layer, n_ctx=n_ctx)
    writer = model.writer
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling)
    writer.add_token_type_count(2)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 5 + [gguf.TokenType.NORMAL] * (len(tokens) - 5))
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_sep_token_id(3)
    writer.add_eos_token_id(3)
    writer.add_mask_token_id(4)
    writer.add_vocab_size(len(tokens))
    model.add(
        {
            "token_embd.weight": model.random(len(tokens), N_EMBD, gain=8.0),
            "position_embd.weight": model.random(n_ctx, N_EMBD),
            "token_types.weight": model.random(2, N_EMBD),
            "token_embd_norm.weight": ones(N_EMBD),
            "token_embd_norm.bias": zeros(N_EMBD),
        }
    )
    for layer in range(n_layer):
        tensors: dict[str, Array] = {}
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors |= {f"{part}.weight": model.random(N_EMBD, N_EMBD), f"{part}.bias": zeros(N_EMBD)}
        tensors |= {"ffn_up.weight": model.random(N_FF, N_EMBD), "ffn_up.bias": zeros(N_FF)}
        tensors |= {"ffn_down.weight": model.random(N_EMBD, N_FF), "ffn_down.bias": zeros(N_EMBD)}
        for part in ("attn_output_norm", "layer_output_norm"):
            tensors |= {f"{part}.weight": ones(N_EMBD), f"{part}.bias": zeros(N_EMBD)}
        model.add_layer(layer, tensors)
    if pooling == gguf.PoolingType.RANK:
        model.add({"cls.weight": model.random(N_EMBD, N_EMBD), "cls.bias": zeros(N_EMBD)})
        model.add({"cls.output.weight": model.random(1, N_EMBD), "cls.output.bias": zeros(1)})
    model.write()


def write_bert_cls(path: Path) -> None:
    write_bert(path, name="tiny-bert-cls", pooling=gguf.PoolingType.CLS)


def write_rerank(path: Path) -> None:
    write_bert(path, name="tiny-rerank", pooling=gguf.PoolingType.RANK)


def write_qwen3(path: Path, *, name: str, pooling: gguf.PoolingType) -> None:
    n_layer, n_head, n_head_kv = 2, 4, 2
    model, vocabulary = ModelFile(path, "qwen3", name, seed=15), Bpe()
    model.add_sizes(n_layer=n_layer)
    model.add_attention(n_head, n_head_kv)
    model.writer.add_pooling_type(pooling)
    vocabulary.add_to(model)
    model.add({"token_embd.weight": model.random(len(vocabulary.tokens), N_EMBD, gain=8.0)})
    for layer in range(n_layer):
        add_llama_layer(model, layer, n_head=n_head, n_head_kv=n_head_kv)
        model.add_layer(layer, {f"attn_{part}_norm.weight": ones(N_EMBD // n_head) for part in "qk"})
    model.add({"output_norm.weight": ones(N_EMBD), "output.weight": vocabulary.output(model)})
    if pooling == gguf.PoolingType.RANK:
        model.writer.add_string("tokenizer.chat_template.rerank", RERANK_TEMPLATE)
        model.writer.add_classifier_output_labels(["yes", "no"])
        model.add({"cls.output.weight": model.random(2, N_EMBD, gain=2.0)})
    else:
        model.writer.add_add_eos_token(True)
    model.write()


def write_qwen_embed(path: Path) -> None:
    write_qwen3(path, name="tiny-qwen-embed", pooling=gguf.PoolingType.LAST)


def write_rerank_causal(path: Path) -> None:
    write_qwen3(path, name="tiny-rerank-causal", pooling=gguf.PoolingType.RANK)
