"""docker-compose.yml, read by Compose's own binary and held to the code. No container is started here."""

from __future__ import annotations

import base64
import http.server
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from pydantic_settings import BaseSettings

from ops.settings_doc import settings_classes
from streams.service import load_settings

ROOT = Path(__file__).parent.parent.parent
Compose = dict[str, Any]
OURS = ("topics", "streams", "trainer", "retriever")
SERVICES = ("streams", "trainer", "retriever")
ONE_SHOT = ("topics",)
WRITABLE_ROOT = ("kafka",)
"""The image writes its configuration into its own folders at start."""


def project() -> dict[str, Any]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        found: dict[str, Any] = tomllib.load(file)["project"]
        return found


def seconds(text: str) -> float:
    """A duration as Compose writes it, such as 1m30s."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3}
    parts = re.findall(r"([\d.]+)(ms|h|m|s)", text)
    assert parts, text
    return sum(float(number) * units[unit] for number, unit in parts)


def environment_of(compose: Compose, service: str) -> dict[str, str]:
    found: dict[str, str] = compose["services"][service].get("environment", {})
    return found


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def settings_of(compose: Compose, service: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The service's settings as its container would load them."""
    environment = environment_of(compose, service)
    with monkeypatch.context() as patched:
        for name in list(os.environ):
            if name.startswith("STREAMTOWER_"):
                patched.delenv(name)
        for name, value in environment.items():
            patched.setenv(name, value)
        settings_class: type[BaseSettings] = settings_classes()[service]
        return load_settings(settings_class)


def test_it_has_the_whole_chain_and_what_watches_it(compose: Compose) -> None:
    assert set(compose["services"]) == {
        "kafka", "topics", "qdrant", "streams", "trainer", "retriever", "prometheus", "grafana",
    }  # fmt: skip


def test_every_image_is_pinned_to_a_patch_version(compose: Compose) -> None:
    for name, service in compose["services"].items():
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+(-unprivileged)?", service["image"]), name


def test_our_image_carries_the_projects_version_and_is_built_here(compose: Compose) -> None:
    for name in OURS:
        assert compose["services"][name]["image"] == f"streamtower:{project()['version']}"
        assert Path(compose["services"][name]["build"]["context"]) == ROOT


def test_qdrant_is_within_one_minor_version_of_the_client(compose: Compose) -> None:
    server = re.search(r":v(\d+)\.(\d+)\.", compose["services"]["qdrant"]["image"])
    assert server
    major, minor = version("qdrant-client").split(".")[:2]
    assert int(server[1]) == int(major)
    assert abs(int(server[2]) - int(minor)) <= 1


def test_every_service_restarts_and_says_whether_it_is_well(compose: Compose) -> None:
    for name, service in compose["services"].items():
        if name in ONE_SHOT:
            assert service["restart"] == "on-failure"
            continue
        assert service["restart"] == "unless-stopped", name
        check = service["healthcheck"]
        assert check["test"][0] in ("CMD", "CMD-SHELL"), name
        assert seconds(check["timeout"]) < seconds(check["interval"]) + 1, name


def test_no_container_has_rights_that_it_does_not_need(compose: Compose) -> None:
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert not service.get("cap_add") and not service.get("privileged"), name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service.get("read_only", False) == (name not in WRITABLE_ROOT), name
        assert service.get("user") not in ("root", "0"), name


def test_nothing_listens_beyond_this_machine(compose: Compose) -> None:
    published = {
        name: [(port["host_ip"], int(port["published"]), port["target"]) for port in service["ports"]]
        for name, service in compose["services"].items()
        if service.get("ports")
    }
    assert published == {
        "kafka": [("127.0.0.1", 9092, 9092)],
        "qdrant": [("127.0.0.1", 6333, 6333)],
        "retriever": [("127.0.0.1", 8080, 8080)],
        "prometheus": [("127.0.0.1", 9090, 9090)],
        "grafana": [("127.0.0.1", 3000, 3000)],
    }
    assert all(service.get("network_mode") != "host" for service in compose["services"].values())


