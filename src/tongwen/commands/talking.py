"""What is done with a model that answers: generate, chat, serve."""

from __future__ import annotations

import argparse
from typing import Any

from tongwen.commands import Add
from tongwen.language import say


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
    command.add_argument(
        "--no-stream", action="store_true", help=say("show each answer when it is whole", "回答完整后再显示")
    )
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
        stream=not parsed.no_stream,
    )


def _serve(parsed: argparse.Namespace) -> int:
    from tongwen.stages import serve

    return serve.run(
        parsed.model,
        parsed.adapter,
        name=parsed.name,
        host=parsed.host,
        port=parsed.port,
        queue=parsed.queue,
        template=parsed.template,
        thinking=parsed.thinking,
        sampling=_sampling(parsed),
    )
