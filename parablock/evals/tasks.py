"""Which tasks to run: names of the harness, the bundled task, local files in place of datasets."""

import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from parablock.data import sources
from parablock.data.word_problems import read_answer, word_problem
from parablock.evals.code import CODE_TASKS
from parablock.evals.word_problems import MAX_NEW_TOKENS

WORD_PROBLEMS = "word_problems"
WORD_PROBLEM_COUNT = 1000
READERS = sources.READERS | {".csv": "csv"}


def word_problems(seed: int = 1, count: int = WORD_PROBLEM_COUNT) -> dict[str, Any]:
    """The bundled task for the harness: `count` problems of the test split, the same as in `parablock demo`."""
    return {
        "task": WORD_PROBLEMS,
        "custom_dataset": _word_problem_dataset,
        "dataset_kwargs": {"seed": seed, "count": count},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "process_results": _score_word_problem,
        "generation_kwargs": {"until": [], "max_gen_toks": MAX_NEW_TOKENS},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }


def _word_problem_dataset(seed: int, count: int, **metadata: Any) -> dict[str, Any]:
    from datasets import Dataset

    problems = [word_problem("test", seed, index) for index in range(count)]
    return {
        "test": Dataset.from_list([{"question": p.question, "answer": p.answer, "result": p.result} for p in problems])
    }


def _score_word_problem(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"exact_match": float(read_answer(results[0]) == doc["result"])}


def load_tasks(
    names: Sequence[str],
    *,
    seed: int = 1,
    limit: int | None = None,
    num_fewshot: int | None = None,
    files: Mapping[str, Mapping[str, str]] | None = None,
    include_path: str | None = None,
) -> tuple[Any, list[Any]]:
    """The harness's task manager, and the tasks and groups that `names` (patterns among them) stand for.

    `files` (of `parse_data`): local JSONL, Parquet or CSV files in place of a task's dataset.

    Raises:
        ValueError: an unknown name (the nearest ones are told), a dataset that cannot be fetched, a file that is
            missing or of another kind.
    """
    left = dict(files or {})
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"there is no folder {include_path!r}; include_path holds task definitions (YAML)")
    manager = _manager(include_path, set(names) != {WORD_PROBLEMS})
    specs: list[Any] = []
    for name in names:
        if name == WORD_PROBLEMS:
            specs.append(word_problems(seed, max(limit or 0, WORD_PROBLEM_COUNT)))
        elif found := manager.match_tasks([name]):
            specs += [
                _with_files(manager, task, left.pop(task), num_fewshot) if task in left else task for task in found
            ]
        elif Path(name).suffix == ".yaml" and Path(name).is_file():
            specs.append(name)
        else:
            known = [*manager.all_tasks, WORD_PROBLEMS, *CODE_TASKS]
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists those of the harness"
            raise ValueError(f"there is no task {name!r}; {hint}")
    if left:
        raise ValueError(f"data names {', '.join(left)}, which is not among the tasks {', '.join(names)}")
    return manager, [item for spec in specs for item in _load(manager, spec)]


def parse_data(data: Sequence[str]) -> dict[str, dict[str, str]]:
    """ "task:split=file" as {task: {split: file}}; "" stands for the split that is evaluated."""
    files: dict[str, dict[str, str]] = {}
    for item in data:
        name, equals, file = item.partition("=")
        task, _, split = name.partition(":")
        if not equals or not task:
            raise ValueError(f"data={item!r} is not understood; write task=file or task:split=file")
        if not Path(file).is_file():
            raise ValueError(f"data={item!r}: there is no file {file!r}")
        files.setdefault(task, {})[split] = file
    return files


@cache
def _manager(include_path: str | None, defaults: bool) -> Any:
    """The harness's index of tasks, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=defaults)


def _config(manager: Any, name: str) -> dict[str, Any]:
    """A task's definition, its functions left alone; of a group, that of its first task."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index.get(name)
    if entry is None or entry.yaml_path is None:
        tagged = [n for n, e in manager.task_index.items() if name in e.tags]
        return _config(manager, tagged[0]) if tagged else {}
    config: dict[str, Any] = load_yaml(entry.yaml_path, resolve_func=False, recursive=True)
    members = config.get("task")
    if isinstance(members, list):
        first = members[0]
        return _config(manager, first if isinstance(first, str) else first.get("task") or first.get("group"))
    return config


def _with_files(manager: Any, name: str, files: Mapping[str, str], num_fewshot: int | None) -> dict[str, Any]:
    """A task that reads local files."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = _config(manager, name)
    if config.get("task") != name:
        raise ValueError(f"data={name}=...: {name} is a group of tasks; name one of its tasks")
    evaluated = config.get("test_split") or config.get("validation_split")
    splits = {split or evaluated: file for split, file in files.items()}
    if evaluated not in splits:
        raise ValueError(f"{name} asks the questions of its split {evaluated!r}; pass --data {name}={evaluated}.jsonl")
    for file in splits.values():
        if Path(file).suffix not in READERS:
            raise ValueError(f"the data of {name} in {file}: only files that end with {', '.join(READERS)} can be read")
    task = {
        **load_yaml(manager.task_index[name].yaml_path, resolve_func=True, recursive=True),
        "tag": None,
        "dataset_path": READERS[Path(splits[evaluated]).suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits},
    }
    shots = config.get("num_fewshot") or 0 if num_fewshot is None else num_fewshot
    examples = config.get("fewshot_split") or config.get("training_split")
    if examples and examples not in splits and not (config.get("fewshot_config") or {}).get("samples"):
        if shots:
            raise ValueError(
                f"{name} takes its {shots} examples from its split {examples!r}; pass --data {name}:{examples}=FILE, "
                "or --num-fewshot 0"
            )
        task |= {"fewshot_split": None, "training_split": None}
    return task


def _load(manager: Any, spec: Any) -> list[Any]:
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    name = spec if isinstance(spec, str) else spec["task"]
    try:
        found = manager.load([spec])
        if unsafe := [task for task, loaded in found["tasks"].items() if getattr(loaded, "UNSAFE_CODE", False)]:
            raise ValueError(
                f"{unsafe[0]} would run programs of the model without a sandbox; use {' or '.join(CODE_TASKS)} instead"
            )
        return [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())
    except (OSError, DatasetsError, HfHubHTTPError, RuntimeError) as error:
        dataset = (spec if isinstance(spec, dict) else _config(manager, name)).get("dataset_path", "its dataset")
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"the data of {name} ({dataset}) could not be read ({reason}); fetch it where there is a network, "
            f"or pass a local file: --data {name}=FILE.jsonl"
        ) from error
    except ImportError as error:
        raise ValueError(
            f"{name} needs {error.name or error}; install it with: pip install 'parablock[eval]'"
        ) from error
