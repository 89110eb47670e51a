"""The form of every benchmark's document."""

from __future__ import annotations

import json
import math
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks
from benchmarks.chain import Step
from benchmarks.document import Row, commit, document, report

PARTS = {"document", "whole_score"}
"""What benchmarks have in common: not run by itself."""
MODULES = [module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name not in PARTS]


def test_a_document_says_what_was_measured_where_and_with_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report("chain", [Row("chain.speed", 1234.5, "clicks/s")], tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert set(written) == {"benchmark", "commit", "machine", "versions", "rows"}
    assert written["benchmark"] == "chain"
    assert written["commit"] == commit()
    assert written["machine"]["processors"] >= 1
    assert written["versions"]["torch"]
    assert written["rows"] == [{"name": "chain.speed", "value": 1234.5, "unit": "clicks/s"}]
    assert capsys.readouterr().out.split() == ["chain.speed", "1,234.500", "clicks/s"]


@pytest.mark.parametrize("names", [["speed"], ["loss.speed"], ["chain.speed", "chain.speed"]])
def test_a_row_has_a_name_of_its_own_below_the_benchmarks(names: list[str]) -> None:
    with pytest.raises(ValueError, match="begin with chain"):
        document("chain", [Row(name, 1.0, "x") for name in names])


def test_a_figure_that_was_not_measured_is_no_row() -> None:
    with pytest.raises(ValueError, match="measured nothing"):
        Row("chain.speed", math.nan, "x")


@pytest.mark.parametrize(
    ("learnt", "under_way", "sustained"), [(1000.0, 2000.0, True), (949.0, 0.0, False), (1000.0, 2001.0, False)]
)
def test_a_rate_is_sustained_if_learning_keeps_up_and_little_is_under_way(
    learnt: float, under_way: float, sustained: bool
) -> None:
    assert Step(1000.0, learnt, under_way, 1.0).sustained is sustained


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_takes_the_same_option(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--json [FILE]" in done.stdout


def test_without_a_file_standard_output_is_the_document_alone() -> None:
    """This benchmark prints while it runs, too."""
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--json", "--items", "1000", "--checkpoints", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    written = json.loads(done.stdout)
    assert written["benchmark"] == "checkpoint"
    told = [line.split()[0] for line in done.stderr.splitlines() if line.startswith("checkpoint.")]
    assert [row["name"] for row in written["rows"]] == told
    assert "c00" in done.stderr, "what it prints while it runs"


@pytest.mark.parametrize(("name", "data"), [("quality", []), ("freshness", ["--data", "/nowhere"])])
def test_data_that_are_not_there_are_asked_for(name: str, data: list[str]) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", "--sets", "opam", *data]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("opam: give --data a directory with opam/ ")
