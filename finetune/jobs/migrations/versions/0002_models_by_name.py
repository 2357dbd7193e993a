"""Add an index for the owner of a model, which predictions with a key look up; allow uploads over 2 GiB on PostgreSQL."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_index("jobs_suffix", "jobs", ["suffix", "id"])
    if op.get_bind().dialect.name == "postgresql":
        op.alter_column("files", "size_bytes", type_=sa.BigInteger)
