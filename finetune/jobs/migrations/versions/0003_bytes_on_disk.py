"""Add the disk space of uploads and runs, for quotas."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    for table in ("files", "jobs"):
        op.add_column(table, sa.Column("stored_bytes", sa.BigInteger, nullable=False, server_default="0"))
    op.execute("UPDATE files SET stored_bytes = size_bytes")
