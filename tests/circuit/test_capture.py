"""A circuit says what the model did: compared with its own trace, with transformers' attention, and with itself."""

import pytest
import torch
from circuits import observed, roomy, spelled, tiled
from tiny import tiny_model

from sentei.axes import connections, rank
from sentei.circuit.agreement import kept_keys
from sentei.circuit.bits import decode, unpack
from sentei.circuit.capture import capture
from sentei.circuit.file import load, save
from sentei.core.errors import SenteiError
from sentei.core.rules import Mass, TopK
from sentei.core.trace_header import OBSERVED, RAN
from sentei.core.tracing import trace


def records(model, tokens):
    with torch.no_grad(), trace(model) as found:
        model(torch.tensor([tokens]))
    return found


def test_rooms_keep_what_their_trace_says():
    model, tokens = roomy(depth=None), [3, 1, 4, 1, 5, 9, 2, 6]
    run = capture(model, [tokens], spelled).runs[0]
    found = records(model, tokens)
    for layer in range(3):
        edges, chosen = found.at(f"blocks.{layer}.block.attention.connections"), found.at(
            f"blocks.{layer}.block.feed_forward.experts")
        assert torch.equal(kept_keys(run, layer), edges[0].selection.mask()[0].tril())
        assert torch.equal(unpack(run.get(layer, "experts.bits"), 4), chosen[0].selection.mask()[0])
        heaviest = decode(run.get(layer, "experts.weights")[:, 0])
        assert torch.allclose(heaviest, chosen[0].selection.weights[0].amax(-1), atol=0.005)


def test_a_block_that_skips_tokens_has_their_rows_and_keys_empty():
    model, tokens = roomy(), list(range(7))
    run = capture(model, [tokens], spelled).runs[0]
    found = records(model, tokens)
    skips = 0
    for layer in range(3):
        kept = found.at(f"blocks.{layer}")[0].selection.count()[0] > 0
        assert torch.equal(run.get(layer, "depth.bits") == 3, kept)
        inner = found.at(f"blocks.{layer}.block.attention.connections")[0].selection.mask()[0]
        keys = kept_keys(run, layer)
        assert torch.equal(keys[:, kept][:, :, kept], inner.tril())
        assert not keys[:, ~kept].any() and not keys[:, :, ~kept].any()
        assert torch.equal(unpack(run.get(layer, "experts.bits"), 4).sum(-1) > 0, kept)
        assert torch.equal(run.get(layer, "cost")[:, 0] > 0, kept)
        skips += int((~kept).sum())
    assert skips > 3


def test_writing_token_by_token_is_reading_at_once():
    model = roomy(connections=connections.Config())  # other rules leave the last token of a call whole
    whole = capture(model, [list(range(7))], spelled, write=3).runs[0]
    again = capture(model, [[token.id for token in whole.tokens]], spelled).runs[0]
    assert len(whole.tokens) == 10 and whole.prompt == 7 and again.prompt == 10
    for layer in range(3):
        assert torch.equal(kept_keys(whole, layer), kept_keys(again, layer))
        for part in ("experts.bits", "depth.bits", "experts.ids", "cost"):
            assert torch.equal(whole.get(layer, part).float(), again.get(layer, part).float()), part


def test_a_model_name_can_be_read_again(tmp_path):
    circuit = capture(tiny_model("llama"), [[1, 2]], spelled, model_name="a" * 60_000)
    save(circuit, tmp_path / "a.trace")
    assert load(tmp_path / "a.trace").model == "a" * 1024


def test_tiles_and_pages_keep_their_granularity():
    model, tokens = tiled(), list(range(33))
    run = capture(model, [tokens], spelled, write=3).runs[0]
    assert run.get(0, "connections.spans").tolist() == [[0, 33, 4, 4], [33, 3, 1, 16]]
    chosen = records(model, tokens).at("model.layers.0.self_attn.connections")[0].selection.mask()[0]
    tiles = chosen.repeat_interleave(4, 1)[:, :33].repeat_interleave(4, 2)[:, :, :33]
    assert torch.equal(kept_keys(run, 0)[:, :33, :33], tiles.tril())
    assert run.get(2, "connections.bits") is None and kept_keys(run, 2)[0].sum() == 36 * 37 // 2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_dense_model_keeps_the_fewest_keys_that_hold_the_mass(family):
    model, tokens = tiny_model(family), list(range(30))
    circuit = capture(model, [tokens], spelled, share=0.7)
    run = circuit.runs[0]
    assert circuit.kind == OBSERVED and model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        answer = model(torch.tensor([tokens]), output_attentions=True)
    for layer, shares in enumerate(answer.attentions):
        kept = kept_keys(run, layer)
        held = (shares[0] * kept).sum(-1)
        lightest = shares[0].masked_fill(~kept, 2).amin(-1)
        assert bool((held >= 0.7 - 1e-5).all()) and bool((held - lightest < 0.7 + 1e-5).all())
    assert [text for text, _ in run.following] == [
        spelled(number) for number in answer.logits[0, -1].topk(5).indices.tolist()]


