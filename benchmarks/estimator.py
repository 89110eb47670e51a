"""How well and how fast item frequencies are estimated: the paper's simulation, a long-tailed stream, clicks a second.

The paper's simulation (§6.1): 1,000 items, q_i ∝ i², mirrored at step 10,000; 128 items a step, drawn without
replacement; the error is Σ|p̂ − p| / (2 · 128) with p = 128 · q. Every variant has 5,000 buckets in all.

The long tail: clicks on a million items with q ∝ 1 / rank, whose ranks are reversed half-way; every variant has 2^20
buckets in all. The error is Σ|q̂ − q| / 2; the log error is the mean of |ln q̂ − ln q| over clicks: how wrong a logQ
correction would be.

All variants count the same draws; a seed draws the items' ids anew, and with them who shares a bucket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.document import Row, parser, report
from streams.contract import Float64Array, Int64Array, UInt64Array
from streams.decayed_counts import DecayedCountEstimator
from streams.frequency import GapEstimator

Estimator = GapEstimator | DecayedCountEstimator
Curves = dict[str, dict[int, list[float]]]
"""Variant → step → error by seed."""

NUM_ITEMS, BATCH_SIZE, MIRRORED_AT, LAST_STEP = 1_000, 128, 10_000, 20_000
PAPER_STEPS = (100, 1_000, 3_000, 5_000, 10_000, 10_100, 11_000, 12_000, 20_000)
PLOTTED_EVERY = 200
HALF_LIFE_STEPS = np.log(2) / 0.003

TAIL_ITEMS, TAIL_BATCH, TAIL_CLICKS = 1_000_000, 256, 10_000_000
TAIL_CHECKS = (1_000_000, 5_000_000, 6_000_000, 10_000_000)
TAIL_HALF_LIVES = (200_000.0, 1_000_000.0)

SPEED_ITEMS, SPEED_BATCH, SPEED_REPEATS = 5_000_000, 256, 3


@dataclass(frozen=True)
class Variant:
    """An estimator, and how its answer becomes the probability that an item is in a batch."""

    make: Callable[[], Estimator]
    presence: Callable[[Any, UInt64Array], Float64Array]


def _paper(alpha: float, num_hashes: int) -> Variant:
    return Variant(
        lambda: GapEstimator(5_000 // num_hashes, num_hashes, alpha, "batch", initial_gap=100.0),
        lambda estimator, item_hash: estimator.estimate(item_hash).share,
    )


def _decayed(conservative: bool) -> Variant:
    return Variant(
        lambda: DecayedCountEstimator((HALF_LIFE_STEPS * BATCH_SIZE,), 1_250, 4, conservative=conservative),
        lambda estimator, item_hash: BATCH_SIZE * estimator.estimate(item_hash).share[:, 0],
    )


PAPER_VARIANTS = {
    "paper_alpha0.1_m1": _paper(0.1, 1),
    "paper_alpha0.02_m1": _paper(0.02, 1),
    "paper_alpha0.01_m1": _paper(0.01, 1),
    "paper_alpha0.001_m1": _paper(0.001, 1),
    "paper_alpha0.01_m2": _paper(0.01, 2),
    "paper_alpha0.01_m4": _paper(0.01, 4),
    "gap_batch_m4": Variant(
        lambda: GapEstimator(1_250, 4, 0.01, "batch"),
        lambda estimator, item_hash: estimator.estimate(item_hash, in_batch=True).share,
    ),
    "gap_batch_stale_m4": Variant(
        lambda: GapEstimator(1_250, 4, 0.01, "batch"),
        lambda estimator, item_hash: estimator.estimate(item_hash).share,
    ),
    "gap_click_m4": Variant(
        lambda: GapEstimator(1_250, 4, 0.01),
        lambda estimator, item_hash: BATCH_SIZE * estimator.estimate(item_hash, in_batch=True).share,
    ),
    "decayed_plain_m4": _decayed(conservative=False),
    "decayed_m4": _decayed(conservative=True),
}


def main() -> None:
    """Measures and reports."""
    options = parser("estimator", (__doc__ or "").splitlines()[0])
    options.add_argument("--seeds", type=int, default=3, help="of the simulations (default 3)")
    options.add_argument("--clicks", type=int, default=10_000_000, help="for the speed (default 10 million)")
    options.add_argument("--plots", type=Path, metavar="DIR", help="write PNGs there; needs the extra `evaluate`")
    given = options.parse_args()
    rows = speed(given.clicks)
    curves = paper_simulation(range(given.seeds))
    rows += error_rows("estimator.paper", "t", {name: pick(curve, PAPER_STEPS) for name, curve in curves.items()})
    errors, log_errors = long_tail(range(given.seeds))
    rows += error_rows("estimator.zipf", "n", errors) + error_rows("estimator.zipf", "n", log_errors, "log_error")
    if given.plots:
        given.plots.mkdir(parents=True, exist_ok=True)
        plot(curves, "step", "error", given.plots / "estimator_paper.png")
        plot(errors, "clicks", "error", given.plots / "estimator_zipf.png")
        plot(log_errors, "clicks", "log error", given.plots / "estimator_zipf_log.png")
    report("estimator", rows, given.json)


def pick(curve: Mapping[int, list[float]], steps: Sequence[int]) -> dict[int, list[float]]:
    """The points at `steps`."""
    return {step: curve[step] for step in steps}


def error_rows(stem: str, unit: str, curves: Mapping[str, Mapping[int, list[float]]], name: str = "error") -> list[Row]:
    """Mean over the seeds and standard deviation of one run, for every variant and point."""
    rows = []
    for variant, curve in curves.items():
        for step, errors in curve.items():
            rows.append(Row(f"{stem}.{variant}.{unit}{step}.{name}", float(np.mean(errors)), "1"))
            if len(errors) > 1:
                rows.append(Row(f"{stem}.{variant}.{unit}{step}.{name}_std", float(np.std(errors, ddof=1)), "1"))
    return rows


def paper_shares(step: int) -> Float64Array:
    """[NUM_ITEMS] each item's q in a step, 1-based."""
    squares = np.arange(1, NUM_ITEMS + 1, dtype=np.float64) ** 2
    return (squares if step <= MIRRORED_AT else squares[::-1]) / squares.sum()


