"""Webhooks: what is told, signed, to which addresses, and what comes of a receiver that does not answer."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import http.server
import ipaddress
import json
import re
import select
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import in_process, registered, until
from standin import write_bundle
from starlette.testclient import TestClient

from finetune.bundle.access import Access
from finetune.errors import Conflict, InvalidInput, NotFound
from finetune.jobs.database import open_jobs
from finetune.jobs.keys import KeyStore
from finetune.jobs.kinds import TRAINING
from finetune.jobs.outbox import TYPES
from finetune.jobs.sending import Reachable, Refused, Sender, attempt, post
from finetune.jobs.store import JobStore
from finetune.jobs.webhooks import MAX_PER_OWNER, RETRY_SECONDS, Delivery, Webhook, WebhookStore
from finetune.promotion import promote

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)


class Receiver(http.server.ThreadingHTTPServer):
    """A server of this test that notes what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []  # of the next answers; then 204

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hooks?from=tests"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        receiver: Any = self.server
        body = self.rfile.read(int(self.headers["content-length"]))
        receiver.received.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(receiver.statuses.pop(0) if receiver.statuses else 204)
        self.send_header("location", "http://127.0.0.1:9/elsewhere")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def store(tmp_path: Path) -> WebhookStore:
    return WebhookStore(open_jobs(tmp_path))


def end_a_job(jobs: JobStore, owner: str = "ann", state: str = "succeeded", **given: Any) -> str:
    spec = {"model": {"backbone": "resnet18"}, "method": {"type": "full"}, "metadata": {"team": "a"}}
    jobs.create(owner, spec, kind=TRAINING, spec_digest="d")
    claim = jobs.claim("worker")
    assert claim is not None
    jobs.finish(claim, state, **given)
    return claim.job.id


def test_the_end_of_a_job_is_queued_for_its_owners_webhooks_alone(store: WebhookStore) -> None:
    jobs = JobStore(store.engine)
    hers = store.create("ann", "https://example.org/hooks")
    only_failures = store.create("ann", "https://example.org/failures", ["fine_tuning.job.failed"])
    his = store.create("bob", "https://example.org/his")
    job_id = end_a_job(jobs, result={"model": "flowers", "version": "3"})
    (queued,) = store.deliveries(hers.id)
    assert (queued.type, queued.state, queued.attempts) == ("fine_tuning.job.succeeded", "waiting", 0)
    told = json.loads(queued.payload)
    assert told["data"] == {
        "id": job_id, "status": "succeeded", "model": "flowers@3", "metadata": {"team": "a"}, "error": None,
        "url": f"/v1/fine_tuning/jobs/{job_id}",
    }  # fmt: skip
    assert told["timestamp"].endswith("Z")
    end_a_job(jobs, state="failed", error_code="out_of_memory", error_message="/home/ann/secret.png is large")
    (failed,) = store.deliveries(only_failures.id)
    assert json.loads(failed.payload)["data"]["error"] == {"code": "out_of_memory"}
    assert "secret" not in failed.payload
    assert store.deliveries(his.id) == []
    queued_one, _ = jobs.create("ann", {"model": {"backbone": "a"}, "method": {"type": "full"}}, kind=TRAINING, spec_digest="d")
    jobs.request_cancel(queued_one.id)
    assert {one.type for one in store.deliveries(hers.id)} >= {"fine_tuning.job.cancelled"}


def test_what_is_sent_is_signed_as_the_specification_says(store: WebhookStore, receiver: Receiver) -> None:
    webhook = store.create("ann", receiver.url)
    end_a_job(JobStore(store.engine))
    taken = store.claim_due(2e9)
    assert taken is not None
    assert store.claim_due(2e9 + 1) is None, "one sender has it"
    status, error = attempt(*taken, Reachable(LOOPBACK), now=1_700_000_000.9)
    assert (status, error) == (204, None)
    ((headers, body),) = receiver.received
    key = base64.b64decode(webhook.secret.removeprefix("whsec_"))
    signed = b".".join((headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body))
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert headers["webhook-timestamp"] == "1700000000"
    assert headers["content-type"] == "application/json"
    store.record_attempt(taken[1], 1.0, status=status, error=error)
    assert store.deliveries(webhook.id)[0].state == "delivered"


