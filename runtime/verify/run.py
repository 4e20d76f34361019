"""The checks in their order, and what they need of each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from secateur.graph.errors import SecateurError, SourceError
from secateur.graph.sparse import SparseWeights
from secateur.runtime.save.branches import BASE, is_branched
from secateur.runtime.verify import checks
from secateur.runtime.verify.claims import Claim
from secateur.runtime.verify.findings import Finding, Outcome, Verification
from secateur.runtime.verify.reloading import check_reload
from secateur.runtime.verify.subject import Progress, Subject

FETCH_AGAIN = "Fetch, copy or save the model again"


@dataclass(frozen=True)
class Check:
    """One question about a folder.
    needs: checks that must have found no fault before.
    """

    ask: Callable[[Subject], Iterator[Finding]]
    needs: tuple[str, ...] = ()


CHECKS: Mapping[str, Check] = {
    "files": Check(checks.check_files),
    "checkpoint": Check(checks.check_checkpoint),
    "numbers": Check(checks.check_numbers, ("checkpoint",)),
    "patterns": Check(checks.check_patterns, ("checkpoint",)),
    "packed weights": Check(checks.check_packed, ("checkpoint",)),
    "manifest": Check(checks.check_manifest),
    "configuration": Check(checks.check_configuration),
    "parameters": Check(checks.check_parameters, ("checkpoint", "configuration")),
    "reload": Check(check_reload, ("checkpoint", "configuration", "parameters")),
}
STORED = ("numbers", "patterns", "packed weights")


def verify_folder(
    folder: str | Path, *, quick: bool = False, progress: Progress = lambda items, *_: items
) -> Verification:
    """Read a model folder, of ours or not, and say whether it is what it claims to be; with the
    checkpoint in it, where the folder holds branches beside one.

    Nothing of the folder is run: no code, no pickle.  Tensors are read one after another, so that a
    folder may be larger than memory, but for the last check, which opens the model as its users do.

    Args:
        quick: leave out that check.
        progress: wraps what takes long.

    Raises:
        SourceError: it is no folder.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise SourceError(f"{path} is no folder: give a folder with a model in it")
    began = time.perf_counter()
    subject = Subject(path, digests=not quick, progress=progress)
    outcomes = dict[str, Outcome]()
    for name, check in CHECKS.items():
        if not (quick and name == "reload"):
            outcomes[name] = _run_check(name, check, subject, outcomes)
    inner = None
    if is_branched(path):
        inner = verify_folder(path / BASE, quick=quick, progress=progress)
    found = tuple(outcomes.values()) + (_run_checks(BASE, inner.outcomes) if inner else ())
    sound = outcomes["checkpoint"].level != "fault"
    tensors = tuple(
        subject.__dict__.get("tensors", {}).values()
    )  # of what was counted, if anything could be
    return Verification(
        folder=path,
        outcomes=found,
        tensors=tensors + (inner.tensors if inner else ()),
        num_bytes=(subject.num_bytes if sound else 0) + (inner.num_bytes if inner else 0),
        count_seconds=subject.count_seconds + (inner.count_seconds if inner else 0.0),
        seconds=time.perf_counter() - began,
    )


def _run_checks(folder: str, outcomes: tuple[Outcome, ...]) -> tuple[Outcome, ...]:
    return tuple(Outcome(f"{folder}: {one.check}", one.findings) for one in outcomes)


def find_stored_faults(folder: Path, sparse: SparseWeights) -> list[str]:
    """What is wrong with stored weights that are said to be sparse; for a folder that is just being
    written.

    Args:
        sparse: by the names that the weights are stored under.
    """
    claims = tuple(Claim("the program", name, one.pattern) for name, one in sparse.items())
    subject = Subject(folder, given=claims)
    outcomes = dict[str, Outcome]()
    for name in ("checkpoint", *STORED):
        outcomes[name] = _run_check(name, CHECKS[name], subject, outcomes)
    return [
        one.says
        for outcome in outcomes.values()
        for one in outcome.findings
        if one.level == "fault"
    ]


def _run_check(name: str, check: Check, subject: Subject, before: Mapping[str, Outcome]) -> Outcome:
    """What a check found, or that it could not be asked."""
    if broken := [need for need in check.needs if before[need].level == "fault"]:
        return Outcome(
            name, (Finding("note", f"not looked at: first mend {' and '.join(broken)}"),)
        )
    found = list[Finding]()
    try:
        found.extend(check.ask(subject))
    except (SecateurError, OSError) as error:
        found.append(Finding("fault", str(error), FETCH_AGAIN))
    assert found, f"the check of {name} said nothing"
    return Outcome(name, tuple(found))
