"""What the job store promises, on SQLite and on PostgreSQL. Lease time is a clock that the test sets."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine

from finetune.errors import Conflict, InvalidInput, NotFound
from finetune.executors.endings import MAX_LOST_ATTEMPTS
from finetune.jobs.clock import LeaseTime
from finetune.jobs.creation import NameTaken, QueueFull, new_id
from finetune.jobs.database import open_database
from finetune.jobs.job import Claim, Job, LeaseLost
from finetune.jobs.kinds import BATCH
from finetune.jobs.store import JobStore

SPEC: dict[str, Any] = {"training_file": "flowers", "metadata": {"note": "a\0b \ud800 ü"}}


@dataclasses.dataclass
class LeaseClock:
    now: LeaseTime = dataclasses.field(default_factory=lambda: LeaseTime(1000.0, "this boot"))

    def __call__(self, _connection: object) -> LeaseTime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now = LeaseTime(self.now.seconds + seconds, self.now.epoch)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> LeaseClock:
    clock = LeaseClock()
    monkeypatch.setattr("finetune.jobs.store.lease_time", clock)
    return clock


@pytest.fixture
def store(engine: Engine) -> JobStore:
    return JobStore(engine, lease_seconds=30)


def queue(store: JobStore, owner: str = "ada", **given: Any) -> Job:
    job, _ = store.create(owner, SPEC, spec_digest="0" * 64, **given)
    return job


def claimed(store: JobStore, worker: str = "worker") -> Claim:
    claim = store.claim(worker)
    assert claim is not None
    return claim


def kinds(store: JobStore, job_id: str) -> list[str]:
    return [event.kind for event in store.events(job_id)]


WRITES: list[Callable[[JobStore, Claim], object]] = [
    lambda store, claim: store.heartbeat(claim, phase="training", records=[{"at": 1.0, "kind": "epoch", "message": "1"}]),
    lambda store, claim: store.finish(claim, "succeeded", result={"model": "flowers"}),
    lambda store, claim: store.finish(claim, "failed", error_code="x", error_message="y"),
    lambda store, claim: store.requeue(claim, "a reason"),
]


# ── the life of a job ─────────────────────────────────────────────────────────────────────────────


def test_a_job_goes_from_queued_to_succeeded_and_says_so(store: JobStore) -> None:
    job = queue(store, suffix="flowers", request={"model": "x"})
    assert (job.state, job.spec, job.request, job.suffix) == ("queued", SPEC, {"model": "x"}, "flowers")
    claim = claimed(store)
    assert claim.job.id == job.id
    assert (claim.job.state, claim.job.attempts, claim.job.worker) == ("running", 1, "worker")
    assert store.heartbeat(claim, phase="training", progress={"done": 1}) is False
    assert store.get(job.id) == store.get(job.id, "ada")
    assert (store.get(job.id).phase, store.get(job.id).progress) == ("training", {"done": 1})
    store.finish(claim, "succeeded", result={"model": "flowers", "version": "1"}, message="done")
    done = store.get(job.id)
    assert (done.state, done.result, done.worker, done.phase) == ("succeeded", {"model": "flowers", "version": "1"}, None, None)
    assert done.created_at <= done.started_at <= done.finished_at  # type: ignore[operator]
    assert kinds(store, job.id) == ["queued", "running", "succeeded"]


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
def test_a_finished_job_never_changes(store: JobStore, clock: LeaseClock, state: str) -> None:
    job = queue(store)
    claim = claimed(store)
    store.finish(claim, state)
    before, history = store.get(job.id), store.events(job.id)
    for write in WRITES:
        with pytest.raises(LeaseLost):
            write(store, claim)
    if state == "cancelled":
        assert store.request_cancel(job.id) == before
    else:
        with pytest.raises(Conflict, match=f"already {state}"):
            store.request_cancel(job.id)
    clock.advance(1e6)
    assert store.reap() == []
    assert store.claim("another") is None
    assert (store.get(job.id), store.events(job.id)) == (before, history)


def test_only_an_end_can_be_finished_with(store: JobStore) -> None:
    queue(store)
    with pytest.raises(ValueError, match="'running' is not one of"):
        store.finish(claimed(store), "running")


def test_jobs_are_claimed_by_priority_and_then_in_the_order_they_came(store: JobStore) -> None:
    first, second, urgent = queue(store), queue(store), queue(store, priority=5)
    assert [store.queue_position(job) for job in (first, second, urgent)] == [1, 2, 0]
    assert [claimed(store).job.id for _ in range(3)] == [urgent.id, first.id, second.id]
    assert store.claim("worker") is None
    assert store.queue_position(store.get(first.id)) is None


def test_ids_sort_by_the_time_they_were_made() -> None:
    ids = [new_id("ftjob") for _ in range(2000)]
    assert len(set(ids)) == 2000
    assert sum(earlier > later for earlier, later in itertools.pairwise(ids)) <= 40, "but for those of one microsecond"
    assert all(len(one) == len("ftjob-") + 26 for one in ids)


# ── owners, lists, quotas ─────────────────────────────────────────────────────────────────────────


def test_another_owners_job_does_not_exist(store: JobStore) -> None:
    job = queue(store, "ada")
    for attempt in (
        lambda: store.get(job.id, "bob"),
        lambda: store.request_cancel(job.id, "bob"),
        lambda: store.get("ftjob-none"),
    ):
        with pytest.raises(NotFound, match="no fine-tuning job"):
            attempt()
    assert store.list("bob") == ([], False)
    assert store.get(job.id).state == "queued"


def test_pages_hold_every_job_once_newest_first(store: JobStore) -> None:
    made = [queue(store, "ada" if number % 2 else "bob").id for number in range(9)]
    seen: list[str] = []
    more, after = True, None
    while more:
        page, more = store.list(after=after, limit=4)
        seen += [job.id for job in page]
        after = seen[-1]
    assert seen == made[::-1]
    assert [job.id for job in store.list("ada", limit=10)[0]] == made[1::2][::-1]
    claim = claimed(store)
    assert [job.id for job in store.list(state="running")[0]] == [claim.job.id] == [made[0]]
    assert store.counts() == {"queued": 8, "running": 1}
    assert store.counts("ada") == {"queued": 4}


def test_an_owner_may_not_queue_more_than_the_quota(store: JobStore) -> None:
    for _ in range(2):
        queue(store, "ada", max_queued=2)
    with pytest.raises(QueueFull, match="2 jobs of yours"):
        queue(store, "ada", max_queued=2)
    queue(store, "bob", max_queued=2)
    store.finish(claimed(store), "succeeded")
    queue(store, "ada", max_queued=2)


def test_the_same_key_and_body_give_the_job_of_the_first_time(store: JobStore) -> None:
    def create(owner: str, body: str) -> tuple[Job, bool]:
        return store.create(owner, SPEC, spec_digest="0" * 64, idempotency_key="k", body_sha256=body, max_queued=1)

    job, new = create("ada", "body")
    assert new
    assert create("ada", "body") == (job, False), "also where the quota is used up"
    with pytest.raises(InvalidInput, match="Idempotency-Key 'k' was used before with another body"):
        create("ada", "another body")
    assert create("bob", "another body")[1], "keys are an owner's own"
    assert store.counts() == {"queued": 2}


def test_an_idempotency_key_is_forgotten_after_a_day(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = store.create("ada", SPEC, spec_digest="0" * 64, idempotency_key="k", body_sha256="b")
    later = SimpleNamespace(time=lambda: first.created_at + 25 * 3600, time_ns=lambda: int((first.created_at + 25 * 3600) * 1e9))
    monkeypatch.setattr("finetune.jobs.creation.time", later)
    second, new = store.create("ada", SPEC, spec_digest="0" * 64, idempotency_key="k", body_sha256="c")
    assert new
    assert second.id != first.id


# ── leases and fences ─────────────────────────────────────────────────────────────────────────────


def test_a_lease_that_is_renewed_is_kept_and_one_that_is_not_is_lost(store: JobStore, clock: LeaseClock) -> None:
    job = queue(store)
    claim = claimed(store)
    for _ in range(5):
        clock.advance(20)
        assert store.reap() == []
        store.heartbeat(claim)
    clock.advance(30.1)
    assert store.reap() == [job.id]
    assert store.reap() == []
    assert (store.get(job.id).state, store.get(job.id).worker) == ("queued", None)
    assert kinds(store, job.id)[-1] == "worker_lost"


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("taken_over", [False, True])
def test_a_worker_that_lost_its_lease_writes_nothing(
    store: JobStore, clock: LeaseClock, write: Callable[[JobStore, Claim], object], taken_over: bool
) -> None:
    job = queue(store)
    stopped = claimed(store, "stopped")
    clock.advance(31)
    assert store.reap() == [job.id]
    second = claimed(store, "second") if taken_over else None
    before, history = store.get(job.id), store.events(job.id)
    with pytest.raises(LeaseLost, match="fence 1"):
        write(store, stopped)
    assert (store.get(job.id), store.events(job.id)) == (before, history)
    if second is not None:
        assert (second.fence, second.job.attempts) == (2, 2)
        store.finish(second, "succeeded")


def test_a_lease_that_ran_out_is_kept_by_a_heartbeat_that_comes_before_anybody_noticed(
    store: JobStore, clock: LeaseClock
) -> None:
    queue(store)
    claim = claimed(store)
    clock.advance(100)
    store.heartbeat(claim)
    assert store.reap() == []


def test_a_step_of_the_wall_clock_ends_no_lease_and_makes_no_duration_negative(
    store: JobStore, clock: LeaseClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = queue(store)
    claim = claimed(store)
    for hours in (+2, -2):
        shifted = job.created_at + 3600 * hours
        monkeypatch.setattr("finetune.jobs.store.time", SimpleNamespace(time=lambda now=shifted: now))
        assert store.reap() == []
        assert store.claim("another") is None
        store.heartbeat(claim)
    store.finish(claim, "succeeded")
    done = store.get(job.id)
    assert done.started_at is not None
    assert done.finished_at is not None
    assert done.finished_at >= done.started_at


def test_the_leases_of_another_boot_have_ended(store: JobStore, clock: LeaseClock) -> None:
    job = queue(store)
    claimed(store)
    clock.now = LeaseTime(5.0, "next boot")
    assert store.reap() == [job.id]
    assert claimed(store).job.id == job.id


def test_a_job_that_seems_to_end_its_workers_is_given_up(store: JobStore, clock: LeaseClock) -> None:
    job = queue(store)
    for _ in range(MAX_LOST_ATTEMPTS - 2):
        claimed(store)
        clock.advance(31)
        store.reap()
    claim = claimed(store)
    assert store.attempts_without_progress(claim) == (1, MAX_LOST_ATTEMPTS - 1), (
        "a worker's loss is not counted as the run's failure"
    )
    store.heartbeat(claim, progressed=True)
    clock.advance(31)
    store.reap()
    for _ in range(MAX_LOST_ATTEMPTS):
        assert store.get(job.id).state == "queued", "a new checkpoint begins the count anew"
        claimed(store)
        clock.advance(31)
        store.reap()
    given_up = store.get(job.id)
    assert (given_up.state, given_up.error_code) == ("failed", "crash_loop")


def test_a_worker_takes_the_kinds_of_jobs_that_it_carries_out_and_leaves_the_others(store: JobStore) -> None:
    training = queue(store)
    batch = queue(store, kind=BATCH)
    taken = store.claim("serving alone", kinds=["batch"])
    assert taken is not None
    assert taken.job.id == batch.id
    assert store.claim("serving alone", kinds=["batch"]) is None
    assert (store.counts(kinds=["batch"]), store.counts()) == ({"running": 1}, {"queued": 1, "running": 1})
    assert claimed(store).job.id == training.id


# ── handing back ──────────────────────────────────────────────────────────────────────────────────


def test_a_job_that_was_handed_back_waits_as_long_as_was_said(store: JobStore, clock: LeaseClock) -> None:
    job = queue(store)
    store.requeue(claimed(store), "the disk is full", delay_seconds=60)
    clock.advance(59)
    assert store.claim("worker") is None
    clock.advance(2)
    assert claimed(store).job.id == job.id
    assert store.events(job.id)[2].data == {"delay_seconds": 60.0}


def test_waiting_does_not_outlive_the_machines_boot_nor_depend_on_the_wall_clock(store: JobStore, clock: LeaseClock) -> None:
    queue(store)
    store.requeue(claimed(store), "the disk is full", delay_seconds=60)
    clock.now = LeaseTime(3.0, "next boot")
    assert store.claim("worker") is not None


def test_attempts_without_a_new_checkpoint_are_counted_until_one_makes_one(store: JobStore) -> None:
    queue(store)
    counts = []
    ends: list[Any] = ["stalled", "lost", "stalled", None, "stalled", "progressed", "lost"]
    for end in ends:
        claim = claimed(store)
        if end == "progressed":
            store.heartbeat(claim, progressed=True)
            store.heartbeat(claim)
        counts.append(store.attempts_without_progress(claim))
        store.requeue(claim, "it died", counted="stalled" if end == "progressed" else end)
    assert counts == [(1, 1), (2, 1), (2, 2), (3, 2), (3, 2), (0, 0), (1, 1)]


# ── cancelling ────────────────────────────────────────────────────────────────────────────────────


def test_a_queued_job_is_cancelled_at_once_and_never_starts(store: JobStore) -> None:
    job = queue(store)
    assert store.request_cancel(job.id, "ada").state == "cancelled"
    assert store.request_cancel(job.id).state == "cancelled"
    assert store.claim("worker") is None
    assert kinds(store, job.id) == ["queued", "cancelled"]


def test_a_running_job_is_cancelled_by_its_worker_which_hears_of_it_twice_over(store: JobStore) -> None:
    job = queue(store)
    claim = claimed(store)
    assert not store.cancel_requested(claim)
    assert store.request_cancel(job.id).state == "cancelling"
    assert store.request_cancel(job.id).state == "cancelling"
    assert store.cancel_requested(claim)
    assert store.heartbeat(claim) is True
    store.finish(claim, "cancelled")
    assert kinds(store, job.id) == ["queued", "running", "cancelling", "cancelled"]


@pytest.mark.parametrize("end", ["requeue", "reap"])
def test_a_job_to_be_cancelled_is_not_queued_again(store: JobStore, clock: LeaseClock, end: str) -> None:
    job = queue(store)
    claim = claimed(store)
    store.request_cancel(job.id)
    if end == "requeue":
        store.requeue(claim, "the worker stops")
    else:
        clock.advance(31)
        assert store.reap() == [job.id]
    assert store.get(job.id).state == "cancelled"
    assert store.get(job.id).finished_at is not None


def test_a_job_that_was_done_before_it_heard_of_the_cancelling_has_succeeded(store: JobStore) -> None:
    job = queue(store)
    claim = claimed(store)
    store.request_cancel(job.id)
    store.finish(claim, "succeeded", result={})
    assert store.get(job.id).state == "succeeded"


# ── events ────────────────────────────────────────────────────────────────────────────────────────


def test_a_runs_own_events_are_added_once_however_often_they_are_sent(store: JobStore) -> None:
    job = queue(store)
    claim = claimed(store)
    lines: list[dict[str, Any]] = [
        {"at": 1.0 + number, "kind": f"k{number}", "message": f"m{number}", "n": number} for number in range(4)
    ]
    store.heartbeat(claim, records=lines[:1])
    store.heartbeat(claim, records=lines[:1])
    store.heartbeat(claim, records=lines[:3])
    store.requeue(claim, "it died")
    store.heartbeat(claimed(store), records=lines)
    history = store.events(job.id)
    assert [event.kind for event in history] == ["queued", "running", "k0", "k1", "k2", "requeued", "running", "k3"]
    assert (history[2].at, history[2].message, history[2].data) == (1.0, "m0", {"n": 0})
    assert [event.seq for event in history] == sorted({event.seq for event in history})
    assert store.events(job.id, after=history[4].seq, limit=2) == history[5:7]


def test_what_a_run_says_of_its_own_end_is_left_to_the_end_itself(store: JobStore) -> None:
    job = queue(store)
    claim = claimed(store)
    said = [{"at": 1.0, "kind": kind, "message": kind} for kind in ("failed", "trained", "succeeded")]
    store.heartbeat(claim, records=said)
    assert kinds(store, job.id) == ["queued", "running", "trained"]


def test_texts_that_a_database_refuses_are_kept_as_far_as_possible(store: JobStore) -> None:
    job = queue(store)
    claim = claimed(store)
    store.heartbeat(
        claim, records=[{"at": 1.0, "kind": "epoch", "message": "a\0b \ud800", "loss": [float("nan"), {"x": float("inf")}]}]
    )
    store.finish(claim, "failed", error_code="x", error_message="tail: \0 \udcff")
    assert store.events(job.id)[2].message == "a\N{REPLACEMENT CHARACTER}b ?"
    assert store.events(job.id)[2].data == {"loss": [None, {"x": None}]}
    assert store.get(job.id).error_message == "tail: \N{REPLACEMENT CHARACTER} ?"
    assert store.get(job.id).spec == SPEC


# ── many at once ──────────────────────────────────────────────────────────────────────────────────


def test_one_key_sent_by_many_at_once_makes_one_job(store: JobStore) -> None:
    made: list[tuple[Job, bool]] = []

    def send() -> None:
        made.append(store.create("ada", SPEC, spec_digest="0" * 64, idempotency_key="k", body_sha256="b"))

    _at_once([send] * 8)
    assert len({job.id for job, _ in made}) == 1
    assert sorted(new for _, new in made) == [False] * 7 + [True]


def test_a_quota_holds_when_many_are_sent_at_once(store: JobStore) -> None:
    refused: list[QueueFull] = []

    def send() -> None:
        try:
            queue(store, max_queued=3)
        except QueueFull as error:
            refused.append(error)

    _at_once([send] * 8)
    assert len(refused) == 5
    assert store.counts() == {"queued": 3}


def test_cancelling_and_claiming_and_handing_back_at_once_lose_no_job_and_no_cancelling(store: JobStore) -> None:
    jobs = [queue(store) for _ in range(20)]

    def work() -> None:
        while (claim := store.claim("worker")) is not None:
            store.requeue(claim, "again") if claim.job.attempts < 2 else store.finish(claim, "succeeded")

    def cancel() -> None:
        for job in jobs[::2]:
            try:
                store.request_cancel(job.id)
            except Conflict:
                continue

    _at_once([work, work, work, cancel])
    for job in jobs:
        done, history = store.get(job.id), kinds(store, job.id)
        assert done.state in ("succeeded", "cancelled")
        assert history[-1] == done.state, "the history is in the order in which things happened"
        asked = "cancelling" in history
        assert not asked or "requeued" not in history[history.index("cancelling") :], "a cancelled job is not queued again"
    assert {store.get(job.id).state for job in jobs[1::2]} == {"succeeded"}


def _at_once(actions: list[Callable[[], None]]) -> None:
    failures: list[BaseException] = []

    def run(action: Callable[[], None]) -> None:
        try:
            ready.wait()
            action()
        except BaseException as error:  # noqa: BLE001 (raised again below)
            failures.append(error)

    ready = threading.Barrier(len(actions))
    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_owners_that_race_for_a_models_name_get_it_once(store: JobStore) -> None:
    def create(owner: str) -> None:
        try:
            queue(store, owner, suffix="flowers")
        except NameTaken as error:
            refused.append(error.message)

    refused: list[str] = []
    _at_once([functools.partial(create, f"owner{number}") for number in range(6)])
    assert refused == ["the model name 'flowers' is taken; choose another suffix"] * 5


def test_a_models_name_is_free_again_when_its_only_job_has_failed(store: JobStore) -> None:
    queue(store, "ada", suffix="flowers")
    store.finish(claimed(store), "failed", error_code="x", error_message="y")
    queue(store, "bob", suffix="flowers")
    with pytest.raises(NameTaken):
        queue(store, "ada", suffix="flowers")
    queue(store, "ada", suffix="flowers", any_suffix=True)


def _claim_everything(database: str | Path, name: str, results: Any) -> None:
    store = JobStore(open_database(database))
    mine: list[tuple[str, int]] = []
    while (claim := store.claim(name)) is not None:
        mine.append((claim.job.id, claim.fence))
    results.put(mine)


@pytest.mark.parametrize(("processes", "jobs"), [(3, 40), pytest.param(4, 200, marks=pytest.mark.slow)], ids=["few", "many"])
def test_processes_that_race_for_jobs_get_each_one_once(store: JobStore, database: str | Path, processes: int, jobs: int) -> None:
    made = sorted(queue(store).id for _ in range(jobs))
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    racers = [context.Process(target=_claim_everything, args=(database, f"w{n}", results)) for n in range(processes)]
    for racer in racers:
        racer.start()
    shares = [results.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join()
    claims = [claim for share in shares for claim in share]
    assert sorted(job_id for job_id, _ in claims) == made
    assert {fence for _, fence in claims} == {1}
    assert {store.get(job_id).attempts for job_id in made} == {1}
