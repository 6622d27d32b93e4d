"""The recipe: its own settings, its sections, and the rules between them.

Type, default, unit and help of every setting stand in this package's section files and nowhere else. The documentation,
`tongwen schema` and the messages are made from them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from tongwen.core.i18n import say
from tongwen.recipe.data import Prepare, Synthesize, Vocab
from tongwen.recipe.fields import Rules, Seconds, Section, read_list, setting
from tongwen.recipe.outputs import Evaluate, Export, Merge
from tongwen.recipe.training import Pretrain, Sft, Training

# The order in which the stages run. A section that is absent does not run.
STAGES = ("synthesize", "prepare", "vocab", "pretrain", "sft", "merge", "evaluate", "export")


TrackerName = Literal["tensorboard", "wandb", "swanlab", "mlflow", "trackio"]


class Recipe(Section):
    """Who and where; below, each stage that has a section runs, in the program's order."""

    name: str = setting(..., "name of the run", "运行的名字", pattern=r"^[\w.\-]+$")
    base: str = setting(
        ...,
        "model: folder, hub id, modelscope:id, .gguf file, or a stage folder",
        "模型：文件夹、hub id、modelscope:id、.gguf 文件或阶段文件夹",
    )
    out: str = setting("", "folder of the run; runs/NAME when absent", "输出文件夹；不写为 runs/NAME")
    seed: int = setting(42, "decides order, split and initialisation", "决定顺序、划分与初始化")
    devices: int = setting(1, "processes, one per GPU", "进程数，每块 GPU 一个", ge=1)
    track: Annotated[list[TrackerName], BeforeValidator(read_list)] = setting(
        [],
        "programs that draw the curves too: tensorboard, wandb, swanlab, mlflow, trackio; keys come from the environment",
        "另外绘制曲线的程序：tensorboard、wandb、swanlab、mlflow、trackio；密钥取自环境变量",
    )
    stop_before: Seconds | None = setting(
        None,
        "this long after the command began, a training that is not done has been saved and has ended: 90 minutes, 6 hours",
        "命令开始后到此时间，未完成的训练已存好检查点并退出：90 minutes、6 hours",
    )
    synthesize: Synthesize | None = setting(None, "let another model write data", "让另一个模型生成数据")
    prepare: Prepare | None = setting(None, "read, check and split the data", "读取、检查、划分数据")
    vocab: Vocab | None = setting(None, "extend the tokenizer and grow the model", "扩充词表并扩大模型")
    pretrain: Pretrain | None = setting(None, "continued pre-training", "继续预训练")
    sft: Sft | None = setting(None, "supervised fine-tuning", "监督微调")
    merge: Merge | None = setting(None, "fold the adapter into the base", "把适配器并入底座")
    evaluate: Evaluate | None = setting(None, "scores of the model and of its base", "模型与底座的评测分数")
    export: Export | None = setting(None, "the model in the forms of other programs", "导出为其他程序使用的格式")

    def rules(self) -> Rules:
        leaves_adapter = any("lora" in section.trained_parts for section in self.training)
        yield (
            self.sft and not (self.prepare and self.prepare.dialogues),
            say(
                "`sft` needs `prepare: {dialogues: ...}`: the data that it learns from",
                "`sft` 需要 `prepare: {dialogues: ...}` 提供训练数据",
            ),
        )
        yield (
            self.vocab and self.vocab.pieces and not self.vocab.tokenizer and not self.prepare,
            say(
                "`vocab` needs `prepare: {documents: ...}`: the text that pieces are learned from",
                "`vocab` 需要 `prepare: {documents: ...}` 提供学习新词的文本",
            ),
        )
        yield (
            self.pretrain and not (self.prepare and self.prepare.documents),
            say(
                "`pretrain` needs `prepare: {documents: ...}`: the text that it learns from",
                "`pretrain` 需要 `prepare: {documents: ...}` 提供训练文本",
            ),
        )
        yield (
            self.evaluate and not self.prepare and any(task.needs_data for task in self.evaluate.tasks),
            say(
                "`evaluate` needs `data` for each task, or `prepare`, whose held-out rows it takes",
                "`evaluate` 的每个任务需要 `data`，或由 `prepare` 提供留出的数据",
            ),
        )
        yield (
            self.sft and self.sft.adapter.method == "qlora" and self.pretrain and "lora" in self.pretrain.trained_parts,
            say(
                "`sft` with `method: qlora` stands on the adapter that `pretrain` leaves, and an adapter cannot be put into "
                "quantised weights: `method: lora`, or a recipe of its own whose base is the merged model",
                "`method: qlora` 的 `sft` 建立在 `pretrain` 产出的适配器之上，而适配器无法并入量化权重：改用 `method: lora`，"
                "或另写一个以合并后模型为底座的配方",
            ),
        )
        yield (
            self.merge and not leaves_adapter,
            say(
                "`merge` needs a training section with an adapter: there is nothing to fold into the base",
                "`merge` 需要训练适配器的段，否则没有可合并的东西",
            ),
        )
        yield (
            self.export and not self.merge and (leaves_adapter or not (self.vocab or self.training)),
            say(
                "`export` needs `merge`, or a stage that leaves a whole model: an adapter alone is no model",
                "`export` 需要 `merge`，或产出完整模型的阶段：单独的适配器不是模型",
            ),
        )

    @property
    def training(self) -> list[Training]:
        """The sections that train, in their order."""
        return [section for section in (self.pretrain, self.sft) if section is not None]

    @property
    def stages(self) -> list[str]:
        """The stages that this recipe runs, in order."""
        return [name for name in STAGES if getattr(self, name) is not None]
