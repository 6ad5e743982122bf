"""Muon for the hidden matrices, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024) replaces the momentum of a weight matrix by the nearest orthogonal matrix; on the bundled
model it reaches a given loss in clearly fewer tokens than AdamW. `torch.optim.Muon` does its Newton-Schulz iterations
in bfloat16 one matrix at a time, which costs more than the training step itself on CPUs without bfloat16 units; here
they run in the parameter's own precision, and matrices of one shape go through together.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of Jordan's Muon post


class MuonAdamW(torch.optim.Optimizer):
    """One step of Muon on the groups with `muon=True`, of AdamW on the others; see `build_optimizer`."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8):
        super().__init__(groups, {"betas": betas, "eps": eps, "momentum": 0.95, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            if group["muon"]:
                self._muon(group, params)
            else:
                self._adamw(group, params)
        return loss

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in params:
            by_shape[p.shape].append(p)
        for shape, same in by_shape.items():
            updates = []
            for p in same:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                updates.append(p.grad.lerp(state["momentum"], group["momentum"]))  # type: ignore[union-attr]
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for p, update in zip(same, orthogonalize(torch.stack(updates)), strict=True):
                p.add_(update, alpha=-group["lr"] * scale)

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        for p in params:
            state = self.state[p]
            if not state:
                state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["step"] += 1
            grad = p.grad
            assert grad is not None
            state["mean"].lerp_(grad, 1 - beta1)
            state["square"].lerp_(grad.square(), 1 - beta2)
            mean = state["mean"] / (1 - beta1 ** state["step"])
            root = (state["square"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
            p.addcdiv_(mean, root, value=-group["lr"])


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices `[N, rows, columns]` -> the same with all singular values pushed near 1 (Newton-Schulz)."""
    a, b, c = NEWTON_SCHULZ
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


def build_optimizer(model: nn.Module, *, lr: float, muon_lr: float, weight_decay: float) -> MuonAdamW:
    """Muon (`muon_lr`) on every 2-D weight inside the decoder layers; AdamW (`lr`) on embeddings, head, norms, biases.

    Weight decay applies to the Muon matrices only.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    muon: list[Tensor] = []
    other: list[Tensor] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            hidden = p.ndim == 2 and id(p) not in embeddings and ".layers." in f".{name}"
            (muon if hidden else other).append(p)
    groups = [
        {"params": muon, "lr": muon_lr, "muon": True, "weight_decay": weight_decay},
        {"params": other, "lr": lr, "muon": False},
    ]
    return MuonAdamW([group for group in groups if group["params"]])
