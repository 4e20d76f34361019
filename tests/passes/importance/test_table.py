"""What holds for every importance: no dependence on batches or padding, and options that a pipeline
can name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.graph import Program
from secateur.passes import IMPORTANCES, Context, Pipeline, Score, samples
from secateur.passes.calibration.data import Batch
from secateur.passes.importance import Importance, Perplexity
from secateur.passes.importance.base import COSTS

METRICS = [Perplexity(families=("mlp",)) if cls is Perplexity else cls() for cls in IMPORTANCES]
every_metric = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)


def scores(program: Program, metric: Importance, data: list[Batch]) -> dict[str, Tensor]:
    return dict(Score(metric)(program, Context(data=samples(data, program), seed=3)).scores)


def padded(rows: list[Tensor], width: int, left: bool) -> dict[str, Tensor]:
    """Rows of other lengths as one batch, with a mask."""
    ids, mask = torch.full((len(rows), width), 9), torch.zeros(len(rows), width, dtype=torch.int64)
    for at, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[at, place], mask[at, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@every_metric
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(2, 9), min_size=2, max_size=5),
    cut=st.integers(1, 4),
    left=st.booleans(),
)
def test_the_same_sequences_score_the_same_however_they_are_laid(
    metric: Importance, two_layers: Program, lengths: list[int], cut: int, left: bool
) -> None:
    maker = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(0, 11, (length,), generator=maker) for length in lengths]
    alone = scores(two_layers, metric, [row[None] for row in rows])
    laid = [padded(part, 11, left) for part in (rows[:cut], rows[cut:]) if part]
    found = scores(two_layers, metric, laid)
    assert set(found) == set(alone) and "mlp#2" in found
    assert all(found[name].equal(alone[name]) for name in alone)


@every_metric
def test_a_pipeline_can_name_it_with_its_options(metric: Importance) -> None:
    pipeline = Pipeline(passes=(Score(metric),))
    assert (
        Pipeline.parse(pipeline.to_text()) == pipeline == Pipeline.from_recipe(pipeline.to_recipe())
    )
    assert metric.needs in COSTS and metric.cost.flops >= 0 and metric.summary().endswith(".")
