"""A Program as tensors and facts, and back: the edits are replayed on the captured source, then the
values are put in.

Only what differs from the source is stored.  What comes back is the same Program or none: graph,
parameters and buffers must have the SHA-256 that they had.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from secateur.graph import Cut, Program, SecateurError, Step, drop, keep, with_parameters
from secateur.graph.edit.rewrite import Edit
from secateur.graph.program import JSON
from secateur.graph.sparse import Sparse, SparseWeights
from secateur.passes.sparsity.boost import Branch, add_branches
from secateur.passes.storage.journal import Entry, hash_tensor
from secateur.runtime.open.declared import from_json, to_json
from secateur.runtime.resume.fingerprint import graph_digest, hash_parameters


class StateMismatch(SecateurError):
    """A stored Program cannot be built again; says what differs."""


def state_of(program: Program, source: Mapping[str, str]) -> Entry:
    """What is needed to build a Program again.

    Args:
        program: to be stored.
        source: ``digests`` of the captured source.
    """
    digests = hash_parameters(program)
    tensors = dict[str, Tensor]()
    for name, parameter in program.named_parameters():
        if digests[name] != source.get(name):
            tensors[f"now {name}"] = parameter.detach()
    kept_units = dict[str, Tensor]()
    dropped = list[str]()
    if program.cut:
        kept_units |= program.cut.kept
        dropped += program.cut.dropped
        for name, parameter in program.cut.dense.named_parameters():
            if hash_tensor(parameter) != source.get(name):
                tensors[f"dense {name}"] = parameter.detach()
    for place, units in enumerate(kept_units.values()):
        tensors[f"kept {place}"] = units
    for place, score in enumerate(program.scores.values()):
        tensors[f"score {place}"] = score
    branches: JSON = {}
    for name, weight in program.sparse.items():
        if weight.norms is not None:
            tensors[f"norms {name}"] = weight.norms
        if weight.removed is not None:
            tensors[f"removed {name}"] = weight.removed
        if weight.branch:
            branches[name] = list(weight.branch)
    facts: JSON = {
        "history": [dataclasses.asdict(step) for step in program.history],
        "scores": list(program.scores),
        "kept": list(kept_units),
        "dropped": dropped,
        "cut": program.cut is not None,
        "sparse": to_json(program.sparse),
        "branches": branches,
        "digests": list(digests.items()),
        "graph": graph_digest(program),
    }
    return Entry(tensors, facts)


def rebuild_program(source: Program, entry: Entry) -> Program:
    """The Program of which ``state_of`` gave the entry.

    Args:
        source: as it was captured.

    Raises:
        NotTheSame: what the replay gives is not what was stored.
    """
    facts = entry.facts
    dense = _put_values(source, _entries_under("dense ", entry))
    kept_units = _listed_tensors(entry, "kept", facts["kept"])
    values = _entries_under("now ", entry)
    sparse = _restore_sparse(entry)
    branches = dict[str, Branch]()
    for name, weight in sparse.items():
        if weight.branch:
            branches[name] = (values[weight.branch[0]], values[weight.branch[1]])
    edited = _replay_edits(dense, kept_units, facts["dropped"], branches, facts["graph"])
    program = _put_values(edited, values)
    _check_facts(program, facts)
    cut = None
    if facts["cut"]:
        cut = Cut(dense, MappingProxyType(kept_units), tuple(facts["dropped"]))
    return program.replace(
        cut=cut,
        history=tuple(Step(**step) for step in facts["history"]),
        scores=_listed_tensors(entry, "score", facts["scores"]),
        sparse=sparse,
    )


def _listed_tensors(entry: Entry, kind: str, names: list[str]) -> dict[str, Tensor]:
    """The tensors of a kind, which are stored by their place in a list of names."""
    return {name: entry.tensors[f"{kind} {place}"] for place, name in enumerate(names)}


def _restore_sparse(entry: Entry) -> SparseWeights:
    branches = entry.facts.get("branches", {})
    restored = dict[str, Sparse]()
    for name, weight in from_json(entry.facts["sparse"]).items():
        branch = None
        if name in branches:
            first, second = branches[name]
            branch = (first, second)
        restored[name] = dataclasses.replace(
            weight,
            norms=entry.tensors.get(f"norms {name}"),
            removed=entry.tensors.get(f"removed {name}"),
            branch=branch,
        )
    return restored


def _put_values(program: Program, values: Mapping[str, Tensor]) -> Program:
    if values:
        return with_parameters(program, values)
    return program


def _entries_under(prefix: str, entry: Entry) -> dict[str, Tensor]:
    entries = dict[str, Tensor]()
    for name, value in entry.tensors.items():
        if name.startswith(prefix):
            entries[name.removeprefix(prefix)] = value
    return entries


def _replay_edits(
    dense: Program,
    kept_units: Mapping[str, Tensor],
    dropped: list[str],
    branches: Mapping[str, Branch],
    graph: str,
) -> Program:
    """The edits once more: blocks together, or one after another where a block went after a part of
    it."""
    edit: Edit = dict(kept_units)
    for steps in ([dropped], [[name] for name in dropped]):
        program = dense
        for names in steps:
            if names:
                program = drop(program, names)
        if edit:
            program = keep(program, edit)
        if branches:
            program = add_branches(program, branches)
        if graph_digest(program) == graph:
            return program
    raise StateMismatch("the replayed edits give another graph")


def _check_facts(program: Program, facts: JSON) -> None:
    digests = list(hash_parameters(program).items())
    stored = [(name, digest) for name, digest in facts["digests"]]
    if digests == stored:
        return
    changed = sorted(name for name, _ in {*digests} ^ {*stored})
    if changed:
        raise StateMismatch(f"{changed[0]} is not what it was")
    raise StateMismatch("the order of the parameters is not what it was")
