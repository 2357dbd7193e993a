"""Any sequence of what clients and workers may do to jobs, compared step by step with a few lines that say what should happen."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, precondition, rule

from finetune.errors import Conflict
from finetune.jobs import store as store_module
from finetune.jobs.clock import LeaseTime
from finetune.jobs.database import open_database
from finetune.jobs.schema import TERMINAL
from finetune.jobs.store import MAX_LOST_WORKERS, Claim, JobStore, LeaseLost

LEASE_SECONDS = 30.0
MOST_AT_ONCE = 2  # few jobs, so that much happens to each


class JobsModel(RuleBasedStateMachine):
    """`expected`: job id → state; `fences`: job id → the last one given out; `until`: job id → when its lease ends."""

    claims: Bundle[Claim] = Bundle("claims")

    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.now = 1000.0
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(store_module, "lease_time", lambda _connection: LeaseTime(self.now, "boot"))
        self.store = JobStore(open_database(self.folder / "jobs.db"), lease_seconds=LEASE_SECONDS)
        self.expected: dict[str, str] = {}
        self.fences: dict[str, int] = {}
        self.until: dict[str, float] = {}
        self.not_before: dict[str, float] = {}
        self.lost: dict[str, int] = {}
        self.ended: dict[str, Any] = {}

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.store.engine.dispose()
            self.patch.undo()
            shutil.rmtree(self.folder)

    @precondition(lambda self: sum(state not in TERMINAL for state in self.expected.values()) < MOST_AT_ONCE)
    @rule()
    def create(self) -> None:
        job, new = self.store.create("ada", {}, spec_digest="0" * 64)
        assert new
        self.expected[job.id], self.fences[job.id] = "queued", 0
        self.not_before[job.id], self.lost[job.id] = 0.0, 0

    @precondition(lambda self: "queued" in self.expected.values())
    @rule(target=claims)
    def claim(self) -> Any:
        due = [job for job in sorted(self.expected) if self.expected[job] == "queued" and self.not_before[job] <= self.now]
        claim = self.store.claim("worker")
        assert (claim and claim.job.id) == (due[0] if due else None)
        if claim is None:
            return multiple()
        self.fences[claim.job.id] += 1
        assert claim.fence == self.fences[claim.job.id]
        self.expected[claim.job.id], self.until[claim.job.id] = "running", self.now + LEASE_SECONDS
        return claim

    def holds(self, claim: Claim) -> bool:
        return self.expected[claim.job.id] in ("running", "cancelling") and claim.fence == self.fences[claim.job.id]

    @rule(claim=claims, progressed=st.booleans())
    def heartbeat(self, claim: Claim, progressed: bool) -> None:
        if not self.holds(claim):
            with pytest.raises(LeaseLost):
                self.store.heartbeat(claim, progressed=progressed)
            return
        cancelling = self.store.heartbeat(claim, progressed=progressed)
        assert cancelling == (self.expected[claim.job.id] == "cancelling")
        self.until[claim.job.id] = self.now + LEASE_SECONDS
        if progressed:
            self.lost[claim.job.id] = -1  # this attempt will not count

    @rule(claim=consumes(claims), state=st.sampled_from(TERMINAL))
    def finish(self, claim: Claim, state: str) -> None:
        if not self.holds(claim):
            with pytest.raises(LeaseLost):
                self.store.finish(claim, state)
            return
        self.store.finish(claim, state)
        self.expected[claim.job.id] = state

    @rule(claim=consumes(claims), delay=st.sampled_from([0.0, 20.0]), counted=st.booleans())
    def hand_back(self, claim: Claim, delay: float, counted: bool) -> None:
        job = claim.job.id
        if not self.holds(claim):
            with pytest.raises(LeaseLost):
                self.store.hand_back(claim, "a reason")
            return
        self.store.hand_back(claim, "a reason", delay_seconds=delay, counted=counted)
        self.expected[job] = "cancelled" if self.expected[job] == "cancelling" else "queued"
        self.not_before[job], self.lost[job] = self.now + delay, max(self.lost[job], 0)

    @precondition(lambda self: self.expected)
    @rule(which=st.sampled_from(["running", "running", "cancelling", "queued", *TERMINAL]))
    def cancel(self, which: str) -> None:
        job = next((job for job, state in self.expected.items() if state == which), None)
        if job is None:
            return
        if which in ("succeeded", "failed"):
            with pytest.raises(Conflict):
                self.store.request_cancel(job)
            return
        self.store.request_cancel(job)
        self.expected[job] = {"queued": "cancelled", "running": "cancelling"}.get(which, which)

    @rule(seconds=st.sampled_from([10.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: any(state in ("running", "cancelling") for state in self.expected.values()))
    @rule(seconds=st.sampled_from([0.0, 31.0]))
    def reap(self, seconds: float) -> None:
        self.now += seconds
        held = [job for job, state in self.expected.items() if state in ("running", "cancelling")]
        expired = [job for job in held if self.until[job] < self.now]
        assert sorted(self.store.reap()) == sorted(expired)
        for job in expired:
            self.lost[job] += 1
            self.not_before[job] = 0.0
            given_up = self.lost[job] >= MAX_LOST_WORKERS
            self.expected[job] = "cancelled" if self.expected[job] == "cancelling" else "failed" if given_up else "queued"

    @invariant()
    def the_store_says_what_the_model_says(self) -> None:
        if not hasattr(self, "expected"):
            return
        found = {job.id: job for job in self.store.list(limit=1000)[0]}
        assert {job_id: job.state for job_id, job in found.items()} == self.expected
        for job_id, job in found.items():
            assert (job.worker is not None) == (job.state in ("running", "cancelling"))
            assert (job.finished_at is not None) == job.finished
            assert self.ended.setdefault(job_id, job) == job if job.finished else job_id not in self.ended
            if job.finished:
                assert self.store.events(job_id)[-1].kind == job.state


JobsModel.TestCase.settings = settings(
    max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
test_any_sequence_of_actions_does_what_the_model_says = JobsModel.TestCase
