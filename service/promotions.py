"""Queue promotions as webhook events. They are read from the registry's journals, so promotions by the CLI count too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select

from finetune.bundle.access import SHARED
from finetune.bundle.aliases import LATEST
from finetune.bundle.deployment import deployments
from finetune.bundle.registry import Registry
from finetune.jobs.database import reading, writing
from finetune.jobs.outbox import DEPLOYED, PROMOTED, enqueue, webhooks_for
from finetune.jobs.schema import webhooks
from finetune.jobs.webhooks import WebhookStore

_LOOK_BACK_SECONDS = 86400.0  # promotions while no server ran are reported up to a day later


class Promotions:
    """Queues new promotions in the journals of a registry, each exactly once, even after a restart."""

    def __init__(self, registry: Registry, store: Callable[[], WebhookStore]) -> None:
        self._registry, self._store = registry, store
        self._sizes: dict[Path, int] = {}  # of the journals when they were last read

    def collect(self) -> None:
        """Queue the promotions since the last call for the webhooks that subscribe to them and may see the model."""
        engine = self._store().engine
        with reading(engine) as connection:
            if connection.execute(select(webhooks.c.id).limit(1)).first() is None:
                return  # no webhook subscribes, so the journals need not be read
        journals = {name: self._registry.journal(name) for name in self._registry.names()}
        changed = [name for name, path in journals.items() if _size(path) != self._sizes.get(path)]
        past = deployments(self._registry)
        if not changed and len(past) == self._sizes.get(self._registry.root):
            return
        sizes = {journals[name]: _size(journals[name]) for name in changed}  # before they are read, to miss no later line
        since = time.time() - _LOOK_BACK_SECONDS
        with writing(engine) as connection:
            for name in changed:
                self._moves(connection, name, since)
            for one in past:
                if one.at >= since:
                    name = one.deployment.reference.partition("@")[0]
                    data = {"reference": one.deployment.reference, "by": one.by}
                    tell_users(connection, self._registry, DEPLOYED, name, data, one.at, f"{one.deployment.reference} {one.at}")
        self._sizes |= {**sizes, self._registry.root: len(past)}

    def _moves(self, connection: Connection, name: str, since: float) -> None:
        for move in self._registry.moves(name):
            if move.alias != LATEST and move.at >= since:
                data = {"model": name, "version": move.version, "alias": move.alias, "by": move.by}
                tell_users(
                    connection, self._registry, PROMOTED, name, data, move.at, f"{name} {move.alias} {move.version} {move.at}"
                )


def tell_users(
    connection: Connection, registry: Registry, event_type: str, model: str, data: Mapping[str, Any], at: float, key: str
) -> None:
    """Queue an event about a model for the webhooks of all users of the model, except webhooks that are newer than the event.

    Args:
        key: identifies the event among those of its type.
    """
    access = registry.access(model)
    for webhook_id in webhooks_for(connection, event_type, None if access.visibility == SHARED else access.owner):
        made = connection.execute(select(webhooks.c.created_at).where(webhooks.c.id == webhook_id)).scalar_one()
        if at >= made:
            enqueue(connection, webhook_id, event_type, data, at, key=key)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
