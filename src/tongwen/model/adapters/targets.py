"""Choose the weights that an adapter is attached to, by properties of the model instead of its family's name.

Only the text part counts: a vision or audio encoder never sees a text, so its weights would get no gradient. In a
mixture of experts `all-linear` takes in the dense layers, the shared experts and the fused experts, but no router.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.core.model_families import family_of
from tongwen.model.adapters.config import is_called, is_inside
from tongwen.recipe.training import AdapterConfig


@dataclass
class AdapterTargets:
    """modules, parameters: names for peft; left_out: linear layers without an adapter, by the reason why"""

    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def kept_from(self, config: Mapping[str, Any]) -> AdapterTargets | None:
        """Return the targets of a saved adapter's config if they differ from these, else None."""
        saved = AdapterTargets(list(config.get("target_modules") or ()), list(config.get("target_parameters") or ()))
        same = {*saved.modules} == {*self.modules} and {*saved.parameters} == {*self.parameters}
        return None if same else saved

    def notices(self) -> list[str]:
        """Return a message for each reason why layers have no adapter."""
        return [
            _("{count} weights get no adapter, the first: {first}: {why}").format(
                count=len(names), first=names[0], why=why
            )
            for why, names in self.left_out.items()
        ]


def find_targets(model: Any, adapter_config: AdapterConfig) -> AdapterTargets:
    """Return what the recipe's `targets`, `target_parameters` and `exclude` mean in this model.

    Raises ModelError when a name matches nothing, or only what text never reaches, or what cannot have an adapter.
    """
    chosen = _chosen_modules(model, adapter_config)
    parameters = _chosen_parameters(model, adapter_config)
    if adapter_config.targets == "all-linear":
        parameters += [name for name in fused_experts(model) if name not in parameters]
    for name in adapter_config.exclude:
        found = {full for full in [*chosen, *parameters] if is_inside(name, full)}
        if not found:
            raise no_module("exclude", name, model)
        chosen, parameters = ([full for full in names if full not in found] for names in (chosen, parameters))
    targets = AdapterTargets()
    reshaping: Collection[str] = ()
    if adapter_config.targets != "all-linear":
        if lost := _lost_by_peft(model, [*chosen, *parameters]):
            raise ModelError(
                _("peft would save an adapter of {name}, but not load it again").format(name=lost[0]),
                place="adapter.targets",
                remedy="targets: all-linear",
            )
    else:
        unreached, reshaping = _probe(model, chosen)
        lost = _lost_by_peft(model, [full for full in [*chosen, *parameters] if full not in unreached])
        for why, names in ((_("no gradient reaches its output"), unreached), (_("peft would not load it again"), lost)):
            if names:
                targets.left_out[why] = names
            chosen, parameters = ([full for full in both if full not in names] for both in (chosen, parameters))
    reserved = _renamed_by_peft(model, chosen) | {*chosen}.intersection(reshaping)
    allowed = _refused_by_peft(model, adapter_config, [name for name in chosen if name not in reserved], targets)
    parameters += [f"{name}.weight" for name in chosen if name in reserved]
    parameters = _fit_for_parameters(model, adapter_config, parameters, targets)
    if not allowed and not parameters:
        raise ModelError(
            ": ".join((_("no weight is left for the adapter"), *targets.left_out)),
            place="adapter.targets",
            remedy=_("exclude fewer names") if adapter_config.exclude else "adapter: {method: full}",
        )
    targets.modules = _shortened(allowed, [name for name, _module in model.named_modules()])
    targets.parameters = _shortened(parameters, [name for name, _part in model.named_parameters()], least=2)
    return targets


