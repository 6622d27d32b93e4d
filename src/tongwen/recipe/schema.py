"""Every word a recipe may say: type, default, unit and help stand here and nowhere else.

The documentation, `tongwen schema` and the messages are made from this page. All sections are frozen after reading.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator
from pydantic_core import PydanticCustomError

from tongwen.core.i18n import say
from tongwen.recipe import engine_config

# The order in which the stages run. A section that is absent does not run.
STAGES = ("synthesize", "prepare", "vocab", "pretrain", "sft", "merge", "evaluate", "export")


def word(default: Any, en: str, zh: str, *, free: bool = False, **limits: Any) -> Any:
    """A field with its help in both languages; `...` as default makes it required. free: it does not decide the result, so
    that it may change while a run is interrupted, and after it."""
    return Field(default, description=en, json_schema_extra={"zh": zh, "free": free}, **limits)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @property
    def idle(self) -> set[str]:
        """Words that say nothing beside the others: a recipe that we write leaves them out."""
        return set()


def wrong(en: str, zh: str) -> PydanticCustomError:
    # Braces are escaped because pydantic formats the template.
    return PydanticCustomError("tongwen", say(en, zh).replace("{", "{{").replace("}", "}}"))


class Duration(BaseModel):
    """How long to train: `2 epochs`, `300 steps`, `5000000 tokens`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    count: float
    unit: Literal["epochs", "steps", "tokens"]

    def __str__(self) -> str:
        number = int(self.count) if self.count == int(self.count) else self.count
        return f"{number} {self.unit[:-1] if number == 1 else self.unit}"


def read_duration(value: Any) -> Any:
    if isinstance(value, Duration):
        return value
    found = re.fullmatch(r"\s*([\d_.,]*\d[\d_.,]*(?:e\d+)?)\s*(epochs?|steps?|tokens?)\s*", str(value))
    try:
        count = float(found[1].replace("_", "").replace(",", "")) if found else 0.0
    except ValueError:
        count = 0.0
    if not found or count <= 0:
        raise wrong(
            f"{value!r} is not a length of training; write for example `2 epochs`, `300 steps` or `5000000 tokens`",
            f"{value!r} 不是训练时长；请写成 `2 epochs`、`300 steps` 或 `5000000 tokens` 这样",
        )
    return Duration(count=count, unit=found[2].rstrip("s") + "s")


def read_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def read_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, dict)) else value


def read_number(value: Any) -> Any:
    """Ints stand for floats; a boolean does not."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


UNITS = {"minute": 60, "hour": 3600, "day": 86400}


def read_seconds(value: Any) -> Any:
    """`90 minutes`, `6 hours`, `2 days`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(minute|hour|day)s?\s*", str(value))
    if not found or not float(found[1]):
        raise wrong(
            f"{value!r} is not a time; write for example `90 minutes`, `6 hours` or `2 days`",
            f"{value!r} 不是时间；请写成 `90 minutes`、`6 hours` 或 `2 days` 这样",
        )
    return float(found[1]) * UNITS[found[2]]


Number = Annotated[float, BeforeValidator(read_number)]
Seconds = Annotated[float, BeforeValidator(read_seconds), PlainSerializer(lambda value: f"{value / 60:g} minutes")]
Length = Annotated[Duration, BeforeValidator(read_duration), PlainSerializer(str)]


class SourceConfig(Section):
    """Where rows come from: a file, a folder, a glob, or a data set of a hub."""

    path: str = word(
        ...,
        "file, folder, glob, hub:OWNER/NAME or modelscope:OWNER/NAME",
        "文件、文件夹、通配符、hub:OWNER/NAME 或 modelscope:OWNER/NAME",
    )
    format: (
        Literal["alpaca", "messages", "conversations", "completion", "query", "pair", "turns_inside", "text"] | None
    ) = word(None, "format of the rows; recognised from the content when absent", "数据格式；不写则按内容识别")
    columns: dict[str, str] = word(
        {}, "our name: the file's name, e.g. {output: answer}", "列名映射，如 {output: answer}"
    )
    roles: dict[str, str] = word(
        {}, "the file's name of a role: ours, e.g. {Customer: user}", "角色名映射，如 {客户: user}"
    )
    separator: str = word(
        "\n",
        "between instruction and input, instruct and query; BELLE had nothing there",
        "instruction 与 input、instruct 与 query 之间的文字；BELLE 中没有",
    )
    records: Literal["line", "paragraph", "file"] | None = word(
        None,
        "what one record of a text file is; absent: paragraphs where blank lines are frequent, else lines",
        "文本文件中一条记录是什么；不写：空行较多则按段落，否则按行",
    )
    encoding: str | None = word(None, "character encoding; recognised when absent", "字符编码；不写则自动识别")
    entry: str | None = word(
        None, "name of an entry, when path is a dataset_info.json", "path 为 dataset_info.json 时的条目名"
    )
    weight: Number | None = word(
        None,
        "passes over its rows per epoch: 0.5 is a new half each time",
        "每轮遍历其数据的次数：0.5 为每次另取一半",
        gt=0,
    )
    share: Number | None = word(
        None, "share of the tokens of an epoch that come from here", "每轮 token 中来自此处的比例", gt=0, lt=1
    )
    language: str | None = word(
        None,
        "zh, en or another name: held-out documents are scored by it; absent: zh or other, by their characters",
        "zh、en 或其他名字：留出文档按此分组评测；不写则按字符分为 zh 或 other",
        pattern=r"^\w+$",
    )

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        if self.weight is not None and self.share is not None:
            raise wrong(
                "`weight` and `share` exclude each other: passes per epoch, or a share of its tokens",
                "`weight` 与 `share` 只能写一个：每轮遍历次数，或占 token 的比例",
            )
        return self


SourceConfigs = Annotated[list[Annotated[SourceConfig, BeforeValidator(read_source)]], BeforeValidator(read_list)]


class SpendingLimits(Section):
    """What `synthesize` may use at most; it stops before it would go beyond."""

    requests: int | None = word(None, "requests", "请求次数", ge=1)
    tokens: int | None = word(None, "tokens, of prompts and answers together", "token 数，提示与回答合计", ge=1)
    money: Number | None = word(None, "money, in the unit of `price`", "金额，单位同 `price`", gt=0)


class Price(Section):
    """What a million tokens cost."""

    input: Number = word(..., "a million tokens of prompts", "一百万提示 token", ge=0)
    output: Number = word(..., "a million tokens of answers", "一百万回答 token", ge=0)


