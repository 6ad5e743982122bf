"""Problems of the bundled task, for the bundled AR model to answer: what its causal adapter learns from.

python scripts/bundled_problems.py runs/bundled/problems.jsonl
parablock batch runs/bundled/problems.jsonl --model bundled-ar --max-new-tokens 96 --output runs/bundled/answers.jsonl
parablock adapt --recipe recipes/bundled/causal.yaml --output runs/bundled/causal
python scripts/bundle_causal.py runs/bundled/causal
"""

import argparse
import json
from pathlib import Path

from parablock.data.word_problems import word_problem

SEED = 11  # other problems than the model itself was trained on


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=12_800)
    given = parser.parse_args()
    given.file.parent.mkdir(parents=True, exist_ok=True)
    questions = (word_problem("train", SEED, index).question for index in range(given.count))
    given.file.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))


if __name__ == "__main__":
    main()
