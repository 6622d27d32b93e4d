"""Download data sets, models and adapters from a hub into a folder, and verify every byte.

A file is moved to its final path only when its size and hash match the hub's, and the folder is renamed only when all files
are complete. The commit is pinned when a download begins, so that a download continued later does not mix two versions.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from tongwen.core import artifact, console, originals
from tongwen.core.errors import ArtifactError, DataError, MachineError, MissingPackage, RecipeError, TongwenError
from tongwen.core.i18n import _
from tongwen.hub.names import HubRef, Notify, nearest, resolve
from tongwen.hub.transfer import (
    HubClient,
    Listing,
    NotFound,
    RemoteFile,
    hash_of,
    is_offline,
    is_safe,
    offline_error,
    shown_endpoint,
    size_of,
)

KIND = "fetch"
WORK_FOLDER = ".fetch"  # inside OUT.partial: the plan and partial files; removed when the download is complete

CODE = ("*.py",)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
ONLY_FOR_TRAINING = (
    "training_args.bin",
    "optimizer*.pt",
    "optimizer*.bin",
    "scheduler*.pt",
    "rng_state*.pth",
    "runs/*",
)
OTHER_ENGINES = ("*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "onnx/*", "openvino/*", "*.tflite", "*.mlmodel")
ORIGINALS = ("original/*", "consolidated*")
HIDDEN = (".*", "*/.*")
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".txt", ".parquet", ".csv", ".tsv")
PACKED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
NOT_ROWS = ("dataset_info*.json", "dataset_dict.json", "state.json", "LICENSE*", "README*", "requirements.txt")


# -- choosing files ------------------------------------------------------------------------------------------------


def choose(files: Sequence[RemoteFile], ref: HubRef) -> tuple[list[RemoteFile], dict[str, list[str]]]:
    """Return (files to fetch, {reason: skipped files})."""
    names_ = [file.path for file in files]
    with_tensors = {_folder(name) for name in names_ if name.endswith(".safetensors")}
    chosen: list[RemoteFile] = []
    skipped: dict[str, list[str]] = {}
    for file in files:
        reason = _reason_to_skip(file.path, ref, with_tensors, names_)
        if reason:
            skipped.setdefault(reason, []).append(file.path)
        else:
            chosen.append(file)
    return chosen, skipped


def _reason_to_skip(path: str, ref: HubRef, with_tensors: set[str], all_: Sequence[str]) -> str:
    if _matches(path, HIDDEN) or path == artifact.MANIFEST:
        return _("not needed")
    if ref.files and not _is_requested(path, ref.files):
        return _("not requested")
    if not ref.code and _matches(path, CODE):
        return _("code, which tongwen never runs")
    if ref.kind != "model" or ref.files:
        return ""
    if _matches(path, ONLY_FOR_TRAINING):
        return _("training state")
    if _matches(path, PICKLES) and _folder(path) in with_tensors:
        return _("pickles; safetensors are fetched instead")
    if _matches(path, OTHER_ENGINES):
        return _("for other frameworks")
    if (
        _matches(path, ORIGINALS)
        and "config.json" in all_
        and any(name.startswith(("model", "pytorch_model")) for name in all_)
    ):
        return _("the same weights in another format")
    return ""


def _is_requested(path: str, patterns: Sequence[str]) -> bool:
    """Whether the path matches a pattern, and none that begins with `!`."""
    included = [pattern for pattern in patterns if not pattern.startswith("!")]
    excluded = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    return (_matches(path, included) or not included) and not _matches(path, excluded)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether the path or its file name matches a pattern."""
    return any(fnmatch(path, pattern) or fnmatch(PurePosixPath(path).name, pattern) for pattern in patterns)


def _folder(path: str) -> str:
    return str(PurePosixPath(path).parent)


# -- fetching ------------------------------------------------------------------------------------------------------


def with_kind(ref: HubRef, notify: Notify) -> HubRef:
    """Return the reference with its kind, looked up on the hub. Raises RecipeError when the hub has neither or both kinds."""
    if ref.kind:
        return ref
    client = HubClient(ref, notify)
    found = [kind for kind in ("model", "dataset") if client.list_files(kind) is not None]
    if not found:
        raise _not_found(ref)
    if len(found) == 2:
        raise RecipeError(
            _("both a model and a data set have this name"),
            place=ref.id,
            remedy="--kind model   |   --kind dataset",
        )
    return replace(ref, kind=found[0])


