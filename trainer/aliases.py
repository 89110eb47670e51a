"""Which version is live, and which is held by hand: two aliases in Qdrant, and the one call that changes them.

Station: between Qdrant, and the trainer and the operator who both switch versions. It knows no towers, loads no torch.

The alias itself names the live version. A second one, `pinned_alias`, names a version that an operator has made live
and that is to stay so: while it is there the trainer makes no other version live.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.contract import collection_name, model_version_of, pinned_alias

if TYPE_CHECKING:  # what is asked of the command line is not to wait for the client's import
    from qdrant_client import QdrantClient

Action = dict[str, dict[str, str]]
"""One change of aliases, as Qdrant's REST interface takes it."""


@dataclass(frozen=True)
class Named:
    """What the aliases name."""

    live: int | None = None
    """None: there is no alias, or it names no collection of ours."""
    pinned: int | None = None


def named_among(targets: Mapping[str, str], alias: str) -> Named:
    """What the aliases name, of all aliases with their collections."""
    live, pinned = (
        model_version_of(alias, targets[name]) if name in targets else None for name in (alias, pinned_alias(alias))
    )
    return Named(live, pinned)


def versions_among(collections: Iterable[str], alias: str) -> list[int]:
    """Versions that have a collection, whole or not, rising."""
    return sorted(version for name in collections if (version := model_version_of(alias, name)) is not None)


def actions_to(there: Collection[str], alias: str, version: int, *, pin: bool | None = None) -> list[Action]:
    """What makes a version live, to be done in one call, so that there always is one.

    Args:
        there: aliases that there are.
        alias: names the live collection.
        version: whose collection is there.
        pin: True: hold it there; False: hold none any more; None: leave that as it is.
    """
    actions: list[Action] = []
    for name in [alias] if pin is None else [alias, pinned_alias(alias)]:
        if name in there:
            actions.append({"delete_alias": {"alias_name": name}})
        if name == alias or pin:
            target = {"collection_name": collection_name(alias, version), "alias_name": name}
            actions.append({"create_alias": target})
    return actions


def named_by(client: QdrantClient, alias: str) -> Named:
    """What the aliases name now; raises what the client does."""
    return named_among(_targets(client), alias)


def versions_in(client: QdrantClient, alias: str) -> list[int]:
    """Versions that have a collection, whole or not, rising; raises what the client does."""
    return versions_among((collection.name for collection in client.get_collections().collections), alias)


def switch(client: QdrantClient, alias: str, version: int, *, pin: bool | None = None) -> None:
    """Makes a version live, as `actions_to` says; raises what the client does."""
    from qdrant_client import models

    wanted = models.ChangeAliasesOperation.model_validate(
        {"actions": actions_to(_targets(client), alias, version, pin=pin)}
    )
    client.update_collection_aliases(wanted.actions)


def _targets(client: QdrantClient) -> dict[str, str]:
    return {entry.alias_name: entry.collection_name for entry in client.get_aliases().aliases}
