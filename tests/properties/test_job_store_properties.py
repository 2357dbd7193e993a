"""Any sequence of what clients and workers may do to jobs, compared step by step with a few lines that say what should happen."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from finetune.errors import Conflict
from finetune.executors.endings import MAX_LOST_ATTEMPTS
from finetune.jobs import store as store_module
from finetune.jobs.clock import LeaseTime
from finetune.jobs.database import open_database
from finetune.jobs.job import Claim, Job, LeaseLost
from finetune.jobs.schema import HELD, TERMINAL
from finetune.jobs.store import JobStore

LEASE_SECONDS = 30.0
MOST_AT_ONCE = 2  # few jobs, so that much happens to each


class JobsModel:
    """`expected`: job id → state; `fences`: job id → the last one given out; `until`: job id → when its lease ends."""

    def __init__(self, path: Path, chance: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(store_module, "lease_time", lambda _connection: LeaseTime(self.now, "boot"))
        self.store = JobStore(open_database(path), lease_seconds=LEASE_SECONDS)
        self.chance = chance
        self.done: Counter[str] = Counter()
        self.expected: dict[str, str] = {}
        self.fences: dict[str, int] = {}
        self.until: dict[str, float] = {}
        self.not_before: dict[str, float] = {}
        self.lost: dict[str, int] = {}
        self.ended: dict[str, Job] = {}
        self.claims: list[Claim] = []

    def create(self) -> None:
        if sum(state not in TERMINAL for state in self.expected.values()) >= MOST_AT_ONCE:
            return
        job, new = self.store.create("ada", {}, spec_digest="0" * 64)
        assert new
        self.expected[job.id], self.fences[job.id] = "queued", 0
        self.not_before[job.id], self.lost[job.id] = 0.0, 0

    def claim(self) -> None:
        due = [job for job in sorted(self.expected) if self.expected[job] == "queued" and self.not_before[job] <= self.now]
        claim = self.store.claim("worker")
        assert (claim and claim.job.id) == (due[0] if due else None)
        if claim is not None:
            self.fences[claim.job.id] += 1
            assert claim.fence == self.fences[claim.job.id]
            self.expected[claim.job.id], self.until[claim.job.id] = "running", self.now + LEASE_SECONDS
            self.claims.append(claim)

    def holds(self, claim: Claim) -> bool:
        return self.expected[claim.job.id] in HELD and claim.fence == self.fences[claim.job.id]

    def chosen(self) -> Claim | None:
        """A claim that holds its job; or one that does not, preferably of a job that somebody else holds now."""
        holds = self.chance.random() < 0.6
        claims = [claim for claim in self.claims if self.holds(claim) == holds]
        if not claims:
            return None
        claim = max(claims, key=lambda claim: (self.expected[claim.job.id] in HELD, claim.fence))
        self.done["by the holder" if holds else "by another" if self.expected[claim.job.id] in HELD else "by nobody"] += 1
        return claim

    def heartbeat(self) -> None:
        progressed = self.chance.random() < 0.2
        if (claim := self.chosen()) is None:
            return
        if not self.holds(claim):
            with pytest.raises(LeaseLost):
                self.store.heartbeat(claim, progressed=progressed)
            return
        assert self.store.heartbeat(claim, progressed=progressed) == (self.expected[claim.job.id] == "cancelling")
        self.until[claim.job.id] = self.now + LEASE_SECONDS
        if progressed:
            self.lost[claim.job.id] = -1  # this attempt will not count

    def finish(self) -> None:
        state = self.chance.choice(TERMINAL)
        if (claim := self.chosen()) is None:
            return
        if not self.holds(claim):
            with pytest.raises(LeaseLost):
                self.store.finish(claim, state)
            return
        self.store.finish(claim, state)
        self.expected[claim.job.id] = state

    def requeue(self) -> None:
        delay, counted = self.chance.choice([0.0, 20.0]), self.chance.choice(["stalled", "lost", None])
        if (claim := self.chosen()) is None:
            return
        if not self.holds(claim):
            with pytest.raises(LeaseLost):
                self.store.requeue(claim, "a reason")
            return
        job = claim.job.id
        self.store.requeue(claim, "a reason", delay_seconds=delay, counted=counted)
        self.expected[job] = "cancelled" if self.expected[job] == "cancelling" else "queued"
        progressed = self.lost[job] == -1
        self.not_before[job], self.lost[job] = self.now + delay, 0 if progressed else self.lost[job] + (counted == "lost")

    def cancel(self) -> None:
        which = self.chance.choice(["running", "running", "cancelling", "queued", *TERMINAL])
        job = next((job for job, state in self.expected.items() if state == which), None)
        if job is None:
            return
        if which in ("succeeded", "failed"):
            with pytest.raises(Conflict):
                self.store.request_cancel(job)
            return
        self.store.request_cancel(job)
        self.expected[job] = {"queued": "cancelled", "running": "cancelling"}.get(which, which)

    def time_passes(self) -> None:
        self.now += 10.0

    def leases_end(self) -> None:
        self.now += self.chance.choice([0.0, 31.0])
        held = [job for job, state in self.expected.items() if state in HELD]
        expired = [job for job in held if self.until[job] < self.now]
        assert sorted(self.store.reap()) == sorted(expired)
        for job in expired:
            self.done[f"reaped {self.expected[job]}"] += 1
            self.lost[job] += 1
            self.not_before[job] = 0.0
            given_up = self.lost[job] >= MAX_LOST_ATTEMPTS
            self.expected[job] = "cancelled" if self.expected[job] == "cancelling" else "failed" if given_up else "queued"

    def agree(self) -> None:
        found = {job.id: job for job in self.store.list(limit=1000)[0]}
        assert {job_id: job.state for job_id, job in found.items()} == self.expected
        for job_id, job in found.items():
            assert (job.worker is not None) == (job.state in HELD)
            assert (job.finished_at is not None) == job.finished
            assert self.ended.setdefault(job_id, job) == job if job.finished else job_id not in self.ended
            if job.finished:
                assert self.store.events(job_id)[-1].kind == job.state


ACTIONS = {"create": 2, "claim": 4, "heartbeat": 3, "finish": 1, "requeue": 2, "cancel": 2, "time_passes": 1, "leases_end": 4}


@pytest.mark.parametrize("seed", range(4))
def test_whatever_clients_and_workers_do_the_store_does_what_the_model_says(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    model = JobsModel(tmp_path / "jobs.db", chance, monkeypatch)
    for action in chance.choices(list(ACTIONS), list(ACTIONS.values()), k=250):
        getattr(model, action)()
        model.agree()
    reached = ("by the holder", "by another", "by nobody", "reaped running", "reaped cancelling")
    assert all(model.done[name] for name in reached), model.done
    assert len(model.ended) >= 5
