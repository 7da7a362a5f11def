"""Exclusive write access to a folder, without importing torch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from fdl.errors import UserError

LOCK = ".fdl.lock"
"""Name of the lock file in the folder."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


@dataclass(frozen=True)
class Holder:
    """The process that holds a folder's lock.

    Attributes:
        pid: its process id.
        host: its machine's host name.
        since: local time at which it took the lock.
        job: its Slurm job id; empty outside Slurm.
        restart: number of times that Slurm had requeued the job before.
    """

    pid: int
    host: str
    since: str
    job: str = ""
    restart: int = 0

    @staticmethod
    def current() -> Holder:
        """Describe the current process."""
        restart = os.environ.get("SLURM_RESTART_COUNT", "")
        return Holder(
            os.getpid(),
            socket.gethostname(),
            time.strftime("%Y-%m-%d %H:%M:%S"),
            os.environ.get("SLURM_JOB_ID", ""),
            int(restart) if restart.isdigit() else 0,
        )

    def is_gone(self, unlocked: bool | None) -> bool:
        """Return True if the process has certainly ended.

        Args:
            unlocked: True if the operating system has released the process's lock, as it does when a process ends;
                None if the file system does not support locks.
        """
        now = Holder.current()
        if self.job and self.job == now.job and self.restart < now.restart:
            return True  # Slurm requeues a job once all its processes have ended
        if self.host != now.host:
            return False  # a lock taken on another machine may be invisible here
        return not _runs(self.pid) if unlocked is None else unlocked


class FolderLock:
    """Context manager that holds the exclusive lock of a folder.

    The operating system releases the lock when the process ends, however it ends; on file systems without locks, the
    process id decides. A lock taken on another machine holds until it is released or the lock file is deleted. Folders
    that were created for the lock are removed at the end if they are still empty.

    Args:
        folder: the folder to lock; created if missing.

    Raises:
        UserError: on entering, if another process holds the lock or the folder cannot be written to.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file = -1
        self._made: list[Path] = []

    def __enter__(self) -> FolderLock:
        absent = [one for one in (self.folder, *self.folder.parents) if not one.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._made = absent
            self._take()
        except OSError as error:
            self._remove_made()
            raise UserError(f"{self.folder}: cannot be written: {error.strerror}") from error
        except BaseException:
            self._remove_made()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        path = self.folder / LOCK
        if _is(self._file, path):
            path.unlink(missing_ok=True)  # before the lock is released, so that no process locks a deleted file
        os.close(self._file)
        self._remove_made()

    def _take(self) -> None:
        path = self.folder / LOCK
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                unlocked, held = _try(file), _read(file)
                if unlocked is False or (held is not None and not held.is_gone(unlocked)):
                    raise _busy(self.folder, held)
                if not _is(file, path):  # its previous holder has deleted it in the meantime
                    os.close(file)
                    continue
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(asdict(Holder.current())).encode(), 0)
            except BaseException:
                os.close(file)
                raise
            self._file = file
            return

    def _remove_made(self) -> None:
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # not empty
                return


def require_unlocked(folder: Path) -> None:
    """Require that no other process holds a folder's lock.

    Args:
        folder: the folder; it need not exist.

    Raises:
        UserError: another process holds the lock; the message names it.
    """
    path = folder / LOCK
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        unlocked, held = _try(file), _read(file)
        if unlocked is False or (held is not None and not held.is_gone(unlocked)):
            raise _busy(folder, held)
    finally:
        os.close(file)


def is_locked(folder: Path) -> bool:
    """Return True if a folder contains a lock file, held or stale."""
    return (folder / LOCK).exists()


def _try(file: int) -> bool | None:
    """Try to lock an open file; return True on success, None if the file system does not support locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _read(file: int) -> Holder | None:
    """Read the holder from an open lock file; None if the file is empty or damaged."""
    try:
        return Holder(**json.loads(os.pread(file, 4096, 0)))
    except (OSError, ValueError, TypeError):
        return None


def _is(file: int, path: Path) -> bool:
    """Return True if an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _busy(folder: Path, held: Holder | None) -> UserError:
    if held is None:
        return UserError(f"{folder}: another process is just taking it; choose another folder")
    text = f"{folder}: is in use by process {held.pid} on {held.host} since {held.since}"
    if held.host == socket.gethostname():
        return UserError(f"{text}; wait for it, stop it, or choose another folder")
    return UserError(
        f"{text}, which cannot be looked at from here; choose another folder or, if that process is over, delete "
        f"{folder / LOCK}"
    )
