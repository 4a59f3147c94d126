"""heads in pretrained layers: fewer key/value heads, folded into ordinary projections."""

import copy

import pytest
import torch
from tiny import tiny_config, tiny_model

from sentei.axes.heads import Config, cache_bytes
from sentei.budget.calibration import calibrate
from sentei.conversion import attended
from sentei.conversion.attended import Attended
from sentei.conversion.families import FAMILIES
from sentei.conversion.layers import layer_of
from sentei.conversion.plan import Plan, convert, wanted
from sentei.conversion.rooms import heads
from sentei.core.errors import UnsupportedError

TEXT = torch.randint(3, 320, (3, 120), generator=torch.Generator().manual_seed(5))
IDS = torch.randint(3, 320, (2, 40), generator=torch.Generator().manual_seed(6))
JOINT, MEAN = Config(num_kv_heads=1, merge="joint"), Config(num_kv_heads=1)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def plan_of(model, config: Config, layers=None) -> Plan:
    return Plan.everywhere(range(model.config.num_hidden_layers) if layers is None else layers, "heads", config)


def converted(model, config: Config, layers=None):
    plan = plan_of(model, config, layers)
    return convert(model, plan, calibrate(model, TEXT, wanted(plan)))


def error(model, config: Config, layers=None) -> float:
    dense = logits(convert(model, Plan()))
    return float((logits(converted(model, config, layers)) - dense).square().mean() / dense.square().mean())