def text_part(model: Any) -> tuple[str, Any]:
    """Return (name, module) of the part of a model that text passes through; ("", model) for a model of text alone."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    is_wrapped = model.config.get_text_config() is not model.config
    return (name, decoder) if name and is_wrapped else ("", model)


def is_tied(model: Any) -> bool:
    """Whether the head is the embedding itself. A wrapped model's own config may not say it, but its text's."""
    configs = (model.config, model.config.get_text_config())
    return any(getattr(config, "tie_word_embeddings", False) for config in configs)


def _chosen_modules(model: Any, adapter_config: AdapterConfig) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    nn = torch.nn
    part, _text = text_part(model)
    inside = {name: module for name, module in model.named_modules() if name and _is_below(name, part)}
    if adapter_config.targets == "all-linear":
        passed = _routers(model) | {name for name, module in inside.items() if module is model.get_output_embeddings()}
        linear = (name for name, module in inside.items() if isinstance(module, (nn.Linear, Conv1D)))
        return [name for name in linear if not any(_is_below(name, one) for one in passed)]
    fit: tuple[type, ...] = (nn.Linear, Conv1D)  # bitsandbytes' layers are subclasses of Linear
    if adapter_config.method != "adalora":
        fit += (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    wanted = adapter_config.targets if isinstance(adapter_config.targets, list) else _usual_targets(model)
    everywhere = dict(model.named_modules())
    head = {name: module for name, module in everywhere.items() if module is model.get_output_embeddings()}
    chosen: dict[str, None] = {}
    for name in wanted:
        found = {full: module for full, module in (inside | head).items() if is_called(full, name)}
        unfit = next((type(module).__name__ for module in found.values() if not isinstance(module, fit)), "")
        if not found and any(is_called(full, name) for full in everywhere):
            raise ModelError(
                _("text never reaches {name!r}: it is outside {part}").format(name=name, part=part),
                place="adapter.targets",
                remedy="targets: all-linear",
            )
        if unfit or not found:
            raise no_module("targets", name, model, unfit)
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _usual_targets(model: Any) -> tuple[str, ...]:
    kind = model.config.get_text_config().model_type
    family = family_of(model.config.model_type) or family_of(kind)
    if family is None:
        raise ModelError(
            _("the usual targets of the family {model_type!r} are not known").format(model_type=kind),
            place="adapter.targets",
            remedy="targets: all-linear",
        )
    return family.targets


def _chosen_parameters(model: Any, adapter_config: AdapterConfig) -> list[str]:
    """Return the full names of `target_parameters`. Raises ModelError for a name that matches no weight."""
    names = [name for name, _part in model.named_parameters()]
    chosen: dict[str, None] = {}
    for wanted in adapter_config.target_parameters:
        found = [name for name in names if is_called(name, wanted)]
        if not found:
            fused = sorted({".".join(name.split(".")[-3:]) for name in fused_experts(model)})
            raise ModelError(
                _("there is no weight named {wanted!r}").format(wanted=wanted),
                place="adapter.target_parameters",
                remedy=_("fused weights here: {fused}").format(fused=_(", ").join(fused) or _("none")),
            )
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _is_below(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(f"{part}.")


def fused_experts(model: Any) -> list[str]:
    """Return the names of the text part's weights that hold the matrices of all experts of a layer, (experts, …)."""
    part, text = text_part(model)
    if not _routers(model):
        return []
    prefix = f"{part}." if part else ""
    return [
        f"{prefix}{name}"
        for name, weight in text.named_parameters()
        if weight.dim() == 3 and not type(text.get_submodule(name.rpartition(".")[0])).__module__.startswith("torch.nn")
    ]


def _routers(model: Any) -> set[str]:
    """Return the names of the modules that choose experts: those whose output transformers records as router logits.

    Where it records a whole block of experts, the router is the layer in it with one output for each expert.
    """
    recorded: set[Any] = set()
    for module in model.modules():
        recorders = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits") or []
        for recorder in recorders if isinstance(recorders, (list, tuple)) else [recorders]:
            recorded.add(getattr(recorder, "target_class", None) or recorder)
    routers = set()
    for name, module in model.named_modules():
        if type(module) not in recorded:
            continue
        experts = {part.shape[0] for part in module.parameters() if part.dim() == 3}
        experts |= {len(child) for child in module.modules() if isinstance(child, torch.nn.ModuleList)}
        if not experts:
            routers.add(name)
        routers |= {
            f"{name}.{below}"
            for below, child in module.named_modules()
            if isinstance(child, torch.nn.Linear) and child.out_features in experts
        }
    return routers


def _probe(model: Any, modules: Collection[str]) -> tuple[list[str], set[str]]:
    """Return (modules whose output does not change the logits, modules that do not map a row to a row), by one step with
    a few tokens.

    Some code reads a layer's weight without calling it (Mamba's `dt_proj`), or only ranks what it computes (the indexer
    of a sparse attention). Experts that the few tokens do not choose count as reached. DeepSeek-V4's grouped projection
    multiplies each group of heads with rows of its own, so an adapter fits its weight, but not its inputs.
    """
    embedding = model.get_input_embeddings()
    reached: set[str] = set()
    reshaping: set[str] = set()
    if embedding.weight.device.type == "meta":
        return [], reshaping

    def watch(name: str, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            return
        if inputs and output.shape != (*inputs[0].shape[:-1], getattr(module, "out_features", output.shape[-1])):
            reshaping.add(name)
        if output.requires_grad:
            output.register_hook(lambda _gradient: reached.add(name))

    model.requires_grad_(False)
    # A copy, because some code adds positions to the embedded tokens in place, which no leaf of the graph allows.
    hooks = [embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(True).clone())]
    for name in modules:
        module = model.get_submodule(name)
        hooks.append(module.register_forward_hook(partial(watch, name)))
    was_training = model.training
    model.train()  # Gemma 3n clamps a weight in training instead of calling its layer
    try:
        ids = torch.arange(1, 17, device=embedding.weight.device)[None] % len(embedding.weight)
        with torch.random.fork_rng():
            model(input_ids=ids, use_cache=False).logits.sum().backward()
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError):
        return [], set()  # a model that needs other inputs: the audit before training decides
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if not reached:  # the text goes through another embedding than the model names: the audit before training decides
        return [], reshaping
    return [name for name in modules if name not in reached and "expert" not in name], reshaping


