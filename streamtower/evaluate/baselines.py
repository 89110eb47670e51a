"""What the model is held against: live popularity, and matrix factorisation that is refitted again and again.

Station: contestants of an evaluation, beside the model and item-kNN. Each block is ranked with the state from before
it, and then learnt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from streams.contract import Float32Array, Float64Array
from streamtower.evaluate.ranking import Seen, ranked
from streamtower.evaluate.replay import Block, Stream

FILL_HALF_LIFE = 5_000.0
"""Half-life, in clicks, of the popularity that orders items which a baseline cannot tell apart."""


class ClickCounts:
    """Decayed click counts of all items of a stream.

    Args:
        num_items: N of the whole stream.
        half_life: in clicks; inf counts all clicks alike.
    """

    def __init__(self, num_items: int, half_life: float) -> None:
        self.counts: Float64Array = np.zeros(num_items)
        self._rate = math.log(2) / half_life

    def add(self, block: Block) -> None:
        """Counts a block: a click that is k clicks old weighs 2^(−k / half_life)."""
        n = len(block)
        self.counts *= math.exp(-self._rate * n)
        np.add.at(self.counts, block.target, np.exp(self._rate * (np.arange(1, n + 1) - n)))

    def known(self, block: Block) -> Float64Array:
        """Of the block's candidates: float64 [N]."""
        return self.counts[: block.num_known]


class Popularity:
    """Ranks items by their recent clicks, the same for everybody.

    Args:
        stream: whose blocks will come.
        half_life: in clicks.
    """

    def __init__(self, stream: Stream, half_life: float) -> None:
        self._counts = ClickCounts(len(stream.item_hash), half_life)

    def observe(self, block: Block) -> Seen:
        """What was foreseen of the block, which is then learnt."""
        popularity = self._counts.known(block)
        seen = ranked(block, np.zeros((len(block), len(popularity)), np.float32), popularity)
        self._counts.add(block)
        return seen


class ALS:
    """`implicit`'s alternating least squares (Hu, Koren, Volinsky 2008), refitted to all clicks so far at even borders.

    A query is folded in from its history as it is known at the click, so that new users are no strangers.

    Args:
        stream: whose blocks will come.
        num_fits: borders, evenly over the stream.
        factors, regularization, alpha, iterations: as in `implicit`.
        seed: of the first factors.

    Raises:
        ModuleNotFoundError: `implicit` is not installed.
    """

    def __init__(
        self,
        stream: Stream,
        num_fits: int = 40,
        *,
        factors: int = 32,
        regularization: float = 100.0,
        alpha: float = 40.0,
        iterations: int = 15,
        seed: int = 0,
    ) -> None:
        import implicit.als
        import scipy.sparse
        import threadpoolctl

        self._one_thread: Callable[[], Any] = lambda: threadpoolctl.threadpool_limits(1, user_api="blas")
        self._new_model: Callable[[], Any] = lambda: implicit.als.AlternatingLeastSquares(
            factors=factors, regularization=regularization, alpha=alpha, iterations=iterations, num_threads=1,
            random_state=seed,
        )  # fmt: skip
        self._csr = scipy.sparse.csr_matrix
        self._borders = [round(stream.num_clicks * fit / num_fits) for fit in range(1, num_fits)]
        self._users: dict[int, int] = {}
        self._clicks: list[tuple[Any, Any]] = []
        self._num_clicks = 0
        self._model: Any = None
        self._counts = ClickCounts(len(stream.item_hash), FILL_HALF_LIFE)

    def observe(self, block: Block) -> Seen:
        """What was foreseen of the block, which is then remembered for the next fit."""
        seen = ranked(block, self._scores(block), self._counts.known(block))
        self._counts.add(block)
        users = [self._users.setdefault(key, len(self._users)) for key in block.batch.user_hash.tolist()]
        self._clicks.append((np.array(users), block.target))
        self._num_clicks += len(block)
        if self._borders and self._num_clicks >= self._borders[0]:
            self._borders = [border for border in self._borders if border > self._num_clicks]
            self._fit()
        return seen

    def _fit(self) -> None:
        user, item = (np.concatenate(column) for column in zip(*self._clicks, strict=True))
        matrix = self._csr((np.ones(len(user), np.float32), (user, item)))
        matrix.sum_duplicates()
        with self._one_thread():  # implicit's own threads and BLAS's would be in each other's way
            self._model = self._new_model()
            self._model.fit(matrix, show_progress=False)

    def _scores(self, block: Block) -> Float32Array:
        scores = np.zeros((len(block), block.num_known), np.float32)
        if self._model is None:
            return scores
        num_fitted = len(self._model.item_factors)
        row = np.repeat(np.arange(len(block)), np.diff(block.history_offsets))
        fitted = block.history_values < num_fitted
        histories = self._csr(
            (np.ones(int(fitted.sum()), np.float32), (row[fitted], block.history_values[fitted])),
            shape=(len(block), num_fitted),
        )
        histories.sum_duplicates()
        has_history = np.diff(histories.indptr) > 0
        if has_history.any():
            queries = self._model.recalculate_user(np.arange(int(has_history.sum())), histories[has_history])
            scores[has_history, :num_fitted] = queries @ self._model.item_factors.T
        return scores
