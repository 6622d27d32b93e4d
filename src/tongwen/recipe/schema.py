"""The recipe: its own settings, its sections, and the rules between them.

The section modules of this package are the only place for a setting's type, default, unit and help. The documentation,
`tongwen schema` and the messages are generated from them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from tongwen.core.i18n import _
from tongwen.recipe.data import Prepare, Synthesize, Vocab
from tongwen.recipe.fields import Count, Rules, Seconds, Section, read_list, setting
from tongwen.recipe.outputs import Evaluate, Export, Merge
from tongwen.recipe.training import Prefer, Pretrain, Sft, Training

# The order in which the stages run. A section that is absent does not run.
STAGES = ("synthesize", "prepare", "vocab", "pretrain", "sft", "prefer", "merge", "evaluate", "export")


TrackerName = Literal["tensorboard", "wandb", "swanlab", "mlflow", "trackio"]


class Recipe(Section):
    """The run's name, base and output folder, and its stages. Each stage with a section runs, in the order below."""

    name: str = setting(..., "name of the run", pattern=r"^[\w.\-]+$")
    base: str = setting(
        ...,
        "model: folder, hub id, modelscope:id, .gguf file, or a stage folder",
        names="model",
    )
    out: str = setting("", "output folder; runs/NAME when absent")
    seed: int = setting(42, "determines order, split and initialisation", ge=0, le=2**32 - 1)
    devices: Count = setting(1, "processes, one per GPU", ge=1)
    track: Annotated[list[TrackerName], BeforeValidator(read_list)] = setting(
        [],
        "programs that also plot the curves: tensorboard, wandb, swanlab, mlflow, trackio; keys come from the environment",
    )
    stop_before: Seconds | None = setting(
        None,
        "save a checkpoint and stop unfinished training within this wall time of the command: 90 minutes, 6 hours",
    )
    synthesize: Synthesize | None = setting(None, "let another model generate data")
    prepare: Prepare | None = setting(None, "read, check and split the data")
    vocab: Vocab | None = setting(None, "extend the tokenizer and enlarge the model")
    pretrain: Pretrain | None = setting(None, "continued pre-training")
    sft: Sft | None = setting(None, "supervised fine-tuning")
    prefer: Prefer | None = setting(None, "preference training: chosen and rejected answers")
    merge: Merge | None = setting(None, "merge the adapter into the base")
    evaluate: Evaluate | None = setting(None, "scores of the model and its base")
    export: Export | None = setting(None, "export the model in the formats of other programs")

    def rules(self) -> Rules:
        leaves_adapter = any("lora" in section.trained_parts for section in self.training)
        yield (
            self.sft and not (self.prepare and self.prepare.dialogues),
            _("`sft` needs `prepare: {dialogues: ...}` for its training data"),
        )
        yield (
            self.prefer and not (self.prepare and self.prepare.preferences),
            _("`prefer` needs `prepare: {preferences: ...}`: chosen and rejected answers, or answers with a label"),
        )
        yield (
            self.prefer and self.devices > 1,
            _(
                "`prefer` trains in one process, but `devices` is {devices}: write it as a second recipe whose `base` is the folder of the stage before"
            ).format(devices=self.devices),
        )
        yield (
            self.vocab and self.vocab.pieces and not self.vocab.tokenizer and not self.prepare,
            _("`vocab` needs `prepare: {documents: ...}`: it learns new pieces from this text"),
        )
        yield (
            self.pretrain and not (self.prepare and self.prepare.documents),
            _("`pretrain` needs `prepare: {documents: ...}` for its training text"),
        )
        yield (
            self.evaluate and not self.prepare and any(task.needs_data for task in self.evaluate.tasks),
            _("`evaluate` needs `data` for each task, or held-out data from `prepare`"),
        )
        below = ""  # the stage whose adapter the next one builds on
        for name in ("pretrain", "sft", "prefer"):
            section: Training | None = getattr(self, name)
            yield (
                below and section and section.adapter.method == "qlora",
                _(
                    "`{name}` with `method: qlora` builds on the adapter from `{below}`, but an adapter cannot be merged into quantised weights: use `method: lora`, or write a second recipe with the merged model as its base"
                ).format(name=name, below=below),
            )
            below = name if section and "lora" in section.trained_parts else below
        yield (
            self.merge and not leaves_adapter,
            _("`merge` needs a training section with an adapter: otherwise there is nothing to merge"),
        )
        yield (
            self.export and not self.merge and (leaves_adapter or not (self.vocab or self.training)),
            _("`export` needs `merge`, or a stage that produces a whole model: an adapter alone is not a model"),
        )

    @property
    def training(self) -> list[Training]:
        """The training sections, in order."""
        return [section for section in (self.pretrain, self.sft, self.prefer) if section is not None]

    @property
    def stages(self) -> list[str]:
        """The stages that this recipe runs, in order."""
        return [name for name in STAGES if getattr(self, name) is not None]
