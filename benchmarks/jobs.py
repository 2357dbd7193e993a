"""How quick the job store is with a long queue: claiming, listing, heartbeats, events, on SQLite and on PostgreSQL.

    python benchmarks/jobs.py --queued 10000 --out jobs.json [--postgres postgresql://…]

Prints medians and 95th percentiles in milliseconds. Each operation is one transaction, flushed to disk as in production.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from finetune.jobs.creation import new_id
from finetune.jobs.database import open_database, writing
from finetune.jobs.history import model_owner
from finetune.jobs.schema import jobs
from finetune.jobs.store import JobStore
from finetune.spec import parse_spec

OWNERS = 20


def fill(store: JobStore, count: int) -> list[str]:
    """`count` queued jobs of `OWNERS` owners, as `create` would make them, in one transaction."""
    spec = json.dumps(parse_spec({"training_file": "/data/flowers"}).model_dump(mode="json"))
    rows = [
        {"id": new_id("ftjob"), "owner": f"owner{n % OWNERS}", "state": "queued", "spec": spec, "spec_digest": "0" * 64,
         "suffix": f"model{n}", "created_at": time.time()}
        for n in range(count)
    ]  # fmt: skip
    with writing(store.engine) as connection:
        connection.execute(insert(jobs), rows)
    return [row["id"] for row in rows]


def timed(action: Callable[[], object], rounds: int) -> dict[str, float]:
    """Milliseconds: the median, the 95th percentile, the longest."""
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        taken.append(1000 * (time.perf_counter() - began))
    return {
        "rounds": rounds,
        "p50_ms": round(statistics.median(taken), 2),
        "p95_ms": round(statistics.quantiles(taken, n=20)[-1], 2),
        "max_ms": round(max(taken), 2),
    }


def measure(where: str | Path, queued: int, rounds: int) -> dict[str, dict[str, float]]:
    store = JobStore(open_database(where))
    ids = fill(store, queued)
    middle = ids[len(ids) // 2]
    claims, last = [], store.get(ids[-1])
    spec = parse_spec({"training_file": "/data/flowers"}).model_dump(mode="json")

    def claim() -> None:
        claim = store.claim("benchmark")
        assert claim is not None
        claims.append(claim)

    found = {
        "claim": timed(claim, rounds),
        "list, first page": timed(lambda: store.list(limit=20), rounds),
        "list, from the middle": timed(lambda: store.list(after=middle, limit=20), rounds),
        "list, one owner": timed(lambda: store.list("owner7", limit=20), rounds),
        "list, one state": timed(lambda: store.list(state="running", limit=20), rounds),
        "get": timed(lambda: store.get(middle), rounds),
        "create with quota": timed(lambda: store.create("new", spec, spec_digest="0" * 64, max_queued=10**9), rounds),
        "queue position, last": timed(lambda: store.queue_position(last), rounds),
        "whose a model is": timed(lambda: model_owner(store.engine, f"model{queued // 2}"), rounds),
        "ended lately": timed(lambda: store.ended_since(time.time() - 60), rounds),
        "counts": timed(store.counts, rounds),
        "heartbeat": timed(lambda: store.heartbeat(claims[0], phase="training", progress={"done": 1}), rounds),
        "reap, nothing lost": timed(store.reap, rounds),
    }
    store.engine.dispose()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--postgres", metavar="URL", help="also measure this (empty!) PostgreSQL database")
    parser.add_argument("--folder", type=Path, help="where the SQLite file is made (default: a temporary folder)")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    report: dict[str, Any] = {"queued": given.queued, "sqlite_version": sqlite3.sqlite_version, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        report["sqlite"] = measure(Path(folder) / "jobs.db", given.queued, given.rounds)
    if given.postgres:
        report["postgresql"] = measure(given.postgres, given.queued, given.rounds)
    for database in [name for name in ("sqlite", "postgresql") if name in report]:
        print(f"{database}, {given.queued:,} queued jobs")
        for name, row in report[database].items():
            print(f"  {name:24} p50 {row['p50_ms']:8.2f} ms   p95 {row['p95_ms']:8.2f} ms   max {row['max_ms']:8.2f} ms")
    if given.out:
        given.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
