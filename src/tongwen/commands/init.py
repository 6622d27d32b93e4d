"""init: write a commented recipe for a model and a machine.

`scripts/generate_docs.py` writes each of these recipes into `recipes/`, for readers who have not installed the package.
"""

from __future__ import annotations

import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tongwen.core import console, originals
from tongwen.core.errors import RecipeError
from tongwen.core.i18n import N_, _
from tongwen.core.nearest_names import nearest_names


class TrainingMethod(NamedTuple):
    """adapter: the value of the recipe's `adapter`; description: in English."""

    adapter: str
    description: str


# The comment of a line of a template: the text after its last `# `.
COMMENT = re.compile(r"# ((?:(?!# ).)*)$", re.MULTILINE)

METHODS = {
    "lora": TrainingMethod("{method: lora, rank: @rank@}", N_("LoRA, a small adapter")),
    "rslora": TrainingMethod(
        "{method: lora, rslora: true, rank: @rank@}",
        N_("rsLoRA, scaled by the root of the rank, for high ranks"),
    ),
    "dora": TrainingMethod(
        "{method: lora, dora: true, rank: @rank@}", N_("DoRA, which separates direction and magnitude")
    ),
    "adalora": TrainingMethod(
        "{method: adalora, rank: @rank@}", N_("AdaLoRA, which gives more rank to important layers")
    ),
    "qlora": TrainingMethod("{method: qlora, rank: @rank@}", N_("QLoRA, an adapter on a base in 4 bits")),
    "int8": TrainingMethod(
        "{method: qlora, quantize: int8, rank: @rank@}",
        N_("QLoRA, an adapter on a base in 8 bits"),
    ),
    "experts": TrainingMethod(
        "{method: lora, rank: @rank@, target_parameters: [mlp.experts.gate_up_proj, mlp.experts.down_proj]}",
        N_("LoRA, also on the experts' fused weights"),
    ),
    "also": TrainingMethod(
        "{method: lora, rank: @rank@, also_train: [embed_tokens]}",
        N_("LoRA, and the embeddings in full"),
    ),
    "family": TrainingMethod(
        "{method: lora, targets: family, rank: @rank@}",
        N_("LoRA on the attention only, as in 2023"),
    ),
    "full": TrainingMethod("{method: full}", N_("all weights")),
}
TRAINS = {
    "lora": N_("adapter alone"),
    "embeddings": N_("embeddings alone"),
    "lora+embeddings": N_("adapter and embeddings"),
    "full": N_("all weights"),
    "new_rows": N_("only the new rows; the rest stays the same bit for bit"),
    "phases": N_("first the new rows, then adapter and embeddings"),
}


@dataclass(frozen=True)
class RecipeTemplate:
    """A recipe to start from: base model, method, and where it fits. train: what a `pretrain` trains."""

    base: str
    method: str
    memory: str
    max_length: int
    learning_rate: str
    template: str = "own"
    rank: int = 16
    stage: str = "sft"
    train: str = "lora+embeddings"
    engine: str = ""
    offload: str = ""
    devices: int = 1

    @property
    def leaves_adapter(self) -> bool:
        return self.method != "full" if self.stage == "sft" else self.train not in ("full", "embeddings", "new_rows")