def test_a_receiver_that_fails_is_tried_again_later_and_not_for_ever(store: WebhookStore, receiver: Receiver) -> None:
    webhook = store.create("ann", receiver.url)
    end_a_job(JobStore(store.engine))
    now, waits = 2e9, []
    receiver.statuses = [500, 302, *[503] * 20]
    for _ in range(len(RETRY_SECONDS) + 1):
        taken = store.claim_due(now)
        assert taken is not None
        status, error = attempt(*taken, Reachable(LOOPBACK), now)
        store.record_attempt(taken[1], now, status=status, error=error)
        (delivery,) = store.deliveries(webhook.id)
        assert delivery.error == f"answered with status {status}"
        if delivery.due_at is not None:
            waits.append(delivery.due_at - now)
            now = delivery.due_at
    assert delivery.state == "given up"
    assert all(0.9 * wait <= given <= 1.1 * wait for wait, given in zip(RETRY_SECONDS, waits, strict=True))
    assert len(receiver.received) == len(RETRY_SECONDS) + 1, "redirects are not followed"
    assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 1


def test_a_receiver_that_is_gone_is_told_nothing_more(store: WebhookStore, receiver: Receiver) -> None:
    webhook, jobs = store.create("ann", receiver.url), JobStore(store.engine)
    end_a_job(jobs)
    end_a_job(jobs)
    receiver.statuses = [410]
    taken = store.claim_due(2e9)
    assert taken is not None
    status, error = attempt(*taken, Reachable(LOOPBACK), 2e9)
    store.record_attempt(taken[1], 2e9, status=status, error=error)
    assert store.get(webhook.id).disabled_at == 2e9
    assert store.claim_due(3e9) is None
    end_a_job(jobs)
    assert len(store.deliveries(webhook.id)) == 2


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1", "fe80::1", "fd00::1",
     "192.88.99.1", "198.18.0.1", "240.0.0.1", "::", "fec0::1", "ff0e::1", "3fff::1", "5f00::1", "100::1", "2001:db8::1",
     "4000::1",
     "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a01:203",
     "64:ff9b:1::1", "64:ff9b:1::5db8:d822", "2002:7f00:1::", "2002:a01:203::1", "2001:0:4136:e378:8000:63bf:f5fe:fdfc",
     "2606:2800:220:1:0:5efe:10.1.2.3", "2606:2800:220:1:200:5efe:10.1.2.3"],
)  # fmt: skip
def test_nothing_is_sent_to_an_address_that_is_not_public(address: str) -> None:
    with pytest.raises(Refused, match="an address that is not public") as refused:
        post("https://example.org/hooks", b"{}", {}, Reachable(), lambda host, port: [address])
    assert address not in str(refused.value), "what a name means inside is not told"
    assert str(ipaddress.ip_address(address)) in refused.value.for_the_log
    with pytest.raises(Refused, match="an address that is not public"):  # one bad address among good ones is enough
        post("https://example.org/hooks", b"{}", {}, Reachable(), lambda host, port: ["93.184.216.34", address])


def test_public_addresses_and_allowed_networks_may_be_reached() -> None:
    public = ("93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34", "64:ff9b::5db8:d822", "2002:5db8:d822::1")
    for text in public:
        Reachable().check(ipaddress.ip_address(text))
    Reachable((ipaddress.ip_network("10.0.0.0/8"),)).check(ipaddress.ip_address("::ffff:10.1.2.3"))


def test_the_address_that_a_name_resolved_to_is_for_the_log_alone(store: WebhookStore, caplog: pytest.LogCaptureFixture) -> None:
    store.create("ann", "https://localhost/hooks")
    end_a_job(JobStore(store.engine))
    taken = store.claim_due(2e9)
    assert taken is not None
    status, error = attempt(*taken, Reachable(), 2e9)
    assert status is None
    assert error is not None
    assert "not public" in error
    assert "127.0.0.1" not in error
    assert "::1" not in error
    assert "localhost resolved to" in caplog.text


class Dribbler(socketserver.BaseRequestHandler):
    """A receiver that sends a byte now and then until the other side has had enough."""

    def handle(self) -> None:
        wait = select.poll()
        wait.register(self.request, select.POLLRDHUP)
        with contextlib.suppress(OSError):
            while not wait.poll(5):
                self.request.sendall(self.server.RequestHandlerClass.piece)

    piece = b"H"


class Flooder(Dribbler):
    """A receiver whose answer has a head without an end."""

    piece = b"HTTP/1.1 100 Continue\r\n\r\n" * 1000


@pytest.mark.parametrize(
    ("handler", "error", "said"),
    [(Dribbler, TimeoutError, "not complete within 0.3 s|timed out"), (Flooder, http.client.HTTPException, "larger than 65,536")],
)
def test_an_exchange_has_one_deadline_and_an_answer_one_size(handler: type[Dribbler], error: type[Exception], said: str) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        seconds = 0.3 if error is TimeoutError else 15.0
        with pytest.raises(error, match=said):
            post(f"http://127.0.0.1:{server.server_address[1]}/", b"{}", {}, Reachable(LOOPBACK), seconds=seconds)
        server.shutdown()


