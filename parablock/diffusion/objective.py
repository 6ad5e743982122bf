"""The training objective: masked cross-entropy over both complementary views, with the token shift.

Fast-dLLM v2, section 3.1, at a fraction of the cost of its published form, which runs two sequences `[xt ; x0]` of 2 L
tokens and the head everywhere. Here one forward runs over the units of `masks.BlockLayout`: both views share one clean
stream, blocks that equal their clean copy and clean blocks that nobody reads are left out, and the head runs at masked
positions only, in chunks. The loss is the same number.
"""

from collections.abc import Callable
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from parablock.diffusion.attention import register_block_attention
from parablock.diffusion.config import FirstTokenContext
from parablock.diffusion.flex import register_flex_attention
from parablock.diffusion.masks import CLEAN, BlockLayout, Units, block_layout, near, sample_bounds
from parablock.diffusion.noise import complementary_views
from parablock.diffusion.support import attention as using_attention
from parablock.diffusion.support import layer_masks, layer_windows, require_supported_layers
from parablock.settings import Model

Attention = Literal["block", "flex", "dense"]

MAX_LOGITS = 2**26  # how many logits the head makes at a time
_known_heads: WeakSet[Any] = WeakSet()  # models whose own logits were seen to be `head_logits`


def diffusion_loss(
    model: Model,
    input_ids: Tensor,
    labels: Tensor,
    noise_mask: Tensor,
    *,
    block_size: int,
    mask_token_id: int,
    samples: Tensor | None = None,
    first_token_context: FirstTokenContext = "noisy",
    num_items: Tensor | int | None = None,
    attention: Attention | None = None,
) -> Tensor:
    """The block-diffusion loss of a stock transformers decoder on one batch (Fast-dLLM v2, section 3.1).

    Args:
        model: a decoder-only language model of transformers.
        input_ids: `[B, L]` clean ids; `L` a multiple of `block_size`.
        labels: `[B, L]`, -100 where nothing is learned (prompt, padding). Those positions are never noised.
        noise_mask: `[B, L]` bool, True where the first view is masked (before restricting it to the labels); the second
            view masks the other labelled positions.
        block_size: D.
        mask_token_id: what stands at masked positions.
        samples: `[B, L / block_size]`, which sample of its row each block belongs to: samples that share a row then see
            nothing of each other, as if each had a row of its own. By default a row is one sample.
        first_token_context: what a block's first token is predicted from, the "noisy" block before it (as published)
            or its "clean" copy (what decoding has).
        num_items: what the summed cross-entropy is divided by; by default the number of masked positions of both views
            (pass the whole accumulated batch's count when accumulating gradients).
        attention: "block" (by structure: plain products, any device), "flex" (flex attention with a block mask; CUDA)
            or "dense" (one quadratic mask and the model's own attention: the reference). Default: "flex" on CUDA,
            else "block", and "dense" where gradient checkpointing re-runs layers outside this call or the
            architecture cannot do the others.

    Returns:
        A scalar, float32: the mean cross-entropy in nats.

    Raises:
        ValueError: shapes that do not fit, or a model with layers that block diffusion cannot run.
    """
    _check(model, input_ids, labels, noise_mask, block_size, mask_token_id)
    first, second = complementary_views(noise_mask, labels)
    layout = block_layout(first, second, block_size, samples)
    if not layout.tokens:
        raise ValueError("no position of the batch has a label; every row needs at least one response token")
    views = torch.stack([input_ids, *(input_ids.masked_fill(v, mask_token_id) for v in (first, second))])
    hidden = hidden_states(model, layout.gather(views), layout, attention)
    sources, targets = _shifted_targets(layout, torch.stack([first, second]), input_ids, first_token_context)
    total = summed_cross_entropy(model, hidden.index_select(0, sources), targets)
    return total / (targets.numel() if num_items is None else num_items)


