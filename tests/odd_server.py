"""`parablock` on a device that can be made slow or useless: `python odd_server.py FOLDER serve ...`.

While FOLDER holds a file `slow` every forward takes a tenth of a second; while it holds `broken` every forward fails.
"""

import sys
import time
from pathlib import Path
from typing import Any

from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import Qwen2Model

from parablock.cli import main

folder = Path(sys.argv.pop(1))


def before(module: Any, _: Any) -> None:
    if isinstance(module, Qwen2Model):
        if (folder / "broken").exists():
            raise RuntimeError("device-side assert triggered\nand more lines of advice")
        if (folder / "slow").exists():
            time.sleep(0.1)


register_module_forward_pre_hook(before)
main()
