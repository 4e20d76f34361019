"""Task files small enough to score by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path

LETTERS = "abcdefghij"
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_choice: "{{endings}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def letters(draw: random.Random, count: int) -> str:
    """Some letters."""
    return "".join(draw.choices(LETTERS, k=count))


def write_tasks(folder: Path) -> None:
    """A multiple-choice task of twelve items."""
    draw = random.Random(0)
    rows = [
        {"ctx": letters(draw, 8), "endings": [letters(draw, 3) for _ in range(3)], "label": i % 3}
        for i in range(12)
    ]
    (folder / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "choice.yaml").write_text(CHOICE)
