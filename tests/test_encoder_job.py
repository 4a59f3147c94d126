"""The main job on an encoder, end to end on a tiny random one: quality is the cosine of embeddings."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_encoder
from torch import nn

import sentei as package
from sentei import pipeline
from sentei.axes.depth import Config as Depth
from sentei.budget.calibration import Library
from sentei.budget.judge import Judge
from sentei.budget.offers import Ruler, candidates
from sentei.budget.workload import Decode, Embed, Prefill, on_model
from sentei.conversion import export
from sentei.conversion.checkpoints import load_model, locate
from sentei.conversion.plan import Entry, Plan, convert
from sentei.conversion.tokenizers import read_tokenizer
from sentei.core.errors import FileError
from sentei.core.rules import Fixed
from sentei.core.storage import Stages
from sentei.measurement.quality import COSINE
from sentei.measurement.text import read_text, windows_of


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> dict:
    """An encoder that reads 128 tokens, and the text of the other jobs."""
    folder = save_tiny_encoder(tmp_path_factory.mktemp("model") / "bert", initializer_range=0.2, intermediate_size=256,
                               max_position_embeddings=128)
    text = folder.parent / "text.txt"
    text.write_text(" ".join(f"{number} squared is {number * number}." for number in range(3000)))
    return {"model": folder, "text": text, "workload": "prefill:96"}


@pytest.fixture(scope="module")
def done(job, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("run") / "out"
    settings = {**job, "model": str(job["model"])}
    return pipeline.run(pipeline.Request(**settings, quality=0.9, out=out), pipeline.Silent())


def test_the_public_object_tells_the_measure_and_no_perplexity(done):
    result = done.result
    assert result["schema"] == "sentei.prune/1" and result["measure"] == "cosine"
    assert result["dense"]["perplexity"] is result["pruned"]["perplexity"] is None
    assert set(result["dense"]) == {"perplexity", "seconds", "tokens_per_second"}
    json.dumps(result, allow_nan=False)


@torch.no_grad()
def test_the_quality_of_a_plan_is_the_mean_cosine_of_embeddings(job):
    """Against the definition, on windows as a job cuts them, of an encoder without the network of a layer."""
    rows = windows_of(read_tokenizer(job["model"]), read_text(job["text"]).text, length=96, needed=Embed(96).windows)
    assert {use: tuple(each.shape) for use, each in rows.items()} == {
        "calibrate": (1, 96), "choose": (8, 96), "verify": (24, 96)}
    assert rows["verify"][:, 0].unique().tolist() == [1] and rows["verify"][:, -1].unique().tolist() == [2]
    dense, model = (load_model(locate(str(job["model"]))) for _ in range(2))
    judge = Judge(model, Embed(96), rows, Stages(None), {})
    judge.prepare("verify", lambda: None)
    plan = Plan((Entry(layer=1, room="depth", config=Depth(rule=Fixed(()), part="network")),))
    found = judge.judge(plan, "verify", lambda: None).quality
    convert(model, plan)
    cosines = [float(nn.functional.cosine_similarity(*(each(row[None]).last_hidden_state[0].mean(0)
                                                       for each in (dense, model)), dim=0)) for row in rows["verify"]]
    mean = sum(cosines) / 24
    spread = (sum((cosine - mean) ** 2 for cosine in cosines) / 23 / 24) ** 0.5
    assert 0 < mean < 0.99 and found.value == pytest.approx(mean, abs=1e-5)
    assert (found.low, found.high) == (pytest.approx(mean - 2.069 * spread, abs=1e-5),
                                       pytest.approx(mean + 2.069 * spread, abs=1e-5))


def test_the_folder_loads_proves_itself_and_is_told(done, job, sentei):
    out = Path(done.result["out"])
    receipt = pipeline.verify(out)
    assert receipt["met"] and receipt["generated"] == []
    model, ids = package.load(out), torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = done.model(ids).last_hidden_state
        torch.testing.assert_close(model(ids).last_hidden_state, expected, rtol=0, atol=1e-3)
    for folder, kind in ((out, "pruned model"), (job["model"], "model")):
        facts = json.loads(sentei("inspect", folder, "--json").stdout)
        assert facts["kind"] == kind and facts["accepted"]


def test_report_and_card_say_what_the_quality_is_and_nothing_of_perplexity(done):
    for name in ("report.html", "README.md"):
        text = (Path(done.result["out"]) / name).read_text()
        assert "cosine of a text" in text and "perplexity" not in text.lower() and "not measured" not in text, name


def test_slack_is_priced_in_cosine(job, sentei):
    words = ("slack", job["model"], "--text", job["text"], "--workload", "prefill:96")
    done = sentei(*words, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["measure"] == "cosine" and found["dense"]["perplexity"] is None
    assert {option["room"] for option in found["options"]} == {"connections", "weights", "experts", "heads", "depth"}
    paying = [option for option in found["options"] if option["nats"] is not None]
    assert all(0 <= option["cosine"] < 1 and option["cosine_per_millisecond"] >= 0 for option in paying)
    from sentei.commands.slack import summary

    assert "cosine a millisecond saved" in summary(found) and "perplexity" not in summary(found)


@pytest.mark.parametrize("flags, said", [
    (("--workload", "decode:64"), "an encoder, which writes no tokens"),
    (("--workload", "prefill:96", "--heal", "1"), "--heal"),
    (("--workload", "prefill:96", "--no-lookahead"), "--no-lookahead"),
], ids=["decode", "heal", "lookahead"])
def test_what_only_language_models_do_is_refused(job, sentei, tmp_path, flags, said):
    done = sentei("prune", job["model"], "--text", job["text"], "--out", tmp_path / "out", *flags)
    assert done.returncode == 5 and said in done.stderr and "encoder" in done.stderr
    assert not (tmp_path / "out").exists()


def test_slack_of_decoding_is_refused(job, sentei):
    done = sentei("slack", job["model"], "--text", job["text"], "--workload", "decode:64")
    assert done.returncode == 5 and "an encoder, which writes no tokens" in done.stderr


def test_a_context_that_is_too_short_is_told(job, sentei, tmp_path):
    done = sentei("prune", job["model"], "--text", job["text"], "--workload", "prefill:129", "--out", tmp_path / "out")
    assert done.returncode == 2 and "context of 128 tokens" in done.stderr


def test_a_workload_is_the_same_for_language_models_and_another_for_encoders(job):
    from tiny import tiny_model

    encoder, decoder = load_model(locate(str(job["model"]))), tiny_model("llama")
    assert on_model(Prefill(96), encoder) == Embed(96) and type(on_model(Prefill(96), decoder)) is Prefill
    assert on_model(Decode(96), decoder) == Decode(96)
    assert str(Embed(96)) == "prefill:96" and Embed(96).timed_tokens == 96


def test_a_changed_receipt_is_refused(done, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(done.result["out"], tmp_path / "copy")
    held = load_file(folder / export.RECEIPT)
    save_file({**held, "states": held["states"] + 1}, folder / export.RECEIPT)
    assert not export.check(folder)["met"]
    save_file({**held, "tokens": held["tokens"] + 1000}, folder / export.RECEIPT)
    with pytest.raises(FileError, match="tokens below 320"):
        export.check(folder)


@torch.no_grad()
def test_the_cost_of_an_option_is_the_cosine_that_the_whole_encoder_loses(job):
    """Run from the option's layer on, which is given what the dense layers before it give."""
    dense, model = (load_model(locate(str(job["model"]))) for _ in range(2))
    text, rows = torch.randint(3, 259, (10, 96), generator=torch.Generator().manual_seed(1)).split([7, 3])
    ruler, seen = Ruler(model, rows, COSINE), Library(model, text, "rule")
    assert ruler.nats(0) == ruler.nats(1) == pytest.approx(0, abs=1e-9)
    entries = [entry for entry, _ in candidates(model, "rule")]
    assert {entry.room for entry in entries} == {"weights", "experts", "heads", "depth"}
    for entry in entries:
        plan = Plan((entry,))
        convert(model, plan, seen(plan))
        one, two = (each(rows).last_hidden_state.double().mean(1) for each in (dense, model))
        expected = -math.log(float(nn.functional.cosine_similarity(one, two, dim=-1).mean()))
        assert ruler.nats(entry.layer) == pytest.approx(expected, rel=1e-2, abs=1e-6) and expected > 1e-6
    assert not any("forward" in vars(layer) for layer in model.encoder.layer)
