"""parablock: turn AR language models into block-diffusion models and decode them many tokens at a time."""

from typing import TYPE_CHECKING, Any

from wrapt import lazy_import, register_post_import_hook

if TYPE_CHECKING:
    from parablock.checkpoints.export import export
    from parablock.checkpoints.load import load
    from parablock.checkpoints.save import save
    from parablock.decoding.config import DecodeConfig
    from parablock.decoding.generate import GenerateOutput, Step, generate, stream
    from parablock.decoding.grammar import CompiledGrammar, Grammar, Grammars
    from parablock.decoding.transformers_generate import custom_generate
    from parablock.diffusion.drafting import draft_loss
    from parablock.diffusion.noise import sample_noise
    from parablock.diffusion.objective import diffusion_loss
    from parablock.engine.config import EngineConfig
    from parablock.engine.engine import Engine
    from parablock.engine.request import Handle, Request, Update
    from parablock.packed import pack, unpack
    from parablock.training.config import TrainConfig
    from parablock.training.mask_token import prepare
    from parablock.training.trainer import train

__version__ = "0.1.0"

_HOME = {
    "CompiledGrammar": "decoding.grammar",
    "DecodeConfig": "decoding.config",
    "Engine": "engine.engine",
    "EngineConfig": "engine.config",
    "GenerateOutput": "decoding.generate",
    "Grammar": "decoding.grammar",
    "Grammars": "decoding.grammar",
    "Handle": "engine.request",
    "Request": "engine.request",
    "Step": "decoding.generate",
    "TrainConfig": "training.config",
    "Update": "engine.request",
    "custom_generate": "decoding.transformers_generate",
    "diffusion_loss": "diffusion.objective",
    "draft_loss": "diffusion.drafting",
    "export": "checkpoints.export",
    "generate": "decoding.generate",
    "load": "checkpoints.load",
    "pack": "packed",
    "prepare": "training.mask_token",
    "sample_noise": "diffusion.noise",
    "save": "checkpoints.save",
    "stream": "decoding.generate",
    "train": "training.trainer",
    "unpack": "packed",
}

__all__ = [
    "CompiledGrammar",
    "DecodeConfig",
    "Engine",
    "EngineConfig",
    "GenerateOutput",
    "Grammar",
    "Grammars",
    "Handle",
    "Request",
    "Step",
    "TrainConfig",
    "Update",
    "custom_generate",
    "diffusion_loss",
    "draft_loss",
    "export",
    "generate",
    "load",
    "pack",
    "prepare",
    "sample_noise",
    "save",
    "stream",
    "train",
    "unpack",
]


def _register_official_config(configuration_auto: Any) -> None:
    """Let transformers' Auto classes load Fast-dLLM v2 checkpoints; the classes are imported when one is met."""
    config_class = lazy_import("parablock.checkpoints.official", attribute="Fast_dLLM_QwenConfig")
    configuration_auto.CONFIG_MAPPING.register("Fast_dLLM_Qwen", config_class, exist_ok=True)


# at once if transformers' Auto classes are imported already, else when they are
register_post_import_hook(_register_official_config, "transformers.models.auto.configuration_auto")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import parablock` costs nothing (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'parablock' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"parablock.{_HOME[name]}"), name)
