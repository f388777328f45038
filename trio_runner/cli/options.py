"""Options of the commands, made from the tables of parameters in config.py, sampling.py and request.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import click

from trio_runner.cli.fetch import fetch_model
from trio_runner.config import EngineConfig, ModelConfig
from trio_runner.models import DEFAULT_MODEL
from trio_runner.parameters import Kind, Option, Parameter, parameters_of

P = ParamSpec("P")
R = TypeVar("R")

# ---- one option from one entry ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Given:
    """A value that the user gave."""

    text: str
    """What the user wrote."""
    value: Any


_METAVARS: Final[Mapping[Kind, str]] = {"integer": "INTEGER", "number": "FLOAT"}


class TableOption:
    """The option of a command for a parameter of a table. `default` is what the help says."""

    def __init__(self, name: str, parameter: Parameter, option: Option, default: str) -> None:
        self.name = name
        self.parameter = parameter
        self.is_repeated = option.repeated
        self._option = option
        self._default = default
        flags = option.flags or (f"--{parameter.name.replace('_', '-')}",)
        self._on_flags = [*flags]
        self._off_flag = f"--no-{flags[0].removeprefix('--')}"

    def decorate(self, function: Callable[P, R]) -> Callable[P, R]:
        """`function`, a command, with this option."""
        parameter, option = self.parameter, self._option
        help = option.doc or parameter.doc
        if parameter.kind == "boolean" and parameter.default:
            flags = f"{self._on_flags[0]}/{self._off_flag}"
            help += f"  [default: {self._on_flags[0].removeprefix('--')}]"
            return click.option(flags, self.name, default=True, help=help)(function)
        if parameter.kind == "boolean":
            return click.option(*self._on_flags, self.name, is_flag=True, help=help)(function)
        if self._default and not option.repeated:
            help += f"  [default: {self._default}]"
        unit = option.unit or parameter.unit
        choices = f"[{'|'.join(parameter.choices)}]" if parameter.choices else ""
        metavar = option.metavar or unit.upper() or choices or _METAVARS.get(parameter.kind, "TEXT")
        return click.option(
            *self._on_flags, self.name, type=self._read, metavar=metavar, multiple=option.repeated, help=help
        )(function)

    def _read(self, text: str) -> Given:
        """The value of the parameter. Raises `click.BadParameter`."""
        try:
            return Given(text, self._value(text))
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    def _value(self, text: str) -> Any:
        """The value of the parameter. Raises ValueError, whose message is for the user."""
        parameter, option = self.parameter, self._option
        if option.parse is not None:
            return option.parse(text)
        # The range is checked in the units of the command line, because the message is about what the user wrote.
        low, high, unit = parameter.low / option.scale, parameter.high / option.scale, option.unit or parameter.unit
        shown = dataclasses.replace(parameter, name="it", low=low, high=high, unit=unit)
        value: Any = text
        if parameter.kind in ("integer", "number"):
            try:
                value = int(text) if parameter.kind == "integer" else float(text)
            except ValueError:
                raise ValueError(
                    f"{text!r} is not {'an integer' if parameter.kind == 'integer' else 'a number'}"
                ) from None
        if (complaint := shown.complaint(value)) is not None:
            raise ValueError(complaint)
        return value if option.scale == 1 else value * option.scale

    def chosen(self, value: Any) -> tuple[Any, list[str]]:
        """(value of the parameter, arguments that say the same) from what click passes to the command. There are no
        arguments if the user gave nothing."""
        if isinstance(value, bool):
            return value, [] if value == self.parameter.default else [self._on_flags[0] if value else self._off_flag]
        given: Sequence[Given] = () if value is None else value if isinstance(value, tuple) else (value,)
        values = tuple(one.value for one in given)
        return values if self.is_repeated else next(iter(values), None), [
            f"{self._on_flags[0]}={one.text}" for one in given
        ]


# ---- all options of a table ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the user chose of a table."""

    values: dict[str, Any]
    """By the name of the parameter."""
    arguments: list[str]
    """The same as arguments of a command line."""


