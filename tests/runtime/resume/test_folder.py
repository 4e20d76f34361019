"""Runs that go on where they were killed: the same Program, bit for bit, or a refusal that says
what differs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from runtime_models import SMALL, tiny

from secateur.graph import Cut, Pattern, Program, Share, Sparse, capture, drop, with_parameters
from secateur.graph.errors import ArtifactError
from secateur.passes import Context, Hooks, Pass, PassResult, Pipeline, PruneWidth, Sample, samples
from secateur.passes.lowering.layers import linear_layers
from secateur.passes.storage.journal import Journal
from secateur.runtime.compress import compress
from secateur.runtime.resume.fingerprint import (
    graph_digest,
    hash_parameters,
    list_differences,
    run_fingerprint,
)
from secateur.runtime.resume.folder import ResumeError, Work, hold_work_folder
from secateur.runtime.resume.state import StateMismatch, rebuild_program, state_of
from secateur.runtime.save.disk import try_lock

TEXT = (
    "score{metric=random},prune-width{mlp=0.25,kv_heads=2},"
    "score{metric=activation},prune-width{hidden=48},repair"
)
MORE = "score{metric=random},prune-width{mlp=60}"


class Killed(BaseException):
    """What a test raises where a process would die."""


@dataclass(frozen=True)
class Noise(Pass):
    """Adds seeded noise in three steps, each kept; may be killed before one of them, or at the
    end."""

    name: ClassVar[str] = "noise"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "lossy"
    killed_before: int = 99
    scale: float = 0.1
    steps: ClassVar[list[int]] = []

    def call(self, program: Program, context: Context) -> PassResult:
        journal = Journal(context.resume)
        values = {name: p.detach() for name, p in program.named_parameters()}
        for step in range(3):
            if step == self.killed_before:
                raise Killed
            kept = journal.read(f"step {step}")
            if kept is None:
                Noise.steps.append(step)
                draw = torch.Generator().manual_seed(context.seed + step)
                values = {
                    n: v + self.scale * torch.randn(v.shape, generator=draw)
                    for n, v in values.items()
                }
                journal.write(f"step {step}", values)
            else:
                values = dict(kept.tensors)
        return PassResult(with_parameters(program, values), modified=True, figures={"third": 1 / 3})


@pytest.fixture(scope="module")
def source() -> Program:
    return capture(tiny("LlamaConfig", **SMALL))


@pytest.fixture(scope="module")
def again() -> Program:
    """The same model, captured once more, as a new process would."""
    return capture(tiny("LlamaConfig", **SMALL))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(1))


def same(one: Program, other: Program) -> bool:
    """Equal in all that a pass can see."""
    scores = [(n, s.tolist()) for n, s in one.scores.items()] == [
        (n, s.tolist()) for n, s in other.scores.items()
    ]
    cuts = [c and {n: k.tolist() for n, k in c.kept.items()} for c in (one.cut, other.cut)]
    dense = [c and hash_parameters(c.dense) for c in (one.cut, other.cut)]
    alike = list(hash_parameters(one).items()) == list(
        hash_parameters(other).items()
    ) and graph_digest(one) == graph_digest(other)
    return (
        alike
        and scores
        and cuts[0] == cuts[1]
        and dense[0] == dense[1]
        and one.history == other.history
    )


@pytest.mark.parametrize("count", range(1, 6))
def test_a_program_is_built_again_after_each_pass(
    source: Program, again: Program, ids: torch.Tensor, count: int
) -> None:
    pipeline = Pipeline.parse(TEXT)
    program = replace(pipeline, passes=pipeline.passes[:count]).run(source, ids)
    entry = state_of(program, hash_parameters(source))
    found = rebuild_program(again, entry)
    assert same(found, program)
    assert torch.equal(found(input_ids=ids).logits, program(input_ids=ids).logits)
    assert (count > 1) == bool(
        entry.tensors and any(name.startswith("now ") for name in entry.tensors)
    )


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.1"],
        ["model.layers.2.mlp", "model.layers.0"],
        ["model.layers.2.mlp", "model.layers.2"],
    ],
)
def test_removed_blocks_stay_removed(names: list[str], ids: torch.Tensor) -> None:
    deep, deep_again = (
        capture(tiny("LlamaConfig", **{**SMALL, "num_hidden_layers": 4})) for _ in range(2)
    )
    program = Pipeline.parse(TEXT).run(deep, ids)
    for name in names:
        program = drop(program, [name])
    program = Pipeline((Noise(),)).run(program, ids)
    found = rebuild_program(deep_again, state_of(program, hash_parameters(deep)))
    assert same(found, program) and found.cut is not None and program.cut is not None
    assert found.cut.dropped == program.cut.dropped


def test_weights_changed_before_the_first_edit_are_kept_too(
    source: Program, again: Program, ids: torch.Tensor
) -> None:
    program = Pipeline((Noise(), *Pipeline.parse(TEXT).passes)).run(source, ids)
    assert same(rebuild_program(again, state_of(program, hash_parameters(source))), program)


def test_sparse_weights_are_kept_bit_for_bit(source: Program, again: Program) -> None:
    values, told = dict[str, torch.Tensor](), dict[str, Sparse]()
    for one in linear_layers(source)[0][:3]:
        dense = dict(source.named_parameters())[one.parameter].detach()
        mask = Pattern(2, 4).select_mask(dense.abs())
        values[one.parameter] = torch.where(mask, dense, 0.0)
        told[one.parameter] = Sparse(
            Pattern(2, 4), "wanda", torch.rand(one.shape[1]), torch.where(mask, 0.0, dense)
        )
    last = next(reversed(told))
    told[last] = Sparse(Share(0.25), "magnitude")
    program = with_parameters(source, values).replace(sparse=told, cut=Cut(source, {}))
    found = rebuild_program(again, state_of(program, hash_parameters(source)))
    assert (
        same(found, program)
        and found.cut is not None
        and not found.cut.kept
        and list(found.sparse) == list(told)
    )
    for name, one in found.sparse.items():
        assert (one.pattern, one.metric) == (told[name].pattern, told[name].metric)
        for kept, was in ((one.norms, told[name].norms), (one.removed, told[name].removed)):
            assert (kept is None and was is None) or (kept is not None and torch.equal(kept, was))


def test_a_program_that_cannot_be_built_again_is_refused(
    source: Program, again: Program, ids: torch.Tensor
) -> None:
    program = Pipeline.parse(TEXT).run(source, ids)
    entry = state_of(program, hash_parameters(source))
    first = next(name for name in entry.tensors if name.startswith("now "))
    with pytest.raises(StateMismatch, match=first.removeprefix("now ")):
        rebuild_program(
            again, replace(entry, tensors={**entry.tensors, first: entry.tensors[first] + 1})
        )
    with pytest.raises(StateMismatch, match="another graph"):
        rebuild_program(again, replace(entry, facts={**entry.facts, "graph": "else"}))


def pipeline_of(**noise: Any) -> Pipeline:
    return Pipeline(
        (*Pipeline.parse(TEXT).passes[:2], Noise(**noise), *Pipeline.parse(TEXT).passes[2:4])
    )


def finished(
    source: Program, ids: torch.Tensor, pipeline: Pipeline, folder: Path, **more: Any
) -> Program:
    told: list[str] = more.pop("told", [])
    data = samples(ids, source)
    with hold_work_folder(
        folder / "out", source, pipeline, data, 0, tell=told.append, **more
    ) as work:
        return pipeline.run(source, ids, checkpoints=work)


def forgetting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options are part of the fingerprint: let the kill itself be none."""
    monkeypatch.setattr(Noise, "to_json", lambda self: {"scale": self.scale})


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_killed_run_goes_on(
    source: Program,
    again: Program,
    ids: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: int,
) -> None:
    forgetting(monkeypatch)
    Noise.steps.clear()
    whole, told = pipeline_of().run(source, ids), list[str]()
    Noise.steps.clear()
    with pytest.raises(Killed):
        finished(source, ids, pipeline_of(killed_before=before), tmp_path, told=told)
    assert "the same command goes on from there" in told[-1]
    assert sorted(path.name for path in (tmp_path / "out.work").iterdir()) == [
        "002-prune-width.safetensors",
        "003-noise",
        "fingerprint.json",
    ]
    result = finished(again, ids, pipeline_of(), tmp_path, told=told)
    assert "going on after pass 2, prune-width" in told[-1]
    assert Noise.steps == [0, 1, 2]
    assert hash_parameters(result) == hash_parameters(whole)
    assert [step.figures.get("third") for step in result.history] == [None, None, 1 / 3, None, None]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_keeps_nothing_leaves_nothing(
    source: Program, ids: torch.Tensor, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        finished(source, ids, Pipeline((Noise(killed_before=0),)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_worked_out_again(
    source: Program,
    ids: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    forgetting(monkeypatch)
    with pytest.raises(Killed):
        finished(source, ids, pipeline_of(killed_before=1), tmp_path)
    kept = tmp_path / "out.work" / "002-prune-width.safetensors"
    kept.write_bytes(kept.read_bytes()[:-4])
    assert hash_parameters(finished(source, ids, pipeline_of(), tmp_path)) == hash_parameters(
        pipeline_of().run(source, ids)
    )
    assert "is damaged" in caplog.text


CHANGES: dict[str, tuple[Callable[[Pipeline], Pipeline], str]] = {
    "option": (
        lambda p: replace(p, passes=(p.passes[0], PruneWidth(mlp=0.5), *p.passes[2:])),
        "2 prune-width, mlp: 0.25 then, 0.5 now",
    ),
    "pass": (
        lambda p: replace(p, passes=(p.passes[0], *p.passes[2:])),
        "passes, 2 prune-width: ",
    ),
    "fewer": (
        lambda p: replace(p, passes=p.passes[:1]),
        "passes, 2 prune-width: ",
    ),
    "stop": (
        lambda p: replace(p, hooks=Hooks(stop_after="score")),
        "stop after: null then, score now",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_recipe_is_refused_and_told(
    source: Program, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    forgetting(monkeypatch)
    with pytest.raises(Killed):
        finished(source, ids, pipeline_of(killed_before=1), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    changed, says = CHANGES[change]
    with pytest.raises(ResumeError) as caught:
        finished(source, ids, changed(pipeline_of()), tmp_path)
    assert says in str(caught.value) and "--restart" in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    told: list[str] = []
    finished(source, ids, changed(pipeline_of()), tmp_path, restart=True, told=told)
    assert told == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["appended", "changed", "removed"])
def test_a_killed_run_goes_on_with_other_passes_after_the_finished_ones(
    source: Program,
    again: Program,
    ids: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    forgetting(monkeypatch)
    Noise.steps.clear()
    began = pipeline_of()
    other = {
        "appended": replace(began, passes=(*began.passes, *Pipeline.parse(MORE).passes)),
        "changed": replace(began, passes=(*began.passes[:2], Noise(scale=0.2))),
        "removed": replace(began, passes=began.passes[:3]),
    }[kind]
    whole = other.run(source, ids)
    Noise.steps.clear()
    with pytest.raises(Killed):
        finished(source, ids, pipeline_of(killed_before=1), tmp_path)
    told: list[str] = []
    result = finished(again, ids, other, tmp_path, told=told)
    assert hash_parameters(result) == hash_parameters(whole)
    assert any("going on after pass 2, prune-width" in line for line in told)
    says = {
        "appended": "the passes are as before, and score, prune-width comes after them",
        "changed": "the first 2 passes are as before; noise, score, prune-width gives way to noise",
        "removed": "the first 3 passes are as before; score, prune-width gives way to nothing",
    }
    assert told[0] == says[kind]
    dropped = "what pass 3, noise, had begun is dropped"
    assert (dropped in told) == (kind == "changed")
    assert Noise.steps == ([0, 0, 1, 2] if kind == "changed" else [0, 1, 2])
    assert list(tmp_path.iterdir()) == []


def test_passes_are_appended_to_a_finished_run_that_was_kept(
    source: Program, again: Program, ids: torch.Tensor, tmp_path: Path
) -> None:
    began = pipeline_of()
    longer = replace(began, passes=(*began.passes, *Pipeline.parse(MORE).passes))
    whole = longer.run(source, ids)
    told: list[str] = []
    finished(source, ids, began, tmp_path, keep_work=True, told=told)
    assert told == [
        f"kept in {tmp_path / 'out.work'}: the same command with passes appended goes on from there"
    ]
    Noise.steps.clear()
    result = finished(again, ids, longer, tmp_path, told=told)
    assert any("going on after pass 5, prune-width" in line for line in told)
    assert Noise.steps == [] and hash_parameters(result) == hash_parameters(whole)
    assert list(tmp_path.iterdir()) == []


def test_appended_passes_do_not_excuse_other_data_or_seed(
    source: Program, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetting(monkeypatch)
    began = pipeline_of(killed_before=1)
    with_data = replace(began, passes=(*Pipeline.parse("score").passes, *began.passes[1:]))
    longer = replace(with_data, passes=(*with_data.passes, *Pipeline.parse("repair").passes))
    with pytest.raises(Killed):
        finished(source, ids, with_data, tmp_path)
    with pytest.raises(ResumeError, match="calibration data, sha256"):
        finished(source, ids + 1, longer, tmp_path)
    with (
        pytest.raises(ResumeError, match="seed: 0 then, 7 now"),
        hold_work_folder(tmp_path / "out", source, longer, samples(ids, source), 7),
    ):
        pass


def test_other_weights_data_and_seed_are_told(
    source: Program, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, held, data = Pipeline.parse(TEXT), hash_parameters(source), samples(ids, source)
    then = run_fingerprint(source, held, pipeline, data, 0)
    assert list_differences(then, run_fingerprint(source, held, pipeline, data, 0)) == []
    other = with_parameters(source, {"lm_head.weight": torch.zeros(96, 64)})
    found = {
        "weights": run_fingerprint(other, hash_parameters(other), pipeline, data, 0),
        "calibration data, sha256": run_fingerprint(
            source, held, pipeline, (*data[1:], data[0]), 0
        ),
        "seed": run_fingerprint(source, held, pipeline, data, 1),
    }
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    found["machine, threads"] = run_fingerprint(source, held, pipeline, data, 0)
    for what, now in found.items():
        (line,) = list_differences(then, now)
        assert what in line and " then, " in line


@pytest.mark.parametrize("labels", [None, torch.tensor([[1, -100]])])
def test_every_part_of_a_sample_counts(source: Program, labels: torch.Tensor | None) -> None:
    def of(*data: Sample) -> Any:
        return run_fingerprint(source, {}, Pipeline(), data, 0)["calibration data"]["sha256"]

    ids = torch.tensor([[3, 4]])
    assert of(Sample({"input_ids": ids}, labels)) == of(Sample({"input_ids": ids.clone()}, labels))
    assert of(Sample({"input_ids": ids}, labels)) != of(Sample({"input_ids": ids + 1}, labels))
    assert of(Sample({"input_ids": ids}, labels)) != of(
        Sample({"input_ids": ids}, torch.tensor([[1, 2]]))
    )


def test_files_that_passes_read_are_part_of_it(
    source: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "teacher").mkdir()
    for file in (tmp_path / "text.txt", tmp_path / "teacher" / "config.json"):
        file.write_text("a")
    monkeypatch.setattr(Noise, "files", (tmp_path / "text.txt", tmp_path / "teacher"))
    then = run_fingerprint(source, {}, Pipeline((Noise(),)), None, 0)
    (tmp_path / "teacher" / "config.json").write_text("b")
    (line,) = list_differences(then, run_fingerprint(source, {}, Pipeline((Noise(),)), None, 0))
    assert line.startswith(f"files, {tmp_path / 'teacher'}: ")
    (tmp_path / "text.txt").unlink()
    with pytest.raises(ArtifactError, match=r"text.txt cannot be read"):
        run_fingerprint(source, {}, Pipeline((Noise(),)), None, 0)


def test_a_second_process_is_refused(source: Program, ids: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    lock = try_lock(tmp_path / "out.work")
    assert lock is not None
    with pytest.raises(ResumeError, match="another process is at work"):
        finished(source, ids, pipeline_of(), tmp_path)
    os.close(lock)
    finished(source, ids, pipeline_of(), tmp_path)


def test_a_folder_of_somebody_else_is_left_alone(
    source: Program, ids: torch.Tensor, tmp_path: Path
) -> None:
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "notes.txt").write_text("mine")
    with pytest.raises(ResumeError, match=r"no run kept \(notes.txt\)"):
        finished(source, ids, pipeline_of(), tmp_path, restart=True)
    assert (tmp_path / "out.work" / "notes.txt").read_text() == "mine"


def test_a_change_of_our_own_code_is_told(
    source: Program, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetting(monkeypatch)
    with pytest.raises(Killed):
        finished(source, ids, pipeline_of(killed_before=1), tmp_path)
    monkeypatch.setattr("secateur.runtime.resume.folder.code_digest", lambda: "else")
    told: list[str] = []
    finished(source, ids, pipeline_of(), tmp_path, told=told)
    assert "the sources of secateur have changed" in told[0]


def test_a_damaged_fingerprint_is_told(source: Program, ids: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "fingerprint.json").write_text("{")
    with pytest.raises(ResumeError, match="is damaged"):
        finished(source, ids, pipeline_of(), tmp_path)
    finished(source, ids, pipeline_of(), tmp_path, restart=True)


def test_compress_saves_what_the_passes_give_and_cleans_up(
    source: Program, ids: torch.Tensor, tmp_path: Path
) -> None:
    report = compress(source, TEXT, tmp_path / "deep" / "out", ids, check=False)
    expected = Pipeline.parse(TEXT).run(source, ids)
    assert report.num_parameters == expected.num_parameters
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (
        json.loads((tmp_path / "deep" / "out" / "secateur.json").read_text())["history"][-1]["name"]
        == "repair"
    )


def test_passes_get_a_folder_and_a_way_to_raise(
    source: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Context] = []

    def call(self: Noise, program: Program, context: Context) -> PassResult:
        seen.append(context)
        return PassResult(program, modified=False)

    monkeypatch.setattr(Noise, "call", call)
    compress(source, Pipeline((Noise(), Noise())), tmp_path / "out", check=False, seed=7)
    assert [context.resume and context.resume.name for context in seen] == [
        "001-noise",
        "002-noise",
    ]
    assert all(context.checkpoints is None and context.seed == 7 for context in seen)
    assert (
        seen[0].raise_model is not None
        and seen[0].raise_model(source).num_parameters() == source.num_parameters
    )


def test_work_forgets_earlier_passes(source: Program, tmp_path: Path) -> None:
    work = Work(tmp_path, hash_parameters(source))
    (work.pass_folder(1, "score") / "tmp1234").mkdir()
    assert not any(
        work.pass_folder(1, "score").iterdir()
    )  # what a killed run had for the moment alone
    for position in (1, 2):
        (work.pass_folder(position, "score") / "x").write_text("")
        work.store(position, "score", source)
    assert [path.name for path in tmp_path.iterdir()] == ["002-score.safetensors"]
