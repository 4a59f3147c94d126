"""What minutes of healing buy a pretrained model whose key/value heads, or a quarter of its neurons, are gone.

Run from the repository's root: python -m benchmarks.bench_healing heads --minutes 10

The plan is one for every layer: "heads" merges all key/value heads into one (jointly, by least squares), "width" keeps
three quarters of the neurons (by OBS score, refitted). It is then healed as `sentei prune --heal` heals: low-rank
changes of all linear layers, KL from the dense model, on all of the text but the windows that are judged. "Ratio" is
the perplexity over that of the dense model on those windows. The clock is the processor time of this process, so that
what else runs on the machine takes no minutes away.
"""

import math
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import subject
from benchmarks.publish import table, write_result
from sentei.axes.heads import Config as Heads
from sentei.axes.weights import Config as Weights
from sentei.budget import distilled
from sentei.budget.calibration import calibrate
from sentei.conversion.checkpoints import load_tokenizer, locate
from sentei.conversion.plan import Plan, wanted
from sentei.conversion.student import adapted, settled, student_of
from sentei.core.rules import TopK
from sentei.measurement.quality import compare, token_losses
from sentei.measurement.text import read_text
from sentei.training.healing import Config, Texts, heal

KEPT, CALIBRATE = 0.75, 6


def plan_of(name: str, model: torch.nn.Module) -> Plan:
    """The same room in every layer."""
    neurons = round(KEPT * model.config.intermediate_size)
    return Plan.everywhere(range(model.config.num_hidden_layers), *{
        "heads": ("heads", Heads(num_kv_heads=1, merge="joint")),
        "width": ("weights", Weights(rule=TopK(neurons), saliency="obs"))}[name])


def main() -> None:
    """Heals and writes the table."""
    parser = subject.parser(__doc__)
    parser.set_defaults(tokens=512, windows=4)
    parser.add_argument("plan", choices=("heads", "width"))
    parser.add_argument("--minutes", type=float, default=10.0, help="of processor time")
    parser.add_argument("--work", type=Path, help="folder for checkpoints, from which a run that was killed goes on")
    arguments = parser.parse_args()
    measured = subject.load(arguments, tune=CALIBRATE)
    model, windows, plan = measured.model, measured.windows, plan_of(arguments.plan, measured.model)
    rows = distilled.text_for(load_tokenizer(locate(arguments.model)), read_text(arguments.text).text,
                            {"judge": windows, "calibrate": measured.others}, distilled.CONTEXT)
    student, dtypes = student_of(model, plan, calibrate(model, measured.others, wanted(plan)))
    dense, before = token_losses(model, windows), token_losses(student, windows)
    config = Config(minutes=arguments.minutes)
    torch.manual_seed(config.seed)
    adapted(student, config.rank)
    with tempfile.TemporaryDirectory() as folder:
        found = heal(model, student, Texts(rows=rows, checks=windows, seed=config.seed), config,
                     arguments.work or Path(folder), job={}, step=lambda note: print(note, flush=True),
                     now=time.process_time)
    settled(student, dtypes)
    after = token_losses(student, windows)
    lines = [[name, f"{quality.pruned:.2f}", f"{1 / quality.value:.3f}",
              f"{1 / quality.high:.3f} to {1 / quality.low:.3f}"]
             for name, quality in (("unhealed", compare(dense, before)), ("healed", compare(dense, after)))]
    bought = [[f"{row['minutes']:.2f}", f"{row['step']:,}", f"{row['tokens']:,}", f"{row['perplexity']:.2f}",
               f"{1 / row['quality']:.3f}"] for row in found.table]
    write_result(f"healing-{arguments.plan}", __doc__, [
        f"{measured.title} Calibrated on {CALIBRATE} other windows; healed on {rows.numel():,} tokens of the same "
        f"text, {config.batch} × {rows.shape[1]} a step, rank {config.rank.rank}, rate {config.optimizer.rate:g}. "
        f"Dense perplexity {math.exp(dense.mean()):.2f}.",
        table(["model", "perplexity", "ratio", "95 %"], lines),
        table(["minutes", "steps", "tokens", "perplexity", "ratio"], bought)])


if __name__ == "__main__":
    main()
