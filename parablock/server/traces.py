"""Traces for OpenTelemetry: a span per request, and below it how long each answer waited, began and was decoded.

Names are those of OpenTelemetry's conventions for HTTP and generative AI where they exist. This file alone imports
OpenTelemetry, and only a server with `otlp_endpoint` imports this file.
"""

import time
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
        """Called in the task of a request that has ended; `line` is its line in the log, and gets the trace's id."""
        span = trace.get_current_span()
        line["trace"] = trace.format_trace_id(span.get_span_context().trace_id)
        if not span.is_recording():
            return
        span.set_attributes(_request(answers, line))
        if line["outcome"] == "error":
            span.set_status(trace.StatusCode.ERROR)
        for choice in answers.choices:
            self._add_phases(choice, len(answers.prompts[choice.index]))

    def _add_phases(self, choice: Choice, prompt_tokens: int) -> None:
        """Spans of what has been: until it had a row, until its first token, until its end."""
        handle = choice.handle
        now = time.perf_counter()
        began = time.time() - (now - handle.submitted)
        ended = now - handle.submitted if handle.seconds is None else handle.seconds
        phases = {
            "queue": (0.0, handle.admitted, {}),
            "prefill": (
                handle.admitted,
                handle.first_token,
                {"gen_ai.usage.input_tokens": prompt_tokens, "parablock.cached_tokens": handle.cached_tokens},
            ),
            "decode": (handle.first_token, ended, _decoded(choice)),
        }
        for name, (start, end, attributes) in phases.items():
            if start is not None:
                span = self._tracer.start_span(
                    name,
                    start_time=round((began + start) * 1e9),
                    attributes={"parablock.choice": choice.index, **attributes},
                )
                span.end(round((began + (ended if end is None else end)) * 1e9))

    def close(self) -> None:
        """Send what is left, for some seconds at most."""
        self._provider.shutdown()


def _request(answers: Answers, line: dict[str, Any]) -> dict[str, Any]:
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


def _decoded(choice: Choice) -> dict[str, Any]:
    drafts = {"parablock.drafted": choice.drafted, "parablock.accepted": choice.accepted}
    return {
        "gen_ai.usage.output_tokens": choice.tokens,
        "parablock.forwards": choice.forwards,
        **{name: sum(counts.values()) for name, counts in drafts.items() if any(counts.values())},
    }
