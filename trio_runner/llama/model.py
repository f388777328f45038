"""Model: weights and vocabulary, loaded once and read from any thread."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from trio_runner.config import SPLIT_MODES, ModelConfig
from trio_runner.errors import EngineClosed, InvalidRequest, LoadError, Unsupported
from trio_runner.info import ModelInfo
from trio_runner.llama.adapter import Adapter
from trio_runner.llama.library import check, drain_log, last_error, native, read_text
from trio_runner.llama.sampler import Sampler
from trio_runner.llama.schema import Schemas
from trio_runner.request import MAX_TEXT_BYTES
from trio_runner.sampling import SamplingParams


def _token(token: int) -> int | None:
    return token if token >= 0 else None


class LoadProgress:
    """The progress of one load. Any thread may read it or cancel the load."""

    def __init__(self) -> None:
        loaded = native()
        self._lib = loaded.lib
        self.handle = loaded.ffi.gc(loaded.lib.trio_load_new(), loaded.lib.trio_load_free)

    @property
    def fraction(self) -> float:
        """The part that is loaded, from 0 to 1."""
        return float(self._lib.trio_load_progress(self.handle))

    def cancel(self) -> None:
        """Make the load end soon, with `EngineClosed`."""
        self._lib.trio_load_cancel(self.handle)


class Model:
    """A loaded model: `trio_runner.core.ports.Model` over llama.cpp.

    Blocks while it loads, with the GIL released. The last `n_device_layers` layers (-1: all) go to the devices with the
    numbers in `devices`. With `no_alloc` the model has no weights: a context of it only tells how much memory it would
    take.

    Raises `LoadError`, or `EngineClosed` if `progress` was cancelled.
    """

    def __init__(
        self,
        config: ModelConfig,
        progress: LoadProgress | None = None,
        *,
        devices: Sequence[int] = (),
        n_device_layers: int = -1,
        no_alloc: bool = False,
    ) -> None:
        loaded = native()
        self._ffi, self._lib = loaded.ffi, loaded.lib
        split = self._ffi.new("float[]", list(config.tensor_split)) if config.tensor_split else self._ffi.NULL
        numbers = self._ffi.new("int32_t[]", list(devices))
        params = self._ffi.new(
            "trio_model_params *",
            {
                "n_gpu_layers": n_device_layers,
                "devices": numbers,
                "n_devices": len(devices),
                "split_mode": SPLIT_MODES.index(config.split_mode),
                # With split mode "none", `devices` has one device.
                "main_gpu": config.main_gpu if config.split_mode == "row" else 0,
                # The original runner does so too. It merged adapters into the weights; we do not.
                "use_mmap": config.mmap and not config.adapters,
                "use_mlock": config.mlock,
                "check_tensors": config.check_tensors,
                "tensor_split": split,
                "n_tensor_split": len(config.tensor_split),
                "no_alloc": no_alloc,
            },
        )
        out = self._ffi.new("trio_model **")
        load = self._ffi.NULL if progress is None else progress.handle
        try:
            check("trio_model_open", self._lib.trio_model_open(os.fsencode(config.path), params, load, out))
        except LoadError as failure:
            raise LoadError(failure.reason, path=config.path) from None
        # Freed with the last reference, so a thread in the middle of a call keeps it alive after close().
        self._handle: Any = self._ffi.gc(out[0], self._lib.trio_model_free)
        drain_log()
        self.path = config.path
        self.native_info = self._ffi.new("trio_model_info *")
        check("trio_model_get_info", self._lib.trio_model_get_info(self._handle, self.native_info))
        self._info = self._describe()
        self._schemas = Schemas()
        self._pieces: dict[int, bytes] = {}

    @property
    def info(self) -> ModelInfo:
        """Facts from the file."""
        return self._info

    @property
    def handle(self) -> Any:
        """The shim's trio_model. Raises `EngineClosed` after close()."""
        if self._handle is None:
            raise EngineClosed("the model has been closed")
        return self._handle

    def _describe(self) -> ModelInfo:
        raw = self.native_info
        metadata: dict[str, str] = {}
        for index in range(check("trio_model_meta_count", self._lib.trio_model_meta_count(self._handle))):
            key = read_text("trio_model_meta_key", self._handle, index)
            value = read_text("trio_model_meta_value", self._handle, index)
            metadata[key.decode(errors="replace")] = value.decode(errors="replace")
        return ModelInfo(
            name=metadata.get("general.name") or Path(self.path).stem,
            architecture=metadata.get("general.architecture", ""),
            description=read_text("trio_model_description", self._handle).decode(errors="replace"),
            n_vocab=raw.n_vocab,
            n_ctx_train=raw.n_ctx_train,
            n_embd=raw.n_embd,
            n_layer=raw.n_layer,
            n_params=raw.n_params,
            size=raw.size,
            token_bos=_token(raw.token_bos),
            token_eos=_token(raw.token_eos),
            token_sep=_token(raw.token_sep),
            token_fim_pre=_token(raw.token_fim_pre),
            token_fim_suf=_token(raw.token_fim_suf),
            token_fim_mid=_token(raw.token_fim_mid),
            token_fim_rep=_token(raw.token_fim_rep),
            token_fim_sep=_token(raw.token_fim_sep),
            adds_bos=bool(raw.add_bos),
            adds_eos=bool(raw.add_eos),
            adds_sep=bool(raw.add_sep),
            bos_text=self._token_text(raw.token_bos),
            eos_text=self._token_text(raw.token_eos),
            causal=bool(raw.causal),
            chat_template=metadata.get("tokenizer.chat_template"),
            metadata=metadata,
        )

    def _token_text(self, token: int) -> str:
        if token < 0 or not self.native_info.has_vocab:
            return ""
        return read_text("trio_token_bytes", self._handle, token).decode(errors="replace")

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the tokens of `text`.

        `add_special` adds the tokens that the model's texts begin or end with. `parse_special` turns the names of
        special tokens into these tokens. Raises `InvalidRequest` for half of a surrogate pair, for more than
        `MAX_TEXT_BYTES` bytes, and for too many special tokens to tell apart in reasonable time.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("the text contains half of a surrogate pair", param="prompt") from None
        if len(data) > MAX_TEXT_BYTES:
            raise InvalidRequest(
                f"the text has {len(data)} bytes, but at most {MAX_TEXT_BYTES} are allowed", param="prompt"
            )
        handle = self.handle
        size = len(data) + 8  # a token per byte and some special ones: nearly always enough
        while True:
            tokens: NDArray[np.int32] = np.empty(size, np.int32)
            buffer = self._ffi.from_buffer("int32_t[]", tokens)
            code = self._lib.trio_tokenize(handle, data, len(data), add_special, parse_special, buffer, size)
            if code == self._lib.TRIO_E_INVALID:
                raise InvalidRequest(last_error(), param="prompt")
            n_tokens = check("trio_tokenize", code)
            if n_tokens <= size:
                return cast(list[int], tokens[:n_tokens].tolist())
            size = n_tokens

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """Return the text of `tokens`, with the names of special tokens.

        Raises `InvalidRequest` for a token outside the vocabulary.
        """
        handle = self.handle
        self._check_tokens(tokens, "tokens")
        raw = self._ffi.new("int32_t[]", list(tokens))
        size = max(256, 8 * len(tokens))
        while True:
            buffer = self._ffi.new("char[]", size)
            n_bytes = check("trio_detokenize", self._lib.trio_detokenize(handle, raw, len(tokens), buffer, size))
            if n_bytes <= size:
                return bytes(self._ffi.buffer(buffer, n_bytes))
            size = n_bytes

    def piece(self, token: int) -> bytes:
        """Return the bytes of one token; for a special token, its name.

        Raises `InvalidRequest` for a token outside the vocabulary.
        """
        piece = self._pieces.get(token)
        if piece is None:
            self._check_tokens((token,), "token")
            size = max(1, self.native_info.max_piece)
            buffer = self._ffi.new("char[]", size)
            n_bytes = check("trio_token_bytes", self._lib.trio_token_bytes(self.handle, token, buffer, size))
            piece = self._pieces[token] = bytes(self._ffi.buffer(buffer, n_bytes))
        return piece

    def is_end(self, token: int) -> bool:
        """Whether `token` ends a generation. Raises `InvalidRequest` for a token outside the vocabulary."""
        self._check_tokens((token,), "token")
        return bool(check("trio_token_is_end", self._lib.trio_token_is_end(self.handle, token)))

    def _check_tokens(self, tokens: Sequence[int], param: str) -> None:
        n_vocab = self._info.n_vocab
        for token in tokens:
            if not 0 <= token < n_vocab:
                raise InvalidRequest(f"token {token} is outside the vocabulary of {n_vocab}", param=param)

    def sampler(self, params: SamplingParams, prompt: Sequence[int]) -> Sampler:
        """Create a sampler whose penalties have seen `prompt`.

        Raises `InvalidGrammar`, `InvalidRequest` for a token outside the vocabulary or a schema without llguidance, and
        `Unsupported` for a schema without a vocabulary.
        """
        for token, _ in params.logit_bias:
            self._check_tokens((token,), "logit_bias")
        self._check_tokens(prompt, "prompt")
        handle = self.handle
        schema = None
        if params.json_schema:
            if not self.native_info.has_vocab:
                raise Unsupported("schemas", "this model has no vocabulary for a schema", param="json_schema")
            schema = self._schemas.compiled(handle, params.json_schema)
        return Sampler(handle, params, prompt, n_vocab=self._info.n_vocab, schema=schema)

    def has_schema(self, text: str) -> bool:
        """Whether the JSON schema is compiled already, so that a sampler with it takes little time to make."""
        return self._schemas.has(text)

    def adapter(self, path: str) -> Adapter:
        """Load a LoRA adapter for this model and try it on a few tokens.

        Blocks. May be called from any thread, also while a context decodes. Raises `LoadError`.
        """
        return Adapter(self.handle, self._info, path)

    def close(self) -> None:
        """Release the model. Its memory is freed when its contexts, samplers, adapters and projectors are closed too.

        May be called more than once.
        """
        self._handle = None
        self._schemas.close()
