"""The commands as functions for Python and notebooks: `run`, `check`, `merge` and `load_data` return objects.

They print and raise what the commands do; the errors are those of `tongwen.core.errors`, whose text has place, rule and remedy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tongwen.core.artifact import Artifact, read_json
from tongwen.core.errors import ArtifactError, RecipeError, RowRejected
from tongwen.core.i18n import _
from tongwen.workflows.stage_inputs import TRAINING

if TYPE_CHECKING:
    from tongwen.recipe.schema import Recipe
    from tongwen.workflows.chat_model import ChatModel

LATEST_FIRST = TRAINING[::-1]  # the last training stage that ran is reported


@dataclass(frozen=True)
class RunResult:
    """A finished run. folder: its `out`; stages: {name: the stage's folder and manifest}."""

    folder: Path
    stages: dict[str, Artifact]

    def report(self, stage: str = "") -> dict[str, Any]:
        """Return report.json of a training stage; of the last one without a name. Raises ArtifactError if there is none."""
        return read_json(self._training(stage) / "report.json")

    def metrics(self, stage: str = "") -> list[dict[str, Any]]:
        """Return the logged steps of a training stage, as `metrics.jsonl` has them: step, loss, learning_rate, …"""
        from tongwen.train.metrics_file import read_metrics

        return read_metrics(self._training(stage) / "metrics.jsonl")

    def scores(self) -> dict[str, Any]:
        """Return what `evaluate` measured. Raises ArtifactError if it did not run."""
        if "evaluate" not in self.stages:
            raise ArtifactError(_("this stage has not run"), place=f"{self.folder}/evaluate")
        return read_json(self.stages["evaluate"].path / "scores.json")

    @property
    def model(self) -> Path:
        """The folder of the run's last model or adapter. Raises ArtifactError if no stage makes one."""
        for name in ("merge", *LATEST_FIRST, "vocab"):
            if name in self.stages:
                return self.stages[name].path
        raise ArtifactError(_("no stage of this run makes a model"), place=str(self.folder))

    def open(self, **options: Any) -> ChatModel:
        """Open the run's model: see `tongwen.open`."""
        from tongwen.workflows.chat_model import open_chat_model

        return open_chat_model(str(self.model), **options)

    def _training(self, stage: str) -> Path:
        names = [stage] if stage else LATEST_FIRST
        for name in names:
            if name in self.stages:
                return self.stages[name].path
        raise ArtifactError(_("this stage has not run"), place=f"{self.folder}/{names[-1]}")

    def _repr_html_(self) -> str:
        """Show the stages and the curve of the loss in a notebook."""
        from markupsafe import escape

        from tongwen.core import html

        rows = [(name, one.path, one.manifest.get("seconds", "")) for name, one in self.stages.items()]
        body = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(path)}</td><td>{seconds}</td></tr>" for name, path, seconds in rows
        )
        table = f"<table><tr><th>{_('stage')}</th><th>{_('folder')}</th><th>{_('seconds')}</th></tr>{body}</table>"
        trained = [name for name in LATEST_FIRST if name in self.stages]
        points = [(line["step"], line["loss"]) for line in self.metrics(trained[0])] if trained else []
        return table + (str(html.curve(points, _("step"), _("loss"))) if points else "")


@dataclass(frozen=True)
class CheckResult:
    """What `check` found. stages: those that would run; data: {kind: {in, kept, lost: …} of rows and bytes}."""

    name: str
    stages: list[str]
    data: dict[str, Any]


@dataclass(frozen=True)
class LoadedData(Sequence[dict[str, Any]]):
    """The rows of data files, as `prepare` reads them: documents with `text`, dialogues with `messages`, preferences.

    rejected: {file, row, reason, rule} of each row that could not be read.
    """

    rows: list[dict[str, Any]]
    rejected: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def to_dataset(self) -> Any:
        """Return a `datasets.Dataset`."""
        import datasets

        return datasets.Dataset.from_list(self.rows)


