"""PUBLIC: what every service process does the same way — settings, refusal to start, logs, exit codes, Kafka security.

Station: none; it is the doorstep of `streams`, `trainer` and `retriever`. It knows no service's settings and no topic.
"""

from __future__ import annotations

import logging
import os
import ssl
import sys
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, Self, TypeVar

import structlog
from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

EXIT_DEPENDENCY = 69
"""A broker, index or other service did not answer within the deadline (EX_UNAVAILABLE)."""
EXIT_BUG = 70
"""A broken invariant (EX_SOFTWARE): nothing was acknowledged, a restart takes the work up again."""
EXIT_CONFIGURATION = 78
"""Settings that cannot work (EX_CONFIG)."""

SERVICES = ("STREAMS", "TRAINER", "RETRIEVER")
_OTHER_VARIABLES = ("STREAMTOWER_TEST_", "STREAMTOWER_KAFKA_HOME", "STREAMTOWER_DATA")
_OF_JSON = ("tuple_type", "list_type", "dict_type")

SettingsT = TypeVar("SettingsT", bound=BaseSettings)


class ConfigurationError(Exception):
    """Settings that cannot work. `problems`: one line each, with its remedy."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class _Environment(EnvSettingsSource):
    """Leaves a value that should be JSON and is not as it stands: it is refused along with all other problems."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except (ValueError, RecursionError):
            return value


class KafkaSettings(BaseSettings):
    """How a service reaches Kafka; the base of the settings of each service that does."""

    model_config = SettingsConfigDict(frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What is given in code, then the environment; no files."""
        return init_settings, _Environment(settings_cls)

    kafka: str = Field("127.0.0.1:9092", min_length=1)
    """Bootstrap servers, HOST:PORT[,HOST:PORT …]."""
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """How the connection is secured."""
    kafka_ca_file: str | None = None
    """PEM file of the authority that signed the brokers' certificates; none: the system's authorities."""
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    """SASL mechanism, used with the SASL_* protocols."""
    kafka_username: str | None = None
    """SASL user name."""
    kafka_password: SecretStr | None = None
    """SASL password."""
    topic_prefix: str = Field("", pattern=r"^[A-Za-z0-9._-]{0,100}$")
    """Put before every topic name, so that several Streamtowers can use one broker."""

    @model_validator(mode="after")
    def _security_is_whole(self) -> Self:
        problems = []
        if self.kafka_security_protocol.startswith("SASL") and not (self.kafka_username and self.kafka_password):
            problems.append(f"{self.kafka_security_protocol} needs kafka_username and kafka_password")
        if self.kafka_ca_file:
            try:
                ssl.create_default_context(cafile=self.kafka_ca_file)
            except OSError as error:
                problems.append(f"kafka_ca_file {self.kafka_ca_file!r} cannot be read: {error}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def confluent_config(self) -> dict[str, Any]:
        """What a confluent-kafka client needs to connect."""
        config: dict[str, Any] = {"bootstrap.servers": self.kafka, "security.protocol": self.kafka_security_protocol}
        if self.kafka_ca_file:
            config["ssl.ca.location"] = self.kafka_ca_file
        if self.kafka_security_protocol.startswith("SASL"):
            config["sasl.mechanism"] = self.kafka_sasl_mechanism
            config["sasl.username"] = self.kafka_username or ""
            config["sasl.password"] = self.kafka_password.get_secret_value() if self.kafka_password else ""
        return config


def load_settings(
    settings_class: type[SettingsT], environment: Mapping[str, str] | None = None, **values: object
) -> SettingsT:
    """The service's settings from its environment variables and `values`, which win.

    pydantic-settings passes over a misspelt variable in silence; here each STREAMTOWER_* variable must be a field.

    Raises:
        ConfigurationError: every problem at once, each with its remedy.
    """
    environment = os.environ if environment is None else environment
    prefix = str(settings_class.model_config["env_prefix"]).upper()
    known = {prefix + name.upper() for name in settings_class.model_fields}
    others = tuple(f"STREAMTOWER_{service}_" for service in SERVICES if f"STREAMTOWER_{service}_" != prefix)
    problems = [
        f"{name}: no such setting; settings here start with {prefix} and are listed by --help"
        for name in sorted(environment)
        if name.startswith("STREAMTOWER_") and name not in known and not name.startswith(others + _OTHER_VARIABLES)
    ]
    problems += [
        f"{name}: not UTF-8" for name in sorted(known & environment.keys()) if not _is_unicode(environment[name])
    ]
    try:
        settings = settings_class(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        for problem in error.errors(include_input=False, include_url=False):
            name = "_".join(str(part) for part in problem["loc"]) or "settings"
            json_hint = ", as JSON" if problem["type"] in _OF_JSON else ""
            problems.append(f"{prefix}{name.upper()}: {problem['msg']}{json_hint}")
        raise ConfigurationError(problems) from None
    except RecursionError:
        raise ConfigurationError([*problems, f"{prefix}*: a value is nested too deep to be read"]) from None
    if problems:
        raise ConfigurationError(problems)
    return settings


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse_to_start(service: str, error: ConfigurationError) -> NoReturn:
    """Lists every problem on stderr and ends the process with EXIT_CONFIGURATION."""
    print(f"{service} cannot start:", *(f"  - {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
    raise SystemExit(EXIT_CONFIGURATION)


def set_up_logs(service: str) -> None:
    """Structured logs on stderr: for people on a terminal, JSON lines elsewhere. Never user ids, never secrets."""
    renderer: Any = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.format_exc_info, renderer],
        # A line in one write: `print` makes two, and a library's line on another thread gets between them.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    # Libraries log through the standard library: the same renderer, warnings only.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
