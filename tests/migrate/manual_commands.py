"""Commands of older projects, and what they become."""

from __future__ import annotations

from pathlib import Path

from tongwen.migrate.shell import ScriptLine, read_script

OLD = Path(__file__).parent / "old_commands"


def lines_of(name: str) -> list[ScriptLine]:
    return read_script((OLD / f"{name}.sh").read_text(encoding="utf-8"), name)


# What the READMEs (and the files that they name) say, written down by hand: batch, learning rate, rank, targets, length,
# template, and how long.
LINEAR = ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
WANTED = {
    "belle:5": ("sft", 8, 1e-5, None, None, 1024, "belle", "2 epochs"),
    "belle:6": ("sft", 16, 2e-5, None, None, 1024, "belle", "2 epochs"),
    "belle:7": ("sft", 8, 1e-5, 8, ["query_key_value"], 1024, "belle", "2 epochs"),
    "belle:8": ("sft", 16, 2e-5, 8, ["q_proj", "v_proj"], 1024, "belle", "2 epochs"),
    "belle:10": ("sft", 8, 1e-5, None, None, 1024, "belle", "2 epochs"),
    "guanaco:1": ("sft", 16, 2e-4, 64, "all-linear", 1024, "guanaco", "3 epochs"),
    "guanaco:2": ("sft", 32, 2e-4, 64, "all-linear", 1024, "guanaco", "3 epochs"),
    "guanaco:5": ("sft", 16, 2e-4, 64, "all-linear", 1024, "guanaco", "3 epochs"),
    "ner:1": ("sft", 8, 3e-5, 8, ["query_key_value"], 256, "chatglm", "3 epochs"),
    "cla:31": ("pretrain", 1, 2e-4, 8, LINEAR, 512, None, "100 steps"),
    "cla:33": ("sft", 1, 1e-4, None, None, 512, "alpaca-cla", "100 steps"),
}
