"""From samples of a profiler to where a step's time goes. Pure.

A sample is the function in which a thread was found. Its kind follows from the library, the source file where it is
known, and the name. Functions that the compiler has put into their caller count as the caller.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

PYTHON: Final = "Python, decode thread"
OTHER_PYTHON: Final = "Python, other threads"
OTHER: Final = "other"
OURS: Final = "ggml"
"""In the names of the libraries that compute."""
UNKNOWN: Final = "[unknown]"
"""What perf calls a function that it has no name for."""
NAMELESS: Final = 0.05
"""Part of the samples that may be in our libraries without a name of the function."""

KINDS: Final[Mapping[str, str]] = {
    "waiting for other threads": r"ggml_barrier|ggml_thread|ggml_graph_compute_(secondary_)?thread|sched_yield|futex",
    "attention": r"/attention\.cpp|flash_attn|simd_gemm",
    "quantising activations": r"quantize_(row|mat)|matmul\.cpp Traits::compute_forward",
    "products": r"/matmul|vec_dot|mul_mat|gemm|gemv|tinyBLAS|sgemm|tiled_|out_prod",
    "RoPE": r"rope|rotate_pairs|sincos",
    "norms": r"ggml-cpu.*norm",
    "softmax": r"soft_max|ggml-cpu.*expf",
    "writing the KV cache": r"set_rows|fp32_to_fp16|ggml_compute_forward_(cpy|dup)",
    "element-wise operations": r"swiglu|silu|gelu|ggml_vec_|ggml_compute_forward_\w|binary_op|unary_op|apply_",
    "sampling": r"/(sampler|candidates|tail_free|schema|thread_team)|libtrio_llama.*(sample|are_numbers)",
    "graphs, memory, batches": r"libllama|libggml|libtrio_llama",
    "Linux": r"^\[(?!vdso)",
    PYTHON: r"python|abi3|_cffi_backend|site-packages|lib-dynload",
    "C library": r"^(lib(c|m|stdc\+\+|gcc_s|pthread)\.so|ld-linux|\[vdso)",
}
"""A pattern for each kind, which is searched in "library/file name". The first one that is found counts."""


@dataclass(frozen=True, slots=True)
class Function:
    """A function of a library. `file` is its source file, or "" if that is not known."""

    library: str
    file: str
    name: str

    @property
    def where(self) -> str:
        """The source file, or else the library."""
        return self.file or self.library

    @property
    def kind(self) -> str:
        """The name of its entry in `KINDS`."""
        text = f"{self.library}/{self.file} {self.name}"
        return next((kind for kind, pattern in KINDS.items() if re.search(pattern, text)), OTHER)


@dataclass(frozen=True, slots=True)
class Sample:
    """A thread, and the function that it was found in."""

    thread: int
    function: Function


_SAMPLE = re.compile(r"^\s*(\d+)\s+[0-9a-f]+ (.*?) \(([^()]*)\)\s*$")
_SYMBOL = re.compile(r"^\s*\d+: [0-9a-f]+\s+\S+\s+(\w+)\s+(\w+)\s+\w+\s+\S+ ?(\S*)")


def read_symbols(listing: str) -> dict[str, str]:
    """The source file of each function that only its file knows, from what `readelf --symbols --wide` prints."""
    files: dict[str, str] = {}
    file = ""
    for line in listing.splitlines():
        if found := _SYMBOL.match(line):
            kind, binding, name = found.groups()
            if kind == "FILE":
                file = name
            elif kind == "FUNC" and binding == "LOCAL" and file:
                files[name] = file
    return files


def read_samples(script: str, files: Mapping[str, str], names: Mapping[str, str]) -> list[Sample]:
    """The samples that `perf script --fields tid,ip,sym,dso` prints. `files` and `names` have the source files of
    functions, and their names for people, by the name that the linker knows."""
    functions: dict[tuple[str, str], Function] = {}
    samples = []
    for line in script.splitlines():
        if found := _SAMPLE.match(line):
            thread, name, path = found.groups()
            if (name, path) not in functions:
                library = path.rpartition("/")[2] if path.startswith("/") else path
                if path.startswith("/") and "python" in path:
                    library = f"python {library}"
                functions[name, path] = Function(library, files.get(name, ""), names.get(name, name))
            samples.append(Sample(int(thread), functions[name, path]))
    return samples


@dataclass(frozen=True, slots=True)
class Profile:
    """The samples of one case."""

    case: str
    samples: Sequence[Sample]
    sample_seconds: float
    """Seconds of one thread that each sample stands for."""
    seconds: float
    """Seconds that the case took."""
    n_steps: int
    step: str
    """What a step is."""
    decode_thread: int | None
    """The thread that decodes, where it is known."""

    def table(self, n_functions: int) -> str:
        """Where the time of a step goes: a row for each kind, and one for each of the `n_functions` largest."""
        kinds = Counter(self._kind(sample) for sample in self.samples)
        functions = Counter(sample.function for sample in self.samples)
        busy = sum(kinds.values()) * self.sample_seconds
        title = (
            f"{self.case}: {1000 * self.seconds / self.n_steps:.2f} ms for {self.step}, "
            f"{1000 * busy / self.n_steps:.2f} ms of all threads together ({self.n_steps} of them)"
        )
        rows = [(kind, n) for kind, n in kinds.most_common()]
        largest = [
            (f"  {function.name[:70]} ({function.where})", n) for function, n in functions.most_common(n_functions)
        ]
        return "\n".join([title, *self._lines(rows), " functions:", *self._lines(largest), *self._remarks(), ""])

    def _remarks(self) -> list[str]:
        nameless = [each for each in self.samples if each.function.name == UNKNOWN and OURS in each.function.library]
        if len(nameless) <= NAMELESS * len(self.samples):
            return []
        libraries = ", ".join(sorted({sample.function.library for sample in nameless}))
        return [f" Functions of {libraries} have no names: the symbols are missing, or are those of another build."]

    def _kind(self, sample: Sample) -> str:
        kind = sample.function.kind
        is_other = self.decode_thread is not None and sample.thread != self.decode_thread
        return OTHER_PYTHON if kind == PYTHON and is_other else kind

    def _lines(self, rows: Iterable[tuple[str, int]]) -> list[str]:
        per_sample = 1000 * self.sample_seconds / self.n_steps
        return [f"{n / len(self.samples):>7.1%} {n * per_sample:>9.3f} ms  {text}" for text, n in rows]
