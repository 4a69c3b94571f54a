#!/usr/bin/env bash
# transformers 5.24.0 (tokenizers 0.23.3): AutoTokenizer gives another tokenizer than the one that a folder holds.
#
# A Qwen2 model folder whose tokenizer.json was saved by PreTrainedTokenizerFast with a pre-tokenizer of its own (here
# plain byte-level) is read back by AutoTokenizer with Qwen2's own pre-tokenizer, because the model type decides the
# class and the class builds its own pipeline. Same vocabulary, other ids, no warning. PreTrainedTokenizerFast reads the
# same folder back as it was. A checkpoint of a model trained with the saved tokenizer silently gets other tokens.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qqq torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3
HF_HUB_OFFLINE=1 venv/bin/python - <<'P'
import json, transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
text = "step 12\n\nput 2 mugs in cabinet 10\n"
trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
bpe.train_from_iterator([text] * 20, trainer)
own = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
own.save_pretrained("model")
Qwen2Config(hidden_size=32, num_attention_heads=1, num_key_value_heads=1).save_pretrained("model")
auto, fast = AutoTokenizer.from_pretrained("model"), PreTrainedTokenizerFast.from_pretrained("model")
ids = {name: t(text)["input_ids"] for name, t in (("saved", own), ("fast", fast), ("auto", auto))}
print("transformers", transformers.__version__, "tokenizer_class saved:",
      json.load(open("model/tokenizer_config.json"))["tokenizer_class"], "AutoTokenizer gives:", type(auto).__name__)
for name, values in ids.items():
    print(f"{name:6}{len(values):4} tokens")
assert ids["fast"] == ids["saved"] and ids["auto"] != ids["saved"], "the behaviour has changed"
P
