"""What inspection tells of a model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from zoo.models import tiny_model
from zoo.sparse import as_sparse

from secateur.graph import Program, SecateurError, capture
from secateur.tools.inspect import groups_of_block, inspect_program
from secateur.tools.report import inspection_tables
from secateur.tools.report.console import CommandConsole


def test_families_locks_and_blocks(llama: Program) -> None:
    found = inspect_program(llama)
    families = {family.family: family for family in found.families}
    assert families["mlp"].groups == 2
    assert families["mlp"].units == {96: 2}
    assert families["mlp"].locked == {}
    assert families["mlp"].parameters == 2 * 3 * 64 * 96
    assert families["hidden"].parameters == llama.num_parameters
    assert sum(families["vocabulary"].locked.values()) == 1
    assert found.blocks == ("model.layers.0", "model.layers.1")
    assert found.dtypes == {"float32": llama.num_parameters}
    assert found.model == "LlamaForCausalLM"
    assert json.loads(json.dumps(found.to_json()))["families"]


def test_sparse_weights_are_told(llama: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_program(llama).sparse == {}
    assert "sparse weights" not in printed(llama, capsys)
    sparse = as_sparse(llama)
    assert inspect_program(sparse).sparse == {"2:4": 14}
    assert "14 x 2:4" in printed(sparse, capsys)


def printed(program: Program, capsys: pytest.CaptureFixture[str]) -> str:
    CommandConsole().result(None, inspection_tables(inspect_program(program)))
    return capsys.readouterr().out


def test_weights_are_not_needed() -> None:
    with torch.device("meta"):
        light = inspect_program(capture(tiny_model("mixtral").to(torch.bfloat16)))
    heavy = inspect_program(capture(tiny_model("mixtral").to(torch.bfloat16)))
    assert replace(light, nodes=0) == replace(heavy, nodes=0)
    assert set(light.dtypes) == {"bfloat16"}


def test_the_groups_of_one_block(llama: Program) -> None:
    path, groups = groups_of_block(llama, -1)
    assert path == "model.layers.1"
    assert [group.block for group in groups[:2]] == [path, path]
    assert {"mlp", "kv_heads", "hidden"} <= {group.family for group in groups}
    assert "mlp@model.layers.0.mlp" not in {group.name for group in groups}
    with pytest.raises(SecateurError, match=r"no block 2: the model has blocks 0\.\.1"):
        groups_of_block(llama, 2)
