"""What went, in the order in which it did, and for how long deletes are repeated."""

from __future__ import annotations

import numpy as np

from trainer.gone import SWEEP_SECONDS, Gone, Sweeps


def hashes(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def test_what_went_is_remembered_until_it_comes_or_is_forgotten() -> None:
    gone = Gone(10)
    assert gone.last == -1 and gone.since(-1).tolist() == []
    gone.went(hashes(1, 2), 5)
    gone.went(hashes(3, 1), 7)
    assert (gone, gone.last) == ({2: 5, 3: 7, 1: 7}, 7)
    assert gone.since(4).tolist() == [2, 3, 1] and gone.since(5).tolist() == [3, 1]
    gone.came(hashes(3, 9))
    gone.forget(5)
    assert gone == {1: 7}


def test_of_what_went_so_much_is_remembered_as_was_allowed_and_that_is_the_newest() -> None:
    gone = Gone(2)
    for step in range(5):
        gone.went(hashes(step), step)
    assert gone == {3: 3, 4: 4}


def test_a_delete_is_done_for_good_when_it_was_acknowledged_for_a_minute() -> None:
    sweeps = Sweeps()
    for now, step in ((0.0, 3), (2.0, 4), (SWEEP_SECONDS, 4)):
        sweeps.acknowledge(now, step)
        assert sweeps.step == -1
    sweeps.acknowledge(SWEEP_SECONDS + 1.0, 4)
    assert sweeps.step == 3
    sweeps.begin_at(1)
    sweeps.acknowledge(SWEEP_SECONDS + 3.0, 9)
    assert sweeps.step == 1
