"""Set up the recipe's engine with accelerate and transformers, and verify that this engine runs.

Both libraries fall back silently: on a CPU accelerate replaces FSDP by DDP, and a launcher's environment variables change
the engine. So before the first step the prepared model is compared with the requested engine.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tongwen.core import console, distributed
from tongwen.core.errors import MachineError, MissingPackage, RecipeError
from tongwen.core.i18n import _, ngettext
from tongwen.recipe import engine_config
from tongwen.recipe.training import Training
from tongwen.train.memory import SHARDED_PURPOSES, ShardingPlan

BUCKET = 500_000_000  # DeepSpeed's default
FSDP_FILE = "pytorch_model_fsdp.bin"  # accelerate's name
# The recipe's `precision` and `compile`, and torch's device detection, take precedence over these.
OVERRIDDEN = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_", "ACCELERATE_USE_CPU")
LAUNCHER_ENGINES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


@dataclass(frozen=True)
class Engine:
    """How a model is distributed over processes.

    name: single, ddp, fsdp2 or zero1 ... zero3; arguments: for TrainingArguments; place: of the setting, for errors
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    place: str = ""

    @property
    def is_deepspeed(self) -> bool:
        return self.name.startswith("zero")

    @property
    def is_whole(self) -> bool:
        """Whether every process holds the whole model; other engines shard or move weights."""
        return self.name in ("single", "ddp")

    def shard(self, model: Any, dtype: torch.dtype) -> None:
        """FSDP2: keep only this process's part of every tensor, so that no GPU ever holds the whole model.

        Trainable weights become fp32 one layer at a time: until then they share the memory of the mapped weight file.
        """
        from accelerate import Accelerator
        from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy, fsdp2_prepare_model
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        self._check_layers(model)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        plugin = _plugin(self.arguments["fsdp_config"], mixed_precision_policy=policy)
        accelerator = Accelerator(cpu=not torch.accelerator.is_available(), fsdp_plugin=plugin)
        self.enforce(accelerator, plugin)
        fsdp_kwargs = {
            "reshard_after_forward": plugin.reshard_after_forward,
            "mp_policy": policy,
            "offload_policy": plugin.cpu_offload,
        }
        plugin.set_auto_wrap_policy(model)
        if is_layer := fsdp2_prepare_auto_wrap_policy(plugin, model):
            for layer in [module for module in model.modules() if module is not model and is_layer(module)][::-1]:
                trainable_to_fp32(layer.parameters())
                fully_shard(layer, **fsdp_kwargs)
        plugin.auto_wrap_policy = None  # accelerate only wraps what is outside the layers
        trainable_to_fp32(model.parameters())
        with _rows_apart(model, fsdp_kwargs):
            fsdp2_prepare_model(accelerator, model)
        register_fsdp_forward_method(model, "generate")

    def _check_layers(self, model: Any) -> None:
        """Raise RecipeError when the engine file names a layer class that the model does not have."""
        layer_classes = {type(module).__name__ for module in model.modules()}
        for layer in self.arguments["fsdp_config"].get("transformer_layer_cls_to_wrap") or ():
            if layer not in layer_classes:
                own = ",".join(sorted(getattr(model, "_no_split_modules", None) or ()))
                raise RecipeError(
                    _("this model has no layer {layer!r}").format(layer=layer),
                    place=f"{self.place} · fsdp_transformer_layer_cls_to_wrap",
                    remedy=f"fsdp_transformer_layer_cls_to_wrap: {own}" if own else _("leave it out"),
                )

    def enforce(self, accelerator: Any, plugin: Any = None) -> None:
        """Make accelerate use FSDP2 even on CPUs, where it would silently not; FSDP2 itself runs there.

        Also delete its environment variables, which would change the engine of the next stage.
        """
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        for name in LAUNCHER_ENGINES:
            os.environ.pop(name, None)
        if self.name == "fsdp2":
            accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            accelerator.state.fsdp_plugin = plugin or _plugin(
                {**self.arguments["fsdp_config"], "auto_wrap_policy": "NO_WRAP"}
            )

    def reserve_accumulation(self, accelerator: Any, most: int) -> None:
        """Tell DeepSpeed how many micro-batches a step has at most: told one, some versions keep no sum in host memory."""
        if self.is_deepspeed:
            config = accelerator.state.deepspeed_plugin.deepspeed_config
            config["gradient_accumulation_steps"] = most
            config["train_batch_size"] = most * accelerator.num_processes

    def check_resumes(self, checkpoint: Path) -> None:
        """Raise RecipeError for a checkpoint of another engine, or one that DeepSpeed split over another process count."""
        shards, world = len(list(checkpoint.glob("global_step*/*optim_states.pt"))), distributed.world_size()
        made = "deepspeed" if shards else "fsdp2" if (checkpoint / FSDP_FILE).is_file() else "ddp"
        mine = "deepspeed" if self.is_deepspeed else "fsdp2" if self.name == "fsdp2" else "ddp"
        if made != mine:
            raise RecipeError(
                _("{made} wrote the checkpoint, and {name} cannot continue it").format(made=made, name=self.name),
                place=str(checkpoint),
                remedy=_("use the engine that wrote it, or --again"),
            )
        if shards and shards != world:
            raise RecipeError(
                ngettext(
                    "DeepSpeed split this checkpoint over {shards} processes, but {world} is running",
                    "DeepSpeed split this checkpoint over {shards} processes, but {world} are running",
                    world,
                ).format(shards=shards, world=world),
                place=str(checkpoint),
                remedy=f"tongwen run RECIPE --devices {shards}",
            )

    def verify(self, wrapped: Any, model: Any, optimizer: Any) -> None:
        """Raise MachineError unless the requested engine runs; assert that the optimizer holds all trainable tensors."""
        found = _name_of(wrapped)
        whole = [name for name, part in model.named_parameters() if not isinstance(part, DTensor)]
        if found == "fsdp2" and whole:
            found = _("fsdp2 without sharding {whole}").format(whole=whole[0])
        if found != self.name:
            raise MachineError(
                _("the recipe asks for {name}, but {found} is running").format(name=self.name, found=found),
                place=f"engine: {self.name}",
                remedy=_("engine: ddp, and report this model"),
            )
        if not self.is_deepspeed:
            held = {id(part) for group in optimizer.param_groups for part in group["params"]}
            assert held == {id(part) for part in model.parameters() if part.requires_grad}, (
                "the optimizer lost a tensor"
            )


