"""A row of a training as text: what is masked, what is to be predicted."""

from typing import Any

from torch import Tensor

from parablock.data.chat import IGNORE
from parablock.training.config import TrainConfig

TOKENS = 128  # of a row, from its first response on
BLOCKS = 4  # of drafts


def decoded(row: dict[str, Tensor], tokenizer: Any, config: TrainConfig) -> str:
    """Where a row's first response begins, as text (escaped for rich).

    Block context: what the first view masks in brackets, block ends as bars. Causal context: some anchors, each with
    the text before it, the token that the model itself says next, and in brackets what its masks are to predict.
    """
    if config.context == "causal":
        return _draft_blocks(row, tokenizer, config.draft_tokens)
    pieces = []
    learned = (row["labels"] != IGNORE).nonzero()
    begin = max(0, int(learned[0]) // config.block_size - 1) * config.block_size if len(learned) else 0
    for i in range(begin, min(begin + TOKENS, len(row["labels"]))):
        text = tokenizer.decode([int(row["input_ids"][i])])
        masked = bool(row["noise_mask"][i]) and int(row["labels"][i]) != IGNORE
        pieces.append(f"\\[{text}]" if masked else text)
        if (i + 1) % config.block_size == 0:
            pieces.append("|")
    return "".join(pieces)


def _draft_blocks(row: dict[str, Tensor], tokenizer: Any, draft_tokens: int) -> str:
    lines = []
    ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
    for anchor in row["anchors"].nonzero()[:BLOCKS, 0].tolist():
        known = tokenizer.decode(ids[max(0, anchor - 15) : anchor + 1]).replace("\n", "\\n").replace("[", "\\[")
        said = tokenizer.decode([ids[anchor + 1]])
        targets = range(anchor + 2, min(anchor + 2 + draft_tokens, len(ids)))
        drafts = " ".join(repr(tokenizer.decode([ids[i]])) for i in targets if labels[i] != IGNORE)
        lines.append(f"... {known} | {said!r} \\[{drafts}]")
    return "\n".join(lines)
