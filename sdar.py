"""SDAR, Self-Distilled Agentic Reinforcement Learning (arXiv 2605.15155), in one file and on one GPU.

The method. A language-model agent plays G episodes of each task. GRPO is the backbone: an episode's advantage is its
reward, normalised within its group, shared by all the tokens the agent wrote. On top of it the SAME weights are asked
again, with a prompt that also holds retrieved skills, how likely they find the very tokens that were sampled. That
privileged prompt is the teacher; each token's detached gap opens or closes a gate:

    Delta_t = log pi(y_t | s_t, skill) - log pi(y_t | s_t)            the teacher-student gap
    g_t     = sigmoid(beta * Delta_t)                                 the gate            -> sdar_gate
    L       = L_GRPO + lambda * mean( g_t * (log pi_teacher - log pi_student) )           -> sdar_tokens, step_loss

The mean is over the tokens of an episode, then over episodes (--loss-agg). At test time the skills are gone.

How to read it. The file follows the paper: settings, policy, prompts, rollout, advantages and losses, scoring,
training. Two dataclasses travel through it: a `Turn` (one prompt, one response) and an `Episode` (its turns and its
reward). The losses are plain functions on (B, T) tensors that need nothing but torch: copy them. What comes after the
training is machinery that a first reading can leave out, up to the last section, which runs it all: generation, faster
kernels, the vocabulary head in chunks, the warm start, the log, several GPUs, files.

What was left out, and why. No inference server: `generate` here is a page long and shares the weights with the
trainer, so there is nothing to synchronise. No sharding: models up to some 3B parameters train on one card, and
several cards of one machine share the work, each with a whole copy. No value network: GRPO has none. The environments
are in envs.py, measuring is in eval.py.

    python sdar.py --env alfworld --model tiny                           # a laptop, offline, minutes
    python sdar.py --env alfworld --model Qwen/Qwen2.5-1.5B-Instruct     # one GPU, the paper's settings
    python sdar.py --resume runs/alfworld-sdar-tiny                      # go on where a run stopped
    torchrun --nproc_per_node 2 sdar.py --model ...                      # several GPUs of one machine
    python sdar.py --help                                                # every setting, explained
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm import tqdm

import envs
from envs import UserError

# ======== Settings: the defaults are the paper's for ALFWorld, PRESETS holds what differs elsewhere ===================

METHODS = ("grpo", "sdar", "opsd", "grpo+opsd", "skill-grpo", "skill-sd", "rlsd")


def opt(default, help, choices=None):
    """One setting: its default, its line in --help, and what it may be."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """Every setting of a run, as saved in config.json; `python sdar.py --help` prints the same list."""

    env: str = opt("alfworld", "benchmark", ("alfworld", "webshop", "search"))
    model: str = opt("tiny", "Hugging Face name, folder, GGUF file, or `tiny` (a million parameters, no download)")
    algo: str = opt("sdar", "training objective", METHODS)
    as_released: bool = opt(False, "the public code's objective: advantages over turns, token mean, KL, baselines")
    out: str = opt("", "run folder (default: runs/ENV-ALGO-MODEL)")
    seed: int = opt(233, "seed of task order, sampling and initial weights; the world itself never depends on it")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    # data
    data: str = opt("", "folder or archive of the benchmark, or built-in (default: $ALFWORLD_DATA etc., else ~/.cache, "
                    "else built-in)")
    env_args: str = opt("", "further options of the environment, as in 'house=6 detours=2' (see envs.py)")
    search_url: str = opt("", "search server of --env search, as http://127.0.0.1:8000/retrieve")
    corpus: str = opt("", "passages of --env search, JSONL or .gz (default: those of the data, else built-in)")
    skills: str = opt("", "folder of a public skill library (default: the skills in envs.py)")
    split: str = opt("", "training split (default: the benchmark's own)")
    val_split: str = opt("", "validation split (default: the benchmark's own)")
    # rollout
    groups: int = opt(16, "tasks per step, one group of GRPO each")
    group_size: int = opt(8, "episodes per task, the G of GRPO")
    max_turns: int = opt(50, "turns before an episode ends as a failure")
    history: int = opt(2, "past turns shown in the prompt")
    max_prompt: int = opt(2048, "tokens of the student's prompt; longer ones lose their oldest history first")
    max_teacher_prompt: int = opt(3072, "tokens of the teacher's prompt; the skill itself is never cut")
    max_response: int = opt(512, "tokens of a response")
    prompt_style: str = opt("paper", "wording of the prompts; brief: the same parts in few tokens", ("paper", "brief"))
    temperature: float = opt(1.0, "sampling temperature of training rollouts")
    rollout_rows: int = opt(128, "sequences decoded together; lower it if a rollout runs out of memory")
    no_graphs: bool = opt(False, "decode without CUDA graphs, for a model that they cannot record; slower")
    # objective
    success_reward: float = opt(10.0, "reward of a solved task; everything else gets 0")
    invalid_penalty: float = opt(0.1, "taken from the advantage of a turn whose response is malformed")
    advantage_over: str = opt("trajectories", "what a group's mean and std run over; turns: as the public code",
                              ("trajectories", "turns"))
    loss_agg: str = opt("trajectory", "trajectory: (1/G) sum_i Agg as the paper; token: mean over all tokens as the "
                        "public code", ("trajectory", "token"))
    gate: str = opt("gap", "what opens a token's gate", ("gap", "entropy", "soft-or", "none"))
    beta: float = opt(5.0, "sharpness of the gate")
    gate_baseline: bool = opt(False, "subtract the mini-batch's mean gate: less variance, no reward for brevity")
    divergence: str = opt("sampled", "what is gated: the sampled log-ratio, or an exact divergence over the vocabulary "
                          "(with --gate none: full distillation)",
                          ("sampled", "reverse-kl", "forward-kl", "jsd"))
    lam: float = opt(0.01, "lambda, the weight of the distillation term")
    rlsd_lam: float = opt(0.5, "share of RLSD's advantage that the teacher scales")
    retrieval: str = opt("km", "which skill the teacher gets: the task's own (km), a bandit's choice, all, one by lot",
                         ("km", "ucb", "full", "random"))
    ucb_c: float = opt(1.0, "exploration of the bandit, in units of success rate")
    clip: float = opt(0.2, "clip range of the importance ratio")
    dual_clip: float = opt(3.0, "bound on the token loss of negative advantages, in units of |A|")
    kl: float = opt(0.01, "alpha_KL, the weight of the KL term; 0 keeps no reference policy")
    # optimisation
    steps: int = opt(150, "training steps (one rollout each)")
    lr: float = opt(1e-6, "learning rate of AdamW")
    lr_warmup: float = opt(0.0, "share of the steps over which the learning rate rises from 0")
    weight_decay: float = opt(0.01, "weight decay of AdamW")
    mini_batch: int = opt(256, "turns per optimizer step; 0: one optimizer step per rollout")
    micro_tokens: int = opt(8192, "tokens per forward-backward: memory, not the gradient; lower it if memory runs out")
    recompute: bool = opt(False, "recompute activations in the backward pass: one more forward, much less memory")
    offload: bool = opt(False, "keep fp32 masters and Adam's moments in host memory, for small cards; slower updates")
    head_chunk: int = opt(256, "response positions per chunk of the output head")
    grad_clip: float = opt(1.0, "largest gradient norm")
    # behaviour cloning before RL
    warm_start: int = opt(0, "steps of behaviour cloning on expert episodes before RL, half of them with the skill")
    warm_lr: float = opt(1e-5, "learning rate of the warm start (cosine to a tenth)")
    warm_tasks: int = opt(8, "expert episodes per warm-start step")
    warm_prompt_loss: float = opt(0.0, "weight of the prompt's own tokens in the warm start; helps models from scratch")
    # measuring and saving
    val_every: int = opt(10, "steps between validations; 0: never")
    val_episodes: int = opt(128, "tasks of the validation panel")
    val_temperature: float = opt(0.4, "sampling temperature of validation; 0: greedy")
    save_every: int = opt(10, "steps between checkpoints (warm start: ten times as many)")
    keep: int = opt(2, "checkpoints kept")
    diagnose_every: int = opt(0, "steps between measurements of the two loss terms' gradients apart; 0: never")
    log_episodes: int = opt(2, "episodes per step written to episodes.jsonl as text")
    # tiny
    tiny_width: int = opt(128, "hidden size of `tiny`")
    tiny_layers: int = opt(4, "layers of `tiny`")
    tiny_vocab: int = opt(1024, "vocabulary of `tiny`")


PRESETS = {
    "alfworld": {},
    "webshop": dict(max_turns=15, max_prompt=4096, max_teacher_prompt=5120, mini_batch=64),
    "search": dict(groups=128, max_turns=4, history=4, max_prompt=4096, max_teacher_prompt=5120, success_reward=1.0,
                   invalid_penalty=0.01, lr_warmup=0.1, val_temperature=0.0),
}
METHOD_PRESETS = {"skill-sd": dict(lam=0.001), "opsd": dict(kl=0.0)}
AS_RELEASED = dict(advantage_over="turns", loss_agg="token", kl=0.01)  # and the baselines' losses: see method_tokens
AS_RELEASED_ENV = {"search": dict(kl=0.001)}
TINY = dict(prompt_style="brief", groups=4, max_prompt=512, max_teacher_prompt=768, max_response=48, lr=3e-4,
            kl=0.0, steps=4, warm_start=150, warm_lr=3e-3, warm_tasks=4, warm_prompt_loss=0.3, val_every=4,
            val_episodes=64)
TINY_ENV = {"alfworld": dict(env_args="house=5 detours=3", max_turns=15), "webshop": dict(mini_batch=256, lr=1e-4)}
MAY_CHANGE = ("corpus data device keep log_episodes max_prompt max_teacher_prompt micro_tokens no_graphs offload "  # on
              "recompute rollout_rows save_every search_url steps val_episodes val_every val_split").split()  # --resume


SECTIONS = {"env": "what is trained", "data": "data", "groups": "rollout", "success_reward": "objective",
            "steps": "optimisation", "warm_start": "behaviour cloning before RL", "val_every": "measuring and saving",
            "tiny_width": "the model `tiny`"}  # of --help, by their first setting


def make_parser():
    """The command line of sdar.py, one flag per field of Settings."""
    parser = argparse.ArgumentParser(
        prog="sdar.py", usage="python sdar.py [--env ENV] [--model MODEL] [flags]", description=__doc__,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=120),
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
        epilog="Defaults are the paper's for ALFWorld; the other benchmarks and `tiny` have presets (PRESETS, TINY).")
    parser.error = lambda message: fail(f"{message}; see python sdar.py --help")
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder with its own settings")
    group = parser
    for f in dataclasses.fields(Settings):
        group = parser.add_argument_group(SECTIONS[f.name]) if f.name in SECTIONS else group
        shown = "" if f.default == "" or f.default is False else f" (default: {f.default})"
        kind = {"action": "store_true"} if isinstance(f.default, bool) else {
            "type": type(f.default), "choices": f.metadata["choices"],
            "metavar": None if f.metadata["choices"] else f.name.upper()}
        group.add_argument(flag(f.name), help=(f.metadata["help"] + shown).replace("%", "%%"), **kind)
    return parser


def flag(name):
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def read_settings(argv):
    """(settings, resumed run folder or None): defaults, the benchmark's preset, the method's, `tiny`'s, explicit flags,
    each over the former; with --resume the run's own, then explicit flags. UserError for what makes no sense."""
    explicit = vars(make_parser().parse_args(argv))
    resume = explicit.pop("resume", None)
    if resume is None:
        name = explicit.get("env", Settings.env)
        tiny = {**TINY, **TINY_ENV.get(name, {})} if explicit.get("model", Settings.model) == "tiny" else {}
        method = METHOD_PRESETS.get(explicit.get("algo"), {})
        released = {**AS_RELEASED, **AS_RELEASED_ENV.get(name, {})} if "as_released" in explicit else {}
        settings = Settings(**{**PRESETS[name], **method, **released, **tiny, **explicit})
        short = re.sub(r"[^\w.-]+", "-", Path(settings.model).name)
        settings.out = settings.out or f"runs/{settings.env}-{settings.algo}-{short}"
        check_settings(settings)
        check_effects(settings)
    else:
        for name in sorted(set(explicit) - set(MAY_CHANGE)):
            raise UserError(f"{flag(name)} cannot change within a run; start a new one with --out")
        saved = read_json(Path(resume) / "config.json", f"{resume} holds no run (no config.json)")
        try:
            settings = Settings(**{**saved, **explicit, "out": str(resume)})
        except TypeError as error:
            raise UserError(f"{resume}/config.json is another version's ({first_line(error)}); start afresh") from None
        check_settings(settings)
    return settings, resume


