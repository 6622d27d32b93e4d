"""The front door: words become a recipe and a stage. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tongwen import __version__
from tongwen.language import say

Handler = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see docs/errors.md)."""
    from tongwen.errors import TongwenError

    parsed = _parse(arguments)
    if parsed.json:
        from tongwen import console

        console.SCREEN.use_json()
    try:
        handler: Handler = parsed.handler
        return handler(parsed)
    except TongwenError as error:
        return _fail(error.exit_code, error.text())
    except KeyboardInterrupt:
        again = say("the same command continues", "用同一命令可以继续")
        return _fail(130, say(f"interrupted; {again}", f"已中断；{again}"))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        cause = _machine_cause(error)
        if cause is None:
            raise
        return _fail(5, cause)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's words. argparse takes changes of a recipe only right behind it; here they may stand anywhere."""
    parser = make_parser()
    parsed, rest = parser.parse_known_args(arguments)
    changes = [word for word in rest if "=" in word and not word.startswith("-")] if "overrides" in parsed else []
    if len(changes) < len(rest):
        parser.error(say("unrecognized arguments: ", "无法识别的参数：") + " ".join(rest))
    if changes:
        parsed.overrides = [*parsed.overrides, *changes]
    return parsed


def make_parser() -> argparse.ArgumentParser:
    """All commands with their help, in the user's language."""
    parser = argparse.ArgumentParser(
        prog="tongwen",
        description=say("Teach a language model Chinese.", "教语言模型中文。"),
        epilog=say("docs: README.md", "文档：README_zh.md"),
    )
    parser.add_argument("--version", action="version", version=f"tongwen {__version__}")
    parser.set_defaults(json=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help_: str, handler: Handler) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_, description=help_)
        command.add_argument(
            "--json", action="store_true", help=say("one JSON object on stdout", "在标准输出给出一个 JSON 对象")
        )
        command.set_defaults(handler=handler)
        return command

    command = add(
        "demo",
        say("the whole pipeline on a small real model, on a laptop CPU", "在笔记本 CPU 上用真实小模型走完整个流程"),
        _demo,
    )
    command.add_argument("--out", default="runs/demo", help=say("folder of the run", "输出文件夹"))
    command.add_argument(
        "--model",
        default="",
        help=say(
            "folder of the model, instead of fetching SmolLM2-135M-Instruct",
            "模型文件夹，代替下载 SmolLM2-135M-Instruct",
        ),
    )

    command = add("run", say("run the stages of a recipe", "运行配方中的各阶段"), _run)
    _add_recipe(command)
    command.add_argument("--only", default="", metavar="STAGE", help=say("this stage alone", "只运行这一阶段"))
    command.add_argument(
        "--from", dest="start", default="", metavar="STAGE", help=say("this stage and the later ones", "从这一阶段起")
    )
    command.add_argument("--until", default="", metavar="STAGE", help=say("up to this stage", "到这一阶段止"))
    command.add_argument("--devices", type=int, help=say("processes, one per GPU", "进程数，每块 GPU 一个"))
    command.add_argument(
        "--again",
        action="store_true",
        help=say(
            "redo what changed and all after it; the old folders are kept", "重做已改变的阶段及其后各阶段；旧文件夹保留"
        ),
    )
    command.add_argument(
        "--fork",
        action="store_true",
        help=say("continue an interrupted stage with changed settings", "以改变后的设置继续被中断的阶段"),
    )

    command = add(
        "fetch",
        say("public data sets, models and adapters by name, verified", "按名称获取公开数据集、模型与适配器并校验"),
        _fetch,
    )
    command.add_argument(
        "name",
        nargs="?",
        default="",
        metavar="NAME",
        help=say(
            "a short name, OWNER/NAME or modelscope:OWNER/NAME; none: the list",
            "简称、OWNER/NAME 或 modelscope:OWNER/NAME；不写则列出",
        ),
    )
    command.add_argument(
        "--out",
        default="",
        metavar="DIR",
        help=say("folder; data/NAME or models/NAME", "文件夹；默认 data/NAME 或 models/NAME"),
    )
    command.add_argument(
        "--dev",
        type=float,
        nargs="?",
        const=0.01,
        default=0.0,
        metavar="SHARE",
        help=say("split off this share of the rows", "划出这一比例的行"),
    )
    command.add_argument("--seed", type=int, default=42, help=say("of the split", "划分的种子"))
    command.add_argument(
        "--old-names", action="store_true", help=say("name the parts as BELLE did", "按 BELLE 的旧文件名命名")
    )
    command.add_argument("--revision", default="", help=say("branch, tag or commit", "分支、标签或提交"))
    command.add_argument(
        "--kind", default="", choices=("model", "dataset"), help=say("when the hub has both", "hub 上两者同名时")
    )
    command.add_argument(
        "--files",
        action="append",
        default=[],
        metavar="PATTERN",
        help=say("these files only; !PATTERN leaves out", "只取这些文件；!模式 表示排除"),
    )
    command.add_argument(
        "--local-files-only",
        action="store_true",
        help=say("ask no hub: what is here, or an error", "不访问模型站：只用本机已有的，否则报错"),
    )
    command.add_argument(
        "--code", action="store_true", help=say("fetch *.py too (never run here)", "也获取 *.py（本工具从不运行）")
    )
    command.add_argument(
        "--again", action="store_true", help=say("anew; the old folder is kept", "重新获取；保留旧文件夹")
    )

    command = add(
        "check", say("read the recipe and the data; no model, no torch", "读配方与数据；不需要模型与 torch"), _check
    )
    _add_recipe(command)
    command = add(
        "plan",
        say(
            "batch sizes, tokens, steps, memory, disk and time; touches nothing",
            "批大小、token、步数、内存、磁盘与时间；不写任何东西",
        ),
        _plan,
    )
    _add_recipe(command)
    command.add_argument(
        "--gpu", default="", metavar="24GB", help=say("a GPU of this memory that is not here", "假设有这么大显存的 GPU")
    )
    command = add(
        "look", say("encoded samples, learned tokens coloured", "查看编码后的样本，学习的 token 有颜色"), _look
    )
    _add_recipe(command)
    command.add_argument("-n", type=int, default=3, help=say("how many", "几个"))
    command.add_argument("--html", default="", metavar="FILE", help=say("write a page instead", "写成网页"))

    command = add("init", say("a commented recipe to start from", "生成一份带注释的配方"), _init)
    command.add_argument(
        "template", nargs="?", default="", help=say("which one; without it they are listed", "哪一份；不写则列出")
    )
    command.add_argument("--out", default="", metavar="FILE", help=say("write it here", "写到此文件"))

    command = add(
        "tokenizer", say("train, extend, merge and judge tokenizers", "训练、扩充、合并、评估分词器"), _tokenizer
    )
    _add_tokenizer(command)
    command = add("merge", say("fold adapters into their base", "把适配器并入底座"), _merge)
    command.add_argument("--base", required=True, help=say("model", "模型"))
    command.add_argument(
        "--adapter",
        default=[],
        action="append",
        help=say("adapter folder; several in the order in which they were trained", "适配器文件夹；多个则按训练的先后"),
    )
    command.add_argument(
        "--chat-vector",
        nargs=2,
        metavar=("INSTRUCT", "BASE"),
        help=say(
            "instead: add what INSTRUCT has over BASE to a model that descends from BASE",
            "或：把 INSTRUCT 相对 BASE 的差值加到同源的模型上",
        ),
    )
    command.add_argument("--scale", type=float, default=1.0, help=say("of the chat vector", "差值的系数"))
    command.add_argument("--out", required=True, help=say("folder of the merged model", "合并后的模型文件夹"))
    command.add_argument(
        "--dtype", default="base", choices=("base", "fp32", "bf16", "fp16"), help=say("number type", "数值类型")
    )
    command.add_argument(
        "--to",
        default="hf",
        choices=("hf", "pth"),
        help=say("Hugging Face, or LLaMA's own files", "Hugging Face，或 LLaMA 原始文件"),
    )
    command.add_argument(
        "--parity",
        default="streamed",
        choices=("streamed", "full"),
        help=say(
            "compare logits layer by layer, or with both models in memory",
            "逐层比较 logits，或两个模型同时载入内存比较",
        ),
    )
    command.add_argument(
        "--again", action="store_true", help=say("keep what stands there under another name", "把已有的改名保留")
    )
    command.add_argument(
        "--force",
        action="store_true",
        help=say(
            "merge onto another base than the adapter's own, or in another order",
            "合并到非原配的底座，或以别的顺序合并",
        ),
    )

    command = add(
        "convert",
        say(
            "a model in another form: Hugging Face, LLaMA's .pth, GGUF",
            "把模型转换为另一种格式：Hugging Face、LLaMA .pth、GGUF",
        ),
        _convert,
    )
    command.add_argument("source", metavar="SRC", help=say("model, or a folder of .pth files", "模型，或 .pth 文件夹"))
    command.add_argument("--to", required=True, choices=("hf", "pth", "gguf"), help=say("form", "格式"))
    command.add_argument("--out", required=True, metavar="D", help=say("folder", "文件夹"))
    command.add_argument(
        "--quantize",
        default="",
        metavar="TYPE",
        help=say("GGUF number type; f16 when absent", "GGUF 数值类型；不写为 f16"),
    )
    command.add_argument(
        "--again", action="store_true", help=say("anew; the old folder is kept", "重新转换；保留旧文件夹")
    )

    command = add(
        "verify",
        say(
            "weights, tokenizer and adapter against known or recorded hashes",
            "用已知或记录的哈希核对权重、分词器与适配器",
        ),
        _verify,
    )
    command.add_argument("path", help=say("file or folder", "文件或文件夹"))
    command.add_argument(
        "--against",
        default="",
        metavar="LIST",
        help=say(
            "a file of hashes, or `known`: only what was published passes", "哈希清单文件，或 `known`：只接受已发布的"
        ),
    )

    command = add("generate", say("answer a file of prompts", "回答一个文件里的提示"), _generate)
    command.add_argument("--model", required=True, help=say("model", "模型"))
    command.add_argument("--adapter", action="append", default=[], help=say("adapter folder", "适配器文件夹"))
    command.add_argument(
        "--prompts",
        required=True,
        metavar="F",
        help=say(
            "text (one a line) or JSON lines with `prompt` or `messages`",
            "文本（每行一个）或含 `prompt`/`messages` 的 JSONL",
        ),
    )
    command.add_argument("--out", required=True, metavar="F", help=say("JSON lines", "JSONL"))
    command.add_argument("--batch-size", type=int, default=8, help=say("prompts at once", "同时处理几个"))
    _add_talking(command)

    command = add("chat", say("talk to a model in the terminal", "在终端里与模型对话"), _chat)
    command.add_argument(
        "model",
        help=say(
            "folder, hub id, modelscope:id, .gguf, or a stage folder",
            "文件夹、hub id、modelscope:id、.gguf 或阶段文件夹",
        ),
    )
    command.add_argument("--adapter", action="append", default=[], help=say("adapter folder", "适配器文件夹"))
    command.add_argument("--system", default="", help=say("system message", "系统提示"))
    _add_talking(command)

    command = add("show", say("what an artifact is and how it was made", "这个文件夹是什么、怎么来的"), _show)
    command.add_argument("path", help=say("folder", "文件夹"))
    command = add("schema", say("every word of a recipe", "配方的每一个词"), _schema)
    command.add_argument("section", nargs="?", default="", help=say("one section", "某一段"))
    add("doctor", say("what this machine can do, and what it can reach", "这台机器能做什么、能连到哪里"), _doctor)
    return parser


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", help=say("recipe file", "配方文件"))
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help=say("change a word of the recipe", "改动配方中的一个词"),
    )


