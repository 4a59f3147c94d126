"""optipfair prunes a model: python run_optipfair.py MODEL CALIBRATION PER_CENT OUT.

It knows nothing of sentei. So many per cent of the neurons of every gated network go, by the package's own default
(peak-to-peak size of the weights) together with activations on the calibration text, which it calls hybrid. What is
left is told by comparing weights.
"""

import json
import sys

import optipfair
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

folder, calibration, amount, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
dense = [layer.mlp.up_proj.weight.detach().clone() for layer in model.model.layers]
rows = load_file(calibration)["tokens"]
batches = torch.utils.data.DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows])
pruned = optipfair.prune_model(model, pruning_percentage=float(amount), dataloader=batches, show_progress=False)
neurons = []
for before, layer in zip(dense, pruned.model.layers, strict=True):
    after, kept = layer.mlp.up_proj.weight, []
    for number, row in enumerate(before):
        if len(kept) < len(after) and torch.equal(row, after[len(kept)]):
            kept.append(number)
    assert len(kept) == len(after), "rows of other weights"
    neurons.append(kept)
with open(out, "w", encoding="utf-8") as file:
    json.dump({"package": f"optipfair {optipfair.__version__}", "neurons": neurons}, file)
