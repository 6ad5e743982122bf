"""parablock: turn AR language models into block-diffusion models and decode them many tokens at a time."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parablock.checkpoints import load, save
    from parablock.config import DecodeConfig, TrainConfig
    from parablock.decoding.generate import GenerateOutput, generate, stream
    from parablock.decoding.steps import Step
    from parablock.diffusion.noise import sample_noise
    from parablock.diffusion.objective import diffusion_loss
    from parablock.training.trainer import train

__version__ = "0.1.0"

_HOME = {
    "DecodeConfig": "config",
    "GenerateOutput": "decoding.generate",
    "Step": "decoding.steps",
    "TrainConfig": "config",
    "diffusion_loss": "diffusion.objective",
    "generate": "decoding.generate",
    "load": "checkpoints",
    "sample_noise": "diffusion.noise",
    "save": "checkpoints",
    "stream": "decoding.generate",
    "train": "training.trainer",
}

__all__ = [
    "DecodeConfig",
    "GenerateOutput",
    "Step",
    "TrainConfig",
    "diffusion_loss",
    "generate",
    "load",
    "sample_noise",
    "save",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import parablock` costs nothing (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'parablock' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"parablock.{_HOME[name]}"), name)
