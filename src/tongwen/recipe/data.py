"""The sections that make and prepare data: `synthesize`, `prepare` and `vocab`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer

from tongwen.core.i18n import _
from tongwen.recipe.fields import Count, Number, Rules, Section, ShareOrCount, read_list, read_source, setting


class SourceConfig(Section):
    """A source of rows: a file, a folder, a glob, or a data set on a hub."""

    path: str = setting(
        ...,
        "file, folder, glob, hub:OWNER/NAME or modelscope:OWNER/NAME",
        names="file",
    )
    format: (
        Literal["alpaca", "messages", "conversations", "completion", "query", "pair", "turns_inside", "text"] | None
    ) = setting(None, "data format; detected from the content when absent")
    columns: dict[str, str] = setting({}, "column names, ours to the file's, e.g. {output: answer}")
    ignore: list[str] = setting(
        [], "fields of the rows that are not to be read, as the notice on unread fields names them, e.g. [id, label]"
    )
    roles: dict[str, str] = setting({}, "role names, the file's to ours, e.g. {Customer: user}; '*' is any other name")
    separator: str = setting(
        "\n",
        "text between instruction and input, instruct and query; BELLE has none",
    )
    records: Literal["line", "paragraph", "file"] | None = setting(
        None,
        "unit of one record in a text file; absent: paragraphs if blank lines are frequent, else lines; `file` also joins the pages of a document",
    )
    encoding: str | None = setting(None, "character encoding; detected when absent")
    entry: str | None = setting(None, "entry name, when path is a dataset_info.json")
    rows: Count | None = setting(None, "most rows that are read: the first ones of its files in order", ge=1)
    weight: Number | None = setting(
        None,
        "passes over its rows per epoch; 0.5 takes a different half each epoch",
        gt=0,
        le=1e6,
    )
    share: Number | None = setting(None, "share of an epoch's tokens that come from this source", gt=0, lt=1)
    language: str | None = setting(
        None,
        "zh, en or another name; held-out documents are scored per language; absent: zh or other, judged by their characters",
        pattern=r"^\w+$",
    )

    def rules(self) -> Rules:
        yield (
            self.weight is not None and self.share is not None,
            _("give only one of `weight` and `share`: passes per epoch, or a share of its tokens"),
        )

    @model_serializer(mode="wrap")
    def _without_later_settings(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out settings without a value that came later: results of versions before them have the same settings."""
        settings: dict[str, Any] = dump(self)
        for name in ("ignore", "rows"):
            if not settings.get(name):
                settings.pop(name, None)
        return settings


SourceConfigs = Annotated[list[Annotated[SourceConfig, BeforeValidator(read_source)]], BeforeValidator(read_list)]


class SpendingLimits(Section):
    """Spending limits of `synthesize`, which stops before it would exceed one."""

    requests: Count | None = setting(None, "requests", ge=1)
    tokens: Annotated[int, Field(le=10**15)] | None = setting(None, "tokens of prompts and answers together", ge=1)
    money: Number | None = setting(None, "money, in the unit of `price`", gt=0)


class Price(Section):
    """The price of a million tokens."""

    input: Number = setting(..., "per million prompt tokens", ge=0)
    output: Number = setting(..., "per million answer tokens", ge=0)


