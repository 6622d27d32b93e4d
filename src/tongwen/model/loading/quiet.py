"""Keep progress bars, hints and warnings of libraries off the screen while they load a model."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator

# bitsandbytes warns about missing kernels on every import, and about fp16 casts at every int8 product.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class quiet:  # noqa: N801 (used like a function)
    """Hide the libraries' progress bars, hints and deprecation warnings; errors are still raised.

    These settings are global to the process, and the web page loads models in threads. So the first block to enter
    changes them, and the last one to leave restores them.
    """

    _lock = threading.Lock()
    _inside = 0
    _before = contextlib.ExitStack()

    def __enter__(self) -> None:
        with quiet._lock:
            if not quiet._inside:
                self._silence()
            quiet._inside += 1

    def __exit__(self, *error: object) -> None:
        with quiet._lock:
            quiet._inside -= 1
            if not quiet._inside:
                quiet._before.close()

    def _silence(self) -> None:
        from transformers.utils import logging as hf

        self._before.callback(hf.set_verbosity, hf.get_verbosity())
        hf.set_verbosity_error()
        hf.disable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        if not sys.stderr.isatty():
            self._before.enter_context(_without_bars())
        self._before.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep progress bars that libraries draw themselves (GGUF) out of a log. Other output is written at the end."""
    with contextlib.redirect_stderr(io.StringIO()) as captured:
        yield
    sys.stderr.write("\n".join(line for line in captured.getvalue().split("\n") if "\r" not in line))