def choose_engine(section: Training) -> Engine:
    """Return the recipe's engine for the running processes. Raises RecipeError or MissingPackage."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    for name in [name for name in os.environ if name.startswith(OVERRIDDEN)]:
        value = os.environ.pop(name)
        if value.lower() not in ("no", "false", ""):
            console.notice(
                _("the launcher's {name}={value} is not used: the recipe decides").format(name=name, value=value)
            )
    unset_hf_deepspeed_config()  # of the previous stage: transformers would shard the next model while loading it
    place = f"engine: {section.engine}"
    outside = [name for name in LAUNCHER_ENGINES if os.environ.get(name, "").lower() == "true"]
    if outside:
        raise RecipeError(
            _("the launcher's settings ask for another engine ({outside}=true)").format(outside=outside[0]),
            place=place,
            remedy=_("put these settings into engine: FILE, and start the launcher without them"),
        )
    if section.sharded_by == "fsdp2":
        return Engine("fsdp2", {"fsdp": True, "fsdp_config": _fsdp_config(section)}, place)
    if section.sharded_by == "deepspeed":
        if importlib.util.find_spec("deepspeed") is None:
            raise MissingPackage("deepspeed", place, "deepspeed")
        config = _deepspeed_config(section)
        _prepare_deepspeed(config["zero_optimization"], place)
        return Engine(f"zero{config['zero_optimization']['stage']}", {"deepspeed": config}, place)
    return Engine("ddp" if distributed.is_launched() else "single")


def sharding_plan(section: Training, world: int) -> ShardingPlan:
    """Return how `world` processes will share a training. Raises RecipeError for an engine file that cannot be read."""
    if section.sharded_by == "fsdp2":
        config = _fsdp_config(section)
        offloaded = SHARDED_PURPOSES["fsdp2"] if section.offload else ()
        return ShardingPlan("fsdp2", world, offloaded, config.get("reshard_after_forward", True))
    if section.sharded_by == "deepspeed":
        zero = _deepspeed_config(section)["zero_optimization"]
        stage = zero["stage"]
        offload_keys = {"offload_optimizer": ("optimizer", "gradients"), "offload_param": ("weights",)}
        offloaded = tuple(purpose for key, what in offload_keys.items() if key in zero for purpose in what)
        copies = 2 if stage < 3 and zero.get("overlap_comm") else 1
        size = zero.get("reduce_bucket_size", BUCKET)
        bucket = 0 if size == "auto" else copies * int(size)  # auto: the hidden size squared, which is small
        return ShardingPlan(f"zero{stage}", world, offloaded, bucket=bucket)
    return ShardingPlan("ddp" if world > 1 else "", world)


def _prepare_deepspeed(zero: dict[str, Any], place: str) -> None:
    """Raise RecipeError for settings unknown to DeepSpeed; on a CPU disable its shared-memory operations.

    Those need a compiler and minutes to build; gloo does the same.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)  # DeepSpeed itself drops "auto" values
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            f"{first['input']!r}: {first['msg']}",
            place=" · ".join([place, ".".join(map(str, ("zero_optimization", *first["loc"])))]),
            remedy=_("DeepSpeed documents its settings: https://www.deepspeed.ai/docs/config-json/"),
        ) from None


