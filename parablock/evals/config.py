"""What a user can set about an evaluation."""

from dataclasses import dataclass
from typing import Literal

from parablock.settings import require, require_at_least, setting


@dataclass(frozen=True)
class EvalConfig:
    """What `parablock eval` measures, and how the questions are put."""

    tasks: tuple[str, ...] = setting(
        (),
        joined=True,
        help="As a list: tasks, groups or patterns of lm-evaluation-harness, 'word_problems' (the bundled task), "
        "'humaneval', 'mbpp' (code: needs run_code).",
    )
    suite: Literal["paper"] | None = setting(None, help="'paper': the tasks and settings of Fast-dLLM v2 instead.")
    data: tuple[str, ...] = setting(
        (), help="A local file in place of a task's dataset: TASK=FILE or TASK:SPLIT=FILE (repeatable)."
    )
    include_path: str | None = setting(None, help="A folder with task definitions of your own.")
    limit: int | None = setting(None, help="Only the first so many questions of each task. Default: all.")
    batch_size: int = setting(32, help="Answers decoded together.")
    num_fewshot: int | None = setting(None, help="Examples in a prompt. Default: the task's own.")
    chat: bool | None = setting(None, help="The chat template. Default: if the tokenizer has one.")
    system: str | None = setting(None, help="A system message. Default: none.")
    multiturn: bool = setting(True, help="Examples as turns of a chat, not in one message.")
    seed: int = setting(
        1, option="question_seed", help="Of examples and sampling, and which problems of the bundled task."
    )
    run_code: bool = setting(False, help="Let programs of the model run, sandboxed.")

    def __post_init__(self) -> None:
        require(bool(self.tasks) != bool(self.suite), "tasks", self.tasks, "name tasks, or use suite='paper'")
        require(self.suite in (None, "paper"), "suite", self.suite, "use 'paper'")
        require_at_least(self, 1, "limit", "batch_size")
        require_at_least(self, 0, "num_fewshot")
        require(self.system is None or self.chat is not False, "system", self.system, "it needs the chat template")
