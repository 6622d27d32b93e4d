"""Try an adapter's regular expressions on the names that they will meet, in a process that is ended at a limit.

peft matches `target_modules` and the like with `re`, and so does a merge. `re` backtracks: `(.*)*x` does not end on a name of
thirty characters, holds the interpreter's lock meanwhile, and cannot be stopped from another thread.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tongwen.core.errors import ArtifactError
from tongwen.core.i18n import _

SECONDS = 5.0
BRANCHES = re.compile(r"[*+?{(|]")  # what a pattern can backtrack over; with few of them it ends soon
FEW = 2  # a repetition of a repetition has three, and takes twice as long with each letter
TRY = "import json, re, sys; patterns, names = json.load(sys.stdin); [re.match(one, name) for one in patterns for name in names]"


def check_patterns(config: Mapping[str, Any], names: Iterable[str], folder: Path) -> None:
    """Raise ArtifactError for a pattern that is none, or that takes too long on the names of the modules."""
    slow = []
    for key, pattern, around in _patterns(config):
        place = f"{folder / 'adapter_config.json'}: {key}"
        whole = around.format(pattern=pattern)
        try:
            re.compile(whole)
        except (re.error, RecursionError, OverflowError) as error:
            raise ArtifactError(_("it is not a regular expression: {error}").format(error=error), place=place) from None
        if len(BRANCHES.findall(pattern)) > FEW:
            slow.append((place, whole))
    if slow and not _answers_in_time([pattern for _place, pattern in slow], sorted({*names})):
        raise ArtifactError(
            _("this regular expression takes more than {seconds:g} seconds to match the names of the modules").format(
                seconds=SECONDS
            ),
            place=slow[0][0],
            remedy=_("list the names of the modules instead"),
        )


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (key, pattern, what stands around it when it is matched)."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            yield key, config[key], r"(?:{pattern})\Z"
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or {}:
            yield key, pattern, r"(.*\.)?({pattern})$"
    layers = config.get("layers_pattern") or []
    for pattern in [layers] if isinstance(layers, str) else layers:
        yield "layers_pattern", pattern, r"(?:^|.*?\.){pattern}\.(\d+)\."


def _answers_in_time(patterns: list[str], names: list[str]) -> bool:
    try:
        subprocess.run(  # noqa: S603
            [sys.executable, "-I", "-S", "-c", TRY],
            input=json.dumps([patterns, names]).encode(),
            timeout=SECONDS,
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return False
    return True
