"""Spans for OpenTelemetry: of requests with their parts, of jobs with their phases; nothing where it is not configured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from job_standin import drive, submit, worker
from serving import in_process, registered
from standin import picture, write_bundle

from finetune.errors import InvalidInput, MissingExtra
from finetune.jobs.database import open_jobs
from finetune.jobs.store import JobStore
from finetune.runtime.tracing import Tracing, tracing_from_environment

TRACE_ID, CALLER_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def spans(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines() if line.startswith('{"name"')]


def test_a_request_is_a_span_in_the_callers_trace_with_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="needs the OpenTelemetry SDK (extra otel)")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    registered(tmp_path, write_bundle(tmp_path / "bundle"))
    with in_process(tmp_path) as client:
        headers = {"traceparent": f"00-{TRACE_ID}-{CALLER_ID}-01", "x-request-id": "mine"}
        assert client.post("/predict", content=picture(), headers=headers).status_code == 200
        assert client.get("/v1/models/nothing").status_code == 404
        assert client.get("/livez").status_code == 200
    written = spans(capsys.readouterr().out)
    by_name = {span["name"]: span for span in written}
    assert set(by_name) >= {"POST /predict", "decode", "preprocess", "inference", "GET /v1/models/{name}"}
    assert not [name for name in by_name if "livez" in name]
    request = by_name["POST /predict"]
    assert request["context"]["trace_id"] == f"0x{TRACE_ID}"
    assert request["parent_id"] == f"0x{CALLER_ID}"
    assert request["attributes"]["http.response.status_code"] == 200
    assert request["attributes"]["finetune.request_id"] == "mine"
    assert request["resource"]["attributes"]["service.name"] == "finetune"
    for name in ("decode", "preprocess", "inference"):
        assert by_name[name]["parent_id"] == request["context"]["span_id"]
        assert by_name[name]["attributes"] == {"finetune.model": "colours", "finetune.version": "1"}
        assert request["start_time"] <= by_name[name]["start_time"] <= by_name[name]["end_time"] <= request["end_time"]
    assert by_name["GET /v1/models/{name}"]["attributes"]["http.response.status_code"] == 404


def test_nothing_is_written_or_imported_where_it_is_not_configured() -> None:
    for environment in ({}, {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}):
        assert tracing_from_environment(environment) is None
    assert tracing_from_environment({"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "true"}) is None
    with pytest.raises(InvalidInput, match="OTEL_TRACES_EXPORTER='zipkin': must be one of otlp, console, none"):
        tracing_from_environment({"OTEL_TRACES_EXPORTER": "zipkin"})
    program = (
        "import sys; from finetune.runtime.tracing import tracing_from_environment; assert tracing_from_environment({}) is None; "
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_is_missing_to_send_spans_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(MissingExtra, match=r"pip install 'finetune-images\[otel\]'"):
        tracing_from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"})


def test_an_attempt_at_a_job_is_a_span_with_its_phases(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="needs the OpenTelemetry SDK (extra otel)")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    store = JobStore(open_jobs(tmp_path))
    job = submit(store)
    driven = worker(store, tmp_path)
    driven.tracing = Tracing(provider)
    drive(driven, until=lambda: store.get(job.id).finished)
    attempt = next(span for span in exporter.get_finished_spans() if span.parent is None)
    phases = [span for span in exporter.get_finished_spans() if span.parent is not None]
    assert attempt.attributes is not None
    assert attempt.name == "fine-tuning job standin, full"
    assert (attempt.attributes["finetune.job"], attempt.attributes["finetune.attempt"]) == (job.id, 1)
    for span in phases:
        assert span.parent is not None
        assert span.parent.span_id == attempt.context.span_id
        assert attempt.start_time <= span.start_time <= span.end_time <= attempt.end_time
    assert [span.name for span in phases] == ["training"]
