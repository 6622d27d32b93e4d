"""Templates that write tool calls, and the tools."""

from __future__ import annotations

import importlib.util
import os
import runpy
from collections.abc import Iterator
from pathlib import Path

from tongwen.core.chat_template import Template

BENCH = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "templates.py"))
STRING, NUMBER = {"type": "string", "description": "x"}, {"type": "integer", "description": "x"}
PROPERTIES = {
    "city": STRING,
    "days": NUMBER,
    "code": STRING,
    "exact": {"type": "boolean", "description": "b"},
    "filter": {"type": "object", "description": "o"},
    "tags": {"type": "array", "description": "t", "items": {"type": "string"}},
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": "d", "parameters": {"type": "object", "properties": PROPERTIES}},
    }
    for name in ("get_weather", "search_docs")
]
LOOP = (
    "{{% if tools %}}{{{{ tools | tojson }}}}{{% endif %}}{{% for m in messages %}}{{% if m.role == 'assistant' %}}{{{{ m.content }}}}"
    "{{% if m.tool_calls %}}{calls}{{% endif %}}</s>{{% else %}}{{{{ '[INST]' + m.content + '[/INST]' }}}}{{% endif %}}{{% endfor %}}"
)
EACH = "{% for c in m.tool_calls %}"


# As Mistral's templates of three years write, Llama 3's with and without a mark, and Kimi's, whose ids are counted.
SMALL = {
    "mistral-v3": LOOP.format(
        calls="[TOOL_CALLS][" + EACH + '{{ \'{"name": "\' + c.function.name + \'", "arguments": \' + c.function.arguments | tojson'
        " + ', \"id\": \"' + c.id + '\"}' }}{% if not loop.last %}, {% endif %}{% endfor %}]"
    ),
    "mistral-v11": LOOP.format(
        calls=EACH + "{{ '[TOOL_CALLS]' + c.function.name + '[CALL_ID]' + c.id + '[ARGS]' + c.function.arguments | tojson }}{% endfor %}"
    ),
    "mistral-v13": LOOP.format(
        calls=EACH + "{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' + c.function.arguments | tojson }}{% endfor %}"
    ),
    "bare": LOOP.format(
        calls="{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}" + EACH
        + '{{ \'{"name": "\' + c.function.name + \'", "parameters": \' + c.function.arguments | tojson + \'}\' }}{% endfor %}'
    ),
    "function-tag": LOOP.format(
        calls=EACH + "{{ '<function=' + c.function.name + '>' + c.function.arguments | tojson + '</function>' }}{% endfor %}"
    ),
    "counted": LOOP.format(
        calls="<|sep|>" + EACH + "{{ '<|seg|>functions.' + c.function.name + ':' + loop.index0 | string + '<|arg|>' + c.function.arguments | tojson + '<|end|>' }}{% endfor %}<|eos|>"
    ),
    "keyword": LOOP.format(
        calls="<|sep|>[" + EACH + "{{ c.function.name + '(' }}{% for k, v in c.function.arguments.items() %}{{ k + '=' + v | tojson }}"
        "{% if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}{% endfor %}]<|end|>"
    ),
}  # fmt: skip


def published() -> Iterator[tuple[str, str]]:
    """(name, source) of the templates that this machine has and that know of tools."""
    found = importlib.util.find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found and found.origin else Path("nowhere")
    sources = [(file.stem, file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.jinja"))]
    archives = os.environ.get("TONGWEN_TEMPLATES", "")
    for archive in sorted(Path(archives).iterdir()) if archives else ():
        sources += BENCH["templates_of"](archive)
    yield from {
        source: (name, source) for name, source in sources if "tool" in source and "_training" not in name
    }.values()


def bound(source: str) -> Template:
    special = sorted({*BENCH["CONTROL"].findall(source), *BENCH["TOKENS"].values(), "</s>"})
    return Template.make("own", source, BENCH["TOKENS"], special)
