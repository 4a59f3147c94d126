"""The native gated MLP, RMS norm and heads against fp64, and what they leave to a module's own forward."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sentei.core.errors import ImplError, ShapeError
from sentei.kernels import native
from sentei.kernels.linear import fused_cpp, reference, rows

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(outputs: int, width: int, seed: int, with_bias: bool):
    return random(outputs, width, seed=seed) / width**0.5, random(outputs, seed=seed + 9) if with_bias else None


def to(dtype, *layers):
    return [tuple(None if part is None else part.to(dtype) for part in layer) for layer in layers]


def eager(x, gate, up, down, activation):
    multiply = nn.functional.linear
    return multiply(rows.ACTIVATIONS[activation](multiply(x, *gate)) * multiply(x, *up), *down)


def eager_norm(x, weight, epsilon, shift):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (normed * (shift + weight.to(wide.dtype))).to(x.dtype)


@pytest.mark.parametrize("activation", rows.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("width, hidden, outputs", [(1, 1, 1), (37, 53, 29), (64, 96, 64), (130, 401, 7),
                                                    (300, 260, 530)])
@pytest.mark.parametrize("size", [1.0, 40.0])
def test_gated_is_as_near_to_fp64_as_torch(activation, dtype, width, hidden, outputs, size, machine_or_pairs):
    for count in (*range(1, 9), 9, 13, 100):
        x = (random(1, count, width, seed=count) * size).to(dtype)
        layers = to(dtype, *(layer(*shape, seed, count % 2 == 0) for seed, shape in enumerate(
            [(hidden, width), (hidden, width), (outputs, hidden)])))
        exact = eager(x.double(), *to(torch.float64, *layers), activation)
        y, own = rows.gated(x, *layers, activation), eager(x, *layers, activation)
        assert y.dtype is dtype and y.shape == own.shape
        unit = torch.finfo(torch.float32 if dtype is torch.float32 else dtype).eps * exact.norm()
        # The plainest instruction set rounds after the product too, and sums 401 of them in a few lanes, or in one.
        few = count <= fused_cpp.FEW_ROWS
        assert (y - exact).norm() <= max(2 * (own - exact).norm(), (4 if few else 6) * unit)


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("width", [1, 7, 16, 33, 576])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_norm_is_as_near_to_fp64_as_torch(shift, dtype, width, size, machine):
    x, weight = (random(1, 8, width) * size).to(dtype), random(width, seed=1).to(dtype)
    exact = eager_norm(x.double(), weight.double(), 1e-6, shift)
    y, own = rows.norm(x, weight, 1e-6, shift), eager_norm(x, weight, 1e-6, shift)
    assert y.dtype is dtype and y.shape == x.shape
    assert (y - exact).norm() <= max(2 * (own - exact).norm(), torch.finfo(dtype).eps * exact.norm())
    assert all(torch.equal(rows.norm(x[:, :count], weight, 1e-6, shift), y[:, :count]) for count in range(1, 9))
    many = rows.norm(x.repeat(1, 200, 1), weight, 1e-6, shift)  # in several pieces of work
    assert torch.equal(many, y.repeat(1, 200, 1))


@pytest.mark.parametrize("activation", rows.ACTIVATIONS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e30], ids=str)
def test_what_is_not_a_number_reaches_its_row_and_no_other(activation, poison, machine):
    layers = to(torch.float32, layer(33, 21, 1, False), layer(33, 21, 2, False), layer(5, 33, 3, False))
    x, weight = random(11, 21).float(), random(21, seed=4).float()
    x[1, 20] = poison
    for count in (3, 11):
        torch.testing.assert_close(rows.gated(x[:count], *layers, activation), eager(x[:count], *layers, activation),
                                   equal_nan=True, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows.norm(x, weight, 1e-6, 0.0), eager_norm(x, weight, 1e-6, 0.0), equal_nan=True)


def test_a_row_of_gated_depends_on_nothing_but_itself(machine, monkeypatch):
    layers = to(torch.float32, layer(1501, 131, 1, True), layer(1501, 131, 2, False), layer(903, 1501, 3, True))
    x = random(8, 131).float()
    expected = torch.cat([rows.gated(row[None], *layers, "silu") for row in x])
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(rows.gated(x, *layers, "silu"), expected)


def test_a_row_of_many_depends_on_nothing_but_itself(machine_or_pairs, monkeypatch):
    dtype = HALF if native.takes_pairs() else torch.float32
    layers = to(dtype, layer(402, 132, 1, True), layer(402, 132, 2, False), layer(603, 402, 3, True))
    x = random(250, 132).to(dtype)
    case = heads_case(dtype, inputs=132, tokens=(1, 250), normed=True, bias=True)
    expected, turned = rows.gated(x, *layers, "silu"), rows.heads(*case)
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for first, count in ((0, 9), (1, 96), (100, 97), (3, 200)):
            some = slice(first, first + count)
            assert torch.equal(rows.gated(x[some], *layers, "silu"), expected[some])
            turn = case[4]._replace(cosine=case[4].cosine[:, some], sine=case[4].sine[:, some])
            for y, whole in zip(rows.heads(case[0][:, some], *case[1:4], turn), turned, strict=True):
                assert torch.equal(y, whole[:, :, some])


def test_nothing_between_the_layers_is_nothing(machine):
    layers = [(torch.empty(0, 6), None), (torch.empty(0, 6), None), (torch.empty(600, 0), torch.ones(600))]
    rows.gated(torch.ones(40, 6), *to(torch.float32, layer(300, 6, 1, False), layer(300, 6, 2, False),
                                      layer(600, 300, 3, False)), "silu")  # leaves memory to the next calls
    for count in (3, 40):
        assert torch.equal(rows.gated(torch.ones(count, 6), *layers, "silu"), torch.ones(count, 600))


def test_every_other_case_is_left():
    x, weight = torch.ones(2, 6), torch.ones(6)
    layers = to(torch.float32, layer(5, 6, 1, False), layer(5, 6, 2, False), layer(4, 5, 3, False))
    assert rows.gated(x, *layers, "silu") is not None and rows.norm(x, weight, 1e-6, 0.0) is not None
    for other in (x.double(), x.half(), x.to(HALF), x.to("meta"), torch.ones(0, 6), torch.ones(2, 3),
                  torch.ones(6, 2).T, torch.tensor(1.0), nn.Parameter(x).as_subclass(type("Own", (torch.Tensor,), {}))):
        assert rows.gated(other, *layers, "silu") is None and rows.norm(other, weight, 1e-6, 0.0) is None
    assert rows.gated(x, layers[0], layers[0], layers[0], "silu") is None
    needing = [tuple(part if part is None else part.clone().requires_grad_() for part in layer) for layer in layers]
    for context in (torch.enable_grad(), torch.autocast("cpu"), torch.device("cpu")):
        with context:
            assert rows.gated(x, *layers, "silu") is None and rows.norm(x, weight, 1e-6, 0.0) is None
    assert rows.norm(x, None, 1e-6, 0.0) is None and rows.gated(x, layers[0], (None, None), layers[2], "silu") is None
    with Watching():
        assert rows.gated(x, *needing, "silu") is not None
        with torch.enable_grad():
            assert rows.gated(x, *needing, "silu") is None
        with torch.autocast("cpu"):
            assert rows.gated(x, *layers, "silu") is None and rows.norm(x, weight, 1e-6, 0.0) is None
        for other in (x.double(), torch.ones(2, 3), torch.ones(0, 6)):
            assert rows.gated(other, *layers, "silu") is None
        assert rows.norm(x, weight.double(), 1e-6, 0.0) is None and rows.norm(x, weight[:5], 1e-6, 0.0) is None


def turned(x, width, norm, cosine, sine, epsilon, shift):
    """[B, H, T, D] of what a linear layer gave, as transformers turns it."""
    x = x.unflatten(-1, (-1, width))
    x = (x if norm is None else eager_norm(x, norm, epsilon, shift)).transpose(1, 2)
    half = torch.cat([-x[..., width // 2:], x[..., :width // 2]], -1)
    return x * cosine[..., None, :, :] + half * sine[..., None, :, :]


def eager_heads(x, query, key, value, turn):
    width = turn.cosine.shape[-1]
    groups = len(key[0]) // width
    made = [nn.functional.linear(x, *layer) for layer in (query, key, value)]
    return (*(turned(y, width, norm, turn.cosine, turn.sine, turn.epsilon, turn.shift)
              for y, norm in zip(made, turn[2:4], strict=False)), made[2].unflatten(-1, (groups, -1)).transpose(1, 2))


def heads_case(dtype, heads=(3, 1), widths=(8, 6), inputs=37, tokens=(1, 2), turns=None, normed=False, bias=False):
    (queries, groups), (width, value) = heads, widths
    layers = [layer(size, inputs, seed, bias) for seed, size in enumerate((queries * width, groups * width,
                                                                           groups * value))]
    angles = random(*(turns or tokens), width, seed=5)
    norms = (random(width, seed=6), random(width, seed=7)) if normed else (None, None)
    turn = rows.Turn(angles.cos(), angles.sin(), *norms, epsilon=1e-3, shift=1.0 if normed else 0.0)
    parts = [part if not isinstance(part, torch.Tensor) else part.to(dtype) for part in turn]
    return random(*tokens, inputs, seed=8).to(dtype), *to(dtype, *layers), rows.Turn(*parts)


CASES = [{}, {"bias": True}, {"normed": True}, {"tokens": (2, 3), "turns": (1, 3)}, {"tokens": (4, 2)},
         {"heads": (9, 3), "widths": (64, 64), "inputs": 130, "tokens": (1, 1), "normed": True, "bias": True},
         {"heads": (1, 1), "widths": (2, 1), "inputs": 1, "tokens": (1, 8)},
         {"heads": (9, 3), "widths": (64, 64), "inputs": 130, "tokens": (1, 100), "normed": True, "bias": True},
         {"tokens": (3, 70), "turns": (1, 70)}, {"tokens": (70, 2), "bias": True},
         {"heads": (14, 2), "widths": (48, 40), "tokens": (1, 13)}]


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_heads_are_as_near_to_fp64_as_torch(case, dtype, machine_or_pairs):
    given = heads_case(dtype, **case)
    wide = (given[0].double(), *to(torch.float64, *given[1:4]),
            rows.Turn(*(part.double() if isinstance(part, torch.Tensor) else part for part in given[4])))
    found, own, exact = rows.heads(*given), eager_heads(*given), eager_heads(*wide)
    for y, mine, best in zip(found, own, exact, strict=True):
        assert y.dtype is dtype and y.shape == mine.shape
        unit = torch.finfo(dtype).eps * best.norm()
        assert (y - best).norm() <= max(2 * (mine - best).norm(), unit)


@pytest.mark.parametrize("tokens", [3, 11])
def test_what_is_not_a_number_reaches_its_row_of_heads_and_no_other(tokens, machine):
    x, *others = heads_case(torch.float32, tokens=(1, tokens))
    x[0, 1, 5] = torch.nan
    for y in rows.heads(x, *others):
        assert y[:, :, 1].isnan().all() and y[:, :, [0, *range(2, tokens)]].isfinite().all()


def test_weights_too_many_to_be_copied_are_left_where_rows_are_many(monkeypatch):
    layers = to(torch.float32, layer(5, 6, 1, False), layer(5, 6, 2, False), layer(4, 5, 3, False))
    monkeypatch.setattr(rows, "MOST_LAID_OUT", 79)  # they are 80
    assert rows.gated(torch.ones(8, 6), *layers, "silu") is not None
    assert rows.gated(torch.ones(9, 6), *layers, "silu") is None
    case = heads_case(torch.float32, tokens=(1, 9))
    monkeypatch.setattr(rows, "MOST_LAID_OUT", sum(part[0].numel() for part in case[1:4]))
    assert rows.heads(*case) is not None
    monkeypatch.setattr(rows, "MOST_LAID_OUT", rows.MOST_LAID_OUT - 1)
    assert rows.heads(*case) is None


def test_heads_of_every_other_case_are_left():
    x, query, key, value, turn = heads_case(torch.float32)
    assert rows.heads(x, query, key, value, turn) is not None
    short = turn.cosine[..., :6].contiguous()
    for other in (turn._replace(cosine=turn.cosine.double()), turn._replace(sine=turn.sine[:, :1].contiguous()),
                  turn._replace(cosine=short, sine=short), turn._replace(query_norm=torch.ones(7)),
                  turn._replace(key_norm=torch.ones(8).double()), turn._replace(cosine=torch.tensor(1.0)),
                  turn._replace(cosine=turn.cosine[..., :7].contiguous(), sine=turn.sine[..., :7].contiguous()),
                  turn._replace(cosine=turn.cosine.mT.contiguous().mT)):
        assert rows.heads(x, query, key, value, other) is None
    for other in (x.double(), x[0], x[:, :0], x[..., :36].contiguous(), x.mT.contiguous().mT):
        assert rows.heads(other, query, key, value, turn) is None
    assert rows.heads(x, (query[0][:20], None), key, value, turn) is None
    assert rows.heads(x, query, (key[0][:0], None), value, turn) is None
    assert rows.heads(x, query, key, (value[0][:, :30].contiguous(), None), turn) is None
    assert rows.heads(x, query, key, (value[0], torch.ones(5)), turn) is None
    with torch.enable_grad():
        assert rows.heads(x, query, key, value, turn) is None


class Watching(TorchDispatchMode):
    """Sees every op, and the names of ours."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, arguments=(), named=None):
        self.seen += [op.__name__] * (op.namespace == "sentei")
        return op(*arguments, **(named or {}))


