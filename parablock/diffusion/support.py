"""Which models block diffusion can run: what it asks of them is checked, so that nothing is silently wrong."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from parablock.settings import Model

PROBE = "parablock_probe"

_probed: set[type] = set()  # architectures that passed: the answer is the same for all their checkpoints


def is_adapted(config: Any) -> bool:
    """Whether a model (its config) was made for block diffusion."""
    return getattr(config, "bd_size", None) is not None and getattr(config, "mask_token_id", None) is not None


def require_supported_layers(config: Any) -> None:
    """ValueError for a model (its config) that our masks and cache would silently get wrong.

    Layers may see all tokens before them or a window of them. Others (linear, chunked attention ...) are refused, and
    so is an attention of transformers that leaves out what the model asks of it.
    """
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise ValueError(
            f"a {config.model_type} model with layers of type {', '.join(sorted(others))} is not supported; "
            "block diffusion needs full attention or a sliding window in every layer"
        )
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        raise ValueError(
            f"a {config.model_type} model whose tokens see those after them (use_bidirectional_attention) is not "
            "supported; use an autoregressive one"
        )
    if softcapping(config) is not None and config._attn_implementation == "sdpa":
        raise ValueError(
            f"a {config.model_type} model with attn_logit_softcapping={softcapping(config)} attends by 'sdpa', which "
            "does not cap; call model.set_attn_implementation('eager')"
        )


def softcapping(config: Any) -> float | None:
    """The bound that a model's attention scores are squeezed under, if there is one (Gemma 2)."""
    cap: float | None = getattr(config, "attn_logit_softcapping", None)
    return cap


def layer_windows(config: Any) -> tuple[int, ...]:
    """How many tokens each layer sees, from a query's own back (a position p sees k where p - k < window); 0: all."""
    window: int = getattr(config, "sliding_window", None) or 0
    if not window or window >= config.max_position_embeddings:  # it hides nothing
        window = 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * int(config.num_hidden_layers)
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def layer_masks(config: Any, mask: Callable[[int], Any]) -> Any:
    """`mask(window)` as a model takes it: one for all its layers, or, where they differ, one for each type of layer."""
    windows = set(layer_windows(config))
    if len(windows) == 1:
        return mask(windows.pop())
    return {"full_attention": mask(0), "sliding_attention": mask(max(windows))}


def require_open_attention(model: Model) -> None:
    """ValueError unless a caller's mask and arguments reach the model's attention.

    Some architectures build their own mask or drop the arguments on the way; they would decode, and wrongly. One token
    is run up to the first layer's attention, once per architecture.
    """
    architecture = type(model.get_decoder())
    if architecture in _probed:
        return
    unreached = wrong = "a caller's mask does not reach its attention"
    if model._supports_attention_backend:
        try:
            with attention(model, _register_probe()), torch.no_grad():
                ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
                mask = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device)
                options = {"position_ids": ids, "use_cache": False, "is_causal": False}
                model.get_decoder()(input_ids=ids, attention_mask=mask, **options)
        except _ReachedError as probe:
            wrong = "its attention has sinks (s_aux)" if probe.sinks else "" if probe.whole else unreached
        except TypeError:  # what it calls its decoder is something else
            pass
    if wrong:
        raise ValueError(
            f"a {model.config.model_type} model is not supported: {wrong}; docs/architectures.md lists what works"
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
    def __init__(self, whole: bool, sinks: bool) -> None:
        self.whole, self.sinks = whole, sinks


def _probe(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    whole = attention_mask is not None and kwargs.get("is_causal") is False
    raise _ReachedError(whole, kwargs.get("s_aux") is not None)


def _register_probe() -> str:
    from transformers import AttentionInterface

    AttentionInterface.register(PROBE, cast(Any, _probe))
    return PROBE
