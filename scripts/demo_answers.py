"""The answers that `parablock demo` trains an adapter on: some of each kind, of those that the model gave itself.

python scripts/smollm2_prompts.py GSM8K_TRAIN.jsonl runs/smollm2
parablock batch runs/smollm2/train.jsonl --model smollm2-ar --max-new-tokens 128 --output runs/smollm2/answers.jsonl
python scripts/demo_answers.py runs/smollm2/answers.jsonl
"""

import argparse
import json
from pathlib import Path

from parablock.demo.live import ANSWERS
from parablock.evals.files import write_text


def main() -> None:
    """Write the file into the package."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", type=Path)
    parser.add_argument("--each", type=int, default=16, help="at most so many of a kind")
    given = parser.parse_args()
    taken: dict[str, list[str]] = {}
    for line in given.answers.read_text().splitlines():
        answer = json.loads(line)
        kind = taken.setdefault(answer["id"].rpartition("-")[0], [])
        if answer["completion_tokens"] >= 40 and len(kind) < given.each:
            kind.append(json.dumps({"messages": answer["messages"]}, ensure_ascii=False) + "\n")
    write_text(ANSWERS, "".join(line for kind in taken.values() for line in kind))
    print(f"{ANSWERS}: " + ", ".join(f"{len(lines)} {kind}" for kind, lines in taken.items()))


if __name__ == "__main__":
    main()
