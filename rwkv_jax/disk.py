"""Files are replaced as a whole or not at all, and an OSError becomes one line."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rwkv_jax.errors import UserError

PARTIAL = ".partial"
"""Ends the name of a file that is being written; what a killed process left is overwritten."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a disk, or of a user's share of one, that has no space left."""


@contextlib.contextmanager
def reading(name: object, remedy: str, error: type[UserError]) -> Iterator[None]:
    """Turns an OSError into one line, as `writing`: `PATH: cannot be read (reason); remedy`."""
    try:
        yield
    except OSError as refused:
        path = refused.filename or name
        raise error(f"{path}: cannot be read ({refused.strerror}); {remedy}") from refused


@contextlib.contextmanager
def writing(
    name: object,
    remedy: str,
    *,
    full: str = "free some space",
    error: type[UserError] = UserError,
) -> Iterator[None]:
    """Turns an OSError into one line: `PATH: reason; remedy`.

    The path is the one that the OSError names, or `name` if it names none. `full` is the remedy for
    a disk without space, `error` the class that is raised.
    """
    try:
        yield
    except OSError as refused:
        if refused.errno is None:  # such as a TimeoutError that concerns no file
            raise
        remedy = full if refused.errno in FULL else remedy
        raise error(f"{refused.filename or name}: {refused.strerror}; {remedy}") from refused


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new binary file, which takes the place of `path` once all of it is on disk.

    Until then, and if anything is raised, `path` is as it was. Raises OSError, which names `path`.
    """
    with replacing_all(path) as (file,):
        yield file


@contextlib.contextmanager
def replacing_all(*paths: Path) -> Iterator[list[BinaryIO]]:
    """As `replacing`, for files that belong together, the last of which makes the others count.

    It is removed before the first is replaced and appears last, so a kill at any moment leaves
    either no last file, or files of one version. The files can be read back while they are written.
    """
    partials = [path.with_name(path.name + PARTIAL) for path in paths]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_naming(dict(zip(map(str, partials), paths, strict=True))))
        for path, partial in zip(paths, partials, strict=True):
            if path.exists() and not path.is_file():  # such as a device, which would be gone
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            partial.unlink(missing_ok=True)
            stack.callback(partial.unlink, missing_ok=True)
        files = [stack.enter_context(partial.open("x+b")) for partial in partials]
        yield files  # pyright: ignore[reportReturnType]
        for file, partial in zip(files, partials, strict=True):
            file.flush()
            os.fsync(file.fileno())
            if not os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                raise OSError(errno.EBUSY, "another process is writing it too", str(partial))
        if len(paths) > 1:
            paths[-1].unlink(missing_ok=True)
        for partial, path in zip(partials, paths, strict=True):
            partial.replace(path)
    for folder in {path.parent for path in paths}:
        _sync(folder)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by a file of this text, in UTF-8. Raises OSError."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def _naming(names: dict[str, Path]) -> Iterator[None]:
    """Puts the final path of a file where an error names the partial one."""
    try:
        yield
    except OSError as error:
        if path := names.get(str(error.filename)):
            error.filename = str(path)
        raise


def _sync(folder: Path) -> None:
    """Puts the names in a folder on disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
