"""Render a template of unknown origin in a process of its own, under limits of time, memory and output.

A chat template is a program that comes with a model, and what it does depends on the row. Jinja's sandbox keeps it from files and
Python objects, but not from looping for ever or from filling the memory. So each render of it happens in a small process that
the kernel ends at a limit. All such templates share one process; it answers in JSON, so nothing is unpickled.

A render with contents that record what is done with them (core/template_cache.py) takes its record there and back.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import jinja2

from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.core.template_cache import ContentInspected, RenderTrace, Slot, find_trace, revive

SECONDS = 3.0  # of CPU time for one render; an ordinary one takes a thousandth
MEMORY = 1 << 30  # bytes of the process's address space
TEXT = 32 << 20  # characters of one render
IS_POSSIBLE = os.name != "nt"  # Windows has no such limits: there a template renders in this process
# The parent's path, and nothing else: no folder of a stranger is imported from.
COMMAND = "import sys; sys.path[:] = {path!r}; from tongwen.core import chat_template, template_guard; template_guard.serve(chat_template.compile_template)"


class TemplateFailure(ValueError):
    """An error of the template itself. kind: the name of the error in the other process."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class Guard:
    """The process, started when it is needed, and again after a template broke a limit. Used by one thread at a time."""

    def __init__(self) -> None:
        self._owner = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._sent: dict[str, int] = {}  # sources that the process has, with their numbers
        self._broke: dict[str, str] = {}  # sources that broke a limit, and how

    def render(self, source: str, name: str, context: Mapping[str, Any]) -> str:
        """Return the render. Raises TemplateFailure or jinja2.TemplateError as the template does, ModelError when it breaks a
        limit, ContentInspected for a traced content that it inspects."""
        trace = find_trace(context["messages"])
        slots = trace.slots if trace else None
        with self._lock:
            if self._owner != os.getpid():  # a fork must not share the pipes
                self._owner, self._process, self._sent = os.getpid(), None, {}
            if source in self._broke:
                raise _limit_error(name, self._broke[source])
            reply = self._ask(source, name, {"context": context, "slots": slots})
        return _read_reply(reply, trace)

    def _ask(self, source: str, name: str, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin and process.stdout
        if source not in self._sent:
            self._sent[source] = len(self._sent)
            request["source"] = source
        request["number"] = self._sent[source]
        try:
            process.stdin.write(json.dumps(request, default=_plain).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = b""
        except BaseException:  # Ctrl-C: the reply would answer the next request
            self.close()
            raise
        reply: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {"limit": self._end_of(process)}
        if "limit" in reply:
            self.close()
            self._broke[source] = str(reply["limit"])
            raise _limit_error(name, self._broke[source])
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", "-c", COMMAND.format(path=sys.path)]
        process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a chat stops the answer, not this process
        )
        self._process, self._sent = process, {}
        return process

    def _end_of(self, process: subprocess.Popen[bytes]) -> str:
        return "time" if process.wait() == -signal.SIGPROF else "memory"

    def close(self) -> None:
        """End the process; the next render starts another."""
        if self._process and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None


GUARD = Guard()
atexit.register(GUARD.close)


def _limit_error(name: str, limit: str) -> ModelError:
    limits = {
        "time": _("it takes more than {seconds:g} seconds for one row").format(seconds=SECONDS),
        "memory": _("it takes more than {gigabytes} GB of memory").format(gigabytes=MEMORY >> 30),
        "text": _("it writes more than {millions} million characters for one row").format(millions=TEXT >> 20),
    }
    return ModelError(
        _("the chat template was stopped: {limit}").format(limit=limits[limit]),
        place=f"template {name}",
        remedy=_("choose another template, for example `template: chatml`"),
    )


def _read_reply(reply: Mapping[str, Any], trace: RenderTrace | None) -> str:
    if trace is not None:
        trace.slots[:] = [
            Slot(number, tuple((method, text) for method, text in steps)) for number, steps in reply["slots"]
        ]
        trace.absent |= {*reply["absent"]}
    if "text" in reply:
        return str(reply["text"])
    kind, message = reply["error"]
    if kind == "inspected":
        raise ContentInspected
    if kind == "refused":
        raise jinja2.TemplateError(message)
    if kind == "syntax":
        raise ModelError(message, place=reply["place"])
    raise TemplateFailure(kind, message)


def _plain(value: Any) -> Any:
    return [value.message, value.steps] if isinstance(value, Slot) else list(value)


def serve(compile_template: Callable[[str], jinja2.Template]) -> None:
    """Answer the requests of the parent process until it ends."""
    import resource

    with suppress(ValueError, OSError):  # the system may set a lower limit, and some systems none
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sources: dict[int, str] = {}
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        sources.setdefault(request["number"], request.get("source", ""))
        trace = RenderTrace()
        trace.slots = [Slot(number, tuple(map(tuple, steps))) for number, steps in request["slots"] or ()]
        context = revive(request["context"], trace) if request["slots"] else request["context"]
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # at the end of which the kernel ends this process
        reply = _reply(compile_template, sources[request["number"]], context)
        answer = json.dumps({**reply, "slots": trace.slots, "absent": sorted(trace.absent)}, default=_plain)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()


def _reply(compile_template: Callable[[str], jinja2.Template], source: str, context: dict[str, Any]) -> dict[str, Any]:
    try:
        text = compile_template(source).render(**context)
    except MemoryError:
        return {"limit": "memory"}
    except ContentInspected:
        return {"error": ["inspected", ""]}
    except ModelError as error:
        return {"error": ["syntax", error.rule], "place": error.place}
    except jinja2.TemplateError as error:
        return {"error": ["refused", str(error)[:1000]]}
    except Exception as error:
        return {"error": [type(error).__name__, str(error)[:1000]]}
    return {"text": text} if len(text) <= TEXT else {"limit": "text"}
