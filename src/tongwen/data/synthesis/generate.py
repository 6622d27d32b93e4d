"""Generate dialogues with a model: tasks like the seed examples, tasks on drawn topics, or questions about documents.

The key of a request is a hash of everything that decides it. Requests are numbered, and replies are processed in the order
of the numbers, whenever they arrive. So the journal alone decides the rows: a killed and resumed run gives the same result.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from itertools import count
from typing import Any

import yaml

from tongwen.core.errors import DataError, RowRejected
from tongwen.core.i18n import _
from tongwen.data.synthesis.journal import Reply, ReplyJournal
from tongwen.data.synthesis.parse import ParsedTask, read_blocks, read_json
from tongwen.data.synthesis.similarity import SimilarityIndex, rouge_l
from tongwen.recipe.data import Synthesize

EXAMPLES = 3  # seed tasks in a prompt, as in BELLE
TASKS = 10  # tasks per request
PIECE = 1200  # characters of a document in one prompt
LONGEST = 100  # maximal characters of an instruction with an input; 1.5 times as many if it contains an example
# Tasks that need images, files or a network, or that mention the model.
FORBIDDEN = (
    *("图像", "图片", "照片", "截图", "文件", "图表", "图层", "曲线图", "折线图", "直线图", "柱形图", "饼状图"),
    *("视频", "音频", "链接", "http", "chatgpt", "openai", "gpt-3", "gpt-4", "作为一个AI", "作为AI", "语言模型"),
)
MODEL_ADDRESS = re.compile(r"(?:请|要求|让|使用)\s*(?:GPT|AI)\s*(?:语言)?(?:模型|助手)?(?:能够|可以|来|去)?[，,：:]?")
CONTROL_TEXT = re.compile(
    "[\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufdd0-\ufdef]|<\\|[^|]{1,40}\\|>|</?s>|\\[/?INST\\]|\\[gMASK\\]"
)
SCHEMA = {
    "type": "object",
    "properties": {
        "items": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {key: {"type": "string"} for key in ("instruction", "input", "output")},
                "required": ["instruction", "input", "output"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["items"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Request:
    """One request to the endpoint. source: its inputs, for the provenance of the rows."""

    number: int
    prompt: str
    source: Any
    schema: dict[str, Any] | None = None

    def key(self, section: Synthesize) -> str:
        identity = [section.model, section.temperature, section.top_p, section.max_tokens, self.number, self.prompt]
        return hashlib.sha256(json.dumps(identity, ensure_ascii=False).encode()).hexdigest()[:32]


Complete = Callable[[Request], Awaitable[tuple[str, str, tuple[int, int]]]]
"""request -> (text, finish reason, tokens of prompt and answer)"""


@dataclass
class GeneratedDialogues:
    """The rows and rejected items of the replies so far."""

    section: Synthesize
    index: SimilarityIndex = field(default_factory=SimilarityIndex)
    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    stale: int = 0  # replies in a row without a new row

    @property
    def enough(self) -> bool:
        return len(self.rows) >= self.section.rows or self.stale >= self.section.stale

    def add_reply(self, request: Request, reply: Reply) -> None:
        """Keep the good tasks of a reply as rows, and the others with their reasons."""
        before = len(self.rows)
        items = list(_read(self.section.method, reply))
        if self.section.method == "documents":
            self._keep_dialogue(request, reply, items)
        else:
            for number, item in enumerate(items):
                self._keep(request, reply, f"{reply.key}:{number}", [item])
        self.stale = 0 if len(self.rows) > before else self.stale + 1

    def refuse(self, request: Request, reason: str, rule: str, value: Any) -> None:
        self.reasons[reason] += 1
        self.rejected.append({"request": request.number, "reason": reason, "rule": rule, "value": value})

    def _keep_dialogue(self, request: Request, reply: Reply, items: list[ParsedTask | RowRejected]) -> None:
        """Join all questions about one piece of a document to one dialogue."""
        good = [item for item in items if isinstance(item, ParsedTask)]
        for item in items:
            if isinstance(item, RowRejected):
                self._keep(request, reply, "", [item])
        if good:
            self._keep(request, reply, reply.key, good)

    def _keep(self, request: Request, reply: Reply, name: str, items: Sequence[ParsedTask | RowRejected]) -> None:
        if len(self.rows) >= self.section.rows:
            return
        turns = []
        for item in items:
            try:
                if isinstance(item, RowRejected):
                    raise item
                turns.append(_checked(item))
            except RowRejected as error:
                value = {"text": reply.text} if isinstance(item, RowRejected) else vars(item)
                self.refuse(request, error.reason, error.rule, value)
                return
        question = "\n".join(item.question for item in turns)
        near = self.index.nearest(question)
        score, likest = near[0] if near else (0.0, "")
        same = max((rouge_l(question, other) for _, other in near), default=0.0)
        if score > self.section.bm25_at_most or same > self.section.rouge_at_most:
            rule = _("BM25 {score:.1f}, ROUGE-L {same:.2f} to {likest!r}").format(
                score=score, same=same, likest=likest[:40]
            )
            self.refuse(request, "like_another", rule, {"question": question})
            return
        self.index.add(question)
        messages = [
            {"role": role, "content": text}
            for item in turns
            for role, text in (("user", item.question), ("assistant", item.output))
        ]
        meta = {
            "id": name,
            "method": self.section.method,
            "model": self.section.model,
            "endpoint": self.section.endpoint,
            "request": request.number,
            "from": request.source,
            "bm25": round(score, 2),
        }
        self.rows.append({"messages": messages, "meta": meta})


def _read(method: str, reply: Reply) -> Iterator[ParsedTask | RowRejected]:
    if method == "self_instruct":
        return read_blocks(reply.text, reply.finish, EXAMPLES + 1)
    return read_json(reply.text)


def _checked(item: ParsedTask) -> ParsedTask:
    """Return the task without phrases that address the model. Raises RowRejected."""

    task = ParsedTask(MODEL_ADDRESS.sub("", item.instruction).strip(), item.input, item.output)
    whole = f"{task.question}\n{task.output}"
    if len(task.instruction) <= 3 or not task.output:
        raise RowRejected("too_short", _("no instruction, or no answer"))
    longest = LONGEST * 3 // 2 if re.search("示例|例子", task.instruction) else LONGEST
    if task.input and len(task.instruction) >= longest:
        raise RowRejected(
            "too_long",
            _("the instruction has {count} characters").format(count=len(task.instruction)),
        )
    if found := CONTROL_TEXT.search(whole):
        raise RowRejected("control_token_in_text", _("the text contains {found!r}").format(found=found[0]))
    for word in (*FORBIDDEN, "gpt"):
        if word.lower() in (task.question if word == "gpt" else whole).lower():
            raise RowRejected("forbidden", _("it contains {word!r}").format(word=word))
    return task


async def gather(
    requests: Iterable[Request],
    generated: GeneratedDialogues,
    journal: ReplyJournal,
    complete: Complete,
    unanswered: type[Exception],
    progress: Callable[[int], None],
) -> None:
    """Send requests and process the replies in order until there are enough rows, or no more requests. An error of
    `complete` cancels all running requests; the error `unanswered` loses one request."""
    section = generated.section
    waiting = iter(requests)
    running: dict[asyncio.Task[Reply | str], Request] = {}
    done: dict[int, tuple[Request, Reply | str]] = {}
    next_number = 0

    async def get_reply(request: Request) -> Reply | str:
        key = request.key(section)
        if key in journal.replies:
            return journal.replies[key]
        journal.check_disk_space()
        try:
            reply = Reply(key, *await complete(request))
        except unanswered as error:
            return str(error)
        journal.add(reply)
        return reply

    try:
        while not generated.enough:
            # Do not run far ahead: those replies would be paid for, and perhaps not used.
            while len(running) < section.concurrency and len(running) + len(done) < 2 * section.concurrency:
                if (request := next(waiting, None)) is None:
                    break
                running[asyncio.create_task(get_reply(request))] = request
            if not running:
                return
            finished, _unused = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                request = running.pop(task)
                done[request.number] = request, task.result()
            while next_number in done and not generated.enough:
                request, reply = done.pop(next_number)
                next_number += 1
                if isinstance(reply, Reply):
                    generated.add_reply(request, reply)
                else:
                    generated.refuse(request, "unanswered", reply, {"prompt": request.prompt})
                progress(len(generated.rows))
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


# -- requests ------------------------------------------------------------------------------------------------------


def self_instruct(seeds: Sequence[ParsedTask], seed: int) -> Iterator[Request]:
    """Yield requests with three seed tasks as examples, drawn by the request's number."""
    for number in count():
        chosen = random.Random(f"{seed}:{number}").sample(range(len(seeds)), EXAMPLES)  # noqa: S311
        examples = "".join(
            f"###\n{place}. 指令: {task.instruction}\n{place}. 输入:\n{task.input or '<无输入>'}\n{place}. 输出:\n{task.output}\n"
            for place, task in enumerate((seeds[index] for index in chosen), 1)
        )
        yield Request(number, f"{_prompts()['self_instruct']}{examples}###\n{EXAMPLES + 1}. 指令:", {"seeds": chosen})


