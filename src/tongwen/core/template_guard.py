"""Render a template of unknown origin in a process of its own, under limits of time, memory and output.

A chat template is a program that comes with a model, and what it does depends on the row. Jinja's sandbox keeps it from files and
Python objects, but not from looping for ever or from filling the memory. So each render of it happens in a small process that
the kernel ends at a limit. All such templates share one process; it takes rows in batches and
answers in JSON, so nothing is unpickled.

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
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import jinja2

from tongwen.core.errors import ModelError, RowRejected
from tongwen.core.i18n import _
from tongwen.core.records import from_dict
from tongwen.core.template_cache import ContentInspected, RenderTrace, Slot, find_trace, revive
from tongwen.core.template_environment import compile_template

SECONDS = 3.0  # of CPU time for one row; an ordinary one takes a thousandth
MEMORY = 1 << 30  # bytes of the process's address space
TEXT = 32 << 20  # characters of one render
BATCH, BATCH_BYTES = 100, 1 << 20  # rows of a request, and their size in JSON
# The parent's path, and nothing else: no folder of a stranger is imported from.
COMMAND = "import sys; sys.path[:] = {path!r}; from tongwen.core import chat_template, template_guard; template_guard.serve(chat_template)"


class TemplateFailure(ValueError):
    """An error of the template itself. kind: the name of the error in the other process."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class Guard:
    """The process, started when it is needed, and again after a template broke a limit. Used by one thread at a time."""

    # Windows has no such limits: there, as in the process itself, a template renders where it is asked.
    is_possible = os.name != "nt"

    def __init__(self) -> None:
        self._owner = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._sent: dict[str, int] = {}  # templates that the process has, with their numbers
        self._broke: dict[str, str] = {}  # templates that broke a limit, and how

    def render(self, source: str, name: str, context: Mapping[str, Any]) -> str:
        """Return the render. Raises TemplateFailure or jinja2.TemplateError as the template does, ModelError when it breaks a
        limit, ContentInspected for a traced content that it inspects."""
        trace = find_trace(context["messages"])
        return _read_reply(
            self._ask(source, name, {"context": context, "slots": trace.slots if trace else None}), trace
        )

    def samples(
        self, specification: Mapping[str, Any], rows: Sequence[dict[str, Any]], learn: str, thinking: str
    ) -> Iterator[list[list[list[Any]]] | RowRejected]:
        """Yield the spans of each dialogue's samples, or why it is rejected. specification: arguments of `Template.make`."""
        template = json.dumps(specification)
        for batch in _batches(rows):
            reply = self._ask(template, specification["name"], {"rows": batch, "learn": learn, "thinking": thinking})
            for spans, refusal in reply["samples"]:
                yield spans if refusal is None else RowRejected(*refusal)

    def _ask(self, template: str, name: str, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            if self._owner != os.getpid():  # a fork must not share the pipes
                self._owner, self._process = os.getpid(), None
            if template in self._broke:
                raise _limit_error(name, self._broke[template])
            process = self._process or self._start()
            if template not in self._sent:
                self._sent[template] = len(self._sent)
                request["template"] = template
            try:
                reply = _exchange(process, {**request, "number": self._sent[template]})
            except BaseException:  # Ctrl-C: the reply would answer the next request
                self.close()
                raise
            if "limit" in reply:
                self.close()
                self._broke[template] = str(reply["limit"])
                raise _limit_error(name, self._broke[template])
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

    def close(self) -> None:
        """End the process; the next render starts another."""
        if self._process and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None


GUARD = Guard()
atexit.register(GUARD.close)


def _exchange(process: subprocess.Popen[bytes], request: dict[str, Any]) -> dict[str, Any]:
    """Return the reply to a request, or the limit at which the process ended instead."""
    assert process.stdin and process.stdout
    line = b""
    with suppress(OSError):
        process.stdin.write(_line(request))
        process.stdin.flush()
        line = process.stdout.readline()
    if line.endswith(b"\n"):
        reply: dict[str, Any] = json.loads(line)
        if "bug" in reply:
            raise RuntimeError(reply["bug"])
        return reply
    return {"limit": "time" if process.wait() == -signal.SIGPROF else "memory"}


def _batches(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield the rows as JSON, in requests of limited size."""
    batch: list[str] = []
    for row in rows:
        text = json.dumps(row, ensure_ascii=False)
        if batch and (len(batch) == BATCH or sum(map(len, batch)) + len(text) > BATCH_BYTES):
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


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


def _read_slot(slot: Sequence[Any]) -> Slot:
    message, path, steps = slot
    return Slot(message, tuple(path), tuple((method, text) for method, text in steps))


def _read_reply(reply: Mapping[str, Any], trace: RenderTrace | None) -> str:
    if trace is not None:
        trace.slots[:] = map(_read_slot, reply["slots"])
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


def _line(message: Mapping[str, Any]) -> bytes:
    """Return a request or a reply as a line of JSON, lone surrogates included."""
    return json.dumps(message, ensure_ascii=False, default=_plain).encode("utf-8", "surrogatepass") + b"\n"


def _plain(value: Any) -> Any:
    return [value.message, value.path, value.steps] if isinstance(value, Slot) else list(value)


def serve(chat_template: Any) -> None:
    """Answer the requests of the parent process until it ends. chat_template: the module, which imports this one."""
    import resource

    Guard.is_possible = False
    with suppress(ValueError, OSError):  # the system may set a lower limit, and some systems none
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sources: dict[int, str] = {}
    templates: dict[int, Any] = {}
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        number = request["number"]
        sources.setdefault(number, request.get("template", ""))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # at the end of which the kernel ends this process
        try:
            if "rows" in request:
                if number not in templates:
                    templates[number] = _make(chat_template, **json.loads(sources[number]))
                answer = _samples(templates[number], request)
            else:
                answer = _render(compile_template, sources[number], request)
        except MemoryError:
            answer = {"limit": "memory"}
        except Exception:
            answer = {"bug": traceback.format_exc()}
        reply = _line(answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()


def _make(chat_template: Any, name: str, **arguments: Any) -> Any:
    special = tuple(arguments.pop("special"))
    return replace(chat_template.Template.make("own", special=special, **arguments), name=name)


def _samples(template: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    out: list[tuple[Any, Any]] = []
    for text in request["rows"]:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            samples = template.samples(from_dict(json.loads(text)), request["learn"], request["thinking"])
            out.append(([sample.spans for sample in samples], None))
        except RowRejected as error:
            out.append((None, (error.reason, error.rule)))
        except RecursionError as error:
            out.append((None, ("template_fails", str(error))))
    return {"samples": out}


def _render(
    compile_template: Callable[[str], jinja2.Template], source: str, request: Mapping[str, Any]
) -> dict[str, Any]:
    trace = RenderTrace()
    trace.slots = [*map(_read_slot, request["slots"] or ())]
    context = revive(request["context"], trace) if request["slots"] else request["context"]
    answer: dict[str, Any] = {}
    try:
        answer["text"] = compile_template(source).render(**context)
        if len(answer["text"]) > TEXT:
            return {"limit": "text"}
    except MemoryError:
        raise
    except ContentInspected:
        answer["error"] = ["inspected", ""]
    except ModelError as error:
        answer |= {"error": ["syntax", error.rule], "place": error.place}
    except jinja2.TemplateError as error:
        answer["error"] = ["refused", str(error)[:1000]]
    except Exception as error:
        answer["error"] = [type(error).__name__, str(error)[:1000]]
    return {**answer, "slots": trace.slots, "absent": sorted(trace.absent)}
