"""The benchmarks of Fast-dLLM v2 (arXiv 2509.26328, table 1), with the settings of its published evaluation script."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# generation: greedy, one token per step unless its confidence is 1, answers of up to 2,048 tokens
DECODING: dict[str, Any] = {"threshold": 1.0, "max_new_tokens": 2048}


@dataclass(frozen=True)
class PaperTask:
    """A benchmark: the task that measures it, which metric is ours, and the paper's accuracy in percent."""

    title: str
    task: str
    metric: str
    num_fewshot: int
    small: float  # Fast-dLLM v2 1.5B
    large: float  # Fast-dLLM v2 7B


# the published script names tasks and shots, the paper's table no metric: "metric" is what we read off
PAPER_TASKS = (
    PaperTask("HumanEval", "humaneval", "pass@1,base", 0, 43.9, 63.4),
    PaperTask("HumanEval+", "humaneval", "pass@1,plus", 0, 40.2, 58.5),
    PaperTask("MBPP", "mbpp", "pass@1,base", 0, 50.0, 63.0),
    PaperTask("MBPP+", "mbpp", "pass@1,plus", 0, 41.3, 52.3),
    PaperTask("GSM8K", "gsm8k", "exact_match,flexible-extract", 0, 62.0, 83.7),
    PaperTask("Minerva Math", "minerva_math", "math_verify,none", 0, 38.1, 61.6),
    PaperTask("IFEval", "ifeval", "prompt_level_strict_acc,none", 0, 47.0, 61.4),
    PaperTask("MMLU", "mmlu", "acc,none", 5, 55.1, 66.6),
    PaperTask("GPQA", "gpqa_main_n_shot", "acc,none", 0, 27.7, 31.9),
)


def paper_rows(tasks: Mapping[str, Any]) -> list[list[str]]:
    """The paper's table with ours beside it; what was not run stays empty, and then there is no average."""
    rows, ours = [], []
    for entry in PAPER_TASKS:
        found = tasks.get(entry.task, {}).get("metrics", {}).get(entry.metric)
        value = None if found is None else 100 * found["value"]
        error = found and found["stderr"]
        ours.append(value)
        shown = "" if value is None else f"{value:.1f}" + (f" ± {100 * error:.1f}" if error else "")
        rows.append([entry.title, entry.metric, shown, f"{entry.small:.1f}", f"{entry.large:.1f}"])
    known = [value for value in ours if value is not None]
    average = f"{sum(known) / len(known):.1f}" if len(known) == len(ours) else ""
    small, large = (sum(getattr(e, size) for e in PAPER_TASKS) / len(PAPER_TASKS) for size in ("small", "large"))
    return [*rows, ["average", "", average, f"{small:.1f}", f"{large:.1f}"]]
