"""CORE: several rewards of one click — tasks, each learnt by a head of its own over the same towers.

Station: between the micro-batch, whose click has one `reward` and a context, and the learner, which takes a reward for
each task. The heads are in `towers.QueryTower`, the sum of their losses is in `step`.

A task is named after the column that has its reward: "reward" is the click's own, any other name a context feature,
such as "watch_share" or "purchase". So a producer sends them as it sends any context, and no layout changes. A context
feature that is a reward is not known when a query is asked, so the query tower must not see it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

REWARD = "reward"
"""Name of the task whose reward is the click's own."""
MAX_REWARD = 1e6
"""Largest reward, as for the click's own: a weight in the loss, which must stay finite in 32 bits."""
MAX_TASKS = 16

_BOOLEANS = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True)
class Task:
    """One reward that is learnt."""

    name: str
    """"reward", or the name of a context feature."""
    weight: float
    """Weight of its loss in training and of its head's score at serving, in (0, 1e6]."""


def problems_of(tasks: Sequence[Task], context_names: Sequence[str]) -> list[str]:
    """What is wrong with these tasks, one line each; `context_names` are the features that the query tower sees."""
    names = [task.name for task in tasks]
    problems = [f"tasks must be at most {MAX_TASKS}, not {len(tasks)}"] if len(tasks) > MAX_TASKS else []
    for name, weight in ((task.name, task.weight) for task in tasks):
        if not isinstance(name, str) or not name or names.count(name) > 1:
            problems.append(f"tasks: a name must be a text of its own that is not empty, not {name!r}")
        elif name in context_names:
            problems.append(f"tasks: {name!r} is a reward, so it cannot be a context feature of the query as well")
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not (number and 0 < weight <= MAX_REWARD):
            problems.append(f"tasks: the weight of {name!r} must be a number above 0 and at most 1e6, not {weight!r}")
    return problems


def task_rewards(
    tasks: Sequence[Task], reward: npt.NDArray[np.float32], context: Mapping[str, Any]
) -> npt.NDArray[np.float32]:
    """Rewards of n clicks for each task: float32 [n, tasks]; without tasks float32 [n, 1], the clicks' own.

    A context value that is no number of 0 … 1e6 counts as 0, as does a missing one: the click teaches that task
    nothing, and its item stays a negative of the others. Booleans are 1 and 0.

    Args:
        tasks: in the order of the columns.
        reward: float32 [n] the clicks' own.
        context: Arrow arrays [n] by name, as a micro-batch has them.
    """
    if not tasks:
        return reward[:, None]
    rewards = np.zeros((len(reward), len(tasks)), np.float32)
    for place, task in enumerate(tasks):
        if task.name == REWARD:
            rewards[:, place] = reward
        elif task.name in context:
            rewards[:, place] = [_reward_of(value) for value in context[task.name].to_pylist()]
    return rewards


def _reward_of(value: str | float | None) -> float:
    if value is None:
        return 0.0
    try:
        number = _BOOLEANS[value] if value in _BOOLEANS else float(value)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) and 0 <= number <= MAX_REWARD else 0.0
