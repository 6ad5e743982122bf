"""Write a block-diffusion checkpoint for others: as a stock one, in the published layout, or with its decoder in it."""

import copy
import json
from pathlib import Path
from typing import Any, Literal, cast, get_args

from parablock.checkpoints.adapter import gate_tensors, write_gate
from parablock.checkpoints.load import load
from parablock.checkpoints.look import OFFICIAL, Checkpoint
from parablock.checkpoints.save import new_directory, require_new
from parablock.checkpoints.standalone import CLASS, MODULE, write_code
from parablock.diffusion.gate import GATE, Gate, gate_of
from parablock.packed import unpack
from parablock.settings import Model

Layout = Literal["stock", "official", "standalone"]
FIELDS = ("bd_size", "mask_token_id")


def export(model: Model, tokenizer: Any, path: str | Path, layout: Layout = "stock") -> None:
    """Write model and tokenizer to the new directory `path`, whole or not at all.

    Layouts:
        stock: the architecture's own files, with `bd_size` and `mask_token_id` in the config. What parablock works
            with; everything else sees an ordinary checkpoint.
        official: the layout of the published Fast-dLLM v2 checkpoints (`Fast_dLLM_QwenForCausalLM`), for engines that
            read it. Qwen2 architectures only.
        standalone: the stock layout and parablock's decoder as remote code, so that `generate` decodes by block
            diffusion where parablock is not installed (`trust_remote_code=True`). Without that consent it is stock.

    Weights keep their dtype, bit for bit. LoRA adapters (a `PeftModel`) are merged into a copy. A gate, which drafts
    for an AR model, is not merged: it is written into the folder `adapter` of its base, and finds it there wherever
    both are moved; standalone attaches it. It has no official layout.

    Raises:
        ValueError: an unknown layout, one that does not fit the model, no block size or mask token, or `path` is taken.
    """
    require_layout(layout)
    gate = gate_of(model)
    model = _merged(model)
    config = model.config
    for name in FIELDS if gate is None else ():
        if getattr(config, name, None) is None:
            raise ValueError(f"the model's config has no {name}: there is no block-diffusion model to export; adapt it")
    _require_fits(layout, drafts=gate is not None)
    if layout == "official" and config.model_type not in ("qwen2", OFFICIAL):
        raise ValueError(f"a {config.model_type} model has no official layout (Qwen2 only); use stock or standalone")
    with new_directory(path) as whole:
        model.save_pretrained(whole, state_dict=_without_gate(model))
        tokenizer.save_pretrained(whole)
        if gate is not None:
            (whole / "adapter").mkdir()
            write_gate(whole / "adapter", model, gate, gate_tensors(gate), "..")
        written = _official_config(config) if layout == "official" else _stock_config(config)
        if layout == "standalone":
            written["auto_map"] = {"AutoModelForCausalLM": f"{MODULE}.{CLASS}"}
            write_code(whole, written["architectures"][0], adapter=gate is not None)
        (whole / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
        (whole / "README.md").write_text(_card(layout, config) if gate is None else _drafting_card(layout, gate))


def export_checkpoint(checkpoint: Checkpoint, path: Path, layout: str) -> None:
    """Load a checkpoint and export it; wrong arguments are told before its weights are read.

    Raises:
        ValueError: as `export`, and for a checkpoint that was never adapted.
    """
    known = require_layout(layout)
    require_new(path)
    _require_fits(known, drafts=checkpoint.draft_tokens is not None)
    if not checkpoint.adapted and checkpoint.draft_tokens is None:
        raise ValueError(
            f"{checkpoint.name} was never adapted to block diffusion, so there is nothing to export; adapt it with: "
            f"parablock adapt {checkpoint.name}"
        )
    export(*load(checkpoint.name, dtype="auto", device="cpu", packed=False), path, known)


def require_layout(name: str) -> Layout:
    """The layout of that name; ValueError if there is none."""
    if name not in get_args(Layout):
        raise ValueError(f"layout={name!r} is unknown; use {', '.join(get_args(Layout))}")
    return cast(Layout, name)


def _require_fits(layout: Layout, *, drafts: bool) -> None:
    if layout == "official" and drafts:
        raise ValueError("layout='official' has no place for an adapter that drafts; use stock or standalone")


def _without_gate(model: Model) -> dict[str, Any]:
    """The tensors of a model itself."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{GATE}.")}


def _merged(model: Model) -> Model:
    """A stock model: LoRA weights added to those they adapt."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("the model carries an adapter of its own; load the adapter's directory with parablock.load")
    if hasattr(model, "merge_and_unload"):
        own = copy.deepcopy(model)
        unpack(own)
        return own.merge_and_unload()
    return model


def _stock_config(config: Any) -> dict[str, Any]:
    """`config.json` of the architecture itself, with the two fields of block diffusion, if it has them, and no code."""
    written: dict[str, Any] = json.loads(config.to_json_string())
    if config.model_type == OFFICIAL:
        written |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    written.pop("auto_map", None)
    return written | {name: getattr(config, name) for name in FIELDS if hasattr(config, name)}


def _official_config(config: Any) -> dict[str, Any]:
    """As published, in the words of transformers 4, which the engines that read this layout use."""
    written = _stock_config(config) | {"model_type": OFFICIAL, "architectures": [f"{OFFICIAL}ForCausalLM"]}
    rope = written.pop("rope_parameters")
    written["rope_theta"] = rope.pop("rope_theta")
    written["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    written["torch_dtype"] = written.pop("dtype")
    return written


USAGE = {
    "stock": """```python
import parablock as pb

model, tokenizer = pb.load("THIS_DIRECTORY")
out = pb.generate(model, prompt_ids, pb.DecodeConfig(threshold=0.9))
```""",
    "official": """```python
import parablock  # or an engine that knows Fast_dLLM_QwenForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")
ids = model.generate(prompt_ids, max_new_tokens=512, small_block_size=8, threshold=0.9)
```""",
    "standalone": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)
ids = model.generate(prompt_ids, max_new_tokens=512, threshold=0.9, sub_block_size=8)
```

The Python files are parablock's decoder (Apache-2.0); transformers 5.17 or newer runs it.""",
}


def _card(layout: Layout, config: Any) -> str:
    return f"""# A block-diffusion language model

Decodes several tokens per forward (block size {config.bd_size}, mask token {config.mask_token_id}). Made with
parablock, layout `{layout}`.

{USAGE[layout]}
"""


DRAFTING = {
    "stock": """```python
import parablock as pb

model, tokenizer = pb.load("THIS_DIRECTORY/adapter")  # the model with the adapter on it
out = pb.generate(model, prompt_ids)
```""",
    "standalone": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)
ids = model.generate(prompt_ids, max_new_tokens=512)
```

The Python files are parablock's decoder (Apache-2.0); transformers 5.17 or newer runs it.""",
}


def _drafting_card(layout: Layout, gate: Gate) -> str:
    return f"""# A language model that drafts what it verifies

An autoregressive model, unchanged, and in `adapter/` what drafts up to {gate.draft_tokens} tokens for it in the forward
that verifies the drafts before them: the same answers in fewer forwards. Without the adapter it is an ordinary
checkpoint. Made with parablock, layout `{layout}`.

{DRAFTING[layout]}
"""
