"""Preparing a request: which thread does which part of it.

the prompt is taken apart     a helper thread    only if it has images or is a conversation
images become pixels          the image thread   one after the other
pixels become rows            the projector      see image_store.py
everything is tokenised, and  a helper thread
the sampler is compiled
"""

from __future__ import annotations

from functools import partial

import trio

from trio_runner.core.ports import EncodedImage, Model
from trio_runner.engine.helper_threads import HelperThreads, kind_for
from trio_runner.engine.mailbox import Submit
from trio_runner.engine.prompt_parts import NamedImage, has_parts, parts_of
from trio_runner.engine.requests import AnyRequest, n_characters
from trio_runner.engine.sequences import prepare_sequence
from trio_runner.engine.state import EngineState
from trio_runner.errors import EngineClosed
from trio_runner.images import load_pixels
from trio_runner.request import GenerateRequest
from trio_runner.sampling import SamplingParams

MAX_PICTURES = 8
"""Images that are decoded, or wait as pixels for the projector, at the same time. Each takes up to 50 MB."""
LONG_DRY = 640_000
"""Pairs of a DRY breaker and a token of the vocabulary that take 0.3 seconds or more to compare. With 16 breakers and
49,152 tokens, a little more, it was 0.4 seconds. The four default breakers are below it up to 160,000 tokens, so that a
common request does not wait for another of its kind."""


class Preparation:
    """Turns requests into mail for the decode thread. All on one trio thread; the work is done by others."""

    def __init__(self, state: EngineState, helpers: HelperThreads) -> None:
        self._state = state
        self._helpers = helpers
        self._pictures = trio.CapacityLimiter(MAX_PICTURES)
        self._image_thread = trio.CapacityLimiter(1)

    async def prepare(self, request: AnyRequest, uid: int) -> Submit:
        """The mail that submits the sequence of a request. Only its adapters are missing.

        Raises a `RequestError` for whatever is wrong with the request, `NativeError` or `RunnerError` for an image that
        the projector fails on, and the errors of `EngineState.live_runtime`.
        """
        runtime = self._state.ready_runtime()
        n_text = n_characters(request)
        parts: list[str | EncodedImage] | None = None
        images: dict[str, EncodedImage] = {}
        if isinstance(request, GenerateRequest) and has_parts(request, runtime):
            named = await self._helpers.run(partial(parts_of, request, runtime), kind_for(n_text))
            n_text = sum(len(part) for part in named if isinstance(part, str))
            parts = []
            for part in named:
                if isinstance(part, NamedImage):
                    images[part.param] = await self._encode(part)
                    parts.append(images[part.param])
                else:
                    parts.append(part)
            self._state.live_runtime()  # that took a while, and the model may be about to be freed
        kind = kind_for(n_text)
        if kind == "short" and _makes_slow_sampler(request, runtime.model):
            kind = "sampler"
        call = partial(prepare_sequence, request, runtime, uid, parts, images)
        return await self._helpers.run(call, kind, discard=close_sampler)

    async def _encode(self, image: NamedImage) -> EncodedImage:
        async with self._pictures:
            decode = partial(load_pixels, image.source, param=image.param)
            pixels = await trio.to_thread.run_sync(decode, limiter=self._image_thread, abandon_on_cancel=True)
            self._state.live_runtime()
            images = self._state.images
            assert images is not None, "an image without a projector"
            try:
                return await images.encode(pixels, param=image.param)
            except EngineClosed:
                self._state.live_runtime()  # raises `EngineBroken` if that is why the images were closed
                raise


def _makes_slow_sampler(request: AnyRequest, model: Model) -> bool:
    """Whether the sampler takes long to make. A schema must be compiled. For every DRY breaker, llama.cpp looks at
    every token of the vocabulary: with 16 breakers, a vocabulary of 250,000 tokens takes seconds."""
    if not isinstance(request, GenerateRequest):
        return False
    sampling: SamplingParams = request.sampling
    if sampling.json_schema and not model.has_schema(sampling.json_schema):
        return True
    if not sampling.dry_multiplier or not sampling.dry_penalty_last_n:
        return False
    return len(sampling.dry_sequence_breakers) * model.info.n_vocab >= LONG_DRY


def close_sampler(mail: Submit | None) -> None:
    """Close the sampler of mail that was never sent."""
    if mail is not None and mail.sampler is not None:
        mail.sampler.close()
