"""Published templates differ in what they write where; each row is learned as its template writes it, at inference and here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import byte_level_tokenizer
from tests.core.templates import (
    HERE,
    LLAMA3,
    SPECIAL,
    TOKENS,
    TOOL,
    learned,
    make_dialogue,
    own_template,
    tool_call_dialogue,
)
from tongwen.core.chat_template import Template
from tongwen.core.errors import ModelError, RowRejected
from tongwen.core.records import Dialogue, Message
from tongwen.model.loading import chat_setup

LOOP = (
    "{{% for m in messages %}}{{% if m.role == 'assistant' %}}{answer}"
    "{{% else %}}{{{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}}}{{% endif %}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
)
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
# Gemma 4: thinking is written before calls only; the prompt of a row without thinking has an empty block.
AHEAD = TOOLS + LOOP.format(
    answer="<|im_start|>model\n{% if m.reasoning_content and m.tool_calls %}<|channel>thought\n{{ m.reasoning_content }}\n<channel|>{% endif %}"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ m.content }}<|im_end|>\n",
    prompt="<|im_start|>model\n{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}",
)
# Apriel: the prompt begins the thinking; the stop stands after earlier answers alone.
OPENER = LOOP.format(
    answer="<|assistant|>\n{% if m.reasoning_content and loop.last %}{{ m.reasoning_content + '\n[BEGIN FINAL RESPONSE]\n' }}{% endif %}"
    "{{ m.content }}{% if not loop.last %}\n<|im_end|>\n{% endif %}",
    prompt="<|assistant|>\nHere are my reasoning steps:\n",
)
# Apertus: a turn goes on after a tool, and the prompt opens it again; thinking is a block of the content.
HELD_OPEN = (
    TOOLS + "{% set ns = namespace(open=false) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if ns.open %}</s>{% set ns.open = false %}{% endif %}{{ '<|user|>' + m.content + '<|eot_id|>' }}"
    "{% elif m.role == 'assistant' %}{% if not ns.open %}<|assistant|>{% set ns.open = true %}{% endif %}"
    "{% if m.content is mapping %}{% for b in m.content.blocks %}{{ '<|im_start|>' + b.text + '<|im_end|>' if b.type == 'thoughts' else b.text }}{% endfor %}"
    "{% elif m.content %}{{ m.content }}{% endif %}"
    "{% if m.tool_calls %}{{ '<sop>' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ '[gMASK]' }}{% endif %}"
    "{% else %}{{ '[' + m.content + ']' }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ONE_CALL = TOOLS + LOOP.format(
    answer="{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    "<|im_start|>assistant\n{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ m.content }}<|im_end|>\n",
    prompt="<|im_start|>assistant\n",
)
FIRST_CALL = ONE_CALL.replace("{{ raise_exception('one call at once') }}", "").replace("in m.tool_calls %}{{ c", "in (m.tool_calls or [])[:1] %}{{ c")  # fmt: skip
KEYWORDS = ONE_CALL.replace(
    "{{ c.function | tojson }}",
    '{{ c.function.name + \'(\' }}{% for k, v in c.function.arguments.items() %}{{ k + "=\'" + v | replace("\'", "\\\\\'") + "\'" }}{% endfor %})',
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + LOOP.format(answer="<|im_start|>model\n{{ m.content }}<|im_end|>\n", prompt="<|im_start|>model\n")
)


def test_thinking_written_only_before_calls_is_also_put_before_answers() -> None:
    template = own_template(AHEAD)
    samples = template.samples(make_dialogue("问一", "答一", "问二", "答二", thinking="想"))
    assert samples[-1].spans[-2].text == "<|channel>thought\n想\n<channel|>答二"
    assert samples[-1].text.split("<|channel>")[0].endswith("<|im_start|>model\n"), "as add_generation_prompt ends it"
    called = Dialogue(
        (Message("user", "问"), *tool_call_dialogue("北京").messages[1:3], Message("assistant", "答", "想")),
        HERE,
        (TOOL,),
    )
    assert learned(template, called)[-1] == "<|channel>thought\n想\n<channel|>答<|im_end|>"


@pytest.mark.parametrize(("thinking", "wanted"), [("想", "想\n"), (None, "")])
def test_answer_continues_a_prompt_that_opens_the_thinking(thinking: str | None, wanted: str) -> None:
    dialogue = make_dialogue("问", "答", thinking=thinking)
    (sample,) = own_template(OPENER).samples(dialogue)
    assert sample.text.endswith(
        f"<|assistant|>\nHere are my reasoning steps:\n{wanted}[BEGIN FINAL RESPONSE]\n答<|im_end|>"
    )
    assert sample.text.startswith(own_template(OPENER).prompt(dialogue.messages[:1]))


def test_prompt_opener_missing_in_training_is_refused() -> None:
    with pytest.raises(RowRejected) as caught:
        own_template(OPENER.replace("{% if m.reasoning_content and loop.last %}", "{% if false %}")).samples(
            make_dialogue("问", "答")
        )
    assert caught.value.reason == "prompt_differs"


def test_turn_left_open_after_a_tool_matches_the_prompt() -> None:
    template = own_template(HELD_OPEN)
    (sample,) = template.samples(tool_call_dialogue("北京"))
    taught = [span.text for span in sample.spans if span.learn]
    assert taught == ['<sop>{"name": "get_weather", "arguments": {"city": "北京"}}', "[gMASK]", "答", "</s>"]
    assert sample.text.endswith("[gMASK][北京晴]<|assistant|>答</s>")
    dialogue = make_dialogue("问一", "答一", "问二", "答二", thinking="想")
    assert learned(template, dialogue) == ["答一</s><|im_start|>想<|im_end|>答二</s>"]


def test_header_that_differs_after_a_tool_is_refused() -> None:
    other = HELD_OPEN.replace(
        "{% elif m.content %}",
        "{% elif m.content and loop.previtem.role == 'tool' %}{{ '#' + m.content }}{% elif m.content %}",
    )
    with pytest.raises(RowRejected) as caught:
        own_template(other).samples(tool_call_dialogue("北京"))
    assert caught.value.reason == "prompt_differs"


@pytest.mark.parametrize("source", [ONE_CALL, FIRST_CALL], ids=["raises", "drops"])
def test_parallel_calls_are_learned_one_per_turn(source: str) -> None:
    template = own_template(source)
    (sample,) = template.samples(tool_call_dialogue("北京", "上海", content="查"))
    learned_calls = [span.text for span in sample.spans if span.learn and not span.stop]
    assert [re.findall("北京|上海", text) for text in learned_calls] == [["北京"], ["上海"], []]
    assert sample.text.count("查<|im_end|>") == 1
    assert [sample.text.index(part) for part in ("北京晴", '"上海"', "上海晴")] == sorted(
        sample.text.index(part) for part in ("北京晴", '"上海"', "上海晴")
    )
    prompt = template.prompt(tool_call_dialogue("北京", "上海", content="查").messages[:-1], (TOOL,))
    assert sample.text.startswith(prompt) and sample.text[len(prompt) :] == "答<|im_end|>", "and asked so"
    unanswered = Dialogue(tool_call_dialogue("北京", "上海").messages[:2], HERE, (TOOL,))
    with pytest.raises(RowRejected):
        template.samples(unanswered)


def test_answers_of_tools_follow_the_ids_of_their_calls() -> None:
    dialogue = tool_call_dialogue("北京", "上海")
    calls = tuple({**call, "id": name} for call, name in zip(dialogue.messages[1].tool_calls, "ab", strict=True))
    results = [Message("tool", "上海晴", tool_call_id="b"), Message("tool", "北京晴", tool_call_id="a")]
    turns = (dialogue.messages[0], Message("assistant", "", tool_calls=calls), *results, dialogue.messages[-1])
    (sample,) = own_template(ONE_CALL).samples(Dialogue(turns, HERE, (TOOL,)))
    places = [sample.text.index(part) for part in ('"北京"', "北京晴", '"上海"', "上海晴")]
    assert places == sorted(places)


@pytest.mark.parametrize("city", ["北京", "Xi'an"])
def test_keyword_argument_calls_are_rendered(city: str) -> None:
    escaped = city.replace("'", "\\'")
    assert learned(own_template(KEYWORDS), tool_call_dialogue(city)) == [
        f"get_weather(city='{escaped}')<|im_end|>答<|im_end|>"
    ]


def test_system_text_is_prepended_without_a_system_turn() -> None:
    turns = (Message("system", "系统"), Message("user", "问"), Message("assistant", "答"))
    (sample,) = own_template(NO_SYSTEM).samples(Dialogue(turns, HERE))
    assert sample.text == "<|im_start|>user\n系统\n\n问<|im_end|>\n<|im_start|>model\n答<|im_end|>"
    assert own_template(NO_SYSTEM).prompt(turns[:2]) == sample.text.removesuffix("答<|im_end|>")


# -- several templates ---------------------------------------------------------------------------------------------

TOOL_USE = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + ONE_CALL
NEEDS_TOOLS = TOOL_USE.replace("{% for t in tools %}", "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}{% for t in tools %}")  # fmt: skip


@pytest.mark.parametrize("form", [dict, list])
@pytest.mark.parametrize("second", [TOOL_USE, NEEDS_TOOLS], ids=["any", "needs tools"])
def test_tool_use_template_renders_like_transformers(form: type, second: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = byte_level_tokenizer(tmp_path / "base")
    named = {"default": tokenizer_source(), "tool_use": second}
    tokenizer.chat_template = named if form is dict else [{"name": name, "template": text} for name, text in named.items()]  # fmt: skip
    tokenizer.save_pretrained(str(tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "base"))
    template = chat_setup.bind_template("own", tokenizer, [])
    turns = [message.to_dict() for message in tool_call_dialogue("北京").messages[:3]]
    judged = tokenizer.apply_chat_template(turns, tools=[TOOL], add_generation_prompt=True, tokenize=False)
    assert template.prompt(tool_call_dialogue("北京").messages[:3], (TOOL,)) == judged
    (sample,) = template.samples(tool_call_dialogue("北京"))
    assert sample.text.startswith(judged)
    plain = tokenizer.apply_chat_template(
        [{"role": "user", "content": "问"}], add_generation_prompt=True, tokenize=False
    )
    assert (
        template.samples(make_dialogue("问", "答"))[0].spans[0].text
        == plain
        == template.prompt([Message("user", "问")])
    )

    chat_setup.save_tokenizer(tokenizer, template, tmp_path / "out")
    chat_setup.copy_chat_setup(tmp_path / "out", tmp_path / "copy")
    assert AutoTokenizer.from_pretrained(str(tmp_path / "copy")).chat_template == named


def tokenizer_source() -> str:
    return LOOP.format(answer="<|im_start|>assistant\n{{ m.content }}<|im_end|>\n", prompt="<|im_start|>assistant\n")


def test_broken_tool_use_template_refuses_only_rows_with_tools() -> None:
    sources = {"default": tokenizer_source(), "tool_use": "{{ no_such_thing.at_all }}"}
    template = Template.make("own", sources, TOKENS, SPECIAL)
    assert learned(template, make_dialogue("问", "答")) == ["答<|im_end|>"]
    with pytest.raises(RowRejected, match="tool_use"):
        template.samples(tool_call_dialogue("北京"))
    with pytest.raises(ModelError):
        Template.make("own", {"rag": "x"}, TOKENS, SPECIAL)


# -- remedies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [SPECIAL, ("<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>")])  # fmt: skip
@pytest.mark.parametrize(
    "dialogue",
    [
        tool_call_dialogue("北京", "上海"),
        tool_call_dialogue("北京", content="查"),
        Dialogue(tool_call_dialogue("北京").messages, HERE),
        Dialogue((Message("user", "问"), Message("assistant", "答")), HERE, (TOOL,)),
        Dialogue((*tool_call_dialogue("北京").messages[:1], Message("assistant", "", "想", tool_call_dialogue("北京").messages[1].tool_calls), *tool_call_dialogue("北京").messages[2:]), HERE, (TOOL,)),
    ],
)  # fmt: skip
def test_remedy_of_a_refusal_works(dialogue: Dialogue, special: tuple[str, ...]) -> None:
    """The template that is named can be bound to this tokenizer, and learns the row."""
    with pytest.raises(RowRejected) as caught:
        Template.make("own", LLAMA3, TOKENS, special).samples(dialogue)
    (name,) = re.findall("`template: (\\w+)`", caught.value.rule)
    remedied = Template.make(name, None, TOKENS, special)
    taught = "".join(learned(remedied, dialogue))
    wanted: list[Any] = [text for message in dialogue.messages if message.role == "assistant" for text in (message.content, message.thinking, *(call["function"]["arguments"]["city"] for call in message.tool_calls))]  # fmt: skip
    assert all(part in taught for part in wanted if part)


def test_prompt_that_cannot_show_its_tools_is_refused() -> None:
    with pytest.raises(RowRejected, match="chatml"):
        own_template(LLAMA3).prompt([Message("user", "问")], (TOOL,))
