"""A whole run for users of Python: the passes with all that they may ask for, resumable, and the
proved result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from secateur.graph import Program
from secateur.graph.errors import PipelineError
from secateur.passes import Pipeline, Progress, samples
from secateur.passes.calibration.data import Batch
from secateur.runtime.resume.folder import RUN, hold_work_folder, is_at_work
from secateur.runtime.save.artifact import check_target
from secateur.runtime.save.stock_checkpoint import SaveReport, save
from secateur.runtime.save.target import inputs_of
from secateur.runtime.stock.to_transformers import to_transformers

log = logging.getLogger(__name__)


def compress(
    program: Program,
    pipeline: Pipeline | str,
    output: str | Path,
    data: Iterable[Batch] | None = None,
    *,
    progress: Progress | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    check: bool = True,
    packed: bool = True,
    restart: bool = False,
    keep_work: bool = False,
    tell: Callable[[str], None] = log.info,
) -> SaveReport:
    """Run a pipeline and save the result as a stock checkpoint.  A run that was killed goes on
    where it was when the same call is made again, and ends with the same weights, bit for bit.

    Args:
        pipeline: or its text.
        output: folder to be made; ``<output>.work`` beside it keeps the run's state.
        data, progress, seed: as ``Pipeline.run``.
        overwrite, check, packed: as ``save``.
        restart: forget what an earlier run kept.
        keep_work: leave the run's state beside the output, so that passes can be appended.
        tell: gets a line where the run goes on from something kept.

    Raises:
        PipelineError, CalibrationError: cannot run as asked.
        ResumeError: the kept run was begun with something else, or another process is at work
            there.
        UnsupportedConfigError, ArtifactError: as ``save``.
    """
    if isinstance(pipeline, str):
        pipeline = Pipeline.parse(pipeline)
    else:
        pipeline = pipeline
    inputs = [program.source.folder, *inputs_of(pipeline)]
    check_target(output, overwrite=overwrite or is_at_work(output), inputs=inputs)
    if reasons := pipeline.requires(program):
        raise PipelineError("; ".join(reasons))
    if seed is None:
        seed = pipeline.seed
    else:
        seed = seed
    batches = data if data is None or isinstance(data, Tensor | Mapping) else list(data)
    read = None
    if batches is not None and pipeline.needs_data:
        read = samples(batches, program)
    with hold_work_folder(
        output, program, pipeline, read, seed, restart=restart, keep_work=keep_work, tell=tell
    ) as work:
        overwrite = overwrite or work.made(output)
        check_target(output, overwrite=overwrite, inputs=inputs)
        smaller = pipeline.run(
            program, batches, progress, seed=seed, raise_model=to_transformers, checkpoints=work
        )
        return save(
            smaller,
            output,
            overwrite=overwrite,
            check=check,
            packed=packed,
            figures={RUN: work.run},
        )
