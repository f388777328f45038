"""The life of an engine: load, run, drain, stop, free.

    open_engine
      nursery
      |- Lifecycle.live   loads the model on a thread, runs the decode loop on another, frees everything in order
      |- Deadlines.watch  once for stalled readers, and once for requests with a deadline
      '- the caller's block

Loading, the decode loop, the projector and the calls of helper threads have threads of their own. Everything else is on
the trio thread. The loading thread sets `EngineState.progress`.
"""

from __future__ import annotations

import logging
import traceback
from functools import partial

import trio

from trio_runner.config import EngineConfig
from trio_runner.core.ports import Adapter, Loader, Runtime
from trio_runner.engine.adapters import AdapterTable
from trio_runner.engine.admission import Admission
from trio_runner.engine.decode_loop import DecodeLoop
from trio_runner.engine.device_threads import DeviceHangs, DeviceThreads
from trio_runner.engine.dispatcher import Dispatcher
from trio_runner.engine.helper_threads import HelperThreads
from trio_runner.engine.image_store import ImageStore
from trio_runner.engine.mailbox import Close, Mailbox
from trio_runner.engine.prepare import Preparation
from trio_runner.engine.state import EngineState
from trio_runner.errors import EngineBroken, EngineClosed, NativeError, RunnerError
from trio_runner.info import AdapterInfo

logger = logging.getLogger("trio_runner.engine")

FREE_SECONDS = 3.0
"""Seconds a failed device may take to release its memory. A device that is gone may never do so."""
CLOSE_SECONDS = 4.0
"""Seconds that a computation or a load may take to end when the engine is closed. A batch is aborted or ends soon, and
loading stops at the next tensor; but a device that hangs does neither."""


