"""Which models block diffusion can run: what it asks of them is checked, so that nothing is silently wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from parablock.settings import Model

PROBE = "parablock_probe"

_probed: set[type] = set()  # architectures that passed: the answer is the same for all their checkpoints


def is_adapted(config: Any) -> bool:
    """Whether a model (its config) was made for block diffusion."""
    return getattr(config, "bd_size", None) is not None and getattr(config, "mask_token_id", None) is not None


def require_full_attention(config: Any) -> None:
    """ValueError for a model (its config) that our masks and cache would silently get wrong (sliding, linear ...)."""
    layers = getattr(config, "layer_types", None)
    others = set(layers or ()) - {"full_attention"}
    if others:
        raise ValueError(
            f"a {config.model_type} model with layers of type {', '.join(sorted(others))} is not supported; "
            "block diffusion needs full attention in every layer"
        )
    window = None if layers else getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"a {config.model_type} model with sliding_window={window} is not supported; in its config.json set "
            f"sliding_window to null and max_position_embeddings to {window} (up to there it changes nothing)"
        )


def require_open_attention(model: Model) -> None:
    """ValueError unless a caller's mask and arguments reach the model's attention.

    Some architectures build their own mask or drop the arguments on the way; they would decode, and wrongly. One token
    is run up to the first layer's attention, once per architecture.
    """
    architecture = type(model.get_decoder())
    if architecture in _probed:
        return
    reached = model._supports_attention_backend
    if reached:
        try:
            with attention(model, _register_probe()), torch.no_grad():
                ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
                mask = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device)
                options = {"position_ids": ids, "use_cache": False, "is_causal": False}
                model.get_decoder()(input_ids=ids, attention_mask=mask, **options)
            reached = False
        except _ReachedError as probe:
            reached = probe.whole
    if not reached:
        raise ValueError(
            f"a {model.config.model_type} model is not supported: a caller's mask does not reach its attention; "
            "docs/architectures.md lists what works"
        )
    _probed.add(architecture)


@contextmanager
def attention(model: Model, name: str) -> Iterator[None]:
    """Let the model use another attention function of transformers' interface, for this call."""
    before = model.config._attn_implementation
    if before != name:
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        if before != name:
            model.set_attn_implementation(before)


class _ReachedError(Exception):
    def __init__(self, whole: bool) -> None:
        self.whole = whole


def _probe(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    raise _ReachedError(attention_mask is not None and kwargs.get("is_causal") is False)


def _register_probe() -> str:
    from transformers import AttentionInterface

    AttentionInterface.register(PROBE, cast(Any, _probe))
    return PROBE
