"""The commands ``secateur generate`` and ``secateur package``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.graph.program import JSON
from secateur.graph.reading import reason_of
from secateur.passes.lowering.lower import DTYPES
from secateur.passes.opening import open_tokenizer
from secateur.runtime.packed.store import as_json as layers_json
from secateur.runtime.save.artifact import check_target
from secateur.runtime.save.branches import checkpoint_in
from secateur.runtime.serving.engine import Engine, Generation, StockEngine, open_engine
from secateur.runtime.serving.package import is_package, write_package
from secateur.tools.commands import common as opening
from secateur.tools.commands.common import Debug, Force, Json, Overwrite, Verbose
from secateur.tools.report.console import BadInput, before_work
from secateur.tools.report.lowering import layer_tables
from secateur.tools.report.units import format_bytes

Folder = Annotated[
    str,
    typer.Argument(help="A saved model, a package, or any checkpoint folder or Hugging Face id."),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="Of dense weights: float32, bfloat16, float16 (default: as stored)."),
]


def generate_command(
    model: Folder,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to go on from; - reads stdin.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="What the draws derive from.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")
    ] = None,
    dtype: Dtype = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Run the stock checkpoint, not the packed weights.")
    ] = False,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="Compile the decode step (default: on CUDA only)."
        ),
    ] = None,
    trust_code: Annotated[
        bool,
        typer.Option(
            "--trust-code",
            help="Run a package's machine code though it was not compiled here by you.",
        ),
    ] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Tell what each layer runs on.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Open the model and tell what would run.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Go on from a prompt, with the text as it comes and tokens a second at the end."""
    voice = opening.start_command(as_json, verbose)
    with before_work():
        text = prompt
        if prompt == "-":
            text = sys.stdin.read()
        tokenizer = read_tokenizer(model)
        ids = prompt_ids(tokenizer, text, chat)
        with voice.waiting(f"opening {model}"):
            packed = None
            if dense:
                packed = False
            engine = open_engine(
                model,
                device=device,
                dtype=check_dtype(dtype),
                packed=packed,
                compiled=compiled,
                trust_code=trust_code,
            )
    facts = describe_engine(engine)
    voice.note(f"{facts['engine']}, weights {format_bytes(facts['weight_bytes'])}")
    if dry_run:
        voice.result(
            {**facts, "prompt_tokens": ids.shape[1], "max_new_tokens": max_new_tokens},
            engine_tables(engine),
        )
        return
    writer = Writer(tokenizer, quiet=as_json)
    generation = engine.generate(
        ids.to(engine.device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        on_token=writer.token,
    )
    writer.end()
    tables = list[Table]()
    if layers:
        tables = engine_tables(engine)
    voice.result(result_json(generation, tokenizer, text, facts), tables)
    voice.note(speed_line(generation))


def package_command(
    model: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the package.")],
    length: Annotated[
        int, typer.Option(min=8, help="Longest sequence, prompt and new tokens together.")
    ] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded at once.")] = 1,
    dtype: Dtype = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Package the stock checkpoint, not the packed weights.")
    ] = False,
    overwrite: Overwrite = False,
    force: Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Open the model and tell what would be done.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Compile prefill and decode steps ahead of time, for this machine; the package needs no model
    code to run."""
    voice = opening.start_command(as_json, verbose)
    with before_work():
        opening.refuse_force(force)
        check_target(output, overwrite=overwrite, inputs=[model])
        if is_package(Path(model).expanduser()):
            raise BadInput(f"{model} is a package already")
        with voice.waiting(f"opening {model}"):
            packed = None
            if dense:
                packed = False
            engine = open_engine(model, dtype=check_dtype(dtype), packed=packed, compiled=False)
        assert isinstance(engine, StockEngine)
    facts = {**describe_engine(engine), "length": length, "batch": batch, "output": str(output)}
    voice.note(
        f"packaging {facts['engine']}: two compilations, a minute or more each for a large graph"
    )
    if dry_run:
        voice.result(facts, engine_tables(engine))
        return
    source = None
    if Path(model).is_dir():
        source = Path(model)
    package = write_package(
        engine.model,
        output,
        length=length,
        batch=batch,
        source=source,
        overwrite=overwrite,
        tell=voice.note,
    )
    voice.result({**facts, "compiled_for": package.compiled_for}, [])
    voice.note(f"written: {output}")


class Writer:
    """Writes text to stdout as soon as its letters are whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, quiet: bool) -> None:
        self.tokenizer = tokenizer
        self.quiet = quiet
        self.ids = list[int]()
        self.shown = ""

    def token(self, column: Tensor) -> None:
        """One more token of the first sequence."""
        self.ids.append(int(column.flatten()[0]))
        text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        if not self.quiet and not text.endswith("\ufffd"):
            sys.stdout.write(text[len(self.shown) :])
            sys.stdout.flush()
            self.shown = text

    def end(self) -> None:
        """What is left, and the end of the line."""
        if not self.quiet:
            text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
            sys.stdout.write(text[len(self.shown) :] + "\n")
            sys.stdout.flush()


def read_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; no code of the folder is run.

    Raises:
        BadInput: there is none that opens.
    """
    folder = Path(model).expanduser()
    name = model
    if folder.is_dir():
        name = str(checkpoint_in(folder))
    tokenizer: PreTrainedTokenizerBase = open_tokenizer(name, BadInput)
    return tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> Tensor:
    """[1, T] token ids of a prompt.

    Raises:
        BadInput: no token, or no chat template.
    """
    if chat:
        try:
            turns = [{"role": "user", "content": text}]
            text = str(
                tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            )
        except Exception as error:  # a template is a program in a sandbox, and raises what it likes
            raise BadInput(
                f"the model has no chat template that works: {reason_of(error)}"
            ) from error
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise BadInput("the prompt is empty: give --prompt with some text")
    return torch.tensor([ids])


def describe_engine(engine: Engine) -> JSON:
    """What would run."""
    layers = list[JSON]()
    if isinstance(engine, StockEngine):
        layers = layers_json(engine.layers)
    return {
        "engine": engine.name,
        "device": str(engine.device),
        "weight_bytes": engine.nbytes,
        "layers": layers,
    }


def engine_tables(engine: Engine) -> list[Table]:
    """What each layer runs on, for people."""
    if isinstance(engine, StockEngine):
        return layer_tables(engine.layers)
    return []


def result_json(
    generation: Generation, tokenizer: PreTrainedTokenizerBase, prompt: str, facts: JSON
) -> JSON:
    """What ``generate --json`` tells."""
    new = generation.ids[0, generation.prompt_tokens :].tolist()
    return {
        "prompt": prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "ids": new,
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": generation.new_tokens,
        "tokens_per_s": generation.tokens_per_s,
        "prefill_seconds": generation.prefill_seconds,
        "decode_seconds": generation.decode_seconds,
        **facts,
    }


def speed_line(generation: Generation) -> str:
    """One line about the speed, with what it was measured on."""
    prompt = f"{generation.prompt_tokens} prompt tokens in {generation.prefill_seconds:.2f} s"
    speed = f"{generation.tokens_per_s:.1f} tokens/s after the first"
    return f"{prompt}, {generation.new_tokens} new tokens, {speed}, batch 1"


def check_dtype(name: str | None) -> str | None:
    """The name of a dtype that models compute in, or None.

    Raises:
        BadInput: another name.
    """
    if name not in (None, *DTYPES):
        raise BadInput(f"--dtype {name}: one of {', '.join(DTYPES)}")
    return name
