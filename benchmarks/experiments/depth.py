"""Dense against Mixture-of-Depths at equal training FLOPs: half and an eighth of the bytes pass a block.

Every other of four blocks is dense, as the paper recommends (2404.02258). What a byte saves is spent on more bytes.
"Two layers" is a static choice: two of the blocks for every byte. Held-out losses are those of the causal predictor, as
in generation; the second table has those of the choice along the sequence, which training uses, and which sees later
bytes.
"""

import statistics

import torch

from benchmarks.experiments.harness import Experiment, Place, Variant, carry_out, trained
from benchmarks.experiments.parts import transformer
from benchmarks.publish import table
from sentei.axes import depth
from sentei.core.rules import Capacity
from sentei.core.tracing import trace
from sentei.model import Transformer
from sentei.training.losses import window_losses

SHAPE = {"width": 96, "heads": (4, 4), "feed_forward": 192}


def mixture_of_depths(share: float) -> Transformer:
    """Two dense blocks and two that a share of the bytes passes, in turn."""
    model = transformer(**SHAPE, layers=4, depth=depth.Config(rule=Capacity(share)))
    dense = transformer(**SHAPE, layers=4)
    for number in (0, 2):
        model.blocks[number] = dense.blocks[number]
    return model


def routed(share: float) -> Variant:
    """Mixture-of-Depths in every other block."""
    return Variant(make=lambda: mixture_of_depths(share), about=f"{share:.1%} pass every other block")


def layers(number: int) -> Variant:
    """The dense model."""
    return Variant(make=lambda: transformer(**SHAPE, layers=number), about="every byte passes every block")


ROUTED = {"half": routed(0.5), "an eighth": routed(0.125)}
EXPERIMENT = Experiment(name="depth", text=("code", "prose", "french"), flops=1.0e12, seeds=3,
                        variants={"dense": layers(4), "two layers": layers(2), **ROUTED})


def along(place: Place) -> str:
    """What the predictor keeps and what it costs, a line a variant: means over seeds."""
    lines = []
    for name in ROUTED:
        shares, causal, training = [], [], []
        for seed in range(EXPERIMENT.seeds):
            model, found = trained(EXPERIMENT, name, seed, place)
            held = place.windows(EXPERIMENT, seed).held_out()
            with torch.no_grad(), trace(model) as records:
                model(held[:32, :-1])
            choices = [record.selection for record in records if "block" not in record.path.split(".")]
            shares.append(sum(int(choice.count().sum()) for choice in choices)
                          / sum(int(choice.permitted.sum()) for choice in choices))
            causal.append(statistics.fmean(found["losses"]))
            training.append(window_losses(model.train(), held).mean().item())
        lines.append([name, f"{statistics.fmean(shares):.1%}", f"{statistics.fmean(causal):.4f}",
                      f"{statistics.fmean(training):.4f}"])
    return table(["variant", "kept by the predictor", "loss, predictor", "loss, choice along the sequence"], lines)


if __name__ == "__main__":
    carry_out(EXPERIMENT, __doc__, along)
