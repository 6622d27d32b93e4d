"""Chat templates, tokens and tools for tests."""

from __future__ import annotations

from typing import Any

from tongwen.core.chat_template import Template
from tongwen.core.records import Dialogue, Message, Origin

SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<s>",
    "</s>",
    "<|user|>",
    "<|assistant|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|begin_of_text|>",
    "[gMASK]",
    "<sop>",
)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
HERE = Origin("f", 1)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = '<|begin_of_text|>' + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def own_template(source: str, **tokens: str) -> Template:
    return Template.make("own", source, TOKENS | tokens, SPECIAL)


def make_dialogue(*contents: str, **last: Any) -> Dialogue:
    turns = [Message("user" if index % 2 == 0 else "assistant", content) for index, content in enumerate(contents)]
    turns[-1] = Message(turns[-1].role, turns[-1].content, **last)
    return Dialogue(tuple(turns), HERE)


def learned(template: Template, dialogue: Dialogue, **options: str) -> list[str]:
    return [
        "".join(span.text for span in sample.spans if span.learn) for sample in template.samples(dialogue, **options)
    ]


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "查天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "城市名"}}},
    },
}


def tool_call_dialogue(*cities: str, content: str = "") -> Dialogue:
    calls = tuple(
        {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}} for city in cities
    )
    return Dialogue(
        (
            Message("user", "问"),
            Message("assistant", content, tool_calls=calls),
            *(Message("tool", f"{city}晴") for city in cities),
            Message("assistant", "答"),
        ),
        HERE,
        (TOOL,),
    )