def run(
    recipe: str | Path | Mapping[str, Any],
    *overrides: str,
    only: str = "",
    start: str = "",
    until: str = "",
    again: bool = False,
    fork: bool = False,
) -> RunResult:
    """Run the stages of a recipe, as `tongwen run` does; what is done already is not done again.

    recipe: a file, or its content as a dictionary; overrides: "section.key=value".
    Raises RecipeError, DataError, ModelError, ArtifactError, MachineError or NumbersError.
    """
    from tongwen.core import artifact
    from tongwen.stages.base import STAGES
    from tongwen.workflows import pipeline

    with _recipe_file(recipe) as (file, name):
        loaded = _load(file, name, overrides)
        words = {"only": only, "start": start, "until": until, "again": again, "fork": fork}
        pipeline.run(loaded, [str(file), *overrides], STAGES, **words)  # type: ignore[arg-type]
    found = {stage: artifact.find(Path(loaded.out) / stage) for stage in loaded.stages}
    return RunResult(Path(loaded.out), {stage: one for stage, one in found.items() if one is not None})


def check(recipe: str | Path | Mapping[str, Any], *overrides: str) -> CheckResult:
    """Read a recipe and its data, as `tongwen check` does. Raises every problem that it finds as one error."""
    from tongwen.commands.check import check_recipe

    with _recipe_file(recipe) as (file, name):
        return CheckResult(**check_recipe(_load(file, name, overrides)))


def merge(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    again: bool = False,
    **options: Any,
) -> Artifact:
    """Merge adapters into their base, in the order of their training, and return the new model's folder and manifest.

    options: those of `tongwen.workflows.merging.MergeOptions`, such as dtype="bf16", to="pth", parity="full".
    """
    from tongwen.commands.merge import merge_into
    from tongwen.workflows.merging import MergeOptions

    names = [str(adapters)] if isinstance(adapters, (str, Path)) else [str(one) for one in adapters]
    return merge_into(str(base), names, str(out), MergeOptions(**options), again=again)


def load_data(path: str | Path, kind: str = "", **source: Any) -> LoadedData:
    """Read data files of any format that `prepare` knows, repaired as it does by default, before it compares rows.

    path:   file, folder or glob
    kind:   documents, dialogues or preferences; absent: dialogues where the first row is one, else documents
    source: as in the recipe: format, columns, roles, records, encoding, …

    Raises DataError for a file that cannot be read, or whose first row is of no known format.
    """
    from tongwen.core import console
    from tongwen.data.clean import Cleaner, RejectedText
    from tongwen.data.files import find_files
    from tongwen.data.input_parts import KINDS, InputPart, kind_of
    from tongwen.data.prepare_steps import iter_rows
    from tongwen.hub.download import local_copy
    from tongwen.recipe.data import Clean, Prepare, SourceConfig

    if kind and kind not in KINDS:
        raise RecipeError(_("{value!r} is none of {known}").format(value=kind, known=", ".join(KINDS)), place="kind")
    config = SourceConfig(path=str(path), **source)
    if config.path.startswith(("hub:", "modelscope:")):
        config = config.model_copy(update={"path": local_copy(config.path, console.notice)})
    loaded = LoadedData([])
    for file in find_files(config.path):
        found = kind or kind_of(file, config, may_be_preferences=True)
        section = Prepare.model_construct(clean=Clean(), fill={})
        part = InputPart(0, found, "train", 0, config, file)
        for raw, record in iter_rows(part, section, Cleaner(section.clean, found), console.notice):
            if isinstance(record, (RejectedText, RowRejected)):
                place = {"file": raw.file, "row": raw.row}
                loaded.rejected.append(place | {"reason": record.reason, "rule": record.rule})
            else:
                loaded.rows.append(record.to_dict())
    return loaded


@contextmanager
def _recipe_file(recipe: str | Path | Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Give a recipe's file and its name in messages. A dictionary becomes a file for as long as it is needed."""
    if not isinstance(recipe, Mapping):
        yield Path(recipe), str(recipe)
        return
    with tempfile.TemporaryDirectory(prefix="tongwen-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(dict(recipe), allow_unicode=True, sort_keys=False), encoding="utf-8")
        yield file, "recipe"


def _load(file: Path, name: str, overrides: Sequence[str]) -> Recipe:
    from tongwen.core import console
    from tongwen.recipe import load

    recipe, notices = (
        load.load_recipe(file, overrides)
        if str(file) == name
        else load.read(file.read_text(encoding="utf-8"), name, overrides)
    )
    for notice in notices:
        console.notice(notice)
    return recipe
