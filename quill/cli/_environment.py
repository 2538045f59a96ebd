"""Settings of the whole process, made once by the command line before torch is imported.

The Python API makes none of them: a notebook's process belongs to the notebook.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import MutableMapping

# How long a thread spins before it sleeps while it waits for the others. With GNU OpenMP's own 300,000
# turns, training on two cores next to three busy processes took twice as long as with 20,000; next to one,
# a tenth longer. Alone, 20,000 is within 2% of the default and no spinning at all takes half as long again.
_SPIN_TURNS = "20000"
# Parameter numbers of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def prepare(env: MutableMapping[str, str] = os.environ) -> None:
    """Set what makes training fast, unless the user's environment says otherwise.

    Args:
        env: The environment, which OpenMP reads when torch is imported.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & env.keys():
        env["GOMP_SPINCOUNT"] = _SPIN_TURNS
    _keep_memory()


def _keep_memory() -> None:
    """Let malloc keep large freed blocks instead of returning them to the system.

    A training step frees and allocates the same large blocks every time. If they are returned, each is
    mapped and zeroed again, which was measured to cost as much as the arithmetic. glibc only.
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
