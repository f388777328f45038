"""Errors of the engine, with the names that their fields have in the body of a request, for every dialect. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager

from trio_runner.errors import PromptTooLong, RequestError


def renamed(error: RequestError, places: Mapping[str, str]) -> RequestError:
    """`error` as one about the field of the body that the parameter at fault was given in. `places` are these fields,
    by the names of the parameters. An error about another parameter is returned as it is."""
    param = error.param or ""
    place = places.get(param, param)
    if place == param:
        return error
    if isinstance(error, PromptTooLong):
        return PromptTooLong(error.n_prompt, error.n_ctx, param=place)
    text = str(error)
    if text.startswith(param):
        text = place + text.removeprefix(param)
    elif place not in text:
        text = f"{place}: {text}"
    other = type(error).__new__(type(error), text)  # with the attributes of its class, whatever those are
    other.__dict__.update(error.__dict__, param=place)
    return other


def places_of_variables(variables: Iterable[str], fields: Container[str]) -> dict[str, str]:
    """The places of the variables in `chat_template_kwargs`. One that is called as one of the `fields` of the body has
    none, since errors about the two look the same."""
    return {name: f"chat_template_kwargs.{name}" for name in variables if name not in fields}


@contextmanager
def naming(places: Mapping[str, str]) -> Iterator[None]:
    """Raise the errors of the block as `renamed` returns them."""
    try:
        yield
    except RequestError as error:
        raise renamed(error, places) from None
