"""serve: offer a model through OpenAI's API on a port of this machine, until SIGTERM or Ctrl-C.

The model answers one request after the other, in their order. For many users at once, give the merged model to a server
made for that (docs/serve.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tongwen.core import console
from tongwen.core.errors import MissingPackage
from tongwen.core.i18n import _
from tongwen.infer.generation import Logprobs, Sampling
from tongwen.workflows.chat_model import ChatModel, open_chat_model

if TYPE_CHECKING:
    from tongwen.serving.openai_api import Backend


def run(
    model: str,
    adapters: Sequence[str],
    *,
    name: str,
    host: str,
    port: int,
    queue: int,
    template: str,
    thinking: str,
    weights: str,
    sampling: dict[str, Any],
) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    try:
        from tongwen.serving import auth, openai_api
    except ImportError:
        raise MissingPackage("uvicorn", "tongwen serve", "serve") from None
    if find_spec("jsonschema") is None:  # imported with the first request that has tools
        raise MissingPackage("jsonschema", "tongwen serve", "serve")

    Sampling().override(**sampling)
    loopback = auth.is_loopback(host)
    token, generated = auth.choose_token(loopback)
    with auth.open_port(host, port) as listening:
        chat_model = open_chat_model(model, adapters, template, thinking, weights=weights, rows=1)
        backend = make_backend(chat_model, name or Path(model).name, sampling)
        url = f"http://{host}:{listening.getsockname()[1]}/v1"
        console.header(backend.name, _("Ctrl-C stops it"))
        console.info(f"OPENAI_BASE_URL={url}")
        console.info(f"OPENAI_API_KEY={token}" if generated else _("the token is ${token}").format(token=auth.TOKEN))
        console.emit({"url": url, "model": backend.name, **({"token": token} if generated else {})})
        auth.serve(auth.AuthMiddleware(openai_api.make_app(backend, queue), token, loopback=loopback), listening)
    console.success(_("ended"))
    return 0


def make_backend(chat_model: ChatModel, name: str, settings: dict[str, Any]) -> Backend:
    """Return a model as the server uses it. settings: defaults for options that a request leaves out."""
    from tongwen.serving.openai_api import Backend

    def generate(
        ids: list[int],
        on_token: Callable[[int], None],
        options: dict[str, Any],
        begin: str,
        top: int | None,
        on_logprob: Callable[[dict[str, Any]], None],
    ) -> Iterator[str]:
        wanted = None if top is None else Logprobs(top, lambda token: on_logprob(chat_model.describe(token)))
        return chat_model.continue_ids(ids, on_token, begin, wanted, **options)

    return Backend(
        name=name,
        chat_ids=chat_model.prompt_ids,
        tool_parser=lambda: chat_model.tool_parser,
        text_ids=chat_model.text_ids,
        generate=generate,
        gives_logprobs=chat_model.generator.gives_logprobs,
        ended=chat_model.ended,
        check=lambda options: Sampling().override(**options),
        context=chat_model.context,
        settings=settings,
    )
