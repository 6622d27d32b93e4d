"""The connection to the hub: list the files of a commit, and download single files, verified by size and hash.

Failures (a connection, a server, a proxy that answers with a web page) are retried, and the download resumes where it
stopped, because files are large and networks unreliable.

huggingface_hub lists files, authorises and opens connections (proxies, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE). Its own
download is not used: it discards partial files when the process ends and does not compare the hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tongwen.core.errors import DataError, MachineError
from tongwen.core.i18n import _
from tongwen.hub.names import HubRef, Notify, unknown

OFFICIAL, MIRROR = "https://huggingface.co", "https://hf-mirror.com"
WAITS_SECONDS = (
    1.0,
    2.0,
    4.0,
    8.0,
    16.0,
    32.0,
)  # before the second try, the third, ...; starts over whenever bytes arrived
FIRST_TRIES = 3  # while the hub has not answered at all: report a network that is down without a minute's wait
WHOLE_TRIES = 3  # of a complete file with a wrong hash: each try takes as long as the first
LONGEST_WAIT_SECONDS = 120.0  # limit for `Retry-After`
CONNECT_SECONDS = 10.0

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file in the hub's listing, with the `sha256` of the content, or only git's hash if the hub lists no sha256."""

    path: str
    size: int
    sha256: str = ""
    git: str = ""

    @property
    def digest(self) -> str:
        return self.sha256 or self.git


@dataclass(frozen=True)
class Listing:
    """The files of one commit."""

    id: str
    commit: str
    files: tuple[RemoteFile, ...]


class TransientError(Exception):
    """A failure that may not repeat. wait: seconds that the server asked for; answered: whether the server answered."""

    def __init__(self, what: str, wait: float = 0.0, *, answered: bool = True) -> None:
        self.what, self.wait, self.answered = what, wait, answered
        super().__init__(what)


class NotFound(Exception):
    """The hub has no such repository, revision or file."""


