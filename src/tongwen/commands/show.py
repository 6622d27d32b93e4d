"""show: print what a folder contains and how it was made, with all its ancestors; for other models, their layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.tree import Tree

from tongwen.core import artifact, console
from tongwen.core.errors import ArtifactError
from tongwen.core.i18n import _


def run(path: str) -> int:
    """Print the family tree of an artifact, or of every stage of a run's folder; or the linear layers of a model."""
    folder_path = Path(path)
    found = [one for folder in (folder_path, *_stages(folder_path)) if (one := artifact.find(folder))]
    if not found and (folder_path / "config.json").is_file():
        return _show_model(path)
    if not found:
        unfinished = sorted(folder.name for folder in folder_path.glob("*.partial")) if folder_path.is_dir() else []
        raise ArtifactError(
            _("no manifest.json here: this is not an artifact of tongwen")
            if not unfinished
            else _("no stage has finished here; in progress: {unfinished}").format(unfinished=_(", ").join(unfinished)),
            place=path,
        )
    for one in found:
        console.show(_tree(one))
    console.emit({"artifacts": {str(one.path): one.manifest for one in found}})
    return 0


def _show_model(path: str) -> int:
    """Print the family, the size, and the possible names in `adapter.targets`; reads only the config."""
    from tongwen.model.loading.architecture import build_on_meta, load_config
    from tongwen.model.loading.locate import locate

    config = load_config(locate(path))
    model = build_on_meta(config)
    layers: dict[str, list[tuple[int, int]]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "in_features"):
            layers.setdefault(name.split(".")[-1], []).append((module.in_features, module.out_features))
    count = sum(part.numel() for part in model.parameters())
    console.header(
        path, f"{config.model_type} · {_('{parameters} parameters').format(parameters=console.human_count(count))}"
    )
    rows = [(name, len(sizes), " → ".join(map(str, sizes[0]))) for name, sizes in layers.items()]
    console.table((_("linear layer"), _("count"), _("in → out")), rows)
    console.emit({"model": path, "family": config.model_type, "parameters": count, "linear": list(layers)})
    return 0


def _stages(folder_path: Path) -> list[Path]:
    return (
        sorted(
            (folder for folder in folder_path.iterdir() if folder.is_dir()), key=lambda folder: folder.stat().st_mtime
        )
        if folder_path.is_dir() and not (folder_path / artifact.MANIFEST).is_file()
        else []
    )


def _tree(one: artifact.Artifact, role: str = "", changed: str = "", below: frozenset[Path] = frozenset()) -> Tree:
    """role, changed: of an ancestor, before and after its path and kind. below: its descendants in the tree."""
    manifest = one.manifest
    made = " · ".join(
        (
            str(manifest.get("created", "")),
            console.human_time(manifest.get("seconds", 0)),
            f"tongwen {manifest.get('tongwen', '?')}",
            f"torch {manifest.get('versions', {}).get('torch', '?')}",
        )
    )
    fingerprint = (one.fingerprint[:12], "dim")
    tree = Tree(console.styled(role, (str(one.path), "bold"), f"  {one.kind}  ", fingerprint, (changed, "red")))
    tree.add(console.styled((made, "dim")))
    for name, value in _facts(manifest):
        tree.add(console.styled(f"{name}: {value}"))
    for role, parent in manifest.get("parents", {}).items():
        place = Path(str(parent.get("path")))
        ancestor = artifact.find(place) if parent.get("kind") and place not in below else None
        if ancestor is not None:
            unchanged = ancestor.fingerprint == parent.get("fingerprint")
            changed = "" if unchanged else f"  {_('has changed since')}"
            tree.add(_tree(ancestor, f"{role}: ", changed, below | {one.path, place}))
        else:
            name = parent.get("path") or parent.get("name") or ""
            tree.add(console.styled(f"{role}: {name}  ", (str(parent.get("fingerprint") or "")[:12], "dim")))
    return tree


def _facts(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    for key in (
        "method",
        "device",
        "dtype",
        "steps",
        "tokens",
        "batch",
        "stop_tokens",
        "template_name",
        "type",
        "counts",
        "forced_over",
    ):
        if key in manifest:
            value = manifest[key]
            out.append(
                (
                    key,
                    ", ".join(f"{name} {count}" for name, count in value.items())
                    if isinstance(value, dict)
                    else str(value),
                )
            )
    tables = manifest.get("ledger", {})
    for name, table in tables.items() if isinstance(tables, dict) else ():
        lost = "".join(f" − {reason} {count['rows']:,}" for reason, count in table["lost"].items())
        out.append((name, f"{table['in']['rows']:,}{lost} = {table['kept']['rows']:,}"))
    return out