class Synthesize(Section):
    """Dialogues written by another model, through an OpenAI-compatible endpoint; one more input of `prepare`."""

    endpoint: str = setting(..., "base URL, such as https://api.deepseek.com/v1", names="address")
    model: str = setting(..., "model name at this endpoint")
    key: str = setting(
        "OPENAI_API_KEY",
        "environment variable that holds the key; the key is never written to a file",
        names="address",
        pattern=r"^[A-Z_][A-Z0-9_]*$",
    )
    method: Literal["self_instruct", "topics", "documents"] = setting(
        "self_instruct",
        "tasks modelled on sampled examples; tasks on sampled topics; conversations about your own documents",
    )
    rows: Count = setting(..., "number of dialogues to generate", ge=1)
    seeds: str | None = setting(None, "seed tasks in BELLE's format; absent: the 40 included ones", names="file")
    topics: list[str] = setting([], "topics; absent: the 82 included ones")
    documents: SourceConfigs = setting([], "documents for the conversations")
    temperature: Number = setting(1.0, "0: always the likeliest", ge=0, le=2)
    top_p: Number = setting(1.0, "top-p (nucleus sampling)", gt=0, le=1)
    max_tokens: Count = setting(2048, "maximum tokens of a reply", ge=1)
    json_schema: Literal["auto", "off"] = setting(
        "auto", "request JSON that follows a schema, if the endpoint supports it"
    )
    concurrency: Count = setting(8, "concurrent requests", ge=1, le=1000)
    requests_per_minute: Number | None = setting(None, "maximum requests per minute", ge=0.001)
    seconds: Number = setting(300.0, "total time limit of one request, in seconds", gt=0, le=86400)
    attempts: Count = setting(8, "maximum attempts after a temporary failure", ge=1, le=100)
    pause: Number = setting(
        1.0,
        "longest pause before the first retry, in seconds; doubled for each further retry",
        gt=0,
        le=3600,
    )
    stale: Count = setting(50, "stop after this many replies in a row without anything new", ge=1)
    bm25_at_most: Number = setting(18.0, "maximum BM25 similarity to any other question", gt=0)
    rouge_at_most: Number = setting(0.7, "the same, as ROUGE-L", gt=0, le=1)
    at_most: SpendingLimits = setting(SpendingLimits(), "spending limit")
    price: Price | None = setting(None, "needed for at_most.money")
    use_proxy: bool = setting(
        False,
        "use the environment's proxies and certificates (HTTPS_PROXY)",
    )

    def rules(self) -> Rules:
        yield (
            self.at_most.money is not None and self.price is None,
            _("`at_most.money` needs `price: {input: …, output: …}`, per million tokens"),
        )
        yield (
            (self.method == "documents") != bool(self.documents),
            _("`documents` and `method: documents` must be used together"),
        )


class Clean(Section):
    """Repairs and filters for texts. Each rule counts its changes."""

    unicode: bool = setting(
        True,
        "compose characters, turn radicals left by PDFs into characters; keep full-width punctuation",
    )
    control: bool = setting(True, "remove control, zero-width and private-use characters")
    mojibake: bool = setting(True, "repair wrongly decoded text; drop it if it cannot be repaired")
    html: bool = setting(True, "remove leftover HTML from documents")
    unwrap: bool = setting(True, "join hard-wrapped lines of documents; no space between Chinese characters")
    repetition: bool = setting(True, "drop documents that repeat themselves")
    full_width: bool = setting(False, "convert full-width letters and digits to half-width")
    convert: Literal["none", "t2s", "s2t", "tw2s", "tw2sp", "s2tw", "s2twp", "hk2s", "s2hk"] = setting(
        "none", "convert between traditional and simplified Chinese (OpenCC)"
    )
    personal_data: Literal["keep", "mask", "drop"] = setting(
        "keep", "telephone numbers, identity card numbers, e-mail addresses"
    )
    min_chars: Count = setting(1, "drop shorter texts", ge=1)
    max_chars: Count | None = setting(None, "drop longer texts", ge=1)
    min_han: Number = setting(
        0.0,
        "drop texts with a smaller share of Chinese characters",
        ge=0,
        le=1,
    )


class Dedup(Section):
    """Duplicates: the first stays. Near duplicates share most of their character 3-grams (Jaccard)."""

    documents: Literal["off", "exact", "near"] = setting("near", "deduplication of documents")
    dialogues: Literal["off", "exact", "near"] = setting(
        "exact",
        "deduplication of dialogues; near also drops rows that differ in a few characters, such as short tasks under one instruction",
    )
    threshold: Number = setting(0.6, "Jaccard threshold of near duplicates", gt=0.3, lt=1)
    min_chars: Count = setting(100, "shorter texts are only compared exactly", ge=3)

    @property
    def preferences(self) -> str:
        """Preferences are compared as dialogues are."""
        return self.dialogues


