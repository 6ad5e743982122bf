"""The command `llm` with a model of the server: chats, a conversation, options, a schema, a tool.

OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python examples/clients/with_llm.py
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MODELS = """
- model_id: smollm2
  model_name: smollm2
  api_base: {url}
  api_key_name: parablock
  supports_tools: true
  supports_schema: true
- model_id: text
  model_name: bundled
  api_base: {url}
  api_key_name: parablock
  completion: true
"""
TOOL = 'def weather(city: str) -> str:\n    "The weather in a city."\n    return "snow"'
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,  # a small model would add some without end
}
PROGRAM = Path(sys.executable).with_name("llm")


def llm(folder: str, *arguments: str) -> str:
    """What the command prints, with files of its own."""
    environment = os.environ | {"LLM_USER_PATH": folder}
    ended = subprocess.run([PROGRAM, *arguments], env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(ended.stderr)
    return ended.stdout.strip()


with tempfile.TemporaryDirectory() as folder:
    Path(folder, "extra-openai-models.yaml").write_text(MODELS.format(url=os.environ["OPENAI_BASE_URL"]))
    llm(folder, "keys", "set", "parablock", "--value", os.environ["OPENAI_API_KEY"])
    options = ("-m", "smollm2", "-o", "temperature", "0", "-o", "max_tokens", "80", "-o", "seed", "1")

    streamed = llm(folder, *options, "-s", "Answer in one sentence.", "What is the capital of France?")
    assert "Paris" in streamed, streamed
    logged = json.loads(llm(folder, "logs", "-n", "1", "--json"))[0]
    assert logged["output_tokens"] > 0, logged
    whole = llm(folder, *options, "--no-stream", "-s", "Answer in one sentence.", "What is the capital of France?")
    assert whole == streamed, whole
    print(f"llm: {whole!r}, streamed and whole, its usage in the log")
    assert llm(folder, "--continue", "And of Italy?"), "nothing"
    print("llm --continue: a conversation")

    person = json.loads(llm(folder, *options, "--schema", json.dumps(PERSON), "Jason is 25 years old."))
    assert person == {"name": "Jason", "age": 25}, person
    print(f"llm --schema: {person}")
    assert llm(folder, *options, "--functions", TOOL, "How is the weather in Oslo?"), "nothing"
    print("llm --functions: the tool is shown, and the answer read")
    assert llm(folder, "-m", "text", "-o", "max_tokens", "12", "Mara has 4 boxes"), "nothing"
    print("llm, completion: a text goes on")
