"""Exit codes of what a command runs."""

from __future__ import annotations

import pytest

from trio_runner.cli.running import ListenError, run_to_exit_code
from trio_runner.errors import EngineBroken, LoadError, RunnerError


def broken() -> EngineBroken:
    error = EngineBroken("the decode thread died")
    error.__cause__ = RuntimeError("twice\nover")
    return error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (LoadError("no model", path="x"), 1, "error: x: no model"),
        (BaseExceptionGroup("", [ExceptionGroup("", [LoadError("no\nmodel")])]), 1, "error: no model"),
        (broken(), 1, "error: the decode thread died: twice over"),
        (ExceptionGroup("", [broken(), LoadError("no model")]), 1, "error: no model"),
        (ListenError("cannot listen"), 1, "error: cannot listen"),
        (RunnerError(), 1, "error: RunnerError"),
        (BrokenPipeError(), 141, ""),
        (BaseExceptionGroup("", [KeyboardInterrupt()]), 130, ""),
    ],
)
def test_expected_failures_are_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fail() -> None:
        raise error

    assert run_to_exit_code(fail) == code
    assert capsys.readouterr().err == (f"{line}\n" if line else "")


def test_unexpected_failures_are_not_hidden() -> None:
    async def fail() -> None:
        raise ExceptionGroup("", [LoadError("no model"), ZeroDivisionError()])

    with pytest.raises(ExceptionGroup) as caught:
        run_to_exit_code(fail)
    assert caught.group_contains(ZeroDivisionError)
