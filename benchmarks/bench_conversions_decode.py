"""Is a token decoded faster with one key/value head a layer, and with fewer neurons?

Run from the repository's root: python -m benchmarks.bench_conversions_decode --tokens 8000

The default model behind a cache of random keys and values. "transformers" is its sdpa path with its own cache, in which
one key/value head is a plain checkpoint; "ours" keeps every key and has our cache and few-row layers. Which neurons are
chosen does not matter to the time, so that nothing is calibrated here (quality: bench_conversions). All take turns in
one process; a time is the least over the rounds of the mean of a round's steps, because others may be at work on the
machine, and a gain the first row of the same kind ÷ this one. Cache is bytes of keys and values a token.
"""

import argparse
import gc
import time

import torch
from torch import nn

from benchmarks.publish import table, write_result
from sentei.axes.connections import Config as Connections
from sentei.axes.experts import Config as Experts
from sentei.axes.heads import Config as Heads
from sentei.axes.heads import cache_bytes
from sentei.conversion.checkpoints import DTYPES, load_model, locate
from sentei.conversion.layers import layers_of
from sentei.conversion.plan import Plan, convert
from sentei.conversion.statistics import Activity, Statistics
from sentei.core.rules import Threshold, TopK

STEPS = 8
SHARES = (0.5, 0.25)


def plans(model: nn.Module) -> dict[str, Plan]:
    """What is timed, by name."""
    layers = range(model.config.num_hidden_layers)

    def of(room: str, config: object) -> Plan:
        return Plan.everywhere(layers, room, config)

    exact, merged = of("connections", Connections(decode=Threshold(0.0))), of("heads", Heads(num_kv_heads=1))
    fewer = {share: of("experts", Experts(rule=TopK(round(share * model.config.intermediate_size)), unit=1))
             for share in SHARES}
    return {"transformers": Plan(), "transformers, heads → 1": merged, "ours": exact,
            "ours, heads → 1": Plan(exact.entries + merged.entries),
            **{f"ours, {share:.0%} of the neurons": Plan(exact.entries + plan.entries)
               for share, plan in fewer.items()},
            f"ours, heads → 1, {SHARES[-1]:.0%} of the neurons": Plan(
                exact.entries + merged.entries + fewer[SHARES[-1]].entries)}


def cache_of(model: nn.Module, tokens: int) -> object:
    """transformers' cache of random keys and values for the heads that the model now has."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(model.model.layers):
        heads = layer.self_attn.k_proj.out_features // layer.self_attn.head_dim
        numbers = torch.randn(1, heads, 1, layer.self_attn.head_dim).to(model.dtype)
        numbers = numbers * torch.randn(1, 1, tokens, 1).to(model.dtype)
        cache.update(numbers, numbers.clone(), index)
    return cache


def seconds(model: nn.Module, tokens: int) -> float:
    """The mean of STEPS decoded tokens, after one in which the cache takes its final form."""
    cache, token = cache_of(model, tokens), torch.tensor([[5]])
    model(input_ids=token, past_key_values=cache, use_cache=True)
    start = time.perf_counter()
    for _ in range(STEPS):
        model(input_ids=token, past_key_values=cache, use_cache=True)
    return (time.perf_counter() - start) / STEPS


def ones(model: nn.Module) -> Statistics:
    """As if every gate multiplied numbers of the same size."""
    seen = Statistics()
    for layer in layers_of(model):
        seen[layer.index, "network_neurons"] = state = Activity(layer.network.down_proj.in_features)
        state.see(torch.ones(1, len(state.squares)))
    return seen


def rows(model: nn.Module, tokens: int, rounds: int) -> list[list[str]]:
    """A row for every plan."""
    chosen, seen = plans(model), ones(model)
    found = {name: [] for name in chosen}
    for _ in range(rounds):
        for name, plan in chosen.items():
            convert(model, plan, seen)
            found[name].append(seconds(model, tokens))
            gc.collect()
    lines, config = [], model.config
    for name, times in found.items():
        first = found[name.partition(",")[0]]
        gain = min(first) / min(times)
        kept = 1 if "heads" in name else config.num_key_value_heads
        each = config.num_hidden_layers * cache_bytes(kept, model.model.layers[0].self_attn.head_dim, model.dtype)
        lines.append([name, f"{1000 * min(times):.1f}", f"**{gain:.2f}**", f"{each:,}"])
        print(" | ".join(lines[-1]), flush=True)
    return lines


@torch.no_grad()
def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000, help="in the cache")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    checkpoint = locate(None)
    lines = rows(load_model(checkpoint, asked.dtype), asked.tokens, asked.rounds)
    write_result(f"conversions-decode-{asked.tokens}-{asked.dtype}", __doc__, [
        f"{checkpoint.name}, {asked.dtype}, {asked.tokens:,} tokens in the cache.",
        table(["what", "ms a token", "gain", "cache, bytes a token"], lines)])


if __name__ == "__main__":
    main()
