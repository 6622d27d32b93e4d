"""A path of the recipe becomes files, and a file becomes raw rows, each with its number.

A row is what a file holds one of: a JSON object, or a paragraph of text. Bytes that are not UTF-8 are an error of the
file or of the row, never replaced.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tongwen.errors import DataError
from tongwen.language import say

TEXT_SUFFIXES = {".txt", ".md"}
JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stands in the file; `problem` is set when it could not even be parsed."""

    file: str
    row: int
    value: Any
    size: int  # UTF-8 bytes of the row in the file
    problem: str = ""
    reason: str = ""


def find_files(path: str) -> list[Path]:
    """The files that a path names: itself, all data files in a folder, or what a glob matches, in sorted order.

    Raises DataError when there is none.
    """
    place = Path(path)
    if place.is_file():
        return [place]
    suffixes = TEXT_SUFFIXES | JSON_SUFFIXES
    if place.is_dir():
        found = sorted(file for file in place.rglob("*") if file.is_file() and file.suffix.lower() in suffixes)
        if found:
            return found
        raise DataError(
            say(
                f"no data file ({', '.join(sorted(suffixes))}) in this folder",
                f"文件夹里没有数据文件（{'、'.join(sorted(suffixes))}）",
            ),
            place=path,
        )
    found = sorted(
        Path(name)
        for name in glob.glob(path, recursive=True)  # noqa: PTH207 (the user's own pattern, absolute or not)
        if Path(name).is_file()
    )
    if found:
        return found
    raise DataError(
        say("there is no such file", "没有这个文件"),
        place=path,
        remedy=say(
            f"paths are taken from the folder where you stand: {Path.cwd()}", f"相对路径从当前目录算起：{Path.cwd()}"
        ),
    )


def read_rows(file: Path) -> Iterator[RawRow]:
    """The rows of one file: a JSON array, JSON lines, or paragraphs of text.

    Raises DataError when the file as a whole cannot be read; a row that cannot is yielded with its problem.
    """
    if not file.stat().st_size:
        raise DataError(
            say("the file is empty", "文件为空"),
            place=str(file),
            remedy=say("take it out of the recipe", "请从配方中去掉它"),
        )
    if _looks_like_array(file):
        yield from _read_array(file)
    elif file.suffix.lower() in TEXT_SUFFIXES and not _looks_like_lines(file):
        yield from _read_text(file)
    else:
        yield from _read_lines(file)


def _first_character(file: Path) -> str:
    with file.open("rb") as stream:
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return chr(head[0]) if head else ""


def _looks_like_array(file: Path) -> bool:
    return file.suffix.lower() not in TEXT_SUFFIXES and _first_character(file) == "["


def _looks_like_lines(file: Path) -> bool:
    """A text file whose first line is a JSON object is JSON lines under another name."""
    if _first_character(file) != "{":
        return False
    with file.open("rb") as stream:
        first = next((line for line in stream if line.strip()), b"")
    try:
        return isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except ValueError:
        return False


def _read_array(file: Path) -> Iterator[RawRow]:
    try:
        rows = json.loads(file.read_bytes().decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from None
    except ValueError as error:
        line = getattr(error, "lineno", None)
        raise DataError(
            say(f"this is not a whole JSON array: {error}", f"这不是完整的 JSON 数组：{error}"),
            place=f"{file}:{line}" if line else str(file),
            remedy=say(
                "one object per line may be meant: then name the file .jsonl and drop the brackets",
                "若本是每行一个对象，请命名为 .jsonl 并去掉方括号",
            ),
        ) from None
    for number, value in enumerate(rows, 1):
        yield RawRow(
            str(file), number, value, len(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        )


def _read_lines(file: Path) -> Iterator[RawRow]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
            except UnicodeDecodeError as error:
                yield RawRow(
                    str(file), number, line.decode("utf-8", "backslashreplace"), len(line), str(error), "not_utf8"
                )
            except (ValueError, RecursionError) as error:
                yield RawRow(
                    str(file), number, line.decode("utf-8").rstrip("\n"), len(line), f"not JSON: {error}", "not_json"
                )
            else:
                yield RawRow(str(file), number, value, len(line))


def _read_text(file: Path) -> Iterator[RawRow]:
    """Paragraphs: lines up to an empty one; the row's number is its first line."""
    paragraph: list[str] = []
    start, size = 1, 0
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    start = number if not paragraph else start
                    paragraph.append(line.rstrip("\r\n"))
                    size += len(line.encode())
                elif paragraph:
                    yield RawRow(str(file), start, {"text": "\n".join(paragraph)}, size)
                    paragraph, size = [], 0
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from None
    if paragraph:
        yield RawRow(str(file), start, {"text": "\n".join(paragraph)}, size)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _not_utf8(file: Path, error: UnicodeDecodeError) -> DataError:
    return DataError(
        say(f"the bytes at {error.start} are not UTF-8", f"第 {error.start} 字节处不是 UTF-8"),
        place=str(file),
        remedy=say(f"convert it: iconv -f GB18030 -t UTF-8 {file}", f"请转换：iconv -f GB18030 -t UTF-8 {file}"),
    )
