"""The models of a server: each with its tokenizer and its own engine."""

import time
from collections.abc import Sequence
from typing import Any

from parablock.checkpoints.load import load
from parablock.diffusion.support import is_adapted
from parablock.engine.config import EngineConfig
from parablock.engine.engine import Engine
from parablock.settings import Model


class ServedModel:
    """One model, its engine running in a thread of its own."""

    def __init__(self, name: str, model: Model, tokenizer: Any, config: EngineConfig) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.adapted = is_adapted(model.config)  # False: an AR model, of which block diffusion would be nonsense
        self.engine = Engine(model, config)
        self.engine.start()
        self.created = int(time.time())
        self.open = 0  # answers that have not ended

    def card(self) -> dict[str, Any]:
        """Its entry in the list of models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "parablock",
            "parablock": {
                "modes": ["diffusion", "autoregressive"] if self.adapted else ["autoregressive"],
                "block_size": self.engine.block_size,
                "context": self.engine.max_context,
            },
        }


def load_models(names: Sequence[str], config: EngineConfig) -> list[ServedModel]:
    """Load checkpoints and start their engines.

    Raises:
        ValueError: a name given twice, or a checkpoint that cannot be loaded.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the model {name!r} is given twice; name every model once")
    return [ServedModel(name, *load(name), config) for name in names]
