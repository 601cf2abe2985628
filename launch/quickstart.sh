#!/usr/bin/env bash
# A pretrained model folded into a looped block, uptrained back, and heard: a few minutes on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh
make_venv .venv "[train]"
workdir=${1:-runs/quickstart}
prompt="Return a new list with"

"$PY" -m recursive_jax.train --config=configs/quickstart.py --workdir="$workdir"

echo
echo "── the source, 12 layers ──"
"$PY" -m recursive_jax.generate --checkpoint=tiny --prompt="$prompt" --max_new_tokens=48
echo
echo "── the recursive model, 6 layers looped twice ──"
"$PY" -m recursive_jax.generate --checkpoint="$workdir" --prompt="$prompt" --max_new_tokens=48
cat <<EOT

Next, with a real model (a Hugging Face directory, a .gguf file, or a hub id):
  $PY -m recursive_jax.convert --source=MODEL --out=runs/mine --lora_rank=64
  $PY -m recursive_jax.train --config=configs/llama_rrt.py --workdir=runs/mine_trained \\
      --config.source=MODEL --config.data.train=TEXT_DIRECTORY
EOT