def test_a_name_server_that_does_not_answer_holds_a_delivery_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.jobs.sending.RESOLVE_SECONDS", 0.01)
    monkeypatch.setattr("finetune.jobs.sending._resolving", threading.BoundedSemaphore(2))
    answered = threading.Event()

    def silent(host: str, port: int) -> list[str]:
        assert answered.wait(60)
        return ["127.0.0.1"]

    before = set(threading.enumerate())
    try:
        for said in (
            "the name servers of example.org did not answer",
            "the name servers of example.org",
            "other host names are",
        ):
            with pytest.raises(TimeoutError, match=said):
                post("https://example.org/hooks", b"{}", {}, Reachable(), silent)
    finally:
        answered.set()
        for thread in set(threading.enumerate()) - before:
            thread.join(60)
    with pytest.raises(Refused, match="not public"):
        post("https://example.org/hooks", b"{}", {}, Reachable(), lambda host, port: ["127.0.0.1"])


def test_a_receiver_that_does_not_answer_holds_one_delivery_and_no_others(
    store: WebhookStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.jobs.sending._WATCH_SECONDS", 0.01)
    slow, quick = store.create("ann", "http://127.0.0.1:1/slow"), store.create("ann", receiver.url)
    answered, waiting = threading.Event(), []

    def answer(webhook: Webhook, delivery: Delivery, *_: object) -> tuple[int | None, str | None]:
        if webhook.id == slow.id:
            waiting.append(delivery.id)
            assert answered.wait(60)
        return 204, None

    monkeypatch.setattr("finetune.jobs.sending.attempt", answer)
    jobs = JobStore(store.engine)
    for _ in range(6):
        end_a_job(jobs)
    sender = Sender(lambda: store, Reachable(LOOPBACK))
    sender.start()
    try:
        until(lambda: all(one.state == "delivered" for one in store.deliveries(quick.id)) and bool(waiting))
        assert len(waiting) == 1
        answered.set()
        until(lambda: all(one.state == "delivered" for one in store.deliveries(slow.id)))
    finally:
        answered.set()
        sender.stop()
    assert len(waiting) == len(set(waiting)) == 6


def test_models_that_cannot_be_read_for_a_moment_hold_no_webhook_up_for_ever(
    store: WebhookStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.jobs.sending._WATCH_SECONDS", 0.01)
    troubles: list[OSError] = [FileNotFoundError("a model's folder, deleted since it was listed"), OSError("a disk that hangs")]

    def collect() -> None:
        if troubles:
            raise troubles.pop()

    webhook = store.create("ann", receiver.url)
    end_a_job(JobStore(store.engine))
    sender = Sender(lambda: store, Reachable(LOOPBACK), collect)
    sender.start()
    try:
        until(lambda: [one.state for one in store.deliveries(webhook.id)] == ["delivered"])
    finally:
        sender.stop()
    assert troubles == []


def test_the_connection_goes_to_the_address_that_was_checked(receiver: Receiver) -> None:
    asked: list[str] = []

    def once(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["192.0.2.1"]

    url = receiver.url.replace("127.0.0.1", "hooks.example.org")
    assert post(url, b"{}", {"content-type": "application/json"}, Reachable(LOOPBACK), once) == 204
    assert asked == ["hooks.example.org"]
    assert receiver.received[0][0]["host"].startswith("hooks.example.org")
    with pytest.raises(Refused, match="http without encryption"):
        post("http://example.org/", b"{}", {}, Reachable(), lambda host, port: ["93.184.216.34"])


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://example.org", "begin with https://"),
        ("https://", "host is missing"),
        ("example.org", "begin with https://"),
        ("https://user:word@example.org/", "user or a fragment"),
        ("https://example.org/#part", "user or a fragment"),
        ("https://exa mple.org", "no spaces"),
        ("https://example.org:99999/", "port is not a number from 1 to 65535"),
        ("https://example.org:0/", "port is not a number from 1 to 65535"),
        ("https://example.org:x/", "port is not a number from 1 to 65535"),
        ("https://example.org/\nHost: other", "control characters"),
        ("https://ex\u00e4mple.org/", "outside ASCII"),
        ("https://.../", "not the name of a host"),
        ("https://a..b/", "not the name of a host"),
        (f"https://{'a' * 300}.org/", "not the name of a host"),
        (f"https://{'a.' * 150}org/", "not the name of a host"),
        ("https://-example.org/", "not the name of a host"),
        ("https://exam%70le.org/", "not the name of a host"),
        ("https://[fe80::1%25eth0]/", "zone"),
        ("https://[::1/", "not an IPv6 address"),
        ("https://[example.org]/", "not an IPv6 address"),
    ],
)
def test_what_is_no_address_is_refused_when_it_is_given(store: WebhookStore, url: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(said)):
        store.create("ann", url)


def test_addresses_of_many_forms_are_taken(store: WebhookStore) -> None:
    urls = (
        "https://example.org./",
        "https://xn--exmple-cua.org:8443/a?b=c",
        "https://a_b.example.org",
        "https://[2606:2800::1]:8443/",
    )
    for url in urls:
        assert store.create("ann", url).url == url
    assert len(store.list("ann")) == len(urls)


def test_an_address_to_which_nothing_can_be_sent_is_refused_when_it_is_given() -> None:
    for url in ("http://example.org/", "http://93.184.216.34/", "https://127.0.0.1/", "https://[::1]/", "https://[fe80::1]/"):
        with pytest.raises(InvalidInput, match=r"https address|FINETUNE_WEBHOOK_NETWORKS"):
            Reachable().check_url(url)
    for url in ("http://receiver.internal/", "http://127.0.0.1:9000/", "https://example.org/"):
        Reachable(LOOPBACK).check_url(url)
    with pytest.raises(InvalidInput, match="https alone"):
        Reachable(LOOPBACK).check_url("http://93.184.216.34/")


def test_owners_have_webhooks_of_their_own_and_not_without_bound(tmp_path: Path) -> None:
    keys = KeyStore(open_jobs(tmp_path))
    ann, bob, root = (
        {"Authorization": f"Bearer {keys.create(name, [scope])[0]}"}
        for name, scope in (("ann", "jobs"), ("bob", "jobs"), ("root", "admin"))
    )
    with in_process(tmp_path, wait=False) as client:
        made = client.post("/v1/webhooks", json={"url": "https://example.org/hooks"}, headers=ann)
        assert made.status_code == 201
        hook = made.json()
        assert hook["secret"].startswith("whsec_")
        assert hook["events"] == list(TYPES)
        one = f"/v1/webhooks/{hook['id']}"
        assert "secret" not in client.get(one, headers=ann).json()
        for path in (one, f"{one}/deliveries"):
            assert client.get(path, headers=ann).status_code == client.get(path, headers=root).status_code == 200
            assert client.get(path, headers=bob).status_code == 404
        assert client.get("/v1/webhooks", headers=bob).json()["data"] == []
        assert client.delete(one, headers=bob).status_code == 404
        wrong = client.post("/v1/webhooks", json={"url": "https://example.org", "events": ["model.promotet"]}, headers=ann)
        assert wrong.status_code in (400, 422)
        assert "Did you mean 'model.promoted'" in wrong.text
        plain = client.post("/v1/webhooks", json={"url": "http://example.org"}, headers=ann)
        assert (plain.status_code, "https address" in plain.json()["detail"]) == (422, True)
        assert client.delete(one, headers=ann).status_code == 204
        assert client.get(one, headers=ann).status_code == 404
    store = WebhookStore(open_jobs(tmp_path))
    for number in range(MAX_PER_OWNER):
        store.create("ann", f"https://example.org/{number}")
    with pytest.raises(Conflict, match="the limit of one owner"):
        store.create("ann", "https://example.org/more")
    with pytest.raises(NotFound):
        store.get("whk-\0")


def test_a_server_tells_of_jobs_and_of_promotions_through_any_door(tmp_path: Path, receiver: Receiver) -> None:
    registry = registered(tmp_path, write_bundle(tmp_path / "bundle"))
    registry.register(write_bundle(tmp_path / "second"), "colours")
    private = registered(tmp_path, write_bundle(tmp_path / "third"), "private")
    private.set_access("private", Access(owner="bob", visibility="private"))
    store = WebhookStore(open_jobs(tmp_path))
    mine: Webhook = store.create("ann", receiver.url)
    with in_process(tmp_path, wait=False, webhook_networks=LOOPBACK):
        end_a_job(JobStore(store.engine))
        promote(registry, "colours", "2", by="ann at a shell")
        registry.set_alias("private", "champion", "1", by="bob")
        until(lambda: sum(one.state == "delivered" for one in store.deliveries(mine.id)) == 2)
        told = {json.loads(body)["type"]: json.loads(body)["data"] for _, body in receiver.received}
        assert told["model.promoted"] == {"model": "colours", "version": "2", "alias": "champion", "by": "ann at a shell"}
        assert told["fine_tuning.job.succeeded"]["status"] == "succeeded"
    with in_process(tmp_path, wait=False, webhook_networks=LOOPBACK) as client:  # a new server reads the same journals
        assert isinstance(client, TestClient)
        registry.set_alias("colours", "tried", "1", by="ann")
        until(lambda: sum(one.state == "delivered" for one in store.deliveries(mine.id)) == 3)
    assert len(receiver.received) == 3