def fetch(
    ref: HubRef,
    out: Path,
    notify: Notify,
    *,
    settings: Mapping[str, Any] | None = None,
    complete: Callable[[artifact.Draft, list[str]], None] | None = None,
    again: bool = False,
    waits: Sequence[float] | None = None,
    sleep: Callable[[float], None] | None = None,
) -> tuple[artifact.Artifact, bool]:
    """Fetch all files into `out`; return (the folder, whether it already existed).

    settings:  further settings that the folder depends on; changed ones are refused without `again`
    complete:  called with the draft and the fetched paths before the folder is renamed; may add files and lists them in
               the fact `made`: path -> {bytes, sha256}
    """
    requested = {
        "source": ref.source,
        "kind": ref.kind,
        "revision": ref.revision,
        "files": list(ref.files),
        "code": ref.code,
        **(settings or {}),
    }
    originals.check_output(out)
    artifact.check_working(out)
    with _folder_lock(out, notify):
        found = _find_existing(out)
        if found is not None and not again:
            check_existing(found, requested)
            return found, True
        if found is not None:
            _reuse(found, out, notify, link=ref.where == "hub")
        with artifact.create(out, KIND, {}, requested, resumable=True) as draft:
            if ref.where == "modelscope":
                files = _from_modelscope(ref, draft)
            else:
                files = _from_hub(ref, draft, HubClient(ref, notify, waits, sleep), reserve=complete is not None)
            draft.facts["files"] = files
            if complete is not None:
                complete(draft, list(files))
            _remove_leftovers(draft, files)
            made = draft.facts.get("made", {})
            hashes = {name: facts["sha256"] for name, facts in {**files, **made}.items()}
            draft.fingerprint = artifact.fingerprint_hashes(hashes)
        assert draft.artifact is not None
        return draft.artifact, False


def local_copy(path: str, notify: Notify) -> str:
    """Return the local folder of the data set `hub:OWNER/NAME` or `modelscope:OWNER/NAME`; fetch it if missing."""
    ref = resolve(path, notify, kind="dataset")
    rows = (f"*{suffix}{packed}" for suffix in DATA_SUFFIXES for packed in ("", *PACKED_SUFFIXES))
    ref = replace(ref, files=ref.files or (*rows, *(f"!{name}" for name in NOT_ROWS)))
    name = ref.id.replace("/", "--") + (f"@{ref.revision.replace('/', '--')}" if ref.revision else "")
    out = artifact.cache_folder() / "data" / (name if ref.where == "hub" else f"modelscope--{name}")
    _unused, was_present = fetch(ref, out, notify)
    if not was_present:
        notify(f"{path} → {out}")
    return str(out)


def check_existing(found: artifact.Artifact, requested: Mapping[str, Any]) -> None:
    """Raise when a finished folder was made from other settings, or the sizes of its files have changed."""
    artifact.refuse_changed(
        str(found.path),
        artifact.differences(found.manifest["settings"], requested),
        _("--again fetches again and keeps this folder under another name; or --out ANOTHER"),
    )
    for name, facts in {**found.manifest.get("files", {}), **found.manifest.get("made", {})}.items():
        size = size_of(found.path / name)
        if size != facts["bytes"]:
            raise ArtifactError(
                _("the file has {size} bytes, but the download had {bytes}").format(size=size, bytes=facts["bytes"]),
                place=str(found.path / name),
                remedy=_("--again fetches incomplete files again") + f"   |   rm -r {found.path}",
            )


def _from_hub(ref: HubRef, draft: artifact.Draft, client: HubClient, *, reserve: bool) -> dict[str, dict[str, Any]]:
    """Fetch all files of the plan into the draft's folder; return {path: bytes and sha256}."""
    for last in (False, True):
        listing, planned = _plan(ref, draft, client)
        try:
            files = _fetch_missing(listing, draft, client, reserve=reserve)
        except NotFound as error:
            _plan_file(draft).unlink(missing_ok=True)
            if not planned or last:
                raise MachineError(
                    _("the hub lists this file but does not have it"),
                    place=str(error),
                    remedy=_("run the same command again"),
                ) from None
            continue  # the hub no longer has the pinned commit: start over with the current one
        break
    draft.parents["source"] = {"path": f"{ref.source}@{listing.commit}", "fingerprint": listing.commit}
    draft.facts["source"] = {"where": "hub", "id": listing.id, "kind": ref.kind, "commit": listing.commit}
    return files