def calls(dtype=torch.float32):
    """One call of each, by name: the function of the room, its arguments, and the op's."""
    width = 37
    x, layers = random(1, 3, width, seed=3).to(dtype), to(dtype, layer(53, width, 1, True), layer(53, width, 2, False),
                                                          layer(29, 53, 3, True))
    heads = heads_case(dtype, tokens=(1, 3), normed=True, bias=True)
    turn = heads[4]
    return {"gated": ((x, *layers, "silu"), (x, *layers[0], *layers[1], *layers[2], "silu")),
            "norm": ((x, random(width).to(dtype), 1e-5, 0.25),) * 2,
            "heads": (heads, (heads[0], *heads[1], *heads[2], *heads[3], *turn))}


def results(found) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", ["gated", "norm", "heads"])
def test_the_definition_is_torchs_formula_in_fp64(name):
    given = calls(torch.float64)[name][0]
    formula = {"gated": eager, "norm": eager_norm, "heads": eager_heads}[name]
    for y, own in zip(*(results(call(*given)) for call in (getattr(reference, name), formula)), strict=True):
        torch.testing.assert_close(y, own, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", rows.ACTIVATIONS)
def test_the_definition_of_gated_has_every_activation(activation):
    given = calls(torch.float64)["gated"][0][:-1]
    torch.testing.assert_close(reference.gated(*given, activation), eager(*given, activation), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("name", ["gated", "norm", "heads"])
def test_it_is_the_definition_rounded_once(name, dtype, machine):
    given = calls(dtype)[name][0]
    wide = [rows.Turn(*(part.double() if isinstance(part, torch.Tensor) else part for part in item))
            if isinstance(item, rows.Turn) else to(torch.float64, item)[0] if isinstance(item, tuple)
            else item.double() if isinstance(item, torch.Tensor) else item for item in given]
    for y, exact in zip(results(getattr(rows, name)(*given)), results(getattr(reference, name)(*wide)), strict=True):
        assert y.shape == exact.shape
        assert (y - exact).norm() <= max(torch.finfo(dtype).eps, 4 * torch.finfo(torch.float32).eps) * exact.norm()


@pytest.mark.parametrize("name", ["gated", "norm", "heads"])
def test_it_is_an_op_of_torch_where_torch_looks_on(name):
    given, arguments = calls()[name]
    call, plain = getattr(rows, name), results(getattr(rows, name)(*given))
    torch.library.opcheck(getattr(torch.ops.sentei, name).default, arguments)
    with Watching() as mode:
        watched = results(call(*given))
    assert mode.seen == [f"{name}.default"]
    compiled = torch.compile(lambda x: call(x + 0, *given[1:]), fullgraph=True, backend="aot_eager")
    for y, own in ((watched, plain), (results(compiled(given[0])), plain)):
        assert all(torch.equal(one, other) and one.stride() == other.stride()
                   for one, other in zip(y, own, strict=True))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = results(call(mode.from_tensor(given[0]), *given[1:]))
    assert [(fake.shape, fake.stride()) for fake in fakes] == [(own.shape, own.stride()) for own in plain]


@pytest.mark.parametrize("name", ["gated", "norm", "heads"])
def test_an_op_takes_strided_tensors_and_refuses_what_does_not_fit(name):
    arguments, op = calls()[name][1], getattr(torch.ops.sentei, name)
    expected = op(*arguments)
    strided = [part.repeat_interleave(2, -1)[..., ::2] if isinstance(part, torch.Tensor) else part
               for part in arguments]
    assert torch.equal(op(*strided), expected) and torch.equal(op(arguments[0].neg()._neg_view(), *arguments[1:]),
                                                               expected)
    for place, part in enumerate(arguments):
        if isinstance(part, torch.Tensor):
            for wrong in (part.double(), part[..., :-1], part.to("meta"), part[None].expand(9, *part.shape)):
                if name != "heads" and place == 0 and wrong.shape[0] == 9:
                    continue  # more dimensions are more rows
                with pytest.raises(ShapeError, match=f"^{name}: expected x "):
                    op(*arguments[:place], wrong, *arguments[place + 1:])
    if name == "gated":
        with pytest.raises(ShapeError, match="expected an activation of silu, gelu_tanh, got relu"):
            op(*arguments[:-1], "relu")
    with torch.enable_grad(), pytest.raises(ImplError, match="expected no gradients"):
        op(arguments[0].requires_grad_(), *arguments[1:]).sum().backward()
