"""A listening Unix socket that only its owner can reach, and its file.

A server that was killed leaves its file behind, and nobody listens there. The next server replaces it. While one looks
for such a file and makes its own, it holds a lock on the directory. Otherwise two servers that start at once could both
find the old file, and the second would remove the new one of the first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BACKLOG = 512
"""Connections that the kernel may keep until they are accepted."""
LOCK_SECONDS = 1.0
"""Seconds for which the directory may be locked by others. They need a millisecond, unless it is their purpose."""


@contextlib.contextmanager
def listening_at(path: Path) -> Iterator[socket.socket]:
    """Listen at `path` for the length of the block: a non-blocking socket with a file of mode 0600. The file is removed
    in the end, unless another one has taken its place. Raises OSError, whose text names the path, if that is
    impossible, and if a server listens there already."""
    try:
        with _locked(path.parent):
            _remove_stale(path)
            listener = _bind(path)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {path}: {error.strerror or error}") from error
    with listener:
        made = path.lstat()
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError), _locked(path.parent):
                if os.path.samestat(path.lstat(), made):
                    path.unlink()


def _bind(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        before = os.umask(0o177)  # of the whole process; other threads could only make a file too private
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the file of a server that is gone. Raises OSError if there is anything else at `path`."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "there is a file that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # as many clients wait there as may
    raise OSError(errno.EADDRINUSE, "another server listens there")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory. It goes with the process, even if that is killed."""
    if sys.platform == "win32":
        raise OSError(errno.ENOSYS, "there are no Unix sockets here")
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OSError(errno.EAGAIN, f"another program keeps {directory} locked") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)