def _add_tokenizer(command: argparse.ArgumentParser) -> None:
    kinds = command.add_subparsers(dest="task", required=True, metavar="TASK")

    def add(name: str, help_: str, out: bool = True) -> argparse.ArgumentParser:
        task = kinds.add_parser(name, help=help_, description=help_)
        task.add_argument(
            "--json", action="store_true", help=say("one JSON object on stdout", "在标准输出给出一个 JSON 对象")
        )
        task.add_argument("--out", required=out, default="", metavar="DIR", help=say("folder", "文件夹"))
        if out:
            task.add_argument(
                "--again", action="store_true", help=say("anew; the old folder is kept", "重新生成；保留旧文件夹")
            )
        return task

    def corpus(task: argparse.ArgumentParser) -> None:
        task.add_argument(
            "--corpus",
            required=True,
            nargs="+",
            metavar="F",
            help=say("text or data of any format", "任意格式的文本或数据"),
        )
        task.add_argument("--pieces", type=int, required=True, metavar="N", help=say("how many", "词数"))

    def script(task: argparse.ArgumentParser) -> None:
        task.add_argument(
            "--script",
            default="han",
            help=say("han, japanese, hangul, cyrillic, …", "han、japanese、hangul、cyrillic 等"),
        )

    task = add("train", say("a tokenizer from nothing", "从头训练分词器"))
    corpus(task)
    task.add_argument("--kind", default="byte-bpe", choices=("byte-bpe", "sp-bpe", "sp-unigram"))
    task.add_argument("--seed", type=int, default=42)
    task = add("extend", say("a base's tokenizer with pieces learned from a corpus", "用语料学到的词扩充底座的分词器"))
    task.add_argument("--base", required=True, metavar="MODEL", help=say("model or tokenizer file", "模型或分词器文件"))
    corpus(task)
    script(task)
    task.add_argument(
        "--word", action="append", default=[], help=say("a whole word as one piece", "整个词作为一个 token")
    )
    task.add_argument("--special", action="append", default=[], help=say("a special token", "特殊符号"))
    task = add(
        "merge", say("a SentencePiece model's pieces behind another's", "把一个 SentencePiece 模型的词加到另一个之后")
    )
    task.add_argument("--base", required=True, metavar="F.model")
    task.add_argument("--add", required=True, metavar="F.model")
    task.add_argument(
        "--mode",
        default="default",
        choices=("default", "legacy", "keep-scores"),
        help=say(
            "legacy: as Chinese-LLaMA-Alpaca; keep-scores: as BELLE",
            "legacy：同 Chinese-LLaMA-Alpaca；keep-scores：同 BELLE",
        ),
    )
    task.add_argument("--pad", action="store_true", help=say("and [PAD] behind them", "最后再加 [PAD]"))
    script(task)
    task = add(
        "report",
        say("what a tokenizer makes of texts, and whether to extend it", "分词器对文本的效果，以及是否值得扩充"),
        False,
    )
    task.add_argument("--base", required=True, metavar="A", help=say("model or tokenizer file", "模型或分词器文件"))
    task.add_argument("--other", default="", metavar="B", help=say("compare with this one", "与此对比"))
    task.add_argument("--text", required=True, nargs="+", metavar="F", help=say("text or data", "文本或数据"))
    script(task)


