"""What is looked at in a folder without running a model.  Each check says at least one thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
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
from secateur.runtime.verify.census import PATTERNS, Array, Census
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
    findings = list[Finding](_machine_code(subject))
    code = [file.as_posix() for file in subject.files if file.suffix == ".py"]
    weights = [file for file in subject.files if file.suffix == ".safetensors"]
    if subject.pickles:
        names = ", ".join(subject.pickles[:3])
        if weights:
            level: Level = "warning"
            mend = "Delete them"
        else:
            level = "fault"
            mend = "If you trust them, convert them once with transformers' save_pretrained"
        says = f"pickles, which can run code when they are read: {names}"
        findings.append(Finding(level, says, mend))
    if code:
        names = ", ".join(code[:3])
        mend = "It was not run; open the folder only with loaders that do not run it"
        findings.append(Finding("warning", f"code: {names}", mend))
    if (subject.folder / SINGLE).is_file() and (subject.folder / INDEX).is_file():
        says = f"{SINGLE} and {INDEX}: loaders take the first"
        findings.append(Finding("warning", says, "Delete the one that is stale"))
    yield from findings
    if not findings:
        yield Finding("ok", f"{len(subject.files)} files, no pickle, no code")


def _machine_code(subject: Subject) -> Findings:
    """Machine code is named as such; it is a fault where opening the folder would run it and nobody
    vouched for it."""
    files = machine_code(subject.folder / file for file in subject.files)
    if not files:
        return
    names = ", ".join(file.relative_to(subject.folder).as_posix() for file in files[:3])
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
    for file in subject.folder.glob("*.safetensors"):
        if file.name not in files_read:
            stray.append(file.name)
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
    manifest = read_manifest(subject.folder)
    faults = []
    for fault in artifact_faults(subject.folder, manifest, known=subject.hashes):
        faults.append(Finding("fault", fault, CHANGED))
    yield from limit_findings(faults, "files")
    if not faults:
        yield Finding(
            "ok",
            f"{len(manifest.files)} files have the size and the SHA-256 that the manifest says",
        )


def check_numbers(subject: Subject) -> Findings:
    """Everything is finite; zeros that were pruned are +0.0."""
    nonfinite = list[Finding]()
    numbers = 0
    mend = "The model diverged, or the file is damaged: save it again from a sound model"
    for census in subject.tensors.values():
        numbers += census.numel
        if census.nans or census.infinities:
            nonfinite.append(Finding("fault", _describe_nonfinite(census), mend))
    yield from limit_findings(nonfinite, "tensors")
    yield from _find_negative_zeros(subject)
    if not nonfinite:
        yield Finding("ok", f"{numbers:,} numbers, none NaN or infinite")


def _find_negative_zeros(subject: Subject) -> Findings:
    """Zeros that are -0.0: a fault where a weight is claimed to be sparse, no harm where it is
    dense."""
    claimed = {subject.stored_name(claim.tensor) for claim in subject.claims[0]}
    mend = "Add 0.0 to the weight before saving it: packers have taken -0.0 for a number"
    faults = list[Finding]()
    warnings = list[Finding]()
    harmless = 0
    for census in subject.tensors.values():
        if not census.negative_zeros:
            continue
        if census.name in claimed:
            faults.append(Finding("fault", _describe_negative_zeros(census), mend))
        elif census.pattern:
            warnings.append(Finding("warning", _describe_negative_zeros(census), mend))
        else:
            harmless += census.negative_zeros
    yield from limit_findings(faults, "tensors")
    yield from limit_findings(warnings, "tensors")
    if harmless:
        yield Finding(
            "note", f"{harmless:,} zeros in dense tensors are -0.0, which does no harm there"
        )


def check_patterns(subject: Subject) -> Findings:
    """Every claim holds in every group, and nothing almost holds a pattern."""
    single, overall = subject.claims
    faults = list[Finding]()
    for claim in single:
        faults += _find_broken_claims(subject, claim)
    for claim_of_all in overall:
        faults += _find_missing_zeros(subject, claim_of_all)
    yield from limit_findings(faults, "weights")
    claimed = {subject.stored_name(claim.tensor) for claim in single}
    almost = list[Finding]()
    patterns = Counter[str]()
    matrices = 0
    for census in subject.tensors.values():
        if census.name not in claimed and _missed_pattern(census):
            almost.append(_warn_missed_pattern(census))
        if census.pattern:
            patterns[census.pattern] += 1
        if census.over:
            matrices += 1
    yield from limit_findings(almost, "weights")
    level: Level = "ok"
    if single or overall:
        level = "note"
        claimed_pairs = {(claim.tensor, str(claim.pattern)) for claim in single}
        true_claims = count_by_level(Counter(pattern for _, pattern in claimed_pairs))
        if not faults:
            says = f"claimed and true in every group: {true_claims or 'the share of zeros'}"
            yield Finding("ok", says)
    as_they_stand = count_by_level(patterns) or "none"
    yield Finding(level, f"of {matrices:,} matrices hold a pattern: {as_they_stand}")


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
            continue
        if row.rounds:
            continue
        stock = subject.tensor(name).to(dtype)
        if not _expands_to(layer.tensors, stock):
            unpacked = unpack_weight(row.kind, row.shape, layer.tensors, dtype)
            faults += _compare_packed(row, unpacked, stock)
    yield from limit_findings(faults, "weights")
    if rounded:
        yield Finding(
            "note",
            f"{rounded} packed weights are rounded copies (head=int8), so they were not compared",
        )
    if not any(finding.level == "fault" for finding in faults):
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
    level: Level = "warning"
    if subject.manifest is not None:
        level = "fault"
    for where in sparsity_configs(data):
        mend = (
            "Delete the field: the zeros are in the weights, and every loader opens them without it"
        )
        says = f"{CONFIG} has {where}: vLLM refuses models with one since March 2026"
        yield Finding(level, says, mend)
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
        reason = innermost_reason(error)
        if isinstance(error, SecateurError):
            reason = str(error)
        yield Finding(
            level, f"no stock class: {reason}", "Parameters and outputs were not compared"
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
        hint = ""
        if any("mask" in name.split(".")[-1] for name in subject.stored_tensors):
            hint = (
                "; a mask beside a weight means that the weight was saved without it: multiply them"
            )
        level: Level = "fault"
        if any(subject.config.get(name) for name in REFUSED_FIELDS):  # packed by another tool
            level = "warning"
        yield Finding(level, str(error), f"Save the model again with the tool that made it{hint}")
    for names in subject.ties:
        yield from _compare_tied(subject, names)


def _compare_tied(subject: Subject, names: list[str]) -> Findings:
    """Whether the tensors of one parameter, where several are stored, are the same."""
    stored = [name for name in names if name in subject.stored_tensors]
    for name in stored[1:]:
        if not _has_same_bits(subject.tensor(stored[0]), subject.tensor(name)):
            says = f"{stored[0]} and {name} are one parameter in the class and differ in the file"
            mend = "Loaders disagree about which one counts: store one of them"
            yield Finding("fault", says, mend)
            return
    if len(stored) > 1:
        says = f"{' and '.join(stored)} are one parameter and stored {len(stored)} times"
        yield Finding("note", says)


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
    census = subject.tensors[name]
    claimed = f"{claim.source} says that it is {claim.pattern}"
    if len(census.shape) != 2:
        says = f"{name} has shape {list(census.shape)}, no matrix; {claimed}"
        yield Finding("fault", says, mend)
    elif isinstance(claim.pattern, Pattern):
        over = census.over.get(str(claim.pattern), 0)
        of = claim.pattern.of
        if not census.over:
            yield Finding("fault", f"{name} holds {census.dtype}, no weights; {claimed}", mend)
        elif over:
            groups = census.numel // of
            where = describe_place(census, census.first.get(str(claim.pattern), (0, 0)), of)
            says = (
                f"{over:,} of {groups:,} groups hold over {claim.pattern.kept} non-zeros; "
                f"{claimed}; the first: {where}"
            )
            yield Finding("fault", says, mend)
    else:
        most, row = census.fullest
        allowed = claim.pattern.kept_per_group(census.columns)
        if most > allowed:
            says = (
                f"row {row} of {name} in {census.file} holds {most:,} non-zeros, "
                f"{allowed:,} allowed"
            )
            yield Finding("fault", f"{says}; {claimed}", mend)


def _find_missing_zeros(subject: Subject, claim: Overall) -> Findings:
    """Where weights together hold fewer zeros than claimed."""
    names = {subject.stored_name(name) for name in claim.tensors} - {None}
    zeros = 0
    numbers = 0
    for name in names:
        if name is not None:
            zeros += subject.tensors[name].zeros
            numbers += subject.tensors[name].numel
    share = zeros / max(numbers, 1)
    if share < claim.share - ALMOST:
        says = (
            f"{claim.source} says that {claim.share:.1%} are zeros, and {share:.1%} of "
            f"{len(names)} weights are"
        )
        yield Finding("fault", says, PRUNE_AGAIN)


def _share_of_zeros(census: Census, name: str) -> float:
    _, of = PATTERNS[name]
    return census.over.get(name, 0) * of / max(census.numel, 1)


def _missed_pattern(census: Census) -> str:
    """The pattern that a weight misses by a few groups only, "" if none."""
    if census.pattern or not census.over:
        return ""
    for name in PATTERNS:
        if _share_of_zeros(census, name) < ALMOST:
            return name
    return ""


def _warn_missed_pattern(census: Census) -> Finding:
    name = _missed_pattern(census)
    kept, of = PATTERNS[name]
    over = census.over[name]
    groups = census.numel // of
    where = describe_place(census, census.first[name], of)
    says = (
        f"almost {name}: {over:,} of {groups:,} groups hold over {kept} non-zeros; the "
        f"first: {where}"
    )
    return Finding(
        "warning",
        says,
        "If it was pruned, something changed it since: apply its mask and save it again",
    )


def _describe_nonfinite(census: Census) -> str:
    numbers = dict[str, int]()
    if census.nans:
        numbers["NaN"] = census.nans
    if census.infinities:
        numbers["infinite"] = census.infinities
    counts = count_by_level(numbers)
    return (
        f"{census.name} holds {counts}; the first: {describe_place(census, census.odd or (0, 0))}"
    )


def _describe_negative_zeros(census: Census) -> str:
    place = f"{census.name} in {census.file}"
    return f"{census.negative_zeros:,} of {census.zeros:,} zeros of {place} are -0.0"


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
    says = f"packed {row.layer} is {list(packed_NK.shape)}, the stock weight {list(stock_NK.shape)}"
    if packed_NK.shape == stock_NK.shape:
        wrong = (packed_NK != stock_NK).nonzero()
        first = f"row {int(wrong[0, 0])}, column {int(wrong[0, 1])}"
        says = (
            f"packed {row.layer} is not the stock weight: {len(wrong):,} numbers differ, "
            f"first in {first}"
        )
    yield Finding("fault", says, CHANGED)


def _expands_to(tensors: Mapping[str, torch.Tensor], stock_NK: torch.Tensor) -> bool:
    """Whether the floats of a bitmask are a weight, bit for bit; False where it takes more than a
    look to tell."""
    values = tensors["values"]
    mask = tensors.get("mask")
    if mask is None or values.dtype != stock_NK.dtype or len(mask) != len(stock_NK):
        return False
    bits = _as_bits(stock_NK)
    where = np.unpackbits(mask.numpy(), axis=1, bitorder="little").view(np.bool_)
    masked = np.pad(bits, ((0, 0), (0, where.shape[1] - bits.shape[1])))[where]
    if not np.array_equal(masked, _as_bits(values).ravel()):
        return False
    return bool(np.count_nonzero(masked) == np.count_nonzero(bits))


def _as_bits(tensor: torch.Tensor) -> Array:
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[tensor.dtype.itemsize]
    bits: Array = tensor.contiguous().view(integer).numpy()
    return bits


def _has_same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(_flat_bytes(first), _flat_bytes(second))


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
