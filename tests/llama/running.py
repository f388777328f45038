"""Runs a context without a scheduler, for tests of models, contexts and samplers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path

from tests.placing import model_config
from trio_runner.config import AdapterConfig, EngineConfig
from trio_runner.core.batch import AdapterSet, Batch, BatchKind, Chunk, DecodeOutcome, Sampled, StepResult
from trio_runner.core.memory import Trim
from trio_runner.core.ports import NO_MEDIA, EncodedMedia
from trio_runner.core.prompt import Item, Media, MediaRow, n_positions
from trio_runner.llama import Context, LlamaLoader, Model, Projector, Sampler
from trio_runner.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, repeat_penalty=1.0)
PROMPT = "hello world, the model and the answer"
LONG_TEXT = "the story of the world and more than a window of thirty-two tokens in this one text"


class Running:
    """A loaded model with its context. Steps use all `adapters`, with uids 0, 1, ..., unless they choose others."""

    def __init__(
        self,
        path: Path,
        *,
        projector: Path | None = None,
        adapters: tuple[AdapterConfig, ...] = (),
        **config: object,
    ) -> None:
        settings = {"slots": 2, "context_length": 256, "batch_size": 64, "threads": 1, "kv_type": "f32"} | config
        gpu_layers = settings.pop("gpu_layers", -1)
        mmproj = None if projector is None else str(projector)
        model = model_config(path, projector=mmproj, adapters=adapters, gpu_layers=gpu_layers)
        loader = LlamaLoader(model)
        runtime = loader(EngineConfig(**settings), progress=lambda _: None, cancelled=lambda: False)  # type: ignore[arg-type]
        self.placement = runtime.placement
        assert isinstance(runtime.model, Model)
        assert isinstance(runtime.context, Context)
        self.model = runtime.model
        self.context = runtime.context
        self.capabilities = runtime.context.capabilities
        self.adapters = {uid: loaded.adapter for uid, loaded in enumerate(runtime.adapters)}
        self.adapter_set: AdapterSet = tuple(
            (uid, loaded.scale) for uid, loaded in enumerate(runtime.adapters) if loaded.scale
        )
        self.around_decode: Callable[[Batch], AbstractContextManager[object]] = nullcontext
        """Called with each batch; the context manager it returns is entered while the batch is decoded."""
        if projector is not None:
            assert isinstance(runtime.projector, Projector)
            self.projector = runtime.projector

    def tokens(self, text: str = PROMPT) -> list[int]:
        return self.model.tokenize(text, add_special=True, parse_special=True)

    def sampler(self, params: SamplingParams = GREEDY, prompt: Sequence[int] = ()) -> Sampler:
        return self.model.sampler(params, prompt)

    def step(
        self,
        *chunks: Chunk,
        samplers: dict[int, Sampler] | None = None,
        embeddings: bool = False,
        adapters: AdapterSet | None = None,
        media: Mapping[Media, EncodedMedia] = NO_MEDIA,
        number: int = 0,
    ) -> StepResult:
        """Decode one batch of these chunks."""
        adapter_set = self.adapter_set if adapters is None else adapters
        kind = BatchKind(adapter_set, embedding=embeddings)
        media_of_chunks = chunks[0].media if chunks else None
        batch = Batch(chunks, kind if media_of_chunks is None else kind.for_media(media_of_chunks), number)
        with self.around_decode(batch):
            return self.context.decode(batch, samplers or {}, media=media, adapters=self.adapters)

    def prefill(self, tokens: Sequence[int], *, slot: int = 0, start: int = 0, rows: int = 64) -> int:
        """Decode `tokens` without output, `rows` at a time. Returns the position after them."""
        for begin in range(0, len(tokens), rows):
            part = tuple(tokens[begin : begin + rows])
            assert self.step(Chunk(0, slot, start + begin, part, output=False)).outcome is DecodeOutcome.OK
        return start + len(tokens)

    def place(self, items: Sequence[Item], media: Mapping[Media, EncodedMedia], *, slot: int = 0) -> int:
        """Decode tokens and images without output in an empty slot. Returns the position after them."""
        position = 0
        for _, group in groupby(items, _image_of):
            part = tuple(group)
            chunk = Chunk(0, slot, position, part, output=False)
            result = self.step(chunk, media=media)
            assert result.outcome is DecodeOutcome.OK, result.message
            position += n_positions(part)
        return position

    def go_on(
        self, token: int, position: int, n_tokens: int, *, slot: int = 0, params: SamplingParams = GREEDY
    ) -> list[Sampled]:
        """Decode `token` at `position`, sample a token, decode that one, and so on. Returns what was sampled."""
        sampler = self.sampler(params)
        result: list[Sampled] = []
        for _ in range(n_tokens):
            step = self.step(Chunk(0, slot, position, (token,), output=True), samplers={0: sampler})
            assert step.outcome is DecodeOutcome.OK, step.message
            result.append(step.sampled[0])
            if result[-1].is_end or result[-1].error is not None:
                break
            token = result[-1].token
            position += 1
        return result

    def generate(
        self,
        prompt: str | Sequence[int] = PROMPT,
        n_tokens: int = 12,
        *,
        slot: int = 0,
        params: SamplingParams = GREEDY,
    ) -> list[Sampled]:
        """Empty `slot`, decode `prompt` in it, and generate up to `n_tokens` tokens."""
        tokens = self.tokens(prompt) if isinstance(prompt, str) else list(prompt)
        assert self.context.apply(Trim(slot, 0))
        position = self.prefill(tokens[:-1], slot=slot)
        return self.go_on(tokens[-1], position, n_tokens, slot=slot, params=params)

    def text(self, prompt: str = PROMPT, n_tokens: int = 24, params: SamplingParams = GREEDY) -> str:
        return b"".join(sampled.piece for sampled in self.generate(prompt, n_tokens, params=params)).decode()


def _image_of(item: Item) -> Media | None:
    return item.media if isinstance(item, MediaRow) else None


def tokens_of(result: Sequence[Sampled]) -> list[int]:
    return [sampled.token for sampled in result]
