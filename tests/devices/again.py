"""Runs tests of other directories again, on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, cast

import pytest


def again(test: Callable[..., Any], names: str = "", values: Sequence[object] = ()) -> Callable[..., Any]:
    """A copy of `test` with other parameters: `names` and `values` as pytest's parametrize takes them."""
    function = cast(FunctionType, test)
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__annotations__, copy.__doc__ = function.__annotations__, function.__doc__
    return pytest.mark.parametrize(names, values)(copy) if names else copy
