"""Cleaning repairs defects, keeps intended text and reports what it did."""

from __future__ import annotations

import time
import unicodedata

import pytest

from tongwen.core.records import Dialogue, Document, Message, Origin
from tongwen.data import clean
from tongwen.data.clean import Cleaner, RejectedText
from tongwen.recipe.data import Clean

HERE = Origin("f", 1)


def document(text: str, **rules) -> str | RejectedText:
    record = Cleaner(Clean(**rules), "documents").clean(Document(text, HERE))
    return record.text if isinstance(record, Document) else record


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("⻓江⼤桥，⻢上。", "长江大桥，马上。"),
        ("全角（标点）：不变！", "全角（标点）：不变！"),
        ("e\u0301te\u0301", "été"),
        ("神 \ufa19 豈 \uf900", "神 \ufa19 豈 \uf900"),  # compatibility ideographs are other characters
        ("ａｂ１２", "ａｂ１２"),
        ("零\u200b宽\ufeff与\u202e方向", "零宽与方向"),
        ("👨\u200d👩", "👨\u200d👩"),
        ("私\ue000用", "私用"),
        ("一\r\n二\u2028三", "一\n二\n三"),
        ("ä½\xa0å¥½ï¼Œä¸–ç•Œ", "你好，世界"),
        ("鎴戜滑鐨勭敓娲诲湪鍙戝睍", "我们的生活在发展"),
        ("<p>一段<b>粗</b>字&nbsp;与&lt;尖括号&gt;<br/>换行</p>", "\n一段粗字 与<尖括号>\n换行\n"),
        ("前<script>var a = '<b>';</script>后<!-- 注 -->", "前后"),
        ("如果 a < b 且 c > d，用 <tr> 表示行", "如果 a < b 且 c > d，用 <tr> 表示行"),
        ("List<String> 与 <dyn T> 不是标签", "List<String> 与 <dyn T> 不是标签"),
    ],
)
def test_defects_are_repaired_and_good_text_is_kept(before: str, after: str) -> None:
    assert document(before) == after


def test_normalisation_is_idempotent_and_neither_nfc_nor_nfkc() -> None:
    text = "⻓⼤豈ｱ①，é\u0301Å"
    once = clean.normalise(text)
    assert clean.normalise(once) == once
    assert once not in (unicodedata.normalize("NFC", text), unicodedata.normalize("NFKC", text))
    assert len(clean.RADICALS) == 114 + 214
    assert all(len(text) == 1 and ord(text) not in clean.RADICALS for text in clean.RADICALS.values())


def test_hard_wrapped_lines_are_joined_and_verse_is_not() -> None:
    line = "他们认为使用这种方法可以得到更加准确的结果而不需要花费更多的时间和精力"
    assert document(f"{line}\n{line[:20]}。") == f"{line}{line[:20]}。"
    english = "It is a truth universally acknowledged that a single man in possession"
    assert document(f"{english}\nof a good fortune") == f"{english} of a good fortune"
    poem = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"
    for kept in (poem, f"一、{line}\n二、{line}", f"{line}。\n{line}。", f"短标题\n{line}"):
        assert document(kept) == kept


@pytest.mark.parametrize(
    ("text", "rules", "reason"),
    [
        ("锟斤拷锟斤拷锟斤拷", {}, "mojibake"),
        ("字\ufffd\ufffd\ufffd字", {}, "mojibake"),
        ("\u200b\ufeff", {}, "empty_after_cleaning"),
        ("短", {"min_chars": 5}, "too_short"),
        ("长" * 9, {"max_chars": 5}, "too_long_text"),
        ("English only, mostly", {"min_han": 0.3}, "language"),
        ("这一行会重复很多很多次。\n" * 40, {}, "repetition"),
        ("哈" * 400, {}, "repetition"),
        ("请拨打13812345678联系", {"personal_data": "drop"}, "personal_data"),
    ],
)
def test_dropped_text_has_a_reason(text: str, rules: dict, reason: str) -> None:
    found = document(text, **rules)
    assert isinstance(found, RejectedText)
    assert found.reason == reason
    assert found.rule


def test_optional_rules_apply_on_request() -> None:
    assert document("Ｑｗｅｎ３，好", full_width=True) == "Qwen3，好"
    card = "11010519491231002X"
    text = f"身份证{card}，手机138 1234 5678，邮箱a.b@c.com，单号11010519491231002Y 12345678901234567890"
    masked = "身份证[身份证号]，手机[电话]，邮箱[邮箱]，单号11010519491231002Y 12345678901234567890"
    assert document(text, personal_data="mask") == masked
    pytest.importorskip("opencc")
    assert document("後來電腦軟體發展", convert="t2s") == "后来电脑软体发展"


def test_dialogues_keep_their_markup_and_their_lines() -> None:
    answer = "用 <b>粗体</b>：\n<p>一段</p>\n" + "哈哈" * 200
    dialogue = Dialogue((Message("user", "⻓江？"), Message("assistant", answer, thinking="想\u200b")), HERE)
    cleaner = Cleaner(Clean(), "dialogues")
    cleaned = cleaner.clean(dialogue)
    assert isinstance(cleaned, Dialogue)
    assert [message.content for message in cleaned.messages] == ["长江？", answer]
    assert cleaned.messages[1].thinking == "想"
    assert cleaner.changed == {"unicode": 1, "control": 1}
    assert cleaner.clean(cleaned) is cleaned, "what is clean is left alone"


@pytest.mark.parametrize(
    "worst", ["<a ", "<script", "&", "</script><script>", "锛", "å", "1", "13", "@a", "a@a.a", "\n", "中\n", " "]
)
def test_worst_case_text_is_cleaned_fast(worst: str) -> None:
    text = worst * (300_000 // len(worst))
    cleaner = Cleaner(Clean(personal_data="mask", min_han=0.1), "documents")
    began = time.process_time()
    cleaner.clean(Document(text, HERE))
    assert time.process_time() - began < 6
