"""Replicas on Ray: real processes, the real openai client; answers are those of one process."""

import itertools
import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import yaml
from conftest import SCRATCH
from processes import run, run_program
from server_process import ASK, LONG, Served, error_of, serve

import parablock as pb
from parablock.cluster.config import ClusterConfig
from parablock.cluster.figures import merged
from parablock.cluster.prefixes import Prefixes, beginning
from parablock.cluster.service import Service
from parablock.data.chat import encode_prompt
from parablock.evals.word_problems import test_problems as problems
from parablock.server.config import ServeConfig

REPLICA = "ServeReplica:parablock:replica"
# Ray asks for a token; here one that others know, too
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
ENVIRONMENT = {"RAY_TMPDIR": SCRATCH, "PARABLOCK_API_KEY": "none", **TOKEN}
QUESTIONS = [problem.question for problem in problems(3, 8)]
SMALL = ("--cpus-per-replica", "0.5", "--max-rows", "8")


def asked(question: str) -> dict[str, Any]:
    return {"model": "bundled", "messages": [{"role": "user", "content": question}]}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("log") / "stderr"
    with serve(log, "bundled", "--replicas", "2", *SMALL, cold=True, **ENVIRONMENT) as served:
        served.http.headers["Authorization"] = "Bearer none"
        yield served


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    model, tokenizer = pb.load("bundled")
    prompts = [encode_prompt(tokenizer, asked(question)["messages"]) for question in QUESTIONS]
    out = pb.generate(model, prompts)
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in out.tokens]
    return dict(zip(QUESTIONS, texts, strict=True))


def replicas(served: Served) -> list[psutil.Process]:
    """Their processes, the oldest first."""
    found = []
    for process in psutil.Process(served.process.pid).children(recursive=True):
        try:
            if REPLICA in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return sorted(found, key=lambda process: process.create_time())


def whole(served: Served, question: str) -> str:
    return served.client.chat.completions.create(**asked(question)).choices[0].message.content or ""


