"""economize leaves layers out one by one, by SLEB (2402.09025): python run_sleb.py MODEL CALIBRATION NUMBER OUT.

It knows nothing of sentei. Each time the layer goes without which the calibration text is foretold best; of that the
first TOKENS of every window are read, for the sake of time. OUT has the layers in the order in which they go; it goes
on from what is there.
"""

import json
import sys
from pathlib import Path

import economize
import torch
from economize.arch import adapter_for
from economize.techniques.prune import DepthPruneConfig, depth_prune_model
from economize.techniques.prune.depth import remove_layers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOKENS = 128

folder, calibration, number, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
rows = load_file(calibration)["tokens"][:, :TOKENS]
adapter, path = adapter_for(model), Path(out)
every = list(range(adapter.num_layers))
gone = json.loads(path.read_text())["gone"] if path.exists() else []
if gone:
    remove_layers(adapter, sorted(layer + 1 for layer in gone))
while len(gone) < int(number):
    place, = depth_prune_model(adapter, DepthPruneConfig(method="sleb", num_blocks=1), list(rows[:, None]))
    gone.append([layer for layer in every if layer not in gone][place - 1])
    path.write_text(json.dumps({"package": f"economize {economize.__version__}", "gone": gone}))
    print(gone, flush=True)
