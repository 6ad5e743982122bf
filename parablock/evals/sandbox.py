"""Runs a Python script that nobody has read: without network, without the machine's files, within limits.

What holds inside, for the script and all that it starts:

- no network, not even this machine's own addresses; no other process of this machine can be seen or signalled;
- the system's programs and libraries, Python, and the job's files can be read; no home folder, no project, no other
  file exists there. Nothing of this machine can be written: `/tmp` is memory, bounded, and gone afterwards;
- none of this process's environment variables, no privileges, no set-user-ID programs, no new user namespaces;
- bounds on the memory of one process, on processes, on files, on time; when the time is over, everything is ended.

What it does not protect against: a fault of the Linux kernel, which is shared; the use of all processors until the time
is over; scripts and answers of the same run that harm each other.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from parablock.evals import confine

MEBIBYTE = 1 << 20


def run(
    python: Path,
    script: Path,
    arguments: Sequence[str],
    files: Mapping[str, bytes],
    *,
    memory: int,
    seconds: float,
    processes: int,
    scratch: int = 512 * MEBIBYTE,
) -> bytes:
    """Run `script` by the interpreter `python`; what it has written to `/out/result`.

    Args:
        python: An interpreter; only its own environment can be imported.
        script: Is `/job/<its name>` inside.
        arguments: The script's.
        files: Name and content; inside, they are in `/job`.
        memory: Bytes that one process may have (of address space).
        seconds: When they are over, all is ended.
        processes: How many may run at once, threads included.
        scratch: Bytes that `/tmp`, `/out` and `/dev/shm` hold, each; no file is larger.

    Raises:
        ValueError: no Linux, or one that refuses the sandbox; the time is over; the script failed (with the end of
            its output).
    """
    if sys.platform != "linux":
        raise ValueError(f"the sandbox needs Linux, and this is {sys.platform}; run it there, or in a virtual machine")
    with tempfile.TemporaryDirectory(prefix="parablock-sandbox-") as folder:
        job, root = Path(folder, "job"), Path(folder, "root")
        root.mkdir()
        job.mkdir()
        job.chmod(0o755)
        for name, content in {**files, script.name: script.read_bytes()}.items():
            (job / name).write_bytes(content)
            (job / name).chmod(0o644)
        plan = {
            "root": str(root.resolve()),
            "job": str(job.resolve()),
            "script": script.name,
            "arguments": list(arguments),
            "memory": memory,
            "processes": processes,
            "scratch": scratch,
        }
        try:
            done = subprocess.run(
                [python, "-I", confine.__file__, json.dumps(plan)],
                env={},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"{script.name} took longer than seconds={seconds:g} and was ended; allow more") from None
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode == confine.REFUSED:
        raise ValueError(
            f"this machine refuses the sandbox ({said}), and unread code is not run without one; allow unprivileged "
            "user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
            "kernel.apparmor_restrict_unprivileged_userns), start the container with a seccomp profile that permits "
            "unshare and mount, or run this step on another machine"
        )
    if done.returncode != 0:
        raise ValueError(f"{script.name} failed in the sandbox; the end of its output:\n{said}")
    return done.stdout
