"""A Program as tensors and facts, and back: the edits are replayed on the captured source, then the
values are put in.

Only what differs from the source is stored.  What comes back is the same Program or none: graph,
parameters and buffers must have the SHA-256 that they had.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from secateur.graph import Cut, Program, SecateurError, Step, drop, keep, with_parameters
from secateur.graph.edit.rewrite import Edit
from secateur.graph.sparse import SparseWeights
from secateur.passes.sparsity.boost import Branch, add_branches
from secateur.passes.storage.journal import Entry, hash_tensor
from secateur.runtime.open.declared import from_json, to_json
from secateur.runtime.resume.fingerprint import graph_digest, hash_parameters

JSON = dict[str, Any]


class StateMismatch(SecateurError):
    """A stored Program cannot be built again; says what differs."""


def state_of(program: Program, source: Mapping[str, str]) -> Entry:
    """What is needed to build a Program again.

    Args:
        source: ``digests`` of the captured source.
    """
    held = hash_parameters(program)
    cut = program.cut
    tensors = {
        f"now {n}": p.detach() for n, p in program.named_parameters() if held[n] != source.get(n)
    }
    if cut:
        kept = dict(cut.kept)
    else:
        kept = {}
    if cut:
        tensors |= {
            f"dense {n}": p.detach()
            for n, p in cut.dense.named_parameters()
            if hash_tensor(p) != source.get(n)
        }
    tensors |= {f"kept {place}": units for place, units in enumerate(kept.values())}
    tensors |= {f"score {place}": score for place, score in enumerate(program.scores.values())}
    for name, one in program.sparse.items():
        kinds = {"norms": one.norms, "removed": one.removed}
        tensors |= {
            f"{kind} {name}": tensor for kind, tensor in kinds.items() if tensor is not None
        }
    return Entry(
        tensors,
        {
            "history": [dataclasses.asdict(step) for step in program.history],
            "scores": list(program.scores),
            "kept": list(kept),
            "dropped": list(cut.dropped) if cut else [],
            "cut": cut is not None,
            "sparse": to_json(program.sparse),
            "branches": {
                name: list(one.branch) for name, one in program.sparse.items() if one.branch
            },
            "digests": list(held.items()),
            "graph": graph_digest(program),
        },
    )


def rebuild_program(source: Program, entry: Entry) -> Program:
    """The Program of which ``state_of`` gave the entry.

    Args:
        source: as it was captured.

    Raises:
        NotTheSame: what the replay gives is not what was stored.
    """
    facts = entry.facts
    dense = _put_values(source, _entries_under("dense ", entry))
    kept = {name: entry.tensors[f"kept {place}"] for place, name in enumerate(facts["kept"])}
    values = _entries_under("now ", entry)
    sparse = _restore_sparse(entry)
    branches = {
        name: (values[one.branch[0]], values[one.branch[1]])
        for name, one in sparse.items()
        if one.branch
    }
    program = _put_values(
        _replay_edits(dense, kept, facts["dropped"], branches, facts["graph"]), values
    )
    _check_facts(program, facts)
    return program.replace(
        cut=Cut(dense, MappingProxyType(kept), tuple(facts["dropped"])) if facts["cut"] else None,
        history=tuple(Step(**step) for step in facts["history"]),
        scores={
            name: entry.tensors[f"score {place}"] for place, name in enumerate(facts["scores"])
        },
        sparse=sparse,
    )


def _restore_sparse(entry: Entry) -> SparseWeights:
    found = entry.tensors
    branches = entry.facts.get("branches", {})
    kept = from_json(entry.facts["sparse"]).items()
    return {
        name: dataclasses.replace(
            one,
            norms=found.get(f"norms {name}"),
            removed=found.get(f"removed {name}"),
            branch=tuple(branches[name]) if name in branches else None,
        )
        for name, one in kept
    }


def _put_values(program: Program, values: Mapping[str, Tensor]) -> Program:
    if values:
        return with_parameters(program, values)
    return program


def _entries_under(prefix: str, entry: Entry) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in entry.tensors.items()
        if name.startswith(prefix)
    }


def _replay_edits(
    dense: Program,
    kept: Mapping[str, Tensor],
    dropped: list[str],
    branches: Mapping[str, Branch],
    graph: str,
) -> Program:
    """The edits once more: blocks together, or one after another where a block went after a part of
    it."""
    edit: Edit = {name: kept[name] for name in kept}
    for steps in ([dropped], [[name] for name in dropped]):
        program = dense
        for names in steps:
            if names:
                program = drop(program, names)
            else:
                program = program
        if edit:
            program = keep(program, edit)
        else:
            program = program
        if branches:
            program = add_branches(program, branches)
        else:
            program = program
        if graph_digest(program) == graph:
            return program
    raise StateMismatch("the replayed edits give another graph")


def _check_facts(program: Program, facts: JSON) -> None:
    found = list(hash_parameters(program).items())
    stored = [(name, value) for name, value in facts["digests"]]
    if found != stored:
        wrong = sorted({name for name, _ in {*found} ^ {*stored}})
        raise StateMismatch(
            f"{wrong[0] if wrong else 'the order of the parameters'} is not what it was"
        )
