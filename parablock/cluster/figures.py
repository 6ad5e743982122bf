"""The metrics of all replicas as one page: every sample with the label of its replica, so that sums are right."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class _Pages(Collector):
    """Metrics that others have written."""

    def __init__(self, pages: Mapping[str, str], front: Mapping[str, int]) -> None:
        self._pages = pages
        self._front = front

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, page in sorted(self._pages.items()):
            for family in text_string_to_metric_families(page):
                kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                kept.samples += [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]
        yield from families.values()
        yield GaugeMetricFamily("parablock_replicas", "Replicas that told their metrics.", len(self._pages))
        texts = {
            "rerun": "Requests that went to another replica, because the first was lost before it answered.",
            "broken": "Answers that ended with an error, because their replica was lost.",
        }
        for name, count in self._front.items():
            yield CounterMetricFamily(f"parablock_{name}_requests", texts[name], count)


def merged(pages: Mapping[str, str], **front: int) -> bytes:
    """One page of these, by replica, and the front's own counts `rerun` and `broken`."""
    registry = CollectorRegistry()
    registry.register(_Pages(pages, front))
    return generate_latest(registry)
