"""Which cell of a notebook is running: what it made before is stale once it runs again. Needs no IPython."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A cell, and which of all executions this is."""

    key: str  # the notebook's own name of it, or its text where the notebook gives none
    execution: int

    def is_again(self, earlier: Cell | None) -> bool:
        """Whether this is another execution of the cell that was ``earlier``.

        >>> Cell("a", 3).is_again(Cell("a", 1)), Cell("a", 3).is_again(Cell("a", 3)), Cell("a", 3).is_again(None)
        (True, False, False)
        """
        return earlier is not None and earlier.key == self.key and earlier.execution != self.execution


def running_cell() -> Cell | None:
    """Return the cell that runs now; None outside of notebooks, and on any thread but the main one.

    >>> running_cell() is None
    True
    """
    ipython = sys.modules.get("IPython")
    if ipython is None or threading.current_thread() is not threading.main_thread():
        return None
    try:
        shell = ipython.get_ipython()
        if shell is None:
            return None
        message = shell.get_parent() if hasattr(shell, "get_parent") else {}  # what the notebook sent
        name = message.get("metadata", {}).get("cellId") or shell.user_ns["In"][-1]
        return Cell(str(name), int(shell.execution_count))
    except Exception:  # a shell of another kind: it is as if there were no cells
        return None
