"""What `/metrics` shows: counts of requests as they end, and the engines' state at the moment of the question."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from parablock.server.answers import Answers
from parablock.server.served import ServedModel

PER_FORWARD = (1, 1.5, 2, 3, 4, 6, 8, 16, 32)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One server's figures, in a registry of their own."""

    def __init__(self, served: Sequence[ServedModel]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engines(served))
        self._responses = Counter(
            "parablock_http_responses", "Responses by status.", ["status"], registry=self._registry
        )
        self.refused_keys = Counter(
            "parablock_refused_keys", "Requests without a key that may ask.", registry=self._registry
        )
        self._rate_limited = Counter(
            "parablock_rate_limited_requests",
            "Requests above a key's limit.",
            ["key", "limit"],
            registry=self._registry,
        )
        self.requests = self._counter("requests", "Requests by how they ended.", "outcome")
        self.tokens = self._counter("tokens", "Tokens of answers.")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.forwards = self._counter("forwards", "Decode forwards, added over the answers.")
        self.cycles = self._counter("speculative_forwards", "Decode forwards of answers that verify drafts.")
        self.drafted = self._counter("drafted_tokens", "Tokens that were drafted.", "drafter")
        self.accepted = self._counter("accepted_tokens", "Drafted tokens that became tokens of answers.", "drafter")
        self.tokens_per_forward = self._histogram("tokens_per_forward", "Of every request.", PER_FORWARD)
        self.first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", SECONDS)
        self.token_seconds = self._histogram(
            "time_per_token_seconds", "Of every answer, from its first token to its last.", TOKEN_SECONDS
        )
        self.seconds = self._histogram("request_seconds", "From arrival to the end.", SECONDS)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"parablock_{name}", text, ["model", *labels], registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"parablock_{name}", text, ["model"], buckets=buckets, registry=self._registry)

    def responded(self, status: int) -> None:
        """An HTTP response, of whatever endpoint; 0: the client left before it."""
        self._responses.labels(str(status)).inc()

    def rate_limited(self, key: str | None, limit: str) -> None:
        """A request that a key's limit of `requests` or `tokens` refuses."""
        self._rate_limited.labels(key or "", limit).inc()

    def ended(self, answers: Answers, outcome: str) -> None:
        """A request that was decoded, at least in part."""
        name = answers.served.name
        self.requests.labels(name, outcome).inc()
        self.tokens.labels(name).inc(answers.tokens)
        self.prompt_tokens.labels(name).inc(sum(len(prompt) for prompt in answers.prompts))
        self.forwards.labels(name).inc(answers.forwards)
        if answers.speculative:
            self.cycles.labels(name).inc(answers.forwards)
            drafts = answers.drafts()
            for counter, key in ((self.drafted, "drafted_by"), (self.accepted, "accepted_by")):
                for drafter, count in drafts[key].items():
                    counter.labels(name, drafter).inc(count)
        if answers.forwards:
            self.tokens_per_forward.labels(name).observe(answers.tokens / answers.forwards)
        if answers.first_token is not None:
            self.first_token.labels(name).observe(answers.first_token)
        for choice in answers.choices:
            first, seconds = choice.handle.first_token, choice.handle.seconds
            if first is not None and seconds is not None and choice.tokens > 1:
                self.token_seconds.labels(name).observe((seconds - first) / (choice.tokens - 1))
        self.seconds.labels(name).observe(answers.seconds or 0.0)

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Engines(Collector):
    """Reads the engines when asked."""

    def __init__(self, served: Sequence[ServedModel]) -> None:
        self._served = served

    def collect(self) -> Iterator[Metric]:
        gauges = {
            "waiting": ("parablock_queue", "Answers that wait for a row."),
            "running": ("parablock_running", "Answers that are being decoded."),
            "pages_held": ("parablock_kv_pages_used", "Pages of K/V memory held by running answers."),
            "pages_cached": ("parablock_kv_pages_cached", "Pages kept for prompts that begin alike."),
            "pages": ("parablock_kv_pages", "Pages of K/V memory in all."),
        }
        for key, (name, text) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            for served in self._served:
                gauge.add_metric([served.name], served.engine.stats[key])
            yield gauge
        counters = {
            "steps": "Forwards of the engine.",
            "step_seconds": "Time in the forwards.",
            "preemptions": "How often an answer gave its pages to others.",
        }
        for key, text in counters.items():
            counter = CounterMetricFamily(f"parablock_{key}", text, labels=["model"])
            for served in self._served:
                counter.add_metric([served.name], getattr(served.engine, key))
            yield counter
