"""What a figure depends on beside the code: the machine and the libraries.

Station: beside the data's way; in the demo's summary and in every benchmark's document.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

VERSIONS = ("torch", "faust-streaming", "aiokafka", "confluent-kafka", "qdrant-client", "numpy", "pyarrow")


def machine() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    return {
        "processors": os.cpu_count(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Versions of the libraries that do the work."""
    return {name: metadata.version(name) for name in VERSIONS}
