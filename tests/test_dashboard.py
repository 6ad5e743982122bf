"""The dashboard asks for metrics and labels that a real server has."""

import re
from pathlib import Path

import grafana_dashboard
from prometheus_client.parser import text_string_to_metric_families
from server_process import ASK, serve

KEY = "sk-0123456789abcdef"


def test_the_file_is_current() -> None:
    assert grafana_dashboard.DASHBOARD.read_text() == grafana_dashboard.text(), (
        "run: python scripts/grafana_dashboard.py"
    )


def test_every_query_finds_its_metric(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f"[once]\nkey = '{KEY}'\nrequests_per_minute = 2\n")
    keys.chmod(0o600)
    with serve(tmp_path / "stderr", "bundled", "--also", "bundled-ar", "--api-keys", str(keys)) as served:
        served.http.get("/v1/models")  # without a key
        served.http.headers["Authorization"] = f"Bearer {KEY}"
        modes = ({"model": "bundled"}, {"model": "bundled-ar", "mode": "speculative"}, {"model": "bundled"})
        told = [served.http.post("/v1/chat/completions", json=ASK | more) for more in modes]
        assert [response.status_code for response in told] == [200, 200, 429]
        page = served.http.get("/metrics").text
    labels = {
        sample.name: {*sample.labels} for family in text_string_to_metric_families(page) for sample in family.samples
    }
    queries = [target["expr"] for panel in grafana_dashboard.dashboard()["panels"] for target in panel["targets"]]
    assert len(queries) > 20
    for query in queries:
        names = re.findall(r"parablock_\w+", query)
        assert names
        for name in names:
            assert name in labels, f"{query}: there is no {name}"
            selected = re.search(rf"{name}{{(\w+)=", query)
            grouped = re.findall(r"by \(([^)]*)\)", query)
            wanted = {label.strip() for group in grouped for label in group.split(",")}
            wanted |= {selected[1]} if selected else set()
            assert wanted <= labels[name], f"{query}: {name} has the labels {labels[name]}"
    shown = {name for query in queries for name in re.findall(r"parablock_\w+", query)}
    kept = {re.sub(r"_(bucket|sum|count)$", "_bucket", name) for name in labels if not name.endswith("_created")}
    assert kept - shown == {"parablock_speculative_forwards_total"}
