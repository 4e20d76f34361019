"""The lower pass: which form for which layer, the reasons, and the cost model behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo.sparse import keep_two_of_four, made_24

from secateur.graph import Program, capture
from secateur.graph.errors import PipelineError
from secateur.passes import Pipeline
from secateur.passes.lowering.cost import (
    DENSE,
    KINDS,
    MACHINES,
    Machine,
    Timing,
    keep_timings,
    machine_named,
    measure_machine,
    read_timings,
    weight_bytes,
)
from secateur.passes.lowering.layers import linear_layers, not_24, sharing_input
from secateur.passes.lowering.lower import Lower, Lowering, last_lowering
from secateur.passes.lowering.quantize import Quantize

ByKind = Callable[[str], Program]
SLOW = Machine("slow", 1e9, 1e12, 0.0, 16, "made up")


def kinds(plan: Lowering) -> dict[str, str]:
    return {row.layer: row.kind for row in plan.layers}


def test_not_24_names_the_first_group() -> None:
    weight = keep_two_of_four(torch.randn(4, 16))
    assert not_24(weight) is None and not_24(weight[:, :15]) is None
    weight[2, 4:8] = 1
    assert (
        not_24(weight)
        == "1 of 16 groups of four have more than two non-zeros, the first in row 2, inputs 4 to 7"
    )


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((), DENSE),
        ((Quantize(bits=8),), "int8"),
        ((Quantize(bits=4),), "int4"),
        (("2:4",), "2:4"),
        (("2:4", Quantize(bits=8)), "2:4+int8"),
        (("2:4", Quantize(bits=4)), "2:4+int4"),
    ],
)
def test_a_weight_runs_in_the_smallest_form_that_it_already_has(
    llama: Program, steps: tuple, expected: str
) -> None:
    program = llama
    for step in steps:
        program = made_24(program) if step == "2:4" else step(program)
    plan = Lower().make_plan(program, SLOW)
    found = kinds(plan)
    assert found.pop("lm_head.weight") == DENSE
    assert set(found.values()) == {expected} and len(found) == 14
    row = plan.layers[0]
    assert row.bytes == weight_bytes(expected, *row.shape, torch.float32)
    assert row.ms == pytest.approx(1e3 * row.bytes / 1e9, rel=1e-2)
    assert (row.ms < row.dense_ms) == (expected != DENSE)


def test_every_dense_layer_has_a_reason(llama: Program) -> None:
    one = made_24(llama, but=("q_proj",))
    rows = {row.layer: row for row in Lower().make_plan(one, SLOW).layers}
    assert "more than two non-zeros" in rows["model.layers.0.self_attn.q_proj.weight"].reason
    assert "head=dense" in rows["lm_head.weight"].reason
    told = Lower().make_plan(one, SLOW).to_json()
    assert sum(told["stays_dense"].values()) == 3 and told["kinds"] == {"2:4": 12, "dense": 3}


def test_a_machine_on_which_packing_does_not_pay_gets_dense_layers(llama: Program) -> None:
    busy = Machine("busy", 1e15, 1e6, 0.0, 16, "made up")
    plan = Lower().make_plan(made_24(llama), busy)
    assert not plan.packed_layers
    assert all(
        "no packed form is faster" in row.reason
        for row in plan.layers
        if "lm_head" not in row.layer
    )
    smallest = Lower(smallest=True).make_plan(made_24(llama), busy)
    assert len(smallest.packed_layers) == 14


def test_large_batches_pay_for_making_the_weight_dense() -> None:
    times = {
        batch: SLOW.milliseconds("2:4", 64, 64, batch, torch.bfloat16)[0] for batch in (16, 17)
    }
    dense = SLOW.milliseconds(DENSE, 64, 64, 17, torch.bfloat16)[0]
    assert times[16] < dense < times[17]


def test_measured_times_win_and_inform_the_others() -> None:
    timed = Machine(
        "timed", 1e9, 1e15, 0.0, 16, "made up", (Timing("2:4", 64, 64, 1, "bfloat16", 0.5),)
    )
    assert timed.milliseconds("2:4", 64, 64, 1, torch.bfloat16) == (0.5, True)
    ideal, _ = SLOW.milliseconds("2:4", 128, 64, 1, torch.bfloat16)
    slowdown = 0.5 / SLOW.milliseconds("2:4", 64, 64, 1, torch.bfloat16)[0]
    assert timed.milliseconds("2:4", 128, 64, 1, torch.bfloat16) == (
        pytest.approx(ideal * slowdown),
        False,
    )
    assert (
        timed.milliseconds("int8", 64, 64, 1, torch.bfloat16)[0]
        == SLOW.milliseconds("int8", 64, 64, 1, torch.bfloat16)[0]
    )


def test_bytes_of_every_form() -> None:
    dense = weight_bytes(DENSE, 4096, 4096, torch.bfloat16)
    parts = {kind: weight_bytes(kind, 4096, 4096, torch.bfloat16) / dense for kind in KINDS}
    wanted = {
        DENSE: 1,
        "2:4": 0.5625,
        "2:4+int8": 0.3125,
        "2:4+int4": 0.1953,
        "int8": 0.5,
        "int4": 0.2578,
    }
    assert parts == {kind: pytest.approx(part, abs=6e-4) for kind, part in wanted.items()}


def test_layers_of_one_input_share_a_product(llama: Program, program_of: ByKind) -> None:
    rows = {
        row.layer.removeprefix("model.layers.0."): row
        for row in Lower().make_plan(made_24(llama), SLOW).layers
    }
    prefix = "model.layers.0."
    for name in ("q", "k", "v"):
        assert rows[f"self_attn.{name}_proj.weight"].shares == f"{prefix}self_attn.q_proj.weight"
    assert rows["mlp.up_proj.weight"].shares == rows["mlp.gate_proj.weight"].shares != ""
    assert rows["mlp.down_proj.weight"].shares == rows["self_attn.o_proj.weight"].shares == ""
    sizes = sorted(len(group) for group in sharing_input(linear_layers(llama)[0]))
    assert sizes == [1, 1, 1, 1, 1, 2, 2, 3, 3]


def test_layers_of_other_forms_do_not_share(llama: Program) -> None:
    plan = Lower().make_plan(made_24(llama, but=("k_proj", "gate_proj")), SLOW)
    rows = {row.layer: row.shares for row in plan.layers}
    assert (
        rows["model.layers.0.self_attn.q_proj.weight"]
        == rows["model.layers.0.self_attn.v_proj.weight"]
        != ""
    )
    assert (
        rows["model.layers.0.self_attn.k_proj.weight"]
        == rows["model.layers.0.mlp.up_proj.weight"]
        == ""
    )


class InPlace(nn.Module):
    """Two layers that read one name, but not one value."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        first = self.one(y)
        y.add_(1)
        return first + self.two(y)


