"""PUBLIC: what the retriever's HTTP interface takes and gives, as models; the OpenAPI document is made from them.

Station: the outer border of the whole chain. It knows neither the towers nor how Qdrant is reached; filters are
Qdrant's own JSON.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PlainValidator,
    model_validator,
)
from qdrant_client import models

from streams.contract import MAX_CONTEXT_FEATURES, MAX_ID_BYTES

MAX_K = 1_000
"""Most candidates that one request may ask for."""
MAX_BATCH = 64
"""Most requests that one batch may hold."""
MAX_SIMILAR = 100
"""Most items that a search for similar ones may begin with."""
MAX_CONTEXT_TEXT = 4_096
"""Longest text of one context feature, in characters."""
PROBLEM_JSON = "application/problem+json"
"""Media type of every error's body (RFC 9457)."""


def _whole_number_as_text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _whole_number(value: object) -> object:
    """1.0 is an integer in JSON Schema."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode text") from None
    return text


def _bounded(value: str) -> str:
    size = len(_unicode(value).encode())
    if not 1 <= size <= MAX_ID_BYTES:
        raise ValueError(f"must be of 1 … {MAX_ID_BYTES} bytes in UTF-8, not {size}")
    return value


def _flat(value: object) -> object:
    if isinstance(value, str):
        _unicode(value)
    if isinstance(value, str) and len(value) > MAX_CONTEXT_TEXT:
        raise ValueError(f"must have {MAX_CONTEXT_TEXT} characters at most, not {len(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    if not (value is None or isinstance(value, (str, bool, int, float))):
        raise ValueError("must be text, a number, true, false or null: context is flat")
    return value


def _plain(value: object) -> object:
    """Qdrant's model takes NaN and halves of surrogate pairs, but no JSON that is sent to Qdrant can hold them."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError):
        raise ValueError("must be plain JSON: finite numbers, valid Unicode text") from None
    return value


_IdText = Annotated[str, Field(min_length=1, max_length=MAX_ID_BYTES)]
Id = Annotated[
    str, AfterValidator(_bounded), BeforeValidator(_whole_number_as_text, json_schema_input_type=_IdText | int)
]
"""The caller's id of a user or item, in UTF-8 of 512 bytes at most; whole numbers are taken as their text, as in
clicks."""
_UpToMaxK = Annotated[int, Field(ge=1, le=MAX_K)]
NumCandidates = Annotated[_UpToMaxK, BeforeValidator(_whole_number, json_schema_input_type=_UpToMaxK)]
_ContextText = Annotated[str, Field(max_length=MAX_CONTEXT_TEXT)]
ContextValue = Annotated[
    str | bool | int | float | None,
    PlainValidator(_flat, json_schema_input_type=_ContextText | bool | int | float | None),
]


class Model(BaseModel):
    """Unknown fields and values of a wrong type are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


_FOR_SOMEBODY: dict[str, Any] = {
    "anyOf": [
        {"required": ["user_id"], "properties": {"user_id": {"type": ["string", "integer"]}}},
        {"required": ["history"], "properties": {"history": {"type": "array"}}},
    ]
}


class QueryRequest(Model):
    """Whom to find items for, and which. At least one of `user_id` and `history` must be there."""

    model_config = ConfigDict(json_schema_extra=_FOR_SOMEBODY)

    user_id: Id | None = None
    """The user; the history is then what the stream says that they clicked, up to seconds ago."""
    history: list[Id] | None = None
    """Item ids, newest last; wins over the history followed for `user_id`. Empty: a user of whom nothing is known."""
    context: dict[Annotated[str, AfterValidator(_unicode)], ContextValue] = Field({}, max_length=MAX_CONTEXT_FEATURES)
    """Features of the moment (device, hour, the item being watched …), flat. Those that the model lacks do nothing."""
    k: NumCandidates = 10
    """How many candidates."""
    filter: Annotated[models.Filter | None, BeforeValidator(_plain)] = None
    """Qdrant's filter on the items' payload."""
    exclude_seen: bool = True
    """Whether the items of the history are left out."""
    popularity: FiniteFloat = Field(1.0, ge=-1, le=2)
    """Weight of live popularity: 0 pure affinity (long tail), 1 what is clicked next, more: trending; below 0 popular
    items are pushed down."""
    with_payload: bool = False
    """Whether each candidate comes with its payload."""

    @model_validator(mode="after")
    def _for_somebody(self) -> Self:
        if self.user_id is None and self.history is None:
            raise ValueError("give user_id, history or both; an empty history asks for an unknown user")
        return self


class CandidatesRequest(QueryRequest):
    """Whom to find items for, which, and how they are told."""

    explain: bool = False
    """Whether each candidate comes with the parts of its score."""
    diversity: FiniteFloat = Field(0.0, ge=0, le=1)
    """λ of maximal marginal relevance over the 4 · k best: the next candidate is that of the largest
    (1 − λ) · score, scaled to 0 … 1 over them, − λ · largest cosine with one taken before. 0: by score alone. Scores
    stay what they are, so that they no longer fall from one candidate to the next."""


class BatchRequest(Model):
    """Several requests for candidates, answered by one query to Qdrant."""

    requests: list[CandidatesRequest] = Field(min_length=1, max_length=MAX_BATCH)
    """Each as to /v1/candidates. One that is wrong, or that Qdrant refuses, has the whole batch refused."""


class Explanation(Model):
    """The parts of a score; they sum to it, up to the rounding of 32-bit numbers."""

    affinity: float
    """Of the query's and the item's embeddings: weight · cosine / temperature."""
    popularity: float
    """Of the log-frequencies, at the popularity that was asked for."""
    covisitation: float
    """Of the items of the history that are often clicked near this one: weight · ln(1 + co-visitation)."""


class Candidate(Model):
    """One item, with the score of the version that answered."""

    item_id: str
    score: float
    """Logit: embedding · cosine / temperature + popularity · log-frequencies + weight · ln(1 + co-visitation), weighed
    as the version's Manifest says. Comparable within one answer alone."""
    payload: dict[str, object] | None = None
    """What the item's producer stored with it; only there with `with_payload`."""
    explanation: Explanation | None = None
    """The parts of the score; only there with `explain`."""


