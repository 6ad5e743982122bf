"""lm-evaluation-harness over HTTP: answers by local-chat-completions, likelihoods by local-completions (with echo).

OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python examples/clients/with_lm_eval.py TOKENIZER

TOKENIZER is the folder or hub id whose tokenizer the model `bundled-ar` has: the harness sends token ids.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ITEMS = ("pencils", "coins", "cards", "apples")
PROBLEMS = [  # with how the solution begins
    ("Mara has 4 boxes with 6 pencils in each. Mara buys 5 more. How many pencils does Mara have now?", 29, "4*6=24"),
    ("Teki had 40 coins but lost 8 of them. Teki buys 8 more. How many coins does Teki have now?", 40, "40-8=32"),
    ("Lina had 30 cards but lost 5 of them. Lina buys 7 more. How many cards does Lina have now?", 32, "30-5=25"),
    ("Toki has 3 bags with 9 apples in each. Toki buys 5 more. How many apples does Toki have now?", 32, "3*9=27"),
]
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
doc_to_text: "{{question}}"
metadata: {version: 1}
"""
ANSWERS = """
task: problems
output_type: generate_until
doc_to_target: "{{result}}"
generation_kwargs: {until: ["<|im_end|>"], max_gen_toks: 160, temperature: 0}
filter_list:
  - {name: last, filter: [{function: regex, regex_pattern: "#### (\\\\d+)"}, {function: take_first}]}
metric_list: [{metric: exact_match}]
"""
CHOICES = """
task: choices
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: right
target_delimiter: ""
metric_list: [{metric: acc}]
"""


def lm_eval(folder: Path, kind: str, task: str, **settings: str) -> dict[str, float]:
    """The figures of a task, as the harness's command writes them."""
    path = {"local-chat-completions": "chat/completions", "local-completions": "completions"}[kind]
    arguments = {"base_url": f"{os.environ['OPENAI_BASE_URL']}/{path}", "num_concurrent": "4", **settings}
    command = [Path(sys.executable).with_name("lm_eval"), "--model", kind, "--tasks", task, "--include_path", folder]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--output_path", folder / task, "--apply_chat_template"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    ended = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(ended.stdout + ended.stderr)
    (results,) = folder.glob(f"{task}/**/results*.json")
    return json.loads(results.read_text())["results"][task]


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    rows = [
        {"question": question, "result": result, "choices": [f"{start} {item}" for item in ITEMS], "right": i}
        for i, (question, result, start) in enumerate(PROBLEMS)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for task, text in (("problems", ANSWERS), ("choices", CHOICES)):
        (folder / f"{task}.yaml").write_text(COMMON.replace("FILE", str(folder / "rows.jsonl")) + text)
    score = lm_eval(folder, "local-chat-completions", "problems", model="bundled")["exact_match,last"]
    assert score >= 0.75, score
    print(f"local-chat-completions: {len(rows)} word problems, exact match {score:.2f}")
    tokenizer = sys.argv[1]
    own = {"model": "bundled-ar", "tokenizer": tokenizer, "tokenizer_backend": "huggingface", "max_length": "512"}
    score = lm_eval(folder, "local-completions", "choices", **own)["acc,none"]
    assert score >= 0.75, score
    print(f"local-completions: {len(rows)} questions with {len(ITEMS)} choices by likelihood, accuracy {score:.2f}")
