"""The repair pass against a reference in plain torch, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo.models import tiny_model

from secateur.graph import Program, capture, coupled_groups, keep, verify
from secateur.graph.errors import PipelineError
from secateur.passes import CalibrationError, Context, Pipeline, Repair, samples
from secateur.passes.calibration.lockstep import Lockstep, map_copy
from secateur.passes.lowering.layers import linear_layers
from secateur.passes.repair.repair import held_back_sequences
from secateur.passes.repair.sites import find_sites, remaining_positions
from secateur.passes.solvers.ridge import Fit, Products, fit_damped
from secateur.passes.storage.journal import Journal

ByKind = Callable[[str], Program]


class Residual(nn.Module):
    """Two residual layers without norms: each consumer's inputs are a short formula."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(32, 6)
        self.up = nn.ModuleList(nn.Linear(6, 10) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(10, 6) for _ in range(2))
        self.head = nn.Linear(6, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return self.head(x)


def tokens(count: int = 20, length: int = 24, below: int = 32) -> Tensor:
    return torch.randint(0, below, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def residual() -> Program:
    torch.manual_seed(0)
    return capture(Residual().double().eval(), {"input_ids": torch.zeros(2, 7, dtype=torch.int64)})


def neurons(program: Program) -> list[str]:
    """Groups between up and down, in order."""
    return [
        g.name
        for g in coupled_groups(program)
        if any("down" in m.parameter and m.dim == 1 for m in g.members)
    ]


def repaired(program: Program, data: Any, **options: Any) -> Program:
    return Repair(**options)(program, Context(data=samples(data, program)))


def reference(
    dense: Residual, kept: list[int], ids: Tensor, target: str
) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of both consumers, refitted in turn on the stream that the repaired layers
    make."""
    back = sorted(held_back_sequences(len(ids)))
    rest = [i for i in range(len(ids)) if i not in back]
    x_dense = x = dense.tokens(ids)
    found = []
    for up, down in zip(dense.up, dense.down, strict=True):
        wanted = down(torch.relu(up(x_dense)))
        h = torch.relu(up(x))[..., kept]
        weight, bias = down.weight[:, kept], down.bias
        aim = x_dense + wanted - x if target == "stream" else wanted
        r = aim - (h @ weight.T + bias)
        parts = []
        for rows in (rest, back[::2], back[1::2]):  # to fit on, to choose the damping, to judge
            made = Products(len(kept), 6, True, torch.device("cpu"))
            made.add_rows(h[rows].flatten(0, 1), r[rows].flatten(0, 1))
            parts.append(made)
        delta = fit_damped(*parts).delta_NK
        assert delta is not None
        weight, bias = weight + delta[:, :-1], bias + delta[:, -1]
        found.append((weight, bias))
        x_dense, x = x_dense + wanted, x + h @ weight.T + bias
    return found


@pytest.mark.parametrize("target", ["own", "stream"])
def test_against_plain_torch(residual: Program, target: str) -> None:
    ids, kept = tokens(), [0, 2, 3, 5, 8]
    pruned = keep(residual, dict.fromkeys(neurons(residual), kept))
    found = dict(repaired(pruned, [ids], target=target).named_parameters())
    with torch.no_grad():
        expected = reference(residual.source.model, kept, ids, target)  # type: ignore[arg-type]
    for at, (weight, bias) in enumerate(expected):
        torch.testing.assert_close(found[f"down.{at}.weight"].detach(), weight)
        torch.testing.assert_close(found[f"down.{at}.bias"].detach(), bias)


def test_only_consumers_change_and_the_given_program_stays(residual: Program) -> None:
    pruned = keep(residual, dict.fromkeys(neurons(residual), range(5)))
    before = {name: p.detach().clone() for name, p in pruned.named_parameters()}
    after = dict(repaired(pruned, [tokens()], bias=False).named_parameters())
    changed = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert changed == {"down.0.weight", "down.1.weight"}
    assert all(torch.equal(p, before[name]) for name, p in pruned.named_parameters())


def test_units_that_never_fire_cost_nothing_and_need_no_repair() -> None:
    torch.manual_seed(0)
    model = Residual().double().eval()
    with torch.no_grad():
        for up in model.up:
            up.weight[7:], up.bias[7:] = 0, -1  # type: ignore[operator, index]
    program = capture(model, {"input_ids": torch.zeros(2, 7, dtype=torch.int64)})
    pruned = keep(program, dict.fromkeys(neurons(program), range(7)))
    done = repaired(pruned, [tokens()])
    ids = tokens(3)
    torch.testing.assert_close(done(input_ids=ids), program(input_ids=ids))


def test_copies_of_a_neuron_are_made_good() -> None:
    """Where each dropped unit equals a kept one, the dense model can be had back; and it is."""
    torch.manual_seed(0)
    model = Residual().double().eval()
    with torch.no_grad():
        for up in model.up:
            up.weight[5:], up.bias[5:] = up.weight[:5].clone(), up.bias[:5].clone()  # type: ignore[operator, index]
    program = capture(model, {"input_ids": torch.zeros(2, 7, dtype=torch.int64)})
    pruned = keep(program, dict.fromkeys(neurons(program), range(5)))
    ids = tokens(3)
    lost, left = (
        float((p(input_ids=ids) - program(input_ids=ids)).detach().norm())
        for p in (pruned, repaired(pruned, [tokens()]))
    )
    assert left < 1e-3 * lost


KINDS = ["llama", "gpt2", "phi", "gemma2"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_of_several_architectures(kind: str, program_of: ByKind) -> None:
    """Repaired, the model is nearer to the dense one on other tokens; heads, neurons and channels
    cut at once."""
    dense, ids = program_of(kind), tokens(10, 40, 128)
    cut = Pipeline.parse("score{metric=wanda},prune-width{mlp=0.5,kv_heads=0.5,hidden=0.25}").run(
        dense, [ids]
    )
    done = repaired(cut, [ids])
    verify(done)
    other = torch.randint(0, 128, (4, 40), generator=torch.Generator().manual_seed(2))
    wanted = dense(input_ids=other).logits
    before, after = (
        float((p(input_ids=other).logits - wanted).square().mean()) for p in (cut, done)
    )
    assert after < 0.9 * before
    figures = done.history[-1].figures["consumers"]
    assert all(figure["error"] <= 1 for figure in figures.values())
    assert {str(group.family) for group in coupled_groups(done)} >= {"mlp", "hidden"}


def test_sums_after_parallel_branches_are_aimed_at(program_of: ByKind) -> None:
    dense = program_of("phi")
    groups = [g.name for g in coupled_groups(dense) if g.family in ("mlp", "kv_heads")]
    cut = keep(dense, dict.fromkeys(groups, range(1)))
    found, refused = find_sites(cut, "stream", True)
    aims = {site.parameter.split(".", 3)[3]: len(site.others) for site in found}
    assert aims == {"self_attn.dense.weight": 0, "mlp.fc2.weight": 2}
    assert not refused


def test_fused_experts_are_left_alone_by_name(program_of: ByKind) -> None:
    cut = Pipeline.parse("score{metric=wanda},prune-width{mlp=0.5}").run(
        program_of("mixtral"), [tokens(4, 24, 128)]
    )
    done = repaired(cut, [tokens(4, 24, 128)])
    left = done.history[-1].figures["left_alone"]
    assert set(left) == {f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)}
    assert all("no matrix" in reason for reason in left.values())
    assert done.gm is cut.gm


def test_tied_weights_are_never_rewritten(program_of: ByKind) -> None:
    cut = Pipeline.parse("score{metric=wanda},prune-width{hidden=0.25}").run(
        program_of("gpt2"), [tokens(4, 24, 128)]
    )
    done = repaired(cut, [tokens(4, 24, 128)])
    tied = "transformer.wte.weight"
    assert dict(done.named_parameters())[tied] is dict(cut.named_parameters())[tied]
    assert any(name.endswith("c_attn.weight") for name in done.history[-1].figures["consumers"])


def test_positions_that_stayed(llama: Program) -> None:
    cut = keep(llama, {"mlp@model.layers.0.mlp": [1, 5], "kv_heads@model.layers.1.self_attn": [1]})
    assert cut.cut is not None
    positions = remaining_positions(cut.cut)
    assert positions["model.layers.0.mlp.down_proj.weight", 1].tolist() == [1, 5]
    assert positions["model.layers.1.self_attn.o_proj.weight", 1].tolist() == list(range(32, 64))
    dense, after = (dict(p.named_parameters()) for p in (llama, cut))
    for (name, dim), stayed in positions.items():
        assert after[name].shape[dim] == len(stayed) < dense[name].shape[dim]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lockstep_gives_what_the_program_gives(kind: str, program_of: ByKind) -> None:
    program, ids = program_of(kind), tokens(3, 12, 128)
    run = Lockstep(program, samples([ids], program))
    output = next(iter(reversed(program.gm.graph.nodes)))
    logits = output.args[0][0]
    run.advance_to(logits.name)
    held = [len(values) for values in run._environments]
    for row in range(3):
        torch.testing.assert_close(
            run.node_value(row, logits.name), program(input_ids=ids[row : row + 1]).logits
        )
    assert max(held) < 20


def test_without_a_cut_or_enough_data_it_refuses(llama: Program) -> None:
    data = tokens(2, 12, 128)
    with pytest.raises(PipelineError, match="nothing was pruned"):
        repaired(llama, [data])
    with pytest.raises(PipelineError, match="put prune-width"):
        Pipeline.parse("score,repair").run(llama, [data])
    cut = keep(llama, {"mlp@model.layers.0.mlp": [1, 5]})
    with pytest.raises(CalibrationError, match="two calibration sequences"):
        repaired(cut, [data[:1]])


def test_weights_are_needed() -> None:
    with torch.device("meta"):
        program = capture(tiny_model("llama"))
    cut = keep(program, {"mlp@model.layers.0.mlp": [1, 5]})
    with pytest.raises(PipelineError, match="meta device"):
        Repair()(cut, Context(data=samples([tokens(4, 12, 128)], program)))


def test_a_pipeline_knows_that_pruning_makes_repair_possible() -> None:
    program = capture(tiny_model("llama"))
    done = Pipeline.parse("score{metric=flap},prune-width{mlp=0.25},repair{target=own}").run(
        program, [tokens(4, 12)]
    )
    assert [step.name for step in done.history] == ["score", "prune-width", "repair"]
    assert done.history[-1].options["target"] == "own"


def test_held_back_sequences() -> None:
    assert held_back_sequences(2) == {1}
    assert held_back_sequences(20) == {2, 7, 12, 17}
    assert all(
        len(held_back_sequences(n)) == max(1, n // 5) and max(held_back_sequences(n)) < n
        for n in range(2, 50)
    )


# Kills and disks
def halved(llama: Program) -> Program:
    return keep(
        llama,
        {
            g.name: range(g.units // 2)
            for g in coupled_groups(llama)
            if g.family in ("mlp", "kv_heads")
        },
    )


def same_weights(a: Program, b: Program) -> bool:
    others = dict(b.named_parameters())
    return all(torch.equal(value, others[name]) for name, value in a.named_parameters())


def test_a_killed_repair_goes_on_and_ends_the_same(program_of: ByKind, tmp_path: Path) -> None:
    cut = halved(program_of("llama"))
    data, seen = samples([tokens(6, 12, 128)], cut), list[str]()

    def dies(items: Any, description: str, total: int | None = None) -> Any:
        for item in items:
            if len(seen) == 2:
                raise KeyboardInterrupt
            yield item
            seen.append(item.parameter)

    with pytest.raises(KeyboardInterrupt):
        Repair()(cut, Context(data=data, resume=tmp_path, progress=dies))
    assert Journal(tmp_path).names() == sorted(seen)
    resumed = Repair()(cut, Context(data=data, resume=tmp_path))
    whole = Repair()(cut, Context(data=data))
    assert not same_weights(whole, cut) and same_weights(whole, resumed)
    assert whole.history[-1].figures["consumers"] == resumed.history[-1].figures["consumers"]


def test_what_a_killed_repair_finished_is_not_worked_out_again(
    program_of: ByKind, tmp_path: Path
) -> None:
    cut = halved(program_of("llama"))
    context = Context(data=samples([tokens(6, 12, 128)], cut), resume=tmp_path)
    Repair()(cut, context)
    journal = Journal(tmp_path)
    entries = {name: journal.read(name) for name in journal.names()}
    refitted = {name: entry for name, entry in entries.items() if entry and entry.tensors}
    assert refitted
    name, entry = next(iter(refitted.items()))
    journal.write(
        name,
        {key: torch.full_like(value, 0.5) for key, value in entry.tensors.items()},
        entry.facts,
    )
    again = dict(Repair()(cut, context).named_parameters())
    assert bool((again[name] == 0.5).all())


def test_activations_on_the_disk_change_no_bit_and_leave_nothing(
    program_of: ByKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.passes.calibration.lockstep.LARGE", 1)
    cut = halved(program_of("llama"))
    data = samples([tokens(6, 12, 128)], cut)
    moved = list[int]()
    monkeypatch.setattr(
        "secateur.passes.calibration.lockstep.map_copy",
        lambda value, folder: (moved.append(value.nbytes), map_copy(value, folder))[1],
    )
    on_disk = Repair(offload=True)(cut, Context(data=data, resume=tmp_path / "new"))
    in_memory = Repair()(cut, Context(data=data))
    assert len(moved) > 20 and same_weights(on_disk, in_memory)
    changed = {
        n for n, facts in in_memory.history[-1].figures["consumers"].items() if facts["damping"]
    }
    lies_in_file = {name for name, p in on_disk.named_parameters() if p.untyped_storage().filename}
    assert changed and changed <= lies_in_file, "new weights need no memory of their own"
    assert all(file.suffix == ".safetensors" for file in (tmp_path / "new").iterdir())


def test_a_mapped_value_lies_in_a_file_without_a_name(tmp_path: Path) -> None:
    value = torch.randn(3, 5)
    copy = map_copy(value, tmp_path)
    assert (
        torch.equal(copy, value)
        and copy.data_ptr() != value.data_ptr()
        and not list(tmp_path.iterdir())
    )
    files = {
        line.split()[-2]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "(deleted)" in line
    }
    assert any(str(tmp_path) in file for file in files)


def test_what_is_the_same_for_all_sequences_is_held_once(
    program_of: ByKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.passes.calibration.lockstep.LARGE", 1)
    program = program_of("llama")
    data = samples([tokens(3, 12, 128)], program)
    run = Lockstep(program, data)
    run.advance_to(
        next(one.node.name for one in linear_layers(program)[0] if "down_proj" in one.parameter)
    )
    environments = [run._environments[sample].items() for sample in range(3)]
    held = [
        {n.name: v for n, v in one if isinstance(v, Tensor) and n.op != "get_attr"}
        for one in environments
    ]
    shared = {
        name for name, value in held[0].items() if value.data_ptr() == held[2][name].data_ptr()
    }
    assert shared == {name for name, value in held[0].items() if torch.equal(value, held[2][name])}
    assert 0 < len(shared) < len(held[0])


def test_what_went_with_its_block_is_passed_over(llama: Program, ids: Tensor) -> None:
    text = "prune-depth{layers=[0]},score{metric=random},prune-width{hidden=48,mlp=0.25},repair"
    refitted = Pipeline.parse(text).run(llama, ids).history[-1].figures["consumers"]
    assert refitted and not any(name.startswith("model.layers.0.") for name in refitted)


def test_sequences_that_chose_the_damping_do_not_judge(
    residual: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[tuple[Products, ...]]()

    def remembered(*parts: Products) -> Fit:
        seen.append(parts)
        return fit_damped(*parts)

    monkeypatch.setattr("secateur.passes.repair.repair.fit_damped", remembered)
    pruned = keep(residual, dict.fromkeys(neurons(residual), range(5)))
    for count, rows in ((20, (16 * 24, 2 * 24, 2 * 24)), (4, (3 * 24, 12, 12))):
        seen.clear()
        repaired(pruned, [tokens(count)])
        assert all(tuple(part.rows for part in parts) == rows for parts in seen) and len(seen) == 2


def test_a_fit_that_the_judges_lose_by_is_not_taken(
    residual: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = keep(residual, dict.fromkeys(neurons(residual), range(5)))

    def lost(chosen: Products, chooser: Products, judge: Products) -> Fit:
        judge.cross_NK = -judge.cross_NK
        return fit_damped(chosen, chooser, judge)

    monkeypatch.setattr("secateur.passes.repair.repair.fit_damped", lost)
    after = repaired(pruned, [tokens()])
    assert after.history[-1].figures["consumers"]["down.0.weight"] == {
        "error": 1.0,
        "damping": None,
    }
    assert all(
        torch.equal(p, q)
        for (_, p), (_, q) in zip(after.named_parameters(), pruned.named_parameters(), strict=True)
    )
