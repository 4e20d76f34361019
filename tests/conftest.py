"""Shared by all tests: quiet, offline, deterministic; and the real model where a test is marked
``real``."""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTHONSAFEPATH", "1")

import pytest
import torch

ROOT = Path(__file__).parents[1]

# torch's structured trace is formatted for whoever captures logs: a tenth of every capture.
logging.getLogger("torch.__trace").setLevel(logging.CRITICAL)
# Graphs hold very many objects that live as long as they do: look for cycles less often.
gc.set_threshold(200_000, 20, 50)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The demo's model as a stock fp32 checkpoint folder (`make assets` prepares it; `make test`
    does so by itself)."""
    folder = (
        Path(os.environ.get("SECATEUR_CACHE", ROOT / ".cache" / "secateur"))
        / "smollm2-135m-instruct"
    )
    if not (folder / "config.json").is_file():
        pytest.skip("the real model is not prepared: run `make assets`")
    return folder
