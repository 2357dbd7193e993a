"""``/v1/webhooks``: URLs to which the ends of jobs and promotions are reported."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from service.middleware.auth import Submitting
from service.problems import RESPONSES
from service.schemas.webhooks import (
    CreatedWebhook,
    DeliveryList,
    WebhookDocument,
    WebhookList,
    WebhookRequest,
    delivery_document,
    webhook_document,
)
from service.state import Server

webhooks_router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], responses=RESPONSES)


@webhooks_router.post("", status_code=201)
def create_webhook(caller: Submitting, server: Server, asked: WebhookRequest) -> CreatedWebhook:
    """Create a webhook for the ends of your jobs, and for promotions of models that you may use."""
    server.webhooks_reach.check_url(asked.url)
    made = server.database.webhooks.create(caller.owner, asked.url, asked.events)
    return CreatedWebhook(**webhook_document(made).model_dump(), secret=made.secret)


@webhooks_router.get("")
def list_webhooks(caller: Submitting, server: Server) -> WebhookList:
    """List your webhooks, oldest first."""
    return WebhookList.of([webhook_document(one) for one in server.database.webhooks.list(caller.sees)], has_more=False)


@webhooks_router.get("/{webhook_id}")
def get_webhook(caller: Submitting, server: Server, webhook_id: str) -> WebhookDocument:
    """Return one webhook."""
    return webhook_document(server.database.webhooks.get(webhook_id, caller.sees))


@webhooks_router.delete("/{webhook_id}", status_code=204, response_class=Response)
def delete_webhook(caller: Submitting, server: Server, webhook_id: str) -> Response:
    """Delete a webhook and its pending deliveries."""
    server.database.webhooks.delete(webhook_id, caller.sees)
    return Response(status_code=204)


@webhooks_router.get("/{webhook_id}/deliveries")
def list_deliveries(
    caller: Submitting, server: Server, webhook_id: str, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> DeliveryList:
    """List the deliveries of a webhook, newest first, with their states and errors."""
    found = server.database.webhooks.deliveries(webhook_id, caller.sees, limit)
    return DeliveryList.of([delivery_document(one) for one in found], has_more=False)
