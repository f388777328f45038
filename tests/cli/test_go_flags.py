"""Command lines are parsed as Go's flag package parses them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.cli.go_flags import Flag, FlagError, FlagSet, HelpRequested, Value, parse_int, quote

FLAGS = FlagSet((Flag("model", "", "a path"), Flag("port", 8080, "a port"), Flag("verbose", False, "log more")))

COMMAND_LINES: list[tuple[list[str], dict[str, Value], list[str]]] = [
    ([], {}, []),
    (["-port", "1"], {"port": 1}, []),
    (["--port", "1"], {"port": 1}, []),
    (["-port=1"], {"port": 1}, []),
    (["--port=1"], {"port": 1}, []),
    (["-port", "-1"], {"port": -1}, []),
    (["-port=1", "-port=2"], {"port": 2}, []),
    (["-verbose"], {"verbose": True}, []),
    (["-verbose=true"], {"verbose": True}, []),
    (["--verbose=F"], {"verbose": False}, []),
    (["-verbose", "false"], {"verbose": True}, ["false"]),
    (["-verbose", "false", "-port", "1"], {"verbose": True}, ["false", "-port", "1"]),
    (["-model", "--port"], {"model": "--port"}, []),
    (["-model", "--"], {"model": "--"}, []),
    (["-model="], {"model": ""}, []),
    (["-model=a=b"], {"model": "a=b"}, []),
    (["-model", ""], {"model": ""}, []),
    (["--", "-port", "1"], {}, ["-port", "1"]),
    (["-port", "1", "--", "x"], {"port": 1}, ["x"]),
    (["-"], {}, ["-"]),
    (["", "-port", "1"], {}, ["", "-port", "1"]),
    (["x", "-port", "1"], {}, ["x", "-port", "1"]),
]


@pytest.mark.parametrize(("arguments", "given_values", "rest"), COMMAND_LINES, ids=str)
def test_command_lines_are_parsed(arguments: list[str], given_values: dict[str, Value], rest: list[str]) -> None:
    assert FLAGS.parse(arguments) == ({"model": "", "port": 8080, "verbose": False} | given_values, rest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-foo"], "flag provided but not defined: -foo"),
        (["--foo=1"], "flag provided but not defined: -foo"),
        (["-Port", "1"], "flag provided but not defined: -Port"),
        (["-vport"], "flag provided but not defined: -vport"),
        (["---port"], "bad flag syntax: ---port"),
        (["-=1"], "bad flag syntax: -=1"),
        (["--=1"], "bad flag syntax: --=1"),
        (["-port"], "flag needs an argument: -port"),
        (["-port", "x"], 'invalid value "x" for flag -port: parse error'),
        (["-port="], 'invalid value "" for flag -port: parse error'),
        (["-port", "1.0"], 'invalid value "1.0" for flag -port: parse error'),
        (["-port", "9223372036854775808"], 'invalid value "9223372036854775808" for flag -port: value out of range'),
        (["-port", 'a"b\n'], r'invalid value "a\"b\n" for flag -port: parse error'),
        (["-verbose=yes"], 'invalid boolean value "yes" for -verbose: parse error'),
        (["-verbose="], 'invalid boolean value "" for -verbose: parse error'),
    ],
)
def test_wrong_command_lines_get_gos_messages(arguments: list[str], message: str) -> None:
    with pytest.raises(FlagError) as caught:
        FLAGS.parse(arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("argument", ["-h", "--h", "-help", "--help", "-help=1"])
def test_help_is_requested_unless_it_is_a_flag(argument: str) -> None:
    with pytest.raises(HelpRequested):
        FLAGS.parse(["-verbose", argument])
    values, _ = FlagSet((Flag("h", False, ""), Flag("help", False, ""))).parse(["-h", "-help"])
    assert values == {"h": True, "help": True}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-0", 0),
        ("+7", 7),
        ("10", 10),
        ("010", 8),
        ("0_10", 8),
        ("00", 0),
        ("0o17", 15),
        ("0O17", 15),
        ("0x1F", 31),
        ("0X_1f", 31),
        ("-0x10", -16),
        ("0b101", 5),
        ("1_000_000", 1_000_000),
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775808", -(2**63)),
        ("0x" + "0" * 100 + "1", 1),
    ],
)
def test_integers_are_parsed(text: str, value: int) -> None:
    assert parse_int(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+",
        "-",
        "--1",
        "1_",
        "_1",
        "1__0",
        "0_",
        "08",
        "0x",
        "0b2",
        "0o8",
        "0b",
        "1e3",
        "1.0",
        " 1",
        "1 ",
        "1\n",
        "١",
    ],
)
def test_malformed_integers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^parse error$"):
        parse_int(text)


@pytest.mark.parametrize("text", ["9223372036854775808", "-9223372036854775809", "0x" + "f" * 17, "1" * 10_000])
def test_integers_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^value out of range$"):
        parse_int(text)


@given(st.integers(-(2**63), 2**63 - 1), st.sampled_from(["d", "#x", "#X", "#o", "#b", "_d", "#_x", "#_b"]))
def test_every_way_to_write_a_number_is_parsed(value: int, style: str) -> None:
    assert parse_int(format(value, style)) == value


@given(st.text(max_size=12) | st.text("+-0123456789abcdefABCDEFxXoOb_", max_size=12))
def test_python_parses_the_same_numbers(text: str) -> None:
    try:
        value = parse_int(text)
    except ValueError:
        return
    digits = text.lstrip("+-")
    old_octal = len(digits) > 1 and digits[0] == "0" and digits[1] not in "xXoObB"
    assert value == (int(text, 8) if old_octal else int(text, 0))


@given(st.lists(st.text("-=xportmdelvbs01 ", max_size=8) | st.sampled_from(["-port", "-model", "--", "-verbose", "1"])))
def test_any_command_line_is_parsed_or_refused(arguments: list[str]) -> None:
    try:
        values, rest = FLAGS.parse(arguments)
    except (FlagError, HelpRequested):
        return
    assert values.keys() == {"model", "port", "verbose"}
    assert rest == arguments[len(arguments) - len(rest) :]


@given(st.text())
def test_quoted_text_is_one_line(text: str) -> None:
    assert len(quote(text).splitlines()) == 1


def test_the_usage_text_lists_flags_in_order() -> None:
    assert FLAGS.describe("runner").splitlines() == [
        "Usage of runner:",
        "  -model string",
        "    \ta path",
        "  -port int",
        "    \ta port (default 8080)",
        "  -verbose",
        "    \tlog more",
    ]
