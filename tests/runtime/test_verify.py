"""Every fault that can be planted in a folder is named, and a sound folder has none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_models import SMALL, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from zoo.sparse import as_sparse

import secateur
from secateur.graph import Pattern, Program, Share, Sparse, capture, with_parameters
from secateur.graph.errors import ArtifactError, SourceError
from secateur.kernels.sparse24.formats import pack
from secateur.runtime.open.checkpoint import SINGLE
from secateur.runtime.packed.store import FOLDER, PLAN, WEIGHTS
from secateur.runtime.save import stock_checkpoint as huggingface
from secateur.runtime.verify import Outcome, Verification, find_stored_faults, verify_folder
from secateur.runtime.verify import run as verify_run

UP = "model.layers.0.mlp.up_proj.weight"
LLM_COMPRESSOR = {
    "format": "dense",
    "global_sparsity": 0.5,
    "ignore": ["lm_head"],
    "registry_requires_subclass": False,
    "sparsity_structure": "2:4",
    "targets": ["Linear"],
}
"""As llm-compressor writes it, inside quantization_config."""


@pytest.fixture(scope="module")
def program() -> Program:
    """A small 2:4 model with tied embeddings."""
    return as_sparse(capture(tiny("LlamaConfig", **SMALL, tie_word_embeddings=True)))


@pytest.fixture(scope="module")
def exported(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as it is saved."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    secateur.save(program, folder, check=False)
    return folder


@pytest.fixture
def ours(exported: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "ours"))


@pytest.fixture
def foreign(ours: Path) -> Path:
    """The same without anything that only we write."""
    shutil.rmtree(ours / FOLDER)
    (ours / "secateur.json").unlink()
    return ours


def look(folder: Path) -> Verification:
    return verify_folder(folder, quick=True)


def outcome(found: Verification, check: str) -> Outcome:
    return next(one for one in found.outcomes if one.check == check)


def told(found: Verification, level: str) -> str:
    return "\n".join(
        f"{o.check}: {f.says}. {f.mend}"
        for o in found.outcomes
        for f in o.findings
        if f.level == level
    )


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any], file: str = SINGLE) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def put(
    value: float, row: int = 3, column: int | None = None, name: str = UP
) -> Callable[[dict[str, Tensor]], None]:
    """Plant a number at a zero of a row."""

    def change(tensors: dict[str, Tensor]) -> None:
        at = int((tensors[name][row] == 0).int().argmax()) if column is None else column
        tensors[name][row, at] = value

    return change


# Sound folders
def test_what_was_exported_is_green_with_every_check(exported: Path) -> None:
    found = verify_folder(exported)
    assert found.green and [one.check for one in found.outcomes] == list(verify_run.CHECKS)
    assert told(found, "warning") == told(found, "fault") == ""
    says = told(found, "ok")
    assert (
        "claimed and true in every group: 14 2:4" in says
        and "14 packed weights are the stock ones bit for bit" in says
    )
    assert (
        "a fresh process (AutoModelForCausalLM)" in says and "on packed weights (float32)" in says
    )
    assert sum(one.pattern == "2:4" for one in found.tensors) == 14 and found.gbps > 0
    assert json.loads(json.dumps(found.to_json()))["green"] is True


def test_a_foreign_folder_needs_neither_manifest_nor_configuration(foreign: Path) -> None:
    assert look(foreign).green and "not an artifact of secateur" in told(look(foreign), "note")
    (foreign / "config.json").unlink()
    found = look(foreign)
    assert found.green and "no config.json" in told(found, "note") and "14 2:4" in told(found, "ok")
    (foreign / SINGLE).rename(foreign / "anything.safetensors")
    assert look(foreign).green


def test_shards_are_counted_file_by_file(foreign: Path) -> None:
    tensors = load_file(foreign / SINGLE)
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[:9],
        "model-00002-of-00002.safetensors": names[9:],
    }
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, foreign / file, metadata={"format": "pt"})
    where = {name: file for file, own in parts.items() for name in own}
    (foreign / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    assert "loaders take the first" in told(look(foreign), "warning")
    (foreign / SINGLE).unlink()
    assert look(foreign).green and {one.file for one in look(foreign).tensors} == set(parts)
    rewrite(foreign, put(1.0), where[UP])
    assert f"of {UP} in {where[UP]}" in told(look(foreign), "warning")
    (foreign / where[UP]).unlink()
    assert "lacks 1 of 2 shards" in told(look(foreign), "fault")


# Planted faults
def not_a_number(folder: Path) -> None:
    rewrite(folder, put(float("nan"), name="model.embed_tokens.weight", column=5))


def infinite(folder: Path) -> None:
    rewrite(folder, put(-float("inf"), name="model.embed_tokens.weight", column=5))


def negative_zero(folder: Path) -> None:
    rewrite(folder, put(-0.0))


def third_of_four(folder: Path) -> None:
    rewrite(folder, put(1e-45))


def other_value(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[UP][tensors[UP] != 0] *= 2

    rewrite(folder, change)


def lost_weight(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(UP))


def mask_beside(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({f"{UP}_mask": tensors[UP] != 0}))


def unlike_ties(folder: Path) -> None:
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
        ),
    )


def truncated(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-4])


def damaged_header(folder: Path) -> None:
    data = bytearray((folder / SINGLE).read_bytes())
    data[8:12] = b"}}}}"
    (folder / SINGLE).write_bytes(data)


def only_pickles(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def other_shapes(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=100)


def untrue_claim(folder: Path) -> None:
    claim = {**LLM_COMPRESSOR, "sparsity_structure": "1:4"}
    edit_json(
        folder / "config.json",
        quantization_config={"quant_method": "compressed-tensors", "sparsity_config": claim},
    )


def untrue_share(folder: Path) -> None:
    edit_json(
        folder / "config.json",
        sparsity_config={**LLM_COMPRESSOR, "sparsity_structure": "0:0", "global_sparsity": 0.6},
    )


def claim_of_nothing(folder: Path) -> None:
    edit_json(folder / "config.json", sparsity_config={**LLM_COMPRESSOR, "targets": ["Conv7d"]})


def claim_without_pattern(folder: Path) -> None:
    edit_json(
        folder / "config.json", sparsity_config={"targets": ["Linear"], "global_sparsity": None}
    )


FAULTS: list[tuple[Callable[[Path], None], str, str]] = [
    (not_a_number, "numbers", r"embed_tokens.weight holds 1 NaN; the first: row 3, column 5"),
    (infinite, "numbers", r"embed_tokens.weight holds 1 infinite; the first: row 3, column 5"),
    (truncated, "checkpoint", "is truncated or corrupted"),
    (damaged_header, "checkpoint", "header does not parse"),
    (only_pickles, "files", "pickles, which can run code when they are read: pytorch_model.bin"),
    (lost_weight, "parameters", "parameters without stored weights"),
    (mask_beside, "parameters", "a mask beside a weight"),
    (unlike_ties, "parameters", "are one parameter in the class and differ in the file"),
    (other_shapes, "parameters", "weights disagree with config.json"),
    (
        untrue_claim,
        "patterns",
        "groups hold over 1 non-zeros; config.json: quantization_config.sparsity_config says",
    ),
    (untrue_share, "patterns", "says that 60.0% are zeros, and 50.0% of 14 weights are"),
    (claim_of_nothing, "patterns", "names no module of LlamaForCausalLM"),
    (claim_without_pattern, "patterns", "says neither a pattern"),
]


@pytest.mark.parametrize(
    ("plant", "check", "says"), FAULTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_fault_of_any_folder_is_named(
    plant: Callable[[Path], None], check: str, says: str, foreign: Path
) -> None:
    assert outcome(look(foreign), check).level in ("ok", "note")
    plant(foreign)
    found = look(foreign)
    assert not found.green and outcome(found, check).level == "fault"
    assert says in told(found, "fault"), told(found, "fault")
    assert all(finding.mend for finding in found.faults), "each says what to do"


def stale_hash(folder: Path) -> None:
    edit_json(folder / "generation_config.json", temperature=0.5)


def planted_file(folder: Path) -> None:
    (folder / "extra.json").write_text("{}")


def other_packed(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP.removesuffix('.weight')}.values"][0, 0] += 1

    rewrite(folder, change, f"{FOLDER}/{WEIGHTS}")


def wrong_mask(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP.removesuffix('.weight')}.mask"][1, 0] = 0xFF

    rewrite(folder, change, f"{FOLDER}/{WEIGHTS}")


def no_packed_file(folder: Path) -> None:
    (folder / FOLDER / WEIGHTS).unlink()


def damaged_plan(folder: Path) -> None:
    (folder / FOLDER / PLAN).write_text("{")


def damaged_manifest(folder: Path) -> None:
    (folder / "secateur.json").write_text("[]")


def claim_of_servers(folder: Path) -> None:
    edit_json(folder / "config.json", sparsity_config=LLM_COMPRESSOR)


OUR_FAULTS: list[tuple[Callable[[Path], None], str, str]] = [
    (
        third_of_four,
        "patterns",
        "1 of 1,536 groups hold over 2 non-zeros; secateur.json says that it is 2:4; "
        f"the first: row 3, columns 0-3 of {UP}",
    ),
    (negative_zero, "numbers", f"1 of 3,072 zeros of {UP} in {SINGLE} are -0.0"),
    (other_value, "packed weights", f"packed {UP} is not the stock weight"),
    (other_packed, "packed weights", "1 numbers differ, first in row 0"),
    (wrong_mask, "packed weights", "row 1, columns 0-3 do not keep exactly two"),
    (no_packed_file, "packed weights", "is damaged"),
    (damaged_plan, "packed weights", "cannot be read as JSON"),
    (stale_hash, "manifest", "generation_config.json"),
    (planted_file, "manifest", "extra.json is not in the manifest"),
    (damaged_manifest, "manifest", "is damaged"),
    (no_json, "configuration", "cannot be read as JSON"),
    (claim_of_servers, "configuration", "vLLM refuses models with one"),
]


@pytest.mark.parametrize(
    ("plant", "check", "says"), OUR_FAULTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_fault_of_an_artifact_is_named(
    plant: Callable[[Path], None], check: str, says: str, ours: Path
) -> None:
    plant(ours)
    found = look(ours)
    assert not found.green and outcome(found, check).level == "fault"
    assert says in told(found, "fault"), told(found, "fault")
    if (ours / "secateur.json").stat().st_size > 10:
        assert outcome(found, "manifest").level == "fault", (
            "and every change of a file is one of its hash"
        )


def test_what_is_only_odd_is_a_warning(foreign: Path) -> None:
    (foreign / "modeling_own.py").write_text("raise SystemExit")
    (foreign / "optimizer.pt").write_bytes(b"\x80\x04")
    edit_json(
        foreign / "config.json",
        auto_map={"AutoModel": "modeling_own.Own"},
        sparsity_config=LLM_COMPRESSOR,
    )
    rewrite(foreign, put(2.0))
    rewrite(foreign, put(-0.0, name="model.layers.1.mlp.up_proj.weight"))
    edit_json(
        foreign / "config.json",
        sparsity_config={**LLM_COMPRESSOR, "ignore": ["lm_head", "re:.*up_proj"]},
    )
    found = look(foreign)
    assert found.green, told(found, "fault")
    says = told(found, "warning")
    for words in ("modeling_own.py", "optimizer.pt", "auto_map", "vLLM refuses", "-0.0"):
        assert words in says
    assert (
        "almost 2:4: 1 of 1,536 groups hold over 2 non-zeros; the first: row 3, columns 0-3 "
        f"of {UP}" in says
    )


def test_claims_of_a_tied_head_are_about_the_weight_that_is_stored(foreign: Path) -> None:
    edit_json(foreign / "config.json", sparsity_config={**LLM_COMPRESSOR, "ignore": []})
    assert "embed_tokens.weight in model.safetensors" in told(look(foreign), "fault")


def test_a_changed_model_is_seen_when_it_is_reloaded(
    ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fresh process itself has its tests; here what it says is told."""
    seen = []

    def prove(folder: Path, expected: Any) -> tuple[list[str], dict[str, Any]]:
        seen.append(expected)
        return ["1 parameters differ from those saved: ['x']"], {}

    monkeypatch.setattr("secateur.runtime.verify.proof.prove_folder", prove)
    other_packed(ours)
    found = verify_folder(ours)
    assert "1 parameters differ" in told(
        found, "fault"
    ) and "on packed weights outputs differ" in told(found, "fault")
    stored = {
        n: secateur.runtime.verify.reload.hash_tensor(t)
        for n, t in load_file(ours / SINGLE).items()
    }
    assert dict(seen[0].parameters) == stored, "what is expected comes from the file"


