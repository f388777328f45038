"""Keyword arguments of `open_engine`, `Engine.generate` and `Engine.chat`, for type checkers and editors.

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


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams`."""

    logit_bias: Sequence[tuple[int, float]]
    """Pairs of a token and a number that is added to the logit of that token. Negative infinity forbids it."""
    ignore_eos: bool
    """Never choose a token that ends the generation, so that it goes on up to its limit."""
    repeat_last_n: int
    """Tokens that the repeat, frequency and presence penalties look back on, the prompt included. 0 turns them
    off, -1 means the whole context."""
    repeat_penalty: float
    """Divides positive logits, and multiplies negative logits, of tokens that occurred recently. 1 is off."""
    frequency_penalty: float
    """Is subtracted from the logit of a token for each time it occurred recently. 0 is off."""
    presence_penalty: float
    """Is subtracted once from the logit of a token that occurred recently. 0 is off."""
    penalize_nl: bool
    """Apply the penalties to the newline token too."""
    dry_multiplier: float
    """Strength of the DRY penalty ("don't repeat yourself") on repeated phrases. 0 is off."""
    dry_base: float
    """Base of the DRY penalty, which grows exponentially with the phrase."""
    dry_allowed_length: int
    """Phrases up to this many tokens may repeat without a DRY penalty."""
    dry_penalty_last_n: int
    """Tokens that the DRY penalty looks back on. 0 turns it off, -1 means the whole context."""
    dry_sequence_breakers: Sequence[str]
    """Texts that end a phrase, so that DRY does not count across them."""
    top_n_sigma: float
    """Keep only tokens whose logits lie within this many standard deviations of the highest. -1 is off."""
    top_k: int
    """Sample only from this many of the most probable tokens. 0 and below is off."""
    tfs_z: float
    """Tail-free sampling: cut the tail where the curve of probabilities flattens. 1 is off."""
    typical_p: float
    """Locally typical sampling: keep the most typical tokens with this total probability. 1 is off."""
    top_p: float
    """Nucleus sampling: keep the most probable tokens with this total probability. 1 is off."""
    min_p: float
    """Drop tokens less probable than this share of the most probable token. 0 is off."""
    xtc_probability: float
    """Chance, for each token, that XTC excludes the most probable choices. 0 is off."""
    xtc_threshold: float
    """Probability from which XTC counts a token among the top choices."""
    temperature: float
    """Divides the logits before the draw: higher values make the text more varied. At 0 and below, the most
    probable token is always chosen."""
    dynatemp_range: float
    """The temperature varies by up to this much in both directions, with the entropy of the choice. 0 is
    off."""
    dynatemp_exponent: float
    """How the entropy is mapped to the temperature."""
    mirostat: int
    """Version of Mirostat, 1 or 2, which replaces all truncating samplers from top_n_sigma to XTC. 0 is off."""
    mirostat_tau: float
    """Surprise per token that Mirostat aims at, in bits."""
    mirostat_eta: float
    """Learning rate of Mirostat."""
    seed: int
    """Seed of the random draw. The same seed gives the same text for the same request."""
    grammar: str
    """GBNF grammar with a rule named root, which the text must follow. A token that the other samplers chose
    against the grammar is chosen anew under it."""
    json_schema: JsonSchema
    """JSON schema, as JSON text, that the text must obey: it is one value of the schema, and nothing before or
    after it. Tokens that the schema does not allow are no candidates for the other samplers. Python callers may
    give an object or a class, too. Not together with `grammar`."""
    logprobs: int
    """Number of most probable alternatives to report with every token. 0 reports the chosen token's own
    log-probability, -1 reports nothing."""
    post_sampling_probs: bool
    """Report log-probabilities as they are after all samplers, in place of the model's own. Tokens that a
    sampler ruled out are no alternatives. A token that is chosen without a draw has the probability 1."""


