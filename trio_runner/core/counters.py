"""What a scheduler has done so far, as numbers that only rise."""

from __future__ import annotations

from dataclasses import dataclass

from trio_runner.core.sequence import Sequence


@dataclass(slots=True)
class Counters:
    """See the fields of the same names in `SchedulerStatistics`."""

    n_batches: int = 0
    n_aborted: int = 0
    n_slots_used: int = 0
    n_sampled: int = 0
    n_preemptions: int = 0
    n_prompt_tokens: int = 0
    n_looked_up: int = 0
    n_found: int = 0
    n_prompt_decoded: int = 0
    prompt_seconds: float = 0.0
    n_generated: int = 0
    generation_seconds: float = 0.0

    def batch_done(self, n_slots_used: int) -> None:
        """Count a batch that was decoded while so many slots were in use."""
        self.n_batches += 1
        self.n_slots_used += n_slots_used

    def prompt_done(self, sequence: Sequence) -> None:
        """Count the prompt of a sequence, all of which is in the KV cache now."""
        spec = sequence.spec
        n_tokens = len(spec.prompt) + len(spec.encoder_tokens)
        self.n_prompt_tokens += n_tokens
        if spec.reuses:
            self.n_looked_up += n_tokens
            self.n_found += sequence.n_cached
        if not spec.embedding:
            self.n_prompt_decoded += n_tokens - sequence.n_cached
            self.prompt_seconds += sequence.prompt_seconds

    def finished(self, sequence: Sequence) -> None:
        """Count the text of a sequence that has finished."""
        self.n_generated += sequence.text.n_tokens
        self.generation_seconds += sequence.completion_seconds
