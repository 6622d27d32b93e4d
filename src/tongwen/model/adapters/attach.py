"""Make parts of a model trainable: all weights, the embeddings, their new rows, or an adapter attached by peft.

A stage may train different parts in turn. So the model is adapted once, for all of them, and `AdaptedModel.train_only`
selects the parts of the current phase.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from tongwen.core.errors import ModelError, first_line
from tongwen.core.i18n import _
from tongwen.core.model_families import family_of
from tongwen.model.adapters.adalora import configure, write_as_lora
from tongwen.model.adapters.chain import open_adapter
from tongwen.model.adapters.config import adapter_type, is_called, is_named
from tongwen.model.adapters.targets import AdapterTargets, find_targets, fused_experts, is_tied, no_module, text_part
from tongwen.model.kernels.fused_lora import fuse
from tongwen.model.loading.quiet import quiet
from tongwen.recipe.training import AdapterConfig, TrainedPart

# Norms of equally initialised rows vary by about 1 / sqrt(2 * width): 1.5 allows 4 times that at a width of 32.
PADDING_SPREAD = 1.5


@dataclass
class AdaptedModel:
    """A model that is ready to train.

    rows:       ids of the new rows
    whole:      whether some part trains embeddings in full
    notices:    messages for the user
    trainable:  every tensor that some part trains
    embeddings: the trainable ones that are whole embedding matrices
    """

    model: Any
    rows: list[int] = field(default_factory=list)
    whole: bool = False
    notices: list[str] = field(default_factory=list)
    trainable: list[torch.nn.Parameter] = field(init=False)
    embeddings: list[torch.nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self._gradient_hooks: list[Any] = []
        self.collect_trainable()

    def collect_trainable(self) -> None:
        """Collect the trainable tensors. Call again after an engine has replaced the model's parameters."""
        self.trainable = [part for part in self.model.parameters() if part.requires_grad]
        self.embeddings = _embeddings(self.model) if self.whole else []

    @property
    def counts(self) -> dict[str, Any]:
        """Return counts of trainable and of all parameters, without the frozen copies that peft keeps of modules."""
        named = [pair for pair in self.model.named_parameters() if ".original_module." not in pair[0]]
        trainable = sum(part.numel() for _, part in named if part.requires_grad)
        total = sum(part.numel() for _, part in named)
        return {"parameters": trainable, "of": total, "share": trainable / total}

    def train_only(self, parts: Collection[TrainedPart]) -> list[torch.nn.Parameter]:
        """Train only these parts from now on.

        Returns the embedding matrices of which only the new rows may learn. Their gradient is zero elsewhere, and the
        optimizer must not change the other rows either (by weight decay, for example).
        """
        for hook in self._gradient_hooks:
            hook.remove()
        self._gradient_hooks = []
        whole = {id(part) for part in self.embeddings}
        single = {id(part) for name, part in self.model.named_parameters() if "trainable_tokens_" in name and self.rows}
        for part in self.trainable:
            if "full" in parts:
                part.requires_grad_(True)
            elif id(part) in whole:
                part.requires_grad_("embeddings" in parts or "new_rows" in parts)
            elif id(part) in single:
                part.requires_grad_("new_rows" in parts)
            else:
                part.requires_grad_("lora" in parts)
        self.model.zero_grad(set_to_none=True)
        if "new_rows" not in parts:
            return []
        self._gradient_hooks = [_mask_gradient_outside(part, self.rows) for part in self.embeddings]
        return self.embeddings

    @property
    def trains_only_rows(self) -> bool:
        """Whether only single embedding rows are trained, without a LoRA adapter."""
        return adapter_type(self.model) == "TRAINABLE_TOKENS"

    def copy_rows_into(self, base: Any, whole: dict[str, torch.Tensor] | None) -> None:
        """Copy the trained rows into the matrices of a freshly loaded base.

        So all other weights keep the dtype of the base's files, not the one used in training. whole: as for `save`.
        """
        from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

        for name, module in self.model.named_modules():
            if isinstance(module, TrainableTokensLayer):
                matrix = base.get_submodule(name.removeprefix("base_model.model.")).weight
                matrix.data = matrix.data.clone()  # it may be memory-mapped from the file
                for adapter, rows in module.token_indices.items():
                    key = f"{name}.trainable_tokens_delta.{adapter}"
                    learned = whole[key] if whole else module.trainable_tokens_delta[adapter]
                    matrix.data[rows] = learned.detach().to(matrix)

    def save(self, folder: Path, whole: dict[str, torch.Tensor] | None = None) -> None:
        """Save the adapter, or the whole model without one. whole: the trainable ones by name, if the model holds only shards
        of them."""
        with quiet():  # peft warns of ranks that AdaLoRA has emptied
            self.model.save_pretrained(str(folder), state_dict=whole)
        if adapter_type(self.model) == "ADALORA":
            write_as_lora(folder)


