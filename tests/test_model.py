"""The model: cache and padding change nothing, later tokens and other rows neither; costs are those torch counts."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sentei.axes.axis import Axis
from sentei.axes.connections import Config as Attended
from sentei.core.cost import Cost
from sentei.core.errors import FileError, SenteiError, ShapeError, UnsupportedError
from sentei.core.rules import Mass, TopK
from sentei.core.tracing import trace
from sentei.model import Config, Slot, Transformer, draw
from sentei.model import slots as home

SMALL = Config(vocabulary=50, width=32, layers=2, heads=(4, 2), feed_forward=48)


def made(config: Config = SMALL, spread: float = 0.3) -> Transformer:
    """A model in float64 whose weights are large enough that every token matters to every later one."""
    torch.manual_seed(0)
    model = Transformer(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=spread)
    return model


def tokens(rows: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(0, SMALL.vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def test_the_blocks_are_the_textbook_s():
    """Against the formulas, written out for one head of a query group at a time."""
    model, x = made(replace(SMALL, layers=1)), tokens(1, 7)
    block, states = model.blocks[0].block, model.embedding(x)[0]

    def norm(layer, y):
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight

    def turned(y):
        pairs = torch.complex(y[:, :4], y[:, 4:])
        angles = torch.arange(len(y), dtype=torch.float64)[:, None] * 10_000 ** (-torch.arange(4) / 4).double()
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], 1)

    y, part = norm(block.attention_norm, states), block.attention
    heads = []
    for head, group in enumerate((0, 0, 1, 1)):
        q, k, v = ((y @ layer.weight.T)[:, 8 * at:8 * at + 8] for layer, at in (
            (part.query, head), (part.key, group), (part.value, group)))
        scores = turned(q) @ turned(k).T / 8 ** 0.5
        heads.append(scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).softmax(-1) @ v)
    states = states + torch.cat(heads, 1) @ part.output.weight.T
    y, part = norm(block.feed_forward_norm, states), block.feed_forward
    gate = y @ part.gate.weight.T
    states = states + (gate * gate.sigmoid() * (y @ part.up.weight.T)) @ part.down.weight.T
    expected = norm(model.norm, states) @ model.embedding.weight.T
    torch.testing.assert_close(model(x)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("parts", [(40,), (17, 1, 1, 21), (1,) * 40], ids=str)
def test_with_a_cache_is_without(parts):
    model, x = made(), tokens()
    cache = model.cache()
    pieces = torch.cat([model(part, None, cache) for part in x.split(parts, 1)], 1)
    torch.testing.assert_close(pieces, model(x), rtol=1e-10, atol=1e-10)


def test_no_token_reads_a_later_one_and_an_encoder_s_does():
    x, other = tokens(), tokens()
    other[:, 25:] = (other[:, 25:] + 1) % SMALL.vocabulary
    model = made()
    assert torch.equal(model(x)[:, :25], model(other)[:, :25])
    assert not torch.allclose(model(x)[:, 25:], model(other)[:, 25:])
    encoder = made(replace(SMALL, causal=False))
    assert not torch.isclose(encoder(x)[:, :25], encoder(other)[:, :25]).all(-1).any()


def test_a_row_does_not_depend_on_the_others_or_its_place():
    model, x = made(), tokens()
    other = torch.cat([tokens(6)[4:], x[:1]])
    torch.testing.assert_close(model(other)[2], model(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_in_front_and_behind_changes_nothing(causal):
    model, x = made(replace(SMALL, causal=causal)), tokens(2, 20)
    padded = torch.zeros(2, 33, dtype=torch.int64)
    padded[0, 13:], padded[1, 5:25] = x[0], x[1]
    got = model(padded, torch.tensor([[13, 33], [5, 25]]))
    torch.testing.assert_close(torch.stack([got[0, 13:], got[1, 5:25]]), model(x), rtol=1e-10, atol=1e-10)


def test_a_block_is_told_the_places_of_its_rows_among_the_real_ones():
    model, told = made(), []
    model.blocks[0].block.register_forward_pre_hook(lambda module, inputs: told.append(inputs[1].positions.tolist()))
    model(tokens(2, 5), torch.tensor([[0, 3], [2, 5]]))
    cache = model.cache()
    model(tokens(2, 4), torch.tensor([[3, 4], [0, 4]]), cache)
    model(tokens(2, 2), None, cache)
    assert told == [[[0, 1, 2, -1, -1], [-1, -1, 0, 1, 2]], [[-1, -1, -1, 0], [0, 1, 2, 3]], [[1, 2], [4, 5]]]


def test_generation_is_the_likeliest_token_each_time_and_padding_and_cache_change_none():
    model, prompt = made(), tokens(2, 9)
    written = model.generate(prompt, 12)
    slow = prompt
    for _ in range(12):
        slow = torch.cat([slow, model(slow)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, slow)
    short = torch.cat([torch.full((1, 4), 7), prompt[:1, :5]], 1)
    mixed = model.generate(torch.cat([short, prompt[1:]]), 12, lengths=torch.tensor([[4, 9], [0, 9]]))
    assert torch.equal(mixed[:1, 4:], model.generate(prompt[:1, :5], 12)) and torch.equal(mixed[1], written[1])


def test_sampling_draws_from_the_softmax_of_what_the_rule_keeps():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, 4)

    def shares(**how):
        drawn = draw(logits, generator=torch.Generator().manual_seed(0), **how)
        return drawn.bincount(minlength=4) / len(logits)

    for temperature, rule, kept in ((1.0, TopK(4), 4), (0.5, TopK(3), 3), (1.0, Mass(0.7), 2)):
        expected = torch.zeros(4)
        expected[:kept] = (logits[0, :kept] / temperature).softmax(-1)
        assert (shares(temperature=temperature, rule=rule) - expected).abs().max() < 4 * 0.5 / 20_000 ** 0.5
    model, prompt = made(spread=0.1), tokens(2, 5)
    first, again, other = (model.generate(prompt, 20, temperature=1.0, generator=torch.Generator().manual_seed(seed))
                           for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_row_ends_with_the_stop_token():
    """Drawn, so that a row does not end in a loop by itself; each row is drawn for whether or not it has ended."""
    model, prompt = made(spread=0.1), tokens(2, 9)
    free, again = (model.generate(prompt, 12, temperature=1.0, generator=torch.Generator().manual_seed(0), stop=stop)
                   for stop in (None, None))
    stop = int(free[0, 9])
    written = model.generate(prompt, 12, temperature=1.0, generator=torch.Generator().manual_seed(0), stop=stop)
    assert torch.equal(free, again) and (free[0, 10:] != stop).any()
    assert (written[0, 9:] == stop).all()
    ends = (free[1, 9:] == stop).nonzero()
    kept = 9 + (int(ends[0]) + 1 if len(ends) else 12)
    assert torch.equal(written[1, :kept], free[1, :kept]) and (written[1, kept:] == stop).all()


@pytest.mark.parametrize("wrong", [{"count": -1}, {"temperature": -0.1}, {"temperature": float("nan")},
                                   {"tokens": tokens(1, 0)}, {"tokens": tokens(1)[0]},
                                   {"lengths": torch.tensor([[0, 5]])}], ids=lambda wrong: str(list(wrong)))
def test_generation_refuses_what_it_cannot_do(wrong):
    with pytest.raises(SenteiError):
        made().generate(**{"tokens": tokens(1, 9), "count": 2, **wrong})


def test_an_encoder_writes_nothing():
    with pytest.raises(UnsupportedError, match="causal model"):
        made(replace(SMALL, causal=False)).generate(tokens(), 1)
    with pytest.raises(ShapeError, match="padding"):
        model = made()
        model(tokens(1, 9), torch.tensor([[0, 5]]), model.cache())


@pytest.mark.parametrize("causal, length", [(False, 128), (False, 64), (True, 64)])
def test_flops_are_those_that_torch_counts(causal, length):
    """Tiles of 64 cover these lengths, and one tile the causal case, of which torch counts the whole square."""
    model = made(replace(SMALL, causal=causal))
    x = tokens(3, length)
    with torch.no_grad(), trace(model) as records:
        model(x)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    cost = model.cost(records, x.shape)
    assert 2 * cost.multiply_adds == 2 * cost.dense_multiply_adds == counter.get_total_flops()


def test_bytes_are_what_each_product_reads_and_writes():
    model, x, moved = made(), tokens(2, 64), []

    def note(module, inputs, output):
        moved.append(8 * (module.weight.numel() + inputs[0].numel() + output.numel()))

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(note)
    with torch.no_grad(), trace(model) as records:
        hidden = model.hidden(x)
    logits = 8 * (model.embedding.weight.numel() + hidden.numel() + 2 * 64 * SMALL.vocabulary)
    assert model.cost(records, x.shape).bytes == sum(moved) + logits + sum(record.cost.bytes for record in records)


def test_parameters_are_counted_once():
    width, hidden, shared = 32, 48, 16
    layer = 2 * width * width + 2 * width * shared + 3 * width * hidden + 2 * width
    number = 50 * width + 2 * layer + width
    assert Transformer(SMALL).size() == (number, 4 * number)
    assert made().size() == (number, 8 * number)


def test_pruned_connections_spend_less_and_keep_all_is_dense():
    room = Attended(rule=TopK(1), tile=(16, 16), window=0)
    dense, pruned = made(), made(replace(SMALL, connections=room))
    x = tokens(2, 128)
    with torch.no_grad(), trace(pruned) as records:
        pruned(x)
    cost = pruned.cost(records, x.shape)
    assert cost.multiply_adds < cost.dense_multiply_adds and len(records) == SMALL.layers
    assert not torch.allclose(pruned(x), dense(x))
    everything = made(replace(SMALL, connections=replace(room, rule=TopK(8))))
    torch.testing.assert_close(everything(x), dense(x), rtol=1e-10, atol=1e-10)


@dataclass(frozen=True, kw_only=True)
class Neurons:
    """The configuration of a room for these tests: every `stride`-th neuron of a layer of `hidden`."""

    hidden: int = 24
    stride: int = 2

    def to_json(self):
        return {"hidden": self.hidden, "stride": self.stride}

    @classmethod
    def from_json(cls, value):
        return cls(**value)


class Some(Axis):
    """Its layer: x·up for the neurons a rule keeps."""

    def __init__(self, config: Neurons, model: Config):
        super().__init__(TopK(config.hidden // config.stride))
        self.up = nn.Linear(model.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, model.width, bias=False)

    def score(self, x, mask=None, tasks=None):
        return self.up(x).abs()

    def apply(self, selection, x, mask=None, tasks=None):
        return self.down(self.up(x) * selection.mask())

    def account(self, selection, x, mask=None, tasks=None):
        width = x.shape[-1]
        kept, permitted = int(selection.count().sum()), int(selection.permitted.sum())
        return Cost(multiply_adds=2 * kept * width, dense_multiply_adds=2 * permitted * width), "eager", "a test"


def test_a_room_in_the_feed_forward_slot(monkeypatch):
    monkeypatch.setitem(home.FEED_FORWARDS, "neurons", Slot(Neurons, Some))
    config = replace(SMALL, feed_forward=Neurons())
    assert Config.from_json(config.to_json()) == config
    assert config.to_json()["feed_forward"] == {"room": "neurons", "hidden": 24, "stride": 2}
    model, x = made(config), tokens(2, 64)
    with torch.no_grad(), trace(model) as records:
        model(x)
    cost = model.cost(records, x.shape)
    saved = cost.dense_multiply_adds - cost.multiply_adds
    assert saved == SMALL.layers * x.numel() * 2 * 32 * 12  # half of 24 neurons, up and down, once each
    plain = 2 * 32 * 32 + 2 * 32 * 16
    attention = 4 * 2 * 64 * 64 * 2 * 8
    assert cost.dense_multiply_adds == SMALL.layers * (x.numel() * (plain + 2 * 32 * 24) + attention) + x.numel() * 1600


class Halved(Axis):
    """A room for the depth slot: the block runs, and counts a half."""

    def __init__(self, block):
        super().__init__(TopK(1))
        self.block, self.gate = block, nn.Linear(1, 1)

    def score(self, x, lengths, cache, tasks):
        return torch.zeros(*x.shape[:2], 1, dtype=x.dtype)

    def apply(self, selection, x, lengths, cache, tasks):
        positions = torch.arange(x.shape[1]).expand(x.shape[:2])
        return x + self.block(x, home.Rows(positions=positions, cache=cache)) / 2

    def account(self, selection, *inputs):
        return Cost(multiply_adds=0, dense_multiply_adds=0), "eager", "a test"


def test_a_room_in_the_depth_slot_gets_the_block_and_its_cache(monkeypatch):
    class Depth(Neurons):
        pass

    monkeypatch.setitem(home.DEPTHS, "half", Slot(Depth, lambda config, block, model: Halved(block), home.Cache))
    config = replace(SMALL, depth=Depth())
    assert Config.from_json(config.to_json()) == config
    model, dense, x = made(config), made(), tokens(2, 10)
    state = dict(zip(dense.state_dict(), dense.state_dict().values(), strict=True))
    model.load_state_dict(state, strict=False)
    assert not torch.allclose(model(x), dense(x))
    for block in (layer.block for layer in dense.blocks):  # half the change, in the dense model's own words
        block.register_forward_hook(lambda module, inputs, output: output / 2)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-10, atol=1e-10)
    assert isinstance(model.cache()[0], home.Cache)


@pytest.mark.parametrize("changes", [
    {"width": 0}, {"width": 30}, {"heads": (4, 3)}, {"heads": [4, 2]}, {"heads": (4,)}, {"layers": 1025},
    {"vocabulary": True}, {"feed_forward": 0}, {"feed_forward": "96"}, {"feed_forward": None}, {"depth": 1},
    {"connections": None}, {"causal": 1}, {"width": 1 << 25}, {"width": 4.0}], ids=str)
def test_a_shape_that_cannot_be_is_refused(changes):
    with pytest.raises(SenteiError):
        replace(SMALL, **changes)
    value = SMALL.to_json() | {key: list(item) if isinstance(item, tuple) else item for key, item in changes.items()}
    if changes != {"heads": [4, 2]}:
        with pytest.raises(FileError):
            Config.from_json(value)


@pytest.mark.parametrize("value", [[], {}, {"room": "rank"}, {"room": "dense"}, {"room": ["dense"]}], ids=str)
def test_json_of_another_shape_is_refused(value):
    for wrong in (value, {**SMALL.to_json(), "feed_forward": value}, {**SMALL.to_json(), "more": 1}):
        with pytest.raises(FileError):
            Config.from_json(wrong)
    assert Config.from_json(SMALL.to_json()) == SMALL


def test_gradients_reach_every_weight_and_are_right():
    model, x = made(replace(SMALL, layers=1)), tokens(1, 6)
    named = dict(model.named_parameters())
    loss = model(x).square().mean()
    gradients = torch.autograd.grad(loss, list(named.values()))
    for (name, parameter), gradient in itertools.islice(zip(named.items(), gradients, strict=True), 20):
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            def moved(by, parameter=parameter, direction=direction):
                parameter.add_(by * direction)
                value = model(x).square().mean().item()
                parameter.sub_(by * direction)
                return value
            slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 1)], ids=str)
def test_nothing_and_one_token(shape):
    assert made()(torch.zeros(shape, dtype=torch.int64)).shape == (*shape, SMALL.vocabulary)


def test_under_autocast_the_error_is_at_most_twice_that_of_bfloat16():
    model, x = made(spread=0.1), tokens(2, 64)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model.float()(x)
    plain = model.bfloat16()(x)
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max() < 2 * (plain.double() - exact).abs().max()
