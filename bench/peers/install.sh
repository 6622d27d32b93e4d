#!/bin/sh
# Create a virtual environment with the pinned peer (LLaMA-Factory) of the training benchmark.
#
#     sh install.sh PEER_VENV
#
# Environment:
#   PYTHON           the python (3.11 or newer) that makes the environment; python3 if not set
#   TORCH_INDEX_URL  a package index that has the CPU build of torch (and of what torch needs), if
#                    pip's own configuration does not lead to one; without either, pip takes the
#                    much larger CUDA build from PyPI, which works but is of no use here
set -eu

if [ "$#" -ne 1 ]; then
    echo "usage: $0 PEER_VENV" >&2
    exit 2
fi
venv=$1
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
pins=$here/llamafactory.txt

"${PYTHON:-python3}" -m venv "$venv"
python=$venv/bin/python

torch=$(grep '^torch==' "$pins")
# torch with what it needs (its CUDA build needs much that is not pinned), then all the pins.
"$python" -m pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch"
"$python" -m pip install --no-deps -r "$pins"

# LLaMA-Factory imports torchaudio whatever it trains.  The wheel on PyPI is linked against CUDA, so
# with a CPU build of torch its import fails; without its compiled parts, which only audio data
# would use, the rest of the package imports well.
if ! "$python" -c 'import torchaudio' 2>/dev/null; then
    "$python" - <<'EOF'
from importlib.metadata import files
for file in files("torchaudio") or []:
    if file.match("lib/*.so"):
        file.locate().unlink(missing_ok=True)
EOF
    "$python" -c 'import torchaudio'
fi

"$python" - <<'EOF'
from importlib.metadata import version
import llamafactory.train.tuner  # also checks the versions of what it trains with
print({name: version(name) for name in ("llamafactory", "transformers", "torch", "peft", "accelerate")})
EOF
