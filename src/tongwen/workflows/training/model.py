"""The model of a training job: prepare it, audit it before each phase, score it, generate answers, save it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from tongwen.core import console, distributed
from tongwen.core.errors import ModelError, NumbersError, RecipeError, first_line, is_out_of_memory
from tongwen.core.i18n import _
from tongwen.core.model_families import family_of
from tongwen.data.preference_store import Samples
from tongwen.data.token_store import TokenStore
from tongwen.infer.generation import ROWS, Sampling, TextGenerator
from tongwen.model.adapters import attach
from tongwen.model.adapters.chain import open_adapter_chain, resize_for_adapter
from tongwen.model.adapters.config import adapter_type
from tongwen.model.kernels import checkpointing, packed_attention
from tongwen.model.kernels.fused_blocks import fuse_blocks
from tongwen.model.kernels.loss import bits_per_byte, learned_loss, use_blockwise_head
from tongwen.model.kernels.recurrent import carries_state, missing_packages
from tongwen.model.loading import chat_setup, devices
from tongwen.model.loading.adapter_folder import find_adapter
from tongwen.model.loading.architecture import load_config
from tongwen.model.loading.config_json import check_trainable
from tongwen.model.loading.fingerprint import fingerprint_model
from tongwen.model.loading.locate import locate
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.names import unused_tensors
from tongwen.model.loading.special_tokens import fix_stop_tokens
from tongwen.model.loading.tokenizer import check_ids_have_rows, check_tokenizer
from tongwen.model.merging.carry import restore_unchanged_tensors
from tongwen.train import audit
from tongwen.train.checkpoints import check_adapter_saved
from tongwen.train.memory import STATE_BYTES, device_memory, is_estimated_to_fit
from tongwen.train.packing import BatchPlan, MicroBatches, fill, pack, pad, to_device
from tongwen.train.parallel import Engine, sharding_plan, trainable_to_fp32
from tongwen.train.phase import Phase
from tongwen.train.try_batch import fits
from tongwen.workflows.record_encoders import RecordEncoder
from tongwen.workflows.training.types import PreparedModel, TrainingJob

# What a model's own code raises for inputs that it was not written for.
MODEL_ERRORS = (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, NotImplementedError)
FREE_SHARE = 0.03  # share of a GPU's memory to leave free when trying a micro-batch: long runs fragment the allocator


def prepare_model(job: TrainingJob, phases: list[Phase], device: str, engine: Engine) -> PreparedModel:
    """Open the base, check it against its tokenizer, attach what the recipe trains, and place it on the device."""
    section, place = job.section, locate(job.base)
    tokenizer = job.record_encoder.tokenizer
    dtype, dtype_reason = devices.compute_dtype(section.precision, device)
    trained = {part for phase in phases for part in phase.parts}

    # Open the base, and check what its files say.
    check_trainable(place)
    with console.waiting(_("opening the base")):
        quantize = section.adapter.quantize if section.adapter.method == "qlora" else ""
        kept = attach.base_dtype(trained, dtype)
        if engine.name == "fsdp2" and attach.trains_base(trained):  # it becomes fp32 when it is sharded
            kept = load_config(place).dtype or kept
        model, fingerprint = open_adapter_chain(place, kept, quantize)
        model.config.use_cache = False
        own_attention = packed_attention.name_in_use(model)
    if unused := unused_tensors(model, place):
        console.notice(
            _(
                "{count} tensors of the base's files are not loaded and not trained, and stay as they are, the first: {first}"
            ).format(count=len(unused), first=unused[0])
        )
    if section.adapter.continue_from:
        resize_for_adapter(model, find_adapter(Path(section.adapter.continue_from)))
    if check_tokenizer(tokenizer, model, place):
        rows = model.get_input_embeddings().weight.shape[0]
        for store in (job.data.store, *job.data.held_out_stores.values()):
            check_ids_have_rows(store.ids, tokenizer, rows, str(job.prepared.path))
    fix_stop_tokens(tokenizer, model, job.base)
    _check_lengths(model.config, job)
    audit.check_finite_base(model)
    stops = chat_setup.stop_ids(tokenizer, job.template, getattr(model, "generation_config", None))
    stops = stops or ((job.end,) if job.end is not None else ())

    # Attach what is trained.
    set_seed(job.recipe.seed)
    adapted = attach.make_trainable(
        model,
        section.adapter,
        job.find_rows(model),
        trained=trained,
        new_rows=list(job.new_rows),
        steps=sum(len(phase.plan) for phase in phases if "lora" in phase.parts),
        fingerprint=fingerprint,
        begun_with=_adapter_of_checkpoints(phases),
    )
    for notice in adapted.notices:
        console.notice(notice)
    console.info(f"{device} · {str(dtype)[6:]}: {dtype_reason}")

    # Place it, and turn on the faster forms of its layers.
    if engine.name == "fsdp2":
        engine.shard(adapted.model, dtype)
        adapted.collect_trainable()
    else:
        trainable_to_fp32(adapted.trainable)
        if not quantize:  # quantised weights are on their device already
            adapted.model.to(device)
    if engine.is_whole and not (section.compile and device == "cuda"):  # the compiler fuses more
        fuse_blocks(adapted.model)
    prepared = PreparedModel(adapted, stops, False, fingerprint, device, dtype, engine, own_attention)
    prepared = _choose_batches(prepared, job)
    if section.compile:
        checkpointing.compile_layers(adapted.model)
    return prepared


def _adapter_of_checkpoints(phases: list[Phase]) -> dict[str, Any] | None:
    """Return the adapter's config in a checkpoint of an interrupted run; None without one. All of them have the same."""
    for phase in phases:
        for file in phase.checkpoints.glob("checkpoint-*/adapter_config.json"):
            return dict(json.loads(file.read_text(encoding="utf-8")))
    return None


