"""Samplers: the effect of each parameter, and that the failure of one sequence does not touch others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.llama.running import GREEDY, PROMPT, Running, tokens_of
from trio_runner.core.batch import Chunk, DecodeOutcome, Sampled
from trio_runner.core.memory import Trim
from trio_runner.errors import InvalidGrammar, InvalidRequest, NativeError
from trio_runner.sampling import RANDOM_SEED, SamplingParams

Models = Callable[[str], Path]

FREE = SamplingParams(repeat_penalty=1.0, top_k=0, top_p=1.0, temperature=1.5, seed=1)
"""Draws from the whole vocabulary."""


@pytest.fixture
def running(models: Models) -> Running:
    return Running(models("llama"))


def drawn(running: Running, params: SamplingParams, n_tokens: int = 12) -> list[int]:
    return tokens_of(running.generate(PROMPT, n_tokens, params=params))


def test_greedy_takes_the_most_probable_token(running: Running) -> None:
    for sampled in running.generate(params=replace(GREEDY, logprobs=3)):
        assert sampled.token == sampled.top[0].token
        assert sampled.logprob == sampled.top[0].logprob


@pytest.mark.parametrize(
    "params",
    [
        replace(FREE, top_k=1),
        replace(FREE, top_p=0.0),
        replace(FREE, min_p=1.0),
        replace(FREE, temperature=1e-9),
        replace(FREE, top_n_sigma=1e-3),
        replace(FREE, mirostat=1, mirostat_tau=0.0),
        replace(FREE, mirostat=2, mirostat_tau=0.0),
        replace(GREEDY, temperature=-1.0, top_k=5, seed=4),
    ],
)
def test_narrowest_settings_are_greedy(running: Running, params: SamplingParams) -> None:
    assert drawn(running, params) == drawn(running, GREEDY)


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        replace(GREEDY, repeat_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2, repeat_last_n=7),
        replace(GREEDY, logit_bias=((40, 3.0), (70, -math.inf), (80, 2.5))),
        replace(GREEDY, logit_bias=tuple((token, -math.inf) for token in range(90)), repeat_penalty=1.1),
        replace(FREE, top_k=1, repeat_penalty=1.1),
        replace(FREE, top_k=5),
        replace(FREE, top_k=40, top_p=0.9, repeat_penalty=1.1, temperature=0.8),
        replace(FREE, top_k=40, min_p=0.05, typical_p=0.9, tfs_z=0.95),
        replace(FREE, top_k=40, xtc_probability=0.5, dynatemp_range=0.5, frequency_penalty=0.3),
        replace(FREE, top_k=30, logit_bias=((40, 3.0), (70, -math.inf), (80, 2.5))),
        replace(FREE, top_k=20, grammar="root ::= [a-z ]+"),
        replace(GREEDY, grammar="root ::= [a-z ]+"),
    ],
)
def test_sampling_the_head_of_the_vocabulary_changes_nothing(running: Running, params: SamplingParams) -> None:
    """DRY considers every token, so with DRY the whole vocabulary is sampled, even if it penalises nothing."""
    everything = replace(params, dry_multiplier=1.0, dry_allowed_length=10**6)
    for seed in range(4):
        head = drawn(running, replace(params, seed=seed), 24)
        assert head == drawn(running, replace(everything, seed=seed), 24)


@pytest.mark.parametrize(
    "params",
    [
        FREE,
        replace(FREE, tfs_z=0.9),
        replace(FREE, typical_p=0.5),
        replace(FREE, xtc_probability=0.5),
        replace(FREE, dynatemp_range=0.5),
        replace(FREE, mirostat=1),
        replace(FREE, mirostat=2),
        replace(FREE, dry_multiplier=0.8, repeat_penalty=1.3, frequency_penalty=0.1, presence_penalty=0.1),
        replace(FREE, grammar="root ::= [a-z ]+"),
    ],
)
def test_a_seed_reproduces_the_text(running: Running, params: SamplingParams) -> None:
    assert drawn(running, params) == drawn(running, params)
    assert len({tuple(drawn(running, replace(params, seed=seed))) for seed in range(4)}) > 1


def test_the_random_seed_is_random(running: Running) -> None:
    assert len({tuple(drawn(running, replace(FREE, seed=RANDOM_SEED))) for _ in range(4)}) > 1


def test_draws_follow_the_probabilities(running: Running) -> None:
    tokens = running.tokens()
    (greedy,) = running.generate(tokens, 1, params=replace(GREEDY, logprobs=1))
    position = len(tokens) - 1
    n_draws, hits = 300, 0
    for seed in range(n_draws):
        running.context.apply(Trim(0, position))
        (sampled,) = running.go_on(tokens[-1], position, 1, params=replace(FREE, temperature=1.0, seed=seed))
        hits += sampled.token == greedy.token
    probability = math.exp(greedy.logprob)
    assert abs(hits / n_draws - probability) < 4 * math.sqrt(probability * (1 - probability) / n_draws)


def test_logprobs_are_those_of_the_model(running: Running) -> None:
    n_vocab = running.model.info.n_vocab
    (plain,) = running.generate(n_tokens=1, params=replace(GREEDY, logprobs=100))
    assert len(plain.top) == min(100, n_vocab)
    values = [info.logprob for info in plain.top]
    assert values == sorted(values, reverse=True)
    total = sum(math.exp(value) for value in values)
    assert 0.5 < total <= 1.0 + 1e-5
    assert [info.piece for info in plain.top] == [running.model.piece(info.token) for info in plain.top]
    # No sampler changes them.
    (forced,) = running.generate(
        n_tokens=1, params=replace(GREEDY, logprobs=100, logit_bias=((plain.token, -math.inf),))
    )
    assert forced.token == plain.top[1].token
    np.testing.assert_allclose([info.logprob for info in forced.top], values, atol=1e-6)
    assert forced.logprob == pytest.approx(plain.top[1].logprob)
    (none,) = running.generate(n_tokens=1, params=replace(GREEDY, logprobs=0))
    assert none.top == ()
    assert none.logprob == pytest.approx(plain.logprob)


def test_a_bias_forbids_and_forces_tokens(running: Running) -> None:
    first = drawn(running, GREEDY, 6)
    forbidden = replace(GREEDY, logit_bias=tuple((token, -math.inf) for token in set(first)))
    assert not set(first) & set(drawn(running, forbidden, 6))
    assert drawn(running, replace(FREE, logit_bias=((77, 1e5),)), 3) == [77, 77, 77]
    everything = replace(FREE, logit_bias=tuple((token, -math.inf) for token in range(running.model.info.n_vocab)))
    (sampled,) = running.generate(n_tokens=1, params=everything)
    assert isinstance(sampled.error, NativeError)
    assert "forbidden" in str(sampled.error)


def test_tokens_outside_the_vocabulary_are_refused(running: Running) -> None:
    n_vocab = running.model.info.n_vocab
    with pytest.raises(InvalidRequest) as bias:
        running.model.sampler(replace(GREEDY, logit_bias=((n_vocab, 1.0),)), ())
    assert bias.value.param == "logit_bias"
    with pytest.raises(InvalidRequest):
        running.model.sampler(GREEDY, (n_vocab,))


@pytest.mark.parametrize(
    "penalty", [{"repeat_penalty": 50.0}, {"frequency_penalty": 100.0}, {"presence_penalty": 100.0}]
)
def test_penalties_prevent_repetition(models: Models, penalty: dict[str, float]) -> None:
    running = Running(models("llama"))
    plain = drawn(running, GREEDY, 40)
    assert len(set(plain)) < len(plain)
    penalised = drawn(running, replace(GREEDY, repeat_last_n=-1, **penalty), 40)  # type: ignore[arg-type]
    assert len(set(penalised)) == len(penalised)
    assert drawn(running, replace(GREEDY, repeat_last_n=0, **penalty), 40) == plain  # type: ignore[arg-type]


def test_penalties_see_the_prompt(running: Running) -> None:
    tokens = running.tokens()
    (first,) = running.generate(tokens, 1)
    params = replace(GREEDY, presence_penalty=1000.0)
    position = len(tokens) - 1

    def with_prompt(prompt: list[int], params: SamplingParams = params) -> int:
        sampler = running.sampler(params, prompt)
        running.context.apply(Trim(0, position))
        chunk = Chunk(0, 0, position, (tokens[-1],), output=True)
        return running.step(chunk, samplers={0: sampler}).sampled[0].token

    assert with_prompt([]) == first.token
    assert with_prompt([first.token]) != first.token
    assert with_prompt([first.token] + [5] * 64) == first.token  # outside of the window of 64 tokens
    assert with_prompt([first.token] + [5] * 63) != first.token


def test_newlines_may_be_exempt_from_penalties(running: Running) -> None:
    newline = running.model.native_info.token_nl
    params = replace(GREEDY, logit_bias=((newline, 100.0),), presence_penalty=1000.0, penalize_nl=False)
    assert drawn(running, params, 4) == [newline] * 4
    assert drawn(running, replace(params, penalize_nl=True), 2)[1] != newline


def test_dry_breaks_loops(running: Running) -> None:
    period = running.tokens("the model")
    prompt = period * 6
    params = replace(GREEDY, logit_bias=tuple((token, 200.0) for token in period))
    dry = replace(params, dry_multiplier=1000.0, dry_sequence_breakers=())
    tokens = running.tokens()
    position = len(tokens) - 1
    running.generate(tokens, 1)

    def next_token(params: SamplingParams) -> int:
        running.context.apply(Trim(0, position))
        chunk = Chunk(0, 0, position, (tokens[-1],), output=True)
        return running.step(chunk, samplers={0: running.sampler(params, prompt)}).sampled[0].token

    expected = period[0]  # the token that would continue the loop
    assert next_token(replace(params, logit_bias=((expected, 200.0),))) == expected
    assert next_token(replace(dry, logit_bias=((expected, 200.0),))) != expected


def test_xtc_leaves_out_the_most_probable_token(running: Running) -> None:
    (first,) = running.generate(n_tokens=1)
    for seed in range(8):
        (sampled,) = running.generate(
            n_tokens=1, params=replace(FREE, xtc_probability=1.0, xtc_threshold=0.01, seed=seed)
        )
        assert sampled.token != first.token


def test_tail_free_sampling_keeps_the_head(running: Running) -> None:
    """Compared with the definition, computed from the model's own probabilities."""
    (sampled,) = running.generate(n_tokens=1, params=replace(GREEDY, logprobs=100))
    ranked = [info.token for info in sampled.top]
    probabilities = np.exp([info.logprob for info in sampled.top])
    bend = np.abs(np.diff(np.diff(probabilities)))
    accumulated = np.cumsum(bend / bend.sum())
    z = 0.6
    n_kept = next(index for index, value in enumerate(accumulated) if value > z and index >= 1)
    assert 1 <= n_kept < 50
    params = replace(FREE, tfs_z=z, temperature=100.0)
    seen = {running.generate(n_tokens=1, params=replace(params, seed=seed))[0].token for seed in range(60)}
    assert seen <= set(ranked[: n_kept + 1])
    assert len(seen) >= min(2, n_kept)


