"""Serve the page on a port of this machine: two languages behind one login, for as long as the command runs."""

from __future__ import annotations

from starlette.applications import Starlette

from tongwen.core import console
from tongwen.core.i18n import _
from tongwen.serving import auth
from tongwen.serving.auth import TOKEN, App, choose_token, is_loopback, open_port
from tongwen.serving.web.api import routes
from tongwen.serving.web.backend import PageBackend
from tongwen.serving.web.login import LoginMiddleware, UploadLimits


def serve(backend: PageBackend, host: str, port: int) -> int:
    """Serve until interrupted. Raises RecipeError if other machines can reach the address and the user has chosen no token,
    MachineError if the port cannot be used."""
    loopback = is_loopback(host)
    token, generated = choose_token(loopback)
    with open_port(host, port) as listening:
        port = listening.getsockname()[1]
        app = make_app(backend, token, port=port, loopback=loopback)
        url = f"http://{host}:{port}/" + (f"?token={token}" if generated else "")
        console.success(url if generated else _("{url}?token=…: the token is ${token}").format(url=url, token=TOKEN))
        console.info(_("Ctrl-C stops it; runs that have started continue"))
        console.emit({"url": url})
        auth.serve(app, listening)
    return 0


def make_app(
    backend: PageBackend, token: str, *, port: int, loopback: bool = True, limits: UploadLimits | None = None
) -> App:
    """Return the whole application: the routes behind the login."""
    application = Starlette(routes=routes(backend))
    application.router.redirect_slashes = False
    limits = limits or UploadLimits()
    return LoginMiddleware(application, token, port=port, loopback=loopback, limits=limits, uploads=backend.uploads)
