"""The Dockerfile: linted, and its instructions followed here as far as that needs no container engine."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = [
    line.split(None, 1) for line in re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    if line
]  # fmt: skip


def project() -> dict[str, object]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        found: dict[str, object] = tomllib.load(file)["project"]
        return found


def values(instruction: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def context() -> list[Path]:
    """What the .dockerignore lets through at the top of the build context."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines, "the list of what is let in begins by shutting everything out"
    return [ROOT / line.removeprefix("!") for line in lines if line.startswith("!")]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our packages as `pip install --no-deps .` of the build context would install them."""
    source, target = tmp_path_factory.mktemp("context"), tmp_path_factory.mktemp("installed")
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] not in "#!*"]
    for path in context():
        if path.is_dir():
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / path.name)
    for line in ignored:
        shutil.rmtree(source / line)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", target, source],
        check=True,
        cwd=target,
    )
    return target


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), "Dockerfile"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_stages_are_one_pinned_python_that_the_project_supports() -> None:
    images = {rest.split(" AS ")[0] for rest in values("FROM")}
    assert len(images) == 1
    found = re.fullmatch(r"python:(\d+\.\d+\.\d+)-slim-bookworm", images.pop())
    assert found
    assert found[1] in SpecifierSet(str(project()["requires-python"]))


def test_it_installs_the_cpu_build_of_torch_before_anything_that_could_bring_another() -> None:
    installs = [rest for rest in values("RUN") if "pip install" in rest]
    assert "torch==$TORCH_VERSION" in installs[0] and '--index-url "$TORCH_INDEX"' in installs[0]
    arguments = dict(rest.split("=", 1) for rest in values("ARG"))
    assert arguments["TORCH_INDEX"].endswith("/cpu")
    dependencies = project()["dependencies"]
    assert isinstance(dependencies, list)
    torch = next(r for r in map(Requirement, dependencies) if r.name == "torch")
    assert arguments["TORCH_VERSION"] in torch.specifier
    in_run = dict(re.findall(r'^(TORCH\w*) = "([^"]+)"', (ROOT / "run.py").read_text(), flags=re.MULTILINE))
    assert in_run == {"TORCH": arguments["TORCH_VERSION"], "TORCH_CPU_INDEX": arguments["TORCH_INDEX"]}
    assert "--constraint constraints.txt" in installs[1] and "--no-deps ." in installs[2]


def test_the_constraints_leave_torch_to_the_dockerfile() -> None:
    pinned = [Requirement(line).name for line in (ROOT / "constraints.txt").read_text().splitlines()
              if line.strip() and not line.startswith("#")]  # fmt: skip
    assert pinned
    assert not [name for name in pinned if name == "torch" or name.startswith("nvidia")]


def test_the_dependencies_that_it_reads_from_the_project_are_those_without_extras() -> None:
    """The one line of Python in it, run as it stands there."""
    command = next(rest for rest in values("RUN") if "tomllib" in rest).split(">")[0]
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == project()["dependencies"]


def test_every_file_that_it_copies_is_let_through_and_exists() -> None:
    allowed = {path.name for path in context()}
    for path in context():
        assert path.exists(), path
    for rest in values("COPY"):
        if not rest.startswith("--from="):
            for source in rest.split()[:-1]:
                assert source == "." or source in allowed, source


def test_it_ends_as_a_user_without_rights() -> None:
    assert values("USER") == ["10001:10001"]
    assert any("useradd --uid 10001 --gid 10001" in rest for rest in values("RUN"))


def test_folders_that_volumes_are_mounted_on_belong_to_that_user(compose: dict[str, object]) -> None:
    """A named volume takes the owner of the folder in the image."""
    made = next(rest for rest in values("RUN") if "install --directory" in rest)
    assert "--owner=10001 --group=10001" in made
    services = compose["services"]
    assert isinstance(services, dict)
    for name in ("streams", "trainer", "retriever"):
        for mount in services[name].get("volumes", ()):
            assert mount["target"] in made.split(), mount


def test_numba_caches_where_the_container_may_write(compose: dict[str, object]) -> None:
    assert any("NUMBA_CACHE_DIR=/tmp/" in rest for rest in values("ENV"))
    services = compose["services"]
    assert isinstance(services, dict)
    for name in ("streams", "trainer", "retriever"):
        assert any(entry.split(":")[0] == "/tmp" for entry in services[name]["tmpfs"])


@pytest.mark.parametrize(
    "command",
    [["-m", "streams"], ["-m", "trainer"], ["-m", "retriever"], ["-m", "streamtower"], ["-m", "streamtower", "topics"]],
    ids=" ".join,
)
def test_the_installed_files_are_enough_to_start(command: list[str], installed: Path, tmp_path: Path) -> None:
    """As in the container: the safe path, an empty working folder, and (-S) nothing of this checkout importable."""
    done = subprocess.run(
        [sys.executable, "-S", "-P", *command, "--help"],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join([str(installed), sysconfig.get_path("purelib")]),
            "NUMBA_CACHE_DIR": str(tmp_path / "numba"),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert {path.name for path in tmp_path.iterdir()} <= {"numba"}, "written where the container has no right to"
