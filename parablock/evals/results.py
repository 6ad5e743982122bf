"""The files of an evaluation: `results.json` has figures and all that is needed to run it again, `samples.jsonl` every
question with its answer and scores.
"""

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from parablock import __version__
from parablock.decoding.config import DecodeConfig
from parablock.evals.config import EvalConfig
from parablock.evals.files import write_text
from parablock.evals.machine import machine

FORMAT = 1
RESULTS, SAMPLES = "results.json", "samples.jsonl"


@dataclass(frozen=True)
class Sample:
    """One question: `response` is what the model wrote (of likelihood tasks each choice's log-probability, and whether
    greedy decoding writes it), `answer` what the task's filter makes of it.
    """

    task: str
    filter: str
    number: int
    question_hash: str
    prompt_hash: str
    prompt: str
    target: Any
    response: Any
    answer: Any
    scores: dict[str, float]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % confidence interval of the mean: Wilson's where all values are 0 or 1, else Student's t."""
    from scipy import stats

    if set(values) <= {0, 1}:
        found = stats.binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    if len(values) < 2:
        return -math.inf, math.inf
    mean, error = fmean(values), float(stats.sem(values))
    reach = error * float(stats.t.ppf(0.975, len(values) - 1))
    return mean - reach, mean + reach


def simple_metric(values: Sequence[float]) -> dict[str, Any]:
    """A metric that is the mean of its questions' scores."""
    value = fmean(values)
    variance = sum((v - value) ** 2 for v in values) / max(1, len(values) - 1)
    return {"value": value, "stderr": math.sqrt(variance / len(values)), "interval": interval(values)}


def question_hash(text: str) -> str:
    """Tells whether two runs asked the same."""
    return hashlib.sha256(text.encode()).hexdigest()


def samples_of(found: Mapping[str, Any]) -> list[Sample]:
    """Every question of a harness result, once for each of its task's filters."""
    samples = []
    for task, entries in found.get("samples", {}).items():
        for entry in entries:
            scores = {name: entry[name] for name in entry["metrics"]}
            samples.append(
                Sample(
                    task=task,
                    filter=entry["filter"],
                    number=entry["doc_id"],
                    question_hash=entry["doc_hash"],
                    prompt_hash=entry["prompt_hash"],
                    prompt=entry["arguments"][0][0],
                    target=entry["target"],
                    response=_only(_only(each) for each in entry["resps"]),
                    answer=_only(entry["filtered_resps"]),
                    scores={name: float(v) for name, v in scores.items() if isinstance(v, (bool, int, float))},
                )
            )
    return samples


def _only(items: Iterable[Any]) -> Any:
    """The one item of a list of one."""
    found = list(items)
    return found[0] if len(found) == 1 else found


def task_reports(found: Mapping[str, Any], samples: Sequence[Sample], speeds: Mapping[str, Any]) -> dict[str, Any]:
    """For each task and group of a harness result: its metrics with errors and intervals, its settings, its speed."""
    values: dict[tuple[str, str], list[float]] = {}
    for sample in samples:
        for name, score in sample.scores.items():
            values.setdefault((sample.task, f"{name},{sample.filter}"), []).append(score)
    reports: dict[str, Any] = {}
    for task, figures in {**found["results"], **found.get("groups", {})}.items():
        metrics: dict[str, Any] = {}
        for name, value in figures.items():
            if "," not in name or not isinstance(value, (int, float)) or "_stderr" in name:
                continue
            metric, _, kind = name.partition(",")
            error = figures.get(f"{metric}_stderr,{kind}")
            metrics[name] = {"value": value, "stderr": error if isinstance(error, (int, float)) else None}
            if (task, name) in values and math.isclose(value, fmean(values[task, name]), abs_tol=1e-9):
                metrics[name]["interval"] = interval(values[task, name])
        reports[task] = {
            "metrics": metrics,
            "questions": found["n-samples"].get(task, {}).get("effective"),
            "of": found["n-samples"].get(task, {}).get("original"),
            "fewshot": found["n-shot"].get(task),
            "version": found["versions"].get(task),
            "dataset": found["configs"].get(task, {}).get("dataset_path"),
            "group": task in found.get("groups", {}),
            "speed": speeds.get(task),
        }
    return reports


def make_report(
    model: str, config: EvalConfig, decoding: DecodeConfig, tasks: Mapping[str, Any], seconds: float, **more: Any
) -> dict[str, Any]:
    """The content of `results.json`."""
    from importlib.metadata import version

    return {
        "format": FORMAT,
        "model": model,
        "command": " ".join(["parablock", *sys.argv[1:]]),
        "evaluation": asdict(config),
        "decoding": asdict(decoding),
        "parablock": __version__,
        "commit": _commit(),
        "lm_eval": version("lm_eval"),
        "machine": machine(),
        "seconds": seconds,
        **more,
        "tasks": dict(tasks),
    }


def write(folder: Path, report: Mapping[str, Any], samples: Sequence[Sample]) -> list[Path]:
    """Both files, each whole or not at all; figures last, so that they never stand without their samples."""
    lines = (json.dumps(asdict(sample), ensure_ascii=False, default=str) for sample in samples)
    content = {SAMPLES: "".join(f"{line}\n" for line in lines), RESULTS: json.dumps(report, indent=2) + "\n"}
    return [write_text(folder / name, content[name]) for name in (SAMPLES, RESULTS)][::-1]


def read(folder: Path) -> tuple[dict[str, Any], list[Sample]]:
    """What `write` wrote.

    Raises:
        ValueError: the folder holds no evaluation, or one of another format.
    """
    if not (folder / RESULTS).is_file() or not (folder / SAMPLES).is_file():
        raise ValueError(
            f"{str(folder)!r} holds no {RESULTS} and {SAMPLES}; pass the output folder of a `parablock eval`"
        )
    try:
        report = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        lines = (folder / SAMPLES).read_text(encoding="utf-8").splitlines()
        samples = [Sample(**json.loads(line)) for line in lines]
        known = report["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(folder)!r} is damaged ({error}); run the evaluation again") from None
    if known != FORMAT:
        raise ValueError(f"{str(folder)!r} has format {known!r}, and this parablock reads {FORMAT}; run it again")
    return report, samples


def _commit() -> str | None:
    """The commit of the working tree that the package runs from; None outside one."""
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
