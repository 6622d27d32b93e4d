"""The training sections, `pretrain`, `sft` and `prefer`, and the settings they share."""

from __future__ import annotations

from typing import Any, Literal, cast

from tongwen.core.i18n import _
from tongwen.recipe.fields import Count, Duration, Length, Number, Rules, Section, ShareOrCount, setting


class AdapterConfig(Section):
    """Which weights are trained: all of them, or a low-rank adapter."""

    method: Literal["lora", "qlora", "adalora", "new_rows", "full"] = setting(
        "lora",
        "lora: a small adapter; qlora: on a quantised base; adalora: ranks allocated where they matter; new_rows: only the rows that the vocabulary stage added; full: all weights",
    )
    rank: Count = setting(16, "rank of the adapter: higher learns more and costs more memory", ge=1, le=1 << 16)
    alpha: Number | None = setting(None, "scale of the adapter; 2 x rank when absent", gt=0)
    dropout: Number = setting(0.0, "dropout on the adapter's input", ge=0, lt=1)
    targets: str | list[str] = setting(
        "all-linear",
        "all-linear, family (the usual few of this model family), or a list of module names",
    )
    exclude: list[str] = setting(
        [], "names of layers that get no adapter, such as mlp, experts or layers.0; each removes all below it"
    )
    target_parameters: list[str] = setting(
        [],
        "names of weights that are not separate modules, such as mlp.experts.gate_up_proj (fused experts)",
    )
    rslora: bool = setting(False, "scale by alpha / sqrt(rank)")
    dora: bool = setting(False, "train direction and magnitude separately (DoRA)")
    quantize: Literal["nf4", "int8"] = setting("nf4", "qlora: 4 bits (double quantisation) or 8 bits")
    also_train: list[str] = setting([], "modules trained in full in addition to the adapter")
    continue_from: str | None = setting(
        None, "folder of an adapter (on the same base) to continue training", names="model"
    )

    def rules(self) -> Rules:
        unused = {"also_train", "continue_from", "exclude", "target_parameters"} if self.part != "lora" else set()
        given = min((name for name in unused & self.model_fields_set if getattr(self, name)), default="")
        not_on_a_weight = "dora" if self.dora else "dropout" if self.dropout else ""
        yield (
            isinstance(self.targets, str) and self.targets not in ("all-linear", "family"),
            _("targets: {targets!r} must be `all-linear`, `family` or a list such as [q_proj, v_proj]").format(
                targets=self.targets
            ),
        )
        yield (
            not self.targets and not self.target_parameters,
            _("targets: the list is empty, so the adapter would have no place; write `all-linear` or module names"),
        )
        yield (
            given,
            _("`method: {method}` does not use `{given}`: leave it out, or write `method: lora`").format(
                method=self.method, given=given
            ),
        )
        yield (
            self.target_parameters and not_on_a_weight,
            _(
                "`target_parameters` and `{not_on_a_weight}` cannot be combined: an adapter on a bare weight does not support it; leave one of them out"
            ).format(not_on_a_weight=not_on_a_weight),
        )
        yield (
            self.dora and self.quantize == "int8",
            _("dora does not work on an 8-bit base; use `quantize: nf4`, or leave `dora` out"),
        )
        yield (
            self.method == "adalora" and (self.dora or self.rslora or self.target_parameters or self.continue_from),
            _("adalora does not support dora, rslora, target_parameters or continue_from; use method: lora"),
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
    """The settings of every training stage."""

    adapter: AdapterConfig = setting(AdapterConfig(), "which weights to train")
    packing: Literal["auto", False] = setting(
        "auto",
        "auto: documents share a row without padding if the model keeps them apart, which is tested; false: padded batches",
        free=True,
    )
    max_length: Count = setting(1024, "maximum tokens of a sample", ge=8, le=1 << 24)
    batch_size: Count = setting(8, "samples per optimizer step, all devices together", ge=1)
    batch_tokens: Count | None = setting(
        None,
        "instead of batch_size: tokens per optimizer step, all devices together; the epoch is packed best-fit",
        ge=16,
    )
    learning_rate: Number | None = setting(
        None, "peak learning rate; default 2e-4 with an adapter, 2e-5 in full", gt=0, le=100
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon"] = setting(
        "adamw",
        "adamw (fused); 8-bit and paged ones need bitsandbytes; muon trains only matrices, such as LoRA's",
    )
    schedule: Literal["constant", "linear", "cosine", "wsd", "warmup_lr"] = setting(
        "cosine",
        "shape after the warm-up; wsd: constant, then falling over the last `decay`; warmup_lr: logarithmic warm-up, then constant (DeepSpeed's WarmupLR)",
    )
    warmup: ShareOrCount = setting(0.03, "share of all steps (below 1) or a number of steps", ge=0)
    decay: ShareOrCount = setting(0.1, "wsd: share of all steps (below 1) or a number of steps", gt=0)
    weight_decay: Number = setting(0.0, "the optimizer's weight decay", ge=0, le=100)
    max_grad_norm: Number = setting(1.0, "clip the gradient to this norm; 0: off", ge=0)
    keep: Number = setting(
        0.0,
        "0 … 1: how much of the base is kept: after training, the weights go back towards it until the divergence on the base's own answers has fallen by this share; 1 returns the base",
        ge=0,
        le=1,
    )
    neftune: Number | None = setting(
        None,
        "noise on the embeddings (NEFTune's alpha, 5 is usual), scaled by each document's own length",
        gt=0,
    )
    stop_after: Length = setting(Duration(count=2, unit="epochs"), "epochs, steps or tokens")
    save_every: Count = setting(100, "optimizer steps between checkpoints", ge=1, free=True)
    keep_checkpoints: Count = setting(2, "number of checkpoints to keep besides the best", ge=1, free=True)
    evaluate_every: Count | None = setting(
        None,
        "steps between held-out evaluations; evaluation before and after always runs",
        ge=1,
        free=True,
    )
    patience: Count | None = setting(
        None,
        "stop after this many evaluations without improvement and use the best checkpoint",
        ge=1,
    )
    log_every: Count = setting(1, "steps between lines of metrics.jsonl", ge=1, free=True)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto",
        "auto: bf16 if the device supports it, else fp32; fp16: for GPUs without bf16, with gradient scaling. Trained weights are always fp32",
    )
    activation_checkpointing: Literal["auto", "on", "off"] = setting(
        "auto",
        "recompute activations to save memory; auto: only if needed (on a GPU, tried before training)",
        free=True,
    )
    compile: bool = setting(
        False,
        "compile each decoder layer: faster on a GPU; costs about a minute at the start (auto and ddp)",
        free=True,
    )
    micro_batch_tokens: Count | None = setting(
        None,
        "tokens that pass through the model at once; derived when absent",
        ge=16,
        free=True,
    )
    engine: str = setting(
        "auto",
        "what is sharded over the processes: auto and ddp nothing, zero2 gradients and optimizer (DeepSpeed), zero3 and fsdp2 also the weights; or a file: a DeepSpeed JSON or accelerate's YAML",
        names="name or file",
    )
    offload: bool = setting(
        False,
        "fsdp2, zero2, zero3: keep the sharded parts in host memory",
    )
    samples: Count = setting(3, "number of held-out questions answered before and after training, for the report", ge=0)
    trainer: dict[str, Any] = setting({}, "other transformers TrainingArguments", names="arguments")

    def rules(self) -> Rules:
        beyond_adapter = next((train for train in self.trains if train != "lora"), "")
        engines = ", ".join(ENGINES)
        yield (
            self.batch_tokens is not None and "batch_size" in self.model_fields_set,
            _("give only one of `batch_size` and `batch_tokens`: samples per step, or tokens per step"),
        )
        yield (
            self.precision == "fp16" and self.sharded_by,
            _(
                "precision: fp16 needs a single device or `engine: ddp`; engines that shard weights compute in bf16 or fp32"
            ),
        )
        yield (
            self.patience is not None and self.evaluate_every is None,
            _("`patience` counts evaluations, but none run during training: add `evaluate_every: 50`"),
        )
        yield (
            self.schedule != "wsd" and "decay" in self.model_fields_set,
            _("`decay` is only for `schedule: wsd`, but the schedule is {schedule}: leave it out, or use wsd").format(
                schedule=self.schedule
            ),
        )
        yield (
            self.optimizer == "muon" and beyond_adapter,
            _(
                "muon only trains matrices of hidden layers, such as an adapter's, but {beyond_adapter} has other weights too: use `optimizer: adamw`"
            ).format(beyond_adapter=beyond_adapter),
        )
        yield (
            self.engine not in ENGINES and not self.engine.endswith((".json", ".yaml", ".yml")),
            _("engine: {engine!r} is neither one of {engines} nor a .json or .yaml file").format(
                engine=self.engine, engines=engines
            ),
        )
        yield (
            self.offload and not self.sharded_by,
            _("`offload` needs an engine that shards: fsdp2, zero2 or zero3, not {engine!r}").format(
                engine=self.engine
            ),
        )
        if self.sharded_by:
            yield from self._rules_of_sharding()

    def _rules_of_sharding(self) -> Rules:
        """Yield the rules for settings that give wrong results, or none, on a sharded tensor."""
        by_deepspeed, quantized = self.sharded_by == "deepspeed", self.adapter.method == "qlora"
        for broken, what, instead in (
            (self.optimizer != "adamw", f"optimizer: {self.optimizer}", "optimizer: adamw"),
            (self.adapter.method == "adalora", "method: adalora", "method: lora"),
            (by_deepspeed and len(self.trains) > 1, "phases", "engine: fsdp2"),
            (by_deepspeed and quantized, "method: qlora", "engine: fsdp2"),
            (by_deepspeed and self.keep, "keep", "engine: fsdp2"),
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
        """What its phases train, in order, in the spelling of `pretrain.train`."""
        return [self.adapter.part]

    @property
    def trained_parts(self) -> frozenset[TrainedPart]:
        """All parts that any of its phases trains."""
        return frozenset(part for train in self.trains for part in parts_of(train))

    @property
    def sharded_by(self) -> Literal["", "fsdp2", "deepspeed"]:
        """The library that divides the model or its optimizer among processes; empty if none does."""
        if self.engine in ("zero2", "zero3") or self.engine.endswith(".json"):
            return "deepspeed"
        return "fsdp2" if self.engine == "fsdp2" or self.engine.endswith((".yaml", ".yml")) else ""


def _no_embeddings() -> str:
    return _(
        "`embedding_learning_rate` is set, but `train: lora` trains no embeddings: leave it out, or use `train: lora+embeddings`"
    )


class PhaseConfig(Section):
    """One phase of pre-training. What it does not set, it takes from the section."""

    train: Literal["new_rows", "embeddings", "lora", "lora+embeddings", "full"] = setting(
        ...,
        "new_rows (added by the vocabulary stage), embeddings, lora, lora+embeddings or full",
    )
    stop_after: Length | None = setting(None, "epochs, steps or tokens")
    learning_rate: Number | None = setting(None, "peak", gt=0, le=100)
    embedding_learning_rate: Number | None = setting(None, "peak learning rate of the embeddings", gt=0, le=100)

    def rules(self) -> Rules:
        yield self.train == "lora" and self.embedding_learning_rate is not None, _no_embeddings()


class Forgetting(Section):
    """Limits for the rise of the held-out bits per byte of any language during training."""

    warn: Number | None = setting(0.05, "warn when the rise exceeds this share", gt=0)
    stop: Number | None = setting(None, "stop when the rise exceeds this share", gt=0)
    divergence_warn: Number | None = setting(
        None, "warn when the divergence on the base's own answers exceeds this many nats per token", gt=0
    )
    divergence_stop: Number | None = setting(
        None, "stop when the divergence on the base's own answers exceeds this many nats per token", gt=0
    )

    @property
    def may_stop(self) -> bool:
        return self.stop is not None or self.divergence_stop is not None

    @property
    def as_warnings(self) -> Forgetting:
        """The same limits for a finished model, for which nothing is left to stop."""
        rises = [limit for limit in (self.warn, self.stop) if limit is not None]
        divergences = [limit for limit in (self.divergence_warn, self.divergence_stop) if limit is not None]
        return Forgetting(warn=min(rises, default=None), divergence_warn=min(divergences, default=None))

    @property
    def measures_divergence(self) -> bool:
        return self.divergence_warn is not None or self.divergence_stop is not None


class Pretrain(Training):
    """Continued pre-training on documents."""

    train: Literal["new_rows", "embeddings", "lora", "lora+embeddings", "full"] = setting(
        "lora",
        "what to train without phases: new_rows, embeddings, lora, lora+embeddings or full",
    )
    phases: list[PhaseConfig] = setting([], "training phases in sequence, instead of `train`")
    documents: Literal["apart", "concatenated", "blocks"] = setting(
        "apart",
        "apart: documents cannot see each other; concatenated: joined end to end, cut at max_length; blocks: the same, dropping the remainder (the scripts of 2023)",
    )
    embedding_learning_rate: Number | None = setting(
        None,
        "peak learning rate of the embeddings; absent, with an adapter: a fifth of learning_rate",
        gt=0,
        le=100,
    )
    stop_after: Length = setting(Duration(count=1, unit="epochs"), "epochs, steps or tokens")
    forgetting: Forgetting = setting(Forgetting(), "allowed rise of each language's held-out bits per byte, as a share")

    def rules(self) -> Rules:
        yield from super().rules()
        first = self.trains[0]
        no_adapter = "lora" not in self.trained_parts
        yield (
            self.phases and "train" in self.model_fields_set,
            _("give only one of `train` and `phases`; each phase has its own `train`"),
        )
        yield (
            self.adapter.part != "lora",
            _("instead of adapter: {{method: {method}}}, write `train: {method}` here").format(
                method=self.adapter.method
            ),
        )
        yield (
            self.forgetting.may_stop and self.evaluate_every is None,
            _("`forgetting: {stop: ...}` needs evaluations, but none run during training: add `evaluate_every: 50`"),
        )
        yield self.embedding_learning_rate is not None and {*self.trains} == {"lora"}, _no_embeddings()
        yield (
            no_adapter and self.adapter.method == "qlora",
            _(
                "`method: qlora` quantises the base for an adapter, but `train: {first}` has none and would write the 4-bit or 8-bit base as a whole model; leave `method` out, or use `train: lora`"
            ).format(first=first),
        )
        yield (
            no_adapter and self.adapter.continue_from is not None,
            _(
                "`continue_from` opens an adapter, but `train: {first}` trains none: use `train: lora`, or run `tongwen merge` first and use the result as the base"
            ).format(first=first),
        )
        yield (
            {"full", "lora"} <= self.trained_parts,
            _("the phases train an adapter and also all base weights: choose one"),
        )
        yield (
            self.adapter.method == "adalora" and sum("lora" in parts_of(train) for train in self.trains) > 1,
            _("adalora allocates its budget in one phase, but two phases train it"),
        )

    @property
    def trains(self) -> list[str]:
        return [phase.train for phase in self.phases] or [self.train]


class Sft(Training):
    """Supervised fine-tuning on dialogues."""

    template: str = setting(
        "own",
        "own (the model's), chatml, alpaca, alpaca-zh, plain, a template of an older project (docs/templates.md), or a .jinja file",
        names="name or file",
    )
    learn: Literal["assistant", "last_answer", "everything"] = setting("assistant", "which text counts toward the loss")
    thinking: Literal["on", "off", "mixed"] = setting(
        "mixed",
        "for thinking models: every answer thinks (on), none does (off), or each row decides (mixed)",
    )
    too_long: Literal["reject", "drop_turns", "cut_prompt"] = setting(
        "reject",
        "longer samples: reject; drop their oldest turns; or then also cut the end of the question",
    )
    legacy: bool = setting(
        False,
        "tokenise as this template's project did in 2023, including its defects: docs/templates.md",
    )
    train_new_control_tokens: bool = setting(
        True,
        "train the embedding rows of control tokens that the base never saw; false: refuse such a base",
    )
    min_stop_learned: Number = setting(0.99, "refuse when less than this share of samples learn to stop", ge=0, le=1)


class Prefer(Training):
    """Learning which of two answers is the better one: a new adapter on the model of the stages before."""

    method: Literal["dpo", "kto", "orpo", "simpo"] = setting(
        "dpo",
        "dpo: pairs; kto: answers with a label, or pairs taken apart; orpo and simpo: pairs, without a reference",
    )
    beta: Number | None = setting(
        None,
        "dpo, kto: how strongly it is held to the reference; orpo: weight of the preference; simpo: sharpness; default 0.1, simpo 2",
        gt=0,
    )
    gamma: Number | None = setting(
        None, "simpo: margin by which the chosen answer must be likelier per token, default 1", ge=0
    )
    template: str = setting(
        "own",
        "own (the model's; after `sft` that of `sft`), or another as in `sft`",
        names="name or file",
    )
    thinking: Literal["on", "off", "mixed"] = setting("mixed", "for thinking models, as in `sft`")
    packing: Literal[False] = setting(False, "pairs are always padded", free=True)
    learning_rate: Number | None = setting(None, "peak learning rate; default 5e-6", gt=0, le=100)
    stop_after: Length = setting(Duration(count=1, unit="epochs"), "epochs, steps or tokens")

    def rules(self) -> Rules:
        yield from super().rules()
        adapter, given = self.adapter, self.adapter.model_fields_set
        yield (
            adapter.method not in ("lora", "qlora"),
            _(
                "`prefer` trains an adapter, because the model without it is the reference: `method: lora` or `qlora`, not {method}"
            ).format(method=adapter.method),
        )
        unusable = {
            "adapter.also_train": adapter.also_train,
            "adapter.continue_from": adapter.continue_from,
            "adapter.dropout": adapter.dropout,
            "batch_tokens": self.batch_tokens,
            "keep": self.keep,
            "neftune": self.neftune,
            "compile": self.compile,
            "engine": self.engine != "auto",
            "offload": self.offload,
        }
        for name, value in unusable.items():
            yield value, _("`prefer` does not use `{name}`: leave it out").format(name=name)
        yield (
            "targets" in given and "lm_head" in adapter.targets,
            _("`prefer` takes the probabilities from the head directly, so `targets` must not contain lm_head"),
        )
        yield (
            self.gamma is not None and self.method != "simpo",
            _("`gamma` is only for `method: simpo`, but the method is {method}: leave it out").format(
                method=self.method
            ),
        )
        yield (
            self.method == "kto" and self.batch_size < 2,
            _("kto compares each answer with those to other prompts in its batch: `batch_size` must be at least 2"),
        )

    @property
    def strength(self) -> float:
        """beta, with its default."""
        return self.beta if self.beta is not None else 2.0 if self.method == "simpo" else 0.1

    @property
    def margin(self) -> float:
        """gamma, with its default."""
        return self.gamma if self.gamma is not None else 1.0
