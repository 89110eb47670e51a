"""Settings of streams: what is refused, and that everything reaches its place."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from streams.__main__ import _settings_help, main
from streams.agent import _credentials
from streams.service import EXIT_CONFIGURATION, ConfigurationError, load_settings
from streams.settings import PRESETS, StreamsSettings
from streams.state import PartitionState, StateConfig


def problems(monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[str]:
    for name, value in variables.items():
        monkeypatch.setenv(f"STREAMTOWER_STREAMS_{name.upper()}", value)
    with pytest.raises(ConfigurationError) as raised:
        load_settings(StreamsSettings)
    return raised.value.problems


def test_the_defaults_stand_and_make_a_state() -> None:
    settings = load_settings(StreamsSettings)
    assert settings.state_config() == StateConfig()
    PartitionState(settings.state_config())


def papers_probability(batches: list[list[int]], item: int, alpha: float) -> float:
    """Algorithm 2 as it is printed, for an item that shares no bucket: A = 0, B = 100."""
    last_step, gap = 0, 100.0
    for step, batch in enumerate(batches, 1):
        if item in batch:
            gap = (1 - alpha) * gap + alpha * (step - last_step)
            last_step = step
    return 1 / gap


def test_the_papers_preset_counts_as_the_paper_prints_it_and_a_setting_wins_over_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STREAMTOWER_STREAMS_PRESET", "paper")
    monkeypatch.setenv("STREAMTOWER_STREAMS_ALPHA", "0.1")
    config = load_settings(StreamsSettings).state_config()
    assert config == StateConfig(num_hashes=1, mode="batch", initial_gap=100.0, alpha=0.1)
    estimator = PartitionState(config).estimator
    batches = [[1, 1, 1, 2], [2, 3], [1, 3, 3], *([[3]] * 300), [4]]
    for batch in batches:
        estimator.update(np.array(batch, np.uint64))
    items = [1, 2, 3, 4, 5]
    expected = [papers_probability(batches, item, 0.1) for item in items]
    assert expected[0] == pytest.approx(1 / (0.9 * (0.9 * 100 + 0.1) + 0.1 * 2)), "once an item, and silence counts not"
    assert expected[4] == 1 / 100
    found = estimator.sampling_probability(np.array(items, np.uint64))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    monkeypatch.setenv("STREAMTOWER_STREAMS_NUM_HASHES", "4")
    monkeypatch.setenv("STREAMTOWER_STREAMS_ESTIMATOR_INITIAL_GAP", "0")
    assert load_settings(StreamsSettings).state_config() == StateConfig(mode="batch", alpha=0.1)


def test_presets_name_settings_alone_and_are_taken_later_too() -> None:
    for preset in PRESETS.values():
        assert preset.keys() <= StreamsSettings.model_fields.keys()
    assert set(PRESETS) == set(get_args(StreamsSettings.model_fields["preset"].annotation))
    own = load_settings(StreamsSettings, {}, num_buckets=64, num_hashes=3)
    assert own.with_preset("paper") == load_settings(StreamsSettings, {}, preset="paper", num_buckets=64, num_hashes=3)
    with pytest.raises(ConfigurationError, match="STREAMTOWER_STREAMS_PRESET"):
        load_settings(StreamsSettings, {}, preset="best")


def test_every_problem_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = problems(monkeypatch, batch_size="0", alpha="much", batchsize="3")
    assert len(found) == 3
    for name in ("BATCHSIZE", "BATCH_SIZE", "ALPHA"):
        assert any(problem.startswith(f"STREAMTOWER_STREAMS_{name}:") for problem in found), name


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"num_buckets": "1"}, "NUM_BUCKETS"),
        ({"drift_fast_clicks": "500", "drift_slow_clicks": "500"}, "drift_fast_clicks must be less"),
        ({"estimator_initial_gap": "0.5"}, "estimator_initial_gap must be 0 or at least 1"),
        ({"max_rejected_ratio": "0"}, "MAX_REJECTED_RATIO"),
        ({"topic_prefix": "a b"}, "TOPIC_PREFIX"),
        ({"kafka_security_protocol": "TLS"}, "KAFKA_SECURITY_PROTOCOL"),
    ],
)
def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    (problem,) = problems(monkeypatch, **variables)
    assert message in problem


def test_the_command_refuses_to_start_and_lists_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STREAMTOWER_STREAMS_BATCH_SIZE", "none")
    monkeypatch.setenv("STREAMTOWER_STREAMS_HISTORY_LENGTH", "0")
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == EXIT_CONFIGURATION
    printed = capsys.readouterr().err
    assert "STREAMTOWER_STREAMS_BATCH_SIZE" in printed
    assert "STREAMTOWER_STREAMS_HISTORY_LENGTH" in printed


def test_the_help_names_every_setting_with_its_meaning_and_default() -> None:
    printed = _settings_help()
    for name, field in StreamsSettings.model_fields.items():
        assert f"STREAMTOWER_STREAMS_{name.upper()} (default: " in printed
        assert field.description
        assert field.description in printed


def test_kafka_is_reached_in_the_clear_unless_told_otherwise() -> None:
    assert _credentials(StreamsSettings()) is None


@pytest.mark.parametrize("protocol", ["SASL_PLAINTEXT", "SASL_SSL"])
def test_a_password_reaches_faust_and_stays_out_of_what_is_printed(protocol: str) -> None:
    settings = StreamsSettings(
        kafka_security_protocol=protocol,  # type: ignore[arg-type]
        kafka_sasl_mechanism="SCRAM-SHA-512",
        kafka_username="app",
        kafka_password="hidden-word",  # type: ignore[arg-type]
    )
    credentials = _credentials(settings)
    assert (credentials.username, credentials.password) == ("app", "hidden-word")
    assert (credentials.protocol.value, credentials.mechanism.value) == (protocol, "SCRAM-SHA-512")
    assert (credentials.ssl_context is not None) == (protocol == "SASL_SSL")
    assert "hidden-word" not in repr(settings) + repr(credentials)


def test_a_certificate_is_checked_against_the_broker() -> None:
    credentials = _credentials(StreamsSettings(kafka_security_protocol="SSL"))
    assert credentials.protocol.value == "SSL"
    assert credentials.context.check_hostname


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kafka_security_protocol": "SSL", "kafka_ca_file": "/nowhere/ca.pem"}, "kafka_ca_file '/nowhere/ca.pem'"),
        ({"kafka_security_protocol": "SASL_SSL"}, "SASL_SSL needs kafka_username and kafka_password"),
    ],
)
def test_credentials_that_cannot_work_are_a_problem_of_configuration(values: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_settings(StreamsSettings, {}, **values)
