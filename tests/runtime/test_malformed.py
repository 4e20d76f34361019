"""Files that others wrote are right or refused in a sentence: numbers, settings, plans, recipes,
teachers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import SMALL, tiny
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from secateur.graph.errors import PipelineError, SecateurError, SourceError
from secateur.graph.reading import MAX_DEPTH, parse_json, printable, reading, shown
from secateur.passes import Pipeline
from secateur.passes.lowering.lower import Lowering
from secateur.passes.training.teachers import open_teacher
from secateur.runtime.open.checkpoint import SINGLE
from secateur.runtime.open.source import open_model
from secateur.tools import cli

ANCHORS = "b0: &b0 [x]\n" + "".join(f"b{n}: &b{n} [*b{n - 1}, *b{n - 1}]\n" for n in range(1, 40))


@pytest.fixture
def folder(tmp_path: Path, llama: PreTrainedModel) -> Path:
    llama.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def spoil(folder: Path, name: str, value: float, dtype: torch.dtype | None = None) -> None:
    tensors = load_file(folder / SINGLE)
    if dtype is not None:
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    tensors[name].view(-1)[70] = value
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def settings(folder: Path, **fields: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "1 NaN"), (float("-inf"), "1 infinite")]
)
def test_weights_that_are_not_finite_are_named(
    folder: Path, dtype: torch.dtype, value: float, word: str
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    spoil(folder, name, value, dtype)
    with pytest.raises(SourceError, match=rf"not finite: {name} \({word}, the first at \[1, 6\]\)"):
        open_model(folder)


def test_large_finite_weights_are_opened(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    tensors["lm_head.weight"].fill_(3e38)  # their sum overflows
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    assert open_model(folder).lm_head.weight.isfinite().all()
    with pytest.raises(SourceError, match="choose another dtype"):
        open_model(folder, dtype="float16")


def test_masks_of_infinities_are_no_weights(folder: Path) -> None:
    model = open_model(folder)
    model.register_buffer("mask", torch.full((4, 4), float("-inf")))
    from secateur.runtime.open.finite import check_finite

    check_finite(model.named_parameters(), folder)
    with pytest.raises(SourceError, match="mask"):
        check_finite(model.named_buffers(), folder)


def test_eight_bit_floats_are_looked_at(tmp_path: Path) -> None:
    from secateur.runtime.open.finite import check_finite

    weight = torch.ones(3, 5).to(torch.float8_e4m3fn)
    check_finite([("w", weight)], tmp_path)
    weight.view(torch.uint8)[2, 1] = 0x7F
    with pytest.raises(SourceError, match=r"w \(1 NaN, the first at \[2, 1\]\)"):
        check_finite([("w", weight)], tmp_path)


def test_a_teacher_is_opened_with_every_check(folder: Path) -> None:
    assert type(open_teacher(folder)).__name__ == "LlamaForCausalLM"
    tensors = load_file(folder / SINGLE)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(
        PipelineError, match=r"teacher=.*without stored weights: model.layers.0.mlp.up_proj"
    ):
        open_teacher(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"compile_config": "bfloat16"},
        {"pad_token_id": "owner/repo"},
        {"eos_token_id": [2, "x"]},
        {"eos_token_id": True},
        {"watermarking_config": 3},
        {"temperature": "hot"},
        {"max_length": 1.5},
        {"custom_generate": "eval"},
        {"cache_implementation": ["static"]},
        {"do_sample": "yes"},
    ],
)
def test_generation_settings_of_a_wrong_type(folder: Path, fields: dict[str, Any]) -> None:
    settings(folder, **fields)
    for weights in (True, False):
        with pytest.raises(SourceError, match=r"generation_config\.json"):
            open_model(folder, weights=weights)


def test_sound_generation_settings_are_kept(folder: Path) -> None:
    settings(
        folder,
        eos_token_id=[2, 3],
        temperature=0.6,
        do_sample=True,
        max_length=None,
        of_ours={"a": 1},
    )
    assert open_model(folder).generation_config.eos_token_id == [2, 3]
    assert open_model(folder, weights=False).generation_config.temperature == 0.6


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": {"": "owner/repo"}},
        {"_attn_implementation_internal": "owner/repo"},
        {"_attn_implementation": "paged|owner/repo"},
        {"experts_implementation": "sonicmoe"},
        {"experts_implementation": {"": "owner/repo"}},
        {"text_config": [{"attn_implementation": {"text": "owner/repo:layer"}}]},
        {"kernel_config": {"kernel_mapping": {"RMSNorm": "owner/repo"}}},
        {"custom_generate": "owner/repo"},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**30},
        {"architectures": 7},
    ],
)
def test_a_configuration_names_no_code(folder: Path, fields: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    for weights in (True, False):
        with pytest.raises(SourceError, match=r"config\.json"):
            open_model(folder, weights=weights)


@pytest.mark.parametrize(
    "kernel", ["flash_attention_2", "flash_attention_3", {"": "flash_attention_2"}]
)
def test_a_hint_of_speed_reaches_no_loader(
    folder: Path, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.integrations.hub_kernels as hub

    def fetched(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel was to be fetched")

    monkeypatch.setattr(hub, "load_and_register_attn_kernel", fetched)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attn_implementation": kernel}))
    assert open_model(folder).config._attn_implementation in ("sdpa", "eager")


def test_a_pointer_is_named(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123\n"
    (folder / SINGLE).write_text(pointer)
    with pytest.raises(SourceError, match="git-lfs pointer and not the weights"):
        open_model(folder)
    (folder / "config.json").write_text(pointer)
    with pytest.raises(SourceError, match="git-lfs pointer and not the file"):
        open_model(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "fp8"}, r"\(fp8\).*FineGrainedFP8Config\(dequantize=True\)"),
        ({"quant_method": "mxfp4"}, "Mxfp4Config"),
        ({"quant_method": "gptq"}, r"\(gptq\).*16 bits"),
        ({"load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_quantized_folders_are_told_a_way(
    folder: Path, settings: dict[str, Any], words: str
) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    with pytest.raises(SourceError, match=words):
        open_model(folder)


def test_odd_metadata_and_deep_headers(folder: Path) -> None:
    from zoo.folders import edit_header

    edit_header(folder, lambda header: header.update(__metadata__={"format": 3}))
    with pytest.raises(SourceError, match="__metadata__"):
        open_model(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("passes: [score]\nseed: !!bool x\n", "recipe"),
        ("passes: [score]\nseed: 0x" + "f" * 5000 + "\n", "recipe"),
        ("passes: [prune-width: {1: 2}]\n", "no name of an option"),
        ("passes: " + "[" * 2000 + "\n", "nested"),
        (ANCHORS, "anchors"),
        ("passes: &a [*a]\n", "anchor|recursive|nested"),
        ("passes: [score]\n? [a, b]\n: 1\n", "is no name"),
        ("passes: [score]\nseed: 99999999999999999999\n", "seed"),
    ],
)  # fmt: skip
def test_recipes_that_are_none(text: str, words: str) -> None:
    with pytest.raises(PipelineError, match=words) as caught:
        Pipeline.from_recipe(text)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "text",
    [
        "score{metric=" + "[" * 3000,
        "score{" + "9" * 6000 + "=1}",
        "prune-width{mlp=" + "9" * 6000 + "}",
        'score{"\\x"=1}',
        'score{metric="\\ud800"}',
        "score{metric=taylor{a=" + "1" * 30 + "}}",
    ],
)
def test_pipeline_texts_that_are_none(text: str) -> None:
    with pytest.raises(PipelineError) as caught:
        Pipeline.parse(text)
    assert len(str(caught.value)) < 1200


def test_a_plan_of_wrong_types() -> None:
    row = {
        "layer": "a.weight",
        "kind": "2:4",
        "shape": [4, 8],
        "bytes": 1,
        "dense_bytes": 2,
        "ms": 1.0,
    }
    row |= {"dense_ms": 1.0, "measured": False, "reason": "", "rounds": False, "shares": "a.weight"}
    plan = {
        "dtype": "float32",
        "machine": "m",
        "source": "s",
        "batch": 1,
        "left_alone": {},
        "layers": [row],
    }
    assert Lowering.from_json(plan).layers[0].shape == (4, 8)
    for change in (
        {"shape": [4]},
        {"shape": 3},
        {"kind": "x"},
        {"shares": "b"},
        {"bytes": "many"},
        {"ms": None},
    ):
        with pytest.raises(ValueError, match=r"found|form|shape"):
            Lowering.from_json(plan | {"layers": [row | change]})


def test_json_has_bounds() -> None:
    for text in (
        "[" * 5000 + "]" * 5000,
        "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2),
        "1" * 5000,
        '{"a":1,"a":2}',
        b"\xff",
    ):
        with pytest.raises(SourceError, match="file cannot be read as JSON"):
            parse_json(text, "file")
    assert parse_json(b"\xef\xbb\xbf[1]", "file") == [1]


def test_the_boundary_prints_no_whole_value() -> None:
    class TextError(SecateurError):
        pass

    with (
        pytest.raises(TextError, match="place cannot be read: 'k' is missing or unknown") as caught,
        reading("place", TextError),
    ):
        raise KeyError("k")
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(TextError) as caught, reading("place", TextError):
        raise ValueError("x" * 100_000)
    assert len(str(caught.value)) < 400
    assert (
        len(shown(list(range(10**6)))) < 90
        and len(shown("\x1b]0;" * 99)) < 90
        and "\x1b" not in shown("\x1b]0;")
    )
    assert len(shown(10**6000)) < 90 and printable("a\ud800\x1bb\n") == "a\\ud800\\x1bb\n"


def test_what_nobody_expected_is_an_internal_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("secateur.tools.commands.inspect.inspect_program", broken)
    assert cli.run_command(["inspect", str(folder)]) == 70
    err = capsys.readouterr().err
    assert (
        "internal error: ZeroDivisionError: by nothing" in err
        and "report" in err
        and "Traceback" not in err
    )
    monkeypatch.setenv("SECATEUR_DEBUG", "1")
    assert cli.run_command(["inspect", str(folder), "--json"]) == 70
    printed = capsys.readouterr()
    assert "Traceback" in printed.err and json.loads(printed.out)["exit_code"] == 70


def test_small_models_of_this_file_are_sound(folder: Path) -> None:
    assert open_model(folder).config.hidden_size == tiny("LlamaConfig", **SMALL).config.hidden_size
