"""Training for causal context: masks behind anchors learn what the model itself would say next.

Clean tokens run the base alone and need no gradient: one forward gives their K/V in every layer. Behind each anchor
`a`, the last known token of a draft block, stand k masks at `a + 1 .. a + k`; one forward with gradient runs over the
masks of all anchors. A mask sees the clean tokens of its sample up to the anchor, and the masks of its own block up to
itself; the mask at `a + j` predicts the token at `a + j + 1`.

Shapes: B rows of L clean tokens, A anchors of all rows together, k masks each, T = A k; H heads of width d, H_kv of
them for K and V, `share` heads to each.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from parablock.diffusion.attention import attention_weights, made_again
from parablock.diffusion.gate import Gate, closed, gate_of
from parablock.diffusion.masks import near
from parablock.diffusion.objective import causal_inputs, head_logits, is_checkpointed, summed_cross_entropy
from parablock.diffusion.support import attention as using_attention
from parablock.diffusion.support import layer_windows, require_supported_layers
from parablock.settings import Model

DRAFT_ATTENTION = "parablock_drafts"  # the name under which transformers finds `draft_attention`


def draft_loss(
    model: Model,
    input_ids: Tensor,
    labels: Tensor,
    anchors: Tensor,
    *,
    block_size: int,
    samples: Tensor | None = None,
    gamma: float = 0.85,
    num_items: Tensor | int | None = None,
    rerun_alike: bool = False,
) -> Tensor:
    """What the masks of a gated model learn in causal context: to draft the tokens that the model would say itself.

    Only the gate gets gradients; the model's own weights, and what clean tokens make of them, stay as they are.

    Args:
        model: a decoder-only language model of transformers with a gate attached.
        input_ids: `[B, L]` clean ids, best the model's own greedy answers; padding on the right.
        labels: `[B, L]`, -100 where nothing is learned (prompt, padding).
        anchors: `[B, L]` bool, behind which tokens a block of masks is drafted. A mask whose target is unlabelled, in
            another sample or behind the row learns nothing.
        block_size: what samples that share a row are aligned to.
        samples: `[B, L / block_size]`, which sample of its row each block belongs to; by default a row is one sample.
        gamma: what the j-th draft counts is `gamma ** (j - 1)`: later ones are reached less often.
        num_items: what the summed loss is divided by; by default the number of anchors (pass the whole accumulated
            batch's count when accumulating gradients).
        rerun_alike: that the caller's gradient checkpointing re-runs layers with the attention and the masks that they
            first ran with, when this call is over (`train` does).

    Returns:
        A scalar, float32: the weighted cross-entropy in nats, mean over anchors.

    Raises:
        ValueError: shapes that do not fit, no anchors, a model without a gate, or with gradient checkpointing.
    """
    _check(input_ids, labels, anchors)
    if model.training and is_checkpointed(model) and not rerun_alike:
        remedy = "train with pb.train, or without it"
        raise ValueError(f"gradient checkpointing would run layers again when the masks are forgotten; {remedy}")
    drafts = _Drafts.run(model, input_ids, anchors, block_size, samples)
    row_Ak, target_Ak = drafts.row[:, None].expand_as(drafts.place), drafts.place + 1
    learned = target_Ak < drafts.end[:, None]
    target_Ak = target_Ak.clamp(max=input_ids.shape[1] - 1)
    learned &= labels[row_Ak, target_Ak] != -100
    weight = gamma ** torch.arange(learned.shape[1], device=labels.device, dtype=torch.float32)
    total = summed_cross_entropy(
        model, drafts.hidden.view(*learned.shape, -1)[learned], input_ids[row_Ak, target_Ak][learned],
        weight.expand(learned.shape)[learned],
    )  # fmt: skip
    return total / (len(drafts.row) if num_items is None else num_items)


@torch.no_grad()
def accepted_drafts(
    model: Model, input_ids: Tensor, anchors: Tensor, *, block_size: int, samples: Tensor | None = None
) -> Tensor:
    """Which drafts behind each anchor would be accepted `[A, k]` (bool): arguments as of `draft_loss`.

    One is where it and all before it are what the model itself finds most probable behind the given text; those whose
    place lies behind the sample's end are not.
    """
    _check(input_ids, input_ids, anchors)
    drafts = _Drafts.run(model, input_ids, anchors, block_size, samples)
    place = drafts.place.clamp(max=input_ids.shape[1] - 1)
    clean = drafts.clean_hidden[drafts.row[:, None], place].flatten(0, 1)
    proposed, own = (head_logits(model, hidden).argmax(-1).view(place.shape) for hidden in (drafts.hidden, clean))
    right = (proposed == own) & (drafts.place < drafts.end[:, None])
    return right.long().cumprod(1).bool()


def _check(input_ids: Tensor, labels: Tensor, anchors: Tensor) -> None:
    if not input_ids.shape == labels.shape == anchors.shape or input_ids.ndim != 2:
        shapes = [tuple(x.shape) for x in (input_ids, labels, anchors)]
        raise ValueError(f"input_ids, labels and anchors must share one shape [B, L], got {shapes}")
    if not anchors.any():
        raise ValueError("the batch has no anchor; every row needs a response of at least two tokens")


@dataclass(frozen=True)
class DraftBlocks:
    """What the masks of a forward attend to, for `draft_attention`.

    `anchor [A]`: where, in its row, each block's anchor stands. `samples`: for every sample with anchors its row, the
    range of its blocks, and the range of clean tokens that any of them sees. `keys`, `values`: of the clean tokens in
    each layer `[B, H_kv, L, d]`.
    """

    draft_tokens: int
    anchor: Tensor
    samples: tuple[tuple[int, slice, slice], ...]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]

    def seen(self, blocks: slice, clean: slice, window: int) -> Tensor:
        """What masks of one sample see of its clean tokens and of their own block `[blocks, k, clean tokens + k]`."""
        anchor, device = self.anchor[blocks, None, None], self.anchor.device
        token = torch.arange(clean.start, clean.stop, device=device)
        mask = torch.arange(self.draft_tokens, device=device)
        known = (token <= anchor).expand(-1, self.draft_tokens, -1)
        own = mask <= mask[:, None]
        if window:
            known = known & near(anchor[:, 0] + 1 + mask, token, window)
            own = own & near(mask, mask, window)
        return torch.cat([known, own.expand(len(anchor), -1, -1)], -1)


@dataclass(frozen=True)
class _Drafts:
    """The two forwards: `row [A]`, `place [A, k]` and `end [A]` say where masks stand, and where their sample ends."""

    row: Tensor
    place: Tensor
    end: Tensor
    hidden: Tensor  # of the masks [T, hidden]
    clean_hidden: Tensor  # [B, L, hidden]

    @staticmethod
    def run(model: Model, input_ids: Tensor, anchors: Tensor, block_size: int, samples: Tensor | None) -> "_Drafts":
        require_supported_layers(model.config)
        gate = gate_of(model)
        if gate is None:
            raise ValueError("the model has no gate; attach(model, new_gate(model, ...)) gives it one")
        from transformers import DynamicCache

        inputs, start_BL, end_BL = causal_inputs(model, input_ids, block_size, samples)
        cache = DynamicCache()  # of all tokens, in layers with a window, too
        with _base_alone(model, gate):
            decoder = model.get_decoder()
            clean = decoder(**inputs | {"use_cache": True, "past_key_values": cache}).last_hidden_state

        row, anchor = anchors.nonzero(as_tuple=True)
        start, k = start_BL[row, anchor], gate.draft_tokens
        place = anchor[:, None] + 1 + torch.arange(k, device=anchor.device)
        layers: list[Any] = cache.layers
        keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
        blocks = DraftBlocks(k, anchor, _by_sample(row, start, anchor), keys, values)
        ids = torch.tensor(gate.mask_ids(k), device=anchor.device).repeat(1, len(anchor))
        with using_attention(model, register_draft_attention()):
            hidden = decoder(
                input_ids=ids, position_ids=(place - start[:, None]).view(1, -1), use_cache=False, drafts=blocks,
                windows=layer_windows(model.config),
            ).last_hidden_state[0]  # fmt: skip
        return _Drafts(row, place, end_BL[row, anchor], hidden, clean)


@contextmanager
def _base_alone(model: Model, gate: Gate) -> Iterator[None]:
    """The model as it decodes: no gate, no dropout, no gradient."""
    training = model.training
    model.eval()
    try:
        with closed(gate), torch.no_grad():
            yield
    finally:
        model.train(training)


def _by_sample(row: Tensor, start: Tensor, anchor: Tensor) -> tuple[tuple[int, slice, slice], ...]:
    """See `DraftBlocks.samples`; anchors stand in order. Syncs with the host once."""
    sample = torch.stack([row, start], 1)
    counts = torch.unique_consecutive(sample, return_counts=True, dim=0)[1]
    end = counts.cumsum(0)
    found = torch.stack([row[end - 1], end - counts, end, start[end - 1], anchor[end - 1] + 1], 1).tolist()
    return tuple((index, slice(begin, to), slice(first, last)) for index, begin, to, first, last in found)


def draft_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    drafts: DraftBlocks | None = None,
    windows: Sequence[int] = (),
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of masks by structure: plain products, no mask of all pairs; in transformers' interface.

    `query [1, H, T, d]`, `key [1, H_kv, T, d]`, `value [1, H_kv, T, e]`, all of masks -> `[1, T, H, e]`.
    """
    if drafts is None:
        raise ValueError(f"{type(module).__name__} was not handed the drafts: the architecture is not supported")
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__} attends with s_aux, which drafts do not support")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = cast(int, module.layer_idx)
    arguments = query * scale, key, value, drafts, layer, windows[layer], softcap, dropout if module.training else 0.0
    return made_again(_attend, *arguments), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, drafts: DraftBlocks, layer: int, window: int, softcap: float | None,
    dropout: float,
) -> Tensor:  # fmt: skip
    k, heads, kv_heads, width = drafts.draft_tokens, query.shape[1], key.shape[1], query.shape[-1]
    blocks, share, out_width = query.shape[2] // k, heads // kv_heads, value.shape[-1]
    # blocks before the heads that share K and V: q [H_kv, A, share, k, d], own K and V [H_kv, A, k, d]
    q = query.view(kv_heads, share, blocks, k, width).transpose(1, 2)
    own_k, own_v = key.view(kv_heads, blocks, k, width), value.view(kv_heads, blocks, k, out_width)
    parts = []
    for row, these, clean in drafts.samples:
        count, length = these.stop - these.start, clean.stop - clean.start
        flat, by_block = (kv_heads, count * share * k, -1), (kv_heads, count, share * k, -1)
        q_row = q[:, these].reshape(flat[0], flat[1], width)
        clean_k, clean_v = (x[row, :, clean] for x in (drafts.keys[layer], drafts.values[layer]))
        own = (q_row.view(*by_block[:3], width) @ own_k[:, these].mT).view(flat)
        scores = torch.cat([q_row @ clean_k.mT, own], -1).view(kv_heads, count, share, k, length + k)
        seen = drafts.seen(these, clean, window)[:, None]
        weights = attention_weights(scores, seen, softcap, value.dtype, dropout)
        of_clean, of_own = weights[..., :length].reshape(flat), weights[..., length:].reshape(by_block)
        out = of_clean @ clean_v + (of_own @ own_v[:, these]).view(flat)
        parts.append(out.view(kv_heads, count, share, k, out_width))
    return torch.cat(parts, 1).permute(1, 3, 0, 2, 4).reshape(1, blocks * k, heads, out_width)


def register_draft_attention() -> str:
    """Make `draft_attention` known to transformers; returns the name to select it by."""
    from transformers import AttentionInterface

    AttentionInterface.register(DRAFT_ATTENTION, cast(Any, draft_attention))
    return DRAFT_ATTENTION
