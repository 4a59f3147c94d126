"""How does llama.cpp do on the same weights: prefill and decode, in tokens a second?

Run from the repository's root: python -m benchmarks.bench_llama PYTHON, where PYTHON is the interpreter of an
environment with llama-cpp-python. It reads the same GGUF file, 4-bit as it stands, which transformers and sentei unpack
to float32 or bfloat16: it moves fewer bytes, so this is a comparison of what a user gets and not of kernels. Same text,
same number of threads; one untimed and RUNS timed runs, the median counts.
"""

import argparse
import json
import subprocess
import tempfile
from importlib.metadata import distribution
from pathlib import Path

import torch

from benchmarks.publish import table, write_result
from sentei.conversion.checkpoints import DEFAULT_FILE, DEFAULT_PACKAGE, load_tokenizer, locate
from sentei.measurement.text import read_text, windows_of

STEPS, RUNS = 32, 3
# What runs in the other environment; it knows nothing of sentei.
CODE = """
import json, statistics, sys, time
from llama_cpp import Llama
path, tokens, steps, runs, threads = sys.argv[1], json.load(open(sys.argv[2])), *map(int, sys.argv[3:])
model = Llama(path, n_ctx=len(tokens) + 8, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)
prefill, decode = [], []
for run in range(runs + 1):
    model.reset()
    start = time.perf_counter()
    model.eval(tokens[:-steps])
    middle = time.perf_counter()
    for token in tokens[-steps:]:
        model.eval([token])
    if run:
        prefill.append(middle - start)
        decode.append((time.perf_counter() - middle) / steps)
print(json.dumps([statistics.median(prefill), statistics.median(decode)]))
"""


def measure(python: str, tokens: int, runs: int) -> tuple[float, float]:
    """Seconds of the prefill, and of a decoded token at the end of `tokens`."""
    checkpoint = locate(None)
    row = windows_of(load_tokenizer(checkpoint), read_text(None).text, length=tokens, needed={"row": 1})["row"][0]
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "tokens.json"
        ids.write_text(json.dumps(row.tolist()))
        weights = distribution(DEFAULT_PACKAGE).locate_file(DEFAULT_FILE)
        done = subprocess.run([python, "-c", CODE, str(weights), str(ids), str(STEPS), str(runs),
                               str(torch.get_num_threads())], stdout=subprocess.PIPE, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measures each length and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 8000])
    parser.add_argument("--runs", type=int, default=RUNS)
    asked = parser.parse_args()
    lines = []
    for tokens in asked.tokens:
        prefill, decode = measure(asked.python, tokens, asked.runs)
        print(json.dumps({"bench": "llama", "tokens": tokens, "prefill_s": prefill, "decode_s": decode}), flush=True)
        lines.append([f"{tokens:,}", f"{prefill:.2f}", f"{(tokens - STEPS) / prefill:,.0f}", f"{1000 * decode:.1f}",
                      f"{1 / decode:.1f}"])
    head = ["tokens", "prefill s", "prefill tokens a second", "ms a decoded token", "decoded tokens a second"]
    write_result("llama", __doc__, [table(head, lines)])


if __name__ == "__main__":
    main()
