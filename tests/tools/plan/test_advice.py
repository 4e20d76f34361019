"""Each row of the warnings speaks where it should and is silent where it should be."""

from __future__ import annotations

import pytest
import torch
from zoo.models import tiny_model

from secateur.graph import Program, capture
from secateur.passes import Pipeline
from secateur.tools.plan.advice import ROWS, advise, document_digests, warn_same_text
from secateur.tools.plan.plan import make_plan, on_meta

SCORE = "score{metric=random}"
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}


@pytest.fixture(scope="module")
def model() -> Program:
    """Widths that serve well: 512 channels, 1024 neurons, 8 key/value heads; shapes alone."""
    with torch.device("meta"):
        return capture(tiny_model("llama", **WIDE, num_hidden_layers=2))


CASES: dict[str, tuple[str, str, str]] = {
    "much removed without retraining": (
        f"{SCORE},prune-width{{mlp=0.75}}",
        f"{SCORE},prune-width{{mlp=0.75}},distill",
        "no retraining follows",
    ),
    "more than half in one step": (
        f"{SCORE},prune-width{{mlp=128,hidden=128}},distill",
        f"{SCORE},prune-width{{mlp=512}},distill,{SCORE},prune-width{{mlp=256}},distill",
        "in one step",
    ),
    "heads do not divide": (
        f"{SCORE},prune-width{{kv_heads=6}}",
        f"{SCORE},prune-width{{kv_heads=4}}",
        "6 key/value heads cannot be served on 4, 8 devices, and 8 could",
    ),
    "k-quants do not fit": (
        f"{SCORE},prune-width{{mlp=896}}",
        f"{SCORE},prune-width{{mlp=0.25,round_to=256}}",
        "mlp=768 keeps as many",
    ),
    "tensor cores idle": (
        f"{SCORE},prune-width{{hidden=480}}",
        f"{SCORE},prune-width{{hidden=448}}",
        "480 is no multiple of 64, which is slow on tensor cores: hidden=448 keeps as many",
    ),
    "magnitude is worse than chance": (
        "score{metric=magnitude},prune-width{mlp=0.25}",
        "score{metric=wanda},prune-width{mlp=0.25}",
        "score{metric=wanda}",
    ),
    "too few calibration tokens": (
        f"{SCORE},prune-width{{mlp=768}},repair",
        f"{SCORE},prune-width{{mlp=512}},repair",
        "give --tokens 1920 or more",
    ),
}


def warned(text: str, model: Program, tokens: int = 800) -> dict[str, str]:
    plan = make_plan(model, Pipeline.parse(text), lambda program: None, tokens=tokens, window=64)
    return {one.name: one.says for one in plan.advice}


def test_every_row_has_a_case_and_a_source() -> None:
    assert list(CASES) == list(ROWS)
    assert all(len(row.source) > 20 for row in ROWS.values())


@pytest.mark.parametrize("row", CASES)
def test_a_row_speaks_where_it_should(row: str, model: Program) -> None:
    fires, silent, says = CASES[row]
    assert says in warned(fires, model)[row]
    assert row not in warned(silent, model)


def test_good_practice_is_not_warned_of(model: Program) -> None:
    text = "score{metric=wanda},prune-width{mlp=0.25,round_to={mlp=256}},repair"
    assert warned(text, model, tokens=100_000) == {}


def test_what_was_never_good_is_no_loss(model: Program) -> None:
    with torch.device("meta"):
        odd = capture(
            tiny_model("llama", hidden_size=72, intermediate_size=100, num_hidden_layers=2)
        )
    light = on_meta(odd)
    pipeline = Pipeline.parse(f"{SCORE},prune-width{{mlp=90}}")
    assert advise(pipeline, [light, light, pipeline.preview(light)], pipeline.plan(light), 0) == []


def test_evaluating_on_calibration_documents_is_warned_of() -> None:
    figures = {"calibration": {"documents": document_digests(["one", "two", "two"])}}
    found = warn_same_text(figures, ["two", "three"])
    assert (
        found is not None and found.says.startswith("1 of 2 documents") and "FLAP" in found.source
    )
    assert warn_same_text(figures, ["three"]) is None
    assert (
        warn_same_text({}, ["one"]) is None
        and warn_same_text({"calibration": None}, ["one"]) is None
    )


@pytest.mark.parametrize(
    ("asked", "advice"),
    [
        ("0.26", "round_to={mlp=256} keeps 768"),
        ("0.1", "mlp=768 keeps as many"),  # rounding to 256 would keep all 1024
        ("700", "mlp=512 keeps as many"),
    ],
)
def test_advice_never_undoes_the_pruning(asked: str, advice: str, model: Program) -> None:
    text = f"{SCORE},prune-width{{mlp={asked}}}"
    assert advice in warned(text, model)["k-quants do not fit"]


def test_a_width_of_one_block_has_no_smaller_multiple() -> None:
    with torch.device("meta"):
        narrow = capture(tiny_model("llama", intermediate_size=256))
    says = warned(f"{SCORE},prune-width{{mlp=0.25}}", narrow)["k-quants do not fit"]
    assert "no smaller multiple of 256 is left of its 256" in says and "round_to" not in says
