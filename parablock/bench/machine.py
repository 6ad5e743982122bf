"""Which machine a figure was measured on."""

import platform
from pathlib import Path


def processor() -> str:
    """The processor's own name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
