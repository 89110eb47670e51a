"""`streamtower versions`: what is listed, what may be made live, and what refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from qdrant_client import QdrantClient, models
from typer.testing import CliRunner

from streamtower.__main__ import app
from streamtower.qdrant import Qdrant
from tests.trainer.publishing import Publishing, publishings
from trainer.aliases import Named
from trainer.contract import DENSE, MANIFEST_FILE, QUERY_TOWER_FILE, collection_name, version_directory
from trainer.progress import Progress

pytestmark = pytest.mark.index

SIZE = models.VectorParams(size=2, distance=models.Distance.DOT)


@pytest.fixture
def publishing(qdrant_url: str, alias: str, tmp_path: Path) -> Iterator[Publishing]:
    """Two versions, the second one live; a third collection is unfinished."""
    with publishings(qdrant_url, alias, tmp_path / "models") as make:
        made = make(progress=Progress(model_version=3))
        made.click("a", "b")
        made.settle()
        made.click("c")
        made.renew()
        made.client.create_collection(collection_name(alias, 9), vectors_config={DENSE: SIZE})
        yield made


@pytest.fixture
def run(publishing: Publishing) -> Callable[..., tuple[int, str]]:
    def run(*arguments: str, qdrant: str = publishing.url) -> tuple[int, str]:
        variables = {
            "STREAMTOWER_TRAINER_QDRANT": qdrant,
            "STREAMTOWER_TRAINER_ALIAS": publishing.alias,
            "STREAMTOWER_TRAINER_MODEL_DIR": str(publishing.model_dir),
        }
        done = CliRunner().invoke(app, ["versions", *arguments], env=variables)
        return done.exit_code, done.stdout if done.exit_code == 0 else done.output

    return run


def test_every_version_is_listed_with_its_state_and_what_is_not_whole_as_that(
    run: Callable[..., tuple[int, str]], publishing: Publishing
) -> None:
    code, text = run("list", "--json")
    document = json.loads(text)
    assert code == 0 and document["schema"] == "streamtower.versions/1"
    found = {v["version"]: (v["live"], v["pinned"], v["whole"], v["points"]) for v in document["versions"]}
    assert found == {4: (False, False, True, 3), 5: (True, False, True, 3), 9: (False, False, False, 0)}
    assert [v["step"] for v in document["versions"]] == [0, 0, None]
    code, text = run("list")
    assert code == 0 and [line.split()[:2] for line in text.splitlines()][1:] == [["5", "live"], ["9", "not"]]
    (publishing.model_dir / "v00000004" / MANIFEST_FILE).write_text("{")
    assert [v["whole"] for v in json.loads(run("list", "--json")[1])["versions"]] == [False, True, False]


def test_one_version_is_shown_with_its_whole_manifest(run: Callable[..., tuple[int, str]]) -> None:
    code, text = run("show", "5")
    document = json.loads(text)
    assert code == 0 and document["manifest"]["model_version"] == 5 and document["manifest"]["prequential"] is None
    assert run("show", "7") == (1, "streamtower: there is no version 7\n")


def test_rollback_and_promote_switch_pin_and_let_go(
    run: Callable[..., tuple[int, str]], publishing: Publishing
) -> None:
    assert run("rollback") == (0, "version 4 is live and pinned\n")
    assert publishing.index.named() == Named(4, 4)
    assert run("promote", "5", "--json") == (
        0, '{"schema": "streamtower.promoted/1", "version": 5, "pinned": true}\n',
    )  # fmt: skip
    assert publishing.index.named() == Named(5, 5)
    assert run("rollback")[0] == 0 and publishing.index.named() == Named(4, 4)
    assert run("promote", "latest") == (0, "version 5 is live\n")
    assert publishing.index.named() == Named(5, None)


def test_a_version_that_is_removed_while_all_are_looked_at_is_not_whole(
    run: Callable[..., tuple[int, str]], publishing: Publishing, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Qdrant.collections

    def and_remove(self: Qdrant) -> list[str]:
        found = look(self)
        publishing.client.delete_collection(collection_name(publishing.alias, 4))
        return found

    monkeypatch.setattr(Qdrant, "collections", and_remove)
    code, text = run("list", "--json")
    assert code == 0
    assert {v["version"]: v["whole"] for v in json.loads(text)["versions"]} == {4: False, 5: True, 9: False}


def test_only_whole_versions_are_made_live(run: Callable[..., tuple[int, str]], publishing: Publishing) -> None:
    for number, why in (("7", "is not there"), ("9", "has no collection or no readable Manifest")):
        assert run("promote", number) == (1, f"streamtower: version {number} {why}; whole versions are: 4, 5\n")
    assert run("promote", "newest")[0] == 2
    tower = version_directory(publishing.model_dir, 4) / QUERY_TOWER_FILE
    tower.write_bytes(tower.read_bytes()[:-1])
    code, text = run("rollback")
    assert code == 1 and "version 4 is damaged" in text
    publishing.client.delete_collection(collection_name(publishing.alias, 4))
    code, text = run("rollback")
    assert code == 1 and "no whole version before 5" in text
    assert version_directory(publishing.model_dir, 4).exists()
    assert publishing.index.named() == Named(5, None)


def test_without_qdrant_it_ends_as_a_missing_dependency(run: Callable[..., tuple[int, str]]) -> None:
    code, text = run("list", qdrant="http://127.0.0.1:9")
    assert code == 69 and text.startswith("streamtower: Qdrant does not answer")


def test_a_rollback_loads_nothing_that_takes_long(publishing: Publishing) -> None:
    """It is to take a second, of which Qdrant's client alone would be more than half."""
    code = (
        "import sys; from streamtower.__main__ import app; app(sys.argv[1:], standalone_mode=False); "
        "print(*({'torch', 'faust', 'numba', 'pandas', 'fastapi', 'grpc', 'qdrant_client'} & set(sys.modules)))"
    )
    where = ["--qdrant", publishing.url, "--alias", publishing.alias, "--model-dir", str(publishing.model_dir)]
    done = subprocess.run(
        [sys.executable, "-c", code, "versions", "rollback", *where], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "version 4 is live and pinned\n\n"), done.stderr


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://qdrant", "http://qdrant:6333/"),
        ("localhost:1", "http://localhost:1/"),
        ("https://q/p", "https://q:6333/p/"),
    ],
)
def test_a_url_is_read_as_qdrants_client_reads_it(url: str, told: str) -> None:
    qdrant, client = Qdrant(url), QdrantClient(url=url, check_compatibility=False)
    assert str(qdrant.url).rstrip("/") + "/" == told
    assert str(client.http.client.host).rstrip("/") + "/" == told
    qdrant.close()
    client.close()