def _choose_batches(prepared: PreparedModel, job: TrainingJob) -> PreparedModel:
    """Return the model with packed documents if it keeps them apart, else with padded batches and its own attention."""
    config = prepared.model.config
    reason = _reason_to_pad(prepared.model, job)
    if not reason:
        try:
            packed_attention.use(prepared.model)
            with prepared.computing():
                _check_packing(prepared, job.data.store)
        except packed_attention.UnknownArgument as error:
            reason = _("its attention has an argument that packed attention does not know, {argument}").format(
                argument=error
            )
        except NumbersError as error:
            reason = error.rule
        except MODEL_ERRORS as error:
            if is_out_of_memory(error) or distributed.is_lost_peer(str(error)):
                raise
            reason = _("packed documents break its own code: {reason}").format(reason=first_line(error)[:160])
    if not reason:
        console.success(_("audit passed: documents in a pack cannot see each other"))
        prepared = replace(prepared, packed=True)
    else:
        packed_attention.restore(prepared.model, prepared.own_attention)
        if job.trainer is None:  # TRL's trainers never pack
            console.notice(
                _("{model_type} trains in padded batches: {why}").format(model_type=config.model_type, why=reason)
            )
    with prepared.computing():
        batch = (pack if prepared.packed else pad)([job.data.store.sample(0)])
        with _refusing_other_inputs(job.base):
            audit.check_causal(prepared.model, batch, learned_loss)
    return prepared


@contextmanager
def _refusing_other_inputs(base: str) -> Iterator[None]:
    """Turn the model's own error into one that says that it needs more than a text. Some need it only in training."""
    try:
        yield
    except MODEL_ERRORS as error:
        if is_out_of_memory(error) or distributed.is_lost_peer(str(error)):
            raise
        raise ModelError(
            _("the model cannot read a text alone: {said}").format(said=first_line(error)[:300]),
            place=base,
            remedy=_("use a model for text generation, such as Qwen/Qwen3-0.6B"),
        ) from error


def _check_packing(prepared: PreparedModel, store: Samples) -> None:
    """Raise NumbersError unless documents of a pack keep apart and score as in the model's own attention."""
    samples = [store.sample(0), store.sample(min(1, len(store) - 1))]
    audit.check_isolation(prepared.model, samples, learned_loss)
    if carries_state(prepared.model):
        audit.check_no_state_passes(prepared.model, samples, learned_loss)
    own = packed_attention.own_attention(prepared.model, prepared.own_attention)
    audit.check_own_attention(prepared.model, samples[0], learned_loss, own)


