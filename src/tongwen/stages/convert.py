"""convert: a model in one form to another, in a folder of its own."""

from __future__ import annotations

from pathlib import Path

from tongwen import console, forms
from tongwen.errors import RecipeError
from tongwen.language import say


def run(source: str, to: str, out: str, quantize: str) -> int:
    """Refuses to write where something stands."""
    target = Path(out)
    if target.exists():
        raise RecipeError(
            say("this folder exists", "该文件夹已存在"), place=out, remedy=say("choose another", "请换一个")
        )
    settings = {"source": source, "to": to, "quantize": quantize}
    made = forms.convert(forms.open_source(source), to, target, quantize, settings)
    console.emit({"out": out, **{key: value for key, value in made.manifest.items() if key != "tensors"}})
    return 0
