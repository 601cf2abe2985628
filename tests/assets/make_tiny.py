"""Writes the embedded model from the run that trained it.

python -m recursive_jax.train --config=configs/tiny_pretrain.py --workdir=runs/tiny
python tests/assets/make_tiny.py runs/tiny recursive_jax/assets/tiny
"""

import json
import pathlib
import shutil
import sys

import ml_dtypes

from recursive_jax.weights import checkpoint, hf


def main(workdir: str, out: str) -> None:
    """Params as bf16 safetensors, beside the tokenizer that is already in `out`."""
    params, cfg = checkpoint.load_params(workdir)
    out_dir, made = pathlib.Path(out), pathlib.Path(out).with_suffix(".new")
    hf.save_params(checkpoint.as_numpy(params), cfg, made, dtype=ml_dtypes.bfloat16)
    out_dir.mkdir(parents=True, exist_ok=True)
    for file in made.iterdir():
        file.replace(out_dir / file.name)
    shutil.rmtree(made)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    (out_dir / "generation_config.json").write_text(json.dumps(ids, indent=1) + "\n")
    print(f"wrote {out_dir}: {sum(f.stat().st_size for f in out_dir.iterdir()):,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