def check_settings(s):
    """Raise UserError for the first setting that cannot work."""
    positive = ("groups", "group_size", "max_turns", "max_prompt", "max_teacher_prompt", "max_response", "rollout_rows",
                "temperature", "micro_tokens", "head_chunk", "grad_clip", "keep", "save_every", "lr", "warm_lr",
                "warm_tasks", "clip", "tiny_width", "tiny_layers")
    for f in dataclasses.fields(s):  # a config.json may hold anything
        name, value, kind = f.name, getattr(s, f.name), type(f.default)
        if type(value) not in (kind, int if kind is float else kind) or value not in (f.metadata["choices"] or [value]):
            raise UserError(f"{flag(name)} cannot be {value!r}")
        if name in positive and not 0 < value < math.inf:
            raise UserError(f"{flag(name)} must be above 0, not {value}")
        if isinstance(value, (int, float)) and name != "seed" and not 0 <= value < math.inf:
            raise UserError(f"{flag(name)} must be a number of 0 or more, not {value}")
    for wrong, message in (
            (s.group_size < 2, "--group-size must be at least 2: an advantage is a comparison within a group"),
            (not -2**63 <= s.seed < 2**63, "--seed must be a number of 64 bits"),
            (s.dual_clip <= 1, f"--dual-clip must be above 1, not {s.dual_clip}"),
            (s.gate_baseline and (s.gate != "gap" or s.divergence != "sampled" or not uses_gate(s)),
             "--gate-baseline goes with SDAR's own term only: --algo sdar, --gate gap and --divergence sampled"),
            (s.tiny_width % 32, f"--tiny-width must be a multiple of 32, not {s.tiny_width}")):
        if wrong:
            raise UserError(message)


def check_effects(s):
    """Raise UserError for the first setting that is not the usual one, and would change nothing."""
    felt = {"gate": uses_gate(s), "divergence": uses_gate(s) or (s.as_released and s.algo == "grpo+opsd"),
            "beta": uses_teacher(s) and s.algo != "grpo+opsd", "rlsd_lam": s.algo == "rlsd",
            "lam": s.algo not in ("grpo", "skill-grpo", "rlsd"),
            "retrieval": uses_teacher(s) or s.algo == "skill-grpo", "ucb_c": s.retrieval == "ucb"}
    for name in felt:
        if not felt[name] and getattr(s, name) != getattr(Settings, name):
            where = f"--retrieval {s.retrieval}" if name == "ucb_c" else f"--algo {s.algo}"
            raise UserError(f"{flag(name)} has no effect with {where}; leave it out")


def open_env(s):
    """The environment of a run: --env-args 'house=6 detours=2' become keyword arguments of its class. Where there is no
    data, s.data says so from now on."""
    options = {name: getattr(s, name) for name in ("search_url", "corpus") if getattr(s, name)}
    for item in s.env_args.split():
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--env-args takes KEY=VALUE pairs, not {item!r}")
        if key in ("name", "data", "skills", "seed"):
            raise UserError(f"--env-args cannot set {key}; --env, --data and --skills can, the world's seed is fixed")
        number = re.fullmatch(r"-?\d+(\.\d+)?", value)
        options[key] = value if not number else float(value) if number[1] else int(value)
    env = envs.open_env(s.env, s.data or None, skills=s.skills or None, **options)
    s.data = s.data or "built-in" * env.builtin  # said, or a run would go on with data that are downloaded later
    return env


# ======== Policy: any causal language model with a chat template ======================================================

@dataclass
class Policy:
    """A language model, its tokenizer, and what generation must know of them."""

    model: torch.nn.Module
    tokenizer: object
    end_ids: frozenset        # token ids that end a response (EOS, end of turn)
    closing_ids: frozenset    # token ids whose text holds '>': only these can complete a closing tag
    think_closed: bool        # the chat template closes the think block in the prompt (Qwen3, thinking off)
    cache: object = None      # KeyValues of the last generation, for the next one

    @property
    def device(self):
        return self.model.device

    @property
    def head(self):
        """The output layer, (hidden) -> (vocabulary)."""
        return self.model.get_output_embeddings()


def pick_device(name):
    """The torch device of a --device flag; UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # one for each process of torchrun
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here ({first_line(error)}); try --device cpu") from None
    device = probe.device  # with its index
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA graphs and streams take the current device
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, and nearly all are new
    return device


def weight_dtype(device):
    """What weights are held in: bf16, on a CPU fp32."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def load_policy(name, device="auto", texts=(), settings=None):
    """A policy, its weights of weight_dtype. name: a Hugging Face model, a local folder (a run folder stands for its
    last checkpoint), a .gguf file, or `tiny`, built from `texts` (an iterable of strings) and the sizes in `settings`.
    UserError when the model cannot be had, has no chat template, or hides its logits behind more than a head."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    device = pick_device(device)
    dtype, path = weight_dtype(device), Path(name)
    if name == "tiny":
        model, tokenizer = build_tiny(texts, settings or Settings())
    else:
        folder, kwargs = str(last_checkpoint(path) or name), {}
        if path.suffix == ".gguf":
            folder, kwargs = str(path.parent), {"gguf_file": path.name}
        try:
            # AutoTokenizer would give a saved `tiny` Qwen2's pre-tokenizer, which is not the one it was trained with
            ours = (Path(folder) / "state.json").exists() and Path(folder, "tokenizer_config.json").read_text()
            kind = PreTrainedTokenizerFast if ours and "TokenizersBackend" in ours else AutoTokenizer
            tokenizer = kind.from_pretrained(folder, **kwargs)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)
        except Exception as error:  # a folder or file of the user's can be wrong in any way
            raise UserError(f"cannot load the model {name!r}: {first_line(error)}; give a Hugging Face name that this "
                            "machine can reach, a local folder, a .gguf file, or tiny") from None
    if not tokenizer.chat_template:
        raise UserError(f"{name!r} has no chat template; take an instruction-tuned model")
    for module in model.modules():  # the losses compare log-probabilities of one and the same function
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for p in model.parameters():  # model.to(dtype) would round the rotary frequencies too, and so shift far positions
        p.data = p.data.to(dtype)
    policy = wrap_policy(model.to(device).eval(), tokenizer)
    check_model(policy, name)
    return policy


def wrap_policy(model, tokenizer):
    """A Policy around a loaded model and tokenizer."""
    if model.device.type == "cuda":
        teach_lengths()
        fuse(model)
    end = model.generation_config.eos_token_id
    end = set(end if isinstance(end, list) else [end]) | {tokenizer.eos_token_id}
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    closing = (i for i, piece in enumerate(pieces) if piece and ">" in piece)
    after = render_chat(tokenizer, "Hello").rpartition("Hello")[2]
    return Policy(model, tokenizer, frozenset(end - {None}), frozenset(closing), "</think>" in after)


@torch.no_grad()
def check_model(policy, name):
    """UserError if the model's logits are not its head applied to its last hidden states (soft-capped or scaled), or if
    it remembers otherwise than by all keys and values (sliding windows, state spaces), which KeyValues does not."""
    from transformers import DynamicCache
    good = "take a Qwen2.5, Qwen3, Llama or SmolLM2 model"
    if odd := {type(layer).__name__ for layer in DynamicCache(config=policy.model.config).layers} - {"DynamicLayer"}:
        raise UserError(f"{name!r} does not attend to all it has read ({', '.join(sorted(odd))}), which the generation "
                        f"here takes for granted; {good}")
    ids = torch.tensor([policy.tokenizer("Hello there", add_special_tokens=False)["input_ids"]], device=policy.device)
    hidden = trunk(policy.model, ids)
    logits = policy.model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(policy.head(hidden), logits, rtol=1e-2, atol=1e-2):
        raise UserError(f"{name!r} scales or caps its logits, which the chunked head does not; {good}")


def trunk(model, ids, cache=None, **options):
    """Last hidden states (B, L, D) of token ids (B, L): the model without its head, so that no logits are made. cache:
    what it has read before, which it adds to."""
    return model.base_model(input_ids=ids, use_cache=cache is not None, **{cache_name(type(model.base_model)): cache},
                            **options).last_hidden_state


def send(values, device):
    """A tensor of these numbers (a list or tensor) on the device. A GPU is not waited for, as torch.tensor(values,
    device=...) would: it has work left to do while the next is prepared."""
    values = torch.as_tensor(values)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


@functools.cache
def cache_name(model_class):
    """What the cache is called in a model's forward: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model_class.forward).parameters else "past_key_values"


TINY_TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_tiny(texts, s):
    """A Qwen2 of about a million parameters with random weights (seeded by s.seed), and a byte-level BPE tokenizer
    trained on `texts`. Nothing is downloaded. Returns (model, tokenizer)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    roles = ["user", "assistant"] * 500  # frequent enough to become a token each
    trainer = trainers.BpeTrainer(vocab_size=s.tiny_vocab, show_progress=False,
                                  special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(itertools.chain(roles, map(envs.encodable, texts)), trainer)
    tags = [f"<{slash}{tag}>" for tag in ("think", "action", "search", "answer") for slash in ("", "/")]
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in tags])  # before the training they would be lost
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        additional_special_tokens=["<|im_start|>"], chat_template=TINY_TEMPLATE)
    heads = s.tiny_width // 32
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=s.tiny_width, intermediate_size=3 * s.tiny_width,
                         num_hidden_layers=s.tiny_layers, num_attention_heads=heads, num_key_value_heads=heads,
                         max_position_embeddings=8192, tie_word_embeddings=True,
                         initializer_range=0.8 * s.tiny_width**-0.5,  # a small width needs more than the usual 0.02
                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(s.seed)
    return Qwen2ForCausalLM(config), tokenizer


def tiny_texts(env, s, count=300):
    """Text for `tiny`'s tokenizer: prompts and responses of expert episodes, and the skills."""
    for task in draw_tasks(env, s, 0, count):
        session = env.start(task, seed=stream(s, "texts", task))
        while not session.done and len(session.turns) < s.max_turns:
            yield session.prompt(history=s.history, brief=s.prompt_style == "brief")
            yield session.expert()
            env.step([session], [session.expert()])
    yield env.all_skills()


# ======== Prompts: the student's, and the teacher's, which also holds the skill =======================================

def render_chat(tokenizer, text):
    """The chat template around one user message, thinking switched off where the template knows the switch."""
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                         add_generation_prompt=True, enable_thinking=False)


def encode_chats(tokenizer, texts):
    """Token ids of user messages, each in the chat template; in one call, which shares them out among the cores.
    Special tokens that a model or a web page wrote as plain text are taken out first: they would end the message and
    open another."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    forged = re.compile("|".join(map(re.escape, sorted(special | set(tokenizer.all_special_tokens)))))

    def harmless(text):
        text = envs.encodable(text)
        while (less := forged.sub("", text)) != text:  # one that was wrapped around another is left after the first
            text = less
        return text
    return tokenizer([render_chat(tokenizer, harmless(x)) for x in texts], add_special_tokens=False)["input_ids"]


def student_prompts(policy, sessions, s, skills):
    """What the agents see: of each session (token ids, whether the prompt was shortened). `skills`: a text each; empty,
    except where a method gives skills to the student itself (Skill-GRPO, Skill-Prompt). Beyond the budget of tokens
    first the oldest history goes, then the middle of the observation, never the skill; UserError if that is not
    enough."""
    texts = [x.prompt(skill, s.history, brief=s.prompt_style == "brief") for x, skill in zip(sessions, skills)]
    budgets = [s.max_teacher_prompt if skill else s.max_prompt for skill in skills]
    return [(ids, False) if len(ids) <= budget else (shortened_prompt(policy, x, s, skill, budget), True)
            for ids, x, skill, budget in zip(encode_chats(policy.tokenizer, texts), sessions, skills, budgets)]


def shortened_prompt(policy, session, s, skill, budget):
    """Token ids of a prompt that in full is longer than its budget."""
    def encode(history, **options):
        text = session.prompt(skill, history, brief=s.prompt_style == "brief", **options)
        return encode_chats(policy.tokenizer, [text])[0]
    for history in range(min(s.history, len(session.turns)), -1, -1):
        if len(ids := encode(history)) <= budget:
            return ids
    room = len(session.observation)
    while room > 0:
        room = room * 3 // 4
        if len(ids := encode(0, room=room)) <= budget:
            return ids
    raise UserError(f"a prompt of {len(ids)} tokens cannot be shortened to {budget}; raise "
                    f"{'--max-teacher-prompt' if skill else '--max-prompt'}")


def teacher_prompts(policy, sessions, s, skills):
    """The same turns with the skills in their place (the privileged context c^+), within a budget of their own."""
    if not all(skills):
        raise UserError("the teacher has no skill text: without it SDAR would silently be plain GRPO; check --skills")
    return student_prompts(policy, sessions, s, skills)


# ======== Rollout: episodes played in batches =========================================================================

@dataclass
class Turn:
    """One response of the agent, with the two prompts that it is scored under."""

    prompt_ids: list
    response_ids: list                  # as sampled, never re-tokenised; EOS included where it was sampled
    text: str
    action: str
    observation: str                    # what the agent saw before it acted
    valid: bool                         # well-formed by the public code's rule, but see Policy.think_closed
    admissible: bool                    # among the actions offered
    teacher_ids: list = None
    shortened: bool = False
    advantage: float = 0.0
    weight: float = 0.0                 # of each response token in its mini-batch's loss, see token_weights
    old_logp: torch.Tensor = None       # (T,) under the policy that sampled
    teacher_logp: torch.Tensor = None   # (T,)
    ref_logp: torch.Tensor = None       # (T,)
    logp: torch.Tensor = None           # (T,) at the update, kept for logs


@dataclass
class Episode:
    """One attempt at a task."""

    task_id: str
    group: str                          # the column it is reported under: task type or dataset
    group_id: int                       # which of the step's tasks: GRPO's G episodes share it (play_step sets it)
    skill_name: str = ""
    turns: list = field(default_factory=list)
    done: bool = False
    won: bool = False
    score: float = 0.0                  # the benchmark's own, 0 to 1
    reward: float = 0.0
    details: dict = field(default_factory=dict)


def rollout(policy, env, task_ids, s, generator, temperature, skills=None, teacher=False, label="rollout"):
    """Episodes of the task ids, in their order (repeat an id for a group), played together; those that are over cost
    nothing. skills: None, or for each episode (name, text) of its skill, which goes into the teacher's prompt of every
    turn if there is a `teacher`, else into the agent's own."""
    sessions = [env.start(task_id) for task_id in task_ids]
    skills, asked = skills or [("", "")] * len(sessions), {}
    episodes = [Episode(t, x.group, i, name) for i, (t, x, (name, _)) in enumerate(zip(task_ids, sessions, skills))]

    def ask(live):
        """{i: prompt} of the next turns of these episodes."""
        if not live:
            return {}
        playing, texts = [sessions[i] for i in live], [skills[i][1] for i in live]
        prompts = student_prompts(policy, playing, s, [""] * len(live) if teacher else texts)
        skilled = teacher_prompts(policy, playing, s, texts) if teacher else [(None, False)] * len(live)
        asked.update(zip(live, zip(prompts, skilled)))
        return {i: ids for i, (ids, _) in zip(live, prompts)}

    def answer(responses):
        """Take turns with these responses, {i: ids}; the prompts of those episodes that go on."""
        playing, texts = zip(*((sessions[i], policy.tokenizer.decode(ids, skip_special_tokens=True))
                               for i, ids in responses.items()))
        seen = [x.observation for x in playing]
        env.step(playing, texts, think_closed=policy.think_closed)
        for (i, ids), x, text, observation in zip(responses.items(), playing, texts, seen):
            (prompt, cut), (taught, taught_cut) = asked.pop(i)
            episodes[i].turns.append(Turn(prompt, ids, text, x.action, observation, x.valid, x.admissible, taught,
                                          cut or taught_cut))
        live = [i for i in responses if not sessions[i].done and len(episodes[i].turns) < s.max_turns]
        bar.set_postfix_str(f"turn {max(len(e.turns) for e in episodes)}")
        bar.update(len(responses) - len(live))
        return ask(live)
    with progress(total=len(sessions), desc=label, unit="ep") as bar:
        generate(policy, list(ask(range(len(sessions))).values()), s, temperature, env.stop, generator, follow=answer)
    for episode, x in zip(episodes, sessions):
        episode.done, episode.won, episode.score, episode.details = x.done, bool(x.won), float(x.score), dict(x.details)
        episode.reward = s.success_reward * episode.won  # an episode cut off at the step limit has not won
    return episodes


