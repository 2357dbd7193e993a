"""What every answer carries, and how everything that goes wrong is said: one form for every error."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import in_process, registered
from standin import picture, write_bundle
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from finetune.bundle.image_limits import ImageLimits
from finetune.errors import Overloaded
from service.admission import WorkQueue
from service.metrics import Metrics
from service.middleware.bodies import BodyLimits, BufferedBodies
from service.middleware.overload import OverloadRefusal
from service.middleware.responses import SECURITY_HEADERS, ResponseMiddleware
from service.problems import ProblemDocument
from service.schemas.predictions import PredictionAnswer
from service.web import STATIC, strings

LIMITS = ImageLimits(max_bytes=100_000)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    home = tmp_path_factory.mktemp("home")
    registered(home, write_bundle(home / "bundle"))
    with in_process(home, image_limits=LIMITS) as client:
        yield client


ERRORS: list[tuple[str, str, dict[str, Any], int, str]] = [
    ("GET", "/nothing/here", {}, 404, "not_found"),
    ("GET", "/static/nothing.js", {}, 404, "not_found"),
    ("GET", "/static/../app.py", {}, 404, "not_found"),
    ("GET", "/static/%2e%2e/app.py", {}, 404, "not_found"),
    ("GET", "/predict", {}, 405, "method_not_allowed"),
    ("DELETE", "/", {}, 405, "method_not_allowed"),
    ("GET", "/v1/models/unknown", {}, 404, "not_found"),
    ("GET", "/v1/models?limit=0", {}, 422, "invalid_input"),
    ("POST", "/predict", {"content": b"x"}, 415, "unsupported_image"),
    ("POST", "/predict", {"json": {}}, 415, "unsupported_media_type"),
    ("POST", "/predict", {"content": b"x" * 200_000}, 413, "request_too_large"),
    ("POST", "/schema.json", {}, 405, "method_not_allowed"),
]


@pytest.mark.parametrize(("method", "path", "sent", "status", "code"), ERRORS)
def test_every_error_is_a_problem_document_that_the_stock_client_can_read_too(
    client: TestClient, method: str, path: str, sent: dict[str, Any], status: int, code: str
) -> None:
    answer = client.request(method, path, **sent)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = ProblemDocument.model_validate(answer.json())
    assert (problem.status, problem.code, problem.type) == (status, code, f"urn:finetune:problem:{code}")
    assert problem.request_id == answer.headers["x-request-id"]
    assert problem.error.message == problem.detail
    assert problem.error.code == code
    assert problem.instance == answer.request.url.path


def test_a_wrong_method_says_which_one_is_allowed(client: TestClient) -> None:
    answer = client.get("/predict")
    assert answer.headers["allow"] == "POST"
    assert "Allowed: POST" in answer.json()["detail"]


@pytest.mark.parametrize(
    "path", ["/livez", "/", "/static/app.js", "/v1/models", "/metrics", "/docs.json", "/schema.json", "/nothing"]
)
def test_every_answer_has_security_headers_and_a_request_id_of_its_own(client: TestClient, path: str) -> None:
    first, second = client.get(path), client.get(path)
    for name, value in SECURITY_HEADERS.items():
        assert first.headers[name] == value
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert "server" not in first.headers


A_KEY = "ft_0123456789ab_" + "Abc-_xyz" * 5 + "123"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("my-trace.7", True), ("x" * 128, True), ("x" * 129, False), ("two words", False), ("", False), (A_KEY, False)],
)
def test_a_plain_request_id_is_kept_and_any_other_replaced(client: TestClient, given: str, kept: bool) -> None:
    answer = client.get("/livez", headers={"X-Request-Id": given})
    assert (answer.headers["x-request-id"] == given) is kept


def test_the_access_log_shows_paths_cut_and_without_keys(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    client.get(f"/v1/files/{A_KEY}")
    client.get("/v1/files/" + "é" * 10_000)
    first, second = (entry for entry in caplog.records if entry.name == "service.access")
    assert first.fields["path"] == "/v1/files/ft_0123456789ab_…"  # type: ignore[attr-defined]
    assert A_KEY[-20:] not in caplog.text
    assert second.getMessage().count("%C3%A9") > 10
    assert len(second.getMessage()) < 500


def test_a_path_cannot_write_a_line_of_its_own_into_the_log(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    client.get("/a%0aGET%20/faked%20200")
    assert "GET /a%0AGET%20/faked%20200 404" in caplog.text


# --- limits ---------------------------------------------------------------------------------------


def chunks(size: int) -> Iterator[bytes]:
    for _ in range(size // 1000):
        yield b"x" * 1000


@pytest.mark.parametrize("path", ["/predict", "/v1/models/colours/predict"])
def test_a_body_over_the_limit_is_413_with_and_without_a_content_length(client: TestClient, path: str) -> None:
    for content in (b"x" * 200_000, chunks(200_000)):
        answer = client.post(path, content=content)
        assert answer.status_code == 413
        assert answer.json()["code"] == "request_too_large"
        assert "165,536 bytes" in answer.json()["detail"]


def test_an_image_over_the_limit_inside_a_body_within_it_is_413(client: TestClient) -> None:
    answer = client.post("/predict", content=b"x" * (LIMITS.max_bytes + 1))
    assert (answer.status_code, answer.json()["code"]) == (413, "image_too_large")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:3000", "[::1]:3000", "LOCALHOST"])
def test_its_own_names_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:3000", "localhost.evil.example", "", "127.0.0.1.evil.example", "[::1", "::1"]
)
def test_another_host_name_is_400(client: TestClient, host: str) -> None:
    answer = client.get("/v1/models", headers={"Host": host})
    assert (answer.status_code, answer.json()["code"]) == (400, "host_not_allowed")
    assert client.get("/livez", headers={"Host": host}).status_code == 200


def test_names_can_be_allowed(tmp_path: Path) -> None:
    with in_process(tmp_path, wait=False, allowed_hosts=("photos.example",)) as client:
        assert client.get("/v1/models", headers={"Host": "photos.example:8080"}).status_code == 200
        assert client.get("/v1/models", headers={"Host": "localhost"}).status_code == 400


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://localhost.evil.example"])
def test_a_page_from_elsewhere_may_not_post_and_gets_no_cors_headers(client: TestClient, origin: str) -> None:
    posted = client.post("/predict", content=picture(), headers={"Origin": origin})
    assert (posted.status_code, posted.json()["code"]) == (403, "origin_not_allowed")
    read = client.get("/v1/models", headers={"Origin": origin})
    preflight = client.options("/predict", headers={"Origin": origin, "Access-Control-Request-Method": "POST"})
    for answer in (posted, read, preflight):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_servers_own_page_may_post(client: TestClient) -> None:
    assert client.post("/predict", content=picture(), headers={"Origin": "http://127.0.0.1"}).status_code == 200


def test_a_body_that_comes_too_slowly_is_408() -> None:
    sent: list[dict[str, Any]] = []

    async def read_body(request: Request) -> Response:
        return PlainTextResponse(await request.body())

    async def send(message: Any) -> None:
        sent.append(message)

    async def never() -> Any:
        await asyncio.Event().wait()

    app = BodyLimits(Starlette(routes=[Route("/", read_body, methods=["POST"])]), BufferedBodies(), silence_seconds=0.01)
    asyncio.run(app({"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}, never, send))
    assert sent[0]["status"] == 408


def test_a_body_that_keeps_its_pace_may_take_longer_than_the_grace() -> None:
    received: list[bytes] = []

    async def read_body(request: Request) -> Response:
        received.append(await request.body())
        return PlainTextResponse("")

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        rest, now = [b"y" * 1000] * 5, 0.0
        loop.time = lambda: now  # type: ignore[method-assign]

        async def receive() -> Any:
            nonlocal now
            now += 3.0  # in the end 15 s, of which 5 s of silence are allowed
            await asyncio.sleep(0)
            return {"type": "http.request", "body": rest.pop(), "more_body": bool(rest)}

        async def send(message: Any) -> None:
            pass

        app = BodyLimits(
            Starlette(routes=[Route("/", read_body, methods=["POST"])]),
            BufferedBodies(),
            silence_seconds=5,
            min_bytes_per_second=10,
        )
        await app({"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}, receive, send)

    asyncio.run(scenario())
    assert received == [b"y" * 5000]


def test_a_prediction_that_would_wait_too_long_is_refused_and_the_others_finish() -> None:
    async def scenario() -> tuple[list[int], str]:
        queue = WorkQueue(threads=1, max_wait_seconds=1.0)
        queue.seconds_each = 0.6
        gate, started = threading.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def work(number: int) -> int:
            loop.call_soon_threadsafe(started.set)
            gate.wait()
            return number

        running = asyncio.create_task(queue.run(work, 1))
        await started.wait()
        waiting = asyncio.create_task(queue.run(work, 2))
        await asyncio.sleep(0)
        assert not queue.has_room  # two before it, 0.6 s each
        with pytest.raises(Exception, match="running or waiting: ") as refused:
            await queue.run(work, 3)
        gate.set()
        return [await running, await waiting], refused.value.code

    assert asyncio.run(scenario()) == ([1, 2], "overloaded")


def test_batches_alternate_and_leave_room_for_single_requests() -> None:
    async def scenario() -> None:
        queue = WorkQueue(threads=1)
        gate, done = threading.Event(), []

        def work(name: str) -> str:
            assert gate.wait(60)
            done.append(name)
            return name

        batches = [asyncio.create_task(queue.run_batch(work, [(f"{batch}{n}",) for n in range(64)])) for batch in "abc"]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (queue.taken, queue.batched) == (1, 191)
        assert queue.has_room
        single = asyncio.create_task(queue.run(work, "single"))
        await asyncio.sleep(0)
        gate.set()
        assert await single == "single"
        answers = [await batch for batch in batches]
        assert answers == [[f"{batch}{n}" for n in range(64)] for batch in "abc"]
        assert done.index("single") == 1
        assert [name for name in done if name != "single"][:6] == ["a0", "b0", "c0", "a1", "b1", "c1"]
        assert (queue.taken, queue.batched) == (0, 0)

    asyncio.run(scenario())


def test_batches_are_bounded_and_one_that_fails_or_is_cancelled_takes_no_place() -> None:
    async def scenario() -> None:
        queue = WorkQueue(threads=1, max_batch_wait_seconds=1.0)
        gate = threading.Event()

        def work(number: int) -> int:
            assert gate.wait(60)
            if number == 7:
                raise KeyError("seven")
            return number

        long = asyncio.create_task(queue.run_batch(work, [(number,) for number in range(6)] * 10))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):  # 59 images of 0.02 s each wait
            await queue.run_batch(work, [(1,)])
        long.cancel()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await long
        assert (queue.taken, queue.batched) == (0, 0)
        with pytest.raises(KeyError):
            await queue.run_batch(work, [(number,) for number in range(5, 10)])
        assert (queue.taken, queue.batched) == (0, 0)

    asyncio.run(scenario())


def test_an_overloaded_server_refuses_predictions_before_it_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.middleware.overload.PAUSE_SECONDS", 0.0)
    queue, buffered = WorkQueue(threads=1), BufferedBodies(max_bytes=100)
    reached: list[str] = []

    async def answer(request: Request) -> Response:
        reached.append(request.url.path)
        return PlainTextResponse("")

    routes = [
        Route(path, answer, methods=["POST"]) for path in ("/predict", "/v1/models/a/predict", "/v2/models/a/infer", "/v1/files")
    ]
    client = TestClient(OverloadRefusal(Starlette(routes=routes), queue, buffered))
    queue.taken, queue.seconds_each = 10, 1.0
    for route in routes[:3]:
        refused = client.post(route.path)
        assert (refused.status_code, refused.json()["code"], refused.headers["retry-after"]) == (503, "overloaded", "1")
    assert client.post("/v1/files").status_code == 200
    queue.taken = 0
    assert client.post("/predict").status_code == 200
    buffered.total_bytes = 90  # of 100: a body that is large beside that has no room, a small one has
    assert client.post("/predict", content=b"x" * 20).status_code == 503
    assert client.post("/predict", content=b"x" * 5).status_code == 200
    assert reached == ["/v1/files", "/predict", "/predict"]


def test_head_is_answered_as_get_without_the_body(client: TestClient) -> None:
    for path in (
        "/livez",
        "/readyz",
        "/",
        "/v1/models",
        "/v1/models/colours",
        "/docs.json",
        "/static/app.js",
        "/v1/models/nobody",
    ):
        got, headed = client.get(path), client.head(path)
        assert (headed.status_code, headed.content) == (got.status_code, b""), path
        assert headed.headers["content-type"] == got.headers["content-type"]
        if got.status_code == 200:
            assert headed.headers["content-length"] == got.headers["content-length"]
    assert client.head("/predict").status_code == 405
    assert 'route="/v1/models/{name}"' in client.get("/metrics").text


def test_a_request_with_thousands_of_mistakes_gets_a_short_answer(client: TestClient) -> None:
    query = "&".join(f"k{number}=1" for number in range(2000))
    answer = client.post(f"/predict?{query}", content=picture())
    assert (answer.status_code, len(answer.json()["errors"])) == (422, 100)
    assert answer.json()["detail"].endswith("and 1,990 problems more")


JSON_ROUTES = ("/v1/webhooks", "/v1/uploads", "/v1/fine_tuning/jobs")
JSON_TYPE = "application/json"


@pytest.mark.parametrize("route", JSON_ROUTES)
@pytest.mark.parametrize(
    ("body", "media_type", "status", "said"),
    [
        (b"{}", "text/plain", 415, "'text/plain' is not "),
        (b"url=x", "application/x-www-form-urlencoded", 415, "send application/json"),
        (b"{}", "", 415, "send application/json"),
        (b"[" * 100_000, JSON_TYPE, 422, "nested"),
        (b'{"url": ' + b"9" * 5_000 + b"}", JSON_TYPE, 422, "a whole number of more than 4,300 digits"),
        (b'{"url": "\xff"}', JSON_TYPE, 422, "not valid Unicode"),
        (b'{"url" "x"}', JSON_TYPE, 422, "the body is not JSON: Expecting ':' delimiter"),
        (b"[]", JSON_TYPE, 422, "the body must be a JSON object"),
        (b'"text"', JSON_TYPE, 422, "the body must be a JSON object"),
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_read_as_json_is_refused_alike_everywhere(
    client: TestClient, route: str, body: bytes, media_type: str, status: int, said: str
) -> None:
    answer = client.post(route, content=body, headers={"content-type": media_type})
    assert answer.status_code == status, answer.text
    detail = ProblemDocument.model_validate(answer.json()).detail
    assert said in detail
    assert len(detail) < 300
    assert "sys." not in detail


def test_a_field_of_a_body_is_named_and_a_body_that_is_missing_is_asked_for(client: TestClient) -> None:
    (problem,) = client.post("/v1/webhooks", json={}).json()["errors"]
    assert problem == {"field": "url", "detail": "Field required"}
    answer = client.post("/v1/webhooks")
    assert (answer.status_code, answer.json()["detail"]) == (422, "the body must be a JSON object")


def test_the_largest_body_is_given_up_when_memory_for_bodies_runs_out() -> None:
    given_up: list[str] = []

    async def scenario() -> list[int]:
        buffered = BufferedBodies(max_bytes=1000)
        finish = asyncio.Event()

        async def read_body(request: Request) -> Response:
            try:
                body = await request.body()
            except HTTPException as error:
                given_up.append(f"{request.headers['x-name']} {error.status_code}")
                raise
            await finish.wait()
            return PlainTextResponse(str(len(body)))

        app = BodyLimits(Starlette(routes=[Route("/", read_body, methods=["POST"])]), buffered)

        async def post(name: str, chunks: list[bytes], *, complete: bool) -> int:
            pending = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
            if complete:
                pending[-1]["more_body"] = False
            status = 0

            async def receive() -> Any:
                if pending:
                    return pending.pop(0)
                return await asyncio.Event().wait()

            async def send(message: Any) -> None:
                nonlocal status
                status = message.get("status", status)

            headers = [(b"x-name", name.encode())]
            await app({"type": "http", "method": "POST", "path": "/", "headers": headers, "query_string": b""}, receive, send)
            return status

        holder = asyncio.create_task(post("holder", [b"x" * 900], complete=False))
        await asyncio.sleep(0)
        others = [asyncio.create_task(post(f"small-{number}", [b"y" * 60], complete=True)) for number in range(3)]
        while not given_up:
            await asyncio.sleep(0)
        finish.set()
        return [await task for task in (holder, *others)]

    assert asyncio.run(scenario()) == [503, 200, 200, 200]
    assert given_up == ["holder 503"]


# --- answers of somebody else's making --------------------------------------------------------------


def answering(endpoint: Any) -> TestClient:
    return TestClient(ResponseMiddleware(Starlette(routes=[Route("/", endpoint)]), Metrics()), raise_server_exceptions=True)


@pytest.mark.parametrize(
    ("response", "detail"),
    [
        (JSONResponse([{"error": "Not an image"}], 400), "Not an image"),  # BentoML's own list
        (JSONResponse({"error": "Too many requests"}, 429), "Too many requests"),
        (JSONResponse({"detail": "Nope"}, 400), "Nope"),
        (JSONResponse("bare", 400), "Bad Request"),
        (PlainTextResponse("Not Found", 404), "Not Found"),
        (Response(status_code=404), "Not Found"),
        (PlainTextResponse("Traceback: secret", 500), "Something went wrong"),
    ],
)
def test_an_error_in_any_other_form_is_rewritten_as_a_problem(response: Response, detail: str) -> None:
    async def endpoint(_: Request) -> Response:
        return response

    answer = answering(endpoint).get("/")
    assert answer.status_code == response.status_code
    assert ProblemDocument.model_validate(answer.json()).detail.startswith(detail)
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_an_unexpected_exception_is_a_500_that_gives_nothing_away(caplog: pytest.LogCaptureFixture) -> None:
    async def endpoint(_: Request) -> Response:
        raise RuntimeError("the password is hunter2")

    answer = answering(endpoint).get("/", headers={"X-Request-Id": "trace-1"})
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert "hunter2" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    logged = next(record for record in caplog.records if record.levelname == "ERROR")
    assert "trace-1" in logged.getMessage()
    assert logged.exc_info is not None


def test_retry_after_survives_the_rewriting() -> None:
    async def endpoint(_: Request) -> Response:
        raise HTTPException(429, "Slow down", headers={"Retry-After": "7"})

    assert answering(endpoint).get("/").headers["retry-after"] == "7"


# --- documents ------------------------------------------------------------------------------------


def test_the_openapi_document_names_every_route_with_its_ways_in_and_its_errors(client: TestClient) -> None:
    document = client.get("/docs.json").json()
    assert set(document["paths"]) >= {
        "/predict",
        "/v1/models/{name}/predict",
        "/v1/models",
        "/v1/models/{name}",
        "/livez",
        "/readyz",
        "/metrics",
    }
    predict = document["paths"]["/predict"]["post"]
    assert set(predict["requestBody"]["content"]) == {"multipart/form-data", "application/octet-stream"}
    assert {one["name"] for one in predict["parameters"]} == {
        *("top_k", "explain", "embedding"),
        *("coverage", "per_class", "abstain", "precision"),
    }
    answers = predict["responses"]["200"]["content"]["application/json"]["schema"]["anyOf"]
    assert [one["$ref"].rpartition("/")[2] for one in answers] == ["PredictionAnswer", "PredictionList"]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            declared = operation["responses"]["5XX"]["content"]
            name = "InferenceProblemDocument" if path.startswith("/v2") else "ProblemDocument"
            assert declared == {"application/problem+json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}, path
    for name, model in (("ProblemDocument", ProblemDocument), ("PredictionAnswer", PredictionAnswer)):
        assert set(document["components"]["schemas"][name]["properties"]) == set(model.model_fields)
    references = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert references <= set(document["components"]["schemas"])


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_inline_code(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    files = [file for file in STATIC.rglob("*") if file.is_file()]
    assert len(files) > 15
    for file in files:
        answer = client.get(f"/static/{file.relative_to(STATIC)}")
        assert answer.status_code == 200, file
        assert answer.headers["cache-control"] == "no-cache"
    scripts = {file.name: file.read_text() for file in files if file.suffix == ".js"}
    for text in (page.text, *scripts.values(), (STATIC / "page.css").read_text()):
        assert not re.findall(r"https?:(?!//www\.w3\.org/2000/svg)", text)
    assert "<script>" not in page.text
    assert "style=" not in page.text
    assert "onclick" not in page.text
    for name, text in scripts.items():
        assert "innerHTML" not in text, name
        assert "sessionStorage" not in text, "a key that is typed in is in memory alone"
        assert "document.cookie" not in text, name
        assert "localStorage" not in text or name == "preferences.js", name


@pytest.mark.parametrize(
    ("asked", "language"),
    [("de-AT,de;q=0.9,en;q=0.8", "de"), ("fr, en;q=0.5", "en"), ("en, de;q=0", "en"), ("", "en"), ("de;q=x", "en")],
)
def test_the_page_comes_in_the_language_that_the_browser_asks_for(client: TestClient, asked: str, language: str) -> None:
    page = client.get("/", headers={"Accept-Language": asked})
    assert f'<html lang="{language}">' in page.text
    assert page.headers["vary"] == "Accept-Language"
    assert '<html lang="de">' in client.get("/?lang=de", headers={"Accept-Language": "en"}).text
    assert '<html lang="en">' in client.get("/?lang=xx", headers={"Accept-Language": "en"}).text


def test_every_sentence_of_the_page_is_there_in_each_language_and_is_used() -> None:
    english, german = (strings(language) for language in ("en", "de"))
    assert english.keys() == german.keys()
    code = "".join(file.read_text() for file in STATIC.rglob("*.js")) + (STATIC.parent / "templates" / "index.html").read_text()
    families = {one.partition("$")[0] for one in re.findall(r"(?:known|t)\(`([a-z_.]+\.\$\{)", code)} | {"nav.", "page."}
    families |= {f"{one}." for one in re.findall(r'inWords\([^"]*"([a-z_.]+)"', code)}
    for key, sentence in english.items():
        forms, others = (one if isinstance(one, dict) else {"other": one} for one in (sentence, german[key]))
        assert forms.keys() == others.keys(), key
        for form in forms:
            assert set(re.findall(r"\{(\w+)\}", forms[form])) == set(re.findall(r"\{(\w+)\}", others[form])), key
        assert f'"{key}"' in code or any(key.startswith(family) for family in families), f"{key} is used nowhere"
    used = set(re.findall(r"""\bt\(\s*"([a-z_.]+)\"""", code)) | set(re.findall(r'data-t(?:-label)?="([a-z_.]+)"', code))
    assert len(used) > 100
    assert used <= english.keys()
