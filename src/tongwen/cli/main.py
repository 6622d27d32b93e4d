"""The entry point of the command line: runs one command and turns its errors into messages and exit codes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from tongwen.cli.parser import parse
from tongwen.core.i18n import say

# What torch's process groups (gloo, NCCL) say when a process that they wait for is gone.
GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited",
    "NCCL communicator was aborted",
)
# What the writers of safetensors (Rust) and torch (C++) say when the disk refuses a write.
UNWRITTEN = ("Input/output error", "os error 5", "PytorchStreamWriter failed", "iostream error")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see docs/errors.md)."""
    arguments = parse(argv)
    arguments.main = main  # `migrate --run` runs the commands that it prints

    from tongwen.core import distributed  # after parse, which exits on --help: these imports take a third of its time
    from tongwen.core.errors import TongwenError

    distributed.adopt()
    _silence_libraries()
    if arguments.json:
        from tongwen.core import console

        console.SCREEN.use_json()
    try:
        return int(arguments.run_command(arguments))
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


def _silence_libraries() -> None:
    """bitsandbytes and DeepSpeed, when they are installed, warn at every start of what they cannot do on a CPU."""
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def _fail(code: int, message: str) -> int:
    from tongwen.core import console, distributed

    if distributed.claim_exit(code) and message:
        console.error(message)
    console.emit({"error": message, "exit_code": code})
    return code


def _machine_cause(error: Exception) -> str | None:
    """A message for what the machine refused (disk, memory, permission); None when it is a bug of ours."""
    from tongwen.core.errors import is_disk_full, is_out_of_memory

    text = str(error)
    if is_out_of_memory(error):
        cures = say("a smaller model, shorter texts, or more memory", "换小一点的模型、更短的文本，或更大的内存")
        return say(
            f"out of memory: {text.splitlines()[0][:160] if text else ''}\n  → {cures}",
            f"内存不足：{text.splitlines()[0][:160] if text else ''}\n  → {cures}",
        )
    if any(words in text for words in GONE):
        return say(
            f"another process of this run has ended: {text.splitlines()[0][:160]}\n  → its message tells why; the same command continues",
            f"本次运行的另一个进程已结束：{text.splitlines()[0][:160]}\n  → 原因见其信息；用同一命令可以继续",
        )
    if "Duplicate GPU detected" in text:
        return say(
            "two processes of this run have the same GPU\n  → as many processes per machine as it has GPUs, and CUDA_VISIBLE_DEVICES "
            "that shows each its own, or all",
            "本次运行有两个进程用了同一块 GPU\n  → 每台机器的进程数应等于 GPU 数；CUDA_VISIBLE_DEVICES 让每个进程看到自己的或全部 GPU",
        )
    if is_disk_full(error):
        return say(
            f"the disk is full: {text}\n  → free some space, or --out on another disk",
            f"磁盘已满：{text}\n  → 请清理空间，或用 --out 换一个磁盘",
        )
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return say(f"permission denied: {text}\n  → choose another `out`", f"没有权限：{text}\n  → 换一个 `out`")
    if number == errno.EIO or any(words in text for words in UNWRITTEN):
        return say(
            f"the disk reports an error: {text}\n  → nothing committed is lost: the same command continues",
            f"磁盘报错：{text}\n  → 已提交的不会丢失：用同一命令可以继续",
        )
    return None
