"""What a command will need at its end, looked at before it begins."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from .reports.plots import require_plots


def require(*, files: Iterable[Path | None] = (), figure: Path | None = None) -> None:
    """Check that these files can be written, and the figure drawn; None is no file. Makes the folders that are missing.

    Raises OSError naming the file, or ValueError where no figure can be drawn, or none of that format.
    """
    for path in (*files, figure):
        if path is not None:
            _writable(path)
    if figure is not None:
        require_plots(figure.suffix)


def _writable(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a file is to be written there, and it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise type(error)(f"{path}: cannot be written: {error.strerror}") from None
