"""Shapes are counted exactly, from the graph alone; the enumeration gives the published
candidates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import NemotronConfig, NemotronForCausalLM
from zoo.models import tiny_model

from secateur.graph import Program, blocks, capture, coupled_groups, drop, keep
from secateur.graph.errors import EditError
from secateur.passes.search.latency import LatencyTable
from secateur.passes.search.space import ShapeCosts, shapes_within

LAYERS, EXPANSION = (29, 30, 31, 32), (2.5, 3.0, 3.5, 4.0)
SPACE_4B = {"layers": LAYERS, "query_heads": (3, 4, 6), "hidden": (2560, 3072, 3584, 4096, 4608)}
SPACE_8B = {"layers": LAYERS, "query_heads": (4, 6), "hidden": (4096, 4608, 5120, 5632, 6144)}


def published(shapes: Mapping[str, Sequence[int]]) -> Any:
    """Parameters of a Nemotron-4 shape as the paper counts them: no norms, eight key/value heads of
    128."""
    depth, heads, hidden, mlp = (
        np.asarray(shapes[n], float) for n in ("layers", "query_heads", "hidden", "mlp")
    )
    attention = 2 * hidden * heads * 8 * 128 + 2 * hidden * 8 * 128
    return depth * (attention + 2 * hidden * mlp) + 2 * 256_000 * hidden


def test_the_published_count_is_that_of_the_published_models() -> None:
    rows = {(32, 6, 6144, 24576): 15.6, (32, 6, 4096, 16384): 8.27, (32, 3, 3072, 9216): 4.19}
    for (depth, heads, hidden, mlp), billions in rows.items():
        found = published(
            {"layers": [depth], "query_heads": [heads], "hidden": [hidden], "mlp": [mlp]}
        )
        assert float(found[0]) / 1e9 == pytest.approx(billions, abs=0.05)


def test_the_published_spaces_have_the_published_candidates() -> None:
    """Muralidharan et al. 2024, arXiv:2407.14679, tables 9 and 19: 18 shapes of 4B, 15 of 8B."""
    four = list(shapes_within(SPACE_4B, published, 4.2e9, 3.8e9, EXPANSION))
    eight = list(shapes_within(SPACE_8B, published, 8.5e9, 7.8e9, EXPANSION))
    assert (len(four), len(eight)) == (18, 15)
    best = {"layers": 32, "query_heads": 6, "hidden": 4096, "mlp": 16384}
    assert best in [dict(one.shape) for one in eight]
    assert [one.cost for one in four] == sorted((one.cost for one in four), reverse=True)


@pytest.fixture(scope="module")
def nemotron() -> Program:
    """Three layers of Nemotron-4 15B, without weights: more layers of the kind are counted all the
    same."""
    config = NemotronConfig(
        vocab_size=256_000,
        hidden_size=6144,
        intermediate_size=24_576,
        num_hidden_layers=3,
        num_attention_heads=48,
        head_dim=128,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return capture(NemotronForCausalLM(config))


def test_the_graph_of_the_published_model_gives_the_same_candidates(nemotron: Program) -> None:
    costs = ShapeCosts(nemotron, ["layers", "query_heads", "hidden", "mlp"])
    three, whole = costs.cost({"layers": [3, 32]}, "parameters")
    layer = sum(
        p.numel() for n, p in nemotron.named_parameters() if n.startswith("model.layers.0.")
    )
    assert (three, whole) == (nemotron.num_parameters, nemotron.num_parameters + 29 * layer)
    assert whole / 1e9 == pytest.approx(15.6, abs=0.05)
    found = shapes_within(SPACE_4B, lambda s: costs.cost(s, "parameters"), 4.2e9, 3.8e9, EXPANSION)
    expected = shapes_within(SPACE_4B, published, 4.2e9, 3.8e9, EXPANSION)
    assert {tuple(one.shape.items()) for one in found} == {
        tuple(one.shape.items()) for one in expected
    }
    found = shapes_within(SPACE_8B, lambda s: costs.cost(s, "parameters"), 8.5e9, 7.8e9, EXPANSION)
    assert len(list(found)) == 15


def test_a_hundred_thousand_shapes_take_seconds(nemotron: Program) -> None:
    costs = ShapeCosts(nemotron, ["layers", "query_heads", "hidden", "mlp"])
    grid = {
        "layers": range(17, 33), "query_heads": range(1, 7), "hidden": range(2048, 6145, 128),
        "mlp": range(8192, 24577, 512),
    }  # fmt: skip
    start = time.perf_counter()
    found = list(shapes_within(grid, lambda s: costs.cost(s, "parameters"), 8e9, 7.9e9))
    assert 16 * 6 * 33 * 33 > 100_000 and len(found) > 100
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mixtral"])
def test_the_count_of_a_shape_is_that_of_the_pruned_program(kind: str) -> None:
    """Ties, fused projections, biases, norms and experts are all in it."""
    program = capture(
        tiny_model(kind, **{("n_layer" if kind == "gpt2" else "num_hidden_layers"): 3})
    )
    families = ["hidden", "mlp", "kv_heads"]
    costs = ShapeCosts(program, ["layers", *families])
    for depth, hidden, mlp, heads in [
        (3, 64, 96, 4),
        (2, 40, 33, 1),
        (1, 62, 95, 2),
        (2, 64, 10, 1),
    ]:
        count = {
            "hidden": hidden,
            "mlp": min(mlp, costs.full["mlp"]),
            "kv_heads": min(heads, costs.full["kv_heads"]),
        }
        edit = {
            g.name: range(count[g.family]) for g in coupled_groups(program) if g.family in families
        }
        smaller = drop(keep(program, edit), [block.name for block in blocks(program)][: 3 - depth])
        one = {name: [value] for name, value in {**count, "layers": depth}.items()}
        assert float(costs.cost(one, "parameters")[0]) == smaller.num_parameters
        assert float(costs.cost(one, "bytes")[0]) == smaller.num_bytes


def test_what_cannot_be_counted_as_one_number_is_refused() -> None:
    program = capture(tiny_model("deepseek_v3", num_hidden_layers=3))
    with pytest.raises(EditError, match="of different sizes"):
        ShapeCosts(program, ["layers"])
    with pytest.raises(EditError, match="no group of family 'channels'"):
        ShapeCosts(program, ["channels"])
    with pytest.raises(EditError, match="too many"):
        list(shapes_within({"a": range(3000), "b": range(3000)}, published, 1, 0))


def test_latency_is_measured_on_a_grid_and_interpolated() -> None:
    asked: list[tuple[int, int]] = []

    def timer(rows: int, columns: int, like: torch.Tensor) -> float:
        asked.append((rows, columns))
        return 1e-9 * rows * columns + 1e-6

    program = capture(tiny_model("llama", num_hidden_layers=3))
    costs = ShapeCosts(program, ["layers", "mlp", "hidden"], LatencyTable(timer))
    shapes = {
        "layers": [3, 3, 2, 1] * 24,
        "mlp": list(range(1, 97)),
        "hidden": [64, 32, 48, 20] * 24,
    }
    found = costs.cost(shapes, "latency")
    for at in (0, 17, 50, 95):
        depth, mlp, hidden = (shapes[name][at] for name in ("layers", "mlp", "hidden"))
        matrices = [
            (64, hidden),
            (32, hidden),
            (32, hidden),
            (hidden, 64),
            (mlp, hidden),
            (mlp, hidden),
            (hidden, mlp),
        ]
        expected = (
            depth * sum(1e-9 * n * k + 1e-6 for n, k in matrices) + 1e-9 * 128 * hidden + 1e-6
        )
        assert found[at] == pytest.approx(expected, rel=1e-9)
    assert len(asked) == len(set(asked)) < 80, "each size once, on a grid of few"


def test_a_matrix_is_timed_on_this_machine() -> None:
    seconds = LatencyTable().seconds(
        np.array([64.0, 512.0]), np.array([64.0, 512.0]), torch.zeros(1)
    )
    assert (seconds > 0).all()
