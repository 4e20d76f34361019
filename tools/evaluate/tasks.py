"""Zero-shot and few-shot tasks through lm-eval, from local task files alone.

A task file is an lm-eval task (YAML) over a local .jsonl, .csv, .txt or .parquet file, named
relative to the task file. Nothing is downloaded and no code of a task file is run: whatever would
do either is refused by name.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.graph.errors import SecateurError
from secateur.graph.reading import reason_of
from secateur.passes.language.recipe import read_yaml
from secateur.tools.evaluate.measures import EvaluationError
from secateur.tools.evaluate.texts import Bootstrap, Interval

JSON = dict[str, Any]
LOCAL = ("json", "csv", "text", "parquet")
FIELDS = frozenset(
    "task task_alias tag description dataset_path dataset_name dataset_kwargs training_split "
    "validation_split"
    " test_split fewshot_split num_fewshot fewshot_delimiter target_delimiter output_type "
    "doc_to_text doc_to_target"
    " doc_to_choice generation_kwargs repeats filter_list metric_list metadata".split()
)
METRICS = frozenset(
    "acc acc_norm acc_bytes acc_mutual_info exact_match perplexity likelihood word_perplexity "
    "byte_perplexity"
    " bits_per_byte mcc f1 brier_score".split()
)


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task: value with a 95 % interval, and its difference to the reference model
    where there is one.

    Intervals resample the items; the difference is that of the same items.  items: how many.
    shots: examples shown.
    """

    task: str
    metric: str
    result: Interval
    items: int
    shots: int
    higher_is_better: bool
    difference: Interval | None = None

    @property
    def protocol(self) -> str:
        """A line to print beside the number."""
        return f"{self.task}: {self.items} items, {self.shots} shots, {self.metric}"


def read_tasks(paths: Sequence[Path]) -> list[JSON]:
    """The tasks of task files, or of all .yaml files of folders, data files made absolute.

    Raises:
        EvaluationError: no file, not YAML, code (``!function``), an unknown field, a source that is
            no local file.
    """
    files = list[Path]()
    for path in paths:
        if path.is_dir():
            files += sorted(path.glob("*.yaml"))
        else:
            files.append(path)
    if not files:
        raise EvaluationError(f"no task file (.yaml) in {', '.join(map(str, paths))}")
    tasks = [_read_task(file) for file in files]
    names = [task["task"] for task in tasks]
    if len(set(names)) < len(names):
        raise EvaluationError(f"two task files have one name: {', '.join(sorted(names))}")
    return tasks


def _read_task(file: Path) -> JSON:
    try:
        task = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"the task file {file} cannot be read: {error}") from error
    except (SecateurError, ValueError, TypeError, LookupError) as error:
        why = reason_of(error)
        raise EvaluationError(
            f"{file} is no plain YAML (code such as !function is never run): {why}"
        ) from error
    if not isinstance(task, dict) or not isinstance(task.get("task"), str):
        raise EvaluationError(f"{file}: expected a map with 'task: NAME'")
    _check_task(task, file)
    options = dict(task["dataset_kwargs"])
    data_files: JSON = {}
    for split, names in options["data_files"].items():
        data_files[split] = _data_files(names, file)
    options["data_files"] = data_files
    return {**task, "dataset_kwargs": options}


def _check_task(task: JSON, file: Path) -> None:
    unknown = sorted(set(task) - FIELDS)
    if unknown:
        raise EvaluationError(
            f"{file}: {unknown[0]!r} is not supported; supported: {', '.join(sorted(FIELDS))}"
        )
    options = task.get("dataset_kwargs")
    if (
        task.get("dataset_path") not in LOCAL
        or not isinstance(options, dict)
        or set(options) != {"data_files"}
    ):
        raise EvaluationError(
            f"{file}: needs dataset_path: {' or '.join(LOCAL)}, and dataset_kwargs: {{data_files: "
            f"{{test: FILE}}}}: "
            "tasks read local files only"
        )
    if not isinstance(options["data_files"], dict):
        raise EvaluationError(
            f"{file}: data_files must be a map from split to file, for example {{test: data.jsonl}}"
        )
    for entry in task.get("metric_list") or ():
        if isinstance(entry, dict):
            name = entry.get("metric")
        else:
            name = entry
        if name not in METRICS or not isinstance(entry, dict) or "hf_evaluate" in entry:
            raise EvaluationError(
                f"{file}: the metric {name!r} is not supported; supported: "
                f"{', '.join(sorted(METRICS))}"
            )


def _data_files(entry: object, file: Path) -> list[str]:
    names = [entry]
    if isinstance(entry, list):
        names = entry
    paths = [file.parent / str(name) for name in names]
    for path in paths:
        if not path.is_file():
            raise EvaluationError(f"{file}: its data file {path} does not exist")
    return [str(path.absolute()) for path in paths]


