"""What can be told about a checkpoint before its weights are read: every refusal says what is wrong and what to do."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
# of an adapter, in PEFT's layout; the last: what PEFT's own files have no place for
ADAPTER = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
ADAPTER_FIELDS = "block_diffusion.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_directory(path: Path) -> None:
    """A config, and safetensors weights that are all there and open.

    Raises:
        ValueError: it is not so.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"{str(path)!r} has no config.json; point to a checkpoint in transformers' layout")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        if pickles:
            raise ValueError(
                f"{str(path)!r} holds pickled weights ({pickles[0]}), which can run code when they are opened and are "
                "never read here; if you trust them, convert them once with transformers: "
                "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
            )
        raise ValueError(f"{str(path)!r} has no .safetensors weights; download or copy the whole checkpoint")
    if (path / INDEX).is_file():
        shards = set(read_json(path / INDEX).get("weight_map", {}).values())
        missing = sorted(shard for shard in shards if not (path / shard).is_file())
        if missing:
            raise ValueError(
                f"{str(path)!r} lacks {len(missing)} of the {len(shards)} weight files that its index names "
                f"(first: {missing[0]}); download or copy them, too"
            )
    for file in weights:
        check_opens(file)


def check_opens(file: Path) -> None:
    """ValueError unless a safetensors file is whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is truncated or damaged ({error}); download or copy it again") from error


def check_architecture(config: Any, name: str) -> None:
    """A decoder-only language model whose layers see all before them or a window of it.

    Raises:
        ValueError: an encoder, an encoder-decoder, or layers that block diffusion cannot run.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    from parablock.diffusion.support import require_supported_layers

    kind = type(config)
    # transformers loads BERT as a causal model, too, but it was not trained as one
    if config.is_encoder_decoder or kind in MODEL_FOR_MASKED_LM_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{name} is a {config.model_type} model, not a decoder-only language model; use an autoregressive one"
        )
    if config.get_text_config() is not config:
        raise ValueError(f"{name} is a {config.model_type} model of text and more; use a language model of text alone")
    require_supported_layers(config)


def check_loaded(name: str, model: Any, info: dict[str, Any]) -> None:
    """Every tensor came from the checkpoint, in its shape (`info` is transformers' report); masks reach the attention.

    Raises:
        ValueError: tensors that do not fit, or that are not in the checkpoint (transformers would leave them random),
            or an attention that block diffusion cannot use.
    """
    from parablock.diffusion.support import require_open_attention

    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        key, found, wanted = mismatched[0]
        raise ValueError(
            f"{name}: {len(mismatched)} tensors do not have the shapes that config.json asks for (first: {key} is "
            f"{list(found)}, expected {list(wanted)}); config and weights must belong together"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} tensors of a {type(model).__name__} are not in the checkpoint (first: "
            f"{missing[0]}); copy all its weight files, or correct config.json"
        )
    require_open_attention(model)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; ValueError if it is not one."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); download or copy it again") from error
    return content


def read_tensors(file: Path) -> dict[str, Any]:
    """All tensors of a safetensors file; ValueError if it is damaged."""
    check_opens(file)
    from safetensors.torch import load_file

    return dict(load_file(file))


@contextmanager
def in_one_line(name: str) -> Iterator[None]:
    """The first line of what the libraries say, as a ValueError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ImportError, RuntimeError, SafetensorError, StrictDataclassError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        raise ValueError(
            f"{name} could not be loaded ({reason}); pass a directory in transformers' layout with "
            "safetensors weights, or an id that is on the hub or in its local cache"
        ) from error
