"""What counts as read, and how often: one norm of a mixture of experts, a head tied to the
embeddings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from zoo.models import tiny_model

from secateur.graph import CoupledGroup, Program, capture, coupled_groups
from secateur.passes import Context, Score, samples
from secateur.passes.calibration.observe import op_name, readers
from secateur.passes.importance import Activation, Fisher, Flap, Importance, Obs, Wanda

ByKind = Callable[[str], Program]


def hidden(program: Program) -> CoupledGroup:
    return next(group for group in coupled_groups(program) if group.family == "hidden")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_norm_before_experts_counts_once(kind: str, program_of: ByKind) -> None:
    program = program_of(kind)
    found = readers(program, hidden(program), head=False)
    assert len(found) == 2 * 2, "two norms in each of two layers"
    assert {op_name(reader.node) for reader in found} == {"aten.mul"}
    assert len(readers(program, hidden(program))) == 2 * 2 + 1


def test_experts_read_what_the_norm_gave(program_of: ByKind, ids: Tensor) -> None:
    program = program_of("mixtral")
    model, seen = program.source.model, dict[str, Tensor]()
    for name, module in model.named_modules():
        if name.endswith("layernorm"):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        model(input_ids=ids)
    expected = sum(out.abs().mean(1).square().sum(0).sqrt() for out in seen.values())
    scored = Score(Activation())(program, Context(data=samples([ids], program)))
    assert len(seen) == 4
    torch.testing.assert_close(scored.scores[hidden(program).name], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def twins() -> tuple[Program, Program]:
    """A model whose head is its table of embeddings, and the same model with the head a copy."""
    tied = tiny_model("llama", tie_word_embeddings=True)
    untied = tiny_model("llama", tie_word_embeddings=False)
    untied.load_state_dict(
        {**tied.state_dict(), "lm_head.weight": tied.lm_head.weight.detach().clone()}
    )
    return capture(tied), capture(untied)


METRICS: list[Importance] = [
    Wanda(),
    Flap(),
    Obs(),
    Fisher(),
    Activation(),
    Activation(final_norm=True),
]


@pytest.mark.parametrize("metric", METRICS, ids=repr)
def test_tying_the_head_changes_no_score(
    twins: tuple[Program, Program], ids: Tensor, metric: Importance
) -> None:
    tied, untied = (
        Score(metric)(one, Context(data=samples([ids], one))).scores[hidden(one).name]
        for one in twins
    )
    torch.testing.assert_close(tied, untied)


def test_the_final_norm_counts_where_asked(twins: tuple[Program, Program], ids: Tensor) -> None:
    program = twins[0]
    data = Context(data=samples([ids], program))
    counts = [
        len(
            Activation(final_norm=asked).members(program, [hidden(program)], data)[
                hidden(program).name
            ]
        )
        for asked in (False, True)
    ]
    assert counts == [4, 5]
