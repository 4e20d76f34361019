"""Tables, pictures and numbers for people."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from secateur.graph import Program, SecateurError
from secateur.passes import Pipeline
from secateur.tools.inspect import groups_of_block, inspect_program
from secateur.tools.plan.footprint import measure_footprint
from secateur.tools.plan.plan import make_plan
from secateur.tools.report import (
    draw_groups,
    inspection_tables,
    pass_tables,
    plan_tables,
    run_tables,
)
from secateur.tools.report.picture import membership_graph
from secateur.tools.report.units import (
    format_bytes,
    format_change,
    format_count,
    format_duration,
    format_spread,
)


def shown(tables: list[object]) -> str:
    console = Console(file=io.StringIO(), width=160)
    for table in tables:
        console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_count(134_515_008), "134.5 M"),
        (format_count(999), "999"),
        (format_count(4.05e11), "405 G"),
        (format_bytes(538_060_032), "513.1 MiB"),
        (format_bytes(12), "12 B"),
        (format_duration(75.2), "1 min 15 s"),
        (format_duration(3), "3 s"),
        (format_duration(7300), "2 h 1 min"),
        (format_change(100, 75), "-25.0 %"),
        (format_change(0, 75), ""),
    ],
)
def test_units(text: str, expected: str) -> None:
    assert text == expected


def test_inspection(llama: Program) -> None:
    text = shown(list(inspection_tables(inspect_program(llama))))
    for word in (
        "LlamaForCausalLM",
        "kv_heads",
        "1 x 8, 2 x 16",
        "looked up by the input",
        "sequence 128",
        "512 B",
    ):
        assert word in text


def test_plan_and_run(llama: Program) -> None:
    pipeline = Pipeline.parse("score{metric=random},prune-width{mlp=0.5,uniform=false}")
    text = shown(list(plan_tables(make_plan(llama, pipeline, lambda p: None))))
    for word in ("48 on average", "peak memory", "GFLOP/s", "stock checkpoint"):
        assert word in text
    smaller = pipeline.run(llama)
    text = shown(
        list(run_tables(llama, smaller, measure_footprint(llama), measure_footprint(smaller)))
    )
    for word in ("prune-width", f"{smaller.num_parameters:,}", "what came out"):
        assert word in text


def test_passes() -> None:
    text = shown(list(pass_tables()))
    for word in ("prune-width", "score", "taylor", "round_to", "activation"):
        assert word in text


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_picture(llama: Program, tmp_path: Path, ending: str) -> None:
    path, groups = groups_of_block(llama, 0)
    draw_groups(groups, path, tmp_path / f"block{ending}")
    head = (tmp_path / f"block{ending}").read_bytes()[:200]
    assert head.startswith(b"\x89PNG") or b"<?xml" in head


def test_the_picture_shows_the_members_of_the_block_alone(llama: Program) -> None:
    path, groups = groups_of_block(llama, 0)
    graph = membership_graph(groups, path)
    edges = {(g, p.removeprefix(path + "."), data["role"]) for g, p, data in graph.edges(data=True)}
    mlp = {(p, role) for g, p, role in edges if g == "mlp@model.layers.0.mlp"}
    expected = {("gate_proj", "produces"), ("up_proj", "produces"), ("down_proj", "consumes")}
    assert mlp == {(f"mlp.{name}.weight", role) for name, role in expected}
    assert all(
        node.startswith(path) for node, side in graph.nodes(data="side") if side == "parameter"
    )


def test_pictures_that_cannot_be(llama: Program, tmp_path: Path) -> None:
    path, groups = groups_of_block(llama, 0)
    with pytest.raises(SecateurError, match=r"ends in \.png or \.svg"):
        draw_groups(groups, path, tmp_path / "block.jpg")
    with pytest.raises(SecateurError, match="cannot be written"):
        draw_groups(groups, path, tmp_path / "nowhere" / "block.png")


def test_a_mean_of_few_runs_has_its_interval() -> None:
    """Three values 1, 2, 3: deviation 1, t = 4.30 at two degrees of freedom, 4.30 / sqrt(3) =
    2.48."""
    assert format_spread([1.0, 2.0, 3.0], ".2f") == "2.00 ± 2.48"
    assert format_spread([-1.0, -2.0, -3.0], "+.1f") == "-2.0 ± 2.5"
    assert format_spread([1.5], ".2f") == "1.50"