class Synthesize(Section):
    """Dialogues written by another model, through an OpenAI-compatible endpoint; one more input of `prepare`."""

    endpoint: str = word(..., "base URL, as https://api.deepseek.com/v1", "接口地址，如 https://api.deepseek.com/v1")
    model: str = word(..., "the model's name there", "接口上的模型名")
    key: str = word(
        "OPENAI_API_KEY",
        "environment variable that holds the key; the key itself stands in no file",
        "存放密钥的环境变量；密钥不写入任何文件",
        pattern=r"^[A-Z_][A-Z0-9_]*$",
    )
    method: Literal["self_instruct", "topics", "documents"] = word(
        "self_instruct",
        "tasks like drawn examples; tasks on drawn topics; conversations about one's own documents",
        "仿照抽取的例子出题；按抽取的话题出题；关于自有文档的对话",
    )
    rows: int = word(..., "dialogues to make", "要生成的对话数", ge=1)
    seeds: str | None = word(
        None, "seed tasks of BELLE's shape; absent: 40 of ours", "BELLE 格式的种子任务；不写用自带的 40 个"
    )
    topics: list[str] = word([], "topics; absent: 82 of ours", "话题；不写用自带的 82 个")
    documents: SourceConfigs = word([], "documents to talk about", "要谈论的文档")
    temperature: Number = word(1.0, "0: always the likeliest", "0：总取最可能的", ge=0, le=2)
    top_p: Number = word(1.0, "share of the likeliest tokens drawn from", "核采样比例", gt=0, le=1)
    max_tokens: int = word(2048, "tokens of a reply at most", "单次回答的最多 token 数", ge=1)
    json_schema: Literal["auto", "off"] = word(
        "auto", "ask for JSON of a schema, where the endpoint can", "接口支持时要求按 JSON schema 输出"
    )
    concurrency: int = word(8, "requests at once", "同时请求数", ge=1, le=1000)
    requests_per_minute: Number | None = word(None, "requests begun in a minute at most", "每分钟最多请求数", gt=0)
    seconds: Number = word(300.0, "for a request, from its start to its end", "单次请求的总时限（秒）", gt=0)
    attempts: int = word(8, "tries of a request that fails for a passing reason", "暂时性失败的最多尝试次数", ge=1)
    pause: Number = word(
        1.0,
        "seconds before a second try at most; doubled for each further one",
        "首次重试前的最长停顿（秒），逐次加倍",
        gt=0,
    )
    stale: int = word(
        50, "stop after so many replies in a row that brought nothing new", "连续这么多次没有新内容就停止", ge=1
    )
    bm25_at_most: Number = word(18.0, "likeness to any other question, BM25", "与其他问题的最大 BM25", gt=0)
    rouge_at_most: Number = word(0.7, "the same as ROUGE-L", "同上，ROUGE-L", gt=0, le=1)
    at_most: SpendingLimits = word(SpendingLimits(), "the cap of spending", "花费上限")
    price: Price | None = word(None, "needed for at_most.money", "at_most.money 需要")
    use_proxy: bool = word(
        False,
        "take proxies and certificates from the environment (HTTPS_PROXY)",
        "使用环境中的代理与证书（HTTPS_PROXY）",
    )

    @model_validator(mode="after")
    def _check(self) -> Synthesize:
        if self.at_most.money is not None and self.price is None:
            raise wrong(
                "`at_most.money` needs `price: {input: …, output: …}`, of a million tokens",
                "`at_most.money` 需要 `price: {input: …, output: …}`（每百万 token）",
            )
        if (self.method == "documents") != bool(self.documents):
            raise wrong("`documents` belong to `method: documents`", "`documents` 与 `method: documents` 须同时使用")
        return self


class Clean(Section):
    """What is mended or dropped in a text. Each rule counts what it does."""

    unicode: bool = word(
        True,
        "compose characters, fold the radicals that PDFs leave behind; full-width punctuation stays",
        "合成字符，把 PDF 遗留的部首还原为汉字；保留全角标点",
    )
    control: bool = word(
        True, "remove control, zero-width and private-use characters", "去除控制符、零宽字符和私用区字符"
    )
    mojibake: bool = word(
        True, "mend text that was decoded wrongly; drop what cannot be mended", "修复错误解码的文本；无法修复则丢弃"
    )
    html: bool = word(True, "remove rests of HTML from documents", "去除文档中的 HTML 残留")
    unwrap: bool = word(
        True, "join hard-wrapped lines of documents, without a blank in Chinese", "合并文档中的硬换行，中文之间不加空格"
    )
    repetition: bool = word(True, "drop documents that repeat themselves", "丢弃自我重复的文档")
    full_width: bool = word(False, "full-width letters and digits become plain ones", "全角字母数字转为半角")
    convert: Literal["none", "t2s", "s2t", "tw2s", "tw2sp", "s2tw", "s2twp", "hk2s", "s2hk"] = word(
        "none", "convert between traditional and simplified Chinese (OpenCC)", "繁简转换（OpenCC）"
    )
    personal_data: Literal["keep", "mask", "drop"] = word(
        "keep", "telephone numbers, identity cards, e-mail addresses", "电话、身份证号、电子邮件地址"
    )
    min_chars: int = word(1, "drop shorter texts", "丢弃更短的文本", ge=1)
    max_chars: int | None = word(None, "drop longer texts", "丢弃更长的文本", ge=1)
    min_han: Number = word(
        0.0,
        "drop texts with a smaller share of Chinese characters among their letters",
        "丢弃汉字占比更低的文本",
        ge=0,
        le=1,
    )


class Dedup(Section):
    """Duplicates: the first stays. Near duplicates share most of their character 3-grams (Jaccard)."""

    documents: Literal["off", "exact", "near"] = word("near", "duplicates among documents", "文档去重")
    dialogues: Literal["off", "exact", "near"] = word(
        "exact",
        "duplicates among dialogues; near also drops rows that differ only a little, as short tasks under one instruction do",
        "对话去重；near 也会丢弃只差几个字的行，例如同一指令下的短任务",
    )
    threshold: Number = word(0.6, "Jaccard similarity of near duplicates", "近似重复的 Jaccard 阈值", gt=0.3, lt=1)
    min_chars: int = word(100, "shorter texts are compared exactly only", "更短的文本只做精确比较", ge=3)