def streamed(served: Served, question: str) -> str:
    """The text, or the error's code."""
    try:
        chunks = served.client.chat.completions.create(**asked(question), stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    except openai.APIError as error:
        return f"error {error.code}"


def test_answers_are_those_of_one_process(cluster: Served, expected: dict[str, str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        for ask in (whole, streamed):
            assert dict(zip(QUESTIONS, pool.map(ask, [cluster] * 8, QUESTIONS), strict=True)) == expected
    text = cluster.http.get("/metrics").text
    counts = [float(line.split()[-1]) for line in text.splitlines() if line.startswith("parablock_requests_total")]
    assert len(counts) == 2  # by replica
    assert sum(counts) == cluster.metric("parablock_requests_total", model="bundled") == 16
    assert cluster.metric("parablock_replicas") == 2


def test_what_one_process_refuses(cluster: Served) -> None:
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer other"}):
        for path in ("/v1/models", "/metrics"):
            refused = cluster.http.get(path, headers=headers)
            assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
    assert cluster.http.get("/health", headers={"Authorization": ""}).json() == {"status": "ready"}
    assert [model.id for model in cluster.client.models.list()] == ["bundled"]
    with pytest.raises(openai.NotFoundError):
        cluster.client.chat.completions.create(**ASK | {"model": "gpt"})
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        cluster.client.chat.completions.create(**ASK, top_logprobs=2)
    large = cluster.http.post("/v1/completions", content=b'{"prompt": "' + b"a" * 1_000_001 + b'"}')
    assert (large.status_code, error_of(large)["code"]) == (413, "request_too_large")
    assert cluster.http.post("/v1/completions", content=b"[").status_code == 400
    assert error_of(cluster.http.get("/nothing"))["type"] == "not_found_error"
    one = cluster.http.get("/v1/models", headers={"X-Request-Id": "mine"})
    assert one.headers.get_list("x-request-id") == ["mine"]


def test_a_client_that_leaves_frees_its_row(cluster: Served) -> None:
    stream = cluster.client.chat.completions.create(**LONG, stream=True)
    next(stream)
    stream.close()
    cluster.wait_until_idle()
    assert cluster.metric("parablock_requests_total", outcome="cancelled") == 1


def test_the_turns_of_a_chat_reuse_their_prefix(cluster: Served) -> None:
    """As much as in one process: every turn goes to the replica of the turn before."""
    chats: list[list[dict[str, str]]] = [[] for _ in range(4)]
    told, cached = 0, [0] * 6
    for turn, chat in itertools.product(range(6), chats):
        chat.append({"role": "user", "content": QUESTIONS[(turn + chats.index(chat)) % 8][:60]})
        answer = cluster.client.chat.completions.create(
            model="bundled", messages=chat, max_tokens=16, extra_body={"threshold": 0.5}
        )
        chat.append({"role": "assistant", "content": answer.choices[0].message.content or "-"})
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        told += answer.usage.prompt_tokens
        cached[turn] += answer.usage.prompt_tokens_details.cached_tokens or 0
    assert cached[5] >= cached[3] > 0
    assert sum(cached) > 0.5 * told, (cached, told)


def test_a_killed_replica_is_replaced_and_nobody_else_notices(cluster: Served, expected: dict[str, str]) -> None:
    [first, _] = replicas(cluster)
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(streamed, cluster, question) for question in QUESTIONS * 6]
        while sum(future.done() for future in running) < 8:
            time.sleep(0.01)
        first.kill()
        told = [future.result(timeout=120) for future in running]
    wrong = [text for question, text in zip(QUESTIONS * 6, told, strict=True) if text != expected[question]]
    assert all(text == "error replica_lost" for text in wrong), wrong
    assert len(wrong) <= 8  # what ran on it
    ends_at = time.monotonic() + 120
    while cluster.metric("parablock_replicas") < 2:
        assert time.monotonic() < ends_at
        time.sleep(0.2)
    assert first.pid not in {process.pid for process in replicas(cluster)}
    assert cluster.metric("parablock_broken_requests_total") == len(wrong)
    assert whole(cluster, QUESTIONS[0]) == expected[QUESTIONS[0]]


UPDATE = """
import json, sys
from parablock.cluster.application import NAME, build
from parablock.cluster.joining import join

with join(sys.argv[1], quiet=True):
    from ray import serve

    serve.run(build(json.loads(sys.argv[2])), name=NAME, route_prefix="/")
"""


def test_a_rolling_update_loses_no_request(cluster: Served, expected: dict[str, str], tmp_path: Path) -> None:
    """What `serve deploy` does with a changed file: other replicas take over while requests run."""
    before = {process.pid for process in replicas(cluster)}
    [address] = re.findall(r"on Ray, (\S+)\)", cluster.text())
    written = run("serve", "bundled", "--replicas", "2", *SMALL, "--drain", "20", "--write-config", str(tmp_path))
    assert written.returncode == 0, written.stderr
    [application] = yaml.safe_load((tmp_path / "serve.yaml").read_text())["applications"]
    command = [sys.executable, "-c", UPDATE, address, json.dumps(application["args"])]
    with ThreadPoolExecutor(5) as pool:
        update = pool.submit(run_program, command, environment=ENVIRONMENT)
        told: list[tuple[str, str]] = []
        while not update.done():
            told += zip(QUESTIONS[:4], pool.map(streamed, [cluster] * 4, QUESTIONS[:4]), strict=True)
    assert update.result().returncode == 0, update.result().stderr
    assert {text == expected[question] for question, text in told} == {True}, told
    assert not before & {process.pid for process in replicas(cluster)}
    assert whole(cluster, QUESTIONS[0]) == expected[QUESTIONS[0]]


def test_sigterm_lets_running_requests_end_on_all_replicas(cluster: Served) -> None:
    processes = psutil.Process(cluster.process.pid).children(recursive=True)
    assert len(processes) > 4
    streams = [cluster.client.chat.completions.create(**LONG, stream=True) for _ in range(4)]
    chunks = [[next(stream)] for stream in streams]
    cluster.process.send_signal(signal.SIGTERM)
    for before, stream in zip(chunks, streams, strict=True):
        before += stream
        assert before[-1].choices[0].finish_reason == "length"
    assert cluster.process.wait(timeout=120) == 0
    _, left = psutil.wait_procs(processes, timeout=20)
    assert not left


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--address", "127.0.0.1:1"], "nobody listens there"),
        (["--address", "ray://127.0.0.1:1"], "nobody listens there"),
        (["--address", "nowhere"], "HOST:PORT"),
        (["--replicas", "0"], "replicas=0"),
        (["--min-replicas", "2"], "belong together"),
        (["--min-replicas", "2", "--max-replicas", "1"], "max_replicas=1"),
    ],
)
def test_refusals(arguments: list[str], says: str) -> None:
    refused = run("serve", "bundled", *arguments, "--port", "0", environment={"RAY_TMPDIR": SCRATCH})
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
    assert says in refused.stderr


def test_more_gpus_than_there_are(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "parablock",
        "serve",
        "bundled",
        "--replicas",
        "2",
        "--gpus-per-replica",
        "64",
        "--port",
        "0",
    ]
    refused = run_program(command, environment={"RAY_TMPDIR": SCRATCH})
    assert refused.returncode == 2
    assert "2 replicas of 64 GPUs need 128, and the cluster has" in refused.stderr