def _fsdp_config(section: Training) -> dict[str, Any]:
    config = {} if section.engine == "fsdp2" else engine_config.read(section.engine, 1).engine
    return {"version": 2, **config, "cpu_offload": section.offload}


def _deepspeed_config(section: Training) -> dict[str, Any]:
    """Return DeepSpeed's config; transformers fills in "auto" from its arguments, which come from the recipe."""
    if section.engine.endswith(".json"):
        config = engine_config.read(section.engine, 1).engine
    else:
        config = {"zero_optimization": {"stage": int(section.engine[-1]), "overlap_comm": True}}
    zero = dict(config["zero_optimization"])
    zero["stage3_gather_16bit_weights_on_model_save"] = True  # else only shards would be saved
    if section.offload:
        for what in ("optimizer", "param")[: 2 if zero["stage"] == 3 else 1]:
            zero.setdefault(f"offload_{what}", {"device": "cpu", "pin_memory": torch.accelerator.is_available()})
    autos = dict.fromkeys((*engine_config.BATCH, "gradient_clipping"), "auto")
    own = {"zero_force_ds_cpu_optimizer": False}  # torch's fused AdamW runs on a CPU too, and needs no compiler
    return {**own, **config, "zero_optimization": zero, "bf16": {"enabled": "auto"}, **autos}


