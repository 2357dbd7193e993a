"""Alembic's entry point. Migrations run inside the transaction that `finetune.jobs.database` opened."""

from __future__ import annotations

from alembic import context

from finetune.jobs.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