class Prepare(Section):
    """Read, clean, deduplicate, check and split the data."""

    documents: SourceConfigs = word([], "plain text for continued pre-training", "继续预训练用的纯文本")
    dialogues: SourceConfigs = word([], "conversations for fine-tuning", "微调用的对话")
    clean: Clean = word(Clean(), "what is mended or dropped", "清洗规则")
    dedup: Dedup = word(Dedup(), "duplicates", "去重")
    held_out: Number | str = word(
        0.02,
        "kept away from training: a share (below 1), a count, or a file",
        "留出不参与训练的部分：比例（小于 1）、条数或一个文件",
    )
    held_out_at_most: int | None = word(None, "rows that a share holds out at most", "按比例留出时的最多行数", ge=1)
    evaluation: SourceConfigs = word(
        [], "data that the model will be examined on; it must not be trained on", "评测用数据，不得出现在训练中"
    )
    contaminated: Literal["remove", "refuse"] = word(
        "remove",
        "training rows that appear in held-out or evaluation data are removed, or the run refuses",
        "训练行若出现在留出集或评测数据中：移除，或拒绝运行",
    )
    fill: dict[str, str] = word(
        {},
        "text for placeholders such as {{name}} and {{author}} in the data",
        "数据中 {{name}}、{{author}} 等占位符的内容",
    )
    max_bad: Number | None = word(
        None,
        "refuse to go on when more rows than this cannot be read: a share (below 1) or a count; 0.1 %, at most 100 rows",
        "无法读取的行超过此数（小于 1 表示比例）就停止；默认 0.1%，至多 100 行",
        ge=0,
    )
    executor: Literal["here", "local", "slurm", "ray"] = word(
        "here", "in this process, or as a datatrove pipeline", "在本进程中运行，或作为 datatrove 流水线"
    )
    tasks: int = word(1, "tasks of the datatrove pipeline", "datatrove 流水线的任务数", ge=1)
    executor_options: dict[str, Any] = word(
        {}, "other arguments of the datatrove executor", "传给 datatrove 执行器的其他参数"
    )

    @model_validator(mode="after")
    def _check(self) -> Prepare:
        if not self.documents and not self.dialogues:
            raise wrong(
                "`prepare` needs `documents` or `dialogues`; for example `dialogues: data/alpaca_zh.json`",
                "`prepare` 需要 `documents` 或 `dialogues`；例如 `dialogues: data/alpaca_zh.json`",
            )
        if isinstance(self.held_out, float) and self.held_out < 0:
            raise wrong(f"held_out: {self.held_out} is negative", f"held_out: {self.held_out} 不能为负")
        for name in ("documents", "dialogues"):
            shares = [source.share for source in getattr(self, name) if source.share is not None]
            if sum(shares) > 1 or (shares and len(shares) == len(getattr(self, name)) and abs(sum(shares) - 1) > 1e-6):
                raise wrong(
                    f"{name}: the shares sum to {sum(shares):g}; they must leave room for the other sources, or sum to 1",
                    f"{name}：share 之和为 {sum(shares):g}；应给其他来源留有余地，或恰好为 1",
                )
        return self


class Vocab(Section):
    """Extend the base's tokenizer with pieces of the target script, and grow the model's rows."""

    pieces: int = word(2000, "new pieces at most, learned from the documents", "从文档中学习的新词数上限", ge=0)
    tokenizer: str | None = word(
        None,
        "instead of learning pieces: a SentencePiece tokenizer that was extended already (folder or file)",
        "代替学习新词：已扩充好的 SentencePiece 分词器（文件夹或文件）",
    )
    script: Literal[
        "han",
        "japanese",
        "hangul",
        "cyrillic",
        "greek",
        "arabic",
        "hebrew",
        "devanagari",
        "bengali",
        "tamil",
        "thai",
        "lao",
        "tibetan",
        "burmese",
        "georgian",
        "khmer",
        "mongolian",
    ] = word(
        "han",
        "the script that new pieces spell; all other text keeps its ids",
        "新词所用的文字；其他文本的 id 保持不变",
    )
    words: list[str] = word([], "domain words, each one piece, whatever script", "领域词，每个成为一个词，不限文字")
    special_tokens: list[str] = word([], "special tokens, such as <|call|>", "特殊符号，如 <|call|>")
    new_rows: Literal["subtoken_mean", "mean", "normal"] = word(
        "subtoken_mean",
        "first values of new rows: the mean of the old pieces' rows; the mean of all; drawn anew, as in 2023",
        "新行的初值：旧词行的均值；全部行的均值；随机（2023 年的做法）",
    )
    pad_to_multiple: int = word(
        64, "rows of embedding and head up to a multiple of this", "词向量与输出层的行数补齐到此数的倍数", ge=1
    )
    shrink: bool = word(False, "drop rows that no token has", "去掉没有词对应的行")
    measure_bits: bool = word(
        True,
        "bits per byte before any training: of the base and of the grown model",
        "训练前的 bits per byte：底座与扩表后的模型",
    )

    @model_validator(mode="after")
    def _check(self) -> Vocab:
        also = sorted(self.model_fields_set & {"pieces", "words", "special_tokens", "script"})
        if self.tokenizer and also:
            raise wrong(
                f"`tokenizer` and `{also[0]}` exclude each other: pieces that are there, or pieces to be made",
                f"`tokenizer` 与 `{also[0]}` 只能写一个：现成的词，或要新加的词",
            )
        if not (self.pieces or self.words or self.special_tokens):
            raise wrong(
                "`vocab` adds nothing: `pieces` is 0 and there are no `words` and `special_tokens`",
                "`vocab` 没有要加的内容：`pieces` 为 0，且没有 `words` 与 `special_tokens`",
            )
        return self


