"""Render a Dialogue to text and mark the spans that the model learns. Training, scoring and chat share this renderer.

A template is one Jinja file, the same text that is stored with the tokenizer as `chat_template`. The render itself
shows where the learned text is:

* our own templates carry `{% generation %}` marks; without the marks, the render must be the same text;
* for a model's own template the prompt is the render up to the answer (`add_generation_prompt`), and the learned text
  follows. A render with a sentinel in every part of the row proves that the template shows each of them, at its place.

The environment follows transformers' (`utils/chat_template_utils.py`): sandboxed, trim_blocks, lstrip_blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, lru_cache
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

from tongwen.core.errors import ModelError, RowRefused
from tongwen.core.i18n import _
from tongwen.core.records import Dialogue, Message, Span
from tongwen.core.render_proof import Planted, lost_part, plant, shape_of, shows, values_of
from tongwen.core.row_spelling import OTHERS, USUAL, Spelling, Tools, Turn, spell, spellings
from tongwen.core.template_cache import SENTINEL, RenderCache, make_render_cache
from tongwen.core.template_guard import GUARD, IS_POSSIBLE, TemplateFailure

SHIPPED = (
    "chatml", "alpaca", "alpaca-zh", "plain", "chatglm", "belle", "belle-v2", "alpaca-cla", "alpaca-llamacpp", "guanaco", "guanaco-v1", "guanaco-chat", "vicuna",
)  # fmt: skip
GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
# Noncharacters: Unicode keeps them out of text, so they can carry marks through a render.
LEARN_FROM, LEARN_TO = "\ufdd0", "\ufdd1"
# Separates the characters of a control token in a user's text: the encoder tokenises the parts separately.
APART = "\ufdd3"
# The end of a prompt that opens a block of thinking, or writes an empty one.
THINKING_BLOCK = re.compile(
    r"(?P<open><\|START_THINKING\|>|[<\[◁][^<>\[\]◁▷|/\s]*think[^<>\[\]◁▷|\s]*[>\]▷])(?P<gap>\s*)(?P<close>(?:<\|END_THINKING\|>|[<\[◁]/[^<>\[\]◁▷\s]*think[^<>\[\]◁▷\s]*[>\]▷])\s*)?\Z",
    re.IGNORECASE,
)
TAGS = frozenset("<[◁")  # begin a tag: such a content is never rendered from a skeleton
OWN_THINKING = re.compile(r"reasoning|thinking|thought", re.IGNORECASE)
EMPTY_BLOCK = re.compile(r"[<\[][^\s>\]]+[>\]]\s*(?:\w+\s*)?[<\[][^\s>\]]+[>\]]\s*")
SIMPLE = {"role", "content", "learn"}  # keys of a turn that every template reads in one way
ANSWER: Turn = {"role": "assistant", "content": "A"}
PLAIN = "aBc"
TRIES = 2  # rows of one outline for which all spellings are tried in vain
SHAPES = 10_000  # proofs that are kept


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


@lru_cache(maxsize=16)
def shipped_forms(special: tuple[str, ...]) -> frozenset[str]:
    """Return the sources of our own templates as they are exported with a tokenizer of these special tokens."""
    sources = [GENERATION_TAG.sub("", shipped_source(name)) for name in SHIPPED]
    return frozenset(_with_prefix(source, prefix) for source in sources for prefix in ("", *special[:8]))


def _with_prefix(source: str, prefix: str) -> str:
    return source.replace("@prefix@", prefix.replace("\\", "\\\\").replace("'", "\\'"))


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


class RenderedTurn(NamedTuple):
    """One answer: its prompt as at inference, its text, and the token that ends it."""

    prompt: str
    answer: str
    stop: str

    def spans(self, learn: bool) -> tuple[Span, Span]:
        return Span(self.answer, learn, answer=True), Span(self.stop, learn, answer=True, stop=True)


class TurnShape(NamedTuple):
    """What the template writes around the last answer of rows of one shape. appended: the stop is not in the render;
    after: what follows the stop; head, tail: what stands before the first and behind the last part of the answer."""

    stop: str
    appended: bool
    after: str
    head: str
    tail: str

    def shows_only_content(self, turn: Turn, answer: str) -> bool:
        """Whether the answer is the content as it is, or trimmed, between head and tail."""
        return any(answer == self.head + text + self.tail for text in _trims(turn["content"]))


@dataclass(frozen=True)
class Template:
    """A chat template bound to a tokenizer's special tokens.

    source:  Jinja text, as exported with the tokenizer
    marked:  the same with generation marks, or "" for a template that tongwen does not ship
    tokens:  bos_token, eos_token, ... that the template uses
    special: texts of all special tokens: none of them may occur in a row's own text
    stop:    text of the token that ends an answer
    appended: the stop is not rendered with the answer (GLM-4: the next `<|user|>` is the stop)
    stops:   tokens that end an answer in a render: the last one, and earlier ones where the template ends them otherwise
    usual:   the spelling of rows without thinking and tools
    shapes, spellings, failures, prompts: what is proven of the shapes of rows
    """

    name: str
    source: str
    marked: str
    tokens: dict[str, str]
    special: tuple[str, ...]
    stop: str = ""
    appended: bool = False
    stops: tuple[str, ...] = ()
    usual: Spelling = USUAL
    skeletons: dict[Any, RenderCache | None] = field(default_factory=dict, compare=False, repr=False)
    shapes: dict[Any, TurnShape | RowRefused] = field(default_factory=dict, compare=False, repr=False)
    spellings: dict[Any, list[Spelling]] = field(default_factory=dict, compare=False, repr=False)
    failures: dict[Any, int] = field(default_factory=dict, compare=False, repr=False)
    prompts: dict[Any, Spelling] = field(default_factory=dict, compare=False, repr=False)

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
            text = _with_prefix(text, prefix)
            if GENERATION_TAG.search(text):
                marked = text
            source = GENERATION_TAG.sub("", text)
        template = cls(name, source, marked, dict(tokens), tuple(special))
        template = template._with_stop()
        template._check_expressible()
        if marked:
            template._check_marks()
        return template

    @cached_property
    def _renders_here(self) -> bool:
        """Whether the template is known to be harmless: then it needs no process of its own."""
        return not IS_POSSIBLE or self.name in SHIPPED or self.source in shipped_forms(self.special)

    # -- rendering ------------------------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), thinking: bool = False) -> str:
        """Return the text up to the answer: the input of inference, and the prompt of training. Control tokens in message
        texts are separated, for `Encoder.encode_prompt`."""
        turns = [
            replace(
                message,
                content=separate_control_tokens(message.content, self.special),
                thinking=message.thinking and separate_control_tokens(message.thinking, self.special),
            ).to_dict()
            for message in messages
        ]
        return self._render(turns, tools, self._spelling_of_prompt(turns, tools), thinking, add_generation_prompt=True)

    def samples(self, dialogue: Dialogue, learn: str = "assistant", thinking: str = "mixed") -> list[Rendered]:
        """Return the samples of a dialogue: one, or one per answer if the template renders earlier answers
        differently from the last one (thinking models drop earlier thinking).

        learn: assistant | last_answer | everything; thinking: on | off | mixed.
        Raises RowRefused with a reason when this dialogue cannot be rendered faithfully.
        """
        self._refuse_control_tokens(dialogue)
        opens_tag = any(message.content.lstrip()[:1] in TAGS for message in dialogue.messages if message.content)
        if (
            not opens_tag
            and (skeleton := self._skeleton(dialogue, learn, thinking))
            and skeleton.fits(dialogue.messages)
        ):
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
        turns = [message.to_dict() for message in messages[: answers[-1] + 1]]
        rendered = self._render_turns(turns, dialogue.tools, answers, prove)
        samples = _join_turns(rendered, answers, learned)
        if learn == "everything":
            samples = [Rendered(tuple(span._replace(learn=True) for span in sample.spans)) for sample in samples]
        return samples

    def _skeleton(self, dialogue: Dialogue, learn: str, thinking: str) -> RenderCache | None:
        """Return the cached render of this dialogue's shape, made once; None for shapes that are rendered one by one."""
        if dialogue.tools or any(message.to_dict().keys() - SIMPLE for message in dialogue.messages):
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

    def _render_turns(
        self, turns: list[Turn], tools: Tools, answers: Sequence[int], prove: bool = True
    ) -> list[RenderedTurn]:
        """Return every answer with its prompt, in the first spelling of the row that shows all its parts.

        Raises RowRefused with what the usual spelling lacks when there is none."""
        refusals: list[RowRefused] = []
        known = self.spellings.setdefault(_outline(turns, tools), [])
        for form in [turns, apart] if (apart := _split_thinking(turns, prove)) else [turns]:
            for spelling in chain(tuple(known), self._untried(form, tools, known)):
                try:
                    out = [self._turn(form[: index + 1], tools, spelling, prove) for index in answers]
                except RowRefused as error:
                    refusals.append(error)
                    continue
                if spelling not in known:
                    known.append(spelling)
                return out
        told = [error for error in refusals if error.reason != "template_fails"] or refusals
        raise told[0]

    def _untried(self, turns: list[Turn], tools: Tools, known: Sequence[Spelling]) -> Iterator[Spelling]:
        """Yield the spellings to try after the known ones; only the usual one where all others failed before."""
        outline = _outline(turns, tools)
        inline = self._takes_thinking_inline
        for number, spelling in enumerate(spellings(turns, tools, self.usual)):
            if spelling.thinking == "inline" and not inline:
                continue
            if number and self.failures.get(outline, 0) >= TRIES:
                return
            if spelling not in known:
                yield spelling
        self.failures[outline] = self.failures.get(outline, 0) + 1

    @property
    def _takes_thinking_inline(self) -> bool:
        """Whether an answer's text may hold thinking as `<think>`: not where the template has another form for it."""
        return "think>" in self.source or not any(map(OWN_THINKING.search, _words_read(self.source)))

    def _spelling_of_prompt(self, turns: list[Turn], tools: Tools) -> Spelling:
        """Return the first spelling in which the prompt shows every part of these turns, else the usual one."""
        if not tools and not any(turn.keys() - SIMPLE for turn in turns):
            return self.usual
        shape = shape_of(turns, tools)
        if shape not in self.prompts:
            planted = plant([*turns, ANSWER], tools)
            self.prompts[shape] = self.usual
            for spelling in spellings(turns, tools, self.usual):
                try:
                    prompt = self._render(
                        planted.turns[:-1], planted.tools, spelling, False, add_generation_prompt=True
                    )
                except RowRefused:
                    continue
                if lost_part(planted, prompt, planted.turns[-1]["content"]) is None:
                    self.prompts[shape] = spelling
                    break
        return self.prompts[shape]

    def _turn(self, turns: list[Turn], tools: Tools, spelling: Spelling, prove: bool = True) -> RenderedTurn:
        """Return the last turn with its prompt. Raises RowRefused unless every part of the row is where it belongs."""
        shape = self._prove_shape(turns, tools, spelling)
        prompt, answer = self._split(turns, tools, spelling)
        ending = "" if shape.appended else shape.stop
        if not answer.endswith(ending + shape.after):
            raise RowRefused(
                "no_stop", _("the answer is rendered without its stop token {stop!r}").format(stop=shape.stop)
            )
        answer = answer[: len(answer) - len(ending) - len(shape.after)]
        if prove:
            self._check_values(turns, prompt, answer)
            if not shape.shows_only_content(turns[-1], answer):
                self._check_answer_unchanged(turns, tools, spelling, answer)
        return RenderedTurn(prompt, answer, shape.stop)

    def _split(self, turns: list[Turn], tools: Tools, spelling: Spelling) -> tuple[str, str]:
        """Return (prompt as at inference, the render that continues it)."""
        last = turns[-1]
        thinking = bool(last.get("reasoning_content")) and spelling.thinking != "inline"
        prompt = self._render(turns[:-1], tools, spelling, thinking, add_generation_prompt=True)
        whole = self._render(turns, tools, spelling, thinking)
        question = turns[-2]["content"] if len(turns) > 1 else ""
        answer = _continuation(prompt, whole, question, last.get("reasoning_content") or "")
        if answer is not None:
            return prompt, answer
        raise RowRefused(
            "prompt_differs",
            _("the template renders the full dialogue differently from its prompt; choose another `template`"),
        )

    def _render(
        self,
        turns: Sequence[Turn],
        tools: Tools,
        spelling: Spelling,
        thinking: bool,
        add_generation_prompt: bool = False,
        marks: bool = False,
    ) -> str:
        messages, definitions = spell(turns, tools, spelling)
        context = {
            "messages": messages,
            "tools": definitions,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "enable_thinking": thinking,
            "thinking": thinking,  # the same word in DeepSeek's and Granite's templates
            "show_marks": marks,
            **self.tokens,
        }
        try:
            if self._renders_here:
                return compile_template(self.marked if marks else self.source).render(context)
            return GUARD.render(self.source, self.name, context)
        except jinja2.TemplateError as error:
            raise RowRefused(
                "template_refuses", _("the template refuses this dialogue: {error}").format(error=error)
            ) from None
        except (TypeError, KeyError, AttributeError, IndexError, ValueError, OverflowError) as error:
            raise RowRefused(
                "template_fails",
                _("the template fails on this dialogue: {type}: {error}").format(
                    type=error.kind if isinstance(error, TemplateFailure) else type(error).__name__, error=error
                ),
            ) from None

    # -- proofs ---------------------------------------------------------------------------------------------------

    def _prove_shape(self, turns: list[Turn], tools: Tools, spelling: Spelling) -> TurnShape:
        """Return how the last turn of such rows ends, or raise RowRefused: proven once per shape of row and spelling."""
        key = (spelling, *shape_of(turns, tools))
        found = self.shapes.get(key)
        if found is None:
            if len(self.shapes) >= SHAPES:
                self.shapes.clear()
            try:
                found = self._learn_shape(turns, tools, spelling)
            except RowRefused as error:
                found = error
            self.shapes[key] = found
        if isinstance(found, RowRefused):
            raise RowRefused(found.reason, found.rule)
        return found

    def _learn_shape(self, turns: list[Turn], tools: Tools, spelling: Spelling) -> TurnShape:
        planted = plant(turns, tools)
        shown = planted.of(len(turns) - 1)
        if all(part.kind == "thinking" for part in shown):
            raise RowRefused("empty_answer", _("turn {turn}: the answer is empty").format(turn=len(turns)))
        prompt, answer = self._split(planted.turns, planted.tools, spelling)
        if part := lost_part(planted, prompt, answer):
            raise RowRefused(
                "part_lost",
                _("the template does not render {part}; {remedy}").format(part=part.place, remedy=_remedy(part.kind)),
            )
        begin = min(answer.find(part.sentinel) for part in shown)
        end = max(answer.rfind(part.sentinel) + len(part.sentinel) for part in shown)
        tail = answer[end:]
        calls = bool(turns[-1].get("tool_calls"))
        stop, at = self._find_stop(tail, calls)
        if at < 0:  # the next turn begins with the stop
            stop = self._stop_before_tool(planted, spelling, prompt + answer) if calls else self.stop
            return TurnShape(stop, True, "", answer[:begin], tail)
        return TurnShape(stop, False, tail[at + len(stop) :], answer[:begin], tail[:at])

    def _find_stop(self, tail: str, calls: bool) -> tuple[str, int]:
        """Return (stop token, its place) in the text after an answer; the place is -1 if the text has none."""
        places = [(place, -len(stop), stop) for stop in self.stops if (place := tail.find(stop)) >= 0]
        if places:
            place, _length, stop = min(places)
            return stop, place
        if not self.appended and calls:  # a call may end with a token of its own
            places = [
                (place + len(token), len(token), token)
                for token in self.special
                if token and (place := tail.rfind(token)) >= 0
            ]
            if places:
                place, length, stop = max(places)
                return stop, place - length
        if self.appended:
            return self.stop, -1
        raise RowRefused("no_stop", _("the answer is rendered without its stop token {stop!r}").format(stop=self.stop))

    def _stop_before_tool(self, planted: Planted, spelling: Spelling, whole: str) -> str:
        """Return the control token that a tool's answer begins with: there the model stops after a call."""
        result = {"role": "tool", "content": SENTINEL}
        try:
            longer = self._render([*planted.turns, result], planted.tools, spelling, False)
        except RowRefused:
            return self.stop
        after = longer[len(whole) :].lstrip() if longer.startswith(whole) else ""
        return max((token for token in self.special if token and after.startswith(token)), key=len, default=self.stop)

    def _check_values(self, turns: list[Turn], prompt: str, answer: str) -> None:
        """Raise RowRefused unless the render shows the values of this row: a template may cut some, such as text before
        `</think>`."""
        if not turns[-1]["content"].strip() and not turns[-1].get("tool_calls"):
            raise RowRefused("empty_answer", _("turn {turn}: the answer is empty").format(turn=len(turns)))
        at = 0
        for number, turn in enumerate(turns, 1):
            last = number == len(turns)
            for kind, value in values_of(turn):
                if last:
                    shown = shows(answer, kind, value)
                elif kind == "thinking":
                    shown = True
                elif kind == "content" and turn["role"] == "assistant":
                    value = value.rsplit("</think>", 1)[-1].strip()
                    found = prompt.find(value, at)
                    shown, at = found >= 0, max(at, found)
                else:
                    shown = shows(prompt, "call", value)
                if not shown:
                    raise RowRefused(
                        "part_lost",
                        _(
                            "turn {turn}: the template does not render {text!r} as the row has it; choose another `template`, or change the text"
                        ).format(turn=number, text=value.strip()[:40]),
                    )

    def _check_answer_unchanged(self, turns: list[Turn], tools: Tools, spelling: Spelling, answer: str) -> None:
        """Check that the render has the answer unchanged (or trimmed), exactly where a sentinel would be. Raises RowRefused
        otherwise."""
        last = turns[-1]
        content = last["content"]
        if not content.strip() or "</think>" in content or last.get("tool_calls") or last.get("reasoning_content"):
            return  # found by their own sentinels; a thinking template rearranges thinking inside the answer's own text
        probe = self._split([*turns[:-1], {**last, "content": SENTINEL}], tools, spelling)[1]
        head, found, tail = probe.partition(SENTINEL)
        if found and any(
            answer.startswith(head + text) and tail.startswith(answer[len(head + text) :]) for text in _trims(content)
        ):
            return
        raise RowRefused(
            "answer_changed",
            _(
                "the template changes the text of an answer, so the model would not learn what the data says: {last!r}; choose another `template`"
            ).format(last=content[:40]),
        )

    def _check_marks(self) -> None:
        """Check that our own marks enclose exactly the learned text of the render, and leave the text unchanged."""
        turns = [_say("user", "A"), _say("assistant", "B"), _say("user", "C"), _say("assistant", "D")]
        marked = self._render(turns, (), self.usual, False, marks=True)
        unmarked = marked.replace(LEARN_FROM, "").replace(LEARN_TO, "")
        inside = [part.split(LEARN_TO)[0] for part in marked.split(LEARN_FROM)[1:]]
        learned = [turn.answer + turn.stop for turn in self._render_turns(turns, (), (1, 3))]
        if unmarked != self._render(turns, (), self.usual, False) or inside != learned:
            raise ModelError(
                _("the template marks {inside}, but the render teaches {learned}").format(
                    inside=inside, learned=learned
                ),
                place=f"template {self.name}",
                remedy=_("mark exactly the answer and its stop token"),
            )

    def _refuse_control_tokens(self, dialogue: Dialogue) -> None:
        """Raise RowRefused for control tokens in a row: they would end the answer, or open a turn, in the middle."""
        firsts, forbidden = forbidden_in_text(self.special)
        for text in _texts(dialogue):
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
        """Find the stop token: the special token after the last answer, or the one after an earlier answer if the template
        writes none after the last (the next turn begins with it)."""
        ask, reply = _say("user", "A"), _say("assistant", SENTINEL)
        one, two, usual = "", "", self.usual
        for content in OTHERS["content"]:
            usual = replace(self.usual, content=content)
            try:
                one = self._render([ask, reply], (), usual, False)
                two = self._render([ask, reply, ask, reply], (), usual, False)
                plain = self._render([ask, _say("assistant", PLAIN)], (), usual, False)
            except RowRefused as error:
                refusal = error
                continue
            if two.count(SENTINEL) == 2 and one.count(SENTINEL) == 1:
                break
        else:
            if not two:
                raise ModelError(refusal.rule, place=f"template {self.name}") from None
            raise ModelError(
                _("the template does not show each answer exactly once"),
                place=f"template {self.name}",
                remedy=_("choose another template, for example `template: chatml`"),
            )
        if PLAIN not in plain:
            raise ModelError(
                _(
                    "the template changes the text of an answer, so the model would not learn what the data says: {last!r}"
                ).format(last=PLAIN),
                place=f"template {self.name}",
                remedy=_("choose another template, for example `template: chatml`"),
            )
        between, last = two.split(SENTINEL)[1].lstrip(), one.split(SENTINEL)[1].lstrip()
        inner, final = self._first_special(between), self._first_special(last)
        if not inner and not final:
            raise ModelError(
                _(
                    "this template writes no special stop token after an answer (it writes {between!r}), so the model would never learn to stop"
                ).format(between=between[:20]),
                place=f"template {self.name}",
                remedy=_("choose one of: {shipped}").format(shipped=_(", ").join(SHIPPED)),
            )
        stops = tuple(dict.fromkeys(filter(None, (final, inner))))
        return replace(self, stop=stops[0], stops=stops, appended=not final, usual=usual)

    def _first_special(self, text: str) -> str:
        return max((token for token in self.special if token and text.startswith(token)), key=len, default="")

    def _check_expressible(self) -> None:
        """Raise ModelError unless all control tokens that the template writes are single tokens of this tokenizer."""
        text = self._render([_say("user", "A"), _say("assistant", "B")], (), self.usual, False)
        missing = sorted({found for found in re.findall(r"<\|[A-Za-z_]+\|>", text) if found not in self.special})
        if missing:
            raise ModelError(
                _("the tokenizer has no token {missing}, which the template writes").format(missing=", ".join(missing)),
                place=f"template {self.name}",
                remedy=_("choose a plain-text template: `template: alpaca` or `template: plain`"),
            )


