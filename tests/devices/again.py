"""The tests of the CPU once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, cast

import pytest


def again(test: Callable[..., Any], names: str = "", values: Sequence[object] = ()) -> Callable[..., Any]:
    """`test` with other parameters than it has where it is from."""
    function = cast(FunctionType, test)
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__annotations__, copy.__doc__ = function.__annotations__, function.__doc__
    return pytest.mark.parametrize(names, values)(copy) if names else copy