# ======== Advantages and losses =======================================================================================
# Every loss is first a per-token function, (B, T) -> (B, T). aggregate() makes it a scalar with weights (B, T) that
# token_weights() computed ONCE for the whole step or mini-batch: micro-batches, slices of it, change no gradient.

def group_normalized_advantages(rewards, group_ids, eps=1e-6):
    """GRPO's A = (R - mean_G) / (std_G + eps), Bessel's std: rewards (N,), N hashable group_ids -> (N,) float32, CPU.
    One entry per trajectory (the paper) or per turn row (the public code): the caller's choice. A group without
    variance gives exactly 0. A group of one keeps mean 0 and std 1 as in the public code: A is the reward itself."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64, device="cpu")  # a handful of numbers: lose no digits
    members = {}
    for row, group in enumerate(group_ids.tolist() if torch.is_tensor(group_ids) else group_ids):
        members.setdefault(group, []).append(row)
    advantages = torch.zeros_like(rewards)
    for rows in members.values():
        r = rewards[rows]
        if len(rows) == 1:
            advantages[rows] = r / (1 + eps)
        elif r.max() > r.min():  # equal rewards would leave rounding noise, which eps = 1e-6 blows up
            advantages[rows] = (r - r.mean()) / (r.std() + eps)
    return advantages.float()


AGGREGATIONS = ("token-mean", "trajectory", "seq-mean-token-mean", "seq-mean-token-sum")


def token_weights(mask, mode="token-mean", trajectory_ids=None):
    """Weight (B, T) of each response token in the loss. mask (B, T) of 0/1: ALL rows of one optimizer step.
    token-mean: 1 / tokens. trajectory (the paper's (1/G) sum_i Agg): 1 / trajectories / tokens of that trajectory, a
    trajectory being all rows of one id in trajectory_ids (B,). seq-mean-token-mean: every row its own trajectory.
    These sum to one. seq-mean-token-sum: 1 / rows. ValueError for another mode or missing ids."""
    mask = mask if mask.is_floating_point() else mask.float()
    if mode == "token-mean":
        return mask / mask.sum().clamp(min=1)
    if mode == "seq-mean-token-sum":
        return mask / max(len(mask), 1)
    if mode not in AGGREGATIONS or (mode == "trajectory" and trajectory_ids is None):
        raise ValueError(f"aggregation {mode!r}: use one of {', '.join(AGGREGATIONS)}; trajectory needs trajectory_ids")
    ids = torch.as_tensor(trajectory_ids if mode == "trajectory" else range(len(mask)), device=mask.device)
    names, index = torch.unique(ids, return_inverse=True)                                         # index (B,)
    tokens = mask.new_zeros(len(names)).index_add(0, index, mask.sum(1))                          # (trajectories,)
    return mask / tokens[index].clamp(min=1)[:, None] / (tokens > 0).sum().clamp(min=1)           # empty: no share


def aggregate(token_values, weights):
    """Scalar sum of weights * token_values, both (B, T). Where the weight is 0 the value is not looked at."""
    return (token_values.masked_fill(weights == 0, 0) * weights).sum()


def _blank(mask, *tensors):
    """Zero what lies outside the mask BEFORE any exp: an infinity behind a mask makes NaN gradients."""
    return [t if t is None else torch.where(mask.bool(), t, torch.zeros_like(t)) for t in tensors]


def sdar_gate(student_logp, teacher_logp, beta=5.0, gate="gap", entropy=None):
    """The paper's g_t (B, T), detached. entropy (B, T): the student's, in nats, for `entropy` and `soft-or`.
    gap: sigmoid(beta * Delta), Delta = teacher - student log-probability of the sampled token; none: 1; entropy:
    sigmoid(beta * h); soft-or: sigmoid(beta * [1 - (1 - h)(1 - Delta)]). ValueError for others, or without entropy."""
    gap = (teacher_logp - student_logp).detach()
    if gate == "none":
        return torch.ones_like(gap)
    if gate == "gap":
        return torch.sigmoid(beta * gap)
    if gate not in ("entropy", "soft-or") or entropy is None:
        raise ValueError(f"gate {gate!r}: use gap, entropy, soft-or or none; entropy and soft-or need the entropy")
    h = entropy.detach()
    return torch.sigmoid(beta * (h if gate == "entropy" else 1 - (1 - h) * (1 - gap)))


def sdar_tokens(student_logp, teacher_logp, beta=5.0, gate="gap", entropy=None, divergence=None, baseline=0.0):
    """l_t = (g_t - baseline) * (log pi_T - log pi_theta), (B, T); the gradient flows through log pi_theta alone.
    divergence (B, T): an exact one (chunked_divergence) instead of the sampled log-ratio; gated, without a baseline.
    baseline: mean gate of the WHOLE mini-batch at the OLD log-probabilities, so known before the first token."""
    g = sdar_gate(student_logp, teacher_logp, beta, gate, entropy)
    return (g - baseline) * (teacher_logp.detach() - student_logp) if divergence is None else g * divergence


def sdar_loss(student_logp, teacher_logp, mask, beta=5.0, weights=None, gate="gap", entropy=None, **options):
    """SDAR's distillation loss -> (scalar, metrics: token means of gap_diagnostics). All (B, T); options as for
    sdar_tokens. weights: this micro-batch's slice of token_weights(...); by default the token mean over `mask`. Not
    used here: for other trainers, as grpo_loss is."""
    student_logp, teacher_logp, entropy = _blank(mask, student_logp, teacher_logp, entropy)
    tokens = sdar_tokens(student_logp, teacher_logp, beta, gate, entropy, **options)
    values, mean = gap_diagnostics(student_logp, teacher_logp, beta, gate, entropy), token_weights(mask)
    return aggregate(tokens, mean if weights is None else weights), {k: aggregate(v, mean) for k, v in values.items()}


@torch.no_grad()
def gap_diagnostics(student_logp, teacher_logp, beta=5.0, gate="gap", entropy=None):
    """What the paper plots, of each token (B, T): its gate, whether g > 0.5, its gap, whether that is negative, and
    SDAR's loss on the sampled token (whichever method or divergence is trained)."""
    gap, g = teacher_logp - student_logp, sdar_gate(student_logp, teacher_logp, beta, gate, entropy)
    return {"gate": g, "gate_active": g > 0.5, "gap": gap, "negative_gap": gap < 0, "distill_loss": g * gap}


def grpo_tokens(logp, old_logp, advantages, clip=0.2, dual_clip=3.0):
    """-min(r A, clip(r, 1-e, 1+e) A), at most -dual_clip * A for A < 0. (B, T); advantages (B, T) or (B, 1).
    log r is cut at +-20 so that exp stays finite; no gradient worth having lies beyond."""
    ratio = (logp - old_logp.detach()).clamp(-20, 20).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def grpo_loss(logp, old_logp, advantages, mask, clip=0.2, dual_clip=3.0, weights=None):
    """Clipped policy loss with dual clip -> (scalar, metrics: token means of clip_diagnostics); weights as for
    sdar_loss."""
    logp, old_logp = _blank(mask, logp, old_logp)
    tokens = grpo_tokens(logp, old_logp, advantages, clip, dual_clip)
    values, mean = clip_diagnostics(logp, old_logp, advantages, clip, dual_clip), token_weights(mask)
    return aggregate(tokens, mean if weights is None else weights), {k: aggregate(v, mean) for k, v in values.items()}


@torch.no_grad()
def clip_diagnostics(logp, old_logp, advantages, clip=0.2, dual_clip=3.0):
    """Of each token (B, T): clipped, clipped by the dual clip, old - new log-probability (estimates KL(old || new))."""
    ratio = (logp - old_logp).exp()
    clipped = ((advantages > 0) & (ratio > 1 + clip)) | ((advantages < 0) & (ratio < 1 - clip))
    return {"clip_fraction": clipped, "clip_fraction_dual": (advantages < 0) & (ratio > dual_clip),
            "old_kl": old_logp - logp}


def k3_kl(logp, ref_logp):
    """Per-token estimate exp(d) - d - 1 of KL(pi_theta || pi_ref), d = ref - logp; cut at 10 as in the public code, and
    d at 20, far beyond, lest an infinity make a NaN gradient."""
    d = (ref_logp.detach() - logp).clamp(max=20)
    return (d.exp() - d - 1).clamp(-10, 10)


def opsd_tokens(logp, ref_logp):
    """The paper's OPSD term log pi_theta - log pi_ref, (B, T), against a FROZEN reference. On-policy its expected
    gradient is zero (README, "What the gate really optimises"). The public code's OPSD is sdar_tokens."""
    return logp - ref_logp.detach()


def skill_sd_tokens(logp, teacher_logp, old_logp, as_released=False):
    """Skill-SD's rho_t k_t, (B, T): d = logp - teacher, k = exp(-d) - 1 + d, rho = exp(logp - old), both with gradient.
    as_released: the public code's guards, -d <= 20 inside the exponential and log rho <= 10."""
    d, log_rho = logp - teacher_logp.detach(), logp - old_logp.detach()
    limit_d, limit_rho = (20, 10) if as_released else (math.inf, math.inf)
    return log_rho.clamp(max=limit_rho).exp() * ((-d).clamp(max=limit_d).exp() - 1 + d)


def rlsd_advantages(advantages, old_logp, teacher_logp, mask, lam=0.5, e_w=0.2):
    """RLSD's token advantages A * [(1 - lam) + lam * clip(exp(sign(A) (teacher - old)), 1 - e_w, 1 + e_w)], (B, T), no
    gradient. advantages (B, T) or (B, 1)."""
    old_logp, teacher_logp = _blank(mask, old_logp.detach(), teacher_logp.detach())
    scale = (advantages.sign() * (teacher_logp - old_logp)).exp().clamp(1 - e_w, 1 + e_w)
    return advantages * ((1 - lam) + lam * scale) * mask


def rlsd_lambda(step, lam=0.5, as_released=False, decay_steps=100):
    """RLSD's lam after `step` training steps: constant in the paper; as released it falls linearly to 0 at decay_steps
    (the public scripts say 100, the trainer's default is 50)."""
    return lam * max(0.0, 1 - step / decay_steps) if as_released else lam


def method_tokens(method, logp, old_logp, advantages, teacher_logp=None, ref_logp=None, coef=0.01, kl_coef=0.0,
                  clip=0.2, dual_clip=3.0, as_released=False, **sdar_options):
    """The whole per-token loss (B, T) of one of METHODS, for aggregate(); ValueError for another. Tensors (B, T).
    coef: lambda (alpha) of the distillation term. skill-grpo is grpo with the skill in the student's prompt, rlsd is
    grpo on rlsd_advantages(...): the caller's data, no other loss. As released, opsd is SDAR's term without the policy
    gradient and grpo+opsd is SDAR with beta 0. The KL to the reference (kl_coef) is added to all of them."""
    if method not in METHODS:
        raise ValueError(f"method {method!r}: use one of {', '.join(METHODS)}")
    total = 0 * logp if method == "opsd" else grpo_tokens(logp, old_logp, advantages, clip, dual_clip)
    if method in ("opsd", "grpo+opsd") and not as_released:
        total = total + coef * opsd_tokens(logp, ref_logp)
    elif method == "skill-sd":
        total = total + coef * skill_sd_tokens(logp, teacher_logp, old_logp, as_released)
    elif method in ("sdar", "opsd", "grpo+opsd"):
        constant = {"beta": 0.0, "gate": "gap"} if method == "grpo+opsd" else {}
        total = total + coef * sdar_tokens(logp, teacher_logp, **{**sdar_options, **constant})
    return total + kl_coef * k3_kl(logp, ref_logp) if kl_coef else total


# ======== Scoring: log-probabilities of responses under a prompt ======================================================

def read_prefix(model, prompts, least=64):
    """What all these prompts begin with, read once: (length, cache), for response_hidden; None where it is too short to
    be worth it. For the teacher of one skill this is everything up to the end of the skill."""
    from transformers import DynamicCache
    first, last = min(prompts), max(prompts)  # in alphabetical order: what these two share, all share
    shared = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    length = min(shared, *(len(p) - 1 for p in prompts))
    if length < least or len(prompts) == 1:
        return None
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([first[:length]], device=model.device)                                           # (1, length)
    trunk(model, ids, cache)
    return length, cache


def response_hidden(model, prompts, responses, prefix=None):
    """Last hidden states (N, D) where response tokens are predicted, those targets (N,), and the mask (B, T), from B
    lists of token ids; T is the longest response, N = mask.sum(), rows one after another. Padded on the right, where
    causal attention never looks, so that no attention mask is needed; lengths say what counts, never a pad id. prefix:
    what all prompts begin with, from read_prefix."""
    device, (skip, cache), options = model.device, prefix or (0, None), {}
    if cache is not None:
        cache = copy.deepcopy(cache)  # the model appends to it
        cache.batch_repeat_interleave(len(prompts))
        if takes_lengths(model):
            options["attention_mask"] = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device)
    rows = [list(p[skip:]) + list(r) for p, r in zip(prompts, responses)]
    width = max(map(len, rows))
    ids = send([row + [0] * (width - len(row)) for row in rows], device)                                # (B, L)
    lengths = send([len(r) for r in responses], device)                                                 # (B,)
    mask = torch.arange(max(map(len, responses)), device=device) < lengths[:, None]                     # (B, T)
    row = send([i for i, r in enumerate(responses) for _ in r], device)                                 # (N,)
    at = send([len(p) - 1 - skip + t for p, r in zip(prompts, responses) for t in range(len(r))], device)  # (N,)
    hidden = trunk(model, ids, cache, **options)                                                        # (B, L, D)
    return hidden[row, at], ids[row, at + 1], mask