def by_topics(topics: Sequence[str], seed: int) -> Iterator[Request]:
    """Yield requests with ten topics, ten kinds of task, and lengths of questions and answers, drawn by the request's
    number."""
    prompts = _prompts()
    for number in count():
        draw = random.Random(f"{seed}:{number}")  # noqa: S311
        chosen = draw.sample(list(topics or prompts["topics"]), min(10, len(topics or prompts["topics"])))
        kinds = draw.sample(prompts["kinds"], 10)
        prompt = prompts["by_topics"].format(
            tasks=TASKS,
            topics="、".join(chosen),
            kinds="、".join(kinds),
            question=draw.randint(80, 120),
            answer=draw.randint(128, 512),
        )
        yield Request(number, prompt, {"topics": chosen, "kinds": kinds}, SCHEMA)


def about_documents(documents: Iterable[tuple[str, str]]) -> Iterator[Request]:
    """Yield requests for questions about each piece of each document. documents: (text, origin)."""
    number = count()
    for text, origin in documents:
        for begin in range(0, len(text), PIECE):
            if len(piece := text[begin : begin + PIECE].strip()) >= 40:
                yield Request(
                    next(number),
                    _prompts()["about_documents"].format(text=piece),
                    {"document": origin, "begin": begin},
                    SCHEMA,
                )


