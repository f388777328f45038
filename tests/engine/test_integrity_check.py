"""With TRIO_RUNNER_CHECK=1 the decode loop checks the scheduler's state after every step."""

from __future__ import annotations

import pytest
import trio

from tests.engine.toys import Toy
from trio_runner.core.scheduler import Scheduler
from trio_runner.errors import EngineBroken
from trio_runner.testing import toy_text


@pytest.mark.parametrize("value", [None, "0", "1"])
async def test_the_check_is_made_only_if_it_is_asked_for(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    n_checks = 0

    def check(scheduler: Scheduler) -> None:
        nonlocal n_checks
        n_checks += 1

    monkeypatch.setattr(Scheduler, "check_integrity", check)
    if value is None:
        monkeypatch.delenv("TRIO_RUNNER_CHECK", raising=False)
    else:
        monkeypatch.setenv("TRIO_RUNNER_CHECK", value)
    async with toy.engine() as engine:
        assert await engine.generate("hello", max_tokens=8).collect() == toy_text("hello", 8)
    assert (n_checks > 0) == (value == "1")


async def test_a_state_that_contradicts_itself_ends_the_engine(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(scheduler: Scheduler) -> None:
        raise AssertionError("slot 0 is busy, but no running sequence holds it")

    monkeypatch.setattr(Scheduler, "check_integrity", fail)
    monkeypatch.setenv("TRIO_RUNNER_CHECK", "1")

    async def ask() -> None:
        async with toy.engine() as engine:
            await engine.generate("hello", max_tokens=8).start()
            await trio.sleep_forever()

    with pytest.raises(EngineBroken) as caught:
        await ask()
    assert isinstance(caught.value.__cause__, AssertionError)
