"""Whether a stock class will hold what comes out, as far as shapes tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from secateur.graph import Program, SecateurError
from secateur.passes import Pipeline, PlannedEdit
from secateur.runtime import ConfigPlan
from secateur.runtime.stock.constants import describe_changes
from secateur.runtime.stock.incompatibility import UnseenParametersError

Stock = Callable[[Program], ConfigPlan | None]


@dataclass(frozen=True)
class StockFit:
    """What a stock class makes of the planned result.

    misfit: why none can hold it, or None.
    doubt: why one that holds it may compute something else, which only outputs can tell; or None.
    depends: what is measured decides whether one can hold it, and which way; or None.
    rounding_helps: whether other unit counts could make the misfit fit.
    """

    misfit: str | None = None
    doubt: str | None = None
    depends: str | None = None
    rounding_helps: bool = True


def plan_fit(
    pipeline: Pipeline, stages: Sequence[Program], edits: Sequence[PlannedEdit], stock: Stock
) -> StockFit:
    """Ask for the stock class of the planned shapes, and of others that may come out instead.

    Args:
        stages: shapes of the Program before the first pass and after each.
        edits: units kept by each group.
        stock: see ``make_plan``.
    """
    planned = stages[-1]
    fit = _ask_class(planned, stock)
    if all(edit.exact for edit in edits) and not _measures_depth(pipeline):
        return fit
    uneven = pipeline.preview_uneven(stages[0])
    if _shapes(uneven) == _shapes(planned):
        return fit
    other = _ask_class(uneven, stock)
    by_width = any(not edit.exact and edit.family != "blocks" for edit in edits)
    if by_width and fit.misfit is None and other.misfit is not None:
        return StockFit(
            f"the scores give each layer a size of its own ({_name_uneven(pipeline)}), and "
            f"{other.misfit}: uniform=true of prune-width gives them one, and fill-widths at the "
            "end brings layers of different sizes to the widest",
            rounding_helps=False,
        )
    if (fit.misfit is None) != (other.misfit is None):
        return StockFit(
            doubt=fit.doubt,
            depends="which blocks go is measured, and of some choices the stock class says: "
            f"{fit.misfit or other.misfit}",
        )
    return fit


def _ask_class(program: Program, stock: Stock) -> StockFit:
    """Misfit, doubt and whether rounding helps, for one set of shapes."""
    if program.source.config is None:
        return StockFit()
    try:
        plan = stock(program)
    except (SecateurError, ValueError) as error:
        helps = not isinstance(error, UnseenParametersError)
        return StockFit(str(error), rounding_helps=helps)
    if plan is None:
        return StockFit()
    return StockFit(doubt=describe_changes(plan.constants).strip() or None)


def _measures_depth(pipeline: Pipeline) -> bool:
    """Whether a pass chooses by measurement which blocks go."""
    return any(one.name == "prune-depth" and one.needs_data for one in pipeline.passes)


def _name_uneven(pipeline: Pipeline) -> str:
    """The passes that give layers sizes of their own, with the option that does."""
    names = []
    for one in pipeline.passes:
        if getattr(one, "uniform", None) is False:
            names.append(f"{one.name}{{uniform=false}}")
        elif one.name == "allocate":
            names.append(one.name)
    return ", ".join(dict.fromkeys(names)) or "by a shared ranking"


def _shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """Shapes by name of parameter."""
    return {name: tuple(p.shape) for name, p in program.named_parameters()}
