"""The sections that make and prepare data: `synthesize`, `prepare` and `vocab`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from tongwen.core.i18n import _
from tongwen.recipe.fields import Number, Rules, Section, read_list, read_source, setting


class SourceConfig(Section):
    """Where rows come from: a file, a folder, a glob, or a data set of a hub."""

    path: str = setting(
        ...,
        "file, folder, glob, hub:OWNER/NAME or modelscope:OWNER/NAME",
    )
    format: (
        Literal["alpaca", "messages", "conversations", "completion", "query", "pair", "turns_inside", "text"] | None
    ) = setting(None, "format of the rows; recognised from the content when absent")
    columns: dict[str, str] = setting({}, "our name: the file's name, e.g. {output: answer}")
    roles: dict[str, str] = setting({}, "the file's name of a role: ours, e.g. {Customer: user}")
    separator: str = setting(
        "\n",
        "between instruction and input, instruct and query; BELLE had nothing there",
    )
    records: Literal["line", "paragraph", "file"] | None = setting(
        None,
        "what one record of a text file is; absent: paragraphs where blank lines are frequent, else lines",
    )
    encoding: str | None = setting(None, "character encoding; recognised when absent")
    entry: str | None = setting(None, "name of an entry, when path is a dataset_info.json")
    weight: Number | None = setting(
        None,
        "passes over its rows per epoch: 0.5 is a new half each time",
        gt=0,
    )
    share: Number | None = setting(None, "share of the tokens of an epoch that come from here", gt=0, lt=1)
    language: str | None = setting(
        None,
        "zh, en or another name: held-out documents are scored by it; absent: zh or other, by their characters",
        pattern=r"^\w+$",
    )

    def rules(self) -> Rules:
        yield (
            self.weight is not None and self.share is not None,
            _("`weight` and `share` exclude each other: passes per epoch, or a share of its tokens"),
        )


SourceConfigs = Annotated[list[Annotated[SourceConfig, BeforeValidator(read_source)]], BeforeValidator(read_list)]


class SpendingLimits(Section):
    """What `synthesize` may use at most; it stops before it would go beyond."""

    requests: int | None = setting(None, "requests", ge=1)
    tokens: int | None = setting(None, "tokens, of prompts and answers together", ge=1)
    money: Number | None = setting(None, "money, in the unit of `price`", gt=0)


class Price(Section):
    """What a million tokens cost."""

    input: Number = setting(..., "a million tokens of prompts", ge=0)
    output: Number = setting(..., "a million tokens of answers", ge=0)


class Synthesize(Section):
    """Dialogues written by another model, through an OpenAI-compatible endpoint; one more input of `prepare`."""

    endpoint: str = setting(..., "base URL, as https://api.deepseek.com/v1")
    model: str = setting(..., "the model's name there")
    key: str = setting(
        "OPENAI_API_KEY",
        "environment variable that holds the key; the key itself stands in no file",
        pattern=r"^[A-Z_][A-Z0-9_]*$",
    )
    method: Literal["self_instruct", "topics", "documents"] = setting(
        "self_instruct",
        "tasks like drawn examples; tasks on drawn topics; conversations about one's own documents",
    )
    rows: int = setting(..., "dialogues to make", ge=1)
    seeds: str | None = setting(None, "seed tasks of BELLE's shape; absent: 40 of ours")
    topics: list[str] = setting([], "topics; absent: 82 of ours")
    documents: SourceConfigs = setting([], "documents to talk about")
    temperature: Number = setting(1.0, "0: always the likeliest", ge=0, le=2)
    top_p: Number = setting(1.0, "share of the likeliest tokens drawn from", gt=0, le=1)
    max_tokens: int = setting(2048, "tokens of a reply at most", ge=1)
    json_schema: Literal["auto", "off"] = setting("auto", "ask for JSON of a schema, where the endpoint can")
    concurrency: int = setting(8, "requests at once", ge=1, le=1000)
    requests_per_minute: Number | None = setting(None, "requests begun in a minute at most", gt=0)
    seconds: Number = setting(300.0, "for a request, from its start to its end", gt=0)
    attempts: int = setting(8, "tries of a request that fails for a passing reason", ge=1)
    pause: Number = setting(
        1.0,
        "seconds before a second try at most; doubled for each further one",
        gt=0,
    )
    stale: int = setting(50, "stop after so many replies in a row that brought nothing new", ge=1)
    bm25_at_most: Number = setting(18.0, "likeness to any other question, BM25", gt=0)
    rouge_at_most: Number = setting(0.7, "the same as ROUGE-L", gt=0, le=1)
    at_most: SpendingLimits = setting(SpendingLimits(), "the cap of spending")
    price: Price | None = setting(None, "needed for at_most.money")
    use_proxy: bool = setting(
        False,
        "take proxies and certificates from the environment (HTTPS_PROXY)",
    )

    def rules(self) -> Rules:
        yield (
            self.at_most.money is not None and self.price is None,
            _("`at_most.money` needs `price: {input: …, output: …}`, of a million tokens"),
        )
        yield (
            (self.method == "documents") != bool(self.documents),
            _("`documents` belong to `method: documents`"),
        )


class Clean(Section):
    """What is mended or dropped in a text. Each rule counts what it does."""

    unicode: bool = setting(
        True,
        "compose characters, fold the radicals that PDFs leave behind; full-width punctuation stays",
    )
    control: bool = setting(True, "remove control, zero-width and private-use characters")
    mojibake: bool = setting(True, "mend text that was decoded wrongly; drop what cannot be mended")
    html: bool = setting(True, "remove rests of HTML from documents")
    unwrap: bool = setting(True, "join hard-wrapped lines of documents, without a blank in Chinese")
    repetition: bool = setting(True, "drop documents that repeat themselves")
    full_width: bool = setting(False, "full-width letters and digits become plain ones")
    convert: Literal["none", "t2s", "s2t", "tw2s", "tw2sp", "s2tw", "s2twp", "hk2s", "s2hk"] = setting(
        "none", "convert between traditional and simplified Chinese (OpenCC)"
    )
    personal_data: Literal["keep", "mask", "drop"] = setting(
        "keep", "telephone numbers, identity cards, e-mail addresses"
    )
    min_chars: int = setting(1, "drop shorter texts", ge=1)
    max_chars: int | None = setting(None, "drop longer texts", ge=1)
    min_han: Number = setting(
        0.0,
        "drop texts with a smaller share of Chinese characters among their letters",
        ge=0,
        le=1,
    )


class Dedup(Section):
    """Duplicates: the first stays. Near duplicates share most of their character 3-grams (Jaccard)."""

    documents: Literal["off", "exact", "near"] = setting("near", "duplicates among documents")
    dialogues: Literal["off", "exact", "near"] = setting(
        "exact",
        "duplicates among dialogues; near also drops rows that differ only a little, as short tasks under one instruction do",
    )
    threshold: Number = setting(0.6, "Jaccard similarity of near duplicates", gt=0.3, lt=1)
    min_chars: int = setting(100, "shorter texts are compared exactly only", ge=3)


class Prepare(Section):
    """Read, clean, deduplicate, check and split the data."""

    documents: SourceConfigs = setting([], "plain text for continued pre-training")
    dialogues: SourceConfigs = setting([], "conversations for fine-tuning")
    clean: Clean = setting(Clean(), "what is mended or dropped")
    dedup: Dedup = setting(Dedup(), "duplicates")
    held_out: Number | str = setting(
        0.02,
        "kept away from training: a share (below 1), a count, or a file",
    )
    held_out_at_most: int | None = setting(None, "rows that a share holds out at most", ge=1)
    evaluation: SourceConfigs = setting([], "data that the model will be examined on; it must not be trained on")
    contaminated: Literal["remove", "refuse"] = setting(
        "remove",
        "training rows that appear in held-out or evaluation data are removed, or the run refuses",
    )
    fill: dict[str, str] = setting(
        {},
        "text for placeholders such as {{name}} and {{author}} in the data",
    )
    max_bad: Number | None = setting(
        None,
        "refuse to go on when more rows than this cannot be read: a share (below 1) or a count; 0.1 %, at most 100 rows",
        ge=0,
    )
    executor: Literal["here", "local", "slurm", "ray"] = setting("here", "in this process, or as a datatrove pipeline")
    tasks: int = setting(1, "tasks of the datatrove pipeline", ge=1)
    executor_options: dict[str, Any] = setting({}, "other arguments of the datatrove executor")

    def rules(self) -> Rules:
        yield (
            not self.documents and not self.dialogues,
            _("`prepare` needs `documents` or `dialogues`; for example `dialogues: data/alpaca_zh.json`"),
        )
        yield (
            isinstance(self.held_out, float) and self.held_out < 0,
            _("held_out: {held_out} is negative").format(held_out=self.held_out),
        )
        for name, sources in (("documents", self.documents), ("dialogues", self.dialogues)):
            shares = [source.share for source in sources if source.share is not None]
            total, all_have_shares = sum(shares), bool(shares) and len(shares) == len(sources)
            yield (
                total > 1 or (all_have_shares and abs(total - 1) > 1e-6),
                _(
                    "{name}: the shares sum to {total:g}; they must leave room for the other sources, or sum to 1"
                ).format(name=name, total=total),
            )


class Vocab(Section):
    """Extend the base's tokenizer with pieces of the target script, and grow the model's rows."""

    pieces: int = setting(2000, "new pieces at most, learned from the documents", ge=0)
    tokenizer: str | None = setting(
        None,
        "instead of learning pieces: a SentencePiece tokenizer that was extended already (folder or file)",
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
    )
    words: list[str] = setting([], "domain words, each one piece, whatever script")
    special_tokens: list[str] = setting([], "special tokens, such as <|call|>")
    new_rows: Literal["subtoken_mean", "mean", "normal"] = setting(
        "subtoken_mean",
        "first values of new rows: the mean of the old pieces' rows; the mean of all; drawn anew, as in 2023",
    )
    pad_to_multiple: int = setting(64, "rows of embedding and head up to a multiple of this", ge=1)
    shrink: bool = setting(False, "drop rows that no token has")
    measure_bits: bool = setting(
        True,
        "bits per byte before any training: of the base and of the grown model",
    )

    def rules(self) -> Rules:
        made = min(self.model_fields_set & {"pieces", "words", "special_tokens", "script"}, default="")
        yield (
            self.tokenizer and made,
            _("`tokenizer` and `{made}` exclude each other: pieces that are there, or pieces to be made").format(
                made=made
            ),
        )
        yield (
            not (self.pieces or self.words or self.special_tokens),
            _("`vocab` adds nothing: `pieces` is 0 and there are no `words` and `special_tokens`"),
        )
