"""Repair: a least-squares refit of the layers that consume pruned groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Literal

import torch
from torch import Tensor

from secateur.graph import Program, with_parameters
from secateur.passes.base import JSON, Context, Cost, Pass, PassResult
from secateur.passes.calibration.data import CalibrationError
from secateur.passes.calibration.lockstep import Lockstep, offload_tensor
from secateur.passes.repair.sites import Site, Target, find_sites
from secateur.passes.solvers.ridge import Fit, Products, fit_damped
from secateur.passes.storage.journal import Entry, Journal

HELD_BACK = 5  # one sequence in so many chooses the damping or judges


@dataclass(frozen=True)
class Repair(Pass):
    """Ridge least squares for every linear op that consumes a pruned group.  Numerics: lossy.

    In the order of the graph, on the inputs that the already pruned and repaired model produces,
    the weight becomes W + D, where D minimises |T - X (W + D)^T|^2 + damping |D diag(s)|^2 and s is
    the root of each input's energy.  One calibration sequence in five is held back: half of these
    choose the damping and are then fitted, too; the others judge, and must gain by the final fit,
    or the weight stays as it is.  Weights that several ops share and fused experts are left alone,
    by name.

    target: T: own (what the op gave in the dense model) or stream (what makes the sum that the op's
        result is added to that of the dense model, so that earlier errors are corrected too; where
        there is no such sum, own).
    bias: refit biases along with the weights, where the op has one.
    offload: hold activations and new weights in memory-mapped files.  Pages stay resident while
        memory is free and may be dropped where it is not; what must be held is one sequence and one
        layer.

    Source:
        Meng et al. 2024 (OSSCAR), arXiv:2403.12983, section 3; the damped form and the centre are
        ours.
    """

    name: ClassVar[str] = "repair"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "lossy"
    uses: ClassVar[frozenset[str]] = frozenset({"cut"})
    ends: ClassVar[frozenset[str]] = frozenset({"scores"})
    bars: ClassVar[Mapping[str, str]] = {
        "sparse": "weights are sparse, and a refit would fill their zeros: put repair before, "
        "reconstruct after it"
    }

    target: Target = "stream"
    bias: bool = True
    offload: bool = False

    @property
    def needs_data(self) -> bool:
        """Always: refits are solved on calibration tokens."""
        return True

    @property
    def least_sequences(self) -> int:
        """Some are held back to check."""
        return 2

    @property
    def cost(self) -> Cost:
        """Forward passes of both models, and six square matrices of the widest input."""
        if self.offload:
            return Cost(3.0, 0.0, solves=6, files=2.0, holds_files=2)
        return Cost(3.0, 4.0, holds=2, solves=6, files=1.0)

    def requires(self, program: Program) -> list[str]:
        """Reasons why the pass cannot run; a refit needs weights.

        Args:
            program: pruned.
        """
        reasons = super().requires(program)
        if any(p.is_meta for _, p in program.named_parameters()):
            reasons.append("the weights are on the meta device: open the model with weights")
        return reasons

    def call(self, program: Program, context: Context) -> PassResult:
        """Refit each site in graph order.

        Args:
            program: pruned, with its cut.
            context: with calibration data.

        Raises:
            CalibrationError: fewer than two calibration sequences.
        """
        data = context.data or ()
        if len(data) < 2:
            raise CalibrationError(
                "repair needs two calibration sequences or more: one is held back to check the fit"
            )
        assert program.cut is not None
        sites, refused = find_sites(program, self.target, self.bias)
        for name, reason in refused.items():
            context.log.info("repair leaves %s alone: %s", name, reason)
        journal = Journal(context.resume)
        parameters = dict(program.named_parameters())
        values: dict[str, Tensor] = {}
        figures: JSON = {}
        with ExitStack() as stack:
            folder = None
            if self.offload:
                folder = Path(stack.enter_context(TemporaryDirectory(dir=journal.ensure_folder)))
            dense = Lockstep(program.cut.dense, data, folder)
            pruned = Lockstep(program, data, folder)
            for site in context.progress(sites, "repair", len(sites)):
                entry = journal.read(site.parameter)
                if entry is None:
                    fit = fit_damped(
                        *_accumulate_products(site, dense, pruned, parameters, len(data))
                    )
                    entry = Entry(_refitted_parameters(site, fit, parameters), _fit_metrics(fit))
                    journal.write(site.parameter, entry.tensors, entry.facts)
                if not entry.tensors:
                    context.log.info(
                        "repair leaves %s alone: no fit serves the held-back tokens", site.parameter
                    )
                pruned.advance_to(site.node.name)
                figures[site.parameter] = entry.facts
                for name, value in entry.tensors.items():
                    values[name] = offload_tensor(value.to(parameters[name].device), folder)
                    pruned.replace_parameter(
                        name,
                        values[name],
                        site.chain if name == site.parameter else site.bias_chain,
                    )
        if values:
            repaired = with_parameters(program, values).replace(scores={})
        else:
            repaired = program
        summary = {
            "tokens": sum(s.tokens for s in data),
            "sequences": len(data),
            "left_alone": refused,
        }
        return PassResult(repaired, bool(values), {**summary, "consumers": figures})


def _accumulate_products(
    site: Site,
    dense: Lockstep,
    pruned: Lockstep,
    parameters: dict[str, torch.nn.Parameter],
    count: int,
) -> tuple[Products, Products, Products]:
    """The sums for one site: over the sequences to fit on, over those that choose the damping, and
    over those that judge.  Where one sequence alone is held back, its first half chooses and its
    second judges."""
    dense.advance_to(site.target)
    pruned.advance_to(site.node.name)
    device = parameters[site.parameter].device
    shape = (len(site.keep_in), len(site.keep_out), site.bias is not None, device)
    seen = Products(*shape)
    chooser = Products(*shape)
    judge = Products(*shape)
    back = sorted(held_back_sequences(count))
    for sample in range(count):
        x = pruned.node_value(sample, site.x.name)
        wanted = dense.node_value(sample, site.target)
        got = pruned.node_value(sample, site.node.name)
        others = []
        for other in site.others:
            others.append(_as_rows(pruned.node_value(sample, other.name)))
        residual = _as_rows(wanted).index_select(-1, site.keep_out.to(device)) - sum(
            others, start=_as_rows(got)
        )
        rows = _as_rows(x)
        if sample not in back:
            seen.add_rows(rows, residual)
        elif len(back) > 1:
            (judge if back.index(sample) % 2 else chooser).add_rows(rows, residual)
        else:
            half = len(rows) // 2
            chooser.add_rows(rows[:half], residual[:half])
            judge.add_rows(rows[half:], residual[half:])
    return seen, chooser, judge


def held_back_sequences(count: int) -> set[int]:
    """Which of ``count`` sequences are held back: one in five, at least one, spread evenly.

    Args:
        count: number of sequences.

    Returns:
        indices of sequences.
    """
    wanted = max(1, count // HELD_BACK)
    return {(2 * i + 1) * count // (2 * wanted) for i in range(wanted)}


def _as_rows(value: Tensor) -> Tensor:
    """[..., channels] as [tokens, channels] in float32 or better."""
    return value.reshape(-1, value.shape[-1]).to(torch.promote_types(value.dtype, torch.float32))


def _refitted_parameters(
    site: Site, made: Fit, parameters: dict[str, torch.nn.Parameter]
) -> dict[str, Tensor]:
    """The new values of the site's weight and bias, in their dtypes."""
    if made.delta_NK is None:
        return {}
    delta_NK = made.delta_NK[:, : len(site.keep_in)]
    weight = parameters[site.parameter].detach()
    changed = {site.parameter: _add_delta(weight, delta_NK.T if site.turned else delta_NK)}
    if site.bias is not None:
        changed[site.bias] = _add_delta(parameters[site.bias].detach(), made.delta_NK[:, -1])
    return changed


def _add_delta(value: Tensor, delta: Tensor) -> Tensor:
    """The value plus a change, in its own dtype."""
    return (value.double() + delta).to(value.dtype).contiguous()


def _fit_metrics(made: Fit) -> JSON:
    """Root of the held-back error that is left, relative to the one before, and the damping; None:
    left alone."""
    if made.before > 0:
        error = math.sqrt(max(made.after, 0.0) / made.before)
    else:
        error = 1.0
    return {
        "error": round(error, 4),
        "damping": made.damping if made.delta_NK is not None else None,
    }
