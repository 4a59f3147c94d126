"""depth in pretrained layers: a part that is left out is one whose last matrix is zero."""

import pytest
import torch
from tiny import tiny_model
from torch import nn

from sentei.axes.depth import Config
from sentei.conversion.families import FAMILIES
from sentei.conversion.layers import layer_of
from sentei.conversion.plan import Entry, Plan, convert
from sentei.conversion.rooms import depth
from sentei.core.errors import UnsupportedError
from sentei.core.rules import Capacity, Fixed

IDS = torch.arange(3, 53)[None]
LAST = {"attention": ("self_attn.o_proj",), "network": ("mlp.down_proj",),
        "block": ("self_attn.o_proj", "mlp.down_proj")}


def drop(layer: int, part: str) -> Plan:
    return Plan((Entry(layer=layer, room="depth", config=Config(rule=Fixed(()), part=part)),))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", LAST)
def test_a_part_that_is_left_out_is_one_whose_last_matrix_is_zero(family, part):
    expected = tiny_model(family)
    for name in LAST[part]:
        nn.init.zeros_(expected.get_submodule(f"model.layers.2.{name}").weight)
    got = convert(tiny_model(family, **({"layer_types": ["full_attention"] * 2 + ["full_attention"]}
                                        if family == "gemma3_text" else {})), drop(2, part))
    if family == "gemma3_text":  # of full attention, so that its last layer is not the first of its kind
        expected = tiny_model(family, layer_types=["full_attention"] * 3)
        for name in LAST[part]:
            nn.init.zeros_(expected.get_submodule(f"model.layers.2.{name}").weight)
    torch.testing.assert_close(logits(got), logits(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family, leads", [("llama", [True, False, False]), ("gemma3_text", [True, True, False])])
def test_the_attention_from_which_a_cache_reads_its_length_cannot_go(family, leads):
    model = tiny_model(family)
    assert [layer_of(model, index).leads for index in range(3)] == leads
    for index, first in enumerate(leads):
        parts = {config.part for config in depth.options(layer_of(model, index), "rule")[1:]}
        assert parts == ({"network"} if first else {"attention", "network", "block"})
    with pytest.raises(UnsupportedError, match="depth: expected a layer whose keys are not needed"):
        convert(model, drop(0, "block"))


def test_choosing_by_token_is_refused():
    with pytest.raises(UnsupportedError, match="depth: expected the rule All, or Fixed"):
        convert(tiny_model("llama"), Plan((Entry(layer=1, room="depth", config=Config(rule=Capacity(0.5))),)))


def test_what_is_left_out_writes_no_keys():
    model = convert(tiny_model("llama"), drop(1, "attention"))
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    assert [layer.get_seq_length() for layer in cache.layers] == [50, 0, 50] and cache.get_seq_length() == 50
