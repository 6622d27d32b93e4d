#!/usr/bin/env bash
# From an adapter to a quantised file for llama.cpp and Ollama: merge, verify, convert, look.
# usage: bash examples/adapter_to_gguf.sh BASE ADAPTER OUT [TYPE]      TYPE: q8_0 (default), q4_k_m, f16, ...
set -euo pipefail
base=$1 adapter=$2 out=$3 type=${4:-q8_0}

tongwen merge --base "$base" --adapter "$adapter" --out "$out/model"          # an ordinary Hugging Face folder, checked
tongwen verify "$out/model"                                                   # every file and tensor against its manifest
tongwen convert "$out/model" --to gguf --quantize "$type" --out "$out/gguf"   # one file, read back
tongwen show "$out/gguf"                                                      # how it came about

echo "llama-server -m $out/gguf/model-$type.gguf        # llama.cpp"
echo "ollama create NAME -f $out/gguf/Modelfile         # Ollama"
echo "vllm serve $out/model                             # vLLM"
