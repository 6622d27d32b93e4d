"""The sections that train, `pretrain` and `sft`, and what they share."""

from __future__ import annotations

from typing import Any, Literal, cast

from tongwen.core.i18n import _
from tongwen.recipe.fields import Duration, Length, Number, Rules, Section, setting


class AdapterConfig(Section):
    """What is trained: every weight, or a low-rank adapter beside them."""

    method: Literal["lora", "qlora", "adalora", "new_rows", "full"] = setting(
        "lora",
        "lora: a small adapter; qlora: on a quantised base; adalora: its ranks go where they matter; new_rows: only the rows "
        "that the vocabulary stage added; full: all weights",
    )
    rank: int = setting(16, "rank of the adapter: higher learns more, costs memory", ge=1)
    alpha: Number | None = setting(None, "scale of the adapter; 2 x rank when absent", gt=0)
    dropout: Number = setting(0.0, "dropout on the adapter's input", ge=0, lt=1)
    targets: str | list[str] = setting(
        "all-linear",
        "all-linear, family (the family's usual few), or a list of module names",
    )
    target_parameters: list[str] = setting(
        [],
        "names of weights that are no module of their own, such as mlp.experts.gate_up_proj (fused experts)",
    )
    rslora: bool = setting(False, "scale by alpha / sqrt(rank)")
    dora: bool = setting(False, "train direction and magnitude apart (DoRA)")
    quantize: Literal["nf4", "int8"] = setting("nf4", "qlora: 4 bits with double quantisation, or 8 bits")
    also_train: list[str] = setting([], "modules trained in full beside the adapter")
    continue_from: str | None = setting(None, "folder of an adapter on the same base that is trained further")

    def rules(self) -> Rules:
        unused = {"also_train", "continue_from", "target_parameters"} if self.part != "lora" else set()
        given = min((name for name in unused & self.model_fields_set if getattr(self, name)), default="")
        not_on_a_weight = "dora" if self.dora else "dropout" if self.dropout else ""
        yield (
            isinstance(self.targets, str) and self.targets not in ("all-linear", "family"),
            _("targets: {targets!r} is not `all-linear`, `family` or a list such as [q_proj, v_proj]").format(
                targets=self.targets
            ),
        )
        yield (
            not self.targets and not self.target_parameters,
            _("targets: the list is empty, so that the adapter would stand nowhere; write `all-linear`, or names"),
        )
        yield (
            given,
            _("`method: {method}` does nothing with `{given}`: leave it out, or write `method: lora`").format(
                method=self.method, given=given
            ),
        )
        yield (
            self.target_parameters and not_on_a_weight,
            _(
                "`target_parameters` goes without `{not_on_a_weight}`: an adapter on a bare weight has none; leave one of them out"
            ).format(not_on_a_weight=not_on_a_weight),
        )
        yield (
            self.dora and self.quantize == "int8",
            _("dora cannot stand on a base in 8 bits; use `quantize: nf4`, or leave `dora` out"),
        )
        yield (
            self.method == "adalora" and (self.dora or self.rslora or self.target_parameters or self.continue_from),
            _("adalora has no dora, rslora, target_parameters or continue_from; use method: lora"),
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

    adapter: AdapterConfig = setting(AdapterConfig(), "what is trained")
    max_length: int = setting(1024, "tokens of a sample at most", ge=8)
    batch_size: int = setting(8, "samples per optimizer step over all devices", ge=1)
    batch_tokens: int | None = setting(
        None,
        "instead of batch_size: tokens per optimizer step over all devices; the epoch is packed best-fit",
        ge=16,
    )
    learning_rate: Number | None = setting(None, "peak; 2e-4 with an adapter, 2e-5 in full", gt=0)
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon"] = setting(
        "adamw",
        "adamw (fused); 8 bits or paged need bitsandbytes; muon trains matrices only, such as LoRA's",
    )
    schedule: Literal["constant", "linear", "cosine", "wsd", "warmup_lr"] = setting(
        "cosine",
        "shape after the warm-up; wsd: constant, then down in the last `decay`; warmup_lr: constant, warmed up by a logarithm "
        "(DeepSpeed's WarmupLR)",
    )
    warmup: Number = setting(0.03, "share of all steps (below 1) or a number of steps", ge=0)
    decay: Number = setting(0.1, "wsd: share of all steps (below 1) or a number of steps", gt=0)
    weight_decay: Number = setting(0.0, "the optimizer's weight decay", ge=0)
    max_grad_norm: Number = setting(1.0, "clip the gradient to this norm; 0: off", ge=0)
    neftune: Number | None = setting(
        None,
        "noise on the embeddings (NEFTune's alpha, 5 is usual), scaled by each document's own length",
        gt=0,
    )
    stop_after: Length = setting(Duration(count=2, unit="epochs"), "epochs, steps or tokens")
    save_every: int = setting(100, "optimizer steps between checkpoints", ge=1, free=True)
    keep_checkpoints: int = setting(2, "how many checkpoints stay, besides the best", ge=1, free=True)
    evaluate_every: int | None = setting(
        None,
        "steps between held-out evaluations; before and after always",
        ge=1,
        free=True,
    )
    patience: int | None = setting(
        None,
        "stop after this many evaluations without a better one, and take the best checkpoint",
        ge=1,
    )
    log_every: int = setting(1, "steps between lines of metrics.jsonl", ge=1, free=True)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto",
        "auto: bf16 where the device computes in it, else fp32; fp16: for GPUs without bf16, with a scaled gradient. What "
        "learns stands in fp32 always",
    )
    activation_checkpointing: Literal["auto", "on", "off"] = setting(
        "auto",
        "recompute activations to save memory; auto: only when memory needs it, which is tried on a GPU before the run",
        free=True,
    )
    compile: bool = setting(
        False,
        "compile each decoder layer: faster on a GPU, after a minute at the beginning (auto and ddp)",
        free=True,
    )
    micro_batch_tokens: int | None = setting(
        None,
        "tokens that go through the model at once; derived when absent",
        ge=16,
        free=True,
    )
    engine: str = setting(
        "auto",
        "what several processes share out: auto and ddp nothing, zero2 gradients and optimizer (DeepSpeed), zero3 and fsdp2 "
        "also the weights; or a file: a DeepSpeed JSON, or accelerate's YAML",
    )
    offload: bool = setting(
        False,
        "fsdp2, zero2, zero3: what is shared out waits in the host's memory",
    )
    samples: int = setting(3, "held-out questions answered before and after, for the report", ge=0)
    trainer: dict[str, Any] = setting({}, "other transformers TrainingArguments")

    def rules(self) -> Rules:
        beyond_adapter = next((train for train in self.trains if train != "lora"), "")
        engines = ", ".join(ENGINES)
        yield (
            self.batch_tokens is not None and "batch_size" in self.model_fields_set,
            _("`batch_size` and `batch_tokens` exclude each other: samples per step, or tokens per step"),
        )
        yield (
            self.precision == "fp16" and self.sharded_by,
            _(
                "precision: fp16 goes with one device or `engine: ddp`; the engines that share weights compute in bf16 or fp32"
            ),
        )
        yield (
            self.patience is not None and self.evaluate_every is None,
            _("`patience` counts evaluations, and there are none on the way: add `evaluate_every: 50`"),
        )
        yield (
            self.schedule != "wsd" and "decay" in self.model_fields_set,
            _(
                "`decay` belongs to `schedule: wsd`, and this one is {schedule}: leave it out, or change the schedule"
            ).format(schedule=self.schedule),
        )
        yield (
            self.optimizer == "muon" and beyond_adapter,
            _(
                "muon trains matrices of hidden layers, an adapter's, and {beyond_adapter} has others too: use `optimizer: adamw`"
            ).format(beyond_adapter=beyond_adapter),
        )
        yield (
            self.engine not in ENGINES and not self.engine.endswith((".json", ".yaml", ".yml")),
            _("engine: {engine!r} is not one of {engines}, and no .json or .yaml file").format(
                engine=self.engine, engines=engines
            ),
        )
        yield (
            self.offload and not self.sharded_by,
            _("`offload` needs an engine that shares out: fsdp2, zero2 or zero3, not {engine!r}").format(
                engine=self.engine
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
                _("`{what}` does not work with `engine: {engine}`: use `engine: ddp`, or `{instead}`").format(
                    what=what, engine=self.engine, instead=instead
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
    return _(
        "`embedding_learning_rate` is set, and `train: lora` trains no embeddings: leave it out, or use `train: lora+embeddings`"
    )


class PhaseConfig(Section):
    """One phase of pre-training. What it does not set, it takes from the section."""

    train: Literal["new_rows", "embeddings", "lora", "lora+embeddings", "full"] = setting(
        ...,
        "new_rows (of the vocabulary stage), embeddings, lora, lora+embeddings or full",
    )
    stop_after: Length | None = setting(None, "epochs, steps or tokens")
    learning_rate: Number | None = setting(None, "peak", gt=0)
    embedding_learning_rate: Number | None = setting(None, "peak of the embeddings", gt=0)

    def rules(self) -> Rules:
        yield self.train == "lora" and self.embedding_learning_rate is not None, _no_embeddings()


class Forgetting(Section):
    """A rise of the held-out bits per byte of any language over where it began."""

    warn: Number | None = setting(0.05, "say it from this share on", gt=0)
    stop: Number | None = setting(None, "stop from this share on", gt=0)


class Pretrain(Training):
    """Continued pre-training on documents."""

    train: Literal["new_rows", "embeddings", "lora", "lora+embeddings", "full"] = setting(
        "lora",
        "what is trained when there are no phases: new_rows, embeddings, lora, lora+embeddings or full",
    )
    phases: list[PhaseConfig] = setting([], "one after the other, instead of `train`")
    documents: Literal["apart", "concatenated", "blocks"] = setting(
        "apart",
        "apart: each sees only itself; concatenated: end to end, cut at max_length; blocks: the same, and the remainder is "
        "dropped (the scripts of 2023)",
    )
    embedding_learning_rate: Number | None = setting(
        None,
        "peak of the embeddings; beside an adapter a fifth of learning_rate when absent",
        gt=0,
    )
    stop_after: Length = setting(Duration(count=1, unit="epochs"), "epochs, steps or tokens")
    forgetting: Forgetting = setting(Forgetting(), "held-out bits per byte of each language may rise by this share")

    def rules(self) -> Rules:
        yield from super().rules()
        first = self.trains[0]
        no_adapter = "lora" not in self.trained_parts
        yield (
            self.phases and "train" in self.model_fields_set,
            _("`train` and `phases` exclude each other; each phase has its own `train`"),
        )
        yield (
            self.adapter.part != "lora",
            _("adapter: {{method: {method}}} is said by `train: {method}` here").format(method=self.adapter.method),
        )
        yield (
            self.forgetting.stop is not None and self.evaluate_every is None,
            _(
                "`forgetting: {stop: ...}` looks at evaluations, and there are none on the way: add `evaluate_every: 50`"
            ),
        )
        yield self.embedding_learning_rate is not None and {*self.trains} == {"lora"}, _no_embeddings()
        yield (
            no_adapter and self.adapter.method == "qlora",
            _(
                "`method: qlora` quantises the base for an adapter, and `train: {first}` has none: it would be written "
                "in 4 or 8 bits as a whole model; leave `method` out, or use `train: lora`"
            ).format(first=first),
        )
        yield (
            no_adapter and self.adapter.continue_from is not None,
            _(
                "`continue_from` opens an adapter, and `train: {first}` trains none: use `train: lora`, or make it the "
                "base after `tongwen merge`"
            ).format(first=first),
        )
        yield (
            {"full", "lora"} <= self.trained_parts,
            _("phases train an adapter and, in full, the weights that it stands on: keep one of the two"),
        )
        yield (
            self.adapter.method == "adalora" and sum("lora" in parts_of(train) for train in self.trains) > 1,
            _("adalora spends its budget over one phase; two phases train it"),
        )

    @property
    def trains(self) -> list[str]:
        return [phase.train for phase in self.phases] or [self.train]


class Sft(Training):
    """Supervised fine-tuning on dialogues."""

    template: str = setting(
        "own",
        "own (the model's), chatml, alpaca, alpaca-zh, plain, one of an older project (docs/templates.md), or a .jinja file",
    )
    learn: Literal["assistant", "last_answer", "everything"] = setting("assistant", "which text counts in the loss")
    thinking: Literal["on", "off", "mixed"] = setting(
        "mixed",
        "for thinking models: every answer thinks (on), none does (off), or as each row has it (mixed)",
    )
    too_long: Literal["reject", "drop_turns", "cut_prompt"] = setting(
        "reject",
        "what happens to longer samples: rejected; their oldest turns dropped; or then also the end of the question cut",
    )
    legacy: bool = setting(
        False,
        "tokens as the project of this template made them in 2023, defects included: docs/templates.md",
    )
    train_new_control_tokens: bool = setting(
        True,
        "train the rows of control tokens that the base never saw; false: refuse such a base instead",
    )
    min_stop_learned: Number = setting(0.99, "refuse when fewer samples than this share learn to stop", ge=0, le=1)
