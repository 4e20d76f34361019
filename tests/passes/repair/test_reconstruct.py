"""Sub-blocks rebuilt: nearer to the dense model, zeros where they were, killed and resumed without
a difference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.graph import Cut, Program, Sparse, coupled_groups, drop, keep, verify, with_parameters
from secateur.graph.blocks.parts import parts
from secateur.graph.errors import PipelineError
from secateur.graph.pattern import Pattern
from secateur.passes import CalibrationError, Context, Pipeline, samples
from secateur.passes.lowering.layers import linear_layers
from secateur.passes.repair.reconstruct import Reconstruct
from secateur.passes.repair.reconstruct_fit import token_weights
from secateur.passes.storage.journal import Journal
from secateur.runtime import to_transformers
from secateur.runtime.resume.fingerprint import hash_parameters
from secateur.runtime.resume.state import rebuild_program as rebuilt_state
from secateur.runtime.resume.state import state_of

ByKind = Callable[[str], Program]
QUICK: dict[str, Any] = {"epochs": 2}


def ids(count: int = 20, length: int = 48, seed: int = 1) -> Tensor:
    return torch.randint(0, 128, (count, length), generator=torch.Generator().manual_seed(seed))


def sparse(dense: Program) -> Program:
    """2:4 by magnitude in every linear layer but the head."""
    pattern, made = Pattern(2, 4), dict[str, Tensor]()
    for layer in linear_layers(dense)[0]:
        if not layer.head and not layer.looked_up:
            weight = dict(dense.named_parameters())[layer.parameter].detach()
            made[layer.parameter] = torch.where(pattern.select_mask(weight.abs()), weight, 0)
    declared = {name: Sparse(pattern) for name in made}
    return with_parameters(dense, made).replace(sparse=declared, cut=Cut(dense, {}))


def rebuilt(program: Program, data: Tensor | None = None, **options: Any) -> Program:
    data = ids() if data is None else data
    return Reconstruct(**QUICK | options)(program, Context(data=samples([data], program)))


def distance(program: Program, dense: Program) -> float:
    """Of the outputs for tokens that were not calibrated on."""
    other = ids(4, seed=2)
    with torch.no_grad():
        wanted = dense(input_ids=other).logits
        return float((program(input_ids=other).logits - wanted).norm() / wanted.norm())


def same_weights(a: Program, b: Program) -> bool:
    others = dict(b.named_parameters())
    return all(torch.equal(value, others[name]) for name, value in a.named_parameters())


def figures(program: Program) -> dict[str, Any]:
    found: dict[str, Any] = program.history[-1].figures["parts"]
    return found


# Sub-blocks
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")]),
        ("gpt2", [f"transformer.h.{i}.{part}" for i in range(2) for part in ("attn", "mlp")]),
        ("phi", [f"model.layers.{i}.self_attn+model.layers.{i}.mlp" for i in range(2)]),
    ],
)
def test_a_chain_of_sub_blocks_is_the_model(
    kind: str, names: list[str], program_of: ByKind
) -> None:
    program = program_of(kind)
    found = parts(program)
    assert [part.name for part in found.by_stage.values()] == names
    assert torch.equal(found.chain(input_ids=ids()).logits, program(input_ids=ids()).logits)


# The pass
@pytest.mark.parametrize(
    "kind",
    ["llama", "phi", *(pytest.param(k, marks=pytest.mark.slow) for k in ("mixtral", "gemma2"))],
)
def test_several_architectures_come_nearer_and_stay_sparse(kind: str, program_of: ByKind) -> None:
    dense = program_of(kind)
    start = sparse(dense)
    done = rebuilt(start)
    verify(done)
    assert distance(done, dense) < 0.93 * distance(start, dense)
    before, after = (dict(p.named_parameters()) for p in (start, done))
    for name in start.sparse:
        assert not after[name][before[name] == 0].any()
    untouched = set(before) - {
        name for part in parts(dense).by_stage.values() for name in part.parameters
    }
    assert untouched and all(after[name] is before[name] for name in untouched)
    assert all(row["error"][-1] <= row["error"][0] for row in figures(done).values())


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "lsq"},
        {"solver": "adam", "autocast": True},
        {"target": "own"},
        {"target": "dense"},
    ],
    ids=str,
)
def test_every_way_serves_the_tokens_held_back(options: dict[str, Any], program_of: ByKind) -> None:
    dense = program_of("llama")
    done = rebuilt(sparse(dense), **options)
    errors = [row["error"] for row in figures(done).values()]
    assert errors[0][-1] < 0.95 * errors[0][0] and all(row[-1] <= row[0] for row in errors)
    assert distance(done, dense) < distance(sparse(dense), dense)


def test_what_cannot_be_better_stays_as_it_is(program_of: ByKind) -> None:
    """A sub-block that is the dense one's already: no error, no change."""
    dense = program_of("llama")
    start = dense.replace(cut=Cut(dense, {}))
    done = rebuilt(start)
    assert done.gm is start.gm and all(
        row["error"][0] == row["error"][-1] == 0 for row in figures(done).values()
    )