class ChatOptions(SamplingOptions, total=False):
    """The fields of `GenerateRequest` that go with a conversation, and those of `SamplingParams`."""

    adapters: Sequence[AdapterChoice] | None
    """LoRA adapters to apply. Without it, all adapters apply at the scales they were loaded with; an empty list
    means the bare model."""
    max_tokens: int | None
    """Tokens to generate at most. 0 only decodes the prompt, so that later requests find it in the cache.
    Without it, generation goes on until the model ends it, or, with `shift` off, until the context is full."""
    stop: str | Sequence[str]
    """Generation ends before the first of these texts to be completed. Empty texts are ignored."""
    sampling: SamplingParams
    """How tokens are chosen, as one value."""
    cache_prompt: bool
    """Continue from the longest beginning of the prompt that a slot still holds, instead of decoding it again.
    On by default in Python and on the command line. The HTTP endpoints of the runner dialect have it off unless
    the request says so, as the original had."""
    share_prompt: bool
    """Wait for a running request that decodes the same beginning of the prompt, however short it is, and then
    continue from there. For several answers to one prompt, which is then decoded once. `cache_prompt` has no
    effect beside it. With recurrent state, which cannot be copied in part, each request decodes its own
    prompt."""
    preferred_slot: int | None
    """Number of the slot to take if it is free: below `slots` of the engine. Otherwise the request takes
    another one."""
    n_keep: int
    """Tokens at the start of the prompt, after BOS, that truncation and context shift leave in place. Below 0
    means the whole prompt."""
    shift: bool
    """When the context is full, drop the older half after `n_keep` and go on. Otherwise generation ends
    there."""
    truncate: bool
    """Shorten a prompt that is longer than the context. Otherwise it is refused. Text loses its middle. A
    conversation loses its oldest messages, but never system messages or the last one. A gap to fill loses what
    is far from it."""
    parse_special: bool
    """Read special tokens such as `<|im_end|>` in the text of the prompt as the tokens they name."""
    progress: bool
    """Report how much of the prompt is decoded, as `PromptProgress` events."""
    prompt_logprobs: int
    """Number of most probable alternatives to report with every token of the prompt but the first, in
    `Finished`. 0 reports the log-probability of the prompt's own token, -1 reports nothing. To report them, the
    whole prompt is decoded anew, whatever is in the cache."""
    priority: Priority
    """Interactive requests go before background requests in the queue, and may take over the slot of one. The
    background request goes on later and loses nothing of its text."""
    deadline: float | None
    """Seconds from the start of the request, waiting included, after which it ends with the text it has."""
    decode_seconds: float | None
    """Seconds from the first token after which generation ends with the text it has. The time that the prompt
    takes does not count."""


class GenerateOptions(ChatOptions, total=False):
    """The fields of `GenerateRequest` and those of `SamplingParams`."""

    image_data: Sequence[tuple[int, ImageSource]]
    """Pairs of a number N and an image, which stands where a prompt that is text has `[img-N]`."""


class EngineOptions(TypedDict, total=False):
    """The fields of `EngineConfig`."""

    slots: int
    """Requests that run at once. Each takes one slot of the KV cache."""
    context_length: int | None
    """Tokens that each slot can hold."""
    batch_size: int
    """Rows of one step at most. With rpc-servers or recurrent state, a cancelled request never interrupts a
    step. A text to embed must fit into one step, unless the model embeds the last row."""
    embedding_batch_size: int | None
    """Longest text to embed, in tokens, for encoders and other models that read a text in one step. More takes
    more memory. The larger of the batch size and this number, which is cut to the context."""
    threads: int | None
    """Threads that compute."""
    flash_attention: FlashAttention
    """Flash attention. auto: on where the backend supports it. Without it, each step attends to every cell of
    the KV cache that is in use, those of other slots and of cached prompts included."""
    kv_type: KvType
    """Element type of the KV cache. Quantised types need flash attention."""
    pooling: Pooling
    """How the rows of a text become one embedding. model: as the file says; if it says nothing, the last
    row."""
    step_target: float | None
    """Time that a step may take if it carries rows of a prompt beside sequences that decode. It bounds the gap
    that a prompt makes in every stream. In seconds."""
    image_cache_bytes: int
    """Bytes of encoded images to keep, so that an image that is asked for again need not be encoded again."""
    max_queue: int | None
    """Requests that may wait for a slot. Further ones are refused and told when to come back. None means no
    bound."""
    load_wait: float
    """Seconds that a request may wait for the model to load. Then it ends with `EngineLoading`."""
    max_backlog: int
    """Unread events after which a generation is paused until its reader catches up."""
    stall_timeout: float
    """Seconds that a paused generation waits for its reader. Then it ends with the error `ReaderStalled`. In
    `serve`, a client that takes nothing of its answer for so long is disconnected, too."""
