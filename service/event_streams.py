"""Live streams of job events: server-sent events for any number of readers, with one database query every half second.

All readers of one job share its events, already encoded as frames, so that a reader costs only a list index and a wake-up.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool

from finetune.errors import DiskFull, NotFound, StoreError
from finetune.jobs.history import Update
from finetune.jobs.job import Event

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
COMMENT_SECONDS = 15.0  # proxies close idle connections


@dataclass
class _Channel:
    """The events and progress of one job while it has readers."""

    readers: int = 0
    seqs: list[int] = field(default_factory=list)
    frames: list[str] = field(default_factory=list)
    progress: str | None = None
    done: str | None = None
    gone: bool = False
    loaded: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        """Wake all readers. They wait on the present `asyncio.Event`, so it is replaced by a new one."""
        self.changed.set()
        self.changed = asyncio.Event()


class EventStreams:
    """The event streams of one server.

    Args:
        look: maps job ids with their last known seq to updates (see `finetune.jobs.history.updates`).
        show: converts an event to the document for readers.
    """

    def __init__(
        self,
        look: Callable[[Mapping[str, int]], Mapping[str, Update]],
        show: Callable[[Event], Mapping[str, Any]],
        *,
        poll_seconds: float = POLL_SECONDS,
        comment_seconds: float = COMMENT_SECONDS,
    ) -> None:
        self._look, self._show = look, show
        self._poll_seconds, self._comment_seconds = poll_seconds, comment_seconds
        self._channels: dict[str, _Channel] = {}
        self._poller: asyncio.Task[None] | None = None
        self._closing = False

    async def follow(
        self, job_id: str, after: int = 0, *, still_allowed: Callable[[], bool] = lambda: True
    ) -> AsyncIterator[str]:
        """Yield the frames of a job: events after `after`, changes of its progress, comments, and ``done`` at its end.

        Args:
            still_allowed: called every few seconds; the stream ends when it returns False, since the key is no longer valid.
        """
        channel = self._subscribe(job_id)
        try:
            position, progress = -1, None
            checked_at = time.monotonic()
            while not self._closing and not channel.gone:
                changed = channel.changed
                if time.monotonic() - checked_at >= self._comment_seconds:
                    checked_at = time.monotonic()
                    if not await run_in_threadpool(still_allowed):
                        return
                if channel.loaded:
                    if position < 0:
                        position = bisect_right(channel.seqs, after)
                    end = len(channel.frames)
                    for frame in channel.frames[position:end]:
                        yield frame
                    position = end
                    if channel.progress != progress and channel.progress is not None:
                        progress = channel.progress
                        yield progress
                    if channel.done is not None:
                        yield channel.done
                        return
                try:
                    async with asyncio.timeout(self._comment_seconds):
                        await changed.wait()
                except TimeoutError:
                    yield ": the job goes on\n\n"
        finally:
            self._unsubscribe(job_id, channel)

    def close(self) -> None:
        """End all streams. Clients reconnect to the next server with the id of their last event."""
        self._closing = True
        for channel in self._channels.values():
            channel.wake()

    def _subscribe(self, job_id: str) -> _Channel:
        channel = self._channels.setdefault(job_id, _Channel())
        channel.readers += 1
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
            self._poller.add_done_callback(self._polled)
        return channel

    def _unsubscribe(self, job_id: str, channel: _Channel) -> None:
        channel.readers -= 1
        if channel.readers == 0 and self._channels.get(job_id) is channel:
            del self._channels[job_id]

    async def _poll(self) -> None:
        while self._channels and not self._closing:
            known = {job_id: channel.seqs[-1] if channel.seqs else 0 for job_id, channel in self._channels.items()}
            try:
                found = await run_in_threadpool(self._look, known)
            except (StoreError, DiskFull):
                found = None  # a temporary failure; readers wait
            if found is not None:
                for job_id in known:
                    self._take(job_id, found.get(job_id))
            await asyncio.sleep(self._poll_seconds)

    def _polled(self, poller: asyncio.Task[None]) -> None:
        """End all streams if the poller has failed, so that clients reconnect instead of waiting."""
        if not poller.cancelled() and (error := poller.exception()) is not None:
            log.error("events cannot be followed", exc_info=error)
            for channel in self._channels.values():
                channel.gone = True
                channel.wake()

    def _take(self, job_id: str, update: Update | None) -> None:
        channel = self._channels.get(job_id)
        if channel is None:
            return
        before = (channel.loaded, len(channel.frames), channel.progress, channel.done)
        channel.loaded = True
        if update is None:
            channel.gone = True
        else:
            for event in update.events:
                if not channel.seqs or event.seq > channel.seqs[-1]:
                    channel.seqs.append(event.seq)
                    document = self._show(event)
                    channel.frames.append(_frame(document, identifier=str(document["id"])))
            status = {"status": update.state, "phase": update.phase}
            if update.progress is not None and not update.finished:
                channel.progress = _frame({**status, "progress": update.progress}, kind="progress")
            channel.done = _frame(status, kind="done") if update.finished else None
        if channel.gone or before != (channel.loaded, len(channel.frames), channel.progress, channel.done):
            channel.wake()


def _frame(document: Mapping[str, Any], *, kind: str | None = None, identifier: str | None = None) -> str:
    head = (f"id: {identifier}\n" if identifier else "") + (f"event: {kind}\n" if kind else "")
    return f"{head}data: {json.dumps(document, separators=(',', ':'))}\n\n"


EVENT_PREFIX = "ftevent-"


def event_seq(identifier: str) -> int:
    """Return 12 for ``ftevent-12``. Raises `NotFound` if it cannot be the id of an event."""
    digits = identifier.removeprefix(EVENT_PREFIX)
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 18):
        raise NotFound(f"no event {identifier[:100]!r}; an event's id looks like {EVENT_PREFIX}12")
    return int(digits)
