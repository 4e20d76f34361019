"""Machine code runs only where its user compiled it, or says that it is trusted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.kernels.sparse24 import cpu
from secateur.runtime.save.artifact import write_artifact
from secateur.runtime.serving import package, trust
from secateur.runtime.serving.engine import GenerateError, StockEngine, device_named
from secateur.runtime.serving.package import (
    PackageError,
    PackageFacts,
    is_package,
    load_package,
    made_here,
)
from secateur.runtime.verify import verify_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trust._key.cache_clear()
    return tmp_path / "cache" / "secateur"


def make(folder: Path, *, signed: bool) -> Path:
    facts = PackageFacts(
        cache=(((1, 4), (1, 4)),),
        length=8,
        batch=1,
        dtype="float32",
        device="cpu",
        vocabulary=8,
        end=(),
        compiled_for=package.describe_target("cpu"),
        ops=False,
    )
    with write_artifact(folder) as draft:
        (draft.folder / "package.json").write_text(facts.to_json())
        for name in package.STEPS:
            (draft.folder / f"{name}.pt2").write_bytes(b"code of " + name.encode())
        if signed:
            draft.figures = {package.SIGNATURE: trust.sign(package._signed_files(draft.folder))}
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders whose machine code was run."""
    ran = list[Path]()
    monkeypatch.setattr(package, "PackagedModel", lambda folder, facts: ran.append(folder))
    return ran


def test_code_from_elsewhere_needs_a_word(tmp_path: Path, opened: list[Path]) -> None:
    foreign = make(tmp_path / "foreign", signed=False)
    with pytest.raises(
        PackageError, match=r"machine code that was not compiled by you.*--trust-code"
    ):
        load_package(foreign)
    assert opened == []
    load_package(foreign, trust_code=True)
    assert opened == [foreign]
    own = make(tmp_path / "own", signed=True)
    load_package(own)
    assert opened == [foreign, own]


def test_a_signature_holds_for_its_files_and_key_alone(
    tmp_path: Path, cache: Path, opened: list[Path]
) -> None:
    own = make(tmp_path / "own", signed=True)
    manifest = json.loads((own / "secateur.json").read_text())
    (own / "decode.pt2").write_bytes(b"other code of len")
    assert not made_here(own)
    foreign = make(tmp_path / "foreign", signed=False)
    for figures in (
        {"signature": manifest["figures"]["signature"]},
        {"signature": 3},
        {"signature": "é"},
        {},
    ):
        file = foreign / "secateur.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"figures": figures}))
        assert not made_here(foreign) or figures.get("signature") == trust.sign(
            package._signed_files(foreign)
        )
    again = make(tmp_path / "again", signed=True)
    assert made_here(again)
    (cache / "trust.key").unlink()
    trust._key.cache_clear()
    assert not made_here(again)


def test_the_key_is_private(cache: Path, tmp_path: Path) -> None:
    make(tmp_path / "own", signed=True)
    file = cache / "trust.key"
    assert file.stat().st_mode & 0o777 == 0o600 and len(file.read_bytes()) == trust.KEY_BYTES
    assert made_here(tmp_path / "own")
    file.chmod(0o644)
    trust._key.cache_clear()
    assert not made_here(tmp_path / "own")  # a key that others know proves nothing
    file.chmod(0o600)
    file.write_bytes(b"short")
    trust._key.cache_clear()
    assert not made_here(tmp_path / "own")


def test_verify_names_machine_code(tmp_path: Path) -> None:
    def files(folder: Path) -> list[tuple[str, str]]:
        found = next(
            one for one in verify_folder(folder, quick=True).outcomes if one.check == "files"
        )
        return [(finding.level, finding.says) for finding in found.findings]

    foreign, own = make(tmp_path / "foreign", signed=False), make(tmp_path / "own", signed=True)
    assert (
        "fault",
        "machine code: decode.pt2, prefill.pt2; not compiled by you on this machine, and not run",
    ) in (files(foreign))
    assert files(own)[0][0] == "ok" and "compiled by you" in files(own)[0][1]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "notes.txt").write_bytes(b"\x7fELF and more")
    assert files(tmp_path / "plain")[0] == ("warning", "machine code: notes.txt")


def test_a_package_json_of_other_tools_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": "somebody", "version": "1.0.0"}')
    assert not is_package(tmp_path)


@pytest.mark.parametrize(
    "change", [{"dtype": "load"}, {"length": 0}, {"cache": 3}, {"device": "meta"}, {"more": 1}]
)
def test_facts_of_a_wrong_type(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = make(tmp_path / "own", signed=True)
    value = json.loads((folder / "package.json").read_text())
    value = {k: v for k, v in value.items() if "more" not in change or k != "length"} | change
    (folder / "package.json").write_text(json.dumps(value))
    with pytest.raises(package.ArtifactError, match=r"package\.json is damaged"):
        package.read_facts(folder)


def test_the_kernel_cache_must_be_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "kernels" / "one" / "kernels.so"
    library.parent.mkdir(parents=True, mode=0o700)
    library.parent.parent.chmod(0o700)
    library.touch(mode=0o700)
    assert cpu.not_private(library) == ""
    for path in (library, library.parent, library.parent.parent):
        mode = path.stat().st_mode
        path.chmod(mode | 0o020)
        assert str(path) in cpu.not_private(library)
        path.chmod(mode)
    tmp_path.chmod(0o777)
    assert "can be written by others" in cpu.not_private(library)
    tmp_path.chmod(0o1777)
    assert cpu.not_private(library) == ""
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    if library.stat().st_uid:
        assert "belongs to another user" in cpu.not_private(library)


def test_a_device_that_is_not_there_is_told() -> None:
    assert device_named("cpu") == "cpu"
    for name in ("cuda:99", "nonsense", "cpu:-3"):
        with pytest.raises(GenerateError, match="--device"):
            device_named(name)


def test_tokens_beyond_the_embedding_are_told() -> None:
    from runtime_models import SMALL, tiny

    engine = StockEngine(tiny("LlamaConfig", **SMALL))
    with pytest.raises(GenerateError, match="token 96, and the model has rows for 96"):
        engine.generate(torch.tensor([[1, 96]]), max_new_tokens=1)
