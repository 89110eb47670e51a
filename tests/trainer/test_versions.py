"""The model directory: a version is there whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.contract import ManifestError, load_manifest, version_checksum

FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from tests.trainer.small_trainer import CONFIG
from trainer.contract import Manifest
from trainer.towers import build_towers
from trainer.versions import Versions
versions = Versions(Path(sys.argv[1]))
tower, _ = build_towers(CONFIG, 0)
def manifest(number):
    return Manifest(
        model_version=number, collection="c", embedding_dim=8, popularity_dims=1, popularity_weights=[1.0],
        popularity_scale=20.0, temperature=0.1,
        towers=CONFIG.to_dict(), num_items=0, step=0, source_offsets={}, settings_hash="", created_at=0.0,
    )
versions.write(manifest(1), tower)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000))
try:
    versions.write(manifest(2), tower)
except OSError as error:
    print(error)
print(versions.numbers())
"""


def test_a_manifest_nested_too_deep_to_be_read_is_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b'{"towers":{"a":' + b"[" * 100_000)
    with pytest.raises(ManifestError, match="no Manifest"):
        load_manifest(tmp_path)


def test_a_disk_that_takes_no_more_leaves_the_versions_before_and_nothing_half_written(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, numbers = done.stdout.splitlines()[-2:]
    assert "File too large" in said and numbers == "[1]"
    assert [path.name for path in tmp_path.iterdir()] == ["v00000001"]
    directory = tmp_path / "v00000001"
    assert (directory / "checksum").read_text() == version_checksum(directory)
