"""The local endpoint as a process: it keeps what it acknowledged, through any end, and leaves nobody behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

pytest.importorskip("qdrant_edge", reason="needs the extra `embedded`")

from streamtower.dev.index.process import LocalIndex, LocalIndexError

pytestmark = pytest.mark.index

DIM = 16
DEADLINE_SECONDS = 60.0


def client_of(index: LocalIndex) -> QdrantClient:
    """Without the check of versions: it asks in a thread of its own, which may come when the process has ended."""
    return QdrantClient(url=index.url, headers={"accept-encoding": "identity"}, timeout=30, check_compatibility=False)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_SECONDS:g} s: {what}"
        time.sleep(0.01)


def create(client: QdrantClient, name: str) -> None:
    client.create_collection(
        name,
        vectors_config={"dense": models.VectorParams(size=DIM, distance=models.Distance.DOT)},
        sparse_vectors_config={"covisit": models.SparseVectorParams()},
    )
    client.create_payload_index(name, "step", models.PayloadSchemaType.INTEGER, wait=True)


def batch(first: int, count: int, step: int) -> models.Batch:
    ids = list(range(first, first + count))
    return models.Batch(
        ids=ids,
        vectors={
            "dense": np.random.default_rng(first).normal(size=(count, DIM)).tolist(),
            "covisit": [models.SparseVector(indices=[id % 7, 9], values=[1.0, 2.0]) for id in ids],
        },
        payloads=[{"step": step} for _ in ids],
    )


def switch(client: QdrantClient, alias: str, collection: str) -> None:
    client.update_collection_aliases(
        [
            models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias)),
            models.CreateAliasOperation(create_alias=models.CreateAlias(collection_name=collection, alias_name=alias)),
        ]
    )


@pytest.mark.parametrize("acknowledgements", [1, 25, 90])
def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path, acknowledgements: int) -> None:
    """A writer upserts, updates and switches an alias until the process is killed under it."""
    index = LocalIndex(tmp_path)
    index.start()
    setup = client_of(index)
    for name in ("items__v1", "items__v2"):
        create(setup, name)
    switch(setup, "items", "items__v1")
    setup.close()
    acknowledged: list[int] = []
    aliases: list[str] = ["items__v1"]

    def write() -> None:
        client = client_of(index)
        try:
            for number in range(10_000):
                client.upsert("items__v1", batch(number * 20, 20, step=number), wait=number % 2 == 0)
                acknowledged.append(number)
                aliases.append(f"items__v{1 + number % 2}")
                switch(client, "items", aliases[-1])
        except (ResponseHandlingException, UnexpectedResponse):
            pass
        finally:
            client.close()

    writer = threading.Thread(target=write)
    writer.start()
    wait_until(lambda: len(acknowledged) >= acknowledgements, f"{acknowledgements} acknowledgements")
    os.kill(index.pid, signal.SIGKILL)
    writer.join()
    wait_until(lambda: index.exit_code == -signal.SIGKILL, "its end by SIGKILL")
    index.stop()

    with LocalIndex(tmp_path) as again:
        client = client_of(again)
        expected = [id for number in acknowledged for id in range(number * 20, number * 20 + 20)]
        found = {
            point.id: point
            for start in range(0, len(expected), 1000)
            for point in client.retrieve("items__v1", expected[start : start + 1000], with_vectors=True)
        }
        assert found.keys() == set(expected)
        for number in acknowledged:
            sent = batch(number * 20, 20, step=number)
            assert isinstance(sent.vectors, dict)
            for id, vector in zip(sent.ids, sent.vectors["dense"], strict=True):
                point = found[id]
                assert point.payload == {"step": number} and isinstance(point.vector, dict)
                assert point.vector["dense"] == pytest.approx(vector, abs=1e-5)
                assert set(point.vector) == {"dense", "covisit"}
        # The switch on the wire when the process died may have been done or not; the alias is one of the last two.
        (entry,) = client.get_aliases().aliases
        assert entry.alias_name == "items" and entry.collection_name in aliases[-2:]
        assert client.get_collection("items__v1").payload_schema["step"].points == client.count("items__v1").count
        client.close()


def test_an_orderly_end_keeps_everything_and_exits_with_0(tmp_path: Path) -> None:
    with LocalIndex(tmp_path) as index:
        client = client_of(index)
        create(client, "items__v1")
        client.upsert("items__v1", batch(0, 300, step=1), wait=True)
        client.delete("items__v1", list(range(100)), wait=True)
        switch(client, "items", "items__v1")
        client.close()
        os.kill(index.pid, signal.SIGTERM)
        wait_until(lambda: index.exit_code is not None, "the end after SIGTERM")
        assert index.exit_code == 0
    with LocalIndex(tmp_path) as index:
        client = client_of(index)
        assert client.count("items").count == 200
        client.close()


def test_a_deleted_collection_and_its_alias_stay_away(tmp_path: Path) -> None:
    with LocalIndex(tmp_path) as index:
        client = client_of(index)
        for name in ("items__v1", "items__v2"):
            create(client, name)
        switch(client, "items", "items__v1")
        client.delete_collection("items__v1")
        client.close()
    assert len(list((tmp_path / "collections").iterdir())) == 1
    with LocalIndex(tmp_path) as index:
        client = client_of(index)
        assert [collection.name for collection in client.get_collections().collections] == ["items__v2"]
        assert client.get_aliases().aliases == []
        client.close()


def test_an_interrupted_creation_leaves_no_collection(tmp_path: Path) -> None:
    torn = tmp_path / "collections" / "items__v1-00000000"
    (torn / "shard").mkdir(parents=True)
    with LocalIndex(tmp_path) as index:
        assert httpx.get(f"{index.url}/collections").json()["result"] == {"collections": []}
    assert not torn.exists()


def test_queries_see_whole_versions_while_points_and_the_alias_change(tmp_path: Path) -> None:
    """Four readers through the alias, two writers, and switches to and fro: no error, and no answer of two versions."""
    with LocalIndex(tmp_path) as index:
        setup = client_of(index)
        for version in (1, 2):
            create(setup, f"items__v{version}")
            setup.upsert(f"items__v{version}", batch(0, 500, step=version), wait=True)
        switch(setup, "items", "items__v1")
        stop = threading.Event()
        errors: list[BaseException] = []
        answers: list[set[int]] = []

        def loop(work: Callable[[QdrantClient, int], None]) -> None:
            client = client_of(index)
            turn = 0
            try:
                while not stop.is_set():
                    work(client, turn)
                    turn += 1
            except BaseException as error:
                errors.append(error)
            finally:
                client.close()

        def read(client: QdrantClient, turn: int) -> None:
            query = np.random.default_rng(turn).normal(size=DIM).tolist()
            points = client.query_points("items", query=query, using="dense", limit=50, with_payload=True).points
            assert len(points) == 50
            answers.append({point.payload["step"] for point in points if point.payload})

        def writer_of(version: int) -> Callable[[QdrantClient, int], None]:
            return lambda client, turn: (
                client.upsert(f"items__v{version}", batch(turn % 50 * 10, 40, step=version), wait=turn % 2 == 0),
                None,
            )[1]

        threads = [threading.Thread(target=loop, args=[read]) for _ in range(4)]
        threads += [threading.Thread(target=loop, args=[writer_of(version)]) for version in (1, 2)]
        for thread in threads:
            thread.start()
        for turn in range(60):
            switch(setup, "items", f"items__v{1 + (turn + 1) % 2}")
            if errors:
                break
        wait_until(lambda: len(answers) >= 100 or bool(errors), "a hundred answers")
        stop.set()
        for thread in threads:
            thread.join()
        setup.close()
    assert errors == []
    assert {1} in answers and {2} in answers and all(len(steps) == 1 for steps in answers)


def test_a_taken_port_is_replaced_and_the_caller_sees_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with LocalIndex(tmp_path, port=taken) as index:
            assert index.port != taken and index.url == f"http://127.0.0.1:{index.port}"
            assert httpx.get(f"{index.url}/readyz").status_code == 200


def test_a_free_port_is_taken_as_wished(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        free = other.getsockname()[1]
    with LocalIndex(tmp_path, port=free) as index:
        assert index.port == free


def test_a_second_process_cannot_use_the_directory(tmp_path: Path) -> None:
    with LocalIndex(tmp_path), pytest.raises(LocalIndexError, match="used by another local index"):
        LocalIndex(tmp_path).start()


def test_the_endpoint_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import signal
        from pathlib import Path
        from streamtower.dev.index.process import LocalIndex
        index = LocalIndex(Path({str(tmp_path)!r}))
        index.start()
        print(index.pid, flush=True)
        signal.pause()
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        endpoint = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    wait_until(lambda: not endpoint.is_running() or endpoint.status() == psutil.STATUS_ZOMBIE, "its end")
    with LocalIndex(tmp_path) as index:
        assert httpx.get(f"{index.url}/readyz").status_code == 200


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "streamtower.dev.index", "--dir", str(tmp_path / "index"), *arguments],
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
        )

    yield run


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_only_loopback_is_listened_on(host: str, command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = command("--host", host)
    assert done.returncode == 78
    assert f"--host {host}" in done.stderr and "Qdrant server" in done.stderr


def test_a_taken_port_on_the_command_line_is_an_error(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = command("--port", str(other.getsockname()[1]))
    assert done.returncode == 78 and "choose another port" in done.stderr


def test_a_broken_collection_is_named(tmp_path: Path) -> None:
    with LocalIndex(tmp_path) as index:
        client = client_of(index)
        create(client, "items__v1")
        client.close()
    (collection,) = (tmp_path / "collections").iterdir()
    (collection / "shard" / "edge_config.json").write_text("{")
    with pytest.raises(LocalIndexError, match="'items__v1'"):
        LocalIndex(tmp_path).start()


def test_the_log_says_what_this_is_and_where(tmp_path: Path) -> None:
    with LocalIndex(tmp_path) as index:
        lines = [json.loads(line) for line in index.log.read_text().splitlines()]
    (ready,) = [line for line in lines if line["event"] == "ready"]
    assert "not a Qdrant server" in ready["what"] and ready["url"] == index.url
