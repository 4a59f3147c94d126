"""Multi-head against grouped-query and multi-query attention at equal training FLOPs: loss and bytes of the cache.

8 query heads in every variant. Fewer key/value heads save their projections, which is spent on more bytes of text. How
fast each decodes, `sentei bench rooms heads` measures on the attention alone; here a token is decoded by the whole
model, over a cache of 8,192 bytes, all variants in turn.
"""

import statistics

import torch

from benchmarks.experiments.harness import Experiment, Place, Variant, carry_out, trained
from benchmarks.experiments.parts import transformer
from benchmarks.publish import table
from sentei.axes.heads import cache_bytes
from sentei.measurement.latency import interleave
from sentei.model import Transformer

SHAPE = {"width": 128, "layers": 2, "feed_forward": 256}
HEADS, KEYS, RUNS = 8, 8192, 15
NAMES = {"MHA": 8, "GQA": 2, "MQA": 1}


def variant(groups: int) -> Variant:
    """The model with so many key/value heads."""
    return Variant(make=lambda: transformer(**SHAPE, heads=(HEADS, groups)), about=f"{HEADS}/{groups} heads")


EXPERIMENT = Experiment(name="heads", text=("code", "prose", "french"), flops=1.0e12, seeds=3,
                        variants={name: variant(groups) for name, groups in NAMES.items()})


class Decoder:
    """Decodes one token after another behind a prompt of KEYS."""

    @torch.no_grad()
    def __init__(self, model: Transformer):
        self.model, self.cache = model, model.cache()
        self.model(torch.zeros(1, KEYS, dtype=torch.int64), cache=self.cache)
        self()  # the first makes room for the others

    @torch.no_grad()
    def __call__(self) -> None:
        """Decodes the next one."""
        self.model(torch.zeros(1, 1, dtype=torch.int64), cache=self.cache)


def decoding(place: Place) -> str:
    """Bytes of the cache and time of a token, a line a variant."""
    made = {name: Decoder(trained(EXPERIMENT, name, 0, place)[0]) for name in NAMES}
    whole, lines = made[EXPERIMENT.baseline], []
    for name, groups in NAMES.items():
        ours = made[name]
        timed = interleave(whole, ours, runs=RUNS)
        share, times = groups / HEADS, [1 / ratio for ratio in timed.ratios()]
        size = cache_bytes(groups, SHAPE["width"] // HEADS, torch.float32) * SHAPE["layers"]
        lines.append([name, f"{size:,}", f"{share:.1%}", f"{1e3 * timed.seconds()[1]:.2f}",
                      f"{statistics.median(times):.1%} ({min(times):.1%} to {max(times):.1%})"])
    return table(["variant", "cache, bytes a token", "of MHA's", "ms a decoded token", "of MHA's"], lines)


if __name__ == "__main__":
    carry_out(EXPERIMENT, __doc__, decoding)
