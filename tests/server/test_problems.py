"""What each error is to a client."""

from __future__ import annotations

import pytest

from trio_runner import errors
from trio_runner.server.dialects.runner.responses import health_line
from trio_runner.server.problems import plain_text, problem

EXPECTED = {
    errors.RunnerError("x"): 500,
    errors.RequestError("x"): 400,
    errors.InvalidRequest("x", param="top_k"): 400,
    errors.PromptTooLong(10, 5): 400,
    errors.InvalidGrammar("x"): 400,
    errors.InvalidImage("x", param="image_data"): 400,
    errors.UnknownAdapter("x"): 404,
    errors.UnknownModel("x", known=("y",)): 404,
    errors.Unsupported("images"): 422,
    errors.Unsupported("infill", param="suffix"): 400,
    errors.EngineBusy(): 503,
    errors.EngineLoading(): 503,
    errors.EngineClosed("x"): 503,
    errors.EngineBroken("x"): 503,
    errors.ReaderStalled("x"): 500,
    errors.DecodeFailed("x"): 500,
    errors.LoadError("x", path="model.gguf"): 503,
    errors.NativeError("decode", -3, "x"): 500,
}


def tree(root: type[errors.RunnerError]) -> set[type[errors.RunnerError]]:
    mine = {child for child in root.__subclasses__() if child.__module__ == errors.__name__}
    return {root}.union(*map(tree, mine))


def test_every_error_has_a_status() -> None:
    assert {type(error) for error in EXPECTED} == tree(errors.RunnerError)


@pytest.mark.parametrize(("error", "status"), EXPECTED.items(), ids=lambda value: type(value).__name__)
def test_status_text_and_headers(error: errors.RunnerError, status: int) -> None:
    answer = problem(error)
    assert answer.status == status
    assert answer.text
    assert "\n" not in answer.text
    assert ("Retry-After" in answer.headers) == isinstance(error, errors.EngineBusy)
    # What is broken stays broken, so OpenAI's clients need not try again.
    assert ("X-Should-Retry" in answer.headers) == isinstance(error, (errors.EngineBroken, errors.LoadError))
    if isinstance(error, errors.RequestError) and error.param is not None:
        assert error.param in answer.text


def test_the_text_of_an_unexpected_error_is_not_sent() -> None:
    assert (problem(KeyError("secret")).status, problem(KeyError("secret")).text) == (500, "internal error")


def test_no_client_is_told_where_the_files_are() -> None:
    path = "/srv/secret/model.gguf"
    error = errors.LoadError(f"cannot be read: [Errno 13] Permission denied: '{path}'", path=path)
    assert problem(error).text == "model.gguf: cannot be read: [Errno 13] Permission denied: 'model.gguf'"
    assert problem(errors.LoadError("no GGUF", path="C:\\secret\\model.gguf")).text == "model.gguf: no GGUF"
    assert b"secret" not in health_line("broken", 0.5, error)


def test_the_body_is_one_line() -> None:
    answer = plain_text(problem(errors.InvalidRequest("a\r\nb", param="c")))
    assert (answer.status, answer.body) == (400, b"c: a b\n")
    assert answer.headers == {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"}
    busy = plain_text(problem(errors.EngineBusy(retry_after=1.5)))
    assert busy.headers["Retry-After"] == "2"
