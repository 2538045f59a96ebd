"""Start a command as several processes on this computer, by the launcher of torchrun."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from quill.errors import ResourceError


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run the command in several processes until all have ended; if one fails, the others are ended.

    Args:
        count: Number of processes.
        arguments: The command's arguments, after the program's name.

    Returns:
        The exit code: of the first process that failed for a reason of its own, or 128 and the number of the
        signal that ended them.

    Raises:
        ResourceError: A process was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // count)))
    # The processes explain their failures themselves.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "quill", *arguments)
    except SignalException as e:
        return 128 + int(e.sigval)
    except ChildFailedError as e:
        codes = {rank: failure.exitcode for rank, failure in e.failures.items()}
        for rank, code in codes.items():
            if code < 0:
                raise ResourceError(
                    f"process {rank} of the run was killed by signal {-code}",
                    why="the others were ended; the last saved state is kept",
                    hint="repeat the command to resume",
                ) from None
        # A process whose peer has failed fails in turn, with the code of ResourceError.
        lost = ResourceError.exit_code
        return next((code for code in codes.values() if code != lost), lost)
    return 0


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