def test_the_checkpoint_beside_branches_is_looked_at_too(foreign: Path, tmp_path: Path) -> None:
    whole = tmp_path / "branched"
    whole.mkdir()
    foreign.rename(whole / "base")
    (whole / "adapter_config.json").write_text("{}")
    save_file(
        {"base_model.model.x.lora_A.weight": torch.ones(2, 8)}, whole / "adapter_model.safetensors"
    )
    assert (
        look(whole).green
        and "base: patterns" in told(look(whole), "ok")
        and len(look(whole).tensors) == 21
    )
    not_a_number(whole / "base")
    assert "base: numbers: model.embed_tokens.weight holds 1 NaN" in told(look(whole), "fault")


def test_plain_modules_are_checked_and_declared_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    program = as_sparse(capture(module, torch.randn(3, 16)))
    assert list(program.sparse) == ["0.weight"]
    secateur.save_weights(program, tmp_path / "out")
    found = look(tmp_path / "out")
    assert found.green and "every group: 1 2:4" in told(found, "ok")
    wrong = with_parameters(program, {"0.weight": torch.ones(8, 16)})
    with pytest.raises(ArtifactError, match="not sparse as they should be"):
        secateur.save_weights(wrong, tmp_path / "wrong")


def test_a_share_of_zeros_is_counted_row_by_row(tmp_path: Path) -> None:
    weight = torch.randn(6, 40)
    weight = torch.where(Share(0.5).select_mask(weight.abs()), weight, 0.0)
    sparse = {"w": Sparse(Share(0.5)), "gone": Sparse(Pattern(2, 4)), "flat": Sparse(Pattern(2, 4))}
    save_file({"w": weight, "flat": torch.zeros(4)}, tmp_path / SINGLE)
    faults = find_stored_faults(tmp_path, sparse)
    assert (
        len(faults) == 2
        and "gone is 2:4; it is not stored" in faults[0]
        and "no matrix" in faults[1]
    )
    weight[4] = 1.0
    save_file({"w": weight}, tmp_path / SINGLE)
    assert (
        "row 4 of w in model.safetensors holds 40 non-zeros, 20 allowed"
        in find_stored_faults(tmp_path, {"w": Sparse(Share(0.5))})[0]
    )


