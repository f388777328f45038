from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tests.core.chat_templates import TEMPLATES
from trio_runner.core.template import MAX_WORK, BoundedTemplate, Refusal, TemplateError, TooLong
from trio_runner.request import MAX_TEXT_BYTES

VARIABLES: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "be  kind"},
        {"role": "user", "content": "Héllo\n<there>", "name": None},
        {"role": "assistant", "content": "x</think>y</think>z", "tool_calls": [{"id": "a", "n": 1.5}]},
    ],
    "tools": [{"b": [1, True, None], "a": {"é": "&<'\""}}],
    "n": 7,
    "word": "  word\n",
}


def rendered(
    source: str, variables: dict[str, Any] = VARIABLES, max_characters: int = 1 << 20, max_work: int = MAX_WORK
) -> str:
    return compiled(source).render(variables, max_characters=max_characters, max_work=max_work)


@lru_cache(maxsize=4)
def compiled(source: str) -> BoundedTemplate:
    return BoundedTemplate(source)


def plain(source: str, variables: dict[str, Any] = VARIABLES) -> str:
    """The text that Jinja makes without our bounds."""
    return plainly_compiled(source).render(variables)


@lru_cache(maxsize=4)
def plainly_compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.LoopControlExtension]
    )
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False, **how})
    return environment.from_string(source)


