"""A tiny job of the training loop, as a YAML file and its text."""

import pytest

JOB = """
model: {width: 16, layers: 1, heads: [2, 1], feed_forward: 24}
data: {text: [text.txt], context: 16, held_out: 3}
training: {steps: 12, batch: 4, accumulate: 2, evaluate: 4, save: 3, optimizer: {rate: 1e-2, warmup: 3}}
"""


@pytest.fixture
def job(tmp_path):
    """The path of the tiny job."""
    text = " ".join(f"{number} squared is {number * number}." for number in range(400))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path / "job.yaml"
