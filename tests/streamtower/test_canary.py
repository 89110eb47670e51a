"""What the prober takes for its own click; the whole way is measured in tests/e2e/test_chain.py."""

from __future__ import annotations

import time

import numpy as np
import pytest

from streamtower.canary import _shows
from trainer.aliases import switch
from trainer.index import Index, new_client

pytestmark = pytest.mark.index


def test_a_click_is_seen_once_it_is_told_whatever_its_last_digit(qdrant_url: str, alias: str) -> None:
    client = new_client(qdrant_url, None, 10)
    index = Index(client, alias)
    assert not _shows(client, alias, 1.0)  # no alias yet
    index.create(1, 4, hnsw=False)
    switch(client, alias, 1)
    assert not _shows(client, alias, 1.0)
    times = time.time() - 200 + np.cumsum(np.random.default_rng(0).uniform(0.1, 1.0, 100))
    for step, event_time in enumerate(times.tolist(), 1):
        assert not _shows(client, alias, event_time)
        index.tell_canary(1, event_time, step)
        assert _shows(client, alias, event_time)
    index.tell_canary(1, float(times[3]), 4)  # an older one comes late
    assert _shows(client, alias, float(times[-1]))
    client.close()


def test_a_click_from_the_future_is_no_proof_and_gives_way_to_the_next(qdrant_url: str, alias: str) -> None:
    client = new_client(qdrant_url, None, 10)
    index = Index(client, alias)
    index.create(1, 4, hnsw=False)
    switch(client, alias, 1)
    index.tell_canary(1, time.time() + 86_400, 1)
    sent_at = time.time()
    assert not _shows(client, alias, sent_at)
    index.tell_canary(1, sent_at, 2)
    assert _shows(client, alias, sent_at)
    client.close()
