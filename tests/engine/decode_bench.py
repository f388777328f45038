"""The decode loop in the test's own thread. Hooks of the context play the trio thread."""

from __future__ import annotations

from collections.abc import Callable

from trio_runner.core.batch import Batch
from trio_runner.core.scheduler import Emission
from trio_runner.core.sequence import SequenceSpec
from trio_runner.engine.decode_loop import DecodeLoop
from trio_runner.engine.mailbox import Close, Mailbox, Submit
from trio_runner.events import Finished
from trio_runner.info import Capabilities
from trio_runner.sampling import SamplingParams
from trio_runner.testing import ToyContext, ToySampler

CAPABILITIES = Capabilities(n_slots=2, n_ctx=256, max_rows=64)


class Bench:
    """A decode loop and all that it needs."""

    def __init__(self, capabilities: Capabilities = CAPABILITIES, context: ToyContext | None = None) -> None:
        self.context = context or ToyContext(capabilities)
        self.mailbox = Mailbox()
        self.emissions: list[Emission] = []
        self.samplers: list[ToySampler] = []
        self.on_deliver: Callable[[], None] = self.close_when_all_finished
        """Called after the events of a step were taken. It closes the loop at the end of the test."""
        self.loop = DecodeLoop(self.context, self.mailbox, self.deliver)

    def deliver(self, emissions: list[Emission]) -> None:
        """Take the events of a step."""
        self.emissions += emissions
        self.on_deliver()

    def close_when_all_finished(self) -> None:
        if len(self.finished) == len(self.samplers):
            self.mailbox.put(Close())

    def close_when_finished(self, uid: int) -> None:
        if uid in self.finished:
            self.mailbox.put(Close())

    @property
    def finished(self) -> list[int]:
        """The uids of the sequences that have finished."""
        return [uid for uid, event in self.emissions if isinstance(event, Finished)]

    def submit(self, uid: int, prompt: str, max_tokens: int = 1) -> None:
        self.samplers.append(ToySampler(SamplingParams()))
        spec = SequenceSpec(uid=uid, prompt=tuple(prompt.encode()), max_tokens=max_tokens)
        self.mailbox.put(Submit(spec, self.samplers[-1]))

    def text(self, uid: int) -> str:
        return "".join(event.text for who, event in self.emissions if who == uid and hasattr(event, "text"))


def prompt_of(n_rows: int) -> str:
    return ("a prompt to cut " * 8)[:n_rows]


class Canceller:
    """A callback for `on_decode` that cancels the given sequences while a batch runs."""

    def __init__(self, bench: Bench, *uids: int) -> None:
        self.aborted: list[bool] = []
        """Whether each batch was aborted because of the cancellations."""
        self._bench = bench
        self._uids = uids

    def __call__(self, batch: Batch) -> None:
        for uid in self._uids:
            self._bench.loop.abort_for(uid)
        self.aborted.append(self._bench.context.aborted_number == batch.number)


class LateMailbox(Mailbox):
    """Mail that arrives just when the decode thread looks for the last time before a batch."""

    on_last_look: Callable[[], None] | None = None

    def __bool__(self) -> bool:
        if self.on_last_look is not None:
            self.on_last_look()
        return super().__bool__()
