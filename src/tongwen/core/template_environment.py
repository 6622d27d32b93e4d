"""The Jinja environment of chat templates, and the marks that its `{% generation %}` blocks leave in a render.

It follows transformers' (`utils/chat_template_utils.py`): sandboxed, trim_blocks, lstrip_blocks.
"""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.core.template_cache import dump_json

# Noncharacters: Unicode keeps them out of text, so they can carry marks through a render.
LEARN_FROM, LEARN_TO = "\ufdd0", "\ufdd1"


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
    environment.filters["tojson"] = dump_json
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
def names_used(source: str) -> frozenset[str]:
    """Return the variables, attributes and keys that a template reads."""
    tree = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=[Generation, "jinja2.ext.loopcontrols"]).parse(
        source
    )
    names = {node.name for node in tree.find_all(jinja2.nodes.Name)}
    names |= {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    return frozenset(
        names | {str(node.value) for node in tree.find_all(jinja2.nodes.Const) if str(node.value).isidentifier()}
    )
