"""Which version is live, and which is held by hand: two aliases in Qdrant, and the one call that changes them.

Station: between Qdrant, and the trainer and the operator who both switch versions. It knows no towers, loads no torch.

The alias itself names the live version. A second one, `pinned_alias`, names a version that an operator has made live
and that is to stay so: while it is there the trainer makes no other version live.
"""

from __future__ import annotations

from dataclasses import dataclass

from qdrant_client import QdrantClient, models

from trainer.contract import collection_name, model_version_of, pinned_alias


@dataclass(frozen=True)
class Named:
    """What the aliases name."""

    live: int | None = None
    """None: there is no alias, or it names no collection of ours."""
    pinned: int | None = None


def named_by(client: QdrantClient, alias: str) -> Named:
    """What the aliases name now; raises what the client does."""
    targets = {entry.alias_name: entry.collection_name for entry in client.get_aliases().aliases}
    live, pinned = (
        model_version_of(alias, targets[name]) if name in targets else None for name in (alias, pinned_alias(alias))
    )
    return Named(live, pinned)


def versions_in(client: QdrantClient, alias: str) -> list[int]:
    """Versions that have a collection, whole or not, rising; raises what the client does."""
    names = [collection.name for collection in client.get_collections().collections]
    return sorted(version for name in names if (version := model_version_of(alias, name)) is not None)


def switch(client: QdrantClient, alias: str, version: int, *, pin: bool | None = None) -> None:
    """Makes a version live: in one call, so that there always is one; raises what the client does.

    Args:
        client: of Qdrant.
        alias: names the live collection.
        version: whose collection is there.
        pin: True: hold it there; False: hold none any more; None: leave that as it is.
    """
    there = {entry.alias_name for entry in client.get_aliases().aliases}
    changes: list[models.AliasOperations] = []
    for name in [alias] if pin is None else [alias, pinned_alias(alias)]:
        if name in there:
            changes.append(models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=name)))
        if name == alias or pin:
            target = models.CreateAlias(collection_name=collection_name(alias, version), alias_name=name)
            changes.append(models.CreateAliasOperation(create_alias=target))
    client.update_collection_aliases(changes)
