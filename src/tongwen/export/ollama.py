"""A Modelfile beside a GGUF file: `ollama create NAME -f Modelfile`.

Ollama writes prompts by a template of its own language. It is made here by rendering the model's own template around
marks, so the two say the same for a system message and a question; the tokens that end an answer become its stops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Render = Callable[[Sequence[tuple[str, str]]], str]  # (role, text) pairs -> the prompt, up to where the model answers
SYSTEM, QUESTION = "\u241fsystem\u241f", "\u241fquestion\u241f"


def make_modelfile(gguf: str, render: Render | None, stops: Sequence[str], begin: str) -> str:
    """The text of a Modelfile. begin: what llama.cpp puts before every prompt by itself, and the template must not."""
    lines = [f"FROM ./{gguf}"]
    if render is not None:
        plain = _body(render([("user", QUESTION)]), begin)
        both = _body(render([("system", SYSTEM), ("user", QUESTION)]), begin)
        body = f"{{{{ if .System }}}}{both}{{{{ else }}}}{plain}{{{{ end }}}}{{{{ .Response }}}}"
        lines.append(f'TEMPLATE """{body}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def _body(prompt: str, begin: str) -> str:
    prompt = prompt.removeprefix(begin).replace("{{", '{{ "{{" }}')
    return prompt.replace(SYSTEM, "{{ .System }}").replace(QUESTION, "{{ .Prompt }}")