# ---- grammars -------------------------------------------------------------------------------------------------------

JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]*)) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws     ::= ([ \t\n] ws)?
"""


@pytest.mark.parametrize("seed", range(4))
def test_the_text_follows_the_grammar(running: Running, seed: int) -> None:
    params = replace(FREE, grammar='root ::= "[" [0-9]{2} ("," [a-f]{3})* "]"', seed=seed)
    text = running.text(n_tokens=60, params=params)
    body = text.removeprefix("[").removesuffix("]")
    head, *rest = body.split(",")
    assert len(head) == 2
    assert head.isdigit()
    for part in rest[:-1]:
        assert len(part) == 3
        assert set(part) <= set("abcdef")


def test_a_json_grammar_gives_json(running: Running) -> None:
    sampler = running.generate(n_tokens=40, params=replace(FREE, grammar=JSON, seed=5))
    text = b"".join(sampled.piece for sampled in sampler).decode(errors="replace")
    assert text.startswith("{")
    assert all(sampled.error is None for sampled in sampler)


def test_a_finished_grammar_ends_the_text(running: Running) -> None:
    result = running.generate(params=replace(GREEDY, grammar='root ::= "yes"'), n_tokens=10)
    assert b"".join(sampled.piece for sampled in result) == b"yes"
    assert result[-1].is_end


def test_a_text_that_follows_the_grammar_anyway_is_unchanged(models: Models) -> None:
    running = Running(models("chain"))
    grammar = replace(GREEDY, grammar="root ::= [^\\x00]*")
    assert running.text("hello", 30, grammar) == running.text("hello", 30)


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= (",
        "root ::= other",
        "other ::= [a-z]",
        'root ::= root "a" | "b"',
        "root ::= <no such token>",
        "nonsense",
    ],
)
def test_bad_grammars_are_refused(running: Running, grammar: str) -> None:
    with pytest.raises(InvalidGrammar):
        running.model.sampler(replace(GREEDY, grammar=grammar), ())


def test_a_dead_end_is_an_error_of_its_sequence_only(running: Running) -> None:
    expected = tokens_of(running.generate("the model", 3))
    for slot in (0, 1):
        running.generate("the model", 1, slot=slot)
    tokens = running.tokens("the model")
    for slot in (0, 1):
        running.context.apply(Trim(slot, len(tokens) - 1))
    samplers = {1: running.sampler(replace(GREEDY, grammar="root ::= <[99999999]>")), 2: running.sampler()}
    chunks = [Chunk(1, 0, len(tokens) - 1, (tokens[-1],), True), Chunk(2, 1, len(tokens) - 1, (tokens[-1],), True)]
    result = running.step(*chunks, samplers=samplers)
    assert result.outcome is DecodeOutcome.OK
    assert isinstance(result.sampled[1].error, InvalidGrammar)
    assert result.sampled[2].token == expected[0]
    # The failed sampler cannot be used any more, but the context can.
    for slot in (0, 1):
        running.context.apply(Trim(slot, len(tokens) - 1))
    again = running.step(*chunks, samplers=samplers).sampled
    assert isinstance(again[1].error, NativeError)
    assert tokens_of(running.generate("the model", 3)) == expected


def test_a_growing_grammar_is_stopped_by_the_clock(running: Running) -> None:
    """Every "ab" doubles the state of the grammar. No single token may take too long."""
    grammar = 'root ::= "ab" root "x" | "ab" root "y" | ""'
    bias = tuple((running.tokens(letter)[-1], 1000.0) for letter in "ab")
    params = replace(GREEDY, grammar=grammar, logit_bias=bias)
    result = running.generate(n_tokens=64, params=params)
    assert isinstance(result[-1].error, InvalidGrammar)
    assert "too complex" in str(result[-1].error)


def test_a_costly_grammar_is_stopped_between_candidates(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a grammar whose cost the scanner overlooks. The other sequence of the batch goes on."""
    monkeypatch.setattr("trio_runner.llama.sampler.check_grammar", lambda text: None)
    expected = tokens_of(running.generate("the model", 1))
    tokens = running.tokens("the model")
    for slot in (0, 1):
        running.generate("the model", 1, slot=slot)
        running.context.apply(Trim(slot, len(tokens) - 1))
    alternatives = " | ".join(f'"{chr(0x4E00 + index)}"' for index in range(500))
    grammar = f"root ::= item{{5}}\nitem ::= {alternatives}"
    samplers = {1: running.sampler(replace(GREEDY, grammar=grammar)), 2: running.sampler()}
    chunks = [Chunk(1, 0, len(tokens) - 1, (tokens[-1],), True), Chunk(2, 1, len(tokens) - 1, (tokens[-1],), True)]
    result = running.step(*chunks, samplers=samplers)
    assert isinstance(result.sampled[1].error, InvalidGrammar)
    assert "too complex" in str(result.sampled[1].error)
    assert result.sampled[2].token == expected[0]


