"""Programs that speak as llama-bench and llama-batched-bench do, and have measured what the test says."""

from __future__ import annotations

import sys
from pathlib import Path

LLAMA_BENCH = """
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
n_tokens = int(options["-gp"].partition(",")[2]) if "-gp" in options else int(options["-p"])
seconds = [9.0] + [n_tokens / {rate}] * (int(options["-r"]) - 1)
print("a line of the log", file=sys.stderr)
print(json.dumps([{{"n_threads": int(options["-t"]), "samples_ns": [1e9 * each for each in seconds]}}]))
"""
BATCHED_BENCH = """
import sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
n_prompt, n_each, n_streams = (int(options[name].split(",")[0]) for name in ("-npp", "-ntg", "-npl"))
assert int(options["-c"]) >= (n_prompt + n_each) * n_streams
open("llama.log", "w").close()
print("|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |", file=sys.stderr)
print("|-------|--------|------|--------|----------|----------|----------|----------|", file=sys.stderr)
for rate in (1.0, {rate}):
    print(f"| {{n_prompt}} | {{n_each}} | {{n_streams}} | 9 | 0.5 | 99.0 | 0.5 | {{rate}} |", file=sys.stderr)
"""


def fake_peer(directory: Path, *, rate: float) -> Path:
    """A llama-bench with this rate for everything, and beside it a llama-batched-bench."""
    for name, text in (("llama-bench", LLAMA_BENCH), ("llama-batched-bench", BATCHED_BENCH)):
        write_program(directory / name, text.format(rate=rate))
    return directory / "llama-bench"


def write_program(path: Path, text: str) -> Path:
    """Write a Python program to `path`."""
    path.write_text(f"#!{sys.executable} -S\n{text}", encoding="utf-8")
    path.chmod(0o755)
    return path