class AdapterConfig(Section):
    """What is trained: every weight, or a low-rank adapter beside them."""

    method: Literal["lora", "qlora", "adalora", "new_rows", "full"] = word(
        "lora",
        "lora: a small adapter; qlora: on a quantised base; adalora: its ranks go where they matter; new_rows: only the rows "
        "that the vocabulary stage added; full: all weights",
        "lora：小适配器；qlora：底座量化；adalora：秩分配到重要之处；new_rows：只训练词表阶段新增的行；full：全部权重",
    )
    rank: int = word(
        16, "rank of the adapter: higher learns more, costs memory", "适配器的秩：越大学得越多，越占内存", ge=1
    )
    alpha: Number | None = word(
        None, "scale of the adapter; 2 x rank when absent", "适配器缩放；不写为 rank 的 2 倍", gt=0
    )
    dropout: Number = word(0.0, "dropout on the adapter's input", "适配器输入的 dropout", ge=0, lt=1)
    targets: str | list[str] = word(
        "all-linear",
        "all-linear, family (the family's usual few), or a list of module names",
        "all-linear、family（该系列惯用的几个）或模块名列表",
    )
    target_parameters: list[str] = word(
        [],
        "names of weights that are no module of their own, such as mlp.experts.gate_up_proj (fused experts)",
        "不单独成模块的权重名，如 mlp.experts.gate_up_proj（融合的专家）",
    )
    rslora: bool = word(False, "scale by alpha / sqrt(rank)", "按 alpha / sqrt(rank) 缩放")
    dora: bool = word(False, "train direction and magnitude apart (DoRA)", "方向与幅度分开训练（DoRA）")
    quantize: Literal["nf4", "int8"] = word(
        "nf4", "qlora: 4 bits with double quantisation, or 8 bits", "qlora：4 位（双重量化）或 8 位"
    )
    also_train: list[str] = word([], "modules trained in full beside the adapter", "除适配器外完整训练的模块")
    continue_from: str | None = word(
        None, "folder of an adapter on the same base that is trained further", "继续训练的适配器文件夹（同一底座）"
    )

    @model_validator(mode="after")
    def _check(self) -> AdapterConfig:
        if isinstance(self.targets, str) and self.targets not in ("all-linear", "family"):
            raise wrong(
                f"targets: {self.targets!r} is not `all-linear`, `family` or a list such as [q_proj, v_proj]",
                f"targets: {self.targets!r} 应为 `all-linear`、`family` 或 [q_proj, v_proj] 这样的列表",
            )
        if not self.targets and not self.target_parameters:
            raise wrong(
                "targets: the list is empty, so that the adapter would stand nowhere; write `all-linear`, or names",
                "targets：列表为空，适配器无处可放；请写 `all-linear` 或模块名",
            )
        asked = {"also_train", "continue_from", "target_parameters"} & self.model_fields_set
        if self.part != "lora" and (said := sorted(word for word in asked if getattr(self, word))):
            raise wrong(
                f"`method: {self.method}` does nothing with `{said[0]}`: leave it out, or write `method: lora`",
                f"`method: {self.method}` 不使用 `{said[0]}`：请删去，或写 `method: lora`",
            )
        if self.target_parameters and (self.dora or self.dropout):
            word = "dora" if self.dora else "dropout"
            raise wrong(
                f"`target_parameters` goes without `{word}`: an adapter on a bare weight has none; leave one of them out",
                f"`target_parameters` 不能与 `{word}` 同用：单独的权重上的适配器没有它；请删去其一",
            )
        if self.dora and self.quantize == "int8":
            raise wrong(
                "dora cannot stand on a base in 8 bits; use `quantize: nf4`, or leave `dora` out",
                "dora 不能用于 8 位底座；请用 `quantize: nf4`，或删去 `dora`",
            )
        if self.method == "adalora" and (self.dora or self.rslora or self.target_parameters or self.continue_from):
            raise wrong(
                "adalora has no dora, rslora, target_parameters or continue_from; use method: lora",
                "adalora 不支持 dora、rslora、target_parameters 与 continue_from；请用 method: lora",
            )
        return self

    @property
    def idle(self) -> set[str]:
        if self.part != "lora":
            return {*AdapterConfig.model_fields} - {"method"}
        own = {*AdapterConfig.model_fields} - {"method", "quantize", "continue_from"} if self.continue_from else set()
        return own if self.method == "qlora" else own | {"quantize"}

    @property
    def scale(self) -> float:
        """alpha, with its default."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank

    @property
    def part(self) -> TrainedPart:
        """What it trains, in the words of `pretrain.train`."""
        return self.method if self.method in ("new_rows", "full") else "lora"


TrackerName = Literal["tensorboard", "wandb", "swanlab", "mlflow", "trackio"]
TrainedPart = Literal["new_rows", "embeddings", "lora", "full"]
ROWS_ONLY = ("new_rows", "embeddings")
ENGINES = ("auto", "ddp", "fsdp2", "zero2", "zero3")


class Training(Section):
    """What every training stage knows."""

    adapter: AdapterConfig = word(AdapterConfig(), "what is trained", "训练哪些权重")
    max_length: int = word(1024, "tokens of a sample at most", "每个样本的最大 token 数", ge=8)
    batch_size: int = word(8, "samples per optimizer step over all devices", "每个优化步的样本数（所有设备合计）", ge=1)
    batch_tokens: int | None = word(
        None,
        "instead of batch_size: tokens per optimizer step over all devices; the epoch is packed best-fit",
        "代替 batch_size：每个优化步的 token 数（所有设备合计），整轮最佳适配打包",
        ge=16,
    )
    learning_rate: Number | None = word(
        None, "peak; 2e-4 with an adapter, 2e-5 in full", "峰值学习率；适配器默认 2e-4，全参数 2e-5", gt=0
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon"] = word(
        "adamw",
        "adamw (fused); 8 bits or paged need bitsandbytes; muon trains matrices only, such as LoRA's",
        "adamw（融合）；8 位与分页版需要 bitsandbytes；muon 只训练矩阵，如 LoRA",
    )
    schedule: Literal["constant", "linear", "cosine", "wsd", "warmup_lr"] = word(
        "cosine",
        "shape after the warm-up; wsd: constant, then down in the last `decay`; warmup_lr: constant, warmed up by a logarithm "
        "(DeepSpeed's WarmupLR)",
        "预热之后的形状；wsd：先恒定，最后 `decay` 段下降；warmup_lr：对数预热后恒定（DeepSpeed 的 WarmupLR）",
    )
    warmup: Number = word(
        0.03, "share of all steps (below 1) or a number of steps", "占总步数的比例（小于 1）或步数", ge=0
    )
    decay: Number = word(
        0.1, "wsd: share of all steps (below 1) or a number of steps", "wsd：占总步数的比例（小于 1）或步数", gt=0
    )
    weight_decay: Number = word(0.0, "the optimizer's weight decay", "优化器的权重衰减", ge=0)
    max_grad_norm: Number = word(1.0, "clip the gradient to this norm; 0: off", "梯度裁剪范数；0 为关闭", ge=0)
    neftune: Number | None = word(
        None,
        "noise on the embeddings (NEFTune's alpha, 5 is usual), scaled by each document's own length",
        "词向量噪声（NEFTune 的 alpha，常用 5），按每个文档自身长度缩放",
        gt=0,
    )
    stop_after: Length = word(Duration(count=2, unit="epochs"), "epochs, steps or tokens", "轮数、步数或 token 数")
    save_every: int = word(100, "optimizer steps between checkpoints", "每多少优化步存一次检查点", ge=1, free=True)
    keep_checkpoints: int = word(
        2, "how many checkpoints stay, besides the best", "除最佳外保留多少个检查点", ge=1, free=True
    )
    evaluate_every: int | None = word(
        None,
        "steps between held-out evaluations; before and after always",
        "每多少步评测留出集；前后总会评测",
        ge=1,
        free=True,
    )
    patience: int | None = word(
        None,
        "stop after this many evaluations without a better one, and take the best checkpoint",
        "连续多少次评测没有更好就停止，并取最佳检查点",
        ge=1,
    )
    log_every: int = word(1, "steps between lines of metrics.jsonl", "每多少步写一行 metrics.jsonl", ge=1, free=True)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = word(
        "auto",
        "auto: bf16 where the device computes in it, else fp32; fp16: for GPUs without bf16, with a scaled gradient. What "
        "learns stands in fp32 always",
        "auto：设备支持 bf16 计算则用，否则 fp32；fp16：用于没有 bf16 的 GPU，梯度带缩放。被训练的权重总是 fp32",
    )
    activation_checkpointing: Literal["auto", "on", "off"] = word(
        "auto",
        "recompute activations to save memory; auto: only when memory needs it, which is tried on a GPU before the run",
        "重算激活以省内存；auto：必要时才用（在 GPU 上训练前先试一次）",
        free=True,
    )
    compile: bool = word(
        False,
        "compile each decoder layer: faster on a GPU, after a minute at the beginning (auto and ddp)",
        "编译每个解码层：在 GPU 上更快，开头约需一分钟（auto 与 ddp）",
        free=True,
    )
    micro_batch_tokens: int | None = word(
        None,
        "tokens that go through the model at once; derived when absent",
        "一次过模型的 token 数；不写则推算",
        ge=16,
        free=True,
    )
    engine: str = word(
        "auto",
        "what several processes share out: auto and ddp nothing, zero2 gradients and optimizer (DeepSpeed), zero3 and fsdp2 "
        "also the weights; or a file: a DeepSpeed JSON, or accelerate's YAML",
        "多进程如何分担：auto 与 ddp 不分担，zero2 分担梯度与优化器（DeepSpeed），zero3 与 fsdp2 还分担权重；或一个文件：DeepSpeed 的 JSON，"
        "或 accelerate 的 YAML",
    )
    offload: bool = word(
        False,
        "fsdp2, zero2, zero3: what is shared out waits in the host's memory",
        "fsdp2、zero2、zero3：分担的部分放在主机内存",
    )
    samples: int = word(
        3, "held-out questions answered before and after, for the report", "报告中训练前后各答几题", ge=0
    )
    trainer: dict[str, Any] = word({}, "other transformers TrainingArguments", "其他 transformers TrainingArguments")

    @model_validator(mode="after")
    def _check_training(self) -> Training:
        if self.batch_tokens is not None and "batch_size" in self.model_fields_set:
            raise wrong(
                "`batch_size` and `batch_tokens` exclude each other: samples per step, or tokens per step",
                "`batch_size` 与 `batch_tokens` 只能写一个：每步的样本数，或每步的 token 数",
            )
        if self.precision == "fp16" and self.shares:
            raise wrong(
                "precision: fp16 goes with one device or `engine: ddp`; the engines that share weights compute in bf16 or fp32",
                "precision: fp16 只用于单设备或 `engine: ddp`；切分权重的引擎用 bf16 或 fp32 计算",
            )
        if self.patience is not None and self.evaluate_every is None:
            raise wrong(
                "`patience` counts evaluations, and there are none on the way: add `evaluate_every: 50`",
                "`patience` 按评测次数计，而途中没有评测：请加 `evaluate_every: 50`",
            )
        if self.schedule != "wsd" and "decay" in self.model_fields_set:
            raise wrong(
                f"`decay` belongs to `schedule: wsd`, and this one is {self.schedule}: leave it out, or change the schedule",
                f"`decay` 只用于 `schedule: wsd`，而此处为 {self.schedule}：请删去，或改用 wsd",
            )
        whole = next((one.train for one in self.stretches if set(one.parts) != {"lora"}), None)
        if self.optimizer == "muon" and whole:
            raise wrong(
                f"muon trains matrices of hidden layers, an adapter's, and {whole} has others too: use `optimizer: adamw`",
                f"muon 只训练隐藏层矩阵（如适配器的），而 {whole} 还含其他权重：请用 `optimizer: adamw`",
            )
        return self

    @property
    def idle(self) -> set[str]:
        unused = {"decay": self.schedule != "wsd", "batch_size": self.batch_tokens is not None}
        return {name for name, applies in unused.items() if applies}

    @property
    def idle_adapter(self) -> set[str]:
        """Words of `adapter` that say nothing beside the others, nor to `train`."""
        trains = self.adapter.part != "lora" or any("lora" in stretch.parts for stretch in self.stretches)
        return self.adapter.idle if trains else {*AdapterConfig.model_fields}

    def deciding(self) -> dict[str, Any]:
        """The words that decide the result. When to evaluate is one of them where evaluations may end the run; so is what an
        engine's file says now, besides where it is. Raises RecipeError when that cannot be read."""
        told = self.model_dump(mode="json", exclude={**dict.fromkeys(self.free, True), "adapter": self.idle_adapter})
        return told if self.engine in ENGINES else {**told, "engine_file": engine_config.deciding(self.engine)}

    @property
    def free(self) -> set[str]:
        """The words that do not decide it."""
        fields = type(self).model_fields
        free = {name for name in fields if dict(fields[name].json_schema_extra or {})["free"]}  # type: ignore[arg-type]
        return free - {"evaluate_every"} if self.may_end_early else free

    @property
    def may_end_early(self) -> bool:
        """Whether an evaluation may end the run."""
        return self.patience is not None

    @model_validator(mode="after")
    def _check_engine(self) -> Training:
        if self.engine not in ENGINES and not self.engine.endswith((".json", ".yaml", ".yml")):
            choices = ", ".join(ENGINES)
            raise wrong(
                f"engine: {self.engine!r} is not one of {choices}, and no .json or .yaml file",
                f"engine: {self.engine!r} 不在 {choices} 之中，也不是 .json 或 .yaml 文件",
            )
        if self.offload and not self.shares:
            raise wrong(
                f"`offload` needs an engine that shares out: fsdp2, zero2 or zero3, not {self.engine!r}",
                f"`offload` 需要会分担的引擎：fsdp2、zero2 或 zero3，而不是 {self.engine!r}",
            )
        if self.shares:
            self._check_sharing()
        return self

    def _check_sharing(self) -> None:
        """Raise for what would be computed wrongly, or not at all, on a part of a tensor."""
        stretches = self.stretches
        quantizes = self.adapter.method == "qlora"
        reasons = (
            (self.optimizer != "adamw", f"optimizer: {self.optimizer}", "optimizer: adamw"),
            (self.adapter.method == "adalora", "method: adalora", "method: lora"),
            (self.shares == "deepspeed" and len(stretches) > 1, "phases", "engine: fsdp2"),
            (quantizes and self.shares == "deepspeed", "method: qlora", "engine: fsdp2"),
            (self.compile, "compile", "compile: false"),
            (quantizes and self.adapter.quantize == "int8", "quantize: int8", "quantize: nf4"),
        )
        for applies, what, remedy in reasons:
            if applies:
                raise wrong(
                    f"`{what}` does not work with `engine: {self.engine}`: use `engine: ddp`, or `{remedy}`",
                    f"`{what}` 不能与 `engine: {self.engine}` 同用：请用 `engine: ddp`，或 `{remedy}`",
                )

    @property
    def shares(self) -> Literal["", "fsdp2", "deepspeed"]:
        """Who shares out a model's training, if anyone does."""
        if self.engine in ("zero2", "zero3") or self.engine.endswith(".json"):
            return "deepspeed"
        return "fsdp2" if self.engine == "fsdp2" or self.engine.endswith((".yaml", ".yml")) else ""

    @property
    def learns_in_full(self) -> bool:
        """Whether all weights learn, in one phase at least."""
        return any("full" in stretch.parts for stretch in self.stretches)

    @property
    def stretches(self) -> list[TrainingPhase]:
        """What is trained, one after the other, each with its own words."""
        part = self.adapter.part
        return [TrainingPhase(part, (part,), self, *self.rates(part))]

    def rates(self, train: str) -> tuple[float, float]:
        """Peak learning rates: of the weights, and of embeddings."""
        rate = self.learning_rate if self.learning_rate is not None else 2e-5 if train == "full" else 2e-4
        return rate, rate


