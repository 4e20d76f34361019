"""Dense branches beside sparse weights: in the graph, trained, kept, opened, and gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from secateur.graph import Program, SecateurError, verify, with_parameters
from secateur.graph.errors import ArtifactError, PipelineError
from secateur.passes import Context
from secateur.passes.lowering.lower import Lower, plan_as_pruned
from secateur.passes.sparsity.boost import (
    add_branches,
    branch_parameters,
    group_sums,
    remove_branches,
)
from secateur.passes.training.adapt_lora import AdaptLora
from secateur.passes.training.retrain_sparse import RetrainSparse
from secateur.runtime import load, lower_graph, open_engine, open_model, save, to_transformers
from secateur.runtime.packed.weights import iterate_packed_modules
from secateur.runtime.resume.fingerprint import hash_parameters
from secateur.runtime.resume.state import rebuild_program, state_of
from secateur.runtime.save.branches import attach_branches, open_with_branches
from secateur.runtime.serving.engine import StockEngine

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from worker import sparse

QUICK: dict[str, Any] = {
    "tokens": 576,
    "batch_tokens": 96,
    "held_out": 4,
    "evaluations": 1,
    "lr": 2e-3,
    "refresh": 4,
    "mode": "adaptive",
}
IDS = torch.arange(20)[None]
Made = tuple[Program, Context]


@pytest.fixture(scope="module")
def made() -> Made:
    torch.manual_seed(0)
    return sparse()


@pytest.fixture(scope="module")
def trained(made: Made) -> Program:
    return RetrainSparse(**QUICK, boost=8, boost_trained=True)(*made)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def branches(program: Program, width: int) -> dict[str, tuple[Tensor, Tensor]]:
    parameters = dict(program.named_parameters())
    shapes = {name: parameters[name].shape for name in program.sparse}
    return {
        name: (
            group_sums(columns, width, parameters[name]),
            0.02 * torch.randn(rows, columns // width),
        )
        for name, (rows, columns) in shapes.items()
    }


def test_a_branch_adds_a_product_of_low_rank(made: Made) -> None:
    program, _ = made
    added = branches(program, 8)
    with_branches = add_branches(program, added)
    verify(with_branches)
    parameters = dict(program.named_parameters())
    merged = {name: parameters[name].detach() + b @ a for name, (a, b) in added.items()}
    dense = with_parameters(program.replace(sparse={}), merged)
    torch.testing.assert_close(logits(with_branches), logits(dense), rtol=1e-4, atol=1e-5)
    assert (
        branch_parameters(with_branches).keys() == program.sparse.keys()
        and branch_parameters(program) == {}
    )
    again = remove_branches(with_branches)
    verify(again)
    assert torch.equal(logits(again), logits(program)) and branch_parameters(again) == {}
    assert [(n, id(p)) for n, p in again.named_parameters()] == [
        (n, id(p)) for n, p in program.named_parameters()
    ]


def test_group_sums_are_sums() -> None:
    x = torch.randn(3, 12)
    torch.testing.assert_close(x @ group_sums(12, 4, x).T, x.unflatten(-1, (3, 4)).sum(-1))


def test_it_starts_from_the_mean_of_what_was_removed(made: Made, width: int = 16) -> None:
    """So the first step learns from the model with branches, which is nearer to the dense one than
    without."""
    small, context = made
    one = RetrainSparse(**{**QUICK, "tokens": 96, "lr": 1e-12, "mode": "fixed"}, boost=width)(
        small, context
    )
    parameters = dict(one.named_parameters())
    for name, (a, b) in branch_parameters(one).items():
        gone = small.sparse[name].removed
        assert gone is not None
        torch.testing.assert_close(
            parameters[b].detach(), gone.unflatten(1, (-1, width)).mean(-1), rtol=0, atol=1e-8
        )
        assert torch.equal(parameters[a].detach(), group_sums(gone.shape[1], width, gone))
    told, plain = (
        one.history[-1].figures,
        RetrainSparse(**{**QUICK, "tokens": 96, "mode": "fixed"})(small, context),
    )
    assert told["held_out"][0]["kl"] < plain.history[-1].figures["held_out"][0]["kl"]


def test_branches_are_trained_along(made: Made, trained: Program) -> None:
    small, context = made
    verify(trained)
    told, parameters = trained.history[-1].figures, dict(trained.named_parameters())
    assert told["branch_parameters"] == sum(
        parameters[n].numel() for pair in branch_parameters(trained).values() for n in pair
    )
    a, b = branch_parameters(trained)[next(iter(small.sparse))]
    sums = group_sums(parameters[a].shape[1], 8, parameters[a])
    assert not torch.equal(parameters[a], sums), "the sums are trained"
    fixed = RetrainSparse(**QUICK, boost=8)(small, context)
    assert torch.equal(dict(fixed.named_parameters())[a], sums), "the sums are not"
    assert not torch.equal(dict(fixed.named_parameters())[b], parameters[b])
    assert all(
        one.pattern.describe_violations(parameters[name].detach()) is None
        for name, one in trained.sparse.items()
    )
    torch.testing.assert_close(logits(to_transformers(trained)), logits(trained))
    packed = lower_graph(trained, plan_as_pruned(trained))
    left = {name for name, _ in packed.named_parameters()}
    assert not left & trained.sparse.keys() and left.issuperset((a, b)), "the branches stay dense"
    torch.testing.assert_close(logits(packed), logits(trained), rtol=1e-4, atol=1e-4)


def test_it_is_kept_and_opened_with_its_branches(trained: Program, tmp_path: Path) -> None:
    from peft import PeftModel

    report = save(trained, tmp_path / "out", check=False)
    assert report.difference == 0 and report.num_parameters == trained.num_parameters
    assert torch.equal(logits(load(tmp_path / "out")), logits(trained))
    base = open_model(tmp_path / "out" / "base")
    assert torch.equal(logits(base), logits(remove_branches(trained))), (
        "the stock part is the 2:4 model without branches"
    )
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, tmp_path / "out")), logits(trained)
    )
    for opener in (open_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises((SecateurError, OSError, ValueError)):
            opener(tmp_path / "out")


@pytest.mark.parametrize("chosen", [False, True])
def test_it_runs_on_packed_weights_with_its_branches(
    trained: Program, tmp_path: Path, chosen: bool
) -> None:
    """chosen: by a lower pass, so that whoever opens it runs packed."""
    program = Lower(smallest=True)(trained) if chosen else trained
    save(program, tmp_path / "out", check=False)
    packed = load(tmp_path / "out", packed=None if chosen else True)
    modules = dict(iterate_packed_modules(packed))
    assert len(modules) == len(trained.sparse)
    torch.testing.assert_close(logits(packed), logits(trained), rtol=1e-4, atol=1e-4)
    engine = open_engine(tmp_path / "out", device="cpu", packed=True)
    assert isinstance(engine, StockEngine)
    kinds = Counter(row.kind for row in engine.layers)
    assert kinds["2:4"] == len(trained.sparse), "nothing falls back to dense unseen"
    dense = open_engine(tmp_path / "out", device="cpu", packed=False)
    made = [one.generate(IDS, max_new_tokens=4, ignore_end=True).ids for one in (engine, dense)]
    assert torch.equal(*made)
    assert torch.equal(logits(open_with_branches(tmp_path / "out")), logits(trained))
    shapes = open_with_branches(tmp_path / "out", weights=False)
    assert shapes.num_parameters() == trained.num_parameters and shapes.device.type == "meta"


def test_bench_runs_a_folder_with_branches(trained: Program, tmp_path: Path) -> None:
    save(trained, tmp_path / "out", check=False)
    quick = [
        "--shapes",
        "none",
        "--dtype",
        "float32",
        "--rounds",
        "1",
        "--prompt-tokens",
        "4",
        "--new-tokens",
        "2",
    ]
    command = [
        sys.executable,
        "-P",
        "-m",
        "secateur",
        "bench",
        str(tmp_path / "out"),
        *quick,
        "--json",
    ]
    done = subprocess.run(
        [*command, "--work", str(tmp_path / "work")], capture_output=True, text=True, check=True
    )
    (row,) = json.loads(done.stdout)["models"]
    assert row["name"] == "out float32 eager" and row["decode"]["median"] > 0


def test_a_branch_that_fits_no_layer_is_an_error(trained: Program, tmp_path: Path) -> None:
    save(trained, tmp_path / "out", check=False)
    model = load(tmp_path / "out" / "base", packed=True)
    wrong = nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(7, 3))
    for path in (next(iter(dict(iterate_packed_modules(model)))), "model.norm"):
        with pytest.raises(ArtifactError, match="no place for a branch"):
            attach_branches(model, {path: wrong})


def test_a_run_goes_on_from_it(made: Made, trained: Program) -> None:
    small, _ = made
    assert small.cut is not None
    source = small.cut.dense
    again = rebuild_program(source, state_of(trained, hash_parameters(source)))
    verify(again)
    assert branch_parameters(again) == branch_parameters(trained) and torch.equal(
        logits(again), logits(trained)
    )


def test_what_cannot_be_is_refused_with_the_reason(made: Made, trained: Program) -> None:
    small, context = made
    with pytest.raises(PipelineError, match="boost=7 does not divide the 64 inputs"):
        RetrainSparse(boost=7)(small, context)
    with pytest.raises(PipelineError, match=r"branches .boost. already"):
        RetrainSparse(boost=8)(trained, context)
    with pytest.raises(PipelineError, match="adapters have no place"):
        AdaptLora()(trained, context)
    with pytest.raises(PipelineError, match="the graph itself is trained"):
        RetrainSparse(**QUICK, boost=8)(small, replace(context, raise_model=None))
