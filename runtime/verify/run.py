"""The checks in their order, and what they need of each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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
        folder: to be read.
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
    num_bytes = 0
    if outcomes["checkpoint"].level != "fault":
        num_bytes = subject.num_bytes
    counted = subject.__dict__.get("tensors", {})  # empty where nothing could be counted
    verification = Verification(
        folder=path,
        outcomes=tuple(outcomes.values()),
        tensors=tuple(counted.values()),
        num_bytes=num_bytes,
        count_seconds=subject.count_seconds,
        seconds=0.0,
    )
    if is_branched(path):
        base = verify_folder(path / BASE, quick=quick, progress=progress)
        verification = _with_base(verification, base)
    return replace(verification, seconds=time.perf_counter() - began)


def _with_base(verification: Verification, base: Verification) -> Verification:
    """Add what was found in the checkpoint that a folder holds beside its branches."""
    renamed = []
    for outcome in base.outcomes:
        renamed.append(Outcome(f"{BASE}: {outcome.check}", outcome.findings))
    return replace(
        verification,
        outcomes=(*verification.outcomes, *renamed),
        tensors=verification.tensors + base.tensors,
        num_bytes=verification.num_bytes + base.num_bytes,
        count_seconds=verification.count_seconds + base.count_seconds,
    )


def find_stored_faults(folder: Path, sparse: SparseWeights) -> list[str]:
    """What is wrong with stored weights that are said to be sparse; for a folder that is just being
    written.

    Args:
        folder: of the checkpoint.
        sparse: by the names that the weights are stored under.

    Returns:
        A sentence for each fault.
    """
    claims = []
    for name, weight in sparse.items():
        claims.append(Claim("the program", name, weight.pattern))
    subject = Subject(folder, given=tuple(claims))
    outcomes = dict[str, Outcome]()
    for name in ("checkpoint", *STORED):
        outcomes[name] = _run_check(name, CHECKS[name], subject, outcomes)
    faults = list[str]()
    for outcome in outcomes.values():
        faults += [finding.says for finding in outcome.findings if finding.level == "fault"]
    return faults


def _run_check(name: str, check: Check, subject: Subject, before: Mapping[str, Outcome]) -> Outcome:
    """What a check found, or that it could not be asked."""
    if broken := [need for need in check.needs if before[need].level == "fault"]:
        return Outcome(
            name, (Finding("note", f"not looked at: first mend {' and '.join(broken)}"),)
        )
    findings = list[Finding]()
    try:
        findings.extend(check.ask(subject))
    except (SecateurError, OSError) as error:
        findings.append(Finding("fault", str(error), FETCH_AGAIN))
    assert findings, f"the check of {name} said nothing"
    return Outcome(name, tuple(findings))
