"""Traces for OpenTelemetry: a span per request, and below it how long each answer waited, began and was decoded.

Names are those of OpenTelemetry's conventions for HTTP and generative AI where they exist. This file alone imports
OpenTelemetry, and only a server with `otlp_endpoint` imports this file.
"""

import threading
import time
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from parablock import __version__
from parablock.server.answers import Answers, Choice

CLOSE_SECONDS = 5.0  # that the last spans have to be sent
UNTRACED = "/health,/metrics"


class Traces:
    """Sends the spans of an application's requests to a collector (OTLP over HTTP); a client's trace is continued.

    What else can be set (the service's name, headers, sampling, batches) OpenTelemetry reads from `OTEL_*`.
    """

    def __init__(self, app: FastAPI, endpoint: str) -> None:
        own = Resource.create({"service.name": "parablock", "service.version": __version__})
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")))
        self._tracer = self._provider.get_tracer("parablock", __version__)
        FastAPIInstrumentor.instrument_app(
            app, tracer_provider=self._provider, excluded_urls=UNTRACED, exclude_spans=["receive", "send"]
        )

    def ended(self, answers: Answers, line: dict[str, Any]) -> None:
        """Called in the task of a request that has ended; `line` is its line in the log, and gets the trace's id.

        The HTTP span of a stream has ended by now, so what the request was stands in a span of its own below it.
        """
        attributes = _attributes(answers, line)
        name = f"{attributes['gen_ai.operation.name']} {line['model']}"
        now = time.perf_counter()
        began = time.time() - now  # when this clock was 0
        span = self._tracer.start_span(name, start_time=_ns(began + answers.started), attributes=attributes)
        line["trace"] = trace.format_trace_id(span.get_span_context().trace_id)
        if line["outcome"] == "error":
            span.set_status(trace.StatusCode.ERROR)
        if span.is_recording():
            below = trace.set_span_in_context(span)
            for choice in answers.choices:
                for phase, start, end, more in _phases(choice, len(answers.prompts[choice.index])):
                    told = {"parablock.choice": choice.index, **more}
                    self._tracer.start_span(phase, below, start_time=_ns(began + start), attributes=told).end(
                        _ns(began + end)
                    )
        span.end(_ns(began + now))

    def close(self) -> None:
        """Send what is left; a collector that is not there holds nobody up."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(CLOSE_SECONDS)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _phases(choice: Choice, prompt_tokens: int) -> Iterator[tuple[str, float, float, dict[str, Any]]]:
    """What an answer has gone through, from when to when: until it had a row, its first token, its end."""
    handle = choice.handle
    times = [0.0, handle.admitted, handle.first_token]
    ended = time.perf_counter() - handle.submitted if handle.seconds is None else handle.seconds
    prompt = {"gen_ai.usage.input_tokens": prompt_tokens, "parablock.cached_tokens": handle.cached_tokens}
    drafts = {"parablock.drafted": choice.drafted, "parablock.accepted": choice.accepted}
    answer = {
        "gen_ai.usage.output_tokens": choice.tokens,
        "parablock.forwards": choice.forwards,
        **{name: sum(counts.values()) for name, counts in drafts.items() if handle.config.mode == "speculative"},
    }
    for number, (name, more) in enumerate((("queue", {}), ("prefill", prompt), ("decode", answer))):
        start, end = times[number], next((t for t in times[number + 1 :] if t is not None), ended)
        if start is not None:
            yield name, handle.submitted + start, handle.submitted + end, more


def _attributes(answers: Answers, line: dict[str, Any]) -> dict[str, Any]:
    config = answers.choices[0].handle.config
    asked = {
        "gen_ai.operation.name": "text_completion" if line["path"] == "/v1/completions" else "chat",
        "gen_ai.provider.name": "parablock",
        "gen_ai.request.model": line["model"],
        "gen_ai.request.stream": line["stream"],
        "gen_ai.request.choice.count": len(answers.choices),
        "gen_ai.request.max_tokens": config.max_new_tokens,
        "gen_ai.request.temperature": config.temperature,
        "gen_ai.request.top_p": config.top_p,
        "gen_ai.request.top_k": config.top_k,
        "gen_ai.request.seed": config.seed,
        "parablock.mode": config.mode,
    }
    answered = {
        "gen_ai.response.model": line["model"],
        "gen_ai.response.finish_reasons": [c.finish_reason for c in answers.choices if c.finish_reason],
        "gen_ai.response.time_to_first_chunk": answers.first_token if line["stream"] else None,
        "gen_ai.usage.input_tokens": line["prompt_tokens"],
        "gen_ai.usage.output_tokens": answers.tokens,
        "gen_ai.usage.cache_read.input_tokens": answers.cached_tokens,
        "parablock.forwards": answers.forwards,
        "parablock.outcome": line["outcome"],
        "parablock.request_id": line["id"],
        "parablock.key": line.get("key"),
    }
    return {name: value for name, value in {**asked, **answered}.items() if value is not None}
