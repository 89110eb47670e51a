"""Configuration: environment variables with damage are refused with a list of problems, or mean what they say.

An input is a JSON object of variables' values, as a process gets them.
"""

from __future__ import annotations

import json
import math
import os
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from retriever.settings import RetrieverSettings
from streams.service import ConfigurationError, KafkaSettings, load_settings
from streams.settings import StreamsSettings
from trainer.settings import TrainerSettings

SECRET = "a-secret-of-sixteen-letters"
CLASSES: dict[str, type[KafkaSettings]] = {
    "STREAMTOWER_STREAMS_": StreamsSettings,
    "STREAMTOWER_TRAINER_": TrainerSettings,
    "STREAMTOWER_RETRIEVER_": RetrieverSettings,
}


SECRETS = frozenset(
    prefix + name.upper()
    for prefix, settings_class in CLASSES.items()
    for name, field in settings_class.model_fields.items()
    if "SecretStr" in str(field.annotation)
)


def _variables(prefix: str, **values: str) -> bytes:
    return "\0".join(f"{prefix}{name.upper()}={value}" for name, value in values.items()).encode()


CORPUS = (
    _variables(
        "STREAMTOWER_STREAMS_", kafka="broker:9092", batch_size="512", alpha="0.05", estimator_mode="batch",
        drift_slow_clicks="1e6", snapshots="", group_instance_id="worker-1",
    ),
    _variables(
        "STREAMTOWER_STREAMS_", kafka_security_protocol="SASL_SSL", kafka_username="app", kafka_password=SECRET,
        kafka_sasl_mechanism="SCRAM-SHA-512", topic_prefix="shop.", preset="paper", max_rejected_ratio="0.25",
    ),
    _variables(
        "STREAMTOWER_TRAINER_", preset="paper", hidden="[128, 64]", use_user_id="true", seed="7", temperature=".1",
        payload_indexes='{"brand": "keyword"}', qdrant="https://qdrant:6333", qdrant_api_key=SECRET,
        features='{"item": [{"name": "brand", "kind": "categorical"}]}', further_half_lives_clicks="[1000.0]",
    ),
    _variables("STREAMTOWER_TRAINER_", tasks='{"reward": 1, "purchase": 4.5}', covisit="no", max_items="5000"),
    _variables(
        "STREAMTOWER_RETRIEVER_", api_keys=json.dumps([SECRET, SECRET[::-1]]), host="::1", port="0",
        search_timeout_seconds="2.5", max_body_bytes="65536", model_dir="/models", history_lookback_seconds="0",
    ),
)  # fmt: skip
WORDS = (
    b"STREAMTOWER_STREAMS_", b"STREAMTOWER_TRAINER_", b"STREAMTOWER_RETRIEVER_", b"=nan", b"=inf", b"=-1", b"=1e400",
    b"=", b"=true", b"=null", b"=[", b"={", b"[NaN]", b"1_000", b" ", b"[" * 3000, b'{"a":' * 2000, b"\xff",
    b"\xc3\xa9",     b"_KAFKA=", b"_ALIAS=../x",
)  # fmt: skip
_TRUE, _FALSE = {"1", "true", "t", "yes", "y", "on"}, {"0", "false", "f", "no", "n", "off"}


class Environment:
    """This process's environment, with only the variables of one input in it."""

    def check(self, data: bytes) -> bool:
        """Whether a service would start with these variables.

        Raises:
            AssertionError: it would, with other settings than were given; or what it refuses with is no list of
                problems, or holds a secret.
        """
        given = dict(part.split("=", 1) for part in os.fsdecode(data).split("\0") if "=" in part[1:])
        given = {name: value for name, value in given.items() if name.startswith("STREAMTOWER_")}
        prefix = next((prefix for prefix in CLASSES if any(name.startswith(prefix) for name in given)), None)
        if prefix is None:
            return False
        # A secret that damage has moved elsewhere is none any more.
        shown = "".join(name + ("" if name in SECRETS else text) for name, text in given.items())
        hidden = SECRET not in shown and SECRET[::-1] not in shown
        os.environ.update(given)
        try:
            settings = load_settings(CLASSES[prefix])
        except ConfigurationError as error:
            assert error.problems and all(error.problems)
            told = "\n".join(error.problems)
            assert not hidden or (SECRET not in told and SECRET[::-1] not in told), told
            return False
        finally:
            for name in given:
                del os.environ[name]
        assert not hidden or (SECRET not in repr(settings) and SECRET[::-1] not in str(settings))
        others = tuple(other for other in CLASSES if other != prefix)
        for name, text in given.items():
            if name.startswith(others) or name.startswith(
                ("STREAMTOWER_TEST_", "STREAMTOWER_KAFKA_HOME", "STREAMTOWER_DATA")
            ):
                continue
            field = name.removeprefix(prefix).lower()
            assert name.startswith(prefix) and field in CLASSES[prefix].model_fields, f"{name} was passed over"
            wanted = CLASSES[prefix].model_fields[field].annotation
            assert means(getattr(settings, field), text, wanted, field), (field, text, getattr(settings, field))
        return True


def means(value: Any, text: str, wanted: Any, field: str) -> bool:
    """Whether a setting's value is what its text says, read by hand."""
    if isinstance(value, SecretStr):
        return value.get_secret_value() == text
    if isinstance(value, bool):
        return text.strip().lower() in (_TRUE if value else _FALSE)
    if isinstance(value, int | float):
        said = float(text)
        return math.isfinite(value) and (
            value == said if isinstance(value, float) or said < 2**53 else value == int(text)
        )
    if isinstance(value, Path):
        return str(value) == str(Path(text))
    if field == "features":
        return json.loads(value or "{}") == json.loads(text.strip() or "{}") if text.strip()[:1] in ("", "{") else True
    if isinstance(value, str):
        return value == text
    if value is None:
        return type(None) in typing.get_args(wanted) and text in ("null", "None")
    said = json.loads(text)
    plain = (
        [one.get_secret_value() if isinstance(one, SecretStr) else one for one in value]
        if isinstance(value, tuple)
        else value
    )
    numbers = plain if isinstance(plain, list) else list(plain.values())
    assert all(not isinstance(number, float) or math.isfinite(number) for number in numbers)
    return _loose(plain) == _loose(said)


def _loose(value: Any) -> Any:
    """Numbers that JSON gave as text count as numbers."""
    if isinstance(value, dict):
        return {name: _loose(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_loose(inner) for inner in value]
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return value


@contextmanager
def environment() -> Iterator[Environment]:
    """An environment without our variables; what was there comes back."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("STREAMTOWER_")}
    for name in kept:
        del os.environ[name]
    try:
        yield Environment()
    finally:
        os.environ.update(kept)
