"""The app for Faust's own command line: `faust -A streams.app worker --without-web`.

Station: a door, and the one module that works when it is imported, because Faust's command line looks for an app in a
module. `python -m streams` does not use it.
"""

from __future__ import annotations

from streams.agent import create_app, warm_up
from streams.broker import DependencyError
from streams.metrics import Metrics
from streams.serve import serve
from streams.service import EXIT_DEPENDENCY, ConfigurationError, load_settings, refuse_to_start, set_up_logs
from streams.settings import StreamsSettings

try:
    _settings, _metrics = load_settings(StreamsSettings), Metrics()
    set_up_logs("streams")
    app = create_app(_settings, _metrics)
    serve(_settings, _metrics, app.latest_movers)
except ConfigurationError as error:
    refuse_to_start("streams", error)
except DependencyError as error:
    raise SystemExit(EXIT_DEPENDENCY) from error
warm_up()
