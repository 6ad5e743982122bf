"""Write docs/grafana.json, a dashboard for Grafana over the metrics of `parablock serve`.

    python scripts/grafana_dashboard.py

Import the file in Grafana (Dashboards, New, Import) and choose the Prometheus that scrapes `/metrics`.
"""

import json
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parents[1] / "docs" / "grafana.json"
SOURCE = {"type": "prometheus", "uid": "${source}"}
MODEL = 'model=~"$model"'
WIDTH, HEIGHT = 8, 8  # of a panel, on a grid 24 wide
Queries = dict[str, str]  # PromQL by legend


def rate(name: str, by: str = "", labels: str = MODEL) -> str:
    """Per second, added over everything but the labels `by`; replicas, too."""
    grouped = f"sum by ({by}) " if by else "sum"
    return f"{grouped}(rate({name}{{{labels}}}[$__rate_interval]))"


def quantiles(name: str) -> Queries:
    """Of a histogram."""
    buckets = rate(f"{name}_bucket", "le")
    return {f"p{100 * q:g}": f"histogram_quantile({q}, {buckets})" for q in (0.5, 0.9, 0.99)}


def share(part: str, whole: str, by: str = "") -> str:
    """How much of one rate another is; nothing where there is none."""
    return f"{rate(part, by)} / ({rate(whole, by)} > 0)"


def level(name: str) -> str:
    """A gauge, added over models and replicas."""
    return f"sum({name}{{{MODEL}}})"


PANELS: list[tuple[str, str, Queries]] = [  # title, unit, queries
    ("Requests by outcome", "reqps", {"{{outcome}}": rate("parablock_requests_total", "outcome")}),
    (
        "Tokens per second",
        "short",
        {"answers": rate("parablock_tokens_total"), "prompts": rate("parablock_prompt_tokens_total")},
    ),
    (
        "Running and waiting answers",
        "short",
        {"running": level("parablock_running"), "waiting": level("parablock_queue")},
    ),
    ("Time to first token", "s", quantiles("parablock_time_to_first_token_seconds")),
    ("Time per token", "s", quantiles("parablock_time_per_token_seconds")),
    ("Time of a request", "s", quantiles("parablock_request_seconds")),
    (
        "Tokens per forward",
        "short",
        {
            "mean": share("parablock_tokens_total", "parablock_forwards_total"),
            "median of requests": quantiles("parablock_tokens_per_forward")["p50"],
        },
    ),
    (
        "Drafted tokens that were accepted",
        "percentunit",
        {"{{drafter}}": share("parablock_accepted_tokens_total", "parablock_drafted_tokens_total", "drafter")},
    ),
    (
        "Forwards",
        "short",
        {
            "per second": rate("parablock_steps_total"),
            "share of time": rate("parablock_step_seconds_total"),
        },
    ),
    (
        "K/V pages",
        "short",
        {
            "held": level("parablock_kv_pages_used"),
            "kept for reuse": level("parablock_kv_pages_cached"),
            "in all": level("parablock_kv_pages"),
        },
    ),
    ("Preemptions", "ops", {"{{model}}": rate("parablock_preemptions_total", "model")}),
    (
        "Refused",
        "reqps",
        {
            "wrong key or none": rate("parablock_refused_keys_total", labels=""),
            "{{key}}: {{limit}} per minute": rate("parablock_rate_limited_requests_total", "key, limit", ""),
            "status {{status}}": rate("parablock_http_responses_total", "status", 'status=~"429|5.."'),
        },
    ),
]


def panel(number: int, title: str, unit: str, queries: Queries) -> dict[str, Any]:
    """Lines over time, at its place in the grid."""
    column, row = number % (24 // WIDTH), number // (24 // WIDTH)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"fillOpacity": 8}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for i, (legend, expression) in enumerate(queries.items())
        ],
    }


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    model = {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": "label_values(parablock_running, model)", "refId": "models"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }
    return {
        "uid": "parablock",
        "title": "parablock",
        "tags": ["parablock"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [source, model]},
        "panels": [panel(number, *each) for number, each in enumerate(PANELS)],
    }


def text() -> str:
    """The file."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(text())
