"""LiteLLM as a proxy in front of the server, asked by the openai client.

OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python examples/clients/with_litellm.py
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai
from pydantic import BaseModel, ConfigDict

KEY = "sk-of-the-proxy"
MODELS = {"smollm2": "openai/smollm2", "vllm": "hosted_vllm/smollm2", "completions": "text-completion-openai/bundled"}
QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]


class City(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")

    city: str


def configuration() -> str:
    """The proxy's: our models by names of its own. JSON is YAML, too."""
    upstream = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": "os.environ/OPENAI_API_KEY", "max_retries": 0}
    models = [{"model_name": name, "litellm_params": {"model": m, **upstream}} for name, m in MODELS.items()]
    return json.dumps({"model_list": models, "general_settings": {"master_key": KEY}})


def proxy(folder: Path) -> tuple[subprocess.Popen[bytes], openai.OpenAI]:
    """A running proxy, and a client of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "config.yaml").write_text(configuration())
    command = [Path(sys.executable).with_name("litellm"), "--config", folder / "config.yaml", "--port", str(port)]
    own = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # nothing is fetched
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--telemetry", "False"], env=os.environ | own, stdout=log, stderr=log
        )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
    for _ in range(180):
        try:
            client.models.list()
            return process, client
        except openai.OpenAIError:
            time.sleep(1)
        if process.poll() is not None:
            break
    process.terminate()
    raise SystemExit((folder / "log").read_text())


def chats(client: openai.OpenAI, model: str) -> None:
    """Whole, streamed, with tools, of a form."""
    asked = {"model": model, "messages": MESSAGES, "max_tokens": 60, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    assert "Paris" in whole, whole
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole, (text, whole)
    assert any(chunk.usage and chunk.usage.completion_tokens for chunk in chunks), chunks
    tools = [{"type": "function", "function": {"name": "visit", "parameters": City.model_json_schema()}}]
    for choice in ("required", {"type": "function", "function": {"name": "visit"}}):
        called = client.chat.completions.create(**asked, tools=tools, tool_choice=choice, parallel_tool_calls=False)
        [call] = called.choices[0].message.tool_calls
        City.model_validate_json(call.function.arguments)
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": City.model_json_schema()}}
    held = client.chat.completions.create(**asked, response_format=form).choices[0].message.content
    City.model_validate_json(held)
    print(f"{MODELS[model]}: an answer, the same streamed with its usage, forced calls, {json.loads(held)}")


def others(client: openai.OpenAI) -> None:
    """What is no chat."""
    parsed = client.chat.completions.parse(model="smollm2", messages=MESSAGES, response_format=City, max_tokens=60)
    assert parsed.choices[0].message.parsed, parsed
    chosen = client.chat.completions.create(
        model="vllm", messages=MESSAGES, extra_body={"guided_choice": ["Rome", "Paris"]}
    )
    assert chosen.choices[0].message.content == "Paris", chosen
    print("parse with a pydantic model; vLLM's guided_choice")
    completed = client.completions.create(model="completions", prompt="Mara has 4 boxes", max_tokens=8)
    assert completed.choices[0].text, completed
    print(f"{MODELS['completions']}: {completed.choices[0].text.strip()!r}")
    response = client.responses.create(model="smollm2", input=QUESTION, max_output_tokens=60, temperature=0)
    assert "Paris" in response.output_text, response
    events = list(client.responses.create(model="smollm2", input=QUESTION, max_output_tokens=60, stream=True))
    assert events[-1].type == "response.completed", events[-1]
    print("responses, whole and streamed")
    refused = ""
    try:
        client.chat.completions.create(model="smollm2", messages=MESSAGES, temperature=-1)
    except openai.BadRequestError as error:
        refused = str(error)
    assert "temperature" in refused, refused
    print("a refused setting: the server's words, as a 400")


with tempfile.TemporaryDirectory() as name:
    process, client = proxy(Path(name))
    try:
        chats(client, "smollm2")
        chats(client, "vllm")
        others(client)
    finally:
        process.terminate()
        process.wait()
