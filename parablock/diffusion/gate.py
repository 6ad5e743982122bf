"""The gate: LoRA and mask embeddings that act at masked positions and nowhere else, attached to a stock model.

In causal context clean tokens run the base's weights: they are the AR model, bit for bit, and so are their K/V. What
was adapted acts on mask tokens alone, token by token within one forward. Mask tokens have ids behind the vocabulary, so
no tokenizer makes one and no head predicts one; by its id every part of the gate knows a masked position.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parablock.diffusion.config import MOST_MASKS
from parablock.settings import Model, require

GATE = "draft_gate"  # the gate's name among the model's modules


class Lora(nn.Module):
    """What is added to a layer's output at masked positions: `up [out, r]` of `down [r, in]` of its input."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)


class Gate(nn.Module):
    """LoRA for the layers named `targets`, and `embeddings [E, hidden]` of masks, whose ids begin at `first_mask_id`.

    All of it stays in float32 when the model is in half precision: such small products are the faster for it on a CPU.
    `draft_tokens`: how many masks the gate was trained to fill at once. Where `closed`, the caller promises that no
    token of the coming forwards is a mask, and nothing of the gate is computed.
    """

    masked: Tensor | None  # of this forward: the scale of LoRA at masks, 0 elsewhere `[T, 1]`; None: it has no masks
    ids: Tensor  # of this forward

    def __init__(
        self, targets: Sequence[str], loras: Sequence[Lora], embeddings: Tensor, *,
        first_mask_id: int, draft_tokens: int, alpha: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.targets = tuple(targets)
        self.loras = nn.ModuleList(loras)
        self.embeddings = nn.Parameter(embeddings)
        self.first_mask_id, self.draft_tokens, self.alpha = first_mask_id, draft_tokens, alpha
        self.rank = int(loras[0].down.shape[0])
        self.closed = False
        self.masked = None

    def mask_ids(self, count: int) -> list[int]:
        """The ids of the 1st, 2nd ... mask of a draft block."""
        last = len(self.embeddings) - 1
        return [self.first_mask_id + min(place, last) for place in range(count)]


def gate_of(model: Model) -> Gate | None:
    """The gate that is attached to a model."""
    gate: Gate | None = model._modules.get(GATE)
    return gate


@contextmanager
def closed(gate: Gate | None, *, unless: bool = False) -> Iterator[None]:
    """Within: forwards without masks, unless there are some; nothing of the gate is computed."""
    if gate is not None:
        gate.closed = not unless
    try:
        yield
    finally:
        if gate is not None:
            gate.closed = False


def new_gate(
    model: Model, *, draft_tokens: int, rank: int, alpha: float, targets: Sequence[str] = (), seed: int = 0
) -> Gate:
    """A gate that changes nothing yet: LoRA that adds zero, masks that look like the mean token.

    `targets`: the last parts of the names of the layers that get LoRA (`o_proj`, say); by default all linear layers.

    Raises:
        ValueError: the model has a gate, or no such layers.
    """
    if gate_of(model) is not None:
        raise ValueError("the model has a gate already; load its base to train another one")
    generator = torch.Generator().manual_seed(seed)
    embedding, layers = model.get_input_embeddings(), _linear_layers(model)
    known = {name.rpartition(".")[2] for name in layers}
    if unknown := sorted(set(targets) - known):
        raise ValueError(f"the model has no layers {unknown[0]!r} to put LoRA on; choose of {', '.join(sorted(known))}")
    if not layers:
        raise ValueError(f"a {type(model).__name__} has no linear layers to put LoRA on; choose another model")
    layers = {name: layer for name, layer in layers.items() if not targets or name.rpartition(".")[2] in targets}
    loras = []
    for layer in layers.values():
        bound = layer.in_features**-0.5  # as LoRA begins: the one random, the other zero
        down = (torch.rand(rank, layer.in_features, generator=generator) * 2 - 1) * bound
        loras.append(Lora(down, torch.zeros(layer.out_features, rank)))
    vocabulary = embedding.weight.shape[0]
    with torch.no_grad():  # as the model sees tokens: some scale their embeddings
        ids = torch.arange(vocabulary, device=embedding.weight.device)
        parts = [embedding(part).sum(0, dtype=torch.float32) for part in torch.split(ids, 4096)]
    masks = (torch.stack(parts).sum(0) / vocabulary).cpu().repeat(draft_tokens, 1)
    return Gate(
        list(layers), loras, masks, first_mask_id=vocabulary, draft_tokens=draft_tokens, alpha=alpha
    )  # fmt: skip


def attach(model: Model, gate: Gate) -> None:
    """Put the gate into a model, from outside; the model's own weights stay as they are, and are frozen.

    Raises:
        ValueError: layers or sizes that the model does not have.
    """
    require(1 <= gate.draft_tokens <= MOST_MASKS, "draft_tokens", gate.draft_tokens, f"use 1 to {MOST_MASKS}")
    layers = dict(model.named_modules())
    pairs = [(name, lora) for name, lora in zip(gate.targets, gate.loras, strict=True) if isinstance(lora, Lora)]
    for name, lora in pairs:
        layer: Any = layers.get(name)
        sizes = (lora.down.shape[1], lora.up.shape[0])
        if not hasattr(layer, "in_features") or (layer.in_features, layer.out_features) != sizes:
            raise ValueError(
                f"the adapter's layer {name} does not fit this {type(model).__name__}; load it on its base"
            )
    embedding = model.get_input_embeddings()
    rows, hidden = embedding.weight.shape
    if gate.first_mask_id != rows or gate.embeddings.shape[1] != hidden:
        raise ValueError(
            f"the adapter's masks (from id {gate.first_mask_id} on, {gate.embeddings.shape[1]} wide) do not fit "
            f"embeddings of {[rows, hidden]}; load it on its base"
        )
    model.requires_grad_(False)
    model.add_module(GATE, gate.to(embedding.weight.device))
    embedding.register_forward_pre_hook(_Notice(gate))
    embedding.register_forward_hook(_Embed(gate))
    for name, lora in pairs:
        layers[name].register_forward_hook(_Add(gate, lora))


def _linear_layers(model: Model) -> dict[str, Any]:
    """The layers of the decoder that every token goes through: experts, which see some of the tokens, are left out."""
    seen: dict[Any, int] = {}
    layers = {
        name: module for name, module in model.named_modules()
        if hasattr(module, "in_features") and module is not model.get_output_embeddings()
    }  # fmt: skip
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: seen.update({layer: args[0].numel() // layer.in_features}))
        for layer in layers.values()
    ]
    try:
        with torch.no_grad():
            ids = torch.zeros(1, 3, dtype=torch.long, device=model.device)
            model.get_decoder()(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: layer for name, layer in layers.items() if seen.get(layer) == 3}


class _Hook:
    """Of one module; an object, so that a copy of the model has hooks that lead to its own copy of the gate."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate


class _Notice(_Hook):
    """Before the embedding: where the masks are; the embedding gets ids that it has."""

    def __call__(self, module: Any, args: tuple[Tensor]) -> tuple[Tensor] | None:
        (ids,) = args
        gate = self.gate
        gate.masked = None
        if gate.closed:
            return None
        masked = ids >= gate.first_mask_id
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and not masked.any():
            return None
        gate.masked = masked.view(-1, 1) * (gate.alpha / gate.rank)
        gate.ids = ids
        return (ids.clamp(max=gate.first_mask_id - 1),)


class _Embed(_Hook):
    """After the embedding: masks have their own."""

    def __call__(self, module: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
        gate = self.gate
        if gate.masked is None:
            return out
        place = gate.ids - gate.first_mask_id
        own = F.embedding(place.clamp(min=0), gate.embeddings.to(out.dtype))
        return torch.where(place[..., None] >= 0, own, out)


class _Add(_Hook):
    """After a linear layer: LoRA at masked positions; elsewhere zero is added."""

    def __init__(self, gate: Gate, lora: Lora) -> None:
        super().__init__(gate)
        self.lora = lora

    def __call__(self, module: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
        masked = self.gate.masked
        if masked is None:
            return out
        own = self.lora._parameters  # attributes of a module are slow to find
        down, up = own["down"], own["up"]
        assert down is not None
        assert up is not None
        x_TI, out_TO = args[0].reshape(-1, down.shape[1]), out.reshape(-1, up.shape[0])
        if out.dtype == down.dtype:
            return torch.addmm(out_TO, F.linear(x_TI, down) * masked.to(down.device), up.mT).view(out.shape)
        narrow_Tr = F.linear(x_TI.to(down.dtype), down) * masked.to(down.device)
        return (out_TO + F.linear(narrow_Tr, up).to(out.dtype)).view(out.shape)
