"""Render a Dialogue to text and mark the spans that the model learns. Training, scoring and chat share this renderer.

A template is one Jinja file, the same text that is stored with the tokenizer as `chat_template`. The render itself
shows where the learned text is:

* our own templates carry `{% generation %}` marks; without the marks, the render must be the same text;
* for a model's own template the prompt is the render up to the answer (`add_generation_prompt`), and the learned text
  follows. A render with a sentinel in place of the answer proves that the template leaves the answer unchanged.

The environment follows transformers' (`utils/chat_template_utils.py`): sandboxed, trim_blocks, lstrip_blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from tongwen.core.errors import ModelError, RowRefused
from tongwen.core.i18n import _
from tongwen.core.records import Dialogue, Message, Span
from tongwen.core.template_cache import SENTINEL, RenderCache, make_render_cache

SHIPPED = (
    "chatml", "alpaca", "alpaca-zh", "plain", "chatglm", "belle", "belle-v2", "alpaca-cla", "alpaca-llamacpp", "guanaco", "guanaco-v1", "guanaco-chat", "vicuna",
)  # fmt: skip
GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
# Noncharacters: Unicode keeps them out of text, so they can carry marks through a render.
LEARN_FROM, LEARN_TO = "\ufdd0", "\ufdd1"
# Separates the characters of a control token in a user's text: the encoder tokenises the parts separately.
APART = "\ufdd3"


class Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: wraps its content in marks when the context sets `show_marks`."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        show = jinja2.nodes.ContextReference()
        call = self.call_method("_wrap", [show], lineno=line)
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    @staticmethod
    def _wrap(context: Any, caller: Any) -> str:
        text = str(caller())
        return f"{LEARN_FROM}{text}{LEARN_TO}" if context.get("show_marks") else text


@lru_cache(maxsize=64)
def compile_template(source: str) -> jinja2.Template:
    """Compile a Jinja template in the sandbox that transformers uses. Raises ModelError when it is not valid Jinja."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            _("the chat template is not valid Jinja: {message}").format(message=error.message),
            place=_("chat template, line {lineno}").format(lineno=error.lineno),
        ) from None


@lru_cache(maxsize=16)
def forbidden_in_text(special: tuple[str, ...]) -> tuple[str, re.Pattern[str]]:
    """Return (first characters, pattern) of the tokens and marks that no row's text may contain, the longest first."""
    tokens = sorted(filter(None, special), key=len, reverse=True)
    marks = f"{LEARN_FROM}{LEARN_TO}{SENTINEL}{APART}"
    firsts = "".join(sorted({token[0] for token in tokens})) + marks
    return firsts, re.compile("|".join([f"[{marks}]", *map(re.escape, tokens)]))


def separate_control_tokens(text: str, special: tuple[str, ...]) -> str:
    """Put APART inside every control token, so that it becomes ordinary tokens: a user's text can neither end nor open
    a turn. Raises RowRefused for a noncharacter, and for a control token of one character."""

    def separate(found: re.Match[str]) -> str:
        if len(found[0]) == 1:
            raise RowRefused("noncharacter_in_text", _("the text contains {found!r}").format(found=found[0]))
        return APART.join(found[0])

    return forbidden_in_text(special)[1].sub(separate, text)


def shipped_source(name: str) -> str:
    """Return the marked source of a template that ships with tongwen."""
    return (resources.files("tongwen.core") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Rendered:
    """One sample: its spans in order. The last is the stop token of the last answer, learned if that answer is."""

    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)

    @property
    def learns_to_stop(self) -> bool:
        """Whether the sample has a learned stop token."""
        return any(span.stop and span.learn for span in self.spans)


