"""Runs in the sandbox: HumanEval's problems in EvalPlus's format, their inputs recorded while their own tests run."""

import json
import random
from pathlib import Path

ATOL = {"HumanEval/32": 1e-4}  # find_zero: a root is as good as its polynomial's value
INPUTS = 12  # of a problem, at most: some draw a hundred

rows = []
for line in Path("/job/HumanEval.jsonl").read_text().splitlines():
    problem = json.loads(line)
    names = {}
    random.seed(0)
    exec(problem["prompt"] + problem["canonical_solution"] + "\n" + problem["test"], names)
    solution, inputs = names[problem["entry_point"]], []

    def candidate(*given, solution=solution, inputs=inputs):
        inputs.append(json.loads(json.dumps(given)))  # before the solution changes them
        return solution(*given)

    names["check"](candidate)
    inputs = inputs[:INPUTS]
    rows.append(
        {key: problem[key] for key in ("task_id", "prompt", "entry_point", "canonical_solution")}
        | {"contract": "", "atol": ATOL.get(problem["task_id"], 0)}
        | {"base_input": inputs[: len(inputs) // 2 or 1], "plus_input": inputs[len(inputs) // 2 :]}
    )
Path("/out/result").write_text("".join(json.dumps(row) + "\n" for row in rows))
