"""Load a checkpoint: the bundled models, Fast-dLLM v2 checkpoints, any AR decoder, LoRA adapters."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from parablock.checkpoints.checks import check_architecture, check_directory, check_loaded, read_json
from parablock.checkpoints.mask_token import prepare
from parablock.checkpoints.save import ADAPTER_FIELDS
from parablock.decoding.config import Mode
from parablock.settings import Model, require_library

BUNDLED = Path(__file__).parents[1] / "bundled"
BUNDLED_MODELS = {"bundled": BUNDLED / "diffusion", "bundled-ar": BUNDLED / "ar"}
ADAPTER = "adapter_config.json"


class NotAdaptedWarning(UserWarning):
    """An AR checkpoint was loaded: block diffusion would decode nonsense with it."""


def load(
    path_or_id: str | Path = "bundled",
    *,
    block_size: int | None = None,
    dtype: Any = None,
    device: str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    revision: str | None = None,
) -> tuple[Model, Any]:
    """Load a model and its tokenizer as stock transformers objects, ready to decode or to adapt.

    Works on a block-diffusion checkpoint (ours, or a published Fast-dLLM v2 one), on any AR decoder (mask token and
    block size are then added, with a `NotAdaptedWarning` that says which: see `mask_token.prepare`), and on a directory
    with a LoRA adapter (its base is loaded, too). Weights are read from safetensors files straight to their device;
    code that comes with a checkpoint is never run.

    Args:
        path_or_id: a directory, a hub id, `"bundled"` (the block-diffusion model that comes with the package) or
            `"bundled-ar"` (the AR model it was adapted from).
        block_size: what to adapt an AR model with (default 32); on a block-diffusion checkpoint its own is right.
        dtype: a torch dtype or its name, or "auto" for the checkpoint's own; by default float32 on CPU, else "auto".
        device: a torch device; by default CUDA where there is one, else CPU.
        device_map: transformers' (such as "auto", to spread a large model over devices), instead of `device`.
        quantization_config: one of transformers' quantisation configs; its library must be installed.
        revision: of a hub id: branch, tag or commit.

    Raises:
        ValueError: no such checkpoint, one that is incomplete or damaged, or a model that block diffusion cannot run.
    """
    import torch

    name = str(path_or_id)
    target = os.path.expanduser(BUNDLED_MODELS.get(name, path_or_id))
    if device is not None and device_map is not None:
        raise ValueError(f"device={device!r} and device_map={device_map!r} exclude each other; pass one")
    if device_map is None:
        device_map = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.float32 if device_map == "cpu" else "auto"
    options = {"dtype": dtype, "device_map": device_map}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if (Path(target) / ADAPTER).is_file() and not (Path(target) / "config.json").is_file():
        model, tokenizer = _load_adapter(Path(target), options, block_size)
    else:
        source = {"trust_remote_code": False, **({"revision": revision} if revision else {})}
        model, tokenizer = _load_model(target, name, source, options)
        added = prepare(model, tokenizer, block_size)
        if added:
            text = f"{name} is an AR checkpoint; prepared for adaptation: {added}"
            warnings.warn(
                NotAdaptedWarning(f"{text}. Until it is adapted, decode with mode='autoregressive'"), stacklevel=2
            )
    return model.eval(), tokenizer


def load_to_decode(path_or_id: str | Path, mode: Mode, **options: Any) -> tuple[Model, Any]:
    """`load`, for decoding in `mode`.

    Raises:
        ValueError: as `load`, and for block diffusion with a model that was never adapted to it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error" if mode == "diffusion" else "ignore", NotAdaptedWarning)
        try:
            return load(path_or_id, **options)
        except NotAdaptedWarning as warning:
            raise ValueError(f"{warning} (--mode autoregressive)") from None


def _load_model(target: str, name: str, source: dict[str, Any], options: dict[str, Any]) -> tuple[Model, Any]:
    """Config first: what is wrong is told before the weights are read."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if Path(target).is_dir():
        check_directory(Path(target))
    elif Path(target).exists() or target.startswith((".", "/")) or target.count("/") > 1:
        raise ValueError(f"there is no checkpoint directory at {target!r}; check the path")
    with _in_one_line(name):
        config = AutoConfig.from_pretrained(target, **source)
    check_architecture(config, name)
    with _in_one_line(name):
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
    return model, tokenizer


def _load_adapter(path: Path, options: dict[str, Any], block_size: int | None) -> tuple[Model, Any]:
    """A LoRA adapter over its base, not merged (`export` merges it)."""
    require_library("peft", "train")
    if not (path / "adapter_model.safetensors").is_file():
        raise ValueError(f"{str(path)!r} has no adapter_model.safetensors; save the adapter with safetensors")
    base = read_json(path / ADAPTER).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{str(path / ADAPTER)!r} names no base_model_name_or_path; add the base's path or id")
    from peft import PeftModel

    model, tokenizer = _load_model(base, base, {"trust_remote_code": False}, options)
    if block_size is None and (path / ADAPTER_FIELDS).is_file():
        block_size = read_json(path / ADAPTER_FIELDS).get("bd_size")
    prepare(model, tokenizer, block_size)
    with _in_one_line(str(path)):
        return PeftModel.from_pretrained(model, str(path)), tokenizer


@contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    """The first line of what the libraries say, as a ValueError."""
    try:
        yield
    except (OSError, ImportError, RuntimeError, SafetensorError, StrictDataclassError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        raise ValueError(
            f"{name} could not be loaded ({reason}); pass a directory in transformers' layout with "
            "safetensors weights, or an id that is on the hub or in its local cache"
        ) from error
