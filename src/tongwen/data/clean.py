"""Clean texts with named rules for Chinese: repair a text, or drop it with a reason. Each rule counts its changes.

A rule takes a text and returns a text (the same object: unchanged) or a `RejectedText`. NFKC is never used: it would turn ，
into `,`. NFC alone is not enough: it keeps the radicals that PDFs contain instead of characters (⻓ for 长), and it
replaces compatibility ideographs, which are distinct characters in names and old texts.
"""

from __future__ import annotations

import html
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from tongwen.core.errors import MissingPackage
from tongwen.core.i18n import _
from tongwen.core.records import Dialogue, Document, Message, Preference, Record
from tongwen.recipe.data import Clean


@dataclass(frozen=True, slots=True)
class RejectedText:
    """A dropped text: the reason that the ledger counts, and the message for the user."""

    reason: str
    rule: str


Filter = Callable[[str], "str | RejectedText"]


class Cleaner:
    """The rules of a recipe, and how many texts each of them changed.

    kind: `documents`, `dialogues` or `preferences`. Markup in a web page may be the subject of an answer, so the rules for HTML, wrapped
    lines and repetition are applied to documents only.
    """

    def __init__(self, section: Clean, kind: str) -> None:
        self.repairs: list[tuple[str, Filter]] = list(_repair_rules(section, kind))
        self.checks: list[tuple[str, Filter]] = list(_check_rules(section, kind))
        self.changed: Counter[str] = Counter()

    def clean(self, record: Record) -> Record | RejectedText:
        """Return the record with repaired texts, or why it is dropped."""
        if isinstance(record, Document):
            return self._document(record)
        return self._preference(record) if isinstance(record, Preference) else self._dialogue(record)

    def _document(self, record: Document) -> Document | RejectedText:
        text = self._repair(record.text)
        if isinstance(text, RejectedText):
            return text
        return self._check(text) or (record if text is record.text else replace(record, text=text))

    def _dialogue(self, record: Dialogue) -> Dialogue | RejectedText:
        messages = self._messages(record.messages)
        if isinstance(messages, RejectedText):
            return messages
        return record if messages is record.messages else replace(record, messages=messages)

    def _preference(self, record: Preference) -> Preference | RejectedText:
        """Each answer must pass the checks with its prompt; cleaned, the two must still differ."""
        cleaned = []
        for part in (record.prompt, record.chosen, record.rejected):
            found = self._repaired(part)
            if isinstance(found, RejectedText):
                return found
            cleaned.append(found)
        prompt, chosen, rejected = cleaned
        for answer in (chosen, rejected):
            if answer and (refused := self._check("\n".join(message.content for message in (*prompt, *answer)))):
                return refused
        if chosen == rejected:
            return RejectedText("equal_answers", _("after cleaning, the chosen and the rejected answer are the same"))
        return replace(record, prompt=prompt, chosen=chosen, rejected=rejected)

    def _messages(self, old: tuple[Message, ...]) -> tuple[Message, ...] | RejectedText:
        """Return repaired messages that pass the checks; the same object when nothing changes."""
        messages = self._repaired(old)
        if isinstance(messages, RejectedText):
            return messages
        return self._check("\n".join(message.content for message in messages)) or messages

    def _repaired(self, old: tuple[Message, ...]) -> tuple[Message, ...] | RejectedText:
        messages: list[Message] = []
        for message in old:
            content = self._repair(message.content) if message.content else message.content
            thinking = self._repair(message.thinking) if message.thinking else message.thinking
            if isinstance(content, RejectedText):
                return content
            if isinstance(thinking, RejectedText):
                return thinking
            same = content is message.content and thinking is message.thinking
            messages.append(message if same else replace(message, content=content, thinking=thinking))
        return old if all(new is same for new, same in zip(messages, old, strict=True)) else tuple(messages)

    def _repair(self, text: str) -> str | RejectedText:
        before = text
        for name, rule in self.repairs:
            found = rule(text)
            if isinstance(found, RejectedText):
                return found
            if found is not text and found != text:
                self.changed[name] += 1
                text = found
        if text is not before and not text.strip():
            return RejectedText("empty_after_cleaning", _("nothing is left after cleaning"))
        return text

    def _check(self, text: str) -> RejectedText | None:
        for _unused, rule in self.checks:
            if isinstance(found := rule(text), RejectedText):
                return found
        return None


