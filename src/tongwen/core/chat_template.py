"""Render a Dialogue to text and mark the spans that the model learns. Training, scoring and chat share this renderer.

A template is one Jinja file, the same text that is stored with the tokenizer as `chat_template`. The render itself
shows where the learned text is:

* our own templates carry `{% generation %}` marks; without the marks, the render must be the same text;
* for a model's own template the prompt is the render up to the answer (`add_generation_prompt`), and the learned text
  follows. A render with a sentinel in every part of the row proves that the template shows each of them, at its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from tongwen.core.continuation import after_opener, continuation
from tongwen.core.control_tokens import APART, forbidden_in_text, separate_in_values
from tongwen.core.errors import ModelError, RowRejected
from tongwen.core.i18n import _
from tongwen.core.message_layout import (
    DEFAULT_LAYOUT,
    LAYOUT_OPTIONS,
    MessageLayout,
    Offered,
    Tools,
    Turn,
    apply_layout,
    layouts,
    one_call_each,
)
from tongwen.core.records import Dialogue, Message, Span
from tongwen.core.render_proof import (
    MarkedRow,
    contains_value,
    find_missing_part,
    insert_sentinels,
    shape_of,
    values_of,
)
from tongwen.core.rendered_sample import RenderedSample, RenderedTurn, TurnShape, join_turns, trims
from tongwen.core.shipped_templates import (
    GENERATION_TAG,
    SHIPPED,
    read_template,
    shipped_forms,
    shipped_source,
    with_prefix,
)
from tongwen.core.template_cache import SENTINEL, RenderSkeleton, make_skeleton, outline
from tongwen.core.template_environment import LEARN_FROM, LEARN_TO, compile_template, names_used
from tongwen.core.template_guard import GUARD, TemplateFailure

OWN_THINKING = re.compile(r"reasoning|thinking|thought", re.IGNORECASE)
SIMPLE = {"role", "content", "learn"}  # keys of a turn that every template reads in one way
ANSWER: Turn = {"role": "assistant", "content": "A"}
PLAIN = "aBc"
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "string", "description": "x"}},
            "required": ["x"],
        },
    },
}
CALL = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}
TRIES = 2  # rows of one outline for which all layouts are tried in vain
SHAPES = 10_000  # proofs that are kept
REPEATS = 3  # rows of one shape that are rendered before it gets a skeleton, where the shapes are many: calls of tools


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
    usual:   the layout of rows without thinking and tools
    tools:   of the rows that find out about the template: one for a template of rows with tools alone
    tool_use: the model's second template, for rows with tools; or why it cannot be used
    shapes, layouts, failures, prompts: what is proven of the shapes of rows
    """

    name: str
    source: str
    marked: str
    tokens: dict[str, str]
    special: tuple[str, ...]
    stop: str = ""
    appended: bool = False
    stops: tuple[str, ...] = ()
    usual: MessageLayout = DEFAULT_LAYOUT
    tools: Tools = ()
    tool_use: Template | ModelError | None = None
    skeletons: dict[Any, RenderSkeleton | int | None] = field(default_factory=dict, compare=False, repr=False)
    shapes: dict[Any, TurnShape | RowRejected] = field(default_factory=dict, compare=False, repr=False)
    layouts: dict[Any, list[MessageLayout]] = field(default_factory=dict, compare=False, repr=False)
    failures: dict[Any, int] = field(default_factory=dict, compare=False, repr=False)
    prompts: dict[Any, tuple[bool, MessageLayout] | None] = field(default_factory=dict, compare=False, repr=False)
    found: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def make(
        cls,
        name: str,
        own_source: str | Mapping[str, str] | None,
        tokens: dict[str, str],
        special: Iterable[str],
        prefix: str = "",
    ) -> Template:
        """Bind a template: `own`, a shipped name, or a .jinja file.

        own_source: the model's own template, or several by name, of which transformers uses `tool_use` for rows with tools
        prefix: text that the tokenizer itself puts before every text (`<s>`); our own templates write it once.
        Raises ModelError when the tokenizer has no template, or cannot express this one.
        """
        by_name = own_source if isinstance(own_source, Mapping) else {"default": own_source or ""}
        own_source, tool_source, marked = by_name.get("default"), by_name.get("tool_use"), ""
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
            text = shipped_source(name) if name in SHIPPED else read_template(name)
            text = with_prefix(text, prefix)
            if GENERATION_TAG.search(text):
                marked = text
            source = GENERATION_TAG.sub("", text)
        template = cls(name, source, marked, dict(tokens), tuple(special))._checked()
        if name != "own" or not tool_source:
            return template
        try:
            second: Template | ModelError = replace(template, source=tool_source, tools=(TOOL,))._checked()
        except ModelError as error:
            second = error
        return replace(template, tool_use=second)

    def _checked(self) -> Template:
        """Return the template with its stop and its usual layout. Raises ModelError when it cannot be used."""
        template = replace(self, skeletons={}, shapes={}, layouts={}, failures={}, prompts={}, found={})._with_stop()
        template._check_expressible()
        if template.marked:
            template._check_marks()
        return template

    @cached_property
    def _renders_here(self) -> bool:
        """Whether the template is known to be harmless: then it needs no process of its own."""
        return not GUARD.is_possible or self.name in SHIPPED or self.source in shipped_forms(self.special)

    @property
    def texts(self) -> str:
        """Return all that decides how rows are rendered."""
        return self.source + (self.tool_use.source if isinstance(self.tool_use, Template) else "")

    @property
    def own_sources(self) -> str | dict[str, str]:
        """Return what is stored with the tokenizer: the text, or both texts by name."""
        if isinstance(self.tool_use, Template):
            return {"default": self.source, "tool_use": self.tool_use.source}
        return self.source

    @property
    def for_calls(self) -> Template:
        """The template that writes calls: the model's second one, where it has one that can be used."""
        return self.tool_use if isinstance(self.tool_use, Template) else self

    def _for_tools(self, tools: Tools) -> Template:
        """Return the template that renders rows with or without tools. Raises RowRejected where it cannot be used."""
        if not tools or self.tool_use is None:
            return self
        if isinstance(self.tool_use, ModelError):
            rule = _("the model's template for rows with tools (tool_use) cannot be used: {rule}")
            raise RowRejected("template_fails", rule.format(rule=self.tool_use.rule))
        return self.tool_use

    # -- rendering ------------------------------------------------------------------------------------------------

    def answer(self, turns: list[Turn], tools: Tools = ()) -> RenderedTurn:
        """Return the last answer as the template writes it behind its prompt. Raises RowRejected when a part is lost."""
        template = self._for_tools(tools)
        return template._render_turns(turns, Offered.of(tools), (len(turns) - 1,))[0]

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), thinking: bool = False) -> str:
        """Return the text up to the answer: the input of inference, and the prompt of training. Control tokens in message
        texts are separated, for `Encoder.encode_prompt`. Raises RowRejected when the prompt cannot show all parts."""
        template = self._for_tools(tools)
        turns = [separate_in_values(message.to_dict(), self.special) for message in messages]
        tools = [separate_in_values(tool, self.special) for tool in tools]
        turns, layout = template._choose_prompt_layout(turns, tools)
        return template._render(turns, tools, layout, thinking, add_generation_prompt=True)

    def samples(self, dialogue: Dialogue, learn: str = "assistant", thinking: str = "mixed") -> list[RenderedSample]:
        """Return the samples of a dialogue: one, or one per answer if the template renders earlier answers
        differently from the last one (thinking models drop earlier thinking).

        learn: assistant | last_answer | everything; thinking: on | off | mixed.
        Raises RowRejected with a reason when this dialogue cannot be rendered faithfully.
        """
        if dialogue.tools and (template := self._for_tools(dialogue.tools)) is not self:
            return template.samples(dialogue, learn, thinking)
        self._refuse_control_tokens(dialogue)
        return self._filled(dialogue, learn, thinking) or self._samples(dialogue, learn, thinking)

    def samples_of_each(
        self, dialogues: Sequence[Dialogue], learn: str, thinking: str
    ) -> list[list[RenderedSample] | RowRejected]:
        """Return the samples of each dialogue, or why it is rejected. A template with a process of its own gets them in
        batches, except those that need no render."""
        out: list[list[RenderedSample] | RowRejected] = []
        later: list[int] = []
        for number, dialogue in enumerate(dialogues):
            found: list[RenderedSample] | None = []
            try:
                if self._renders_here:
                    found = self.samples(dialogue, learn, thinking)
                elif found := self._filled(dialogue, learn, thinking):
                    self._refuse_control_tokens(dialogue)
            except RowRejected as error:
                out.append(error)
                continue
            out.append(found or [])
            later += [number] if found is None else []
        specification = {
            "name": self.name,
            "own_source": self.own_sources,
            "tokens": self.tokens,
            "special": self.special,
        }
        answers = GUARD.samples(specification, [dialogues[number].to_dict() for number in later], learn, thinking)
        for number, answer in zip(later, answers, strict=True):
            out[number] = (
                answer
                if isinstance(answer, RowRejected)
                else [RenderedSample(tuple(Span(*span) for span in spans)) for spans in answer]
            )
        return out

    def _filled(self, dialogue: Dialogue, learn: str, thinking: str) -> list[RenderedSample] | None:
        """Return the samples of a dialogue whose shape needs no render; None for others."""
        skeleton = self._skeleton(dialogue, learn, thinking)
        if skeleton and skeleton.fits(dialogue.messages):
            return [RenderedSample(spans) for spans in skeleton.fill(dialogue.messages)]
        return None

    def _samples(self, dialogue: Dialogue, learn: str, thinking: str, prove: bool = True) -> list[RenderedSample]:
        turns = [message.to_dict() for message in _with_thinking(dialogue.messages, thinking)]
        try:
            return self._samples_of(turns, dialogue.tools, learn, prove)
        except RowRejected:
            if apart := one_call_each(turns):
                with suppress(RowRejected):  # the reason is that of the row as it stands
                    return self._samples_of(apart, dialogue.tools, learn, prove)
            raise

    def _samples_of(self, turns: list[Turn], tools: Tools, learn: str, prove: bool) -> list[RenderedSample]:
        tools = Offered.of(tools)
        answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers:
            raise RowRejected("no_answer", _("the dialogue has no answer to learn"))
        chosen = answers[-1:] if learn == "last_answer" else answers
        learned = {index for index in chosen if turns[index].get("learn") is not False}
        learned |= {index for index in answers if turns[index].get("learn") is True}
        if not learned and learn != "everything":
            raise RowRejected("nothing_to_learn", _("learning is turned off for every answer"))
        rendered = self._render_turns(turns[: answers[-1] + 1], tools, answers, prove)
        samples = join_turns(rendered, answers, learned)
        if learn == "everything":
            samples = [RenderedSample(tuple(span._replace(learn=True) for span in sample.spans)) for sample in samples]
        return samples

    def _skeleton(self, dialogue: Dialogue, learn: str, thinking: str) -> RenderSkeleton | None:
        """Return the cached render of this dialogue's shape, made once; None for shapes that are rendered one by one."""
        uses_tools = bool(dialogue.tools) or any(message.tool_calls for message in dialogue.messages)
        if uses_tools and not self._renders_here:  # the other process has a skeleton of its own
            return None
        if (common := outline(dialogue.messages)) is None:
            return None
        tools = json.dumps(dialogue.tools, ensure_ascii=False) if dialogue.tools else ""
        shape = learn, thinking, tools, common
        found = self.skeletons.get(shape, 0)
        if not isinstance(found, int):
            return found
        if uses_tools and found < REPEATS:
            if len(self.skeletons) >= SHAPES:
                self.skeletons.clear()
            self.skeletons[shape] = found + 1
            return None
        self.skeletons[shape] = made = make_skeleton(
            dialogue.messages,
            lambda messages, prove: [
                sample.spans for sample in self._samples(replace(dialogue, messages=messages), learn, thinking, prove)
            ],
        )
        return made

    def _render_turns(
        self, turns: list[Turn], tools: Tools, answers: Sequence[int], prove: bool = True
    ) -> list[RenderedTurn]:
        """Return every answer with its prompt, in the first layout of the row that shows all its parts.

        Raises RowRejected with what the usual layout lacks when there is none."""
        refusals: list[RowRejected] = []
        known = self.layouts.setdefault(_outline(turns, tools), [])
        for form in [turns, apart] if (apart := _split_thinking(turns, prove)) else [turns]:
            for layout in chain(tuple(known), self._untried(form, tools, known)):
                try:
                    out = [self._turn(form[: index + 1], tools, layout, prove) for index in answers]
                except RowRejected as error:
                    refusals.append(error)
                    continue
                if layout not in known:
                    known.append(layout)
                return out
        told = [error for error in refusals if error.reason != "template_fails"] or refusals
        raise told[0]

    def _untried(self, turns: list[Turn], tools: Tools, known: Sequence[MessageLayout]) -> Iterator[MessageLayout]:
        """Yield the layouts to try after the known ones; only the usual one where all others failed before."""
        outline = _outline(turns, tools)
        if self.usual not in known:
            yield self.usual
        if self.failures.get(outline, 0) >= TRIES:
            return
        for layout in layouts(turns, tools, self.usual):
            if layout != self.usual and layout not in known and self._reads(layout):
                yield layout
        self.failures[outline] = self.failures.get(outline, 0) + 1

    def _reads(self, layout: MessageLayout) -> bool:
        """Whether the template may read a row in this layout: it has the words for it. An answer's text may hold thinking as
        `<think>` only where the template has no other form for it."""
        if layout.ahead and self._form_of_thinking(layout) is None:
            return False
        if layout.thinking == "inline":
            return "think>" in self.source or not any(map(OWN_THINKING.search, names_used(self.source)))
        return layout.thinking not in ("thinking", "reasoning", "blocks") or layout.thinking in self.source

    def _choose_prompt_layout(self, turns: list[Turn], tools: Tools) -> tuple[list[Turn], MessageLayout]:
        """Return the turns and the first layout in which the prompt shows all their parts. Raises RowRejected without one."""
        if not tools and not any(turn.keys() - SIMPLE for turn in turns):
            return turns, self.usual
        shape = shape_of(turns, tools)
        if shape not in self.prompts:
            forms = enumerate([turns, one_call_each(turns)])
            found = ((bool(number), self._find_prompt_layout(form, tools)) for number, form in forms if form)
            self.prompts[shape] = next(((apart, one) for apart, one in found if one), None)
        if (known := self.prompts[shape]) is None:
            raise RowRejected(
                "part_lost",
                _("the template does not render every part of this prompt, such as its tools; {remedy}").format(
                    remedy=self._remedy("tool")
                ),
            )
        return (one_call_each(turns) or turns) if known[0] else turns, known[1]

    def _find_prompt_layout(self, turns: list[Turn], tools: Tools) -> MessageLayout | None:
        marked = insert_sentinels([*turns, ANSWER], tools)
        for layout in filter(self._reads, layouts(turns, tools, self.usual)):
            try:
                prompt = self._render(marked.turns[:-1], marked.tools, layout, False, add_generation_prompt=True)
            except RowRejected:
                continue
            if find_missing_part(marked, prompt, marked.turns[-1]["content"]) is None:
                return layout
        return None

    def _turn(self, turns: list[Turn], tools: Tools, layout: MessageLayout, prove: bool = True) -> RenderedTurn:
        """Return the last turn with its prompt. Raises RowRejected unless every part of the row is where it belongs."""
        shape = self._prove_shape(turns, tools, layout)
        prompt, answer = self._split(turns, tools, layout)
        ending = "" if shape.appended else shape.stop
        if not answer.endswith(ending + shape.after):
            raise RowRejected(
                "no_stop", _("the answer is rendered without its stop token {stop!r}").format(stop=shape.stop)
            )
        answer = answer[: len(answer) - len(ending) - len(shape.after)]
        if prove:
            self._check_values(turns, prompt, answer)
            if not shape.shows_only_content(turns[-1], answer):
                self._check_answer_unchanged(turns, tools, layout, answer)
        return RenderedTurn(prompt, answer, shape.stop)

    def _split(self, turns: list[Turn], tools: Tools, layout: MessageLayout) -> tuple[str, str]:
        """Return (prompt as at inference, the render that continues it)."""
        last, before = turns[-1], turns[:-1]
        thought = last.get("reasoning_content") or ""
        thinking = bool(thought) and layout.thinking != "inline"
        if thinking and layout.ahead and not last.get("tool_calls"):
            head, tail = self._form_of_thinking(layout) or ("", "")
            ahead, thought = f"{head}{thought.strip()}{tail}", ""
            turns = [*before, {key: value for key, value in last.items() if key != "reasoning_content"}]
        else:
            ahead = ""
        prompt = self._render(before, tools, layout, thinking, add_generation_prompt=True)
        whole = self._render(turns, tools, layout, thinking)
        question = before[-1]["content"] if before else ""
        answer = continuation(prompt, whole, question, thought)
        if answer is None:
            begin = self._render(before, tools, layout, thinking)
            if found := after_opener(prompt, begin, whole, question):
                answer = self._after_opener(*found, turns, tools, layout)
        if answer is not None:
            return prompt, ahead + answer
        raise RowRejected(
            "prompt_differs",
            _("the template renders the full dialogue differently from its prompt; choose another `template`"),
        )

    def _after_opener(
        self, opener: str, rest: str, turns: list[Turn], tools: Tools, layout: MessageLayout
    ) -> str | None:
        """Return the answer where the prompt ends with an opener that the render of an answer lacks.

        The opener may begin the thinking, such as Apriel's `Here are my reasoning steps:`: then the answer is the thinking and
        what ends it. Or it opens a turn that the render holds open, such as Apertus' after a tool: then the answer must be the
        one that follows a question. Otherwise the two differ, and None is returned.
        """
        thinking = (turns[-1].get("reasoning_content") or "").strip()
        if thinking and rest.startswith(thinking):
            return rest
        if not thinking and (end := self._end_of_thinking(layout)) and opener in self._prompt_end(layout):
            return end.lstrip() + rest
        if len(turns) < 3 or turns[-2]["role"] != "tool":
            return None
        asked = [turn for turn in turns if turn["role"] == "user"][:1]
        return rest if asked and self._split([*asked, turns[-1]], tools, layout)[1] == rest else None

    def _form_of_thinking(self, layout: MessageLayout) -> tuple[str, str] | None:
        """Return what a template writes around the thinking before a call, and nowhere else; None if it writes none."""
        key = ("form", layout.thinking)
        if key not in self.found:
            self.found[key] = None
            ask, usual = _turn_of("user", "A"), replace(layout, ahead=False, empty="empty", ids="row")
            reply: Turn = {**_turn_of("assistant", ""), "tool_calls": [CALL]}
            try:
                bare = self._split([ask, reply], (TOOL,), usual)[1]
                answer = self._split([ask, {**reply, "reasoning_content": SENTINEL}], (TOOL,), usual)[1]
            except RowRejected:
                return None
            head, found, after = answer.partition(SENTINEL)
            if found and after.endswith(bare):
                self.found[key] = head, after[: len(after) - len(bare)]
        form: tuple[str, str] | None = self.found[key]
        return form

    def _end_of_thinking(self, layout: MessageLayout) -> str:
        """Return what the template writes between the thinking and the text of an answer; "" if it shows no thinking."""
        key = ("end", layout.thinking)
        if key not in self.found:
            reply = {**_turn_of("assistant", APART), "reasoning_content": SENTINEL}
            try:
                whole = self._render([_turn_of("user", "A"), reply], (), layout, True)
            except RowRejected:
                whole = ""
            self.found[key] = whole.partition(SENTINEL)[2].partition(APART)[0]
        return str(self.found[key])

    def _prompt_end(self, layout: MessageLayout) -> str:
        """Return what the template writes after a question to ask for an answer with thinking."""
        ask = [_turn_of("user", "A")]
        begin = self._render(ask, (), layout, True)
        return self._render(ask, (), layout, True, add_generation_prompt=True).removeprefix(begin)

    def _render(
        self,
        turns: Sequence[Turn],
        tools: Tools,
        layout: MessageLayout,
        thinking: bool,
        add_generation_prompt: bool = False,
        marks: bool = False,
    ) -> str:
        messages, definitions = apply_layout(turns, tools, layout)
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
            source = self.marked if marks else self.source
            return (
                compile_template(source).render(context)
                if self._renders_here
                else GUARD.render(source, self.name, context)
            )
        except jinja2.TemplateError as error:
            raise RowRejected(
                "template_refuses",
                _("the template refuses this dialogue: {error}; {remedy}").format(error=error, remedy=self._remedy("")),
            ) from None
        except (TypeError, KeyError, AttributeError, IndexError, ValueError, OverflowError) as error:
            raise RowRejected(
                "template_fails",
                _("the template fails on this dialogue: {type}: {error}").format(
                    type=error.kind if isinstance(error, TemplateFailure) else type(error).__name__, error=error
                ),
            ) from None

    # -- proofs ---------------------------------------------------------------------------------------------------

    def _prove_shape(self, turns: list[Turn], tools: Tools, layout: MessageLayout) -> TurnShape:
        """Return how the last turn of such rows ends, or raise RowRejected: proven once per shape of row and layout."""
        key = (layout, *shape_of(turns, tools))
        found = self.shapes.get(key)
        if found is None:
            if len(self.shapes) >= SHAPES:
                self.shapes.clear()
            try:
                found = self._derive_shape(turns, tools, layout)
            except RowRejected as error:
                found = error
            self.shapes[key] = found
        if isinstance(found, RowRejected):
            raise RowRejected(found.reason, found.rule)
        return found

    def _derive_shape(self, turns: list[Turn], tools: Tools, layout: MessageLayout) -> TurnShape:
        marked = insert_sentinels(turns, tools)
        shown = marked.of(len(turns) - 1)
        if all(part.kind == "thinking" for part in shown):
            raise RowRejected("empty_answer", _("turn {turn}: the answer is empty").format(turn=len(turns)))
        prompt, answer = self._split(marked.turns, marked.tools, layout)
        if part := find_missing_part(marked, prompt, answer):
            raise RowRejected(
                "part_lost",
                _("the template does not render {part} at its place; {remedy}").format(
                    part=part.place, remedy=self._remedy(part.kind)
                ),
            )
        begin = min(answer.find(part.sentinel) for part in shown)
        end = max(answer.rfind(part.sentinel) + len(part.sentinel) for part in shown)
        tail = answer[end:]
        calls = bool(turns[-1].get("tool_calls"))
        after_call = self._stop_before_tool(marked, layout, prompt + answer) if calls and self.appended else ""
        stop, at = self._find_stop(tail, calls and not after_call)
        if at < 0:  # the next turn begins with the stop
            return TurnShape(after_call or self.stop, True, "", answer[:begin], tail)
        return TurnShape(stop, False, tail[at + len(stop) :], answer[:begin], tail[:at])

    def _find_stop(self, tail: str, own: bool) -> tuple[str, int]:
        """Return (stop token, its place) in the text after an answer; the place is -1 if the text has none. own: whether the
        answer may end with a token of its own, as a call does."""
        places = [(place, -len(stop), stop) for stop in self.stops if (place := tail.find(stop)) >= 0]
        if places:
            place, _length, stop = min(places)
            return stop, place
        if own:
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
        raise RowRejected("no_stop", _("the answer is rendered without its stop token {stop!r}").format(stop=self.stop))

    def _stop_before_tool(self, marked: MarkedRow, layout: MessageLayout, whole: str) -> str:
        """Return the control token that a tool's answer begins with: there the model stops after a call. "" without one."""
        result = {"role": "tool", "content": SENTINEL}
        try:
            longer = self._render([*marked.turns, result], marked.tools, layout, False)
        except RowRejected:
            return ""
        return self._first_special(longer[len(whole) :].lstrip()) if longer.startswith(whole) else ""

    def _remedy(self, kind: str) -> str:
        """Return what a user can do about a part that the template does not render: a template that this tokenizer can
        express, too."""
        name = "chatml" if {"<|im_start|>", "<|im_end|>"} <= {*self.special} else "plain"
        if kind in ("call", "tool"):
            return _("`template: {name}` renders tools and calls").format(name=name)
        if kind == "thinking":
            return _("`template: {name}` renders thinking, and `thinking: off` leaves it out").format(name=name)
        return _("choose another `template`, such as `{name}`").format(name=name)

    def _check_values(self, turns: list[Turn], prompt: str, answer: str) -> None:
        """Raise RowRejected unless the render shows the values of this row: a template may cut some, such as text before
        `</think>`."""
        if not turns[-1]["content"].strip() and not turns[-1].get("tool_calls"):
            raise RowRejected("empty_answer", _("turn {turn}: the answer is empty").format(turn=len(turns)))
        at = 0
        for number, turn in enumerate(turns, 1):
            last = number == len(turns)
            for kind, value in values_of(turn):
                if last:
                    shown = contains_value(answer, kind, value)
                elif kind == "thinking":
                    shown = True
                elif kind == "content" and turn["role"] == "assistant":
                    value = value.rsplit("</think>", 1)[-1].strip()
                    found = prompt.find(value, at)
                    shown, at = found >= 0, max(at, found)
                else:
                    shown = contains_value(prompt, "call", value)
                if not shown:
                    raise RowRejected(
                        "part_lost",
                        _(
                            "turn {turn}: the template does not render {text!r} as the row has it; choose another `template`, or change the text"
                        ).format(turn=number, text=value.strip()[:40]),
                    )

    def _check_answer_unchanged(self, turns: list[Turn], tools: Tools, layout: MessageLayout, answer: str) -> None:
        """Check that the render has the answer unchanged (or trimmed), exactly where a sentinel would be. Raises RowRejected
        otherwise."""
        last = turns[-1]
        content = last["content"]
        if not content.strip() or "</think>" in content or last.get("tool_calls") or last.get("reasoning_content"):
            return  # found by their own sentinels; a thinking template rearranges thinking inside the answer's own text
        probe = self._split([*turns[:-1], {**last, "content": SENTINEL}], tools, layout)[1]
        head, found, tail = probe.partition(SENTINEL)
        if found and any(
            answer.startswith(head + text) and tail.startswith(answer[len(head + text) :]) for text in trims(content)
        ):
            return
        raise RowRejected(
            "answer_changed",
            _(
                "the template changes the text of an answer, so the model would not learn what the data says: {last!r}; choose another `template`"
            ).format(last=content[:40]),
        )

    def _check_marks(self) -> None:
        """Check that our own marks enclose exactly the learned text of the render, and leave the text unchanged."""
        turns = [_turn_of("user", "A"), _turn_of("assistant", "B"), _turn_of("user", "C"), _turn_of("assistant", "D")]
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
        """Raise RowRejected for control tokens in a row: they would end the answer, or open a turn, in the middle."""
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
                raise RowRejected(
                    "control_token_in_text",
                    _("the text contains the control token {found!r}").format(found=found[0]),
                )
            raise RowRejected(
                "noncharacter_in_text",
                _("the text contains a Unicode noncharacter"),
            )

    def _with_stop(self) -> Template:
        """Find the stop token: the special token after the last answer, or the one after an earlier answer if the template
        writes none after the last (the next turn begins with it)."""
        ask, reply = _turn_of("user", "A"), _turn_of("assistant", SENTINEL)
        one, two, usual = "", "", self.usual
        refusals: list[RowRejected] = []
        for content in LAYOUT_OPTIONS["content"]:
            usual = replace(self.usual, content=content)
            try:
                one = self._render([ask, reply], self.tools, usual, False)
                two = self._render([ask, reply, ask, reply], self.tools, usual, False)
                plain = self._render([ask, _turn_of("assistant", PLAIN)], self.tools, usual, False)
            except RowRejected as error:
                refusals.append(error)
                continue
            if two.count(SENTINEL) == 2 and one.count(SENTINEL) == 1:
                break
        else:
            if not two:
                raise ModelError(refusals[0].rule, place=f"template {self.name}") from None
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
        if not self._shows_system(usual):
            usual = replace(usual, system="question")
        return replace(self, stop=stops[0], stops=stops, appended=not final, usual=usual)

    def _shows_system(self, usual: MessageLayout) -> bool:
        """Whether the template has a place for a system text. Gemma's has none: there it begins the first question."""
        turns = [_turn_of("system", SENTINEL), _turn_of("user", "A")]
        try:
            return SENTINEL in self._render(turns, self.tools, usual, False, add_generation_prompt=True)
        except RowRejected:
            return False

    def _first_special(self, text: str) -> str:
        return max((token for token in self.special if token and text.startswith(token)), key=len, default="")

    def _check_expressible(self) -> None:
        """Raise ModelError unless all control tokens that the template writes are single tokens of this tokenizer."""
        text = self._render([_turn_of("user", "A"), _turn_of("assistant", "B")], self.tools, self.usual, False)
        missing = sorted({found for found in re.findall(r"<\|[A-Za-z_]+\|>", text) if found not in self.special})
        if missing:
            raise ModelError(
                _("the tokenizer has no token {missing}, which the template writes").format(missing=", ".join(missing)),
                place=f"template {self.name}",
                remedy=_("choose a plain-text template: `template: alpaca` or `template: plain`"),
            )


def _turn_of(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


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
    """Return what decides in which layout a template reads a row."""
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


def _with_thinking(messages: Sequence[Message], thinking: str) -> list[Message]:
    if thinking == "off":
        return [replace(message, thinking=None) for message in messages]
    if thinking == "on" and any(message.role == "assistant" and not message.thinking for message in messages[-1:]):
        raise RowRejected(
            "no_thinking",
            _("`thinking: on`, but the last answer has no thinking"),
        )
    return list(messages)