@torch.no_grad()
def alike(model):
    """Makes the key heads multiples, frequency by frequency, of the first, and the values maps of its value."""
    for layer in model.model.layers:
        attention, size = layer.self_attn, layer.self_attn.head_dim
        numbers = torch.Generator().manual_seed(3)
        for linear, map_of in ((attention.k_proj, turn), (attention.v_proj, mix)):
            for _, weight in linear.named_parameters():
                rows = weight.reshape(-1, size, weight.numel() // linear.out_features)
                if linear is attention.k_proj and hasattr(attention, "k_norm"):
                    rows[1:] = rows[0]
                else:
                    for head in range(1, len(rows)):
                        rows[head] = map_of(rows[0], numbers.manual_seed(head))
    return model


def turn(rows, numbers):
    half = len(rows) // 2
    factors = torch.complex(*torch.randn(2, half, 1, generator=numbers))
    turned = factors * torch.complex(rows[:half], rows[half:])
    return torch.cat([turned.real, turned.imag])


def mix(rows, numbers):
    return torch.randn(len(rows), len(rows), generator=numbers) @ rows / len(rows) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_hold_the_same_in_other_words_merge_without_loss(family):
    """Factors folded into the queries, maps into the output, biases with them, at every position."""
    model = alike(tiny_model(family))
    dense = logits(model)
    merged = converted(model, JOINT)
    attention = merged.model.layers[1].self_attn
    assert type(attention).__name__ == FAMILIES[family].attention and attention.num_key_value_groups == 4
    assert attention.k_proj.out_features == attention.v_proj.out_features == 16
    torch.testing.assert_close(logits(merged), dense, rtol=0, atol=2e-3 * float(dense.abs().max()))
    assert error(convert(merged, Plan()), MEAN) > 1e-4


@pytest.mark.parametrize("config", [Config(num_kv_heads=2, merge="joint"), JOINT], ids=lambda c: str(c.num_kv_heads))
def test_of_multi_head_attention_fewer_heads_lose_less_than_their_mean(config):
    model = tiny_model("llama", num_key_value_heads=4)
    joint, mean = error(model, config), error(model, Config(num_kv_heads=config.num_kv_heads))
    assert 0 < joint < 0.75 * mean
    assert error(model, config, layers=[1]) < joint
    assert [layer.self_attn.num_key_value_groups for layer in model.model.layers] == [1, 4 // config.num_kv_heads, 1]


def test_the_cache_holds_fewer_heads_in_the_layers_that_were_merged():
    model = converted(tiny_model("llama"), JOINT, layers=[0, 2])
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    found = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    assert found == [IDS.numel() * cache_bytes(kept, 16, torch.float32) for kept in (1, 2, 1)]


def test_a_model_with_the_same_heads_in_every_layer_is_an_ordinary_one():
    model = converted(tiny_model("llama"), JOINT)
    plain = type(model)(tiny_config("llama", num_key_value_heads=1)).eval()
    plain.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [3, 4])
def test_heads_that_do_not_divide_are_refused(kept):
    model = tiny_model("llama")
    for merge in ("mean", "joint"):
        with pytest.raises(UnsupportedError, match="expected key/value heads that divide 2"):
            converted(model, Config(num_kv_heads=kept, merge=merge))
    eight = tiny_model("llama", num_attention_heads=8, num_key_value_heads=8, head_dim=8)
    with pytest.raises(UnsupportedError, match="at most 4 into one, got 1"):
        converted(eight, JOINT)
    assert [c.num_kv_heads for c in heads.options(layer_of(eight, 0), "rule")] == [None, 4, 2]


@pytest.mark.parametrize("pieces", [1, 4, 256])
@pytest.mark.parametrize("sight", [6, 3], ids=["causal", "sliding"])
def test_the_statistic_is_what_loops_find(monkeypatch, sight, pieces):
    """φ of the keys drawn for each query around their mean, and what each head attends to, a token at a time."""
    monkeypatch.setattr(attended, "KEYS", 5)
    monkeypatch.setattr(attended, "AT_ONCE", pieces)
    state, tokens = Attended(4, 2, 4), 6
    numbers = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, tokens, 4, generator=numbers) for heads in (4, 2, 2))
    state.see(query, key, value, torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril().triu(1 - sight), 0.5)
    scores, values = torch.zeros(4, 8, 8, dtype=torch.float64), torch.zeros(4, 8, 8, dtype=torch.float64)
    for head in range(4):
        for t in range(tokens):
            first = max(0, t + 1 - sight)
            weights = (query[0, head, t] @ key[0, head // 2, first:t + 1].T * 0.5).softmax(0)
            attends = torch.cat([weights @ value[0, g, first:t + 1] for g in (0, 1)]).double()
            values[head] += torch.outer(attends, attends)
            drawn = (0.9 * weights + 0.1 / (t + 1 - first)).cumsum(0)
            found = []
            for step in range(5):
                s = min(first + int((drawn < (step + 0.5) / 5).sum()), t)
                q, k = query[0, head, t].double(), key[0, :, s].double()
                found.append(torch.stack([torch.stack([q[f] * k[g, f] + q[f + 2] * k[g, f + 2],
                                                       q[f + 2] * k[g, f] - q[f] * k[g, f + 2]])
                                          for f in range(2) for g in range(2)]).flatten())
            found = torch.stack(found)
            scores[head] += (found - found.mean(0)).T @ (found - found.mean(0))
    torch.testing.assert_close(state.values, values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.scores, scores, rtol=1e-4, atol=1e-5)
    assert state.rows == 6


def test_a_pair_out_of_four_heads_is_what_the_two_alone_would_show():
    four, two = Attended(8, 4, 4), Attended(4, 2, 4)
    numbers = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 30, 4, generator=numbers) for heads in (8, 4, 4))
    allowed = torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()
    four.see(query, key, value, allowed, 0.5)
    two.see(query[:, 4:], key[:, 2:], value[:, 2:], allowed, 0.5)
    scores, values, served = four.of(1, 2)
    assert served == slice(4, 8)
    torch.testing.assert_close(scores, two.scores, rtol=1e-3, atol=1e-3)  # float32
    torch.testing.assert_close(values, two.values, rtol=1e-3, atol=1e-3)  # float32
    parts = [Attended(8, 4, 4) for _ in range(2)]
    for row, part in enumerate(parts):
        part.see(query[row:row + 1], key[row:row + 1], value[row:row + 1], allowed, 0.5)
    parts[1].merge(parts[0])
    torch.testing.assert_close(parts[1].scores, four.scores, rtol=1e-3, atol=1e-3)  # float32
    torch.testing.assert_close(parts[1].values, four.values, rtol=1e-3, atol=1e-3)  # float32
    assert parts[1].rows == four.rows


def test_watching_changes_neither_the_model_nor_what_it_computes():
    model = tiny_model("gemma3_text")
    dense, modules, before = logits(model), dict(model.named_modules()), copy.copy(model.config)
    calibrate(model, TEXT, {0: {"attention_heads"}, 2: {"attention_heads"}})
    assert torch.equal(logits(model), dense) and dict(model.named_modules()) == modules
    assert model.config._attn_implementation == before._attn_implementation == "sdpa"
    assert not any(hasattr(layer.self_attn, attended.STATE) for layer in model.model.layers)
