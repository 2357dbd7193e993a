"""Documents of webhooks and their deliveries."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune.jobs.outbox import TYPES
from finetune.jobs.webhooks import MAX_URL, Delivery, Webhook
from service.schemas.body import RequestBody
from service.schemas.lists import ListItem, Page


class WebhookRequest(RequestBody):
    """A URL, and the types of events to send to it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"url": "https://example.org/hooks"}]})

    url: Annotated[str, Field(min_length=1, max_length=MAX_URL, description="An https address on a public host.")]
    events: Annotated[
        list[Annotated[str, Field(max_length=64)]],
        Field(max_length=len(TYPES), default_factory=list, description=f"Any of {', '.join(TYPES)}; all, if empty."),
    ]


class WebhookDocument(ListItem):
    """A webhook, without its secret."""

    object: Literal["webhook"] = "webhook"
    url: str
    events: list[str]
    created_at: int
    disabled_at: int | None = Field(description="When the receiver responded with 410 Gone; nothing has been sent since.")
    owned_by: str


class CreatedWebhook(WebhookDocument):
    """A new webhook with its secret."""

    secret: str = Field(description="The key that signs the deliveries (Standard Webhooks specification); it is not shown again.")


class DeliveryDocument(ListItem):
    """The delivery of one event to a webhook."""

    object: Literal["webhook.delivery"] = "webhook.delivery"
    type: str
    state: Literal["delivered", "waiting", "given up"]
    attempts: int
    created_at: int
    next_attempt_at: int | None
    status: int | None = Field(description="HTTP status of the last response.")
    error: str | None = Field(description="Why the last attempt failed.")


WebhookList = Page[WebhookDocument]
DeliveryList = Page[DeliveryDocument]


def webhook_document(webhook: Webhook) -> WebhookDocument:
    """Return the document of a webhook, without its secret."""
    return WebhookDocument(
        id=webhook.id,
        url=webhook.url,
        events=list(webhook.events),
        created_at=int(webhook.created_at),
        disabled_at=None if webhook.disabled_at is None else int(webhook.disabled_at),
        owned_by=webhook.owner,
    )


def delivery_document(delivery: Delivery) -> DeliveryDocument:
    """Return the document of a delivery."""
    return DeliveryDocument(
        id=delivery.id,
        type=delivery.type,
        state=delivery.state,  # type: ignore[arg-type]
        attempts=delivery.attempts,
        created_at=int(delivery.created_at),
        next_attempt_at=None if delivery.due_at is None else int(delivery.due_at),
        status=delivery.status,
        error=delivery.error,
    )
