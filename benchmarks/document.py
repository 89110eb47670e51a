"""The one form in which every benchmark writes its figures, so that a later run can be held against it."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
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
    made.add_argument("--json", type=Path, metavar="FILE", help="write the document to this file")
    return made


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


def report(benchmark: str, rows: Sequence[Row], path: Path | None) -> None:
    """Prints the rows, and writes the document where a file is named."""
    written = document(benchmark, rows)
    for row in rows:
        print(f"{row.name:50} {row.value:>14,.3f} {row.unit}")
    if path is not None:
        path.write_text(json.dumps(written, indent=2, allow_nan=False) + "\n")


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
