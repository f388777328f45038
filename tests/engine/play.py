"""Plays a schedule of tests/engine/company.py on any model, and says who got other bits than alone:

    python -m tests.engine.play MODEL.gguf --events 1000 --threads 2
    python -m tests.engine.play MODEL.gguf --seed 3 --first      # the shortest beginning of this schedule that fails

A model comes without a path if it is one of tests/tiny_wide.py: `wide:q4_K`, or `wide-moe:f16`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.engine.company import Company
from tests.tiny_wide import WIDE_MODELS, wide_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file, or NAME:TYPE")
    parser.add_argument("--events", type=int, default=1000, help="how many things happen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of the company; the runs alone have one")
    parser.add_argument("--kv-type", default="f16")
    parser.add_argument("--flash-attention", default="auto")
    parser.add_argument("--first", action="store_true", help="look for the shortest beginning that fails")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        name, _, kind = asked.model.partition(":")
        path = wide_model(name, kind, Path(directory)) if name in WIDE_MODELS else Path(asked.model)
        options = {"threads": asked.threads, "kv_type": asked.kv_type, "flash_attention": asked.flash_attention}
        for n_events in range(1, asked.events + 1) if asked.first else [asked.events]:
            if _play(path, asked.seed, n_events, options, say=not asked.first):
                if asked.first:
                    print(f"with {n_events} events:")
                    _play(path, asked.seed, n_events, options, say=True)
                break


def _play(path: Path, seed: int, n_events: int, options: dict[str, Any], *, say: bool) -> bool:
    """Whether somebody got other bits."""
    company, started = Company(path, seed=seed, **options), time.perf_counter()
    company.play(n_events)
    played = time.perf_counter()
    differences = company.differences()
    if say:
        n_tokens = sum(len(told.tokens) for told in company.told.values())
        print(
            f"{len(company.requests)} requests, {n_tokens:,} tokens; {played - started:.1f} s for the company, ", end=""
        )
        print(f"{time.perf_counter() - played:.1f} s for the runs alone")
        print(", ".join(f"{n:,} x {what}" for what, n in sorted(company.counts.items())))
        for difference in differences:
            spec, sampling = company.requests[difference.uid]
            print(
                f"request {difference.uid} differs at {difference.place} by up to {difference.nats:.3g} nats: ", end=""
            )
            print(f"{len(spec.prompt)} tokens of prompt, temperature {sampling.temperature}")
        print(f"{len(differences)} requests got other bits than alone")
    return bool(differences)


if __name__ == "__main__":
    main()
