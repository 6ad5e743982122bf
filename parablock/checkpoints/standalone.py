"""The decoder as a checkpoint's remote code: parablock's own files, flat, with relative imports.

Nothing is written twice: the files are those of this package that `custom_generate` and an adapter need, found by their
imports.
"""

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
MODULE = "modeling_block_diffusion"
CLASS = "BlockDiffusionForCausalLM"
START = "parablock.decoding.transformers_generate"
ADAPTER_START = "parablock.checkpoints.adapter"
IMPORT = re.compile(r"^( *)from (parablock\.[\w.]+) import", re.MULTILINE)

MODELING = '''"""A stock {stock} whose `generate` decodes several tokens per forward."""

from typing import Any

from transformers import {stock}

from .{hook} import custom_generate


class {name}({stock}):
    """`{stock}` in everything but `generate`."""

    def generate(self, inputs: Any = None, **kwargs: Any) -> Any:
        """As transformers' `generate`, with the keywords of `custom_generate`."""
        return super().generate(inputs, **{{"custom_generate": custom_generate, **kwargs}})
'''

ATTACHING = """
    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        \"\"\"The model with the adapter in the checkpoint's `adapter` folder attached.\"\"\"
        from .{adapter} import attach_published

        loaded = super().from_pretrained(name, *args, **kwargs)
        attach_published(loaded[0] if isinstance(loaded, tuple) else loaded, name, **kwargs)
        return loaded
"""


def write_code(directory: Path, stock_class: str, *, adapter: bool) -> None:
    """Write the decoder's files to `directory`, and a model class over transformers' `stock_class` that uses them.

    `adapter`: the checkpoint has one in its folder `adapter`, which that class attaches.
    """
    pending, done = [START, *([ADAPTER_START] if adapter else [])], set[str]()
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
    if adapter:
        text += ATTACHING.format(adapter=_flat(ADAPTER_START))
    (directory / f"{MODULE}.py").write_text(text)


def _flat(module: str) -> str:
    """`parablock.decoding.cache` -> `decoding_cache`."""
    return module.removeprefix("parablock.").replace(".", "_")
