"""run.py: when it installs, when it does not, and what it says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

RUN = Path(__file__).parent.parent / "run.py"


@pytest.fixture(scope="module")
def run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run", RUN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def venv(tmp_path: Path, run: ModuleType) -> Path:
    """A directory that looks like an environment as far as the stamp is concerned."""
    python = run.venv_python(tmp_path / ".venv")
    python.parent.mkdir(parents=True)
    python.touch()
    return tmp_path / ".venv"


def project(folder: Path, requirements: str = "a", pins: str = "a==1") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "pyproject.toml").write_text(requirements)
    (folder / "constraints.txt").write_text(pins)
    return folder


def test_nothing_is_installed_without_a_stamp(run: ModuleType, venv: Path) -> None:
    assert not run.is_installed(venv, "x", "embedded")


def test_a_stamp_of_the_same_requirements_is_enough(run: ModuleType, venv: Path) -> None:
    run.write_stamp(venv, "x", "embedded")
    assert run.is_installed(venv, "x", "embedded")
    assert not run.is_installed(venv, "y", "embedded")


def test_the_tests_environment_serves_the_demo_and_not_the_reverse(run: ModuleType, venv: Path) -> None:
    run.write_stamp(venv, "x", "embedded")
    assert not run.is_installed(venv, "x", "embedded,dev")
    run.write_stamp(venv, "x", "embedded,dev")
    assert run.is_installed(venv, "x", "embedded")


def test_an_installation_that_was_cut_off_does_not_count(run: ModuleType, venv: Path) -> None:
    run.write_stamp(venv, "x", "embedded")
    (venv / run.MARK).touch()
    assert not run.is_installed(venv, "x", "embedded")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"fingerprint": "x"}', '{"fingerprint": "x", "extras": 3}'])
def test_a_torn_stamp_does_not_count(run: ModuleType, venv: Path, text: str) -> None:
    (venv / run.STAMP).write_text(text)
    assert not run.is_installed(venv, "x", "embedded")


def test_a_stamp_without_its_python_does_not_count(run: ModuleType, venv: Path) -> None:
    run.write_stamp(venv, "x", "embedded")
    run.venv_python(venv).unlink()
    assert not run.is_installed(venv, "x", "embedded")


def test_the_fingerprint_changes_with_requirements_pins_and_place(run: ModuleType, tmp_path: Path) -> None:
    first = run.fingerprint(project(tmp_path / "one"))
    assert run.fingerprint(project(tmp_path / "one")) == first
    assert run.fingerprint(project(tmp_path / "two")) != first
    assert run.fingerprint(project(tmp_path / "one", pins="a==2")) != first
    assert run.fingerprint(project(tmp_path / "one", requirements="b")) != first


def test_an_environment_of_somebody_else_is_left_alone(run: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "precious").touch()
    with pytest.raises(run.InstallError, match="move it away"):
        run.make_venv(tmp_path / "venv")
    assert (tmp_path / "venv" / "precious").exists()


def test_a_broken_environment_is_made_new_and_a_good_one_kept(run: ModuleType, tmp_path: Path) -> None:
    python = run.make_venv(tmp_path / "venv")
    (tmp_path / "venv" / run.MARK).unlink()
    made = (tmp_path / "venv" / "pyvenv.cfg").stat().st_ino
    assert run.make_venv(tmp_path / "venv") == python
    assert (tmp_path / "venv" / "pyvenv.cfg").stat().st_ino == made
    python.unlink()
    run.make_venv(tmp_path / "venv")
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


@pytest.fixture
def lock_holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is installing: it holds the lock of a copy of run.py, and so does the pip that it started."""
    (tmp_path / "run.py").write_bytes(RUN.read_bytes())
    code = (
        "import subprocess, sys, time; sys.path.insert(0, '.'); import run\n"
        "with run.one_at_a_time():\n"
        "    pip = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE, close_fds=False)\n"
        "    print(pip.pid, flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.mark.skipif(os.name == "nt", reason="no such lock on Windows")
def test_the_pip_of_a_killed_run_is_waited_for(tmp_path: Path, lock_holder: subprocess.Popen[str]) -> None:
    """The killed run's pip reads its stdin, whose other end died with the run: it ends, and only then we go on."""
    import fcntl

    assert lock_holder.stdout is not None
    pip = int(lock_holder.stdout.readline())
    with open(tmp_path / "run.py") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock_holder.kill()
        lock_holder.wait()
        fcntl.flock(file, fcntl.LOCK_EX)
    assert not Path(f"/proc/{pip}/fd").exists() or not os.listdir(f"/proc/{pip}/fd")


def test_help_needs_nothing_installed() -> None:
    done = subprocess.run([sys.executable, "-I", "-S", RUN, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "run.py demo" in done.stdout
    assert "run.py test" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["dance"]])
def test_an_unknown_command_is_a_usage_error(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-I", "-S", RUN, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2


def test_every_pin_is_exact_and_torch_is_free() -> None:
    lines = (RUN.parent / "constraints.txt").read_text().splitlines()
    names = [line.partition("==")[0].lower() for line in lines]
    assert all("==" in line for line in lines)
    assert not [name for name in names if name == "torch" or name.startswith("nvidia")]


def test_all_stages_run_and_one_failure_is_a_failure(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("ruff", "mypy", "lint-imports", "python"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho ran {name} $@\n{'exit 3' if name == 'mypy' else 'exit 0'}\n")
        program.chmod(0o755)
    assert run.run_tests(tmp_path / "python", ["-k", "x"]) == 1
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        "ran ruff check .",
        "ran ruff format --check .",
        "ran mypy",
        "ran lint-imports",
        f"ran python -m pytest {' '.join(run.TWO_AT_A_TIME)} -k x",
    ]
    assert "types    FAILED (exit code 3)" in err
    assert "tests    ok" in err
