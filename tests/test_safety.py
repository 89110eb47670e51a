"""What the product may not do, and what it may be made of: no code out of data, known versions, known licences."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import deque
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    path for package in ("streams", "trainer", "retriever", "streamtower") for path in (ROOT / package).rglob("*.py")
)
NOT_IMPORTED = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
NOT_CALLED = {"eval", "exec", "compile", "torch.load", "torch.save", "pd.read_pickle", "yaml.load", "os.system"}
WITHOUT_PICKLE = {"np.load", "np.save", "np.savez", "np.savez_compressed"}

INSTALLED_WITH = ("embedded", "evaluate")
"""Extras that users install; `dev` is for those who work on the project."""
NOT_PINNED = ("torch", "setuptools", "streamtower")
"""torch comes first, in the build that fits the machine; setuptools is asked for by it."""
OF_CUDA = ("nvidia", "triton", "cuda")
"""Come with torch's own builds for graphics cards, under NVIDIA's terms."""
LICENCES = {
    "0BSD", "3-Clause BSD License", "Apache Software License", "Apache-2.0", "Apache-2.0 WITH LLVM-exception",
    "BSD License", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "HPND", "ISC", "ISC License (ISCL)", "MIT",
    "MIT License", "MIT-CMU", "MPL-2.0", "Mozilla Public License 2.0 (MPL 2.0)", "PSF-2.0",
    "Python Software Foundation License", "Repoze Public License", "Zlib",
}  # fmt: skip
"""All let an Apache-2.0 program use the package as it is; MPL asks for its own changed files alone."""


def faults(tree: ast.AST) -> list[str]:
    """What in a module would make code out of data."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"imports {name}" for name in names if name.split(".")[0] in NOT_IMPORTED]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in NOT_CALLED:
                found.append(f"calls {called}")
            if given.get("allow_pickle", "False") != "False" or given.get("weights_only") == "False":
                found.append(f"{called} takes pickles")
            if called in WITHOUT_PICKLE and "allow_pickle" not in given:
                found.append(f"{called} without allow_pickle=False")
            if given.get("verify") == "False" or given.get("shell") == "True":
                found.append(f"{called} checks no certificate, or starts a shell")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_product_code_unpickles_nothing_and_runs_no_data(path: Path) -> None:
    assert faults(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import joblib.hashing", "torch.load(path)", "eval(text)",
        "np.load(path)", "np.load(path, allow_pickle=True)", "load(path, weights_only=False)", "get(u, verify=False)",
        "run(text, shell=True)",
    ],
)  # fmt: skip
def test_what_would_be_wrong_is_found(code: str) -> None:
    assert faults(ast.parse(code))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def dependencies() -> dict[str, str]:
    """Every installed package that the product, with what users install, needs: name → version."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    wanted = deque(map(Requirement, project["dependencies"]))
    for extra in INSTALLED_WITH:
        wanted += map(Requirement, project["optional-dependencies"][extra])
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    while wanted:
        requirement = wanted.popleft()
        for extra in ("", *sorted(requirement.extras)):
            if (canonical(requirement.name), extra) in seen:
                continue
            seen.add((canonical(requirement.name), extra))
            try:
                found = distribution(requirement.name)
            except PackageNotFoundError:
                continue  # of an extra that is not installed here
            versions[canonical(requirement.name)] = found.version
            for text in found.requires or []:
                inner = Requirement(text)
                if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                    wanted.append(inner)
    return versions


def licences_of(name: str) -> set[str]:
    """The licences that a package's metadata names."""
    metadata = distribution(name).metadata
    if expression := metadata.get("License-Expression"):
        return {part.strip("() ") for part in re.split(r" AND | OR ", expression)}
    classifiers = [
        text.split(" :: ")[-1] for text in metadata.get_all("Classifier", []) if text.startswith("License ::")
    ]
    named = set(classifiers) - {"OSI Approved"}
    return named or set(re.split(r" AND | OR ", (metadata.get("License") or "none").strip().splitlines()[0]))


def test_what_is_installed_is_what_was_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = {canonical(name): version for name, version in (line.split("==") for line in lines)}
    installed = dependencies()
    assert len(installed) > 60 and {"torch", "qdrant-client", "faust-streaming"} <= installed.keys()
    checked = {name: version for name, version in installed.items() if not name.startswith((*NOT_PINNED, *OF_CUDA))}
    different = {name: (version, pinned.get(name)) for name, version in checked.items() if pinned.get(name) != version}
    assert different == {}, "installed, and pinned in constraints.txt"


def test_every_dependency_has_a_licence_that_is_known() -> None:
    unknown = {name: other for name in dependencies() if (other := licences_of(name) - LICENCES)}
    unknown = {name: other for name, other in unknown.items() if not name.startswith(OF_CUDA)}
    assert unknown == {}


@pytest.mark.parametrize("page", ["security.md", "delivery.md"])
def test_every_test_that_is_named_as_evidence_exists(page: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / page).read_text())
    assert len(named) > 10
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert not name or name in functions, f"{path}::{name}"
