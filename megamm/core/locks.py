"""Files and folders that one process at a time may hold."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megamm.core.errors import DataError

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EINVAL)


@contextmanager
def alone(path: Path, busy: str) -> Iterator[None]:
    """Hold a file or folder until the end of the block, or of this process. A file system without locks lets everybody in.

    Args:
        path: It exists.
        busy: What to say where another process holds it.

    Raises:
        DataError: Another process holds it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(busy) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)
