"""HumanEval(+) and MBPP(+) of a checkpoint: answers from the engine, scores from EvalPlus in its sandbox."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from rich.console import Console

from parablock.evals import code
from parablock.evals.cost import speed
from parablock.evals.files import write_text
from parablock.evals.results import Sample, question_hash, simple_metric

if TYPE_CHECKING:
    from parablock.evals.harness import ParablockLM

NEW_TOKENS = 768  # EvalPlus's own limit for an answer


def run_code_task(
    lm: "ParablockLM", task: str, folder: Path, console: Console, *, file: str | None = None, limit: int | None = None
) -> tuple[dict[str, Any], list[Sample]]:
    """The report and the samples of one task; the answers are written to `folder` before any of them is run.

    Raises:
        ValueError: as `code.prepare`, `code.load_problems` and `code.score`.
    """
    python = code.prepare(progress=lambda line: console.print(line, soft_wrap=True))
    problems = code.load_problems(task, python, file)
    asked = problems[:limit]
    requests = []
    for number, problem in enumerate(asked):
        messages, beginning = code.chat_prompt(problem)
        context = lm.apply_chat_template(
            [*messages, {"role": "assistant", "content": beginning}], add_generation_prompt=False
        )
        settings = {"until": list(problem.stop), "max_gen_toks": NEW_TOKENS}
        requests.append(Instance("generate_until", {}, (context, settings), 0, (task, number, 1)))
    answers = {
        problem.task_id: problem.beginning + code.cut_answer(problem, text)
        for problem, text in zip(asked, lm.generate_until(requests), strict=True)
    }
    write_text(folder / f"{task}-answers.json", json.dumps(answers, indent=1) + "\n")
    console.print(f"running the programs of {len(answers)} answers in a sandbox")
    scores = code.score(task, answers, python, file=file)
    samples = [
        Sample(
            task=task,
            filter=kind,
            number=number,
            question_hash=question_hash(problem.task_id + problem.prompt),
            prompt_hash=question_hash(request.args[0]),
            prompt=request.args[0],
            target=None,
            response=answers[problem.task_id],
            answer=score.solution,
            scores={"pass@1": float(getattr(score, kind))},
        )
        for kind in ("base", "plus")
        for number, (problem, request, score) in enumerate(zip(asked, requests, scores, strict=True))
    ]
    report = {
        "metrics": {
            f"pass@1,{kind}": simple_metric([s.scores["pass@1"] for s in samples if s.filter == kind])
            for kind in ("base", "plus")
        },
        "questions": len(asked),
        "of": len(problems),
        "fewshot": 0,
        "version": next(item for item in code.REQUIREMENTS if item.startswith("evalplus")),
        "dataset": file or "EvalPlus's release",
        "group": False,
        "speed": speed(lm.costs[task]),
    }
    return report, samples
