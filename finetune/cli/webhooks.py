"""`webhooks`: URLs to which the workspace's server reports the ends of jobs and promotions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from finetune.cli.training import json_option

if TYPE_CHECKING:
    from finetune.jobs.webhooks import WebhookStore


@click.group()
def webhooks() -> None:
    """Manage webhooks, which report events to a URL.

    \b
    finetune webhooks create https://example.org/hooks
    finetune webhooks deliveries whk-…
    """


def _store() -> WebhookStore:
    from finetune.jobs.database import open_jobs
    from finetune.jobs.webhooks import WebhookStore
    from finetune.storage.workspace import Workspace

    return WebhookStore(open_jobs(Workspace.from_environment().root))


@webhooks.command("create")
@click.argument("url")
@click.option("--owner", help="Report the jobs of this owner of an API key. Default: jobs without a key.")
@click.option(
    "--event",
    "events",
    multiple=True,
    metavar="TYPE",
    help="Event to report, such as fine_tuning.job.succeeded; repeatable. Default: all.",
)
@json_option
def create_webhook(url: str, owner: str | None, events: tuple[str, ...], as_json: bool) -> None:
    """Create a webhook and print its secret.

    The secret signs the deliveries; it cannot be shown again. docs/webhooks.md describes the deliveries and how to verify them.
    """
    from finetune.cli.terminal import print_json
    from finetune.jobs.job import LOCAL_OWNER

    made = _store().create(owner or LOCAL_OWNER, url, events)
    if as_json:
        print_json({**made.to_dict(), "secret": made.secret})
    else:
        click.echo(made.secret)
        click.echo(f"webhook {made.id} of {made.owner}: store the secret, it is not shown again", err=True)


@webhooks.command("list")
@json_option
def list_webhooks(as_json: bool) -> None:
    """List all webhooks with the state of their newest deliveries."""
    from finetune.cli.terminal import print_json, table

    store = _store()
    found = [(one, next(iter(store.deliveries(one.id, limit=1)), None)) for one in store.list()]
    if as_json:
        print_json({"webhooks": [one.to_dict() for one, _ in found]})
        return
    rows = [
        [one.id, one.owner, one.url, "disabled" if one.disabled_at else last.state if last else "nothing sent yet"]
        for one, last in found
    ]
    table("Webhooks", ["id", "owner", "address", "newest delivery"], rows)


@webhooks.command("deliveries")
@click.argument("webhook_id")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1, max=100))
@json_option
def list_deliveries(webhook_id: str, limit: int, as_json: bool) -> None:
    """List the deliveries of a webhook, newest first.

    A failed delivery is listed with the reason.
    """
    from dataclasses import asdict

    from finetune.cli.terminal import print_json, table

    found = _store().deliveries(webhook_id, limit=limit)
    if as_json:
        print_json({"deliveries": [{**asdict(one), "state": one.state} for one in found]})
        return
    rows = [[one.type, one.state, one.attempts, one.status or "", one.error or ""] for one in found]
    table("Deliveries", ["event", "state", "attempts", "status", "why"], rows)


@webhooks.command("delete")
@click.argument("webhook_id")
def delete_webhook(webhook_id: str) -> None:
    """Delete a webhook and its pending deliveries."""
    _store().delete(webhook_id)
    click.echo(f"webhook {webhook_id} is deleted", err=True)
