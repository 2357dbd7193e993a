"""Webhooks: URLs to which an owner wants the ends of jobs and promotions reported, and the state of their deliveries.

Deliveries follow the Standard Webhooks specification, with the headers ``webhook-id``, ``webhook-timestamp`` and
``webhook-signature``, an HMAC-SHA256 over id, timestamp and body. `finetune.jobs.outbox` queues them; `finetune.jobs.sending`
sends them.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import random
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Engine, RowMapping, and_, delete, func, insert, or_, select, update

from finetune.errors import Conflict, InvalidInput, NotFound, did_you_mean
from finetune.jobs.database import reading, writing
from finetune.jobs.outbox import TYPES
from finetune.jobs.schema import webhook_deliveries, webhooks

MAX_PER_OWNER = 20
MAX_URL = 2000  # characters
SECRET_PREFIX = "whsec_"
# Seconds to wait after each failed attempt, about two days in total; after the last one the delivery is given up.
RETRY_SECONDS = (5, 300, 1800, 7200, 18000, 36000, 50400, 72000)
_ATTEMPT_SECONDS = 60.0  # how long a delivery in progress is reserved for its sender
_MAX_HOST = 253  # characters of a name, RFC 1035
_HOST_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_KEPT_SECONDS = 30 * 86400.0


@dataclass(frozen=True)
class Webhook:
    """A URL and the types of events that are sent to it. `secret` signs the deliveries."""

    id: str
    owner: str
    url: str
    secret: str
    events: tuple[str, ...]
    created_at: float
    disabled_at: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the secret, for display."""
        shown = {"id": self.id, "owner": self.owner, "url": self.url, "events": list(self.events)}
        return {**shown, "created_at": self.created_at, "disabled_at": self.disabled_at}


@dataclass(frozen=True)
class Delivery:
    """The delivery of one event to one webhook. `due_at` is None after it was delivered or given up."""

    id: str
    webhook_id: str
    type: str
    payload: str
    created_at: float
    attempts: int
    due_at: float | None
    delivered_at: float | None
    status: int | None
    error: str | None

    @property
    def state(self) -> str:
        """``delivered``, ``waiting`` or ``given up``."""
        return "delivered" if self.delivered_at is not None else "waiting" if self.due_at is not None else "given up"