def unflatten(flat, mask):
    """(N,) values of the tokens in mask (B, T), N = mask.sum(), as (B, T) with zeros elsewhere. Not masked_scatter:
    its gradient waits for a GPU to count the mask."""
    places = mask.flatten().int().argsort(descending=True, stable=True)[:len(flat)]                     # (N,)
    return flat.new_zeros(mask.numel()).scatter(0, places, flat).view(mask.shape)


def response_logps(model, prompts, responses, s, with_entropy=False, prefix=None):
    """log pi(response token | prompt, earlier tokens), the mask, both (B, T), hidden states (N, D), entropies (B, T) or
    None; zeros beyond the mask. At the rollout's temperature: the policy that sampled is the policy scored."""
    hidden, targets, mask = response_hidden(model, prompts, responses, prefix)
    head = model.get_output_embeddings()
    flat = chunked_logps(hidden, head.weight, targets, head.bias, s.head_chunk, s.temperature, with_entropy)
    if with_entropy:
        return unflatten(flat[0], mask), mask, hidden, unflatten(flat[1], mask)
    return unflatten(flat, mask), mask, hidden, None


def micro_batches(lengths, budget):
    """Indices 0..n-1 in batches whose padded size (rows times longest) stays within `budget` tokens; longest first,
    so that memory fails at once or never."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def batches_of(turns, s, prompt_field="prompt_ids"):
    """The turns in micro-batches of at most s.micro_tokens tokens."""
    lengths = [len(getattr(t, prompt_field)) + len(t.response_ids) for t in turns]
    return [[turns[i] for i in rows] for rows in micro_batches(lengths, s.micro_tokens)]


@functools.cache
def say_once(text):
    """Print a line, the first time."""
    tqdm.write(text)


def out_of_memory(error):
    """Whether this exception says that memory ran out, on a GPU or a CPU."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)))


@contextlib.contextmanager
def enough_memory():
    """Where memory runs out, say so as a user's error."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError("out of memory; lower --rollout-rows (if it happened in a rollout) or --micro-tokens (in "
                        "scoring or the update); a training that was saved goes on with --resume") from None


def in_halves(work, batch, model):
    """work(batch), a list, or where memory runs out those of its halves, joined, and so on. What is left of the
    gradients of the attempt that failed is dropped, so that nothing counts twice."""
    try:
        return work(batch)
    except RuntimeError as error:
        if not out_of_memory(error) or len(batch) == 1:
            raise
    model.zero_grad(set_to_none=True)  # here, for an exception under way would keep the attempt's tensors alive
    torch.cuda.empty_cache()
    say_once("out of memory: a micro-batch was halved; a lower --micro-tokens would save the attempts")
    middle = len(batch) // 2
    return in_halves(work, batch[:middle], model) + in_halves(work, batch[middle:], model)


@torch.no_grad()
def score_turns(model, lists, prompt_field, result_field, s, label):
    """Set turn.<result_field>, (T,) on the CPU, of the turns in these lists: log-probabilities of the response under
    turn.<prompt_field>. What the prompts of a list have in common at their beginning is read once."""
    def score(prefix, batch):
        prompts, responses = [getattr(t, prompt_field) for t in batch], [t.response_ids for t in batch]
        logp = response_logps(model, prompts, responses, s, prefix=prefix)[0]
        return [row[:len(r)].clone() for row, r in zip(logp, responses)]
    model.eval()
    todo, results = [(number, batch) for number, turns in enumerate(lists)
                     for batch in batches_of(turns, s, prompt_field)], []
    prefix = functools.cache(lambda number: read_prefix(model, [getattr(t, prompt_field) for t in lists[number]]))
    for number, batch in progress(share(todo), desc=label):
        results.append(in_halves(functools.partial(score, prefix(number)), batch, model))
    results = [[row.cpu() for row in rows] for rows in results]  # only now: a GPU is not waited for before
    for (_, batch), rows in zip(todo, gather(results)):
        for turn, values in zip(batch, rows):
            setattr(turn, result_field, values)


# ======== Training: one step of Algorithm 1 is play_step, then learn_step =============================================

@dataclass
class State:
    """All that changes in a run. Random streams are not here: they are functions of (seed, step), see `stream`."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    masters: list                      # fp32 masters, one per model parameter; the parameter itself where it is fp32
    grads: list                        # their gradients so far, fp32, on the model's device
    step: int = 0                      # finished RL steps
    warm_step: int = 0                 # finished steps of the warm start
    cursor: int = 0                    # tasks drawn from the training split so far
    bandit: dict = field(default_factory=dict)
    tasks: str = ""                    # hash of the training tasks


def stream(s, *where):
    """The seed of one random stream of this run, e.g. stream(s, "rollout", step)."""
    return int.from_bytes(hashlib.sha256(repr((s.seed, *where)).encode()).digest()[:7], "big")


def generator_for(policy, s, *where):
    """A torch generator on the policy's device for one random stream; each rank has its own."""
    where += ranks()[:1] if ranks()[0] else ()  # the first has that of a single process
    return torch.Generator(policy.device).manual_seed(stream(s, *where))


def make_state(policy, s, beta2=0.999):
    """State with AdamW over fp32 masters: a step of 1e-6 is lost in bf16, whose neighbours of 0.01 lie 6e-5 apart. With
    s.offload the masters lie in host memory, and AdamW with its moments works there."""
    if s.recompute:
        kind = "activation" if hasattr(policy.model, "activation_checkpointing_enable") else "gradient"
        enable = getattr(policy.model, f"{kind}_checkpointing_enable")
        enable(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})

    def master_of(p):
        if not s.offload:
            return p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
        master = p.detach().to("cpu", torch.float32, copy=True)
        return (master.pin_memory() if p.is_cuda else master).requires_grad_()  # pinned: the way back is faster
    masters = [master_of(p) for p in policy.model.parameters()]
    fused = s.offload or policy.device.type == "cuda" or None
    optimizer = torch.optim.AdamW(masters, lr=s.lr, betas=(0.9, beta2), weight_decay=s.weight_decay, fused=fused)
    return State(policy, optimizer, masters, [None] * len(masters))


def collect_gradients(state):
    """After a backward: add the gradients to state.grads, in fp32, so that micro-batches are summed exactly."""
    params = list(state.policy.model.parameters())
    for i, p in enumerate(params):
        if p.grad is not None and state.grads[i] is None:  # if memory runs out here, nothing is added yet
            state.grads[i] = p.grad if p.dtype == torch.float32 else torch.zeros_like(p, dtype=torch.float32)
    for total, p in zip(state.grads, params):
        if p.grad is not None and p.grad is not total:
            total.add_(p.grad)
        p.grad = None


@torch.no_grad()
def apply_update(state, lr, grad_clip):
    """Sum the gradients over the ranks, clip, step, copy the masters back. Returns (gradient norm before clipping,
    whether the step was taken): a gradient that is not finite is dropped."""
    params = list(state.policy.model.parameters())
    if ranks()[1] > 1:
        for i, p in enumerate(params):
            state.grads[i] = torch.zeros_like(p, dtype=torch.float32) if state.grads[i] is None else state.grads[i]
            dist.all_reduce(state.grads[i])
    norm = torch.nn.utils.get_total_norm([g for g in state.grads if g is not None])
    scale, finite = (grad_clip / (norm + 1e-6)).clamp(max=1.0), bool(norm.isfinite())
    if finite:
        for master, grad in zip(state.masters, state.grads):
            master.grad = None if grad is None else grad.mul_(scale).to(master.device)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.optimizer.step()
        for p, master in zip(params, state.masters):
            if master is not p:
                p.copy_(master.to(p.device, non_blocking=True))
    state.optimizer.zero_grad(set_to_none=True)
    state.grads = [None] * len(params)
    return norm.item(), finite


def draw_tasks(env, s, cursor, count):
    """`count` task ids of the training split from position `cursor` of an endless sequence of shuffled epochs."""
    ids, drawn = env.tasks(s.split or env.splits[0]), []
    while len(drawn) < count:
        epoch, start = divmod(cursor + len(drawn), len(ids))
        order = ids[:]
        random.Random(stream(s, "epoch", epoch)).shuffle(order)
        drawn += order[start:start + count - len(drawn)]
    return drawn


def choose_skills(env, categories, s, bandit, step):
    """(name, text) of a skill for each task, from its category, which was decided once from the task alone.
    km: the category's own; full: the library; random: one by lot; ucb: the skill of the highest mean success plus
    --ucb-c * sqrt(ln N / n), untried ones first, one bandit per category. The choice is counted in `bandit`,
    {category: {skill: [n, successes]}}; the caller adds the successes."""
    lot, chosen = random.Random(stream(s, "retrieval", step)), []
    for category in categories:
        name = {"km": category, "full": "full", "random": lot.choice(env.skill_names)}.get(s.retrieval)
        if s.retrieval == "ucb":
            arms = bandit.setdefault(category, {k: [0, 0.0] for k in env.skill_names})
            total = sum(n for n, _ in arms.values())
            bound = lambda n, won: won / n + s.ucb_c * math.sqrt(math.log(total) / n) if n else math.inf
            name = max(arms, key=lambda k: bound(*arms[k]))
            arms[name][0] += 1
        chosen.append((name, env.all_skills() if name == "full" else env.skill(name, s.prompt_style == "brief")))
    return chosen


def uses_teacher(s):
    """Whether the method scores the responses under the teacher's prompt."""
    return s.algo in ("sdar", "skill-sd", "rlsd") or (s.as_released and s.algo in ("opsd", "grpo+opsd"))


def uses_gate(s):
    """Whether the method's loss holds SDAR's gate."""
    return s.algo == "sdar" or (s.as_released and s.algo == "opsd")


def uses_reference(s):
    """Whether the method needs the frozen policy that training started from."""
    return s.kl > 0 or (s.algo in ("opsd", "grpo+opsd") and not s.as_released)