class CandidatesAnswer(Model):
    """Candidates, best first; fewer than `k` if no more items pass the filter."""

    model_config = ConfigDict(protected_namespaces=())

    candidates: list[Candidate]
    model_version: int
    """The published version whose query tower and items made this answer."""
    user_known: bool | None
    """Whether the user's clicks are followed; null without `user_id`."""
    history_source: Literal["request", "followed", "none"]
    """Where the history that was used came from."""
    history_length: int
    """Items in the history that was used."""
    fallback: Literal["popularity"] | None = None
    """Not null: Qdrant did not answer, and these are the items that were the most popular ones when it last did, the
    same for everybody but for seen items. Only with the setting fallback_items."""


class BatchAnswer(Model):
    """The answers to a batch, in the order of its requests."""

    answers: list[CandidatesAnswer]
    """One for each request."""


class QueryAnswer(Model):
    """A request ready to be sent to Qdrant; its answer has the candidates that /v1/candidates would give."""

    model_config = ConfigDict(protected_namespaces=())

    collection: str
    """Where to send it: POST /collections/COLLECTION/points/query. A physical collection: an alias may move on."""
    query: dict[str, Any]
    """The body, as Qdrant's REST interface and `qdrant_client.models.QueryRequest` take it. Filters of the caller's own
    belong into each prefetch that has no prefetch of its own, or else they thin out what was found."""
    model_version: int
    """The published version whose query tower made it; good as long as that version's collection is there."""
    user_known: bool | None
    """Whether the user's clicks are followed; null without `user_id`."""
    history_source: Literal["request", "followed", "none"]
    """Where the history that was used came from."""
    history_length: int
    """Items in the history that was used."""


class SimilarRequest(Model):
    """Items to find similar ones for."""

    item_ids: list[Id] = Field(min_length=1, max_length=MAX_SIMILAR)
    """One item, or several whose common neighbours are wanted. They are left out of the answer."""
    by: Literal["both", "embedding", "covisitation"] = "both"
    """What makes items similar: the embeddings' cosine, being clicked near each other by the same users, or both,
    weighed as the version's Manifest says. Popularity has no part in it."""
    k: NumCandidates = 10
    """How many."""
    filter: Annotated[models.Filter | None, BeforeValidator(_plain)] = None
    """Qdrant's filter on the items' payload."""
    with_payload: bool = False
    """Whether each item comes with its payload."""


class SimilarAnswer(Model):
    """Similar items, best first; fewer than `k` if no more are similar or pass the filter."""

    model_config = ConfigDict(protected_namespaces=())

    candidates: list[Candidate]
    model_version: int
    """The published version whose items made this answer."""


class HistoryAnswer(Model):
    """What the retriever knows of one user."""

    user_id: str
    known: bool
    """Whether a click of this user has been followed."""
    items: list[str | None]
    """Item ids, newest last; null where the live index does not hold the item (yet, or any more)."""


class VersionAnswer(Model):
    """The version that is served now."""

    model_config = ConfigDict(protected_namespaces=())

    model_version: int
    collection: str
    """Qdrant collection that is searched."""
    created_at: float
    """When the trainer made it, in seconds since the epoch."""
    step: int
    """Optimizer steps behind it."""
    num_items: int
    """Items in it when it was published."""
    embedding_dim: int
    context: list[str]
    """Names of the context features that its query tower looks at."""


class StatusAnswer(Model):
    """A probe that passed."""

    status: Literal["alive", "ready"]


class InvalidValue(Model):
    """One thing wrong with a request."""

    location: str
    """Where: body, path or header, then the field, with dots."""
    message: str


class Problem(Model):
    """Every error's body: RFC 9457, `application/problem+json`."""

    type: str
    """urn:streamtower:problem:SLUG, one for each kind of error."""
    title: str
    """The kind of error, in words."""
    status: int
    detail: str
    """What was expected, what came, what to do."""
    errors: list[InvalidValue] = []
    """Each thing wrong with the request, where that is the problem."""