def test_without_ray() -> None:
    code = "import sys; sys.modules['ray'] = None; sys.argv = {}; from parablock.cli import main; main()"
    refused = run_program([sys.executable, "-c", code.format(["parablock", "serve", "bundled", "--replicas", "2"])])
    assert refused.returncode == 2
    assert "parablock[ray]" in refused.stderr
    unasked = "import sys, parablock.cli, parablock.server.command; assert 'ray' not in sys.modules"
    assert run_program([sys.executable, "-c", unasked]).returncode == 0


def test_files_for_a_cluster(tmp_path: Path) -> None:
    """What Ray's own schema takes, and the fields of KubeRay's `RayService`."""
    from ray.serve.schema import ServeDeploySchema

    from parablock.cluster.application import build

    given = ("--min-replicas", "2", "--max-replicas", "4", "--gpus-per-replica", "1", "--max-rows", "16")
    written = run("serve", "bundled", *given, "--write-config", str(tmp_path / "a folder"))
    assert written.returncode == 0, written.stderr
    config = yaml.safe_load((tmp_path / "a folder" / "serve.yaml").read_text())
    [application] = ServeDeploySchema(**config).applications
    assert application.import_path == "parablock.cluster.application:build"
    deployments = build(application.args)._bound_deployment
    service = deployments.init_args[1]
    wanted = ClusterConfig(min_replicas=2, max_replicas=4, gpus_per_replica=1.0)
    assert service == Service(("bundled",), ServeConfig(max_rows=16), wanted)

    manifest = yaml.safe_load((tmp_path / "a folder" / "rayservice.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    spec = manifest["spec"]
    assert spec.keys() == {"serveConfigV2", "rayClusterConfig"}
    ServeDeploySchema(**yaml.safe_load(spec["serveConfigV2"]))
    ray_cluster = spec["rayClusterConfig"]
    assert ray_cluster.keys() == {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
    assert ray_cluster["headGroupSpec"].keys() == {"rayStartParams", "template"}
    [workers] = ray_cluster["workerGroupSpecs"]
    assert workers.keys() == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    [container] = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "none" not in (tmp_path / "a folder" / "serve.yaml").read_text()  # no key


def test_prefixes_lead_to_the_replica_that_has_them() -> None:
    prefixes, idle = Prefixes(slack=2), {"a": 0, "b": 0}
    turns = [[{"role": "user", "content": f"question {n} " + "x" * 100}] for n in range(4)]

    def texts(chat: list[dict[str, str]]) -> tuple[str, ...]:
        return beginning(json.dumps({"messages": chat}).encode())

    homes = []
    for chat in turns:
        homes.append(prefixes.choose(texts(chat), idle))
        prefixes.sent(texts(chat), homes[-1])
    assert sorted(homes) == ["a", "a", "b", "b"]
    for chat, home in zip(turns, homes, strict=True):
        chat += [{"role": "assistant", "content": "y"}, {"role": "user", "content": "and then?"}]
        assert prefixes.choose(texts(chat), idle) == home
        other = "b" if home == "a" else "a"
        assert prefixes.choose(texts(chat), {home: 2, other: 0}) == home
        assert prefixes.choose(texts(chat), {home: 3, other: 0}) == other  # clearly busier
    prefixes.keep([homes[0]])
    assert prefixes.choose(texts(turns[0]), {homes[0]: 0, "new": 0}) == homes[0]


def test_prefixes_are_bounded_and_take_any_body() -> None:
    prefixes = Prefixes(slack=2, kept=10)
    for n in range(100):
        prefixes.sent((f"{n} " + "x" * 500,), "a")
    assert len(prefixes._seen) <= 10
    assert beginning(b'{"prompt": "abc"}') == ("", "abc")
    assert beginning(b'{"model": "m", "prompt": [[1, 2], [3]]}') == ("m", "1 2")
    assert beginning(b'{"prompt": ["a", "b"]}') == ("", "a")
    assert beginning(b'{"input": "abc", "instructions": "x"}') == ("", '"x"', '"abc"')
    assert beginning(b'{"input": [{"role": "user"}]}') == ("", '{"role": "user"}')
    for body in (b"", b"[", b"[]", b"3", b'{"messages": 3}', b'{"prompt": null}', b"\xff"):
        assert beginning(body) == ()


def test_metrics_of_replicas_on_one_page() -> None:
    page = '# HELP x_total t\n# TYPE x_total counter\nx_total{model="m"} 2.0\n'
    text = merged({"r1": page, "r2": page}, rerun=3, broken=1).decode()
    assert 'x_total{model="m",replica="r1"} 2.0' in text
    assert 'x_total{model="m",replica="r2"} 2.0' in text
    assert text.count("# TYPE x_total counter") == 1
    assert "parablock_rerun_requests_total 3.0" in text
    assert "parablock_replicas 2.0" in text