def test_a_closed_sampler_is_refused(running: Running) -> None:
    sampler = running.sampler()
    sampler.close()
    sampler.close()
    assert running.step(Chunk(0, 0, 0, (5,), output=False)).outcome is DecodeOutcome.OK


def test_ignore_eos_forbids_every_token_that_ends_the_generation(models: Models) -> None:
    """This model counts to ten and ends, if it may."""
    running = Running(models("chain"))
    for params in (GREEDY, replace(FREE, temperature=1.0), replace(GREEDY, logit_bias=((2, 50.0),))):
        assert running.generate("hello", 60, params=params)[-1].is_end
        endless = running.generate("hello", 60, params=replace(params, ignore_eos=True))
        assert len(endless) == 60
        assert not any(sampled.is_end for sampled in endless)


def test_a_model_whose_every_allowed_token_ends_the_generation(running: Running) -> None:
    (sampled,) = running.generate(n_tokens=1, params=replace(GREEDY, ignore_eos=True, grammar='root ::= ""'))
    assert isinstance(sampled.error, InvalidGrammar)


def reported(running: Running, params: SamplingParams, n_tokens: int = 12) -> list[Sampled]:
    return running.generate(n_tokens=n_tokens, params=replace(params, logprobs=100, post_sampling_probs=True))


