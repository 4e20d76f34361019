"""``python -m secateur.tools.demo``: the same as ``secateur demo``."""

import typer

from secateur.tools.demo.command import demo_command

if __name__ == "__main__":
    typer.run(demo_command)
