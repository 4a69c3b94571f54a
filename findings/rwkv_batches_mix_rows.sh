#!/usr/bin/env bash
# transformers 5.24.0: RWKV's generate gives other tokens for a prompt in a batch than for the same prompt alone.
#
# While decoding, one token a step, the time shift of RwkvSelfAttention and RwkvFeedForward takes `state[:, :, layer]`,
# (batch, hidden), where the hidden states are (batch, 1, hidden): broadcasting makes (batch, batch, hidden) of them, so
# rows are mixed. With one row it is right, and so is the forward pass without a state.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qqq torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 venv/bin/python - <<'P'
import torch, transformers
from transformers import RwkvConfig, RwkvForCausalLM
torch.manual_seed(0)
model = RwkvForCausalLM(RwkvConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2, context_length=512)).eval()
with torch.no_grad():
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
prompt = torch.arange(20, 40)[None]
options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
alone = model.generate(prompt, **options)[0, 20:].tolist()
pair = model.generate(prompt.repeat(2, 1), **options)[:, 20:].tolist()
print("transformers", transformers.__version__, "\nalone", alone, "\npair ", pair[0])
ids = prompt
for _ in range(12):
    ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
print("without a state", ids[0, 20:].tolist())
assert ids[0, 20:].tolist() == alone != pair[0], "the behaviour has changed"
P
