"""What follows from each way in which an attempt can end."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from finetune.executors.endings import Ending, Finish, TryAgain, next_action

DIVERGED = {"code": "training_failed", "message": "the loss became nan at step 7", "problems": []}
BAD_SPEC = {"code": "invalid_data", "message": "no class folder", "problems": [{"where": "training_file", "message": "is empty"}]}
NO_SPACE = {"code": "disk_full", "message": "checkpoints: the disk is full", "problems": []}
NO_MEMORY = {"code": "out_of_memory", "message": "out of memory at batch size 64", "problems": []}
KILLED = -signal.SIGKILL


def follows(exit_code: int, **facts: Any) -> Finish | TryAgain:
    return next_action(Ending(exit_code, **facts), retry_base_seconds=2.0)


@pytest.mark.parametrize("exit_code", [0, 1, 130, KILLED])
@pytest.mark.parametrize("facts", [{}, {"cancelling": True}, {"worker_stopping": True}, {"hung": True}])
def test_a_complete_run_has_succeeded_however_its_process_ended(exit_code: int, facts: dict[str, Any]) -> None:
    assert follows(exit_code, complete=True, **facts) == Finish("succeeded")


@pytest.mark.parametrize("exit_code", [0, 1, 2, 130, KILLED, -signal.SIGTERM])
def test_an_incomplete_run_whose_end_was_asked_for_is_cancelled(exit_code: int) -> None:
    assert follows(exit_code, cancelling=True, error=DIVERGED if exit_code == 1 else None) == Finish("cancelled")


def test_a_run_that_took_more_memory_than_allowed_fails_at_once() -> None:
    facts = {"memory_bytes": 9 << 30, "max_memory_bytes": 8 << 30}
    ended = follows(KILLED, **facts)
    assert isinstance(ended, Finish)
    assert (ended.state, ended.error_code) == ("failed", "out_of_memory")
    assert "took 9.0 GiB of memory; its worker allows 8.0 GiB a job" in str(ended.error_message)
    assert follows(KILLED, cancelling=True, **facts) == Finish("cancelled")


def test_a_users_mistake_fails_at_once_with_every_problem() -> None:
    assert follows(2, error=BAD_SPEC) == Finish("failed", "invalid_data", "no class folder\ntraining_file: is empty")


def test_a_users_mistake_that_left_no_document_fails_at_once_with_what_was_printed() -> None:
    ended = follows(2, log_tail="no such option: --jsn")
    assert isinstance(ended, Finish)
    assert ended.error_code == "invalid_input"
    assert "no such option" in str(ended.error_message)


def test_a_failure_that_would_repeat_itself_is_not_tried_again() -> None:
    assert follows(1, error=DIVERGED) == Finish("failed", "training_failed", "the loss became nan at step 7")


@pytest.mark.parametrize("exit_code", [130, KILLED, -signal.SIGTERM])
def test_a_run_that_a_stopping_worker_ended_goes_back_at_once_and_uncounted(exit_code: int) -> None:
    again = follows(exit_code, worker_stopping=True, stalled_attempts=99)
    assert isinstance(again, TryAgain)
    assert (again.delay_seconds, again.counted) == (0.0, None)


def test_a_run_folder_that_is_held_is_tried_again_without_counting() -> None:
    again = follows(75, stalled_attempts=99)
    assert isinstance(again, TryAgain)
    assert (again.delay_seconds, again.counted) == (5.0, None)


@pytest.mark.parametrize(("exit_code", "error", "disk_full"), [(1, NO_SPACE, False), (1, None, True), (KILLED, None, True)])
def test_a_full_disk_is_waited_out_however_long_it_takes(exit_code: int, error: Any, disk_full: bool) -> None:
    again = follows(exit_code, error=error, disk_full=disk_full, stalled_attempts=99)
    assert isinstance(again, TryAgain)
    assert "disk is full" in again.reason
    assert (again.delay_seconds, again.counted) == (60.0, None)


def test_an_error_of_the_run_itself_is_not_blamed_on_a_disk_that_is_full_too() -> None:
    assert follows(1, error=DIVERGED, disk_full=True) == Finish("failed", "training_failed", DIVERGED["message"])


def test_a_run_that_stopped_for_want_of_a_lease_counts_as_lost_and_has_more_tries() -> None:
    again = follows(130, stalled_attempts=3, lost_attempts=9)
    assert isinstance(again, TryAgain)
    assert (again.delay_seconds, again.counted) == (2.0, "lost")
    assert "its worker could not renew its lease" in again.reason
    given_up = follows(130, stalled_attempts=3, lost_attempts=10)
    assert isinstance(given_up, Finish)
    assert given_up.error_code == "crash_loop"


@pytest.mark.parametrize(
    ("exit_code", "what"),
    [
        (KILLED, "killed (signal 9)"),
        (-signal.SIGSEGV, "signal 11 (SIGSEGV)"),
        (3, "exit code 3"),
        (0, "exit code 0"),
    ],
)
def test_a_death_is_tried_again_twice_and_the_third_is_a_crash_loop(exit_code: int, what: str) -> None:
    for stalled, delay in [(0, 2.0), (1, 2.0), (2, 4.0)]:
        again = follows(exit_code, stalled_attempts=stalled)
        assert isinstance(again, TryAgain)
        assert (again.delay_seconds, again.counted) == (delay, "stalled")
        assert what in again.reason
    given_up = follows(exit_code, stalled_attempts=3, log_tail="the last words")
    assert isinstance(given_up, Finish)
    assert (given_up.state, given_up.error_code) == ("failed", "crash_loop")
    assert what in str(given_up.error_message)
    assert "the last words" in str(given_up.error_message)


def test_a_run_that_hangs_again_and_again_is_said_to_have_stalled() -> None:
    assert isinstance(follows(KILLED, hung=True, stalled_attempts=2), TryAgain)
    given_up = follows(KILLED, hung=True, stalled_attempts=3)
    assert isinstance(given_up, Finish)
    assert given_up.error_code == "stalled"
    assert "no progress" in str(given_up.error_message)


@pytest.mark.parametrize(
    ("exit_code", "facts", "advice"),
    [(1, {"error": NO_MEMORY}, "batch size 64"), (KILLED, {"memory_kills": 1}, "batch_size")],
)
def test_memory_that_runs_out_is_tried_once_more(exit_code: int, facts: dict[str, Any], advice: str) -> None:
    assert isinstance(follows(exit_code, stalled_attempts=1, **facts), TryAgain)
    given_up = follows(exit_code, stalled_attempts=2, **facts)
    assert isinstance(given_up, Finish)
    assert given_up.error_code == "out_of_memory"
    assert advice in str(given_up.error_message)


def test_pauses_grow_only_so_far() -> None:
    again = next_action(Ending(KILLED, stalled_attempts=2), retry_base_seconds=1e6)
    assert isinstance(again, TryAgain)
    assert again.delay_seconds == 600.0