def test_an_observed_layer_adds_up():
    """What is said of key/value heads, groups of neurons and depth, against the layer's own modules."""
    model, tokens, seen = tiny_model("llama"), list(range(1, 9)), {}
    layer = model.model.layers[1]
    for part, module in (("o", layer.self_attn.o_proj), ("down", layer.mlp.down_proj)):
        module.register_forward_hook(lambda _, args, output, part=part: seen.update({part: (args[0][0], output[0])}))
    layer.register_forward_pre_hook(lambda module, args: seen.update(stream=args[0][0]))
    run = capture(model, [tokens], spelled).runs[0]
    joined, moved = seen["o"]
    weight = layer.self_attn.o_proj.weight
    halves = zip(joined.split(32, 1), weight.split(32, 1), strict=True)
    groups = torch.stack([(part @ columns.T).norm(dim=-1) for part, columns in halves], 1)
    assert torch.allclose(decode(run.get(1, "heads.weights")), groups / groups.sum(-1, keepdim=True), atol=0.004)
    neurons, change = seen["down"]
    sizes = (neurons.abs() * layer.mlp.down_proj.weight.norm(dim=0)).unflatten(-1, (16, 6)).sum(-1)
    best = sizes.argmax(-1)
    assert torch.equal(run.get(1, "experts.ids")[:, 0].long(), best)
    stream = seen["stream"]
    steps = [moved.norm(dim=-1) / stream.norm(dim=-1), change.norm(dim=-1) / (stream + moved).norm(dim=-1)]
    assert torch.allclose(decode(run.get(1, "depth.weights")), torch.stack(steps, -1).clamp(max=1), atol=0.004)


def test_a_move_above_the_tokens_length_has_the_highest_code():
    model, tokens, seen = tiny_model("llama"), list(range(1, 9)), {}
    layer = model.model.layers[0]
    model.model.embed_tokens.weight.data[1:9] *= torch.logspace(-2, 2, 8)[:, None]  # the stream, not its direction
    layer.register_forward_pre_hook(lambda module, args: seen.update(stream=args[0][0]))
    layer.self_attn.o_proj.register_forward_hook(lambda _, args, output: seen.update(moved=output[0]))
    codes = capture(model, [tokens], spelled).runs[0].get(0, "depth.weights")[:, 0]
    lengths = seen["moved"].norm(dim=-1) / seen["stream"].norm(dim=-1)
    assert torch.equal(codes == 255, lengths >= (254.5 / 255) ** 2)
    assert lengths.max() > 2 and torch.equal(codes[lengths > 1], torch.full_like(codes[lengths > 1], 255))


def test_an_encoder_sees_both_ways():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                 intermediate_size=64)).eval()
    run = capture(model, [list(range(7))], spelled).runs[0]
    assert not run.causal and run.following == () and bool(kept_keys(run, 0)[:, 0, 1:].any())
    ours = capture(roomy(causal=False, depth=None, connections=connections.Config(
        rule=TopK(3), tile=(1, 1), window=0)), [list(range(7))], spelled).runs[0]
    assert not ours.causal and bool(kept_keys(ours, 0)[:, 0, 1:].any())
    with pytest.raises(SenteiError, match="an encoder that is to write"):
        capture(model, [[1, 2]], spelled, write=1)


def test_low_rank_directions_are_counted():
    model = tiny_model("llama")
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            adapted = rank.from_dense(getattr(layer.self_attn, name), rank.Config(rule=Mass(0.5), rank=4))
            torch.nn.init.normal_(adapted.b)
            setattr(layer.self_attn, name, adapted)
    circuit = capture(model, [list(range(6))], spelled)
    found = records(model, list(range(6)))
    counts = sum(record.selection.count()[0] for record in found if ".layers.1." in record.path)
    assert circuit.kind == RAN and circuit.runs[0].layers[1].rank == 8
    assert torch.equal(circuit.runs[0].get(1, "rank.kept").long(), counts) and len(set(counts.tolist())) > 1


def test_cost_of_keeping_all_is_the_dense_layer():
    model = roomy(depth=None, connections=connections.Config())
    cost = capture(model, [list(range(5))], spelled).runs[0].get(0, "cost")
    attention, expert = 32 * 32 * 2 + 2 * 32 * 16, 3 * 16 * 32
    pairs = torch.arange(1, 6) * 4 * 16
    assert torch.equal(cost[:, 1], (pairs + attention + 4 * expert).float())
    assert torch.equal(cost[:, 0], (pairs + attention + 2 * expert).float())


@pytest.mark.parametrize("prompts", [[], [[1], [2], [3], [4]], [[]], [[1], []]])
def test_prompts_that_cannot_be_read_are_refused(prompts):
    with pytest.raises(SenteiError, match="one to three prompts"):
        capture(tiny_model("llama"), prompts, spelled)


def test_two_prompts_of_other_lengths_share_their_prefix_to_the_bit():
    first, second = observed().runs
    assert len(first.tokens) == 9 and len(second.tokens) == 12
    for layer in range(3):
        for part in ("experts.weights", "heads.weights", "depth.weights", "experts.bits"):
            assert torch.equal(first.get(layer, part)[:6], second.get(layer, part)[:6]), part
        assert torch.equal(kept_keys(first, layer)[:, :6, :6], kept_keys(second, layer)[:, :6, :6])
        one, other = (run.get(layer, "connections.weights")[:, :6] for run in (first, second))
        assert torch.equal(one, other)
