"""Scores agree with other implementations of the same measure, and unscorable data are reported."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import dialogues, write_recipe, write_rows
from tongwen.cli.main import main
from tongwen.core.answer_form import find_answer_form
from tongwen.core.chat_template import Template
from tongwen.core.errors import DataError, ModelError
from tongwen.infer import entities
from tongwen.infer.metrics import TEXT, AnsweredPrompt, compare, summarise, without_thinking
from tongwen.recipe.data import SourceConfig
from tongwen.recipe.outputs import Evaluate, TaskConfig
from tongwen.workflows import scoring
from tongwen.workflows.evaluation import read_task
from tongwen.workflows.likelihood import windows

NAMES, KINDS = ("北京", "上海", "李白", "白", "_下划线_", "联合国"), ("地名", "人名", "机构名")


def entity_rows(count: int, seed: int = 0) -> list[AnsweredPrompt]:
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
        rows.append(AnsweredPrompt(question, "\n".join([*answer, *noise]) or "没有", "\n".join(wanted) or "没有"))
    return rows


def score(name: str, rows: list[AnsweredPrompt]) -> dict[str, Any]:
    measure = TEXT[name]
    return summarise(np.array([measure.count(row) for row in rows]), measure.figures)


def test_entity_f1_matches_scikit_learn_micro_f1() -> None:
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
    predicted, wanted = [numbered(row.answer) for row in rows], [numbered(row.wanted) for row in rows]
    binary = MultiLabelBinarizer().fit(predicted + wanted)
    precision, recall, f1, _ = precision_recall_fscore_support(
        binary.transform(wanted), binary.transform(predicted), average="micro"
    )
    found = score("entity_f1", rows)["figures"]
    assert 0.3 < f1 < 0.9
    assert found == pytest.approx({"f1": f1, "precision": precision, "recall": recall})


def test_span_scores_match_seqeval() -> None:
    from seqeval.metrics import f1_score, precision_score, recall_score

    rows = entity_rows(200, seed=1)
    predicted, wanted = zip(*(entities.tag(row.question, row.answer, row.wanted) for row in rows), strict=True)
    found = score("spans", rows)["figures"]
    assert found == pytest.approx(
        {
            "f1": f1_score(list(wanted), list(predicted)),
            "precision": precision_score(list(wanted), list(predicted)),
            "recall": recall_score(list(wanted), list(predicted)),
        }
    )


def test_entity_is_located_at_its_last_occurrence() -> None:
    question = "找地名。\n北京，北京"
    one, two = entities.tag(question, "北京_地名", "北京_地名\n北京_地名\n火星_地名\n月亮_地名")
    assert [place for place, tag in enumerate(one) if tag == "B-地名"] == [8]
    assert [place for place, tag in enumerate(two) if tag == "B-地名"] == [5, 8, 10, 11], (
        "behind the text what is not in it"
    )
    assert len(one) == len(two)


def test_exact_match_bleu_and_rouge_match_other_libraries() -> None:
    import sacrebleu
    from sklearn.metrics import accuracy_score

    rng = random.Random(0)
    texts = ["今天天气很好，我们去公园散步吧。", "人工智能可以帮助我们学习语言 Python 3", "是的", "月亮自己不会发光"]
    rows = [
        AnsweredPrompt("", "".join(rng.choice(texts)[: rng.randrange(2, 20)]), rng.choice(texts)) for _ in range(60)
    ]
    rows += [AnsweredPrompt("", text, text) for text in texts] + [AnsweredPrompt("", "", texts[0])]
    predicted, wanted = [row.answer for row in rows], [row.wanted for row in rows]
    assert score("exact_match", rows)["value"] == pytest.approx(accuracy_score(wanted, predicted))
    assert score("bleu", rows)["value"] == pytest.approx(
        sacrebleu.corpus_bleu(predicted, [wanted], tokenize="zh").score
    )

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
    assert score("rouge_words", [AnsweredPrompt("", "我爱北京", "我爱北京天安门")])["figures"][
        "rouge1"
    ] == pytest.approx(6 / 7)


def test_thinking_is_removed_from_answers() -> None:
    assert without_thinking("<think>北京_地名</think>\n没有") == "没有"
    assert without_thinking("想一想</think>好") == "好", "the template opened the thinking"
    assert without_thinking("<think>未完") == ""


def test_confidence_interval_coverage_and_paired_comparison() -> None:
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


def test_windows_score_each_token_once_with_enough_context() -> None:
    for count, size, first in ((3, 8, 1), (8, 8, 1), (9, 8, 1), (100, 8, 2), (101, 16, 1)):
        scored: list[int] = []
        for begin, end, start in windows(count, size, first):
            assert end - begin <= size and (begin == 0 or start - begin >= size // 2)
            scored += range(start, end)
        assert scored == list(range(first, count))


# -- the command ---------------------------------------------------------------------------------------------------


def opened(folder: Path, template: str = "chatml") -> Any:
    from tongwen.workflows.chat_model import open_chat_model

    return open_chat_model(str(folder), template=template, precision="fp32")


def test_likelihood_matches_a_plain_forward_pass(chat_model: Path, tongwen: Any, tmp_path: Path) -> None:
    texts = ["你好，世界。" * 3, "Hello world, how are you today?" * 40]
    data = write_rows(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    code, out, err = tongwen(
        "evaluate", "--model", chat_model, "--task", "bits_per_byte", "--task", "perplexity", "--data", data, "--json"
    )
    assert code == 0, err
    scores = json.loads(out)["scores"]
    model, nats, tokens, size = opened(chat_model, "completion").generator, 0.0, 0, 0
    for text in texts:
        ids = [model.tokenizer.convert_tokens_to_ids("<|endoftext|>"), *model.tokenizer(text)["input_ids"]]
        for begin, end, first in windows(len(ids), model.context, 1):
            whole = torch.tensor([ids[begin:end]])
            loss = torch.nn.functional.cross_entropy(
                model.model(whole).logits[0, first - begin - 1 : -1], whole[0, first - begin :], reduction="sum"
            )
            nats, tokens = nats + loss.item(), tokens + end - first
        size += len(text.encode())
    assert scores["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert scores["perplexity"]["value"] == pytest.approx(math.exp(nats / tokens), rel=1e-3)


CEVAL = (
    "id,question,A,B,C,D,answer\n0,一加一等于？,一,二,三,四,B\n1,月亮,发光,不发光,是太阳,是水,B\n2,天气,好,坏,冷,热,A\n"
)
CMMLU = ",Question,A,B,C,D,Answer\n0,一加一等于？,一,二,三,四,B\n1,月亮,发光,不发光,是太阳,是水,D\n"
MMLU = 'One plus one?,"one, 1",two,three,four,B\nThe moon?,a,b,c,d,C\n'


def suite(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("template", ["chatml", "completion"])
@pytest.mark.parametrize(
    ("name", "text", "head", "mark"),
    [
        ("logic_val.csv", CEVAL, "以下是中国关于logic考试的单项选择题，请选出其中的正确答案。", "答案："),
        ("logic.csv", CMMLU, "以下是关于logic的单项选择题，请直接给出正确答案的选项。", "答案是："),
        ("logic_test.csv", MMLU, "The following are multiple choice questions (with answers) about logic.", "Answer:"),
    ],
)
def test_options_are_ranked_by_rendered_likelihood(
    name: str, text: str, head: str, mark: str, template: str, chat_model: Path, tongwen: Any, tmp_path: Path
) -> None:
    """The same choice from whole texts, rendered by hand and scored one by one."""
    data = suite(tmp_path / "data", name, text)
    shot = suite(tmp_path / "dev", name.replace("val", "dev").replace("test", "dev"), text)
    code, _, err = tongwen(
        "evaluate", "--model", chat_model, "--task", "multiple_choice", "--data", data, "--examples", shot,
        "--shots", 1, "--template", template, "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    voice = opened(chat_model).generator

    def block(cells: list[str]) -> str:
        return "\n".join(
            [cells[0], *(f"{letter}. {cell}" for letter, cell in zip("ABCD", cells[1:5], strict=True)), mark]
        )

    lines = [line for line in text.strip().split("\n") if "uestion" not in line]
    rows = [line.replace('"one, 1"', "one; 1").split(",")[-6:] for line in lines]
    rows = [[cell.replace(";", ",") for cell in row] for row in rows]
    picked = []
    for row in rows:
        nats = []
        for letter in "ABCD":
            blank = " " if mark == "Answer:" and template == "completion" else ""
            first, second = f"{head}\n\n{block(rows[0])}", block(row)
            if template == "completion":
                before, answer = f"{first}{blank}{rows[0][5]}\n\n{second}", blank + letter
            else:
                turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
                before = f"{turn.format(first)}{rows[0][5]}<|im_end|>\n{turn.format(second)}"
                answer = letter
            prompt, answer_ids = (voice.tokenizer(part)["input_ids"] for part in (before, answer))
            with torch.no_grad():
                logits = voice.model(torch.tensor([prompt + answer_ids])).logits[0, len(prompt) - 1 : -1]
            nats.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer_ids), reduction="sum")))
        picked.append("ABCD"[int(np.argmin(nats))])
    found = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in found] == picked
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["multiple_choice"]
    assert scores["value"] == np.mean([one == row[5] for one, row in zip(picked, rows, strict=True)])


def test_two_models_are_compared_in_a_report(chat_model: Path, other_model: Path, tongwen: Any, tmp_path: Path) -> None:
    rows = [{"instruct": "找地名", "query": f"文本：北京{index}", "answer": "北京_地名"} for index in range(6)]
    data = write_rows(tmp_path / "ner.jsonl", rows)
    out = tmp_path / "out"
    argv = ["evaluate", "--model", chat_model, "--before", other_model, "--data", data, "--template", "chatml"]
    argv += ["--task", "entity_f1", "--task", "exact_match", "--task", "bits_per_byte", "--max-new-tokens", 8]
    code, stdout, err = tongwen(*argv, "--limit", 4, "--out", out)
    assert code == 0, err
    scores = json.loads((out / "scores.json").read_text())
    assert scores["entity_f1"]["rows"] == 4
    bits = scores["bits_per_byte"]
    assert bits["change"]["value"] == pytest.approx(bits["value"] - bits["before"]["value"])
    assert bits["low"] <= bits["value"] <= bits["high"]
    assert "95 %" in (out / "report.html").read_text(encoding="utf-8") and "change" in stdout
    assert json.loads((out / "manifest.json").read_text())["kind"] == "evaluate"
    shown = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert {"question", "answer", "wanted", "before"} <= shown[0].keys()
    code, _, err = tongwen(*argv, "--out", out)
    assert code == 2 and "this already exists" in err


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_tool_calls_are_compared_as_json_and_checked_by_their_schemas(tmp_path: Path) -> None:
    def call(arguments: Any, name: str = "weather") -> str:
        return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"

    right = {"city": "北京", "days": 1}
    calls = [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": json.dumps(right)}}]
    called = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    row = {
        "messages": [
            *called,
            {"role": "tool", "content": "晴", "tool_call_id": "a"},
            {"role": "assistant", "content": "晴。"},
        ]
    }
    one = {"messages": called, "tools": [WEATHER]}
    data = write_rows(tmp_path / "rows.jsonl", [{**row, "tools": [WEATHER]}, *[one] * 7, row])
    task = read_task(TaskConfig(task="tool_calls", data=SourceConfig(path=str(data))))
    answers = [
        (call({"days": 1.0, "city": "北京"}), (1, 1, 1, 1)),  # keys in any order, 1 = 1.0
        ("晴。", (1, 1, 1, 0)),  # no call is wanted
        (f"<think>{call(right)}</think>" + call(right), (1, 1, 1, 1)),
        (call({"city": "北京", "days": True}), (0, 1, 0, 1)),
        (call({"city": "北京", "days": 0}), (0, 1, 0, 1)),
        (call({"days": 1}), (0, 1, 0, 1)),
        (call({**right, "x": 1}), (0, 1, 0, 1)),
        (call(right) + call(right), (0, 0, 1, 1)),
        (call(right, "clock"), (0, 0, 0, 1)),
    ]
    assert len(task) == len(answers)
    template = Template.make("chatml", None, {}, ["<|im_start|>", "<|im_end|>"])
    model: Any = SimpleNamespace(tool_parser=find_answer_form(template).tools)
    scores = task.run(model, lambda questions, progress: [text for text, _counts in answers], lambda done: None)
    assert [tuple(scores.counts[row][:4]) for row in range(len(answers))] == [counts for _text, counts in answers]
    assert scores.shown[5]["problem"] == "weather.city: missing" and scores.shown[0]["wanted"].startswith("weather {")
    assert task.result(scores)["figures"] == {
        "exact_calls": 3 / 9, "right_tools": 7 / 9, "valid_arguments": 4 / 9, "called": 8 / 9,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}, "no row has tools"),
        (
            {
                "messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}],
                "tools": [{"name": "f", "parameters": {"type": "thing"}}],
            },
            "parameters.type: 'thing'",
        ),
    ],
)
def test_rows_without_usable_tools_are_refused(tmp_path: Path, row: dict[str, Any], rule: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=rule):
        read_task(TaskConfig(task="tool_calls", data=SourceConfig(path=str(data))))


@pytest.mark.sample()
def test_killed_evaluation_resumes(chat_model: Path, other_model: Path, tongwen: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "qa.jsonl", [{"question": f"问题{n}", "std_answer": f"答{n}"} for n in range(6)])
    model = shutil.copytree(chat_model, tmp_path / "model")
    out, beside = tmp_path / "out", tmp_path / "out.answers"
    argv = ["evaluate", "--model", model, "--before", other_model, "--data", data, "--task", "exact_match"]
    argv = [*map(str, argv), "--task", "rouge", "--template", "chatml", "--batch-size", "1", "--max-new-tokens", "60"]
    argv += ["--out", str(out)]
    child = os.fork()
    if child == 0:
        with contextlib.redirect_stdout(io.StringIO()):
            os._exit(main(argv))

    def kept() -> list[list[list[Any]]]:
        """The [row, answer] of each journal, the longest first."""
        lines = [file.read_text(encoding="utf-8").split("\n")[1:-1] for file in beside.glob("*")]
        return sorted(([json.loads(line) for line in some] for some in lines), key=len, reverse=True)

    ends = time.monotonic() + 120
    while sum(map(len, kept())) < 8 and time.monotonic() < ends:  # in the middle of the second model
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    first, second = kept()
    assert len(first) == 6 > len(second) >= 2 and not out.exists()
    row, answer = second[0]
    for file in beside.glob("*"):
        if (text := file.read_text(encoding="utf-8")).count("\n") < 7:
            marked = text.replace(json.dumps([row, answer], ensure_ascii=False), f'[{row}, "kept"]')
            file.write_text(marked + '[5, "torn', encoding="utf-8")
    shutil.copytree(beside, tmp_path / "other.answers")
    code, stdout, err = tongwen(*argv)
    assert code == 0, err
    assert "6 answers already exist" in stdout and f"{len(second)} answers already exist" in stdout
    shown = [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [one["answer"] for one in shown if one["row"] == row + 1] == ["kept"] * 2, "it was not generated again"
    assert not beside.exists()
    os.utime(model / "model.safetensors")
    code, stdout, _ = tongwen(*argv[:-1], str(tmp_path / "other"))
    assert code == 0 and stdout.count("answers already exist") == 1, "other weights answer for themselves"


def test_held_out_scores_match_the_training_report(chat_model: Path, tongwen: Any, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        chat_model,
        dialogues(24),
        extra="evaluate: {tasks: [bits_per_byte, exact_match], max_new_tokens: 4}\n",
    )
    code, _, err = tongwen("run", recipe)
    assert code == 0, err
    scores = json.loads((tmp_path / "out" / "evaluate" / "scores.json").read_text())
    report = json.loads((tmp_path / "out" / "sft" / "report.json").read_text())["held_out"]["bits_per_byte"]
    assert scores["bits_per_byte"]["before"]["value"] == pytest.approx(report["before"], rel=1e-4)
    assert scores["bits_per_byte"]["value"] == pytest.approx(report["after"], rel=1e-3)
    code, stdout, _ = tongwen("run", recipe)
    assert code == 0 and "evaluate: already done" in stdout


def test_rows_without_an_answer_are_counted_but_not_scored(chat_model: Path, tongwen: Any, tmp_path: Path) -> None:
    rows = [
        {"question": "一", "std_answer": "1"},
        {"question": "二", "std_answer": ""},
        {"question": "三", "std_answer": "3"},
    ]
    data = write_rows(tmp_path / "belle.jsonl", rows)
    argv = ["evaluate", "--model", chat_model, "--template", "chatml", "--data", data, "--max-new-tokens", 2]
    code, stdout, err = tongwen(*argv, "--task", "exact_match", "--task", "bits_per_byte", "--out", tmp_path / "out")
    assert code == 0, err
    assert stdout.count("1 rows without an answer are not scored") == 2
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["exact_match"]["rows"] == scores["bits_per_byte"]["rows"] == 2


def test_evaluate_only_recipe_reports_an_unusable_base(chat_model: Path, tongwen: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "text.jsonl", [{"text": "你好"}])
    recipe = tmp_path / "only.yaml"
    recipe.write_text(
        f"name: only\nbase: {chat_model}\nout: {tmp_path / 'only'}\nevaluate: {{tasks: [{{task: bits_per_byte, data: {data}}}]}}\n"
    )
    code, _, err = tongwen("run", recipe)
    assert code == 0, err
    assert "before" not in json.loads((tmp_path / "only" / "evaluate" / "scores.json").read_text())["bits_per_byte"]
    task = read_task(TaskConfig(task="bits_per_byte", data=SourceConfig(path=str(data))))

    after, nowhere = scoring.EvaluatedModel(str(chat_model), template="chatml"), str(tmp_path / "nowhere")
    section = Evaluate(tasks=[task.config])
    scores = scoring.evaluate_models(
        [task], after, scoring.EvaluatedModel(nowhere, optional=True), section, tmp_path, None
    )
    assert "before" not in scores["bits_per_byte"]
    with pytest.raises(ModelError):
        scoring.evaluate_models([task], after, scoring.EvaluatedModel(nowhere), section, tmp_path, None)


@pytest.mark.parametrize(
    ("name", "text", "task", "wanted"),
    [
        ("a.jsonl", "", "entity_f1", ("a.jsonl",)),
        ("a.jsonl", '{"prompt": "问"}\n', "exact_match", ("a.jsonl:1", "exact_match needs reference answers")),
        ("a.jsonl", '{"instruction": "问", "output": "北京"}\n', "entity_f1", ("a.jsonl:1", "'北京'", "实体_类型")),
        ("a.jsonl", '{"x": "问"}\n', "bleu", ("a.jsonl:1", "columns")),
        ("a.csv", "id,question,A,B,C,D,answer\n0,问,甲,乙,丙,丁,E\n", "multiple_choice", ("a.csv:2", "'E'", "A, B, C, D")),
        ("a.csv", "id,question,A,B,C,D,answer\n0,问,甲,乙\n", "multiple_choice", ("a.csv:2", "4 columns")),
        ("a.csv", "问,答\n1,2\n", "multiple_choice", ("a.csv:1", "C-Eval")),
        ("a.csv", "\n\n", "multiple_choice", ("a.csv",)),
    ],
)  # fmt: skip
def test_unscorable_data_is_refused_before_loading_a_model(
    name: str, text: str, task: str, wanted: tuple[str, ...], tongwen: Any, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    code, _, err = tongwen("evaluate", "--model", tmp_path / "none", "--task", task, "--data", tmp_path / name)
    assert code == 3, err
    assert all(word in err for word in wanted), err
    assert "→" in err or not text.strip(), "a remedy"


def test_unknown_task_lists_known_tasks(tongwen: Any, tmp_path: Path) -> None:
    code, _, err = tongwen("evaluate", "--model", "m", "--task", "entity_f", "--data", "d")
    assert code == 2 and "'entity_f'" in err and "entity_f1" in err and "multiple_choice" in err
    code, _, err = tongwen("evaluate", "--model", "m", "--task", "multiple_choice", "--shots", "2", "--data", "d")
    assert code == 2 and "needs `examples`" in err


def test_nan_logits_are_an_error(
    chat_model: Path, tongwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tongwen.model.loading import load

    def broken(*arguments: Any, **options: Any) -> Any:
        model = plain(*arguments, **options)
        model.model.norm.weight.data.fill_(float("nan"))
        return model

    plain = load.load_model
    monkeypatch.setattr("tongwen.model.adapters.chain.load_model", broken)
    choices = suite(tmp_path / "mc", "a.csv", CEVAL)
    text = write_rows(tmp_path / "text.jsonl", [{"text": "你好"}])
    pairs = write_rows(tmp_path / "pairs.jsonl", dialogues(2))
    for task, data in (("multiple_choice", choices), ("bits_per_byte", text), ("exact_match", pairs)):
        code, _, err = tongwen("evaluate", "--model", chat_model, "--task", task, "--data", data)
        assert code == 6 and "NaN" in err, (task, err)


def test_lm_eval_suite_is_scored(chat_model: Path, tongwen: Any, tmp_path: Path) -> None:
    """A multiple-choice task of its own, whose accuracy follows from plain likelihoods."""
    pytest.importorskip("lm_eval")
    rows = [{"question": f"题{number}", "answer": number % 2} for number in range(4)]
    data = write_rows(tmp_path / "suite" / "rows.jsonl", rows)
    (tmp_path / "suite" / "tiny.yaml").write_text(
        f"task: tiny_zh\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: answer\n"
        "doc_to_choice: ['好', '坏']\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    argv = ["evaluate", "--model", chat_model, "--task", "lm_eval", "--data", data.parent, "--json"]
    code, out, err = tongwen(*argv, "--suite", "tiny_zh")
    assert code == 0, err
    voice, right = opened(chat_model, "completion").generator, 0
    for row in rows:
        prompt = voice.tokenizer(row["question"])["input_ids"]
        nats = []
        for answer in ("好", "坏"):
            answer_ids = voice.tokenizer(answer)["input_ids"]
            with torch.no_grad():
                logits = voice.model(torch.tensor([prompt + answer_ids])).logits[0, len(prompt) - 1 : -1]
            nats.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer_ids), reduction="sum").item())
        right += int(np.argmin(nats)) == row["answer"]
    assert json.loads(out.splitlines()[-1])["scores"]["tiny_zh"]["value"] == right / 4
    code, _, err = tongwen(*argv, "--suite", "nothing_like_it")
    assert code == 2 and "no such task" in err


def test_missing_lm_eval_names_the_package(chat_model: Path, tongwen: Any) -> None:
    if importlib.util.find_spec("lm_eval"):
        pytest.skip("it is installed")
    code, _, err = tongwen("evaluate", "--model", chat_model, "--task", "lm_eval", "--suite", "ceval-valid")
    assert code == 5 and "tongwen[lm-eval]" in err
    code, _, err = tongwen("evaluate", "--model", chat_model, "--task", "lm_eval")
    assert code == 2 and "`suite: NAME`" in err