class HubClient:
    """A client of the hub that retries each request with growing waits."""

    def __init__(
        self,
        ref: HubRef,
        notify: Notify,
        waits: Sequence[float] | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self.ref, self.notify = ref, notify
        self.waits = WAITS_SECONDS if waits is None else waits
        self.sleep = sleep or time.sleep
        self.answered = False

    def with_retries(self, place: str, attempt: Callable[[], T], bytes_so_far: Callable[[], int] = lambda: 0) -> T:
        """Return the result of `attempt`, retried after a TransientError. bytes_so_far: bytes on disk; when the number grows,
        the count of tries starts over.

        Raises MachineError when all tries have failed.
        """
        if is_offline():
            raise offline_error(place)
        best, used = bytes_so_far(), 0
        while True:
            try:
                result = attempt()
                self.answered = True
                return result
            except TransientError as error:
                self.answered = self.answered or error.answered
                if bytes_so_far() > best:
                    best, used = bytes_so_far(), 0
                tries = len(self.waits) if self.answered else min(FIRST_TRIES - 1, len(self.waits))
                if used >= tries:
                    raise self._download_failed(place, error.what, used + 1) from None
                wait = max(self.waits[used], min(error.wait, LONGEST_WAIT_SECONDS))
                used += 1
                self.notify(
                    _("{place}: {what}; retrying in {wait:g} s ({used} of {tries})").format(
                        place=place, what=error.what, wait=wait, used=used, tries=tries
                    )
                )
            self.sleep(wait)

    def list_files(self, kind: str) -> Listing | None:
        """Return the files of the revision's current commit; None when the repository does not exist."""
        ref = self.ref

        def attempt() -> Listing | None:
            from huggingface_hub import HfApi

            try:
                with self.translate_errors(ref.id):
                    info: Any = HfApi(endpoint=endpoint()).repo_info(
                        ref.id,
                        repo_type=kind,
                        revision=ref.revision or None,
                        files_metadata=True,
                        timeout=_timeout()[1],
                    )
                    files = tuple(_remote(sibling, ref) for sibling in info.siblings or ())
                    return Listing(str(info.id or ref.id), str(info.sha or ref.revision or "main"), files)
            except NotFound:
                return None
            except (ValueError, KeyError, TypeError, AttributeError):  # the response is not the expected JSON
                raise TransientError(_("the response is not from the hub (a login page?)")) from None

        return self.with_retries(ref.id, attempt)

    def fetch(
        self, remote: RemoteFile, listing: Listing, target: Path, part: Path, on_progress: Callable[[int], None]
    ) -> str:
        """Download one file to `target`, resuming from `part`; return its sha256. Raises MachineError or NotFound."""
        from huggingface_hub import hf_hub_url

        place = f"{listing.id}/{remote.path}"
        url = hf_hub_url(listing.id, remote.path, repo_type=self.ref.kind, revision=listing.commit, endpoint=endpoint())
        wrong = 0

        def attempt() -> str:
            nonlocal wrong
            offset = size_of(part)
            if offset > remote.size:
                part.unlink()
                offset = 0
            if offset < remote.size or not part.exists():
                with self.translate_errors(place):
                    self._stream(url, place, remote, part, offset, on_progress)
            found, sha256 = hash_of(part, remote)
            if found != remote.digest:
                part.unlink()
                wrong += 1
                what = _("the content is wrong: its hash is {found}, but the hub lists {digest}").format(
                    found=found, digest=remote.digest
                )
                raise self._download_failed(place, what, wrong) if wrong >= WHOLE_TRIES else TransientError(what)
            return sha256

        sha256 = self.with_retries(place, attempt, lambda: size_of(part))
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)
        return sha256

    def _stream(
        self, url: str, place: str, remote: RemoteFile, part: Path, offset: int, on_progress: Callable[[int], None]
    ) -> None:
        """Append the missing bytes to `part`. Raises TransientError when the server sends fewer or more than the file's size."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        headers = dict(build_hf_headers())
        headers["Accept-Encoding"] = "identity"  # otherwise lengths and offsets are those of the compressed body
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=_timeout()) as response:
            if offset and response.status_code == 416:
                part.unlink()
                raise TransientError(_("the server refuses to resume; starting over"))
            self._check_status(response, place)
            is_page = response.headers.get("Content-Type", "").lower().startswith("text/html")
            if is_page and not remote.path.lower().endswith((".html", ".htm")):
                raise TransientError(_("the server sent a web page instead of the file (a login page?)"))
            resumes = response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
            if offset and not (response.status_code == 206 and resumes):
                offset = 0
            with part.open("ab" if offset else "wb") as stream:
                for block in response.iter_bytes():
                    if offset + len(block) > remote.size:
                        stream.truncate(0)
                        raise TransientError(
                            _("the server sent more than the {size} bytes of the file").format(size=remote.size)
                        )
                    stream.write(block)
                    offset += len(block)
                    on_progress(offset)
        if offset < remote.size:
            raise TransientError(
                _("the connection ended after {have} of {size} bytes").format(have=offset, size=remote.size)
            )

    @contextlib.contextmanager
    def translate_errors(self, place: str) -> Iterator[None]:
        """Translate the exceptions of huggingface_hub and its HTTP library into ours. The server's own text is not repeated:
        a hostile server could return the token that it received."""
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

        try:
            yield
        except GatedRepoError:
            raise self._refused(place, 403) from None
        except RepositoryNotFoundError:  # the hub also answers 401 for repositories that do not exist
            self.answered = True
            raise NotFound(place) from None
        except HFValidationError:
            raise unknown(self.ref.name, self.ref.id) from None
        except HfHubHTTPError as error:
            self._check_status(error.response, place)
            raise
        except UnicodeEncodeError:
            raise MachineError(
                _("the token contains characters that cannot occur in a token"),
                place="HF_TOKEN",
                remedy="export HF_TOKEN=hf_...",
            ) from None
        except network_error() as error:
            raise TransientError(
                _("the connection failed ({type})").format(type=type(error).__name__),
                answered=False,
            ) from None

    def _check_status(self, response: Any, place: str) -> None:
        """Raise TransientError, NotFound or MachineError unless the request succeeded."""
        self.answered = True
        status = response.status_code
        if status in (404, 410):
            raise NotFound(place)
        if status in (408, 425, 429) or status >= 500:
            raise TransientError(f"HTTP {status}", _retry_after(response.headers))
        if status >= 400:
            raise self._refused(place, status)

    def _refused(self, place: str, status: int) -> MachineError:
        if status not in (401, 403):
            return MachineError(
                _("the hub refused: HTTP {status}").format(status=status), place=place, remedy=self._remedy()
            )
        page = f"{shown_endpoint()}/{'datasets/' if self.ref.kind == 'dataset' else ''}{self.ref.id}"
        return MachineError(
            _("the hub denied access: HTTP {status}").format(status=status),
            place=place,
            remedy=_("request access at {page}, then: export HF_TOKEN=hf_...").format(page=page),
        )

    def _download_failed(self, place: str, what: str, tries: int) -> MachineError:
        return MachineError(
            _("cannot download from {endpoint}: {what}; {tries} tries").format(
                endpoint=shown_endpoint(), what=what, tries=tries
            ),
            place=place,
            remedy=self._remedy(),
        )

    def _remedy(self) -> str:
        other = OFFICIAL if "hf-mirror" in endpoint() else MIRROR
        alternative = f"modelscope:{self.ref.modelscope or 'OWNER/NAME'}"
        return _(
            "export HF_ENDPOINT={other}   and run the same command to continue; or use ModelScope:   tongwen fetch {there}"
        ).format(other=other, there=alternative)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that the server asks to wait: `Retry-After` (number or date), or the hub's `RateLimit: ...;t=N`."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    if reset := re.search(r";\s*t=(\d{1,9})", headers.get("RateLimit", "")):
        return float(reset[1])
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return 0.0


def is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def endpoint() -> str:
    """Return the hub's URL: HF_ENDPOINT, or the official one. Raises MachineError when it is not a URL."""
    from huggingface_hub import constants

    address = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise MachineError(
            _("{address!r} is not a URL").format(address=address),
            place="HF_ENDPOINT",
            remedy=f"export HF_ENDPOINT={MIRROR}",
        )
    return address