@enough_memory()
def play_step(state, env, reference, s):
    """The first half of a step: rollout, scoring, advantages. It changes nothing in `state`, so that it may be
    interrupted. Returns (episodes, the bandit after them, seconds and tokens per second by phase)."""
    policy, phases, bandit = state.policy, {}, copy.deepcopy(state.bandit)
    lap = stopwatch(phases, policy.device)
    tasks, skills = draw_tasks(env, s, state.cursor, s.groups), None
    categories = [env.start(task).category for task in tasks]
    if uses_teacher(s) or s.algo == "skill-grpo":
        skills = choose_skills(env, categories, s, bandit, state.step)
    repeat = lambda rows: rows and [row for row in share(rows) for _ in range(s.group_size)]
    generator = generator_for(policy, s, "rollout", state.step)
    episodes = gather(rollout(policy, env, repeat(tasks), s, generator, s.temperature, repeat(skills), uses_teacher(s),
                              f"step {state.step + 1} rollout"), s.group_size)
    for i, episode in enumerate(episodes):
        episode.group_id = i // s.group_size
        if s.retrieval == "ucb" and skills:
            bandit[categories[episode.group_id]][episode.skill_name][1] += episode.won / s.group_size
    turns = [t for e in episodes for t in e.turns]
    tokens = sum(len(t.prompt_ids) + len(t.response_ids) for t in turns)
    lap("rollout", sum(len(t.response_ids) for t in turns))
    if uses_teacher(s):
        by_skill = {}
        for e in episodes:
            by_skill.setdefault(e.skill_name, []).extend(e.turns)
        score_turns(policy.model, list(by_skill.values()), "teacher_ids", "teacher_logp", s, "teacher")
        lap("teacher", sum(len(t.teacher_ids) + len(t.response_ids) for t in turns))
    if reference is not None:
        score_turns(reference, [turns], "prompt_ids", "ref_logp", s, "reference")
        lap("reference", tokens)
    if (s.mini_batch and len(turns) > s.mini_batch) or s.gate_baseline:  # one update per rollout: old is current
        score_turns(policy.model, [turns], "prompt_ids", "old_logp", s, "old policy")
        lap("old_policy", tokens)
    assign_advantages(episodes, s)
    return episodes, bandit, phases


def assign_advantages(episodes, s):
    """Set turn.advantage. Over trajectories (Algorithm 1): one normalised reward per episode, shared by its turns; the
    penalty for a malformed response is taken off after the normalisation, for before it one bad turn among n of equal
    reward would get -sqrt(n), about. Over turns: as the public code, penalty and all, each turn a sample of its own."""
    turns = [(e, t) for e in episodes for t in e.turns]
    penalty = lambda turn: s.invalid_penalty * (not turn.valid)
    if s.advantage_over == "turns":
        rewards = [e.reward - penalty(t) for e, t in turns]
        values = group_normalized_advantages(rewards, [e.group_id for e, _ in turns]).tolist()
    else:
        shared = group_normalized_advantages([e.reward for e in episodes], [e.group_id for e in episodes]).tolist()
        values = [value - penalty(t) for e, value in zip(episodes, shared) for t in e.turns]
    for (_, t), value in zip(turns, values):
        t.advantage = value


def assign_weights(episodes, minis, s):
    """Set turn.weight, the weight of each of its tokens in the loss of its mini-batch, from counts over the whole
    mini-batch (token mean) or the whole step (the paper's (1/G) sum_i Agg): micro-batches change nothing."""
    def assign(turns, scale=1, **mode):
        lengths = torch.tensor([[len(t.response_ids)] for t in turns])                                  # (turns, 1)
        mask = torch.arange(int(lengths.max())) < lengths                                               # (turns, T)
        for turn, weight in zip(turns, (scale * token_weights(mask, **mode))[:, 0].tolist()):
            turn.weight = weight
    if s.loss_agg == "token":
        for mini in minis:
            assign(mini)
    else:  # they sum to 1 over the step; each of its mini-batches, an optimizer step of its own, needs that much
        owners = [i for i, e in enumerate(episodes) for _ in e.turns]
        assign([t for e in episodes for t in e.turns], len(minis), mode="trajectory", trajectory_ids=owners)


def step_loss(policy, turns, s, step=0, baseline=0.0):
    """These turns' part of the mini-batch's loss (the parts add up to it), sums over their tokens for the log, and the
    log-probabilities (B, T). `step` is RLSD's clock, `baseline` the mini-batch's mean gate where one is subtracted."""
    prompts, responses = [t.prompt_ids for t in turns], [t.response_ids for t in turns]
    logp, mask, hidden, entropy = response_logps(policy.model, prompts, responses, s, s.gate in ("entropy", "soft-or"))
    column = lambda name: None if getattr(turns[0], name) is None else unflatten(
        send(torch.cat([getattr(t, name) for t in turns]), mask.device), mask)
    old, teacher, ref = column("old_logp"), column("teacher_logp"), column("ref_logp")                  # (B, T)
    old = logp.detach() if old is None else old  # one update per rollout: the policy that sampled is this one
    advantages = send([[t.advantage] for t in turns], mask.device)                                      # (B, 1)
    weights = send([[t.weight] for t in turns], mask.device) * mask                                     # (B, T)
    if s.algo == "rlsd":
        advantages = rlsd_advantages(advantages, old, teacher, mask, rlsd_lambda(step, s.rlsd_lam, s.as_released))
    divergence = None
    if s.divergence != "sampled" and teacher is not None:
        with torch.no_grad():
            taught, _, _ = response_hidden(policy.model, [t.teacher_ids for t in turns], responses)
        divergence = unflatten(chunked_divergence(hidden, taught, policy.head.weight, s.divergence, s.head_chunk,
                                                  policy.head.bias, s.temperature), mask)
    tokens = method_tokens(s.algo, logp, old, advantages, teacher, ref, s.lam, s.kl, s.clip, s.dual_clip, s.as_released,
                           beta=s.beta, gate=s.gate, entropy=entropy, divergence=divergence, baseline=baseline)
    loss, values = aggregate(tokens, weights), clip_diagnostics(logp, old, advantages, s.clip, s.dual_clip)
    if teacher is not None:
        values |= gap_diagnostics(logp, teacher, s.beta, s.gate, entropy)
    if ref is not None:
        values["kl"] = k3_kl(logp.detach(), ref)
    sums = {"loss": loss.detach(), "tokens": mask.sum(), **{k: (v * mask).sum() for k, v in values.items()}}
    return loss, sums, logp.detach()


def backward(state, turns, s, baseline):
    """Add the gradient of a micro-batch to state.grads; [(the sums of step_loss, each turn's log-probabilities (T,))],
    which a GPU need not have made yet."""
    loss, sums, logp = step_loss(state.policy, turns, s, state.step, baseline)
    loss.backward()
    collect_gradients(state)
    return [(sums, [row[:len(t.response_ids)].clone() for row, t in zip(logp, turns)])]


