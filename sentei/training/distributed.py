"""Training in several processes: plain torch.distributed, as `torchrun` starts it; gloo, or NCCL where there are GPUs.

    data       each process reads its rows of the batch; gradients are means over all
    shard      FSDP2, a block at a time; without it the same with all weights in each process
    experts    the stacks are DTensors, cut over some processes; tokens travel (`kernels/routing/exchange.py`)

A gradient is that of the mean loss over all processes, so that a job gives the same curve, up to rounding, on any
number of them.
References: Zhao et al. 2023, arXiv 2304.11277 (FSDP); Lepikhin et al. 2020, arXiv 2006.16668 (GShard).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sentei.axes.depth import Depth
from sentei.axes.experts import MixtureOfExperts
from sentei.core.errors import ResourceError, ShapeError, UnsupportedError, require
from sentei.training import shards
from sentei.training.parallel import World

SILENCE = timedelta(minutes=10)  # after which a process counts as lost; one that ended is noticed at once


class Processes(World):
    """Several processes, which call all methods together."""

    def __init__(self):
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.stacks: list[nn.Parameter] = []

    def place(self, model, config):
        require("parallel.experts", config.experts, {
            f"a number that divides that of the processes, {self.size}": self.size % config.experts == 0})
        device = next(model.parameters()).device.type
        if config.experts > 1:
            self.stacks = cut_experts(model, init_device_mesh(
                device, (self.size // config.experts, config.experts), mesh_dim_names=("data", "experts")))
        copies = (1, self.size) if config.shard else (self.size, 1)
        mesh = init_device_mesh(device, copies, mesh_dim_names=("replicate", "shard"))
        for part in (*getattr(model, "blocks", ()), model):
            fully_shard(part, mesh=mesh, reshard_after_forward=config.shard, ignored_params=set(self.stacks))

    def sum(self, tensor):
        distributed.all_reduce(tensor)
        return tensor

    def clip(self, parameters, largest):
        for stack in self.stacks:
            if stack.grad is not None:
                stack.grad = stack.grad.redistribute(placements=stack.placements) / self.size
        meshes = {}
        for parameter in parameters:
            if parameter.grad is not None:
                meshes.setdefault(parameter.device_mesh, []).append(parameter.grad)
        norms = [nn.utils.get_total_norm(gradients).full_tensor() for gradients in meshes.values()]
        norm = torch.linalg.vector_norm(torch.stack(norms)).item()
        for gradient in (gradient for gradients in meshes.values() for gradient in gradients):
            gradient.mul_(min(1.0, largest / (norm + 1e-6)))
        return norm

    def in_turn(self, work):
        result = work() if self.first else None
        distributed.barrier()
        return result if self.first else work()

    def whole(self, tensors):
        together = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.first:
                together[name] = full.detach().cpu().contiguous()
        return together

    def save(self, folder: Path, step: int, tensors: dict[str, torch.Tensor], about: dict) -> None:
        shards.save(folder, step, tensors, about)


def cut_experts(model: nn.Module, mesh: object) -> list[nn.Parameter]:
    """Makes DTensors of the stacks of every mixture of experts, cut over the dimension `experts` of the mesh.

    Raises:
        ShapeError: a layer whose experts cannot be shared evenly.
        UnsupportedError: no such layer; or one inside mixture of depths, which may leave out the layer here alone.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MixtureOfExperts)}
    inside = any(isinstance(part, MixtureOfExperts) for room in model.modules() if isinstance(room, Depth)
                 for part in room.modules())
    if not layers or inside:
        raise UnsupportedError("parallel.experts", expected="a model with experts, in blocks that every token passes",
                               got="mixture of depths" if layers else "no experts", do="leave it out")
    cut, parts = [], mesh.size(1)
    for name, layer in layers.items():
        if len(layer.up) % parts:
            raise ShapeError(name, expected=f"experts in {parts} equal parts", got=f"{len(layer.up)} experts",
                             do="choose parallel.experts so that it divides them")
        for key in ("up", "down"):
            own = distribute_tensor(getattr(layer, key).detach(), mesh, [Replicate(), Shard(0)], src_data_rank=None)
            setattr(layer, key, nn.Parameter(own, requires_grad=getattr(layer, key).requires_grad))
            cut.append(getattr(layer, key))
    return cut


@contextmanager
def joined() -> Iterator[Processes]:
    """The process group of the environment, or the one that is there already, for as long as the block lasts.

    Raises:
        ResourceError: another process ended or was silent for SILENCE.
    """
    ours = not distributed.is_initialized()
    if ours:
        distributed.init_process_group(timeout=SILENCE)
    try:
        yield Processes()
    except (RuntimeError, CheckpointException) as error:
        if not was_lost(error):
            raise
        raise ResourceError("torchrun", expected="an answer of every process", got=" ".join(str(error).split())[-300:],
                            do="look at what the process that ended first said; the same command goes on from the "
                               "newest checkpoint") from error
    finally:
        if ours:
            distributed.destroy_process_group()


def was_lost(error: BaseException) -> bool:
    """Whether an error means that another process did not answer. gloo says so in words alone."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error)
