"""Our products of quantised weights are as near to float32 as llama.cpp's. `tests/accuracy.py` measures real models."""

from __future__ import annotations

import json
from random import Random

import pytest

from tests.accuracy import Accuracy, accuracy, accuracy_apart, open_for_scoring, write_reference_apart
from tests.tiny_wide import wide_model
from tests.weight_types import OTHER_TYPES, OUR_TYPES

N_TOKENS = 300
TYPES = (*OUR_TYPES, *OTHER_TYPES)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Accuracy, Accuracy]]:
    """Ours and llama.cpp's, by type."""
    work = tmp_path_factory.mktemp("accuracy")
    reference, tokens = work / "reference", work / "tokens.json"
    chance, exact = Random(1), wide_model("wide", "f32", work)
    chosen = [chance.randrange(3, 300) for _ in range(N_TOKENS)]
    tokens.write_text(json.dumps(chosen))
    write_reference_apart(exact, tokens, reference)
    paths = [wide_model("wide", kind, work) for kind in TYPES]
    theirs = accuracy_apart(paths, tokens, reference, upstream=True)
    ours = [accuracy(open_for_scoring(path), chosen, reference) for path in paths]
    return dict(zip(TYPES, zip(ours, theirs, strict=True), strict=True))


@pytest.mark.parametrize("kind", TYPES)
def test_the_divergence_from_float32_is_not_greater(found: dict[str, tuple[Accuracy, Accuracy]], kind: str) -> None:
    ours, theirs = found[kind]
    # Both read the same weights, and round the activations in other ways: by chance either may be a little nearer.
    assert ours.divergence <= 1.05 * theirs.divergence + 1e-6


def test_a_reference_diverges_from_itself_by_nothing(found: dict[str, tuple[Accuracy, Accuracy]]) -> None:
    assert found["f32"][1].divergence == 0
    assert found["q2_K"][1].divergence > 10 * found["q8_0"][1].divergence > 0