def test_a_value_changed_in_place_is_not_shared() -> None:
    program = capture(InPlace().eval(), {"x": torch.randn(2, 8)})
    assert [len(group) for group in sharing_input(linear_layers(program)[0])] == [1, 1]


def test_what_is_no_linear_layer_is_refused_by_name(program_of: ByKind) -> None:
    found, refused = linear_layers(program_of("gpt2"))
    assert [layer.parameter for layer in found if layer.looked_up] == ["transformer.wte.weight"]
    assert "[inputs, outputs]" in refused["transformer.h.0.attn.c_attn.weight"]
    assert "looked up" in refused["transformer.wpe.weight"]


def test_the_head_on_request(llama: Program, program_of: ByKind) -> None:
    rows = {row.layer: row for row in Lower(head="int8").make_plan(llama, SLOW).layers}
    head = rows["lm_head.weight"]
    assert (
        head.kind == "int8" and head.rounds and not rows["model.layers.0.mlp.up_proj.weight"].rounds
    )
    tied = {row.layer: row for row in Lower(head="auto").make_plan(program_of("gpt2"), SLOW).layers}
    assert tied["transformer.wte.weight"].kind == DENSE


def test_the_plan_is_kept_in_the_history_and_read_back(llama: Program) -> None:
    program = Pipeline.parse("lower{machine=h200,batch=4,dtype=bfloat16}").run(made_24(llama))
    assert program.gm is not None and program.history[-1].name == "lower"
    figures = json.loads(json.dumps(program.history[-1].figures))
    plan = Lowering.from_json(figures["plan"])
    assert plan == last_lowering(program.history) and (plan.machine, plan.batch, plan.dtype) == (
        "h200",
        4,
        "bfloat16",
    )
    assert (
        plan.layers
        == Lower(machine="h200", batch=4, dtype="bfloat16")
        .make_plan(program, MACHINES["h200"])
        .layers
    )
    assert last_lowering(()) is None


def test_machines_by_name_file_and_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_TIMINGS", str(tmp_path / "timings.json"))
    measure_machine.cache_clear()
    assert read_timings() == ()
    kept = (Timing("2:4", 8, 8, 1, "float32", 0.25),)
    assert keep_timings(kept) == tmp_path / "timings.json" and read_timings() == kept
    measured = measure_machine()
    assert 1e8 < measured.bytes_per_s < 1e14 and measured.timings == kept
    other = json.loads((tmp_path / "timings.json").read_text())
    other["fingerprint"]["threads"] = -1
    (tmp_path / "timings.json").write_text(json.dumps(other))
    assert read_timings() == (), "those of another machine are not used"
    (tmp_path / "m.json").write_text(json.dumps({**vars(SLOW), "timings": [vars(kept[0])]}))
    assert machine_named(str(tmp_path / "m.json")).timings == kept
    measure_machine.cache_clear()
    with pytest.raises(PipelineError, match="did you mean 'h200'"):
        machine_named("h20")
    with pytest.raises(PipelineError, match="does not describe a machine"):
        machine_named(str(tmp_path / "none.json"))