def shown_endpoint() -> str:
    """Return the hub's URL without user name and password, for messages."""
    parts = urlsplit(endpoint())
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def network_error() -> type[Exception]:
    """Return the base class of connection errors, from httpx or httpx2, whichever this huggingface_hub uses."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__module__.startswith("httpx"))


def _timeout() -> tuple[float, float, float, float]:
    """Return timeouts (connect, read, write, pool) in seconds; HF_HUB_DOWNLOAD_TIMEOUT limits the time without a byte."""
    from huggingface_hub import constants

    silence = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    return (min(CONNECT_SECONDS, silence), silence, silence, silence)


def _remote(sibling: Any, ref: HubRef) -> RemoteFile:
    path = str(sibling.rfilename)
    if not is_safe(path):
        raise DataError(
            _("the hub lists a file whose path leads outside the folder: {path!r}").format(path=path[:80]),
            place=ref.id,
            remedy=_("do not trust this source; nothing was downloaded"),
        )
    large = sibling.lfs or {}
    sha256, git = str(large.get("sha256") or ""), str(sibling.blob_id or "")
    size = sibling.size if sibling.size is not None else large.get("size")
    if size is None or not (
        re.fullmatch(r"[0-9a-f]{64}", sha256) or (not large and re.fullmatch(r"[0-9a-f]{40}", git))
    ):
        raise MachineError(
            _("this hub gives no size or hash, so downloads cannot be verified"),
            place=f"{ref.id}/{path}",
            remedy=f"export HF_ENDPOINT={OFFICIAL}",
        )
    return RemoteFile(path, int(size), sha256, "" if sha256 else git)


def is_safe(path: str) -> bool:
    """Whether a listed path stays inside the folder, on every operating system."""
    parts = path.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not re.search(r"[\\\x00-\x1f\x7f]|^[A-Za-z]:", path)


def hash_of(file: Path, remote: RemoteFile) -> tuple[str, str]:
    """Return (hash to compare with `remote.digest`, sha256) of a file on disk."""
    sha256 = hashlib.sha256()
    git = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            sha256.update(block)
            if not remote.sha256:
                git.update(block)
    return (sha256 if remote.sha256 else git).hexdigest(), sha256.hexdigest()


def size_of(file: Path) -> int:
    """Return the size of a file in bytes; 0 when it does not exist."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def offline_error(place: str) -> MachineError:
    return MachineError(
        _("this is not on the machine, and HF_HUB_OFFLINE=1 forbids downloading it"),
        place=place,
        remedy="unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE",
    )