def base_dtype(parts: Collection[TrainedPart], dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the base: fp32 if its own weights are trained."""
    return torch.float32 if trains_base(parts) else dtype


def trains_base(parts: Collection[TrainedPart]) -> bool:
    """Whether the base's own weights are trained. Adapters and single rows are separate tensors."""
    return "lora" not in parts and set(parts) != {"new_rows"}


def make_trainable(
    model: Any,
    adapter_config: AdapterConfig,
    control_rows: list[int],
    *,
    trained: Collection[TrainedPart] = (),
    new_rows: list[int] | None = None,
    steps: int = 0,
    fingerprint: str | None = None,
    begun_with: Mapping[str, Any] | None = None,
) -> AdaptedModel:
    """Freeze the weights that no part trains, and attach an adapter if one is configured.

    control_rows: ids whose rows are trained beside the adapter
    trained:      the parts that some phase trains; by default the adapter's own part
    new_rows:     ids for the part `new_rows`
    steps:        training steps, for AdaLoRA's schedule
    fingerprint:  of the model, to check an adapter that is trained further
    begun_with:   the adapter's config in a checkpoint of this run, whose targets it keeps: another version of tongwen
                  may choose others for `all-linear`
    Raises ModelError when a target names no module, or when nothing would be trained.
    """
    parts = set(trained) or {adapter_config.part}
    rows, held = list(new_rows or []), len(model.get_input_embeddings().weight)
    if rows and not 0 <= min(rows) <= max(rows) < held:
        raise ModelError(
            _("new_rows.json names row {highest}, but the embedding has only {held} rows").format(
                highest=max(rows), held=held
            ),
            place=str(model.name_or_path),
            remedy=_("run the vocabulary stage again"),
        )
    if "full" in parts:
        model.requires_grad_(False)
        text_part(model)[1].requires_grad_(True)
        for part in _weights_of_embeddings(model):
            part.requires_grad_(True)
        return AdaptedModel(model, rows, whole=True)
    if "lora" in parts:
        adapted = _with_adapter(model, adapter_config, parts, control_rows, rows, steps, fingerprint, begun_with)
    elif "embeddings" in parts:
        model.requires_grad_(False)
        for part in _weights_of_embeddings(model):
            part.requires_grad_(True)
        adapted = AdaptedModel(model, rows, whole=True)
    else:
        from peft import TrainableTokensConfig, get_peft_model

        # Better than Adapted's gradient mask: the optimizer keeps state for these rows only.
        config = TrainableTokensConfig(
            token_indices=sorted({*control_rows, *rows}), target_modules=list(_row_owners(model))
        )
        with quiet():
            adapted = AdaptedModel(get_peft_model(model, config), rows)
    if not adapted.trainable:
        raise ModelError(_("no parameter would be trained"), place="adapter")
    return adapted


def _with_adapter(
    model: Any,
    adapter_config: AdapterConfig,
    parts: set[TrainedPart],
    control_rows: list[int],
    new_rows: list[int],
    steps: int,
    fingerprint: str | None,
    begun_with: Mapping[str, Any] | None,
) -> AdaptedModel:
    single = sorted({*control_rows, *(new_rows if "new_rows" in parts else [])})
    if adapter_config.continue_from:
        opened = open_adapter(model, adapter_config.continue_from, fingerprint, trainable=True)
        fuse(opened)
        adapted = AdaptedModel(opened, new_rows, whole="embeddings" in parts)
        if (lost := set(single) - _rows_in(opened)) and not _embeddings(opened):
            raise ModelError(
                _("{count} token rows must be trained, but this adapter has no tensor for them").format(
                    count=len(lost)
                ),
                place="adapter.continue_from",
                remedy=_("merge it first, then train a new adapter on the merged model"),
            )
        if adapted.whole and not adapted.embeddings:
            raise ModelError(
                _("this adapter has no embeddings to train further"),
                place="adapter.continue_from",
                remedy="train: lora",
            )
        return adapted
    from peft import get_peft_model

    whole = "embeddings" in parts
    also = list(adapter_config.also_train)
    for name in also:
        _check_also(name, model)
    owners = _row_owners(model)
    if whole:
        also += owners
    rows = dict.fromkeys(_owners_apart(model, also), single) if single else {}
    targets = find_targets(model, adapter_config)
    experts = _experts(model, targets)
    if begun_with and (kept := targets.kept_from(begun_with)):
        targets, experts = (
            kept,
            [_("the adapter keeps the targets with which this run began: this version would choose others")],
        )
    config = _peft_config(model, adapter_config, targets, also, rows or None, steps)
    try:
        with quiet():
            adapted = AdaptedModel(get_peft_model(model, config), new_rows, whole)
    except (ValueError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise ModelError(
            _("peft cannot place this adapter: {reason}").format(reason=reason),
            place="adapter",
        ) from error
    adapted.notices += [*targets.notices(), *experts]
    fuse(adapted.model)
    if control_rows and rows:
        adapted.notices.append(
            _("{count} token rows are trained in addition to the adapter").format(count=len(control_rows))
        )
    return adapted


def _peft_config(
    model: Any,
    adapter_config: AdapterConfig,
    targets: AdapterTargets,
    also: list[str],
    rows: dict[str, list[int]] | None,
    steps: int,
) -> Any:
    from peft import LoraConfig

    family = family_of(model.config.model_type)
    settings: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "lora_alpha": adapter_config.scale,
        "lora_dropout": adapter_config.dropout,
        "target_modules": targets.modules,
        "fan_in_fan_out": bool(family and family.transposed),
        "modules_to_save": also or None,
        # by default peft unties the pair silently
        "ensure_weight_tying": is_tied(model),
    }
    if adapter_config.method == "adalora":
        if rows:
            raise ModelError(
                _("adalora cannot train single token rows, but {count} rows need training").format(
                    count=len(next(iter(rows.values())))
                ),
                place="adapter.method",
                remedy=_("method: lora, or also_train: [{rows}]").format(rows=", ".join(rows)),
            )
        return configure(adapter_config.rank, steps, settings)
    return LoraConfig(
        **settings,
        r=adapter_config.rank,
        use_rslora=adapter_config.rslora,
        use_dora=adapter_config.dora,
        target_parameters=targets.parameters or None,
        trainable_token_indices=rows,
    )


def _rows_in(model: Any) -> set[int]:
    """Return the ids whose rows an adapter trains one by one."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    layers = (module for module in model.modules() if isinstance(module, TrainableTokensLayer))
    return {row for layer in layers for rows in layer.token_indices.values() for row in rows}


def _mask_gradient_outside(part: torch.nn.Parameter, rows: list[int]) -> Any:
    """Add a hook that zeroes a matrix's gradient (V, H) outside these rows.

    It runs before gradients accumulate; for a matrix sharded over processes, after each has received its reduced shard.
    """
    others = torch.ones(len(part), 1, dtype=torch.bool, device=part.device)
    others[rows] = False
    if isinstance(part, DTensor):
        local_mask = distribute_tensor(others, part.device_mesh, part.placements).to_local()

        def mask(part: torch.Tensor) -> None:
            gradient = part.grad.to_local()
            gradient.masked_fill_(local_mask.to(gradient.device), 0)

        return part.register_post_accumulate_grad_hook(mask)
    return part.register_hook(lambda gradient: gradient.masked_fill(others, 0))


def _embeddings(model: Any) -> list[torch.nn.Parameter]:
    """Return the trainable whole matrices of the input embedding and the head; a single one if they are tied."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    found = {
        id(part): part
        for module in modules
        if module is not None
        for name, part in module.named_parameters()
        if part.requires_grad and "lora_" not in name and "trainable_tokens_" not in name and part.dim() == 2
    }
    return list(found.values())