def test_a_learning_rate_out_of_all_reason_does_no_harm(program_of: ByKind) -> None:
    start = sparse(program_of("llama"))
    done = rebuilt(start, solver="adam", lr=100.0)
    assert same_weights(done, start)


def test_biases_and_scales_change_only_if_asked(program_of: ByKind) -> None:
    start = sparse(program_of("phi"))
    vectors = {name for name, p in start.named_parameters() if p.dim() == 1}
    for asked in (True, False):
        after = dict(rebuilt(start, solver="adam", vectors=asked).named_parameters())
        changed = {name for name, p in start.named_parameters() if not torch.equal(p, after[name])}
        assert bool(changed & vectors) == asked and changed & set(start.sparse)


def test_pruned_widths_are_rebuilt_too(program_of: ByKind) -> None:
    """Without a pattern every entry is free; the dense stream is read in the channels that are
    left."""
    dense = program_of("llama")
    part = {"mlp": 0.5, "hidden": 0.9}
    kept = {
        g.name: range(int(g.units * part[g.family]))
        for g in coupled_groups(dense)
        if g.family in part
    }
    cut = keep(dense, kept)
    done = rebuilt(cut)
    verify(done)
    assert all(row["error"][-1] < row["error"][0] for row in figures(done).values())
    assert distance(done, dense) < distance(cut, dense)


@pytest.mark.parametrize("target", ["stream", "own"])
def test_what_stands_after_a_dropped_sub_block_aims_at_its_own_place(
    target: str, program_of: ByKind
) -> None:
    dense = program_of("llama")
    start = drop(sparse(dense), ["model.layers.0.mlp"])
    done = rebuilt(start, target=target, solver="lsq")
    assert list(figures(done)) == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
        "model.layers.1.mlp",
    ]
    assert all(row["error"][-1] <= row["error"][0] for row in figures(done).values())
    with pytest.raises(PipelineError, match="units or blocks were pruned"):
        rebuilt(start, target="dense")


def test_parts_that_are_dense_are_left_alone_by_name(program_of: ByKind) -> None:
    whole = sparse(program_of("llama"))
    some = {name: one for name, one in whole.sparse.items() if "layers.1.mlp" in name}
    back = {
        n: p.detach()
        for n, p in program_of("llama").named_parameters()
        if n in whole.sparse and n not in some
    }
    start = with_parameters(whole, back).replace(sparse=some)
    done = rebuilt(start, solver="lsq")
    assert list(figures(done)) == ["model.layers.1.mlp"]
    left = done.history[-1].figures["left_alone"]
    assert set(left.values()) == {"no weight of it may change"} and len(left) == 3
    changed = {
        name for name, p in start.named_parameters() if p is not dict(done.named_parameters())[name]
    }
    assert changed >= set(some) and all(
        ".1.mlp." in name or ".1.post_attention" in name for name in changed
    )


@pytest.mark.slow
def test_bfloat16_stays_bfloat16(program_of: ByKind) -> None:
    import copy

    from zoo.models import tiny_model

    from secateur.graph import capture

    dense = capture(copy.deepcopy(tiny_model("llama")).bfloat16())
    done = rebuilt(sparse(dense))
    verify(done)
    assert {p.dtype for _, p in done.named_parameters()} == {torch.bfloat16}
    assert any(row["error"][-1] < row["error"][0] for row in figures(done).values())


