"""Requests of all kinds that come, go, pause, fail and run out of time as a seed says: each that stays has exactly
the text that it has alone."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import trio
import trio.testing

from tests.engine.inside import images_of
from tests.engine.toys import Projector, Toy, items_of, picture, until, until_idle
from trio_runner.config import AdapterConfig
from trio_runner.core.batch import Batch, DecodeOutcome
from trio_runner.core.prompt import Item
from trio_runner.engine.engine import Engine
from trio_runner.engine.generation import Generation
from trio_runner.errors import InvalidImage, RunnerError, UnknownAdapter
from trio_runner.events import Usage
from trio_runner.images import load_pixels
from trio_runner.request import AdapterChoice, EmbedRequest, GenerateRequest
from trio_runner.testing import Interruption, ToyAdapters, ToyEncoding, toy_cache_key, toy_text, toy_vector

START = 1
N_TOKENS = 30
PICTURES = [picture(n) for n in range(5)]
REFUSED, BROKEN = picture(100), picture(101)
"""What the projector does not like, and what it falls over."""
TEXTS = ["a beginning that is long enough to be waited for by others", "look: ", "what is it?", "no", "é", "yes, " * 9]

WORLDS: list[tuple[dict[str, object], Projector | None]] = [
    ({}, Projector()),
    ({"can_shift": False}, Projector(shares_positions=True)),
    ({"can_trim": False}, Projector(n_tiles=2)),
    ({"embeds_last_row": True}, Projector(causal=False)),
    ({"decoder_start": START}, None),
    ({"can_shift": False}, Projector(shares_positions=True, n_tiles=3)),
]


@dataclass(frozen=True)
class Ask:
    """A request, and what is needed to predict its text."""

    request: GenerateRequest
    items: list[Item]

    @property
    def adapters(self) -> tuple[AdapterChoice, ...]:
        assert self.request.adapters is not None
        return self.request.adapters

    @property
    def may_fail(self) -> tuple[type[RunnerError], ...]:
        """The errors that this request may raise."""
        errors: list[type[RunnerError]] = []
        if any(choice.name == "guest" for choice in self.adapters):
            errors.append(UnknownAdapter)
        if REFUSED in self.request.prompt:  # type: ignore[operator]
            errors.append(InvalidImage)
        if BROKEN in self.request.prompt:  # type: ignore[operator]
            errors.append(RunnerError)
        return tuple(errors)


class Storm:
    """`guest` is an adapter that comes and goes, each time another file. The other two adapters stay."""

    def __init__(self, toy: Toy, seed: int) -> None:
        toy.capabilities, projector = WORLDS[seed % len(WORLDS)]
        if projector is not None:
            toy.projector = Projector(
                shares_positions=projector.shares_positions, causal=projector.causal, n_tiles=projector.n_tiles
            )
            toy.projector.on_encode = self.encode
        toy.adapters = (AdapterConfig("/lora/one.gguf", 0), AdapterConfig("/lora/two.gguf", 0))
        toy.on_decode = self.interrupt
        self.toy = toy
        self.chance = random.Random(seed)
        self.in_the_context = random.Random(seed)
        self.engine: Engine
        self.n_stayed = self.n_gone = self.n_failed = 0

    # -- what happens in the threads ----------------------------------------------------------------------------------

    def interrupt(self, batch: Batch) -> Interruption | None:
        what = self.in_the_context.random()
        if self.toy.context.aborted_number == batch.number or what < 0.1:
            return Interruption(DecodeOutcome.ABORTED, self.in_the_context.randrange(batch.n_rows + 1))
        return Interruption(DecodeOutcome.NO_KV_SPACE) if what < 0.15 else None

    def encode(self, encoding: ToyEncoding) -> None:
        if encoding.pixels == load_pixels(REFUSED, param="image"):
            raise InvalidImage("it is refused")
        if encoding.pixels == load_pixels(BROKEN, param="image"):
            raise MemoryError

    # -- what is asked ------------------------------------------------------------------------------------------------

    def an_ask(self, *, good: bool) -> Ask:
        chance = self.chance
        parts: list[str | bytes] = [chance.choice(TEXTS[:2]), *chance.choices(TEXTS, k=chance.randrange(3))]
        if self.toy.projector is not None:
            for image in chance.choices(PICTURES, k=chance.randrange(4)):
                parts.insert(chance.randrange(len(parts) + 1), image)
            if not good and chance.random() < 0.2:
                parts.insert(chance.randrange(len(parts) + 1), chance.choice([REFUSED, BROKEN]))
        names = chance.choice([[], [], ["one"], ["two"], ["one", "two"], ["guest"], ["two", "guest"]])
        request = GenerateRequest(
            prompt=tuple(parts),
            adapters=tuple(AdapterChoice(name, chance.choice([0.5, 1.0])) for name in names),
            max_tokens=N_TOKENS,
            priority=chance.choice(["interactive", "background"]),
            cache_prompt=chance.random() < 0.8,
            deadline=1000 if good else chance.choice([None, 0.001, 0.01, 0.05]),
        )
        return Ask(request, self.items(parts))

    def items(self, parts: list[str | bytes]) -> list[Item]:
        return items_of(self.toy.projector or Projector(), parts)

    def said(self, ask: Ask, adapters: ToyAdapters, n_tokens: int) -> str:
        if self.toy.projector is None:
            source = [item for item in ask.items if isinstance(item, int)]
            return toy_text([START], n_tokens, toy_cache_key(adapters, source))
        return toy_text(ask.items, n_tokens, toy_cache_key(adapters))

    # -- who asks -----------------------------------------------------------------------------------------------------

    async def read_to_the_end(self, ask: Ask, *, slowly: bool) -> None:
        generation = self.engine.generate(ask.request)
        try:
            await generation.start()
        except ask.may_fail:
            self.n_failed += 1
            return
        paths = {info.name: info.path for info in self.engine.adapters}  # the adapters that the names mean now
        text = ""
        async for event in generation:
            text += event.text
            if slowly:
                await trio.testing.wait_all_tasks_blocked()
        assert generation.usage is not None
        if generation.usage == Usage():  # its deadline passed before it was submitted
            assert text == ""
            self.n_gone += 1
            return
        adapters = [(paths[choice.name], choice.scale) for choice in ask.adapters]
        assert text == self.said(ask, adapters, generation.usage.completion_tokens)
        if ask.request.deadline == 1000:
            assert text == self.said(ask, adapters, N_TOKENS)
            self.n_stayed += 1
        else:
            self.n_gone += 1

    async def be_cancelled(self, use: Callable[[], Awaitable[object]], n_turns: int) -> None:
        async with trio.open_nursery() as nursery:

            async def use_it() -> None:
                try:
                    await use()
                except RunnerError:
                    self.n_failed += 1

            nursery.start_soon(use_it)
            for _ in range(n_turns):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        self.n_gone += 1

    async def be_closed(self, generation: Generation, n_turns: int) -> None:
        """Close a generation from another task than the one that reads it."""
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                try:
                    await generation.collect()
                except (RunnerError, trio.ClosedResourceError):
                    self.n_failed += 1

            nursery.start_soon(read)
            for _ in range(n_turns):
                await trio.lowlevel.checkpoint()
            generation.close()
        self.n_gone += 1

    async def embed(self, text: str) -> None:
        adapters = self.chance.choice([(), (AdapterChoice("one", 0.5),)])
        embedded = await self.engine.embed_request(EmbedRequest(content=text, adapters=adapters))
        cache_key = toy_cache_key([("/lora/one.gguf", choice.scale) for choice in adapters])
        np.testing.assert_array_equal(embedded.vector, toy_vector(list(text.encode()), cache_key))

    async def visit(self, n: int) -> None:
        """Load the guest, and unload it a little later."""
        await self.engine.load_adapter(f"/lora/guest{n}.gguf", name="guest")
        for _ in range(self.chance.randrange(200)):
            await trio.lowlevel.checkpoint()
        self.engine.unload_adapter("guest")

    async def visits(self, done: trio.Event) -> None:
        n = 0
        while not done.is_set():
            await self.visit(n)
            n += 1

    def start_one_that_goes(self, nursery: trio.Nursery) -> None:
        ask, n_turns = self.an_ask(good=False), self.chance.randrange(80)
        generation = self.engine.generate(ask.request)
        match self.chance.randrange(4):
            case 0:
                nursery.start_soon(self.be_closed, generation, n_turns)
            case 1:
                nursery.start_soon(self.be_cancelled, generation.collect, n_turns)
            case 2:
                nursery.start_soon(partial(self.read_to_the_end, ask, slowly=n_turns % 2 == 0))
            case _ if self.toy.projector is not None:
                nursery.start_soon(self.be_cancelled, partial(self.embed, TEXTS[0][:30]), n_turns)
                nursery.start_soon(self.embed, TEXTS[0][-20:])


@pytest.mark.parametrize("seed", range(24))
async def test_every_text_is_the_same_as_alone(toy: Toy, seed: int) -> None:
    storm = Storm(toy, seed)
    # What an encoder reads must fit into one batch.
    options = {"batch_size": 200 if toy.projector is None else 32, "step_target": 0.02, "image_cache_bytes": 400}
    async with toy.engine(slots=3, max_queue=None, max_backlog=8, **options) as engine:
        storm.engine = engine
        done = trio.Event()
        async with trio.open_nursery() as visiting:
            visiting.start_soon(storm.visits, done)
            async with trio.open_nursery() as nursery:
                for n in range(12):
                    ask = storm.an_ask(good=True)
                    nursery.start_soon(partial(storm.read_to_the_end, ask, slowly=n % 4 == 0))
                    for _ in range(5):
                        storm.start_one_that_goes(nursery)
            done.set()
        await until_idle(engine)
        assert storm.n_stayed > 0
        assert storm.n_gone > 20
        statistics = engine.statistics().scheduler
        assert statistics.n_paused == statistics.n_preempted == 0
        await until(lambda: sum(not adapter.closed for adapter in toy.model.adapters) == 2)
        if toy.projector is not None:
            assert engine.statistics().image_bytes <= 400
            assert images_of(engine).n_encoding == 0
