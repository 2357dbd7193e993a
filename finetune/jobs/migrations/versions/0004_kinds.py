"""Add the kind of a job, so that comparisons and other kinds wait in the same queue as training jobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("kind", sa.String(16), nullable=False, server_default="training"))
    op.drop_index("jobs_claim", "jobs")
    op.create_index("jobs_claim", "jobs", ["state", sa.text("priority DESC"), "created_at", "id"])
    op.create_index("jobs_kind", "jobs", ["kind", "id"])
