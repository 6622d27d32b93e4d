"""The four projects' templates, letter by letter; and their tokens, as their own code made them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import dialogues, sentencepiece_tokenizer, tiny_llama, write_recipe
from tests.model.chatglm.chatglm_base import chatglm_folder
from tongwen.core.chat_template import Template
from tongwen.core.errors import RecipeError
from tongwen.core.records import Dialogue, Message, Origin
from tongwen.data.encoder import Encoder
from tongwen.data.legacy_encoder import RULES, LegacyEncoder
from tongwen.model.loading.chat_setup import bind_template
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.tokenizer import load_tokenizer

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# The prompts of each project: a first question, and a second one after an answer.
LITERAL = {
    "belle": ("Human: 问\n\nAssistant: ", "Human: 问\n\nAssistant: 答</s>Human: 又\n\nAssistant: "),
    "belle-v2": ("Human: \n问\n\nAssistant: \n", "Human: \n问\n\nAssistant: \n答</s>Human: \n又\n\nAssistant: \n"),
    "alpaca-cla": (f"{ALPACA}\n\n### Instruction:\n问\n\n### Response: ", None),
    "alpaca-llamacpp": (f"{ALPACA}\n\n### Instruction:\n\n问\n\n### Response:\n\n", None),
    "guanaco": (f"{CHAT}\nHuman: 问\nAssistant: ", f"{CHAT}\nHuman: 问\nAssistant: 答</s>\nHuman: 又\nAssistant: "),
    "guanaco-v1": ("Instruction: 问\nAnswer: ", None),
    "guanaco-chat": (f"{CHAT}\n\nUser: 问\n\nAssistant:", None),
    "vicuna": (f"{CHAT}</s>USER: 问 ASSISTANT: ", f"{CHAT}</s>USER: 问 ASSISTANT: 答</s>USER: 又 ASSISTANT: "),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return sentencepiece_tokenizer(tmp_path_factory.mktemp("llama"), legacy=True)


def bound(name: str) -> Template:
    return Template.make(name, None, {"bos_token": "<s>", "eos_token": "</s>"}, ("<s>", "</s>"), prefix="<s>")


@pytest.mark.parametrize("name", LITERAL)
def test_legacy_templates_match_the_originals(name: str) -> None:
    template, (first, second) = bound(name), LITERAL[name]
    ask, reply, again = Message("user", "问"), Message("assistant", "答"), Message("user", "又")
    assert template.prompt([ask]) == f"<s>{first}"
    assert template.stop == "</s>" and not template.appended
    if second is not None:
        assert template.prompt([ask, reply, again]) == f"<s>{second}"


# -- the old code, as short as it can be said; HF's `tokenizer(text)` puts <s> before -------------------------------------


def belle(tokenizer: Any, prompt: str, answer: str, length: int) -> tuple[list[int], int]:
    def tokenise(text: str) -> list[int]:
        ids = list(tokenizer(text)["input_ids"])[:length]
        if len(ids) == length:
            ids[-1] = 2
        return ids

    whole = tokenise(f"<s>{prompt}{answer}</s>")
    return whole, min(len(tokenizer(f"<s>{prompt}")["input_ids"]), len(whole))


def cla(tokenizer: Any, prompt: str, answer: str, length: int) -> tuple[list[int], int]:
    source = list(tokenizer(prompt)["input_ids"])
    target = list(tokenizer(f"{answer}</s>", add_special_tokens=False)["input_ids"])
    return (source + target)[:length], min(len(source), length)


def guanaco(tokenizer: Any, prompt: str, answer: str, length: int) -> tuple[list[int], int]:
    half = length // 2
    source = list(tokenizer(prompt)["input_ids"])[:half]
    target = list(tokenizer(f"{answer}</s>", add_special_tokens=False)["input_ids"])[:half]
    return source + target, len(source)


OLD: dict[str, Callable[[Any, str, str, int], tuple[list[int], int]]] = {
    "belle": belle,
    "alpaca-cla": cla,
    "guanaco": guanaco,
    "guanaco-v1": guanaco,
    "vicuna": guanaco,
}


@pytest.mark.parametrize("length", [1000, 240, 60, 20])
@pytest.mark.parametrize("name", OLD)
def test_legacy_tokens_match_the_old_code(name: str, length: int, tokenizer: Any) -> None:
    template = bind_template(name, tokenizer, Encoder(tokenizer).prefix)
    for answer in ("是", "今天天气很好。" * 3, "Hello"):
        dialogue = Dialogue((Message("user", "你好吗"), Message("assistant", answer)), Origin("f", 1))
        (sample,) = template.samples(dialogue)
        prompt, learned = LegacyEncoder(tokenizer, name, length).encode([sample.spans])[0]
        text = template.prompt(dialogue.messages[:1]).removeprefix("<s>")
        ids, masked = OLD[name](tokenizer, text, answer, length)
        assert [*prompt.ids, *learned.ids] == ids, (name, length, answer)
        assert len(prompt.ids) == masked and not prompt.learn and learned.learn


def test_every_old_script_is_covered() -> None:
    assert RULES.keys() == {*OLD, "chatglm"}


@pytest.mark.parametrize("length", [1000, 30, 12])
def test_chatglm_legacy_tokens_match_the_old_code(length: int, small_ice: Path, tmp_path: Path) -> None:
    """chinese_llm_sft: ids + `[gMASK]`, then `<sop>`, answer and `<eop>` as the target, cut from the right."""
    tokenizer = load_tokenizer(ModelRef("", str(chatglm_folder(tmp_path, small_ice))))
    template = bind_template("chatglm", tokenizer, Encoder(tokenizer).prefix)
    gmask, sop, eop = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>", "<eop>"])
    question, cut = "找出地名。\n文本：我们去公园。", 0
    for answer in ("没有", "公园_地名\n公园_地名"):
        dialogue = Dialogue((Message("user", question), Message("assistant", answer)), Origin("f", 1))
        (sample,) = template.samples(dialogue)
        encoder = LegacyEncoder(tokenizer, "chatglm", length)
        prompt, learned = encoder.encode([sample.spans])[0]
        source, target = (tokenizer.encode(text, add_special_tokens=False) for text in (question, answer))
        ids = [*source, gmask, sop, *target, eop][:length]
        assert [*prompt.ids, *learned.ids] == ids
        assert len(prompt.ids) == min(len(source) + 1, length) and learned.learn
        assert encoder.keeps_stop([prompt, learned]) == (ids[-1] == eop)
        cut += not learned.ids
    assert cut == (2 if length == 12 else 0), "where <sop> was cut, the old model crashed; here the sample is rejected"


def test_chatglm_legacy_trains_end_to_end(small_ice: Path, tmp_path: Path, tongwen: Any) -> None:
    base = chatglm_folder(tmp_path / "chatglm-6b", small_ice)
    rows = dialogues(10)
    long = {"instruction": "很长的问题" * 80, "input": "", "output": "好"}
    recipe = write_recipe(tmp_path, base, rows=[*rows, long], merge=False)
    overrides = [
        "sft.template=chatglm",
        "sft.legacy=true",
        "sft.stop_after=1 steps",
        "sft.samples=0",
        "prepare.held_out=0",
    ]
    code, _, err = tongwen("run", recipe, *overrides)
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "sft" / "report.json").read_text())
    tokenizer = load_tokenizer(ModelRef("", str(base)))
    answers = [tokenizer.encode(row["output"], add_special_tokens=False) for row in rows]
    assert report["mask"]["learned_tokens"] == sum(len(ids) + 2 for ids in answers), "<sop> and <eop> are learned"
    assert report["ledger"]["encode"]["lost"].keys() == {"nothing_to_learn"}


def test_defects_are_fixed_by_default(tokenizer: Any) -> None:
    template = bind_template("belle", tokenizer, [1])
    (sample,) = template.samples(Dialogue((Message("user", "问"), Message("assistant", "是")), Origin("f", 1)))
    old, new = (one.encode([sample.spans])[0] for one in (LegacyEncoder(tokenizer, "belle", 64), Encoder(tokenizer)))
    learned = [tokenizer.convert_ids_to_tokens(list(pieces[-1].ids)) for pieces in (old, new)]
    assert learned == [["</s>"], ["是", "</s>"]]  # the answer itself had a loss of 0
    assert list(old[0].ids[:2]) == [1, 1] and list(new[0].ids[:2]) != [1, 1]


def test_legacy_setting_of_the_recipe(tongwen: Any, tmp_path: Path) -> None:
    base = tmp_path / "llama"
    tiny_llama(base, len(sentencepiece_tokenizer(base, legacy=True)))
    overrides = ["sft.template=alpaca-cla", "sft.legacy=true", "sft.stop_after=1 steps", "--only", "sft"]
    recipe = write_recipe(tmp_path, base, merge=False)
    assert tongwen("run", recipe, "--only", "prepare")[0] == 0
    code, _, err = tongwen("run", recipe, *overrides, "sft.max_length=160")
    assert code == 3 and "min_stop_learned" in err  # the cut takes ends along, and that is not silent
    code, _, err = tongwen("run", recipe, *overrides, "sft.max_length=400")
    assert code == 0, err
    mask = json.loads((tmp_path / "out/sft/report.json").read_text())["mask"]
    assert mask["stop_learned_share"] == 1, mask
    with pytest.raises(RecipeError, match="chatml"):
        LegacyEncoder(sentencepiece_tokenizer(tmp_path / "t"), "chatml", 10)
