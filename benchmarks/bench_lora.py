"""LoRA: a training step and a forward pass, against PEFT on the same model and factors.

Both adapt every linear layer of each block of a random Llama, at the same rank, and read the same file of factors; the
losses are compared before anything is timed. Turns alternate. Memory is what a step keeps for its backward pass:
distinct storages that are no parameters. Needs `pip install peft --no-deps`.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.publish import table, write_result
from sentei.axes.rank import Config
from sentei.conversion.adapter_files import load, write
from sentei.conversion.adapters import adapters_of, add
from sentei.measurement.outcome import environment

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Case:
    """Rows and tokens of a batch, the rank, and what is timed: "step" or "forward"."""

    what: str
    rows: int
    tokens: int
    rank: int

    def __str__(self) -> str:
        return f"{self.what}, {self.rows} × {self.tokens} tokens, rank {self.rank}"


CASES = [Case("step", 4, 128, 8), Case("step", 4, 128, 64), Case("step", 1, 32, 8), Case("forward", 4, 128, 8),
         Case("forward", 1, 1, 8)]


def model() -> nn.Module:
    """The random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).train()


def both(rank: int) -> dict[str, nn.Module]:
    """The model with our adapters, and with those of PEFT, of the same numbers."""
    import peft

    ours, again = model(), model()
    add(ours, TARGETS, Config(rank=rank, alpha=2 * rank))
    for adapter in adapters_of(ours).values():
        nn.init.normal_(adapter.b, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        write(ours, Path(folder))
        theirs = peft.PeftModel.from_pretrained(model(), folder, is_trainable=True).train()
        load(again, folder)
    return {"ours": again.train(), "peft": theirs}


def loss_of(network: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The mean of the tokens' losses."""
    return network(input_ids=tokens, labels=tokens, use_cache=False).loss


def kept_bytes(network: nn.Module, tokens: torch.Tensor) -> int:
    """Bytes of the distinct storages that a step keeps for its backward pass, parameters left out."""
    own, kept = {part.untyped_storage().data_ptr() for part in network.parameters()}, {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = loss_of(network, tokens)
    total = sum(kept.values())
    loss.backward()
    return total


def work(network: nn.Module, case: Case, tokens: torch.Tensor) -> Callable[[], None]:
    """One turn of what is timed."""
    optimizer = torch.optim.AdamW([part for part in network.parameters() if part.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(network, tokens).backward()
        optimizer.step()

    @torch.no_grad()
    def forward() -> None:
        network(input_ids=tokens, use_cache=False)

    return {"step": step, "forward": forward}[case.what]


def rows(runs: int) -> Iterator[dict]:
    """One row for every case.

    Raises:
        AssertionError: the losses, or the trained numbers, differ.
    """
    machine = environment()
    for case in CASES:
        networks = both(case.rank)
        tokens = torch.randint(SIZES["vocab_size"], (case.rows, case.tokens))
        losses = [loss_of(network, torch.arange(32)[None]).item() for network in networks.values()]
        trained = {sum(part.numel() for part in network.parameters() if part.requires_grad)
                   for network in networks.values()}
        assert len(trained) == 1 and abs(losses[0] - losses[1]) < 1e-4, (trained, losses)
        held = {name: kept_bytes(network, tokens) for name, network in networks.items()} if case.what == "step" else {}
        turns = {name: work(network.eval() if case.what == "forward" else network, case, tokens)
                 for name, network in networks.items()}
        seconds = {name: [] for name in turns}
        for turn in range(runs + 2):
            for name in turns if turn % 2 else reversed(turns):
                start = time.perf_counter()
                turns[name]()
                seconds[name] += [time.perf_counter() - start] if turn > 1 else []
        ratios = [theirs / ours for theirs, ours in zip(seconds["peft"], seconds["ours"], strict=True)]
        yield {"bench": "lora", "case": str(case), "peer": "peft", "ours_s": statistics.median(seconds["ours"]),
               "peer_s": statistics.median(seconds["peft"]), "ratio": statistics.median(ratios),
               "low": sorted(ratios)[len(ratios) // 10], "high": sorted(ratios)[-1 - len(ratios) // 10],
               "ours_bytes": held.get("ours"), "peer_bytes": held.get("peft"), "machine": machine["processor"]}


def main() -> None:
    """Measures every case and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25, help="timed turns a row")
    lines = []
    for row in rows(parser.parse_args().runs):
        print(json.dumps(row), flush=True)
        memory = [f"{row[name] / 1e6:,.2f}" if row[name] else "" for name in ("ours_bytes", "peer_bytes")]
        lines.append([row["case"], f"{1e3 * row['ours_s']:,.2f}", f"{1e3 * row['peer_s']:,.2f}",
                      f"**{row['ratio']:.2f}** ({row['low']:.2f} to {row['high']:.2f})", *memory])
    import peft

    head = ["case", "ours ms", "PEFT ms", "PEFT ÷ ours (middle 80 %)", "ours kept MB", "PEFT kept MB"]
    write_result("lora", __doc__, [f"PEFT {peft.__version__}.", table(head, lines)])


if __name__ == "__main__":
    main()
