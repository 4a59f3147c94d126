"""The cache layer against transformers' own, operation by operation, and decoding through it."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from sentei.axes.connections import Config
from sentei.conversion import cache, wrapper
from sentei.conversion.families import FAMILIES
from sentei.conversion.plan import Plan, convert, prunable_layers
from sentei.core.rules import All, Mass, Threshold, TopK
from sentei.core.tracing import trace
from sentei.kernels.paging import PAGE, bounds_of

PAGED = Config(tile=(8, 4), window=2, decode=TopK(2))
every_family = pytest.mark.parametrize("family", FAMILIES)


def states(batch: int, tokens: int, number: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(batch, 2, tokens, width, generator=generator) for width in (4, 3)]


def check_alike(ours, theirs) -> None:
    """The same content, and bounds that are those of the keys."""
    length = theirs.get_seq_length()
    assert ours.get_seq_length() == length and ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
    assert ours.is_initialized == theirs.is_initialized
    if length:
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        pages = getattr(ours.keys, "pages", None)
        if pages is not None:
            assert torch.equal(pages[:, :, :length // PAGE], bounds_of(theirs.keys))


OPERATIONS = st.lists(st.one_of(
    st.tuples(st.just("update"), st.sampled_from([0, 1, 1, 1, 2, 15, 16, 17, 40])),
    st.tuples(st.just("crop"), st.integers(-40, 0)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("reorder"), st.integers(0, 9)),
    st.tuples(st.just("select"), st.integers(0, 9)),
    st.tuples(st.sampled_from(["reset", "copy", "assign", "inference"]), st.just(0)),
), max_size=14)


def batch_of(layer) -> int:
    """A layer cropped to nothing remembers its batch."""
    return len(layer.keys) if layer.keys is not None and layer.keys.dim() == 4 else 2


def do(layer, name: str, number: int, step: int):
    """One operation; returns the layer, or the copy that goes on in its place."""
    batch = batch_of(layer)
    rows = torch.randint(0, batch, (batch,), generator=torch.Generator().manual_seed(number))
    if name == "update":
        layer.update(*states(batch, number, step))
    elif name == "inference":
        with torch.inference_mode():
            layer.update(*states(batch, 1, step))
    elif name == "crop" and layer.get_seq_length():
        layer.crop(number)
    elif name == "repeat" and batch < 9:
        layer.batch_repeat_interleave(number)
    elif name == "reorder":
        layer.reorder_cache(rows)
    elif name == "select":
        layer.batch_select_indices(rows[:max(1, number % (batch + 1))])
    elif name == "reset":
        layer.reset()
    elif name == "copy":
        return copy.deepcopy(layer)
    elif name == "assign" and layer.get_seq_length():
        layer.keys, layer.values = layer.keys.flip(0), layer.values.flip(0)
    return layer


@settings(deadline=None, max_examples=200, derandomize=True)
@given(operations=OPERATIONS)
def test_every_operation_does_what_that_of_transformers_does(operations):
    ours, theirs = cache.layer_class()(), DynamicLayer()
    with torch.no_grad():
        for step, (name, number) in enumerate(operations):
            ours, theirs = (do(layer, name, number, step) for layer in (ours, theirs))
            check_alike(ours, theirs)
        batch = batch_of(theirs)
        for step in range(2 * PAGE):
            one, other = ours.update(*states(batch, 1, 99 + step)), theirs.update(*states(batch, 1, 99 + step))
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
            assert one[0].pages is not None
            check_alike(ours, theirs)


def test_a_token_copies_nothing_and_what_was_handed_out_stays():
    layer = cache.layer_class()()
    first, _ = layer.update(*states(1, 100))
    content, places = first.clone(), set()
    for step in range(400):
        keys, values = layer.update(*states(1, 1, step))
        places.add((keys.data_ptr(), values.data_ptr(), keys.pages.data_ptr()))
    assert len(places) < 10 and keys.shape[2] == 500
    assert torch.equal(first, content) and torch.equal(keys[:, :, :100], content)
    assert layer.buffers[0].shape[2] <= 500 * cache.GROWTH + 2 * PAGE


def test_gradients_flow_and_the_cache_goes_on_afterwards():
    ours, theirs = cache.layer_class()(), DynamicLayer()
    for layer in (ours, theirs):
        for step in range(3):
            key, value = (tensor.requires_grad_() for tensor in states(1, 20, step))
            keys, values = layer.update(key, value)
        gradients = torch.autograd.grad((keys.square().sum() + values.square().sum()), (key, value))
        assert all(torch.equal(gradient, 2 * tensor) for gradient, tensor in zip(gradients, (key, value), strict=True))
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        layer.update(*states(1, 5, 9))
    check_alike(ours, theirs)


def test_a_dtype_of_its_own_is_kept():
    layer = cache.layer_class()(torch.bfloat16)
    for tokens in (20, 1, 30):
        keys, values = layer.update(*states(2, tokens))
        assert keys.dtype == values.dtype == keys.pages.dtype == layer.dtype == torch.bfloat16
    assert torch.equal(keys[:, :, :20], states(2, 20)[0].bfloat16())


def converted(family: str, config: Config, **overrides) -> nn.Module:
    model = tiny_model(family, **overrides)
    return convert(model, Plan.everywhere(prunable_layers(model), "connections", config))


def prompt(batch: int, length: int) -> dict[str, torch.Tensor]:
    """One whole row, or rows padded at the left by 0, 5 and 13 tokens."""
    ids = torch.randint(3, 320, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, padding in zip(range(1, batch), (5, 13), strict=False):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def kinds(held) -> list[bool]:
    return [type(layer) is cache.layer_class() for layer in held.layers]


@every_family
@pytest.mark.parametrize("batch", [1, 3], ids=["one row", "three padded rows"])
@pytest.mark.parametrize("rule", [TopK(100), Threshold(0), Mass(1.0)], ids=str)
def test_a_rule_that_keeps_all_generates_what_the_dense_model_does(family, batch, rule):
    arguments = {**prompt(batch, 70), "max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    found = converted(family, replace(PAGED, decode=rule)).generate(**arguments)
    assert torch.equal(found, tiny_model(family).generate(**arguments))


@every_family
@pytest.mark.parametrize("batch", [1, 3], ids=["one row", "three padded rows"])
@torch.no_grad()
def test_token_by_token_is_one_call_of_several_rows_and_no_cache_of_ours_is_the_same(family, batch):
    model, data = converted(family, PAGED), prompt(batch, 96)
    mask = data["attention_mask"]

    def decode(sizes: list[int], held) -> torch.Tensor:
        parts, start = [], 88
        model(input_ids=data["input_ids"][:, :88], attention_mask=mask[:, :88], past_key_values=held)
        for size in sizes:
            parts.append(model(input_ids=data["input_ids"][:, start:start + size], past_key_values=held,
                               attention_mask=mask[:, :start + size]).logits)
            start += size
        return torch.cat(parts, 1)

    together = decode([8], DynamicCache(config=model.config))
    with trace(model) as records:
        single = decode([1] * 8, DynamicCache())
    assert records.density() < 0.9
    torch.testing.assert_close(single, together, rtol=0, atol=1e-4)
    torch.testing.assert_close(decode([3, 5], cache.make(model)), together, rtol=0, atol=1e-4)
    getattr(model, wrapper.HOOK).remove()
    plain = DynamicCache(config=model.config)
    torch.testing.assert_close(decode([3, 5], plain), together, rtol=0, atol=1e-4)
    assert not any(kinds(plain))
    dense = converted(family, replace(PAGED, decode=All()))
    model = dense
    assert not torch.allclose(decode([8], DynamicCache(config=dense.config)), together, atol=1e-3)


@torch.no_grad()
def test_listening_changes_nothing_and_the_trace_tells_the_pages():
    model, data = converted("llama", PAGED), prompt(3, 120)
    held = model(**data, use_cache=True).past_key_values
    other = copy.deepcopy(held)
    token = {"input_ids": torch.full((3, 1), 7), "attention_mask": torch.ones(3, 121, dtype=torch.int64)}
    token["attention_mask"][:, :120] = data["attention_mask"]
    with trace(model) as records:
        heard = model(**token, past_key_values=held).logits
    assert torch.equal(model(**token, past_key_values=other).logits, heard)
    assert kinds(held) == kinds(other) == [True] * 3
    for record in records:
        assert record.selection.ids.shape[:3] == (3, 2, 1) and record.selection.unit == PAGE
        assert record.selection.num_candidates == 8 and record.selection.count().flatten().tolist() == [2] * 6
        assert 0 < record.cost.multiply_adds < record.cost.dense_multiply_adds and record.cost.choosing > 0
        assert record.impl in ("fused_cpp", "eager") and record.cost.density() == pytest.approx(
            record.selection.density())


def test_beam_search_is_that_of_a_cache_whose_bounds_are_made_anew():
    arguments = {**prompt(2, 60), "max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0,
                 "num_beams": 3}
    model = converted("llama", PAGED)
    found = model.generate(**arguments)
    assert not torch.equal(found, tiny_model("llama").generate(**arguments))
    getattr(model, wrapper.HOOK).remove()
    assert torch.equal(model.generate(**arguments), found)


@torch.no_grad()
def test_a_cropped_cache_goes_on_as_if_it_had_never_been_longer():
    model, data = converted("llama", PAGED), prompt(1, 120)
    ids = data["input_ids"]
    held, fresh = cache.make(model), cache.make(model)
    model(input_ids=ids[:, :110], past_key_values=held)
    model(input_ids=ids[:, :90], past_key_values=fresh)
    held.crop(-20)
    for step in range(90, 120):
        found = model(input_ids=ids[:, step:step + 1], past_key_values=held).logits
        expected = model(input_ids=ids[:, step:step + 1], past_key_values=fresh).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_half_precision_cache_under_a_float32_model():
    """With a rule that keeps all: what differs is the rounding of what is kept, 2**-9 of each number."""
    model, data = converted("llama", replace(PAGED, decode=TopK(100))), prompt(1, 90)
    held = cache.make(model, torch.bfloat16)
    found = model.generate(**data, past_key_values=held, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert found.shape == (1, 110) and {layer.keys.dtype for layer in held.layers} == {torch.bfloat16}
    next_logits = [model(input_ids=found[:, -1:], past_key_values=filled).logits for filled in (
        held, model(input_ids=found[:, :109], use_cache=True).past_key_values)]
    assert 0 < (next_logits[0] - next_logits[1]).abs().max() < 0.1 * next_logits[1].std()


def test_sliding_layers_are_left_alone_and_the_hook_comes_and_goes_with_the_rooms():
    model = converted("gemma3_text", PAGED)
    held = DynamicCache(config=model.config)
    model.generate(**prompt(1, 40), past_key_values=held, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert kinds(held) == [False, True, False]
    ours = held.layers[1]
    model(input_ids=torch.full((1, 1), 7), past_key_values=held)
    assert held.layers[1] is ours
    wrapper.use(model, "sdpa")
    plain = DynamicCache(config=model.config)
    model.generate(**prompt(1, 40), past_key_values=plain, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert not any(kinds(plain))
    wrapper.use(model, wrapper.IMPLEMENTATION)
    convert(model, Plan.everywhere((1,), "connections", replace(PAGED, decode=All())))
    assert not hasattr(model, wrapper.HOOK) and not model.model._forward_pre_hooks
    convert(model, Plan.everywhere((1,), "connections", PAGED))
    assert len(model.model._forward_pre_hooks) == 1
    convert(model, Plan.everywhere((1,), "connections", PAGED))
    assert len(model.model._forward_pre_hooks) == 1
    convert(model, Plan())
    assert not hasattr(model, wrapper.HOOK) and not model.model._forward_pre_hooks
