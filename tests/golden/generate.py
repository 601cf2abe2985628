"""Writes the frozen logits of tiny transformers models, so that parity is checked without torch.

    python tests/golden/generate.py        (needs torch and transformers)

One JSON per case of `cases.py`: the `config.json` transformers saves, the tokens, the names and
shapes of its tensors (their values follow from `cases.weight`), and the logits as base64 float32.

If `tests/test_hf.py` fails against these, our decoder or reader has changed: run
`tests/test_hf_consistency.py`, which compares with transformers itself, and mend the code. Only if
that passes and this directory disagrees has transformers changed its mathematics: read its release
notes, regenerate, and say why in the commit. After adding a case, run this and commit its file.
"""

import base64
import json
import pathlib
import sys

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import cases  # noqa: E402


def generate(name: str) -> dict:
    kind, settings = cases.CASES[name]
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.eval()
    shapes = {}
    with torch.no_grad():
        for key, value in model.named_parameters():
            shapes[key] = list(value.shape)
            value.copy_(torch.from_numpy(cases.weight(key, tuple(value.shape), kind)))
        tokens = cases.tokens(config.vocab_size)
        logits = model(torch.from_numpy(tokens)).logits.numpy().astype("<f4")
    return {
        "made_with": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "config": json.loads(model.config.to_json_string()),
        "tokens": tokens.tolist(),
        "tensors": shapes,
        "logits": base64.b64encode(logits.tobytes()).decode(),
    }


if __name__ == "__main__":
    for case in cases.CASES:
        file = HERE / f"{case}.json"
        golden = generate(case)
        file.write_text(json.dumps(golden, sort_keys=True) + "\n")
        values = np.frombuffer(base64.b64decode(golden["logits"]), "<f4")
        print(f"{file.name}: {file.stat().st_size} bytes, logit scale {np.abs(values).max():.3f}")