def _plugin(config: dict[str, Any], **kwargs: Any) -> Any:
    """Return accelerate's plugin for transformers' fsdp_config."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    wrapped = config.get("transformer_layer_cls_to_wrap")
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=config.get("reshard_after_forward", True),
        auto_wrap_policy=config.get("auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        transformer_cls_names_to_wrap=[wrapped] if isinstance(wrapped, str) else wrapped,
        min_num_params=config.get("min_num_params"),
        cpu_offload=config["cpu_offload"],
        state_dict_type="FULL_STATE_DICT",
        **kwargs,
    )


@contextmanager
def _rows_apart(model: Any, fsdp_kwargs: dict[str, Any]) -> Iterator[None]:
    """Shard here the matrices of which peft trains single rows, and hide them from accelerate inside.

    accelerate would read their weights to see whether they are tied, and each access makes peft compute the whole weight.
    """
    from torch.distributed.fsdp import fully_shard

    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    if not any("trainable_tokens_" in name for module in modules for name, _ in module.named_parameters()):
        yield
        return
    one, other = ({id(part) for part in module.parameters()} for module in modules)
    for together in [modules] if one & other else [[module] for module in modules]:
        reshard = fsdp_kwargs["reshard_after_forward"] and len(together) == 1  # tied: used at both ends of a step
        fully_shard(together, **{**fsdp_kwargs, "reshard_after_forward": reshard})
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings, model.get_output_embeddings


def _name_of(wrapped: Any) -> str:
    from torch.distributed.fsdp import FSDPModule

    if isinstance(wrapped, FSDPModule):
        return "fsdp2"
    if hasattr(wrapped, "zero_optimization_stage"):
        return f"zero{wrapped.zero_optimization_stage()}"
    return "ddp" if isinstance(wrapped, DistributedDataParallel) else "single"


def trainable_to_fp32(parts: Iterable[torch.nn.Parameter]) -> None:
    """Convert the trainable parameters to fp32."""
    for part in parts:
        if part.requires_grad and not isinstance(part, DTensor):
            part.data = part.data.float()


def reshard(model: Any) -> None:
    """Reshard weights that a forward without a backward has left gathered in every process."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(part: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor, a view of the same memory."""
    return part.to_local() if isinstance(part, DTensor) else part


def true_on_any_rank(parts: Iterable[torch.Tensor], predicate: Any) -> list[bool]:
    """Return for each tensor whether `predicate` is true of it, or of its part on any rank. Call it on all ranks."""
    parts = list(parts)
    flags = torch.stack([predicate(local(part)) for part in parts]) if parts else torch.zeros(0, dtype=torch.bool)
    if any(isinstance(part, DTensor) for part in parts):
        counts = flags.int()
        torch.distributed.all_reduce(counts)
        flags = counts > 0
    return [bool(flag) for flag in flags.tolist()]


def broadcast_from_rank0(value: Any) -> Any:
    """Return the first rank's value on all ranks. Call it on all ranks.

    Values computed per rank may differ in the last bits, and so would decisions based on them.
    """
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def gather(model: Any, chosen: Iterable[torch.nn.Parameter]) -> dict[str, torch.Tensor] | None:
    """Return the chosen parameters and the saved buffers of a sharded model by name, whole and on the CPU.

    Returns None for a model that is not sharded. Call it on all ranks.
    """
    parts = {id(part): part for part in chosen}
    if not any(isinstance(part, DTensor) or hasattr(part, "ds_id") for part in parts.values()):
        return None
    whole = {key: _whole(part) for key, part in parts.items()}  # tied names share one tensor, so that it is saved once
    state = model.state_dict()
    out = {name: buffer.cpu() for name, buffer in model.named_buffers() if name in state}
    return out | {
        name: whole[id(part)] for name, part in model.named_parameters(remove_duplicate=False) if id(part) in whole
    }


def scatter(model: Any, whole: dict[str, torch.Tensor]) -> None:
    """Write what `gather` returned back into the model, to each rank its part. Call it on all ranks."""
    with torch.no_grad():
        for name, part in model.named_parameters():
            if name in whole:
                mine = whole[name]
                if isinstance(part, DTensor):
                    mine = distribute_tensor(mine.to(part.device_mesh.device_type), part.device_mesh, part.placements)
                local(part).copy_(local(mine))


def _whole(part: torch.nn.Parameter) -> torch.Tensor:
    if isinstance(part, DTensor):
        return part.detach().full_tensor().cpu()
    from deepspeed import zero

    with zero.GatheredParameters([part]):
        return part.detach().cpu().clone()