def test_rare_patterns_are_counted_because_they_are_claimed(tmp_path: Path) -> None:
    weight, pattern = torch.randn(5, 48), Pattern(3, 16)
    weight = torch.where(pattern.select_mask(weight.abs()), weight, 0.0)
    save_file({"w": weight}, tmp_path / SINGLE)
    assert find_stored_faults(tmp_path, {"w": Sparse(pattern)}) == []
    weight[2, 16:32] = 1.0
    save_file({"w": weight}, tmp_path / SINGLE)
    assert (
        "1 of 15 groups hold over 3 non-zeros"
        in find_stored_faults(tmp_path, {"w": Sparse(pattern)})[0]
    )


def test_weights_that_others_keep_as_bits_and_values_are_counted(foreign: Path) -> None:
    def compress(tensors: dict[str, Tensor]) -> None:
        weight = tensors.pop(UP)
        packed = pack(weight)
        tensors |= {
            f"{UP}.compressed": packed.values,
            f"{UP}.bitmask": packed.mask,
            f"{UP}.shape": torch.tensor(weight.shape),
        }

    claim = {**LLM_COMPRESSOR, "format": "sparse-24-bitmask"}
    edit_json(foreign / "config.json", quantization_config={"sparsity_config": claim})
    rewrite(foreign, compress)
    found = look(foreign)
    assert found.green and "claimed and true in every group: 14 2:4" in told(found, "ok")
    one = next(one for one in found.tensors if one.name == f"{UP}.bitmask")
    assert one.shape == (96, 64) and one.share == 0.5 and one.pattern == "2:4"
    rewrite(foreign, lambda tensors: tensors[f"{UP}.bitmask"][5].fill_(0b01111100))
    assert "8 of 1,536 groups hold over 2 non-zeros" in told(look(foreign), "fault")
    assert f"the first: row 5, columns 4-7 of {UP}.bitmask" in told(look(foreign), "fault")