@cache  # read for each piece of a document
def _prompts() -> dict[str, Any]:
    """Return the prompts, topics, kinds of task and seeds of prompts.yaml."""
    return dict(
        yaml.safe_load((resources.files("tongwen.data.synthesis") / "prompts.yaml").read_text(encoding="utf-8"))
    )


def shipped_seeds() -> list[ParsedTask]:
    return [ParsedTask(*(row[key] for key in ("instruction", "input", "output"))) for row in _prompts()["seeds"]]


def read_seed(row: Any, place: str) -> ParsedTask:
    """Read a seed task in BELLE's format. Raises DataError."""
    value = row if isinstance(row, dict) else {}
    instances = value.get("instances")
    first = instances[0] if isinstance(instances, list) and instances and isinstance(instances[0], dict) else {}
    found = (value.get("instruction"), first.get("input", ""), first.get("output"))
    parts = zip(("instruction", "instances[0].input", "instances[0].output"), found, (False, True, False), strict=True)
    missing = [
        name for name, text, may_be_empty in parts if not isinstance(text, str) or not (text.strip() or may_be_empty)
    ]
    if missing:
        raise DataError(
            _("not a seed task: no text in {wrong}; it has {value}").format(
                wrong=_(", ").join(missing), value=_(", ").join(map(str, value)) or _("no keys")
            ),
            place=place,
            remedy='{"instruction": "…", "instances": [{"input": "", "output": "…"}]}',
        )
    return ParsedTask(*(str(text).strip() for text in found))
