"""GGUF checkpoints: dequantised once by transformers, and kept as safetensors in the user's cache folder."""

import functools
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parablock.cached import cache_folder, cached_directory
from parablock.checkpoints.checks import check_architecture, check_loaded, in_one_line
from parablock.checkpoints.gguf_header import Header, check_gguf
from parablock.settings import Model

VERSION = 1  # of what is written below; entries of another are made again
DTYPES = ("float32", "bfloat16", "float16")
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone")  # tokenizers that split numbers
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose scores have a scale of their own


def converted(file: Path, dtype: Any) -> Path:
    """The directory with a GGUF file's model and tokenizer in transformers' layout, made on first use.

    Args:
        file: the GGUF file.
        dtype: a torch dtype, or "auto": bfloat16.

    Raises:
        ValueError: a file that cannot be loaded, or a dtype that its weights are not made in.
    """
    name = "bfloat16" if dtype == "auto" else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: a GGUF is read in one of {', '.join(DTYPES)}")
    header, stat = check_gguf(file), file.stat()
    told = (str(file.resolve()), stat.st_size, stat.st_mtime_ns, name, VERSION)
    digest = hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def make(folder: Path) -> None:
        print(f"parablock: reading {file.name} (once; it is kept in {place})", file=sys.stderr, flush=True)
        _convert(file, header, name, folder)

    place = cache_folder() / "gguf"
    return cached_directory(place, f"{digest}-{name}-{file.stem[:60]}", make)


def _convert(file: Path, header: Header, dtype: str, folder: Path) -> None:
    """Write model and tokenizer to `folder`."""
    import torch
    import transformers

    name = str(file)
    _require_readable(name, header)
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # without it nothing else is done than to dequantise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _quiet():
        with in_one_line(name):
            config = transformers.AutoConfig.from_pretrained(**source)
            _complete(config, header, file)
        check_architecture(config, name)
        with in_one_line(name):
            tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                config=config, dtype=getattr(torch, dtype), output_loading_info=True, ignore_mismatched_sizes=True,
                **options, **source,
            )  # fmt: skip
        model, info = loaded
        check_loaded(name, model, info)
        _as_any_other(model, header)
        if header.fields.get("tokenizer.ggml.pre") in SINGLE_DIGITS:
            _split_numbers(tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _require_readable(name: str, header: Header) -> None:
    """ValueError for a kind of quantisation that cannot be undone."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    for kind in sorted({tensor.kind for tensor in header.tensors}):
        kind_ = GGMLQuantizationType(kind)
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind_][1]), dtype=np.uint8), kind_)
        except NotImplementedError:
            raise ValueError(
                f"{name} has weights of type {kind_.name}, which cannot be dequantised; take one of another, such as "
                "Q8_0 or Q4_K_M"
            ) from None


def _complete(config: Any, header: Header, file: Path) -> None:
    """What the file says and transformers does not take over."""
    rope = getattr(config, "rope_parameters", None)  # GPT-2 has none
    if rope is not None:
        rope = rope.get("full_attention", rope)
        rope["rope_theta"] = header.own("rope.freq_base") or rope["rope_theta"]
        if header.own("rope.scaling.type") == "linear":
            rope |= {"rope_type": "linear", "factor": header.own("rope.scaling.factor")}
        if any(tensor.name == "rope_freqs.weight" for tensor in header.tensors):
            rope |= _each_frequency(file, config.max_position_embeddings)
    if header.architecture == "phi3":
        config.sliding_window = header.own("attention.sliding_window")
    if header.architecture == "gpt2":
        config.n_positions, config.n_inner = header.own("context_length"), header.own("feed_forward_length")
    if header.architecture == "qwen3moe":
        config.moe_intermediate_size = header.own("expert_feed_forward_length") or config.moe_intermediate_size
    if LARGEST_GEMMA.get(header.architecture) == header.own("block_count"):
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


def _each_frequency(file: Path, context: int) -> dict[str, Any]:
    """Llama 3's positions, whose frequencies are each divided by a factor of its own, as a kind that takes factors."""
    from gguf import GGUFReader

    (factors,) = (t.data.tolist() for t in GGUFReader(file).tensors if t.name == "rope_freqs.weight")
    return {
        "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0,
        "attention_factor": 1.0, "original_max_position_embeddings": context,
    }  # fmt: skip


def _as_any_other(model: Model, header: Header) -> None:
    """A model that is saved like one that came from elsewhere, with all tokens that end an answer."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    names = {"eos_token_id", "eot_token_id"}
    ends = {header.fields[f"tokenizer.ggml.{name}"] for name in names if f"tokenizer.ggml.{name}" in header.fields}
    if len(ends) > 1:
        model.config.eos_token_id = model.generation_config.eos_token_id = sorted(ends)


def _split_numbers(tokenizer: Any) -> None:
    """Digits stand alone before anything else is split, which transformers leaves out."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, no progress bars: neither transformers' own nor those of its GGUF reader, which has no switch."""
    import transformers
    from tqdm.std import tqdm

    logging: Any = transformers.utils.logging
    level, begin = logging.get_verbosity(), tqdm.__init__
    logging.set_verbosity_error()
    tqdm.__init__ = functools.partialmethod(begin, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = begin
        logging.set_verbosity(level)
