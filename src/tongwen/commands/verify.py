"""verify: compare a file or folder with every known hash of it.

Four sources: our own manifest (tensors and files), md5 lists beside an original download, the published SHA256 of LLaMA
and Chinese-LLaMA/Alpaca, and a list that the user names. A contradiction is an error; if no source knows the files, that is
an error as well, because nothing was verified.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

from tongwen.core import artifact, console
from tongwen.core.errors import ArtifactError, ModelError, RecipeError, TongwenError, raise_all
from tongwen.core.i18n import _
from tongwen.core.safetensors_io import find_tensors
from tongwen.export import checksums, pth
from tongwen.workflows.finished import fingerprint_now, recorded_files

WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.gguf", "*.model")


class VerifyReport:
    """The sources that agree with each file, and the contradictions."""

    def __init__(self) -> None:
        self.sources: dict[str, list[str]] = defaultdict(list)
        self.problems: list[TongwenError] = []

    def compare(self, name: str, expected: str, found: str, source: str, place: str) -> None:
        if expected == found:
            self.sources[name].append(source)
        else:
            self.add_problem(
                _("its hash is {found}…, {source} says {expected}…").format(
                    found=found[:16], source=source, expected=expected[:16]
                ),
                place,
            )

    def add_problem(self, rule: str, place: str) -> None:
        remedy = _("fetch or make this file again: it is damaged or not the same file")
        self.problems.append(ArtifactError(rule, place=place, remedy=remedy))


def run(path: str, against: str) -> int:
    """Return 0 only if something was compared and everything agreed. against: a list's file, `known`, or empty."""
    target = Path(path)
    if not target.exists():
        raise RecipeError(_("this path does not exist"), place=path)
    folder = target if target.is_dir() else target.parent
    files = [target] if target.is_file() else sorted(file for file in folder.iterdir() if file.is_file())
    files = [file for file in files if file.name != artifact.MANIFEST]
    lists = _lists(folder, against)
    verdicts = VerifyReport()
    console.header("verify", path)
    stage = artifact.find(folder) if target.is_dir() else None
    _check_complete(folder, files, verdicts)
    hashes = _hash_all(files, lists)
    for name, expected, source in _expectations(folder, lists, stage):
        file = folder / name
        if file in hashes:
            found = hashes[file]["md5" if len(expected) == 32 else "sha256"]
            verdicts.compare(name, expected, found, source, str(file))
        elif target.is_dir():
            verdicts.add_problem(_("{source} lists this file, but it is missing").format(source=source), str(file))
    _compare_published(hashes, verdicts, strict=against == "known")
    if stage and not verdicts.problems:
        _compare_stage(stage, verdicts)
    raise_all(verdicts.problems)
    return _report(path, files, hashes, verdicts)


def _lists(folder: Path, against: str) -> list[Path]:
    named = [Path(against)] if against and against != "known" else []
    for file in named:
        if not file.is_file():
            raise RecipeError(_("there is no such list"), place=f"--against {against}", remedy="--against known")
    return named + [folder / name for name in checksums.LISTS if (folder / name).is_file()]


def _expectations(folder: Path, lists: list[Path], stage: artifact.Artifact | None) -> list[tuple[str, str, str]]:
    """Return (file name, its hash, the source) for every expected file."""
    out = [(name, digest, file.name) for file in lists for name, digest in checksums.read_list(file).items()]
    recorded = recorded_files(stage) if stage else {}
    return out + [(name, digest, artifact.MANIFEST) for name, digest in recorded.items()]


def _hash_all(files: list[Path], lists: list[Path]) -> dict[Path, dict[str, str]]:
    md5 = any(len(digest) == 32 for file in lists for digest in checksums.read_list(file).values())
    requested = dict.fromkeys(files, ("sha256", "md5") if md5 else ("sha256",))
    total = sum(file.stat().st_size for file in files)
    with console.progress(max(total // 10**6, 1), "MB") as bar:
        return checksums.hash_files(
            requested, artifact.cache_folder() / "verify.json", lambda read: bar.update(read // 10**6)
        )


def _check_complete(folder: Path, files: list[Path], verdicts: VerifyReport) -> None:
    """Check headers, indices and numbering before hashing anything."""
    try:
        if any(file.suffix == ".safetensors" for file in files):
            find_tensors(folder)
        pth.find_files(folder)
    except ModelError as error:
        verdicts.problems.append(error)


def _compare_published(hashes: dict[Path, dict[str, str]], verdicts: VerifyReport, *, strict: bool) -> None:
    """Record which published files these are. A folder with one part of a published model must hold its other parts too."""
    published = {one.sha256: one for one in checksums.known_files()}
    found = {file: published.get(digests["sha256"]) for file, digests in hashes.items()}
    for file, one in found.items():
        if one:
            verdicts.sources[file.name].append(one.what)
    models = Counter(one.what for one in found.values() if one and one.file != "tokenizer.model")
    for file, one in found.items():
        same_name = [other for other in published.values() if other.what in models and other.file == file.name]
        if one is None and same_name:
            expected = same_name[0]
            verdicts.compare(file.name, expected.sha256, hashes[file]["sha256"], expected.what, str(file))
        elif one is None and strict and any(file.match(pattern) for pattern in WEIGHTS):
            verdicts.add_problem(_("no published list contains it"), str(file))
    for model_name in models:
        for other in published.values():
            if other.what == model_name and len(hashes) > 1 and other.file not in {file.name for file in hashes}:
                verdicts.add_problem(_("this part of {what} is missing").format(what=model_name), other.file)


def _compare_stage(stage: artifact.Artifact, verdicts: VerifyReport) -> None:
    """Compare with the fingerprint in the manifest, and name a tensor that changed since."""
    found, place = fingerprint_now(stage)
    if found:  # otherwise its files were compared already
        verdicts.compare(stage.path.name, stage.fingerprint, found, artifact.MANIFEST, place)


def _report(path: str, files: list[Path], hashes: dict[Path, dict[str, str]], verdicts: VerifyReport) -> int:
    rows = [[f.name, hashes[f]["sha256"][:16] + "…", ", ".join(verdicts.sources.get(f.name, ()))] for f in files]
    console.table(["", "sha256", _("agrees with")], rows)
    if not verdicts.sources:
        raise ArtifactError(
            _("the files are complete, but no list contains them: nothing was verified"),
            place=path,
            remedy="--against LIST",
        )
    count = sum(len(found) for found in verdicts.sources.values())
    console.success(_("{count} hashes agree").format(count=count))
    console.emit(
        {
            "path": path,
            "files": {f.name: {**hashes[f], "agrees_with": verdicts.sources.get(f.name, [])} for f in files},
            "agrees_with": dict(verdicts.sources),
        }
    )
    return 0