EXPRESSIONS = [
    "messages[0].role ~ messages[1]['content'] ~ n ~ 1.5 ~ true",
    "'a' + 'b' * 3 + word",
    "[1, 2] + [n] * 2",
    "(n - 2) * 3 // 2 % 5 ** 2 / 4",
    "2 ** 10 + 2 ** -1 - -n",
    "'%s is %5.2f and %d%%' % ('pi', 3.14159, n)",
    "'%(a)s' % {'a': word}",
    "'{0} {x:>5} {0!r:.3}'.format(word, x=n)",
    "'{a[0]}'.format_map({'a': 'bc'})",
    "word[1:3] ~ word[::-1] ~ word[-2:] ~ messages[1:][0].role ~ (1, 2, 3)[:2] ~ messages[::-1][0].role",
    "messages | selectattr('role', 'equalto', 'user') | list | length",
    "messages | rejectattr('tool_calls', 'defined') | map(attribute='role') | join(', ')",
    "messages | map(attribute='content') | map('upper') | list | last",
    "[3, 1, 2] | sort | join",
    "[3, 1, 2] | sort(reverse=true) | first",
    "[1, 1, 2] | unique | list",
    "['a', 'b', 'A'] | groupby('upper') | list if false else 'none'",
    "messages | groupby('role') | map(attribute='grouper') | join(' ')",
    "[1, 2, 3] | sum + ([{'x': 4}] | sum(attribute='x', start=1))",
    "[1, 2, 3] | min ~ [1, 2, 3] | max",
    "[3, 4] | reverse | list ~ ('abc' | reverse)",
    "tools[0] | dictsort ~ (tools[0] | items | list)",
    "tools | tojson ~ (tools | tojson(indent=2)) ~ (tools | tojson(ensure_ascii=true, sort_keys=true))",
    "tools | tojson(separators=(',', ':')) ~ ('</script>' | tojson)",
    "word | trim ~ (word | trim('w \\n')) ~ (word | upper | lower | title | capitalize)",
    "'a-b' | replace('-', '+') ~ ('aaa' | replace('a', 'b', 2)) ~ 'aaa'.replace('a', 'b', 1)",
    "'a\\nb\\n\\nc' | indent(2) ~ ('a\\nb' | indent(width='> ', first=true)) ~ ('a\\n\\nb' | indent(1, blank=true))",
    "'one two three' | truncate(9) ~ ('one two' | truncate(4, true, '..', 0))",
    "1.25 | round(1) ~ (1.25 | round(1, 'floor')) ~ (7 | round)",
    "'12' | int + ('x' | int(3)) + ('ff' | int(base=16)) + ('1.5' | float) + (-3 | abs)",
    "[1, 'a'] | string ~ (none_at_all | default('d')) ~ ('' | default('d', true)) ~ (n | d(1))",
    "'%d,%s' | format(n, word)",
    "n | safe ~ ('x' | safe)",
    "'a,b,c'.split(',') ~ 'a b'.split() ~ 'a,b,c'.split(',', 1) ~ 'a,b,c'.rsplit(',', 1) ~ 'a\\nb'.splitlines()",
    "word.strip() ~ word.lstrip() ~ word.rstrip('\\n') ~ word.upper().lower().title() ~ 'abc'.capitalize()",
    "'abc'.find('c') ~ 'abcc'.rfind('c') ~ 'abc'.index('b') ~ 'aba'.count('a') ~ 'abc'.partition('b')",
    "'abc'.startswith('a') and 'abc'.endswith(('x', 'c')) and not 'abc'.isdigit()",
    "', '.join(['a', 'b']) ~ ''.join(messages | map(attribute='role')) ~ '-'.join('abc')",
    "'a'.ljust(3) ~ 'a'.rjust(3, '.') ~ 'a'.center(3) ~ '7'.zfill(3)",
    "'abc'.removeprefix('a').removesuffix('c') ~ 'aBc'.swapcase()",
    "messages[0].keys() | list ~ (messages[0].values() | list) ~ (messages[0].items() | list)",
    "messages[0].get('role') ~ messages[0].get('x', 'y') ~ [1, 2, 2].count(2) ~ ('a', 'b').index('b')",
    "'role' in messages[0] and 'x' not in messages[0] and 'ell' in 'Hello' and n in [7] and n not in (1, 2)",
    "n == 7 and n != 8 and n > 6 and n >= 7 and n < 8 and n <= 7 and 1 < 2 < 3 and not 1 < 3 < 2",
    "messages[0] == messages[0] and messages[0] != messages[1] and [1] < [2] and (1, 2) == (1, 2)",
    "n is odd and n is not even and 6 is divisibleby 3 and n is number and n is integer and 1.5 is float",
    "word is string and messages is sequence and messages[0] is mapping and messages is iterable",
    "x is undefined and n is defined and true is true and false is false and none is none and true is boolean",
    "n is eq 7 and n is ne 8 and n is lt 8 and n is le 7 and n is gt 6 and n is ge 7 and n is in [7] and 'a' is lower",
    "[1, 2, 3] | select('odd') | list ~ ([1, 2, 3] | reject('eq', 2) | list) ~ ([1, 2] | select('in', [2]) | list)",
    "'yes' if n > 5 else 'no'",
    "('yes' if n > 5) ~ ('no' if n < 5)",
    "range(3) | list ~ (range(1, 9, 3) | list) ~ dict(a=1) ~ {'k': n, word: 2} ~ {1: 2}[1]",
    "(x.y if x is defined else 'no') ~ (messages[0].y is defined) ~ (messages[9] is defined)",
    "(messages | first).role ~ (messages | last).role ~ messages | count",
    "None is none and True and not False",
    "('upper' is filter) ~ ('nothing' is filter) ~ ('odd' is test) ~ ('nothing' is test) ~ (n is sameas n)",
    "'12' | int(5000) ~ ('x' | int(5000)) ~ 'xx'.replace('x', 'y', 5000) ~ 'a a'.split(' ', 5000)",
    "'aba'.rfind('a', 0, 5000) ~ (0.5 in range(3)) ~ (2 in range(3))",
    "nothing | map('upper') | list ~ (none | selectattr('x', 'defined') | list) ~ (none | map('upper') | list)",
    "none | reject('odd') | list ~ (none | select('odd') | list) ~ (none | rejectattr('x') | list)",
    "messages | selectattr('role', '==', 'user') | map(attribute='content') | join",
    "10 - 3 - 1.5 + -7 // 2 - 7 / 2 - 2 ** 70 + (2 ** 70 + 1) // 3",
    "'abc' | trim(chars='c') ~ ('ab' | replace(old='a', new='c')) ~ ([1, 2] | join(d='-')) ~ ([1] | sum(start=2))",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_means_what_it_means_in_jinja(expression: str) -> None:
    for source in (
        "{{ " + expression + " }}",
        "{% set result = " + expression + " %}{{ result }}",
        "{% for _ in [1, 2] %}[{{ " + expression + " }}]{% endfor %}",
    ):
        assert rendered(source) == plain(source)


STATEMENTS = [
    "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}"
    "{{ loop.length }}{{ (loop.previtem or m).role }}{{ (loop.nextitem or m).role }}{{ loop.cycle('a', 'b') }}"
    "{% endfor %}",
    "{% for m in messages if m.role != 'user' %}{{ m.role }}{% if not loop.last %}, {% endif %}{% endfor %}",
    "{% for x in [] %}{{ x }}{% else %}nothing{% endfor %}{% for x in nothing %}{% else %}undefined{% endfor %}",
    "{% for x in [1, 2, 3, 4] %}{% if x == 2 %}{% continue %}{% endif %}{% if x == 4 %}{% break %}{% endif %}{{ x }}"
    "{% endfor %}",
    "{% for k, v in tools[0].items() %}{{ k }}={{ v }};{% endfor %}{% for k in tools[0] %}{{ k }}{% endfor %}",
    "{% for x in [[1, [2]], [3]] recursive %}{{ loop.depth }}{{ loop(x) if x is iterable else x }}{% endfor %}",
    "{% for x in [1, 1, 2] %}{{ loop.changed(x) }}{% endfor %}",
    "{% for c in 'abc' %}{{ c }}{% endfor %}{% for c in range(3) %}{{ c }}{% endfor %}",
    "{% set ns = namespace(a=1, b=[]) %}{% for x in [1, 2] %}{% set ns.a = ns.a + x %}{% set ns.b = ns.b + [x] %}"
    "{% endfor %}{{ ns.a }}{{ ns.b }}",
    "{% set x %}one {{ n }}\n{% endset %}{{ x }}{% set y | upper %}two{% endset %}{{ y }}",
    "{% set a, b = 1, 'x' %}{{ a }}{{ b }}{% with c = 3 %}{{ c }}{% endwith %}{{ c }}",
    "{% macro f(x, y='d') %}{{ x }}{{ y }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1) }}{{ f(1, 2, 3, z=4) }}",
    "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(5) }}{{ f(2) | length }}",
    "{% macro f() %}<{{ caller(1) }}>{% endmacro %}{% call(x) f() %}{{ x }}{% endcall %}",
    "{% filter upper %}abc{{ word }}{% endfilter %}{% filter indent(2) %}a\nb{% endfilter %}",
    "{% block a %}x{{ n }}{% endblock %}{{ self.a() }}",
    "{% if n > 8 %}a{% elif n > 6 %}b{% else %}c{% endif %}{# no #}{% raw %}{{ n }}{% endraw %}",
    "  {% if true %}\n  a\n  {% endif %}\n\tb {%- if true -%}   c   {%- endif %}\n\n",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{{ c.reset() or c.current }}",
    "{% set j = joiner('|') %}{{ j() }}{{ j() }}",
]


@pytest.mark.parametrize("source", STATEMENTS)
def test_a_statement_means_what_it_means_in_jinja(source: str) -> None:
    assert rendered(source) == plain(source)


PLACES = st.none() | st.integers(-7, 7)
STEPS = PLACES.filter(lambda n: n != 0)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab'é\n", max_size=3),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text("ab", max_size=2), values, max_size=3),
    max_leaves=6,
)