@dataclass(frozen=True)
class Template:
    """A chat template bound to a tokenizer's special tokens.

    source:  Jinja text, as exported with the tokenizer
    marked:  the same with generation marks, or "" for a template that tongwen does not ship
    tokens:  bos_token, eos_token, ... that the template uses
    special: texts of all special tokens: none of them may occur in a row's own text
    stop:    text of the token that ends an answer
    appended: the stop is not rendered with the answer (GLM-4: the next `<|user|>` is the stop)
    """

    name: str
    source: str
    marked: str
    tokens: dict[str, str]
    special: tuple[str, ...]
    stop: str = ""
    appended: bool = False
    skeletons: dict[Any, RenderCache | None] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def make(
        cls, name: str, own_source: str | None, tokens: dict[str, str], special: Iterable[str], prefix: str = ""
    ) -> Template:
        """Bind a template: `own`, a shipped name, or a .jinja file.

        prefix: text that the tokenizer itself puts before every text (`<s>`); our own templates write it once.
        Raises ModelError when the tokenizer has no template, or cannot express this one.
        """
        marked = ""
        if name == "own":
            if not own_source:
                raise ModelError(
                    _("the model has no chat template of its own"),
                    place="template: own",
                    remedy=_("choose one: template: {shipped} (a base model: chatml or alpaca)").format(
                        shipped=" | ".join(SHIPPED)
                    ),
                )
            source = own_source
        else:
            text = shipped_source(name) if name in SHIPPED else _read_template(name)
            text = text.replace("@prefix@", prefix.replace("\\", "\\\\").replace("'", "\\'"))
            if GENERATION_TAG.search(text):
                marked = text
            source = GENERATION_TAG.sub("", text)
        template = cls(name, source, marked, dict(tokens), tuple(special))
        template = template._with_stop()
        template._check_expressible()
        if marked:
            template._check_marks()
        return template

    # -- rendering ------------------------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), thinking: bool = False) -> str:
        """Return the text up to the answer: the input of inference, and the prompt of training. Control tokens in message
        texts are separated, for `Encoder.encode_prompt`."""
        apart = [
            replace(
                message,
                content=separate_control_tokens(message.content, self.special),
                thinking=message.thinking and separate_control_tokens(message.thinking, self.special),
            )
            for message in messages
        ]
        return self._render(apart, tools, thinking, add_generation_prompt=True)

    def samples(self, dialogue: Dialogue, learn: str = "assistant", thinking: str = "mixed") -> list[Rendered]:
        """Return the samples of a dialogue: one, or one per answer if the template renders earlier answers
        differently from the last one (thinking models drop earlier thinking).

        learn: assistant | last_answer | everything; thinking: on | off | mixed.
        Raises RowRefused with a reason when this dialogue cannot be rendered faithfully.
        """
        self._refuse_control_tokens(dialogue.messages)
        if (skeleton := self._skeleton(dialogue, learn, thinking)) and skeleton.fits(dialogue.messages):
            return [Rendered(spans) for spans in skeleton.fill(dialogue.messages)]
        return self._samples(dialogue, learn, thinking)

    def _samples(self, dialogue: Dialogue, learn: str, thinking: str, prove: bool = True) -> list[Rendered]:
        messages = _with_thinking(dialogue.messages, thinking)
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        if not answers:
            raise RowRefused("no_answer", _("the dialogue has no answer to learn"))
        chosen = answers[-1:] if learn == "last_answer" else answers
        learned = {index for index in chosen if messages[index].learn is not False}
        learned |= {index for index in answers if messages[index].learn is True}
        if not learned and learn != "everything":
            raise RowRefused("nothing_to_learn", _("learning is turned off for every answer"))
        messages = messages[: answers[-1] + 1]
        turns = [self._turn(messages[: index + 1], dialogue.tools, prove) for index in answers]
        samples = self._join_turns(turns, answers, learned)
        if learn == "everything":
            samples = [Rendered(tuple(span._replace(learn=True) for span in sample.spans)) for sample in samples]
        return samples

    def _skeleton(self, dialogue: Dialogue, learn: str, thinking: str) -> RenderCache | None:
        """Return the cached render of this dialogue's shape, made once; None for shapes that are rendered one by one."""
        if dialogue.tools or any(
            message.thinking or message.tool_calls or message.name or message.tool_call_id
            for message in dialogue.messages
        ):
            return None
        shape = (*((message.role, message.learn) for message in dialogue.messages), learn, thinking)
        if shape not in self.skeletons:
            self.skeletons[shape] = make_render_cache(
                dialogue.messages,
                lambda messages, prove: [
                    sample.spans
                    for sample in self._samples(replace(dialogue, messages=messages), learn, thinking, prove)
                ],
            )
        return self.skeletons[shape]

    def _turn(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], prove: bool = True
    ) -> tuple[str, str]:
        """Return (prompt, answer with its stop) of the last message. A sentinel in its place checks the split."""
        last = messages[-1]
        think = bool(last.thinking)
        prompt = self._render(messages[:-1], tools, think, add_generation_prompt=True)
        whole = self._render(messages, tools, think)
        if not whole.startswith(prompt):
            raise ModelError(
                _("the template renders the full dialogue differently from its prompt"),
                place=f"template {self.name}",
                remedy=_("choose another template, for example `template: chatml`"),
            )
        if last.thinking and last.thinking.strip() not in whole[len(prompt) :]:
            # The template does not know `reasoning_content`: the thinking is part of the answer's own text.
            inside = replace(
                last, thinking=None, content=f"<think>\n{last.thinking.strip()}\n</think>\n\n{last.content}"
            )
            return self._turn([*messages[:-1], inside], tools, prove)
        if prove:
            self._check_answer_unchanged(messages, tools, think, whole)
        answer = whole[len(prompt) :]
        if self.appended:
            return prompt, answer + self.stop
        end = answer.find(self.stop)
        if end < 0:
            raise RowRefused(
                "no_stop",
                _("the answer is rendered without its stop token {stop!r}").format(stop=self.stop),
            )
        return prompt, answer[: end + len(self.stop)]

    def _join_turns(self, turns: list[tuple[str, str]], answers: list[int], learned: set[int]) -> list[Rendered]:
        """Return one sample if each turn's text begins with the turns before it, else one sample per learned turn."""
        spans: list[Span] = []
        text = ""
        for (prompt, answer), index in zip(turns, answers, strict=True):
            if not prompt.startswith(text):
                return [
                    Rendered((Span(prompt, False), *self._answer_spans(answer, True)))
                    for (prompt, answer), index in zip(turns, answers, strict=True)
                    if index in learned
                ]
            spans += [Span(prompt[len(text) :], False), *self._answer_spans(answer, index in learned)]
            text = prompt + answer
        return [Rendered(tuple(spans))]

    def _answer_spans(self, answer: str, learn: bool) -> tuple[Span, Span]:
        return Span(answer[: -len(self.stop)], learn, answer=True), Span(self.stop, learn, answer=True, stop=True)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        thinking: bool,
        add_generation_prompt: bool = False,
        marks: bool = False,
    ) -> str:
        try:
            return compile_template(self.marked if marks else self.source).render(
                messages=[message.to_dict() for message in messages],
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=thinking,
                show_marks=marks,
                **self.tokens,
            )
        except jinja2.TemplateError as error:
            raise RowRefused(
                "template_refuses", _("the template refuses this dialogue: {error}").format(error=error)
            ) from None
        except (TypeError, KeyError, AttributeError, IndexError, ValueError, OverflowError) as error:
            raise RowRefused(
                "template_fails",
                _("the template fails on this dialogue: {type}: {error}").format(
                    type=type(error).__name__, error=error
                ),
            ) from None

    # -- proofs ---------------------------------------------------------------------------------------------------

    def _check_answer_unchanged(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], thinking: bool, whole: str
    ) -> None:
        """Check that the render contains the answer unchanged (or trimmed), exactly where a sentinel would be.

        Raises ModelError otherwise."""
        last = messages[-1]
        if not last.content.strip():
            return
        probe = self._render([*messages[:-1], replace(last, content=SENTINEL)], tools, thinking)
        if probe.count(SENTINEL) == 1:
            head, tail = probe.split(SENTINEL)
            for content in (last.content, last.content.strip(), last.content.lstrip(), last.content.rstrip()):
                if whole == head + content + tail:
                    return
        if "</think>" in last.content and last.content.rsplit("</think>", 1)[1].strip() in whole:
            return  # a thinking template rearranges the thinking inside the answer's own text
        raise ModelError(
            _(
                "the template changes the text of an answer, so the model would not learn what the data says: {last!r}"
            ).format(last=last.content[:40]),
            place=f"template {self.name}",
            remedy=_("choose another template, for example `template: chatml`"),
        )

    def _check_marks(self) -> None:
        """Check that our own marks enclose exactly the learned text of the render, and leave the text unchanged."""
        messages = [Message("user", "A"), Message("assistant", "B"), Message("user", "C"), Message("assistant", "D")]
        marked = self._render(messages, (), False, marks=True)
        unmarked = marked.replace(LEARN_FROM, "").replace(LEARN_TO, "")
        inside = [part.split(LEARN_TO)[0] for part in marked.split(LEARN_FROM)[1:]]
        learned = [answer for _, answer in (self._turn(messages[: end + 1], ()) for end in (1, 3))]
        if unmarked != self._render(messages, (), False) or inside != learned:
            raise ModelError(
                _("the template marks {inside}, but the render teaches {learned}").format(
                    inside=inside, learned=learned
                ),
                place=f"template {self.name}",
                remedy=_("mark exactly the answer and its stop token"),
            )

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        """Raise RowRefused for control tokens in a message: they would end the answer, or open a turn, in the middle."""
        firsts, forbidden = forbidden_in_text(self.special)
        for message in messages:
            for text in (message.content, message.thinking or ""):
                for first in firsts:  # a search for one character is much cheaper than the pattern
                    if first in text:
                        break
                else:
                    continue
                if not (found := forbidden.search(text)):
                    continue
                if found[0] in self.special:
                    raise RowRefused(
                        "control_token_in_text",
                        _("the text contains the control token {found!r}").format(found=found[0]),
                    )
                raise RowRefused(
                    "noncharacter_in_text",
                    _("the text contains a Unicode noncharacter"),
                )

    def _with_stop(self) -> Template:
        """Find the stop token: the special token after the first of two answers, or after the last answer if the template
        writes none after earlier ones."""
        ask, reply = Message("user", "A"), Message("assistant", SENTINEL)
        try:
            one = self._render([ask, reply], (), False)
            two = self._render([ask, reply, ask, reply], (), False)
        except RowRefused as error:
            raise ModelError(error.rule, place=f"template {self.name}") from None
        if two.count(SENTINEL) != 2 or one.count(SENTINEL) != 1:
            raise ModelError(
                _("the template does not show each answer exactly once"),
                place=f"template {self.name}",
                remedy=_("choose another template, for example `template: chatml`"),
            )
        between, last = two.split(SENTINEL)[1].lstrip(), one.split(SENTINEL)[1].lstrip()
        found = [token for token in self.special if token and between.startswith(token)]
        found = found or [token for token in self.special if token and last.startswith(token)]
        if not found:
            raise ModelError(
                _(
                    "this template writes no special stop token after an answer (it writes {between!r}), so the model would never learn to stop"
                ).format(between=between[:20]),
                place=f"template {self.name}",
                remedy=_("choose one of: {shipped}").format(shipped=_(", ").join(SHIPPED)),
            )
        stop = max(found, key=len)
        return replace(self, stop=stop, appended=not last.startswith(stop))

    def _check_expressible(self) -> None:
        """Raise ModelError unless all control tokens that the template writes are single tokens of this tokenizer."""
        text = self._render([Message("user", "A"), Message("assistant", "B")], (), False)
        missing = sorted({found for found in re.findall(r"<\|[A-Za-z_]+\|>", text) if found not in self.special})
        if missing:
            raise ModelError(
                _("the tokenizer has no token {missing}, which the template writes").format(missing=", ".join(missing)),
                place=f"template {self.name}",
                remedy=_("choose a plain-text template: `template: alpaca` or `template: plain`"),
            )


def _with_thinking(messages: Sequence[Message], thinking: str) -> list[Message]:
    if thinking == "off":
        return [replace(message, thinking=None) for message in messages]
    if thinking == "on" and any(message.role == "assistant" and not message.thinking for message in messages[-1:]):
        raise RowRefused(
            "no_thinking",
            _("`thinking: on`, but the last answer has no thinking"),
        )
    return list(messages)


def _read_template(name: str) -> str:
    path = Path(name)
    if path.suffix in (".jinja", ".j2") and path.is_file():
        return path.read_text(encoding="utf-8")
    raise ModelError(
        _("there is no template {name!r}").format(name=name),
        place="template",
        remedy=_("one of: own, {shipped}, or a .jinja file").format(shipped=_(", ").join(SHIPPED)),
    )
