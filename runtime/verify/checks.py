"""What is looked at in a folder without running a model.  Each check says at least one thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from secateur.graph.errors import SecateurError
from secateur.graph.pattern import Pattern
from secateur.passes.lowering.lower import DTYPES, LayerPlan
from secateur.runtime.open.checkpoint import INDEX, SINGLE, read_json
from secateur.runtime.open.classes import BUILD_FAILURES, innermost_reason
from secateur.runtime.open.source import CONFIG, REFUSED_FIELDS, check_weights
from secateur.runtime.packed.store import FOLDER, has_packed, load_layers, read_plan, unpack_weight
from secateur.runtime.save.artifact import MANIFEST, artifact_faults, read_manifest
from secateur.runtime.serving.package import is_package, made_here
from secateur.runtime.serving.trust import machine_code
from secateur.runtime.verify.census import PATTERNS, Census
from secateur.runtime.verify.claims import Claim, Overall, sparsity_configs
from secateur.runtime.verify.findings import (
    Finding,
    Level,
    count_by_level,
    describe_place,
    limit_findings,
)
from secateur.runtime.verify.subject import Subject

Findings = Iterator[Finding]
ALMOST = 0.01
"""A weight with fewer broken groups than this part was meant to hold the pattern."""
CHANGED = "The files are not what was saved: copy them again, or save the model again"
PRUNE_AGAIN = "Prune the weight again and save it with its mask applied, or take the claim out"


def check_files(subject: Subject) -> Findings:
    """Pickles and code are named, never opened."""
    told = list[Finding](_machine_code(subject))
    code = [file.as_posix() for file in subject.files if file.suffix == ".py"]
    weights = [file for file in subject.files if file.suffix == ".safetensors"]
    if subject.pickles:
        names = ", ".join(subject.pickles[:3])
        if weights:
            level: Level = "warning"
        else:
            level = "fault"
        if weights:
            mend = "Delete them"
        else:
            mend = "If you trust them, convert them once with transformers' save_pretrained"
        told.append(
            Finding(level, f"pickles, which can run code when they are read: {names}", mend)
        )
    if code:
        names = ", ".join(code[:3])
        told.append(
            Finding(
                "warning",
                f"code: {names}",
                "It was not run; open the folder only with loaders that do not run it",
            )
        )
    if (subject.folder / SINGLE).is_file() and (subject.folder / INDEX).is_file():
        told.append(
            Finding(
                "warning",
                f"{SINGLE} and {INDEX}: loaders take the first",
                "Delete the one that is stale",
            )
        )
    yield from told
    if not told:
        yield Finding("ok", f"{len(subject.files)} files, no pickle, no code")


def _machine_code(subject: Subject) -> Findings:
    """Machine code is named as such; it is a fault where opening the folder would run it and nobody
    vouched for it."""
    found = machine_code(subject.folder / file for file in subject.files)
    if not found:
        return
    names = ", ".join(file.relative_to(subject.folder).as_posix() for file in found[:3])
    if not is_package(subject.folder):
        yield Finding(
            "warning", f"machine code: {names}", "It was not run; no loader of secateur runs it"
        )
    elif subject.manifest is not None and made_here(subject.folder):
        yield Finding(
            "ok", f"machine code: {names}; compiled by you on this machine, and unchanged"
        )
    else:
        mend = (
            "Package the model yourself, or open it with --trust-code if you trust whoever made it"
        )
        yield Finding(
            "fault",
            f"machine code: {names}; not compiled by you on this machine, and not run",
            mend,
        )


def check_checkpoint(subject: Subject) -> Findings:
    """Headers, ranges and shards are sound."""
    files_read = {record.file.name for record in subject.stored_tensors.values()}
    stray = []
    for f in subject.folder.glob("*.safetensors"):
        if f.name not in files_read:
            stray.append(f.name)
    if stray:
        yield Finding(
            "warning", f"no loader reads {', '.join(sorted(stray)[:3])}", "Delete what is stale"
        )
    yield Finding(
        "ok",
        f"{len(subject.stored_tensors):,} tensors in {len(files_read)} files, headers and "
        "ranges sound",
    )


def check_manifest(subject: Subject) -> Findings:
    """Sizes and SHA-256 are those of the manifest."""
    if not (subject.folder / MANIFEST).is_file():
        yield Finding(
            "note",
            f"no {MANIFEST}: not an artifact of secateur, so nothing says what the files should be",
        )
        return
    read = read_manifest(subject.folder)
    faults = []
    for one in artifact_faults(subject.folder, read, known=subject.hashes):
        faults.append(Finding("fault", one, CHANGED))
    yield from limit_findings(faults, "files")
    if not faults:
        yield Finding(
            "ok", f"{len(read.files)} files have the size and the SHA-256 that the manifest says"
        )


def check_numbers(subject: Subject) -> Findings:
    """Everything is finite; zeros that were pruned are +0.0."""
    wrong = [one for one in subject.tensors.values() if one.nans or one.infinities]
    mend = "The model diverged, or the file is damaged: save it again from a sound model"
    yield from limit_findings(
        [Finding("fault", _describe_nonfinite(one), mend) for one in wrong], "tensors"
    )
    claimed = {subject.stored_name(claim.tensor) for claim in subject.claims[0]}
    negative = [one for one in subject.tensors.values() if one.negative_zeros]
    worst = [one for one in negative if one.name in claimed]
    mend = "Add 0.0 to the weight before saving it: packers have taken -0.0 for a number"
    yield from limit_findings(
        [Finding("fault", _describe_negative_zeros(one), mend) for one in worst], "tensors"
    )
    sparse = [one for one in negative if one.pattern and one.name not in claimed]
    yield from limit_findings(
        [Finding("warning", _describe_negative_zeros(one), mend) for one in sparse], "tensors"
    )
    rest = sum(one.negative_zeros for one in negative if one not in worst and one not in sparse)
    if rest:
        yield Finding("note", f"{rest:,} zeros in dense tensors are -0.0, which does no harm there")
    if not wrong:
        yield Finding(
            "ok",
            f"{sum(one.numel for one in subject.tensors.values()):,} numbers, none NaN or infinite",
        )


def check_patterns(subject: Subject) -> Findings:
    """Every claim holds in every group, and nothing almost holds a pattern."""
    single, overall = subject.claims
    faults = [found for claim in single for found in _find_broken_claims(subject, claim)]
    faults += [found for claim in overall for found in _find_missing_zeros(subject, claim)]
    yield from limit_findings(faults, "weights")
    claimed = {subject.stored_name(claim.tensor) for claim in single}
    almost = [
        one for one in subject.tensors.values() if one.name not in claimed and _missed_pattern(one)
    ]
    yield from limit_findings([_warn_missed_pattern(one) for one in almost], "weights")
    held = count_by_level(
        Counter(pattern for _, pattern in {(claim.tensor, str(claim.pattern)) for claim in single})
    )
    if (single or overall) and not faults:
        yield Finding("ok", f"claimed and true in every group: {held or 'the share of zeros'}")
    found = Counter(one.pattern for one in subject.tensors.values() if one.pattern)
    matrices = sum(bool(one.over) for one in subject.tensors.values())
    as_they_stand = count_by_level(found) or "none"
    yield Finding(
        "note" if single or overall else "ok",
        f"of {matrices:,} matrices hold a pattern: {as_they_stand}",
    )


def check_packed(subject: Subject) -> Findings:
    """Packed weights are the stock ones, bit for bit."""
    if not has_packed(subject.folder):
        yield Finding("note", "no packed weights")
        return
    plan = read_plan(subject.folder / FOLDER)
    dtype = DTYPES[plan.dtype]
    faults = list[Finding]()
    rounded = 0
    size = 0
    dense = 0
    for row, layer in load_layers(subject.folder / FOLDER, plan):
        size = size + layer.count_bytes
        dense = dense + row.dense_bytes
        rounded = rounded + row.rounds
        name = subject.stored_name(row.layer)
        if name is None:
            faults.append(Finding("fault", f"packed {row.layer} has no stock weight", CHANGED))
        elif not row.rounds and not _expands_to(
            layer.tensors, stock := subject.tensor(name).to(dtype)
        ):
            faults += _compare_packed(
                row, unpack_weight(row.kind, row.shape, layer.tensors, dtype), stock
            )
    yield from limit_findings(faults, "weights")
    if rounded:
        yield Finding(
            "note",
            f"{rounded} packed weights are rounded copies (head=int8), so they were not compared",
        )
    if not any(one.level == "fault" for one in faults):
        share = f"{size:,} bytes, {100 * size / max(dense, 1):.4g} % of dense"
        yield Finding(
            "ok",
            f"{len(plan.packed_layers):,} packed weights are the stock ones bit for bit: {share}",
        )


def check_configuration(subject: Subject) -> Findings:
    """config.json leads to a stock class, and asks nothing that loaders and servers refuse."""
    if not (subject.folder / CONFIG).is_file():
        yield Finding("note", f"no {CONFIG}: only the tensors were looked at")
        return
    data = read_json(subject.folder / CONFIG)
    ours = subject.manifest is not None
    for where in sparsity_configs(data):
        mend = (
            "Delete the field: the zeros are in the weights, and every loader opens them without it"
        )
        says = f"{CONFIG} has {where}: vLLM refuses models with one since March 2026"
        yield Finding("fault" if ours else "warning", says, mend)
    for name in REFUSED_FIELDS:
        if data.get(name) and not sparsity_configs({name: data[name]}):
            yield Finding("note", f"{CONFIG} has {name}: such a model is not opened here")
    if "auto_map" in data:
        yield Finding(
            "warning",
            f"{CONFIG} has auto_map, which names code",
            "Delete the field if a stock class exists",
        )
    try:
        yield Finding("ok", f"{type(subject.build()).__name__} can be built")
    except (SecateurError, *BUILD_FAILURES) as error:
        says = (
            "no stock class: "
            f"{error if isinstance(error, SecateurError) else innermost_reason(error)}"
        )
        yield Finding(
            "fault" if ours else "warning", says, "Parameters and outputs were not compared"
        )


def check_parameters(subject: Subject) -> Findings:
    """The stored tensors are the class's parameters, by transformers' own rules; tied ones are
    one."""
    model = subject.model
    if model is None:
        yield Finding("note", "no class to compare the tensors with")
        return
    try:
        check_weights(type(model), model.config, subject.stored_tensors, subject.folder)
        yield Finding(
            "ok", f"no tensor is missing, left over or of another shape for {type(model).__name__}"
        )
    except SecateurError as error:
        masks = any("mask" in name.split(".")[-1] for name in subject.stored_tensors)
        if masks:
            hint = (
                "; a mask beside a weight means that the weight was saved without it: multiply them"
            )
        else:
            hint = ""
        packed_by_others = any(subject.config.get(name) for name in REFUSED_FIELDS)
        if packed_by_others:
            level: Level = "warning"
        else:
            level = "fault"
        yield Finding(level, str(error), f"Save the model again with the tool that made it{hint}")
    for names in subject.ties:
        there = [name for name in names if name in subject.stored_tensors]
        unlike = [
            name
            for name in there[1:]
            if not _has_same_bits(subject.tensor(there[0]), subject.tensor(name))
        ]
        if unlike:
            says = (
                f"{there[0]} and {unlike[0]} are one parameter in the class and differ in the file"
            )
            yield Finding(
                "fault", says, "Loaders disagree about which one counts: store one of them"
            )
        elif len(there) > 1:
            yield Finding(
                "note", f"{' and '.join(there)} are one parameter and stored {len(there)} times"
            )


# Single weights
def _find_broken_claims(subject: Subject, claim: Claim) -> Findings:
    """Where a claim about one weight does not hold."""
    name = subject.stored_name(claim.tensor)
    if claim.source.startswith(CONFIG):
        mend = PRUNE_AGAIN
    else:
        mend = CHANGED
    if name is None:
        yield Finding(
            "fault",
            f"{claim.source} says that {claim.tensor} is {claim.pattern}; it is not stored",
            mend,
        )
        return
    one = subject.tensors[name]
    told = f"{claim.source} says that it is {claim.pattern}"
    if len(one.shape) != 2:
        yield Finding("fault", f"{name} has shape {list(one.shape)}, no matrix; {told}", mend)
    elif isinstance(claim.pattern, Pattern):
        over = one.over.get(str(claim.pattern), 0)
        of = claim.pattern.of
        if over or not one.over:
            groups = one.numel // of
            where = describe_place(one, one.first.get(str(claim.pattern), (0, 0)), of)
            says = (
                f"{over:,} of {groups:,} groups hold over {claim.pattern.kept} non-zeros; "
                f"{told}; the first: {where}"
            )
            yield Finding(
                "fault", says if one.over else f"{name} holds {one.dtype}, no weights; {told}", mend
            )
    elif one.fullest[0] > (kept := claim.pattern.kept_per_group(one.columns)):
        says = (
            f"row {one.fullest[1]} of {name} in {one.file} holds {one.fullest[0]:,} non-zeros, "
            f"{kept:,} allowed"
        )
        yield Finding("fault", f"{says}; {told}", mend)


def _find_missing_zeros(subject: Subject, claim: Overall) -> Findings:
    """Where weights together hold fewer zeros than claimed."""
    names = {subject.stored_name(name) for name in claim.tensors} - {None}
    found = [subject.tensors[name] for name in names if name is not None]
    share = sum(one.zeros for one in found) / max(sum(one.numel for one in found), 1)
    if share < claim.share - ALMOST:
        says = (
            f"{claim.source} says that {claim.share:.1%} are zeros, and {share:.1%} of "
            f"{len(found)} weights are"
        )
        yield Finding("fault", says, PRUNE_AGAIN)


def _share_of_zeros(one: Census, name: str) -> float:
    _, of = PATTERNS[name]
    return one.over.get(name, 0) * of / max(one.numel, 1)


def _missed_pattern(one: Census) -> str:
    """The pattern that a weight misses by a few groups only, "" if none."""
    if one.pattern or not one.over:
        return ""
    return next((name for name in PATTERNS if _share_of_zeros(one, name) < ALMOST), "")


def _warn_missed_pattern(one: Census) -> Finding:
    name = _missed_pattern(one)
    kept, of = PATTERNS[name]
    over = one.over[name]
    groups = one.numel // of
    where = describe_place(one, one.first[name], of)
    says = (
        f"almost {name}: {over:,} of {groups:,} groups hold over {kept} non-zeros; the "
        f"first: {where}"
    )
    return Finding(
        "warning",
        says,
        "If it was pruned, something changed it since: apply its mask and save it again",
    )


def _describe_nonfinite(one: Census) -> str:
    found = count_by_level(
        {name: n for name, n in (("NaN", one.nans), ("infinite", one.infinities)) if n}
    )
    return f"{one.name} holds {found}; the first: {describe_place(one, one.odd or (0, 0))}"


def _describe_negative_zeros(one: Census) -> str:
    return f"{one.negative_zeros:,} of {one.zeros:,} zeros of {one.name} in {one.file} are -0.0"


def _compare_packed(row: LayerPlan, packed_NK: torch.Tensor, stock_NK: torch.Tensor) -> Findings:
    if _has_same_bits(packed_NK, stock_NK):
        return
    if packed_NK.shape == stock_NK.shape and torch.equal(packed_NK, stock_NK):
        yield Finding(
            "warning",
            f"packed {row.layer} differs from the stock one in the sign of zeros",
            CHANGED,
        )
        return
    if packed_NK.shape == stock_NK.shape:
        wrong = (packed_NK != stock_NK).nonzero()
    else:
        wrong = torch.zeros(0, 2)
    if len(wrong):
        first = f", first in row {int(wrong[0, 0])}, column {int(wrong[0, 1])}"
    else:
        first = ""
    says = f"packed {row.layer} is not the stock weight: {len(wrong):,} numbers differ{first}"
    if not len(wrong):
        says = (
            f"packed {row.layer} is {list(packed_NK.shape)}, the stock weight "
            f"{list(stock_NK.shape)}"
        )
    yield Finding("fault", says, CHANGED)


def _expands_to(tensors: Mapping[str, torch.Tensor], stock_NK: torch.Tensor) -> bool:
    """Whether the floats of a bitmask are a weight, bit for bit; False where it takes more than a
    look to tell."""
    values = tensors["values"]
    mask = tensors.get("mask")
    if mask is None or values.dtype != stock_NK.dtype or len(mask) != len(stock_NK):
        return False
    held, bits = (_as_bits(one) for one in (values, stock_NK))
    where = np.unpackbits(mask.numpy(), axis=1, bitorder="little").view(np.bool_)
    kept = np.pad(bits, ((0, 0), (0, where.shape[1] - bits.shape[1])))[where]
    return np.array_equal(kept, held.ravel()) and np.count_nonzero(kept) == np.count_nonzero(bits)


def _as_bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[tensor.dtype.itemsize]
    found: npt.NDArray[Any] = tensor.contiguous().view(whole).numpy()
    return found


def _has_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    first, second = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)
