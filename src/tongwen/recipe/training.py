"""The sections that train, `pretrain` and `sft`, and what they share."""

from __future__ import annotations

from typing import Any, Literal, cast

from tongwen.core.i18n import say
from tongwen.recipe.fields import Duration, Length, Number, Rules, Section, setting


class AdapterConfig(Section):
    """What is trained: every weight, or a low-rank adapter beside them."""

    method: Literal["lora", "qlora", "adalora", "new_rows", "full"] = setting(
        "lora",
        "lora: a small adapter; qlora: on a quantised base; adalora: its ranks go where they matter; new_rows: only the rows "
        "that the vocabulary stage added; full: all weights",
        "lora：小适配器；qlora：底座量化；adalora：秩分配到重要之处；new_rows：只训练词表阶段新增的行；full：全部权重",
    )
    rank: int = setting(
        16, "rank of the adapter: higher learns more, costs memory", "适配器的秩：越大学得越多，越占内存", ge=1
    )
    alpha: Number | None = setting(
        None, "scale of the adapter; 2 x rank when absent", "适配器缩放；不写为 rank 的 2 倍", gt=0
    )
    dropout: Number = setting(0.0, "dropout on the adapter's input", "适配器输入的 dropout", ge=0, lt=1)
    targets: str | list[str] = setting(
        "all-linear",
        "all-linear, family (the family's usual few), or a list of module names",
        "all-linear、family（该系列惯用的几个）或模块名列表",
    )
    target_parameters: list[str] = setting(
        [],
        "names of weights that are no module of their own, such as mlp.experts.gate_up_proj (fused experts)",
        "不单独成模块的权重名，如 mlp.experts.gate_up_proj（融合的专家）",
    )
    rslora: bool = setting(False, "scale by alpha / sqrt(rank)", "按 alpha / sqrt(rank) 缩放")
    dora: bool = setting(False, "train direction and magnitude apart (DoRA)", "方向与幅度分开训练（DoRA）")
    quantize: Literal["nf4", "int8"] = setting(
        "nf4", "qlora: 4 bits with double quantisation, or 8 bits", "qlora：4 位（双重量化）或 8 位"
    )
    also_train: list[str] = setting([], "modules trained in full beside the adapter", "除适配器外完整训练的模块")
    continue_from: str | None = setting(
        None, "folder of an adapter on the same base that is trained further", "继续训练的适配器文件夹（同一底座）"
    )

    def rules(self) -> Rules:
        unused = {"also_train", "continue_from", "target_parameters"} if self.part != "lora" else set()
        given = min((name for name in unused & self.model_fields_set if getattr(self, name)), default="")
        not_on_a_weight = "dora" if self.dora else "dropout" if self.dropout else ""
        yield (
            isinstance(self.targets, str) and self.targets not in ("all-linear", "family"),
            say(
                f"targets: {self.targets!r} is not `all-linear`, `family` or a list such as [q_proj, v_proj]",
                f"targets: {self.targets!r} 应为 `all-linear`、`family` 或 [q_proj, v_proj] 这样的列表",
            ),
        )
        yield (
            not self.targets and not self.target_parameters,
            say(
                "targets: the list is empty, so that the adapter would stand nowhere; write `all-linear`, or names",
                "targets：列表为空，适配器无处可放；请写 `all-linear` 或模块名",
            ),
        )
        yield (
            given,
            say(
                f"`method: {self.method}` does nothing with `{given}`: leave it out, or write `method: lora`",
                f"`method: {self.method}` 不使用 `{given}`：请删去，或写 `method: lora`",
            ),
        )
        yield (
            self.target_parameters and not_on_a_weight,
            say(
                f"`target_parameters` goes without `{not_on_a_weight}`: an adapter on a bare weight has none; leave one of them out",
                f"`target_parameters` 不能与 `{not_on_a_weight}` 同用：单独的权重上的适配器没有它；请删去其一",
            ),
        )
        yield (
            self.dora and self.quantize == "int8",
            say(
                "dora cannot stand on a base in 8 bits; use `quantize: nf4`, or leave `dora` out",
                "dora 不能用于 8 位底座；请用 `quantize: nf4`，或删去 `dora`",
            ),
        )
        yield (
            self.method == "adalora" and (self.dora or self.rslora or self.target_parameters or self.continue_from),
            say(
                "adalora has no dora, rslora, target_parameters or continue_from; use method: lora",
                "adalora 不支持 dora、rslora、target_parameters 与 continue_from；请用 method: lora",
            ),
        )

    @property
    def scale(self) -> float:
        """alpha, with its default."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank

    @property
    def part(self) -> TrainedPart:
        """What it trains, as `pretrain.train` names it."""
        return self.method if self.method in ("new_rows", "full") else "lora"


TrainedPart = Literal["new_rows", "embeddings", "lora", "full"]


ROWS_ONLY = ("new_rows", "embeddings")


ENGINES = ("auto", "ddp", "fsdp2", "zero2", "zero3")


def parts_of(train: str) -> tuple[TrainedPart, ...]:
    """`lora+embeddings` -> ("lora", "embeddings")."""
    return cast("tuple[TrainedPart, ...]", tuple(train.split("+")))


class Training(Section):
    """What every training stage knows."""

    adapter: AdapterConfig = setting(AdapterConfig(), "what is trained", "训练哪些权重")
    max_length: int = setting(1024, "tokens of a sample at most", "每个样本的最大 token 数", ge=8)
    batch_size: int = setting(
        8, "samples per optimizer step over all devices", "每个优化步的样本数（所有设备合计）", ge=1
    )
    batch_tokens: int | None = setting(
        None,
        "instead of batch_size: tokens per optimizer step over all devices; the epoch is packed best-fit",
        "代替 batch_size：每个优化步的 token 数（所有设备合计），整轮最佳适配打包",
        ge=16,
    )
    learning_rate: Number | None = setting(
        None, "peak; 2e-4 with an adapter, 2e-5 in full", "峰值学习率；适配器默认 2e-4，全参数 2e-5", gt=0
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon"] = setting(
        "adamw",
        "adamw (fused); 8 bits or paged need bitsandbytes; muon trains matrices only, such as LoRA's",
        "adamw（融合）；8 位与分页版需要 bitsandbytes；muon 只训练矩阵，如 LoRA",
    )
    schedule: Literal["constant", "linear", "cosine", "wsd", "warmup_lr"] = setting(
        "cosine",
        "shape after the warm-up; wsd: constant, then down in the last `decay`; warmup_lr: constant, warmed up by a logarithm "
        "(DeepSpeed's WarmupLR)",
        "预热之后的形状；wsd：先恒定，最后 `decay` 段下降；warmup_lr：对数预热后恒定（DeepSpeed 的 WarmupLR）",
    )
    warmup: Number = setting(
        0.03, "share of all steps (below 1) or a number of steps", "占总步数的比例（小于 1）或步数", ge=0
    )
    decay: Number = setting(
        0.1, "wsd: share of all steps (below 1) or a number of steps", "wsd：占总步数的比例（小于 1）或步数", gt=0
    )
    weight_decay: Number = setting(0.0, "the optimizer's weight decay", "优化器的权重衰减", ge=0)
    max_grad_norm: Number = setting(1.0, "clip the gradient to this norm; 0: off", "梯度裁剪范数；0 为关闭", ge=0)
    neftune: Number | None = setting(
        None,
        "noise on the embeddings (NEFTune's alpha, 5 is usual), scaled by each document's own length",
        "词向量噪声（NEFTune 的 alpha，常用 5），按每个文档自身长度缩放",
        gt=0,
    )
    stop_after: Length = setting(Duration(count=2, unit="epochs"), "epochs, steps or tokens", "轮数、步数或 token 数")
    save_every: int = setting(100, "optimizer steps between checkpoints", "每多少优化步存一次检查点", ge=1, free=True)
    keep_checkpoints: int = setting(
        2, "how many checkpoints stay, besides the best", "除最佳外保留多少个检查点", ge=1, free=True
    )
    evaluate_every: int | None = setting(
        None,
        "steps between held-out evaluations; before and after always",
        "每多少步评测留出集；前后总会评测",
        ge=1,
        free=True,
    )
    patience: int | None = setting(
        None,
        "stop after this many evaluations without a better one, and take the best checkpoint",
        "连续多少次评测没有更好就停止，并取最佳检查点",
        ge=1,
    )
    log_every: int = setting(1, "steps between lines of metrics.jsonl", "每多少步写一行 metrics.jsonl", ge=1, free=True)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto",
        "auto: bf16 where the device computes in it, else fp32; fp16: for GPUs without bf16, with a scaled gradient. What "
        "learns stands in fp32 always",
        "auto：设备支持 bf16 计算则用，否则 fp32；fp16：用于没有 bf16 的 GPU，梯度带缩放。被训练的权重总是 fp32",
    )
    activation_checkpointing: Literal["auto", "on", "off"] = setting(
        "auto",
        "recompute activations to save memory; auto: only when memory needs it, which is tried on a GPU before the run",
        "重算激活以省内存；auto：必要时才用（在 GPU 上训练前先试一次）",
        free=True,
    )
    compile: bool = setting(
        False,
        "compile each decoder layer: faster on a GPU, after a minute at the beginning (auto and ddp)",
        "编译每个解码层：在 GPU 上更快，开头约需一分钟（auto 与 ddp）",
        free=True,
    )
    micro_batch_tokens: int | None = setting(
        None,
        "tokens that go through the model at once; derived when absent",
        "一次过模型的 token 数；不写则推算",
        ge=16,
        free=True,
    )
    engine: str = setting(
        "auto",
        "what several processes share out: auto and ddp nothing, zero2 gradients and optimizer (DeepSpeed), zero3 and fsdp2 "
        "also the weights; or a file: a DeepSpeed JSON, or accelerate's YAML",
        "多进程如何分担：auto 与 ddp 不分担，zero2 分担梯度与优化器（DeepSpeed），zero3 与 fsdp2 还分担权重；或一个文件：DeepSpeed 的 JSON，"
        "或 accelerate 的 YAML",
    )
    offload: bool = setting(
        False,
        "fsdp2, zero2, zero3: what is shared out waits in the host's memory",
        "fsdp2、zero2、zero3：分担的部分放在主机内存",
    )
    samples: int = setting(
        3, "held-out questions answered before and after, for the report", "报告中训练前后各答几题", ge=0
    )
    trainer: dict[str, Any] = setting({}, "other transformers TrainingArguments", "其他 transformers TrainingArguments")

    def rules(self) -> Rules:
        beyond_adapter = next((train for train in self.trains if train != "lora"), "")
        engines = ", ".join(ENGINES)
        yield (
            self.batch_tokens is not None and "batch_size" in self.model_fields_set,
            say(
                "`batch_size` and `batch_tokens` exclude each other: samples per step, or tokens per step",
                "`batch_size` 与 `batch_tokens` 只能写一个：每步的样本数，或每步的 token 数",
            ),
        )
        yield (
            self.precision == "fp16" and self.sharded_by,
            say(
                "precision: fp16 goes with one device or `engine: ddp`; the engines that share weights compute in bf16 or fp32",
                "precision: fp16 只用于单设备或 `engine: ddp`；切分权重的引擎用 bf16 或 fp32 计算",
            ),
        )
        yield (
            self.patience is not None and self.evaluate_every is None,
            say(
                "`patience` counts evaluations, and there are none on the way: add `evaluate_every: 50`",
                "`patience` 按评测次数计，而途中没有评测：请加 `evaluate_every: 50`",
            ),
        )
        yield (
            self.schedule != "wsd" and "decay" in self.model_fields_set,
            say(
                f"`decay` belongs to `schedule: wsd`, and this one is {self.schedule}: leave it out, or change the schedule",
                f"`decay` 只用于 `schedule: wsd`，而此处为 {self.schedule}：请删去，或改用 wsd",
            ),
        )
        yield (
            self.optimizer == "muon" and beyond_adapter,
            say(
                f"muon trains matrices of hidden layers, an adapter's, and {beyond_adapter} has others too: use `optimizer: adamw`",
                f"muon 只训练隐藏层矩阵（如适配器的），而 {beyond_adapter} 还含其他权重：请用 `optimizer: adamw`",
            ),
        )
        yield (
            self.engine not in ENGINES and not self.engine.endswith((".json", ".yaml", ".yml")),
            say(
                f"engine: {self.engine!r} is not one of {engines}, and no .json or .yaml file",
                f"engine: {self.engine!r} 不在 {engines} 之中，也不是 .json 或 .yaml 文件",
            ),
        )
        yield (
            self.offload and not self.sharded_by,
            say(
                f"`offload` needs an engine that shares out: fsdp2, zero2 or zero3, not {self.engine!r}",
                f"`offload` 需要会分担的引擎：fsdp2、zero2 或 zero3，而不是 {self.engine!r}",
            ),
        )
        if self.sharded_by:
            yield from self._rules_of_sharding()

    def _rules_of_sharding(self) -> Rules:
        """What would be computed wrongly, or not at all, on a part of a tensor."""
        by_deepspeed, quantized = self.sharded_by == "deepspeed", self.adapter.method == "qlora"
        for broken, what, instead in (
            (self.optimizer != "adamw", f"optimizer: {self.optimizer}", "optimizer: adamw"),
            (self.adapter.method == "adalora", "method: adalora", "method: lora"),
            (by_deepspeed and len(self.trains) > 1, "phases", "engine: fsdp2"),
            (by_deepspeed and quantized, "method: qlora", "engine: fsdp2"),
            (self.compile, "compile", "compile: false"),
            (quantized and self.adapter.quantize == "int8", "quantize: int8", "quantize: nf4"),
        ):
            yield (
                broken,
                say(
                    f"`{what}` does not work with `engine: {self.engine}`: use `engine: ddp`, or `{instead}`",
                    f"`{what}` 不能与 `engine: {self.engine}` 同用：请用 `engine: ddp`，或 `{instead}`",
                ),
            )

    @property
    def trains(self) -> list[str]:
        """What its phases train, in order, as `pretrain.train` writes it."""
        return [self.adapter.part]

    @property
    def trained_parts(self) -> frozenset[TrainedPart]:
        """All that it trains, in one phase or another."""
        return frozenset(part for train in self.trains for part in parts_of(train))

    @property
    def sharded_by(self) -> Literal["", "fsdp2", "deepspeed"]:
        """The library that divides the model or its optimizer among processes; empty if none does."""
        if self.engine in ("zero2", "zero3") or self.engine.endswith(".json"):
            return "deepspeed"
        return "fsdp2" if self.engine == "fsdp2" or self.engine.endswith((".yaml", ".yml")) else ""


def _no_embeddings() -> str:
    return say(
        "`embedding_learning_rate` is set, and `train: lora` trains no embeddings: leave it out, or use `train: lora+embeddings`",
        "写了 `embedding_learning_rate`，而 `train: lora` 不训练词向量：请删去，或用 `train: lora+embeddings`",
    )


class PhaseConfig(Section):
    """One phase of pre-training. What it does not set, it takes from the section."""

    train: Literal["new_rows", "embeddings", "lora", "lora+embeddings", "full"] = setting(
        ...,
        "new_rows (of the vocabulary stage), embeddings, lora, lora+embeddings or full",
        "new_rows（词表阶段新增的行）、embeddings、lora、lora+embeddings 或 full",
    )
    stop_after: Length | None = setting(None, "epochs, steps or tokens", "轮数、步数或 token 数")
    learning_rate: Number | None = setting(None, "peak", "峰值学习率", gt=0)
    embedding_learning_rate: Number | None = setting(None, "peak of the embeddings", "词向量的峰值学习率", gt=0)

    def rules(self) -> Rules:
        yield self.train == "lora" and self.embedding_learning_rate is not None, _no_embeddings()


class Forgetting(Section):
    """A rise of the held-out bits per byte of any language over where it began."""

    warn: Number | None = setting(0.05, "say it from this share on", "升高超过此比例就提醒", gt=0)
    stop: Number | None = setting(None, "stop from this share on", "升高超过此比例就停止", gt=0)


class Pretrain(Training):
    """Continued pre-training on documents."""

    train: Literal["new_rows", "embeddings", "lora", "lora+embeddings", "full"] = setting(
        "lora",
        "what is trained when there are no phases: new_rows, embeddings, lora, lora+embeddings or full",
        "没有 phases 时训练什么：new_rows、embeddings、lora、lora+embeddings 或 full",
    )
    phases: list[PhaseConfig] = setting([], "one after the other, instead of `train`", "依次进行的各阶段，代替 `train`")
    documents: Literal["apart", "concatenated", "blocks"] = setting(
        "apart",
        "apart: each sees only itself; concatenated: end to end, cut at max_length; blocks: the same, and the remainder is "
        "dropped (the scripts of 2023)",
        "apart：文档互不可见；concatenated：首尾相接后按 max_length 切分；blocks：同上并丢弃余数（2023 年的脚本）",
    )
    embedding_learning_rate: Number | None = setting(
        None,
        "peak of the embeddings; beside an adapter a fifth of learning_rate when absent",
        "词向量的峰值学习率；与适配器同训时默认为 learning_rate 的五分之一",
        gt=0,
    )
    stop_after: Length = setting(Duration(count=1, unit="epochs"), "epochs, steps or tokens", "轮数、步数或 token 数")
    forgetting: Forgetting = setting(
        Forgetting(), "held-out bits per byte of each language may rise by this share", "各语言留出集允许的升高比例"
    )

    def rules(self) -> Rules:
        yield from super().rules()
        first = self.trains[0]
        no_adapter = "lora" not in self.trained_parts
        yield (
            self.phases and "train" in self.model_fields_set,
            say(
                "`train` and `phases` exclude each other; each phase has its own `train`",
                "`train` 与 `phases` 只能写一个；每个阶段有自己的 `train`",
            ),
        )
        yield (
            self.adapter.part != "lora",
            say(
                f"adapter: {{method: {self.adapter.method}}} is said by `train: {self.adapter.method}` here",
                f"此处 adapter: {{method: {self.adapter.method}}} 应写作 `train: {self.adapter.method}`",
            ),
        )
        yield (
            self.forgetting.stop is not None and self.evaluate_every is None,
            say(
                "`forgetting: {stop: ...}` looks at evaluations, and there are none on the way: add `evaluate_every: 50`",
                "`forgetting: {stop: ...}`依据评测判断，而途中没有评测：请加 `evaluate_every: 50`",
            ),
        )
        yield self.embedding_learning_rate is not None and {*self.trains} == {"lora"}, _no_embeddings()
        yield (
            no_adapter and self.adapter.method == "qlora",
            say(
                f"`method: qlora` quantises the base for an adapter, and `train: {first}` has none: it would be written "
                "in 4 or 8 bits as a whole model; leave `method` out, or use `train: lora`",
                f"`method: qlora` 为适配器而量化底座，而 `train: {first}` 没有适配器，会把 4 位或 8 位的底座写成完整模型；"
                "请删去 `method`，或用 `train: lora`",
            ),
        )
        yield (
            no_adapter and self.adapter.continue_from is not None,
            say(
                f"`continue_from` opens an adapter, and `train: {first}` trains none: use `train: lora`, or make it the "
                "base after `tongwen merge`",
                f"`continue_from` 打开适配器，而 `train: {first}` 不训练适配器：请用 `train: lora`，或先 `tongwen merge` 再作底座",
            ),
        )
        yield (
            {"full", "lora"} <= self.trained_parts,
            say(
                "phases train an adapter and, in full, the weights that it stands on: keep one of the two",
                "各阶段既训练适配器又全量训练其底座权重：只能保留一种",
            ),
        )
        yield (
            self.adapter.method == "adalora" and sum("lora" in parts_of(train) for train in self.trains) > 1,
            say(
                "adalora spends its budget over one phase; two phases train it",
                "adalora 的预算只能分配在一个阶段；这里有两个阶段训练它",
            ),
        )

    @property
    def trains(self) -> list[str]:
        return [phase.train for phase in self.phases] or [self.train]


class Sft(Training):
    """Supervised fine-tuning on dialogues."""

    template: str = setting(
        "own",
        "own (the model's), chatml, alpaca, alpaca-zh, plain, one of an older project (docs/templates.md), or a .jinja file",
        "own（模型自带）、chatml、alpaca、alpaca-zh、plain、旧项目的模板（docs/templates.md）或 .jinja 文件",
    )
    learn: Literal["assistant", "last_answer", "everything"] = setting(
        "assistant", "which text counts in the loss", "哪些文字计入损失"
    )
    thinking: Literal["on", "off", "mixed"] = setting(
        "mixed",
        "for thinking models: every answer thinks (on), none does (off), or as each row has it (mixed)",
        "思考模型：都思考（on）、都不思考（off）、按数据而定（mixed）",
    )
    too_long: Literal["reject", "drop_turns", "cut_prompt"] = setting(
        "reject",
        "what happens to longer samples: rejected; their oldest turns dropped; or then also the end of the question cut",
        "更长的样本：拒绝；丢弃最早的轮次；或再截断问题末尾",
    )
    legacy: bool = setting(
        False,
        "tokens as the project of this template made them in 2023, defects included: docs/templates.md",
        "按该模板的项目在 2023 年的做法切分，含其缺陷：见 docs/templates.md",
    )
    train_new_control_tokens: bool = setting(
        True,
        "train the rows of control tokens that the base never saw; false: refuse such a base instead",
        "训练底座从未见过的控制符的词向量行；false：遇到这种底座就拒绝",
    )
    min_stop_learned: Number = setting(
        0.99, "refuse when fewer samples than this share learn to stop", "学会停止的样本低于此比例就拒绝", ge=0, le=1
    )