QWEN_4B, QWEN_8B = "Qwen/Qwen3-4B", "Qwen/Qwen3-8B"
SMOL, QWEN_BASE = "HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen3-0.6B-Base"
STARTS = {
    "smollm2-135m-lora-cpu": RecipeTemplate(f"{SMOL}-Instruct", "lora", "4 GB, CPU", 512, "1e-3", "chatml"),
    "qwen3-0.6b-lora-8g": RecipeTemplate("Qwen/Qwen3-0.6B", "lora", "8 GB GPU", 2048, "2e-4"),
    "qwen3-0.6b-full-16g": RecipeTemplate("Qwen/Qwen3-0.6B", "full", "16 GB GPU", 2048, "2e-5"),
    "qwen3-4b-lora-24g": RecipeTemplate(QWEN_4B, "lora", "24 GB GPU", 2048, "2e-4"),
    "qwen3-4b-rslora-24g": RecipeTemplate(QWEN_4B, "rslora", "24 GB GPU", 2048, "1e-4", rank=64),
    "qwen3-4b-dora-24g": RecipeTemplate(QWEN_4B, "dora", "24 GB GPU", 2048, "2e-4"),
    "qwen3-4b-embeddings-24g": RecipeTemplate(QWEN_4B, "also", "24 GB GPU", 2048, "1e-4"),
    "qwen3-4b-adalora-24g": RecipeTemplate(QWEN_4B, "adalora", "24 GB GPU", 2048, "5e-4"),
    "qwen3-8b-qlora-24g": RecipeTemplate(QWEN_8B, "qlora", "24 GB GPU", 2048, "1e-4"),
    "qwen3-8b-int8-24g": RecipeTemplate(QWEN_8B, "int8", "24 GB GPU", 2048, "1e-4"),
    "qwen3-8b-lora-40g": RecipeTemplate(QWEN_8B, "lora", "40 GB GPU", 2048, "1e-4"),
    "llama3.1-8b-lora-40g": RecipeTemplate("meta-llama/Llama-3.1-8B-Instruct", "lora", "40 GB GPU", 2048, "1e-4"),
    "llama3.1-8b-attention-40g": RecipeTemplate(
        "meta-llama/Llama-3.1-8B-Instruct", "family", "40 GB GPU", 2048, "2e-4"
    ),
    "qwen3.5-4b-lora-24g": RecipeTemplate("Qwen/Qwen3.5-4B", "lora", "24 GB GPU", 2048, "2e-4"),
    "hunyuan-4b-lora-24g": RecipeTemplate("tencent/Hunyuan-4B-Instruct", "lora", "24 GB GPU", 2048, "2e-4"),
    "ernie-4.5-0.3b-lora-8g": RecipeTemplate("baidu/ERNIE-4.5-0.3B-PT", "lora", "8 GB GPU", 2048, "2e-4"),
    "ministral-3-8b-lora-40g": RecipeTemplate(
        "mistralai/Ministral-3-8B-Instruct-2512-BF16", "lora", "40 GB GPU", 2048, "1e-4"
    ),
    "gemma-3-4b-lora-24g": RecipeTemplate("google/gemma-3-4b-it", "lora", "24 GB GPU", 2048, "2e-4"),
    "gemma-4-e2b-lora-24g": RecipeTemplate("google/gemma-4-E2B-it", "lora", "24 GB GPU", 2048, "2e-4"),
    "minicpm3-4b-lora-24g": RecipeTemplate("openbmb/MiniCPM3-4B", "lora", "24 GB GPU", 2048, "2e-4"),
    "deepseek-r1-distill-qwen-1.5b-lora-8g": RecipeTemplate(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "lora", "8 GB GPU", 2048, "2e-4"
    ),
    "gpt-oss-20b-lora-80g": RecipeTemplate("unsloth/gpt-oss-20b-BF16", "lora", "80 GB GPU", 2048, "1e-4"),
    "glm-4.7-flash-lora-fsdp2": RecipeTemplate(
        "zai-org/GLM-4.7-Flash", "lora", "2 GPUs of 80 GB", 2048, "1e-4", rank=8, engine="fsdp2", devices=2
    ),
    "qwen3-8b-base-chatml-40g": RecipeTemplate("Qwen/Qwen3-8B-Base", "lora", "40 GB GPU", 2048, "1e-4", "chatml", 64),
    "qwen3-30b-a3b-experts-fsdp2": RecipeTemplate(
        "Qwen/Qwen3-30B-A3B", "experts", "2 GPUs of 80 GB", 2048, "1e-4", rank=8, engine="fsdp2", devices=2
    ),
    "qwen3-8b-lora-ddp": RecipeTemplate(QWEN_8B, "lora", "2 GPUs of 40 GB", 2048, "1e-4", engine="ddp", devices=2),
    "qwen3-8b-full-fsdp2": RecipeTemplate(QWEN_8B, "full", "4 GPUs of 80 GB", 2048, "1e-5", engine="fsdp2", devices=4),
    "qwen3-32b-qlora-fsdp2": RecipeTemplate(
        "Qwen/Qwen3-32B", "qlora", "2 GPUs of 24 GB", 2048, "1e-4", engine="fsdp2", devices=2
    ),
    "qwen3-8b-lora-zero2": RecipeTemplate(QWEN_8B, "lora", "2 GPUs of 40 GB", 2048, "1e-4", engine="zero2", devices=2),
    "qwen3-4b-full-zero2": RecipeTemplate(QWEN_4B, "full", "4 GPUs of 80 GB", 2048, "1e-5", engine="zero2", devices=4),
    "qwen3-4b-full-zero3": RecipeTemplate(
        QWEN_4B, "full", "2 GPUs of 48 GB, 128 GB of memory", 2048, "1e-5", engine="zero3", offload="true", devices=2
    ),
    "smollm2-135m-pretrain-cpu": RecipeTemplate(SMOL, "lora", "4 GB, CPU", 512, "1e-3", stage="pretrain"),
    "smollm2-135m-vocab-cpu": RecipeTemplate(SMOL, "lora", "4 GB, CPU", 512, "1e-3", stage="vocab", train="phases"),
    "smollm2-135m-rows-cpu": RecipeTemplate(SMOL, "lora", "4 GB, CPU", 512, "1e-3", stage="vocab", train="new_rows"),
    "mistral-7b-vocab-80g": RecipeTemplate(
        "mistralai/Mistral-7B-v0.3", "lora", "80 GB GPU", 2048, "2e-4", rank=64, stage="vocab", train="phases"
    ),
    "qwen3-0.6b-base-pretrain-16g": RecipeTemplate(
        QWEN_BASE, "lora", "16 GB GPU", 2048, "2e-4", rank=64, stage="pretrain"
    ),
    "qwen3-0.6b-base-embeddings-8g": RecipeTemplate(
        QWEN_BASE, "lora", "8 GB GPU", 2048, "2e-4", stage="pretrain", train="embeddings"
    ),
    "qwen3-0.6b-base-pretrain-full-16g": RecipeTemplate(
        QWEN_BASE, "full", "16 GB GPU", 2048, "2e-5", stage="pretrain", train="full"
    ),
    "qwen3-8b-base-pretrain-fsdp2": RecipeTemplate(
        "Qwen/Qwen3-8B-Base",
        "lora",
        "4 GPUs of 80 GB",
        4096,
        "1e-4",
        rank=128,
        stage="pretrain",
        engine="fsdp2",
        devices=4,
    ),
}


