"""Load a checkpoint: the bundled models, Fast-dLLM v2 checkpoints, any AR decoder, LoRA adapters."""

from pathlib import Path
from typing import Any

from parablock.checkpoints.checks import check_architecture, check_loaded, in_one_line
from parablock.checkpoints.look import Checkpoint, look
from parablock.settings import Model, require_library


def load(
    path_or_id: str | Path = "bundled",
    *,
    dtype: Any = None,
    device: str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    revision: str | None = None,
) -> tuple[Model, Any]:
    """Load a model and its tokenizer as stock transformers objects, ready to decode or to adapt.

    Works on a block-diffusion checkpoint (ours, or a published Fast-dLLM v2 one), on any AR decoder (which is loaded as
    it is and decodes autoregressively), and on a directory with a LoRA adapter (its base is loaded, too). Weights are
    read from safetensors files straight to their device; code that comes with a checkpoint is never run.

    Args:
        path_or_id: a directory, a hub id, `"bundled"` (the block-diffusion model that comes with the package) or
            `"bundled-ar"` (the AR model it was adapted from).
        dtype: a torch dtype or its name, or "auto" for the checkpoint's own; by default float32 on CPU, else "auto".
        device: a torch device; by default CUDA where there is one, else CPU.
        device_map: transformers' (such as "auto", to spread a large model over devices), instead of `device`.
        quantization_config: one of transformers' quantisation configs; its library must be installed.
        revision: of a hub id: branch, tag or commit.

    Raises:
        ValueError: no such checkpoint, one that is incomplete or damaged, or a model that block diffusion cannot run.
    """
    if device is not None and device_map is not None:
        raise ValueError(f"device={device!r} and device_map={device_map!r} exclude each other; pass one")
    checkpoint = look(path_or_id, revision)  # a wrong path is told before torch is imported
    import torch

    if device_map is None:
        device_map = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.float32 if device_map == "cpu" else "auto"
    options = {"dtype": dtype, "device_map": device_map}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if checkpoint.base is not None:
        model, tokenizer = _load_adapter(checkpoint, checkpoint.base, options)
    else:
        model, tokenizer = _load_model(checkpoint, options, revision)
    return model.eval(), tokenizer


def _load_model(checkpoint: Checkpoint, options: dict[str, Any], revision: str | None) -> tuple[Model, Any]:
    """Config first: what is wrong is told before the weights are read."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from parablock.diffusion.support import softcapping

    name, target = checkpoint.name, checkpoint.target
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
