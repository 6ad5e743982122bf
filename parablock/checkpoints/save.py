"""Write checkpoints, whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import distributed

from parablock.checkpoints.adapter import base_name, gate_tensors, write_gate
from parablock.checkpoints.checks import ADAPTER, ADAPTER_FIELDS
from parablock.checkpoints.named import BUNDLED_MODELS, SMOLLM2_AR
from parablock.diffusion.gate import Gate, gate_of
from parablock.settings import Model


def save(model: Model, tokenizer: Any, path: str | Path) -> None:
    """Write model and tokenizer to `path` (safetensors), whole or not at all; `export` writes other layouts.

    Of a model with an adapter (LoRA, or a gate) only the adapter is written, and the name of its base.

    Under `torchrun` every process calls it (a sharded model is gathered) and the first one writes.

    Raises:
        ValueError: `path` exists and is not an empty directory, or an adapter's base has no name.
    """
    if (gate := gate_of(model)) is not None:
        _save_gate(gate, model, tokenizer, path)
        return
    weights = _gathered(model)
    if distributed.is_initialized() and distributed.get_rank() > 0:
        return
    with new_directory(path) as whole:
        model.save_pretrained(whole, state_dict=weights)
        tokenizer.save_pretrained(whole)
        if (whole / ADAPTER).is_file():
            fields = {name: getattr(model.config, name, None) for name in ("bd_size", "mask_token_id")}
            (whole / ADAPTER_FIELDS).write_text(json.dumps(fields) + "\n")


def _save_gate(gate: Gate, model: Model, tokenizer: Any, path: str | Path) -> None:
    base, tensors = base_name(model), gate_tensors(gate)
    if distributed.is_initialized() and distributed.get_rank() > 0:
        return
    with new_directory(path) as whole:
        write_gate(whole, model, gate, tensors, base)
        tokenizer.save_pretrained(whole)
        (whole / "README.md").write_text(_card(gate, base))


def _card(gate: Gate, base: str) -> str:
    local = Path(base).is_absolute()
    head = (
        ""
        if local or base in (*BUNDLED_MODELS, SMOLLM2_AR)
        else f"---\nbase_model: {base}\nlibrary_name: parablock\n---\n"
    )
    name = Path(base).name if local else base
    return f"""{head}# Drafts for {name}

An adapter that lets the autoregressive model {name} draft up to {gate.draft_tokens} tokens in the forward that
verifies the drafts before them. The model's own weights are not changed, and neither are its answers: they come in
fewer forwards. LoRA (rank {gate.rank}) and {len(gate.embeddings)} mask embeddings, in PEFT's layout, which act at
masked positions alone.

```python
import parablock as pb

model, tokenizer = pb.load("THIS_DIRECTORY")  # the base with the adapter on it
out = pb.generate(model, prompt_ids)
```
"""


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
