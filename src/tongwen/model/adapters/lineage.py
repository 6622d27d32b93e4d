"""Check that base, adapters and tokenizer belong together, by recorded fingerprints where they exist.

An adapter from tongwen records the fingerprint of its base, which may include adapters. Other tools record a name at
best: their adapters are checked by shapes only, and a notice says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tongwen.core import artifact
from tongwen.core.errors import ArtifactError
from tongwen.core.i18n import _
from tongwen.core.rowless_tokens import read_rowless
from tongwen.core.safetensors_io import TensorSource
from tongwen.model.adapters.read import HEADS, Adapter, whole_rows
from tongwen.model.loading.fingerprint import combine, digests_of, fingerprint_chain, order_that_fits


@dataclass(frozen=True)
class AdapterLink:
    """One adapter in a chain. recorded: the fingerprint of its base, None if it does not record one."""

    adapter: Adapter
    stage: artifact.Artifact | None
    recorded: str | None
    fingerprint: str

    @property
    def name(self) -> str:
        return str(self.adapter.folder)

    @property
    def trained_on(self) -> str:
        """Path or name of the adapter's base; empty if it does not record one."""
        recorded = self.stage.manifest["parents"].get("base", {}).get("path") if self.stage else None
        return str(recorded or self.adapter.config.get("base_model_name_or_path") or "")


def read_link(adapter: Adapter) -> AdapterLink:
    """Read an adapter's lineage. Raises ArtifactError when its tensors differ from those in its manifest."""
    stage = _stage_of(adapter.folder)
    fingerprint = _checked_fingerprint(adapter.folder, adapter.tensors, stage)
    recorded = stage.manifest["parents"].get("base", {}).get("fingerprint") if stage else None
    return AdapterLink(adapter, stage, recorded, fingerprint)


def fingerprint_of(folder: Path, tensors: TensorSource) -> str:
    """Return the fingerprint of an adapter's tensors. Raises ArtifactError when its manifest records another."""
    return _checked_fingerprint(folder, tensors, _stage_of(folder))


def _checked_fingerprint(folder: Path, tensors: TensorSource, stage: artifact.Artifact | None) -> str:
    fingerprint = combine(digests_of(tensors))
    if stage and stage.fingerprint != fingerprint:
        raise ArtifactError(
            _("its tensors have the fingerprint {own}, but its manifest records {fingerprint}").format(
                own=fingerprint[:12], fingerprint=stage.fingerprint[:12]
            ),
            place=str(folder),
            remedy=_("the file was changed or damaged after training"),
        )
    return fingerprint


def _stage_of(folder: Path) -> artifact.Artifact | None:
    """Return the stage that made an adapter; None without one, and for a download, whose manifest is of its files."""
    found = artifact.find(folder)
    return found if found and found.kind != "fetch" else None


def check_chain(base: str, fingerprint: str, links: Sequence[AdapterLink]) -> None:
    """Raise ArtifactError when an adapter was trained on another base than the one below it in this chain."""
    model = ModelBelow(fingerprint)
    for number, link in enumerate(links):
        if link.recorded and not model.is_base_of(link.adapter.folder, link.recorded, link.trained_on):
            raise ArtifactError(
                _("the adapter was trained on a base with fingerprint {recorded}, but here the base is {below}").format(
                    recorded=link.recorded[:12], below=model.fingerprint[:12]
                )
                + (f" ({base})" if number == 0 else f" ({base} + {' + '.join(one.name for one in links[:number])})"),
                place=link.name,
                remedy=_remedy(fingerprint, links, link),
            )
        model.add(link.fingerprint, link.recorded)


class ModelBelow:
    """The model below an adapter: a base and the adapters on it so far.

    The same model can have been made in several ways, of which each has a fingerprint of its own.
    """

    def __init__(self, base: str) -> None:
        self.base, self.fingerprint, self.same, self.adapters = base, base, {base}, list[str]()

    def add(self, adapter: str, recorded: str | None) -> None:
        """Put an adapter on it. recorded: the fingerprint of the base that the adapter names, which is this model's too."""
        self.same = {fingerprint_chain(one, adapter) for one in {*self.same, *([recorded] if recorded else [])}}
        self.fingerprint = fingerprint_chain(self.fingerprint, adapter)
        self.adapters.append(adapter)

    def is_base_of(self, folder: Path, recorded: str, trained_on: str) -> bool:
        """Whether an adapter that was trained on the model of this fingerprint stands on this one.

        It also does where tongwen made its base of this one, as the manifest beside that base says: by a merge of this base
        and the adapters so far; or by a larger vocabulary, whose rows the adapter brings in full,
        those of the head, too, where the vocabulary stage changed old ones.
        """
        if recorded in self.same:
            return True
        try:
            made = artifact.find(Path(trained_on)) if trained_on else None
        except ArtifactError:
            return False
        if made is None or made.fingerprint != recorded:
            return False
        parents = made.manifest["parents"]
        own = parents.get("base", {}).get("fingerprint")
        if made.kind == "vocab":
            brought = whole_rows(folder)
            lacks_head = made.manifest.get("changed_head") and not any(name.endswith(HEADS) for name in brought)
            return own in self.same and bool(brought) and not lacks_head
        roles = sorted((role for role in parents if role.startswith("adapter")), key=_place_of_role)
        merged = [parents[role].get("fingerprint") for role in roles]
        return made.kind == "model" and own == self.base and bool(merged) and merged == self.adapters


