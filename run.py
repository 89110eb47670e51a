"""From a checkout to a running Streamtower with nothing but Python 3.11 or newer and pip.

    python3 run.py demo [options]        everything on this machine: broker, index, services, real clicks
    python3 run.py test [pytest args]    lint, types, import rules, and all tests

Both make .venv beside this file and install into it; that takes minutes the first time and nothing afterwards. It uses
the standard library alone, because it runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = "streamtower-installed.json"
MARK = "streamtower-installing"
LOG = "streamtower-install.log"
OLDEST_PYTHON = (3, 11)
TORCH = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS = {"demo": "embedded", "test": "embedded,dev,evaluate"}
TWO_AT_A_TIME = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
"""Most tests wait for servers. File by file, because the tests of a file share what they start."""
IS_WINDOWS = os.name == "nt"


class InstallError(Exception):
    """The environment could not be made. The message says what was tried and what to do."""


def main(arguments: Sequence[str]) -> int:
    """Runs one of the two commands; the return value is the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    command, rest = arguments[0], list(arguments[1:])
    if command not in EXTRAS:
        say(f"unknown command {command!r}: it is `demo` or `test`")
        return 2
    signal.signal(signal.SIGTERM, interrupt)
    try:
        python = bootstrap(EXTRAS[command])
    except InstallError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; the next run starts the installation over")
        return 130
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if command == "test":
        return run_tests(python, rest)
    return become([str(python), "-m", "streamtower", "demo", *rest])


def interrupt(signum: int, frame: object) -> NoReturn:
    """SIGTERM ends an installation as Ctrl-C does: pip with it."""
    raise KeyboardInterrupt


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- the environment ------------------------------------------------------------------------------------------------


def bootstrap(extra: str) -> Path:
    """Makes .venv fit for `extra` unless it is already; returns its Python."""
    wanted = fingerprint(ROOT)
    if is_installed(VENV, wanted, extra):
        return venv_python(VENV)
    with one_at_a_time():
        if is_installed(VENV, wanted, extra):  # whoever held the lock has done it
            return venv_python(VENV)
        started = time.monotonic()
        say(f"making {VENV.name} (once; a few minutes, most of it is PyTorch)")
        python = make_venv(VENV)
        (VENV / STAMP).unlink(missing_ok=True)
        (VENV / MARK).touch()
        try:
            install(python, extra)
        except InstallError:
            (VENV / MARK).unlink()  # pip ended in order: what it has installed is whole
            raise
        write_stamp(VENV, wanted, extra)
        (VENV / MARK).unlink()
        say(f"installed in {time.monotonic() - started:.0f} s")
        return python


