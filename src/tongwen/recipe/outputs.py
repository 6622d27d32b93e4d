"""The sections that use the trained model: `merge`, `evaluate` and `export`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from tongwen.core.i18n import say
from tongwen.recipe.data import SourceConfig
from tongwen.recipe.fields import Number, Rules, Section, read_list, read_source, setting


class Merge(Section):
    """Fold the adapter into the base."""

    dtype: Literal["base", "fp32", "bf16", "fp16"] = setting(
        "base", "number type of the merged model", "合并后模型的数值类型"
    )
    parity: Literal["streamed", "full"] = setting(
        "streamed",
        "compare its logits with base + adapters: layer by layer, or with both models in memory",
        "与底座 + 适配器比较 logits：逐层，或两个模型同时载入内存",
    )
    onto: Literal["original", "nf4", "int8"] = setting(
        "original",
        "base that QLoRA's adapter goes into: the original one, or what training saw of it (the difference is measured)",
        "QLoRA 适配器并入哪个底座：原始底座，或训练时所见的量化底座（会测量差异）",
    )
    shard_gb: Number = setting(5.0, "size of a weights file at most, in GB", "单个权重文件的最大 GB 数", gt=0)


def read_task(value: Any) -> Any:
    return {"task": value} if isinstance(value, str) else value


TaskName = Literal[
    "bits_per_byte",
    "perplexity",
    "exact_match",
    "bleu",
    "rouge",
    "rouge_words",
    "entity_f1",
    "spans",
    "multiple_choice",
    "lm_eval",
]


class TaskConfig(Section):
    """One thing that a model is examined in."""

    task: TaskName = setting(..., "what is measured", "测什么")
    name: str = setting(
        "", "its name in scores.json; the task's when absent", "在 scores.json 中的名字；不写则为任务名"
    )
    data: Annotated[SourceConfig, BeforeValidator(read_source)] | None = setting(
        None, "what it is measured on; what `prepare` held out when absent", "评测数据；不写则用 prepare 留出的部分"
    )
    suite: str = setting(
        "", "lm_eval: name of a task there, such as ceval-valid", "lm_eval：其中的任务名，如 ceval-valid"
    )
    examples: str | None = setting(
        None,
        "multiple_choice: file or folder of answered questions, such as dev/",
        "multiple_choice：示例题的文件或文件夹，如 dev/",
    )
    shots: int = setting(0, "examples before each question with options", "选择题每题之前的示例数", ge=0)
    limit: int | None = setting(None, "only so many rows, the first ones", "只取前几行", ge=1)

    def rules(self) -> Rules:
        yield (
            (self.task == "lm_eval") != bool(self.suite),
            say("`task: lm_eval` and `suite: NAME` belong together", "`task: lm_eval` 与 `suite: 名称` 须同时出现"),
        )
        yield (
            self.shots and not self.examples and not self.suite,
            say(
                f"shots: {self.shots} needs `examples`, such as the folder dev/ of C-Eval",
                f"shots: {self.shots} 需要 `examples`，例如 C-Eval 的 dev/ 文件夹",
            ),
        )

    @property
    def title(self) -> str:
        return self.name or self.suite or self.task

    @property
    def needs_data(self) -> bool:
        """Whether it is measured on rows that somebody must name; a suite brings its own."""
        return self.data is None and not self.suite


class Evaluate(Section):
    """Scores of the model that the stages before leave, and of the base."""

    tasks: Annotated[list[Annotated[TaskConfig, BeforeValidator(read_task)]], BeforeValidator(read_list)] = setting(
        [TaskConfig(task="bits_per_byte")],
        "names, or {task: NAME, data: FILE, …}",
        "任务名，或 {task: 名称, data: 文件, …}",
        min_length=1,
    )
    before: bool = setting(True, "score the recipe's base too", "也评测配方的底座")
    batch_size: int = setting(32, "questions answered side by side, at most", "同时回答几个问题", ge=1)
    max_new_tokens: int = setting(256, "tokens of an answer at most", "回答的最大 token 数", ge=1)

    def rules(self) -> Rules:
        names = [task.title for task in self.tasks]
        yield (
            len({*names}) < len(names),
            say(
                f"two tasks have one name: {', '.join(names)}; give one a `name`",
                f"两个任务同名：{'、'.join(names)}；请给其中一个写 `name`",
            ),
        )


class Export(Section):
    """The finished model in the forms that other programs read."""

    formats: Annotated[list[Literal["hf", "pth", "gguf"]], BeforeValidator(read_list)] = setting(
        ["gguf"],
        "hf (vLLM, SGLang, transformers), pth (LLaMA's own files), gguf (llama.cpp, Ollama)",
        "hf（vLLM、SGLang、transformers）、pth（LLaMA 原始文件）、gguf（llama.cpp、Ollama）",
        min_length=1,
    )
    quantize: str = setting(
        "f16",
        "number type of the GGUF file: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; with `tongwen[llamacpp]` also q2_k to q6_k (q4_k_m …)",
        "GGUF 的数值类型：f32、f16、bf16、q8_0、q5_1、q5_0、q4_1、q4_0；装有 `tongwen[llamacpp]` 时还有 q2_k 至 q6_k（q4_k_m 等）",
    )
    push: str = setting(
        "",
        "send the hf form to this place on a hub, private: OWNER/NAME or modelscope:OWNER/NAME",
        "把 hf 格式推送到 hub（私有）：OWNER/NAME 或 modelscope:OWNER/NAME",
    )

    def rules(self) -> Rules:
        yield (
            self.push and "hf" not in self.formats,
            say("`push` sends the hf form: `formats: [hf]`", "`push` 推送 hf 格式：`formats: [hf]`"),
        )
