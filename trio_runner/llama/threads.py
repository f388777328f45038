"""How many threads a context computes with, unless it is told."""

from __future__ import annotations

import os
from pathlib import Path


def default_threads() -> tuple[int, int]:
    """Return the number of threads for decoding, and the number for prefill.

    Prefill gets one thread per physical core that this process may use, or as many as the container's CPU quota allows.
    Decoding gets one fewer. Its threads meet after every short operation and spin while they wait, so one core that is
    busy with something else, such as our own event loop, stalls all of them. On two cores, two threads decoded four
    streams 1.25 times as fast as one thread on an idle machine, and less than half as fast beside another busy process.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:  # not Linux: every CPU counts as a core
            cores.add(str(cpu))
    n_cores = len(cores)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            n_cores = min(n_cores, int(quota) // int(period))
    except (OSError, ValueError, ZeroDivisionError):
        pass
    return max(1, n_cores - 1), max(1, n_cores)