def run(name: str, out: str) -> int:
    """Write the recipe, or list all templates."""
    if not name:
        rows = [(key, start.base, _kind(start), start.memory) for key, start in STARTS.items()]
        console.table((_("template"), _("model"), _("method"), _("fits in")), rows)
        console.info("\ntongwen init qwen3-0.6b-lora-8g --out recipe.yaml")
        console.emit({"templates": list(STARTS)})
        return 0
    if name not in STARTS:
        nearest = nearest_names(name, STARTS) or list(STARTS)
        raise RecipeError(_("there is no template {name!r}").format(name=name), place="init", remedy=", ".join(nearest))
    text = render(name)
    if not out:
        if console.SCREEN.json:
            console.emit({"template": name, "recipe": text})
        else:
            print(text, end="")
        return 0
    target = Path(out)
    originals.check_new(target)
    originals.write_new(target, text)
    console.success(_("{out} · next: tongwen check {out}").format(out=out))
    console.emit({"out": out})
    return 0


def render(name: str) -> str:
    """Return the recipe of that name, with its comments in the user's language."""
    start, method = STARTS[name], METHODS[STARTS[name].method]
    text = (importlib.resources.files("tongwen.commands") / "recipe_templates" / f"{start.stage}.yaml").read_text(
        encoding="utf-8"
    )
    adapter = "" if start.stage != "sft" and not start.leaves_adapter else method.adapter
    values = {**vars(start), "name": name, "adapter": adapter, "phases": "+" if start.train == "phases" else ""}
    description = method.description if start.stage == "sft" else TRAINS[start.train]
    values |= {"what": _(description), "result": _result(start)}
    if start.devices == 1:
        values["devices"] = ""
    values["one"] = "" if start.train == "phases" else start.train
    values["merge"] = "{}" if start.leaves_adapter else ""
    lines = [
        line for line in text.splitlines(keepends=True) if all(values[key] for key in re.findall(r"@(\w+)@", line))
    ]
    text = "".join(lines).replace("@phases@", "").rstrip() + "\n"
    text = COMMENT.sub(lambda found: f"# {_(found[1])}", text)
    for _index in range(2):  # twice, because the adapter's value contains @rank@
        text = re.sub(r"@(\w+)@", lambda found: str(values[found[1]]), text)
    return text


def _kind(start: RecipeTemplate) -> str:
    description = start.method if start.stage == "sft" else start.train
    return f"{start.stage}, {description}" + (f", {start.engine}" if start.engine else "")


def _result(start: RecipeTemplate) -> str:
    stage = "sft" if start.stage == "sft" else "pretrain"
    if start.leaves_adapter:
        return _("an adapter in OUT/{stage}, and an ordinary model in OUT/merge").format(stage=stage)
    return _("an ordinary model in OUT/{stage}").format(stage=stage)