class Prepare(Section):
    """Read, clean, deduplicate, check and split the data."""

    documents: SourceConfigs = setting([], "plain text for continued pre-training")
    dialogues: SourceConfigs = setting([], "conversations for fine-tuning")
    preferences: SourceConfigs = setting(
        [],
        "chosen and rejected answers, or answers with a label (KTO), for `prefer`; cleaned and deduplicated as dialogues",
    )
    clean: Clean = setting(Clean(), "cleaning rules")
    dedup: Dedup = setting(Dedup(), "deduplication")
    held_out: ShareOrCount | str = setting(
        0.02,
        "held out from training: a share (below 1), a count, or a file",
        names="file",
    )
    held_out_at_most: Count | None = setting(None, "maximum rows when held_out is a share", ge=1)
    evaluation: SourceConfigs = setting([], "evaluation data, which must not occur in training")
    contaminated: Literal["remove", "refuse"] = setting(
        "remove",
        "training rows that appear in held-out or evaluation data: remove them, or refuse to run",
    )
    fill: dict[str, str] = setting(
        {},
        "text for placeholders such as {{name}} and {{author}} in the data",
    )
    max_bad: ShareOrCount | None = setting(
        None,
        "stop when more rows than this cannot be read: a share (below 1) or a count; default 0.1 %, at most 100 rows",
        ge=0,
    )
    executor: Literal["here", "local", "slurm", "ray"] = setting(
        "here", "run in this process, or as a datatrove pipeline"
    )
    tasks: Count = setting(1, "number of tasks of the datatrove pipeline", ge=1)
    executor_options: dict[str, Any] = setting({}, "other arguments of the datatrove executor", names="arguments")

    def rules(self) -> Rules:
        yield (
            not self.documents and not self.dialogues and not self.preferences,
            _(
                "`prepare` needs `documents`, `dialogues` or `preferences`; for example `dialogues: data/alpaca_zh.json`"
            ),
        )
        yield (
            any(source.format for source in self.preferences),
            _("`preferences` takes no `format`: each row's keys say what it is; `columns` names other keys"),
        )
        for name, sources in (
            ("documents", self.documents),
            ("dialogues", self.dialogues),
            ("preferences", self.preferences),
        ):
            shares = [source.share for source in sources if source.share is not None]
            total, all_have_shares = sum(shares), bool(shares) and len(shares) == len(sources)
            yield (
                total > 1 or (all_have_shares and abs(total - 1) > 1e-6),
                _(
                    "{name}: the shares sum to {total:g}; they must leave room for the other sources or sum to exactly 1"
                ).format(name=name, total=total),
            )

    @model_serializer(mode="wrap")
    def _without_empty_preferences(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out empty `preferences`: results of versions before they came have the same settings."""
        settings: dict[str, Any] = dump(self)
        if not settings.get("preferences"):
            settings.pop("preferences", None)
        return settings


class Vocab(Section):
    """Extend the base's tokenizer with pieces of the target script, and grow the model's rows."""

    pieces: Count = setting(2000, "maximum number of new pieces learned from the documents", ge=0, le=10**7)
    tokenizer: str | None = setting(
        None,
        "instead of learning pieces: an already extended SentencePiece tokenizer (folder or file)",
        names="model",
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
        "script of the new pieces; all other text keeps its ids",
    )
    words: list[str] = setting([], "domain words, one piece each, in any script")
    special_tokens: list[str] = setting([], "special tokens, such as <|call|>")
    new_rows: Literal["subtoken_mean", "matched", "mean", "normal"] = setting(
        "subtoken_mean",
        "initial values of new rows: mean of the old pieces' rows; fitted to what the base says with the old pieces (unties the head); mean of all rows; random (as in 2023)",
    )
    pad_to_multiple: Count = setting(64, "pad the rows of embedding and head to a multiple of this", ge=1, le=1 << 16)
    shrink: bool = setting(False, "drop rows without a token")
    measure_bits: bool = setting(
        True,
        "bits per byte before training: base and extended model",
    )

    def rules(self) -> Rules:
        made = min(self.model_fields_set & {"pieces", "words", "special_tokens", "script"}, default="")
        yield (
            self.tokenizer and made,
            _("give only one of `tokenizer` and `{made}`: existing pieces, or pieces to add").format(made=made),
        )
        yield (
            not (self.pieces or self.words or self.special_tokens),
            _("`vocab` adds nothing: `pieces` is 0, and `words` and `special_tokens` are empty"),
        )