def test_each_token_counts_by_its_own_size() -> None:
    stream = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    weighed = token_weights(stream) * stream
    torch.testing.assert_close(weighed[0], weighed[1])
    torch.testing.assert_close(weighed.square().mean(-1), torch.ones(2))


# Refusals, kills and disks
def test_without_a_dense_model_or_enough_data_it_refuses(program_of: ByKind) -> None:
    dense = program_of("llama")
    with pytest.raises(PipelineError, match="nothing was pruned"):
        rebuilt(dense)
    with pytest.raises(CalibrationError, match="two calibration sequences"):
        rebuilt(sparse(dense), ids(1))


def test_a_model_that_was_opened_again_takes_its_dense_one_from_a_folder(
    program_of: ByKind, tmp_path: Path
) -> None:
    dense = program_of("llama")
    to_transformers(dense).save_pretrained(tmp_path / "dense")
    start = sparse(dense)
    found = rebuilt(start.replace(cut=None), teacher=str(tmp_path / "dense"))
    assert same_weights(found, rebuilt(start)) and not same_weights(found, start)
    half = {
        group: range(group.units // 2) for group in coupled_groups(dense) if group.family == "mlp"
    }
    smaller = keep(dense, half).replace(cut=None)
    with pytest.raises(PipelineError, match=r"other shapes .*which units went is no longer known"):
        rebuilt(smaller, teacher=str(tmp_path / "dense"))
    with pytest.raises(PipelineError, match="is no model folder"):
        rebuilt(start.replace(cut=None), teacher=str(tmp_path))


def test_a_killed_run_goes_on_and_ends_the_same(program_of: ByKind, tmp_path: Path) -> None:
    start = sparse(program_of("llama"))
    data, seen = samples([ids()], start), list[str]()

    def dies(items: Any, description: str, total: int | None = None) -> Any:
        for item in items:
            if len(seen) == 2:
                raise KeyboardInterrupt
            yield item
            seen.append(item.name)

    with pytest.raises(KeyboardInterrupt):
        Reconstruct(**QUICK)(start, Context(data=data, resume=tmp_path, progress=dies))
    assert Journal(tmp_path).names() == sorted(seen)
    resumed = Reconstruct(**QUICK)(start, Context(data=data, resume=tmp_path))
    whole = Reconstruct(**QUICK)(start, Context(data=data))
    assert not same_weights(whole, start) and same_weights(whole, resumed)
    assert figures(whole) == figures(resumed)


def test_activations_on_the_disk_change_no_bit(
    program_of: ByKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.passes.calibration import lockstep as repair_run

    moved, mapped = list[int](), repair_run.map_copy
    monkeypatch.setattr(repair_run, "LARGE", 1)
    monkeypatch.setattr(
        repair_run,
        "map_copy",
        lambda value, folder: (moved.append(value.nbytes), mapped(value, folder))[1],
    )
    start = sparse(program_of("llama"))
    on_disk = Reconstruct(solver="lsq", offload=True)(
        start, Context(data=samples([ids()], start), resume=tmp_path)
    )
    assert len(moved) > 20 and same_weights(on_disk, rebuilt(start, solver="lsq"))
    lies_in_file = {name for name, p in on_disk.named_parameters() if p.untyped_storage().filename}
    assert lies_in_file >= start.sparse.keys(), "new weights need no memory of their own"
    assert all(file.suffix == ".safetensors" for file in tmp_path.iterdir())


def test_the_whole_way_is_kept_over_a_kill_and_opens_as_a_stock_model(program_of: ByKind) -> None:
    """Channels reordered, 2:4, rebuilt: compared with the dense model in the new order, then and
    later."""
    dense = program_of("llama")
    text = "permute-channels,sparsify,reconstruct{solver=lsq}"
    done = Pipeline.parse(text).run(dense, [ids()])
    assert not done.sparse.keys() - dict(done.named_parameters()).keys() and done.cut is not None
    back = rebuilt_state(dense, state_of(done, hash_parameters(dense)))
    assert (
        back.cut is not None
        and same_weights(back, done)
        and same_weights(back.cut.dense, done.cut.dense)
    )
    assert not same_weights(done.cut.dense, dense) and distance(done.cut.dense, dense) < 1e-4
    stock = to_transformers(done)
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=ids(2)).logits, done(input_ids=ids(2)).logits)
