"""Traces: a real server sends them to a collector of the test, which reads OTLP as the protocol defines it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from processes import COMMAND, run_program
from server_process import ASK, Served, serve

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """The spans that came, each as a dict, and the attributes of the service."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        self.resource: dict[str, Any] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                collector.take(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource = plain(resource.resource.attributes)
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                self.spans.append({
                    "name": span.name, "trace": span.trace_id.hex(), "id": span.span_id.hex(),
                    "parent": span.parent_span_id.hex(), "start": span.start_time_unix_nano,
                    "end": span.end_time_unix_nano, "error": span.status.code == 2, **plain(span.attributes),
                })  # fmt: skip


def plain(attributes: Any) -> dict[str, Any]:
    def value(any_value: Any) -> Any:
        kind = any_value.WhichOneof("value")
        return [value(v) for v in any_value.array_value.values] if kind == "array_value" else getattr(any_value, kind)

    return {attribute.key: value(attribute.value) for attribute in attributes}


@contextmanager
def collected() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        collector.server.shutdown()
        thread.join()
        collector.server.server_close()


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Collector, dict[str, Any], Served]:
    """What a server has sent when it has ended, and what its clients were told."""
    with collected() as collector:
        log = tmp_path_factory.mktemp("log") / "stderr"
        options = ("bundled", "--also", "bundled-ar", "--otlp-endpoint", collector.url)
        with serve(log, *options, OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=test") as served:
            create = served.client.chat.completions.create
            parent = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            told: dict[str, Any] = {"whole": create(**ASK, temperature=0.5, seed=3, n=2, extra_headers=parent)}
            told["stream"] = list(
                create(**{**ASK, "model": "bundled-ar"}, stream=True, extra_body={"mode": "speculative"})
            )
            with pytest.raises(openai.BadRequestError):
                create(**ASK, temperature=-1)
            served.http.get("/health")
            served.http.get("/metrics")
            served.process.terminate()
            assert served.process.wait() == 0
    return collector, told, served


def test_a_request_is_a_span_with_its_phases_below(traced: Any) -> None:
    collector, told, served = traced
    spans = [span for span in collector.spans if span["trace"] == TRACE]
    http = next(span for span in spans if span["parent"] == PARENT)
    assert http["name"] == "POST /v1/chat/completions"
    request = next(span for span in spans if span["parent"] == http["id"])
    whole, line = told["whole"], next(line for line in served.lines() if line.get("trace") == TRACE)
    expected = {
        "name": "chat bundled", "gen_ai.operation.name": "chat", "gen_ai.provider.name": "parablock",
        "gen_ai.request.model": "bundled", "gen_ai.request.temperature": 0.5, "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 2, "gen_ai.request.stream": False,
        "gen_ai.response.finish_reasons": [choice.finish_reason for choice in whole.choices],
        "gen_ai.usage.input_tokens": whole.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": whole.usage.completion_tokens,
        "parablock.forwards": whole.parablock["forwards"], "parablock.mode": "diffusion",
        "parablock.outcome": "finished", "parablock.request_id": line["id"], "error": False,
    }  # fmt: skip
    assert {name: request.get(name) for name in expected} == expected
    phases = [span for span in spans if span["parent"] == request["id"]]
    assert len(phases) == len(spans) - 2 == 6
    for choice in (0, 1):
        queue, prefill, decode = (
            next(span for span in phases if span["name"] == name and span["parablock.choice"] == choice)
            for name in ("queue", "prefill", "decode")
        )
        times = [queue["start"], queue["end"], prefill["start"], prefill["end"], decode["start"], decode["end"]]
        assert times == sorted(times)
        assert abs(queue["start"] - request["start"]) < 60e9  # the same clock
        assert (queue["end"], prefill["end"]) == (prefill["start"], decode["start"])
        assert prefill["gen_ai.usage.input_tokens"] == whole.usage.prompt_tokens
        assert "parablock.drafted" not in decode
    decoded = [span for span in phases if span["name"] == "decode"]
    assert sum(span["gen_ai.usage.output_tokens"] for span in decoded) == whole.usage.completion_tokens
    assert sum(span["parablock.forwards"] for span in decoded) == whole.parablock["forwards"]


def test_streams_drafts_and_refusals(traced: Any) -> None:
    collector, told, served = traced
    figures = told["stream"][-1].parablock
    stream = next(span for span in collector.spans if span.get("gen_ai.request.stream"))
    assert stream["gen_ai.response.time_to_first_chunk"] > 0
    assert stream["name"] == "chat bundled-ar"
    assert not next(span for span in collector.spans if span["id"] == stream["parent"])["parent"]
    decode = next(s for s in collector.spans if s["parent"] == stream["id"] and s["name"] == "decode")
    assert (decode["parablock.drafted"], decode["parablock.accepted"]) == (
        figures["drafted"],
        figures["accepted"],
    )
    refused = [
        span for span in collector.spans if span.get("http.status_code", span.get("http.response.status_code")) == 400
    ]
    assert [span["name"] for span in refused] == ["POST /v1/chat/completions"]
    assert not [span for span in collector.spans if "/health" in span["name"] or "/metrics" in span["name"]]
    assert collector.resource["service.name"] == "parablock"
    assert collector.resource["deployment.environment.name"] == "test"
    assert "Traceback" not in served.text()


def test_without_the_option_nothing_is_imported() -> None:
    """Other libraries may import its interface, which does nothing."""
    imported = "import sys, parablock.server.command; print([m for m in sys.modules if m.startswith('opentelemetry.')])"
    told = run_program([COMMAND[0], "-c", imported]).stdout
    assert not [part for part in ("sdk", "exporter", "instrumentation") if f"opentelemetry.{part}" in told], told


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['opentelemetry.instrumentation'] = None; from parablock.cli import main; "
    refused = run_program(
        [COMMAND[0], "-c", hidden + "sys.argv[1:] = ['serve', '--otlp-endpoint', 'http://x:1']; main()"]
    )
    assert refused.returncode == 2
    assert "pip install 'parablock[otel]'" in refused.stderr
    refused = run_program([*COMMAND, "serve", "--otlp-endpoint", "localhost:4318"])
    assert "otlp_endpoint='localhost:4318' is out of range; use http://HOST:PORT" in refused.stderr
