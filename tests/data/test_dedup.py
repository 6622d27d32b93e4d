"""Deduplication matches exact similarity; evaluation data are not trained on."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tongwen.core.records import Dialogue, Document, Message, Origin
from tongwen.data import dedup

HERE = Origin("f", 1)
CHARACTERS = [chr(code) for code in range(0x4E00, 0x4E00 + 1500)]


def texts(count: int, length: int = 120, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(CHARACTERS, k=length)) for _ in range(count)]


def near(documents: list[str], threshold: float = 0.6) -> dict[int, int]:
    table = np.stack([dedup.signature(dedup.fold(text)) for text in documents])
    gone = np.zeros(len(documents), bool)
    return dedup.find_near(lambda band: table[:, band].copy(), gone, lambda i: dedup.fold(documents[i]), threshold)


def changed(text: str, share: float, rng: random.Random) -> str:
    out = list(text)
    for place in rng.sample(range(len(text)), round(share * len(text))):
        out[place] = rng.choice(CHARACTERS)
    return "".join(out)


def test_planted_near_duplicates_are_found_and_nothing_else() -> None:
    rng = random.Random(1)
    documents = texts(300)
    planted = rng.sample(range(300), 100)
    documents += [changed(documents[index], 0.05, rng) for index in planted]
    found = near(documents)
    assert all(dedup.jaccard(documents[one], documents[other]) >= 0.6 for one, other in found.items())
    assert sum(index in found for index in range(300, 400)) >= 95
    assert not any(index < 300 for index in found), "the first of a pair stays"
    left = [text for index, text in enumerate(documents) if index not in found]
    assert near(left) == {}, "deduplication is idempotent"


def test_similarity_is_jaccard_of_character_3_grams() -> None:
    one, other = "一二三四五六七八", "一二三四五六九十"
    first, second = ({text[place : place + 3] for place in range(6)} for text in (one, other))
    assert dedup.jaccard(one, other) == len(first & second) / len(first | second)
    assert dedup.jaccard(one, one) == 1 and dedup.jaccard("一二", one) == 0


def test_fold_ignores_width_case_blanks_and_punctuation() -> None:
    assert dedup.fold("Ｑwen３，你 好！") == dedup.fold("qwen3你好") == "qwen3你好"
    assert dedup.fold("……") == "......" or dedup.fold("……"), "a text of marks alone is not nothing"


@pytest.mark.parametrize("partition", [1, 3, 100])
def test_exact_duplicates_keep_the_first(partition: int, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["甲", "乙", "甲", "丙", "乙 ", "甲。"]
    digests = np.stack([np.frombuffer(dedup.digest(dedup.fold(word)), np.uint64) for word in words])
    monkeypatch.setattr(dedup, "PARTITION", partition)
    same, first = dedup.find_exact(lambda: iter([digests[:2], digests[2:]]), len(digests))
    assert dict(zip(same.tolist(), first.tolist(), strict=True)) == {2: 0, 4: 1, 5: 0}


def ask(question: str, answer: str = "答案") -> Dialogue:
    return Dialogue((Message("user", question), Message("assistant", answer)), HERE)


def test_evaluation_questions_are_recognised() -> None:
    questions = texts(40, 60, seed=3)
    examination = dedup.ContaminationIndex.from_records([ask(question, "甲") for question in questions])

    def knows(record) -> str:
        return examination.match(record, dedup.digest(dedup.fold(dedup.text_of(record))))

    assert knows(ask(questions[0], "甲")) == "same"
    assert knows(ask(questions[0], "另一个答案")) == "covers", "the same question with another answer"
    assert knows(Document("前文" * 50 + questions[7] + "后文", HERE)) == "covers"
    assert knows(ask(texts(1, 60, seed=99)[0])) == ""
    assert knows(ask(questions[0][:30] + texts(1, 30, seed=98)[0])) == "", "half a question is not the question"


def test_shared_instruction_is_no_contamination() -> None:
    instruction = texts(1, 80, seed=5)[0]
    examination = dedup.ContaminationIndex.from_records([ask(instruction + text) for text in texts(30, 20, seed=6)])
    for text in texts(30, 20, seed=7):
        record = ask(instruction + text)
        assert examination.match(record, dedup.digest(dedup.fold(dedup.text_of(record)))) == ""


@pytest.mark.parametrize("empty", [True, False])
def test_contamination_index_survives_save_and_load(empty: bool, tmp_path) -> None:
    records = [] if empty else [ask(text) for text in texts(5, 60, seed=8)]
    examination = dedup.ContaminationIndex.from_records(records)
    examination.save(tmp_path / "e.npz")
    found = dedup.ContaminationIndex.load(tmp_path / "e.npz")
    assert found.exact == examination.exact
    for name in ("hashes", "owners", "sizes"):
        assert np.array_equal(getattr(found, name), getattr(examination, name))
