"""What the services of a demo are given: settings that they know, and ports that are free."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from retriever.settings import RetrieverSettings
from streams.service import load_settings
from streams.settings import StreamsSettings
from streamtower.datasets.synthetic import synthetic_dataset
from streamtower.stack import Servers, Stack
from trainer.settings import TrainerSettings
from trainer.towers import TowerConfig

pytest.importorskip("qdrant_edge", reason="the embedded stack is not installed")
CLASSES = {"streams": StreamsSettings, "trainer": TrainerSettings, "retriever": RetrieverSettings}
DATASET = replace(synthetic_dataset(100), trainer={"use_user_id": "true", "history_decay": "0.5"})


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """One that is not started, with addresses as if it were."""
    stack = Stack(Servers(None, None, "secret-key", "demo-", "shop"), tmp_path, DATASET, tell=lambda line: None)
    stack.kafka, stack.qdrant = "127.0.0.1:1234", "http://127.0.0.1:5678"
    stack._ports = {"streams": 1, "trainer": 2, "retriever": 3}
    return stack


def test_every_service_knows_its_variables_and_takes_them(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {service: stack._environment(service) for service in CLASSES}
    for service in CLASSES:
        for name, value in environment[service].items():
            monkeypatch.setenv(name, value)
    settings = {service: load_settings(found) for service, found in CLASSES.items()}
    for found in settings.values():
        assert (found.kafka, found.topic_prefix) == ("127.0.0.1:1234", "demo-")
    streams, trainer, retriever = settings.values()
    assert (streams.metrics_port, trainer.metrics_port, retriever.port) == (1, 2, 3)
    for found in (trainer, retriever):
        assert (found.qdrant, found.alias) == ("http://127.0.0.1:5678", "shop")
        assert found.qdrant_api_key.get_secret_value() == "secret-key"
    assert trainer.model_dir == retriever.model_dir
    assert trainer.use_user_id
    assert trainer.payload_indexes == {"category": "keyword"}
    config = TowerConfig.from_dict(trainer.towers())
    assert [(f.name, f.kind) for f in config.item] == [
        ("category", "categorical"),
        ("title", "text"),
        ("price", "number"),
    ]
    assert [(f.name, f.kind) for f in config.context] == [("device", "categorical")]


def test_what_the_user_has_set_wins_over_what_the_data_suggest(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMTOWER_TRAINER_HISTORY_DECAY", "0.9")
    environment = stack._environment("trainer")
    assert "STREAMTOWER_TRAINER_HISTORY_DECAY" not in environment
    assert environment["STREAMTOWER_TRAINER_USE_USER_ID"] == "true"
    assert json.loads(environment["STREAMTOWER_TRAINER_FEATURES"])["context"]


@pytest.mark.broker
@pytest.mark.index
@pytest.mark.slow
@pytest.mark.parametrize("who", ["trainer", "retriever"])
def test_taken_ports_are_told_and_others_used(tmp_path: Path, who: str) -> None:
    """Both ways: taken before the look, and between the look and the start of the service."""
    told: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        stack = Stack(Servers(), tmp_path, DATASET, tell=told.append)
        port = taken.getsockname()[1]
        original = stack._environment

        def late(service: str) -> dict[str, str]:
            if service == who and stack._ports[who] != port and not any(str(port) in line for line in told):
                stack._ports[who] = port
            return original(service)

        stack._environment = late  # type: ignore[method-assign]
        with stack:
            deadline = time.monotonic() + 60
            while stack._services[who].exit_code is None:  # it has ended before anybody waits for it
                assert time.monotonic() < deadline, f"{who} has not ended although its port is taken"
                time.sleep(0.01)
            stack.wait_listening()
            stack.wait_ready("trainer")
            stack.wait_ready("streams")
            assert stack._ports[who] != port
            assert any(line.startswith(f"port {port} is taken: the {who} listens on") for line in told)
            assert str(stack._ports[who]) in stack.metrics_urls()[who]
