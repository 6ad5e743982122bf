"""A model's linear layers, prepared once for the processor they run on.

Handed plain weights, a CPU reads them in a layout that is not its own, or brings them into that layout in every
product; with the few tokens of a decoding step that is half of the time. `pack` does it once, from outside, on any
stock model: the linear layers change their class, and the plain weights go, but those that the embedding shares (it is
read by rows) and those of small layers. `unpack` brings them back, bit for bit.
"""

import copy
import weakref
from collections import Counter
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from parablock.settings import Model

SMALL = 131_072  # float32 weights of a layer up to which some products are faster as they are: those of fewer tokens
LONG = 1024  # numbers of a single input from which on oneDNN splits the sums, which are rounded otherwise then
FEW = 7  # than this, and of more the smaller the layer is

# compilers cannot look into oneDNN's layout: they are shown an operator that finds the layer by its number
_numbers = count()
_layers: weakref.WeakValueDictionary[int, "PackedLinear | Int8Linear"] = weakref.WeakValueDictionary()
_library: Any = torch.library.Library("parablock", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("product(Tensor x, Tensor layer, int out_features, ScalarType dtype) -> Tensor")
_library.impl("product", lambda x, layer, *_: _layers[int(layer)].product(x), "CompositeExplicitAutograd")
_library.impl("product", lambda x, _, out, dtype: x.new_empty(*x.shape[:-1], out, dtype=dtype), "Meta")


def pack(model: Model, *, int8: bool = False) -> None:
    """Bring the weights of a model's linear layers into the processor's own layout: the same products, faster.

    For a model in float32 or bfloat16 on a CPU; anything else in it stays as it is, and so does all of it where torch
    has no oneDNN. Weights that are trained are unpacked by `model.train()`, frozen ones stay packed. What is saved are
    plain weights.

    `int8` rounds the weights to 8 bits besides, for good: half of bfloat16's memory, less time in large models. Every
    output's weights have a scale of their own, and so have a token's inputs, which are rounded in every product: a
    token's result does not depend on those beside it.

    Raises:
        ValueError: int8 without oneDNN.
    """
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if int8 and not available:
        raise ValueError("int8 needs a torch with oneDNN, and this one was built without; choose another dtype")
    if int8:
        unpack(model)
        for parent in list(model.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear and _is_plain(layer.weight):
                    setattr(parent, name, Int8Linear(layer))
        model.requires_grad_(False)
    elif available:
        holders = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        for layer in model.modules():
            if type(layer) is nn.Linear and _can_be_packed(layer.weight):
                _pack(layer, keep_plain=holders[id(layer.weight)] > 1)


def unpack(model: Model) -> None:
    """Bring the plain weights back that `pack` took; they are as they were, bit for bit. Those in 8 bits stay."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layer.unpack()


def bf16_is_fast() -> bool:
    """Whether this processor multiplies in bfloat16 by itself."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class PackedLinear(nn.Linear):
    """A linear layer with its weight in oneDNN's layout: `[..., in_features]` -> `[..., out_features]`, as before.

    Its parameter `weight` is the packed one, or the plain one beside it where that is kept.
    """

    packed: Tensor
    keeps_plain: bool
    few: int  # inputs, all tokens together, up to which plain products are the faster ones
    number: Tensor  # a tensor, so that what is compiled for one model is known for the next

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        if self.few and (torch.compiler.is_compiling() or x.numel() < self.few):
            return nn.functional.linear(x, self.weight, self.bias)
        if torch.compiler.is_compiling():
            return _product(x, self.number, self.out_features, x.dtype)
        if x.dtype != self.packed.dtype and torch.is_autocast_enabled("cpu"):
            x = x.to(self.packed.dtype)
        if torch.is_grad_enabled() and (x.requires_grad or self._trained):
            return _Differentiable.apply(x, self.weight, self.bias, self)  # type: ignore[no-any-return, no-untyped-call]
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """What the processor does. A long input goes twice where it is alone: so it is summed as beside others."""
        if x.numel() == self.in_features > LONG:
            return self._product(x.expand(2, *x.shape))[0]
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out

    def unpack(self) -> None:
        """An ordinary layer again."""
        self.weight = self._plain(in_place=True)
        self.__class__ = nn.Linear  # type: ignore[assignment]
        del self.packed, self.keeps_plain, self.few, self.number

    def _plain(self, in_place: bool = False) -> nn.Parameter:
        if self.keeps_plain:
            return self.weight  # type: ignore[return-value]
        plain = nn.Parameter(self.packed.to_dense(), self.weight.requires_grad)
        return _in_place_of(self.weight, plain) if in_place else plain

    @property
    def _trained(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def train(self, mode: bool = True) -> Any:
        """A layer that is trained is an ordinary one again."""
        if mode and self._trained:
            self.unpack()
        return nn.Linear.train(self, mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        keep_plain = self.keeps_plain
        self.unpack()
        nn.Linear._apply(self, *args, **kwargs)  # type: ignore[no-untyped-call]
        if _can_be_packed(self.weight):
            _pack(self, keep_plain)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self._plain().detach()

    def __getstate__(self) -> dict[str, Any]:  # copies are made of the plain weight
        state = self.__dict__ | {"_parameters": self._parameters | {"weight": self._plain()}}
        return {name: value for name, value in state.items() if name not in ("packed", "number")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _pack(self, self.keeps_plain)


class _Differentiable(torch.autograd.Function):
    """The product, differentiable by its input alone: no optimizer could change the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if any(ctx.needs_input_grad[1:3]):
            raise RuntimeError("packed weights are not trained; call model.train() or parablock.unpack(model) first")
        return gradient @ ctx.layer.packed.to_dense(), None, None, None


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights: `[..., in_features]` -> `[..., out_features]`, in the dtype of its input."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        weight = layer.weight.detach().float()
        self.scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.zero = torch.zeros(self.out_features, dtype=torch.int32)
        rounded = torch.round(weight / self.scale[:, None]).to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.number = _numbered(self)
        self._forward_hooks = layer._forward_hooks  # an adapter's, say

    def forward(self, x: Tensor) -> Tensor:
        """The product of rounded weights and rounded inputs; RuntimeError where a derivative would be needed."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("8-bit weights have no derivatives; load the checkpoint with another dtype")
        largest = x.float().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = torch.round(x.float() * (127 / largest)).add_(128).to(torch.uint8)
        if torch.compiler.is_compiling():
            product = _product(rounded, self.number, self.out_features, torch.float32)
        else:
            product = self.product(rounded)
        out = (product * largest).to(x.dtype)
        return out if self.bias is None else out + self.bias

    def product(self, x: Tensor) -> Tensor:
        """What the processor does: `x` is uint8, with 0 at 128 and a token's largest at 1 or 255; float32."""
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            x, 1 / 127, 128, self.packed, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out

    def train(self, mode: bool = True) -> Any:
        """ValueError in training."""
        if mode:
            raise ValueError("8-bit weights cannot be trained; load the checkpoint with another dtype")
        return super().train(mode)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise ValueError("8-bit weights are not saved; load the checkpoint with another dtype to save it")

    def __deepcopy__(self, memo: Any) -> "Int8Linear":
        copied = Int8Linear.__new__(Int8Linear)
        memo |= {id(self): copied, id(self.packed): self.packed}  # which never changes
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)  # hooks lead to what is copied, too
        copied.number = _numbered(copied)
        return copied


def _is_plain(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.layout == torch.strided and weight.is_floating_point()


def _can_be_packed(weight: Tensor) -> bool:
    bf16 = weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return _is_plain(weight) and (bf16 or weight.dtype == torch.float32)


def _pack(layer: nn.Linear, keep_plain: bool) -> None:
    plain = layer.weight
    small = plain.dtype == torch.float32 and plain.numel() < SMALL
    packed = torch.ops.mkldnn._reorder_linear_weight(plain.detach())
    layer.__class__ = PackedLinear
    assert isinstance(layer, PackedLinear)
    layer.packed, layer.number = packed, _numbered(layer)
    layer.few = SMALL * FEW // layer.out_features if small else 0
    layer.keeps_plain = keep_plain or small
    if not layer.keeps_plain:
        layer.weight = _in_place_of(plain, nn.Parameter(packed, plain.requires_grad))


def _in_place_of(old: Any, new: nn.Parameter) -> nn.Parameter:
    """The parameter `old` with the content of `new`, so that whoever holds it (an optimizer) still does."""
    if weakref.getweakrefs(old):  # a compiler holds it: it cannot be changed
        return new
    torch.utils.swap_tensors(old, new)  # type: ignore[no-untyped-call]
    return old  # type: ignore[no-any-return]


def _numbered(layer: Any) -> Tensor:
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number)


def _product(x: Tensor, number: Tensor, out_features: int, dtype: torch.dtype) -> Tensor:
    out: Tensor = torch.ops.parablock.product(x, number, out_features, dtype)
    return out