class TableOptions:
    """The options of a command for the parameters of `table`: for all of them, or those with `names`.

    `defaults` has the values that this command uses where the user gives none, and that differ from the table's.
    """

    def __init__(
        self, table: type[Any], *names: str, command: str = "", defaults: Mapping[str, Any] | None = None
    ) -> None:
        self._defaults = dict(defaults or {})
        self._options = [
            self._option(parameter, option, index)
            for name, parameter in parameters_of(table).items()
            if not names or name in names
            for index, option in enumerate(parameter.options)
            if not option.commands or command in option.commands
        ]

    def _option(self, parameter: Parameter, option: Option, index: int) -> TableOption:
        name = parameter.name if index == 0 else f"{parameter.name}_{index + 1}"
        default = str(self._defaults.get(parameter.name, parameter.default_words))
        return TableOption(name, parameter, option, default)

    def decorate(self, function: Callable[P, R]) -> Callable[P, R]:
        """`function`, a command, with these options."""
        for option in reversed(self._options):  # the help lists them in the opposite order
            function = option.decorate(function)
        return function

    def take(self, kwargs: dict[str, Any]) -> Chosen:
        """What the user chose, and `defaults`. Removes it from the keyword arguments of the command."""
        values, arguments = dict(self._defaults), []
        for option in self._options:
            value, words = option.chosen(kwargs.pop(option.name))
            arguments += words
            if words:
                name = option.parameter.name
                values[name] = (*values.get(name, ()), *value) if option.is_repeated else value
        return Chosen(values, arguments)


def table_options(
    table: type[Any], *names: str
) -> Callable[[Callable[Concatenate[dict[str, Any], P], R]], Callable[P, R]]:
    """Give a command the options of `table`, or those with `names`. Its first argument is what the user chose, by the
    name of the parameter."""
    options = TableOptions(table, *names)

    def decorate(function: Callable[Concatenate[dict[str, Any], P], R]) -> Callable[P, R]:
        @wraps(function)
        def command(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(options.take(kwargs).values, *args, **kwargs)

        return options.decorate(command)

    return decorate


# ---- the options of every command with a model -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """The model that the user chose, and its options and those of the engine."""

    model: str
    """A path, or the name of a model to fetch."""
    offline: bool
    verbose: int
    """How many times -v was given."""
    of_model: Chosen
    of_engine: Chosen

    @property
    def slots(self) -> int | None:
        """What the user chose; None leaves the choice to the command."""
        slots: int | None = self.of_engine.values.get("slots")
        return slots

    def configs(self) -> tuple[ModelConfig, EngineConfig]:
        """Both configurations. Fetches the model if it is not on this machine.

        Raises `click.UsageError` for a value outside its range, and `LoadError` if there is no such model.
        """
        try:
            engine = EngineConfig(**self.of_engine.values)
            model = ModelConfig(path=self.model, **self.of_model.values)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        path = fetch_model(self.model, offline=self.offline)
        return dataclasses.replace(model, path=str(path)), engine

    def serve_arguments(self) -> list[str]:
        """Arguments of `serve` for the same engine, with the model as a path. Raises what `configs` raises."""
        model, _ = self.configs()
        return [f"--model={model.path}", *self.of_model.arguments, *self.of_engine.arguments]


def engine_options(
    **defaults: Any,
) -> Callable[[Callable[Concatenate[EngineChoice, P], R]], Callable[P, R]]:
    """Give a command the options of the model and the engine. Its first argument is what the user chose.

    `defaults` are fields of `EngineConfig` that this command sets to something else than the table does.
    """

    def decorate(function: Callable[Concatenate[EngineChoice, P], R]) -> Callable[P, R]:
        of_model = TableOptions(ModelConfig, command=function.__name__)
        of_engine = TableOptions(EngineConfig, command=function.__name__, defaults=defaults)

        @wraps(function)
        def command(*args: P.args, **kwargs: P.kwargs) -> R:
            model, offline, verbose = (kwargs.pop(name) for name in ("model", "offline", "verbose"))
            options = EngineChoice(
                model=str(model),
                offline=bool(offline),
                verbose=int(str(verbose)),
                of_model=of_model.take(kwargs),
                of_engine=of_engine.take(kwargs),
            )
            return function(options, *args, **kwargs)

        name = DEFAULT_MODEL.name
        decorated: Callable[P, R] = click.option("--verbose", "-v", count=True, help="Log more. -vv logs everything.")(
            command
        )
        decorated = of_model.decorate(of_engine.decorate(decorated))
        decorated = click.option("--offline", is_flag=True, help="Never fetch anything.")(decorated)
        return click.option("--model", "-m", default=name, show_default=True, help="Model to load.")(decorated)

    return decorate
