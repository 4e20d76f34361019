"""Nobody loses a file: output never goes over what was there, nor over what it is made from."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from secateur.graph.errors import ArtifactError
from secateur.passes import Pipeline
from secateur.runtime.save import artifact
from secateur.runtime.save.artifact import MANIFEST, check_target, verify_artifact, write_artifact
from secateur.runtime.save.drafts import DRAFT, MARK, remove_leftovers
from secateur.runtime.save.target import check_files, inputs_of, new_file


def write(path: Path, text: str = "hello", **options: object) -> None:
    with write_artifact(path, **options) as draft:  # type: ignore[arg-type]
        (draft.folder / "a.txt").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def add_note(folder: Path) -> None:
    (folder / "notes.md").write_text("mine")


def add_note_below(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text("mine")


def change_listed(folder: Path) -> None:
    (folder / "a.txt").write_text("other")


def add_link(folder: Path) -> None:
    (folder.parent / "far").mkdir()
    (folder.parent / "far" / "b.txt").write_text("mine")
    (folder / "link").symlink_to(folder.parent / "far")


@pytest.mark.parametrize("change", [add_note, add_note_below, change_listed, add_link])
def test_what_the_result_did_not_bring_is_never_removed(tmp_path: Path, change: object) -> None:
    write(tmp_path / "out")
    change(tmp_path / "out")  # type: ignore[operator]
    before = contents(tmp_path)
    for overwrite, words in (
        (False, "earlier result"),
        (True, "did not bring, or that have changed"),
    ):
        with pytest.raises(ArtifactError, match=words):
            write(tmp_path / "out", "new", overwrite=overwrite)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "mine",
        '{"format": "secateur-artifact", "version": 1, "files": {}, "history": [], "figures": {}}',
    ],
)
def test_a_file_of_the_manifest_s_name_does_not_make_a_folder_ours(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_text(text)
    add_note(tmp_path / "out")
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="not a finished result"):
            write(tmp_path / "out", overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_manifest_that_lists_other_people_s_files_does_not_make_them_ours(tmp_path: Path) -> None:
    write(tmp_path / "out")
    file = tmp_path / "out" / MANIFEST
    add_note(tmp_path / "out")
    manifest = json.loads(file.read_text())
    manifest["files"]["notes.md"] = {"bytes": 4, "sha256": "0" * 64}
    file.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"notes\.md"):
        write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"


def test_links_are_followed_and_stay(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    write(tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and verify_artifact(tmp_path / "disk").files
    write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "a.txt").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["disk", "out"]


@pytest.mark.parametrize("leads_to", ["nowhere", "out"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path, leads_to: str) -> None:
    (tmp_path / "out").symlink_to(tmp_path / leads_to)
    with pytest.raises(ArtifactError, match=r"leads nowhere|cannot be reached"):
        write(tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("place", ["source", "source/inner", ".", "link", "link/inner"])
def test_the_source_is_never_the_target(tmp_path: Path, place: str) -> None:
    write(tmp_path / "a" / "source")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "source")
    for source in ("source", "link"):
        with pytest.raises(ArtifactError, match="which is read"):
            check_target(tmp_path / "a" / place, overwrite=True, inputs=[tmp_path / "a" / source])
    assert verify_artifact(tmp_path / "a" / "source").files


def test_a_source_of_links_and_a_text_are_never_the_target(tmp_path: Path) -> None:
    """As the hub's cache keeps models: a folder of links into another one."""
    write(tmp_path / "blobs")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.txt").symlink_to(tmp_path / "blobs" / "a.txt")
    for source in (tmp_path / "source", tmp_path / "blobs" / "a.txt"):
        with pytest.raises(ArtifactError, match="which is read"):
            check_target(tmp_path / "blobs", overwrite=True, inputs=[None, "owner/name", source])
    assert (
        check_target(tmp_path / "new", inputs=[tmp_path / "source"]) == (tmp_path / "new").resolve()
    )


def test_paths_that_passes_read(tmp_path: Path) -> None:
    pipeline = Pipeline.parse("distill{teacher=big,data=text.jsonl}")
    assert set(inputs_of(pipeline)) == {"big", "text.jsonl"}


def test_what_is_put_into_a_result_while_it_is_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = artifact.exchange_folders

    def exchange(new: Path, old: Path) -> None:
        add_note(old)
        real(new, old)

    write(tmp_path / "out", "old")
    monkeypatch.setattr(artifact, "exchange_folders", exchange)
    with caplog.at_level(logging.WARNING):
        write(tmp_path / "out", "new", overwrite=True)
    assert contents(tmp_path / "out.left-1")["notes.md"] == "mine" and "out.left-1" in caplog.text
    assert verify_artifact(tmp_path / "out").files and sorted(os.listdir(tmp_path)) == [
        "out",
        "out.left-1",
    ]


def test_what_somebody_made_meanwhile_stays(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="not a finished result"),
        write_artifact(tmp_path / "out") as draft,
    ):
        (draft.folder / "a.txt").write_text("x")
        (tmp_path / "out").mkdir()
        add_note(tmp_path / "out")
    with (
        pytest.raises(ArtifactError, match="earlier result"),
        write_artifact(tmp_path / "second") as draft,
    ):
        write(tmp_path / "second", "first there")
    assert contents(tmp_path / "out") == {"notes.md": "mine"}
    assert (tmp_path / "second" / "a.txt").read_text() == "first there"


def test_only_our_own_drafts_are_leftovers(tmp_path: Path) -> None:
    for name in (f".out{DRAFT}mine", f".out{DRAFT}abcd1234"):
        (tmp_path / name).mkdir()
        add_note(tmp_path / name)
    ours, result = tmp_path / f".out{DRAFT}wxyz1234", tmp_path / f".out{DRAFT}old_1234"
    ours.mkdir()
    add_note(ours)
    (ours / MARK).touch()
    write(tmp_path / "out")
    write(tmp_path / "spare")
    (tmp_path / "spare").rename(result)
    assert set(remove_leftovers(tmp_path / "out")) == {result}
    assert sorted(os.listdir(tmp_path)) == [f".out{DRAFT}abcd1234", f".out{DRAFT}mine", "out"]


def test_files_are_whole_or_absent_and_never_replaced_unasked(tmp_path: Path) -> None:
    file = tmp_path / "new" / "speed.md"
    with pytest.raises(ZeroDivisionError), new_file(file) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert os.listdir(tmp_path / "new") == []
    with new_file(file) as part:
        part.write_text("old")
    with pytest.raises(ArtifactError, match="--overwrite"):
        check_files([file])
    with pytest.raises(ArtifactError, match="--overwrite"), new_file(file) as part:
        part.write_text("new")
    assert file.read_text() == "old" and os.listdir(file.parent) == ["speed.md"]
    check_files([file], overwrite=True)
    with new_file(file, overwrite=True) as part:
        part.write_text("new")
    assert file.read_text() == "new" and file.stat().st_mode & 0o444 == 0o444


def test_files_are_not_written_into_what_is_read(tmp_path: Path) -> None:
    write(tmp_path / "source")
    for file in ("source/a.txt", "source/new.png", "source"):
        with pytest.raises(ArtifactError, match=r"which is read|is a folder"):
            check_files([tmp_path / file], overwrite=True, inputs=[tmp_path / "source"])
