"""The command line: help of every command, exit codes, and what goes to stdout."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streams.contract import Topics

COMMANDS = (
    "canary",
    "dead-letters list",
    "dead-letters replay",
    "demo",
    "evaluate",
    "export",
    "produce",
    "query",
    "replay",
    "topics",
    "versions list",
    "versions promote",
    "versions rollback",
    "versions show",
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "streamtower", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"COLUMNS": "200"} | environment,
    )


def every_command(group: Any, stem: str = "") -> dict[str, Any]:
    found = {}
    for name, command in group.commands.items():
        found |= every_command(command, f"{stem}{name} ") if hasattr(command, "commands") else {stem + name: command}
    return found


def test_every_command_is_looked_at() -> None:
    import typer.main

    from streamtower.__main__ import app

    assert sorted(every_command(typer.main.get_group(app))) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_is_explained(command: str) -> None:
    import typer.main

    from streamtower.__main__ import app

    done = run(*command.split(), "--help")
    assert done.returncode == 0
    [found] = [c for name, c in every_command(typer.main.get_group(app)).items() if name == command]
    assert found.help
    for parameter in found.params:
        assert getattr(parameter, "help", None), f"{command} {parameter.name} is not explained"
        for option in parameter.opts if parameter.param_type_name == "option" else []:
            assert option in done.stdout


def test_a_short_command_loads_no_torch_and_no_faust() -> None:
    code = (
        "import sys; sys.argv = ['streamtower', 'query', 'anna', '--url', 'http://127.0.0.1:1']\n"
        "from streamtower.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as error: print(error.code, *({'torch', 'faust', 'qdrant_client'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["69"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["dance"], 2, "No such command"),
        (["topics", "--partitions", "0"], 2, "partitions"),
        (["topics", "--kafka", "127.0.0.1:1", "--timeout", "0.3"], 69, "no Kafka broker answers at 127.0.0.1:1"),
        (["dead-letters", "list", "--kafka", "127.0.0.1:1", "--timeout", "0.3"], 69, "no Kafka broker answers"),
        (["dead-letters", "replay", "--reason", "ugly"], 2, "bad_reward"),
        (["produce", "nowhere.csv"], 2, "there is no file nowhere.csv"),
        (["query", "anna", "--url", "http://127.0.0.1:1"], 69, "no retriever answers at http://127.0.0.1:1"),
        (["query"], 2, "name a user"),
        (["query", "anna", "--filter", "{"], 2, "--filter is no JSON"),
        (["query", "anna", "--context", "phone"], 2, "NAME=VALUE"),
        (["demo", "--data", "nowhere.csv"], 2, "there is no file nowhere.csv"),
    ],
)
def test_what_goes_wrong_is_an_exit_code_and_a_line_on_stderr(arguments: list[str], code: int, said: str) -> None:
    done = run(*arguments)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_bad_variable_is_a_bad_configuration() -> None:
    done = run("topics", STREAMTOWER_STREAMS_KAFKA_SECURITY_PROTOCOL="SECRET")
    assert done.returncode == 78
    assert "STREAMTOWER_STREAMS_KAFKA_SECURITY_PROTOCOL" in done.stderr


@pytest.fixture
def retriever() -> Iterator[SimpleNamespace]:
    """Stands in for the service: keeps what it is asked, answers what it is told to."""
    state = SimpleNamespace(asked=[], status=200, answer={})

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            state.asked.append((self.path, body))
            self.send_response(state.status)
            self.end_headers()
            self.wfile.write(json.dumps(state.answer).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


ANSWER: dict[str, Any] = {
    "candidates": [{"item_id": "tea", "score": 1.25, "payload": {"colour": "green"}}],
    "model_version": 3,
    "user_known": True,
    "history_source": "followed",
    "history_length": 2,
}


def test_a_query_asks_for_what_its_options_say(retriever: SimpleNamespace) -> None:
    retriever.answer = ANSWER
    options = ["-k", "3", "--history", "a,b", "--context", "device=phone", "--popularity", "0.5", "--with-seen"]
    done = run("query", "anna", *options, "--filter", '{"must": []}', "--url", retriever.url)
    assert done.returncode == 0, done.stderr
    assert retriever.asked == [
        (
            "/v1/candidates",
            {
                "user_id": "anna",
                "history": ["a", "b"],
                "k": 3,
                "context": {"device": "phone"},
                "filter": {"must": []},
                "popularity": 0.5,
                "exclude_seen": False,
                "with_payload": True,
            },
        )
    ]
    assert done.stdout.split() == ["1.250", "tea", "colour=green"]
    assert "version 3, history of 2 (followed)" in done.stderr


def test_json_is_the_services_answer_as_it_is(retriever: SimpleNamespace) -> None:
    retriever.answer = ANSWER
    done = run("query", "anna", "--json", "--url", retriever.url)
    assert json.loads(done.stdout) == ANSWER


@pytest.mark.parametrize(("status", "code"), [(503, 69), (422, 1)])
def test_a_refusal_is_told_in_the_services_words(retriever: SimpleNamespace, status: int, code: int) -> None:
    retriever.status = status
    retriever.answer = {"detail": "k is too much", "errors": [{"location": "body.k", "message": "at most 1000"}]}
    done = run("query", "anna", "--url", retriever.url)
    assert done.returncode == code
    assert "k is too much" in done.stderr


@pytest.mark.broker
def test_a_file_is_produced_with_its_items(kafka: str, topics: Topics, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("who,item,ts\nanna,1,10\nbert,2,20\n,3,30\n")
    (tmp_path / "i.jsonl").write_text('{"item_id": "1", "colour": "red"}\n')
    command = ["produce", str(tmp_path / "c.csv"), "--items", str(tmp_path / "i.jsonl"), "--user", "who", "--json"]
    done = run(*command, "--kafka", kafka, "--topic-prefix", topics.prefix)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.pop("seconds") >= 0
    assert told == {"schema": "streamtower.produce/1", "items": 1, "clicks": 2, "skipped": 1}


@pytest.mark.broker
def test_a_rate_and_a_limit_are_kept(kafka: str, topics: Topics) -> None:
    command = ["produce", "synthetic", "--limit", "300", "--rate", "400", "--now", "--json"]
    done = run(*command, "--kafka", kafka, "--topic-prefix", topics.prefix)
    told = json.loads(done.stdout)
    assert told["clicks"] == 300
    assert told["seconds"] >= 0.7


@pytest.mark.broker
def test_topics_are_made_once(kafka: str, topics: Topics) -> None:
    there = dict.fromkeys((topics.clicks, topics.items, topics.dead_letters, topics.micro_batches), False)
    done = run("topics", "--json", STREAMTOWER_STREAMS_KAFKA=kafka, STREAMTOWER_STREAMS_TOPIC_PREFIX=topics.prefix)
    assert json.loads(done.stdout) == {"schema": "streamtower.topics/1", "topics": there}