class Lifecycle:
    """Makes the parts of an engine, and runs them from loading to freeing."""

    def __init__(self, loader: Loader, config: EngineConfig, *, cancel_when_broken: bool) -> None:
        self.state = EngineState(config)
        self.mailbox = Mailbox()
        self.helpers = HelperThreads(self.state)
        self.adapters = AdapterTable()
        self.admission = Admission(self.state)
        self.dispatcher = Dispatcher(
            self.state, self.mailbox, self.admission, self.adapters, Preparation(self.state, self.helpers)
        )
        self._loader = loader
        self._cancel_when_broken = cancel_when_broken
        self._device_threads = DeviceThreads()
        self._decode_thread_hangs = False

    async def live(self) -> None:
        """Load the model, run until cancelled, free everything.

        Returns if loading fails. If the decode thread dies, raises `EngineBroken`, which cancels the caller's block; or
        returns, if `cancel_when_broken` is false.
        """
        state = self.state
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_when_cancelled)
                runtime = await self._load()
                if runtime is not None:
                    if runtime.projector is not None:
                        max_bytes = state.config.image_cache_bytes
                        state.images = ImageStore(runtime.projector, max_bytes, nursery, self._device_threads)
                    nursery.start_soon(self.dispatcher.stall_deadlines.watch)
                    nursery.start_soon(self.dispatcher.request_deadlines.watch)
                    try:
                        await self._run(runtime)
                    finally:
                        await self._free(runtime)
                nursery.cancel_scope.cancel()
        finally:
            if state.status != "broken":
                state.status = "closed"
            state.settle()

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 - running out of time is no error
        """Take no more requests. Wait at most `timeout` seconds for those in flight or in preparation, then end the
        rest with `EngineClosed`."""
        state = self.state
        if state.status in ("loading", "ready"):
            state.status = "closing"
            state.settle()
        with trio.move_on_after(timeout):
            await self.admission.wait_until_idle()
        state.is_stopping = True
        self.dispatcher.cancel_all(lambda: EngineClosed("the engine is shutting down"))

    async def _load(self) -> Runtime | None:
        """The runtime, or None if loading failed or is not wanted any more."""
        state = self.state

        def report(progress: float) -> None:
            state.progress = progress

        load = partial(self._loader, state.config, progress=report, cancelled=state.is_load_cancelled)
        try:
            runtime = await self._device_threads.run(load)
        except EngineClosed:
            return None
        except DeviceHangs:
            logger.error("loading does not stop: a device does not answer")
            return None
        except Exception as failure:
            logger.info("loading failed: %s", failure)
            state.break_down(failure)
            _forget_variables(failure)
            return None
        state.progress = 1.0
        return runtime

    async def _run(self, runtime: Runtime) -> None:
        """Run the decode loop to its end on a thread. Raises `EngineBroken` if it dies and that is to cancel."""
        state, dispatcher = self.state, self.dispatcher
        for loaded in runtime.adapters:
            self.adapters.add(AdapterInfo(loaded.name, loaded.path, loaded.scale), loaded.adapter)
        receive = dispatcher.receiver(trio.lowlevel.current_trio_token())
        target = state.config.step_target
        loop = DecodeLoop(runtime.context, self.mailbox, receive, step_target=target, times=state.times)
        state.runtime, state.loop = runtime, loop
        if state.status == "loading":
            state.status = "ready"
        state.settle()
        try:
            await self._device_threads.run(loop.run)
        except DeviceHangs:
            self._decode_thread_hangs = True
            logger.error("the decode thread does not stop: a device does not answer")
            return
        except Exception as failure:
            # The native library has logged its own failures. Anything else is a bug, so its place is logged.
            trace = None if isinstance(failure, NativeError) else failure
            logger.error("the decode thread died: %s", " ".join(str(failure).split()), exc_info=trace)
            dispatcher.hand_over()
            state.break_down(failure)
            if self._cancel_when_broken:
                raise EngineBroken(f"the decode thread died: {failure}") from failure
            return
        dispatcher.hand_over()

    async def _free(self, runtime: Runtime) -> None:
        """End all requests, wait for the threads that use the model, and free it."""
        state = self.state
        self.dispatcher.fail_all(self._last_error)
        seconds = FREE_SECONDS if state.status == "broken" else CLOSE_SECONDS
        with trio.move_on_after(seconds, shield=True) as scope:
            await self._wait_for_users_of_the_model()
        loop, state.runtime, state.loop, state.images = state.loop, None, None, None
        if loop is not None:
            state.last_statistics = loop.statistics.at_rest()
        adapters = self.adapters.clear()
        if self._decode_thread_hangs:
            return  # should the thread ever come back, its last reference to the model frees it
        if loop is not None:
            loop.refuse_mail()  # what was submitted after the decode thread ended and before that was known
        if state.failure is not None:
            _forget_variables(state.failure)
        if not scope.cancelled_caught:
            # On a thread, because it may take a while, in which a server still answers that the engine is broken.
            free = partial(_free_in_order, runtime, adapters)
            with trio.move_on_after(seconds, shield=True) as scope:
                await trio.to_thread.run_sync(free, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True)
        if scope.cancelled_caught:
            logger.warning("the memory of the model is not free yet: a device does not answer")

    def _last_error(self) -> RunnerError:
        """What the readers of requests get when the engine ends."""
        return self.state.broken_error() if self.state.status == "broken" else EngineClosed("the engine was closed")

    async def _wait_for_users_of_the_model(self) -> None:
        await self.helpers.wait_until_idle()
        await trio.lowlevel.checkpoint()  # the tasks that asked now get what was made for them, and close it
        if self.state.images is not None:
            self.state.images.close()
            await self.state.images.closed()

    async def _stop_when_cancelled(self) -> None:
        state = self.state
        try:
            await trio.sleep_forever()
        finally:
            state.is_stopping = True
            if state.status != "broken":
                state.status = "closing"
            self._device_threads.wait_at_most(CLOSE_SECONDS)
            self.mailbox.put(Close())
            if state.loop is not None:
                state.loop.abort_running()
            if state.images is not None:
                state.images.close()


def _free_in_order(runtime: Runtime, adapters: tuple[Adapter, ...]) -> None:
    """Free a runtime, the model last."""
    runtime.context.close()
    for adapter in adapters:
        adapter.close()
    if runtime.projector is not None:
        runtime.projector.close()
    runtime.model.close()


def _forget_variables(failure: BaseException) -> None:
    """Drop the local variables of the frames in the tracebacks of a failure. The failure is kept, and its variables
    would keep alive what is to be freed."""
    error: BaseException | None = failure
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
