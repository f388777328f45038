"""From what the profiler prints to where a step's time goes."""

from __future__ import annotations

import pytest

from trio_runner.bench.hotspots import KINDS, OTHER, OTHER_PYTHON, PYTHON, Function, Profile, read_samples, read_symbols

SYMBOLS = """
Symbol table '.symtab' contains 9 entries:
   Num:    Value          Size Type    Bind   Vis      Ndx Name
     1: 0000000000000000     0 FILE    LOCAL  DEFAULT  ABS attention.cpp
     2: 00000000000013b0   120 FUNC    LOCAL  DEFAULT   12 _ZN6attendEv
     3: 0000000000004010     8 OBJECT  LOCAL  DEFAULT   25 _ZL4made
     4: 0000000000000000     0 FILE    LOCAL  DEFAULT  ABS crtstuff.c
     5: 0000000000001370     0 FUNC    LOCAL  DEFAULT   12 frame_dummy
     6: 0000000000000000     0 FILE    LOCAL  DEFAULT  ABS
     7: 0000000000001400    64 FUNC    LOCAL  DEFAULT   12 _fini
     8: 0000000000001500    64 FUNC    GLOBAL DEFAULT   12 ggml_barrier
"""
SCRIPT = """
 22 7f00a1 _ZN6attendEv (/a dir/lib/libggml-cpu-haswell.so)
 22 7f00b2 ggml_barrier (/a dir/lib/libggml-cpu-haswell.so)
 23 7f00b2 ggml_barrier (/a dir/lib/libggml-cpu-haswell.so)
 22 55d0c1 _PyEval_EvalFrameDefault (/usr/lib/libpython3.11.so.1.0)
 24 55d0c1 _PyEval_EvalFrameDefault (/usr/lib/libpython3.11.so.1.0)
 24 ffffffff81 finish_task_switch.isra.0 ([kernel.kallsyms])
 24 55d0c9 [unknown] (/home/me/x.so)
"""


def test_the_source_files_of_functions_are_found() -> None:
    assert read_symbols(SYMBOLS) == {"_ZN6attendEv": "attention.cpp", "frame_dummy": "crtstuff.c"}


def test_samples_are_read() -> None:
    samples = read_samples(SCRIPT, read_symbols(SYMBOLS), {"_ZN6attendEv": "Worker::attend"})
    assert [sample.thread for sample in samples] == [22, 22, 23, 22, 24, 24, 24]
    assert samples[0].function == Function("libggml-cpu-haswell.so", "attention.cpp", "Worker::attend")
    assert samples[0].function.where == "attention.cpp"
    assert samples[1].function.where == "libggml-cpu-haswell.so"
    kinds = [sample.function.kind for sample in samples]
    waiting = "waiting for other threads"
    assert kinds == ["attention", waiting, waiting, PYTHON, PYTHON, "Linux", OTHER]


@pytest.mark.parametrize(
    ("library", "file", "name", "kind"),
    [
        ("libggml-cpu-haswell.so", "", "ggml_vec_dot_q4_1_q8_1", "products"),
        ("libggml-cpu-haswell.so", "matmul_avx2.cpp", "tile", "products"),
        ("libggml-cpu-haswell.so", "", "quantize_row_q8_1", "quantising activations"),
        ("libggml-cpu-haswell.so", "matmul.cpp", "Traits::compute_forward", "quantising activations"),
        ("libggml-cpu-haswell.so", "", "ggml_compute_forward_flash_attn_ext", "attention"),
        ("libggml-cpu-haswell.so", "", "ggml_compute_forward_rms_norm_mul_fused", "norms"),
        ("libggml-cpu-haswell.so", "", "void rotate_pairs<float>", "RoPE"),
        ("libm.so.6", "", "__sincosf_fma", "RoPE"),
        ("libggml-cpu-haswell.so", "", "ggml_vec_soft_max_f32", "softmax"),
        ("libggml-cpu-haswell.so", "", "ggml_compute_forward_set_rows", "writing the KV cache"),
        ("libggml-cpu-haswell.so", "", "ggml_vec_swiglu_f32", "element-wise operations"),
        ("libggml-cpu-haswell.so", "", "ggml_compute_forward_add_non_quantized", "element-wise operations"),
        ("libggml-cpu-haswell.so", "", "ggml_graph_compute_thread", "waiting for other threads"),
        ("libggml-cpu-haswell.so", "", "ggml_graph_plan", "graphs, memory, batches"),
        ("libggml-base.so", "", "ggml_gallocr_alloc_graph", "graphs, memory, batches"),
        ("libllama.so", "", "llm_graph_context::build_norm", "graphs, memory, batches"),
        ("libtrio_llama.so", "candidates.cpp", "select", "sampling"),
        ("libtrio_llama.so", "", "trio::are_numbers", "sampling"),
        ("libtrio_llama.so", "", "trio_step", "graphs, memory, batches"),
        ("_native.abi3.so", "", "_cffi_f_trio_step", PYTHON),
        ("libc.so.6", "", "__memmove_avx_unaligned_erms", "C library"),
        ("[vdso]", "", "__vdso_clock_gettime", "C library"),
        ("[kernel.kallsyms]", "", "clear_page_erms", "Linux"),
        ("libjpeg.so.8", "", "jpeg_start", OTHER),
    ],
)
def test_kinds_of_functions(library: str, file: str, name: str, kind: str) -> None:
    assert Function(library, file, name).kind == kind
    assert kind in KINDS or kind == OTHER


def test_the_table_divides_the_time_of_a_step() -> None:
    samples = read_samples(SCRIPT, read_symbols(SYMBOLS), {})
    profile = Profile("decode", samples, 0.001, seconds=0.01, n_steps=2, step="a step", decode_thread=22)
    assert profile.table(1).splitlines() == [
        "decode: 5.00 ms for a step, 3.50 ms of all threads together (2 of them)",
        "  28.6%     1.000 ms  waiting for other threads",
        "  14.3%     0.500 ms  attention",
        f"  14.3%     0.500 ms  {PYTHON}",
        f"  14.3%     0.500 ms  {OTHER_PYTHON}",
        "  14.3%     0.500 ms  Linux",
        "  14.3%     0.500 ms  other",
        " functions:",
        "  28.6%     1.000 ms    ggml_barrier (libggml-cpu-haswell.so)",
    ]


def test_libraries_without_names_of_functions_are_reported() -> None:
    script = SCRIPT.replace("ggml_barrier", "[unknown]")
    lines = Profile("decode", read_samples(script, {}, {}), 0.001, 0.01, 2, "a step", None).table(1).splitlines()
    assert lines[-1] == (
        " Functions of libggml-cpu-haswell.so have no names: the symbols are missing, or are those of another build."
    )
