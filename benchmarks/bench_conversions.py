"""What fewer key/value heads and fewer neurons a token cost a pretrained model that nobody trains afterwards.

Run from the repository's root: python -m benchmarks.bench_conversions

One calibration pass over windows that share no token with those judged. Key/value heads are merged into one in every
layer, by the mean of their projections (Ainslie et al. 2023) and jointly, by least squares on scores and outputs; and
jointly in the layers that lose least by their own account. Neurons are chosen for every token by what their gates say,
at a share of them that is the same in every layer; gates are always read. "Ratio" is the perplexity over that of the
dense model on the same tokens, with its 95 % interval.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks import subject
from benchmarks.publish import table, write_result
from sentei.axes.experts import Config as Experts
from sentei.axes.heads import Config as Heads
from sentei.budget.calibration import calibrate
from sentei.conversion.plan import Plan, convert, wanted
from sentei.conversion.rooms.heads import LOST
from sentei.core.rules import TopK
from sentei.measurement.quality import compare, token_losses

JOINT, MEAN = Heads(num_kv_heads=1, merge="joint"), Heads(num_kv_heads=1)
SHARES = (0.75, 0.5, 0.375, 0.25)
PARTS = (1 / 3, 2 / 3)  # of the layers, those that lose least
NAME = {"heads": "{} of {} layers: key/value heads → 1, {}", "experts": "neurons kept by a token: {:.1%}"}


def neurons(model: nn.Module, share: float) -> Plan:
    """Every layer's tokens keep this share of its neurons."""
    rule = TopK(round(share * model.config.intermediate_size))
    return Plan.everywhere(range(model.config.num_hidden_layers), "experts", Experts(rule=rule, unit=1))


def plans(model: nn.Module) -> Iterator[tuple[str, Plan]]:
    """Names and plans; the third and later need `model` converted by the second."""
    layers = range(model.config.num_hidden_layers)
    for name, config in (("mean", MEAN), ("joint", JOINT)):
        yield NAME["heads"].format(len(layers), len(layers), name), Plan.everywhere(layers, "heads", config)
    lost = {i: sum(getattr(model.model.layers[i].self_attn, LOST)) for i in layers}
    for part in PARTS:
        chosen = sorted(layers, key=lost.get)[:round(part * len(layers))]
        yield NAME["heads"].format(len(chosen), len(layers), "joint"), Plan.everywhere(sorted(chosen), "heads", JOINT)
    for share in SHARES:
        yield NAME["experts"].format(share), neurons(model, share)


def cache_share(model: nn.Module) -> float:
    """Bytes of keys and values a token holds ÷ those of the dense model."""
    dense = model.config.num_hidden_layers * model.config.num_key_value_heads * model.model.layers[0].self_attn.head_dim
    return sum(layer.self_attn.k_proj.out_features for layer in model.model.layers) / dense


def main() -> None:
    """Measures every plan and writes the table."""
    parser = subject.parser(__doc__)
    parser.set_defaults(tokens=512, windows=6)
    parser.add_argument("--calibrate", type=int, default=8, help="windows of the calibration pass")
    arguments = parser.parse_args()
    measured = subject.load(arguments, tune=arguments.calibrate)
    model, windows = measured.model, measured.windows
    everything = Plan((*Plan.everywhere(range(model.config.num_hidden_layers), "heads", JOINT).entries,
                       *neurons(model, 0.5).entries))
    seen = calibrate(model, measured.others, wanted(everything))
    dense, lines = token_losses(model, windows), []
    print(f"dense {math.exp(dense.mean()):.2f}", flush=True)
    for name, plan in plans(model):
        convert(model, plan, seen)
        found = compare(dense, token_losses(model, windows))
        lines.append([name, f"{found.pruned:.2f}", f"{1 / found.value:.3f}",
                      f"{1 / found.high:.3f} to {1 / found.low:.3f}", f"{cache_share(model):.2f}"])
        print(" | ".join(lines[-1]), flush=True)
    convert(model, Plan())
    write_result("conversions", __doc__, [
        f"{measured.title} Calibrated on {arguments.calibrate} other windows of the same text. Dense perplexity "
        f"{math.exp(dense.mean()):.2f}.", table(["plan", "perplexity", "ratio", "95 %", "cache, share"], lines)])


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