@pytest.mark.parametrize("params", [GREEDY, replace(FREE, top_k=1), replace(GREEDY, grammar="root ::= [a-z ]+")])
def test_a_token_that_is_chosen_without_a_draw_has_probability_1_after_the_samplers(
    running: Running, params: SamplingParams
) -> None:
    for sampled in reported(running, params):
        assert sampled.logprob == 0.0
        assert [(top.token, top.logprob) for top in sampled.top] == [(sampled.token, 0.0)]


def test_without_samplers_that_change_anything_they_are_the_models_own(running: Running) -> None:
    params = replace(FREE, temperature=1.0)
    own = running.generate(params=replace(params, logprobs=100))
    for after, before in zip(reported(running, params), own, strict=True):
        assert after.token == before.token
        assert after.logprob == pytest.approx(before.logprob, abs=1e-3)
        assert [top.logprob for top in after.top] == pytest.approx([top.logprob for top in before.top], abs=1e-3)


def test_they_follow_the_temperature(running: Running) -> None:
    (cold,) = reported(running, replace(FREE, temperature=1.0), 1)
    (hot,) = reported(running, replace(FREE, temperature=2.0), 1)
    assert [top.token for top in hot.top[:5]] == [top.token for top in cold.top[:5]]
    for one, other in zip(hot.top[1:5], cold.top[1:5], strict=True):
        assert one.logprob - hot.top[0].logprob == pytest.approx((other.logprob - cold.top[0].logprob) / 2, abs=1e-3)