def _weights_of_embeddings(model: Any) -> list[torch.nn.Parameter]:
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return list({id(module.weight): module.weight for module in modules if module is not None}.values())


def _check_also(name: str, model: Any) -> None:
    """Raise ModelError when there is no such module, or when it is quantised and cannot be trained in full."""
    found = [module for module_name, module in model.named_modules() if is_called(module_name, name)]
    if not found:
        raise no_module("also_train", name, model)
    held = [part for module in found for part in module.parameters()]
    if any(getattr(part, "quant_state", None) is not None or not part.is_floating_point() for part in held):
        raise ModelError(
            _("{name!r} is quantised, so it cannot be trained in full").format(name=name),
            place="adapter.also_train",
            remedy=_("method: lora, or only {modules}").format(modules=_(", ").join(_row_owners(model))),
        )


def find_untrained_rows(model: Any, ids: list[int], owned: Collection[int] = ()) -> list[int]:
    """Return the ids whose output rows were never trained in the base.

    A row counts as untrained when it is almost zero, when another token has exactly the same row (reserved tokens with
    a shared initialisation), or when it is as small as the rows of no token (padding of the vocabulary).

    owned: the ids of all tokens of the tokenizer; without them padding rows cannot be recognised.
    """
    head = model.get_output_embeddings()
    weight = (head if head is not None else model.get_input_embeddings()).weight.detach()
    norms = weight.float().norm(dim=1)
    typical = float(norms.median())
    smallest = max(1e-3 * typical, _norm_of_padding(norms, owned, typical))
    untrained = []
    for index in ids:
        row, norm = weight[index], float(norms[index])
        alike = torch.nonzero((norms - norm).abs() <= 1e-6 * max(norm, 1e-12)).flatten()
        twin = any(int(other) != index and torch.equal(weight[int(other)], row) for other in alike[:64])
        if norm <= smallest or twin:
            untrained.append(index)
    return untrained


