"""optipfair prunes a model: python run_optipfair.py MODEL CALIBRATION WIDTH_OR_DEPTH AMOUNT OUT.

It knows nothing of sentei. WIDTH: AMOUNT per cent of the neurons of every gated network, by the package's own default
(peak-to-peak size of the weights) together with activations on the calibration text, which it calls hybrid. DEPTH:
AMOUNT layers, the least important by `analyze_layer_importance` on that text, as its README goes about it.
"""

import json
import sys

import optipfair
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, calibration, kind, amount, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
rows = load_file(calibration)["tokens"]
batches = torch.utils.data.DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows])
layers = list(range(model.config.num_hidden_layers))
if kind == "depth":
    scores = optipfair.analyze_layer_importance(model, batches, show_progress=False)
    gone = sorted(scores, key=scores.get)[:int(amount)]
    kept = [layer for layer in layers if layer not in gone]
    pruned = optipfair.prune_model(model, pruning_type="DEPTH", layer_indices=gone, show_progress=False)
    assert len(pruned.model.layers) == len(kept)
    state = {}
else:
    kept = layers
    pruned = optipfair.prune_model(model, pruning_percentage=float(amount), dataloader=batches, show_progress=False)
    state = {name: tensor.contiguous() for name, tensor in pruned.state_dict().items()
             if tensor.shape != dense[name].shape or not torch.equal(tensor, dense[name])}
save_file(state, out, {"kept": json.dumps(kept), "package": json.dumps(f"optipfair {optipfair.__version__}")})
