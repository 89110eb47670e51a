"""Rewards of several tasks, from a click's own reward and its context."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from streams.contract import MicroBatch
from streams.service import load_settings
from tests.trainer.streams_of_clicks import micro_batch
from trainer.model import new_model
from trainer.rewards import MAX_TASKS, Task, task_rewards
from trainer.settings import TrainerSettings
from trainer.towers import Feature, TowerConfig

OWN = np.array([1.0, 0.5, 2.0], np.float32)


def test_without_tasks_there_is_the_clicks_own_reward() -> None:
    np.testing.assert_array_equal(task_rewards((), OWN, {"watch_share": pa.array([0.1, 0.2, 0.3])}), OWN[:, None])


def test_each_task_has_its_column_in_the_order_of_the_tasks() -> None:
    context = {"watch_share": pa.array([0.25, None, 1.0]), "bought": pa.array(["true", "false", None])}
    tasks = (Task("bought", 4.0), Task("reward", 1.0), Task("watch_share", 0.5), Task("nowhere", 1.0))
    expected = [[1.0, 1.0, 0.25, 0.0], [0.0, 0.5, 0.0, 0.0], [0.0, 2.0, 1.0, 0.0]]
    np.testing.assert_array_equal(task_rewards(tasks, OWN, context), np.array(expected, np.float32))


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 1e7, "much", "-inf", ""])
def test_a_value_that_is_no_reward_teaches_nothing(value: str | float) -> None:
    column = pa.array([value], pa.string() if isinstance(value, str) else pa.float64())
    assert task_rewards((Task("x", 1.0),), OWN[:1], {"x": column}).tolist() == [[0.0]]


def test_rewards_come_through_the_bytes_of_a_micro_batch() -> None:
    context = {"watch_share": pa.array([0.25, None])}
    batch = MicroBatch.decode(micro_batch(["a", "b"], context=context).encode())
    tasks = (Task("reward", 1.0), Task("watch_share", 1.0))
    assert task_rewards(tasks, batch.reward, batch.context).tolist() == [[1.0, 0.25], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        ((Task("", 1.0),), "a name must be a text of its own"),
        ((Task("a", 1.0), Task("a", 2.0)), "a name must be a text of its own"),
        ((Task("device", 1.0),), "cannot be a context feature"),
        ((Task("a", 0.0),), "weight of 'a' must be"),
        ((Task("a", math.nan),), "weight of 'a' must be"),
        ((Task("a", True),), "weight of 'a' must be"),
        (tuple(Task(f"t{n}", 1.0) for n in range(MAX_TASKS + 1)), "at most 16"),
    ],
)
def test_tasks_that_cannot_work_are_refused(tasks: tuple[Task, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TowerConfig(context=(Feature("device", "categorical"),), tasks=tasks)


def test_tasks_survive_json_and_other_forms_are_refused() -> None:
    config = TowerConfig(tasks=(Task("reward", 1.0), Task("purchase", 4.0)))
    assert config.to_dict()["tasks"] == {"reward": 1.0, "purchase": 4.0}
    assert TowerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="tasks must be an object"):
        TowerConfig.from_dict({"tasks": ["reward"]})


def test_a_model_learns_each_task_from_its_column_of_the_micro_batch() -> None:
    """A click that was no purchase teaches the head of purchases nothing."""
    settings = load_settings(
        TrainerSettings, {}, tasks={"reward": 1, "purchase": 4}, item_rows=256, recent_negatives=0, evaluation_rows=0
    )
    moved = []
    for purchase in (pa.array([None, None]), pa.array([None, "true"])):
        model = new_model(settings)
        heads = model.learner.query_tower.heads
        before = heads.detach().clone()
        context = {"purchase": purchase.cast(pa.string())}
        model.learn(micro_batch(["a", "b"], histories=[["c"], ["d"]], context=context), 1)
        moved.append([not torch.equal(heads[task], before[task]) for task in (0, 1)])
    assert moved == [[True, False], [True, True]]
