"""Find the files of a recipe's path, and open a file as a stream of bytes, unpacked if it is compressed.

The first bytes of a file decide its type, never its name. Any error while reading raises `DamagedFile`, so that the row
reader can report how many rows came before it. A file must not change between opening and closing.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tongwen.core.errors import DataError
from tongwen.core.i18n import _

JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}
MARKDOWN_SUFFIXES = {".md", ".markdown"}
TEXT_SUFFIXES = {".txt"} | MARKDOWN_SUFFIXES
CSV_SUFFIXES = {".csv", ".tsv"}
TABLE_SUFFIXES = {".parquet", ".arrow", ".feather", ".ipc"}
WORKBOOK_SUFFIXES = {".xlsx", ".xlsm"}
PACKED_SUFFIXES = {".gz", ".zst", ".xz"}
HTML_SUFFIXES = {".html", ".htm", ".xhtml"}
DOCUMENT_SUFFIXES = {".pdf", ".docx", ".pptx", ".epub"} | HTML_SUFFIXES
ARCHIVE_SUFFIXES = {".zip", ".tar", ".tgz", ".7z", ".rar"}
DATA_SUFFIXES = JSON_SUFFIXES | TEXT_SUFFIXES | CSV_SUFFIXES | TABLE_SUFFIXES | WORKBOOK_SUFFIXES | DOCUMENT_SUFFIXES
# Files in a data folder that are not data.
_BESIDE = re.compile(
    r"\.|~\$|(README|LICENSE|CHANGELOG)\b|(manifest|dataset_infos?|dataset_dict|state)\.json$", re.IGNORECASE
)

BLOCK = 1 << 20
HEAD = 1 << 20  # bytes that decide the type of a file
# A file that unpacks to more than BOMB_BYTES and to more than BOMB_RATIO times its size is a decompression bomb.
BOMB_BYTES, BOMB_RATIO = 1 << 28, 200
_XZ_MEMORY = 1 << 29

GZIP, ZSTD, XZ = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0"
_PACKED = {GZIP: "gzip", ZSTD: "zstd", XZ: "xz"}
_ARCHIVES = {
    b"PK\x03\x04": "ZIP",
    b"PK\x05\x06": "ZIP",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "RAR",
}
_OLD_OFFICE = "pre-2007 or encrypted Office"
_FOREIGN = {
    b"BZh": "bzip2",
    b"\x89PNG\r\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"SQLite format 3\0": "SQLite",
    b"\x80\x02}": "pickle",
    b"\x80\x04\x95": "pickle",
    b"FEA1": "Feather 1",
    b"\xd0\xcf\x11\xe0": _OLD_OFFICE,
}


class DamagedFile(Exception):
    """The rest of a file cannot be read. rule: what is wrong; line: the line number, if known."""

    def __init__(self, rule: str, remedy: str = "", line: int = 0) -> None:
        self.rule, self.remedy, self.line = rule, remedy, line
        super().__init__(rule)


def printable(path: Path | str) -> str:
    """Return a path for messages: line ends and bytes that are not UTF-8 are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def suffix(file: Path) -> str:
    """Return the suffix of the content: `.jsonl` for `a.jsonl.gz`."""
    suffixes = [part.lower() for part in file.suffixes]
    if suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


# -- which files ---------------------------------------------------------------------------------------------------


def find_files(path: str) -> list[Path]:
    """Return the files of a path, sorted: the file itself, all data files in a folder, or the matches of a glob.

    Raises DataError when no file is found, or one cannot be read.
    """
    place = Path(path).expanduser() if path.startswith("~/") else Path(path)
    kind = _kind(place)
    if kind == "folder":
        return _in_folder(place)
    if kind:
        return [_checked(place, kind)]
    names = glob.glob(str(place), recursive=True) if glob.has_magic(path) else []  # noqa: PTH207 (the user's own pattern)
    kinds = {name: _kind(Path(name)) for name in sorted(names)}
    found = [_checked(Path(name), kind) for name, kind in kinds.items() if kind != "folder"]
    if found:
        return found
    if place.is_symlink():
        raise DataError(_("a link to a file that does not exist"), place=printable(path))
    raise DataError(
        _("there is no such file"),
        place=printable(path),
        remedy=_("relative paths start from the current folder: {folder}").format(folder=Path.cwd()),
    )


