"""Answers in the dialect of Ollama's Go runner: events and results -> bytes. Pure.

Each answer is one compact line, with <, >, &, U+2028 and U+2029 escaped as Go escapes them. The lines of a stream are
put together by hand, since there is one for every token; msgspec writes all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trio_runner.errors import EngineBusy, EngineLoading, LoadError, RequestError, RunnerError
from trio_runner.events import Embedded, Event, Finished, PromptProgress, SampledToken, TextPiece, TokenInfo, Usage
from trio_runner.info import AdapterInfo, Capabilities, EngineStatistics, ModelInfo, Placement
from trio_runner.server.dialects.json_out import (
    finite_vector,
    float32,
    float32_list,
    float32_text,
    go_line,
    go_string,
    line,
    long_go_string,
    long_list,
    whole_characters,
)
from trio_runner.server.dialects.runner.requests import NO_SEQUENCE
from trio_runner.server.dialects.sampled_tokens import finite_logprob
from trio_runner.server.problems import Problem, load_failure, problem, problem_text

NO_SLOT = "Failed to load cache: no available cache slots"
"""How the original refuses a request when all its slots are taken."""


# --- Refusals --------------------------------------------------------------------------------------------------------


def not_admitted(error: RunnerError) -> Problem:
    """The problem of a request that was well formed, but got no sequence or no slot, in the words of the original."""
    refusal = problem(error)
    if isinstance(error, EngineBusy) and not isinstance(error, EngineLoading):
        return replace(refusal, text=NO_SLOT)
    if isinstance(error, RequestError):
        return replace(refusal, text=NO_SEQUENCE + refusal.text)
    return refusal


def adapter_problem(error: LoadError, file: str) -> Problem:
    """The problem of a file that is no adapter for this model. It does not say in which directory the file is."""
    reason = error.reason if error.path is None else error.reason.replace(error.path, file)
    return Problem(422, f"file: {file}: {' '.join(reason.split())}")


# --- Streams ---------------------------------------------------------------------------------------------------------


def _quoted(text: str) -> str:
    return go_string(text).decode()


def _timings(usage: Usage, more: str = "") -> str:
    return (
        f'"timings":{{"predicted_n":{usage.completion_tokens},"predicted_ms":{int(usage.completion_seconds * 1000)},'
        f'"prompt_n":{usage.prompt_tokens},"prompt_ms":{int(usage.prompt_seconds * 1000)}{more}}}'
    )


def _token(info: TokenInfo) -> str:
    text = _quoted(info.piece.decode("utf-8", errors="replace"))
    piece = ",".join(map(str, info.piece))
    return f'"id":{info.token},"token":{text},"bytes":[{piece}],"logprob":{float32_text(finite_logprob(info.logprob))}'


def _probabilities(tokens: Sequence[SampledToken]) -> str:
    if not tokens:
        return ""
    entries = (
        f'{{{_token(token)},"top_logprobs":[{",".join(f"{{{_token(other)}}}" for other in token.top)}]}}'
        for token in tokens
    )
    return f'"completion_probabilities":[{",".join(entries)}],'


_NO_TIMINGS = _timings(Usage())
_STOPPED = {"length": '"stopped_limit":true,', "deadline": '"stopped_deadline":true,'}


class CompletionLines:
    """Writes the events of one generation as the lines of its answer."""

    def event(self, event: Event) -> bytes:
        match event:
            case PromptProgress():
                return b""
            case TextPiece(text=text, tokens=tokens):
                written = f'{{"content":{_quoted(text)},"stop":false,{_probabilities(tokens)}{_NO_TIMINGS}}}\n'
            case Finished(reason=reason, usage=usage, tokens=tokens):
                timings = _timings(usage, f',"cache_n":{usage.cached_tokens}')
                written = f'{{"content":"","stop":true,{_STOPPED.get(reason, "")}{_probabilities(tokens)}{timings}}}\n'
        return written.encode()

    def failure(self, error: Exception) -> bytes:
        """The last line of an answer that cannot go on. Its status is long sent, so the error comes in the body.

        The line has "stop":true. Ollama's server of that time does not look for "error", and takes the line for the
        normal end of an answer: to it, an answer that failed looks like one that is complete. Other clients can tell
        the two apart by "error".
        """
        return f'{{"error":{_quoted(problem_text(error))},"content":"","stop":true,{_NO_TIMINGS}}}\n'.encode()


# --- Results ---------------------------------------------------------------------------------------------------------


def embedding_line(embedded: Embedded) -> bytes:
    """The answer of /embedding. Raises `RunnerError` if a value is not finite."""
    return line({"embedding": float32_list(finite_vector(embedded))})


def embeddings_line(embedded: Sequence[Embedded]) -> bytes:
    """The answer of /embedding to a list of texts. Raises `RunnerError` if a value is not finite."""
    return line({"embeddings": [float32_list(finite_vector(one)) for one in embedded]})


def rerank_line(scores: Sequence[float], top_n: int | None) -> bytes:
    """The answer of /rerank: the `top_n` best documents, or all; the best first, and of equal ones the earlier. Raises
    `RunnerError` if a score is not finite."""
    if not np.isfinite(scores).all():
        raise RunnerError("a score is not finite")
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_n]
    return line({"results": [{"index": index, "relevance_score": float32(scores[index])} for index in best]})


def adapters_line(adapters: Sequence[AdapterInfo]) -> bytes:
    """The answer of GET /adapters."""
    return go_line({"adapters": [_adapter(info) for info in adapters]})


def adapter_line(info: AdapterInfo) -> bytes:
    """The answer of POST and DELETE /adapters."""
    return go_line(_adapter(info))


def _adapter(info: AdapterInfo) -> dict[str, object]:
    file = info.path.replace("\\", "/").rpartition("/")[2]
    return {"name": whole_characters(info.name), "file": whole_characters(file), "scale": float32(info.scale)}


def tokens_line(tokens: Sequence[int]) -> bytes:
    """The answer of /tokenize."""
    return line({"tokens": long_list(tokens)})


def content_line(text: str) -> bytes:
    """The answer of /detokenize."""
    return line({"content": long_go_string(text)})


# --- The engine ------------------------------------------------------------------------------------------------------


def health_line(status: str, progress: float, failure: BaseException | None = None) -> bytes:
    """The answer of /health for an engine in `status`. `progress` of the load goes from 0 to 1; `failure` is what broke
    the engine."""
    fields: dict[str, object] = {"status": _status(status), "progress": float32(progress)}
    if failure is not None:
        reason = load_failure(failure, named=False) if isinstance(failure, LoadError) else str(failure)
        fields["error"] = whole_characters(" ".join(reason.split()) or type(failure).__name__)
    return go_line(fields)


def health_status(status: str) -> int:
    """The HTTP status of /health: 503 from an engine that takes no more requests. The original sends no other than 200,
    and its server looks only at the body; other programs look at the status."""
    return 200 if status in _STATUS else 503


def props_line(info: ModelInfo, capabilities: Capabilities, placement: Placement | None) -> bytes:
    """The answer of /props: what does not change while the engine lives. Memory in bytes."""
    fields: dict[str, object] = {
        "model": {
            "name": info.name,
            "architecture": info.architecture,
            "description": info.description,
            "parameters": info.n_params,
            "bytes": info.size,
        },
        "slots": capabilities.n_slots,
        "context_length": capabilities.n_ctx,
    }
    if placement is not None:
        fields["placement"] = {
            "layers": placement.n_layers,
            "device_layers": placement.n_device_layers,
            "devices": [
                {
                    "name": device.name,
                    "description": device.description,
                    "backend": device.backend,
                    "kind": device.kind,
                    "memory_total": device.memory_total,
                    "memory_free_before": device.memory_free,
                    "memory_used": _used(placement, device.number),
                }
                for device in placement.devices
            ],
            "host": {"memory_used": _used(placement, None)},
        }
    return line(fields)


def _used(placement: Placement, device: int | None) -> dict[str, int]:
    use = placement.used(device)
    return {"model": use.model, "context": use.context, "compute": use.compute}


def statistics_line(statistics: EngineStatistics) -> bytes:
    """The answer of /statistics: how full the engine is, and counters that only rise while it lives."""
    scheduler = statistics.scheduler
    fields = {
        "status": _status(statistics.status),
        "slots": statistics.slots,
        "running": scheduler.n_running,
        "waiting": scheduler.n_waiting,
        "paused": scheduler.n_paused,
        "preempted": scheduler.n_preempted,
        "cached_tokens": scheduler.n_cached_tokens,
        "generations": statistics.generations,
        "batches": scheduler.n_batches,
        "aborted": scheduler.n_aborted,
        "prompt_rows": scheduler.n_prompt_rows,
        "sampled": scheduler.n_sampled,
        "images_encoded": statistics.images_encoded,
        "images_found": statistics.images_found,
        "image_bytes": statistics.image_bytes,
    }
    return line(fields)


_STATUS = {"loading": "loading model", "ready": "ok"}


def _status(status: str) -> str:
    return _STATUS.get(status, "server error")