def fingerprint(root: Path) -> str:
    """Changes when what has to be installed changes: the requirements, their pins, this Python, this place."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((root / name).read_bytes())
    digest.update(f"{platform.python_version()} {platform.machine()} {TORCH} {root}".encode())
    return digest.hexdigest()


def is_installed(venv: Path, wanted: str, extra: str) -> bool:
    """Whether a finished installation of these requirements is there, with all of `extra`."""
    try:
        stamp = json.loads((venv / STAMP).read_text())
        return (
            stamp["fingerprint"] == wanted
            and set(extra.split(",")) <= set(stamp["extras"])
            and not (venv / MARK).exists()
            and venv_python(venv).exists()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_stamp(venv: Path, fingerprint: str, extra: str) -> None:
    """Says that the installation is finished; written aside and renamed, so that it is there whole or not at all."""
    aside = venv / f"{STAMP}.new"
    aside.write_text(json.dumps({"fingerprint": fingerprint, "extras": extra.split(",")}))
    aside.replace(venv / STAMP)


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if IS_WINDOWS else "bin/python")


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Holds off a second run of this file while the first one installs.

    pip inherits the lock: should this process be killed, the next one still waits for the pip that it left behind.
    """
    if IS_WINDOWS:
        yield
        return
    import fcntl

    with open(__file__, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is installing; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        os.set_inheritable(file.fileno(), True)
        yield


def make_venv(venv: Path) -> Path:
    """A virtual environment with a working pip, made new if the last installation was cut off or the Python is gone."""
    python = venv_python(venv)
    if venv.exists():
        if not (venv / "pyvenv.cfg").exists() and any(venv.iterdir()):
            raise InstallError(f"{venv} is no virtual environment; move it away")
        cut_off = (venv / MARK).exists()
        if not cut_off and same_python(python) and call([str(python), "-m", "pip", "--version"]) == 0:
            return python
        say(
            "the last installation was cut off; starting over"
            if cut_off
            else f"{venv.name} does not work; making it new"
        )
        shutil.rmtree(venv)
    venv.mkdir()
    (venv / "pyvenv.cfg").touch()  # known as ours from the first moment, should this be cut off
    (venv / MARK).touch()
    log = venv / LOG
    if call([sys.executable, "-m", "venv", str(venv)], log) != 0:
        raise InstallError(
            f"this Python cannot make a virtual environment:\n{tail(log)}\n"
            "On Debian and Ubuntu: apt install python3-venv, then run this again"
        )
    return python


def same_python(python: Path) -> bool:
    """Whether the environment's Python starts and is of this version."""
    code = f"import sys; sys.exit(sys.version_info[:3] != {tuple(sys.version_info[:3])})"
    return python.exists() and call([str(python), "-c", code]) == 0


def install(python: Path, extra: str) -> None:
    """PyTorch first, from where it is small; then the rest, with pinned versions."""
    log = VENV / LOG
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    install_torch(python, pip, log)
    rest = [*pip, "-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[{extra}]"]
    if watched(rest, log, f"installing Streamtower with [{extra}]") != 0:
        raise InstallError(f"pip could not install Streamtower; all it said is in {log}, the end of it:\n{tail(log)}")
    # A second look, because a wheel can install and not load (an old processor, a missing system library).
    if call([str(python), "-c", "import torch, numba, confluent_kafka, pyarrow"], log) != 0:
        raise InstallError(f"installed, but it does not load; the end of {log}:\n{tail(log)}")


def install_torch(python: Path, pip: list[str], log: Path) -> None:
    """The CPU build wherever one can be had: it is a tenth of the size of the default one on Linux."""
    fits = (
        "import sys, torch; v = torch.__version__.split('.'); sys.exit(not (2, 9) <= (int(v[0]), int(v[1])) < (3, 0))"
    )
    if call([str(python), "-c", fits]) == 0:
        return
    exact = [f"torch=={TORCH}+cpu", "--no-deps", "--retries", "1", "--timeout", "20"]
    if sys.platform != "darwin":  # macOS has one build, without CUDA
        if watched([*pip, *exact], log, f"PyTorch {TORCH}, CPU build, from pip's configured sources") == 0:
            return
        if watched([*pip, *exact, "--index-url", TORCH_CPU_INDEX], log, f"the same from {TORCH_CPU_INDEX}") == 0:
            return
        say(
            "no CPU build of PyTorch can be had here: pip takes its default one, which on Linux brings CUDA (some 3 GB)"
        )
    constraints = ["-c", str(ROOT / "constraints.txt")]
    if watched([*pip, *constraints, "torch>=2.9,<3"], log, "PyTorch, as pip finds it") != 0:
        raise InstallError(
            f"pip found no PyTorch for this Python {platform.python_version()}; the end of {log}:\n{tail(log)}"
        )


# --- processes ------------------------------------------------------------------------------------------------------


def call(command: Sequence[str], log: Path | None = None) -> int:
    """Runs a command, its output into the log or nowhere; returns its exit code."""
    with open(log or os.devnull, "ab") as output:
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                close_fds=False,  # the lock goes along, see one_at_a_time
                check=False,
            ).returncode
        except OSError as error:
            output.write(f"{error}\n".encode())
            return 127


def watched(command: Sequence[str], log: Path, doing: str) -> int:
    """`call`, telling meanwhile what is being done and for how long: a running clock on a terminal, else lines."""
    on_terminal = sys.stderr.isatty()
    started = time.monotonic()
    done = threading.Event()

    def tell() -> None:
        if not on_terminal:
            say(f"  {doing} …")
        while not done.wait(0.5 if on_terminal else 30.0):
            seconds = time.monotonic() - started
            if on_terminal:
                print(f"\r\033[K  {doing} … {seconds:.0f} s", end="", file=sys.stderr, flush=True)
            else:
                say(f"  … {seconds:.0f} s")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        code = call(command, log)
    finally:
        done.set()
        teller.join()
    outcome = "done" if code == 0 else "not to be had" if "orch" in doing else "failed"
    say(f"{chr(13) + chr(27) + '[K' if on_terminal else ''}  {doing}: {outcome}, {time.monotonic() - started:.0f} s")
    return code


def tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def become(command: list[str]) -> NoReturn:
    """Goes on as another program, so that signals and exit codes are its own."""
    if IS_WINDOWS:
        sys.exit(subprocess.run(command, check=False).returncode)
    os.execv(command[0], command)  # noqa: S606  no shell is wanted


def run_tests(python: Path, pytest_arguments: list[str]) -> int:
    """All stages, whatever the earlier ones say; 1 if any of them failed."""
    programs = python.parent
    stages = {
        "lint": [str(programs / "ruff"), "check", "."],
        "format": [str(programs / "ruff"), "format", "--check", "."],
        "types": [str(programs / "mypy")],
        "imports": [str(programs / "lint-imports")],
        "tests": [str(python), "-m", "pytest", *TWO_AT_A_TIME, *pytest_arguments],
    }
    outcomes = []
    for name, command in stages.items():
        say(f"== {name}: {' '.join(Path(command[0]).name if part is command[0] else part for part in command)}")
        started = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        outcomes.append((name, code, time.monotonic() - started))
    for name, code, seconds in outcomes:
        say(f"{name:8} {'ok' if code == 0 else f'FAILED (exit code {code})'}, {seconds:.0f} s")
    return int(any(code for _, code, _ in outcomes))


if __name__ == "__main__":
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(
            f"Streamtower needs Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer, and this is "
            f"{platform.python_version()}. Start it with a newer one, such as: python3.12 run.py demo"
        )
    sys.exit(main(sys.argv[1:]))