def run_tasks(
    models: Mapping[str, Any],
    tokenizer: Any,
    tasks: Sequence[JSON],
    *,
    reference: str | None = None,
    limit: int | None = None,
    batch: int = 8,
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, list[TaskScore]]:
    """Every task on every model, by name.

    Args:
        models: causal language models of transformers, by name.
        tokenizer: of all of them.
        tasks: as ``read_tasks`` gives them.
        reference: name of the model that the others are compared with, or None.
        limit: only so many items of each task.
        batch: items that run at once.
        seed: of the draws of examples, and of the resampling behind the intervals.
        note: gets a line for each model.

    Raises:
        EvaluationError: lm-eval is not installed, or refuses a task.
    """
    lm_eval, wrap = _import_harness()
    raw: dict[str, JSON] = {}
    with tempfile.TemporaryDirectory(prefix="secateur-tasks-") as cache, _silence_harness(lm_eval):
        local = list[JSON]()
        for task in tasks:
            options = {**task["dataset_kwargs"], "cache_dir": cache}
            local.append({**task, "dataset_kwargs": options})
        for name, model in models.items():
            note(f"tasks on {name}")
            try:
                raw[name] = _run_tasks(lm_eval, wrap, model, tokenizer, local, limit, batch, seed)
            except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
                names = ", ".join(task["task"] for task in tasks)
                raise EvaluationError(
                    f"lm-eval cannot run {names}: {type(error).__name__}: {error}"
                ) from error
    base = raw.get(reference or "")
    scores: dict[str, list[TaskScore]] = {}
    for name, results in raw.items():
        scores[name] = list(_iterate_scores(results, base, name == reference, seed))
    return scores


def _import_harness() -> tuple[Any, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval.evaluator
        import lm_eval.tasks
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise EvaluationError(
            f"tasks need lm-eval: pip install 'secateur[evaluate]' ({error})"
        ) from error
    return lm_eval, HFLM


@contextmanager
def _silence_harness(lm_eval: Any) -> Iterator[None]:
    """Without lm-eval's chatter, which also goes to stdout, and without its question to git, which
    complains outside of a repository."""
    logger = logging.getLogger("lm_eval")
    evaluator = lm_eval.evaluator
    level = logger.level
    asks_git = getattr(evaluator, "get_git_commit_hash", None)
    logger.setLevel(logging.ERROR)
    evaluator.get_git_commit_hash = lambda: None
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        evaluator.get_git_commit_hash = asks_git


def _run_tasks(
    lm_eval: Any,
    wrap: Any,
    model: Any,
    tokenizer: Any,
    tasks: list[JSON],
    limit: int | None,
    batch: int,
    seed: int,
) -> JSON:
    wrapped = wrap(
        pretrained=model, tokenizer=tokenizer, batch_size=batch, device=str(model.device)
    )
    results: JSON = lm_eval.simple_evaluate(
        model=wrapped,
        tasks=tasks,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        limit=limit,
        bootstrap_iters=1000,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return results


def _iterate_scores(run: JSON, base: JSON | None, is_base: bool, seed: int) -> Iterator[TaskScore]:
    for task, results in run["results"].items():
        for key, value in results.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            items = len(run["samples"][task])
            shots = int(run["n-shot"].get(task) or 0)
            values = _by_item(run, task, metric, value)
            others = None
            if base is not None and not is_base:
                others = _by_item(base, task, metric, base["results"][task][key])
            bootstrap = Bootstrap(torch.arange(items), seed)
            if values is None:
                # the metric is no mean of items: a normal interval from lm-eval's standard error
                spread = results.get(f"{metric}_stderr,{kind}")
                half = float("nan")
                if isinstance(spread, float):
                    half = 1.96 * spread
                result = Interval(float(value), value - half, value + half)
            else:
                result = bootstrap.interval(values)
            difference = None
            if not (values is None or others is None):
                difference = bootstrap.interval(values - others)
            better = bool(run["higher_is_better"].get(task, {}).get(metric, True))
            yield TaskScore(task, metric, result, items, shots, better, difference)


def _by_item(run: JSON, task: str, metric: str, value: float) -> torch.Tensor | None:
    """The metric of each item, where its mean is the metric of the task."""
    items = sorted(run["samples"][task], key=lambda item: int(item["doc_id"]))
    numbers = [item.get(metric) for item in items]
    if not all(isinstance(number, int | float) for number in numbers):
        return None
    values = torch.tensor(numbers, dtype=torch.float64)
    if abs(float(values.mean()) - value) < 1e-9:
        return values
    return None
