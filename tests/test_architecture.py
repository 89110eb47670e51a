"""The plan of the house, held against the code: import rules, module sizes, work at import time, forbidden rooms."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("streams", "trainer", "retriever", "streamtower")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
CORE = {
    "streams": ("contract", "validate", "frequency", "decayed_counts", "drift", "history", "batcher"),
    "trainer": ("contract", "towers", "rewards", "negatives", "loss", "training", "step", "evaluate"),
}


def test_imports_run_against_the_data() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_rules_name_every_private_module() -> None:
    """A new module is private until it is said to be public: the rules must list it."""
    rules = (ROOT / ".importlinter").read_text()
    public = {f"streams.{name}" for name in ("contract", "hash_table", "kernel", "service")}
    public |= {"trainer.contract", "trainer.towers"}
    for package in ("streams", "trainer"):
        for path in (ROOT / package).glob("*.py"):
            name = f"{package}.{path.stem}"
            if path.stem not in ("__init__", "__main__") and name not in public:
                assert f"    {name}\n" in rules, f"{name} is missing from .importlinter's list of private modules"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_its_station_and_stays_short(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    assert len(text.splitlines()) <= 400, f"{path} is over 400 lines"
    assert path.stem not in ("common", "utils", "helpers", "base"), f"{path} is a drawer, not a room"


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=str)
def test_a_package_face_holds_only_a_docstring(path: Path) -> None:
    assert len(ast.parse(path.read_text()).body) == 1


@pytest.mark.parametrize("module", [f"{package}.{name}" for package, names in CORE.items() for name in names])
def test_the_core_loads_no_library_of_the_edges(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print(*({'faust','aiokafka','confluent_kafka','qdrant_client','prometheus_client','pydantic_settings'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_the_loop_tells_its_story_in_under_120_lines() -> None:
    assert len((ROOT / "trainer" / "loop.py").read_text().splitlines()) < 120


def test_product_code_does_not_know_the_dev_stack() -> None:
    for path in MODULES:
        if path.relative_to(ROOT).parts[0] != "streamtower":
            text = path.read_text()
            for name in ("qdrant_edge", "calfkit", "streamtower"):
                assert f"import {name}" not in text and f"from {name}" not in text, f"{path} imports {name}"
