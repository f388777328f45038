"""What a process on this machine holds, from /proc; nothing where there is no such thing."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_LISTENING = "0A"


@dataclass(frozen=True, slots=True)
class Holdings:
    threads: int
    descriptors: int
    memory: float
    """MiB of its own: not the model's file, of which more or less is mapped as it happens."""


def holdings(pid: int) -> Holdings | None:
    """None if the process is gone, or not ours to look at."""
    try:
        status = (_PROC / str(pid) / "status").read_text()
        n_descriptors = len(os.listdir(_PROC / str(pid) / "fd"))
    except OSError:
        return None
    fields = dict(re.findall(r"^(\w+):\s+(\d+)", status, re.MULTILINE))
    if "RssAnon" not in fields:  # a zombie
        return None
    return Holdings(int(fields["Threads"]), n_descriptors, int(fields["RssAnon"]) / 1024)


def foreign_seconds(pids: Iterable[int | None]) -> float | None:
    """Seconds, since some moment, that the cores of this machine have spent on anything but these processes; None if
    that cannot be seen, or one of them is not known."""
    try:
        user, nice, system, _, _, *others = map(int, (_PROC / "stat").read_text().partition("\n")[0].split()[1:9])
        stats = [(_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split() for pid in pids]
    except (OSError, ValueError):
        return None
    ours = sum(int(fields[11]) + int(fields[12]) for fields in stats)
    return (user + nice + system + sum(others) - ours) / os.sysconf("SC_CLK_TCK")


def listener(host: str, port: int) -> int | None:
    """The process that listens on `port` of this machine; None if `host` is another one, or it cannot be found."""
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
            continue  # gone meanwhile, or somebody else's
    return None


def _listening(table: Path, port: int) -> list[str]:
    try:
        rows = table.read_text().splitlines()[1:]
    except OSError:
        return []
    fields = [row.split() for row in rows]
    return [row[9] for row in fields if row[3] == _LISTENING and int(row[1].rpartition(":")[2], 16) == port]
