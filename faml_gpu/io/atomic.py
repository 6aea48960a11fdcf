"""Files that are either the old one or the new one, never half of the new one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_path"]


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the folder of `path`, which replaces `path` when the block ends without an error.

    The data are on the disk (fsync) before the file gets its name. After an error (disk full, Ctrl-C) the temporary
    file is removed and `path` is as it was.

    Yields
    ------
    Path
        Not yet existing; the block writes a file there. It keeps the suffix of `path`.
    """
    target = Path(path)
    # Not `tempfile`: its files are readable by their owner only.
    temporary = target.with_name(f".{target.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp{target.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
