"""Settings: the same defaults as the parts they configure, feature lists from anywhere, nothing wrong goes through."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest

from streams.service import ConfigurationError, load_settings
from trainer.rewards import Task
from trainer.rollout import PublishSettings
from trainer.settings import PRESETS, TrainerSettings, settings_hash
from trainer.towers import TowerConfig
from trainer.training import TrainingConfig

FEATURES = {"context": [{"name": "device", "kind": "categorical"}], "item": [{"name": "title", "kind": "text"}]}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TrainerSettings.model_fields:
        monkeypatch.delenv(f"STREAMTOWER_TRAINER_{name.upper()}", raising=False)


def test_defaults_are_those_of_the_parts() -> None:
    settings = load_settings(TrainerSettings, {})
    # A weight of its own for each half-life, which the towers know from their configuration alone.
    assert TowerConfig.from_dict(settings.towers()) == TowerConfig(popularity_dims=5, use_history_length=True)
    impersonal = load_settings(TrainerSettings, {}, personal_popularity=False)
    assert TowerConfig.from_dict(impersonal.towers()) == TowerConfig(use_history_length=True)
    assert TrainingConfig(**settings.training()) == TrainingConfig()
    assert settings.training().keys() == {field.name for field in dataclasses.fields(TrainingConfig)}
    assert settings.towers().keys() | {"context", "item"} == {field.name for field in dataclasses.fields(TowerConfig)}
    for field in dataclasses.fields(PublishSettings):
        if field.name != "settings_hash":
            assert getattr(settings, field.name) == field.default, field.name


def test_the_papers_preset_is_the_papers_recipe_and_a_setting_wins_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMTOWER_TRAINER_PRESET", "paper")
    paper = load_settings(TrainerSettings)
    assert TowerConfig.from_dict(paper.towers()) == TowerConfig(
        hidden=(512,), embedding_dim=128, history_decay=1.0, temperature=0.05
    )
    training = TrainingConfig(**paper.training())
    assert (training.loss, training.correction, training.mask_history) == ("softmax", "logq", False)
    assert (training.recent_negatives, training.uniform_negatives, training.chosen_negatives) == (0, 0, 0)
    assert (training.row_learning_rate, training.dense_learning_rate) == (0.1, 0.01)
    assert paper.popularity_weight == 0.0
    monkeypatch.setenv("STREAMTOWER_TRAINER_HIDDEN", "[8]")
    monkeypatch.setenv("STREAMTOWER_TRAINER_CORRECTION", "none")
    changed = load_settings(TrainerSettings, temperature=0.14)
    assert (changed.hidden, changed.correction, changed.temperature, changed.embedding_dim) == ((8,), "none", 0.14, 128)


def test_presets_name_settings_alone() -> None:
    for preset in PRESETS.values():
        assert preset.keys() <= TrainerSettings.model_fields.keys()
    assert set(PRESETS) == set(get_args(TrainerSettings.model_fields["preset"].annotation))
    with pytest.raises(ConfigurationError, match="PRESET"):
        load_settings(TrainerSettings, {}, preset="best")


def test_tasks_are_read_and_bind_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_settings(TrainerSettings, {})
    monkeypatch.setenv("STREAMTOWER_TRAINER_TASKS", '{"reward": 1, "purchase": 4}')
    settings = load_settings(TrainerSettings)
    assert TowerConfig.from_dict(settings.towers()).tasks == (Task("reward", 1.0), Task("purchase", 4.0))
    assert settings_hash(settings.identity()) != settings_hash(plain.identity())


@pytest.mark.parametrize("form", ["inline", "json", "toml"])
def test_feature_lists_come_inline_or_from_a_file(tmp_path: Path, form: str) -> None:
    value = json.dumps(FEATURES)
    if form == "json":
        path = tmp_path / "features.json"
        path.write_text(value)
        value = str(path)
    elif form == "toml":
        path = tmp_path / "features.toml"
        path.write_text('[[context]]\nname = "device"\nkind = "categorical"\n[[item]]\nname = "title"\nkind = "text"\n')
        value = str(path)
    config = TowerConfig.from_dict(load_settings(TrainerSettings, {}, features=value).towers())
    assert [(feature.name, feature.kind) for feature in config.context] == [("device", "categorical")]
    assert [(feature.name, feature.kind) for feature in config.item] == [("title", "text")]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"features": "nowhere.json"}, "readable .json or .toml file"),
        ({"features": "{"}, "readable .json or .toml file"),
        ({"features": '{"items": []}'}, '"context" and "item" alone'),
        ({"temperature": 0}, "TEMPERATURE"),
        ({"qdrant": "127.0.0.1:6333"}, "QDRANT"),
        ({"first_publish_interval_seconds": 99}, "first_publish_interval_seconds must not be above"),
        ({"payload_indexes": {"step": "integer"}}, "step are indexed anyway"),
        ({"payload_indexes": {"brand": "words"}}, "PAYLOAD_INDEXES"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_and_named(values: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        load_settings(TrainerSettings, {}, **values)


def test_the_hash_stands_for_what_a_checkpoint_is_bound_to() -> None:
    plain = load_settings(TrainerSettings, {})
    same = load_settings(TrainerSettings, {}, row_learning_rate=0.5, publish_interval_seconds=9)
    other = load_settings(TrainerSettings, {}, features=json.dumps(FEATURES))
    assert settings_hash(plain.identity()) == settings_hash(same.identity()) != settings_hash(other.identity())
