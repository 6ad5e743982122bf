"""A gate as files, in PEFT's layout: LoRA as PEFT names it, the mask embeddings beside it, and what masks are for.

`adapter_config.json` and `adapter_model.safetensors` are what PEFT writes, with one tensor more; what its config has no
place for stands in `block_diffusion.json`. The base is named, never written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parablock.checkpoints.checks import ADAPTER, ADAPTER_FIELDS, ADAPTER_TENSORS, read_json, read_tensors
from parablock.checkpoints.named import BUNDLED_MODELS
from parablock.diffusion.gate import Gate, Lora, attach
from parablock.settings import Model

FILES = (ADAPTER, ADAPTER_TENSORS, ADAPTER_FIELDS)
MASKS = "mask_embeddings"
PREFIX = "base_model.model."
HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")
# of a PEFT config: what would change what its tensors mean
PLAIN: dict[str, Any] = {
    "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False,
    "bias": "none", "modules_to_save": None,
}  # fmt: skip


def gate_tensors(gate: Gate) -> dict[str, Tensor]:
    """The gate's tensors as they are named in the file; every process calls it, one that FSDP has sharded is gathered.

    They are written in float16, which keeps more digits than bfloat16, unless a value is too large for it.
    """
    tensors = {MASKS: gate.embeddings}
    for name, lora in zip(gate.targets, gate.loras, strict=True):
        assert isinstance(lora, Lora)
        tensors |= {f"{PREFIX}{name}.lora_A.weight": lora.down, f"{PREFIX}{name}.lora_B.weight": lora.up}
    whole = {name: _whole(tensor) for name, tensor in tensors.items()}
    largest = max(float(tensor.abs().max()) for tensor in whole.values())
    dtype = torch.float16 if largest <= torch.finfo(torch.float16).max else torch.bfloat16
    return {name: tensor.to(dtype).contiguous() for name, tensor in whole.items()}


def write_gate(folder: Path, model: Model, gate: Gate, tensors: Mapping[str, Tensor], base: str) -> None:
    """Write the files; `tensors` are those of `gate_tensors`, `base` is the name that the base is found by."""
    from safetensors.torch import save_file

    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": None,
        "r": gate.rank, "lora_alpha": gate.alpha, "lora_dropout": 0.0, "target_modules": _target_modules(model, gate),
        "inference_mode": True, "init_lora_weights": True, "layers_to_transform": None, "layers_pattern": None, **PLAIN,
    }  # fmt: skip
    fields = {"context": "causal", "draft_tokens": gate.draft_tokens, "mask_embeddings": len(tensors[MASKS])}
    save_file(dict(tensors), folder / ADAPTER_TENSORS, metadata={"format": "pt"})
    (folder / ADAPTER).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / ADAPTER_FIELDS).write_text(json.dumps(fields) + "\n")


def base_name(model: Model) -> str:
    """What a model's base is found by: a hub id, a bundled model's name, or the whole path of a directory.

    Raises:
        ValueError: the model was not loaded from anywhere.
    """
    target: str = model.config._name_or_path
    if not target:
        raise ValueError(
            "an adapter names its base, and this model does not say where it was loaded from; save it first"
        )
    if not Path(target).is_dir():
        return target
    path = Path(target).resolve()
    return next((name for name, bundled in BUNDLED_MODELS.items() if bundled == path), str(path))


def attach_adapter(model: Model, folder: Path) -> None:
    """Attach the gate in `folder` to its base, in float32.

    Raises:
        ValueError: files that are damaged or do not fit one another or the model.
    """
    try:
        attach(model, _read_gate(model, folder))
    except ValueError as error:
        raise ValueError(f"the adapter {str(folder)!r}: {error}") from error


def attach_published(model: Model, path_or_id: Any, **options: Any) -> None:
    """Attach the gate in the folder `adapter` of a checkpoint; `options`: those of `from_pretrained`."""
    from transformers.utils.hub import cached_file

    source = {name: options[name] for name in HUB if name in options}
    files = [cached_file(path_or_id, name, subfolder="adapter", **source) for name in FILES]
    attach_adapter(model, Path(str(files[0])).parent)


def _whole(tensor: Any) -> Tensor:
    sharded = hasattr(tensor, "full_tensor")
    whole: Tensor = (tensor.full_tensor() if sharded else tensor).detach().cpu()
    return whole


def _target_modules(model: Model, gate: Gate) -> list[str]:
    """The last parts of the layers' names, as PEFT reads them; whole names where these would match more layers."""
    short = {name.rpartition(".")[2] for name in gate.targets}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short) if matched == set(gate.targets) else list(gate.targets)


def _read_gate(model: Model, folder: Path) -> Gate:
    config, fields, tensors = (
        read_json(folder / ADAPTER), read_json(folder / ADAPTER_FIELDS), read_tensors(folder / ADAPTER_TENSORS)
    )  # fmt: skip
    for name, plain in PLAIN.items():
        _require(config.get(name) in (plain, None), f"{ADAPTER} has {name}={config.get(name)!r}, a gate has {plain!r}")
    for name in ("r", "lora_alpha"):
        _require(isinstance(config.get(name), int | float), f"{ADAPTER} has no number {name}")
    _require(MASKS in tensors, f"{ADAPTER_TENSORS} has no tensor {MASKS}")
    masks = tensors.pop(MASKS).float()
    count = fields["mask_embeddings"]
    _require(
        masks.ndim == 2 and len(masks) == count,
        f"{MASKS} in {ADAPTER_TENSORS} is {list(masks.shape)}, and {ADAPTER_FIELDS} names {count} of them",
    )
    found = _loras(tensors, config["r"])
    targets = [name for name, _ in model.named_modules() if name in found]
    targets += found.keys() - set(targets)  # of another model: `attach` names them
    return Gate(
        targets, [found[name] for name in targets], masks, draft_tokens=fields["draft_tokens"],
        first_mask_id=model.get_input_embeddings().weight.shape[0], alpha=config["lora_alpha"],
    )  # fmt: skip


def _loras(tensors: dict[str, Tensor], rank: int) -> dict[str, Lora]:
    """Layer -> its LoRA; ValueError for tensors that are missing, have another rank, or are something else."""
    _require(bool(tensors), f"{ADAPTER_TENSORS} has no LoRA tensors")
    layers = {}
    for key in sorted(tensors):
        name, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        known = key.startswith(PREFIX) and name and part in ("A.weight", "B.weight")
        _require(bool(known), f"{ADAPTER_TENSORS} has a tensor {key}, which is none of a gate's")
        pair = [f"{PREFIX}{name}.lora_{side}.weight" for side in "AB"]
        missing = [other for other in pair if other not in tensors]
        _require(not missing, f"{ADAPTER_TENSORS} has no tensor {'and '.join(missing)}")
        down, up = (tensors[key].float() for key in pair)
        _require(
            down.ndim == up.ndim == 2 and len(down) == up.shape[1] == rank,
            f"LoRA of {name} in {ADAPTER_TENSORS} is {list(down.shape)} and {list(up.shape)}, {ADAPTER} has r={rank}",
        )
        layers[name] = Lora(down, up)
    return layers


def _require(ok: bool, wrong: str) -> None:
    if not ok:
        raise ValueError(f"{wrong}; the files must belong together: copy all of them again")