class WebhookStore:
    """The webhooks of one job database."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def create(self, owner: str, url: str, events: Iterable[str] = ()) -> Webhook:
        """Create a webhook; without `events`, it receives all types of events.

        Raises:
            InvalidInput: the URL is invalid, or a type of event is unknown.
            Conflict: the owner already has `MAX_PER_OWNER` webhooks.
        """
        check_url(url)
        wanted = tuple(dict.fromkeys(events)) or TYPES
        for event in wanted:
            if event not in TYPES:
                raise InvalidInput(f"unknown event {event!r}; allowed are {', '.join(TYPES)}.{did_you_mean(event, TYPES)}")
        secret = SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()
        made = Webhook(f"whk-{secrets.token_hex(12)}", owner, url, secret, wanted, time.time(), None)
        with writing(self.engine) as connection:
            count = select(func.count()).where(webhooks.c.owner == owner)
            if connection.execute(count).scalar_one() >= MAX_PER_OWNER:
                raise Conflict(f"{MAX_PER_OWNER} webhooks are the limit of one owner; delete one first")
            values = {**made.to_dict(), "secret": secret, "events": ",".join(wanted)}
            connection.execute(insert(webhooks).values(values))
        return made

    def list(self, owner: str | None = None) -> Sequence[Webhook]:
        """Return the webhooks of an owner, or of all, oldest first."""
        query = select(webhooks).order_by(webhooks.c.created_at, webhooks.c.id)
        with reading(self.engine) as connection:
            rows = connection.execute(query if owner is None else query.where(webhooks.c.owner == owner)).mappings().all()
        return [_webhook(row) for row in rows]

    def get(self, webhook_id: str, owner: str | None = None) -> Webhook:
        """Return a webhook of `owner`, or of any owner if None. Raises NotFound if there is none."""
        query = select(webhooks).where(webhooks.c.id == webhook_id)
        with reading(self.engine) as connection:
            row = None if "\0" in webhook_id else connection.execute(query).mappings().one_or_none()
        if row is None or owner not in (None, row["owner"]):
            raise NotFound(f"no webhook {webhook_id[:100]!r}; finetune webhooks list shows yours, and so does GET /v1/webhooks")
        return _webhook(row)

    def delete(self, webhook_id: str, owner: str | None = None) -> None:
        """Delete a webhook and its deliveries. Raises NotFound if the owner does not have it."""
        self.get(webhook_id, owner)
        with writing(self.engine) as connection:
            connection.execute(delete(webhook_deliveries).where(webhook_deliveries.c.webhook_id == webhook_id))
            connection.execute(delete(webhooks).where(webhooks.c.id == webhook_id))

    def deliveries(self, webhook_id: str, owner: str | None = None, limit: int = 20) -> Sequence[Delivery]:
        """Return the newest deliveries of a webhook."""
        self.get(webhook_id, owner)
        query = select(webhook_deliveries).where(webhook_deliveries.c.webhook_id == webhook_id)
        newest = query.order_by(webhook_deliveries.c.created_at.desc(), webhook_deliveries.c.id).limit(limit)
        with reading(self.engine) as connection:
            return [Delivery(**row) for row in connection.execute(newest).mappings().all()]

    def claim_due(self, now: float, except_for: Sequence[str] = ()) -> tuple[Webhook, Delivery] | None:
        """Return a delivery that is due and reserve it for `_ATTEMPT_SECONDS`; None if none is due.

        Args:
            except_for: ids of webhooks to skip.
        """
        wanted = and_(webhook_deliveries.c.due_at <= now, webhook_deliveries.c.webhook_id.not_in(except_for))
        due = select(webhook_deliveries).where(wanted).order_by(webhook_deliveries.c.due_at).limit(1)
        with reading(self.engine) as connection:
            if connection.execute(due).first() is None:
                return None
        with writing(self.engine) as connection:
            row = connection.execute(due.with_for_update(skip_locked=True)).mappings().one_or_none()
            if row is None:
                return None
            mine = webhook_deliveries.c.id == row["id"]
            connection.execute(update(webhook_deliveries).where(mine).values(due_at=now + _ATTEMPT_SECONDS))
            hook = connection.execute(select(webhooks).where(webhooks.c.id == row["webhook_id"])).mappings().one()
        return _webhook(hook), Delivery(**row)

    def record_attempt(self, delivery: Delivery, now: float, *, status: int | None, error: str | None) -> None:
        """Record the result of an attempt: delivered, to be tried again later, or given up. 410 Gone disables the webhook."""
        attempts = delivery.attempts + 1
        values: dict[str, Any] = {"attempts": attempts, "status": status, "error": error}
        if error is None:
            values |= {"due_at": None, "delivered_at": now}
        elif status == 410 or attempts > len(RETRY_SECONDS):
            values |= {"due_at": None}
        else:
            values |= {"due_at": now + RETRY_SECONDS[attempts - 1] * random.uniform(0.9, 1.1)}
        with writing(self.engine) as connection:
            connection.execute(update(webhook_deliveries).where(webhook_deliveries.c.id == delivery.id).values(values))
            if status == 410:
                connection.execute(update(webhooks).where(webhooks.c.id == delivery.webhook_id).values(disabled_at=now))
                waiting = and_(webhook_deliveries.c.webhook_id == delivery.webhook_id, webhook_deliveries.c.due_at.is_not(None))
                connection.execute(update(webhook_deliveries).where(waiting).values(due_at=None, error="the webhook is disabled"))

    def delete_old(self, now: float) -> None:
        """Delete deliveries that were delivered or given up more than 30 days ago."""
        settled = webhook_deliveries.c.due_at.is_(None)
        old = or_(webhook_deliveries.c.delivered_at < now - _KEPT_SECONDS, webhook_deliveries.c.created_at < now - _KEPT_SECONDS)
        with writing(self.engine) as connection:
            connection.execute(delete(webhook_deliveries).where(settled, old))


def check_url(url: str) -> None:
    """Raise `InvalidInput` unless `url` is like ``https://host/path``. Its host's addresses are checked at each delivery."""
    wrong = _problem_of_url(url)
    if wrong is not None:
        raise InvalidInput(f"{url[:100]!r}: {wrong}; give an address such as https://example.org/hooks")


def _problem_of_url(url: str) -> str | None:
    """Return why a text is not a valid URL of a webhook, or None if it is."""
    if len(url) > MAX_URL:
        return f"the address has more than {MAX_URL:,} characters"
    if not url.isascii() or not url.isprintable() or " " in url:
        return "an address has no spaces, control characters or characters outside ASCII"
    try:
        parts = urlsplit(url)
    except ValueError:
        return "the text in square brackets is not an IPv6 address"
    try:
        port_is_wrong = parts.port == 0
    except ValueError:
        port_is_wrong = True
    if port_is_wrong:
        return "the port is not a number from 1 to 65535"
    if parts.scheme not in ("https", "http"):
        return "the address does not begin with https://"
    if parts.username is not None or parts.fragment:
        return "the address has a user or a fragment"
    return _problem_of_host(parts.hostname or "", in_brackets="[" in parts.netloc)


def _problem_of_host(host: str, *, in_brackets: bool) -> str | None:
    if not host:
        return "the host is missing"
    if in_brackets:
        return "an address with a zone (%) is valid on one machine only" if "%" in host else None
    labels = host.removesuffix(".").split(".")
    if len(host) > _MAX_HOST or not all(map(_HOST_LABEL.fullmatch, labels)):
        return f"{host[:80]!r} is not the name of a host (parts of 1 to 63 letters, digits and hyphens, with dots between them)"
    return None


def signature_headers(secret: str, delivery_id: str, payload: str, now: float) -> dict[str, str]:
    """Return the three headers by which a receiver verifies that a payload is authentic, unchanged and recent."""
    timestamp = str(int(now))
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    digest = hmac.new(key, f"{delivery_id}.{timestamp}.{payload}".encode(), hashlib.sha256).digest()
    signature = f"v1,{base64.b64encode(digest).decode()}"
    return {"webhook-id": delivery_id, "webhook-timestamp": timestamp, "webhook-signature": signature}


def _webhook(row: RowMapping) -> Webhook:
    return Webhook(**{**row, "events": tuple(row["events"].split(","))})
