"""The search compares what it says, keeps the best, and goes on after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from zoo.models import tiny_model

from secateur.graph import Program, blocks, capture
from secateur.graph.errors import EditError, PipelineError, SecateurError
from secateur.passes import Pipeline
from secateur.passes.base import Context
from secateur.passes.calibration.data import samples
from secateur.passes.calibration.kl import kl
from secateur.passes.language.options import OptionError
from secateur.passes.repair.repair import held_back_sequences
from secateur.passes.search.search import Candidate, Search, _Run

IDS = torch.randint(3, 120, (6, 12), generator=torch.Generator().manual_seed(2))
SPACE: dict[str, Any] = {"layers": (2, 3, 4), "mlp": (48, 64, 96), "at_most": 0.8, "at_least": 0.6}


@pytest.fixture(scope="module")
def scored() -> Program:
    program = capture(tiny_model("llama", num_hidden_layers=4))
    return Pipeline.parse("score{metric=wanda}").run(program, data=IDS)


@pytest.fixture(scope="module")
def context(scored: Program) -> Context:
    return Context(data=samples(IDS, scored))


def test_the_best_candidate_stays(scored: Program, context: Context) -> None:
    chosen = Search(**SPACE, repair=False, top=4)(scored, context)
    figures = chosen.history[-1].figures
    rows = figures["candidates"]
    assert len(rows) == min(4, figures["within"]) > 1
    assert all(0.6 <= row["parameters"] / scored.num_parameters <= 0.8 for row in rows)
    assert all(row["cost"] == row["parameters"] for row in rows), (
        "what was counted is what was built"
    )
    best = min(rows, key=lambda row: row["kl"])
    assert figures["chosen"] == best["shape"] and chosen.num_parameters == best["parameters"]
    assert len(blocks(chosen)) == best["shape"]["layers"]
    judges = [s for at, s in enumerate(context.data or ()) if at in held_back_sequences(6)]
    dense = chosen.cut.dense if chosen.cut else chosen
    assert kl(dense, chosen, judges).mean == pytest.approx(best["kl"], abs=1e-4)


def test_candidates_are_repaired(scored: Program) -> None:
    options: dict[str, Any] = {"mlp": (24,), "at_most": 1.0, "at_least": 0.1, "top": 1}
    ids = torch.randint(3, 120, (40, 32), generator=torch.Generator().manual_seed(2))
    context = Context(data=samples(ids, scored))
    rough, repaired = (
        Search(**options, repair=asked)(scored, context).history[-1].figures["candidates"][0]
        for asked in (False, True)
    )
    assert repaired["shape"] == rough["shape"] and repaired["kl"] < rough["kl"]


def test_a_killed_search_goes_on_after_its_last_candidate(
    scored: Program, context: Context, tmp_path: Path
) -> None:
    resumable = Context(data=context.data, resume=tmp_path)
    first = Search(**SPACE, repair=False, top=2)(scored, resumable)
    (tmp_path / "candidate 1.safetensors").unlink(missing_ok=True)
    again = Search(**SPACE, repair=False, top=2)(scored, resumable)
    assert again.history[-1].figures["candidates"] == first.history[-1].figures["candidates"]
    ours, theirs = dict(again.named_parameters()), dict(first.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_patience_stops_it(scored: Program, context: Context) -> None:
    rows = (
        Search(**SPACE, repair=False, top=5, patience=1)(scored, context)
        .history[-1]
        .figures["candidates"]
    )
    worse = [row["kl"] >= min(r["kl"] for r in rows[:at]) for at, row in enumerate(rows) if at]
    assert not any(worse[:-1]), "nothing was compared after the first that was no better"


def test_shapes_that_no_stock_class_holds_are_passed_over(
    scored: Program, context: Context
) -> None:
    def picky(program: Program) -> Any:
        if len(blocks(program)) == 3:
            raise SecateurError("not three layers")

    careful = Context(data=context.data, raise_model=picky)
    rows = Search(**SPACE, repair=False, top=4)(scored, careful).history[-1].figures["candidates"]
    assert rows and all(row["shape"]["layers"] != 3 for row in rows)

    def never(program: Program) -> Any:
        raise SecateurError("no")

    with pytest.raises(PipelineError, match="no stock class holds"):
        Search(**SPACE, repair=False, top=2)(scored, Context(data=context.data, raise_model=never))


def test_a_plan_and_ranges(scored: Program) -> None:
    search = Search(
        hidden={"low": 32, "multiple": 16}, expansion=(1.0, 1.5), at_most=0.7, at_least=0.2
    )
    found = search.list_candidates(scored)
    assert {one.shape["hidden"] for one in found} <= {32, 48, 64}
    assert all(
        one.shape["mlp"] in (one.shape["hidden"], 1.5 * one.shape["hidden"]) for one in found
    )
    assert {edit.family for edit in search.plan(scored)} == {"hidden", "mlp"}
    assert search.preview(scored).num_parameters == found[0].cost


def test_a_budget_of_time(scored: Program) -> None:
    found = Search(
        mlp=(16, 96), layers=(1, 4), budget="latency", at_most=10.0, at_least=1e-9
    ).list_candidates(scored)
    assert len(found) == 4 and all(one.cost > 0 for one in found)


def test_what_makes_no_sense_is_said(scored: Program) -> None:
    with pytest.raises(OptionError, match="nothing to choose"):
        Search()
    with pytest.raises(OptionError, match="stands for mlp"):
        Search(expansion=(2.0,), mlp=(3,))
    with pytest.raises(EditError, match="no shape costs between"):
        Search(mlp=(96,), at_most=0.1).list_candidates(scored)


@pytest.mark.slow
def test_the_finalists_are_distilled(scored: Program) -> None:
    ids = torch.randint(3, 120, (24, 32), generator=torch.Generator().manual_seed(2))
    context = Context(data=samples(ids, scored))
    chosen = Search(**SPACE, repair=False, top=3, tokens=256, finalists=2)(scored, context)
    rows = chosen.history[-1].figures["candidates"]
    again = [row for row in rows if "kl_distilled" in row]
    assert len(again) == 2
    assert (
        chosen.history[-1].figures["chosen"]
        == min(again, key=lambda row: row["kl_distilled"])["shape"]
    )


def test_patience_counts_from_the_last_that_was_better(scored: Program, context: Context) -> None:
    found = [5.0, 4.0, 4.5, 4.2, 3.0, 3.5, 3.0, 2.0]
    shapes = [Candidate({"mlp": at}, 1.0) for at in range(len(found))]

    def compared(patience: int) -> list[float]:
        run = _Run(
            Search(mlp=(48,), repair=False, top=8, patience=patience),
            scored,
            context,
            context.data or (),
        )
        run._candidate_row = lambda one: {"shape": dict(one.shape), "kl": found[one.shape["mlp"]]}  # type: ignore[method-assign]
        return [row["kl"] for row in run.compare_candidates(shapes)]

    assert compared(0) == found
    assert compared(1) == found[:3]
    assert compared(2) == found[:4]
    assert compared(3) == found
