"""How a command reaches Kafka, and what becomes of an error that a command raises.

Station: beside the command line; it connects to nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsConfigDict

from streams.service import EXIT_CONFIGURATION, EXIT_DEPENDENCY, KafkaSettings
from streamtower.options import fail

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class ConnectionSettings(KafkaSettings):
    """How the commands reach Kafka: by the variables that `streams` reads, so that one place names the broker."""

    model_config = SettingsConfigDict(env_prefix="STREAMTOWER_STREAMS_", frozen=True)


Kafka = Annotated[
    str | None,
    typer.Option(
        help="Broker, HOST:PORT; else the variables STREAMTOWER_STREAMS_KAFKA… (security too).", metavar="HOST:PORT"
    ),
]
Prefix = Annotated[str | None, typer.Option(help="Put before every topic's name.")]


def connection(kafka: str | None, topic_prefix: str | None) -> ConnectionSettings:
    """The settings, with the options that were given put over them."""
    given: dict[str, Any] = {"kafka": kafka, "topic_prefix": topic_prefix}
    return ConnectionSettings(**{name: value for name, value in given.items() if value is not None})


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turns what a command raises into a line on stderr and an exit code."""
    from streamtower.asking import AskError, RetrieverAwayError
    from streamtower.datasets.clicks import DatasetError
    from streamtower.producer import DeliveryError
    from streamtower.topics import BrokerAwayError, TopicsError

    try:
        yield
    except DatasetError as error:
        fail(str(error), EXIT_USAGE)
    except (BrokerAwayError, RetrieverAwayError, DeliveryError) as error:
        fail(str(error), EXIT_DEPENDENCY)
    except (TopicsError, AskError) as error:
        fail(str(error), EXIT_FAILURE)
    except ValidationError as error:
        prefix = str(ConnectionSettings.model_config["env_prefix"])
        problems = [f"{prefix}{str((*p['loc'], 'kafka')[0]).upper()}: {p['msg']}" for p in error.errors()]
        fail("; ".join(problems), EXIT_CONFIGURATION)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
