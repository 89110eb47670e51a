"""The one form in which every benchmark writes its figures, so that a later run can be held against it."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamtower.machine import machine, versions


@dataclass(frozen=True)
class Row:
    """One figure. Names are dotted, begin with the benchmark's, and stay the same for ever."""

    name: str
    value: float
    unit: str

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"{self.name} is {self.value}: the benchmark has measured nothing")


def parser(benchmark: str, description: str) -> argparse.ArgumentParser:
    """A command line with the option that every benchmark has."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark}", description=description)
    made.add_argument(
        "--json",
        nargs="?",
        action=_Document,
        metavar="FILE",
        help="write the document to this file; alone: to standard output, and all else to standard error",
    )
    return made


class _Document(argparse.Action):
    """Takes the file's path; where none is given, keeps standard output for the document, as a file descriptor.

    Whatever else would be written there, by a library or a child as well, goes to standard error from then on.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if values is None:
            sys.stdout.flush()
            kept = os.dup(1)
            os.dup2(2, 1)
            setattr(namespace, self.dest, kept)
        else:
            setattr(namespace, self.dest, Path(str(values)))


def document(benchmark: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The document.

    Raises:
        ValueError: a row's name does not begin with the benchmark's, or two have the same.
    """
    names = [row.name for row in rows]
    wrong = [name for name in names if not name.startswith(f"{benchmark}.") or names.count(name) > 1]
    if wrong:
        raise ValueError(f"rows of {benchmark} need names of their own that begin with {benchmark}.: {wrong}")
    return {
        "benchmark": benchmark,
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }


def report(benchmark: str, rows: Sequence[Row], target: Path | int | None) -> None:
    """Prints the rows, and writes the document to what `--json` gave: a file, or a descriptor, which is closed."""
    written = document(benchmark, rows)
    for row in rows:
        print(f"{row.name:50} {row.value:>14,.3f} {row.unit}")
    if target is not None:
        with open(target, "w") as file:
            file.write(json.dumps(written, indent=2, allow_nan=False) + "\n")


def commit() -> str | None:
    """The commit that was measured, with a + where files differ from it; None outside a repository."""
    root = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