def test_another_port_for_kafka_is_also_the_one_that_it_advertises(compose_with: Callable[..., Compose]) -> None:
    kafka = compose_with(KAFKA_PORT="29092")["services"]["kafka"]
    assert kafka["ports"][0]["published"] == "29092"
    assert "EXTERNAL://127.0.0.1:29092" in kafka["environment"]["KAFKA_ADVERTISED_LISTENERS"].split(",")


def test_every_mounted_file_exists_and_is_read_only(compose: Compose) -> None:
    binds = [
        mount for service in compose["services"].values() for mount in service.get("volumes", ())
        if mount["type"] == "bind"
    ]  # fmt: skip
    assert binds
    for mount in binds:
        source = Path(mount["source"])
        assert source.is_dir() and source.is_relative_to(ROOT / "ops"), source
        assert mount["read_only"], source


def test_every_named_volume_is_declared_and_used(compose: Compose) -> None:
    used = {
        mount["source"] for service in compose["services"].values() for mount in service.get("volumes", ())
        if mount["type"] == "volume"
    }  # fmt: skip
    assert used == set(compose["volumes"])


def test_settings_load_as_the_container_would_load_them(
    compose: Compose, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = environment_of(compose, service)
    fields = settings_classes()[service].model_fields
    prefix = f"STREAMTOWER_{service.upper()}_"
    assert environment
    assert {name.removeprefix(prefix).lower() for name in environment} <= set(fields)
    settings = settings_of(compose, service, monkeypatch)
    for name, value in environment.items():
        assert str(getattr(settings, name.removeprefix(prefix).lower())) == value


def test_containers_meet_kafka_where_it_advertises_itself(
    compose: Compose, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    advertised = compose["services"]["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"].split(",")
    address = settings_of(compose, service, monkeypatch).kafka
    assert f"INTERNAL://{address}" in advertised
    assert address in compose["services"]["topics"]["command"]


@pytest.mark.parametrize("service", ["trainer", "retriever"])
def test_containers_meet_qdrant_at_its_own_port(
    compose: Compose, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = urlparse(settings_of(compose, service, monkeypatch).qdrant)
    assert url.hostname == "qdrant"
    assert url.port in [port["target"] for port in compose["services"]["qdrant"]["ports"]]


def mount_at(compose: Compose, service: str, path: Path) -> dict[str, Any]:
    found: list[dict[str, Any]] = [
        mount for mount in compose["services"][service]["volumes"] if Path(mount["target"]) == path
    ]
    assert len(found) == 1, f"{service} has no volume at {path}"
    return found[0]


def test_trainer_and_retriever_share_the_published_versions_and_only_the_trainer_writes(
    compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = mount_at(compose, "trainer", settings_of(compose, "trainer", monkeypatch).model_dir)
    read = mount_at(compose, "retriever", settings_of(compose, "retriever", monkeypatch).model_dir)
    assert written["source"] == read["source"]
    assert not written.get("read_only")
    assert read["read_only"]


def test_checkpoints_are_on_a_volume_of_the_trainers_own(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = mount_at(compose, "trainer", settings_of(compose, "trainer", monkeypatch).checkpoint_dir)
    assert not mount.get("read_only")
    others = [
        other["source"] for name, service in compose["services"].items() if name != "trainer"
        for other in service.get("volumes", ())
    ]  # fmt: skip
    assert mount["source"] not in others


def test_the_trainer_has_time_for_a_last_checkpoint(compose: Compose) -> None:
    """Each of ours ends within 10 s by design; the trainer may have a large checkpoint to write."""
    grace = {name: seconds(compose["services"][name]["stop_grace_period"]) for name in SERVICES}
    assert grace["streams"] >= 30 and grace["retriever"] >= 30
    assert grace["trainer"] >= 120


def test_our_containers_take_further_settings_from_one_file_that_need_not_be_there(compose: Compose) -> None:
    for name in OURS:
        [file] = compose["services"][name]["env_file"]
        assert (Path(file["path"]).name, file["required"]) == ("streamtower.env", False)


def test_the_retriever_does_not_wait_for_the_trainer(compose: Compose) -> None:
    needed: set[str] = set()
    todo = ["retriever"]
    while todo:
        todo += (more := set(compose["services"][todo.pop()].get("depends_on", ())) - needed)
        needed |= more
    assert needed == {"qdrant", "topics", "kafka"}


def test_services_wait_until_the_topics_are_made(compose: Compose, service: str) -> None:
    assert compose["services"][service]["depends_on"]["topics"]["condition"] == "service_completed_successfully"
    assert compose["services"]["topics"]["depends_on"]["kafka"]["condition"] == "service_healthy"


def test_kafka_has_three_listeners_and_keeps_its_data_on_a_volume(compose: Compose) -> None:
    kafka = compose["services"]["kafka"]
    environment = kafka["environment"]
    listeners = dict(entry.split("://") for entry in environment["KAFKA_LISTENERS"].split(","))
    protocols = dict(entry.split(":") for entry in environment["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(","))
    assert set(listeners) == set(protocols) == {"INTERNAL", "EXTERNAL", "CONTROLLER"}
    assert environment["KAFKA_CONTROLLER_QUORUM_VOTERS"] == f"1@kafka{listeners['CONTROLLER']}"
    assert listeners["EXTERNAL"] == f":{kafka['ports'][0]['target']}"
    assert mount_at(compose, "kafka", Path(environment["KAFKA_LOG_DIRS"]))["type"] == "volume"
    assert len(base64.urlsafe_b64decode(environment["CLUSTER_ID"] + "==")) == 16
    assert f"127.0.0.1{listeners['INTERNAL']}" in kafka["healthcheck"]["test"][1]


def test_our_probes_ask_the_port_that_the_service_listens_on(
    compose: Compose, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(compose, service, monkeypatch)
    host, port = (
        (settings.host, settings.port) if service == "retriever" else (settings.metrics_host, settings.metrics_port)
    )
    assert host == "0.0.0.0"
    path = "/healthz" if service == "retriever" else "/metrics"
    assert f"'http://127.0.0.1:{port}{path}'" in compose["services"][service]["healthcheck"]["test"][3]


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server on a free port that answers every GET with this status."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def probe(compose: Compose, service: str, port: int) -> int:
    """Exit code of the health check, run here with another port in the place of the service's own."""
    kind, *command = compose["services"][service]["healthcheck"]["test"]
    assert kind == "CMD"
    own = {"streams": 9101, "trainer": 9102, "retriever": 8080, "qdrant": 6333}[service]
    command = [part.replace("$$", "$").replace(str(own), str(port)) for part in command]
    if command[0] == "python":
        command[0] = sys.executable
    return subprocess.run(command, capture_output=True, timeout=20).returncode


@pytest.mark.parametrize("service", [*SERVICES, "qdrant"])
def test_a_probe_tells_well_from_ill_and_from_away(compose: Compose, service: str) -> None:
    with answering(200) as port:
        assert probe(compose, service, port) == 0
    assert probe(compose, service, port) != 0
    with answering(503) as port:
        assert probe(compose, service, port) != 0


@pytest.mark.index
def test_the_probe_of_qdrant_understands_a_real_answer(compose: Compose, qdrant_url: str) -> None:
    url = urlparse(qdrant_url)
    if url.hostname != "127.0.0.1" or url.port is None:
        pytest.skip("the probe asks its own container: only an endpoint on 127.0.0.1 can stand for it")
    assert probe(compose, "qdrant", url.port) == 0


def test_nothing_of_the_dev_stack_is_in_it() -> None:
    embedded = [re.split(r"[=<>]", name)[0] for name in project()["optional-dependencies"]["embedded"]]
    text = (ROOT / "docker-compose.yml").read_text() + (ROOT / "Dockerfile").read_text()
    for name in [*embedded, "tansu", "embedded", "streamtower.dev", "streamtower/dev"]:
        assert name.lower() not in text.lower(), name