@given(st.text("abc", max_size=6) | st.lists(st.integers(0, 3), max_size=6), PLACES, PLACES, STEPS)
def test_slices(value: Any, start: int | None, stop: int | None, step: int | None) -> None:
    variables = {"value": value, "start": start, "stop": stop, "step": step}
    source = "{{ value[start:stop:step] }}"
    assert rendered(source, variables) == plain(source, variables) == str(value[start:stop:step])


@given(JSON, JSON)
def test_values_are_compared_and_written_as_jinja_does(left: Any, right: Any) -> None:
    variables = {"left": [left], "right": [right]}
    for source in (
        "{{ left }}{{ left == right }}{{ left != right }}{{ left | tojson }}{{ left[0] in right }}",
        "{{ left ~ right }}{{ left + right }}{{ left is eq right }}{{ left | string }}",
    ):
        assert rendered(source, variables) == plain(source, variables)


def test_differences_from_jinja() -> None:
    assert rendered("{{ none }}{{ messages[1].name }}|{{ none ~ 'x' }}|{{ none | trim }}|{{ none | string }}") == "|x||"
    assert rendered("{{ '<' | e }}{{ ('<' | e) + '<' }}") == "&lt;&lt;<"
    assert rendered("{% generation %}a{{ n }}{% endgeneration %}b") == "a7b"
    assert rendered("{% set ns = namespace(a=1) %}{% set ns.me = ns %}{{ ns }}") == "<Namespace>"


