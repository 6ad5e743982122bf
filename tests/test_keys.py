"""Several keys, each with limits: the file, the buckets, and a real server with OpenAI's client."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from processes import run
from server_process import ASK, Served, error_of, serve

from parablock.server.errors import ApiError
from parablock.server.keys import Key, find_key, given_keys
from parablock.server.limits import Limits, Spending, duration

FREE, ONE, WORDS, TINY = (f"sk-{name}-0123456789" for name in ("free", "one", "words", "tiny"))
FILE = f"""
# who may ask
[free]
key = "{FREE}"

[one]
key = "{ONE}"
requests_per_minute = 1

["with words"]
key = "{WORDS}"
requests_per_minute = 1_000
tokens_per_minute = 40

[tiny]
key = "{TINY}"
tokens_per_minute = 5
"""


def write(folder: Path, text: str = FILE, mode: int = 0o600) -> str:
    path = folder / "keys.toml"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("keys")
    with serve(folder / "stderr", "bundled", "--api-keys", write(folder)) as served:
        served.http.headers["Authorization"] = f"Bearer {FREE}"
        yield served


def ask(server: Served, key: str, **more: Any) -> Any:
    client = server.client.with_options(api_key=key)
    return client.chat.completions.with_raw_response.create(**{**ASK, **more})


def test_keys_that_may_ask(server: Served) -> None:
    assert ask(server, FREE).parse().usage.completion_tokens
    assert not [name for name in ask(server, FREE).headers if name.startswith("x-ratelimit")]
    before = server.metric("parablock_refused_keys_total")
    for key in ("none", FREE[:-1], FREE + "0", FREE.upper(), "\u00fc"):
        response = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
        assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=ASK)
    assert refused.status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.metric("parablock_refused_keys_total") == before + 6
    audit = [line for line in server.lines() if line.get("status") == 401]
    assert [line["refused"] for line in audit] == ["wrong key"] * 5 + ["no key"]
    assert {line["client"] for line in audit} == {"127.0.0.1"}
    assert audit[-1]["id"] == refused.headers["x-request-id"]
    assert {line.get("key") for line in server.lines() if line.get("status") == 200} == {None, "free"}  # None: health
    assert "sk-" not in server.text()


def test_requests_per_minute(server: Served) -> None:
    headers = ask(server, ONE).headers
    assert headers["x-ratelimit-limit-requests"] == "1"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"].startswith("59.")
    assert "x-ratelimit-limit-tokens" not in headers
    with pytest.raises(openai.RateLimitError, match="'one' may use 1 requests per minute") as refused:
        ask(server, ONE)
    assert (refused.value.code, refused.value.type) == ("rate_limit_exceeded", "rate_limit_error")
    told = refused.value.response.headers
    assert 1 <= int(told["Retry-After"]) <= 60
    assert told["x-ratelimit-remaining-requests"] == "0"
    assert server.client.with_options(api_key=ONE).models.list().data  # which asks for no answer
    assert server.metric("parablock_rate_limited_requests_total", key="one", limit="requests") == 1
    assert server.lines()[-3]["refused"] == "requests per minute"


def test_tokens_per_minute(server: Served) -> None:
    """The answer is counted when it ends, and may lead into debt; a stream is counted, too."""
    client = server.client.with_options(api_key=WORDS)
    usage = [
        chunk.usage
        for chunk in client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    ][-1]
    assert usage is not None
    assert usage.total_tokens > 40 > usage.prompt_tokens
    with pytest.raises(openai.RateLimitError, match="tokens per minute") as refused:
        ask(server, WORDS)
    told = refused.value.response.headers
    assert (told["x-ratelimit-limit-tokens"], told["x-ratelimit-remaining-tokens"]) == ("40", "0")
    assert told["x-ratelimit-reset-tokens"].startswith("1m")
    assert int(told["x-ratelimit-remaining-requests"]) >= 998
    with pytest.raises(openai.RateLimitError, match="shorten it") as refused:
        ask(server, TINY)
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert refused.value.response.headers["x-ratelimit-remaining-tokens"] == "5"
    with pytest.raises(openai.BadRequestError):  # costs a request, and no tokens
        ask(server, TINY, temperature=-1)


def test_a_bucket_fills_within_a_minute() -> None:
    now, refused = [0.0], []
    limits = Limits(Key("k", b"", 6, 600), refused.append, lambda: now[0])
    for _ in range(6):
        Spending(limits, {}).begin()
    with pytest.raises(ApiError, match="try again in 10 s"):
        Spending(limits, {}).begin()
    now[0] = 10
    line: dict[str, Any] = {}
    spending = Spending(limits, line)
    spending.begin()
    spending.reserve(100)
    assert limits.headers() == {
        "x-ratelimit-limit-requests": "6", "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m0s",
        "x-ratelimit-limit-tokens": "600", "x-ratelimit-remaining-tokens": "500", "x-ratelimit-reset-tokens": "10s",
    }  # fmt: skip
    line |= {"prompt_tokens": 100, "tokens": 800}
    for _ in range(2):  # the second time nothing is new
        spending.settle()
    assert limits.buckets["tokens"].level == -300
    now[0] = 40
    with pytest.raises(ApiError, match="tokens per minute; try again in 1 s"):
        Spending(limits, {}).begin()
    now[0] = 50
    with pytest.raises(ApiError, match="try again in 2 s"):
        Spending(limits, {}).reserve(120)
    unanswered = Spending(limits, {})
    unanswered.reserve(60)
    unanswered.settle()  # there was no room in the queue: nothing was used
    assert limits.buckets["tokens"].level == 100
    now[0] = 1000
    assert (limits.buckets["tokens"].level, limits.buckets["requests"].level) == (600, 6)
    assert refused == ["requests", "tokens", "tokens"]


def test_durations_are_written_as_openai_does() -> None:
    assert [duration(s) for s in (0, 0.0171, 1, 1.25, 60, 360.5)] == ["0ms", "18ms", "1s", "1.25s", "1m0s", "6m0.5s"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no keys"),
        ("[a]\nkey = x", r"no TOML: .*line 2"),
        (f"\na = '{FREE}'", r"line 2: \[a\]: this is no table"),
        (f"[a]\nkey = '{FREE}'\n\n[b]\nkey = '{FREE}'", r"line 4: \[b\]: the key is that of \[a\]"),
        ("[a]\nkey = 'short'", r"line 1: \[a\]: key must be a text of at least 16"),
        ("[a]\nkey = 'with blanks in it, and long'", "without blanks"),
        ("[a]\nrequests_per_minute = 5", "key must be"),
        (f"[a]\nkey = '{FREE}'\nrpm = 5", "rpm is unknown"),
        (f"[ 'the a' ]\nkey = '{FREE}'\ntokens_per_minute = 0", r"1: \[the a\]: tokens_per_minute=0 is out of range"),
        (f"[a]\nkey = '{FREE}'\ntokens_per_minute = true", "tokens_per_minute=True"),
        ("[a]\nkey = '\udcff'", "no TOML"),
    ],
)  # fmt: skip
def test_wrong_files_say_where(tmp_path: Path, text: str, says: str) -> None:
    path = Path(write(tmp_path, ""))
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=says) as error:
        given_keys(str(path), None)
    assert str(path) in str(error.value)
    assert FREE not in str(error.value)


def test_files_that_others_can_read_are_warned_about(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="chmod 600"):
        given_keys(write(tmp_path, mode=0o640), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keys = given_keys(write(tmp_path), None)
    assert [key.name for key in keys] == ["free", "one", "with words", "tiny"]
    assert FREE not in repr(keys)
    assert find_key(keys, f"Bearer {ONE}".encode()) is keys[1]
    assert find_key(keys, ONE.encode()) is None
    assert find_key(given_keys(None, "x"), b"Bearer x") == Key(
        None, find_key(given_keys(None, "x"), b"Bearer x").digest
    )  # type: ignore[union-attr]
    assert given_keys(None, None) == ()


def test_what_does_not_go_together(tmp_path: Path) -> None:
    path = write(tmp_path)
    refused = run("serve", "bundled", "--api-keys", path, environment={"PARABLOCK_API_KEY": "x"})
    assert refused.returncode == 2
    assert "both given" in refused.stderr
    refused = run("serve", "bundled", "--api-keys", path, "--replicas", 2)
    assert refused.returncode == 2
    assert "does not go with replicas" in refused.stderr
    refused = run("serve", "bundled", "--api-keys", tmp_path / "none.toml")
    assert refused.returncode == 2
    assert "none.toml" in refused.stderr
