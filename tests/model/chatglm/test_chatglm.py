"""ChatGLM-6B matches the original implementation and runs through every stage like any other family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import CORPUS, SHARED, dialogues, write_recipe
from tests.model.chatglm.chatglm_base import AUTO_MAP, chatglm_folder
from tongwen.core.errors import ModelError
from tongwen.core.records import Dialogue, Message, Origin
from tongwen.data.encoder import Encoder
from tongwen.data.token_bytes import token_bytes
from tongwen.model.loading import chat_setup, load
from tongwen.model.loading.architecture import load_config
from tongwen.model.loading.locate import locate
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.tokenizer import check_tokenizer, load_tokenizer
from tongwen.workflows.chat_model import open_chat_model

GOLDEN, ICE = SHARED / "golden", SHARED / "tokenizers" / "ice_text.model"
needs_shared = pytest.mark.skipif(not ICE.is_file(), reason="TONGWEN_SHARED is not set")


def golden_model() -> Any:
    return load.load_model(locate(str(GOLDEN / "chatglm_tiny")), torch.float32).eval()


@needs_shared
def test_logits_match_the_original() -> None:
    from safetensors.torch import load_file

    model, expected = golden_model(), load_file(GOLDEN / "chatglm_tiny" / "expected.safetensors")
    for number in range(8):
        ids, labels, logits, loss, greedy = (
            expected[f"{number}.{name}"] for name in ("input_ids", "labels", "logits", "loss", "greedy")
        )
        out = model(ids[None], labels=labels[None])
        torch.testing.assert_close(out.logits[0], logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(out.loss[None], loss, rtol=0, atol=1e-5)
        prompt = greedy[None, :-10]
        for cached in (True, False):
            answer = model.generate(prompt, max_new_tokens=10, do_sample=False, eos_token_id=None, use_cache=cached)
            assert answer[0].tolist() == greedy.tolist()
    model.zero_grad()
    model(expected["0.input_ids"][None], labels=expected["0.labels"][None]).loss.backward()
    wanted = expected["0.grad.query_key_value"]
    torch.testing.assert_close(
        model.transformer.layers[1].attention.query_key_value.weight.grad, wanted, atol=1e-5, rtol=0
    )


@needs_shared
def test_padding_and_packing_keep_the_logits() -> None:
    """Rows padded on either side, and documents end to end, get the logits that each has alone."""
    from safetensors.torch import load_file

    from tongwen.model.kernels import packed_attention

    model, expected = golden_model(), load_file(GOLDEN / "chatglm_tiny" / "expected.safetensors")
    texts = [expected[f"{number}.input_ids"] for number in (0, 3)]
    alone = [expected[f"{number}.logits"] for number in (0, 3)]
    short, long = texts
    gap = len(long) - len(short)
    padding, real = torch.full((gap,), 3), torch.ones(2, len(long), dtype=torch.long)
    for left in (True, False):
        parts = [padding, short] if left else [short, padding]
        mask = real.clone()
        mask[0, slice(0, gap) if left else slice(len(short), None)] = 0
        logits = model(torch.stack([torch.cat(parts), long]), attention_mask=mask).logits
        kept = logits[0, gap:] if left else logits[0, : len(short)]
        torch.testing.assert_close(kept, alone[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(logits[1], alone[1], rtol=0, atol=1e-5)
    model.set_attn_implementation(packed_attention.register())
    borders = torch.tensor([0, len(short), len(short) + len(long)])
    packed = model(torch.cat(texts)[None], cu_seq_lens_q=borders).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)


@needs_shared
def test_tokenizer_ids_match_the_original(tmp_path: Path) -> None:
    folder = chatglm_folder(tmp_path, ICE)
    tokenizer = load_tokenizer(locate(str(folder)))
    cases = json.loads((GOLDEN / "chatglm_tokenizer.json").read_text(encoding="utf-8"))
    assert len(cases) == 95
    tokenizer.save_pretrained(str(tmp_path / "saved"))
    for reader in (tokenizer, load_tokenizer(ModelRef("saved", str(tmp_path / "saved")))):
        for case in cases:
            assert reader(case["text"]).input_ids == case["input_ids"]
            assert reader(case["text"], add_special_tokens=False).input_ids == case["no_special"]
            assert reader.decode(case["input_ids"], skip_special_tokens=True) == case["decoded"]
        assert reader("上", "下").input_ids[-1] == reader.eos_token_id == 130005


def test_first_checkpoints_have_image_tokens_before_the_text(small_ice: Path, tmp_path: Path) -> None:
    later = load_tokenizer(locate(str(chatglm_folder(tmp_path / "later", small_ice))))
    folder = chatglm_folder(tmp_path / "first", small_ice, images=20000)
    tokenizer = load_tokenizer(locate(str(folder)))
    for text in CORPUS[:4]:
        assert tokenizer(text).input_ids == [index + 20000 for index in later(text).input_ids]
    model = load.load_model(locate(str(folder)), torch.float32)
    check_tokenizer(tokenizer, model, locate(str(folder)))
    ids = tokenizer("你好", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, eos_token_id=None).shape == (1, ids.shape[1] + 3)


def test_prompt_format_matches_the_original(small_ice: Path, tmp_path: Path) -> None:
    """One question stands alone; a conversation is numbered, and only its last answer is learned with what went before
    seen whole. An answer begins with a blank of its own, as every text does."""
    tokenizer = load_tokenizer(locate(str(chatglm_folder(tmp_path, small_ice))))
    encoder = Encoder(tokenizer)
    template = chat_setup.bind_template("own", tokenizer, encoder.prefix)
    assert template.prompt([Message("user", "你好")]) == "你好[gMASK]<sop>"
    turns = tuple(
        Message(role, text) for role, text in [("user", "一"), ("assistant", "二"), ("user", "三"), ("assistant", "四")]
    )
    one, two = template.samples(Dialogue(turns, origin=Origin("here", 1)))
    assert one.text == "一[gMASK]<sop>二<eop>"
    assert two.text == "[Round 0]\n问：一\n答：二\n[Round 1]\n问：三\n答：[gMASK]<sop>四<eop>"
    ids = [int(index) for piece in encoder.encode([one.spans])[0] for index in piece.ids]
    question, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in ("一", "二"))
    assert ids == [*tokenizer("一").input_ids, *answer, tokenizer.eos_token_id]
    assert question[0] == answer[0] == tokenizer.convert_tokens_to_ids("\u2581")
    sizes = token_bytes(tokenizer)
    for piece, size in (("<n>", 1), ("<|blank_7|>", 7), ("<sop>", 0), ("<0x41>", 1)):
        assert sizes[tokenizer.convert_tokens_to_ids(piece)] == size


def test_punctuation_is_restored_to_full_width(small_ice: Path, tmp_path: Path, tongwen: Any) -> None:
    folder = chatglm_folder(tmp_path, small_ice)
    speaker = open_chat_model(str(folder))
    voice = speaker.generator
    ids = voice.tokenizer("你好，世界。Hello, world! 好：", add_special_tokens=False).input_ids
    assert voice.decode(ids) == "你好，世界。Hello, world! 好："
    assert voice.tokenizer.decode(ids) == "你好,世界。Hello, world! 好:"
    pieces = [voice.tokenizer.decode(ids)[index : index + 2] for index in range(0, 40, 2)]
    assert "".join(voice._postprocessed(iter(pieces))) == voice.decode(ids)
    messages = [{"role": "user", "content": "你好"}]
    assert "".join(speaker.stream(messages, max_new_tokens=12)).rstrip("\ufffd") == speaker.chat(
        messages, max_new_tokens=12
    )
    with pytest.raises(ModelError, match="chatglm can only answer, not continue a text"):
        open_chat_model(str(folder), template="completion")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"multi_query_attention": True, "padded_vocab_size": 65024}, "ChatGLM2-6B / ChatGLM3-6B"),
        ({"multi_query_attention": True, "padded_vocab_size": 151552}, "GLM-4-9B"),
        ({"quantization_bit": 4}, "4 bits"),
        ({"pre_seq_len": 128}, "pre_seq_len: 128"),
        ({"position_encoding_2d": False}, "position_encoding_2d: False"),
    ],
)
def test_other_chatglm_versions_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm", "auto_map": AUTO_MAP} | config))
    with pytest.raises(ModelError, match=message):
        load_config(ModelRef(str(tmp_path), str(tmp_path)))


@needs_shared
def test_silently_wrong_inputs_raise() -> None:
    model = golden_model()
    with pytest.raises(ValueError, match=r"\[gMASK\] <sop>"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
    with pytest.raises(ValueError, match="position_ids"):
        past = model(torch.tensor([[5, 591, 592]]), use_cache=True).past_key_values
        model(torch.tensor([[9]]), past_key_values=past)


@needs_shared
def test_gradient_checkpointing_keeps_every_adapter_gradient() -> None:
    """The old trainer's loss stood still: with a frozen embedding its checkpoints cut the graph."""
    from peft import LoraConfig, get_peft_model

    ids = torch.tensor([[40, 39, 591, 592, 276, 133, 593]])
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False)
        model = get_peft_model(golden_model(), config).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append([part.grad for part in model.parameters() if part.requires_grad])
    assert all(float(one.abs().max()) > 0 for one in gradients[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(("method", "real"), [("full", False), pytest.param("lora", True, marks=needs_shared)])
def test_chatglm_trains_end_to_end(method: str, real: bool, small_ice: Path, tmp_path: Path, tongwen: Any) -> None:
    """Trained in full, and with the original's own tokenizer where that is at hand; the rest is in test_families."""
    base = chatglm_folder(tmp_path / "chatglm-6b", ICE if real else small_ice)
    recipe = write_recipe(tmp_path, base, rows=dialogues(16), merge=method != "full")
    text = recipe.read_text().replace("template: chatml", "template: chatglm")
    text = text.replace("rank: 4", f"rank: 4, method: {method}").replace("learning_rate: 1e-2", "learning_rate: 3e-3")
    recipe.write_text(text)
    code, _, err = tongwen("run", recipe)
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "sft" / "report.json").read_text())
    assert report["held_out"]["bits_per_byte"]["after"] < report["held_out"]["bits_per_byte"]["before"]
    made = tmp_path / "out" / ("sft" if method == "full" else "merge")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("问题1：你好吗？\n", encoding="utf-8")
    code, _, err = tongwen("generate", "--model", made, "--prompts", prompts, "--out", tmp_path / "answers.jsonl")
    assert code == 0, err