def _lost_by_peft(model: Any, targets: Collection[str]) -> list[str]:
    """Return the modules and weights whose adapters peft would save, but not find when it loads them: it renames an
    adapter's tensors as transformers does the base's, and some patterns match a name that is right already (Laguna's
    `mlp.shared_expert.` matches `mlp.shared_experts`)."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    modules = {name for name, _module in model.named_modules()}
    owners = {name: name if name in modules else name.rpartition(".")[0] for name in targets}
    given = {
        f"base_model.model.{owner}.lora_{part}.weight": torch.zeros(1, 1) for owner in owners.values() for part in "AB"
    }
    try:
        found = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), given)
    except (ValueError, RuntimeError, KeyError):  # shapes matter to some patterns: the merge decides
        return []
    return [name for name, owner in owners.items() if f"base_model.model.{owner}.lora_A.weight" not in found]


def _renamed_by_peft(model: Any, modules: Collection[str]) -> set[str]:
    """Return the modules whose names peft reads as those of experts that an older transformers kept apart.

    For some mixtures peft takes `gate_proj` in a config to mean the fused experts, and nothing else, so dense layers
    and shared experts of that name would be passed over. As parameters (`gate_proj.weight`) it finds them.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    leaves = {name.rpartition(".")[2] for name in modules}
    renamed = set()
    for leaf in leaves:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:  # it asks for the other name of a fused pair
            renamed.add(leaf)
        if leaf not in (config.target_modules or ()):
            renamed.add(leaf)
    return {name for name in modules if name.rpartition(".")[2] in renamed}


def _refused_by_peft(
    model: Any, adapter_config: AdapterConfig, modules: list[str], targets: AdapterTargets
) -> list[str]:
    """Return the modules that peft accepts; note the others with peft's reason. A module that the user named is an
    error instead, which peft raises itself."""
    if isinstance(adapter_config.targets, list):
        return modules
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    allowed = []
    for name in modules:
        try:
            _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
        except ValueError:
            targets.left_out.setdefault(_("peft does not support an adapter there"), []).append(name)
        else:
            allowed.append(name)
    return allowed


def _fit_for_parameters(
    model: Any, adapter_config: AdapterConfig, names: Iterable[str], targets: AdapterTargets
) -> list[str]:
    """Return the weights that can be adapted as parameters; note the others with the reason."""
    setting = (
        "adalora"
        if adapter_config.method == "adalora"
        else "dora"
        if adapter_config.dora
        else "dropout"
        if adapter_config.dropout
        else ""
    )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    fit = []
    for name in names:
        if setting:
            why = _("an adapter on a bare weight does not support {setting}").format(setting=setting)
        elif not parameters[name].is_floating_point() or getattr(parameters[name], "quant_state", None) is not None:
            why = _("an adapter on a bare weight does not support quantised weights")
        else:
            fit.append(name)
            continue
        targets.left_out.setdefault(why, []).append(name)
    return fit


def _shortened(chosen: Collection[str], everything: Collection[str], least: int = 1) -> list[str]:
    """Return the last components of the chosen names where they name nothing else, and whole names elsewhere."""

    def ending(name: str) -> str:
        return ".".join(name.split(".")[-least:])

    taken = set(chosen)
    others = {ending(name) for name in everything if name not in taken}
    return sorted({name if ending(name) in others else ending(name) for name in chosen})


def no_module(key: str, name: str, model: Any, unfit: str = "") -> ModelError:
    """Return the error for a bad target. unfit: class of a module with this name that cannot have an adapter."""
    linear = sorted({full.split(".")[-1] for full, module in model.named_modules() if hasattr(module, "in_features")})
    return ModelError(
        _("{name!r} is a {module_type}; an adapter cannot be attached to it").format(name=name, module_type=unfit)
        if unfit
        else _("there is no module named {name!r}").format(name=name),
        place=f"adapter.{key}",
        remedy=_("this model has: {linear}").format(linear=_(", ").join(linear)),
    )
