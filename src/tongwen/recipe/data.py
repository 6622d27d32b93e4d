"""The sections that make and prepare data: `synthesize`, `prepare` and `vocab`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from tongwen.core.i18n import say
from tongwen.recipe.fields import Number, Rules, Section, read_list, read_source, setting


class SourceConfig(Section):
    """Where rows come from: a file, a folder, a glob, or a data set of a hub."""

    path: str = setting(
        ...,
        "file, folder, glob, hub:OWNER/NAME or modelscope:OWNER/NAME",
        "文件、文件夹、通配符、hub:OWNER/NAME 或 modelscope:OWNER/NAME",
    )
    format: (
        Literal["alpaca", "messages", "conversations", "completion", "query", "pair", "turns_inside", "text"] | None
    ) = setting(None, "format of the rows; recognised from the content when absent", "数据格式；不写则按内容识别")
    columns: dict[str, str] = setting(
        {}, "our name: the file's name, e.g. {output: answer}", "列名映射，如 {output: answer}"
    )
    roles: dict[str, str] = setting(
        {}, "the file's name of a role: ours, e.g. {Customer: user}", "角色名映射，如 {客户: user}"
    )
    separator: str = setting(
        "\n",
        "between instruction and input, instruct and query; BELLE had nothing there",
        "instruction 与 input、instruct 与 query 之间的文字；BELLE 中没有",
    )
    records: Literal["line", "paragraph", "file"] | None = setting(
        None,
        "what one record of a text file is; absent: paragraphs where blank lines are frequent, else lines",
        "文本文件中一条记录是什么；不写：空行较多则按段落，否则按行",
    )
    encoding: str | None = setting(None, "character encoding; recognised when absent", "字符编码；不写则自动识别")
    entry: str | None = setting(
        None, "name of an entry, when path is a dataset_info.json", "path 为 dataset_info.json 时的条目名"
    )
    weight: Number | None = setting(
        None,
        "passes over its rows per epoch: 0.5 is a new half each time",
        "每轮遍历其数据的次数：0.5 为每次另取一半",
        gt=0,
    )
    share: Number | None = setting(
        None, "share of the tokens of an epoch that come from here", "每轮 token 中来自此处的比例", gt=0, lt=1
    )
    language: str | None = setting(
        None,
        "zh, en or another name: held-out documents are scored by it; absent: zh or other, by their characters",
        "zh、en 或其他名字：留出文档按此分组评测；不写则按字符分为 zh 或 other",
        pattern=r"^\w+$",
    )

    def rules(self) -> Rules:
        yield (
            self.weight is not None and self.share is not None,
            say(
                "`weight` and `share` exclude each other: passes per epoch, or a share of its tokens",
                "`weight` 与 `share` 只能写一个：每轮遍历次数，或占 token 的比例",
            ),
        )


SourceConfigs = Annotated[list[Annotated[SourceConfig, BeforeValidator(read_source)]], BeforeValidator(read_list)]


class SpendingLimits(Section):
    """What `synthesize` may use at most; it stops before it would go beyond."""

    requests: int | None = setting(None, "requests", "请求次数", ge=1)
    tokens: int | None = setting(None, "tokens, of prompts and answers together", "token 数，提示与回答合计", ge=1)
    money: Number | None = setting(None, "money, in the unit of `price`", "金额，单位同 `price`", gt=0)


class Price(Section):
    """What a million tokens cost."""

    input: Number = setting(..., "a million tokens of prompts", "一百万提示 token", ge=0)
    output: Number = setting(..., "a million tokens of answers", "一百万回答 token", ge=0)


class Synthesize(Section):
    """Dialogues written by another model, through an OpenAI-compatible endpoint; one more input of `prepare`."""

    endpoint: str = setting(..., "base URL, as https://api.deepseek.com/v1", "接口地址，如 https://api.deepseek.com/v1")
    model: str = setting(..., "the model's name there", "接口上的模型名")
    key: str = setting(
        "OPENAI_API_KEY",
        "environment variable that holds the key; the key itself stands in no file",
        "存放密钥的环境变量；密钥不写入任何文件",
        pattern=r"^[A-Z_][A-Z0-9_]*$",
    )
    method: Literal["self_instruct", "topics", "documents"] = setting(
        "self_instruct",
        "tasks like drawn examples; tasks on drawn topics; conversations about one's own documents",
        "仿照抽取的例子出题；按抽取的话题出题；关于自有文档的对话",
    )
    rows: int = setting(..., "dialogues to make", "要生成的对话数", ge=1)
    seeds: str | None = setting(
        None, "seed tasks of BELLE's shape; absent: 40 of ours", "BELLE 格式的种子任务；不写用自带的 40 个"
    )
    topics: list[str] = setting([], "topics; absent: 82 of ours", "话题；不写用自带的 82 个")
    documents: SourceConfigs = setting([], "documents to talk about", "要谈论的文档")
    temperature: Number = setting(1.0, "0: always the likeliest", "0：总取最可能的", ge=0, le=2)
    top_p: Number = setting(1.0, "share of the likeliest tokens drawn from", "核采样比例", gt=0, le=1)
    max_tokens: int = setting(2048, "tokens of a reply at most", "单次回答的最多 token 数", ge=1)
    json_schema: Literal["auto", "off"] = setting(
        "auto", "ask for JSON of a schema, where the endpoint can", "接口支持时要求按 JSON schema 输出"
    )
    concurrency: int = setting(8, "requests at once", "同时请求数", ge=1, le=1000)
    requests_per_minute: Number | None = setting(None, "requests begun in a minute at most", "每分钟最多请求数", gt=0)
    seconds: Number = setting(300.0, "for a request, from its start to its end", "单次请求的总时限（秒）", gt=0)
    attempts: int = setting(8, "tries of a request that fails for a passing reason", "暂时性失败的最多尝试次数", ge=1)
    pause: Number = setting(
        1.0,
        "seconds before a second try at most; doubled for each further one",
        "首次重试前的最长停顿（秒），逐次加倍",
        gt=0,
    )
    stale: int = setting(
        50, "stop after so many replies in a row that brought nothing new", "连续这么多次没有新内容就停止", ge=1
    )
    bm25_at_most: Number = setting(18.0, "likeness to any other question, BM25", "与其他问题的最大 BM25", gt=0)
    rouge_at_most: Number = setting(0.7, "the same as ROUGE-L", "同上，ROUGE-L", gt=0, le=1)
    at_most: SpendingLimits = setting(SpendingLimits(), "the cap of spending", "花费上限")
    price: Price | None = setting(None, "needed for at_most.money", "at_most.money 需要")
    use_proxy: bool = setting(
        False,
        "take proxies and certificates from the environment (HTTPS_PROXY)",
        "使用环境中的代理与证书（HTTPS_PROXY）",
    )

    def rules(self) -> Rules:
        yield (
            self.at_most.money is not None and self.price is None,
            say(
                "`at_most.money` needs `price: {input: …, output: …}`, of a million tokens",
                "`at_most.money` 需要 `price: {input: …, output: …}`（每百万 token）",
            ),
        )
        yield (
            (self.method == "documents") != bool(self.documents),
            say("`documents` belong to `method: documents`", "`documents` 与 `method: documents` 须同时使用"),
        )


class Clean(Section):
    """What is mended or dropped in a text. Each rule counts what it does."""

    unicode: bool = setting(
        True,
        "compose characters, fold the radicals that PDFs leave behind; full-width punctuation stays",
        "合成字符，把 PDF 遗留的部首还原为汉字；保留全角标点",
    )
    control: bool = setting(
        True, "remove control, zero-width and private-use characters", "去除控制符、零宽字符和私用区字符"
    )
    mojibake: bool = setting(
        True, "mend text that was decoded wrongly; drop what cannot be mended", "修复错误解码的文本；无法修复则丢弃"
    )
    html: bool = setting(True, "remove rests of HTML from documents", "去除文档中的 HTML 残留")
    unwrap: bool = setting(
        True, "join hard-wrapped lines of documents, without a blank in Chinese", "合并文档中的硬换行，中文之间不加空格"
    )
    repetition: bool = setting(True, "drop documents that repeat themselves", "丢弃自我重复的文档")
    full_width: bool = setting(False, "full-width letters and digits become plain ones", "全角字母数字转为半角")
    convert: Literal["none", "t2s", "s2t", "tw2s", "tw2sp", "s2tw", "s2twp", "hk2s", "s2hk"] = setting(
        "none", "convert between traditional and simplified Chinese (OpenCC)", "繁简转换（OpenCC）"
    )
    personal_data: Literal["keep", "mask", "drop"] = setting(
        "keep", "telephone numbers, identity cards, e-mail addresses", "电话、身份证号、电子邮件地址"
    )
    min_chars: int = setting(1, "drop shorter texts", "丢弃更短的文本", ge=1)
    max_chars: int | None = setting(None, "drop longer texts", "丢弃更长的文本", ge=1)
    min_han: Number = setting(
        0.0,
        "drop texts with a smaller share of Chinese characters among their letters",
        "丢弃汉字占比更低的文本",
        ge=0,
        le=1,
    )


class Dedup(Section):
    """Duplicates: the first stays. Near duplicates share most of their character 3-grams (Jaccard)."""

    documents: Literal["off", "exact", "near"] = setting("near", "duplicates among documents", "文档去重")
    dialogues: Literal["off", "exact", "near"] = setting(
        "exact",
        "duplicates among dialogues; near also drops rows that differ only a little, as short tasks under one instruction do",
        "对话去重；near 也会丢弃只差几个字的行，例如同一指令下的短任务",
    )
    threshold: Number = setting(0.6, "Jaccard similarity of near duplicates", "近似重复的 Jaccard 阈值", gt=0.3, lt=1)
    min_chars: int = setting(100, "shorter texts are compared exactly only", "更短的文本只做精确比较", ge=3)


class Prepare(Section):
    """Read, clean, deduplicate, check and split the data."""

    documents: SourceConfigs = setting([], "plain text for continued pre-training", "继续预训练用的纯文本")
    dialogues: SourceConfigs = setting([], "conversations for fine-tuning", "微调用的对话")
    clean: Clean = setting(Clean(), "what is mended or dropped", "清洗规则")
    dedup: Dedup = setting(Dedup(), "duplicates", "去重")
    held_out: Number | str = setting(
        0.02,
        "kept away from training: a share (below 1), a count, or a file",
        "留出不参与训练的部分：比例（小于 1）、条数或一个文件",
    )
    held_out_at_most: int | None = setting(None, "rows that a share holds out at most", "按比例留出时的最多行数", ge=1)
    evaluation: SourceConfigs = setting(
        [], "data that the model will be examined on; it must not be trained on", "评测用数据，不得出现在训练中"
    )
    contaminated: Literal["remove", "refuse"] = setting(
        "remove",
        "training rows that appear in held-out or evaluation data are removed, or the run refuses",
        "训练行若出现在留出集或评测数据中：移除，或拒绝运行",
    )
    fill: dict[str, str] = setting(
        {},
        "text for placeholders such as {{name}} and {{author}} in the data",
        "数据中 {{name}}、{{author}} 等占位符的内容",
    )
    max_bad: Number | None = setting(
        None,
        "refuse to go on when more rows than this cannot be read: a share (below 1) or a count; 0.1 %, at most 100 rows",
        "无法读取的行超过此数（小于 1 表示比例）就停止；默认 0.1%，至多 100 行",
        ge=0,
    )
    executor: Literal["here", "local", "slurm", "ray"] = setting(
        "here", "in this process, or as a datatrove pipeline", "在本进程中运行，或作为 datatrove 流水线"
    )
    tasks: int = setting(1, "tasks of the datatrove pipeline", "datatrove 流水线的任务数", ge=1)
    executor_options: dict[str, Any] = setting(
        {}, "other arguments of the datatrove executor", "传给 datatrove 执行器的其他参数"
    )

    def rules(self) -> Rules:
        yield (
            not self.documents and not self.dialogues,
            say(
                "`prepare` needs `documents` or `dialogues`; for example `dialogues: data/alpaca_zh.json`",
                "`prepare` 需要 `documents` 或 `dialogues`；例如 `dialogues: data/alpaca_zh.json`",
            ),
        )
        yield (
            isinstance(self.held_out, float) and self.held_out < 0,
            say(f"held_out: {self.held_out} is negative", f"held_out: {self.held_out} 不能为负"),
        )
        for name, sources in (("documents", self.documents), ("dialogues", self.dialogues)):
            shares = [source.share for source in sources if source.share is not None]
            total, all_have_shares = sum(shares), bool(shares) and len(shares) == len(sources)
            yield (
                total > 1 or (all_have_shares and abs(total - 1) > 1e-6),
                say(
                    f"{name}: the shares sum to {total:g}; they must leave room for the other sources, or sum to 1",
                    f"{name}：share 之和为 {total:g}；应给其他来源留有余地，或恰好为 1",
                ),
            )


class Vocab(Section):
    """Extend the base's tokenizer with pieces of the target script, and grow the model's rows."""

    pieces: int = setting(2000, "new pieces at most, learned from the documents", "从文档中学习的新词数上限", ge=0)
    tokenizer: str | None = setting(
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
    ] = setting(
        "han",
        "the script that new pieces spell; all other text keeps its ids",
        "新词所用的文字；其他文本的 id 保持不变",
    )
    words: list[str] = setting([], "domain words, each one piece, whatever script", "领域词，每个成为一个词，不限文字")
    special_tokens: list[str] = setting([], "special tokens, such as <|call|>", "特殊符号，如 <|call|>")
    new_rows: Literal["subtoken_mean", "mean", "normal"] = setting(
        "subtoken_mean",
        "first values of new rows: the mean of the old pieces' rows; the mean of all; drawn anew, as in 2023",
        "新行的初值：旧词行的均值；全部行的均值；随机（2023 年的做法）",
    )
    pad_to_multiple: int = setting(
        64, "rows of embedding and head up to a multiple of this", "词向量与输出层的行数补齐到此数的倍数", ge=1
    )
    shrink: bool = setting(False, "drop rows that no token has", "去掉没有词对应的行")
    measure_bits: bool = setting(
        True,
        "bits per byte before any training: of the base and of the grown model",
        "训练前的 bits per byte：底座与扩表后的模型",
    )

    def rules(self) -> Rules:
        made = min(self.model_fields_set & {"pieces", "words", "special_tokens", "script"}, default="")
        yield (
            self.tokenizer and made,
            say(
                f"`tokenizer` and `{made}` exclude each other: pieces that are there, or pieces to be made",
                f"`tokenizer` 与 `{made}` 只能写一个：现成的词，或要新加的词",
            ),
        )
        yield (
            not (self.pieces or self.words or self.special_tokens),
            say(
                "`vocab` adds nothing: `pieces` is 0 and there are no `words` and `special_tokens`",
                "`vocab` 没有要加的内容：`pieces` 为 0，且没有 `words` 与 `special_tokens`",
            ),
        )
