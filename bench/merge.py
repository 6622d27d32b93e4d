"""Merge random Llama-shape models: tongwen, peft's merge_and_unload + save, and a plain copy of the same files.

    OMP_NUM_THREADS=1 python bench/merge.py --folder /tmp/bench-merge --out bench/results/merge.json

Each measurement runs in its own process, with a warm page cache: wall and CPU seconds, and the peak memory of the process
(`VmHWM`). `cp` is the time to copy the base and sync it to the disk, a lower bound for a merge.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

# hidden, layers, heads, key/value heads, feed-forward, vocabulary
SHAPES = {
    "0.3B": (1024, 16, 16, 8, 2816, 32000),
    "1.1B": (2048, 22, 32, 4, 5632, 32000),
    "2B": (2560, 26, 20, 4, 6912, 32000),
}
RANK = 16


def make_model(folder: Path, shape: tuple[int, ...]) -> None:
    """A random bf16 model in shards of about 1 GB."""
    import torch
    from safetensors.torch import save_file

    hidden, layers, heads, kv_heads, wide, vocabulary = shape
    narrow = hidden // heads * kv_heads
    tensors = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for layer in range(layers):
        for name, (rows, columns) in linears(shape).items():
            tensors[f"model.layers.{layer}.{name}.weight"] = (rows, columns)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
        tensors[f"model.layers.{layer}.post_attention_layernorm.weight"] = (hidden,)
    tensors["model.norm.weight"] = (hidden,)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, dimensions in tensors.items():
        count = 2 * int(torch.Size(dimensions).numel())
        if size + count > 1e9 and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = dimensions
        size += count
    folder.mkdir(parents=True)
    weight_map = {}
    torch.manual_seed(0)
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        state = {
            name: torch.ones(at, dtype=torch.bfloat16) if len(at) == 1 else (torch.randn(at) * 0.02).bfloat16()
            for name, at in shard.items()
        }
        save_file(state, str(folder / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": wide,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "head_dim": narrow // kv_heads,
    }
    (folder / "config.json").write_text(json.dumps(config))


def linears(shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """Linear layer of a block -> (rows, columns)."""
    hidden, _, heads, kv_heads, wide, _ = shape
    narrow = hidden // heads * kv_heads
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }


def make_adapter(folder: Path, shape: tuple[int, ...], seed: int) -> None:
    """A random LoRA adapter of rank 16 on all linear layers, as peft writes it."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    state = {}
    for layer in range(shape[1]):
        for name, (rows, columns) in linears(shape).items():
            at = f"base_model.model.model.layers.{layer}.{name}"
            state[f"{at}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
            state[f"{at}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
    folder.mkdir(parents=True)
    save_file(state, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    names = sorted(name.split(".")[1] for name in linears(shape))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config))


PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, out, *adapters = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
for adapter in adapters:
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out, max_shard_size="1GB")
"""


def measure(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds and peak memory of one process. Raises when it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _high_water(process.pid))
        time.sleep(0.02)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit((process.stderr.read() if process.stderr else b"").decode()[-2000:])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_seconds": round(wall, 2), "cpu_seconds": round(cpu, 2), "peak_mb": round(peak / 1e6)}


def _high_water(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def run(folder: Path, size: str, repeats: int) -> dict[str, Any]:
    """All measurements of one size."""
    shape = SHAPES[size]
    base = folder / size / "base"
    adapters = [folder / size / f"adapter-{index}" for index in (1, 2)]
    if not base.exists():
        make_model(base, shape)
        for index, adapter in enumerate(adapters, 1):
            make_adapter(adapter, shape, index)
    out = folder / size / "out"
    commands = {"cp": ["sh", "-c", f"cp -r {base} {out} && sync -f {out}"]}
    for count in (1, 2):
        chosen = [str(adapter) for adapter in adapters[:count]]
        flags = [flag for adapter in chosen for flag in ("--adapter", adapter)]
        commands[f"peft, {count}"] = [sys.executable, "-c", PEFT, str(base), str(out), *chosen]
        merge = [sys.executable, "-m", "tongwen", "merge", "--base", str(base), "--out", str(out), *flags]
        commands[f"tongwen, {count}"] = merge
    largest = 2 * shape[0] * shape[5]
    found: dict[str, Any] = {"largest_tensor_mb": round(largest / 1e6)}
    for _ in range(repeats):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            found.setdefault(name, []).append(measure(command))
    shutil.rmtree(out, ignore_errors=True)
    return {
        name: min(values, key=lambda one: one["cpu_seconds"]) if isinstance(values, list) else values
        for name, values in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the models are made")
    parser.add_argument("--sizes", nargs="*", default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = {
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "numpy")},
    }
    for size in args.sizes:
        found[size] = run(args.folder, size, args.repeats)
        print(size, json.dumps(found[size], indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
