"""All that is data travels with a result; code, pickles and links out of the folder do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.runtime.save.side_files import SOURCE_CARD, copy_side_files


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    source = tmp_path / "source"
    result = tmp_path / "result"
    source.mkdir()
    result.mkdir()
    return source, result


def write(folder: Path, files: dict[str, object]) -> None:
    for name, value in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(value if isinstance(value, str) else json.dumps(value))


def names_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_data_travels_and_code_does_not(folders: tuple[Path, Path]) -> None:
    source, result = folders
    data = {
        "tokenizer.json": {"a": 1},
        "video_preprocessor_config.json": {},
        "LICENSE": "text",
        "NOTICE.txt": "text",
        "vocab.bpe": "a b",
        "additional_chat_templates/tools.jinja": "{{ x }}",
    }
    write(source, {**data, "README.md": "# Card"})
    write(source, {"config.json": {}, "generation_config.json": {}, "model.safetensors": "x"})
    write(source, {"modeling_x.py": "x", "pytorch_model.bin": "x", ".gitattributes": "x"})
    report = copy_side_files(source, result)
    assert names_below(result) == {*data, SOURCE_CARD}
    assert set(report.left_behind) == {"modeling_x.py", "pytorch_model.bin"}
    assert "code" in report.left_behind["modeling_x.py"]


def test_a_file_that_names_code_loses_that_entry(folders: tuple[Path, Path]) -> None:
    source, result = folders
    write(source, {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": "x.Y"}, "b": 2}})
    report = copy_side_files(source, result)
    assert json.loads((result / "tokenizer_config.json").read_text()) == {"b": 2}
    assert "auto_map" in report.changed[0]


def test_a_link_out_of_the_folder_is_not_followed(folders: tuple[Path, Path]) -> None:
    source, result = folders
    secret = source.parent / "secret.txt"
    secret.write_text("mine")
    (source / "LICENSE").symlink_to(secret)
    write(source, {"kept.json": {}})
    (source / "inside.json").symlink_to(source / "kept.json")
    report = copy_side_files(source, result)
    assert names_below(result) == {"kept.json", "inside.json"}
    assert not (result / "inside.json").is_symlink()
    assert "leads out" in report.left_behind["LICENSE"]


def test_the_blobs_of_a_cache_are_followed(tmp_path: Path) -> None:
    source = tmp_path / "models--me--tiny" / "snapshots" / "abc"
    blob = tmp_path / "models--me--tiny" / "blobs" / "123"
    source.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_text("{}")
    (source / "tokenizer.json").symlink_to(Path("../../blobs/123"))
    result = tmp_path / "result"
    result.mkdir()
    assert copy_side_files(source, result).copied == ["tokenizer.json"]


def test_nothing_of_the_result_is_written_over(folders: tuple[Path, Path]) -> None:
    source, result = folders
    write(source, {"package.json": {"theirs": 1}})
    write(result, {"package.json": {"ours": 1}})
    report = copy_side_files(source, result)
    assert json.loads((result / "package.json").read_text()) == {"ours": 1}
    assert "package.json" in report.left_behind


MODULES = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]
POOLING = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}


def test_modules_follow_the_hidden_size(folders: tuple[Path, Path]) -> None:
    source, result = folders
    write(source, {"modules.json": MODULES, "1_Pooling/config.json": POOLING})
    report = copy_side_files(source, result, {32: 24})
    pooling = json.loads((result / "1_Pooling" / "config.json").read_text())
    assert pooling == {**POOLING, "word_embedding_dimension": 24}
    assert report.changed == ["1_Pooling/config.json: word_embedding_dimension 32 -> 24"]


@pytest.mark.parametrize("widths", [{}, {32: 24}])
def test_a_module_with_weights_goes_along_at_the_same_width_only(
    folders: tuple[Path, Path], widths: dict[int, int]
) -> None:
    source, result = folders
    modules = [*MODULES, {"idx": 2, "path": "2_Dense"}]
    write(source, {"modules.json": modules, "1_Pooling/config.json": POOLING})
    write(source, {"2_Dense/config.json": {"in_features": 32}, "2_Dense/model.safetensors": "x"})
    report = copy_side_files(source, result, widths)
    expected = set() if widths else names_below(source)
    assert names_below(result) == expected
    assert ("2_Dense" in report.left_behind) == bool(widths)


def test_a_path_of_a_module_never_leaves_the_folder(folders: tuple[Path, Path]) -> None:
    source, result = folders
    write(source.parent, {"other/config.json": {"secret": 1}})
    write(source, {"modules.json": [{"path": "../other"}, {"path": 3}, "x"]})
    copy_side_files(source, result)
    assert names_below(source.parent / "result") == {"modules.json"}