def _add_talking(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--template",
        default="own",
        help=say(
            "own, a template's name, or `completion` for a base model", "own、模板名，或 `completion`（基座模型续写）"
        ),
    )
    command.add_argument(
        "--thinking", default="off", choices=("on", "off"), help=say("let a thinking model think", "让思考模型思考")
    )
    command.add_argument("--max-new-tokens", type=int, default=512)
    command.add_argument(
        "--temperature", type=float, default=0.0, help=say("0: always the likeliest", "0：总取最可能的")
    )
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--top-k", type=int, default=0)
    command.add_argument("--repetition-penalty", type=float, default=1.0)
    command.add_argument("--seed", type=int)


def _load(parsed: argparse.Namespace) -> Any:
    from tongwen import console
    from tongwen.recipe.load import load

    overrides = list(parsed.overrides)
    if getattr(parsed, "devices", None):
        overrides.append(f"devices={parsed.devices}")
    recipe, notices = load(parsed.recipe, overrides)
    for notice in notices:
        console.notice(notice)
    return recipe


def _run(parsed: argparse.Namespace) -> int:
    from tongwen import console, river

    recipe = _load(parsed)
    arguments = [parsed.recipe, *parsed.overrides, *([f"devices={parsed.devices}"] if parsed.devices else [])]
    done = river.run(
        recipe,
        arguments,
        only=parsed.only,
        start=parsed.start,
        until=parsed.until,
        again=parsed.again,
        fork=parsed.fork,
    )
    console.emit({"out": recipe.out, "stages": {found.path.name: found.manifest for found in done}})
    return 0


