"""`sentei.trace` hears what core's does, and shows itself in a notebook."""

import html
import json
import re

import pytest
import torch
from circuits import roomy, spelled, tiled
from tiny import tiny_tokenizer

import sentei
from sentei.circuit.agreement import kept_keys
from sentei.circuit.capture import capture
from sentei.circuit.tracing import spell
from sentei.core import tracing
from sentei.core.errors import SenteiError
from sentei.training.data import Bytes


def told(shown: str) -> dict:
    page = html.unescape(re.search(r'srcdoc="(.*)"></iframe>', shown, re.DOTALL)[1])
    return json.loads(re.search(r'id="trace">(.*?)</script>', page, re.DOTALL)[1])


def test_a_notebook_shows_the_prompt_and_what_was_written():
    model = tiled()
    tokens = torch.arange(3, 36)[None]
    with sentei.trace(model, tiny_tokenizer()) as t:
        model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False,
                       eos_token_id=None)
    found = t.circuit().runs[0]
    again = capture(model, [tokens[0].tolist()], spelled, write=3).runs[0]
    assert [token.id for token in found.tokens] == [token.id for token in again.tokens] and found.prompt == 33
    for layer in range(3):
        assert torch.equal(kept_keys(found, layer), kept_keys(again, layer))
    head = told(t._repr_html_())
    assert len(head["runs"]) == 1 and head["runs"][0]["tokens"][0] == [3, "!"]


def test_it_hears_what_core_hears():
    model, tokens = roomy(), torch.arange(6)[None]
    with torch.no_grad(), sentei.trace(model) as ours, tracing.trace(model) as theirs:
        model(tokens)
    assert ours.paths() == theirs.paths() and ours.cost() == theirs.cost() and ours.density() == theirs.density()
    assert [token.text for token in ours.circuit().runs[0].tokens] == list("012345")
    assert not model._forward_pre_hooks


def test_the_newest_prompt_is_shown():
    model = roomy()
    with torch.no_grad(), sentei.trace(model) as t:
        model(torch.arange(6)[None])
        model(torch.arange(2, 6)[None])
    assert [token.id for token in t.circuit().runs[0].tokens] == [2, 3, 4, 5]


def test_rows_of_a_batch():
    model = roomy(depth=None)
    batch = torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]])
    with torch.no_grad(), sentei.trace(model) as t:
        model(batch)
    alone = capture(model, [[9, 8, 7, 6]], spelled).runs[0]
    assert torch.equal(kept_keys(t.circuit(1).runs[0], 1), kept_keys(alone, 1))
    with pytest.raises(SenteiError, match="row 2"):
        t.circuit(2)


def test_an_empty_trace_says_so():
    with sentei.trace(roomy()) as t:
        pass
    assert "without records" in t._repr_html_()
    with pytest.raises(SenteiError, match="a call of a model with rooms"):
        t.circuit()


def test_words_that_a_space_sets_apart_bring_it_along():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "bat": 1, "##s": 2, ",": 3, "[SEP]": 4}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    text = spell(PreTrainedTokenizerFast(tokenizer_object=pieces))
    assert "".join(map(text, [1, 2, 3, 1, 4])) == " bats, bat [SEP]"


def test_bytes_that_sentencepiece_falls_back_on():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = Tokenizer(models.BPE({name: place for place, name in enumerate(names)}, [], unk_token="<unk>",
                                  byte_fallback=True))
    pieces.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    text = spell(PreTrainedTokenizerFast(tokenizer_object=pieces))
    assert [text(place) for place in (1, 2 + 0xE3, 2 + 0x81, 2 + 0x41)] == ["a", "<e3>", "<81>", "A"]


def test_parts_of_characters_are_told_as_bytes():
    tokenizer = tiny_tokenizer()
    first = tokenizer("剪")["input_ids"][0]
    assert spell(tokenizer)(first) == "<e5>" and spell(tokenizer)(tokenizer("a")["input_ids"][0]) == "a"
    assert spell(Bytes())(0xe5) == "<e5>" and spell(Bytes())(65) == "A"
