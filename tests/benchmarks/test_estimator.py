"""The estimator's benchmark by value, in small: draws, errors, rows and plots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import estimator as benchmark
from benchmarks.estimator import PAPER_VARIANTS, Variant, error_rows, long_tail, paper_draws, paper_shares, plot
from streams.decayed_counts import DecayedCountEstimator
from streams.frequency import GapEstimator


def test_items_are_drawn_by_their_shares_without_replacement_and_mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "MIRRORED_AT", 1_000)
    counts = np.zeros((2, 1_000))
    for step, items in paper_draws(np.random.default_rng(1), 2_000):
        assert len(set(items.tolist())) == 128
        counts[int(step > 1_000), items] += 1
    inclusion = counts / 1_000
    np.testing.assert_allclose(counts.sum(axis=1), 128_000)
    # drawing without replacement includes the most likely items a little less often than 128 · q says
    floor = np.abs(inclusion[0] - 128 * paper_shares(1)).sum() / 256
    assert 0.02 < floor < 0.045  # .024 of it is the scheme's, the rest that 1,000 steps are few
    np.testing.assert_allclose(inclusion[0][-100:].mean(), inclusion[1][:100].mean(), rtol=0.03)
    assert paper_shares(1_001)[0] == paper_shares(1)[-1] == 1_000**2 / sum(n * n for n in range(1, 1_001))


def test_an_error_is_half_the_distance_over_the_batch() -> None:
    """Of an estimator that answers a constant: Σ|c − 128·q| / 256."""
    constant = Variant(lambda: GapEstimator(2, 1), lambda _, item_hash: np.full(len(item_hash), 0.128))
    curves = benchmark.paper_simulation(range(2), 100, {"constant": constant})
    expected = np.abs(0.128 - 128 * paper_shares(1)).sum() / 256
    assert curves == {"constant": {100: [pytest.approx(expected)] * 2}}


def test_the_reference_and_the_best_come_out_at_step_1000() -> None:
    names = ("paper_alpha0.01_m4", "gap_batch_m4", "decayed_m4")
    curves = benchmark.paper_simulation(range(2), 1_000, {name: PAPER_VARIANTS[name] for name in names})
    errors = {name: np.mean(curve[1_000]) for name, curve in curves.items()}
    assert errors["paper_alpha0.01_m4"] == pytest.approx(0.324, abs=0.01)
    assert errors["gap_batch_m4"] == pytest.approx(0.055, abs=0.008)
    assert errors["decayed_m4"] == pytest.approx(0.047, abs=0.008)


def test_every_variant_has_five_thousand_buckets() -> None:
    for variant in PAPER_VARIANTS.values():
        made = variant.make()
        assert made.num_buckets * made.num_hashes == 5_000
        assert made.num_bytes == 16 * 5_000


def test_the_long_tail_is_counted_before_and_after_its_reversal() -> None:
    errors, log_errors = long_tail(range(1), num_items=200, checks=(20_000, 40_000, 80_000), num_buckets=2**14)
    assert errors.keys() == log_errors.keys()
    assert len(errors) == 5
    # half-life 200,000: as good as a plain count of 40,000 clicks, and then of two laws half and half
    law = 1 / np.arange(1, 201) / np.sum(1 / np.arange(1, 201))
    assert errors["decayed_m4_h200000"][40_000][0] == pytest.approx(
        np.sum(np.sqrt(2 / np.pi * law * (1 - law) / 40_000)) / 2, rel=0.15
    )
    assert errors["decayed_m4_h200000"][80_000][0] == pytest.approx(np.abs(law - law[::-1]).sum() / 4, rel=0.1)
    assert log_errors["decayed_m4_h1000000"][40_000][0] == pytest.approx(
        np.sum(law * np.sqrt(2 / np.pi * (1 - law) / law / 40_000)), rel=0.15
    )


def test_a_presence_is_taken_back_to_a_share() -> None:
    item_hash = np.array([1, 2], np.uint64)
    papers = GapEstimator(2**10, 1, 0.5, "batch", initial_gap=4.0)
    shares = benchmark.tail_shares("paper", papers, item_hash)
    np.testing.assert_allclose(1 - (1 - shares["paper"]) ** 256, 0.25)
    decayed = DecayedCountEstimator((5.0, 7.0), 2**10, 2)
    decayed.update(item_hash[:1])
    shares = benchmark.tail_shares("decayed", decayed, item_hash)
    assert {name: share.tolist() for name, share in shares.items()} == {
        "decayed_h5": [1.0, 0.0], "decayed_h7": [1.0, 0.0]
    }  # fmt: skip


def test_rows_name_variant_and_step_and_tell_mean_and_spread() -> None:
    rows = error_rows("estimator.paper", "t", {"decayed_m4": {1_000: [0.04, 0.06]}})
    assert [(row.name, row.value) for row in rows] == [
        ("estimator.paper.decayed_m4.t1000.error", pytest.approx(0.05)),
        ("estimator.paper.decayed_m4.t1000.error_std", pytest.approx(0.01 * np.sqrt(2))),
    ]
    assert len(error_rows("estimator.paper", "t", {"decayed_m4": {1_000: [0.04]}})) == 1


def test_the_speed_is_told_beside_that_of_add_at() -> None:
    values = {row.name: row.value for row in benchmark.speed(20_000)}
    per_second, add_at = values["estimator.clicks_per_second"], values["estimator.add_at_per_second"]
    assert values["estimator.ratio_to_add_at"] == pytest.approx(per_second / add_at)
    assert values["estimator.decayed.clicks_per_second"] > 0
    assert values["estimator.bytes"] == 16 * 2 * 2**22
    assert values["estimator.decayed.bytes"] == 24 * 2 * 2**22


def test_curves_become_a_png(tmp_path: Path) -> None:
    plot({"paper": {1: [0.5], 2: [0.25]}, "ours": {1: [0.1, 0.2]}}, "step", "error", tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