def test_a_folder_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is no folder"):
        verify_folder(tmp_path / "nothing")
    assert "has no weights" in told(look(tmp_path), "fault")


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_changed_byte_of_an_artifact_is_seen(
    exported: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path_factory.mktemp("changed") / "model"))
    names = sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
    )
    file = folder / data.draw(st.sampled_from([name for name in names if name != "secateur.json"]))
    content = bytearray(file.read_bytes())
    early = st.integers(0, min(len(content), 3000) - 1)
    at = data.draw(st.one_of(early, st.integers(0, len(content) - 1)))
    content[at] ^= data.draw(st.integers(1, 255))
    file.write_bytes(bytes(content[:at] if data.draw(st.booleans()) else content))
    found = look(folder)
    assert not found.green and outcome(found, "manifest").level == "fault"
    (folder / "secateur.json").unlink()
    assert isinstance(look(folder).green, bool), "without a manifest it is judged all the same"


# What export writes
@pytest.mark.parametrize("plant", [third_of_four, negative_zero], ids=lambda plant: plant.__name__)
def test_a_wrong_file_is_not_kept(
    plant: Callable[[Path], None], program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = huggingface._write_model

    def write_and_plant(model: Any, folder: Path) -> None:
        write(model, folder)
        plant(folder)

    monkeypatch.setattr(huggingface, "_write_model", write_and_plant)
    with pytest.raises(ArtifactError, match="not sparse as they should be"):
        secateur.save(program, tmp_path / "out", check=False)
    assert list(tmp_path.iterdir()) == []