def _plan(ref: HubRef, draft: artifact.Draft, client: HubClient) -> tuple[Listing, bool]:
    """Return (commit and files to fetch, whether an interrupted download had planned them)."""
    file = _plan_file(draft)
    request = {**asdict(ref), "name": "", "files": list(ref.files)}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        plan = json.loads(file.read_text(encoding="utf-8"))
        if plan["request"] == request:
            return Listing(plan["id"], plan["commit"], tuple(RemoteFile(**one) for one in plan["files"])), True
    listing = client.list_files(ref.kind)
    if listing is None:
        raise _not_found(ref)
    if listing.id.lower() != ref.id.lower():
        client.notify(_("{wanted} is now called {listing}").format(wanted=ref.id, listing=listing.id))
    chosen, skipped = choose(listing.files, ref)
    for reason, paths in skipped.items():
        shown = ", ".join(paths[:3]) + (" …" if len(paths) > 3 else "")
        client.notify(_("skipped ({reason}): {shown}").format(reason=reason, shown=shown))
    if not chosen:
        have = ", ".join(file.path for file in listing.files[:10]) or _("nothing")
        raise DataError(
            _("it contains no file that tongwen needs; it contains: {have}").format(have=have),
            place=ref.id,
        )
    if ref.kind == "model" and any(_matches(one.path, PICKLES) for one in chosen):
        client.notify(_("its weights are pickles (it has no safetensors): tongwen reads only tensors from them"))
    listing = replace(listing, files=tuple(chosen))
    file.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_json(
        file,
        {"request": request, "id": listing.id, "commit": listing.commit, "files": [asdict(one) for one in chosen]},
    )
    return listing, False


def _fetch_missing(
    listing: Listing, draft: artifact.Draft, client: HubClient, *, reserve: bool
) -> dict[str, dict[str, Any]]:
    """Fetch the missing files of a listing; keep existing files whose hash is right."""
    work = draft.path / WORK_FOLDER
    total = sum(one.size for one in listing.files)
    parts = {one.path: work / f"{one.digest}.part" for one in listing.files}
    out: dict[str, dict[str, Any]] = {}
    for one in listing.files:
        target = draft.path / one.path
        if target.is_file() and target.stat().st_size == one.size:
            found, sha256 = hash_of(target, one)
            if found == one.digest:
                out[one.path] = {"bytes": one.size, "sha256": sha256}
                continue
        target.unlink(missing_ok=True)
    missing = [one for one in listing.files if one.path not in out]
    partial_size = sum(min(size_of(parts[one.path]), one.size) for one in missing)
    done = total - sum(one.size for one in missing)
    artifact.check_disk(draft.path, total - done - partial_size + (total if reserve else 0))
    with console.progress(
        _megabytes(total), f"{listing.id.split('/')[-1]} MB", _megabytes(done + partial_size, up=False)
    ) as bar:
        for one in missing:
            before = done

            def on_progress(size: int, before: int = before) -> None:
                bar.update(_megabytes(before + size, up=False))

            sha256 = client.fetch(one, listing, draft.path / one.path, parts[one.path], on_progress)
            out[one.path] = {"bytes": one.size, "sha256": sha256}
            done += one.size
    return {one.path: out[one.path] for one in listing.files}


def _find_existing(out: Path) -> artifact.Artifact | None:
    """Return the finished download at this path, or None. Raises ArtifactError for any other file or folder."""
    found = artifact.find(out)
    if found is not None and found.kind == KIND:
        return found
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if out.exists():
        raise ArtifactError(
            _("another file or folder already exists at this path"), place=str(out), remedy="--out ANOTHER"
        )
    return None


def _reuse(found: artifact.Artifact, out: Path, notify: Notify, *, link: bool) -> None:
    """Move a finished folder aside and hard-link its files into the new one, so that no byte is fetched twice. link: False
    for a downloader that may write into existing files."""
    partial = artifact.partial_of(out)
    artifact.empty(partial)
    aside = artifact.put_aside(out)
    assert aside is not None
    notify(_("the old folder is kept as {aside}").format(aside=aside))
    for name in found.manifest.get("files", {}) if link else ():
        target = partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # then it is fetched
            os.link(aside / name, target)


def _remove_leftovers(draft: artifact.Draft, files: Mapping[str, Any]) -> None:
    """Delete files of the draft that are neither downloaded nor made: partial files, and files of an earlier plan."""
    keep = {*files, *draft.facts.get("made", {}), artifact.MARK}
    for path in sorted(draft.path.rglob("*"), reverse=True):
        name = path.relative_to(draft.path).as_posix()
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif name not in keep:
            path.unlink()


