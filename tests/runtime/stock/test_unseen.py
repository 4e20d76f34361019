"""What the captured computation did not use: never cut by halves, always told, tried with a
picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from secateur.graph import Program, capture, coupled_groups, drop, keep
from secateur.graph.blocks.find import blocks
from secateur.runtime.save.stock_checkpoint import save
from secateur.runtime.stock.config_search import plan_config
from secateur.runtime.stock.incompatibility import UnseenParametersError
from secateur.runtime.stock.to_transformers import to_transformers_with_plan
from secateur.runtime.stock.unseen import unseen_parameters
from secateur.runtime.verify import verify_folder
from secateur.runtime.verify.modalities import NoExample, WrongWidth, picture_inputs
from secateur.runtime.verify.picture_proof import picture_calls

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
TEXT |= {"bos_token_id": 1, "eos_token_id": 1}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
GRID: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 4}
GRID |= {"out_hidden_size": 32, "spatial_merge_size": 2}
TOKENS = {
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}

KINDS: dict[str, dict[str, Any]] = {
    "Llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model"},
        "image_token_index": 5,
        "vision_feature_select_strategy": "default",
    },
    "Qwen2_5_VL": {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": GRID | {"depth": 2, "fullatt_block_indexes": [1], "window_size": 16},
        **TOKENS,
    },
    "Qwen3VL": {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": GRID
        | {"depth": 2, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **TOKENS,
    },
    "InternVL": {
        "text_config": TEXT | {"model_type": "qwen3"},
        "vision_config": VISION | {"image_size": [32, 32], "patch_size": [8, 8]},
        "image_token_id": 5,
    },
    "SmolVLM": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"image_size": 32},
        "image_token_id": 5,
        "scale_factor": 2,
    },
    "Gemma3": {
        "text_config": TEXT | {"sliding_window": 16},
        "vision_config": VISION | {"model_type": "siglip_vision_model", "image_size": 32},
        "mm_tokens_per_image": 4,
        "image_token_index": 5,
        "boi_token_index": 7,
        "eoi_token_index": 8,
    },
}


QUICK = ("Llava", "Qwen2_5_VL")
SOME_SLOW = [
    kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS
]


def model_of(kind: str) -> PreTrainedModel:
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind])
    model: PreTrainedModel = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


class Programs(dict[str, Program]):
    """The Program of each kind, captured when it is first asked for."""

    def __missing__(self, kind: str) -> Program:
        torch.manual_seed(0)
        self[kind] = capture(model_of(kind))
        return self[kind]


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return Programs()


def cut(program: Program, family: str, count: int) -> Program:
    groups = [g for g in coupled_groups(program) if g.family == family and g.locked is None]
    assert groups
    return keep(program, {g: torch.randperm(g.units)[:count].sort().values for g in groups})


@pytest.mark.parametrize("kind", SOME_SLOW)
def test_a_picture_can_be_made_from_the_configuration(
    programs: dict[str, Program], kind: str
) -> None:
    model: Any = programs[kind].source.model
    inputs = picture_inputs(model)
    assert inputs is not None
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, model(**other).logits)


@pytest.mark.parametrize("kind", SOME_SLOW)
def test_a_width_that_runs_through_all_layers_is_refused_by_name(
    programs: dict[str, Program], kind: str
) -> None:
    program = programs[kind]
    assert unseen_parameters(program)
    with pytest.raises(UnseenParametersError, match=r"runs through all layers.*pixel_values"):
        plan_config(cut(program, "hidden", 24))


@pytest.mark.parametrize("kind", SOME_SLOW)
@pytest.mark.parametrize("what", ["mlp", "depth"])
def test_a_cut_inside_the_layers_answers_a_picture_as_the_source_with_zeros(
    programs: dict[str, Program], kind: str, what: str
) -> None:
    program = programs[kind]
    smaller = (
        drop(program, [blocks(program)[1].name]) if what == "depth" else cut(program, what, 40)
    )
    raised = to_transformers_with_plan(smaller)
    calls, figures = picture_calls(smaller, raised)
    assert figures["picture"] == "agrees"
    assert figures["numbers"] == sum(p.numel() for p in unseen_parameters(program).values())
    assert len(calls) == 1
    stay = {
        name: p for name, p in raised.model.named_parameters() if name in unseen_parameters(program)
    }
    assert stay.keys() == unseen_parameters(program).keys()


def test_a_raised_model_that_computes_something_else_from_a_picture_is_refused(
    programs: dict[str, Program],
) -> None:
    smaller = cut(programs["Llava"], "mlp", 40)
    raised = to_transformers_with_plan(smaller)
    with torch.no_grad():
        weight = raised.model.get_parameter("model.multi_modal_projector.linear_2.weight")
        replaced = torch.nn.Parameter(weight * 2)
        raised.model.get_submodule("model.multi_modal_projector.linear_2").weight = replaced
    with pytest.raises(UnseenParametersError, match="answers a picture otherwise"):
        picture_calls(smaller, raised)


def test_the_other_stack_keeps_its_layers(programs: dict[str, Program]) -> None:
    """Two layers of pictures beside three of text: not taken for a number of first layers."""
    program = programs["Llava"]
    plan = plan_config(drop(program, [blocks(program)[1].name]))
    assert set(plan.changes) == {"text_config.num_hidden_layers"}


def test_saved_told_and_verified_with_a_picture(
    programs: dict[str, Program], tmp_path: Path
) -> None:
    report = save(cut(programs["Llava"], "mlp", 40), tmp_path / "out")
    assert report.unseen["picture"] == "agrees"
    assert report.reload["difference with a picture"] <= 1e-4
    figures = json.loads((tmp_path / "out" / "secateur.json").read_text())["figures"]
    assert figures["unseen"]["parameters"] == len(unseen_parameters(programs["Llava"]))
    says = {
        o.check: " ".join(f.says for f in o.findings)
        for o in verify_folder(tmp_path / "out").outcomes
    }
    assert "with a picture by" in says["reload"]


@pytest.mark.slow
def test_verify_finds_an_encoder_that_does_not_fit(tmp_path: Path) -> None:
    """As pruning the text model alone would leave it: it opens, answers text, dies at a picture."""
    config = KINDS["Qwen2_5_VL"] | {
        "vision_config": KINDS["Qwen2_5_VL"]["vision_config"] | {"out_hidden_size": 24}
    }
    broken = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(**config)
    ).eval()
    with pytest.raises(WrongWidth, match="width 24"):
        picture_inputs(broken)
    broken.save_pretrained(tmp_path / "broken")
    verified = verify_folder(tmp_path / "broken")
    reload = next(outcome for outcome in verified.outcomes if outcome.check == "reload")
    assert reload.level == "fault"
    assert "cannot read pictures" in " ".join(finding.says for finding in reload.findings)


def test_where_no_example_can_be_made_the_reason_is_told(programs: dict[str, Program]) -> None:
    model = model_of("Llava")
    vars(model.config)["image_token_index"] = None
    with pytest.raises(NoExample, match="names no picture token"):
        picture_inputs(model)
    text: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    assert picture_inputs(text) is None
