"""How families of models write tool calls."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """How a family of models writes calls: `{"name": ..., <key>: {...}}`, one or several."""

    name: str
    signs: tuple[str, ...]  # what a chat template of the family contains
    mark: str  # stands before a call, or before a list of them
    closer: str = ""  # stands behind a call
    key: str = "arguments"
    bare: bool = False  # at an answer's beginning, a call stands without the mark, too
    before: str = r"\s*"  # between the mark and a call
    again: bool = False  # behind a call another one may follow without a mark ...
    between: str = r"\s*"  # ... with this between them
    short_ids: bool = False  # its templates take ids of 9 letters and digits alone


HERMES = Format("hermes", ("<tool_call>",), "<tool_call>", closer="</tool_call>")
LLAMA = Format(
    "llama3", ("<|python_tag|>", "<|start_header_id|>ipython"), "<|python_tag|>", key="parameters", bare=True,
    again=True, between=r"\s*;?\s*",
)  # fmt: skip
MISTRAL = Format(
    "mistral", ("[TOOL_CALLS]",), "[TOOL_CALLS]", before=r"\s*\[?\s*", again=True, between=r"\s*[,\]]?\s*",
    short_ids=True,
)  # fmt: skip


def format_of(template: str) -> Format:
    """The format in which a model with this chat template writes calls; Hermes' if it shows none."""
    return next((f for f in (MISTRAL, LLAMA) if any(sign in template for sign in f.signs)), HERMES)
