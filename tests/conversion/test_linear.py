"""Native linear layers put into a model and taken out again."""

import copy

import pytest
import torch
from tiny import tiny_model
from torch import nn

from sentei.conversion import linear
from sentei.conversion.linear import NativeLinear, install, remove
from sentei.kernels import native

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
FAMILIES = ["llama", "qwen2", "gemma3_text"]
TOKENS = torch.tensor([[5, 9, 17, 33]])


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The rows of every native product."""
    rows = []
    for name in ("at_once", "run"):
        function = getattr(linear.fused_cpp, name)

        def noted(x, weight, bias, function=function):
            output = function(x, weight, bias)
            rows.extend([] if output is None else [x.numel() // x.shape[-1]])
            return output

        monkeypatch.setattr(linear.fused_cpp, name, noted)
    return rows


def plain(model: nn.Module) -> int:
    return sum(type(module) is nn.Linear for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_within_rounding_and_removing_gives_the_same_bits(family, dtype, calls):
    model = tiny_model(family).to(dtype)
    exact = copy.deepcopy(model).double()(TOKENS).logits
    before, state = model(TOKENS).logits, {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    count = plain(model)
    choices = install(model, most_rows=8, many_rows=0)
    assert len(choices) == count and plain(model) == 0 and {choice.most_rows for choice in choices} == {8}
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
    after = model(TOKENS).logits
    assert set(calls) == {4} and len(calls) == count
    assert (after - exact).norm() <= 2 * (before - exact).norm()
    remove(model)
    assert plain(model) == count and torch.equal(model(TOKENS).logits, before)
    assert not any("native_rows" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_same_tokens_and_decodes_natively(family, calls):
    model = tiny_model(family)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(TOKENS, **options)
    install(model, most_rows=8, many_rows=0)
    assert torch.equal(model.generate(TOKENS, **options), expected)
    assert 1 in calls


@torch.no_grad()
def test_the_tied_head_stays_tied():
    model = tiny_model("llama")
    install(model, most_rows=8, many_rows=0)
    assert type(model.lm_head) is NativeLinear
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.get_input_embeddings().weight[7] += 1
    assert model(TOKENS).logits[0, -1, 7] != tiny_model("llama")(TOKENS).logits[0, -1, 7]


def test_more_rows_other_dtypes_and_gradients_take_torchs_own_path(calls):
    module = nn.Sequential(nn.Linear(6, 5))
    install(module, most_rows=4, many_rows=0)
    with torch.no_grad():
        module(torch.ones(4, 6))
        assert calls == [4]
        module(torch.ones(5, 6))
        module.to(torch.bfloat16)(torch.ones(1, 6, dtype=torch.bfloat16))
        module.float()
    module(torch.ones(2, 6)).sum().backward()
    assert module[0].weight.grad.tolist() == [[2.0] * 6] * 5
    assert calls == [4]


@torch.no_grad()
def test_hooks_and_copies_go_on_working(calls):
    module = nn.Sequential(nn.Linear(6, 5))
    seen = []
    module[0].register_forward_hook(lambda *_: seen.append(1))
    install(module, most_rows=8, many_rows=0)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(torch.ones(1, 6)), module(torch.ones(1, 6)))
    assert seen == [1, 1] and calls == [1, 1]
    remove(module)
    assert type(module[0]) is nn.Linear and type(twin[0]) is NativeLinear


def test_what_the_kernel_cannot_take_is_left_and_said():
    class Own(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(6, 5).double(), Own(6, 5), nn.Linear(0, 5))
    assert [(choice.path, choice.most_rows, choice.reason) for choice in install(module, most_rows=8, many_rows=0)] == [
        ("0", 0, "torch.float64 on cpu"), ("2", 0, "a weight without numbers")]
    assert [type(part) for part in module] == [nn.Linear, Own, nn.Linear]


@pytest.mark.parametrize("gains, most_rows", [((2.0, 1.5, 1.1), 8), ((2.0, 1.5, 0.9), 4), ((1.2, 0.9, 3.0), 1),
                                              ((0.9, 2.0, 2.0), 0), ((1.01, 2.0, 2.0), 0)], ids=str)
def test_only_what_was_measured_faster_is_switched(gains, most_rows, monkeypatch):
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(6, 5))
    monkeypatch.setattr(linear, "_gains", lambda modules, kind_of, ways, rows: dict.fromkeys(
        map(kind_of, modules), gains[linear.ROWS.index(rows)]))
    choices = install(module, many_rows=0)
    assert {choice.most_rows for choice in choices} == {most_rows}
    assert f"{gains[0]:.2f} times as fast at 1 rows" in choices[0].reason
    assert {type(part) is NativeLinear for part in module} == {most_rows > 0}


@pytest.mark.parametrize("own, ours, gain", [(3.0, 2.0, 1.5), (2.0, 4.0, 0.5)])
def test_a_gain_is_the_first_ways_time_by_the_seconds(monkeypatch, own, ours, gain):
    now = [0.0]

    def taking(seconds):
        def way(module, x):
            now[0] += seconds
        return way

    monkeypatch.setattr(linear.time, "perf_counter", lambda: now[0])
    modules = [nn.Linear(6, 5), nn.Linear(6, 5)]
    assert linear._gains(modules, lambda module: "all", (taking(own), taking(ours)), 1) == {"all": gain}


def test_it_measures_every_shape_and_a_second_install_starts_afresh():
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(6, 7, bias=False))
    install(module, most_rows=8, many_rows=0)
    assert all("times as fast" in choice.reason for choice in install(module))


@torch.no_grad()
def test_a_bias_of_another_size_is_torchs_business(calls):
    module = nn.Sequential(nn.Linear(6, 500))
    install(module, most_rows=8, many_rows=9)
    own = module[0].bias
    for rows in (1, 9):
        module[0].bias = nn.Parameter(torch.ones(1))
        assert torch.equal(module(torch.zeros(rows, 6)), torch.ones(rows, 500))
        module[0].bias = nn.Parameter(torch.ones(499))
        with pytest.raises(RuntimeError):
            module(torch.zeros(rows, 6))
    module[0].bias = own
    module(torch.zeros(9, 6))
    assert calls == [9]


def test_an_output_head_takes_no_many_rows():
    module = nn.Sequential(nn.Linear(1, linear.MOST_NUMBERS // linear.MANY_ROWS[0] + 1, bias=False))
    choice, = install(module, most_rows=0)
    assert (choice.many_rows, choice.reason) == (0, "asked for; many rows are not for it")


@torch.no_grad()
def test_an_input_of_another_width_is_refused_by_torch():
    module = nn.Sequential(nn.Linear(6, 5))
    install(module, most_rows=8, many_rows=0)
    for wrong in (torch.ones(1, 12), torch.ones(2, 3)):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            module(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_are_the_native_kernels_where_asked(dtype, calls):
    module = nn.Sequential(nn.Linear(6, 5, dtype=dtype))
    twin, x = copy.deepcopy(module)[0], torch.randn(2, 8, 6, dtype=dtype)
    assert [choice.many_rows for choice in install(module, most_rows=0, many_rows=16)] == [16]
    wide = nn.functional.linear(x.double(), twin.weight.double(), twin.bias.double())
    with torch.no_grad():
        assert torch.allclose(module(x).double(), wide, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
        assert calls == [16]
        assert torch.equal(module(x[:, :7]), nn.functional.linear(x[:, :7], twin.weight, twin.bias))
    module(x).float().sum().backward()
    assert module[0].weight.grad.dtype == dtype and calls == [16]


@pytest.mark.parametrize("gains, many_rows", [((1.6, 1.4), 256), ((1.6, 0.9), 1024), ((0.9, 1.4), 0)], ids=str)
def test_many_rows_are_switched_only_where_that_was_measured_faster(gains, many_rows, monkeypatch):
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(6, 5))
    monkeypatch.setattr(linear, "_gains", lambda modules, kind_of, ways, rows: dict.fromkeys(
        map(kind_of, modules), gains[linear.MANY_ROWS.index(rows)]))
    choices = install(module, most_rows=0)
    assert {choice.many_rows for choice in choices} == {many_rows}
    assert f"asked for; {gains[0]:.2f} times as fast at 1024 rows" in choices[0].reason
    assert {type(part) is NativeLinear for part in module} == {many_rows > 0}
    remove(module)
    assert {type(part) for part in module} == {nn.Linear}
