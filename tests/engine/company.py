"""Requests in company, over llama.cpp and in one thread: whether each gets the same bits as alone.

A `Company` does what the decode loop does, but no thread and no clock has a part in it: a random generator decides who
comes, leaves, pauses and goes on, how prompts are cut into steps, and which batches are aborted or thrown away. So a
schedule is the same in every run.

    company = Company(path, seed=1)
    company.play(n_events=60)
    assert not company.differences()

`differences` runs each request again, alone, with a context of its own in which nothing was decoded before, its prompt
in one step. Every token, log-probability and embedding must be the same there, to the last bit. Of a request that was
cancelled, this holds for what it was told before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Final, TypeAlias

import numpy as np

from tests.llama.running import Running
from trio_runner.config import AdapterConfig
from trio_runner.core.batch import Batch, StepResult
from trio_runner.core.memory import Copy
from trio_runner.core.pace import Pace
from trio_runner.core.scheduler import Scheduler
from trio_runner.core.sequence import FirstToken, SequenceSpec
from trio_runner.events import Embedded, Event, Finished, SampledToken, TextPiece
from trio_runner.llama import Sampler
from trio_runner.sampling import SamplingParams

N_TOP: Final = 3
"""Most probable tokens to compare at each place."""
MAX_TOKENS: Final = 20
"""Tokens of a text at most."""
MOST_AT_ONCE: Final = 9
"""Requests in flight, at most. More come only when one has ended."""
SAMPLINGS: Final = (
    SamplingParams(temperature=0, repeat_penalty=1, logprobs=N_TOP),
    SamplingParams(temperature=0, repeat_penalty=1, logprobs=N_TOP),
    SamplingParams(temperature=0.8, seed=7, logprobs=N_TOP),
    SamplingParams(temperature=1.0, seed=8, repeat_penalty=1.3, logprobs=N_TOP),
)
EVENTS: Final = {
    "submit": 10,
    "submit several answers": 3,
    "submit one that shifts": 1,
    "submit an embedding": 1,
    "cancel": 5,
    "pause": 4,
    "resume": 4,
    "expire": 1,
    "abort a batch": 4,
    "throw a batch away": 2,
}
"""What may happen, and how often in proportion."""

Request: TypeAlias = tuple[SequenceSpec, SamplingParams]


class _CutPrompts(Pace):
    """Gives prompts a random number of rows in each step."""

    def __init__(self, max_rows: int, chance: Random) -> None:
        super().__init__(max_rows)
        self._most, self._chance = max_rows, chance

    def prompt_rows(self, n_decoding: int, *, n_kinds: int = 1, short: bool = False) -> int:
        return self._chance.choice((1, 2, 3, 5, 8, 13, 16, 17, 31, self._most))


class _WholePrompts(Pace):
    """Gives prompts all rows of a step."""

    def __init__(self, max_rows: int) -> None:
        super().__init__(max_rows)
        self._most = max_rows

    def prompt_rows(self, n_decoding: int, *, n_kinds: int = 1, short: bool = False) -> int:
        return self._most


@dataclass
class Told:
    """What the reader of one request was told."""

    tokens: list[SampledToken] = field(default_factory=list)
    prompt: tuple[SampledToken, ...] = ()
    vector: np.ndarray[Any, np.dtype[np.float32]] | None = None
    reason: str | None = None
    """Why it ended; None for an embedding, and while it has not ended or if it was cancelled."""

    def take(self, event: Event | Embedded | FirstToken) -> None:
        if isinstance(event, Embedded):
            self.vector = np.asarray(event.vector)
        elif isinstance(event, (TextPiece, Finished)):
            self.tokens += event.tokens
            if isinstance(event, Finished):
                assert event.error is None, event.error
                self.reason, self.prompt = event.reason, event.prompt_logprobs


@dataclass(frozen=True)
class Difference:
    """Where a request first differs from its run alone, and by how much at most before the texts part."""

    uid: int
    place: str
    nats: float


class _Driver:
    """A scheduler over a context of its own, in one thread."""

    def __init__(self, path: Path, *, pace: Random | None, **config: Any) -> None:
        self.running = Running(path, **config)
        n_rows = self.running.capabilities.max_rows
        chosen = _WholePrompts(n_rows) if pace is None else _CutPrompts(n_rows, pace)
        self.scheduler = Scheduler(self.running.capabilities, pace=chosen)
        self.told: dict[int, Told] = {}
        self.live: list[int] = []
        self.counts: Counter[str] = Counter()
        self._samplers: dict[int, Sampler] = {}

    def submit(self, spec: SequenceSpec, sampling: SamplingParams) -> int:
        uid = len(self.told)
        self.told[uid] = Told()
        self.live.append(uid)
        if spec.samples:
            self._samplers[uid] = self.running.sampler(
                sampling, [item for item in spec.prompt if isinstance(item, int)]
            )
        self.scheduler.submit(replace(spec, uid=uid))
        return uid

    def step(self, *, abort: bool = False, discard: bool = False) -> bool:
        """One step. False if there is nothing to do."""
        step = self.scheduler.next_step()
        if step is None:
            return False
        self.counts["copies"] += sum(isinstance(op, Copy) for op in step.memory_ops)
        refused = [op for op in step.memory_ops if not self.running.context.apply(op)]
        for op in refused:
            self.scheduler.trim_failed(op)
        if step.batch.chunks and not refused and not discard:
            if abort:
                self.running.context.abort(step.batch.number)
            self._commit(step.batch, self._decode(step.batch))
        return True

    def _decode(self, batch: Batch) -> StepResult:
        result = self.running.context.decode(batch, self._samplers, adapters=self.running.adapters)
        self.counts[result.outcome.name] += 1
        return result

    def _commit(self, batch: Batch, result: StepResult) -> None:
        for uid, event in self.scheduler.commit(batch, result):
            self.hear(uid, event)

    def hear(self, uid: int, event: Event | Embedded | FirstToken) -> None:
        self.told[uid].take(event)
        if isinstance(event, (Finished, Embedded)):
            self.counts["cache hits"] += event.usage.cached_tokens > 0
            self.forget(uid)

    def forget(self, uid: int) -> None:
        self.live.remove(uid)
        sampler = self._samplers.pop(uid, None)
        if sampler is not None:
            sampler.close()

    def run(self) -> None:
        while self.step():
            pass
        assert not self.live


class Company(_Driver):
    """See above. `config` are fields of EngineConfig, `adapters` are loaded too, and some requests use them."""

    def __init__(
        self, path: Path, *, seed: int, threads: int = 1, adapters: tuple[AdapterConfig, ...] = (), **config: Any
    ) -> None:
        self.path = path
        """The model of the runs alone, which the company had."""
        self._config = {"slots": 3, "context_length": 160, "batch_size": 48, "kv_type": "f16", "adapters": adapters}
        self._config |= config
        self._chance = Random(seed)
        super().__init__(path, pace=self._chance, threads=threads, **self._config)
        self.requests: dict[int, Request] = {}
        self._paused: set[int] = set()
        self._prompts = list(self._make_prompts(n_vocab=self.running.model.info.n_vocab))

    # -- what happens -------------------------------------------------------------------------------------------------

    def play(self, n_events: int) -> None:
        """Let so many things happen, with some steps after each, and then everyone who has stayed finish."""
        kinds, weights = list(EVENTS), list(EVENTS.values())
        for _ in range(n_events):
            kind = self._chance.choices(kinds, weights)[0]
            if kind.startswith("submit") and len(self.live) >= MOST_AT_ONCE:
                kind = "cancel"
            self.counts[kind] += self._happen(kind)
            for _ in range(self._chance.choice((0, 1, 2, 3, 6))):
                self.step()
        for uid in sorted(self._paused):
            self.scheduler.resume(uid)
        self.run()
        self.counts["preemptions"] = self.scheduler.statistics().n_preemptions

    def _happen(self, kind: str) -> bool:
        """Make an event of this kind happen. False if no sequence is in the state that it needs."""
        match kind:
            case "submit" | "submit several answers" | "submit one that shifts" | "submit an embedding":
                self._submit(kind)
                return True
            case "abort a batch":
                return self.step(abort=True)
            case "throw a batch away":
                return self.step(discard=True)
        concerned = [uid for uid in self.live if (uid in self._paused) == (kind == "resume")]
        if not concerned:
            return False
        uid = self._chance.choice(concerned)
        match kind:
            case "cancel":
                self.scheduler.cancel(uid)
                self.forget(uid)
            case "pause":
                self.scheduler.pause(uid)
                self._paused.add(uid)
            case "resume":
                self.scheduler.resume(uid)
                self._paused.discard(uid)
            case "expire":
                for told, event in self.scheduler.expire(uid):
                    self.hear(told, event)
        return True

    def _submit(self, kind: str) -> None:
        chance, n_answers = self._chance, 1
        spec = SequenceSpec(
            uid=0,
            prompt=chance.choice(self._prompts),
            max_tokens=chance.randrange(MAX_TOKENS + 1),
            cache_prompt=chance.random() < 0.8,
            background=chance.random() < 0.3,
            shift=False,
            logprobs=True,
            prompt_logprobs=N_TOP if chance.random() < 0.1 else -1,
            adapters=chance.choice(((), self.running.adapter_set)),
        )
        if kind == "submit several answers":
            spec, n_answers = replace(spec, share_prompt=True, prompt_logprobs=-1), chance.choice((2, 3))
        elif kind == "submit one that shifts":
            spec = replace(spec, shift=True, max_tokens=2 * self.running.capabilities.n_ctx, n_keep=4)
        elif kind == "submit an embedding":
            able = self.running.capabilities
            longest = able.n_ctx if able.embeds_last_row else able.max_rows  # the engine refuses longer ones
            prompt = spec.prompt[:longest]
            spec = replace(spec, prompt=prompt, embedding=True, background=False, prompt_logprobs=-1)
        for _ in range(n_answers):
            sampling = chance.choice(SAMPLINGS)
            self.requests[self.submit(spec, sampling)] = spec, sampling

    def _make_prompts(self, n_vocab: int) -> Iterator[tuple[int, ...]]:
        """Prompts that share beginnings of different lengths, and some that share nothing."""
        first_text = min(3, n_vocab - 1)  # after the control tokens of the tiny vocabularies
        common = [self._chance.randrange(first_text, n_vocab) for _ in range(120)]
        longest = self.running.capabilities.n_ctx - MAX_TOKENS - 14
        for n_common in (0, 0, 1, 15, 16, 17, 33, 64, 90, 120):
            rest = [self._chance.randrange(first_text, n_vocab) for _ in range(self._chance.randrange(1, 13))]
            yield (*common[: min(n_common, longest)], *rest)

    # -- what came of it ----------------------------------------------------------------------------------------------

    def differences(self) -> list[Difference]:
        """The requests that were not told the same as alone."""
        found = []
        alone: dict[object, Told] = {}
        for uid, (spec, sampling) in self.requests.items():
            key = spec.prompt, spec.adapters, spec.embedding, spec.prompt_logprobs, sampling
            if spec.shift:
                continue  # a context shift changes bits
            if key not in alone:
                alone[key] = self.alone(spec, sampling)
            difference = _difference(uid, self.told[uid], alone[key])
            if difference is not None:
                found.append(difference)
        return found

    def alone(self, spec: SequenceSpec, sampling: SamplingParams) -> Told:
        """What this request is told if it runs alone, up to `MAX_TOKENS` tokens, computed by one thread."""
        driver = _Driver(self.path, pace=None, **self._config | {"batch_size": 256, "slots": 1, "threads": 1})
        uid = driver.submit(replace(spec, max_tokens=MAX_TOKENS, background=False, share_prompt=False), sampling)
        driver.run()
        return driver.told[uid]


def _difference(uid: int, told: Told, alone: Told) -> Difference | None:
    if told.vector is not None:
        assert alone.vector is not None
        if told.vector.tobytes() == alone.vector.tobytes():
            return None
        return Difference(uid, "embedding", float(np.abs(told.vector - alone.vector).max()))
    for name, ours, theirs in (("prompt", told.prompt, alone.prompt), ("token", told.tokens, alone.tokens)):
        assert len(ours) <= len(theirs), "more than alone"
        nats, first = 0.0, None
        for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
            if one != other:
                first = place if first is None else first
                nats = max(nats, _nats(one, other))
            if one.token != other.token:
                break
        if first is not None:
            return Difference(uid, f"{name} {first}", nats)
    return None


def _nats(one: SampledToken, other: SampledToken) -> float:
    """The greatest difference of the log-probabilities at one place."""
    ours, theirs = (sorted((info.logprob for info in token.top), reverse=True) for token in (one, other))
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=False))