def update(state, episodes, s, lr):
    """One pass over a step's turns: mini-batches, each one optimizer step. Returns metrics: means over ALL tokens, and
    the mean loss and gradient norm of the mini-batches."""
    turns = [t for e in episodes for t in e.turns]
    random.Random(stream(s, "minis", state.step)).shuffle(turns)
    count = -(-len(turns) // (s.mini_batch or len(turns)))
    minis = [turns[i::count] for i in range(count)]  # of equal size: Adam makes as much of two turns as of many
    assign_weights(episodes, minis, s)
    totals, norms, term_norms, baseline = {}, [], {}, 0.0
    state.policy.model.train()
    with progress(total=len(share(turns)), desc="update", unit="turn") as bar:
        for mini in minis:
            if s.gate_baseline:
                old, teacher = (torch.cat([getattr(t, name) for t in mini]) for name in ("old_logp", "teacher_logp"))
                baseline = sdar_gate(old, teacher, s.beta).mean().item()
            if s.diagnose_every and uses_teacher(s) and state.step % s.diagnose_every == 0 and mini is minis[0]:
                term_norms = term_gradients(state.policy, mini, s, state.step, baseline)
            batches, results = batches_of(mini, s), []
            for batch in share(batches):
                results.append(in_halves(lambda part: backward(state, part, s, baseline), batch, state.policy.model))
                bar.update(len(batch))
            results = [[({name: float(value) for name, value in sums.items()}, [row.cpu() for row in rows])
                        for sums, rows in parts] for parts in results]
            for batch, parts in zip(batches, gather(results)):
                for turn, logp in zip(batch, [row for _, rows in parts for row in rows]):
                    turn.logp = logp
                for name, value in [item for sums, _ in parts for item in sums.items()]:
                    totals[name] = totals.get(name, 0.0) + value
            norm, applied = apply_update(state, lr, s.grad_clip)
            norms += [norm] * applied
    state.policy.model.eval()
    if not norms:
        raise UserError("no gradient of this step is finite, the training has diverged; start again with a lower --lr")
    loss, tokens = totals.pop("loss"), totals.pop("tokens")
    return {"loss": loss / len(minis), **{name: value / tokens for name, value in totals.items()}, **term_norms,
            "grad_norm": sum(norms) / len(norms), "updates": len(minis),
            "updates_skipped": len(minis) - len(norms), "lr": lr, "update_tokens": int(tokens)}


def learn_step(state, episodes, bandit, phases, s):
    """The second half: the update. All that a step changes in `state` is changed here. Returns the step's metrics."""
    lap = stopwatch(phases, state.policy.device)
    if s.offload:
        state.policy.cache = None  # a small card needs the memory now; the next rollout makes it again
    rise = min(1.0, (state.step + 1) / (s.lr_warmup * s.steps)) if s.lr_warmup else 1.0
    metrics = update(state, episodes, s, s.lr * rise)
    if uses_teacher(s):
        metrics |= gap_profile(episodes)
    lap("update", sum(len(t.prompt_ids) + len(t.response_ids) for e in episodes for t in e.turns))
    state.step, state.cursor, state.bandit = state.step + 1, state.cursor + s.groups, bandit
    seconds = sum(value for name, value in phases.items() if name.startswith("seconds_"))
    return {"step": state.step, **episode_metrics(episodes), **metrics, "seconds": seconds, **phases,
            "peak_memory_mib": peak_memory(state.policy.device)}


# ======== Generation: what a rollout spends its time on ==============================================================
# `generate` is all that the rest of the file knows of it. Its greedy tokens are those of model.generate, which copies
# its cache for every token and pads what has ended.

def response_ended(policy, ids, stop):
    """Whether the last of these sampled ids ends the response: an EOS, or the last piece of a closing tag."""
    return ids[-1] in policy.end_ids or (ids[-1] in policy.closing_ids and any(
        tag in policy.tokenizer.decode(ids[-16:]) for tag in stop))


def sample(logits, temperature, generator, block=128):
    """One token per row of (B, V) logits: the first whose cumulative probability exceeds a uniform number. Unlike
    multinomial it draws one number a row, not one a word, and never waits for the device. First the block of words is
    found, then the word in it, which spares a GPU the cumulative sum of all. In fp64, for in fp32 the sum of 152k
    probabilities would swallow the rare ones (and Apple's GPUs have no fp64)."""
    if temperature == 0:
        return logits.argmax(-1)  # (B,)
    exact, words = torch.float32 if logits.device.type == "mps" else torch.float64, logits.shape[1]
    p = torch.softmax(logits if temperature == 1 else logits.float() / temperature, -1, dtype=torch.float32)  # (B, V)
    p = F.pad(p, (0, -words % block)).unflatten(1, (-1, block))                                   # (B, blocks, block)
    upto = p.sum(-1, dtype=exact).cumsum(-1)                                                      # (B, blocks)
    drawn = upto[:, -1:] * torch.rand(len(p), 1, dtype=exact, device=p.device, generator=generator)
    which = torch.searchsorted(upto, drawn, right=True).clamp(max=upto.shape[1] - 1)              # (B, 1)
    inside = p.take_along_dim(which[..., None], 1)[:, 0].cumsum(-1, dtype=exact)                  # (B, block)
    rest = drawn - upto.gather(1, which) + inside[:, -1:]
    token = which * block + torch.searchsorted(inside, rest, right=True).clamp(max=block - 1)
    return token[:, 0].clamp(max=words - 1)


@dataclass
class Row:
    """A sequence under way in `generate`."""

    prompt: int      # which one it answers
    limit: int       # tokens of its response at most
    slot: int        # where its next token goes
    ids: list = field(default_factory=list)
    over: bool = False


LOOK = {"cuda": 8}      # decode steps between two looks at the sampled tokens: to look is to wait for the device
REFILL = {"cuda": 0.2}  # share of the rows that must be over before others take their places, in the midst of decoding;
                        # elsewhere all, for there a step of few rows costs little


@torch.no_grad()
def generate(policy, prompts, s, temperature, stop, generator, limit=None, follow=None):
    """Responses (lists of token ids) to prompts (lists of token ids), each ended by EOS, by a closing tag of `stop`, or
    by its limit of limit(i) tokens (by default s.max_response). At most s.rollout_rows at a time, short prompts first;
    what a row writes between its end and the next look is thrown away. When no prompt is waiting, follow({i: response})
    of those that have ended gives what comes next, {i: prompt}: an episode need not wait for the others' turns. Of
    several responses to one i the last is returned."""
    limit, follow = limit or (lambda i: s.max_response), follow or (lambda ended: {})
    look, due = (table.get(policy.device.type, 1) for table in (LOOK, REFILL))
    waiting, ended, responses, rows = dict(enumerate(prompts)), {}, {}, []

    def add(row, values):
        for value in values:
            if not row.over:
                row.ids.append(value)
                row.over = len(row.ids) == row.limit or response_ended(policy, row.ids, stop)
                if row.over:
                    ended[row.prompt] = row.ids
    while True:
        live, batch, drawn = [j for j, row in enumerate(rows) if not row.over], [], None
        enough = len(rows) - len(live) >= due * len(rows)
        if live:
            coming = (len(waiting) + len(ended)) * (due < 1)  # they may have the places of rows that are over
            if len(live) + coming <= 0.8 * len(rows):         # copying has a price: not for a few rows
                policy.cache.keep(live, max(row.slot for row in rows))
                rows = [rows[j] for j in live]
            batch, drawn = rows[:], decode(policy, rows, look, temperature, generator)
        if enough and ended and not waiting:  # a GPU is still decoding
            responses |= ended
            waiting, ended = follow({i: ended[i] for i in sorted(ended)}), {}
        fresh = admit(policy, rows, waiting, s, temperature, generator, limit, look) if enough else []
        for row, values in zip(batch, drawn.tolist() if batch else ()):
            add(row, values)
        for row, token in fresh:
            add(row, [token])
        if not rows:
            return [responses[i] for i in range(len(prompts))]


def decode(policy, rows, look, temperature, generator):
    """The next tokens (n, steps) of these rows, of those that are over too; at most `look`. A GPU has not yet made them
    when this returns."""
    kv, drawn = policy.cache, []
    for j, row in enumerate(rows):
        if row.over and row.slot > look:  # on in the dark, from the start of its buffer, where it has least to read
            row.slot = 0
            kv.slot[j].zero_()
    for _ in range(min(look, max(row.limit - len(row.ids) for row in rows if not row.over))):
        logits = fast_step(policy, kv, len(rows), 1 + max(row.slot for row in rows))
        kv.slot[:len(rows)] += 1
        kv.token[:len(rows)] = token = sample(logits, temperature, generator)                           # (n,)
        drawn.append(token)
        for row in rows:
            row.slot += 1
    return torch.stack(drawn, 1)


def admit(policy, rows, waiting, s, temperature, generator, limit, look):
    """Let prompts, taken out of `waiting`, have the places of rows that are over and those not in use: read them, and
    sample their first tokens. Returns [(row, token)]. A GPU does it after the steps under way, without a pause."""
    if all(row.over for row in rows):
        rows.clear()
    places = [j for j, row in enumerate(rows) if row.over] + list(range(len(rows), s.rollout_rows))
    chosen = sorted(waiting, key=lambda i: len(waiting[i]))[:len(places)]
    if not chosen:
        return []
    prompts, fresh, places = [waiting.pop(i) for i in chosen], [], places[:len(chosen)]
    for place, i, ids in zip(places, chosen, prompts):
        fresh.append(Row(i, limit(i), len(ids)))
        rows[place:place + 1] = fresh[-1:]
    kv = room(policy, len(rows), max(row.slot for row in fresh) + max(row.limit for row in fresh) + look, s)
    logits = prefill(policy, kv, prompts, places, s)                                                    # (new, V)
    where = send(places, policy.device)
    kv.slot[where] = send([len(p) for p in prompts], policy.device)
    kv.token[where] = token = sample(logits, temperature, generator)                                    # (new,)
    return list(zip(fresh, token.tolist()))


def room(policy, rows, length, s):
    """policy.cache with at least so many rows and slots: the one there is, or a larger one with its content."""
    old = policy.cache
    if old is None or old.rows < rows or old.length < length:
        rows, length = (max(rows, old.rows), max(length, old.length)) if old else (rows, length)
        policy.cache = KeyValues(rows, -(-length // 256) * 256, policy.device,
                                 policy.device.type == "cuda" and not s.no_graphs, takes_lengths(policy.model))
        if old:
            policy.cache.take(old)
            if policy.device.type == "cuda":
                torch.cuda.synchronize(policy.device)  # the old one's graphs, which end with it, may be at work
    return policy.cache


class KeyValues:
    """Keys and values of a batch in buffers of a fixed size, row i's token t in slot t, in the place of transformers'
    cache, which moves with every token, so that no CUDA graph could follow."""

    def __init__(self, rows, length, device, graphs, lengths=False):
        self.rows, self.length, self.layers = rows, length, []
        self.graphs = {} if graphs else None                                  # of decode_step, by its n and span
        self.lengths = lengths                                                # not masks, see teach_lengths
        self.logits = None                                                    # (rows, V), filled by the graphs
        self.index = torch.arange(rows + 1, device=device)
        self.token, self.slot = torch.zeros_like(self.index), torch.zeros_like(self.index)  # what each row reads next
        self.n = self.span = 0                                                # rows and slots of the step under way

    def take(self, old):
        """The content of a smaller one, which loses it, layer by layer."""
        for mine, other in ((self.token, old.token), (self.slot, old.slot)):
            mine[:old.rows] = other[:old.rows]
        for number in range(len(old.layers)):
            for mine, other in zip(self.buffers(number, old.layers[0][0]), old.layers.pop(0)):
                mine[:old.rows, :, :old.length] = other

    def store(self, cache, source, rows):
        """Take prompts over from transformers' cache: its row source[i] becomes our row rows[i] (lists)."""
        source, rows = send(source, self.index.device), send(rows, self.index.device)
        for number, layer in enumerate(cache.layers):
            for own, new in zip(self.buffers(number, layer.keys), (layer.keys, layer.values)):          # (U, H, L, D)
                own[rows, :, :new.shape[2]] = new[source]

    def buffers(self, number, like):
        """The (keys, values) of a layer, made when first asked for. Zeros: what is masked must not be NaN."""
        if number == len(self.layers):
            shape = self.rows, *((self.length, like.shape[1]) if self.lengths else (like.shape[1], self.length))
            made = [like.new_zeros(*shape, like.shape[3]) for _ in ("keys", "values")]
            self.layers.append([x.transpose(1, 2) for x in made] if self.lengths else made)             # (N, H, S, D)
        return self.layers[number]

    def update(self, key, value, number, *args, **kwargs):
        """What the model's attention calls with a token's key and value (n, H, 1, D), to get all those it may see."""
        keys, values = (buffer[:self.n] for buffer in self.layers[number])
        keys[self.index[:self.n], :, self.slot[:self.n]] = key[:, :, 0]
        values[self.index[:self.n], :, self.slot[:self.n]] = value[:, :, 0]
        return keys[:, :, :self.span], values[:, :, :self.span]

    def get_seq_length(self, *args):
        """Asked by the model, which has been told positions and mask already."""
        return self.span - 1

    def keep(self, rows, span):
        """Move these rows (a list) to the front; slots from `span` on hold nothing yet."""
        rows = send(rows, self.index.device)
        for buffer in (self.token, self.slot, *(b[:, :, :span] for layer in self.layers for b in layer)):
            buffer[:len(rows)] = buffer[rows]


def prefill(policy, kv, prompts, places, s):
    """Read the prompts into these rows of kv, equal ones once, s.micro_tokens at a time; padded on the right, where
    causal attention never looks. Returns the logits (B, V) of the first tokens."""
    from transformers import DynamicCache
    where, hidden = {}, {}
    for prompt, place in zip(prompts, places):
        where.setdefault(tuple(prompt), []).append(place)
    unique = list(where)
    for batch in micro_batches([len(p) for p in unique], s.micro_tokens):
        chosen, cache = [unique[i] for i in batch], DynamicCache(config=policy.model.config)
        width = len(chosen[0])                                                # the longest comes first
        ids = send([p + (0,) * (width - len(p)) for p in chosen], policy.device)                        # (U, L)
        last = trunk(policy.model, ids, cache)                                                          # (U, L, D)
        source = [i for i, p in enumerate(chosen) for _ in where[p]]
        kv.store(cache, source, [place for p in chosen for place in where[p]])
        ends = send([len(p) - 1 for p in chosen], policy.device)                                        # (U,)
        hidden.update(zip(chosen, last[torch.arange(len(chosen), device=policy.device), ends]))         # (U, D)
    return policy.head(torch.stack([hidden[tuple(p)] for p in prompts]))


def decode_step(policy, kv, n, span):
    """Logits (n, V) after each of n rows has read kv.token in kv.slot and seen the slots before; span > all slots."""
    kv.n, kv.span = n, kv.length if kv.lengths else span
    if kv.lengths:
        ends = kv.index[:n + 1]
        mask = torch.stack([ends, ends * kv.length, kv.slot[:n + 1] + 1]).int()[:, None, None]          # (3, 1, 1, n+1)
    else:
        unseen = torch.arange(span, device=policy.device) > kv.slot[:n, None]                           # (n, span)
        mask = torch.zeros(n, 1, 1, span, dtype=policy.model.dtype, device=policy.device)
        mask.masked_fill_(unseen[:, None, None], -math.inf)  # not booleans, which every layer would make into this
    hidden = trunk(policy.model, kv.token[:n, None], kv, position_ids=kv.slot[:n, None], attention_mask=mask)
    return policy.head(hidden[:, -1])                                                                   # (n, V)


@functools.cache
def side_stream(device):
    """The stream on which recordings are prepared. One for all: cuBLAS keeps up to 32 MiB for each that it sees."""
    return torch.cuda.Stream(device)


def record_step(policy, kv, n, span):
    """A CUDA graph of decode_step, whose replay fills kv.logits[:n]."""
    side = side_stream(policy.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up in a first call, which must not be recorded
        logits = decode_step(policy, kv, n, span)
    torch.cuda.current_stream().wait_stream(side)
    if kv.logits is None:  # one buffer for all graphs: what a graph makes for itself, it keeps
        kv.logits = logits.new_zeros(kv.rows, logits.shape[1])
    graph, shared = torch.cuda.CUDAGraph(), next((graph.pool() for graph in kv.graphs.values()), None)
    with torch.cuda.graph(graph, pool=shared, capture_error_mode="thread_local"):  # NCCL's threads go on beside it
        kv.logits[:n] = decode_step(policy, kv, n, span)
    return graph


def fast_step(policy, kv, n, span):
    """decode_step, on a GPU as a CUDA graph: one launch instead of some hundred, which take longer than their work. A
    graph repeats kernels on fixed addresses. That is safe here: token, slots, keys, values and logits lie in kv's
    buffers; the optimizer changes weights in place; the logits are read before the next step; and sizes come in coarse
    buckets, so that few graphs are made, once each. What a bucket adds is masked or never looked at."""
    if kv.graphs is None:
        return decode_step(policy, kv, n, span)
    size = min(-(-n // 16) * 16 if n > 8 else 1 << (n - 1).bit_length(), kv.rows)
    many = kv.length if kv.lengths else min(-(-span // 256) * 256, kv.length)
    if (size, many) not in kv.graphs:
        try:
            kv.graphs[size, many] = record_step(policy, kv, size, many)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise UserError(f"no CUDA graph can be made of this model ({first_line(error)}); decode without them: "
                            "--no-graphs") from None  # a recording cut short leaves the allocator of no use
    kv.graphs[size, many].replay()
    return kv.logits[:n]


# ======== Faster kernels, on a GPU ====================================================================================

def head_width(config):
    """The width of an attention head, which not every model's config names."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def takes_lengths(model):
    """Whether attention can be told lengths instead of a mask: FlashAttention can run, and the model asks transformers
    for its attention, where teach_lengths has been."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    width = head_width(model.config)
    return (model.device.type == "cuda" and torch.version.cuda is not None and model.dtype != torch.float32
            and torch.cuda.get_device_capability(model.device) >= (8, 0) and width % 8 == 0 and width <= 256
            and model._supports_attention_backend and model.config._attn_implementation == "sdpa"
            and hasattr(ALL_ATTENTION_FUNCTIONS["sdpa"], "plain"))


def teach_lengths():
    """Let a mask of integers, which transformers hands on to its attention unread, stand for one that FlashAttention
    knows without reading it. With a real mask a slower kernel would read all keys of all rows."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    if not hasattr(ALL_ATTENTION_FUNCTIONS["sdpa"], "plain"):
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention_by_lengths(ALL_ATTENTION_FUNCTIONS["sdpa"])


def attention_by_lengths(plain):
    """transformers' attention(module, query (B, H, L, D), key and value (B, K, S, D), mask, ...) -> (B, L, H, D), where
    a mask of integers says: for L > 1, the queries are the last of S tokens, each sees those before it (response_hidden
    after a prefix); for L = 1, where in (B S, K, D) each row starts and how many keys it sees (decode_step)."""
    def attention(module, query, key, value, attention_mask, **options):
        if attention_mask is None or attention_mask.dtype != torch.int32:
            return plain(module, query, key, value, attention_mask, **options)
        scale, (longest, keys) = options.get("scaling"), (query.shape[2], key.shape[2])
        if longest > 1:
            from torch.nn.attention.bias import causal_lower_right  # here, for it takes seconds that --help has not
            out = F.scaled_dot_product_attention(query, key, value, causal_lower_right(longest, keys), scale=scale,
                                                 enable_gqa=True)
            return out.transpose(1, 2), None
        query_starts, key_starts, seen = attention_mask[:, 0, 0]                                        # (B + 1,) each
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
        out = torch.ops.aten._flash_attention_forward(*flat, query_starts, key_starts, 1, keys, 0.0, False, False,
                                                      scale=scale, seqused_k=seen[:-1])[0]              # (B, H, D)
        return out[:, None], None
    attention.plain = plain
    return attention


def fuse(model):
    """Make every norm, rotary embedding and gated activation of a Llama or Qwen model one kernel of a GPU instead of
    three to ten, whose time is that of reading and writing memory, or in decoding that of starting. What lay between
    those kernels was rounded to bf16, and is not now. For other models nothing changes."""
    try:
        compiled(gated)(*torch.ones(2, 2, 16, device=model.device))
        torch._dynamo.config.recompile_limit = 64  # there are about 8 kinds of shapes, after which it would give up
    except Exception as error:  # no compiler on this machine, say
        return say_once(f"torch.compile does not work here, which makes the work slower: {first_line(error)}")
    for module in model.modules():
        if hasattr(module, "variance_epsilon") and type(module).__name__.endswith("RMSNorm"):
            replace_forward(module, fused_norm, module.weight)
        if hasattr(module, "gate_proj") and "SiLU" in type(getattr(module, "act_fn", None)).__name__:
            replace_forward(module, fused_mlp, module.gate_proj.weight)
    modeling = sys.modules[type(model).__module__]
    plain = getattr(modeling, "apply_rotary_pos_emb", None)
    if plain and not hasattr(plain, "plain"):
        def rotary(q, *rest, **options):  # (q, k, cos, sin)
            return (compiled(plain) if q.is_cuda else plain)(q, *rest, **options)
        rotary.plain, modeling.apply_rotary_pos_emb = plain, rotary


@torch.no_grad()
def replace_forward(module, function, weight):
    """Let `function` be the module's forward, unless it computes something else; weight (..., D): of its input."""
    x = torch.linspace(-2, 2, 4 * weight.shape[-1], dtype=weight.dtype, device=weight.device).view(4, -1)   # (4, D)
    wanted = module(x)
    module.forward = types.MethodType(function, module)
    if (module(x) - wanted).norm() > 0.05 * wanted.norm():
        del module.forward


@functools.cache
def compiled(function):
    """torch.compile of a small function: anew for a few kinds of shapes, the rest share what changing sizes need."""
    return torch.compile(function)


def gated(gate, up):
    """What a gated MLP does between its matrices, (..., F)."""
    return F.silu(gate) * up


def fused_norm(self, x):
    return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def fused_mlp(self, x):
    return self.down_proj(compiled(gated)(self.gate_proj(x), self.up_proj(x)))


# ======== The vocabulary head in chunks ===============================================================================
# Full logits of a micro-batch are gigabytes: only `chunk` rows exist at a time, and backward makes them again.

class ByChunks(torch.autograd.Function):
    """function(logits of some rows, those rows of `others`) -> tuple of (rows,) tensors, over all rows of hidden
    (N, D), `chunk` at a time. The first of the tuple has a gradient; `others` have none. Checkpointing would do the
    same, but with a gradient of the whole head for every chunk beside their sum: gigabytes again."""

    @staticmethod
    def forward(ctx, function, chunk, hidden, weight, bias, *others):
        ctx.function, ctx.chunk = function, chunk
        ctx.save_for_backward(hidden, weight, bias, *others)
        results = [function(F.linear(h, weight, bias), *rest)
                   for h, *rest in zip(*(x.split(chunk) for x in (hidden, *others)))]
        values = tuple(map(torch.cat, zip(*results)))
        ctx.mark_non_differentiable(*values[1:])
        return values

    @staticmethod
    def backward(ctx, grad, *_):
        hidden, weight, bias, *others = (x if x is None else x.detach() for x in ctx.saved_tensors)
        d_hidden, d_weight, d_bias = (x if x is None else torch.zeros_like(x) for x in (hidden, weight, bias))
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            h = hidden[rows].requires_grad_()

            def add(d_logits):  # as soon as it is known, for nothing of its size to be kept
                d_weight.addmm_(d_logits.T, h.detach())
                if bias is not None:
                    d_bias.add_(d_logits.sum(0))
            with torch.enable_grad():
                logits = F.linear(h, weight, bias)                                                # (chunk, V)
                logits.register_hook(add)
                values = ctx.function(logits, *(x[rows] for x in others))[0]
            del logits
            d_hidden[rows], = torch.autograd.grad(values, h, grad[rows])
            del values
        return None, None, d_hidden, d_weight, d_bias, *[None for _ in others]


def _log_softmax(logits, temperature):
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def chunked_logps(hidden, weight, targets, bias=None, chunk=1024, temperature=1.0, with_entropy=False):
    """log pi(target) (N,) in fp32 from hidden states (N, D), head weight (V, D), targets (N,) [bias (V,)], holding at
    most (chunk, V) logits. with_entropy: -> (logp, entropy (N,) in nats, no gradient)."""
    def one(logits, t):
        logp = _log_softmax(logits, temperature)
        p = logp.detach()
        return logp.gather(1, t[:, None])[:, 0], *([-(p.exp() * p).sum(-1)] if with_entropy else [])
    values = ByChunks.apply(one, chunk, hidden, weight, bias, targets)
    return values if with_entropy else values[0]


def chunked_divergence(student_hidden, teacher_hidden, weight, kind="reverse-kl", chunk=1024, bias=None,
                       temperature=1.0):
    """Exact divergence over the vocabulary per token, (N,) in nats, from hidden states (N, D) and head weight (V, D).
    reverse-kl: KL(pi || pi_T); forward-kl: KL(pi_T || pi); jsd: [KL(pi || M) + KL(pi_T || M)] / 2, M = (pi + pi_T) / 2.
    The teacher's side is detached, its use of the head included. ValueError for another kind."""
    if kind not in ("reverse-kl", "forward-kl", "jsd"):
        raise ValueError(f"divergence {kind!r}: use reverse-kl, forward-kl or jsd")

    def one(logits, teacher_h):
        p = _log_softmax(logits, temperature)
        with torch.no_grad():
            q = _log_softmax(F.linear(teacher_h, weight, bias), temperature)
        if kind == "reverse-kl":
            return (p.exp() * (p - q)).sum(-1),
        if kind == "forward-kl":
            return (q.exp() * (q - p)).sum(-1),
        m = torch.logaddexp(p, q) - math.log(2)
        return 0.5 * (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1),
    return ByChunks.apply(one, chunk, student_hidden, weight, bias, teacher_hidden.detach())[0]


# ======== Warm start: behaviour cloning on expert episodes ============================================================

def expert_turns(policy, env, task_id, s, seed):
    """An expert's episode as (prompt ids, response ids); in every other turn, by lot, the skill is in the prompt, so
    that the teacher knows how to use it."""
    session, lot, turns = env.start(task_id, seed=seed), random.Random(seed), []
    while not session.done and len(turns) < s.max_turns:
        skill = env.skill(session.category, s.prompt_style == "brief") if lot.random() < 0.5 else ""
        text = envs.encodable(session.expert())
        (ids, _), = student_prompts(policy, [session], s, [skill])
        turns.append((ids, policy.tokenizer(text, add_special_tokens=False)["input_ids"]))
        env.step([session], [text])
    return turns


def warm_start_step(state, env, s):
    """One optimizer step of behaviour cloning on s.warm_tasks expert episodes. Returns the mean loss per response
    token in nats. The prompt's own tokens count s.warm_prompt_loss each: guessing them teaches copying. The last step
    leaves a fresh optimizer for RL behind, so that no interruption can come between the two."""
    policy, turns = state.policy, []
    tasks = draw_tasks(env, s, state.warm_step * s.warm_tasks, s.warm_tasks)
    for i, task in enumerate(tasks):
        turns += expert_turns(policy, env, task, s, stream(s, "expert", state.warm_step, i))
    count, total = sum(len(response) for _, response in turns), 0.0
    policy.model.train()
    for rows in share(micro_batches([len(p) + len(r) for p, r in turns], s.micro_tokens)):
        cut = [(1 if s.warm_prompt_loss else len(turns[i][0]), *turns[i]) for i in rows]  # 1: score prompts as well
        logp, mask, _, _ = response_logps(policy.model, [p[:n] for n, p, _ in cut], [p[n:] + r for n, p, r in cut], s)
        lengths = send([[len(p) - n] for n, p, _ in cut], policy.device)                                   # (B, 1)
        prompt = (torch.arange(mask.shape[1], device=policy.device) < lengths) & mask                      # (B, T)
        weights = (mask.float() - (1 - s.warm_prompt_loss) * prompt.float()) / count
        (-logp * weights).sum().backward()
        collect_gradients(state)
        total -= float(logp.detach()[mask & ~prompt].sum())
    total = sum(gather([total]))  # before the gradients are: where a process has ended, this says so in one line
    cosine = math.cos(math.pi * (state.warm_step / s.warm_start))
    lr = s.warm_lr * min(1.0, (state.warm_step + 1) / 20) * (0.55 + 0.45 * cosine)
    apply_update(state, lr, s.grad_clip)
    policy.model.eval()
    state.warm_step += 1
    if state.warm_step == s.warm_start:
        fresh = make_state(policy, s)
        state.optimizer, state.masters = fresh.optimizer, fresh.masters
    return total / count


def run_warm_start(state, env, s):
    """What is left of the behaviour cloning, with a checkpoint at its end."""
    if state.warm_step >= s.warm_start:
        return
    with progress(total=s.warm_start, initial=state.warm_step, desc="warm start", unit="step") as bar:
        while state.warm_step < s.warm_start:
            with uninterrupted():
                loss = warm_start_step(state, env, s)
                write_log(s, "metrics.jsonl", [{"step": 0, "warm_step": state.warm_step, "warm_loss": loss}])
            bar.set_postfix_str(f"{loss:.3f} nats a token")
            bar.update()
            if state.warm_step % (10 * s.save_every) == 0 or state.warm_step == s.warm_start:
                save_checkpoint(state, s)


# ======== What the log says ===========================================================================================

def term_gradients(policy, turns, s, step, baseline):
    """Norms of the gradients of a mini-batch's policy term and of its distillation term (no KL), and their cosine."""
    def gradient(**changes):
        for batch in batches_of(turns, s):
            step_loss(policy, batch, dataclasses.replace(s, kl=0.0, **changes), step, baseline)[0].backward()
        flat = torch.cat([p.grad.float().flatten() for p in policy.model.parameters() if p.grad is not None])
        policy.model.zero_grad(set_to_none=True)
        return flat
    reward = gradient(lam=0.0, rlsd_lam=0.0)
    distill = gradient() - reward
    return {"grad_norm_policy": reward.norm().item(), "grad_norm_distill": distill.norm().item(),
            "grad_cosine": F.cosine_similarity(reward, distill, dim=0).item()}


def gap_profile(episodes):
    """The teacher-student gap by turn of the episode and by tenth of the response (the paper's Figure 3), as means."""
    by_turn, by_tenth = {}, {}
    for e in episodes:
        for number, t in enumerate(e.turns):
            for i, gap in enumerate((t.teacher_logp - t.logp).tolist()):
                by_turn.setdefault(number, []).append(gap)
                by_tenth.setdefault(10 * i // len(t.response_ids), []).append(gap)
    mean = lambda gaps: round(sum(gaps) / len(gaps), 4) if gaps else None
    means = lambda table: [mean(table.get(k)) for k in range(max(table) + 1)]
    return {"gap_by_turn": means(by_turn), "gap_by_tenth": means(by_tenth)}


def episode_metrics(episodes):
    """What the log says of a batch of episodes; lengths are means per turn, `turns` is per episode."""
    turns, n, won = [t for e in episodes for t in e.turns], len(episodes), sum(e.won for e in episodes)
    mean = lambda values: sum(values) / len(turns)
    advantages, groups = [t.advantage for t in turns], {}
    for e in episodes:
        groups.setdefault(e.group_id, set()).add(e.reward)
    return {"episodes": n, "successes": won, "success": won / n, "success_95": wilson(won, n),
            "reward": sum(e.reward for e in episodes) / n, "score": sum(e.score for e in episodes) / n,
            "turns": len(turns) / n, "response_tokens": mean(len(t.response_ids) for t in turns),
            "prompt_tokens": mean(len(t.prompt_ids) for t in turns), "valid": mean(t.valid for t in turns),
            "admissible": mean(t.admissible for t in turns), "prompts_shortened": sum(t.shortened for t in turns),
            "advantage_min": min(advantages), "advantage_max": max(advantages),
            "groups_without_variance": sum(len(rewards) == 1 for rewards in groups.values())}


def wilson(successes, n, z=1.959964):
    """95 % Wilson interval of a rate, as (low, high)."""
    if n == 0:
        return (0.0, 1.0)
    p = successes / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n)))


def stopwatch(phases, device):
    """A function lap(phase, tokens) that writes seconds and tokens per second since the last lap into `phases`."""
    last = [time.perf_counter()]

    def lap(phase, tokens):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        phases[f"seconds_{phase}"], phases[f"tokens_per_s_{phase}"] = now - last[0], tokens / (now - last[0])
        last[0] = now
    return lap


def peak_memory(device):
    """Peak memory in MiB: of the GPU, or of this process where there is a way to ask, else None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):  # Linux; getrusage would give a child process its parent's peak
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10
    with contextlib.suppress(ImportError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes
    return None


def episode_text(policy, episode, step, s):
    """An episode as a JSON row that a person can read: each turn's observation, response, and its tokens with the value
    of the gap gate behind them where there is a teacher, as in 'go[0.52] to[0.61]'."""
    rows = []
    for t in episode.turns:
        row = {"observation": t.observation, "response": t.text, "valid": t.valid, "admissible": t.admissible,
               "advantage": round(t.advantage, 4)}
        if t.teacher_logp is not None:
            gates = sdar_gate(t.logp, t.teacher_logp, s.beta).tolist()
            row["gates"] = "".join(f"{policy.tokenizer.decode([i])}[{g:.2f}]" for i, g in zip(t.response_ids, gates))
        rows.append(row)
    return {"step": step, "task_id": episode.task_id, "skill": episode.skill_name, "won": episode.won,
            "score": episode.score, "details": episode.details, "turns": rows}


def rate_text(m):
    """A success rate with its counts and interval, for the terminal."""
    low, high = m["success_95"]
    return (f"success {100 * m['success']:.1f} % ({m['successes']}/{m['episodes']}, "
            f"95 % {100 * low:.0f}-{100 * high:.0f})")


def step_line(m, s):
    """The terminal's line for a step."""
    parts = [f"step {m['step']}/{s.steps}", rate_text(m), f"turns {m['turns']:.1f}", f"valid {100 * m['valid']:.0f} %"]
    if "gap" in m:
        parts.append(f"gap {m['gap']:+.3f} gate {m['gate']:.3f} ({100 * m['gate_active']:.0f} % open)")
    if "kl" in m:
        parts.append(f"kl {m['kl']:.4f}")
    phases = " ".join(f"{k[8:]} {v:.1f}" for k, v in m.items() if k.startswith("seconds_"))
    if m["updates_skipped"]:
        parts.append(f"{m['updates_skipped']} of {m['updates']} updates skipped: not finite")
    return "  ".join(parts + [f"grad {m['grad_norm']:.2f}", f"{m['seconds']:.1f} s ({phases})"])


# ======== Several GPUs of one machine, started by torchrun ============================================================
# Every rank plays its share of the groups and takes its share of the micro-batches. All know all episodes, and the
# gradients are summed: of the same episodes every rank computes what one process would.

def ranks():
    """(this process's rank, their number)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_ranks():
    """Meet the other processes, if torchrun started us; only the first of them prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # torch itself would take NCCL alone: who waits in that hears neither Ctrl-C nor that another process has ended
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))  # one may play far longer episodes
        if ranks()[0] > 0:
            sys.stdout = open(os.devnull, "w")


def share(items):
    """This rank's part of a list that all ranks have."""
    rank, count = ranks()
    return items[rank::count]


def gather(part, unit=1):
    """The list whose shares were worked on by all ranks, in its order; `unit` results came of each of its items.
    ConnectionError if one of them is gone."""
    if ranks()[1] == 1:
        return part
    parts = [None] * ranks()[1]
    try:
        dist.all_gather_object(parts, part)
    except RuntimeError:
        raise ConnectionError("another process of this run has ended, see what it said") from None
    rounds = range(0, max(map(len, parts)), unit)
    return [result for i in rounds for own in parts for result in own[i:i + unit]]


def progress(*args, **kwargs):
    """A progress bar that vanishes when done; the first rank's alone."""
    return tqdm(*args, leave=False, dynamic_ncols=True, disable=ranks()[0] > 0, **kwargs)


# ======== Files: checkpoints and logs =================================================================================

LOGS = ("metrics.jsonl", "validation.jsonl", "episodes.jsonl")


def first_line(error):
    """The first line of an exception's text, for one-line messages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def read_json(path, missing):
    """A JSON file; UserError with the text `missing` if there is none, or that it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(missing) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({first_line(error)})") from None


def write_text(path, text):
    """Write a file whole or not at all."""
    part = Path(f"{path}.part")
    part.write_text(text, encoding="utf-8", errors="replace")
    os.replace(part, path)


def write_log(s, name, rows):
    """Append rows to one of the run's JSON-lines files; one log for all ranks."""
    if ranks()[0] > 0:
        return
    with open(Path(s.out) / name, "a", encoding="utf-8", errors="replace") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_lines(path):
    """The rows of one of a run's logs, [] if there is none; a line that was half written is left out."""
    rows = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):  # splitlines cuts at U+2028 too
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def checkpoints(run):
    """The checkpoint folders of a run, oldest first; those of the warm start come before step-000000 itself."""
    return sorted(Path(run).glob("checkpoints/step-*"), key=lambda path: path.name + "~")  # "-warm" sorts before "~"


def last_checkpoint(path):
    """The newest checkpoint of a run folder, the folder itself if it is a checkpoint or model, None if neither."""
    return ([path, *checkpoints(path)] if Path(path).is_dir() else [None])[-1]


def save_checkpoint(state, s):
    """Write RUN/checkpoints/step-N[-warm-M]: a model folder for from_pretrained, optimizer.pt, and state.json with all
    digests; renamed to this when whole, so that an interrupted write costs nothing. OSError when the disk is full."""
    if ranks()[0] > 0:
        return
    folder = Path(s.out) / "checkpoints"
    name = f"step-{state.step:06d}" + (f"-warm-{state.warm_step:06d}" if state.warm_step < s.warm_start else "")
    if (folder / name).exists():  # Ctrl-C right after it was saved: the same state
        return
    part = folder / "writing"  # one name: what a killed process left of it goes with the next
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        state.policy.model.save_pretrained(part)
        state.policy.tokenizer.save_pretrained(part)
        own = [None if m is p else m for p, m in zip(state.policy.model.parameters(), state.masters)]
        torch.save({"optimizer": state.optimizer.state_dict(), "masters": own}, part / "optimizer.pt")
        saved = {"step": state.step, "warm_step": state.warm_step, "cursor": state.cursor, "bandit": state.bandit,
                 "tasks": state.tasks, "settings": dataclasses.asdict(s),
                 "files": {p.name: envs.file_digest(p) for p in part.iterdir()}}
        write_text(part / "state.json", json.dumps(saved, indent=1))
        for path in part.iterdir():
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
        part.rename(folder / name)
    except (OSError, RuntimeError, SafetensorError) as error:  # each library has an error of its own for a full disk
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"cannot save to {folder}: {first_line(error)}; the previous checkpoint is whole: make room, "
                      f"then python sdar.py --resume {s.out}") from None
    for old in checkpoints(s.out)[:-s.keep]:
        shutil.rmtree(old)


def read_state(path, unread=()):
    """The state.json of a checkpoint folder. UserError if a file is missing or differs from its digest; those named in
    `unread` are not looked at."""
    state, whole = read_json(path / "state.json", f"{path} is no checkpoint (no state.json)"), False
    with contextlib.suppress(AttributeError, KeyError, TypeError, OSError):
        whole = {"step", "warm_step", "cursor", "bandit", "settings"} <= set(state) and all(
            envs.file_digest(path / name) == digest for name, digest in state["files"].items() if name not in unread)
    if not whole:
        raise UserError(f"the checkpoint {path} is damaged; delete that folder to use the one before it")
    return state


def load_checkpoint(path, s):
    """State from a checkpoint folder; UserError as read_state."""
    kept = read_state(path)
    state = make_state(load_policy(str(path), s.device), s)
    saved = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    with torch.no_grad():
        for master, own in zip(state.masters, saved["masters"]):
            if own is not None:
                master.copy_(own)
    for old, new in zip(saved["optimizer"]["param_groups"], state.optimizer.param_groups):
        old["fused"] = new["fused"]  # the device and --offload may have changed; it says where the step counts belong
    state.optimizer.load_state_dict(saved["optimizer"])
    for name in ("step", "warm_step", "cursor", "bandit"):
        setattr(state, name, kept[name])
    state.tasks = kept.get("tasks", "")
    return state


# ======== A run from its first line to its last, and the command line =================================================

@functools.cache
def claim(out):
    """Lock a run folder as long as this process lives; UserError if another one has: two would mix their logs and
    checkpoints."""
    with contextlib.suppress(ImportError, OSError):  # Windows has no fcntl, some file systems have no locks
        import fcntl
        handle = open(out / "lock", "w")
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another process is writing to {out}; choose another --out, or wait for it") from None
        return handle  # closing it would unlock


def begin(s, env, resume):
    """State of a new run, its folder made, or of a resumed one, its log cut back to the last checkpoint: later steps
    will be taken again."""
    out, found, first = Path(s.out), checkpoints(s.out), ranks()[0] == 0
    tasks = envs.panel_hash(env.tasks(s.split or env.splits[0]))
    if resume is None and found and first:
        raise UserError(f"{out} already holds a run; continue it with --resume {out}, or choose another --out")
    if resume is not None and not found:  # killed before its first checkpoint
        raise UserError(f"{out} has no checkpoint yet; start it again without --resume")
    if first:
        out.mkdir(parents=True, exist_ok=True)
        claim(out)
    if resume is None:
        if first:
            for name in LOGS:
                (out / name).unlink(missing_ok=True)
            write_text(out / "config.json", json.dumps(dataclasses.asdict(s), indent=1))
        texts = tiny_texts(env, s) if s.model == "tiny" else ()
        state = make_state(load_policy(s.model, s.device, texts, s), s, 0.98 if s.warm_start else 0.999)
        state.tasks = tasks
        return state
    state = load_checkpoint(found[-1], s)
    if state.tasks not in ("", tasks):
        raise UserError(f"the training tasks are not those that {out} began with; give that run's data with --data")
    if first:
        write_text(out / "config.json", json.dumps(dataclasses.asdict(s), indent=1))  # flags given now hold from now on
    for name in LOGS if first else ():
        rows = [row for row in read_lines(out / name)
                if row["step"] <= state.step and row.get("warm_step", 0) <= state.warm_step]
        write_text(out / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"resumed from {found[-1]}", flush=True)
    return state


def reference_policy(state, s):
    """The frozen policy of the KL term: the weights that RL started from, kept in RUN/reference for a resumed run."""
    if not uses_reference(s):
        return None
    from transformers import AutoModelForCausalLM
    path, model = Path(s.out) / "reference", state.policy.model
    if state.step == 0 and ranks()[0] == 0:
        model.save_pretrained(path)
    gather([])  # the others wait
    try:
        reference = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype).to(model.device)
        if model.device.type == "cuda":
            fuse(reference)  # the same functions, so the same roundings
    except Exception as error:  # any damage to the folder
        raise UserError(f"the reference policy in {path} cannot be read ({first_line(error)}); the run cannot be "
                        "continued without it") from None
    return reference.requires_grad_(False).eval()


