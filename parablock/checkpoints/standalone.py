"""The decoder as a checkpoint's remote code: parablock's own files, flat, with relative imports.

Nothing is written twice: the files are those of this package that `custom_generate` needs, found by their imports.
"""

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
MODULE = "modeling_block_diffusion"
CLASS = "BlockDiffusionForCausalLM"
START = "parablock.decoding.transformers_generate"
IMPORT = re.compile(r"^( *)from (parablock\.[\w.]+) import", re.MULTILINE)

MODELING = '''"""A stock {stock} whose `generate` decodes by block diffusion."""

from typing import Any

from transformers import {stock}

from .{hook} import custom_generate


class {name}({stock}):
    """`{stock}` in everything but `generate`."""

    def generate(self, inputs: Any = None, **kwargs: Any) -> Any:
        """As transformers' `generate`, with the keywords of `custom_generate`."""
        return super().generate(inputs, **{{"custom_generate": custom_generate, **kwargs}})
'''


def write_code(directory: Path, stock_class: str) -> None:
    """Write the decoder's files to `directory`, and a model class over transformers' `stock_class` that uses them."""
    pending, done = [START], set[str]()
    while pending:
        module = pending.pop()
        if module in done:
            continue
        done.add(module)
        source = (PACKAGE.parent / (module.replace(".", "/") + ".py")).read_text()
        pending += [found for _, found in IMPORT.findall(source)]
        flat = IMPORT.sub(lambda m: f"{m[1]}from .{_flat(m[2])} import", source)
        (directory / f"{_flat(module)}.py").write_text(flat)
    text = MODELING.format(stock=stock_class, name=CLASS, hook=_flat(START))
    (directory / f"{MODULE}.py").write_text(text)


def _flat(module: str) -> str:
    """`parablock.decoding.cache` -> `decoding_cache`."""
    return module.removeprefix("parablock.").replace(".", "_")
