"""init: the name of a model and a machine in; a commented recipe that fits them out."""

from __future__ import annotations

import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path

from tongwen import console
from tongwen.errors import RecipeError
from tongwen.language import say


@dataclass(frozen=True)
class Start:
    """A recipe to start from: base model, method, and where it fits."""

    base: str
    method: str
    memory: str
    max_length: int
    learning_rate: str
    template: str = "own"
    rank: int = 16
    stage: str = "sft"


STARTS = {
    "smollm2-135m-lora-cpu": Start("HuggingFaceTB/SmolLM2-135M-Instruct", "lora", "4 GB, CPU", 512, "1e-3", "chatml"),
    "qwen3-0.6b-lora-8g": Start("Qwen/Qwen3-0.6B", "lora", "8 GB GPU", 2048, "2e-4"),
    "qwen3-0.6b-full-16g": Start("Qwen/Qwen3-0.6B", "full", "16 GB GPU", 2048, "2e-5"),
    "qwen3-4b-lora-24g": Start("Qwen/Qwen3-4B", "lora", "24 GB GPU", 2048, "2e-4"),
    "qwen3-8b-lora-40g": Start("Qwen/Qwen3-8B", "lora", "40 GB GPU", 2048, "1e-4"),
    "llama3.1-8b-lora-40g": Start("meta-llama/Llama-3.1-8B-Instruct", "lora", "40 GB GPU", 2048, "1e-4"),
    "qwen3-4b-dora-24g": Start("Qwen/Qwen3-4B", "dora", "24 GB GPU", 2048, "2e-4"),
    "qwen3-4b-adalora-24g": Start("Qwen/Qwen3-4B", "adalora", "24 GB GPU", 2048, "5e-4"),
    "qwen3-8b-qlora-24g": Start("Qwen/Qwen3-8B", "qlora", "24 GB GPU", 2048, "1e-4"),
    "qwen3-8b-base-chatml-40g": Start("Qwen/Qwen3-8B-Base", "lora", "40 GB GPU", 2048, "1e-4", "chatml", 64),
    "smollm2-135m-pretrain-cpu": Start(
        "HuggingFaceTB/SmolLM2-135M", "lora", "4 GB, CPU", 512, "1e-3", stage="pretrain"
    ),
    "smollm2-135m-vocab-cpu": Start("HuggingFaceTB/SmolLM2-135M", "lora", "4 GB, CPU", 512, "1e-3", stage="vocab"),
    "mistral-7b-vocab-80g": Start(
        "mistralai/Mistral-7B-v0.3", "lora", "80 GB GPU", 2048, "2e-4", rank=64, stage="vocab"
    ),
    "qwen3-0.6b-base-pretrain-16g": Start(
        "Qwen/Qwen3-0.6B-Base", "lora", "16 GB GPU", 2048, "2e-4", rank=64, stage="pretrain"
    ),
}


def run(name: str, out: str) -> int:
    """Write the recipe, or list what there is."""
    if not name:
        rows = [(key, start.base, f"{start.stage}, {start.method}", start.memory) for key, start in STARTS.items()]
        console.table(
            (say("template", "模板"), say("model", "模型"), say("method", "方法"), say("fits in", "适用")), rows
        )
        console.tell("\ntongwen init qwen3-0.6b-lora-8g --out recipe.yaml")
        console.emit({"templates": list(STARTS)})
        return 0
    if name not in STARTS:
        import difflib

        near = difflib.get_close_matches(name, STARTS, 3) or list(STARTS)
        raise RecipeError(
            say(f"there is no template {name!r}", f"没有模板 {name!r}"), place="init", remedy=", ".join(near)
        )
    text = render(name)
    if not out:
        if console.SCREEN.json:
            console.emit({"template": name, "recipe": text})
        else:
            print(text, end="")
        return 0
    target = Path(out)
    if target.exists():
        raise RecipeError(
            say("this file exists", "该文件已存在"), place=out, remedy=say("choose another name", "换个名字")
        )
    target.write_text(text, encoding="utf-8")
    console.good(say(f"{out} · next: tongwen check {out}", f"{out} · 下一步：tongwen check {out}"))
    console.emit({"out": out})
    return 0


def render(name: str) -> str:
    """The recipe of that name; its comments, which stand in both languages (`# en ¦ zh`), in the user's."""
    start = STARTS[name]
    text = (importlib.resources.files("tongwen") / "templates" / f"{start.stage}.yaml").read_text(encoding="utf-8")
    method = "lora, dora: true" if start.method == "dora" else start.method
    adapter = "{method: full}" if method == "full" else f"{{method: {method}, rank: {start.rank}}}"
    values = {**vars(start), "name": re.sub(r"[^\w.\-]", "-", name), "adapter": adapter}
    text = re.sub(r"@(\w+)@", lambda found: str(values[found[1]]), text)
    if start.method == "full":
        text = re.sub(r"^merge:.*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"# (.*?) ¦ (.*)$", lambda found: "# " + say(found[1], found[2]), text, flags=re.MULTILINE)
