"""Models are opened safely: each way in which a folder can be wrong ends in a message that says
so."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import GPT2, SMALL, tiny
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from zoo.folders import edit_header

from secateur.graph.errors import SourceError
from secateur.runtime.open.checkpoint import INDEX, SINGLE, read_checkpoint, read_header
from secateur.runtime.open.source import open_model

Write = Callable[[PreTrainedModel], Path]


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def edit_bytes(folder: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray((folder / SINGLE).read_bytes())
    change(data)
    (folder / SINGLE).write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("config", "cls", "fields"),
    [
        ("LlamaConfig", None, SMALL | {"tie_word_embeddings": True}),
        ("MixtralConfig", None, SMALL | {"num_local_experts": 4}),
        ("GPT2Config", None, GPT2),
        ("BertConfig", "BertModel", {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    ],
)
def test_opens_what_it_should(
    checkpoint: Write, config: str, cls: str | None, fields: dict[str, Any]
) -> None:
    model = tiny(config, cls, **fields)
    opened = open_model(checkpoint(model))
    assert type(opened) is type(model) and not opened.training
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in opened.state_dict().items())


def test_without_weights_a_config_is_enough(checkpoint: Write, llama: PreTrainedModel) -> None:
    folder = checkpoint(llama)
    (folder / SINGLE).unlink()
    for place in (folder, str(folder), folder / "config.json"):
        opened = open_model(place, weights=False, dtype="bfloat16")
        assert {(p.device.type, p.dtype) for p in opened.parameters()} == {("meta", torch.bfloat16)}
    with pytest.raises(SourceError, match="has no weights"):
        open_model(folder)


def test_sharded_checkpoint(tmp_path: Path, llama: PreTrainedModel) -> None:
    llama.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / INDEX).is_file()
    assert torch.equal(open_model(tmp_path).lm_head.weight, llama.lm_head.weight)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(SourceError, match=r"lacks 1 of \d+ shards: model-00002"):
        open_model(tmp_path)


def test_index_that_lies(tmp_path: Path, llama: PreTrainedModel) -> None:
    llama.save_pretrained(tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / INDEX).read_text())
    for weight_map, words in (
        (index["weight_map"] | {"lm_head.weight": "../model.safetensors"}, "outside the folder"),
        (
            index["weight_map"] | {"extra.weight": index["weight_map"]["lm_head.weight"]},
            "holds extra.weight",
        ),
        (["a"], "no weight_map"),
    ):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(SourceError, match=words):
            open_model(tmp_path)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("absent", "is no folder"),
        ("empty", "has no config.json"),
        ("file.txt", "is a file"),
    ],
)
def test_not_a_model_folder(tmp_path: Path, place: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(SourceError, match=words):
        open_model(tmp_path / place)


def test_unknown_hub_id_says_what_to_check() -> None:
    with pytest.raises(SourceError, match="neither a folder nor a model that can be fetched"):
        open_model("secateur-tests/no-such-model")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"model_type": 3}', "\xff"])
def test_config_that_is_no_config(checkpoint: Write, llama: PreTrainedModel, text: str) -> None:
    folder = checkpoint(llama)
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SourceError, match=r"config\.json"):
        open_model(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "no_such_type"}, "does not know"),
        ({"architectures": ["BertModel"]}, "takes a BertConfig"),
        ({"architectures": ["MyOwnModel"]}, "never run"),
        ({"architectures": ["AutoModel"]}, "never run"),
        ({"hidden_size": "many"}, "refused by LlamaConfig"),
        ({"vocab_size": -1}, "cannot be built"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"attn_implementation": "somebody/kernels"}, "names code to be fetched"),
        (
            {"text_config": {"_attn_implementation": "somebody/kernels:v1"}},
            "names code to be fetched",
        ),
        ({"transformers_weights": "other.safetensors"}, "another weights file"),
        ({"per_layer_config": {"1": {"intermediate_size": 8}}}, "layers differ"),
        (
            {"hidden_size": 128},
            r"embed_tokens.weight is stored as \[96, 64\], the configuration says \[96, 128\]",
        ),
        ({"intermediate_size": 95}, r"is stored as \[64, 96\], the configuration says \[64, 95\]"),
        ({"num_key_value_heads": 2}, "k_proj.weight is stored as"),
        ({"vocab_size": 100}, "embed_tokens.weight is stored as"),
        ({"num_hidden_layers": 3}, "without stored weights: model.layers.2"),
        ({"num_hidden_layers": 1}, "does not use: model.layers.1"),
        ({"attention_bias": True}, "without stored weights: .*bias"),
    ],
)
def test_config_that_lies(
    checkpoint: Write, llama: PreTrainedModel, fields: dict[str, Any], words: str
) -> None:
    folder = checkpoint(llama)
    change_config(folder, **fields)
    with pytest.raises(SourceError, match=words):
        open_model(folder)


def test_config_that_lies_about_experts(checkpoint: Write) -> None:
    folder = checkpoint(tiny("MixtralConfig", **SMALL, num_local_experts=4))
    change_config(folder, num_local_experts=3)
    with pytest.raises(SourceError, match="experts"):
        open_model(folder)


def test_remote_code_is_never_run(
    checkpoint: Write, llama: PreTrainedModel, tmp_path: Path
) -> None:
    folder = checkpoint(llama)
    (folder / "modeling.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n"
    )
    auto_map = {"AutoConfig": "modeling.Model", "AutoModelForCausalLM": "modeling.Model"}
    change_config(folder, auto_map=auto_map)
    assert type(open_model(folder)) is type(llama)  # a stock class exists: it is used instead
    change_config(folder, model_type="mine")
    with pytest.raises(SourceError, match="remote code is never run"):
        open_model(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickles_are_never_read(checkpoint: Write, llama: PreTrainedModel, name: str) -> None:
    folder = checkpoint(llama)
    (folder / SINGLE).unlink()
    (folder / name).write_bytes(b"\x80\x04would run code")
    with pytest.raises(SourceError, match=r"only pickled weights .*convert them"):
        open_model(folder)


def test_adapter_folder_is_refused(checkpoint: Write, llama: PreTrainedModel) -> None:
    folder = checkpoint(llama)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match="merge"):
        open_model(folder)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1, -1000])
def test_truncated_weights(checkpoint: Write, llama: PreTrainedModel, kept: int) -> None:
    folder = checkpoint(llama)
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:kept])
    with pytest.raises(SourceError, match="truncated or corrupted"):
        open_model(folder)


def test_surplus_bytes(checkpoint: Write, llama: PreTrainedModel) -> None:
    folder = checkpoint(llama)
    edit_bytes(folder, lambda data: data.extend(b"abc"))
    with pytest.raises(SourceError, match="truncated or corrupted"):
        open_model(folder)


def test_flipped_bytes_of_the_header_are_seen(checkpoint: Write, llama: PreTrainedModel) -> None:
    """Whatever the flip hits, a name, a shape, an offset, a dtype or the syntax.  (Descriptive
    metadata may change.)"""
    folder = checkpoint(llama)
    good = (folder / SINGLE).read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    start = good.index(b'"lm_head')
    for position in [0, 1, 7, *range(start, 8 + length - 8, 97)]:
        bad = bytearray(good)
        bad[position] ^= 0x01
        (folder / SINGLE).write_bytes(bytes(bad))
        with pytest.raises(SourceError):
            open_model(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h["lm_head.weight"].update(shape=[64, 96, 2]), "does not fill"),
        (lambda h: h["lm_head.weight"].update(shape=[-96, -64]), "no count"),
        (lambda h: h["lm_head.weight"].update(dtype="F31"), "does not parse"),
        (lambda h: h["lm_head.weight"].update(dtype="I32"), "floating point"),
        (
            lambda h: h["lm_head.weight"].update(shape=[64, 96]),
            r"\[64, 96\], the configuration says \[96, 64\]",
        ),
        (lambda h: h.update({"lm_head.weight": dict(h["model.norm.weight"])}), "begins at byte"),
        (lambda h: h.pop("model.norm.weight"), "begins at byte|describes"),
        (lambda h: h.update(extra=3), "does not parse"),
    ],
)
def test_header_that_lies(
    checkpoint: Write, llama: PreTrainedModel, change: Any, words: str
) -> None:
    folder = checkpoint(llama)
    edit_header(folder, change)
    with pytest.raises(SourceError, match=words):
        open_model(folder)


def test_missing_and_unexpected_tensors(checkpoint: Write, llama: PreTrainedModel) -> None:
    folder = checkpoint(llama)
    change_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(SourceError, match=r"without stored weights: model\.norm\.weight"):
        open_model(folder)
    change_weights(
        folder,
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(64), "x": torch.ones(1)}),
    )
    with pytest.raises(SourceError, match="does not use: x"):
        open_model(folder)
    assert open_model(folder, allow_unexpected=True).config.hidden_size == 64


def test_tied_and_ignored_tensors_are_not_missed(checkpoint: Write) -> None:
    model = tiny("GPT2Config", **GPT2)
    folder = checkpoint(model)
    assert "lm_head.weight" not in read_checkpoint(folder)
    change_weights(
        folder, lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)})
    )
    opened = open_model(
        folder
    )  # old checkpoints hold that mask; the class says that it may be ignored
    assert opened.lm_head.weight is opened.transformer.wte.weight


def test_header_of_every_dtype(tmp_path: Path) -> None:
    tensors = {
        str(d): torch.zeros(3, 5).to(d)
        for d in (torch.bool, torch.int64, torch.float16, torch.bfloat16)
    }
    save_file(
        tensors | {"empty": torch.zeros(0, 4), "scalar": torch.tensor(1.0)},
        tmp_path / "x.safetensors",
    )
    read = read_header(tmp_path / "x.safetensors")
    assert all(
        read[str(d)].dtype == t.dtype and read[str(d)].shape == (3, 5) for d, t in tensors.items()
    )
    assert read["empty"].shape == (0, 4) and read["scalar"].shape == ()


def test_a_missing_package_is_not_the_model_s_fault(
    checkpoint: Write, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ImportError("a device map requires `accelerate`")

    folder = checkpoint(llama)
    monkeypatch.setattr(type(llama), "from_pretrained", refuse)
    with pytest.raises(
        SourceError, match=r"needs a package that is not installed here: .*accelerate"
    ) as told:
        open_model(folder)
    assert "config.json" not in str(told.value)
