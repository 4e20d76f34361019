"""Technical prose of two Debian packages, Vim's help and Git's manual: a second text to calibrate
on and measure with.

Run ``python benchmarks/technical_text.py --out FOLDER`` on a Debian-like system.  It fetches two
packages by name (nothing is installed), deals their files out by the SHA-256 of their names, cuts
them into pieces at empty lines, and writes calibration.jsonl and held-out.jsonl, a document a line.
Of different files, so of different documents.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES = {
    "vim-runtime": "usr/share/vim/vim*/doc/*.txt",
    "git-doc": "usr/share/doc/git/html/*.txt",
}
PIECE = 2_000  # characters of a document, about
HELD_OUT = 4  # one file in so many


def files(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every file of the packages, in the order of names."""
    for package, pattern in PACKAGES.items():
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
        (deb,) = folder.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", deb, folder / package], check=True)
        for file in sorted((folder / package).glob(pattern)):
            if file.is_file():
                yield f"{package}/{file.name}", file.read_text("utf-8", errors="replace")


def pieces(text: str) -> Iterator[str]:
    """The text cut at empty lines, into parts of PIECE characters or a little more."""
    part: list[str] = []
    for paragraph in text.split("\n\n"):
        part.append(paragraph)
        if sum(map(len, part)) >= PIECE:
            yield "\n\n".join(part)
            part = []
    if sum(map(len, part)) >= PIECE // 2:
        yield "\n\n".join(part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    sets: dict[str, list[str]] = {"calibration": [], "held-out": []}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files(Path(folder)):
            held = int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0
            sets["held-out" if held else "calibration"] += pieces(text)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, documents in sets.items():
        # In an order that has nothing to do with the files, so that a few windows hold pieces of
        # many.
        documents.sort(key=lambda document: hashlib.sha256(document.encode()).hexdigest())
        lines = [json.dumps({"text": document}) for document in documents]
        (options.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(documents)} documents, {sum(map(len, documents)):,} characters")


if __name__ == "__main__":
    main()
