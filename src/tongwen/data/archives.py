"""Read the data files inside a ZIP archive, one after the other, as if it were a folder."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from tongwen.core.errors import DataError, first_line
from tongwen.core.i18n import _
from tongwen.data import files
from tongwen.data.row import RawRow

UTF8_NAME, ENCRYPTED = 0x800, 0x1  # flags of a member


def read_archive(
    file: Path, name: str, read: Callable[[Path, str], Iterator[RawRow]], notify: Callable[[str], None]
) -> Iterator[RawRow]:
    """Yield the rows of each data file in an archive; their file is ARCHIVE/MEMBER. A member that cannot be read is a row with
    its reason. read(copy, name): yields the rows of a member. Raises DamagedFile when it is no archive."""
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise files.DamagedFile(_("this archive is damaged: {reason}").format(reason=first_line(error))) from None
    with archive, tempfile.TemporaryDirectory() as folder:
        members = [(member_name(one), one) for one in archive.infolist() if not one.is_dir()]
        if not any(files.suffix(Path(member)) in files.DATA_SUFFIXES for member, _one in members):
            raise files.DamagedFile(_("no member of this archive is a data file"))
        files.check_unpacked_size(file, sum(one.file_size for _member, one in members))
        for number, (member, one) in enumerate(sorted(members, key=lambda pair: pair[0])):
            place = f"{name}/{files.printable(member)}"
            path = PurePosixPath(member)
            suffix = files.suffix(Path(path.name))
            hidden = any(part.startswith((".", "__MACOSX")) and part != ".." for part in path.parts)
            if hidden or files.is_beside(path.name):
                continue
            if suffix in files.ARCHIVE_SUFFIXES:
                yield RawRow(
                    place, 1, "", 0, _("an archive inside an archive is not read: unpack it"), "nested_archive"
                )
            elif suffix not in files.DATA_SUFFIXES:
                notify(
                    _("{member} is not read: its name is that of no data file").format(member=files.printable(member))
                )
            elif one.flag_bits & ENCRYPTED:
                yield RawRow(place, 1, "", 0, _("it is encrypted: save it without a password"), "encrypted")
            else:
                copy = Path(folder) / f"{number}{''.join(path.suffixes[-2:])}"
                yield from _read_member(archive, one, copy, place, read)


def _read_member(
    archive: zipfile.ZipFile,
    one: zipfile.ZipInfo,
    copy: Path,
    place: str,
    read: Callable[[Path, str], Iterator[RawRow]],
) -> Iterator[RawRow]:
    try:
        with archive.open(one) as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, files.BLOCK)
        yield from read(copy, place)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
        rule = _("this archive is damaged: {reason}").format(reason=first_line(error))
        yield RawRow(place, 1, "", 0, rule, "damaged_file")
    except DataError as error:
        yield RawRow(place, 1, "", 0, error.rule, "damaged_file")
    finally:
        copy.unlink(missing_ok=True)


def member_name(one: zipfile.ZipInfo) -> str:
    """Return a member's name; one that is not marked as UTF-8 is GB18030 where that can be, as Windows in China writes it."""
    if one.flag_bits & UTF8_NAME:
        return one.filename
    written = one.filename.encode("cp437")
    for encoding in ("utf-8", "gb18030"):
        try:
            return written.decode(encoding)
        except UnicodeDecodeError:
            continue
    return one.filename
