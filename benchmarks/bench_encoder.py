"""An encoder with narrower feed-forward layers: how alike its sentence embeddings stay, and how much faster it is.

Run from the repository's root: python -m benchmarks.bench_encoder FOLDER

FOLDER holds an encoder of BERT's architecture, as MiniLM. Every layer keeps the same share of its neurons, those that
are worth most on other windows of the text (room `weights`, saliency obs), and its last matrix is fitted anew by least
squares; nothing is trained, and the result is an ordinary, smaller encoder. "Cosine" is between the embeddings of both
models, their last states' means over all tokens of a window, with the 95 % interval over windows. Times are of one
window, dense and narrower in turn.
"""

import argparse
import copy
import hashlib
import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks.publish import table, write_result
from sentei.axes.weights import Config, Network, from_dense
from sentei.conversion.checkpoints import load_model, load_tokenizer, locate
from sentei.core.rules import TopK
from sentei.geometry.intervals import mean_interval
from sentei.kernels.linear.calibration import Calibration, calibrate
from sentei.measurement.latency import interleave
from sentei.measurement.quality import embedding_of
from sentei.measurement.text import read_text, windows_of

SHARES = (0.96875, 0.9375, 0.875, 0.75, 0.5)
STEP = 32  # a width is a multiple of so many neurons
WINDOWS = {"calibrate": 8, "judge": 24}


def embeddings(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """The means of the last states, float64 [N, width]."""
    return torch.cat([embedding_of(model, row[None]) for row in rows])


def calibrated(model: nn.Module, rows: torch.Tensor) -> dict[str, Calibration]:
    """What the last matrix of every feed-forward layer is given, by the layer's number."""
    with calibrate({str(number): layer.output.dense for number, layer in enumerate(model.encoder.layer)}) as seen:
        embeddings(model, rows)
    return seen


def narrower(model: nn.Module, seen: dict[str, Calibration], share: float) -> nn.Module:
    """A copy of an encoder whose feed-forward layers keep this share of their neurons, in multiples of STEP."""
    made = copy.deepcopy(model)
    for number, layer in enumerate(made.encoder.layer):
        up, down, known = layer.intermediate.dense, layer.output.dense, seen[str(number)]
        kept = min(max(STEP, STEP * round(share * up.out_features / STEP)), up.out_features)
        network = Network(up, down, activation=layer.intermediate.intermediate_act_fn)
        found = from_dense(network, Config(rule=TopK(kept), saliency="obs"), known).fix(known).layer
        layer.intermediate.dense, layer.output.dense = found.up, found.down
        made.config.intermediate_size = found.up.out_features
    return made


def nameless(words: list[str], folder: Path) -> list[str]:
    """The words of a command line without the folder, however it was written: a page names no folders."""
    return ["FOLDER" if Path(word) == folder else word for word in words]


def identity(model: nn.Module) -> str:
    """Which model it is, without its name: its sizes, and the beginning of the SHA-256 of its weights in float32."""
    digest, config = hashlib.sha256(), model.config
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + parameter.detach().float().contiguous().numpy().tobytes())
    return (f"{config.num_hidden_layers} layers, width {config.hidden_size}, feed-forward layers of "
            f"{config.intermediate_size} neurons, a vocabulary of {config.vocab_size:,}, weights "
            f"{digest.hexdigest()[:16]}")


def main() -> None:
    """Measures every share and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--runs", type=int, default=15)
    arguments = parser.parse_args()
    sys.argv = nameless(sys.argv, arguments.folder)
    checkpoint, text = locate(str(arguments.folder)), read_text(None)
    model = load_model(checkpoint)
    rows = windows_of(load_tokenizer(checkpoint), text.text, length=arguments.tokens, needed=WINDOWS)
    seen, dense, lines = calibrated(model, rows["calibrate"]), embeddings(model, rows["judge"]), []
    for share in SHARES:
        made, row = narrower(model, seen, share), rows["judge"][:1]
        alike = nn.functional.cosine_similarity(dense, embeddings(made, rows["judge"]))
        cosine, low, high = mean_interval(alike.tolist())
        timed = interleave(lambda: model(input_ids=row), lambda: made(input_ids=row), runs=arguments.runs)  # noqa: B023
        ratios = timed.ratios()
        lines.append([f"{made.config.intermediate_size}", f"{cosine:.4f}", f"{low:.4f} to {high:.4f}",
                      f"{timed.speedup():.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"])
        print(" | ".join(lines[-1]), flush=True)
    write_result("encoder", __doc__, [
        f"{identity(model)}; {arguments.tokens} tokens a window, {WINDOWS['judge']} windows "
        f"judged and {WINDOWS['calibrate']} calibrated on, of {text.name}; {arguments.runs} pairs of runs.",
        table(["neurons", "cosine", "95 %", "times as fast", "pairs of runs"], lines)])


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
