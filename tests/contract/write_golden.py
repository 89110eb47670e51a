"""Writes the golden bytes of the version that the code writes: `python -m tests.contract.write_golden`.

Only for a new version; bytes of a version that was released are never written again.
"""

from __future__ import annotations

from pathlib import Path

from streams.contract import MICRO_BATCH_VERSION
from tests.contract.batches import FIXED

if __name__ == "__main__":
    path = Path(__file__).parent / "golden" / f"micro_batch_v{MICRO_BATCH_VERSION}.arrow"
    with path.open("xb") as file:
        file.write(FIXED.encode())
