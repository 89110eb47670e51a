"""Docs held to the code: pages made from it are current, links lead somewhere, commands and named tests exist."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
from prometheus_client.metrics_core import Metric
from pydantic_settings import BaseSettings

from ops import metrics_doc, settings_doc

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FOLDERS = ("streams", "trainer", "retriever", "streamtower", "ops", "docs", "tests", "benchmarks", ".ci")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_page_of_metrics_is_what_the_code_makes() -> None:
    assert metrics_doc.PAGE.read_text() == metrics_doc.render(), "run python -m ops.metrics_doc"


def test_the_page_of_settings_is_what_the_code_makes() -> None:
    assert settings_doc.PAGE.read_text() == settings_doc.render(), "run python -m ops.settings_doc"


FIELDS = [
    pytest.param(settings_class, name, id=f"{service}.{name}")
    for service, settings_class in settings_doc.settings_classes().items()
    for name in settings_class.model_fields
]


@pytest.mark.parametrize(("settings_class", "name"), FIELDS)
def test_every_setting_says_what_it_means(settings_class: type[BaseSettings], name: str) -> None:
    text = settings_class.model_fields[name].description
    assert text, "no docstring under the field (or no use_attribute_docstrings in the class that has it)"
    assert text.rstrip().endswith(".")


METRICS = [
    pytest.param(family, id=family.name)
    for registry in metrics_doc.registries().values()
    for family in registry.collect()
]


@pytest.mark.parametrize("family", METRICS)
def test_every_metric_says_what_it_is(family: Metric) -> None:
    assert family.documentation.rstrip().endswith(".")
    assert len(family.documentation.split()) >= 4


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^(?: {4}|\t).*$", "", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pages
def test_every_link_inside_the_project_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pages
def test_every_file_that_is_named_exists(page: Path) -> None:
    for name in re.findall(r"`([\w.\-/]+)`", prose(page)):
        if name.split("/")[0] in FOLDERS and "/" in name:
            assert (ROOT / name).exists(), name
    for name in re.findall(r"(?<![\w/`])((?:docs|ops|tests|benchmarks)/[\w./\-]+\.(?:md|py|yml|json))", prose(page)):
        assert (ROOT / name).exists(), name


@pages
def test_every_variable_that_is_named_is_a_setting(page: Path) -> None:
    known = {
        str(settings_class.model_config["env_prefix"]).upper() + name.upper()
        for settings_class in settings_doc.settings_classes().values()
        for name in settings_class.model_fields
    } | {"STREAMTOWER_TEST_KAFKA", "STREAMTOWER_TEST_QDRANT", "STREAMTOWER_KAFKA_HOME"}
    for name in re.findall(r"STREAMTOWER_[A-Z*]+_[A-Z_0-9]+\b(?!\*)", page.read_text()):
        pattern = re.escape(name).replace(r"\*", "[A-Z]+")
        assert any(re.fullmatch(pattern, setting) for setting in known), name


@pages
def test_every_metric_that_is_named_exists(page: Path) -> None:
    exposed = {
        sample.name for registry in metrics_doc.registries().values() for family in registry.collect()
        for sample in family.samples
    }  # fmt: skip
    histograms = {name.removesuffix("_bucket") for name in exposed if name.endswith("_bucket")}
    for name in re.findall(r"\bstreamtower_(?:streams|trainer|retriever)_\w+", page.read_text()):
        assert name in exposed | histograms, name


def commands(page: Path) -> list[str]:
    """Lines of code that start one of our commands."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).splitlines() + re.findall(r"^(?: {4}|\t)(.*)$", text, flags=re.MULTILINE)
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"\s*\n\s*", " ", prose(page)))
    lines = [line.strip().removeprefix("$ ").removeprefix(".venv/bin/") for line in lines]
    return [line for line in lines if re.match(r"(python3? (run\.py|-m) |streamtower )\w", line)]


def problem_of(command: str) -> str | None:
    """What is wrong with one of our commands, or None."""
    words = [word for word in shlex.split(command, comments=True) if word]
    while "&&" in words:
        words = words[: words.index("&&")]
    if words[:1] == ["streamtower"]:
        return _problem_of_streamtower(words[1:])
    if words[1] == "-m":
        if words[2] == "streamtower":
            return _problem_of_streamtower(words[3:])
        if words[2] not in ("pytest",) and importlib.util.find_spec(words[2]) is None:
            return f"no module {words[2]}"
        return None
    extras = next(
        node.value for node in ast.parse((ROOT / "run.py").read_text()).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "EXTRAS"
    )  # fmt: skip
    if words[2] not in ast.literal_eval(extras):
        return f"run.py has no command {words[2]}"
    return _problem_of_streamtower(words[2:]) if words[2] == "demo" else None


def _problem_of_streamtower(words: list[str]) -> str | None:
    from streamtower.__main__ import app

    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if len(words) > 1 and hasattr(known.get(words[0]), "commands"):
        known, words = known[words[0]].commands, words[1:]
    if not words or words[0] not in known:
        return f"streamtower has no command {words[:1]}"
    options = {option for parameter in known[words[0]].params for option in parameter.opts + parameter.secondary_opts}
    wrong = [word for word in words[1:] if word.startswith("--") and word.split("=")[0] not in options | {"--help"}]
    return f"streamtower {words[0]} has no option {wrong}" if wrong else None


@pages
def test_every_command_that_is_shown_exists(page: Path) -> None:
    wrong = {command: problem for command in commands(page) if (problem := problem_of(command))}
    assert wrong == {}


@pytest.mark.parametrize(
    "command",
    [
        "streamtower dance",
        "streamtower dead-letters bury",
        "streamtower topics --loud",
        "python3 run.py fly",
        "python -m streams.nowhere",
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str) -> None:
    assert problem_of(command)


def test_every_script_of_the_project_is_named_as_it_is_installed() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        assert set(tomllib.load(file)["project"]["scripts"]) == {"streamtower"}


def deviations() -> list[str]:
    """The numbered entries of docs/deviations.md."""
    text = (ROOT / "docs" / "deviations.md").read_text()
    return re.split(r"^(?=(?:#+ )?\d+\. )", text, flags=re.MULTILINE)[1:]


def test_deviations_are_numbered_without_gaps() -> None:
    numbers = [int(found[1]) for entry in deviations() if (found := re.match(r"(?:#+ )?(\d+)\. ", entry))]
    assert numbers
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_deviation_names_a_test_that_exists() -> None:
    for entry in deviations():
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", entry)
        assert named, f"no `tests/….py::test_…` in: {entry.splitlines()[0]}"
        for path, name in named:
            tree = ast.parse((ROOT / path).read_text())
            functions = {
                node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            }
            assert name in functions, f"{path}::{name}"
