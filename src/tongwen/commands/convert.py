"""convert: write a model in another format to a new folder, and push it to a hub on request."""

from __future__ import annotations

from pathlib import Path

from tongwen.core import console, originals
from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.hub import upload
from tongwen.workflows import model_formats


def run(source: str, to: str, out: str, quantize: str, push: str = "", *, again: bool, public: bool = False) -> int:
    """Convert. An existing folder is an error, unless `again` allows renaming it."""
    if push:
        upload.check_name(push)
        if to != "hf":
            raise RecipeError(_("only the hf format can be pushed to a hub"), place="--push", remedy="--to hf")
    target = Path(out)
    originals.clear_path(target, [source], again=again)
    settings = {"source": source, "to": to, "quantize": quantize}
    result = model_formats.convert(model_formats.open_source(source), to, target, quantize, settings)
    model_formats.report_written(target)
    address = upload.push(target, push, console.notice, public=public) if push else ""
    if address:
        console.success(address)
    facts = {key: value for key, value in result.manifest.items() if key != "tensors"}
    console.emit({"out": out, "pushed": address, **facts})
    return 0
