"""What entries of a sparse weight are ranked by when the score is to match the start."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from secateur.graph import Sparse, parse_pattern
from secateur.passes import Context
from secateur.passes.training.masks.choice import MaskScore
from secateur.passes.training.retrain_sparse import _ranked_by


def test_a_start_by_sparsegpt_is_ranked_by_wanda_and_said_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kind, norms = parse_pattern("2:4"), torch.ones(4)
    sparse = {
        "a": Sparse(kind, "sparsegpt", norms),
        "b": Sparse(kind, "sparsegpt", norms),
        "c": Sparse(kind, "ria", norms),
        "d": Sparse(kind, "magnitude"),
    }
    student = SimpleNamespace(sparse=sparse)
    with caplog.at_level(logging.INFO, "secateur.passes"):
        found = _ranked_by(student, MaskScore("match"), Context())  # type: ignore[arg-type]
    assert found == {"wanda": 2, "ria": 1, "magnitude": 1}
    assert "2 weights that sparsegpt made sparse are ranked by wanda" in caplog.text
    assert caplog.text.count("ranked by") == 1
    assert _ranked_by(student, MaskScore("magnitude"), Context()) == {"magnitude": 4}  # type: ignore[arg-type]
