"""Runs one script where it can reach nothing; itself a script, started by `sandbox.run` with one argument, its plan.

Three processes. This one leaves for new namespaces (user, mount, process, network, IPC, host name, cgroup). Its child,
the first process in there, builds a root from what Python needs, read only, enters it, waits, and hands out the result.
The grandchild gives up every privilege and becomes the script. It reads `/job`, writes to `/tmp` and `/out`, which are
memory, and its result is `/out/result`. When the first process ends, the kernel ends all the others.

Only the standard library: the interpreter is that of the script's environment.
"""

import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any

REFUSED = 77  # exit status: the machine does not allow it; any other one than 0 is the script's failure
LOG_BYTES = 4000  # the end of the script's output, handed out when it fails

NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # CLONE_NEW*
READ_ONLY, NO_SETUID, NO_DEVICES, NO_PROGRAMS = 1, 2, 4, 8  # MS_*, and the same in statvfs
REMOUNT, BIND, RECURSIVE, PRIVATE = 32, 4096, 16384, 1 << 18  # MS_*
DETACH = 2  # MNT_DETACH
DEATH_SIGNAL, DROP_CAPABILITY, NO_NEW_PRIVILEGES = 1, 24, 38  # PR_*

NOBODY = 65534  # who the script is outside, if root starts it: limits on processes do not hold for root
SYSTEM = ("usr", "lib", "lib64", "lib32", "bin", "sbin")
FILES = ("/etc/ld.so.cache", "/proc/meminfo", "/proc/stat", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

libc = ctypes.CDLL(None, use_errno=True)


def main(plan: dict[str, Any]) -> int:
    """Run the plan; the exit status."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")  # out of memory: the kernel ends these processes first
        other_user = _leave()
        _die_with_parent()
    except OSError as error:
        print(error, file=sys.stderr)
        return REFUSED
    first = os.fork()
    if first == 0:
        status = REFUSED
        try:
            status = _first_process(plan, other_user)
        except OSError as error:
            print(error, file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return 1 if (status := os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])) < 0 else status


def _leave() -> bool:
    """New namespaces; whether a second user is known there."""
    owner, uid, gid = os.getpid(), os.geteuid(), os.getegid()
    other_user = uid == 0 and all(_is_mapped(f"/proc/self/{kind}_map", NOBODY) for kind in ("uid", "gid"))
    left, leave = os.pipe()
    helper = os.fork()
    if helper == 0:  # stays outside: only there may a second user be mapped
        os.close(leave)
        status = 1
        try:
            if os.read(left, 1):
                second = f"1 {NOBODY} 1\n" if other_user else ""
                if not other_user:
                    Path(f"/proc/{owner}/setgroups").write_text("deny")
                Path(f"/proc/{owner}/uid_map").write_text(f"0 {uid} 1\n{second}")
                Path(f"/proc/{owner}/gid_map").write_text(f"0 {gid} 1\n{second}")
                status = 0
        except OSError as error:
            print(error, file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    os.close(left)
    try:
        _check(libc.unshare(NAMESPACES), "unshare")
        os.write(leave, b".")
    finally:
        os.close(leave)
        _, status = os.waitpid(helper, 0)
    if status:
        raise OSError("the users of the new namespace could not be set")
    return other_user


def _is_mapped(file: str, number: int) -> bool:
    """Whether this user namespace knows a user or group."""
    ranges = [[int(n) for n in line.split()] for line in Path(file).read_text().splitlines()]
    return any(first <= number < first + count for first, _, count in ranges)


def _first_process(plan: dict[str, Any], other_user: bool) -> int:
    """Build the root, run the script in it, write its result to stdout or the end of its output to stderr."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process ignores what it does not handle
    with contextlib.suppress(OSError):  # one more lock; some containers have /proc/sys read only
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
    _build_root(plan)
    script = os.fork()
    if script == 0:
        try:
            _become_script(plan, other_user)
        except OSError as error:
            print(error, file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    ended = 0
    while ended != script:  # whatever else ends here has lost its parent
        ended, status = os.wait()
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    result = Path("/out/result")
    code = os.waitstatus_to_exitcode(status)
    if code == 0 and result.is_file():
        sys.stdout.buffer.write(result.read_bytes())
        return 0
    log = Path("/out/log")
    if log.exists():
        sys.stderr.write(log.read_bytes()[-LOG_BYTES:].decode(errors="replace"))
    print(f"exit status {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}", file=sys.stderr)
    return 1


def _build_root(plan: dict[str, Any]) -> None:
    """A root of memory that shows the system's programs and libraries, Python and the job, all read only."""
    root = plan["root"]
    memory = NO_SETUID | NO_DEVICES
    _mount(None, "/", None, RECURSIVE | PRIVATE)
    _mount("tmpfs", root, "tmpfs", memory, "size=1m,mode=755")
    for folder, size in (("/tmp", plan["scratch"]), ("/out", plan["scratch"]), ("/dev/shm", plan["scratch"])):
        os.makedirs(root + folder)
        _mount("tmpfs", root + folder, "tmpfs", memory, f"size={size},nr_inodes=65536,mode=1777")
    for name in SYSTEM:
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{root}/{name}")
        elif os.path.isdir(f"/{name}"):
            _show(root, f"/{name}", f"/{name}")
    for folder in sorted({sys.prefix, sys.base_prefix}):
        if not folder.startswith("/usr/") and folder != "/usr":
            _show(root, folder, folder)
    for file in FILES:
        if os.path.exists(file):
            _show(root, file, file)
    _show(root, plan["job"], "/job")
    os.chdir(root)
    _check(libc.pivot_root(b".", b"."), "pivot_root")
    _check(libc.umount2(b".", DETACH), "umount")  # the old root, which lies over the new one
    os.chdir("/tmp")
    _mount(None, "/", None, REMOUNT | BIND | READ_ONLY | memory)


def _show(root: str, source: str, place: str) -> None:
    """Show a file or folder, with all that is mounted below it, at `place` under the new root: read only."""
    target = root + place
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).touch()
    _mount(source, target, None, BIND | RECURSIVE)
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        point = os.fsdecode(re.sub(rb"\\(\d{3})", lambda octal: bytes([int(octal[1], 8)]), line.split()[4]))
        if point == target or point.startswith(target + "/"):
            kept = os.statvfs(point).f_flag & (NO_DEVICES | NO_PROGRAMS)  # a restriction cannot be lifted
            _mount(None, point, None, REMOUNT | BIND | READ_ONLY | NO_SETUID | kept)


def _become_script(plan: dict[str, Any], other_user: bool) -> None:
    """Limits, no privileges, and the script in place of this program; its output goes to the log."""
    log = os.open("/out/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for limit, value in (
        (resource.RLIMIT_AS, plan["memory"]),
        (resource.RLIMIT_FSIZE, plan["scratch"]),
        (resource.RLIMIT_NPROC, plan["processes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (lower, lower))
    for capability in range(64):
        libc.prctl(DROP_CAPABILITY, capability, 0, 0, 0)  # those that this kernel does not have fail
    if other_user:
        os.setgroups([])
        os.setresgid(1, 1, 1)
        os.setresuid(1, 1, 1)
    _check(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no new privileges")
    command = [sys.executable, "-I", f"/job/{plan['script']}", *plan["arguments"]]
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.execve(sys.executable, command, {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"})


def _die_with_parent() -> None:
    _check(libc.prctl(DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0), "prctl")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _check(libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def _check(returned: int, what: str) -> None:
    """Raise what the last call of the C library says."""
    if returned != 0:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    raise SystemExit(main(json.loads(sys.argv[1])))
