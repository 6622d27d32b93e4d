"""convert: a model in one form to another, in a folder of its own."""

from __future__ import annotations

from pathlib import Path

from tongwen import artifact, console, forms


def run(source: str, to: str, out: str, quantize: str, *, again: bool) -> int:
    """Refuses to write where something stands, unless told to keep that under another name."""
    target = Path(out)
    artifact.make_way(target, again=again)
    settings = {"source": source, "to": to, "quantize": quantize}
    made = forms.convert(forms.open_source(source), to, target, quantize, settings)
    console.emit({"out": out, **{key: value for key, value in made.manifest.items() if key != "tensors"}})
    return 0