def _place_of_role(role: str) -> int:
    """Return the place of an adapter among a merge's parents: adapter_2 is the second."""
    number = role.rpartition("_")[2]
    return int(number) if number.isdecimal() else 0


def describe_unverified(base: str, links: Sequence[AdapterLink]) -> list[str]:
    """Return a notice for each adapter that does not record its base, so that lineage cannot be verified."""
    out = []
    for number, link in enumerate(links):
        if link.recorded:
            continue
        below = base if number == 0 else links[number - 1].name
        named = link.trained_on
        differs = bool(named) and Path(named).name.lower() != Path(below).name.lower()
        if differs:
            rule = _("{link} does not record its base; only shapes and names can be checked (it names {named})")
        else:
            rule = _("{link} does not record its base; only shapes and names can be checked")
        out.append(rule.format(link=link.name, named=named))
    return out


def highest_token(folder: Path) -> tuple[int, str] | None:
    """Return (highest id of a folder's tokenizer, its text); None without a tokenizer that can be read without code."""
    file, old = folder / "tokenizer.json", folder / "tokenizer.model"
    tokens: dict[int, str] = {}
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            vocabulary = found["model"]["vocab"]
            if isinstance(vocabulary, dict):
                tokens = {int(index): text for text, index in vocabulary.items()}
            else:
                tokens = {index: text for index, (text, _) in enumerate(vocabulary)}
            tokens |= {int(token["id"]): token["content"] for token in found.get("added_tokens", ())}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ArtifactError(_("the tokenizer cannot be read"), place=str(file)) from None
    elif old.is_file():
        count, last = _pieces(old)
        tokens = {count - 1: last}
        if (folder / "added_tokens.json").is_file():
            added = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
            tokens |= {int(index): text for text, index in added.items()}
    return max(tokens.items(), default=None)


def check_vocabulary(folder: Path, rows: int, place: str) -> None:
    """Raise ArtifactError when a folder's tokenizer has ids for which the embedding has no row."""
    highest = highest_token(folder)
    spare, needed = read_rowless(folder, rows)
    if highest is not None and highest[0] >= rows and (needed or not spare):
        raise ArtifactError(
            _("the tokenizer has ids up to {highest} ({token}), but the merged embedding has only {rows} rows").format(
                highest=highest[0], token=highest[1], rows=rows
            ),
            place=place,
            remedy=_(
                "this tokenizer belongs to a model with a larger vocabulary: the adapter that brings those rows is missing, or the order is wrong"
            ),
        )


def _remedy(fingerprint: str, links: Sequence[AdapterLink], wrong: AdapterLink) -> str:
    order = order_that_fits(fingerprint, [(link.recorded, link.fingerprint) for link in links])
    if order is not None:
        return _("the correct order: {order}").format(
            order=" ".join(f"--adapter {links[index].name}" for index in order)
        )
    return _("merge onto {trained_on}").format(trained_on=wrong.trained_on)


def _pieces(file: Path) -> tuple[int, str]:
    """Return (number of pieces of a SentencePiece model, the last piece).

    The protobuf message repeats field 1 once per piece, and a piece begins with its text.
    """
    data, at, count, last = file.read_bytes(), 0, 0, b""

    def number(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value, at

    try:
        while at < len(data):
            key, at = number(at)
            size = 0
            if key & 7 == 2:  # a message or a text, with its length
                size, at = number(at)
                at += size
            elif key & 7 == 0:
                _unused, at = number(at)
            else:
                at += {1: 8, 5: 4}[key & 7]
            if key == (1 << 3 | 2):
                count, last = count + 1, data[at - size : at]
    except (IndexError, KeyError):
        raise ArtifactError(_("this is not a SentencePiece model"), place=str(file)) from None
    return count, last[2 : 2 + last[1]].decode("utf-8", "replace") if len(last) > 1 else ""
