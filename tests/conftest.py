"""For every test: no hub, two threads, one seed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when transformers is first imported

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in each test, whichever tests ran before."""
    torch.manual_seed(0)
