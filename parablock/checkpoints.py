"""Load and save checkpoints: the bundled models, AR checkpoints, block-diffusion checkpoints."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

BUNDLED = Path(__file__).parent / "bundled"
BUNDLED_MODELS = {"bundled": BUNDLED / "diffusion", "bundled-ar": BUNDLED / "ar"}


def load(path_or_id: str | Path = "bundled", *, dtype: Any = None, device: str | None = None) -> tuple[Any, Any]:
    """Load a model and its tokenizer as stock transformers objects, ready to decode.

    Args:
        path_or_id: a directory, a hub id, `"bundled"` (the block-diffusion model that comes with the package) or
            `"bundled-ar"` (the AR model it was adapted from).
        dtype: a torch dtype or its name; by default float32 on CPU and the checkpoint's own elsewhere.
        device: a torch device; by default CUDA where there is one, else CPU.

    Raises:
        ValueError: no such checkpoint, or one that is incomplete or damaged.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = str(BUNDLED_MODELS.get(str(path_or_id), path_or_id))
    if Path(target).is_dir():
        _check_directory(Path(target))
    elif Path(target).exists() or target.startswith((".", "/", "~")) or target.count("/") > 1:
        raise ValueError(f"there is no checkpoint directory at {target!r}; check the path")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else "auto"
    try:
        tokenizer = AutoTokenizer.from_pretrained(target)
        model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path_or_id!s} could not be loaded ({reason}); pass a directory in transformers' layout with "
            "safetensors weights, or an id that is on the hub or in its local cache"
        ) from error
    return model.to(device).eval(), tokenizer


def save(model: Any, tokenizer: Any, path: str | Path) -> None:
    """Write model and tokenizer to `path` (safetensors), whole or not at all.

    Raises:
        ValueError: `path` exists and is not an empty directory.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{str(path)!r} exists and is not empty; name a new directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        whole = Path(scratch) / path.name
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        if path.exists():
            path.rmdir()
        shutil.move(whole, path)


def _check_directory(path: Path) -> None:
    """What can be told before loading: a config, and weights that open."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{str(path)!r} has no config.json; point to a checkpoint in transformers' layout")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise ValueError(
            f"{str(path)!r} has no .safetensors weights; convert other formats with transformers' save_pretrained "
            "(pickle files are never read)"
        )
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{str(file)!r} is truncated or damaged ({error}); download or copy it again") from error
