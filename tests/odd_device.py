"""`parablock` on a device that can be made slow or useless."""

import time
from pathlib import Path
from typing import Any

from processes import command


def odd_device(folder: str, arguments: list[str]) -> None:
    """The command. While `folder` holds a file `slow` a forward takes a tenth of a second; with `broken` it fails."""
    from torch.nn.modules.module import register_module_forward_pre_hook
    from transformers import Qwen2Model

    def before(module: Any, _: Any) -> None:
        if isinstance(module, Qwen2Model):
            if (Path(folder) / "broken").exists():
                raise RuntimeError("device-side assert triggered\nand more lines of advice")
            if (Path(folder) / "slow").exists():
                time.sleep(0.1)

    register_module_forward_pre_hook(before)
    command(arguments)