def _repair_rules(section: Clean, kind: str) -> Iterable[tuple[str, Filter]]:
    """Yield the repair rules in the required order: encoding, then characters, then lines."""
    if section.mojibake:
        yield "mojibake", repair_mojibake
    if kind == "documents" and section.html:
        yield "html", remove_html
    if section.control:
        yield "control", remove_control
    if section.unicode:
        yield "unicode", normalise
    if section.full_width:
        yield "full_width", narrow
    if kind == "documents" and section.unwrap:
        yield "unwrap", unwrap
    if section.convert != "none":
        yield "convert", make_converter(section.convert)
    if section.personal_data != "keep":
        yield "personal_data", mask_personal_data if section.personal_data == "mask" else refuse_personal_data


def _check_rules(section: Clean, kind: str) -> Iterable[tuple[str, Filter]]:
    if section.min_chars > 1 or section.max_chars:
        yield "length", lambda text: check_length(text, section.min_chars, section.max_chars)
    if section.min_han:
        yield "language", lambda text: check_han(text, section.min_han)
    if kind == "documents" and section.repetition:
        yield "repetition", check_repetition


# -- characters ---------------------------------------------------------------------------------------------------

# Unicode's EquivalentUnifiedIdeograph.txt, U+2E81…U+2EF3 (U+2E9A is unassigned); the Kangxi radicals U+2F00…U+2FD5
# have compatibility decompositions to the same characters.
_SUPPLEMENT = (
    "厂乛乚乙亻冂𠘨刀刂卜㔾小小兀尣尢𡯂巳幺彑𫜹忄心扌攵旡日月歺母民氵氺灬爫爫丬牛犭王𤴔目示礻𥫗糹纟罓罒㓁冗𦉫羊𦍌"
    "𦍋耂肀聿肉𦥑艹艹艹虎衤覀西见角𧢲讠贝𧾷车辶辶辶邑钅長镸长门𨸏阝雨青韦页风飞食𩙿飠饣𩠐马骨鬼鱼鸟卤麦黄黾斉齐歯齿竜龙龜亀龟"
)
RADICALS = {
    **dict(zip([code for code in range(0x2E81, 0x2EF4) if code != 0x2E9A], _SUPPLEMENT, strict=True)),
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in range(0x2F00, 0x2FD6)},
}
_RADICAL = re.compile("[\u2e81-\u2ef3\u2f00-\u2fd5]")
_COMPATIBILITY = re.compile("([\uf900-\ufaff\U0002f800-\U0002fa1f]+)")
_FULL_WIDTH = {code: code - 0xFEE0 for first, last in ("０９", "ＡＺ", "ａｚ") for code in range(ord(first), ord(last) + 1)}  # fmt: skip
# Control characters except tab and line feed, soft hyphens, zero-width and bidi marks (except the joiners of emoji and
# Indic scripts), private use and noncharacters.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufdd0-\ufdef\ufffe\uffff"
    "\ue000-\uf8ff\U000f0000-\U0010ffff]"
)


def normalise(text: str) -> str:
    """Normalise to NFC and map radicals to characters; keep compatibility ideographs and full-width forms."""
    if _RADICAL.search(text):
        text = text.translate(RADICALS)
    if unicodedata.is_normalized("NFC", text):
        return text
    parts = _COMPATIBILITY.split(text)  # every second part consists of compatibility ideographs
    parts[::2] = [unicodedata.normalize("NFC", part) for part in parts[::2]]
    return "".join(parts)


def narrow(text: str) -> str:
    """Ｑｗｅｎ３ → Qwen3; full-width punctuation stays."""
    return text.translate(_FULL_WIDTH)


def remove_control(text: str) -> str:
    """Remove invisible and private-use characters; convert line ends to \\n."""
    if not _CONTROL.search(text):
        return text
    text = re.sub("\r\n?|[\u2028\u2029\x85]", "\n", text)
    return _CONTROL.sub("", text)


# -- wrong decoding -----------------------------------------------------------------------------------------------

_LATIN = re.compile("[\u00c2-\u00f4][\u0080-\u00bf\u0152-\u017e\u02c6\u02dc\u2013-\u2122]")
# What the UTF-8 bytes of the most frequent Chinese characters and punctuation look like when read as GBK.
_AS_GBK = re.compile("[锛銆鐨鍦鏄涓浜鏈鍜浠鎴鍒鐢鍥瀵璇鏂绛闂涔鍙鍚杩鑳]")
_LOST = re.compile("锟斤拷|烫烫烫|屯屯屯|\ufffd")