class TrainingPhase(NamedTuple):
    """A part of a stage's training. train: as the recipe says it; parts: what that trains; words: how; rates: see there."""

    train: str
    parts: tuple[TrainedPart, ...]
    words: Training
    rate: float
    embedding_rate: float


def no_embeddings() -> PydanticCustomError:
    return wrong(
        "`embedding_learning_rate` is set, and `train: lora` trains no embeddings: leave it out, or use `train: lora+embeddings`",
        "写了 `embedding_learning_rate`，而 `train: lora` 不训练词向量：请删去，或用 `train: lora+embeddings`",
    )


class PhaseConfig(Section):
    """One phase of pre-training. What it does not say, the section says."""

    train: Literal["new_rows", "embeddings", "lora", "lora+embeddings", "full"] = word(
        ...,
        "new_rows (of the vocabulary stage), embeddings, lora, lora+embeddings or full",
        "new_rows（词表阶段新增的行）、embeddings、lora、lora+embeddings 或 full",
    )
    stop_after: Length | None = word(None, "epochs, steps or tokens", "轮数、步数或 token 数")
    learning_rate: Number | None = word(None, "peak", "峰值学习率", gt=0)
    embedding_learning_rate: Number | None = word(None, "peak of the embeddings", "词向量的峰值学习率", gt=0)

    @model_validator(mode="after")
    def _check(self) -> PhaseConfig:
        if self.train == "lora" and self.embedding_learning_rate is not None:
            raise no_embeddings()
        return self


