"""What a checkpoint is: told by its small files, before torch is imported and a weight is read."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parablock.checkpoints.checks import (
    ADAPTER,
    ADAPTER_FIELDS,
    ADAPTER_TENSORS,
    check_directory,
    check_opens,
    in_one_line,
    read_json,
)
from parablock.checkpoints.gguf_header import check_gguf, gguf_in
from parablock.checkpoints.named import REMEDY, SMOLLM2_AR, location
from parablock.decoding.config import DecodeConfig, Mode

OFFICIAL = "Fast_dLLM_Qwen"  # model_type of the published checkpoints, all of them adapted


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint is, and what it says about block diffusion.

    `name`: as the user wrote it. `target`: a directory or a hub id. `base`: of an adapter. `draft_tokens`: of one of
    causal context, whose base stays the AR model that it is: how many masks it was trained to fill at once.
    `gguf`: whether the target is a GGUF file.
    """

    name: str
    target: str
    block_size: int | None
    mask_token_id: int | None
    base: "Checkpoint | None" = None
    draft_tokens: int | None = None
    gguf: bool = False

    @property
    def adapted(self) -> bool:
        """Whether it was made for block diffusion."""
        return self.block_size is not None and self.mask_token_id is not None

    def mode(self, config: DecodeConfig) -> Mode:
        """How it decodes with these settings.

        Raises:
            ValueError: block diffusion with a model that was never adapted to it, speculation with one that was.
        """
        if self.draft_tokens is not None:
            if config.mode == "diffusion":
                raise ValueError(
                    f"mode='diffusion': {self.name} drafts for an AR model, which verifies the drafts; leave --mode out"
                )
            return config.mode or "speculative"
        mask_token_id = self.mask_token_id if config.mask_token_id is None else config.mask_token_id
        named = config.block_size or self.block_size, mask_token_id
        if config.mode == "diffusion" and None in named:
            raise ValueError(
                f"mode='diffusion': {self.name} was never adapted to block diffusion; adapt it with: parablock adapt "
                f"{self.name}, or decode with --mode autoregressive"
            )
        adapted = self.block_size is not None and mask_token_id is not None
        if config.mode == "speculative" and adapted:
            raise ValueError(
                f"mode='speculative': {self.name} was adapted to block diffusion: its tokens see their whole block, "
                "and drafts are verified by an AR model; leave --mode out (--strategy verified "
                "verifies drafts in block diffusion), or name the AR checkpoint it was made from"
            )
        return config.mode or ("diffusion" if adapted else "autoregressive")


def look(path_or_id: str | Path, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint and read its small files; of one on the hub, the config is fetched.

    Raises:
        ValueError: there is none, or what is there is incomplete or damaged.
    """
    name = str(path_or_id)
    target = os.path.expanduser(location(name))
    path = Path(target)
    file = path if path.suffix == ".gguf" and path.is_file() else gguf_in(path) if path.is_dir() else None
    if file is not None:
        check_gguf(file)
        return Checkpoint(name, str(file), None, None, gguf=True)
    if path.is_dir():
        if (path / ADAPTER).is_file() and not (path / "config.json").is_file():
            return _look_at_adapter(name, path)
        check_directory(path)
        config = read_json(path / "config.json")
    elif path.exists() or target.startswith((".", "/", "~")) or target.count("/") > 1:
        what = "GGUF file" if path.suffix == ".gguf" else "checkpoint directory"
        raise ValueError(f"there is no {what} at {target!r}; check the path")
    else:
        config = _hub_config(name, target, revision)
    if config.get("model_type") == OFFICIAL:
        config = {"bd_size": 32, "mask_token_id": 151665} | config  # the published files lack the latter
    return Checkpoint(name, target, config.get("bd_size"), config.get("mask_token_id"))


def announce(checkpoint: Checkpoint, config: DecodeConfig) -> None:
    """Say in one line on stderr that a model decodes autoregressively though nobody asked for it.

    Raises:
        ValueError: a mode is asked for that the model does not have.
    """
    first = os.environ.get("RANK", "0") == "0"
    if checkpoint.mode(config) == "autoregressive" and config.mode is None and first:
        print(
            f"parablock: {checkpoint.name} was never adapted to block diffusion: it decodes autoregressively (adapt it "
            f"with: parablock adapt {checkpoint.name})",
            file=sys.stderr,
        )


def _look_at_adapter(name: str, path: Path) -> Checkpoint:
    if not (path / ADAPTER_TENSORS).is_file():
        raise ValueError(f"{str(path)!r} has no {ADAPTER_TENSORS}; save the adapter with safetensors")
    check_opens(path / ADAPTER_TENSORS)
    base_name = read_json(path / ADAPTER).get("base_model_name_or_path")
    if not base_name:
        raise ValueError(f"{str(path / ADAPTER)!r} names no base_model_name_or_path; add the base's path or id")
    if base_name.startswith(".") and (path / base_name).exists():
        base_name = os.path.normpath(path / base_name)  # beside the adapter, wherever both are moved
    try:
        base = look(base_name)
    except ValueError as error:
        raise ValueError(f"the base of {name}, which {str(path / ADAPTER)!r} names: {error}") from error
    fields = read_json(path / ADAPTER_FIELDS) if (path / ADAPTER_FIELDS).is_file() else {}
    if fields.get("context", "block") != "block":
        return Checkpoint(name, str(path), None, None, base, _draft_tokens(path / ADAPTER_FIELDS, fields, base))
    block_size = fields.get("bd_size") or base.block_size
    mask_token_id = base.mask_token_id if fields.get("mask_token_id") is None else fields["mask_token_id"]
    return Checkpoint(name, str(path), block_size, mask_token_id, base)


def _draft_tokens(file: Path, fields: dict[str, Any], base: Checkpoint) -> int:
    """Of an adapter of causal context; ValueError where its fields or its base are none of one."""
    if fields["context"] != "causal":
        raise ValueError(f"{str(file)!r} has context={fields['context']!r}, which is unknown; use 'causal' or 'block'")
    for field in ("draft_tokens", "mask_embeddings"):
        if not isinstance(fields.get(field), int) or fields[field] < 1:
            raise ValueError(
                f"{str(file)!r} has {field}={fields.get(field)!r}, which is not a number of masks; copy it again"
            )
    if base.base is not None or base.adapted:
        raise ValueError(
            f"{str(file)!r} has context='causal', and the base {base.name} was adapted itself; name the AR model that "
            "the adapter was trained on"
        )
    draft_tokens: int = fields["draft_tokens"]
    return draft_tokens


def _hub_config(name: str, target: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        with in_one_line(name):
            file = hf_hub_download(target, "config.json", revision=revision)
    except ValueError as error:
        if name != SMOLLM2_AR:
            raise
        raise ValueError(f"{name} is not here; get it with: {REMEDY}") from error
    return read_json(Path(file))
