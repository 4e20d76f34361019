"""The commands generate and package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo.sparse import made_24

import secateur
from secateur.passes.lowering.lower import Lower
from secateur.tools.cli import run_command
from secateur.tools.commands.generate import Writer

Output = pytest.CaptureFixture[str]
OPTIONS = ["--prompt", "abcabc", "--max-new-tokens", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def lowered(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lowered") / "out"
    secateur.save(
        Lower(smallest=True)(made_24(secateur.capture(model_folder))), folder, check=False
    )
    return folder


def test_text_comes_on_stdout_and_the_rest_on_stderr(model_folder: Path, capsys: Output) -> None:
    assert run_command(["generate", str(model_folder), *OPTIONS]) == 0
    streamed = capsys.readouterr()
    assert run_command(["generate", str(model_folder), *OPTIONS, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert streamed.out == told["text"] + "\n" and "tokens/s" in streamed.err
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = torch.tensor([tokenizer("abcabc")["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    wanted = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert told["ids"] == wanted[0, ids.shape[1] :].tolist() and told["new_tokens"] == len(
        told["ids"]
    )
    assert {row["kind"] for row in told["layers"]} == {"dense"}


def test_packed_weights_are_used_and_told(lowered: Path, capsys: Output) -> None:
    found = {}
    for flags in ((), ("--dense",)):
        assert run_command(["generate", str(lowered), *OPTIONS, "--json", *flags]) == 0
        found[flags] = json.loads(capsys.readouterr().out)
    packed, dense = found[()], found[("--dense",)]
    assert packed["ids"] == dense["ids"]
    assert [sum(row["kind"] == "2:4" for row in run_["layers"]) for run_ in (packed, dense)] == [
        14,
        0,
    ]
    assert packed["weight_bytes"] < dense["weight_bytes"]
    assert run_command(["generate", str(lowered), *OPTIONS, "--layers"]) == 0
    shown = capsys.readouterr().out
    assert "what runs where" in shown and "2:4" in shown


def test_draws_are_repeatable(model_folder: Path, capsys: Output) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert (
            run_command(
                [
                    "generate",
                    str(model_folder),
                    *OPTIONS,
                    "--temperature",
                    "1.5",
                    "--seed",
                    seed,
                    "--json",
                ]
            )
            == 0
        )
        texts.append(json.loads(capsys.readouterr().out)["ids"])
    assert texts[0] == texts[1] != texts[2]


def test_dry_runs_generate_and_write_nothing(lowered: Path, tmp_path: Path, capsys: Output) -> None:
    assert run_command(["generate", str(lowered), *OPTIONS, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["max_new_tokens"] == 6 and "text" not in told and len(told["layers"]) == 15
    assert (
        run_command(
            [
                "package",
                str(lowered),
                "-o",
                str(tmp_path / "pkg"),
                "--length",
                "32",
                "--dry-run",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["length"] == 32
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["generate", "{model}", "--prompt", ""], "the prompt is empty"),
        (["generate", "{model}", "--prompt", "a", "--chat"], "no chat template"),
        (["generate", "{model}", "--prompt", "a", "--dtype", "int3"], "one of float32"),
        (["generate", "{empty}", "--prompt", "a"], "no tokenizer that opens"),
        (["package", "{model}", "-o", "{model}"], "nothing is written there"),
    ],
)
def test_what_cannot_be_done_is_told_before_any_work(
    arguments: list[str], complaint: str, model_folder: Path, tmp_path: Path, capsys: Output
) -> None:
    places = {"model": model_folder, "empty": tmp_path}
    assert run_command([one.format(**places) for one in arguments]) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())


class Letters:
    """A tokenizer whose second token completes a letter begun by the first."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_letters_are_written_when_they_are_whole(capsys: Output) -> None:
    writer = Writer(Letters(), quiet=False)  # type: ignore[arg-type]
    shown = []
    for byte in "aé!".encode():
        writer.token(torch.tensor([byte]))
        shown.append(capsys.readouterr().out)
    assert shown == ["a", "", "é", "!"]
    writer.end()
    assert capsys.readouterr().out == "\n"
