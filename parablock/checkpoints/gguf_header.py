"""The head of a GGUF file: what it says about itself and its tensors. No tensor is read, and no list of words."""

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from parablock.settings import require_library

# those of docs/architectures.md whose GGUF transformers reads; Mistral and SmolLM are "llama" there, too
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "phi3", "gpt2", "starcoder2", "gemma2", "gemma3")
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
BIASED = ("qwen2", "gpt2", "starcoder2")  # their linear layers have biases
MERGE = "merge them first with llama.cpp: llama-gguf-split --merge FIRST_PART MERGED.gguf"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9  # kinds of values; the others are numbers
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Tensor:
    """A tensor's name, its kind (a number of ggml's) and where its bytes begin in the data."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """`fields`: what the file says about itself; of a list of strings only the length."""

    fields: dict[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it."""
        return str(self.fields["general.architecture"])

    def own(self, name: str) -> Any:
        """A field of the architecture's; None where there is none."""
        return self.fields.get(f"{self.architecture}.{name}")


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file of a directory that is no checkpoint in another layout; None where there is none.

    Raises:
        ValueError: there are several.
    """
    if (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        return None
    files = sorted(file for file in folder.glob("*.gguf") if file.is_file())
    for file in files:
        _refuse_part(file)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{str(folder)!r} holds {len(files)} GGUF files ({names}); name one of them")
    return files[0] if files else None


def check_gguf(file: Path) -> Header:
    """The head of a GGUF file that can be loaded.

    Raises:
        ValueError: a file that is damaged or cut off, or one that cannot be loaded: of another architecture, a part of
            several, without a tokenizer; the library is missing.
    """
    require_library("gguf", "gguf")
    name = repr(str(file))
    _refuse_part(file)
    header = read_header(file)
    architecture = header.fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{name} is a GGUF of architecture {architecture!r}, which cannot be loaded; these can: "
            f"{', '.join(ARCHITECTURES)}"
        )
    if header.fields.get("split.count", 1) > 1:
        raise ValueError(f"{name} is one of {header.fields['split.count']} parts; {MERGE}")
    if header.fields.get("general.type", "model") != "model":
        raise ValueError(f"{name} is a GGUF of type {header.fields['general.type']!r}; name the one of the model")
    if not header.fields.get("tokenizer.ggml.tokens"):
        raise ValueError(f"{name} has no tokenizer in it (tokenizer.ggml.tokens); take a GGUF that has one")
    try:
        _refuse_unread(name, header)
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{name} does not say its shape ({error}); download or copy it again") from error
    return header


def _refuse_part(file: Path) -> None:
    if found := PART.search(file.name):
        raise ValueError(f"{str(file)!r} is part {int(found[1])} of {int(found[2])} of a GGUF; {MERGE}")


def _refuse_unread(name: str, header: Header) -> None:
    """ValueError for what transformers would leave out in silence: the answers would be others."""
    stretched, heads = header.own("rope.scaling.type"), header.own("attention.head_count")
    head = header.own("attention.key_length") or int(header.own("embedding_length")) // int(heads)
    turned = header.own("rope.dimension_count") or head
    names = [tensor.name for tensor in header.tensors]
    biases = [] if header.architecture in BIASED else [tensor for tensor in names if tensor.endswith(".bias")]
    unread = {
        f"positions stretched by {stretched!r}": stretched not in (None, "none", "linear"),
        "positions stretched by rope_factors": any(tensor.startswith("rope_factors") for tensor in names),
        f"positions in {turned} of a head's {head} dimensions": turned != head,
        "experts (Mixtral)": header.architecture == "llama" and bool(header.own("expert_count")),
        f"biases ({', '.join(biases[:1])})": bool(biases),
    }
    for what, found in unread.items():
        if found:
            raise ValueError(f"{name} has {what}, which is not read from a GGUF; load the model's safetensors files")


def read_header(file: Path) -> Header:
    """The head of any GGUF file.

    Raises:
        ValueError: it is empty, none, damaged or cut off.
    """
    again = "download or copy it again"
    size = file.stat().st_size
    if size == 0:
        raise ValueError(f"{str(file)!r} is empty; {again}")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError(f"{str(file)!r} is not a GGUF file, whatever its name says; {again}")
        try:
            reader = _Reader(data)
            header = reader.header()
            needed = reader.end_of(header)
        except (struct.error, UnicodeDecodeError, KeyError, IndexError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{str(file)!r} is truncated or damaged ({error}); {again}") from error
    if needed > size:
        raise ValueError(f"{str(file)!r} is truncated: it has {size} bytes of {needed}; {again}")
    return header


class _Reader:
    """Reads on from `at`; struct.error where the file ends too early."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 4

    def header(self) -> Header:
        version, tensors, fields = self.numbers("IQQ")
        if version not in VERSIONS:
            raise struct.error(f"version {version}, where {' or '.join(map(str, VERSIONS))} are known")
        found = {}
        for _ in range(fields):
            name = self.string()
            found[name] = self.value(self.numbers("I")[0])
        return Header(found, tuple(self.tensor() for _ in range(tensors)))

    def end_of(self, header: Header) -> int:
        """Where the last tensor ends."""
        from gguf import GGML_QUANT_SIZES

        alignment = header.fields.get("general.alignment", 32)
        start, end = -(-self.at // alignment) * alignment, self.at
        for tensor in header.tensors:
            if tensor.kind not in GGML_QUANT_SIZES:
                raise struct.error(f"{tensor.name} is of kind {tensor.kind}, which the library gguf does not know")
            values, width = GGML_QUANT_SIZES[tensor.kind]  # type: ignore[index]
            end = max(end, start + tensor.offset + prod(tensor.shape) // values * width)
        return end

    def tensor(self) -> Tensor:
        name = self.string()
        (dimensions,) = self.numbers("I")
        if dimensions > 8:
            raise struct.error(f"{name} has {dimensions} dimensions")
        shape = self.numbers(f"{dimensions}Q")
        kind, offset = self.numbers("IQ")
        return Tensor(name, shape, kind, offset)

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.numbers(NUMBERS[kind])[0]
        kind, count = self.numbers("IQ")
        if kind == STRING:
            for _ in range(count):
                (length,) = self.numbers("Q")
                self.at += length
            return count
        if count > len(self.data):
            raise struct.error(f"a list of {count} values")
        return self.numbers(f"{count}{NUMBERS[kind]}")

    def string(self) -> str:
        (length,) = self.numbers("Q")
        self.at += length
        if self.at > len(self.data):
            raise struct.error("the file ends within a text")
        return self.data[self.at - length : self.at].decode()

    def numbers(self, layout: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{layout}", self.data, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return found
