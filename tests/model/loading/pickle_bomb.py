"""A pickle that runs code when it is opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Bomb:
    """A pickle that leaves a file when it is run."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.canary),))