@enough_memory()
def validate(state, env, s):
    """Success on the fixed panel, without skills, logged: at the start, every --val-every steps and at the end, unless
    the log has it. A run that was stopped in the middle of a validation thus makes up for it."""
    split = s.val_split or env.splits[1]
    due = s.val_every and (state.step % s.val_every == 0 or state.step == s.steps)
    done = gather([any(row["step"] == state.step for row in read_lines(Path(s.out) / "validation.jsonl"))])[0]
    if not due or done:
        return
    ids, digest = envs.panel(env, split, s.val_episodes)
    m = episode_metrics(gather(rollout(state.policy, env, share(ids), s, generator_for(state.policy, s, "validation"),
                                       s.val_temperature, label=f"validation on {split}")))
    print(f"validation after step {state.step}: {rate_text(m)} on {split}, panel {digest}", flush=True)
    kept = ("episodes", "successes", "success", "success_95", "score", "turns", "valid")
    write_log(s, "validation.jsonl", [{"step": state.step, "warm_step": state.warm_step, "split": split,
                                       "panel": digest, **{name: m[name] for name in kept}}])


@contextlib.contextmanager
def uninterrupted():
    """Hold Ctrl-C and SIGTERM back until the block is done. Its ConnectionError (another process ended) becomes another
    OSError, after which nothing is saved: it may have been in the middle of an update."""
    held, signals = [], (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda *_: held.append(True)) for number in signals]
    try:
        yield
    except ConnectionError as error:
        raise OSError(error) from None
    finally:
        for number, handler in zip(signals, previous):
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt


def train(s, resume=None):
    """Run a training from its settings. Ctrl-C, SIGTERM, a user's error, or another process's end saves and raises."""
    join_ranks()
    env = open_env(s)
    if s.val_every:
        envs.panel(env, s.val_split or env.splits[1], s.val_episodes)  # if it cannot be had, say so before the training
    print(env.source, flush=True)
    state, out = begin(s, env, resume), Path(s.out)
    model = state.policy.model
    print(f"{s.model}: {model.num_parameters() / 1e6:.2f}M parameters, {model.dtype}, {model.device}; {s.algo}, "
          f"{s.groups} x {s.group_size} episodes a step; log in {out}", flush=True)
    try:
        run_warm_start(state, env, s)
        reference = reference_policy(state, s)
        validate(state, env, s)
        while state.step < s.steps:
            episodes, bandit, phases = play_step(state, env, reference, s)
            with uninterrupted():  # weights must not stop halfway through an update, nor the log before its line
                metrics = learn_step(state, episodes, bandit, phases, s)
                write_log(s, "metrics.jsonl", [metrics])
                write_log(s, "episodes.jsonl", [episode_text(state.policy, e, state.step, s)
                                                for e in episodes[::s.group_size][:s.log_episodes]])
            print(step_line(metrics, s), flush=True)
            if state.step % s.save_every == 0 or state.step == s.steps:
                save_checkpoint(state, s)
            validate(state, env, s)
    except (KeyboardInterrupt, UserError, ConnectionError):  # none can strike within an update: all may be saved after
        with uninterrupted():  # launchers ask more than once
            save_checkpoint(state, s)
            print(f"\nstopped and saved after step {state.step}; go on with: python sdar.py --resume {out}", flush=True)
            raise
    print(f"done: {s.steps} steps; evaluate with: python eval.py --env {s.env} --model {out}", flush=True)
    return state


def fail(message):
    """One line on what was wrong and what to do, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    leave(2)


def leave(status):
    """End the process. One of several skips the interpreter's own end, where gloo's threads now and then abort it, even
    after destroy_process_group; nor is that called, for NCCL's would wait for processes that may be gone."""
    if ranks()[1] > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(argv=None):
    """The command line."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a path or a task may hold what this terminal cannot show
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler that wants its machine back: as Ctrl-C
    try:
        with enough_memory():
            train(*read_settings(argv))
        gather([])  # nobody hangs up while another still listens
        if ranks()[1] > 1:
            leave(0)
    except (UserError, OSError, SafetensorError) as error:  # OSError: --out not writable, a full disk
        fail(error)
    except KeyboardInterrupt:
        leave(130)


if __name__ == "__main__":
    main()