def autoregressive_loss(
    model: Model,
    input_ids: Tensor,
    labels: Tensor,
    *,
    block_size: int,
    samples: Tensor | None = None,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """The ordinary next-token loss at the labelled positions, from a causal pass over the clean tokens.

    Arguments as of `diffusion_loss`; samples that share a row are isolated in the same way. Rows are padded on the
    right. Returns a scalar, float32: the mean cross-entropy in nats.
    """
    require_supported_layers(model.config)
    inputs, start_BL, _ = causal_inputs(model, input_ids, block_size, samples)
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    index = torch.arange(input_ids.shape[1], device=input_ids.device)
    row, position = ((labels != -100) & (index > start_BL)).nonzero(as_tuple=True)
    total = summed_cross_entropy(model, hidden[row, position - 1], input_ids[row, position])
    return total / (position.numel() if num_items is None else num_items)


def causal_inputs(
    model: Model, input_ids: Tensor, block_size: int, samples: Tensor | None
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """What a decoder is called with to run over clean tokens causally, each within its sample.

    Returns the arguments, and for every token where, in its row, its sample starts and ends `[B, L]`.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids}
    length = input_ids.shape[1]
    if samples is None:
        start = torch.zeros_like(input_ids)
        return inputs, start, start + length
    index = torch.arange(length, device=input_ids.device)
    first, last = (bound.repeat_interleave(block_size, 1) for bound in sample_bounds(samples))
    start, end = first * block_size, (last + 1) * block_size
    own = (start[:, :, None] == start[:, None, :]) & (index[:, None] >= index[None, :])

    def seen(window: int) -> Tensor:
        return (own & near(index, index, window or length))[:, None]

    return inputs | {"attention_mask": _additive(model, seen), "position_ids": index - start}, start, end


def _additive(model: Model, seen: Callable[[int], Tensor]) -> Any:
    """The bool masks `seen(window)` as every attention of transformers reads them ("eager" misreads bool ones)."""

    def mask(window: int) -> Tensor:
        hidden, dtype = ~seen(window), model.dtype
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)

    return layer_masks(model.config, mask)


def _check(
    model: Model, input_ids: Tensor, labels: Tensor, noise_mask: Tensor, block_size: int, mask_token_id: int
) -> None:
    require_supported_layers(model.config)
    if not input_ids.shape == labels.shape == noise_mask.shape or input_ids.ndim != 2:
        shapes = [tuple(x.shape) for x in (input_ids, labels, noise_mask)]
        raise ValueError(f"input_ids, labels and noise_mask must share one shape [B, L], got {shapes}")
    if input_ids.shape[1] % block_size:
        raise ValueError(f"rows of {input_ids.shape[1]} tokens are not whole blocks; pad to a multiple of {block_size}")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if not 0 <= mask_token_id < vocabulary:
        raise ValueError(f"mask_token_id={mask_token_id} is outside the vocabulary of {vocabulary} tokens")


def hidden_states(model: Model, ids: Tensor, layout: Units, attention: Attention | None = None) -> Tensor:
    """One forward of the decoder over all units: `[1, T]` -> `[T, hidden]`."""
    if attention is None:
        if model.training and is_checkpointed(model):
            attention = "dense"
        elif ids.device.type == "cuda":
            attention = "flex" if model._supports_flex_attn else "dense"
        else:
            attention = "block"
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": layout.positions(), "use_cache": False}
    decoder = model.get_decoder()
    if attention == "block":
        with using_attention(model, register_block_attention()):
            output = decoder(**inputs, block_layout=layout, windows=layer_windows(model.config))
    elif attention == "flex":
        with using_attention(model, register_flex_attention()):
            output = decoder(**inputs, attention_mask=layer_masks(model.config, layout.flex_mask))
    else:
        output = decoder(**inputs, attention_mask=_additive(model, layout.dense_mask))
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def is_checkpointed(model: Model) -> bool:
    """Whether layers run again in the backward pass (whatever this version of transformers calls it)."""
    return any(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing"))


def _shifted_targets(
    layout: BlockLayout, masked: Tensor, input_ids: Tensor, first_token_context: FirstTokenContext
) -> tuple[Tensor, Tensor]:
    """Token shift: for every masked position i of both views (`masked [2, B, L]`), where its hidden state i - 1 lies.

    Returns `sources [M]`, indices into the T tokens of the step, and `targets [M]`, the clean ids. Where the view has
    no unit of its own for position i - 1, the clean unit shows the same. A sample's first position has no i - 1: not
    predicted.
    """
    size = layout.block_size
    view, row, position = masked.nonzero(as_tuple=True)
    unit = layout.unit_of[view + 1, row, position // size]  # where the masked token itself stands
    predicted = (layout.number[unit] > 0) | (position % size > 0)
    view, row, position = view[predicted], row[predicted], position[predicted]
    block, place = (position - 1) // size, (position - 1) % size
    unit, clean = layout.unit_of[view + 1, row, block], layout.unit_of[CLEAN, row, block]
    if first_token_context == "clean":
        unit = torch.where(place == size - 1, clean, unit)
    unit = torch.where(unit >= 0, unit, clean)
    return unit * size + place, input_ids[row, position]


def head_logits(model: Model, hidden: Tensor) -> Tensor:
    """What the model's own forward makes of `hidden [M, hidden]`: its head, and what its architecture does after it.

    Raises:
        ValueError: the model's own logits are others (looked at once per model).
    """
    if model not in _known_heads:
        _compare_logits(model)
        _known_heads.add(model)
    return _head_logits(model, hidden)


def _head_logits(model: Model, hidden: Tensor) -> Tensor:
    logits: Tensor = model.get_output_embeddings()(hidden).float()
    config = model.config
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * factor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2 and 3
        logits = torch.tanh(logits / cap) * cap
    return logits


def _compare_logits(model: Model) -> None:
    """ValueError unless the logits of the model's own forward are those of `head_logits`, over a few tokens.

    Safe in the middle of a training step, under whatever wraps the model: the forward is the inner model's, both logits
    come from the same hidden states, and no random number is used up.
    """
    kept: list[Tensor] = []
    hook = model.get_decoder().register_forward_hook(lambda *call: kept.append(call[2].last_hidden_state))
    device = torch.device(model.device)
    ids = torch.arange(min(8, model.get_input_embeddings().weight.shape[0]), device=device)[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # the class's own: what wraps the instance's forward (autocast, say) is entered already, and not re-entrant
            own = type(model).forward(model, **inputs).logits.float()
            if not kept:  # its forward doesn't call the decoder as a module
                kept.append(model.get_decoder()(**inputs).last_hidden_state)
            ours = _head_logits(model, kept[0])
    finally:
        hook.remove()
    exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    apart, largest = (own - ours).abs().max().item(), own.abs().max().item()
    if apart > (1e-3 if exact else 3e-2) * largest:  # not so where a weight is no number: others say that
        raise ValueError(
            f"{type(model).__name__} (model_type {model.config.model_type!r}) is not supported: its own logits are not "
            f"those of its head with the scaling that its config names (up to {largest:.4g} and "
            f"{ours.abs().max().item():.4g}, up to {apart:.2g} apart), so the loss would be wrong; name the scaling "
            "logits_scaling, logit_scale or final_logit_softcapping in the config, or leave it out of the forward"
        )


def summed_cross_entropy(model: Model, hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy summed over `hidden [M, hidden]`; with large vocabularies chunk by chunk, logits recomputed.

    `weights [M]`: what each counts, by default 1.
    """

    def chunk_loss(h: Tensor, t: Tensor, w: Tensor | None = None) -> Tensor:
        if w is None:
            return F.cross_entropy(head_logits(model, h), t, reduction="sum")
        return F.cross_entropy(head_logits(model, h), t, reduction="none") @ w

    arguments = [hidden, targets] if weights is None else [hidden, targets, weights]
    size = max(1, MAX_LOGITS // model.get_output_embeddings().weight.shape[0])
    if len(targets) <= size:
        return chunk_loss(*arguments)
    chunks = zip(*(torch.split(argument, size) for argument in arguments), strict=True)
    return torch.stack([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()
