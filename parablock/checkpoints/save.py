"""Write checkpoints, whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import distributed

from parablock.checkpoints.look import ADAPTER, ADAPTER_FIELDS
from parablock.settings import Model


def save(model: Model, tokenizer: Any, path: str | Path) -> None:
    """Write model and tokenizer to `path` (safetensors), whole or not at all; `export` writes other layouts.

    Under `torchrun` every process calls it (a sharded model is gathered) and the first one writes.

    Raises:
        ValueError: `path` exists and is not an empty directory.
    """
    weights = _gathered(model)
    if distributed.is_initialized() and distributed.get_rank() > 0:
        return
    with new_directory(path) as whole:
        model.save_pretrained(whole, state_dict=weights)
        tokenizer.save_pretrained(whole)
        if (whole / ADAPTER).is_file():
            fields = {name: getattr(model.config, name, None) for name in ("bd_size", "mask_token_id")}
            (whole / ADAPTER_FIELDS).write_text(json.dumps(fields) + "\n")


def _gathered(model: Model) -> dict[str, Any] | None:
    """The whole weights of a model that FSDP has sharded; None for any other."""
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)))


def require_new(path: Path) -> None:
    """ValueError if `path` exists and is not an empty directory."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{str(path)!r} exists and is not empty; name a new directory")


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A scratch directory beside `path` that takes its place when the block ends without an error.

    Raises:
        ValueError: `path` exists and is not an empty directory.
    """
    path = Path(path)
    require_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        whole = Path(scratch) / path.name
        whole.mkdir()
        yield whole
        if path.exists():
            path.rmdir()
        shutil.move(whole, path)