@lru_cache(maxsize=16)
def _words_read(source: str) -> frozenset[str]:
    """Return the variables, attributes and keys that a template reads."""
    tree = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=[Generation, "jinja2.ext.loopcontrols"]).parse(
        source
    )
    names = {node.name for node in tree.find_all(jinja2.nodes.Name)}
    names |= {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    return frozenset(
        names | {str(node.value) for node in tree.find_all(jinja2.nodes.Const) if str(node.value).isidentifier()}
    )


def _say(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _remedy(kind: str) -> str:
    """Return what a user can do about a part that a template does not render."""
    if kind in ("call", "tool"):
        return _("`template: chatml` renders tools and calls")
    if kind == "thinking":
        return _("choose another `template`, or `thinking: off`")
    return _("choose another `template`")


def _trims(text: str) -> tuple[str, ...]:
    return text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"), text.lstrip("\n")


def _texts(dialogue: Dialogue) -> Iterator[str]:
    """Yield the texts of a row that go through the template; tools and calls as JSON."""
    for message in dialogue.messages:
        yield message.content
        if message.thinking:
            yield message.thinking
        if message.tool_calls:
            yield json.dumps(message.tool_calls, ensure_ascii=False)
    if dialogue.tools:
        yield json.dumps(dialogue.tools, ensure_ascii=False)


def _outline(turns: Sequence[Turn], tools: Tools) -> tuple[Any, ...]:
    """Return what decides in which spelling a template reads a row."""
    return bool(tools), frozenset(
        (turn["role"], bool(turn["content"]), bool(turn.get("reasoning_content")), len(turn.get("tool_calls") or ()))
        for turn in turns
    )


def _split_thinking(turns: list[Turn], prove: bool) -> list[Turn] | None:
    """Return the turns with the text before `</think>` as their thinking: the raw output of a model whose prompt opened the
    block. None if no answer has such text."""
    if not prove or not any(turn["role"] == "assistant" and "</think>" in turn["content"] for turn in turns):
        return None
    out = []
    for turn in turns:
        thinking, found, answer = turn["content"].partition("</think>")
        if turn["role"] == "assistant" and found and not turn.get("reasoning_content") and answer.strip():
            thinking = thinking.strip().removeprefix("<think>").strip()
            turn = {**turn, "content": answer.lstrip(), "reasoning_content": thinking}
        out.append(turn)
    return out


def _continuation(prompt: str, whole: str, question: str, thinking: str) -> str | None:
    """Return what follows the prompt in the render of the whole dialogue, None if the two differ.

    A prompt may open a block of thinking that the render of an answer lacks: the thinking and the end of the block are
    written as the model is to write them. It may write an empty block: then the answer alone is what follows.
    """
    rest = _after(prompt, whole, question)
    block = THINKING_BLOCK.search(prompt)
    if not block:
        return rest if rest is not None else _after_empty_block(prompt, whole, thinking)
    opening, gap = block["open"], block["gap"]
    closing = opening.replace("START", "END") if "START" in opening else f"{opening[0]}/{opening[1:]}"
    thinking = thinking.strip()
    if rest is None:
        rest = _after(prompt[: block.start()], whole, question)
        if rest is not None and rest.lstrip().startswith(opening):  # the render has the block, with other blanks
            inside, found, after = rest.lstrip()[len(opening) :].partition(closing)
            return (after.lstrip() if block["close"] else inside.lstrip() + closing + after) if found else None
    if rest is None or block["close"] or (thinking and rest.lstrip().startswith(thinking)):
        return rest
    if rest.lstrip().startswith(closing):
        return thinking + (gap if thinking else "") + rest.lstrip()
    return f"{thinking}{gap}{closing}{gap}{gap}{rest}"


def _after(begin: str, whole: str, question: str) -> str | None:
    """Return the text after `begin`, or after its end from the last question on: some templates write the system text before
    the last question, or other things that depend on what follows."""
    if whole.startswith(begin):
        return whole[len(begin) :]
    at = begin.rfind(question) if question else -1
    place = whole.rfind(begin[at:]) if at >= 0 else -1
    return whole[place + len(begin) - at :] if place >= 0 else None


def _after_empty_block(prompt: str, whole: str, thinking: str) -> str | None:
    """Return the answer of a row without thinking where the prompt ends with a block of the template's own that the render of
    an answer lacks, such as Gemma's `<|channel>thought`."""
    if thinking:
        return None
    length = next((at for at, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), len(whole))
    shared = prompt[:length]
    opened = max(shared.rfind("<"), shared.rfind("["))
    if opened > max(shared.rfind(">"), shared.rfind("]")):
        shared = shared[:opened]
    return whole[len(shared) :] if EMPTY_BLOCK.fullmatch(prompt[len(shared) :]) else None


def _join_turns(turns: Sequence[RenderedTurn], answers: Sequence[int], learned: set[int]) -> list[Rendered]:
    """Return one sample if each turn's text begins with the turns before it, else one sample per learned turn."""
    spans: list[Span] = []
    text = ""
    for turn, index in zip(turns, answers, strict=True):
        if not turn.prompt.startswith(text):
            return [
                Rendered((Span(turn.prompt, False), *turn.spans(True)))
                for turn, index in zip(turns, answers, strict=True)
                if index in learned
            ]
        spans += [Span(turn.prompt[len(text) :], False), *turn.spans(index in learned)]
        text = turn.prompt + turn.answer + turn.stop
    return [Rendered(tuple(spans))]


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
