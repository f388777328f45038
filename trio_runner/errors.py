"""All errors that trio-runner raises on purpose.

    RunnerError
    |- RequestError         the caller's fault; `param` names the field
    |  |- InvalidRequest
    |  |- PromptTooLong     (n_prompt, n_ctx)
    |  |- InvalidGrammar
    |  |- InvalidImage
    |  |- UnknownAdapter    (name)
    |  |- UnknownModel      (name)
    |  '- Unsupported       (feature)
    |- EngineBusy           the queue is full; `retry_after` seconds
    |  '- EngineLoading     the model is still loading
    |- EngineClosed         we shut the engine down
    |- EngineBroken         the decode thread died; `__cause__` says why
    |- ReaderStalled        the events of a generation were left unread for too long
    |- DecodeFailed         (message) a batch with the rows of one request failed
    |- LoadError            a model, adapter or projector file; `path` names it
    '- NativeError          (function, code, message) the shim failed; only llama/ raises it

As in trio, Closed is what we did and Broken is what happened to us. Messages are for people: everything that a program
needs is an attribute. `status` is the HTTP status that fits; only server/problems.py reads it.
"""

from __future__ import annotations

from typing import ClassVar


class RunnerError(Exception):
    """The root of the tree above."""

    status: ClassVar[int] = 500


class RequestError(RunnerError):
    """The request cannot be served as it is. To send it again unchanged is pointless."""

    status = 400

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError):
    """A field is missing, has the wrong type, or is outside its range."""


class PromptTooLong(RequestError):
    """The prompt has `n_prompt` tokens where at most `n_ctx` fit."""

    def __init__(self, n_prompt: int, n_ctx: int, *, param: str = "prompt") -> None:
        super().__init__(f"{param} has {n_prompt} tokens, but at most {n_ctx} fit", param=param)
        self.n_prompt = n_prompt
        self.n_ctx = n_ctx


class InvalidGrammar(RequestError):
    """The grammar or the JSON schema does not parse, can produce nothing, or would cost too much."""

    def __init__(self, message: str, *, param: str = "grammar") -> None:
        super().__init__(message, param=param)


class InvalidImage(RequestError):
    """The image cannot be decoded or is outside the limits."""


class UnknownAdapter(RequestError):
    """No adapter has this `name`, or it was unloaded."""

    status = 404

    def __init__(self, name: str, *, param: str = "adapters") -> None:
        super().__init__(f"{param}: there is no adapter {name!r}", param=param)
        self.name = name


class UnknownModel(RequestError):
    """The server has no model with this `name`. `known` are the names that it has."""

    status = 404

    def __init__(self, name: str, *, known: tuple[str, ...], param: str = "model") -> None:
        shown = name if len(name) <= 100 else f"{name[:100]}..."
        super().__init__(f"{param}: there is no {shown!r} here, only {', '.join(map(repr, known))}", param=param)
        self.name = name
        self.known = known


class Unsupported(RequestError):
    """The loaded model cannot do `feature`."""

    status = 422

    def __init__(self, feature: str, message: str | None = None, *, param: str | None = None) -> None:
        super().__init__(message or f"this model does not support {feature}", param=param)
        self.feature = feature


class EngineBusy(RunnerError):
    """The queue is full. Try again in `retry_after` seconds."""

    status = 503

    def __init__(self, message: str = "the queue is full", *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineLoading(EngineBusy):
    """The model is still loading. It will probably take `retry_after` more seconds."""

    def __init__(self, message: str = "the model is still loading", *, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)


class EngineClosed(RunnerError):
    """The engine was shut down before or during the request."""

    status = 503


class EngineBroken(RunnerError):
    """The decode thread died, or the model was never loaded. `__cause__` is the failure."""

    status = 503


class ReaderStalled(RunnerError):
    """The events of a generation were left unread for longer than the engine's stall deadline."""

    status = 500


class DecodeFailed(RunnerError):
    """The model could not decode the rows of this request. `message` is what the context said.

    The request was alone in a batch that failed, so that no other request is to blame. The others go on.
    """

    def __init__(self, message: str) -> None:
        super().__init__(f"decode failed: {message}")
        self.message = message


class LoadError(RunnerError):
    """A file could not be loaded. `path` names it, and the message says what is wrong with it."""

    status = 503

    def __init__(self, message: str, *, path: str | None = None) -> None:
        super().__init__(message if path is None else f"{path}: {message}")
        self.path = path
        self.reason = message


class NativeError(RunnerError):
    """`function` of the shim failed with `code`, or without one if it is 0. `message` is what llama.cpp or the shim
    said."""

    def __init__(self, function: str, code: int, message: str) -> None:
        super().__init__(f"{function} failed{f' with {code}' if code else ''}: {message}")
        self.function = function
        self.code = code
        self.message = message