def _reason_to_pad(model: Any, job: TrainingJob) -> str:
    """Return why documents cannot be packed, as far as it is known without trying; "" if nothing speaks against it."""
    text = model.config.get_text_config()
    family = family_of(model.config.model_type)
    if job.section.packing is False:
        return f"{job.stage}.packing: false"
    if family and family.padded:
        return _(family.padded)
    if carries_state(model):  # transformers says of few such models that they support any attention: the audit decides
        if missing := missing_packages(model):
            return _(
                "its layers carry a state from token to token, and packages that keep documents apart in them are missing: {packages}"
            ).format(packages=" ".join(missing))
    elif not getattr(model, "_supports_attention_backend", False):
        return _("it has its own attention implementation")
    chunk = getattr(text, "attention_chunk_size", None)
    if chunk and int(job.data.store.lengths.max()) > chunk:
        return _("it attends in chunks of {chunk} tokens, and a sample is longer").format(chunk=chunk)
    return ""


def _check_lengths(config: Any, job: TrainingJob) -> None:
    """Raise RecipeError if a sample is longer than the model's table of positions."""
    family, limit = family_of(config.model_type), chat_setup.context_length(config)
    longest = max(store.longest for store in (job.data.store, *job.data.held_out_stores.values()))
    if family and family.table and longest > limit:
        raise RecipeError(
            _("a sample has {longest} tokens, but {model_type} has a table of only {limit} positions").format(
                longest=longest, model_type=config.model_type, limit=limit
            ),
            place=f"{job.stage}.max_length: {job.section.max_length}",
            remedy=f"{job.stage}: {{max_length: {limit}}}",
        )


def set_memory_savers(model: PreparedModel, phase: Phase, store: Samples) -> None:
    """Turn on a phase's memory savers: blockwise logits for our own loss, activation recomputation. Call this before the
    audit, which runs a training step."""
    if model.engine.is_whole and model.dtype != torch.float16:  # fp16's small gradients wait for the scaler
        # autocast would later reuse casts made here without gradients
        with model.computing(), _refusing_other_inputs(str(model.model.config.name_or_path)):
            use_blockwise_head(model.model, to_device(_first_batch(model, store, phase.plan), model.model))
    _set_checkpointing(model, phase, store)


def _first_batch(model: PreparedModel, store: Samples, plan: BatchPlan) -> dict[str, Any]:
    return MicroBatches(store, [plan.micro[0][0]], packed=model.packed)[0]


def _set_checkpointing(model: PreparedModel, phase: Phase, store: Samples) -> None:
    """Recompute activations if the recipe asks for it, or if the largest micro-batch would not fit on the GPU."""
    setting = phase.config.activation_checkpointing
    checkpointing.keep_activations(model.model)
    if setting == "on":
        checkpointing.recompute(model.model)
    elif setting == "auto" and (memory := device_memory(model.device)) and not _fits(model, phase, store, memory):
        checkpointing.recompute(model.model)
        console.notice(
            _(
                "a micro-batch does not fit on the GPU with all activations, so they are recomputed (a smaller micro_batch_tokens is faster if it fits)"
            )
        )


def _fits(model: PreparedModel, phase: Phase, store: Samples, memory: int) -> bool:
    """Return whether the largest micro-batch fits beside the optimizer's memory. memory: bytes of the GPU.

    The micro-batch is tried for real. If processes share the model, one that fails would leave the others waiting, so
    the memory is estimated instead.
    """
    section, plan = phase.config, phase.plan
    if section.sharded_by:
        sharding = sharding_plan(section, distributed.world_size())
        return is_estimated_to_fit(model.model, section, sharding, model.dtype.itemsize, plan.budget, memory)
    learning = sum(part.numel() for part in model.model.parameters() if part.requires_grad)
    largest = max(plan.flat(), key=lambda micro: int(store.lengths[list(micro)].sum()))
    batch = MicroBatches(store, [largest], packed=model.packed)[0]
    buckets = 4 * distributed.is_launched()  # DDP's copy of the gradients
    reserve = learning * (STATE_BYTES[section.optimizer] + buckets) + int(FREE_SHARE * memory)
    with console.waiting(_("trying a micro-batch on the GPU")):
        return fits(
            model.model, batch, learned_loss, model.computing(), passes=min(plan.accumulate, 2), reserve=reserve
        )


def audit_phase(model: PreparedModel, phase: Phase, store: Samples) -> list[str]:
    """Check on the first micro-batch that each trainable tensor gets a gradient.

    Returns the trainable tensors that its tokens did not reach. Raises NumbersError if a check fails.
    """
    first = _first_batch(model, store, phase.plan)
    with model.computing(), _refusing_other_inputs(str(model.model.config.name_or_path)):
        unreached = audit.probe_gradients(model.model, first, learned_loss)
    console.success(_("audit passed: gradients reach every trained tensor"))
    for name in unreached:
        console.notice(_("no token reached {name} in the first micro-batch").format(name=name))
    return unreached


