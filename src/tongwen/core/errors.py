"""Errors caused by the user or the machine. Any other exception is a bug and shows its traceback.

    TongwenError                    exit code
      RecipeError                   2    recipe or command
      DataError                     3    data
        RowRejected                       one row, with the reason that the ledger counts
      ModelError                    4    model or adapter
        ArtifactError                    a missing or wrong output folder of a stage
      MachineError                  5    disk, memory, device, permission, network
        MissingPackage                   an extra that is not installed
      NumbersError                  6    NaN, Inf, a failed audit
      Interrupted                   130  stopped on request, with everything saved
      SeveralErrors                      all problems at once: the lowest code of 2, 3 and 4

A message contains the place, the value, the rule that the value breaks, and the remedy.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from tongwen.core.i18n import _


class TongwenError(Exception):
    """Base class of all errors that a user can fix.

    rule:   one sentence: what is wrong, with the value quoted
    place:  file, line, row or tensor with the error
    remedy: what to do; a command or a recipe line that can be pasted
    """

    exit_code = 1

    def __init__(self, rule: str, *, place: str = "", remedy: str = "") -> None:
        self.rule, self.place, self.remedy = rule, place, remedy
        super().__init__(self.text())

    def text(self) -> str:
        """Return the message for the user: `place: rule`, then the remedy on its own line."""
        first = f"{self.place}: {self.rule}" if self.place else self.rule
        return f"{first}\n  → {self.remedy}" if self.remedy else first


class RecipeError(TongwenError):
    exit_code = 2


class DataError(TongwenError):
    exit_code = 3


class RowRejected(DataError):
    """One row is rejected. `reason` is the key in the ledger; the message explains what is wrong with the row."""

    def __init__(self, reason: str, rule: str) -> None:
        self.reason = reason
        super().__init__(rule)


class ModelError(TongwenError):
    exit_code = 4


class ArtifactError(ModelError):
    """The output folder of a stage is missing, unfinished, damaged or of another kind."""


class MachineError(TongwenError):
    """Disk, memory, device, permission, network."""

    exit_code = 5


class NumbersError(TongwenError):
    """NaN, Inf, or a failed audit."""

    exit_code = 6


class Interrupted(TongwenError):
    """The run stopped on request; its progress is saved."""

    exit_code = 130


class MissingPackage(MachineError):
    def __init__(self, package: str, needed_for: str, extra: str) -> None:
        super().__init__(
            _("the package {package!r} is needed for {needed_for}").format(package=package, needed_for=needed_for),
            remedy=f"pip install 'tongwen[{extra}]'",
        )


class SeveralErrors(TongwenError):
    """All problems at once. The exit code is the lowest among recipe, data and model problems."""

    def __init__(self, errors: Sequence[TongwenError]) -> None:
        self.errors = list(errors)
        self.exit_code = min(error.exit_code for error in self.errors)
        super().__init__("\n".join(error.text() for error in self.errors))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class when the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or a device ran out of memory."""
    phrases = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "alloc_failed")
    return isinstance(error, MemoryError) or any(phrase in str(error).lower() for phrase in phrases)


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed because the disk is full; the writers of safetensors and torch set no errno."""
    phrases = ("No space left", "unexpected pos")
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        phrase in str(error) for phrase in phrases
    )


def is_disk_error(error: BaseException) -> bool:
    """Whether the disk itself failed, in reading or in writing; safetensors (Rust) and torch (C++) set no errno."""
    phrases = ("Input/output error", "os error 5", "PytorchStreamWriter failed", "iostream error")
    return getattr(error, "errno", None) == errno.EIO or any(phrase in str(error) for phrase in phrases)


def raise_all(errors: Sequence[TongwenError]) -> None:
    """Raise the one error, or all of them together; do nothing for an empty list."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise SeveralErrors(errors)