class Forgetting(Section):
    """A rise of the held-out bits per byte of any language over where it began."""

    warn: Number | None = word(0.05, "say it from this share on", "升高超过此比例就提醒", gt=0)
    stop: Number | None = word(None, "stop from this share on", "升高超过此比例就停止", gt=0)


class Pretrain(Training):
    """Continued pre-training on documents."""

    train: Literal["new_rows", "embeddings", "lora", "lora+embeddings", "full"] = word(
        "lora",
        "what is trained when there are no phases: new_rows, embeddings, lora, lora+embeddings or full",
        "没有 phases 时训练什么：new_rows、embeddings、lora、lora+embeddings 或 full",
    )
    phases: list[PhaseConfig] = word([], "one after the other, instead of `train`", "依次进行的各阶段，代替 `train`")
    documents: Literal["apart", "concatenated", "blocks"] = word(
        "apart",
        "apart: each sees only itself; concatenated: end to end, cut at max_length; blocks: the same, and the remainder is "
        "dropped (the scripts of 2023)",
        "apart：文档互不可见；concatenated：首尾相接后按 max_length 切分；blocks：同上并丢弃余数（2023 年的脚本）",
    )
    embedding_learning_rate: Number | None = word(
        None,
        "peak of the embeddings; beside an adapter a fifth of learning_rate when absent",
        "词向量的峰值学习率；与适配器同训时默认为 learning_rate 的五分之一",
        gt=0,
    )
    stop_after: Length = word(Duration(count=1, unit="epochs"), "epochs, steps or tokens", "轮数、步数或 token 数")
    forgetting: Forgetting = word(
        Forgetting(), "held-out bits per byte of each language may rise by this share", "各语言留出集允许的升高比例"
    )

    @model_validator(mode="after")
    def _check_phases(self) -> Pretrain:
        if self.phases and "train" in self.model_fields_set:
            raise wrong(
                "`train` and `phases` exclude each other; each phase has its own `train`",
                "`train` 与 `phases` 只能写一个；每个阶段有自己的 `train`",
            )
        if self.adapter.part != "lora":
            raise wrong(
                f"adapter: {{method: {self.adapter.method}}} is said by `train: {self.adapter.method}` here",
                f"此处 adapter: {{method: {self.adapter.method}}} 应写作 `train: {self.adapter.method}`",
            )
        if self.forgetting.stop is not None and self.evaluate_every is None:
            raise wrong(
                "`forgetting: {stop: ...}` looks at evaluations, and there are none on the way: add `evaluate_every: 50`",
                "`forgetting: {stop: ...}`依据评测判断，而途中没有评测：请加 `evaluate_every: 50`",
            )
        trained = [one.parts for one in self.stretches]
        if self.embedding_learning_rate is not None and all(parts == ("lora",) for parts in trained):
            raise no_embeddings()
        if not any("lora" in parts for parts in trained):
            train = self.stretches[0].train
            if self.adapter.method == "qlora":
                raise wrong(
                    f"`method: qlora` quantises the base for an adapter, and `train: {train}` has none: it would be written "
                    "in 4 or 8 bits as a whole model; leave `method` out, or use `train: lora`",
                    f"`method: qlora` 为适配器而量化底座，而 `train: {train}` 没有适配器，会把 4 位或 8 位的底座写成完整模型；"
                    "请删去 `method`，或用 `train: lora`",
                )
            if self.adapter.continue_from is not None:
                raise wrong(
                    f"`continue_from` opens an adapter, and `train: {train}` trains none: use `train: lora`, or make it the "
                    "base after `tongwen merge`",
                    f"`continue_from` 打开适配器，而 `train: {train}` 不训练适配器：请用 `train: lora`，或先 `tongwen merge` 再作底座",
                )
        if ("full",) in trained and any("lora" in parts for parts in trained):
            raise wrong(
                "phases train an adapter and, in full, the weights that it stands on: keep one of the two",
                "各阶段既训练适配器又全量训练其底座权重：只能保留一种",
            )
        if self.adapter.method == "adalora" and sum("lora" in parts for parts in trained) > 1:
            raise wrong(
                "adalora spends its budget over one phase; two phases train it",
                "adalora 的预算只能分配在一个阶段；这里有两个阶段训练它",
            )
        return self

    @property
    def idle(self) -> set[str]:
        return super().idle | ({"train"} if self.phases else set())

    @property
    def may_end_early(self) -> bool:
        return super().may_end_early or self.forgetting.stop is not None

    @property
    def stretches(self) -> list[TrainingPhase]:
        out = []
        for phase in self.phases or [PhaseConfig(train=self.train)]:
            said = {name: getattr(phase, name) for name in PhaseConfig.model_fields if name != "train"}
            if phase.learning_rate is not None and phase.train in ROWS_ONLY:
                said["embedding_learning_rate"] = phase.embedding_learning_rate or phase.learning_rate
            words = self.model_copy(update={name: value for name, value in said.items() if value is not None})
            out.append(TrainingPhase(phase.train, tuple(phase.train.split("+")), words, *words.rates(phase.train)))  # type: ignore[arg-type]
        return out

    def rates(self, train: str) -> tuple[float, float]:
        rate, own = super().rates(train)[0], self.embedding_learning_rate
        if own is None:
            return rate, rate / 5 if train == "lora+embeddings" else rate
        return own if train in ROWS_ONLY else rate, own


