"""torch-pruning prunes a model: python run_torch_pruning.py MODEL CALIBRATION WHAT PER_CENT OUT.

It knows nothing of sentei. WHAT is "example", as in the package's own example for language models: the width of the
stream, the neurons and the heads by one ratio, from group magnitudes; "widths": the same without the heads; or
"network": the neurons alone, which that example does not do but which spares what hurts most. Magnitudes need no
calibration text. What is left is told by comparing weights.
"""

import json
import sys
from importlib.metadata import version

import torch
import torch_pruning as tp
from transformers import AutoModelForCausalLM


def kept(before, after):
    """The rows of one matrix that another is made of, in order."""
    found = []
    for number, row in enumerate(before):
        if len(found) < len(after) and torch.equal(row, after[len(found)]):
            found.append(number)
    assert len(found) == len(after), "rows of other weights"
    return found


folder, _, what, percent, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
model.config.use_cache = False
ratio, ends = float(percent) / 100, [model.lm_head]
dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
heads = {}
for layer in model.model.layers:
    attention = layer.self_attn
    if what == "example":
        heads[attention.q_proj] = model.config.num_attention_heads
        heads[attention.k_proj] = heads[attention.v_proj] = model.config.num_key_value_heads
    else:
        ends += [attention.q_proj, attention.k_proj, attention.v_proj]
    if what == "network":
        ends += [attention.o_proj, layer.mlp.down_proj]
if what == "network":
    ends.append(model.model.embed_tokens)
pruner = tp.pruner.BasePruner(
    model, example_inputs=torch.arange(8)[None], importance=tp.importance.GroupMagnitudeImportance(
        p=2, group_reduction="mean"), global_pruning=False, pruning_ratio=ratio, ignored_layers=ends, num_heads=heads,
    prune_num_heads=bool(heads), prune_head_dims=False, head_pruning_ratio=ratio if heads else 0.0,
    round_to=4, output_transform=lambda output: output.logits)
for group in pruner.step(interactive=True):
    group.prune()
stream = kept(dense["model.embed_tokens.weight"].T, model.model.embed_tokens.weight.detach().T)
neurons = [kept(dense[f"model.layers.{number}.mlp.up_proj.weight"][:, stream], layer.mlp.up_proj.weight)
           for number, layer in enumerate(model.model.layers)]
left = {"neurons": neurons} | ({"stream": stream} if what != "network" else {})
with open(out, "w", encoding="utf-8") as file:
    json.dump({"package": f"torch-pruning {version('torch-pruning')}", **left}, file)
