"""From which length on does pruning pay, and what does it cost below?

Run from the repository's root: python -m benchmarks.bench_lengths

One plan, the same rule in every layer, on prompts of growing length: seconds of a prefill (cache filled, last token's
logits), dense through transformers' sdpa path and pruned, in turn; then seconds of one decoded token after the prompt,
where the room keeps everything. Choosing is included. The density is what the rule kept of the prompt.
"""

import argparse
import statistics
from functools import partial

import torch
from torch import nn

from benchmarks.publish import table, write_result
from sentei.axes.connections import Config
from sentei.conversion import wrapper
from sentei.conversion.checkpoints import load_model, load_tokenizer, locate
from sentei.conversion.plan import Plan, convert, prunable_layers
from sentei.core.rules import Threshold
from sentei.core.tracing import trace
from sentei.measurement.latency import interleave
from sentei.measurement.text import read_text, windows_of

LENGTHS = (256, 512, 1024, 2048, 4096)
RULE = Threshold(0.02)


@torch.no_grad()
def prefill(model: nn.Module, ids: torch.Tensor) -> object:
    """Reads the prompt and returns the cache."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def decode(model: nn.Module, cache, token: torch.Tensor) -> None:
    """Reads one more token and forgets it again."""
    model(input_ids=token, past_key_values=cache, use_cache=True)
    cache.crop(cache.get_seq_length() - 1)


def ratio(model: nn.Module, work, runs: int) -> tuple[str, str, str]:
    """Median seconds dense and pruned in milliseconds, and the median of the pairs' ratios with its range."""
    found = interleave(work, work, runs=runs, before=(lambda: wrapper.use(model, "sdpa"),
                                                      lambda: wrapper.use(model, wrapper.IMPLEMENTATION)))
    dense, pruned = (f"{1000 * seconds:,.1f}" for seconds in found.seconds())
    ratios = found.ratios()
    return dense, pruned, f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Measures every length and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as for `sentei prune`")
    parser.add_argument("--runs", type=int, default=5, help="pairs of a prefill; of a decoded token ten times as many")
    arguments = parser.parse_args()
    checkpoint = locate(arguments.model)
    model, text = load_model(checkpoint), read_text(None)
    ids = windows_of(load_tokenizer(checkpoint), text.text, length=max(LENGTHS) + 1, needed={"time": 1})["time"]
    convert(model, Plan.everywhere(prunable_layers(model), "connections", Config(rule=RULE)))
    lines = []
    for length in LENGTHS:
        prompt, token = ids[:, :length], ids[:, length:length + 1]
        with trace(model) as records:
            cache = prefill(model, prompt)
        lines.append([f"{length:,}", f"{records.density():.2f}",
                      *ratio(model, partial(prefill, model, prompt), arguments.runs),
                      *ratio(model, partial(decode, model, cache, token), 10 * arguments.runs)])
        print(" | ".join(lines[-1]), flush=True)
    head = ["prompt", "density", "prefill dense ms", "pruned ms", "dense ÷ pruned", "token dense ms", "pruned ms",
            "dense ÷ pruned"]
    write_result("lengths", __doc__, [f"{checkpoint.name}, float32, {RULE} in every layer.", table(head, lines)])


if __name__ == "__main__":
    main()
