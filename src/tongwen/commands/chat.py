"""chat: talk to a model in the terminal. Answers are streamed; the history is cut by whole turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.core.json_schema import schema_problem
from tongwen.core.message_layout import body_of
from tongwen.infer.generation import Sampling
from tongwen.serving.terminal import TerminalChat, converse
from tongwen.workflows.chat_model import open_chat_model

TOOL = '[{"type": "function", "function": {"name": "…", "description": "…", "parameters": {…}}}]'


def run(
    model: str,
    adapters: Sequence[str],
    *,
    template: str,
    thinking: str,
    weights: str,
    sampling: dict[str, Any],
    system: str,
    stream: bool,
    tools_file: str,
) -> int:
    """Run the conversation until the user leaves. tools_file: JSON with the tools that the model may call, "" for none."""
    Sampling().override(**sampling)
    tools = read_tools(Path(tools_file)) if tools_file else []
    chat_model = open_chat_model(model, adapters, template, thinking, weights=weights, rows=1)

    def reply(
        messages: list[dict[str, Any]], settings: dict[str, Any], on_token: Callable[[int], None]
    ) -> Iterator[str]:
        return chat_model.stream(messages, on_token, tools, **settings)

    chat = TerminalChat(
        reply=reply,
        count=lambda messages: len(chat_model.prompt_ids(messages, tools)),
        check=lambda settings: Sampling().override(**settings),
        context=chat_model.context,
        settings=sampling,
        stream=stream,
        tools=tools,
        parser=chat_model.tool_parser if tools else None,
    )
    return converse(chat, name=model, system=system)


def read_tools(file: Path) -> list[dict[str, Any]]:
    """Return the tools of a JSON file in OpenAI's form. Raises RecipeError with place and rule."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(_("not readable as JSON: {error}").format(error=error), place=f"--tools {file}") from None
    tools = found.get("tools") if isinstance(found, dict) else found
    if not isinstance(tools, list) or not tools:
        raise RecipeError(_("not a list of tools"), place=f"--tools {file}", remedy=TOOL)
    out = []
    for number, tool in enumerate(tools):
        inner = body_of(tool) if isinstance(tool, dict) else {}
        if not isinstance(inner.get("name"), str) or not inner["name"]:
            raise RecipeError(_("a tool needs a name"), place=f"{file}: {number}", remedy=TOOL)
        if problem := schema_problem(inner.get("parameters", {}), "parameters"):
            raise RecipeError(problem, place=f"{file}: {number}: {inner['name']}")
        defaults = {"description": "", "parameters": {"type": "object", "properties": {}}}
        out.append({"type": "function", "function": defaults | inner})
    return out
