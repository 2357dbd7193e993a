"""The tables of the job database. Times are Unix seconds, except those marked as on the lease clock (`clock`)."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

STATES = ("queued", "running", "cancelling", "succeeded", "failed", "cancelled")
TERMINAL = ("succeeded", "failed", "cancelled")
HELD = ("running", "cancelling")  # a worker holds a lease on the job
UNFINISHED = ("queued", *HELD)

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(80), nullable=False),
    Column("state", String(16), nullable=False),
    Column("phase", String(16)),
    Column("priority", Integer, nullable=False, default=0),
    Column("spec", Text, nullable=False),  # the request for the command, as JSON
    Column("spec_digest", String(64), nullable=False),
    Column("request", Text),  # the client's body, if it is not in the form of a JobSpec
    Column("suffix", String(64)),
    Column("created_at", Float, nullable=False),
    Column("not_before", Float, nullable=False, default=0.0),  # on the lease clock, like `lease_until`
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("attempts", Integer, nullable=False, default=0),  # number of starts
    Column("progressed", Boolean, nullable=False, default=False),  # whether the current attempt has written a new checkpoint
    Column("stalled_attempts", Integer, nullable=False, default=0),  # earlier ones in a row without a new checkpoint
    Column("lost_attempts", Integer, nullable=False, default=0),  # the same, of attempts whose worker was lost
    Column("fence", Integer, nullable=False, default=0),  # fencing token: every claim increments it, and every write names it
    Column("lease_owner", String(80)),
    Column("lease_until", Float),  # on the lease clock
    Column("clock_epoch", String(64)),  # the lease clock of `lease_until` and `not_before`
    Column("cancel_requested_at", Float),
    Column("progress", Text),
    Column("progress_at", Float),
    Column("result", Text),
    Column("error_code", String(64)),
    Column("error_message", Text),
    Column("stored_bytes", BigInteger, nullable=False, server_default="0"),  # of the run's folder; set when the job ends
    Column("kind", String(16), nullable=False, server_default="training"),  # see `finetune.jobs.kinds`
    CheckConstraint("state IN ('queued','running','cancelling','succeeded','failed','cancelled')", name="known_state"),
    CheckConstraint("(state IN ('running','cancelling')) = (lease_owner IS NOT NULL)", name="lease_while_held"),
    Index("jobs_claim", "state", text("priority DESC"), "created_at", "id"),  # the order in which jobs are claimed
    Index("jobs_kind", "kind", "id"),
    Index("jobs_owner", "owner", "id"),
    Index("jobs_suffix", "suffix", "id"),
)

job_events = Table(
    "job_events",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("job_id", String(40), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("at", Float, nullable=False),
    Column("level", String(8), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", Text),
    Column("line", Integer),  # line number in the run's events.jsonl, for events from there
    Index("job_events_job", "job_id", "seq"),
    sqlite_autoincrement=True,
)

files = Table(
    "files",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(80), nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("size_bytes", Integer().with_variant(BigInteger, "postgresql"), nullable=False),  # SQLite's integers are large enough
    Column("sha256", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("summary", Text, nullable=False),  # JSON: classes with counts
    Column("stored_bytes", BigInteger, nullable=False, server_default="0"),  # disk space of the unpacked contents
    Index("files_owner", "owner", "id"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("owner", String(80), nullable=False),
    Column("secret_sha256", LargeBinary(32), nullable=False),
    Column("scopes", String(120), nullable=False),  # comma-separated
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    Column("last_used_at", Float),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("owner", String(80), nullable=False),
    Column("key", String(255), nullable=False),
    Column("body_sha256", String(64), nullable=False),
    Column("object_id", String(40), nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("owner", "key", name="one_answer_a_key"),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(80), nullable=False),
    Column("url", Text, nullable=False),
    Column("secret", String(80), nullable=False),  # ``whsec_`` and base64; signs the deliveries
    Column("events", Text, nullable=False),  # event types, comma-separated
    Column("created_at", Float, nullable=False),
    Column("disabled_at", Float),  # when the receiver responded with 410 Gone
    Index("webhooks_owner", "owner", "id"),
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", String(64), primary_key=True),  # equal in every attempt, so that receivers recognise repetitions
    Column("webhook_id", String(40), ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    Column("type", String(64), nullable=False),
    Column("payload", Text, nullable=False),  # JSON, exactly the bytes that are signed and sent
    Column("created_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("due_at", Float),  # None: delivered or given up
    Column("delivered_at", Float),
    Column("status", Integer),  # HTTP status of the last response
    Column("error", Text),  # why the last attempt failed
    Index("webhook_deliveries_due", "due_at"),
    Index("webhook_deliveries_webhook", "webhook_id", "created_at"),
)
