"""Options of the commands, made from the tables of parameters in config.py, sampling.py and request.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import click

from trio_runner.cli.fetch import fetch_model
from trio_runner.config import EngineConfig, ModelConfig
from trio_runner.models import DEFAULT_MODEL
from trio_runner.parameters import Option, Parameter, parameters_of

P = ParamSpec("P")
R = TypeVar("R")

# ---- one option from one entry ---------------------------------------------------------------------------------------


def _type_of(parameter: Parameter) -> tuple[click.ParamType[Any], str]:
    """(what reads a value of its kind, what stands for the value in `--help`)."""
    match parameter.kind:
        case "integer":
            return click.INT, "INTEGER"
        case "number":
            return click.FLOAT, "FLOAT"
        case "choice":
            return click.Choice(parameter.choices), f"[{'|'.join(parameter.choices)}]"
    return click.STRING, "TEXT"


@dataclass(frozen=True, slots=True)
class Given:
    """A value that the user gave."""

    text: str
    """What the user wrote."""
    value: Any


class _ValueType(click.ParamType[Given]):
    """Reads and checks a value of a parameter."""

    name = "value"

    def __init__(self, parameter: Parameter, option: Option) -> None:
        self._parse = option.parse
        self._scale = option.scale
        self._type, metavar = _type_of(parameter)
        unit = option.unit or parameter.unit
        self.metavar = option.metavar or unit.upper() or metavar
        # The range is checked in the unit of the command line, because that is what the user reads in the message.
        low, high = parameter.low / option.scale, parameter.high / option.scale
        self._shown = dataclasses.replace(parameter, name="it", low=low, high=high, unit=unit)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Given:
        if isinstance(value, Given):
            return value
        if self._parse is not None:
            try:
                return Given(value, self._parse(value))
            except ValueError as error:
                self.fail(str(error), param, ctx)
        read: Any = self._type.convert(value, param, ctx)
        if (complaint := self._shown.complaint(read)) is not None:
            self.fail(complaint, param, ctx)
        return Given(str(value), read if self._scale == 1 else read * self._scale)


class TableOption(click.Option):
    """The option of a command for a parameter of a table."""

    def __init__(self, name: str, parameter: Parameter, option: Option, default: str) -> None:
        self.parameter = parameter
        plain = f"--{parameter.name.replace('_', '-')}"
        flags = list(option.flags or (plain,))
        help = option.doc or parameter.doc
        if parameter.kind == "boolean":
            if parameter.default:
                default, flags = flags[0].removeprefix("--"), [f"{flags[0]}/--no-{flags[0].removeprefix('--')}"]
            note = f"  [default: {default}]" if parameter.default else ""
            super().__init__([*flags, name], is_flag=True, default=parameter.default, help=help + note)
        else:
            note = "" if option.repeated else f"  [default: {default}]"
            kind = _ValueType(parameter, option)
            super().__init__(
                [*flags, name], type=kind, metavar=kind.metavar, multiple=option.repeated, help=help + note
            )

    def chosen(self, value: Any) -> tuple[Any, list[str]]:
        """(what the user gave, the same as arguments) from what click parsed; the arguments are empty if it is the
        default."""
        if isinstance(value, bool):
            flags = self.opts if value else self.secondary_opts
            return value, flags[:1] if value != self.parameter.default else []
        given = () if value is None else value if isinstance(value, tuple) else (value,)
        arguments = [f"{self.opts[0]}={one.text}" for one in given]
        values = tuple(one.value for one in given)
        return values if self.multiple else next(iter(values), None), arguments


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

    def __iter__(self) -> Iterator[TableOption]:
        return iter(self._options)

    def take(self, kwargs: dict[str, Any]) -> Chosen:
        """What the user chose, and `defaults`. Removes it from the keyword arguments of the command."""
        values, arguments = dict(self._defaults), []
        for option in self._options:
            assert option.name is not None
            value, words = option.chosen(kwargs.pop(option.name))
            arguments += words
            if words:
                name = option.parameter.name
                values[name] = (*values.get(name, ()), *value) if option.multiple else value
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

        return _with(command, options)

    return decorate


def _with(command: Callable[P, R], options: Sequence[click.Option] | TableOptions) -> Callable[P, R]:
    # This is where click's own decorators keep the options of a function, the last one first.
    kept = command.__dict__.setdefault("__click_params__", [])
    kept.extend(reversed(list(options)))
    return command


# ---- the options of every command with a model -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What the user chose of the model and its engine."""

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
) -> Callable[[Callable[Concatenate[EngineOptions, P], R]], Callable[P, R]]:
    """Give a command the options of the model and the engine. Its first argument is what the user chose.

    `defaults` are fields of `EngineConfig` that this command sets to something else than the table does.
    """

    def decorate(function: Callable[Concatenate[EngineOptions, P], R]) -> Callable[P, R]:
        of_model = TableOptions(ModelConfig, command=function.__name__)
        of_engine = TableOptions(EngineConfig, command=function.__name__, defaults=defaults)

        @wraps(function)
        def command(*args: P.args, **kwargs: P.kwargs) -> R:
            model, offline, verbose = (kwargs.pop(name) for name in ("model", "offline", "verbose"))
            options = EngineOptions(
                model=str(model),
                offline=bool(offline),
                verbose=int(str(verbose)),
                of_model=of_model.take(kwargs),
                of_engine=of_engine.take(kwargs),
            )
            return function(options, *args, **kwargs)

        default = DEFAULT_MODEL.name
        first = [
            click.Option(["--model", "-m"], default=default, show_default=True, help="Model to load."),
            click.Option(["--offline"], is_flag=True, help="Never fetch anything."),
        ]
        last = [click.Option(["--verbose", "-v"], count=True, help="Log more. -vv logs everything.")]
        return _with(command, [*first, *of_model, *of_engine, *last])

    return decorate