def paper_draws(rng: np.random.Generator, last_step: int) -> Iterator[tuple[int, Int64Array]]:
    """Step and its items, drawn one after the other without replacement: the largest of log q + Gumbel noise."""
    for step in range(1, last_step + 1):
        keys = np.log(paper_shares(step)) + rng.gumbel(size=NUM_ITEMS)
        yield step, np.argpartition(-keys, BATCH_SIZE)[:BATCH_SIZE]


def paper_simulation(
    seeds: Sequence[int], last_step: int = LAST_STEP, variants: Mapping[str, Variant] = PAPER_VARIANTS
) -> Curves:
    """The errors of each variant, at the table's steps and often enough between them to be drawn."""
    curves: Curves = {name: {} for name in variants}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        item_hash = rng.integers(0, 2**64, NUM_ITEMS, np.uint64)
        estimators = {name: variant.make() for name, variant in variants.items()}
        for step, items in paper_draws(rng, last_step):
            for estimator in estimators.values():
                estimator.update(item_hash[items])
            if step in PAPER_STEPS or step % PLOTTED_EVERY == 0:
                target = BATCH_SIZE * paper_shares(step)
                for name, variant in variants.items():
                    error = np.abs(variant.presence(estimators[name], item_hash) - target).sum() / (2 * BATCH_SIZE)
                    curves[name].setdefault(step, []).append(float(error))
    return curves


