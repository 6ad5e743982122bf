"""Load a checkpoint: the bundled models, Fast-dLLM v2 checkpoints, any AR decoder, adapters."""

import os
from pathlib import Path
from typing import Any

from parablock.checkpoints.checks import check_architecture, check_loaded, in_one_line
from parablock.checkpoints.gguf import converted
from parablock.checkpoints.look import Checkpoint, look
from parablock.checkpoints.named import SMOLLM2_AR
from parablock.settings import Model, require_library

LARGE = 10_000_000  # parameters from which on bfloat16 is the faster dtype on a CPU that has it


def load(
    path_or_id: str | Path = "bundled",
    *,
    dtype: Any = None,
    device: str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    revision: str | None = None,
    packed: bool = True,
) -> tuple[Model, Any]:
    """Load a model and its tokenizer as stock transformers objects, ready to decode or to adapt.

    Works on a block-diffusion checkpoint (ours, or a published Fast-dLLM v2 one), on any AR decoder (which is loaded as
    it is and decodes autoregressively), and on a directory with an adapter (its base is loaded, too): LoRA of a
    block-diffusion model, or what drafts for an AR model, which is attached to it. Weights are read from safetensors
    files straight to their device; code that comes with a checkpoint is never run.

    Args:
        path_or_id: a directory, a hub id, a GGUF file, `"bundled"` (the block-diffusion model that comes with the
            package), `"bundled-ar"` (the AR model it was adapted from), `"bundled-causal"` (that one, with an adapter
            whose masks draft for it), `"smollm2"` or `"smollm2-ar"` (SmolLM2, with such an adapter and alone).
        dtype: a torch dtype or its name, "auto" for the checkpoint's own (of a GGUF: bfloat16), or "int8" (on a CPU:
            8-bit weights). By default the checkpoint's own; on a CPU float32, unless the checkpoint is a large one in
            bfloat16 and the processor multiplies in it.
        device: a torch device; by default CUDA where there is one, else CPU.
        device_map: transformers' (such as "auto", to spread a large model over devices), instead of `device`.
        quantization_config: one of transformers' quantisation configs; its library must be installed.
        revision: of a hub id: branch, tag or commit.
        packed: on a CPU: prepare the weights of the linear layers for the processor (`parablock.pack`); they are plain
            again in `model.train()` and in what is saved.

    Raises:
        ValueError: no such checkpoint, one that is incomplete or damaged, or a model that block diffusion cannot run.
    """
    if device is not None and device_map is not None:
        raise ValueError(f"device={device!r} and device_map={device_map!r} exclude each other; pass one")
    checkpoint = look(path_or_id, revision)  # a wrong path is told before torch is imported
    import torch

    if device_map is None:
        device_map = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"dtype": weights_dtype(dtype, device_map), "device_map": device_map}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if checkpoint.base is not None and checkpoint.draft_tokens is None:
        model, tokenizer = _load_adapter(checkpoint, checkpoint.base, options)
    else:
        model, tokenizer = _load_model(checkpoint.base or checkpoint, options, None if checkpoint.base else revision)
    if str(device_map) == "cpu" and quantization_config is None:
        _suit_to_cpu(model, dtype, packed)
    if checkpoint.draft_tokens is not None:
        from parablock.checkpoints.adapter import attach_adapter

        attach_adapter(model, Path(checkpoint.target))  # to the layers as they are from now on
    return model.eval(), tokenizer


def weights_dtype(dtype: Any, device: Any) -> Any:
    """The torch dtype that weights are made in for `dtype`, as of `load`; "auto" where that is left to the checkpoint.

    Raises:
        ValueError: an unknown name, or 8-bit weights on another device than a CPU.
    """
    import torch

    if dtype == "int8" and str(device) != "cpu":
        raise ValueError(f"dtype='int8' is for a CPU, and the model goes to {device!r}; use quantization_config")
    if dtype in (None, "int8", "auto"):
        return "auto"
    if isinstance(dtype, str) and dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {dtype!r} is unknown; use 'float32', 'bfloat16', 'float16', 'int8' or 'auto'")
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _suit_to_cpu(model: Model, dtype: Any, packed: bool) -> None:
    import torch

    from parablock.packed import bf16_is_fast, pack

    if dtype in (None, "int8"):
        large = model.dtype == torch.bfloat16 and model.num_parameters() >= LARGE
        if not (large and bf16_is_fast()):
            model.float()
    if packed or dtype == "int8":
        pack(model, int8=dtype == "int8")


def _load_model(checkpoint: Checkpoint, options: dict[str, Any], revision: str | None) -> tuple[Model, Any]:
    """Config first: what is wrong is told before the weights are read."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from parablock.diffusion.support import softcapping

    name, target = checkpoint.name, checkpoint.target
    if checkpoint.gguf:
        target = str(converted(Path(target), options["dtype"]))
    source: dict[str, Any] = {"trust_remote_code": False, **({"revision": revision} if revision else {})}
    with in_one_line(name):
        config = AutoConfig.from_pretrained(target, **source)
    check_architecture(config, name)
    if softcapping(config) is not None:
        options = {**options, "attn_implementation": "eager"}  # some releases would take "sdpa", which does not cap
    with in_one_line(name):
        tokenizer = AutoTokenizer.from_pretrained(target, **source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            target,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loaded tells them by name
            **options,
            **source,
        )
    model, info = loaded
    check_loaded(name, model, info)
    if checkpoint.adapted and tokenizer.mask_token is None:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(model.config.mask_token_id)
    if checkpoint.gguf:  # an adapter names its base by this
        origin = name if name == SMOLLM2_AR else os.path.abspath(checkpoint.target)
        model.config._name_or_path = model.name_or_path = tokenizer.name_or_path = origin
    return model, tokenizer


def _load_adapter(adapter: Checkpoint, base: Checkpoint, options: dict[str, Any]) -> tuple[Model, Any]:
    """A LoRA adapter over its base, not merged (`export` merges it)."""
    require_library("peft", "train")
    from peft import PeftModel

    from parablock.training.mask_token import prepare

    model, tokenizer = _load_model(base, options, None)
    if adapter.block_size is not None and adapter.mask_token_id is not None:
        prepare(model, tokenizer, adapter.block_size)
    with in_one_line(adapter.name):
        return PeftModel.from_pretrained(model, adapter.target), tokenizer