class Sft(Training):
    """Supervised fine-tuning on dialogues."""

    template: str = word(
        "own",
        "own (the model's), chatml, alpaca, alpaca-zh, plain, one of an older project (docs/templates.md), or a .jinja file",
        "own（模型自带）、chatml、alpaca、alpaca-zh、plain、旧项目的模板（docs/templates.md）或 .jinja 文件",
    )
    learn: Literal["assistant", "last_answer", "everything"] = word(
        "assistant", "which text counts in the loss", "哪些文字计入损失"
    )
    thinking: Literal["on", "off", "mixed"] = word(
        "mixed",
        "for thinking models: every answer thinks (on), none does (off), or as each row has it (mixed)",
        "思考模型：都思考（on）、都不思考（off）、按数据而定（mixed）",
    )
    too_long: Literal["reject", "drop_turns", "cut_prompt"] = word(
        "reject",
        "what happens to longer samples: rejected; their oldest turns dropped; or then also the end of the question cut",
        "更长的样本：拒绝；丢弃最早的轮次；或再截断问题末尾",
    )
    legacy: bool = word(
        False,
        "tokens as the project of this template made them in 2023, defects included: docs/templates.md",
        "按该模板的项目在 2023 年的做法切分，含其缺陷：见 docs/templates.md",
    )
    train_new_control_tokens: bool = word(
        True,
        "train the rows of control tokens that the base never saw; false: refuse such a base instead",
        "训练底座从未见过的控制符的词向量行；false：遇到这种底座就拒绝",
    )
    min_stop_learned: Number = word(
        0.99, "refuse when fewer samples than this share learn to stop", "学会停止的样本低于此比例就拒绝", ge=0, le=1
    )


class Merge(Section):
    """Fold the adapter into the base."""

    dtype: Literal["base", "fp32", "bf16", "fp16"] = word(
        "base", "number type of the merged model", "合并后模型的数值类型"
    )
    parity: Literal["streamed", "full"] = word(
        "streamed",
        "compare its logits with base + adapters: layer by layer, or with both models in memory",
        "与底座 + 适配器比较 logits：逐层，或两个模型同时载入内存",
    )
    onto: Literal["original", "nf4", "int8"] = word(
        "original",
        "base that QLoRA's adapter goes into: the original one, or what training saw of it (the difference is measured)",
        "QLoRA 适配器并入哪个底座：原始底座，或训练时所见的量化底座（会测量差异）",
    )
    shard_gb: Number = word(5.0, "size of a weights file at most, in GB", "单个权重文件的最大 GB 数", gt=0)


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

    task: TaskName = word(..., "what is measured", "测什么")
    name: str = word("", "its name in scores.json; the task's when absent", "在 scores.json 中的名字；不写则为任务名")
    data: Annotated[SourceConfig, BeforeValidator(read_source)] | None = word(
        None, "what it is measured on; what `prepare` held out when absent", "评测数据；不写则用 prepare 留出的部分"
    )
    suite: str = word("", "lm_eval: name of a task there, such as ceval-valid", "lm_eval：其中的任务名，如 ceval-valid")
    examples: str | None = word(
        None,
        "multiple_choice: file or folder of answered questions, such as dev/",
        "multiple_choice：示例题的文件或文件夹，如 dev/",
    )
    shots: int = word(0, "examples before each question with options", "选择题每题之前的示例数", ge=0)
    limit: int | None = word(None, "only so many rows, the first ones", "只取前几行", ge=1)

    @model_validator(mode="after")
    def _check(self) -> TaskConfig:
        if (self.task == "lm_eval") != bool(self.suite):
            raise wrong(
                "`task: lm_eval` and `suite: NAME` belong together", "`task: lm_eval` 与 `suite: 名称` 须同时出现"
            )
        if self.shots and not self.examples and not self.suite:
            raise wrong(
                f"shots: {self.shots} needs `examples`, such as the folder dev/ of C-Eval",
                f"shots: {self.shots} 需要 `examples`，例如 C-Eval 的 dev/ 文件夹",
            )
        return self

    @property
    def title(self) -> str:
        return self.name or self.suite or self.task

    @property
    def needs_data(self) -> bool:
        """Whether it is measured on rows that somebody must name; a suite brings its own."""
        return self.data is None and not self.suite


class Evaluate(Section):
    """Scores of the model that the stages before leave, and of the base."""

    tasks: Annotated[list[Annotated[TaskConfig, BeforeValidator(read_task)]], BeforeValidator(read_list)] = word(
        [TaskConfig(task="bits_per_byte")],
        "names, or {task: NAME, data: FILE, …}",
        "任务名，或 {task: 名称, data: 文件, …}",
        min_length=1,
    )
    before: bool = word(True, "score the recipe's base too", "也评测配方的底座")
    batch_size: int = word(32, "questions answered side by side, at most", "同时回答几个问题", ge=1)
    max_new_tokens: int = word(256, "tokens of an answer at most", "回答的最大 token 数", ge=1)

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        names = [one.title for one in self.tasks]
        if len({*names}) < len(names):
            raise wrong(
                f"two tasks have one name: {', '.join(names)}; give one a `name`",
                f"两个任务同名：{'、'.join(names)}；请给其中一个写 `name`",
            )
        return self