def long_tail(
    seeds: Sequence[int],
    num_items: int = TAIL_ITEMS,
    checks: Sequence[int] = TAIL_CHECKS,
    num_buckets: int = 2**20,
) -> tuple[Curves, Curves]:
    """Errors and log errors of each variant at numbers of clicks; at half of the last one the ranks are reversed."""
    law = 1 / np.arange(1, num_items + 1)
    law /= law.sum()
    errors: Curves = {}
    log_errors: Curves = {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        item_hash = rng.integers(0, 2**64, num_items, np.uint64)
        estimators: dict[str, Estimator] = {
            "paper_alpha0.01_m1": GapEstimator(num_buckets, 1, 0.01, "batch", initial_gap=100.0),
            "gap_click_m1": GapEstimator(num_buckets, 1, 0.01),
            "gap_click_m4": GapEstimator(num_buckets // 4, 4, 0.01),
            "decayed_m4": DecayedCountEstimator(TAIL_HALF_LIVES, num_buckets // 4, 4),
        }
        cumulative, done = np.cumsum(law), 0
        for check in checks:
            items = np.searchsorted(cumulative, rng.random(check - done) * cumulative[-1])
            q = law if check <= checks[-1] // 2 else law[::-1]
            clicks = item_hash[items if q is law else num_items - 1 - items]
            for name, estimator in estimators.items():
                for low in range(0, len(clicks), TAIL_BATCH):
                    estimator.update(clicks[low : low + TAIL_BATCH])
                for variant, share in tail_shares(name, estimator, item_hash).items():
                    error = float(np.abs(share - q).sum() / 2)
                    # no share is below one click in all: so the gap estimator answers for an item never hit
                    log_error = float(q @ np.abs(np.log(np.maximum(share, 1 / (check + 1)) / q)))
                    errors.setdefault(variant, {}).setdefault(check, []).append(error)
                    log_errors.setdefault(variant, {}).setdefault(check, []).append(log_error)
            done = check
    return errors, log_errors


def tail_shares(name: str, estimator: Estimator, item_hash: UInt64Array) -> dict[str, Float64Array]:
    """Variant → shares of clicks [n]; a presence probability is taken back to the share that would give it."""
    if isinstance(estimator, DecayedCountEstimator):
        shares = estimator.estimate(item_hash).share.T
        half_lives = estimator.half_lives
        return {f"{name}_h{int(half_life)}": share for half_life, share in zip(half_lives, shares, strict=True)}
    share = estimator.estimate(item_hash).share
    if estimator.mode == "batch":
        share = -np.expm1(np.log1p(-np.minimum(share, 1 - 1e-12)) / TAIL_BATCH)
    return {name: share}


def speed(num_clicks: int) -> list[Row]:
    """Update and estimate of Zipf(1.1) clicks in micro-batches, beside np.add.at on one array.

    In seconds of the processor, one thread, the best of several runs that take turns: what else the machine does at the
    time costs them caches, but no waiting.
    """
    rng = np.random.default_rng(0)
    cumulative = np.cumsum(np.arange(1, SPEED_ITEMS + 1) ** -1.1)
    ids = rng.integers(0, 2**64, SPEED_ITEMS, np.uint64)
    clicks = ids[np.searchsorted(cumulative, rng.random(num_clicks) * cumulative[-1])]
    bucket, counts = (clicks >> np.uint64(42)).astype(np.int64), np.zeros(2**22)

    def gap() -> None:
        estimator = GapEstimator(2**22, 2)
        for low in range(0, num_clicks, SPEED_BATCH):
            batch = clicks[low : low + SPEED_BATCH]
            estimator.update(batch)
            estimator.sampling_probability(batch, in_batch=True)

    def decayed() -> None:
        estimator = DecayedCountEstimator((5_000.0, 50_000.0), 2**22, 2)
        for low in range(0, num_clicks, SPEED_BATCH):
            batch = clicks[low : low + SPEED_BATCH]
            estimator.update(batch)
            estimator.estimate(batch)

    def add_at() -> None:
        np.add.at(counts, bucket, 1.0)

    seconds: dict[Callable[[], None], float] = {gap: np.inf, decayed: np.inf, add_at: np.inf}
    for estimator in (GapEstimator(16, 2), DecayedCountEstimator((2.0, 3.0), 16, 2)):  # compiles
        estimator.update(clicks[:1])
        estimator.estimate(clicks[:1])
    for _ in range(SPEED_REPEATS):
        for run in seconds:
            started = time.process_time()
            run()
            seconds[run] = min(seconds[run], time.process_time() - started)
    return [
        Row("estimator.clicks_per_second", num_clicks / seconds[gap], "clicks/s"),
        Row("estimator.ratio_to_add_at", seconds[add_at] / seconds[gap], "1"),
        Row("estimator.add_at_per_second", num_clicks / seconds[add_at], "clicks/s"),
        Row("estimator.decayed.clicks_per_second", num_clicks / seconds[decayed], "clicks/s"),
        Row("estimator.bytes", GapEstimator(2**22, 2).num_bytes, "B"),
        Row("estimator.decayed.bytes", DecayedCountEstimator((5_000.0, 50_000.0), 2**22, 2).num_bytes, "B"),
    ]


def plot(curves: Mapping[str, Mapping[int, list[float]]], horizontal: str, vertical: str, path: Path) -> None:
    """Mean error over the seeds, one line a variant, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), dpi=110)
    for name, curve in curves.items():
        steps = sorted(curve)
        line = "--" if name.startswith("paper") else "-"
        axes.plot(steps, [float(np.mean(curve[step])) for step in steps], line, label=name, linewidth=1.3)
    axes.set(xlabel=horizontal, ylabel=vertical, yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
