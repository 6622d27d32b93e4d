"""Identify files by their hashes: published lists, md5 lists beside a download, and the user's own lists.

`known.json` holds the published SHA256 of the original LLaMA files and of Chinese-LLaMA/Alpaca's adapters, tokenizers
and merged files. Another version of torch writes the same merged model with another hash, so an unknown hash does not
prove that a file is wrong.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from tongwen.core.errors import ArtifactError
from tongwen.core.i18n import _

CHUNK = 1 << 22
WORKERS = 4
LISTS = ("checklist.chk", "tokenizer_checklist.chk")  # md5, beside the original downloads


@dataclass(frozen=True)
class KnownFile:
    """One published file: what it belongs to, its name, its hash."""

    what: str
    file: str
    sha256: str


def known_files() -> list[KnownFile]:
    text = (resources.files("tongwen.export") / "known.json").read_text(encoding="utf-8")
    return [KnownFile(**row) for row in json.loads(text)]


def read_list(file: Path) -> dict[str, str]:
    """Read file name -> hash from `HASH  NAME` lines (sha256 or md5) or a JSON object. Raises ArtifactError otherwise."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
            found = found.get("files", found)  # one of our manifests, or name -> hash
            return {
                str(name): str(one["sha256"] if isinstance(one, dict) else one).lower() for name, one in found.items()
            }
        except (ValueError, KeyError, AttributeError, TypeError):
            raise _unreadable(file, 1, text.splitlines()[0]) from None
    out: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"\s*([0-9a-fA-F]{64}|[0-9a-fA-F]{32})\s+\*?(.+?)\s*", line)
        if not match:
            raise _unreadable(file, number, line)
        out[match[2]] = match[1].lower()
    return out


def hash_files(
    files: Mapping[Path, Sequence[str]], done: Path, progress: Callable[[int], None]
) -> dict[Path, dict[str, str]]:
    """Return file -> algorithm -> hash, hashing several files in parallel.

    done: a file that records finished hashes, so that an interrupted run can continue; it is removed at the end.
    """
    noted = _read_notes(done)
    out: dict[Path, dict[str, str]] = {}
    read = 0

    def one(file: Path) -> tuple[Path, dict[str, str]]:
        key, wanted = _key(file), files[file]
        if key in noted and noted[key].keys() >= set(wanted):
            return file, noted[key]
        return file, _hash(file, wanted)

    with ThreadPoolExecutor(WORKERS) as pool:
        for file, found in pool.map(one, files):
            out[file] = noted[_key(file)] = found
            done.parent.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps(noted), encoding="utf-8")
            read += file.stat().st_size
            progress(read)
    done.unlink(missing_ok=True)
    return out


def _hash(file: Path, wanted: Sequence[str]) -> dict[str, str]:
    digests = {name: hashlib.new(name, usedforsecurity=name != "md5") for name in wanted}
    with file.open("rb") as stream:
        while block := stream.read(CHUNK):
            for digest in digests.values():
                digest.update(block)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _key(file: Path) -> str:
    facts = file.stat()
    return f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}"


def _read_notes(done: Path) -> dict[str, dict[str, str]]:
    try:
        return dict(json.loads(done.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _unreadable(file: Path, number: int, line: str) -> ArtifactError:
    return ArtifactError(
        _("{line!r} is not a line of a hash list").format(line=line[:80]),
        place=f"{file}:{number}",
        remedy="SHA256_OR_MD5  FILE",
    )
