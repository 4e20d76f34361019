"""Saving a Program as a stock checkpoint that is proved before it appears, and loading it again."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel

from secateur.graph.errors import ArtifactError
from secateur.graph.program import JSON, Program
from secateur.graph.sparse import SparseWeights
from secateur.passes.sparsity.boost import branch_parameters
from secateur.runtime.open.checkpoint import INDEX, SINGLE, read_checkpoint
from secateur.runtime.open.classes import silence_transformers
from secateur.runtime.open.declared import FIGURE, from_json, make_declaration, to_json
from secateur.runtime.open.ignored import describe_ignored, withdraw_announcement
from secateur.runtime.open.source import open_model
from secateur.runtime.packed.store import load_lowered, runs_packed, write_packed
from secateur.runtime.save.artifact import (
    Draft,
    check_target,
    read_manifest,
    verify_artifact,
    write_artifact,
)
from secateur.runtime.save.branches import is_branched, load_branched, save_branched
from secateur.runtime.save.carried import IgnoredTensors, plan_ignored, write_carried
from secateur.runtime.save.configuration import finish_configuration
from secateur.runtime.save.side_files import copy_side_files
from secateur.runtime.stock.to_transformers import (
    TransformersModel,
    accepted_difference,
    as_history,
    comparable_outputs,
    is_on_meta,
    probe_inputs,
    to_transformers_with_plan,
)
from secateur.runtime.verify import find_stored_faults, proof, reload
from secateur.runtime.verify.picture_proof import picture_calls

log = logging.getLogger(__name__)

UNSEEN = "unseen"
"""In the manifest: what the captured computation did not use, and what was proved of it."""
HASHED_BYTES = 4 << 30
SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class SaveReport:
    """What was saved, and what was proved.

    changes: configuration field -> (before, after).
    difference: largest difference of the raised model's outputs to the program's, relative where
        above one.
    reload: figures of the fresh process (its own difference, seconds to load, generated tokens);
        empty if unchecked.
    packed: what lies beside the checkpoint: layers by form, bytes packed and dense; empty if
        nothing was lowered.
    unseen: what the captured computation did not use (parameters, numbers), and how a picture
        fared; else empty.
    seconds: of the whole save."""

    path: Path
    num_bytes: int
    num_parameters: int
    changes: Mapping[str, tuple[object, object]]
    difference: float
    reload: JSON = field(default_factory=dict)
    packed: JSON = field(default_factory=dict)
    unseen: JSON = field(default_factory=dict)
    seconds: float = 0.0


def save(
    program: Program,
    path: str | Path,
    *,
    overwrite: bool = False,
    check: bool = True,
    packed: bool = True,
    figures: Mapping[str, object] | None = None,
) -> SaveReport:
    """Save as a stock checkpoint: configuration, safetensors, tokenizer and generation files, and
    the manifest.

    Before the folder appears, a fresh process opens it with plain transformers and proves that no
    key is missing, unexpected or mismatched, that every parameter is bit-equal, that the outputs
    agree, and that generation with the cache gives the tokens of generation without it.
    A program with sparse weights, or one that was lowered, has its packed weights beside the stock
    ones.  What was
    written is read again: every group of every sparse weight is counted, and packed and stock
    weights are compared. Branches beside sparse weights have no place in a stock checkpoint: see
    runtime/save/branches.py for what is written.

    Args:
        program: with weights.
        path: the folder to make.
        overwrite: replace an earlier result; what no result brought is never removed, nor is the
            source written to.
        check: False skips the fresh process.
        packed: False leaves the packed weights out.
        figures: JSON values to stand in the manifest beside those of the proof.

    Raises:
        UnsupportedConfigError: no stock class holds the program.
        ArtifactError: cannot be written, or the proof failed; nothing is left behind.
    """
    started = time.perf_counter()
    path = Path(path).expanduser()
    source = _source_folder(program)
    check_target(path, overwrite=overwrite, inputs=[source])
    if is_on_meta(program):
        raise ArtifactError(
            "the program is on the meta device and has no weights: capture the model with "
            "its weights"
        )
    if branch_parameters(program):
        return save_branched(
            program, path, overwrite=overwrite, check=check, packed=packed, figures=figures
        )
    raised = to_transformers_with_plan(program)
    assert raised.difference is not None
    calls, unseen = picture_calls(program, raised)
    ignored, ignored_figures = _settle_ignored(program, raised.model, source)
    needed = program.num_bytes + SPARE_BYTES
    with write_artifact(path, needed_bytes=needed, overwrite=overwrite, inputs=[source]) as draft:
        _write_model(raised.model, draft.folder)
        beside = _write_beside(program, raised.model, draft.folder, source)
        if source is not None:
            write_carried(ignored, source, draft.folder)
        proved: JSON = {}
        if check:
            proved = prove_reload(program, raised, draft.folder, calls)
        packed_figures: JSON = {}
        if packed:
            packed_figures = write_packed(program, raised.model, draft.folder)
        _check_stored(from_json(make_declaration(program, raised.model)), draft.folder)
        _describe_result(draft, program, raised, proved)
        draft.figures |= ignored_figures | beside
        if unseen:
            draft.figures[UNSEEN] = unseen
        draft.figures |= figures or {}
    return SaveReport(
        path=path,
        num_bytes=read_manifest(path).num_bytes,
        num_parameters=program.num_parameters,
        changes=raised.plan.changes,
        difference=raised.difference,
        reload=proved,
        unseen=unseen,
        packed=packed_figures,
        seconds=time.perf_counter() - started,
    )


def load(
    path: str | Path, *, verify: bool | None = None, packed: bool | None = None
) -> PreTrainedModel:
    """The model of a saved artifact, in eval mode, ready to generate; on its packed weights, where
    it was lowered.

    Args:
        path: the folder.
        verify: re-hash every file; None does so below 4 GiB.  Sizes are always compared.
        packed: True runs on the packed weights beside the stock checkpoint, False does not; None
            does if ``lower`` chose so.

    Raises:
        ArtifactError: not a finished artifact, changed since, or without the packed weights that
            were asked for.
        SourceError: its checkpoint is not sound.
    """
    folder = Path(path).expanduser()
    manifest = read_manifest(folder)
    hashes = verify
    if hashes is None:
        hashes = manifest.num_bytes <= HASHED_BYTES
    verify_artifact(folder, hashes=hashes)
    if is_branched(folder):
        return load_branched(folder, packed=packed)
    if runs_packed(folder, packed):
        return load_lowered(folder)
    return open_model(folder)


def save_weights(program: Program, path: str | Path, *, overwrite: bool = False) -> None:
    """Save any program's parameters and buffers as safetensors under their source names, with a
    table of shapes: for plain modules, which no stock class holds.  No code is stored; the module
    is built by its own code.

    Args:
        program: with weights.
        path: the folder to make.
        overwrite: replace an earlier result.

    Raises:
        ArtifactError: cannot be written, or the program has no weights.
    """
    if is_on_meta(program):
        raise ArtifactError(
            "the program is on the meta device and has no weights: capture the model with "
            "its weights"
        )
    state = {}
    for name, tensor in (*program.named_parameters(), *program.gm.named_buffers()):
        state[name] = tensor.detach().contiguous()
    needed = program.num_bytes + SPARE_BYTES
    with write_artifact(
        path, needed_bytes=needed, overwrite=overwrite, inputs=[program.source.folder]
    ) as draft:
        save_file(state, draft.folder / "weights.safetensors")
        table = {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in state.items()}
        (draft.folder / "shapes.json").write_text(json.dumps(table, indent=1) + "\n", "utf-8")
        draft.history = as_history(program)
        if program.sparse:
            _check_stored(program.sparse, draft.folder)
            draft.figures[FIGURE] = to_json(program.sparse)


def prove_reload(
    program: Program, raised: TransformersModel, folder: Path, calls: tuple[proof.Call, ...] = ()
) -> JSON:
    """Open a checkpoint folder in a fresh process with plain transformers, and compare it with the
    program.

    Args:
        program: what was saved.
        raised: its stock model.
        folder: of the checkpoint.
        calls: more calls that must be answered as here.

    Returns:
        Figures of that process.

    Raises:
        ArtifactError: says what differs.
    """
    faults, figures = proof.prove_folder(
        folder, replace(expect_in_folder(program, raised), calls=calls)
    )
    if faults:
        raise ArtifactError(
            f"the saved model is not the program, so it was removed: {'; '.join(faults)}"
        )
    return figures


def expect_in_folder(program: Program, raised: TransformersModel) -> proof.ExpectedFolder:
    """What a fresh process must find in the folder of a program."""
    inputs = probe_inputs(program)
    with torch.no_grad():
        outputs = comparable_outputs(program(**inputs))
        stock = comparable_outputs(raised.model(**inputs))
    return proof.ExpectedFolder(
        loader=proof.loader_name(raised.plan.config, raised.plan.cls),
        inputs=inputs,
        outputs={name: output for name, output in outputs.items() if name in stock},
        parameters={name: reload.hash_tensor(p) for name, p in raised.model.named_parameters()},
        tolerance=accepted_difference(program),
        generate=raised.model.can_generate() and "input_ids" in inputs,
    )


def _check_stored(sparse: SparseWeights, folder: Path) -> None:
    """Count every group of every sparse weight in the files that were written."""
    if sparse and (faults := find_stored_faults(folder, sparse)):
        raise ArtifactError(
            f"the saved weights are not sparse as they should be, so they were removed: {faults[0]}"
        )


def _write_model(model: PreTrainedModel, folder: Path) -> None:
    generation: Any = getattr(model, "generation_config", None)
    with silence_transformers():
        if generation is not None and not _is_valid(generation):
            # Some published generation files break rules that are checked on saving only: they are
            # kept as they are.
            model.generation_config = GenerationConfig()
        model.save_pretrained(folder)
    model.generation_config = generation
    if generation is not None and not _is_valid(generation):
        (folder / "generation_config.json").write_text(generation.to_json_string(), "utf-8")


def _write_beside(
    program: Program, model: PreTrainedModel, folder: Path, source: Path | None
) -> JSON:
    """Finish the configuration, and copy what lies beside the weights of the source.

    Returns:
        For the manifest: what differs from the source beside the weights.
    """
    figures: JSON = {}
    if differences := finish_configuration(folder, source, model).to_json():
        figures["configuration"] = differences
    if source is not None:
        widths = _changed_widths(program, model)
        beside = copy_side_files(source, folder, widths).to_json()
        if beside:
            figures["side_files"] = beside
        if dtypes := _changed_dtypes(folder, source):
            figures["dtypes"] = dtypes
    for line in _describe_beside(figures):
        log.warning("%s", line)
    return figures


def _changed_widths(program: Program, model: PreTrainedModel) -> dict[int, int]:
    """Return the new width of the embeddings by the old one; empty where it stayed."""
    old = getattr(program.source.model.get_input_embeddings(), "embedding_dim", None)  # type: ignore[operator]
    new = getattr(model.get_input_embeddings(), "embedding_dim", None)
    if not isinstance(old, int) or not isinstance(new, int) or old == new:
        return {}
    return {old: new}


def _changed_dtypes(folder: Path, source: Path) -> dict[str, int]:
    """Count the tensors whose dtype in the result is not that in the source: a stock class opens
    all of them in one dtype."""
    if not any((source / name).is_file() for name in (SINGLE, INDEX)):
        return {}
    written = read_checkpoint(folder)
    counts: dict[str, int] = {}
    for name, record in read_checkpoint(source).items():
        if name in written and written[name].dtype != record.dtype:
            before = str(record.dtype).removeprefix("torch.")
            after = str(written[name].dtype).removeprefix("torch.")
            change = f"{before} -> {after}"
            counts[change] = counts.get(change, 0) + 1
    return counts


def _describe_beside(figures: JSON) -> list[str]:
    """Say in sentences what differs from the source beside the weights."""
    lines: list[str] = []
    configuration = figures.get("configuration", {})
    if left_out := configuration.get("left_out"):
        lines.append(f"config.json is without {', '.join(left_out)} of the source")
    side_files = figures.get("side_files", {})
    lines += side_files.get("changed", [])
    for name, reason in side_files.get("left_behind", {}).items():
        lines.append(f"{name} stays behind: {reason}")
    for change, count in figures.get("dtypes", {}).items():
        lines.append(f"{count} tensors were stored in another dtype: {change}")
    return lines


def _settle_ignored(
    program: Program, model: PreTrainedModel, source: Path | None
) -> tuple[IgnoredTensors, JSON]:
    """Decide on the tensors that the class ignores, and withdraw from the configuration what
    announces those that are left out.

    Returns:
        The plan, and its entry for the manifest.
    """
    source_model = program.source.model
    assert isinstance(source_model, PreTrainedModel)
    plan = plan_ignored(model, source_model, source)
    if plan.carried:
        names = describe_ignored(list(plan.carried))
        log.warning("carried over as they are, no pass saw them: %s", names)
        return plan, {"carried": {"tensors": list(plan.carried)}}
    if plan.left_out:
        announced = withdraw_announcement(model.config)
        names = describe_ignored(list(plan.left_out))
        log.warning("left out (%s): %s; set to 0: %s", plan.reason, names, ", ".join(announced))
        entry = {"tensors": list(plan.left_out), "reason": plan.reason, "set_to_zero": announced}
        return plan, {"left_out": entry}
    return plan, {}


def _source_folder(program: Program) -> Path | None:
    """Where tokenizer files are: the folder of the capture, or the one that the model says it was
    read from."""
    folder = program.source.folder
    name_or_path = getattr(program.source.model, "name_or_path", None)
    if not folder and name_or_path and isinstance(name_or_path, str):
        folder = Path(name_or_path)
    if folder is not None and folder.is_dir():
        return folder
    return None


def _is_valid(generation: GenerationConfig) -> bool:
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True


def _describe_result(
    draft: Draft, program: Program, raised: TransformersModel, figures: JSON
) -> None:
    draft.history = as_history(program)
    draft.figures = {
        "num_parameters": program.num_parameters,
        "configuration_changes": {name: list(pair) for name, pair in raised.plan.changes.items()},
        "difference": raised.difference,
        "reload": dict(figures),
    }
    if program.sparse:
        draft.figures[FIGURE] = make_declaration(program, raised.model)


def as_json(report: SaveReport) -> JSON:
    """A report as JSON."""
    return asdict(report) | {"path": str(report.path)}