def score_held_out(
    model: PreparedModel, stores: dict[str, TokenStore], budget: int, sizes: torch.Tensor
) -> dict[str, Any]:
    """Return the bits per byte of the held-out data, overall and by group.

    stores: by group; budget: tokens of a micro-batch; sizes: (V,) bytes of each token. Raises NumbersError for NaN.
    """
    groups = {}
    for name, store in stores.items():
        batches = MicroBatches(store, fill(store.lengths, budget), packed=model.packed)
        with model.computing():
            stream = (to_device(batches[index], model.model) for index in range(len(batches)))
            groups[name] = bits_per_byte(model.model, stream, sizes)
        if not math.isfinite(groups[name]["loss"]):
            raise NumbersError(
                _("a held-out score is NaN or infinite"),
                place=_("held out") + (f" · {name}" if name else ""),
                remedy=_(
                    "lower learning_rate, or precision: fp32; if this happens before training, the base is damaged"
                ),
            )
    size, tokens = (sum(one[unit] for one in groups.values()) for unit in ("bytes", "tokens"))
    return {
        "bits_per_byte": sum(one["bits_per_byte"] * one["bytes"] for one in groups.values()) / max(size, 1),
        "loss": sum(one["loss"] * one["tokens"] for one in groups.values()) / max(tokens, 1),
        "bytes": size,
        "tokens": tokens,
        "groups": {name: one for name, one in groups.items() if name},
    }


def answer_prompts(prepared: PreparedModel, record_encoder: RecordEncoder, prompts: list[str]) -> list[str]:
    """Return the model's greedy answers to prompts."""
    ids = [record_encoder.encoder.encode_prompt(prompt) for prompt in prompts]
    answers = generate(prepared, record_encoder.tokenizer, ids, max_new_tokens=64)
    decode = _generator(prepared, record_encoder.tokenizer).decode
    return [decode(answer).strip() for answer in answers]


def generate(prepared: PreparedModel, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Return the ids of the model's greedy answers to prompts (ids), generated with another attention than in training."""
    model, answers = prepared.model, dict[int, list[int]]()
    was_training = model.training
    model.eval()
    own = packed_attention.own_attention(model, prepared.own_attention) if prepared.packed else nullcontext()
    try:
        with own, prepared.computing(), checkpointing.uncompiled(model):
            sampling = Sampling(max_new_tokens=max_new_tokens)
            _generator(prepared, tokenizer).answer_all(prompts, sampling, answers.__setitem__, ROWS)
    finally:
        model.train(was_training)
    return [answers[index] for index in range(len(prompts))]


def _generator(prepared: PreparedModel, tokenizer: Any) -> TextGenerator:
    context = chat_setup.context_length(prepared.model.config)
    return TextGenerator(prepared.model, tokenizer, prepared.stops, context)


def save_model(job: TrainingJob, prepared: PreparedModel, folder: Path, whole: dict[str, torch.Tensor] | None) -> str:
    """Save adapter or model, tokenizer, template and stop tokens. Returns the fingerprint of the trained tensors.

    whole: the trained tensors by name, if this process has only shards of the model.
    """
    model, tokenizer = prepared.model, job.record_encoder.tokenizer
    packed_attention.restore(model, prepared.own_attention)
    model.config.use_cache = True
    place = locate(job.base)
    if prepared.adapted.trains_only_rows:
        base, _unused = open_adapter_chain(place, load_config(place).dtype or torch.float32)
        fix_stop_tokens(tokenizer, base, job.base)
        prepared.adapted.copy_rows_into(base, whole)
        base.save_pretrained(str(folder))
        restore_unchanged_tensors(base, place, folder)
    else:
        prepared.adapted.save(folder, whole)
        if not adapter_type(model):
            restore_unchanged_tensors(model, place, folder)
    chat_setup.save_tokenizer(tokenizer, job.template, folder)
    chat_setup.save_generation_config(model, prepared.stops, folder)
    check_adapter_saved(folder)
    return fingerprint_model(ModelRef(str(folder), str(folder))) or ""
