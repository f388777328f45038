"""What a process on this machine holds, as /proc tells on Linux. Elsewhere all functions return None."""

from __future__ import annotations

import ipaddress
import os
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

LOOK_SECONDS: Final = 0.001
"""Seconds between two looks at the memory of this process."""

_PROC = Path("/proc")
_LISTENING = "0A"


@dataclass(frozen=True, slots=True)
class Holdings:
    """Threads, open descriptors and memory of a process."""

    threads: int
    descriptors: int
    memory: float
    """MiB of anonymous memory. The mapped part of the model's file varies and does not count."""


def holdings(pid: int) -> Holdings | None:
    """What the process holds. None if it has ended, or belongs to another user."""
    try:
        status = (_PROC / str(pid) / "status").read_text()
        n_descriptors = len(os.listdir(_PROC / str(pid) / "fd"))
    except OSError:
        return None
    fields = dict(re.findall(r"^(\w+):\s+(\d+)", status, re.MULTILINE))
    if "RssAnon" not in fields:  # the process has ended, but its parent has not waited for it
        return None
    return Holdings(int(fields["Threads"]), n_descriptors, int(fields["RssAnon"]) / 1024)


class PeakMemory:
    """The largest `Holdings.memory` of this process while a block ran, by looks a millisecond apart."""

    def __init__(self) -> None:
        self.largest = 0.0
        """MiB. 0 where it cannot be seen."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        ends = False
        while not ends:
            ends = self._over.wait(LOOK_SECONDS)  # so the last look is at the end
            now = holdings(os.getpid())
            self.largest = max(self.largest, 0.0 if now is None else now.memory)


def cpu_seconds(pid: int) -> float | None:
    """Seconds that cores have spent on the process so far, to the hundredth. None if it cannot be seen."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def foreign_seconds(pids: Iterable[int | None]) -> float | None:
    """Seconds that the cores of this machine have spent on other processes than these, since an unknown moment.

    Only differences are of use. None if it cannot be seen, or one of `pids` is None.
    """
    try:
        user, nice, system, _, _, *others = map(int, (_PROC / "stat").read_text().partition("\n")[0].split()[1:9])
    except (OSError, ValueError):
        return None
    spent = [None if pid is None else cpu_seconds(pid) for pid in dict.fromkeys(pids)]
    ours = sum(seconds for seconds in spent if seconds is not None)
    if None in spent:
        return None
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK") - ours


def listener(host: str, port: int) -> int | None:
    """The process that listens on `port` of this machine. None if `host` is another machine, or it is not found."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    inodes = {inode for table in ("tcp", "tcp6") for inode in _listening(_PROC / "net" / table, port)} if local else ()
    if not inodes:
        return None
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in _PROC.glob("[0-9]*"):
        try:
            if any(os.readlink(link) in wanted for link in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:
            continue  # it has ended meanwhile, or belongs to another user
    return None


def _listening(table: Path, port: int) -> list[str]:
    try:
        rows = table.read_text().splitlines()[1:]
    except OSError:
        return []
    fields = [row.split() for row in rows]
    return [row[9] for row in fields if row[3] == _LISTENING and int(row[1].rpartition(":")[2], 16) == port]