def repair_mojibake(text: str) -> str | RejectedText:
    """Decode a wrongly decoded text again with the right encoding (ftfy for Latin-1, our own step for GBK); drop it when
    bytes are lost."""
    if _LATIN.search(text):
        from ftfy import fix_encoding

        text = fix_encoding(text)
    if len(_AS_GBK.findall(text)) >= max(3, 0.15 * len(text)):
        try:
            return text.encode("gb18030").decode("utf-8")
        except UnicodeError:
            return RejectedText("mojibake", _("UTF-8 that was decoded as GBK and cannot be restored"))
    lost = sum(map(len, _LOST.findall(text)))
    if lost > 0.01 * len(text):
        return RejectedText("mojibake", _("{lost} characters are corrupt (�, 锟斤拷)").format(lost=lost))
    return text


# -- markup and lines ---------------------------------------------------------------------------------------------

_BLOCK = "p|br|div|table|tr|tbody|thead|ul|ol|li|h[1-6]|hr|pre|blockquote|section|article|header|footer|nav|form|center"
_INLINE = "span|a|b|i|u|em|strong|font|td|th|img|code|sup|sub|button|input|label|iframe|small|big|strike|del|ins"
_TAG = re.compile(rf"<(/?)({_BLOCK}|{_INLINE})(\s[^<>]{{0,500}})?/?>", re.IGNORECASE)
_IS_BLOCK = re.compile(_BLOCK, re.IGNORECASE)
_VOID = {"br", "hr", "img", "input"}
_ENTITY = re.compile(r"&(?:[a-zA-Z]{2,8}|#\d{1,7}|#x[0-9a-fA-F]{1,6});")
_HIDDEN = (("<script", "</script>"), ("<style", "</style>"), ("<!--", "-->"))


def remove_html(text: str) -> str:
    """Remove scripts, comments and HTML tags, and resolve entities. Other text in angle brackets stays, and so does a bare
    `<tr>` without an end tag: the text is about the tag."""
    if "<" in text:
        for start, end in _HIDDEN:
            text = _without(text, start, end)
        closed = {found[2].lower() for found in _TAG.finditer(text) if found[1]}

        def replaced(found: re.Match[str]) -> str:
            name = found[2].lower()
            if not (found[1] or found[3] or name in closed or name in _VOID):
                return found[0]
            return "\n" if _IS_BLOCK.fullmatch(name) else ""

        text = _TAG.sub(replaced, text)
    if "&" in text:
        text = _ENTITY.sub(lambda found: html.unescape(found[0]).replace("\xa0", " "), text)
    return text


def _without(text: str, start: str, end: str) -> str:
    """Remove everything from `start` to `end`, in linear time, also if an end is missing."""
    low = text.lower()
    if len(low) != len(text) or start not in low:  # a few capitals become longer in lower case
        return text
    out, place = [], 0
    while (begin := low.find(start, place)) >= 0 and (finish := low.find(end, begin)) >= 0:
        out.append(text[place:begin])
        place = finish + len(end)
    return "".join([*out, text[place:]])


_WIDE = re.compile("[\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6\U00020000-\U0003fffd]")  # fmt: skip
_ENDS = tuple("。！？；：…”』」!?;:.|")
_STARTS = re.compile(r"[\s#>|*+\-•·●○■□◆【《\d（(一二三四五六七八九十]")
_UNIT = re.compile(r"[!-~]+|.")
_SPACED = re.compile("[\u4e00-\u9fff] [A-Za-z0-9]|[A-Za-z0-9] [\u4e00-\u9fff]")
_TIGHT = re.compile("[\u4e00-\u9fff][A-Za-z0-9]|[A-Za-z0-9][\u4e00-\u9fff]")


def unwrap(text: str) -> str:
    """Join lines that were wrapped at a fixed width: without a space between Chinese characters, with a space between
    words, and between the two as in the rest of the text.

    A line was wrapped if the beginning of the next line would not have fitted. The width is the text's own; at least two
    lines must reach it (or it must be 64…80, the width of terminals and mails). Poems, lists and titles stay.
    """
    if "\n" not in text:
        return text
    lines = text.split("\n")
    widths = [len(line) + len(_WIDE.findall(line)) for line in lines]
    full = max(widths)
    if not 30 <= full <= 120 or (sum(width >= full - 3 for width in widths) < 2 and not 64 <= full <= 80):
        return text
    between = " " if len(_SPACED.findall(text)) > len(_TIGHT.findall(text)) else ""
    out = [lines[0]]
    for before, line, width in zip(lines, lines[1:], widths, strict=False):
        if _was_wrapped(before, line, width, full):
            out[-1] = out[-1].rstrip() + _separator(before.rstrip(), line, between) + line
        else:
            out.append(line)
    return "\n".join(out)


