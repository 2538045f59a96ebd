"""Settings of the whole process, made once by the command line before torch is imported.

The Python API makes none of them: a notebook's process belongs to the notebook.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TextIO

# How long a thread spins before it sleeps while it waits for the others. With GNU OpenMP's own 300,000
# turns, training on two cores next to three busy processes took twice as long as with 20,000; next to one,
# a tenth longer. Alone, 20,000 is within 2% of the default and no spinning at all takes half as long again.
_SPIN_TURNS = "20000"
# The variables by which a user may have chosen how threads wait: GNU's, OpenMP's, and LLVM's.
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
# The variables that choose the number of threads, of which a user may have set one.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Parameter numbers of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def prepare(env: MutableMapping[str, str] = os.environ) -> None:
    """Set what makes training fast, unless the user's environment says otherwise.

    Args:
        env: The environment, which OpenMP reads when torch is imported.
    """
    if not env.keys() & set(_WAITING):
        env["GOMP_SPINCOUNT"] = _SPIN_TURNS
    # cuBLAS's own choice of memory for its products lets their last bits differ between runs.
    env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    quota = _quota()
    if quota and not env.keys() & set(_THREADS) and quota < (os.cpu_count() or 1):
        env[_THREADS[0]] = str(quota)
    _keep_memory()


def _quota(root: Path = Path("/"), groups: str = "proc/self/cgroup") -> int | None:
    """Processors that the quota of this process's cgroups pays for, at least 1; None without a quota.

    A container with a quota sees every processor of its host, and is stopped for the rest of each period
    once its threads have used up the quota together.

    Args:
        root: The root of the file system.
        groups: The file that lists the process's cgroups.
    """
    least = None
    with suppress(OSError, ValueError):
        for line in (root / groups).read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            # A container sees its own cgroup as the mount's root, whatever the path says.
            for part in (path, *map(str, Path(path).parents), "/"):
                found = _processors(mount / part.lstrip("/"))
                if found is not None:
                    least = min(found, least or found)
    return least


def _processors(group: Path) -> int | None:
    """The processors that the quota of one cgroup pays for, at least 1; None without a quota."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError):
            quota, period = " ".join((group / name).read_text() for name in names).split()
            return max(1, round(int(quota) / int(period))) if quota not in ("max", "-1") else None
    return None


def _keep_memory() -> None:
    """Let malloc keep large freed blocks instead of returning them to the system.

    A training step frees and allocates the same large blocks every time. If they are returned, each is
    mapped and zeroed again, which was measured to cost as much as the arithmetic. With it torch's huge pages
    (THP_MEM_ALLOC_ENABLE) gain nothing: steps take as long, and 15 to 35% more memory. glibc only.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, 1 << 30)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_TOP_PAD, 16 << 20)


def leave(code: int) -> NoReturn:
    """End the process, without the interpreter's teardown if torch is loaded: that takes half a second.

    Threads are still joined, exit handlers run, and output is flushed. A process that is traced, profiled or
    interactive ends as usual.

    Args:
        code: The exit code.
    """
    if code == 141:
        # The pipe behind stdout is closed, and a flush would complain about it.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    if "torch" not in sys.modules or sys.getprofile() or sys.gettrace() or sys.flags.interactive:
        sys.exit(code)
    # The interpreter's own order.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    os._exit(code)


def _flush(stream: TextIO | None) -> None:
    """Write what is buffered; what cannot be written is dropped, or the interpreter would exit with 120."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except ValueError:
        pass  # It is closed.
