"""A saved model says what of it is sparse, and knows it again when it is opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import secateur
from secateur.graph import Share
from secateur.graph.errors import ArtifactError
from secateur.runtime.open.declared import from_json, read_declared, to_json
from secateur.runtime.save.artifact import MANIFEST


def test_patterns_outlive_a_save_under_the_names_of_the_checkpoint(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    """A dropped layer numbers those after it anew; what is said of them goes along."""
    text = (
        "sparsify{metric=magnitude,targets=mlp},"
        "sparsify{metric=magnitude,targets=q_proj,pattern=25%}"
    )
    program = secateur.Pipeline.parse(f"{text},prune-depth{{layers=[0]}}").run(
        secateur.capture(llama)
    )
    last = max(int(name.split(".")[2]) for name in program.sparse)
    secateur.save(program, tmp_path / "sparse", check=False)
    again = secateur.capture(tmp_path / "sparse")
    secateur.verify(again)
    layer = {name: int(name.split(".")[2]) for name in program.sparse}
    assert set(again.sparse) == {
        name.replace(f"layers.{at}.", f"layers.{at - 1}.") for name, at in layer.items()
    }
    assert f"model.layers.{last - 1}.mlp.up_proj.weight" in again.sparse
    q_proj = again.sparse[f"model.layers.{last - 1}.self_attn.q_proj.weight"]
    assert (q_proj.pattern, q_proj.metric, q_proj.removed) == (Share(0.25), "magnitude", None)
    assert from_json(json.loads(json.dumps(to_json(again.sparse)))).keys() == again.sparse.keys()
    dense = dict(program.named_parameters())
    for name, parameter in again.named_parameters():
        assert any(
            torch.equal(parameter, one) for one in dense.values() if one.shape == parameter.shape
        ), name


def test_a_folder_that_says_nothing_is_dense(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "plain")
    assert not read_declared(tmp_path / "plain") and not secateur.capture(tmp_path / "plain").sparse
    broken = {
        "format": "secateur-artifact",
        "version": 1,
        "files": {},
        "history": [],
        "versions": {},
    }
    manifest = tmp_path / "plain" / MANIFEST
    manifest.write_text(json.dumps({**broken, "figures": {"sparse": {"w": {"pattern": "four"}}}}))
    with pytest.raises(ArtifactError, match="is damaged"):
        read_declared(tmp_path / "plain")
