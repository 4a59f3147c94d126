"""A dense network put into experts as CMoE (arXiv 2502.04416): python run_cmoe.py MODEL CALIBRATION NUMBER OUT.

Written from the paper's formulas; it needs scipy for the exact assignment, and knows nothing of sentei. Of EXPERTS
experts of equal size NUMBER are for all tokens and each token chooses as many. Nothing is trained.

    h = silu(x̂ Ĝᵀ) · (x̂ Ûᵀ)     inputs and rows of the weights of norm 1
    A[t, f] = 1 where |h[t, f]| is among the MARKED largest of its token
    shared: the neurons with the largest mean of A; the others: one round of balanced 1-means of the columns of A, by
    linear assignment, from the most active ones; an expert's router is its neuron nearest to the centre.
"""

import json
import sys

import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from transformers import AutoModelForCausalLM

EXPERTS, MARKED = 16, 10


def split(marks, shared):
    """Int64: shared neurons [S], experts [E, U], routers [E], of marks bool [tokens, F]."""
    size = marks.shape[1] // EXPERTS
    order = marks.mean(0).argsort(descending=True, stable=True)
    always, others = order[:shared * size].sort().values, order[shared * size:]
    columns = marks[:, others].T.contiguous()
    number = EXPERTS - shared
    # Each centre stands `size` times on the other side of the assignment, so that the groups come out equal.
    far = torch.cdist(columns, columns[:number], p=1)
    places = torch.as_tensor(linear_sum_assignment(far.repeat_interleave(size, 1).numpy())[1]) // size
    experts, routers = [], []
    for expert in range(number):
        own = (places == expert).nonzero()[:, 0]
        middle = columns[own].mean(0)
        routers.append(others[own[(columns[own] - middle).abs().sum(1).argmin()]])
        experts.append(others[own].sort().values)
    return always, torch.stack(experts), torch.stack(routers)


@torch.no_grad()
def main():
    """Marks, splits and writes."""
    folder, calibration, number, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    marks = {index: [] for index in range(len(model.model.layers))}

    def listen(index, network):
        gate, up = (torch.nn.functional.normalize(linear.weight, dim=1)
                    for linear in (network.gate_proj, network.up_proj))

        def hook(_, given):
            x = torch.nn.functional.normalize(given[0].flatten(0, -2), dim=1)
            size = (network.act_fn(x @ gate.T) * (x @ up.T)).abs()
            marks[index].append(torch.zeros_like(size).scatter_(1, size.topk(MARKED, dim=1).indices, 1.0))

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(listen(index, layer.mlp))
    for row in load_file(calibration)["tokens"]:
        model.model(input_ids=row[None], use_cache=False)
    parts = [split(torch.cat(found), int(number)) for found in marks.values()]
    names = "shared", "experts", "routers"
    layers = [{name: ids.tolist() for name, ids in zip(names, part, strict=True)} for part in parts]
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"package": "CMoE from the paper's formulas", "experts": layers, "active": int(number)}, file)


if __name__ == "__main__":
    main()
