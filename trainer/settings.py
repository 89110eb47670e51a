"""Settings of the trainer, all from environment variables STREAMTOWER_TRAINER_*.

Station: read once at start, through `streams.service.load_settings`; nothing else here reads the environment. It loads
no torch, so that settings are refused before anything heavy is loaded.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from streams.service import KafkaSettings

PayloadIndex = Literal["keyword", "integer", "float", "bool", "datetime"]
Preset = Literal["default", "paper"]
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "hidden": (512,),
        "embedding_dim": 128,
        "history_decay": 1.0,
        "temperature": 0.05,
        "correction": "logq",
        "rows_per_step": 8_192,
        "recent_negatives": 0,
        "mask_history": False,
        "dense_learning_rate": 0.01,
        "popularity_weight": 0.0,
        "further_half_lives_clicks": (),
        "covisit": False,
        "adapt_weights": False,
        "personal_popularity": False,
        "use_history_length": False,
    },
}
"""Values that a preset gives to the settings that are not set themselves."""


class TrainerSettings(KafkaSettings):
    """Where the trainer reads and writes, how it learns, and how often it saves and publishes."""

    model_config = SettingsConfigDict(
        env_prefix="STREAMTOWER_TRAINER_", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    preset: Preset = "default"
    """Defaults of the other settings. default: those listed here, the best that were measured; paper: as in the paper,
    with hidden layers, plain mean of the history, logQ correction, the batch's negatives alone and no live popularity
    (docs/deviations.md has the list). A setting that is set itself wins over the preset."""
    kafka_deadline_seconds: float = Field(60.0, gt=0, le=3_600)
    """Longest time without any answer from Kafka, or without its topics at start, before the process gives up (exit
    code 69), in seconds."""
    checkpoint_dir: Path = Path("checkpoints")
    """Directory of the checkpoints: model, optimizer, catalogue and offsets. One trainer at a time."""
    checkpoint_interval_seconds: float = Field(30.0, ge=0.1, le=86_400)
    """Time between checkpoints, in seconds: what is learnt again after a crash."""
    keep_checkpoints: int = Field(3, ge=1, le=100)
    """Newest checkpoints kept, and as many full ones: the others hold what has changed since a full one."""
    retention_expired: Literal["fail", "earliest", "latest"] = "fail"
    """If Kafka has deleted micro-batches that are not learnt yet: fail: end with an explanation; earliest: go on with
    the oldest that are left; latest: with those that are yet to come. The clicks that are passed over are counted."""
    learn_from: dict[NonNegativeInt, NonNegativeInt] | None = None
    """JSON object of partition → offset of `clicks` from which a trainer without a checkpoint begins to learn;
    partitions that are not named begin with the oldest micro-batch. A trainer with this setting publishes only when it
    has caught up with what there was at its start. Set by `streamtower replay`."""

    qdrant: str = Field("http://127.0.0.1:6333", pattern=r"^https?://[^/\s]+")
    """URL of Qdrant's REST interface."""
    qdrant_api_key: SecretStr | None = None
    """Key that Qdrant asks for; it must allow writing."""
    qdrant_timeout_seconds: int = Field(10, ge=1, le=600)
    """Longest time for one call to Qdrant, in seconds."""
    qdrant_attempts: int = Field(4, ge=1, le=100)
    """Attempts for one call to Qdrant before a publish is given up and begun again later."""
    alias: str = Field("items", pattern=r"^[A-Za-z0-9._-]{1,100}$")
    """Alias in Qdrant that names the collection of the live version; collections are called ALIAS__vNUMBER."""
    model_dir: Path = Path("models")
    """Directory of the published versions, shared with the retriever."""
    keep_versions: int = Field(2, ge=1, le=100)
    """Newest published versions kept, the live one among them, in Qdrant and in the model directory."""
    publish_interval_seconds: float = Field(2.0, ge=0.05, le=3_600)
    """Time between deltas: publishing the touched items into the live version, in seconds."""
    first_publish_interval_seconds: float = Field(15.0, ge=0.05, le=86_400)
    """Time from the first version to the second, in seconds; each further one takes twice as long as the one before, up
    to full_publish_interval_seconds, because a young model moves fast."""
    full_publish_interval_seconds: float = Field(60.0, ge=0.05, le=86_400)
    """Longest time between new versions, in seconds; never less than twice what the last one took to publish (once
    after the first)."""
    publish_batch_points: int = Field(500, ge=1, le=10_000)
    """Points in one upsert."""
    hnsw_from_items: int = Field(200_000, ge=0)
    """From this many items on a version gets an HNSW graph; below, searches are exact."""
    green_seconds: float = Field(300.0, gt=0, le=86_400)
    """Longest time for Qdrant to index a new version before it is given up, in seconds."""
    canary_queries: int = Field(32, ge=0, le=1_000)
    """Queries of invented users that are asked of a new version before it goes live, as it would be searched and
    exactly; 0: none."""
    canary_recall: float = Field(0.9, ge=0, le=1)
    """Share of the exact best 100 items that canary queries must find with the collection's own parameters; a version
    that finds less does not go live."""
    staleness_items: int = Field(256, ge=0, le=10_000)
    """Items drawn to measure how far what is served lags behind what is learnt; 0: it is not measured."""
    staleness_interval_seconds: float = Field(10.0, ge=0.1, le=3_600)
    """Time between such measurements, in seconds."""
    full_publish_recall_lost: float = Field(0.5, ge=0, le=1)
    """Recall lost by what is served, above which the next version is published before its time, though not within
    twice what the last one took (as above); 0: never."""
    payload_indexes: dict[str, PayloadIndex] = Field(default_factory=dict)
    """JSON object of payload fields that queries filter by: name → keyword, integer, float, bool or datetime."""
    popularity_scale: float = Field(20.0, gt=0, le=1e6)
    """The log-frequency dimension is divided by it, so that its range is that of the embedding's own."""
    popularity_weight: float = Field(1.0, ge=0, le=100)
    """Weight of the log frequency in the score when a request asks for popularity 1; with adapt_weights only the first
    one."""

    features: str = ""
    """Feature lists of the towers: path of a .json or .toml file, or JSON itself, as {"context": [{"name", "kind"} …],
    "item": [{"name", "kind"} …]}; kinds are categorical, multi, text, number, item. Empty: ids alone."""
    embedding_dim: int = Field(64, ge=1, le=4_096)
    """Size of query and item embeddings."""
    row_dim: int = Field(64, ge=1, le=4_096)
    """Size of a row of the embedding tables."""
    item_rows: int = Field(2**18, ge=2, le=2**31)
    """Rows of the item table, a power of two."""
    user_rows: int = Field(2**16, ge=2, le=2**31)
    """Rows of the user table, a power of two; used with use_user_id."""
    feature_rows: int = Field(2**17, ge=2, le=2**31)
    """Rows of the table of feature values, a power of two."""
    history_length: int = Field(20, ge=1, le=1_000)
    """Newest items of a user's history that the query tower sees."""
    history_decay: float = Field(0.8, gt=0, le=1)
    """Weight of a history item relative to the next newer one; 1 is the plain mean."""
    use_history_length: bool = True
    """Whether the query tower knows how many items the history has."""
    use_user_id: bool = False
    """Whether the query tower has a row for each user."""
    hidden: tuple[int, ...] = ()
    """JSON list of the sizes of the towers' hidden layers; []: linear towers."""
    temperature: float = Field(0.12, gt=0, le=10)
    """Logits are cosines divided by it."""
    personal_popularity: bool = True
    """Whether the query tower gives each user weights for the log frequencies, beside those that are the same for all:
    some lean to what everybody clicks, some to the long tail."""
    tasks: dict[str, float] = Field(default_factory=dict)
    """JSON object of rewards with a head each: name → weight of its loss and of its score. "reward" is the clicks' own
    reward, any other name a number or boolean in their context, as in {"reward": 1, "purchase": 4}. Empty: the clicks'
    own reward alone."""

    loss: Literal["softmax", "gbce"] = "softmax"
    """softmax: a clicked item among its negatives; gbce: generalised binary cross-entropy, each item for itself."""
    gbce_calibration: float = Field(0.75, ge=0, le=1)
    """gBCE's t: 0 is plain binary cross-entropy, 1 gives calibrated probabilities."""
    correction: Literal["none", "logq", "refined", "mixed"] = "none"
    """What is subtracted from the logits in training. none: popularity comes from the live log frequency alone
    (popularity_weight 1). The others learn it, for popularity_weight 0. logq: log q from all logits, as in the paper;
    refined: from the negatives' alone, given that they are not the positive; mixed: from the negatives' alone, by how
    often each was expected among those from clicks and from the catalogue."""
    rows_per_step: int = Field(64, ge=1, le=1_000_000)
    """Most clicks of one optimizer step; a micro-batch is cut into steps of equal size."""
    recent_negatives: int = Field(192, ge=0, le=1_000_000)
    """Further negatives of a step, drawn from the recent clicks of earlier steps."""
    recent_window: int = Field(10_000, ge=1, le=100_000_000)
    """How many of the newest clicks count as recent."""
    uniform_negatives: int = Field(0, ge=0, le=1_000_000)
    """Further negatives of a step, drawn uniformly from the catalogue."""
    chosen_negatives: int = Field(0, ge=0, le=1_000_000)
    """Negatives of each click that count, out of all candidates of the step; 0: all."""
    choice: Literal["random", "hardest", "semi-hard"] = "random"
    """Which ones count, with chosen_negatives: any, those of the highest logits, or the highest below the click's own
    item."""
    mask_history: bool = True
    """Whether items of a click's history are no negatives of it: right where they are not served to the user again."""
    row_learning_rate: float = Field(0.1, gt=0, le=100)
    """Adagrad's learning rate of the rows of items and features."""
    user_learning_rate: float = Field(0.03, gt=0, le=100)
    """Adagrad's learning rate of the rows of users: a fast one makes a user's row out of its last click."""
    dense_learning_rate: float = Field(0.02, gt=0, le=100)
    """Adagrad's learning rate of the layers."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the weights and of every random choice."""
    num_threads: int = Field(1, ge=1, le=256)
    """Threads that torch computes with."""
    max_items: int = Field(1_000_000, ge=1_000, le=100_000_000)
    """Most items in the catalogue; a sixteenth of them, those untouched for longest, make room when it is full."""
    admit_clicks: int = Field(1, ge=1, le=1_000_000)
    """With its click of this number an unknown item comes into the catalogue; until then it is learnt from and not
    served. Items of the topic `items` come in at once. For counting there is room for max_items / 8 waiting items."""
    expire_clicks: int = Field(0, ge=0, le=1_000_000_000_000)
    """An item that is neither clicked nor changed for so many clicks of all items leaves the catalogue and the index,
    give or take a sixteenth of them; 0: never. Clicked again, it comes back without features until its next event."""
    log_q_half_life_clicks: float = Field(5_000.0, gt=0, le=1e12)
    """Half-life of an item's click count behind its log frequency, in clicks of all items."""
    further_half_lives_clicks: tuple[PositiveFloat, ...] = (200.0, 1_000.0, 25_000.0, 1e12)
    """JSON list of further half-lives, in clicks of all items: each gives the score a log frequency of its own; []: one
    alone."""
    uniform_ratio: float = Field(0.02, gt=0, le=1)
    """Share of clicks taken as spread evenly over all items: an item's log frequency is at least
    log(uniform_ratio / number of items)."""
    covisit: bool = True
    """Whether items clicked by the same users within a few clicks count in the score."""
    covisit_partners: int = Field(128, ge=8, le=1_024, multiple_of=8)
    """Most co-visited items that are counted for each item, a multiple of 8; 12 bytes each. 64 cost half and find a
    little less (docs/learning.md)."""
    covisit_window: int = Field(10, ge=1, le=1_000)
    """Newest distinct items of the history that a click is counted with."""
    covisit_half_life_clicks: float = Field(0.0, ge=0, le=1e12)
    """Clicks of all items after which co-visits count half; 0: they never fade."""
    covisit_scale: float = Field(1.0, gt=0, le=1e6)
    """c of the score's b · ln(1 + c · x), x being how much more often than by chance items were clicked together."""
    covisit_weight: float = Field(0.5, gt=0, le=100)
    """b of the score; with adapt_weights only the first one."""
    adapt_weights: bool = True
    """Whether the weights of embedding, log frequencies and co-visitation follow the clicks."""
    refresh_clicks: int = Field(64, ge=1, le=100_000)
    """Clicks after which, within a micro-batch, counts and weights are renewed for those that are tested."""
    exclude_history: bool = True
    """Whether, when the model is tested, items of the click's history are no candidates; a click on one is a miss."""
    evaluation_rows: int = Field(16, ge=0, le=100_000)
    """Clicks of each micro-batch, drawn at random, on which the model is tested before it learns them; 0: none.
    Of more than 16,384 items, 16 at most, and of one micro-batch in (items / 16,384) alone."""
    evaluation_window_clicks: int = Field(5_000, ge=1, le=100_000)
    """Tested clicks that the running recall is taken over."""
    guard: Literal["hold", "rollback"] = "hold"
    """When learning comes apart (a loss that is not finite, exploding gradients or weights, a collapse of recall),
    nothing is saved or published any more, and what is served stays. hold: until the trainer is restarted; rollback: it
    goes back to its newest checkpoint at once, and passes over the clicks since."""
    guard_norm_factor: float = Field(100.0, ge=0, le=1e12)
    """Gradients or weights are exploding if one is so many times as long as usual; 0: never."""
    guard_recall_ratio: float = Field(0.5, ge=0, lt=1)
    """Recall at 10 has collapsed if it is below this share of the usual one, and below that of popularity; 0: never."""

    metrics_host: str = Field("127.0.0.1", min_length=1)
    """Address on which /metrics is served; 0.0.0.0 for every interface."""
    metrics_port: int = Field(9102, ge=0, le=65_535)
    """Port on which /metrics is served; 0: any free one, which the log line `listening` names."""

    @field_validator("features")
    @classmethod
    def _read_features(cls, value: str) -> str:
        """The feature lists as JSON, read from the file if it is one, so that nothing reads it a second time."""
        text = value.strip()
        if not text:
            return ""
        try:
            if text.startswith("{"):
                plain = json.loads(text)
            elif text.endswith(".toml"):
                plain = tomllib.loads(Path(text).read_text())
            else:
                plain = json.loads(Path(text).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"must be a readable .json or .toml file, or JSON itself: {error}") from error
        if not isinstance(plain, dict) or not set(plain) <= {"context", "item"}:
            raise ValueError('must be an object with "context" and "item" alone')
        return json.dumps(plain, sort_keys=True)

    @model_validator(mode="before")
    @classmethod
    def _take_preset(cls, values: Any) -> Any:
        return PRESETS.get(str(values.get("preset")), {}) | values if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _intervals_fit(self) -> TrainerSettings:
        if self.first_publish_interval_seconds > self.full_publish_interval_seconds:
            raise ValueError("first_publish_interval_seconds must not be above full_publish_interval_seconds")
        if reserved := {"item_id", "step"} & self.payload_indexes.keys():
            raise ValueError(f"payload_indexes: {', '.join(sorted(reserved))} are indexed anyway; leave them out")
        return self

    def towers(self) -> dict[str, Any]:
        """The towers' configuration as plain data, for `TowerConfig.from_dict`."""
        names = (
            "embedding_dim row_dim item_rows user_rows feature_rows history_length history_decay "
            "use_history_length use_user_id hidden temperature tasks"
        )
        plain: dict[str, Any] = {name: getattr(self, name) for name in names.split()}
        plain["popularity_dims"] = (1 + len(self.further_half_lives_clicks)) if self.personal_popularity else 0
        plain.update(json.loads(self.features or "{}"))
        return plain

    def training(self) -> dict[str, Any]:
        """How to learn, as plain data, for `TrainingConfig`."""
        names = (
            "loss gbce_calibration correction rows_per_step recent_negatives recent_window uniform_negatives "
            "chosen_negatives choice mask_history row_learning_rate user_learning_rate dense_learning_rate seed"
        )
        return {name: getattr(self, name) for name in names.split()}

    def identity(self) -> dict[str, Any]:
        """The settings that a checkpoint is bound to: with another value of one of them it means something else."""
        names = (
            "topic_prefix", "log_q_half_life_clicks", "further_half_lives_clicks", "recent_window", "seed", "covisit",
            "covisit_partners", "covisit_window", "covisit_half_life_clicks", "adapt_weights",
        )  # fmt: skip
        return {"towers": self.towers()} | {name: getattr(self, name) for name in names}


def settings_hash(identity: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that stand for these settings."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
