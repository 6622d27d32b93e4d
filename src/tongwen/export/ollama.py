"""Write a Modelfile beside a GGUF file: `ollama create NAME -f Modelfile`.

Ollama has its own template language. We render the model's template with placeholders for a system message and a
question, and replace these by Ollama's variables, so both give the same prompt. Stop tokens become stop parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Render = Callable[[Sequence[tuple[str, str]]], str]  # (role, text) pairs -> the prompt, up to where the model answers
SYSTEM, QUESTION = "\u241fsystem\u241f", "\u241fquestion\u241f"


def make_modelfile(gguf: str, render: Render | None, stops: Sequence[str], begin: str) -> str:
    """Return the text of a Modelfile. begin: text that llama.cpp itself puts before every prompt, so that the template
    must omit it."""
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
