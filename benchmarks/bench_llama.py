"""What does a user get on the same weights: tokens a second of llama.cpp, of transformers, of sentei's exact kernels?

Run from the repository's root: python -m benchmarks.bench_llama PYTHON, where PYTHON is the interpreter of an
environment with llama-cpp-python. It reads the 4-bit GGUF file as it stands; transformers and sentei unpack the same
file to float32 or bfloat16 and keep every key. So this compares what a user gets, and not kernels: of weights llama.cpp
moves a sixth of float32's bytes, and it rounds what it multiplies with them to 8 bits. llama.cpp attends in two ways,
both are here: plainly, its Python package's default, and `flash_attn`. All sides run in turn, on the same tokens with
the same number of threads, after a short untimed run: the prompt is read, a token is written, and STEPS more are timed.
Medians; in brackets the range where there are several runs.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import product

import torch
from torch import nn

from benchmarks.publish import table, write_result
from sentei.axes.connections import Config
from sentei.conversion import embedded
from sentei.conversion.checkpoints import load_model, load_tokenizer, locate
from sentei.conversion.plan import Plan, convert, prunable_layers
from sentei.core.rules import All, Threshold
from sentei.measurement.text import read_text, windows_of

STEPS, SHORT = 32, 96
# What runs in the other environment; it knows nothing of sentei. For a line of tokens it gives a line of two times.
CODE = """
import json, sys, time
from llama_cpp import Llama, llama_print_system_info
path, tokens, steps, threads, flash = sys.argv[1], *map(int, sys.argv[2:])
model = Llama(path, n_ctx=tokens + 8, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False,
              flash_attn=bool(flash))
print(llama_print_system_info().decode(), flush=True)
for line in sys.stdin:
    tokens = json.loads(line)
    model.reset()
    start = time.perf_counter()
    model.eval(tokens[:-steps - 1])
    middle = time.perf_counter()
    model.eval([tokens[-steps - 1]])
    warm = time.perf_counter()
    for token in tokens[-steps:]:
        model.eval([token])
    print(json.dumps([middle - start, (time.perf_counter() - warm) / steps]), flush=True)
"""
Side = Callable[[torch.Tensor], tuple[float, float]]  # seconds of the prefill, and of a decoded token after it


def llama(held: ExitStack, python: str, tokens: int, flash: bool) -> tuple[Side, str]:
    """llama.cpp in a process of its own, and what it says of its instruction sets."""
    given = [str(number) for number in (tokens, STEPS, torch.get_num_threads(), int(flash))]
    child = held.enter_context(subprocess.Popen([python, "-c", CODE, str(embedded.path()), *given], text=True,
                                                stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    held.callback(child.stdin.close)
    system = child.stdout.readline().strip()

    def run(row: torch.Tensor) -> tuple[float, float]:
        print(json.dumps(row.tolist()), file=child.stdin, flush=True)
        return tuple(json.loads(child.stdout.readline()))

    return run, system


@torch.no_grad()
def read_and_write(model: nn.Module, plan: Plan, row: torch.Tensor) -> tuple[float, float]:
    """A model of transformers with a plan."""
    convert(model, plan)
    prompt, (warm, *tokens) = row[:-STEPS - 1], row[-STEPS - 1:].split(1)
    start = time.perf_counter()
    cache = model(input_ids=prompt[None], use_cache=True, logits_to_keep=1).past_key_values
    middle = time.perf_counter()
    model(input_ids=warm[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    begin = time.perf_counter()
    for token in tokens:
        model(input_ids=token[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return middle - start, (time.perf_counter() - begin) / STEPS


def sides(held: ExitStack, asked: argparse.Namespace, tokens: int) -> tuple[dict[str, Side], str]:
    """Everyone by name, and what llama.cpp says of its instruction sets."""
    found: dict[str, Side] = {}
    system = ""
    for flash in (False, True):
        found[f"llama.cpp, 4-bit weights{', flash_attn' * flash}"], system = llama(held, asked.python, tokens, flash)
    for dtype, name in product(asked.dtype or ("float32", "bfloat16"), ("transformers", "sentei, exact")):
        if name == "transformers":
            model = load_model(locate(None), dtype)
            plan = Plan()
        else:
            plan = Plan.everywhere(prunable_layers(model), "connections", Config(rule=All(), decode=Threshold(0.0)))
        found[f"{name}, {dtype}"] = partial(read_and_write, model, plan)
    return found, system


def shown(rates: list[float]) -> str:
    """A rate's median and range."""
    middle = f"{statistics.median(rates):,.0f}" if min(rates) > 100 else f"{statistics.median(rates):,.1f}"
    return f"**{middle}**" + (f" ({min(rates):,.1f} to {max(rates):,.1f})" if len(rates) > 1 else "")


def measure(asked: argparse.Namespace, tokens: int) -> tuple[list[list[str]], str]:
    """The lines of one length, and what llama.cpp says of its instruction sets."""
    checkpoint = locate(None)
    row = windows_of(load_tokenizer(checkpoint), read_text(None).text, length=tokens, needed={"row": 1})["row"][0]
    with ExitStack() as held:
        named, system = sides(held, asked, tokens)
        seconds = {name: [] for name in named}
        for turn in range(asked.runs + 1):
            for name, run in named.items() if turn % 2 else reversed(named.items()):
                spent = run(row if turn else row[:SHORT])
                print(json.dumps({"bench": "llama", "tokens": tokens, "side": name, "timed": turn > 0,
                                  "prefill_s": spent[0], "decode_s": spent[1]}), flush=True)
                seconds[name] += [spent] if turn else []
    return [[f"{tokens:,}", name, shown([(tokens - STEPS - 1) / prefill for prefill, _ in spent]),
             shown([1 / decode for _, decode in spent])] for name, spent in seconds.items()], system


def main() -> None:
    """Measures each length and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 8000])
    parser.add_argument("--dtype", action="append", help="of transformers and sentei; float32 and bfloat16")
    parser.add_argument("--runs", type=int, default=2, help="timed runs a side")
    asked = parser.parse_args()
    measured = [measure(asked, tokens) for tokens in asked.tokens]
    head = ["tokens", "side", "prompt tokens a second", "written tokens a second, at its end"]
    lines = table(head, [line for lines, _ in measured for line in lines])
    write_result(f"llama-{'-'.join(map(str, asked.tokens))}", __doc__, [lines, f"llama.cpp says: {measured[0][1]}"])


if __name__ == "__main__":
    main()