@pytest.mark.parametrize(
    "params",
    [
        replace(FREE, top_k=5),
        replace(FREE, top_k=20, top_p=0.9, min_p=0.01, repeat_penalty=1.1),
        replace(FREE, top_k=50, xtc_probability=1.0, xtc_threshold=0.01),
        replace(FREE, top_k=50, grammar="root ::= [a-z ]+"),
        replace(FREE, top_p=0.5, dry_multiplier=1.0),
        replace(FREE, top_n_sigma=1.0, temperature=0.7),
        replace(FREE, mirostat=1),
        replace(FREE, mirostat=2),
    ],
)
def test_the_candidates_that_are_left_share_all_of_the_probability(running: Running, params: SamplingParams) -> None:
    """And the text is the same as without the report."""
    result = reported(running, params)
    assert tokens_of(result) == drawn(running, params)
    for sampled in result:
        logprobs = [top.logprob for top in sampled.top]
        assert logprobs == sorted(logprobs, reverse=True)
        assert len({top.token for top in sampled.top}) == len(sampled.top)
        if len(sampled.top) < 100:  # otherwise there are more candidates
            assert sum(map(math.exp, logprobs)) == pytest.approx(1, abs=1e-4)
            assert sampled.logprob in [top.logprob for top in sampled.top if top.token == sampled.token]


def test_tokens_that_top_n_sigma_rules_out_are_no_alternatives(running: Running) -> None:
    (sampled,) = reported(running, replace(FREE, top_n_sigma=0.5), 1)
    assert 0 < len(sampled.top) < 100
    assert sum(math.exp(top.logprob) for top in sampled.top) == pytest.approx(1.0, abs=1e-3)


def test_only_the_chosen_token_is_reported_without_alternatives(running: Running) -> None:
    params = replace(FREE, top_k=5, post_sampling_probs=True)
    for sampled, full in zip(
        running.generate(params=replace(params, logprobs=0)), reported(running, replace(FREE, top_k=5)), strict=True
    ):
        assert sampled.top == ()
        assert sampled.logprob == full.logprob
    assert all(sampled.logprob == 0.0 for sampled in running.generate(params=params))
