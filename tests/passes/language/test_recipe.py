"""Recipe files."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.graph.errors import PipelineError
from secateur.passes import DataSpec, Pipeline, PruneWidth, Score
from secateur.passes.importance import Magnitude

RECIPE = """
seed: 4
data: {file: text.jsonl, tokens: 512, window: 64}
passes:
  - score: {metric: {magnitude: {p: 1}}, aggregate: max}
  - prune-width:
      mlp: 0.25
      round_to: {mlp: 8}
  - score
"""


def test_a_recipe_is_the_same_passes(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    pipeline = Pipeline.from_recipe(file)
    passes = (Score(Magnitude(p=1), "max"), PruneWidth(mlp=0.25, round_to={"mlp": 8}), Score())
    assert pipeline == Pipeline(passes, DataSpec(file="text.jsonl", tokens=512, window=64), seed=4)
    assert Pipeline.parse(pipeline.to_text()).passes == passes
    assert Pipeline.from_recipe(pipeline.to_recipe()) == pipeline


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("passes: [\n", "not YAML (line"),
        ("- score\n- score\n", "expected a map"),
        ("passes: []\n", "passes"),
        ("sed: 1\npasses: [score]\n", "unknown key 'sed'; did you mean 'seed'?"),
        ("data: {fil: a}\npasses: [score]\n", "unknown key 'data.fil'; did you mean 'file'?"),
        ("data: {window: 1}\npasses: [score]\n", "data.window"),
        ("seed: x\npasses: [score]\n", "seed"),
        ("passes: [scor]\n", "passes[0]: 'scor' is not the name of a pass; did you mean 'score'?"),
        ("passes: [score, {prune-width: {mlp: 2.5}}]\n", "passes[1]: prune-width: mlp=2.5"),
        ("passes: [{score: {}, prune-width: {}}]\n", "expected the name of a pass"),
        ("passes: [score]\nseed: 1\nseed: 2\n", "'seed' is given twice (line 1)"),
        ("passes: [!!python/object/apply:os.getcwd []]\n", "not YAML"),
    ],
)
def test_faults_are_named(text: str, says: str) -> None:
    with pytest.raises(PipelineError) as caught:
        Pipeline.from_recipe(text)
    assert says in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"nothing.yaml: cannot be read"):
        Pipeline.from_recipe(tmp_path / "nothing.yaml")


def test_numbers_as_people_write_them() -> None:
    recipe = Pipeline.from_recipe("passes: [score]\ndata: {tokens: 2e6}\n")
    assert recipe.data == DataSpec(tokens=2_000_000)
