"""Attention sinks, as gpt-oss defines them, made of any implementation and its lse: outputs and all gradients."""

import importlib.util

import pytest
import torch
from oracle import Case

from sentei.core.errors import ShapeError
from sentei.kernels import native
from sentei.kernels.attention import attend, sink

IMPLS = ["reference", "eager", *["fused_cpp"] * (not native.missing()),
         *["fused_triton"] * (importlib.util.find_spec("triton") is not None)]
CASES = [
    Case(name="grouped, some kept", queries=24, keys=40, tile=(16, 16), heads=4, groups=2),
    Case(name="dense", queries=20, keys=20, tile=(16, 16), kept=None),
    Case(name="little kept, padded", queries=40, keys=40, tile=(16, 16), kept=0.2, lengths=((9, 40), (40, 40))),
    Case(name="window, soft cap", queries=40, keys=40, tile=(16, 16), window=7, softcap=2.0, logits=3.0),
]
LOGITS = torch.tensor([0.7, -30.0, 4.0, 0.0])


def by_definition(query, key, value, logits, case: Case) -> torch.Tensor:
    """A column more in the softmax, and no value for it."""
    per_group = case.heads // case.groups
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    key, value = key.repeat_interleave(per_group, 1), value.repeat_interleave(per_group, 1)
    scores = query @ key.mT * case.widths[0] ** -0.5
    scores = case.softcap * torch.tanh(scores / case.softcap) if case.softcap else scores
    scores = scores.masked_fill(~case.pairs(), -torch.inf)
    column = logits[:, None, None].expand(*scores.shape[:-1], 1)
    return (torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value).transpose(1, 2)


def ours(query, key, value, logits, case: Case, impl: str) -> torch.Tensor:
    output, lse = attend(query, key, value, case.tiles(), softcap=case.softcap, impl=impl, return_lse=True)
    return sink(output, lse, logits)[0]


def with_gradients(function, tensors, *more) -> list[torch.Tensor]:
    """Output and the gradients of one fixed loss for query, key, value and logits."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*leaves, *more)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad((output * weights.to(output.dtype)).sum(), leaves)]


def check(function, case: Case, dtype: torch.dtype, *more) -> None:
    tensors = [*case.tensors(dtype), LOGITS[:case.heads].to(dtype)]
    exact = with_gradients(by_definition, [tensor.double() for tensor in tensors], case)
    plain = with_gradients(by_definition, tensors, case)
    for name, got, other, true in zip(("output", "dq", "dk", "dv", "dlogits"),
                                      with_gradients(function, tensors, case, *more), plain, exact, strict=True):
        error, allowed = ((x.double() - true).abs().amax() for x in (got, other))
        step = 8 * torch.finfo(dtype).eps * true.abs().amax().clamp(min=1)
        assert error <= 2 * allowed + step, f"{name}: error {error:.3g}, plain {allowed:.3g} + {step:.3g}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_one_column_more_in_the_softmax(impl, case):
    check(ours, case, torch.float32 if impl.startswith("fused") else torch.float64, impl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_so_it_is_in_half_precision(dtype):
    check(ours, CASES[0], dtype, "eager")


def test_without_keys_the_sink_is_all_there_is_and_without_a_sink_nothing_changes():
    output, lse = torch.randn(1, 3, 2, 4), torch.randn(1, 3, 2)
    lse[0, 1], output[0, 1] = -torch.inf, 0
    found, total = sink(output, lse, torch.tensor([0.5, -torch.inf]))
    assert torch.equal(found[:, :, 1], output[:, :, 1]) and torch.equal(total[..., 1], lse[..., 1])
    assert total[0, 1, 0] == 0.5 and (found[0, 1, 0] == 0).all()
    torch.testing.assert_close(total[..., 0].exp(), lse[..., 0].exp() + torch.tensor(0.5).exp())


@pytest.mark.parametrize("logits", [torch.zeros(3), torch.zeros(1), torch.zeros(2, 1), torch.tensor(0.0)],
                         ids=lambda logits: str(list(logits.shape)))
def test_logits_that_are_not_one_a_head_are_refused(logits):
    with pytest.raises(ShapeError, match=r"sink: expected logits \[2\], one a head, got .*; give one a query head"):
        sink(torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2), logits)