def _demo(parsed: argparse.Namespace) -> int:
    from tongwen.stages import demo

    return demo.run(parsed.out, parsed.model)


def _fetch(parsed: argparse.Namespace) -> int:
    if parsed.local_files_only:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, below
    from tongwen.stages import fetch

    return fetch.run(
        parsed.name,
        parsed.out,
        dev=parsed.dev,
        seed=parsed.seed,
        old_names=parsed.old_names,
        revision=parsed.revision,
        kind=parsed.kind,
        files=parsed.files,
        code=parsed.code,
        again=parsed.again,
    )


def _check(parsed: argparse.Namespace) -> int:
    from tongwen.stages import check

    return check.run(_load(parsed))


def _plan(parsed: argparse.Namespace) -> int:
    from tongwen.stages import plan

    return plan.run(_load(parsed), parsed.gpu)


def _look(parsed: argparse.Namespace) -> int:
    from tongwen.stages import look

    return look.run(_load(parsed), parsed.n, parsed.html)


def _init(parsed: argparse.Namespace) -> int:
    from tongwen.stages import init

    return init.run(parsed.template, parsed.out)


def _tokenizer(parsed: argparse.Namespace) -> int:
    from tongwen.stages import tokenizer

    if parsed.task == "train":
        return tokenizer.run_train(
            parsed.corpus, parsed.kind, parsed.pieces, parsed.out, parsed.seed, again=parsed.again
        )
    if parsed.task == "extend":
        return tokenizer.run_extend(
            parsed.base,
            parsed.corpus,
            parsed.pieces,
            parsed.out,
            script=parsed.script,
            words=parsed.word,
            special_tokens=parsed.special,
            again=parsed.again,
        )
    if parsed.task == "merge":
        return tokenizer.run_merge(
            parsed.base, parsed.add, parsed.mode, parsed.out, pad=parsed.pad, script=parsed.script, again=parsed.again
        )
    return tokenizer.run_report(parsed.base, parsed.other, parsed.text, parsed.out, parsed.script)