def _norm_of_padding(norms: torch.Tensor, owned: Collection[int], typical: float) -> float:
    """Return the norm up to which a row counts as padding. norms: (V,).

    0 if there are no padding rows, or if their norms are too close to those of trained rows.
    """
    spare = torch.ones(len(norms), dtype=torch.bool)
    spare[[index for index in owned if index < len(norms)]] = False
    if not owned or not spare.any():
        return 0.0
    limit = PADDING_SPREAD * float(norms[spare.to(norms.device)].median())
    return limit if limit <= typical / 2 else 0.0


def _row_owners(model: Any) -> list[str]:
    """Return the names of the modules with token rows: the input embedding, and the head unless it is tied."""
    names = {id(module): name for name, module in model.named_modules()}
    inside = names[id(model.get_input_embeddings())].split(".")[-1]
    if is_tied(model):
        return [inside]
    return [inside, names[id(model.get_output_embeddings())].split(".")[-1]]


def _owners_apart(model: Any, also: list[str]) -> list[str]:
    """Return the row owners that are not trained in full: peft cannot train single rows of a fully trained matrix."""
    learned = {
        id(part)
        for name, part in model.named_parameters(remove_duplicate=False)
        if is_named(also, name.rpartition(".")[0])
    }
    owners = zip(_row_owners(model), _weights_of_embeddings(model), strict=False)
    return [name for name, part in owners if id(part) not in learned]


def _experts(model: Any, targets: AdapterTargets) -> list[str]:
    """Return a notice on whether the adapter covers fused expert weights, which are not `Linear` modules."""
    parts = dict(model.named_parameters(remove_duplicate=False))  # tied ones have two names
    fused = {name: parts[name] for name in fused_experts(model)}
    passed = [name for name in fused if not is_named(targets.parameters, name)]
    if passed:
        size = sum(fused[name].numel() for name in passed)
        return [
            _(
                "the adapter does not cover {count} fused expert weights ({size:,} parameters), the first: {passed}"
            ).format(count=len(passed), size=size, passed=passed[0])
        ]
    if fused:
        return [
            _("the adapter covers {count} fused expert weights, with separate matrices for each expert").format(
                count=len(fused)
            )
        ]
    return []
