"""What is done with a model that answers: generate, evaluate, chat, serve."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from tongwen.cli import Add
from tongwen.core.i18n import say
from tongwen.infer.presets import PRESETS

SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "beams")


def add_to(add: Add) -> None:
    """Add these commands."""
    command = add("generate", say("answer a file of prompts", "回答一个文件里的提示"), _generate)
    command.add_argument("--model", required=True, help=say("model", "模型"))
    command.add_argument("--adapter", action="append", default=[], help=say("adapter folder", "适配器文件夹"))
    command.add_argument(
        "--prompts",
        required=True,
        metavar="F",
        help=say(
            "text (one a line), JSON with `prompt` or `messages`, or a data set with answers",
            "文本（每行一个）、含 `prompt`/`messages` 的 JSON，或带答案的数据集",
        ),
    )
    command.add_argument("--out", required=True, metavar="F", help=say("the answers", "回答"))
    command.add_argument(
        "--form",
        default="jsonl",
        choices=("jsonl", "belle", "chinese-llama-alpaca"),
        help=say("rows, or the array that the project's script wrote", "逐行 JSON，或该项目脚本所写的数组"),
    )
    command.add_argument(
        "--engine",
        default="auto",
        choices=("auto", "batched", "paged", "llama.cpp", "vllm"),
        help=say(
            "auto: llama.cpp for a .gguf file, else batched; paged: continuous batching",
            "auto：.gguf 用 llama.cpp，其余用 batched；paged：连续批处理",
        ),
    )
    command.add_argument(
        "--endpoint",
        default="",
        metavar="URL",
        help=say(
            "an OpenAI-compatible address, which knows --model; key: OPENAI_API_KEY",
            "OpenAI 兼容接口的地址，--model 为其中的名字；密钥：OPENAI_API_KEY",
        ),
    )
    command.add_argument("--beams", type=int, help=say("beam search", "束搜索"))
    command.add_argument(
        "--batch-size", type=int, default=32, help=say("prompts side by side, at most", "同时处理几个")
    )
    command.add_argument(
        "--again", action="store_true", help=say("begin anew; the old file is kept", "重新开始；旧文件保留")
    )
    _add_talking(command)
    command = add("evaluate", say("score a model", "给模型评分"), _evaluate)
    command.add_argument("--model", required=True, help=say("model", "模型"))
    command.add_argument("--adapter", action="append", default=[], help=say("adapter folder", "适配器文件夹"))
    command.add_argument(
        "--task",
        action="append",
        required=True,
        metavar="NAME",
        help=say(
            "bits_per_byte, entity_f1, multiple_choice, …; may stand several times, a wrong name lists all",
            "bits_per_byte、entity_f1、multiple_choice……可写多次，写错会列出全部",
        ),
    )
    command.add_argument(
        "--data",
        metavar="F",
        help=say("file or folder: dialogues, documents, or CSV with options", "文件或文件夹：对话、文档或带选项的 CSV"),
    )
    command.add_argument(
        "--suite",
        default="",
        metavar="NAME",
        help=say("task lm_eval: a task of that harness", "任务 lm_eval：其中的任务名"),
    )
    command.add_argument("--before", default="", metavar="MODEL", help=say("a model to compare with", "用来对比的模型"))
    command.add_argument(
        "--out",
        default="",
        metavar="DIR",
        help=say("folder for scores, rows and report", "分数、逐行结果与报告的文件夹"),
    )
    command.add_argument("--limit", type=int, help=say("only the first rows", "只取前几行"))
    command.add_argument(
        "--shots",
        type=int,
        default=0,
        help=say("examples before a question with options", "选择题的题前示例数"),
    )
    command.add_argument(
        "--examples",
        metavar="F",
        help=say("multiple_choice: where they are, such as dev/", "multiple_choice：示例所在，如 dev/"),
    )
    command.add_argument(
        "--batch-size", type=int, default=32, help=say("questions side by side, at most", "同时处理几个")
    )
    command.add_argument("--max-new-tokens", type=int, default=256)
    _add_opening(command, "auto")
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
    command.add_argument(
        "--no-stream", action="store_true", help=say("show each answer when it is whole", "回答完整后再显示")
    )
    command.add_argument("--web", action="store_true", help=say("in the browser", "在浏览器里"))
    command.add_argument(
        "--beside",
        default="",
        metavar="MODEL",
        help=say("--web: a second model answers too", "--web：另一个模型同时回答"),
    )
    _add_page(command)
    _add_talking(command)
    command = add("serve", say("OpenAI's API for a model, on this machine", "在本机以 OpenAI 接口提供模型"), _serve)
    command.add_argument("model", help=say("as for chat", "同 chat"))
    command.add_argument("--adapter", action="append", default=[], help=say("adapter folder", "适配器文件夹"))
    command.add_argument(
        "--name", default="", help=say("the model's name; absent: its folder's", "模型名；不写用文件夹名")
    )
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help=say(
            "another than loopback asks for a token in TONGWEN_API_KEY", "非本机地址需要 TONGWEN_API_KEY 中的令牌"
        ),
    )
    command.add_argument("--port", type=int, default=8000, help=say("0: a free one", "0：任一空闲端口"))
    command.add_argument(
        "--queue",
        type=int,
        default=16,
        help=say("requests that may wait; the next is told to come again (429)", "最多排队的请求数；再多则返回 429"),
    )
    _add_talking(command)
    command = add("web", say("the whole bench in the browser", "浏览器里的整个工作台"), _web)
    command.add_argument(
        "folders", nargs="*", default=["."], metavar="FOLDER", help=say("what the page may see", "网页可以访问的文件夹")
    )
    command.add_argument(
        "--model",
        action="append",
        default=[],
        help=say("what the chat opens with; twice: side by side", "对话使用的模型；写两次则并排"),
    )
    _add_page(command)
    _add_opening(command, "own")


def _add_page(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help=say(
            "web: another than loopback asks for a token in TONGWEN_API_KEY",
            "网页：非本机地址需要 TONGWEN_API_KEY 中的令牌",
        ),
    )
    command.add_argument(
        "--port", type=int, default=7860, help=say("web: port; 0: a free one", "网页：端口；0：任一空闲端口")
    )


def _add_opening(command: argparse.ArgumentParser, template: str) -> None:
    """How a model is opened."""
    command.add_argument(
        "--template",
        default=template,
        help=say(
            "own, a template's name, or `completion` for a base model", "own、模板名，或 `completion`（基座模型续写）"
        ),
    )
    command.add_argument(
        "--thinking", default="off", choices=("on", "off"), help=say("let a thinking model think", "让思考模型思考")
    )
    command.add_argument(
        "--load",
        default="full",
        choices=("full", "8bit", "4bit", "auto"),
        help=say("weights: whole, in fewer bits, or what fits", "权重：完整、更少的位数，或放得下的"),
    )


def _add_talking(command: argparse.ArgumentParser) -> None:
    _add_opening(command, "own")
    command.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help=say("sample as this project did; what follows is said besides", "按该项目的方式采样；以下选项优先"),
    )
    command.add_argument("--max-new-tokens", type=int, help="512")
    command.add_argument("--temperature", type=float, help=say("0: always the likeliest", "0：总取最可能的"))
    command.add_argument("--top-p", type=float, help="1")
    command.add_argument("--top-k", type=int, help="0")
    command.add_argument("--repetition-penalty", type=float, help="1")
    command.add_argument("--seed", type=int)


def _sampling(parsed: argparse.Namespace) -> dict[str, Any]:
    """The preset, and over it what the command says itself."""
    from tongwen.infer.generation import Sampling

    said = {name: value for name, value in vars(parsed).items() if name in SAMPLING and value is not None}
    return asdict(Sampling().with_(**{**PRESETS.get(parsed.preset, {}), **said}))


def _generate(parsed: argparse.Namespace) -> int:
    from tongwen.commands import generate

    return generate.run(
        generate.AnswerSource(
            parsed.model,
            parsed.adapter,
            parsed.template,
            parsed.thinking,
            parsed.load,
            parsed.engine,
            parsed.endpoint,
        ),
        parsed.prompts,
        parsed.out,
        form=parsed.form,
        batch_size=parsed.batch_size,
        sampling=_sampling(parsed),
        again=parsed.again,
    )


def _evaluate(parsed: argparse.Namespace) -> int:
    from tongwen.recipe.load import from_options
    from tongwen.stages import evaluate

    words = {name: getattr(parsed, name) for name in ("data", "suite", "examples", "shots", "limit")}
    section = {name: getattr(parsed, name) for name in ("batch_size", "max_new_tokens")}
    section["tasks"] = [{"task": name, **words} for name in parsed.task]
    recipe = from_options({"name": "evaluate", "base": parsed.model, "evaluate": section}, "tongwen evaluate")
    return evaluate.command(
        recipe,
        parsed.adapter,
        before=parsed.before,
        template=parsed.template,
        thinking=parsed.thinking,
        weights=parsed.load,
        out=parsed.out,
    )


def _chat(parsed: argparse.Namespace) -> int:
    if parsed.web:
        from tongwen.commands import web

        return web.run(
            [],
            [parsed.model, *([parsed.beside] if parsed.beside else [])],
            adapters=parsed.adapter,
            system=parsed.system,
            sampling=_sampling(parsed),
            whole=False,
            **_page(parsed),
        )
    from tongwen.commands import chat

    return chat.run(
        parsed.model,
        parsed.adapter,
        template=parsed.template,
        thinking=parsed.thinking,
        weights=parsed.load,
        sampling=_sampling(parsed),
        system=parsed.system,
        stream=not parsed.no_stream,
    )


def _serve(parsed: argparse.Namespace) -> int:
    from tongwen.commands import serve

    return serve.run(
        parsed.model,
        parsed.adapter,
        name=parsed.name,
        host=parsed.host,
        port=parsed.port,
        queue=parsed.queue,
        template=parsed.template,
        thinking=parsed.thinking,
        weights=parsed.load,
        sampling=_sampling(parsed),
    )


def _web(parsed: argparse.Namespace) -> int:
    from tongwen.commands import web

    return web.run(parsed.folders, parsed.model, whole=True, **_page(parsed))


def _page(parsed: argparse.Namespace) -> dict[str, Any]:
    names = ("template", "thinking", "host", "port")
    return {"weights": parsed.load, **{name: getattr(parsed, name) for name in names}}