def _merge(parsed: argparse.Namespace) -> int:
    if parsed.chat_vector and not parsed.adapter:
        from tongwen.stages import chat_vector

        instruct, base = parsed.chat_vector
        return chat_vector.run(parsed.base, instruct, base, parsed.scale, parsed.out, again=parsed.again)
    from tongwen.errors import RecipeError
    from tongwen.stages import merge

    if parsed.chat_vector or not parsed.adapter:
        raise RecipeError(
            say("either adapters are merged, or a chat vector", "合并适配器与差值，二者择一"),
            place="tongwen merge",
            remedy="--adapter A [--adapter A2 …]   |   --chat-vector INSTRUCT BASE",
        )
    choice = merge.Choice(parsed.dtype, parsed.to, parsed.parity, force=parsed.force)
    return merge.command(parsed.base, parsed.adapter, parsed.out, choice, again=parsed.again)


def _convert(parsed: argparse.Namespace) -> int:
    from tongwen.stages import convert

    return convert.run(parsed.source, parsed.to, parsed.out, parsed.quantize, again=parsed.again)


def _verify(parsed: argparse.Namespace) -> int:
    from tongwen.stages import verify

    return verify.run(parsed.path, parsed.against)


def _sampling(parsed: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
    return {name: getattr(parsed, name) for name in names}


def _generate(parsed: argparse.Namespace) -> int:
    from tongwen.stages import generate

    return generate.run(
        parsed.model,
        parsed.adapter,
        parsed.prompts,
        parsed.out,
        batch_size=parsed.batch_size,
        template=parsed.template,
        thinking=parsed.thinking,
        sampling=_sampling(parsed),
    )


def _chat(parsed: argparse.Namespace) -> int:
    from tongwen.stages import chat

    return chat.run(
        parsed.model,
        parsed.adapter,
        template=parsed.template,
        thinking=parsed.thinking,
        sampling=_sampling(parsed),
        system=parsed.system,
    )


def _show(parsed: argparse.Namespace) -> int:
    from tongwen.stages import show

    return show.run(parsed.path)


def _schema(parsed: argparse.Namespace) -> int:
    from tongwen.recipe import pages

    return pages.run(parsed.section)


def _doctor(parsed: argparse.Namespace) -> int:
    from tongwen.stages import doctor

    return doctor.run()


def _fail(code: int, message: str) -> int:
    from tongwen import console, launch

    if launch.claim_exit(code) and message:
        console.error(message)
    console.emit({"error": message, "exit_code": code})
    return code


def _machine_cause(error: Exception) -> str | None:
    """A message for what the machine refused (disk, memory, permission); None when it is a bug of ours."""
    text = str(error)
    if "out of memory" in text.lower() or isinstance(error, MemoryError):
        cures = say(
            "in this order: micro_batch_tokens smaller, activation_checkpointing: on, max_length smaller, adapter.method: qlora, a smaller base",
            "依次尝试：减小 micro_batch_tokens，activation_checkpointing: on，减小 max_length，adapter.method: qlora，换小一点的底座",
        )
        return say(
            f"out of memory: {text.splitlines()[0][:160] if text else ''}\n  → {cures}",
            f"内存不足：{text.splitlines()[0][:160] if text else ''}\n  → {cures}",
        )
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "unexpected pos" in text:
        return say(
            f"the disk is full: {text}\n  → free some space; the same command continues",
            f"磁盘已满：{text}\n  → 请清理空间；用同一命令可以继续",
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return say(f"permission denied: {text}\n  → choose another `out`", f"没有权限：{text}\n  → 换一个 `out`")
    if number == errno.EIO:
        return say(f"the disk reports an error: {text}", f"磁盘报错：{text}")
    return None
