"""The Manifest of a version that would be published now: sizes, weights, positions, and how good the model is.

Station: between the model and the publisher, on the loop's thread. It copies nothing and writes nothing.
"""

from __future__ import annotations

from typing import Any

from trainer.contract import Manifest, PrequentialScore, collection_name
from trainer.covisit import SMOOTHING
from trainer.model import Model
from trainer.progress import Progress
from trainer.rollout import PublishSettings


def manifest_of(model: Model, progress: Progress, settings: PublishSettings, alias: str, created_at: float) -> Manifest:
    """The Manifest of a copy that is taken now.

    Args:
        model: as it is.
        progress: its `model_version` is the newest number taken.
        settings: of publishing.
        alias: names the live collection.
        created_at: seconds since the epoch.
    """
    config, number = model.learner.config, progress.model_version + 1
    return Manifest(
        model_version=number,
        collection=collection_name(alias, number),
        embedding_dim=config.embedding_dim,
        **_weights(model),
        popularity_scale=settings.popularity_scale,
        temperature=config.temperature,
        towers=config.to_dict(),
        num_items=model.catalogue.num_items,
        step=model.learner.num_steps,
        source_offsets=dict(progress.learnt),
        settings_hash=settings.settings_hash,
        created_at=created_at,
        prequential=_prequential(model),
    )


def _weights(model: Model) -> dict[str, Any]:
    """The weights of the served score, as the Manifest has them."""
    score, covisit = model.score, model.covisit
    at_mean, slopes = score.weights.T.tolist()
    weights: dict[str, Any] = {
        "popularity_dims": len(at_mean) - 2,
        "popularity_weights": at_mean[1:-1],
        "popularity_slopes": slopes[1:-1],
        "embedding_weight": at_mean[0],
        "embedding_slope": slopes[0],
        "history_length": model.learner.config.history_length,
    }
    if covisit is not None:
        weights |= {
            "covisit_weight": at_mean[-1],
            "covisit_slope": slopes[-1],
            "covisit_scale": score.covisit_scale / SMOOTHING,
            "covisit_decay": covisit.history_decay,
        }
    return weights


def _prequential(model: Model) -> PrequentialScore | None:
    if model.evaluation is None or not len((ranks := model.evaluation.window()).rank):
        return None
    return PrequentialScore(
        clicks=len(ranks.rank),
        recall_at_10=ranks.recall(10),
        recall_at_100=ranks.recall(100),
        popularity_recall_at_10=ranks.popularity_recall(10),
        popularity_recall_at_100=ranks.popularity_recall(100),
    )
