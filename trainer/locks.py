"""Locks on files, which the kernel drops with the process that holds them, however it ends."""

import errno
import fcntl
from typing import IO

# Lustre mounted without flock, NFS without its lock service, and others.
_UNKNOWN = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


class NoLocksError(Exception):
    """The file system has no locks: its reason."""


def try_lock(file: IO[str]) -> bool:
    """Whether this process holds the open file from now on; if not, another one does.

    Raises NoLocksError where that cannot be known.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNKNOWN:
            raise NoLocksError(error.strerror) from error
        raise
    return True
