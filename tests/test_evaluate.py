"""Scores agree with other implementations of the same measure, and what cannot be scored is said."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tongwen.infer import entities
from tongwen.infer.measures import TEXT, Answered, compare, summarise, without_thinking
from tongwen.likelihood import windows

NAMES, KINDS = ("北京", "上海", "李白", "白", "_下划线_", "联合国"), ("地名", "人名", "机构名")


def entity_rows(count: int, seed: int = 0) -> list[Answered]:
    """Random answers beside random truths: doubled, missing, empty, malformed lines among them."""
    rng = random.Random(seed)

    def some() -> list[str]:
        return [f"{rng.choice(NAMES)}_{rng.choice(KINDS)}" for _ in range(rng.randrange(4))]

    rows = []
    for _ in range(count):
        wanted = some()
        answer = [line for line in wanted if rng.random() < 0.7] + some()[: rng.randrange(3)]
        noise = [rng.choice(["没有", "", " 地名 ", "北京"])] if rng.random() < 0.2 else []
        question = "提取人名、地名。\n文本：" + "，".join(rng.sample(NAMES, len(NAMES)))
        rows.append(Answered(question, "\n".join([*answer, *noise]) or "没有", "\n".join(wanted) or "没有"))
    return rows


def score(name: str, rows: list[Answered]) -> dict[str, Any]:
    measure = TEXT[name]
    return summarise(np.array([measure.count(row) for row in rows]), measure.figures)


def test_entity_f1_is_scikit_learns_micro_f1_over_numbered_entities() -> None:
    from sklearn.metrics import precision_recall_fscore_support
    from sklearn.preprocessing import MultiLabelBinarizer

    def numbered(text: str) -> set[str]:  # the n-th of equal entities is a label of its own
        seen: Counter[str] = Counter()
        labels = set()
        for line in filter(None, map(str.strip, text.split("\n"))):
            if line != "没有":
                seen[line] += 1
                labels.add(f"{line}#{seen[line]}")
        return labels

    rows = entity_rows(200)
    said, wanted = [numbered(row.answer) for row in rows], [numbered(row.wanted) for row in rows]
    binary = MultiLabelBinarizer().fit(said + wanted)
    precision, recall, f1, _ = precision_recall_fscore_support(
        binary.transform(wanted), binary.transform(said), average="micro"
    )
    found = score("entity_f1", rows)["figures"]
    assert 0.3 < f1 < 0.9
    assert found == pytest.approx({"f1": f1, "precision": precision, "recall": recall})


def test_spans_are_scored_as_seqeval_scores_tags() -> None:
    from seqeval.metrics import f1_score, precision_score, recall_score

    rows = entity_rows(200, seed=1)
    said, wanted = zip(*(entities.tag(row.question, row.answer, row.wanted) for row in rows), strict=True)
    found = score("spans", rows)["figures"]
    assert found == pytest.approx(
        {
            "f1": f1_score(list(wanted), list(said)),
            "precision": precision_score(list(wanted), list(said)),
            "recall": recall_score(list(wanted), list(said)),
        }
    )


def test_an_entity_stands_where_its_name_last_occurs() -> None:
    question = "找地名。\n北京，北京"
    one, two = entities.tag(question, "北京_地名", "北京_地名\n北京_地名\n火星_地名\n月亮_地名")
    assert [place for place, tag in enumerate(one) if tag == "B-地名"] == [8]
    assert [place for place, tag in enumerate(two) if tag == "B-地名"] == [5, 8, 10, 11], (
        "behind the text what is not in it"
    )
    assert len(one) == len(two)


def test_exact_match_bleu_and_rouge_agree_with_others() -> None:
    import sacrebleu
    from sklearn.metrics import accuracy_score

    rng = random.Random(0)
    texts = ["今天天气很好，我们去公园散步吧。", "人工智能可以帮助我们学习语言 Python 3", "是的", "月亮自己不会发光"]
    rows = [Answered("", "".join(rng.choice(texts)[: rng.randrange(2, 20)]), rng.choice(texts)) for _ in range(60)]
    rows += [Answered("", text, text) for text in texts] + [Answered("", "", texts[0])]
    said, wanted = [row.answer for row in rows], [row.wanted for row in rows]
    assert score("exact_match", rows)["value"] == pytest.approx(accuracy_score(wanted, said))
    assert score("bleu", rows)["value"] == pytest.approx(sacrebleu.corpus_bleu(said, [wanted], tokenize="zh").score)

    def common(one: str, two: str) -> int:  # longest common subsequence, by its definition
        best = [0] * (len(two) + 1)
        for left in one:
            row = [0]
            for place, right in enumerate(two):
                row.append(best[place] + 1 if left == right else max(best[place + 1], row[-1]))
            best = row
        return best[-1]

    chinese = [row for row in rows if not any("a" <= letter.lower() <= "z" for letter in row.answer + row.wanted)]
    shares = []
    for row in chinese:
        same, size = common(row.answer, row.wanted), len(row.answer) + len(row.wanted)
        shares.append(2 * same / size if size else 0.0)
    assert score("rouge", chinese)["value"] == pytest.approx(np.mean(shares))
    assert score("rouge_words", [Answered("", "我爱北京", "我爱北京天安门")])["figures"]["rouge1"] == pytest.approx(
        6 / 7
    )


def test_thinking_is_no_answer() -> None:
    assert without_thinking("<think>北京_地名</think>\n没有") == "没有"
    assert without_thinking("想一想</think>好") == "好", "the template opened the thinking"
    assert without_thinking("<think>未完") == ""


def test_an_interval_holds_the_truth_and_a_pair_is_compared_as_one() -> None:
    rng = np.random.default_rng(1)
    figures = TEXT["exact_match"].figures
    inside = 0
    for _ in range(100):
        counts = np.stack([rng.random(80) < 0.3, np.ones(80)], axis=1).astype(float)
        found = summarise(counts, figures)
        inside += found["low"] <= 0.3 <= found["high"]
    assert 88 <= inside <= 100
    old = np.stack([rng.random(50) < 0.5, np.ones(50)], axis=1).astype(float)
    assert compare(old, old, figures) == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_windows_score_every_token_once_with_half_a_window_before() -> None:
    for count, size, first in ((3, 8, 1), (8, 8, 1), (9, 8, 1), (100, 8, 2), (101, 16, 1)):
        scored: list[int] = []
        for begin, end, start in windows(count, size, first):
            assert end - begin <= size and (begin == 0 or start - begin >= size // 2)
            scored += range(start, end)
        assert scored == list(range(first, count))