def _was_wrapped(before: str, line: str, width: int, full: int) -> bool:
    if not line or width < 0.6 * full or before.rstrip().endswith(_ENDS) or _STARTS.match(line):
        return False
    unit = _UNIT.match(line)
    needed = len(unit[0]) + len(_WIDE.findall(unit[0])) if unit else 0
    return width + needed > full - 2  # punctuation that may not begin a line leaves a gap


def _separator(before: str, line: str, between: str) -> str:
    left, right = bool(_WIDE.match(before[-1:])), bool(_WIDE.match(line))
    if left and right:
        return ""
    if left != right:
        punctuation = unicodedata.category(before[-1:] if left else line[0]).startswith("P")
        return "" if punctuation else between
    return " "


# -- optional rules -----------------------------------------------------------------------------------------------

_PERSONAL = (
    ("[身份证号]", re.compile(r"(?<!\d)[1-9]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?![\dA-Za-z])")),
    ("[电话]", re.compile(r"(?<![\d.])(?:(?:\+?86[- ]?)?1[3-9]\d(?:[- ]?\d{4}){2}|0\d{2,3}-\d{7,8})(?!\d)")),
    ("[邮箱]", re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,4}", re.ASCII)),
)  # fmt: skip
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def mask_personal_data(text: str) -> str:
    """Replace identity card numbers (with a valid check digit, GB 11643), phone numbers and e-mail addresses by marks."""
    for mark, pattern in _PERSONAL:
        text = pattern.sub(lambda found, mark=mark: mark if _is_real(mark, found[0]) else found[0], text)  # type: ignore[misc]
    return text


def refuse_personal_data(text: str) -> str | RejectedText:
    for mark, pattern in _PERSONAL:
        if any(_is_real(mark, found[0]) for found in pattern.finditer(text)):
            return RejectedText("personal_data", _("contains personal data: {mark}").format(mark=mark))
    return text


def _is_real(mark: str, found: str) -> bool:
    if mark != "[身份证号]":
        return True
    total = sum(weight * int(digit) for weight, digit in zip(_WEIGHTS, found, strict=False))
    return "10X98765432"[total % 11] == found[-1].upper()


def make_converter(direction: str) -> Filter:
    """Return a converter from traditional to simplified characters or back, with OpenCC's phrase dictionaries."""
    try:
        from opencc import OpenCC
    except ImportError:
        raise MissingPackage("opencc", f"convert: {direction}", "opencc") from None
    convert: Filter = OpenCC(direction).convert
    return convert


def check_length(text: str, least: int, most: int | None) -> str | RejectedText:
    if len(text) < least:
        return RejectedText(
            "too_short", _("{count} characters, min_chars is {least}").format(count=len(text), least=least)
        )
    if most and len(text) > most:
        return RejectedText(
            "too_long_text", _("{count} characters, max_chars is {most}").format(count=len(text), most=most)
        )
    return text


_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_LETTER = re.compile(r"[^\W\d_]")


def han_share(text: str) -> float:
    """Return the share of Chinese characters among all letters."""
    return len(_HAN.findall(text)) / max(1, len(_LETTER.findall(text)))


def check_han(text: str, least: float) -> str | RejectedText:
    share = han_share(text)
    if share < least:
        return RejectedText(
            "language",
            _("{share:.0%} Chinese characters, min_han is {least:g}").format(share=share, least=least),
        )
    return text


def check_repetition(text: str) -> str | RejectedText:
    """Drop texts of at least 200 characters with more than half in repeated lines, or that deflate to under a tenth.
    (Chinese prose deflates to about a half.)"""
    if len(text) < 200:
        return text
    lines = [line for line in text.split("\n") if len(line) > 4]
    if len(lines) >= 5:
        counts = Counter(lines)
        repeated = sum(len(line) * (count - 1) for line, count in counts.items())
        if repeated > 0.5 * len(text):
            return RejectedText(
                "repetition",
                _("{repeated:.0%} of the text is repeated lines").format(repeated=repeated / len(text)),
            )
    data = text[:100_000].encode("utf-8", "surrogatepass")
    ratio = len(zlib.compress(data, 1)) / len(data)
    if ratio < 0.1:
        return RejectedText("repetition", _("the text compresses to {ratio:.1%}").format(ratio=ratio))
    return text
