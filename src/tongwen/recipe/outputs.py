"""The sections that use the trained model: `merge`, `evaluate` and `export`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from tongwen.core.i18n import _
from tongwen.recipe.data import SourceConfig
from tongwen.recipe.fields import Count, Number, Rules, Section, read_list, read_source, setting


class Merge(Section):
    """Merge the adapter into the base."""

    dtype: Literal["base", "fp32", "bf16", "fp16"] = setting("base", "dtype of the merged model")
    parity: Literal["streamed", "full"] = setting(
        "streamed",
        "compare its logits with base + adapters: layer by layer, or with both models in memory",
    )
    onto: Literal["original", "nf4", "int8"] = setting(
        "original",
        "base that a QLoRA adapter is merged into: the original, or the quantised one used in training (the difference is measured)",
    )
    shard_gb: Number = setting(5.0, "maximum size of one weights file, in GB", gt=0)


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
    "tool_calls",
    "multiple_choice",
    "lm_eval",
]


class TaskConfig(Section):
    """One evaluation task."""

    task: TaskName = setting(..., "what to measure")
    name: str = setting("", "name in scores.json; absent: the task's name")
    data: Annotated[SourceConfig, BeforeValidator(read_source)] | None = setting(
        None, "evaluation data; absent: the part that `prepare` held out"
    )
    suite: str = setting("", "lm_eval: task name, such as ceval-valid", names="name or file")
    examples: str | None = setting(
        None,
        "multiple_choice: file or folder of example questions with answers, such as dev/",
        names="file",
    )
    shots: Count = setting(0, "number of examples before each multiple-choice question", ge=0)
    limit: Count | None = setting(None, "use only the first N rows", ge=1)

    def rules(self) -> Rules:
        yield (
            (self.task == "lm_eval") != bool(self.suite),
            _("`task: lm_eval` and `suite: NAME` must be used together"),
        )
        yield (
            self.shots and not self.examples and not self.suite,
            _("shots: {shots} needs `examples`, such as C-Eval's dev/ folder").format(shots=self.shots),
        )

    @property
    def title(self) -> str:
        return self.name or self.suite or self.task

    @property
    def needs_data(self) -> bool:
        """Whether it needs held-out data from `prepare`: it names no data, and a suite has its own."""
        return self.data is None and not self.suite


class Evaluate(Section):
    """Scores of the run's model and of its base."""

    tasks: Annotated[list[Annotated[TaskConfig, BeforeValidator(read_task)]], BeforeValidator(read_list)] = setting(
        [TaskConfig(task="bits_per_byte")],
        "task names, or {task: NAME, data: FILE, …}",
        min_length=1,
    )
    before: bool = setting(True, "also score the recipe's base")
    batch_size: Count = setting(32, "maximum number of questions answered at once", ge=1)
    max_new_tokens: Count = setting(256, "maximum tokens of an answer", ge=1)

    def rules(self) -> Rules:
        names = [task.title for task in self.tasks]
        yield (
            len({*names}) < len(names),
            _("two tasks have the same name: {names}; give one of them a `name`").format(names=_(", ").join(names)),
        )


class Export(Section):
    """The finished model in the formats of other programs."""

    formats: Annotated[list[Literal["hf", "pth", "gguf"]], BeforeValidator(read_list)] = setting(
        ["gguf"],
        "hf (vLLM, SGLang, transformers), pth (LLaMA's own files), gguf (llama.cpp, Ollama)",
        min_length=1,
    )
    quantize: str = setting(
        "f16",
        "dtype of the GGUF file: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; with `tongwen[llamacpp]` also q2_k to q6_k (q4_k_m etc.)",
    )
    push: str = setting(
        "",
        "push the hf format to a hub, as a private repository: OWNER/NAME or modelscope:OWNER/NAME",
        names="address",
    )

    def rules(self) -> Rules:
        yield (
            self.push and "hf" not in self.formats,
            _("`push` sends the hf format: `formats: [hf]`"),
        )
