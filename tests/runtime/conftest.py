"""Small checkpoints for the runtime tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))
from runtime_models import SMALL, tiny


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny("LlamaConfig", **SMALL)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[PreTrainedModel], Path]:
    """Saves a model as a stock checkpoint and gives its folder."""

    def write(model: PreTrainedModel) -> Path:
        model.save_pretrained(tmp_path / "checkpoint")
        return tmp_path / "checkpoint"

    return write
