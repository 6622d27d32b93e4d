"""Upload a finished folder to a hub, private by default, and compare the uploaded files with the local ones.

The hubs' own packages do the upload. The manifest is not uploaded: it contains paths of this machine, and the model card
repeats what readers need.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tongwen.core.errors import MachineError, MissingPackage, RecipeError
from tongwen.core.i18n import _
from tongwen.hub.names import HubRef, Notify, is_id
from tongwen.hub.transfer import HubClient, NotFound, endpoint, hash_of, shown_endpoint

IGNORED = ("manifest.json", "*.py", "*.partial")
MODELSCOPE_PRIVATE, MODELSCOPE_PUBLIC = 1, 5
TOKENS = {"hub": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}


def check_name(name: str) -> HubRef:
    """Parse OWNER/NAME or modelscope:OWNER/NAME. Raises RecipeError for anything else."""
    where, _unused, text = name.rpartition(":")
    if where not in ("", "hub", "modelscope") or not is_id(text):
        raise RecipeError(
            _("{name!r} is not a hub name").format(name=name),
            place="push",
            remedy=_("OWNER/NAME or modelscope:OWNER/NAME"),
        )
    return HubRef(name, text, "model", where or "hub")


def push(folder: Path, name: str, notify: Notify, *, public: bool = False) -> str:
    """Upload a folder; return its URL. Raises MachineError when the hub refuses, or its files differ afterwards."""
    ref = check_name(name)
    send = _to_modelscope if ref.where == "modelscope" else _to_hub
    return send(folder, ref, HubClient(ref, notify), public)


def _to_hub(folder: Path, ref: HubRef, client: HubClient, public: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint())

    def attempt() -> None:
        try:
            with client.translate_errors(ref.id):
                api.create_repo(ref.id, private=not public, exist_ok=True)
                api.upload_folder(repo_id=ref.id, folder_path=str(folder), ignore_patterns=list(IGNORED))
        except NotFound:
            raise _refused(ref) from None

    client.with_retries(ref.id, attempt)
    listing = client.list_files("model")
    remote_files = {remote.path: remote for remote in listing.files} if listing else {}
    for file in _files(folder):
        remote = remote_files.get(file.relative_to(folder).as_posix())
        if remote is None or hash_of(file, remote)[0] != remote.digest:
            raise _mismatch(file, ref)
    return f"{shown_endpoint()}/{ref.id}"


def _to_modelscope(folder: Path, ref: HubRef, client: HubClient, public: bool) -> str:
    try:
        from modelscope.hub.api import HubApi
    except ImportError:
        raise MissingPackage("modelscope", "ModelScope", "modelscope") from None
    api: Any = HubApi()
    try:
        api.login(os.environ.get(TOKENS["modelscope"]))
        if not api.repo_exists(ref.id, repo_type="model"):
            api.create_model(ref.id, visibility=MODELSCOPE_PUBLIC if public else MODELSCOPE_PRIVATE)
        api.upload_folder(repo_id=ref.id, folder_path=str(folder), ignore_patterns=list(IGNORED))
        remote_files = {str(one["Path"]): int(one["Size"]) for one in api.get_model_files(ref.id, recursive=True)}
    except Exception as error:  # a package with errors of many kinds; its text may repeat the token
        raise _refused(ref, type(error).__name__) from None
    for file in _files(folder):
        if remote_files.get(file.relative_to(folder).as_posix()) != file.stat().st_size:
            raise _mismatch(file, ref)
    return f"https://modelscope.cn/models/{ref.id}"


def _files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if not any(path.match(pattern) for pattern in IGNORED)]


def _refused(ref: HubRef, kind: str = "") -> MachineError:
    token = TOKENS[ref.where]
    return MachineError(
        _("the hub rejected the upload") + (f": {kind}" if kind else ""),
        place=ref.source,
        remedy=_("use a token with write access: export {token}=...   and an OWNER that the token belongs to").format(
            token=token
        ),
    )


def _mismatch(file: Path, ref: HubRef) -> MachineError:
    return MachineError(
        _("{file} on the hub differs from the file that was sent").format(file=file.name),
        place=ref.source,
        remedy=_("push it again"),
    )
