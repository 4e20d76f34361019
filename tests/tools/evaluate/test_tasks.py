"""Local tasks: read without code or network, scored item by item, compared on the same items."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo.tasks import CHOICE, letters, write_tasks

from secateur.tools.evaluate.measures import EvaluationError
from secateur.tools.evaluate.tasks import read_tasks, run_tasks

LAST = """
task: last
dataset_path: json
dataset_kwargs: {data_files: {test: last.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{word}}"
target_delimiter: ""
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(1)
    write_tasks(folder)
    last = [{"text": letters(draw, 8), "word": letters(draw, 1)} for _ in range(9)]
    (folder / "last.jsonl").write_text("\n".join(map(json.dumps, last)))
    (folder / "last.yaml").write_text(LAST)
    return folder


def test_tasks_run_on_a_model_and_its_reference(
    tasks: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_folder),
        AutoTokenizer.from_pretrained(model_folder),
    )
    other = AutoModelForCausalLM.from_pretrained(model_folder)
    for parameter in other.parameters():
        parameter.data = (
            parameter.data.flip(0).contiguous() if parameter.dim() > 1 else parameter.data
        )
    found = run_tasks(
        {"a": model, "b": other}, tokenizer, read_tasks([tasks]), reference="a", limit=8, batch=4
    )
    assert capsys.readouterr().out == ""  # stdout is for the result alone
    by_name = {(s.task, s.metric): s for s in found["b"]}
    assert set(by_name) == {("choice", "acc"), ("last", "perplexity"), ("last", "acc")}
    score = by_name["choice", "acc"]
    assert (
        score.items == 8
        and score.shots == 0
        and score.higher_is_better
        and score.protocol.startswith("choice: 8")
    )
    assert 0 <= score.result.low <= score.result.value <= score.result.high <= 1
    base = {(s.task, s.metric): s for s in found["a"]}
    assert base["choice", "acc"].difference is None and score.difference is not None
    assert score.difference.value == pytest.approx(
        score.result.value - base["choice", "acc"].result.value
    )
    perplexity = by_name["last", "perplexity"]
    assert not perplexity.higher_is_better and perplexity.difference is None
    assert perplexity.result.low < perplexity.result.value < perplexity.result.high
    assert by_name["choice", "acc"].result.value == pytest.approx(
        _accuracy_by_hand(other, tokenizer, tasks)
    )


def _accuracy_by_hand(model: object, tokenizer: object, tasks: Path) -> float:
    rows = [json.loads(line) for line in (tasks / "choice.jsonl").read_text().splitlines()][:8]
    right = 0
    for row in rows:
        scores = []
        for ending in row["endings"]:
            ids = tokenizer(row["ctx"] + ending, return_tensors="pt", add_special_tokens=False)[
                "input_ids"
            ]  # type: ignore[operator]
            with torch.no_grad():
                logs = model(input_ids=ids).logits[0].log_softmax(-1)  # type: ignore[operator]
            scores.append(
                sum(float(logs[t - 1, ids[0, t]]) for t in range(len(ids[0]) - 3, len(ids[0])))
            )
        right += scores.index(max(scores)) == row["label"]
    return right / len(rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "no plain YAML"),
        ("task: x\ndoc_to_text: !function code.py", "never run"),
        ("just words", "expected a map"),
        (CHOICE + "process_docs: x\n", "'process_docs' is not supported"),
        (CHOICE.replace("path: json", "path: squad"), "local files only"),
        (
            CHOICE.replace("dataset_kwargs:", "dataset_kwargs: {trust_remote_code: true} #"),
            "local files only",
        ),
        (CHOICE.replace("choice.jsonl", "missing.jsonl"), "does not exist"),
        (CHOICE.replace("{test: choice.jsonl}", "choice.jsonl"), "must be a map"),
        (CHOICE.replace("metric: acc", "metric: rouge"), "'rouge' is not supported"),
    ],
)
def test_what_would_run_code_or_fetch_is_refused(
    tasks: Path, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "choice.jsonl").write_text((tasks / "choice.jsonl").read_text())
    file = tmp_path / "task.yaml"
    file.write_text(text)
    with pytest.raises(EvaluationError, match=message):
        read_tasks([file])


def test_no_task_two_of_a_name_and_no_file(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no task file"):
        read_tasks([tmp_path])
    with pytest.raises(EvaluationError, match="two task files"):
        read_tasks([tasks, tasks / "last.yaml"])
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_tasks([tmp_path / "none.yaml"])


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tasks: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r"secateur\[evaluate\]"):
        run_tasks({}, None, read_tasks([tasks]))