@contextlib.contextmanager
def _folder_lock(out: Path, notify: Notify) -> Iterator[None]:
    """Lock a folder: one process at a time fetches into it; the others wait and then find it finished."""
    from filelock import FileLock, Timeout

    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(out.with_name(f".{out.name}.lock")))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        notify(_("another process is downloading {out}: waiting").format(out=out))
        lock.acquire()
    except NotImplementedError:  # a file system without locks: the hashes still verify the result
        yield
        return
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def _not_found(ref: HubRef) -> RecipeError:
    near = ", ".join(nearest(ref.id))
    at = f"@{ref.revision}" if ref.revision else ""
    kinds = {"model": _("model"), "dataset": _("dataset")}
    kind = kinds.get(ref.kind, _("model or data set"))
    return RecipeError(
        _("{endpoint} has no {kind} {wanted}{at}, or it is private").format(
            endpoint=shown_endpoint(), kind=kind, wanted=ref.id, at=at
        ),
        place=ref.name,
        remedy=_("known names: {near}; for a private one: export HF_TOKEN=hf_...").format(near=near),
    )


def _plan_file(draft: artifact.Draft) -> Path:
    return draft.path / WORK_FOLDER / "plan.json"


def _megabytes(size: int, *, up: bool = True) -> int:
    return max(-(-size // 10**6), 1) if up else size // 10**6


# -- ModelScope ----------------------------------------------------------------------------------------------------


def _from_modelscope(ref: HubRef, draft: artifact.Draft) -> dict[str, dict[str, Any]]:
    """Fetch all files of a ModelScope repository with its own package, which resumes and verifies by itself."""
    try:
        from modelscope import snapshot_download
        from modelscope.hub.api import HubApi
        from modelscope.hub.snapshot_download import dataset_snapshot_download
    except ImportError:
        raise MissingPackage("modelscope", _("downloading from ModelScope"), "modelscope") from None
    options: dict[str, Any] = {"local_dir": str(draft.path), "revision": ref.revision or "master"}
    expected: dict[str, int] = {}
    if is_offline():
        raise offline_error(ref.source)
    try:
        if ref.kind == "model":
            listed = [
                RemoteFile(str(one["Path"]), int(one.get("Size") or 0))
                for one in HubApi().get_model_files(ref.id, revision=options["revision"], recursive=True)
                if one.get("Type") != "tree"
            ]
            chosen, _unused = choose([one for one in listed if is_safe(one.path)], ref)
            expected = {one.path: one.size for one in chosen}
            snapshot_download(ref.id, allow_patterns=sorted(expected), **options)
        else:
            included = [pattern for pattern in ref.files if not pattern.startswith("!")]
            skipped = [pattern[1:] for pattern in ref.files if pattern.startswith("!")] + ([] if ref.code else [*CODE])
            dataset_snapshot_download(ref.id, allow_patterns=included or None, ignore_patterns=skipped, **options)
    except TongwenError:
        raise
    except Exception as error:  # the package raises errors of many libraries
        if (
            isinstance(error, OSError)
            and error.errno is not None
            and not isinstance(error, (ConnectionError, TimeoutError))
        ):
            raise
        raise MachineError(
            _("cannot download this from ModelScope: {type}: {error}").format(
                type=type(error).__name__, error=str(error)[:160]
            ),
            place=ref.source,
            remedy=_("the same command continues"),
        ) from None
    files = {
        name: {"bytes": path.stat().st_size, "sha256": artifact.hash_file(path)}
        for path in sorted(draft.path.rglob("*"))
        if path.is_file() and not _matches(name := path.relative_to(draft.path).as_posix(), HIDDEN)
        if name != artifact.MANIFEST
    }
    for name, size in expected.items():
        if name not in files or (size and files[name]["bytes"] != size):
            raise MachineError(
                _("ModelScope lists {size} bytes, but {bytes} arrived").format(
                    size=size, bytes=files.get(name, {}).get("bytes", 0)
                ),
                place=f"{ref.source}/{name}",
                remedy=_("the same command continues"),
            )
    if not files:
        raise DataError(_("it contains no file that tongwen needs"), place=ref.source)
    draft.parents["source"] = {"path": f"{ref.source}@{options['revision']}"}
    draft.facts["source"] = {"where": "modelscope", "id": ref.id, "kind": ref.kind, "commit": options["revision"]}
    return files