def _kind(place: Path) -> str:
    """Return 'file', 'folder', the kind of a special file, or '' when the path does not exist."""
    try:
        mode = place.stat().st_mode
    except ValueError:
        raise DataError(_("a path cannot contain a NUL"), place=printable(str(place).replace("\0", "\\0"))) from None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return ""
        raise _cannot_open(place, error) from None
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    names = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
    return names.get(stat.S_IFMT(mode), "special file")


def _checked(file: Path, kind: str) -> Path:
    if kind != "file":
        raise DataError(
            _("this is a {kind}, not a file").format(kind=kind or _("broken link")),
            place=printable(file),
        )
    if not os.access(file, os.R_OK):
        raise _cannot_open(file, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return file


def _in_folder(folder: Path) -> list[Path]:
    """Return all data files below a folder. Links to folders are followed; hidden and descriptive files are skipped."""
    found, archives = [], []

    def fail(error: OSError) -> None:
        raise _cannot_open(Path(error.filename), error) from None

    for top, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        directory = Path(top)
        if (
            directory.is_symlink()
            and directory.resolve() in directory.absolute().parent.resolve().joinpath("x").parents
        ):
            raise DataError(_("this link leads back to a folder above it"), place=printable(directory))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = directory / name
            if is_beside(name):
                continue
            if suffix(file) in DATA_SUFFIXES:
                found.append(_checked(file, _kind(file)))
            elif file.suffix.lower() in ARCHIVE_SUFFIXES:
                archives.append(file)
    found = found or [_checked(file, _kind(file)) for file in archives if file.suffix.lower() == ".zip"]
    if found:
        return sorted(found)
    known = sorted(DATA_SUFFIXES)
    raise DataError(
        _("no data file ({known}; also .gz, .zst, .xz) in this folder").format(known=_(", ").join(known)),
        place=printable(folder),
        remedy=_("of archives only .zip is read; unpack {archives}").format(archives=archives[0].name)
        if archives
        else "",
    )


def is_beside(name: str) -> bool:
    """Whether a file of this name lies beside data and holds none."""
    return bool(_BESIDE.match(name))


def _cannot_open(place: Path, error: OSError) -> DataError:
    if error.errno == errno.ELOOP:
        rule = _("this link leads to itself")
    elif error.errno in (errno.EACCES, errno.EPERM):
        rule = _("no permission to read this")
    elif error.errno == errno.ENAMETOOLONG:
        rule = _("this file name is too long")
    else:
        rule = _("this cannot be opened: {strerror}").format(strerror=error.strerror)
    remedy = f"chmod +r {printable(place)}" if error.errno == errno.EACCES else ""
    return DataError(rule, place=printable(place), remedy=remedy)


# -- their bytes ---------------------------------------------------------------------------------------------------


@dataclass
class Stream:
    """The unpacked bytes of a file. head: the first bytes; blocks: all bytes, including the head."""

    file: Path
    head: bytes
    blocks: Iterator[bytes]
    whole: bool  # whether the head is the whole file
    packed: str  # gzip, zstd, xz, or ''


@contextmanager
def open_stream(file: Path) -> Iterator[Stream]:
    """Open a file as a Stream. Raises DataError when its type holds no rows, or when it changed while it was read;
    iterating over the blocks may raise DamagedFile."""
    _checked(file, _kind(file))
    with file.open("rb") as raw:
        before = os.fstat(raw.fileno())
        if not before.st_size:
            raise DataError(
                _("no rows: the file is empty"),
                place=printable(file),
                remedy=_("remove it from the recipe"),
            )
        magic = raw.read(16)
        raw.seek(0)
        packed = next((name for sign, name in _PACKED.items() if magic.startswith(sign)), "")
        blocks = _in_larger_blocks(_unpacked(raw, packed)) if packed else _plain(raw)
        taken, failure = _read_head(blocks)
        head = b"".join(taken)
        check_signature(file, head, packed)
        whole = len(head) < HEAD and failure is None
        yield Stream(file, head[:HEAD], _replay(taken, failure, blocks), whole, packed)
        _check_unchanged(file, before)


def _check_unchanged(file: Path, before: os.stat_result) -> None:
    try:
        after: os.stat_result | None = file.stat()
    except OSError:
        after = None
    if after is None or any(
        getattr(after, name) != getattr(before, name) for name in ("st_size", "st_mtime_ns", "st_ino")
    ):
        raise DataError(
            _("this file changed while it was being read"),
            place=printable(file),
            remedy=_("wait until it is fully written, then run again"),
        )


def _read_head(blocks: Iterator[bytes]) -> tuple[list[bytes], DamagedFile | None]:
    """Return the first blocks, up to HEAD bytes, and the error that stopped the reading, if any."""
    taken, size = list[bytes](), 0
    try:
        for block in blocks:
            taken.append(block)
            size += len(block)
            if size >= HEAD:
                break
    except DamagedFile as failure:
        return taken, failure
    return taken, None


def _replay(taken: list[bytes], failure: DamagedFile | None, blocks: Iterator[bytes]) -> Iterator[bytes]:
    yield from taken
    if failure:
        raise failure
    yield from blocks


def _plain(raw: IO[bytes]) -> Iterator[bytes]:
    try:
        while block := raw.read(BLOCK):
            yield block
    except OSError as error:
        raise DamagedFile(_("reading failed: {strerror}").format(strerror=error.strerror)) from None


def _in_larger_blocks(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the same bytes in larger blocks, also those before an error."""
    gathered, size = list[bytes](), 0
    try:
        for piece in pieces:
            gathered.append(piece)
            size += len(piece)
            if size > BLOCK // 4:
                yield b"".join(gathered)
                gathered, size = [], 0
    except DamagedFile:
        if size:
            yield b"".join(gathered)
        raise
    if size:
        yield b"".join(gathered)


# -- compression ---------------------------------------------------------------------------------------------------


def _unpacked(raw: IO[bytes], packed: str) -> Iterator[bytes]:
    """Yield the unpacked bytes of all members of a compressed file; zero padding between members is allowed."""
    new, step, at_once, errors = _engine(packed)
    engine: Any = new()
    given = made = 0
    try:
        while data := raw.read(at_once):
            given += len(data)
            while data:
                if engine is None:
                    data = data.lstrip(b"\0")
                    if not data:
                        break
                    engine = new()
                for piece in step(engine, data):
                    made += len(piece)
                    if made > BOMB_BYTES and made > BOMB_RATIO * given:
                        raise DamagedFile(
                            _("{given:,} bytes unpack to more than {made:,}: normal data does not do that").format(
                                given=given, made=made
                            )
                        )
                    yield piece
                data = b""
                if engine.eof:
                    data, engine = engine.unused_data, None
    except errors as error:
        raise DamagedFile(
            _("the {packed} data is damaged: {error}").format(packed=packed, error=error),
            _("fetch the file again"),
        ) from None
    except OSError as error:
        raise DamagedFile(_("reading failed: {strerror}").format(strerror=error.strerror)) from None
    if engine is not None:
        raise DamagedFile(
            _("the {packed} data is truncated").format(packed=packed),
            _("fetch the file again"),
        )


Step = Callable[[Any, bytes], Iterator[bytes]]


def _engine(packed: str) -> tuple[Callable[[], Any], Step, int, tuple[type[Exception], ...]]:
    """Return (decompressor factory, function that feeds it, bytes per feed, its exceptions)."""
    if packed == "gzip":
        return (lambda: zlib.decompressobj(31)), _step_gzip, 1 << 16, (zlib.error,)
    if packed == "xz":
        import lzma

        return (lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY)), _step_xz, 1 << 16, (lzma.LZMAError,)
    import zstandard

    # A call has no output limit, and 4 bytes can unpack to 128 KiB: feed little at once.
    return zstandard.ZstdDecompressor().decompressobj, _step_zstd, 1 << 11, (zstandard.ZstdError,)


def _step_gzip(engine: Any, data: bytes) -> Iterator[bytes]:
    piece = b""
    while data or len(piece) == BLOCK:
        piece = engine.decompress(data, BLOCK)
        data = engine.unconsumed_tail
        yield piece


def _step_xz(engine: Any, data: bytes) -> Iterator[bytes]:
    yield engine.decompress(data, BLOCK)
    while not engine.eof and not engine.needs_input:
        yield engine.decompress(b"", BLOCK)


def _step_zstd(engine: Any, data: bytes) -> Iterator[bytes]:
    yield engine.decompress(data)


# -- what a file is ------------------------------------------------------------------------------------------------


def check_unpacked_size(file: Path, size: int) -> None:
    """Raise DamagedFile for a file that unpacks to far more bytes than it has: a decompression bomb."""
    if size > BOMB_BYTES and size > BOMB_RATIO * file.stat().st_size:
        raise DamagedFile(_("it would unpack to {size:,} bytes").format(size=size))


def is_zip(head: bytes) -> bool:
    return head.startswith(b"PK\x03\x04")


def zip_kind(file: Path) -> str:
    """Return what a ZIP archive is by its parts: xlsx, docx, pptx, epub, or zip."""
    parts = {
        "xl/workbook.xml": "xlsx",
        "word/document.xml": "docx",
        "ppt/presentation.xml": "pptx",
        "META-INF/container.xml": "epub",
    }
    try:
        with zipfile.ZipFile(file) as archive:
            names = {*archive.namelist()}
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return "zip"
    return next((kind for part, kind in parts.items() if part in names), "zip")


def document_kind(file: Path, head: bytes) -> str:
    """Return pdf, docx, pptx, epub, html, or "" for a file that is no document. A web page counts only where its name says so:
    elsewhere it is what a failed download leaves."""
    if head.startswith(b"%PDF"):
        return "pdf"
    if is_zip(head):
        kind = zip_kind(file)
        return kind if kind in ("docx", "pptx", "epub") else ""
    return "html" if suffix(file) in HTML_SUFFIXES else ""


def is_table(head: bytes) -> bool:
    """Whether the file is Parquet, an Arrow file, or an Arrow stream (first message shorter than 16 MiB)."""
    return head.startswith((b"PAR1", b"ARROW1")) or (head[:4] == b"\xff\xff\xff\xff" and head[7:8] == b"\0")


def check_signature(file: Path, head: bytes, packed: str = "") -> None:
    """Raise DataError when the first bytes belong to a file type without rows."""

    def refuse(rule: str, remedy: str = "") -> DataError:
        return DataError(rule, place=printable(file), remedy=remedy)

    archive = next((name for sign, name in _ARCHIVES.items() if head.startswith(sign)), "")
    if head[257:262] == b"ustar":
        archive = "tar"
    if packed and (head.startswith(b"%PDF") or archive == "ZIP"):
        raise refuse(
            _("this is a document or an archive compressed with {packed}").format(packed=packed), _("unpack it")
        )
    if head.startswith(b"PK\x05\x06"):
        raise refuse(_("this archive is empty"), _("remove it from the recipe"))
    if archive and archive != "ZIP":
        raise refuse(
            _("this is a {archive} archive; only ZIP is read").format(archive=archive),
            _("unpack it and name the files in the recipe"),
        )
    if inner := next((name for sign, name in _PACKED.items() if packed and head.startswith(sign)), ""):
        raise refuse(_("this is compressed twice ({packed}, {inner})").format(packed=packed, inner=inner))
    if packed and is_table(head):
        raise refuse(
            _("this is a table (Parquet or Arrow) compressed with {packed}; it cannot be read directly").format(
                packed=packed
            ),
            _("unpack it"),
        )
    if foreign := next((name for sign, name in _FOREIGN.items() if head.startswith(sign)), ""):
        new = {".doc": ".docx", ".docx": ".docx", ".ppt": ".pptx", ".pptx": ".pptx"}.get(suffix(file), ".xlsx")
        remedy = _("save it as {new}, without a password").format(new=new) if foreign == _OLD_OFFICE else ""
        raise refuse(_("this is a {kind} file; it contains no rows").format(kind=foreign), remedy)
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise refuse(_("this is a Git LFS pointer, not the data"), "git lfs pull")
    is_page = re.match(rb"(?:\xef\xbb\xbf)?\s*(?:<!doctype html|<html[\s>]|<\?xml\s)", head, re.IGNORECASE)
    if is_page and (packed or suffix(file) not in HTML_SUFFIXES):
        raise refuse(
            _("this is a web page (HTML or XML), perhaps an error page of the download"),
            _("look at its content, then fetch the data again"),
        )
    if head and not head.strip(b"\0"):
        raise refuse(_("this file contains only NUL bytes: it is damaged"))
