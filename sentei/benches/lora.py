"""LoRA: is a training step, its memory and a forward pass not worse than PEFT's, on the same model and factors?

Both adapt every linear layer of each block of a random Llama, at the same rank, and read the same file of factors; the
losses are compared before anything is timed. Turns alternate. Memory is what a step keeps for its backward pass:
distinct storages that are no parameters. Needs `pip install peft --no-deps`.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from sentei.axes.rank import Config
from sentei.conversion.adapter_files import load, write
from sentei.conversion.adapters import adapters_of, add
from sentei.measurement.latency import interleave, measured

MIB = 1 << 20
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
        return f"LoRA {self.what}, {self.rows} × {self.tokens} tokens, rank {self.rank}"


CASES = {"lora": [Case("step", 4, 128, 8), Case("step", 4, 128, 64), Case("step", 1, 32, 8),
                  Case("forward", 4, 128, 8), Case("forward", 1, 1, 8)]}


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
    return {"ours": again.train(), "peer": theirs}


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


def rows(names: list[str], runs: int, absent: Callable[[str], None]) -> Iterator[dict]:
    """One row for every case: the keys of `sentei.benches.table`, and of a step ours_mib and peer_mib.

    Args:
        names: of CASES.
        runs: timed pairs a row.
        absent: told why there are no rows.
    Raises:
        AssertionError: the losses, or how many numbers are trained, differ; there is no ratio then.
    """
    if names and find_spec("peft") is None:
        return absent("PEFT is not installed")
    for case in (case for name in names for case in CASES[name]):
        networks = both(case.rank)
        check(networks)
        tokens = torch.randint(SIZES["vocab_size"], (case.rows, case.tokens))
        held = {}
        if case.what == "step":
            held = {f"{name}_mib": kept_bytes(network, tokens) / MIB for name, network in networks.items()}
        ours, theirs = (work(network.eval() if case.what == "forward" else network, case, tokens)
                        for network in networks.values())
        yield measured("rooms", str(case), "PEFT", interleave(theirs, ours, runs=runs)) | held


def check(networks: dict[str, nn.Module]) -> None:
    """Raises AssertionError where the two give other losses, or train other numbers."""
    losses = [loss_of(network, torch.arange(32)[None]).item() for network in networks.values()]
    trained = {sum(part.numel() for part in network.parameters() if part.requires_grad)
               for network in networks.values()}
    if len(trained) > 1 or abs(losses[0] - losses[1]) > 1e-4:
        raise AssertionError(f"LoRA and PEFT differ: losses {losses}, trained {trained}")
