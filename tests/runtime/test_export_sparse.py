"""A program with sparse weights on disk: a stock checkpoint with exact zeros, and its packed
weights beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_models import SMALL, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from zoo.sparse import as_sparse

import secateur
from secateur.graph import Pattern, Program, Sparse, capture
from secateur.graph.errors import ArtifactError
from secateur.passes import Pipeline
from secateur.passes.lowering.cost import DENSE
from secateur.passes.lowering.lower import Lower, plan_as_pruned
from secateur.runtime.open.checkpoint import SINGLE, read_header
from secateur.runtime.open.declared import read_declared
from secateur.runtime.packed.store import FOLDER, PLAN, has_packed, read_plan, runs_packed
from secateur.runtime.packed.weights import iterate_packed_modules
from secateur.runtime.serving.engine import open_engine
from secateur.runtime.verify import find_stored_faults, verify_folder
from secateur.runtime.verify.census import census_of_file


@pytest.fixture(scope="module")
def dense() -> Program:
    return capture(tiny("LlamaConfig", **SMALL))


@pytest.fixture(scope="module")
def program(dense: Program) -> Program:
    return as_sparse(dense)


def test_both_forms_lie_in_the_folder_and_the_stock_one_runs(
    program: Program, tmp_path: Path
) -> None:
    report = secateur.save(program, tmp_path / "out", check=False)
    assert (
        report.packed["kinds"] == {"2:4": 14}
        and 0 < report.packed["bytes"] < 0.54 * report.packed["dense_bytes"]
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "sparsity" not in json.dumps(config) and "quantization_config" not in config
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    for name, parameter in program.named_parameters():
        assert torch.equal(parameter, stock.get_parameter(name))
        assert not bool((stock.get_parameter(name).signbit() & (parameter == 0)).any()), (
            "zeros are +0.0"
        )
    opened = secateur.load(tmp_path / "out")
    assert (
        not list(iterate_packed_modules(opened))
        and type(opened.model.layers[0].mlp.up_proj) is nn.Linear
    )
    packed = secateur.load(tmp_path / "out", packed=True)
    ids = torch.randint(3, 96, (2, 7))
    with torch.no_grad():
        assert len(list(iterate_packed_modules(packed))) == 14 and torch.allclose(
            packed(ids).logits, stock(ids).logits, atol=1e-4
        )
    assert not read_plan(tmp_path / "out" / FOLDER).chosen
    assert open_engine(tmp_path / "out", device="cpu").layers[0].kind == DENSE
    told = {row.kind for row in open_engine(tmp_path / "out", device="cpu", packed=True).layers}
    assert told == {"2:4", DENSE}


def test_the_packed_weights_can_be_left_out(program: Program, tmp_path: Path) -> None:
    report = secateur.save(program, tmp_path / "out", check=False, packed=False)
    assert report.packed == {} and not has_packed(tmp_path / "out")
    assert not runs_packed(tmp_path / "out", None) and not runs_packed(tmp_path / "out", False)
    with pytest.raises(ArtifactError, match="has no packed weights"):
        secateur.load(tmp_path / "out", packed=True)


def test_what_lower_chose_is_what_runs(program: Program, tmp_path: Path) -> None:
    secateur.save(Lower(smallest=True)(program), tmp_path / "out", check=False)
    assert runs_packed(tmp_path / "out", None) and list(
        iterate_packed_modules(secateur.load(tmp_path / "out"))
    )
    assert not list(iterate_packed_modules(secateur.load(tmp_path / "out", packed=False)))
    found = verify_folder(tmp_path / "out", quick=True)
    assert found.green and any(
        "bit for bit" in f.says for one in found.outcomes for f in one.findings
    )
    plan = tmp_path / "out" / FOLDER / PLAN
    earlier = json.loads(plan.read_text())
    assert earlier.pop("chosen") is True
    plan.write_text(
        json.dumps(earlier)
    )  # as versions wrote it that kept packed weights of lowered models only
    assert runs_packed(tmp_path / "out", None)


def test_rounded_copies_are_not_taken_for_the_stock_weights(dense: Program, tmp_path: Path) -> None:
    program = Pipeline.parse("quantize{bits=8},lower{smallest=true,head=int8}").run(
        as_sparse(dense)
    )
    report = secateur.save(program, tmp_path / "out", check=False)
    assert report.packed["kinds"] == {"2:4+int8": 14, "int8": 1}
    found = verify_folder(tmp_path / "out", quick=True)
    assert found.green, found.faults
    says = [f.says for one in found.outcomes for f in one.findings]
    assert any("1 packed weights are rounded copies" in one for one in says)


@pytest.mark.parametrize("pattern", ["1:4", "1:2"])
def test_stricter_patterns_are_packed_as_2_4(pattern: str, dense: Program) -> None:
    plan = plan_as_pruned(as_sparse(dense, pattern))
    assert [row.kind for row in plan.layers] == ["2:4"] * 14 and not plan.chosen
    assert sum(1 for row in plan.layers if row.shares) == 10, "queries, keys, values; gate and up"


def test_looser_patterns_are_declared_and_not_packed(dense: Program, tmp_path: Path) -> None:
    report = secateur.save(as_sparse(dense, "4:8"), tmp_path / "out", check=False)
    assert report.packed == {} and not has_packed(tmp_path / "out")
    assert {str(one.pattern) for one in read_declared(tmp_path / "out").values()} == {"4:8"}


SCORES = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 1.0, 2.0, -2.0, 3e38])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_masked_is_stored_exactly_2_4(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    rows, groups = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    values = data.draw(st.lists(SCORES, min_size=4 * rows * groups, max_size=4 * rows * groups))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    weight = torch.tensor(values, dtype=torch.float64).view(rows, -1).clamp(-6e4, 6e4).to(dtype)
    kept = torch.where(Pattern(2, 4).select_mask(weight.abs()), weight, 0.0) + 0.0
    folder = tmp_path_factory.mktemp("stored")
    save_file({"w": kept}, folder / SINGLE)
    assert find_stored_faults(folder, {"w": Sparse(Pattern(2, 4))}) == []
    (one,) = census_of_file(folder / SINGLE, read_header(folder / SINGLE))
    assert one.over["2:4"] == 0 and one.negative_zeros == 0
    assert torch.equal(load_file(folder / SINGLE)["w"], kept)
