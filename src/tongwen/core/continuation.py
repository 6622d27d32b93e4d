"""Find an answer in two renders of a chat template: the prompt that asks for it, and the whole dialogue that has it.

Nearly always the dialogue continues the prompt. Some templates open a block of thinking in the prompt alone, write an empty one,
put the system text before the last question, or end their prompt with words that no render of an answer has.
"""

from __future__ import annotations

import re

# The end of a prompt that opens a block of thinking, or writes an empty one.
THINKING_BLOCK = re.compile(
    r"(?P<open><\|START_THINKING\|>|[<\[◁][^<>\[\]◁▷|/\s]*think[^<>\[\]◁▷|\s]*[>\]▷])(?P<gap>\s*)(?P<close>(?:<\|END_THINKING\|>|[<\[◁]/[^<>\[\]◁▷\s]*think[^<>\[\]◁▷\s]*[>\]▷])\s*)?\Z",
    re.IGNORECASE,
)
EMPTY_BLOCK = re.compile(r"[<\[][^\s>\]]+[>\]]\s*(?:\w+\s*)?[<\[][^\s>\]]+[>\]]\s*")


def continuation(prompt: str, whole: str, question: str, thinking: str) -> str | None:
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
    thinks, thinking = bool(thinking), thinking.strip()
    if rest is None:
        rest = _after(prompt[: block.start()], whole, question)
        if rest is not None and rest.lstrip().startswith(opening):  # the render has the block, with other blanks
            inside, found, after = rest.lstrip()[len(opening) :].partition(closing)
            return (after.lstrip() if block["close"] else inside.lstrip() + closing + after) if found else None
    if rest is None or block["close"] or (thinks and rest.lstrip().startswith(thinking)):
        return rest
    if rest.lstrip().startswith(closing):
        return thinking + (gap if thinks else "") + rest.lstrip()
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
    shared = prompt[: shared_length(prompt, whole)]
    opened = max(shared.rfind("<"), shared.rfind("["))
    if opened > max(shared.rfind(">"), shared.rfind("]")):
        shared = shared[:opened]
    return whole[len(shared) :] if EMPTY_BLOCK.fullmatch(prompt[len(shared) :]) else None


def after_opener(prompt: str, begin: str, whole: str, question: str) -> tuple[str, str] | None:
    """Return (the end of the prompt that the render of an answer lacks, what the render has in its place), None if there is no
    such end. begin: the prompt without the words that ask for an answer."""
    rest = _after(begin, whole, question)
    if rest is None or not prompt.startswith(begin):
        return None
    opener = prompt[len(begin) :]
    shared = shared_length(opener, rest)
    return opener[shared:], rest[shared:]


def shared_length(one: str, other: str) -> int:
    """Return the length of the beginning that both texts share."""
    differ = (at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differ, min(len(one), len(other)))