def test_functions_of_templates() -> None:
    template = BoundedTemplate("{{ strftime_now('%d %b') if strftime_now is defined else 'some day' }}")
    assert template.render({}, max_characters=99) == "some day"
    assert template.render({}, max_characters=99, strftime_now=lambda layout: f"<{layout}>") == "<%d %b>"
    with pytest.raises(Refusal, match=r"\ANone\Z"):
        rendered("{{ raise_exception(none) }}")
    with pytest.raises(Refusal, match="no system role"):
        rendered("{% if n %}{{ raise_exception('no ' ~ messages[0].role ~ ' role') }}{% endif %}")


def test_a_text_that_is_too_long() -> None:
    template = BoundedTemplate("{% for _ in range(10) %}abc{% endfor %}")
    assert template.render({}, max_characters=30) == "abc" * 10
    with pytest.raises(TooLong):
        template.render({}, max_characters=29)


def test_several_threads_render_one_template() -> None:
    template = BoundedTemplate("{% for _ in range(n) %}{{ n }}{% endfor %}")
    barrier = threading.Barrier(4)

    def work(n: int) -> None:
        barrier.wait()
        for _ in range(50):
            assert template.render({"n": n}, max_characters=9999) == str(n) * n
            with pytest.raises(TemplateError, match="too long"):
                template.render({"n": 100_000}, max_characters=1 << 30, max_work=10_000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


SHARED = (
    "{% set ns = namespace(x=(1, 2), y=(1, 2)) %}{% for i in range(60) %}"
    "{% set ns.x = (ns.x, ns.x) %}{% set ns.y = (ns.y, ns.y) %}{% endfor %}"
)
"""Two tuples that are equal, and of 2**60 elements if they were written out."""

HOSTILE = {
    # Text and numbers that grow.
    "repeated text": "{{ 'x' * 10**9 }}",
    "repeated text twice": "{% set x = 'x' * 1000000 %}{{ (x * 1000) | length }}",
    "repeated list": "{{ ([0] * 10**9) | length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": "{% set ns = namespace(x=9) %}{% for i in range(50) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "~ doubles": "{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "+ doubles": "{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "list doubles": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "replace doubles": "{% set x = 'a' * 100000 %}{{ x.replace('a', x) }}",
    "replace filter": "{% set x = 'a' * 100000 %}{{ x | replace('a', x) }}",
    "replace nothing": "{% set x = 'a' * 100000 %}{{ x.replace('', x) }}",
    "join": "{% set x = 'a' * 100000 %}{{ x.join(x) }}",
    "join filter": "{{ (['a' * 100000] * 100000) | join }}",
    "join a list": "{{ ''.join(['a' * 100000] * 100000) }}",
    "join a generator": "{{ ''.join(['a' * 100000] * 100000 | map('string')) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "center": "{{ 'a'.center(width=10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "translate": "{{ 'a'.translate({97: 'x' * 100000}) }}",
    "to_bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "printf": "{{ '%1000000000d' % 1 }}",
    "printf *": "{{ '%*d' % (10**9, 1) }}",
    "printf precision": "{{ '%.1000000000f' % 1 }}",
    "printf flags": "{{ '%(x)-0 +1000000000d' % {'x': 1} }}",
    "printf often": "{{ ('%(x)s' * 10000) % {'x': 'a' * 100000} }}",
    "printf filter": "{{ '%1000000000d' | format(1) }}",
    "printf by odd": "{{ '%1000000000d' is odd }}",
    "printf by divisibleby": "{{ '%1000000000d' is divisibleby 7 }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format nested": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "format often": "{{ ('{0}' * 10000).format('a' * 100000) }}",
    "indent": "{{ ('a\n' * 1000) | indent(10**8) }}",
    "indent text": "{{ ('a\n' * 100000) | indent('x' * 100000) }}",
    "tojson indent": "{{ [[1]] | tojson(indent=10**9) }}",
    "tojson separators": "{{ ([0] * 100000) | tojson(separators=('x' * 100000, '')) }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "round a list": "{{ [1] | round(9, 'ceil') }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice filter": "{{ [1] | slice(10**9) | list }}",
    "sum of lists": "{{ ([[1]] * 100000) | sum(start=[]) }}",
    "int of a long text": "{{ ('f' * 1000000) | int(base=16) }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "round to negative digits": "{{ 5 | round(-20000000) }}",
    "sums of numbers": "{% set ns = namespace(x=1) %}"
    "{% for i in range(9999) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "differences of numbers": "{% set ns = namespace(x=1) %}"
    "{% for i in range(9999) %}{% set ns.x = ns.x - -ns.x %}{% endfor %}",
    "quotients of a number": "{% set n = " + "9" * 4000 + " %}{% for i in range(9) %}{{ n // 3 }}{% endfor %}",
    "remainders of a number": "{% set n = " + "9" * 4000 + " %}{% for i in range(9) %}{{ n % 3 }}{% endfor %}",
    # The budget.
    "a cost below zero": "{{ [-(10**12)] | map('=pay') | list }}",
    "a filter of the rewriter": "{{ [1] | map('=weighed') | list }}",
    "variables of a loop": "{% macro f(v) %}{{ ''.strip(**v) }}{% endmacro %}"
    "{% for i in range(99999) %}{% set x = f({'_loop_vars': messages[0]}) %}{% endfor %}",
    # Loops.
    "members of a range": "{% set r = range(100000) %}{% for i in range(99) %}{{ 0.5 in r }}{% endfor %}",
    "members of a list": "{% set x = 'a' * 99999 %}{% set y = [x ~ ''] * 9999 %}{% set x = x[1:] ~ 'b' %}"
    "{% for i in range(99) %}{{ x in y }}{% endfor %}",
    "range": "{{ range(10**9) | list }}",
    "range of a range": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "four loops": "".join(f"{{% for {x} in range(1000) %}}" for x in "abcd") + "{% endfor %}" * 4,
    "maps of maps": "{% for a in range(9999) %}{{ range(9999) | map('string') | map('upper') | list }}{% endfor %}",
    "selections": "{% for a in range(9999) %}{{ range(9999) | select('odd') | list }}{% endfor %}",
    "a long body": "{% for a in range(99999) %}" + "{% set b = c %}" * 500 + "{% endfor %}",
    "a long condition": "{% for a in range(99999) if " + "b or " * 2_000 + "b %}{% endfor %}",
    "a long default": "{% macro f(x=" + "b or " * 2_000 + "b) %}{% endmacro %}"
    "{% for a in range(99999) %}{% set y = f() %}{% endfor %}",
    "a long list": "{% for a in range(99999) %}{% for b in ["
    + "c, " * 2_000
    + "] %}{% break %}{% endfor %}{% endfor %}",
    "a long macro": "{% macro f() %}"
    + "{% set b = c %}" * 500
    + "{% endmacro %}{% for a in range(99999) %}{% set x = f() %}{% endfor %}",
    "fixed text": "{% for i in range(99999) %}{% set x %}" + "a" * 100_000 + "{% endset %}{% endfor %}",
    "fixed text in bits": "{% macro m() %}"
    + ("a" * 100 + "{{ '' }}") * 900
    + "{% endmacro %}{% for i in range(99999) %}{% set x = m() %}{% endfor %}",
    "slices": "{% set x = 'a' * 1000000 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "comparisons": "{% set x = 'a' * 900000 %}{% set y = x ~ '' %}{% for i in range(99999) %}{{ x == y }}{% endfor %}",
    "written out": "{% for i in range(99999) %}" + "a" * 100 + "{% endfor %}",
    # Recursion.
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro by two": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a block without end": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "a loop without end": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "a loop by two": "{% for x in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    # Structures that share their parts.
    **{
        f"shared, {name}": SHARED + source
        for name, source in {
            "written out": "{{ ns.x }}",
            "as text": "{{ ns.x | string }}",
            "joined to text": "{{ '' ~ ns.x }}",
            "as JSON": "{{ ns.x | tojson }}",
            "formatted": "{{ '%s' % [ns.x] }}",
            "formatted by braces": "{{ '{}'.format([ns.x]) }}",
            "compared": "{{ ns.x == ns.y }}",
            "compared in a chain": "{{ ns.x == ns.y == 1 }}",
            "compared in a list": "{{ [ns.x] == [ns.y] }}",
            "compared by a test": "{{ ns.x is eq ns.y }}",
            "selected": "{{ [ns.x] | select('eq', ns.y) | list }}",
            "searched": "{{ ns.x in [ns.y] }}",
            "searched in a generator": "{{ ns.x in ([ns.y] | map('default', 0)) }}",
            "found": "{{ (ns.x,).index(ns.y) }}",
            "sorted": "{{ [ns.x, ns.y] | map('default', 0) | sort }}",
            "unique": "{{ [ns.x, ns.y] | map('default', 0) | unique | list }}",
            "grouped": "{{ [(ns.x,), (ns.y,)] | groupby(0) }}",
            "changed": "{% for i in [1, 2] %}{{ loop.changed(ns.x if i == 1 else ns.y) }}{% endfor %}",
            "a key": "{{ {ns.x: 1} }}",
            "looked up": "{{ messages[0][ns.x] }}",
            "got": "{{ messages[0].get(ns.x) }}",
            "of a dict": "{{ dict([[ns.x, 1]]) }}",
            "trimmed": "{{ ns.x | trim }}",
            "in upper case": "{{ ns.x | upper }}",
            "refused": "{{ raise_exception(ns.x) }}",
            "joining": "{{ [1, 2] | join(ns.x) }}",
            "as a format": "{{ ns.x | format }}",
            "tested for its letters": "{{ ns.x is lower }}",
            "views": "{{ {'a': ns.x}.items() == {'a': ns.y}.items() }}",
            "views, subtracted": "{{ {'a': ns.x}.items() - {'a': ns.y}.items() }}",
            "of a namespace": "{{ namespace([[ns.x, 1]]) }}",
            "in keys": "{{ ns.x in messages[0].keys() }}",
            "by a name": "{{ messages | map(attribute=ns.x) | list }}",
        }.items()
    },
    # Searching that is quadratic.
    "strip": "{% set x = 'a' * 1000000 %}{{ x.strip(x ~ 'b') }}",
    "trim": "{% set x = 'a' * 1000000 %}{{ x | trim(x) }}",
    "rfind": "{% set x = 'a' * 1000000 %}{{ ('b' ~ x ~ x).rfind('c' ~ x) }}",
    "rsplit by name": "{% set x = 'a' * 1000000 %}{{ ('b' ~ x ~ x).rsplit(sep='c' ~ x) }}",
    "titles": "{% set x = 'a ' * 100000 %}{% for i in range(99) %}{% set y = x | title %}{% endfor %}",
    "rejected letters": "{% set x = 'a' * 1000000 %}{% for i in range(99) %}{% set y = x | reject('string') | list %}"
    "{% endfor %}",
    "forward searches": "{% set x = 'a' * 1000000 %}{% for i in range(99) %}{{ 'b' ~ 'a' * 99 in x }}{% endfor %}",
    "JSON by a function": "{{ [namespace()] * 99 | tojson(default=('{0}' * 100000).format) }}",
    "JSON by a class": "{{ [1] | tojson(cls=namespace, encode=('{0}' * 100000).format) }}",
    "indented JSON": "{% set x = [1] * 9999 %}{% for i in range(99) %}{% set y = x | tojson(indent=1) %}{% endfor %}",
    "equal hashes": "{% set x = [" + ",".join(str(n * (2**61 - 1)) for n in range(3000)) + "] %}"
    "{% for i in range(9) %}{% set y = x | unique %}{% endfor %}",
    "rsplit": "{% set x = 'a' * 1000000 %}{{ ('b' ~ x ~ x).rsplit('c' ~ x) }}",
    # Ways out.
    **{
        f"way out {number}": source
        for number, source in enumerate(
            [
                "{{ ''.__class__.__mro__ }}",
                "{{ messages.__class__.__base__.__subclasses__() }}",
                "{{ ''['__class__'].__name__ }}",
                "{{ cycler.__init__.__globals__ }}",
                "{{ namespace.__init__.__globals__ }}",
                "{{ raise_exception.__globals__.keys() }}",
                "{{ self._TemplateReference__context.environment }}",
                "{{ '{0.__class__.__mro__}'.format(1) }}",
                "{{ '{0.__class__}'.format_map({'0': 1}) }}",
                "{{ ('{0.__class__.__mro__}' | format)(1) }}",
                "{{ messages.append(1) }}",
                "{{ messages[0].update(x=1) }}",
                "{{ messages | attr('append') }}",
                "{{ [1] | map(attribute='__class__.__name__.upper') | first }}{{ ''.encode() }}",
                "{% for x in [1] %}{{ loop._iterable.gi_frame.f_globals }}{% endfor %}",
                "{% macro f() %}{% endmacro %}{{ f._func.__globals__.x }}",
                "{% include 'x' %}",
                "{% import 'x' as y %}",
                "{% extends 'x' %}",
                "{% autoescape true %}{{ '<' }}{% endautoescape %}",
                "{% debug %}",
                "{% do messages.append(1) %}",
                "{{ random }}{{ [1, 2] | random }}",
                "{{ strftime_now('%d' * 1000) }}",
                "{{ undefined.x.y }}",
                "{{ none() }}",
                "{{ super() }}",
                "{{ raise_exception() }}",
            ]
        )
    },
    # Sources.
    "brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "nots": "{{ " + "not " * 30_000 + "1 }}",
    "sums": "{{ " + "1+" * 30_000 + "1 }}",
    "filters": "{{ 1" + "|default(1)" * 4_000 + " }}",
    "attributes": "{{ " + "a." * 30_000 + "b }}",
    "ifs": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "fors": "{% for x in [1] %}" * 50 + "{% endfor %}" * 50,
    "comments": "{#" * 50_000,
    "blocks": "{%" * 50_000,
    "outputs": "{{" * 50_000,
    "raws": "{% raw %}" * 10_000,
    "quotes": "{{ '" + "\\'" * 50_000,
    "a number": "{{ " + "9" * 5000 + " }}",
    "a syntax error": "{% if %}",
    "an end too many": "{% endif %}",
    "an unknown filter": "{{ 1 | nothing }}",
    "too long": " " * 131_073,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_fails_within_bounds(name: str) -> None:
    started = time.thread_time()
    with pytest.raises((TemplateError, Refusal)):
        # A small part of the budget is enough: work that is not counted would not end with any budget.
        rendered(HOSTILE[name], max_work=1 << 21)
    assert time.thread_time() - started < 4


@pytest.mark.parametrize("name", ["range of a range", "shared, sorted", "a macro by two", "maps of maps"])
def test_a_sixteenth_of_the_budget_takes_a_sixteenth_of_some_seconds(name: str) -> None:
    started = time.thread_time()
    with pytest.raises(TemplateError, match="too long"):
        rendered(HOSTILE[name], max_characters=1 << 40, max_work=MAX_WORK // 16)
    assert time.thread_time() - started < 20 / 16


# ---- conversations of ordinary size ---------------------------------------------------------------------------------

WORK_PER_CHARACTER = MAX_WORK / MAX_TEXT_BYTES
"""Units of work for each character of the largest request."""


def conversation(n_messages: int, n_characters: int) -> list[dict[str, Any]]:
    """Messages of `n_characters` in turn, with reasoning, tool calls and answers of tools."""
    text = ("Some words, in a line.\n" * (n_characters // 23 + 1))[:n_characters]
    thinking = f"<think>\n{text[n_characters // 2 :]}\n</think>\n\n{text[: n_characters // 2]}"
    call = {"id": "call12345", "type": "function", "function": {"name": "f", "arguments": {"a": text, "b": [1, None]}}}
    user = {"role": "user", "content": text}
    turns: list[dict[str, Any]] = [
        user,
        {"role": "assistant", "content": thinking, "tool_calls": None},
        user,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "f", "tool_call_id": "call12345", "content": text},
        {"role": "assistant", "content": text, "reasoning_content": text},
    ]
    return [turns[index % len(turns)] for index in range(n_messages)]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(("n_messages", "n_characters"), [(3, 50_000), (301, 500)])
def test_every_template_renders_the_longest_conversations(name: str, n_messages: int, n_characters: int) -> None:
    messages = conversation(n_messages, n_characters)
    if name in ("gemma", "llama 3", "deepseek", "mistral"):  # they refuse some of these fields
        messages = [
            {"role": ("user", "assistant")[index % 2], "content": message["content"]}
            for index, message in enumerate(messages)
        ]
    if name == "only parts":
        messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    variables = {"messages": messages, "tools": None, "add_generation_prompt": True, "bos_token": "", "eos_token": ""}
    size = len(json.dumps(messages))
    text = rendered(TEMPLATES[name], variables, 1 << 30, int(size * WORK_PER_CHARACTER))
    assert text.count("Some words, in a line.") > size / 100


@pytest.mark.parametrize(
    "expression",
    [
        "content.strip('\\n') ~ content.lstrip('\\n') ~ content.rstrip()",
        "content.replace('\\r', '') ~ content.replace('\\n', ' ')",
        "content.split('</think>')[-1].lstrip('\\n') ~ content.rsplit('x', 1)[0]",
        "content | trim ~ (content | replace('x', ''))",
    ],
)
def test_methods_in_a_loop_take_what_their_text_is_long(expression: str) -> None:
    source = "{% for m in messages %}{% set content = m.content %}{{ " + expression + " }}{% endfor %}"
    messages = [{"content": "words \n" * 14_286}]
    assert len(rendered(source, {"messages": messages}, max_work=100_002 * 16)) > 100_000


def test_what_takes_little_work() -> None:
    text = "x" * 100_000
    message = {"role": "user", "content": text, "tools": [text] * 5}
    for expression in [
        "'tool_calls' in message",
        "'user' in [content, role]",
        "role == content",
        "content == none",
        "content is string",
        "message.tools | length",
        "content[:5]",
    ]:
        rendered("{{ " + expression + " }}", {"message": message, **message}, max_work=2000)
    message.pop("tools")
    rendered("{{ message | tojson(separators=(',', ':')) }}", {"message": message}, max_work=100_000 * 5)
    rendered("{{ message | tojson(indent=4) }}", {"message": message}, max_work=100_000 * 12)


def test_nested_comparisons_compile_at_once() -> None:
    assert rendered("{{ " + "0 < (" * 30 + "1" + ") < 2" * 30 + " }}") == "True"


def test_errors_are_short() -> None:
    for source in ["{{ ('x' * 100000)() }}", "{{ raise_exception('x' * 100000) }}", "{{ messages['x' * 10000].y }}"]:
        with pytest.raises((TemplateError, Refusal)) as caught:
            rendered(source)
        assert len(str(caught.value)) <= 500