class Export(Section):
    """The finished model in the forms that other programs read."""

    formats: Annotated[list[Literal["hf", "pth", "gguf"]], BeforeValidator(read_list)] = word(
        ["gguf"],
        "hf (vLLM, SGLang, transformers), pth (LLaMA's own files), gguf (llama.cpp, Ollama)",
        "hf（vLLM、SGLang、transformers）、pth（LLaMA 原始文件）、gguf（llama.cpp、Ollama）",
        min_length=1,
    )
    quantize: str = word(
        "f16",
        "number type of the GGUF file: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; with `tongwen[llamacpp]` also q2_k to q6_k (q4_k_m …)",
        "GGUF 的数值类型：f32、f16、bf16、q8_0、q5_1、q5_0、q4_1、q4_0；装有 `tongwen[llamacpp]` 时还有 q2_k 至 q6_k（q4_k_m 等）",
    )
    push: str = word(
        "",
        "send the hf form to this place on a hub, private: OWNER/NAME or modelscope:OWNER/NAME",
        "把 hf 格式推送到 hub（私有）：OWNER/NAME 或 modelscope:OWNER/NAME",
    )

    @model_validator(mode="after")
    def _check(self) -> Export:
        if self.push and "hf" not in self.formats:
            raise wrong("`push` sends the hf form: `formats: [hf]`", "`push` 推送 hf 格式：`formats: [hf]`")
        return self


class Recipe(Section):
    """Who and where; below, each stage that has a section runs, in the program's order."""

    name: str = word(..., "name of the run", "运行的名字", pattern=r"^[\w.\-]+$")
    base: str = word(
        ...,
        "model: folder, hub id, modelscope:id, .gguf file, or a stage folder",
        "模型：文件夹、hub id、modelscope:id、.gguf 文件或阶段文件夹",
    )
    out: str = word("", "folder of the run; runs/NAME when absent", "输出文件夹；不写为 runs/NAME")
    seed: int = word(42, "decides order, split and initialisation", "决定顺序、划分与初始化")
    devices: int = word(1, "processes, one per GPU", "进程数，每块 GPU 一个", ge=1)
    track: Annotated[list[TrackerName], BeforeValidator(read_list)] = word(
        [],
        "programs that draw the curves too: tensorboard, wandb, swanlab, mlflow, trackio; keys come from the environment",
        "另外绘制曲线的程序：tensorboard、wandb、swanlab、mlflow、trackio；密钥取自环境变量",
    )
    stop_before: Seconds | None = word(
        None,
        "this long after the command began, a training that is not done has been saved and has ended: 90 minutes, 6 hours",
        "命令开始后到此时间，未完成的训练已存好检查点并退出：90 minutes、6 hours",
    )
    synthesize: Synthesize | None = word(None, "let another model write data", "让另一个模型生成数据")
    prepare: Prepare | None = word(None, "read, check and split the data", "读取、检查、划分数据")
    vocab: Vocab | None = word(None, "extend the tokenizer and grow the model", "扩充词表并扩大模型")
    pretrain: Pretrain | None = word(None, "continued pre-training", "继续预训练")
    sft: Sft | None = word(None, "supervised fine-tuning", "监督微调")
    merge: Merge | None = word(None, "fold the adapter into the base", "把适配器并入底座")
    evaluate: Evaluate | None = word(None, "scores of the model and of its base", "模型与底座的评测分数")
    export: Export | None = word(None, "the model in the forms of other programs", "导出为其他程序使用的格式")

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.sft and not (self.prepare and self.prepare.dialogues):
            raise wrong(
                "`sft` needs `prepare: {dialogues: ...}`: the data that it learns from",
                "`sft` 需要 `prepare: {dialogues: ...}` 提供训练数据",
            )
        if self.vocab and self.vocab.pieces and not self.vocab.tokenizer and not self.prepare:
            raise wrong(
                "`vocab` needs `prepare: {documents: ...}`: the text that pieces are learned from",
                "`vocab` 需要 `prepare: {documents: ...}` 提供学习新词的文本",
            )
        if self.pretrain and not (self.prepare and self.prepare.documents):
            raise wrong(
                "`pretrain` needs `prepare: {documents: ...}`: the text that it learns from",
                "`pretrain` 需要 `prepare: {documents: ...}` 提供训练文本",
            )
        if self.evaluate and not self.prepare and any(one.needs_data for one in self.evaluate.tasks):
            raise wrong(
                "`evaluate` needs `data` for each task, or `prepare`, whose held-out rows it takes",
                "`evaluate` 的每个任务需要 `data`，或由 `prepare` 提供留出的数据",
            )
        if self.sft and self.sft.adapter.method == "qlora" and self.stands_on_adapter:
            raise wrong(
                "`sft` with `method: qlora` stands on the adapter that `pretrain` leaves, and an adapter cannot be put into "
                "quantised weights: `method: lora`, or a recipe of its own whose base is the merged model",
                "`method: qlora` 的 `sft` 建立在 `pretrain` 产出的适配器之上，而适配器无法并入量化权重：改用 `method: lora`，"
                "或另写一个以合并后模型为底座的配方",
            )
        if self.merge and not self.trains_adapters:
            raise wrong(
                "`merge` needs a training section with an adapter: there is nothing to fold into the base",
                "`merge` 需要训练适配器的段，否则没有可合并的东西",
            )
        if self.export and not self.merge and (not (self.vocab or self.training) or self.trains_adapters):
            raise wrong(
                "`export` needs `merge`, or a stage that leaves a whole model: an adapter alone is no model",
                "`export` 需要 `merge`，或产出完整模型的阶段：单独的适配器不是模型",
            )
        return self

    @property
    def training(self) -> list[Training]:
        """The sections that train, in their order."""
        return [section for section in (self.pretrain, self.sft) if section is not None]

    @property
    def stands_on_adapter(self) -> bool:
        """Whether `sft` continues from an adapter that `pretrain` leaves."""
        return bool(self.pretrain and self.sft and any("lora" in one.parts for one in self.pretrain.stretches))

    @property
    def trains_adapters(self) -> bool:
        return any("lora" in one.parts for stage in self.training for one in stage.stretches)

    @property
    def stages(self) -> list[str]:
        """The stages that this recipe runs, in order."""
        return [name for name in STAGES if getattr(self, name) is not None]
