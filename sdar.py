"""SDAR, Self-Distilled Agentic Reinforcement Learning (arXiv 2605.15155), in one file on one GPU.

A language-model agent plays G episodes of each task. GRPO is the backbone: an episode's advantage
is its reward, normalised within its group, and every token that the agent wrote gets it. The same
weights then score the sampled tokens again, under a prompt that also contains retrieved skills: the
teacher. The detached gap between teacher and student opens or closes a gate for each token:

    Delta_t = log pi(y_t | s_t, skill) - log pi(y_t | s_t)       teacher-student gap, detached
    g_t     = sigmoid(beta * Delta_t)                            gate                -> sdar_gate
    l_t     = g_t * (log pi_teacher - log pi_student)            distillation term   -> sdar_tokens
    L       = L_GRPO + lambda * mean(l_t)                        loss                -> step_loss

Only log pi_student carries gradient, so minimising l_t raises the probability of the tokens whose
gate is open. The mean is over the tokens of an episode, then over episodes. At test time there are
no skills.

How to read it. Sections 1 to 9 are the whole method, in the paper's order: data, prompts, rollout,
scoring, advantages, losses, the table METHODS, the update, training. `generate` (section 12) and
small helpers of sections 10, 11 and 14 are used there by name. The rest, which loads, logs and
saves, is machinery that you can skip. To add a method, write a function of a Batch and add a row
to METHODS.

Left out: an inference server, because `generate` shares the weights with the trainer; sharding over
GPUs (docs/adapters.md shows the loss in trainers that shard); a value network, GRPO has none.

    python sdar.py --env alfworld --model tiny                        # laptop, offline, minutes
    python sdar.py --env alfworld --model Qwen/Qwen2.5-1.5B-Instruct  # one GPU, paper's settings
    python sdar.py --resume runs/alfworld-sdar-tiny                   # continue an interrupted run
    python sdar.py --help                                             # every setting, explained
"""

import argparse
import contextlib
import copy
import datetime
import difflib
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import envs
from envs import UserError

# ======== Settings ================================================================================
def opt(default, help, choices=None, above=None):
    """One setting: default, line in --help, allowed values. Numbers are at least 0, or `above`."""
    return field(default=default, metadata={"help": help, "choices": choices, "above": above})

@dataclass
class Settings:
    """All settings of a run, as saved in its config.json. Defaults: the paper's for ALFWorld."""
    # what is trained
    env: str = opt("alfworld", "alfworld, webshop, search, or a class of yours as FILE.py:Class")
    model: str = opt("tiny", "Hugging Face name, folder, GGUF file, or `tiny` (0.3M, no download)")
    algo: str = opt("sdar", "method, a row of METHODS")
    recipe: str = opt("paper", "objective of the paper or the public code", ("paper", "released"))
    out: str = opt("", "run folder")
    seed: int = opt(233, "seed of task order, sampling and initial weights; not of the tasks")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    # data
    data: str = opt("", "the benchmark's folder or archive, or built-in (default: what is found)")
    env_args: str = opt("", "options of the environment, as 'house=6' (docs/environments.md)")
    skills: str = opt("", "folder of a public skill library (default: the skills in envs.py)")
    val_split: str = opt("", "validation split (default: the benchmark's own)")
    # rollout
    groups: int = opt(16, "tasks per step, one GRPO group each", above=0)
    group_size: int = opt(8, "episodes per task, GRPO's G", above=1)
    max_turns: int = opt(50, "turns after which an episode has failed", above=0)
    history: int = opt(2, "past turns shown in the prompt")
    max_prompt: int = opt(2048, "tokens of a prompt; the oldest history is cut first", above=0)
    max_teacher_prompt: int = opt(3072, "the same with a skill, which is never cut", above=0)
    max_response: int = opt(512, "tokens of a response", above=0)
    prompt_style: str = opt("paper", "wording of prompts; brief: few tokens", ("paper", "brief"))
    temperature: float = opt(1.0, "sampling temperature of training rollouts", above=0)
    rollout_rows: int = opt(128, "sequences decoded together; lower it to save memory", above=0)
    # objective
    lam: float = opt(0.01, "lambda, weight of the distillation term (RLSD: the teacher's share)")
    beta: float = opt(5.0, "sharpness of the gate")
    gate: str = opt("gap", "what opens a token's gate", ("gap", "entropy", "soft-or", "none"))
    gap: str = opt("skill", "the gate compares the skill with no skill, or (contrast, ours) with "
                   "another category's skill (docs/gate.md)", ("skill", "contrast"))
    gate_baseline: bool = opt(False, "subtract the mini-batch's mean gate (docs/gate.md)")
    divergence: str = opt("sampled", "what is gated: the sampled log-ratio or an exact divergence",
                          ("sampled", "reverse-kl", "forward-kl", "jsd"))
    retrieval: str = opt("km", "skill: of the task's category (km), a bandit's choice, all, random",
                         ("km", "ucb", "full", "random"))
    invalid_penalty: float = opt(0.1, "subtracted from the advantage of a malformed turn")
    clip: float = opt(0.2, "clip range of the importance ratio", above=0)
    kl: float = opt(0.01, "alpha_KL, weight of the KL term to the reference policy")
    teacher_model: str = opt("", "ATOD's teacher, with the same tokenizer (default: atod_self)")
    judge: str = opt("", "chat server URL[#MODEL]: TRIAGE's roles, SGCD's references (else rules)")
    craft_sign: str = opt("paper", "CRAFT as printed, or repaired (loo)", ("paper", "loo"))
    # optimisation
    steps: int = opt(150, "training steps, one rollout each")
    lr: float = opt(1e-6, "learning rate of AdamW", above=0)
    lr_warmup: float = opt(0.0, "share of the steps in which the learning rate rises from 0")
    mini_batch: int = opt(256, "turns per optimizer step; 0: one optimizer step per rollout")
    micro_tokens: int = opt(8192, "tokens per forward-backward; changes memory only", above=0)
    grad_clip: float = opt(1.0, "largest gradient norm", above=0)
    small_gpu: bool = opt(False, "optimizer in host memory, activations recomputed: slower")
    # behaviour cloning before RL
    warm_start: int = opt(0, "steps of cloning experts, a random half of the turns with the skill")
    warm_lr: float = opt(1e-5, "learning rate of the cloning (cosine to a tenth)", above=0)
    # measuring and saving
    control_every: int = opt(0, "steps between scorings under another category's skill; 0: never")
    val_every: int = opt(10, "steps between validations; 0: never")
    val_episodes: int = opt(128, "tasks of the validation panel")
    val_temperature: float = opt(0.4, "sampling temperature of validation; 0: greedy")
    save_every: int = opt(10, "steps between checkpoints (cloning: ten times as many)", above=0)
    track: str = opt("none", "where the log goes too", ("none", "wandb", "tensorboard"))

HEADINGS = {"env": "what is trained", "data": "data", "groups": "rollout", "lam": "objective",
            "steps": "optimisation", "warm_start": "behaviour cloning before RL",
            "control_every": "measuring and saving"}  # of --help, by each group's first setting

PRESETS = {  # a row applies if all its words are the run's env, algo, recipe or model; later wins
    "webshop": dict(max_turns=15, max_prompt=4096, max_teacher_prompt=5120, mini_batch=64),
    "search": dict(groups=128, max_turns=4, history=4, max_prompt=4096, max_teacher_prompt=5120,
                   invalid_penalty=0.01, lr_warmup=0.1, val_temperature=0.0),
    "skill-sd": dict(lam=0.001),
    "rlsd": dict(lam=0.5),
    "opsd": dict(kl=0.0),
    "released": dict(kl=0.01),
    "released search": dict(kl=0.001),
    "gigpo search": dict(kl=0.001),
    "ucob search": dict(kl=0.001),
    "atod": dict(kl=0.0),
    "sgcd": dict(kl=0.0),
    "craft": dict(kl=0.0),
    "tiny": dict(prompt_style="brief", groups=4, max_prompt=512, max_teacher_prompt=768,
                 max_response=48, lr=3e-4, kl=0.0, steps=4, warm_start=150, warm_lr=3e-3,
                 val_every=4, val_episodes=64),
    "tiny alfworld": dict(env_args="house=4 task_types=Pick detours=2", max_turns=8, groups=8,
                          mini_batch=128, steps=50, warm_start=300, warm_lr=4e-3, val_every=25,
                          val_temperature=1.0, val_episodes=140),
    "tiny webshop": dict(mini_batch=256, lr=1e-4),
}
SUCCESS_REWARD = {"alfworld": 10.0, "webshop": 10.0, "search": 1.0}  # of others 1; else 0
MAY_CHANGE = ("data device judge max_prompt max_teacher_prompt micro_tokens rollout_rows skills "
              "save_every small_gpu steps track val_episodes val_every val_split").split()
INHERITED = ("prompt_style history max_prompt max_teacher_prompt max_response lr max_turns "
             "env_args data").split()    # by a new run from the run in --model

# ======== 1. Data: a turn, an episode, a batch ====================================================
@dataclass
class Turn:
    """One prompt and one response of T tokens. Tensors are (T,) and on the CPU."""

    prompt_ids: list                    # what the agent read
    response_ids: list = None           # as sampled, never re-tokenised; with EOS where sampled
    other_ids: list = None              # the other view: the teacher's prompt, with the skill
    observation: str = ""               # what the agent saw before it acted
    text: str = ""                      # the response
    action: str = ""
    valid: bool = True                  # the response is well-formed
    admissible: bool = True             # the action is one of the admissible commands
    shortened: bool = False             # a prompt was over its budget
    cut: bool = False                   # the response was ended by --max-response
    reward: float = 0.0                 # of the episode
    group: int = 0                      # which task of the step: GRPO's group
    rollout: int = 0                    # which episode of the step
    number: int = 0                     # which turn of the episode
    old_logp: torch.Tensor = None       # under the policy that sampled
    teacher_logp: torch.Tensor = None   # under other_ids
    ref_logp: torch.Tensor = None       # under the reference policy
    logp: torch.Tensor = None           # at the update, kept for the log
    advantages: torch.Tensor = None
    weight: float = 0.0                 # of each of its tokens in the mini-batch's loss
    extra: dict = field(default_factory=dict)   # further tensors of a method
    after: list = field(default_factory=list)   # token ids read after it, see Method.after_loss
    role: str = ""                      # of TRIAGE: D, E, N or R
    control_ids: list = field(default_factory=list)     # a prompt for each of Episode.controls

@dataclass
class Episode:
    """One attempt at a task."""

    task_id: str
    session: object                     # of envs.py: category, done, won, score, details ...
    skill: str = ""                     # name of the skill that was given
    reward: float = 0.0
    turns: list = field(default_factory=list)
    skill_text: str = ""                # of that skill
    controls: list = field(default_factory=list)    # texts to score under instead of the skill

@dataclass
class Batch:
    """B turns, padded to T tokens: a micro-batch for Method.term, the whole step for
    Method.advantages. What was not scored is None."""

    mask: torch.Tensor                  # (B, T) True on response tokens
    old: torch.Tensor                   # (B, T) log-probabilities
    teacher: torch.Tensor               # (B, T)
    ref: torch.Tensor                   # (B, T)
    advantages: torch.Tensor            # (B, T)
    weights: torch.Tensor               # (B, T) in the mini-batch's loss, see assign_weights
    reward: torch.Tensor                # (B,)
    valid: torch.Tensor                 # (B,)
    group: torch.Tensor                 # (B,)
    rollout: torch.Tensor               # (B,)
    number: torch.Tensor                # (B,)
    extra: dict                         # {name: (B, T)}
    turns: list                         # the Turns themselves
    logp: torch.Tensor = None           # (B, T) of the current policy, with gradient
    entropy: torch.Tensor = None        # (B, T) of the current policy, in nats, if needed
    compare: Callable = None            # compare(f): f(log pi, log pi_T) over the words, (B, T)
    baseline: float = 0.0               # subtracted from the gate
    after: torch.Tensor = None          # (B, L) log-probabilities of Turn.after, else 0
    log: dict = field(default_factory=dict)     # what Method.advantages adds to the metrics

def batch_of(turns, device="cpu"):
    """The turns as a Batch. Masks come from lengths, never from a pad id."""
    def tokens(rows):
        if rows[0] is not None:
            return to_device(pad_sequence(rows, batch_first=True).detach(), device)     # (B, T)

    def column(name):
        return to_device(torch.tensor([getattr(t, name) for t in turns]), device)       # (B,)

    mask = tokens([torch.ones(len(t.response_ids), dtype=torch.bool) for t in turns])
    old, teacher, ref = (tokens([getattr(t, name) for t in turns])
                         for name in ("old_logp", "teacher_logp", "ref_logp"))
    advantages = tokens([t.advantages for t in turns])
    extra = {name: tokens([t.extra[name] for t in turns]) for name in turns[0].extra}
    return Batch(mask, old, teacher, ref, advantages, column("weight")[:, None] * mask,
                 *map(column, ("reward", "valid", "group", "rollout", "number")), extra, turns)

# ======== 2. Prompts: the teacher's contain a skill, the student's do not =========================
def encode_chats(tokenizer, texts):
    """Token ids of user messages, each in the chat template."""
    chats = [render_chat(tokenizer, text) for text in without_special_tokens(tokenizer, texts)]
    return tokenizer(chats, add_special_tokens=False)["input_ids"]

def prompts(policy, sessions, s, skills):
    """(token ids, over budget?) of the sessions' current prompts. skills: a text per session, ""
    for the student, the retrieved skill (c^+ in the paper) for the teacher. A prompt over its
    budget loses history, then the middle of the observation, never the skill."""
    brief = s.prompt_style == "brief"
    texts = [x.prompt(skill, s.history, brief=brief) for x, skill in zip(sessions, skills)]
    encoded = encode_chats(policy.tokenizer, texts)
    return [fitting(policy, x, s, skill, ids) for x, skill, ids in zip(sessions, skills, encoded)]

# ======== 3. Rollout ==============================================================================
def rollout(policy, env, tasks, s, temperature, generator, group_size=1, skills=None, acts="plain",
            both=False, label="rollout"):
    """group_size Episodes per task id, played together; a finished one costs nothing. skills:
    (name, text, *controls) per task. acts: "skilled" shows it to the agent itself, "half" in every
    second episode. both: also build the other prompt, the teacher's if the agent sees no skill."""
    skills = skills or [("", "")] * len(tasks)
    episodes = [Episode(task, env.start(task), name, skill_text=text, controls=controls)
                for task, (name, text, *controls) in zip(tasks, skills) for _ in range(group_size)]
    skilled = [acts == "skilled" or (acts == "half" and i % 2 == 0) for i in range(len(episodes))]
    waiting = {}                                       # {episode: prompt ids}, emptied by generate
    logps = {}                                         # {episode: of its response}

    def view(live, own):                               # the agent's own prompts, or the other ones
        texts = [episodes[i].skill_text if skilled[i] == own else "" for i in live]
        return prompts(policy, [episodes[i].session for i in live], s, texts)

    def ask(live):
        own = view(live, True)
        other = view(live, False) if both else [(None, False)] * len(live)
        for i, (ids, cut), (other_ids, other_cut) in zip(live, own, other):
            e = episodes[i]
            e.turns.append(Turn(ids, None, other_ids, e.session.observation, number=len(e.turns),
                                group=i // group_size, rollout=i, shortened=cut or other_cut,
                                control_ids=control_prompts(policy, e, s)))
            waiting[i] = ids
    ask(range(len(episodes)))
    with progress(total=len(episodes) * s.max_turns, desc=label, unit="turn") as bar:
        for ended in generate(policy, waiting, s, temperature, env.stop, generator, None, logps):
            texts = [response_text(policy, ids) for ids in ended.values()]
            env.step([episodes[i].session for i in ended], [policy.opened + x for x in texts],
                     think_closed=policy.think_closed)
            for (i, ids), text in zip(ended.items(), texts):
                complete_turn(episodes[i], ids, logps.get(i), text, policy.end_ids, env.stop)
            live = [i for i in ended if not episodes[i].session.done
                    and len(episodes[i].turns) < s.max_turns]
            bar.update(sum(1 if i in live else s.max_turns + 1 - len(episodes[i].turns)
                           for i in ended))
            if live:
                ask(live)                              # generate takes these next
    return with_rewards(episodes, s)

# ======== 4. Scoring: log-probabilities of responses under a prompt ===============================
@torch.no_grad()
def score_turns(model, turns, prompt, result, s, label, with_entropy=False):
    """Set turn.<result>, (T,) on the CPU, to the log-probabilities under turn.<prompt>.
    with_entropy: also turn.extra["entropy"], in nats."""
    model.eval()
    batches = micro_batches(turns, s.micro_tokens, prompt)
    scores = []
    for batch in progress(batches, desc=label):
        rows = [getattr(t, prompt) for t in batch]
        responses = [t.response_ids for t in batch]
        scores.append(response_logps(model, rows, responses, s, with_entropy))
    for batch, score in zip(batches, scores):          # after the loop, which never waits for a GPU
        set_rows(batch, result, score[0])
        if with_entropy:
            set_extra(batch, "entropy", score[2])

def response_logps(model, prompts, responses, s, with_entropy=False):
    """(log pi(token | prompt, earlier tokens), mask), both (B, T), zeros beyond the mask. Taken at
    the rollout's temperature: the policy that is scored is the policy that sampled. with_entropy:
    the third is the entropy (B, T)."""
    hidden, targets, mask = response_hidden(model, prompts, responses)
    head = model.get_output_embeddings()
    logp, entropy = chunked_logps(head, hidden, targets, s.temperature, with_entropy)
    both = unflatten(logp, mask), mask
    return (*both, unflatten(entropy, mask)) if with_entropy else both

def response_hidden(model, prompts, responses):
    """Last hidden states (N, D) that predict the response tokens, those tokens (N,), and their mask
    (B, T), from B lists of token ids; N = mask.sum(). Rows are padded on the right, where causal
    attention never looks, so no attention mask is needed."""
    rows = [list(p) + list(r) for p, r in zip(prompts, responses)]
    width = max(map(len, rows))
    ids = to_device([row + [0] * (width - len(row)) for row in rows], model.device)     # (B, L)
    lengths = to_device([len(r) for r in responses], model.device)                      # (B,)
    mask = torch.arange(max(map(len, responses)), device=model.device) < lengths[:, None]  # (B, T)
    places = [(i, len(p) - 1 + t) for i, (p, r) in enumerate(zip(prompts, responses))
              for t in range(len(r))]
    row, position = to_device(places, model.device).T                                   # (N,)
    hidden = hidden_states(model, ids)                                                  # (B, L, D)
    return hidden[row, position], ids[row, position + 1], mask

# ======== 5. Advantages and token weights =========================================================
def grpo(b, s, state=None):
    """GRPO's advantages (B, T) of a whole step: one per episode (Algorithm 1), minus the penalty of
    malformed turns. --recipe released: normalised over turns, the penalty subtracted before; one
    malformed turn among n of equal reward then gets about -sqrt(n)."""
    rewards = b.reward.double()
    penalty = s.invalid_penalty * (~b.valid).double()                                   # (B,)
    if s.recipe == "released":
        values = group_normalized_advantages(rewards - penalty, b.group)                # (B,)
    else:
        first = b.number == 0                          # one row per episode, in episode order
        shared = group_normalized_advantages(rewards[first], b.group[first])  # (episodes,)
        values = (shared[b.rollout].double() - penalty).float()                         # (B,)
    return values[:, None].expand(b.mask.shape)

def group_normalized_advantages(rewards, groups, eps=1e-6):
    """GRPO's A = (R - mean_G R) / (std_G R + eps) with Bessel's std: (N,) rewards and group ids ->
    (N,) float32. A group without variance gets exactly 0. A group of one, which other callers may
    have, keeps its reward as in the public code. float64: rounding must not invent a variance."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64, device="cpu")
    groups = torch.as_tensor(groups, device="cpu")
    advantages = torch.zeros_like(rewards)
    for group in groups.unique():
        rows = groups == group
        r = rewards[rows]
        if len(r) == 1:
            advantages[rows] = r / (1 + eps)
        elif r.max() > r.min():
            advantages[rows] = (r - r.mean()) / (r.std() + eps)
    return advantages.float()

def token_weights(mask, owners=None):
    """Weight (B, T) of each response token in a loss, sum 1. mask (B, T): ALL rows. owners (B,):
    the paper's (1/G) sum_i Agg, where rows of one owner are one episode. None: the token mean."""
    mask = mask.to(torch.promote_types(mask.dtype, torch.float32))
    if owners is None:
        return mask / mask.sum().clamp(min=1)
    names, index = torch.unique(owners, return_inverse=True)                            # (B,)
    tokens = mask.new_zeros(len(names)).index_add(0, index, mask.sum(1))
    return mask / tokens[index].clamp(min=1)[:, None] / (tokens > 0).sum().clamp(min=1)

# ======== 6. The gate and the losses, per token: (B, T) -> (B, T) =================================
def grpo_tokens(logp, old_logp, advantages, clip=0.2, dual_clip=3.0):
    """Policy loss (B, T): -min(r A, clip(r, 1-e, 1+e) A), at most -dual_clip * A for A < 0. The
    log-ratio is limited to +-20, so that exp stays finite."""
    ratio = (logp - old_logp.detach()).clamp(-20, 20).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)

def sdar(b, s):
    """SDAR's term lambda * l_t, (B, T). --gate, --divergence and --gap are in section 10."""
    if (s.gate, s.gap, s.divergence) == ("gap", "skill", "sampled"):
        return s.lam * sdar_tokens(b.logp, b.teacher, s.beta, b.baseline)
    return s.lam * sdar_variant(b, s)

def sdar_gate(student_logp, teacher_logp, beta=5.0):
    """sigmoid(beta * (log pi_T - log pi_theta)) of the sampled tokens, (B, T), detached."""
    return torch.sigmoid(beta * (teacher_logp - student_logp).detach())

def sdar_tokens(student_logp, teacher_logp, beta=5.0, baseline=0.0):
    """Loss of each token (B, T). teacher_logp: the SAME tokens scored by the same weights under a
    prompt with the skill. baseline: a constant for the whole optimizer step, best the mean gate;
    the paper has none."""
    gate = sdar_gate(student_logp, teacher_logp, beta)
    return (gate - baseline) * (teacher_logp.detach() - student_logp)

def sdar_loss(student_logp, teacher_logp, mask, beta=5.0, baseline=0.0, total_tokens=None):
    """Scalar, for other trainers; mask (B, T) of 0/1. total_tokens: response tokens of the WHOLE
    optimizer step, so that the micro-batch size changes nothing; by default those of this mask."""
    hidden = mask == 0
    student_logp = student_logp.masked_fill(hidden, 0)
    teacher_logp = teacher_logp.masked_fill(hidden, 0)
    values = sdar_tokens(student_logp, teacher_logp, beta, baseline).masked_fill(hidden, 0)
    return values.sum() / (mask.sum().clamp(min=1) if total_tokens is None else total_tokens)

def k3_kl(logp, ref_logp):
    """Estimate exp(d) - d - 1 of KL(pi_theta || pi_ref), d = ref - logp; at most 10, as in the
    public code. d is limited to 20, so that inf cannot become NaN in the gradient."""
    d = (ref_logp.detach() - logp).clamp(max=20)
    return (d.exp() - d - 1).clamp(-10, 10)

def aggregate(values, weights):
    """Scalar sum of weights * values, both (B, T). Where the weight is 0 the value is ignored."""
    return (values.masked_fill(weights == 0, 0) * weights).sum()

# ======== 7. Methods ==============================================================================
@dataclass(frozen=True)
class Method:
    """A row of METHODS: GRPO's clipped loss on `advantages`, plus whatever else is named here."""

    needs: str = ""              # words: "teacher", "reference", "old" are scoring passes,
                                 # "entropy" fills b.entropy, "views" builds both prompts,
                                 # "uncertainty" is extra["entropy"] of the old policy
    advantages: Callable = grpo  # (Batch of the WHOLE step, s, state) -> (B, T); b.extra, b.log
    term: Callable = None        # (Batch, s) -> (B, T), added to the policy loss
    acts: str = "plain"          # the agent's own prompt: plain, skilled, or half (see rollout)
    prepare: Callable = None     # (state, env, episodes, s), before scoring -> metrics or None
    rows: Callable = None        # (state, episodes, s) -> further turns with weights, and ...
    row_term: Callable = None    # ... their only loss: (Batch, s) -> (B, T)
    after_loss: Callable = None  # Batch -> scalar, from b.after
    uses: str = ""               # settings with an effect; check_settings refuses the other ones

METHODS = {  # the terms that are not SDAR's are in section 10, seven more methods in 10b
    "grpo": Method(),
    "sdar": Method("teacher", term=sdar,
                   uses="lam beta gate gap gate_baseline divergence retrieval"),
    "skill-grpo": Method(acts="skilled", uses="retrieval"),
    "opsd": Method("reference", advantages=lambda b, s, state: 0 * grpo(b, s),  # no policy loss
                   term=lambda b, s: s.lam * (b.logp - b.ref), uses="lam"),
    "grpo+opsd": Method("reference", term=lambda b, s: s.lam * (b.logp - b.ref), uses="lam"),
    "skill-sd": Method("teacher", uses="lam beta retrieval",
                       term=lambda b, s: s.lam * skill_sd_tokens(b.logp, b.teacher, b.old)),
    "rlsd": Method("teacher old", uses="lam beta retrieval", advantages=lambda b, s, state:
                   rlsd_advantages(grpo(b, s), b.old, b.teacher, s.lam)),
}

# ======== 8. The update ===========================================================================
def update(state, episodes, s, method, lr):
    """One pass over a step's turns in mini-batches of equal size, because Adam makes a step of the
    same length for a small one. Returns metrics: token means, mean loss and gradient norm."""
    turns = [t for e in episodes for t in e.turns]
    b = batch_of(turns)
    set_rows(turns, "advantages", method.advantages(b, s, state))
    for name, values in b.extra.items():
        set_extra(turns, name, values)
    random.Random(seed_for(s, "minis", state.step)).shuffle(turns)
    count = optimizer_steps(turns, s)
    minis = [turns[i::count] for i in range(count)]
    assign_weights(minis, s)
    further = method.rows(state, episodes, s) if method.rows else []
    b.log |= {"further_rows": len(further)} if method.rows else {}
    for turn in further:                               # no policy loss, not counted in the log
        turn.advantages = torch.zeros(len(turn.response_ids))
        turn.number = -1
    results = []
    state.policy.model.train()
    with progress(total=len(turns) + len(further), desc="update", unit="turn") as bar:
        for i, mini in enumerate(minis):
            results.append(optimizer_step(state, mini, further[i::count], s, method, lr, bar))
    state.policy.model.eval()
    return update_metrics(results, turns, lr) | control_metrics(turns, s) | b.log

def assign_weights(minis, s):
    """Set turn.weight, equal for all its tokens. Paper: they sum to 1 over the step, times the
    number of its mini-batches. Public code: the token mean of each mini-batch."""
    turns = [t for mini in minis for t in mini]
    for part in [turns] if s.recipe == "paper" else minis:
        b = batch_of(part)
        weights = token_weights(b.mask, b.rollout if s.recipe == "paper" else None)     # (B, T)
        for turn, row in zip(part, weights.tolist()):
            turn.weight = row[0] * (len(minis) if s.recipe == "paper" else 1)

def optimizer_step(state, turns, further, s, method, lr, bar):
    """One AdamW step on a mini-batch of turns and a method's further rows. Sets turn.logp. Returns
    (sums over tokens of each micro-batch, gradient norm, whether the step was taken)."""
    baseline = mean_gate(turns, s) if s.gate_baseline else 0.0
    parts = [(part, method.term) for part in micro_batches(turns, s.micro_tokens)]
    parts += [(part, method.row_term) for part in micro_batches(further, s.micro_tokens)]
    results = []
    for part, term in parts:
        loss, b = step_loss(state.policy, part, s, method, term, baseline)
        loss.backward()                                # into the fp32 masters, see make_state
        results.append((part, b.logp.detach(), token_sums(b, s, loss)))
        bar.update(len(part))
    for part, logps, _ in results:                     # after the loop, which never waits for a GPU
        set_rows(part, "logp", logps)
    sums = [{name: float(x) for name, x in part.items()} for _, _, part in results]
    return sums, *apply_update(state, lr, s.grad_clip)

def step_loss(policy, turns, s, method, term, baseline=0.0):
    """(this micro-batch's part of the loss, its Batch). The parts of a mini-batch add up."""
    tokens = [t.response_ids + t.after for t in turns]
    hidden, targets, mask = response_hidden(policy.model, [t.prompt_ids for t in turns], tokens)
    with_entropy = "entropy" in method.needs or s.gate in ("entropy", "soft-or")
    with_entropy = "gradient" if s.recipe == "released" else with_entropy
    logp, entropy = chunked_logps(policy.head, hidden, targets, s.temperature, with_entropy)
    b = batch_of(turns, policy.device)
    full = unflatten(logp, mask)                                                        # (B, L)
    b.logp = full[:, :b.mask.shape[1]].masked_fill(~b.mask, 0)                          # (B, T)
    b.after = full.masked_fill(F.pad(b.mask, (0, full.shape[1] - b.mask.shape[1])), 0)  # (B, L)
    b.entropy = None if entropy is None else unflatten(entropy.detach(), mask)          # (B, T)
    b.old = b.logp.detach() if b.old is None else b.old    # one update per rollout: old is current
    b.compare = functools.partial(compare_views, policy, turns, s, hidden, mask)
    b.baseline = baseline
    values = grpo_tokens(b.logp, b.old, b.advantages, s.clip)                           # (B, T)
    if term:
        values = values + term(b, s)
    if s.kl and b.ref is not None:
        values = values + s.kl * k3_kl(b.logp, b.ref)
    if s.recipe == "released":
        values = values - ENTROPY_BONUS * unflatten(entropy, mask)[:, :values.shape[1]]
    loss = aggregate(values, b.weights)
    return loss + method.after_loss(b) if method.after_loss else loss, b

# ======== 9. Training =============================================================================
def train(s, resume=None):
    """A whole run. Ctrl-C, SIGTERM or a user's error saves and ends it."""
    env = open_env(s, training=True)
    state = start_or_resume(s, env, resume)
    try:
        clone_experts(state, env, s)
        reference = reference_policy(state, s)
        validate(state, env, s)
        while state.step < s.steps:
            episodes, phases = play_step(state, env, reference, s)
            with uninterrupted():    # no half update, no step without its log line
                metrics = learn_step(state, episodes, phases, s)
                log_step(state, episodes, metrics, s)
            if state.step % s.save_every == 0 or state.step == s.steps:
                save_checkpoint(state, s)
            validate(state, env, s)
        save_checkpoint(state, s)                      # unless the last step did
    except (KeyboardInterrupt, UserError):             # neither can come in mid-update
        save_and_say(state, s)
        raise
    print(f"done: {s.steps} steps; evaluate with: python eval.py --env {s.env} --model {s.out}")
    return state

def play_step(state, env, reference, s):
    """Rollout and scoring -> (episodes, seconds and tokens per second by phase). It changes nothing
    in `state`, so that it may be interrupted."""
    policy = state.policy
    method = method_of(s)
    phases = {}
    lap = stopwatch(phases, policy.device)
    tasks = draw_tasks(env, s, state.cursor, s.groups)
    both = "views" in method.needs or ("teacher" in method.needs and state.teacher is None)
    skilled = both or method.acts != "plain"
    skills = choose_skills(env, tasks, s, state) if skilled else None
    generator = generator_for(policy, s, "rollout", state.step)
    episodes = rollout(policy, env, tasks, s, s.temperature, generator, s.group_size, skills,
                       acts=method.acts, both=both, label=f"step {state.step + 1} rollout")
    turns = [t for e in episodes for t in e.turns]
    lap("rollout", turns, None)
    if method.prepare:
        phases |= method.prepare(state, env, episodes, s) or {}
        lap("prepare", turns)
    if "teacher" in method.needs:                      # once, with the weights that sampled
        teacher, view = (policy.model, "other_ids") if both else (state.teacher, "prompt_ids")
        score_turns(teacher, turns, view, "teacher_logp", s, "teacher")
        lap("teacher", turns, view)
        score_controls(policy.model, turns, s, lap)
    if reference is not None:
        score_turns(reference, turns, "prompt_ids", "ref_logp", s, "reference")
        lap("reference", turns)
    rescored = turns[0].old_logp is None or "uncertainty" in method.needs
    if rescored and ("old" in method.needs or s.gate_baseline or 0 < s.mini_batch < len(turns)):
        # with a single mini-batch step_loss takes the current policy as the old one
        score_turns(policy.model, turns, "prompt_ids", "old_logp", s, "old policy",
                    "uncertainty" in method.needs)
        lap("old_policy", turns)
    return episodes, phases

def learn_step(state, episodes, phases, s):
    """The update. All that a step changes in `state` is changed here. Returns the metrics."""
    lap = stopwatch(phases, state.policy.device)
    rise = min(1.0, (state.step + 1) / (s.lr_warmup * s.steps)) if s.lr_warmup else 1.0
    metrics = update(state, episodes, s, method_of(s), s.lr * rise)
    lap("update", [t for e in episodes for t in e.turns])
    count_skills(state.bandit, episodes, s)
    state.step += 1
    state.cursor += s.groups
    return {"step": state.step, **episode_metrics(episodes), **metrics, **phases,
            "peak_memory_mib": peak_memory(state.policy.device)}

# ======== 10. Other objectives: baselines and ablations of the paper ==============================

def skill_sd_tokens(logp, teacher_logp, old_logp, limit_d=math.inf, limit_rho=math.inf):
    """Skill-SD's rho * k, (B, T): d = logp - teacher, k = exp(-d) - 1 + d, rho = exp(logp - old),
    both with gradient. The public code limits -d and log rho."""
    d = logp - teacher_logp.detach()
    log_rho = logp - old_logp.detach()
    return log_rho.clamp(max=limit_rho).exp() * ((-d).clamp(max=limit_d).exp() - 1 + d)

def rlsd_advantages(advantages, old_logp, teacher_logp, lam=0.5, e_w=0.2):
    """RLSD's A * [(1-lam) + lam * clip(exp(sign(A) (teacher - old)), 1 - e_w, 1 + e_w)], (B, T)."""
    scale = (advantages.sign() * (teacher_logp - old_logp).detach()).exp()
    return advantages * ((1 - lam) + lam * scale.clamp(1 - e_w, 1 + e_w))

def gate_values(b, s):
    """The gate (B, T) of --gate and --gap, detached; h is the student's entropy in nats."""
    gap = (b.teacher - (b.extra["control"] if s.gap == "contrast" else b.logp)).detach()
    h = torch.zeros_like(gap) if b.entropy is None else b.entropy
    opens = {"gap": gap, "entropy": h, "soft-or": 1 - (1 - h) * (1 - gap)}
    return torch.ones_like(gap) if s.gate == "none" else torch.sigmoid(s.beta * opens[s.gate])

def sdar_variant(b, s):
    """SDAR's term, without lambda, for every --gate and --divergence, (B, T)."""
    exact = DIVERGENCES.get(s.divergence)
    return (gate_values(b, s) - b.baseline) * (b.compare(exact) if exact else b.teacher - b.logp)

def kl(p, q):
    """KL(p || q) in nats (n,), from log-probabilities (n, V)."""
    return (p.exp() * (p - q)).sum(-1)

def jensen_shannon(p, q):
    """[KL(p || M) + KL(q || M)] / 2 with M = (p + q) / 2, as `kl`."""
    m = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1)

# of p = log pi and q = log pi_T
DIVERGENCES = {"reverse-kl": kl, "forward-kl": lambda p, q: kl(q, p), "jsd": jensen_shannon}
ENTROPY_BONUS = 0.001     # --recipe released: in every method's loss

RELEASED = {  # --recipe released: methods whose public code differs from the paper
    "opsd": Method("teacher", METHODS["opsd"].advantages, sdar, uses=METHODS["sdar"].uses),
    "grpo+opsd": Method("teacher", uses="lam divergence retrieval",
                        term=lambda b, s: sdar(b, replace(s, beta=0.0))),    # the gate is 1/2
    "skill-sd": Method("teacher", uses="lam beta retrieval", term=lambda b, s:
                       s.lam * skill_sd_tokens(b.logp, b.teacher, b.old, 20, 10)),
    "rlsd": Method("teacher old", uses="lam beta retrieval", advantages=lambda b, s, state:
                   rlsd_advantages(grpo(b, s), b.old, b.teacher,
                                   s.lam * max(0.0, 1 - state.step / 100))),
}

def method_of(s):
    """The Method that a run trains with."""
    return (RELEASED if s.recipe == "released" else {}).get(s.algo, METHODS[s.algo])

def without_effect(s):
    """Settings of other methods that have no effect on this run's."""
    names = {name for row in METHODS.values() for name in row.uses.split()}
    method = method_of(s)
    if "teacher" not in method.needs or s.teacher_model:     # the teacher reads no skill
        names.add("control_every")
    return sorted(names - set(method.uses.split()))

def mean_gate(turns, s):
    """Mean gate of a mini-batch under the rollout policy: a constant, known before the update."""
    old = torch.cat([t.extra["control"] if s.gap == "contrast" else t.old_logp for t in turns])
    return sdar_gate(old, torch.cat([t.teacher_logp for t in turns]), s.beta).mean().item()

# ======== 10b. Follow-ups of SDAR: GiGPO and six methods on the same backbone =====================
# SDAR's own term is off in all of them. [D]: our choice where a paper is silent or contradicts
# itself; docs/methods.md says what differs from each paper. Section 10c has what they prepare
# before the scoring and their rows of METHODS.

def by_group(function, groups, *values):
    """function(the values of a group's rows), in these rows, for each group; groups: (B,)."""
    result = torch.zeros_like(values[0])
    for group in groups.unique():
        rows = groups == group
        result[rows] = function(*(v[rows] for v in values))
    return result

def gigpo(b, s, state=None, step_weight=1.0):
    """GiGPO (2505.10978), (B, T): A = R - mean_G R + step_weight (V - mean of V in the same state),
    minus GRPO's penalty; V is the return to go. On Search-QA both are divided by their standard
    deviation, and states are equal from a similarity of 0.9. [D]: the mean of R is over rollouts;
    a success is worth 10 on every benchmark."""
    search = s.env == "search"
    states = shared_states(b.turns, 0.9 if search else 1.0)                             # (B,)
    shared = states.bincount()[states] > 1
    b.log |= {"states": int(states.max()) + 1, "rows_in_shared_states": shared.sum().item(),
              "share_in_shared_states": shared.double().mean().item()}
    value = returns_to_go(b)
    if search:
        step = group_normalized_advantages(value, states) * shared
        return grpo(b, s) + step_weight * step[:, None]
    first = b.number == 0
    reward = 10.0 * (b.reward[first] > 0).double()      # (episodes,), in the order of b.rollout
    values = minus_mean(reward, b.group[first])[b.rollout] + step_weight * minus_mean(value, states)
    values = values - s.invalid_penalty * (~b.valid).double()                           # (B,)
    return values.float()[:, None].expand(b.mask.shape)

def returns_to_go(b, gamma=0.95):
    """V (B,): 10 for a success, times gamma for each turn that still follows."""
    last = by_group(torch.max, b.rollout, b.number)                                     # (B,)
    return 10.0 * (b.reward > 0).double() * gamma ** (last - b.number)

def minus_mean(values, groups):
    """values (N,) minus their group's mean; equal values, or a lone one, give exactly 0."""
    return by_group(lambda v: v - (v.mean() if v.max() > v.min() else v), groups, values)

def shared_states(turns, similarity=1.0):
    """The number (B,) of each turn's state. Turns of a group share it if their observations are
    equal; with similarity < 1, if difflib's ratio of their words is at least this [D]."""
    first = {}                               # {group: {observation: the first one that is like it}}
    numbers = {}                             # {(group, first observation): number}
    for t in turns:
        known = first.setdefault(t.group, {})
        if t.observation not in known:
            like = (x for x in known.values()
                    if similarity < 1 and alike(x, t.observation, similarity))
            known[t.observation] = next(like, t.observation)
        numbers.setdefault((t.group, known[t.observation]), len(numbers))
    return torch.tensor([numbers[t.group, first[t.group][t.observation]] for t in turns])

def alike(text, other, least):
    """Whether difflib's ratio of the two texts' words is at least `least`."""
    m = difflib.SequenceMatcher(None, text.split(), other.split(), False)
    return m.real_quick_ratio() >= least and m.quick_ratio() >= least and m.ratio() >= least

def atod(b, s, state):
    """ATOD (2606.27814), (B, T): A = kappa w (log pi_T - log pi_old) + rho A_GRPO, where kappa =
    max(0.1, 1 - 0.9 p), rho = 1 + p, p = min(step / 80, 1); the first step is 0 [D]. The teacher is
    --teacher-model and reads the plain prompt."""
    p = min(state.step / 80, 1.0)
    w = atod_weights(b.old, b.teacher, b.mask, b.rollout)                               # (B,)
    pull = max(0.1, 1 - 0.9 * p) * w[:, None] * (b.teacher - b.old)
    return pull + (1 + p) * grpo(b, s)

def atod_weights(old, teacher, mask, rollout):
    """w = 1 - (1 - d)(1 - h) of each turn, (B,): d is its mean |log pi_T - log pi_old|, h its mean
    -log pi_old, each scaled to [0, 1] over the turns of its rollout (0.5 if these are equal). A
    turn without tokens is left out and gets 0 [D]."""
    def scaled(values):
        mean = (values.masked_fill(~mask, 0).sum(1) / mask.sum(1))[live]
        low, high = (by_group(f, rollout[live], mean) for f in (torch.amin, torch.amax))
        return torch.where(high - low < 1e-8, 0.5, (mean - low) / (high - low))

    live = mask.any(1)                                                                  # (B,)
    w = torch.zeros_like(old[:, 0])
    w[live] = 1 - (1 - scaled((old - teacher).abs())) * (1 - scaled(-old))
    return w

# of decisive progress, useful exploration, no progress, regression; without a role 0
ROLE_VALUES = {"D": 1.0, "E": 0.5, "N": -0.1, "R": -0.5}

def triage(b, s, state=None, lam=None, whiten=True):
    """TRIAGE (2606.32017), (B, T): A_GRPO + lam c[role], whitened over the turns of the step; c is
    ROLE_VALUES, lam 0.2, on Search-QA 0.4. [D]: population standard deviation, eps 1e-6."""
    lam = (0.4 if s.env == "search" else 0.2) if lam is None else lam
    c = torch.tensor([ROLE_VALUES.get(t.role, 0.0) for t in b.turns])                   # (B,)
    a = grpo(b, s)[:, 0] + lam * c
    if whiten:
        spread = a.std(correction=0) if a.max() > a.min() else math.inf
        a = (a - a.mean()) / (spread + 1e-6)
    return a[:, None].expand(b.mask.shape)

def sgcd(b, s, state=None, gamma=1.0):
    """SGCD (2606.12634), (B, T): A_GRPO * W, where W from 1 to 2 is larger on tokens about which a
    teacher that has read the siblings' attempts confidently disagrees. [D]: in groups that are not
    mixed W = 1."""
    w = sgcd_weights(b.extra["divergence"], b.extra["teacher_entropy"], b.mask, gamma)
    b.log["sgcd_weight"] = w[b.mask].mean().item()
    return grpo(b, s) * w

def sgcd_weights(d, h, mask, gamma=1.0):
    """W = clip(1 + gamma s, 1, 2), (B, T). s is d scaled to (d - min) / (max - min + 0.1) over the
    turn's response [D], except that the tokens of a segment share the s of its first one. A segment
    starts where s > 0.15 and lasts while the teacher's entropy h is at most 1.5 times that of its
    start, for at most a fifth of the response (rounded down, at least one token [D]); the token
    that ends it may start the next [D]."""
    low = d.masked_fill(~mask, math.inf).amin(1, True)                                  # (B, 1)
    high = d.masked_fill(~mask, -math.inf).amax(1, True)
    w = torch.ones_like(d)
    for i, n in enumerate(mask.sum(1).tolist()):
        s = ((d[i] - low[i]) / (high[i] - low[i] + 0.1)).tolist()
        entropy = h[i].tolist()
        start = 0
        for t in range(n):
            lasts = t - start < max(1, n // 5) and entropy[t] <= 1.5 * entropy[start]
            if not (s[start] > 0.15 and lasts):
                start = t
            w[i, t] = 1 + gamma * s[start]
    return w.clamp(1, 2)

def disagreement(p, q, token, k=100):
    """(KL(pi || pi_T), entropy of pi_T), in nats, (n, 2), of log-probabilities (n, V), over the
    teacher's k likeliest words, the sampled token (n,) and one bucket for all others."""
    kept = torch.zeros_like(q, dtype=torch.bool)
    kept.scatter_(1, q.topk(min(k, q.shape[1])).indices, True).scatter_(1, token[:, None], True)

    def grouped(x):
        rest = x.masked_fill(kept, -math.inf).logsumexp(1, True)
        return torch.cat([x.masked_fill(~kept, -math.inf), rest], 1)

    p = grouped(p)
    q = grouped(q)
    terms = (p.exp() * (p - q), -q.exp() * q)          # NaN where a word is in the bucket
    return torch.stack([x.nan_to_num(0).sum(1) for x in terms], 1)

def craft(b, s, state):
    """CRAFT (2606.29476): GRPO's advantages, (B, T), and in b.extra each token's credit c, lambda =
    0.005 + 0.015 E and mu = 0.005 + 0.015 (1 - E). E, in state.memory, is 0.5 for ten steps, then
    E <- 0.95 E + 0.05 (share of tokens with |c| > 0.1). [D]: siblings are turns with the same
    number; gaps are the rollout policy's; c ignores the penalty of malformed turns."""
    a = grpo(b, replace(s, invalid_penalty=0.0))[:, 0]                                  # (B,)
    gap = (b.teacher - b.old).masked_fill(~b.mask, 0)
    place = torch.stack([b.group, b.number], 1).unique(dim=0, return_inverse=True)[1]   # (B,)
    credit = by_group(lambda *rows: craft_credit(*rows, s.craft_sign), place, gap, b.mask, a)
    rate = state.memory.get("craft_rate", 0.5)
    share = (credit.abs() > 0.1)[b.mask].double().mean().item()
    state.memory["craft_rate"] = rate if state.step < 10 else 0.95 * rate + 0.05 * share
    weights = {"lambda": 0.005 + 0.015 * rate, "mu": 0.005 + 0.015 * (1 - rate)}
    b.extra |= {name: torch.full_like(gap, x) for name, x in weights.items()} | {"credit": credit}
    b.log |= {f"craft_{name}": x for name, x in weights.items()} | {"craft_share": share}
    return grpo(b, s)

def craft_credit(gap, live, advantages, sign="paper"):
    """c = sign(x) (2 sigmoid(5 |x|) - 1), (G, T), of G siblings: x_i = sum_j w_j A_j - A_i over the
    others, w = softmax of their gaps D (G, T). live (G, T): there is a token. Where fewer than two
    are live x is A_i D_i (paper) or 0 (loo)."""
    own = torch.eye(len(gap), dtype=torch.bool)[:, :, None]
    logits = gap.masked_fill(~live, -math.inf)[None].masked_fill(own, -math.inf)        # (G, G, T)
    w = logits.softmax(1).nan_to_num(0)                # NaN: no other one is live
    # the difference first: equal advantages give exactly 0, whatever w rounds to
    x = (w * (advantages - advantages[:, None])[:, :, None]).sum(1)                     # (G, T)
    alone = advantages[:, None] * gap if sign == "paper" else 0 * gap
    x = torch.where(live.sum(0) < 2, alone, x) * live
    return x.sign() * (2 * torch.sigmoid(5 * x.abs()) - 1)

def craft_term(b, s, p1=True, p2=True, p3=True):
    """-lambda c log pi + mu KL, (B, T), where the KL is x = log pi - log pi_ref for c > 0, -x for
    c < 0, k3 for c = 0. --craft-sign loo, a repair that is not CRAFT (docs/gate.md): +lambda [D].
    Without p1, SDAR's term for the credit; p2, both weights 0.01; p3, k3; all three, SDAR."""
    c, lam, mu = (b.extra[name] for name in ("credit", "lambda", "mu"))
    if not p2:
        lam = mu = 0.01
    k3 = k3_kl(b.logp, b.ref)
    signed = torch.where(c == 0, k3, c.sign() * (b.logp - b.ref)) if p3 else k3
    credit = (1 if s.craft_sign == "loo" else -1) * lam * c * b.logp if p1 else sdar(b, s)
    return credit + mu * signed if p2 or p3 else credit

def ucob_pairs(state, episodes, s, targets="code"):
    """UCOB (2606.29502, its CBSD part): pairs of turns in one state, as turns to score. Half of a
    group acts with the skill. In a state the turn with the largest return to go V wins, its targets
    are the two with the smallest V, more than 0.05 below ("paper": only those that acted in the
    other view). The student reads the target's prompt in the view that the winner did not have, the
    teacher the winner's own. The skills stay as they are: ucob_cbsd_fixed_bank."""
    turns = [t for e in episodes for t in e.turns]
    values = returns_to_go(batch_of(turns)).tolist()
    states = {}
    for t, value, number in zip(turns, values, shared_states(turns).tolist()):
        if t.valid and t.response_ids:
            states.setdefault(number, []).append((value, t))
    rows = []
    for members in states.values():
        best, winner = max(members, key=lambda x: x[0])              # ties: the first
        emphasis = 1.0 + action_tokens(state.policy, winner)                            # (T,)
        worse = sorted((x for x in members if best - x[0] > 0.05), key=lambda x: x[0])
        if targets == "paper":
            worse = [(v, t) for v, t in worse if (t.rollout - winner.rollout) % 2]
        for v, t in worse[:2]:
            same_view = (t.rollout - winner.rollout) % 2 == 0
            row = Turn(t.other_ids if same_view else t.prompt_ids, winner.response_ids,
                       winner.prompt_ids, teacher_logp=winner.old_logp)
            row.extra["scale"] = min((best - v) / 0.2, 2.0) * emphasis                  # w_j
            rows.append(row)
    for row in rows:
        row.weight = 0.1 * optimizer_steps(turns, s) / sum(len(x.response_ids) for x in rows)
    return rows

def ucob_term(b, s):
    """g w_j KL(q' || p') on the winner's response, (B, T), g = sigmoid(5 (log q - log p)), w_j =
    min((V_b - V_j) / 0.2, 2), twice that in its action. [D]: g takes log q from the policy that
    sampled, which differs from q after the first mini-batch."""
    return sdar_gate(b.logp, b.teacher, 5.0) * b.extra["scale"] * b.compare(top_kl)

def top_kl(p, q, k=32):
    """KL(q' || p') in nats (n,) of log-probabilities (n, V), both renormalised on q's top k."""
    q, top = q.topk(min(k, q.shape[1]))
    return kl(q.log_softmax(-1), p.gather(1, top).log_softmax(-1))

def paw(b, s, state, alpha=0.75):
    """PaW (2606.02388): GRPO's advantages, (B, T), and b.extra["world"], each turn's weight in the
    world loss: 1 - the group's success rate, shared by its turns in S; mean over groups. S: of the
    turns with a next observation the share alpha, rounded up [D], whose actions have the highest
    mean entropy, over the whole vocabulary [D]."""
    action = b.extra["action"] & b.mask
    mean = b.extra["entropy"].masked_fill(~action, 0).sum(1) / action.sum(1).clamp(min=1)
    pool = torch.tensor([bool(t.after) for t in b.turns])                               # (B,)
    order = mean.masked_fill(~pool, -math.inf).argsort(descending=True, stable=True)
    chosen = order[:math.ceil(alpha * int(pool.sum()))]                                 # (S,)
    first = b.number == 0
    won = by_group(torch.mean, b.group[first], (b.reward[first] > 0).double())[b.rollout]
    weight = (1 - won[chosen]) / b.group[chosen].bincount()[b.group[chosen]]
    weight = weight / len(b.group.unique()) * optimizer_steps(b.turns, s)
    b.extra["world"] = torch.zeros(b.mask.shape)
    b.extra["world"][chosen] = weight.float()[:, None]
    b.log["world_turns"] = len(chosen)
    return grpo(b, s)

def paw_loss(b, rho=0.2):
    """The world loss of a micro-batch: sum over turns of weight * (1/n) sum_i [p_i <= rho] (1 -
    p_i) over the n tokens of the next observation. The indicator has no gradient."""
    p = b.after.exp()                                  # 1 where there is no such token
    n = torch.tensor([max(len(t.after), 1) for t in b.turns], device=p.device)
    rows = ((p.detach() <= rho) * (1 - p)).sum(1) / n                                   # (B,)
    return (b.extra["world"][:, 0] * rows).sum()

# ======== 10c. What the follow-ups prepare before the scoring, and their rows of METHODS ==========

def load_teacher(policy, s):
    """ATOD's frozen --teacher-model, None without one. UserError if its tokenizer is another."""
    if not s.teacher_model:
        if s.algo == "atod":
            print("no --teacher-model: the model itself with the skill teaches (atod_self), which "
                  "is not the paper's ATOD", flush=True)
        return None
    if s.teacher_model == "tiny":
        raise UserError("--teacher-model tiny would be random; give the folder of a trained run")
    teacher = load_policy(s.teacher_model, s.device)
    if teacher.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise UserError(f"--teacher-model {s.teacher_model} has another tokenizer than {s.model}; "
                        "take a larger model of the same family")
    return teacher.model.requires_grad_(False)

def add_roles(state, env, episodes, s):
    """Method.prepare of TRIAGE: sets turn.role, by --judge or roles_by_rule; N where no reply of
    the judge names one, counted in the log."""
    turns = [t for e in episodes for t in e.turns]
    if s.judge:
        texts = [JUDGE_PROMPT + as_text(e, t) for e in episodes for t in e.turns]
        roles = ask(s.judge, texts, read_role)
    else:
        roles = [role for e in episodes for role in roles_by_rule(e)]
    for t, role in zip(turns, roles):
        t.role = role or "N"
    shares = {f"share_role_{x}": sum(t.role == x for t in turns) / len(turns) for x in ROLE_VALUES}
    return shares | ({"judge_failures": roles.count(None)} if s.judge else {})

def steps_of(episode):
    """[(turn, what the agent saw after it)]"""
    after = [t.observation for t in episode.turns[1:]]
    return list(zip(episode.turns, [*after, episode.session.observation]))

# actions of ALFWorld and WebShop that change the state: what is held, heated, chosen or bought
CHANGES = re.compile(r"(take|put|move|heat|cool|clean|use|slice|open) |click\[(?!(b0\w{8}|next >|"
                     r"< prev|back to search|description|features|reviews|attributes)\])")

def roles_by_rule(episode):
    """A role per turn by rule, which is not TRIAGE's judge [D]. R: action and result repeat since
    the last D, or a second invalid turn in a row. N: invalid. D: a change of state, or the last
    turn of an episode with a score (it sees the outcome). E: a new observation. Else N."""
    roles = []
    shown = {episode.turns[0].observation}
    repeated = set()
    invalid = False
    for t, result in steps_of(episode):
        again = invalid
        invalid = not (t.valid and t.admissible)
        scores = t is episode.turns[-1] and episode.session.score > 0
        if (t.action, result) in repeated or (invalid and again):
            roles.append("R")
        elif invalid:
            roles.append("N")
        elif scores or CHANGES.match(t.action):
            roles.append("D")
            repeated = set()
        else:
            roles.append("N" if result in shown else "E")
        repeated.add((t.action, result))
        shown.add(result)
    return roles

JUDGE_PROMPT = """\
Judge one step of an agent. You are not told whether it succeeded in the end.
Roles: D decisive progress, E useful exploration, N no progress, R regression.
Rules: a first inspection is E, a repeated one without change R. An invalid action is N, a \
repeated invalid one R. The right take, place, heat, cool or buy is D. Choosing an attribute again \
is R. A harmless repetition after completion is N, walking past empty places too. A wrong object \
or product is R.
Answer with JSON only: {"role": "D", "E", "N" or "R", "evidence": "a quotation from below"}
"""

def as_text(episode, judged=None, window=5):
    """The task and all turns with the outcome, or without it the turns around the judged one."""
    lines = ["Task: " + envs.one_line(episode.session.task, 600)]
    if judged is None:
        lines.append(f"Attempt that {'succeeded' if episode.reward else 'failed'}:")
    for t, result in steps_of(episode):
        if judged is None or abs(t.number - judged.number) <= window:
            mark = "THE STEP TO JUDGE" if t is judged else "step"
            seen = envs.one_line(result, 600 if judged else 200)
            lines.append(f"{mark} {t.number + 1}: action {envs.one_line(t.action)!r}, "
                         f"result {seen!r}")
    return "\n".join(lines)

def read_role(reply):
    """The role in a judge's reply, None if it names none or quotes no evidence."""
    answer = json.loads(re.findall(r"\{[^{}]*\}", reply)[-1])
    known = answer["role"] in ROLE_VALUES and isinstance(answer["evidence"], str)
    return answer["role"] if known else None

DIGEST_PROMPT = """\
Several attempts at one task follow. Write advice for another attempt, in at most 150 words: \
checks that the successes made, branches to take again, branches that failed and why, where they \
part.
"""

def add_references(state, env, episodes, s):
    """Method.prepare of SGCD: in mixed groups, where some won and some did not, the teacher reads
    a reference before the turn's own prompt, by --judge or sibling_reference_plain. Sets
    turn.extra["divergence"] and ["teacher_entropy"], 0 where there is no reference."""
    names = ("divergence", "teacher_entropy")
    for t in [t for e in episodes for t in e.turns]:
        t.extra = dict.fromkeys(names, torch.zeros(len(t.response_ids)))
    groups = [episodes[i:i + s.group_size] for i in range(0, len(episodes), s.group_size)]
    mixed = [group for group in groups if len({bool(e.reward) for e in group}) == 2]
    metrics = {"mixed_groups": len(mixed)}
    siblings = [[x for x in group if x is not e] for group in mixed for e in group]
    references = list(map(sibling_reference_plain, siblings))
    if s.judge:
        texts = [DIGEST_PROMPT + "\n".join(map(as_text, others)) for others in siblings]
        digests = ask(s.judge, [text[:50_000] for text in texts], lambda reply:
                      reply.rpartition("</think>")[2].strip()[:2000] or None)
        references = [digest or plain for digest, plain in zip(digests, references)]
        metrics["judge_failures"] = digests.count(None)
    taught = [e for group in mixed for e in group]
    for e, reference in zip(taught, references):
        for t in e.turns:
            t.other_ids = with_reference(state.policy, t.prompt_ids, reference, s)
    compare_prompts(state.policy, [t for e in taught for t in e.turns], s, disagreement, names)
    return metrics

def sibling_reference_plain(siblings):
    """A reference without a language model, which is not SGCD's [D]: the actions of the shortest
    success and of the longest failure among the siblings, never the rollout's own."""
    won = min((e.turns for e in siblings if e.reward), key=len, default=())
    lost = max((e.turns for e in siblings if not e.reward), key=len, default=())
    return "\n".join(f"Another attempt that {how}: " + " > ".join(
        envs.one_line(t.action) for t in turns)
        for how, turns in (("succeeded", won), ("failed", lost)) if turns)

def with_reference(policy, prompt_ids, text, s):
    """prompt_ids with the text at the start of the user message, cut where --max-teacher-prompt is
    reached. The other ids stay as they are."""
    before = render_chat(policy.tokenizer, "Hello").rpartition("Hello")[0]
    texts = [before, *without_special_tokens(policy.tokenizer, [text + "\n\n"])]
    start, ids = policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
    n = len(os.path.commonprefix([start, prompt_ids]))
    room = max(0, s.max_teacher_prompt - len(prompt_ids))
    return prompt_ids[:n] + ids[:room] + prompt_ids[n:]

def add_next_observations(state, env, episodes, s):
    """Method.prepare of PaW: after its response each turn reads the bare next observation, at most
    --max-response tokens of it [D]; the last one reads none. extra["action"] marks its action."""
    tokenizer = state.policy.tokenizer
    for e in episodes:
        texts = without_special_tokens(tokenizer, [t.observation for t in e.turns])
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for t, ids in zip(e.turns, encoded[1:]):
            t.after = ids[:s.max_response]
        for t in e.turns:
            t.extra["action"] = action_tokens(state.policy, t)

def action_tokens(policy, turn):
    """(T,) bool: the response's tokens inside the tags of its action; all if it has none [D]."""
    pieces = policy.tokenizer.batch_decode([[i] for i in turn.response_ids])
    found = re.search(r"<(action|search|answer)>(.+?)</\1>", "".join(pieces), re.I | re.S)
    start, end = found.span(2) if found else (-1, math.inf)
    lengths = torch.tensor([len(piece) for piece in pieces])                            # (T,)
    ends = lengths.cumsum(0)
    return (ends > start) & (ends - lengths < end)

def ask(url, texts, read, seconds=300.0):
    """[read(reply)] of an OpenAI-compatible chat server, URL[#MODEL], to each text, at temperature
    0, 16 at a time; None if four replies cannot be read. UserError if the server fails, or takes
    longer than `seconds`. A reply is data: of at most 1 MiB the last 20,000 characters are read."""
    base, _, model = url.partition("#")
    address = base.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"

    def content(reply):
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            return read(json.loads(reply[:1 << 20])["choices"][0]["message"]["content"][-20_000:])

    def one(text):
        messages = [{"role": "user", "content": text}]
        body = {"model": model or "default", "temperature": 0, "messages": messages}
        return envs.post_json("--judge", address, body, content, seconds, retries=3, total=seconds)

    with ThreadPoolExecutor(16) as pool:               # an error cancels what has not begun
        return list(pool.map(one, texts))

METHODS |= {
    "gigpo": Method(advantages=gigpo),
    "atod": Method("teacher old", atod, uses="teacher_model retrieval"),
    "triage": Method(advantages=triage, prepare=add_roles, uses="judge"),
    "sgcd": Method(advantages=sgcd, prepare=add_references, uses="judge"),
    "craft": Method("teacher reference old", craft, craft_term, uses="craft_sign retrieval"),
    "ucob": Method("views old", gigpo, acts="half", rows=ucob_pairs, row_term=ucob_term,
                   uses="retrieval"),
    "paw": Method("old uncertainty", paw, prepare=add_next_observations, after_loss=paw_loss),
}

# ======== 11. Prompts, tasks and skills in detail =================================================
DAY = datetime.datetime(2026, 1, 1)     # "today" in every chat template: a resume sees the same
TODAY = "{%% macro strftime_now(day) %%}{{ day%s }}{%% endmacro %%}" % "".join(
    f"|replace('{x}', '{DAY.strftime(x)}')"
    for x in "%-d %-m %a %A %b %B %d %H %m %M %S %y %Y".split())

def render_chat(tokenizer, text, answer=None, begun=True):
    """The chat template around one user message, with thinking switched off where it can be; with
    an answer, around both. begun: with the beginning of the answer."""
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(
        chat if answer else chat[:1], chat_template=TODAY + tokenizer.get_chat_template(),
        tokenize=False, add_generation_prompt=begun and not answer, enable_thinking=False)

TAG = re.compile("</?(think|action|search|answer|information)>")     # of the environments

def special_tokens(tokenizer):
    """{text: id} of the tokens that structure a chat: those called special, but for the tags of the
    environments, and those in <> or [] that the template writes."""
    written = re.findall(r"<[^\s<>]+>|\[[^\s\[\]]+\]", str(tokenizer.chat_template))
    found = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()
             if token.special or token.content in written}
    found |= zip(tokenizer.all_special_tokens, tokenizer.all_special_ids)
    return {text: i for text, i in found.items() if not TAG.fullmatch(text)}

def response_text(policy, ids):
    """The text of a response, without end and padding tokens."""
    return policy.tokenizer.decode([i for i in ids if i not in policy.special_ids])

def without_special_tokens(tokenizer, texts):
    """The texts without special tokens that stand there as text and would end the message."""
    special = sorted(special_tokens(tokenizer), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, special)) or "(?!)")
    result = []
    for text in map(envs.encodable, texts):
        while (shorter := pattern.sub("", text)) != text:  # what was removed may have split another
            text = shorter
        result.append(text)
    return result

def fitting(policy, session, s, skill, ids):
    """(ids, False) of a prompt within its budget, else (ids of a shorter one, True)."""
    name = "max_teacher_prompt" if skill else "max_prompt"
    budget = getattr(s, name)
    over = len(ids) > budget
    history = min(s.history, len(session.turns))
    room = None                                        # characters of an observation, None: all
    while len(ids) > budget:
        if room == 0:
            raise UserError(f"a prompt of {len(ids)} tokens cannot be shortened to {budget}; "
                            f"raise {flag(name)}")
        if history:
            history -= 1
        else:
            room = (len(session.observation) if room is None else room) * 3 // 4
        text = session.prompt(skill, history, room, brief=s.prompt_style == "brief")
        ids = encode_chats(policy.tokenizer, [text])[0]
    return ids, over

def complete_turn(episode, ids, logps, text, end_ids, stop):
    """Fill in the episode's last turn, which the session has just played."""
    x = episode.session
    closed = ids[-1] in end_ids or any(tag in text for tag in stop)
    episode.turns[-1] = replace(episode.turns[-1], response_ids=ids, text=text, action=x.action,
                                valid=x.valid, admissible=x.admissible, cut=not closed,
                                old_logp=None if logps is None else torch.tensor(logps))

def with_rewards(episodes, s):
    """The episodes, their rewards and their turns' set; one cut off at the limit has not won."""
    for e in episodes:
        e.reward = SUCCESS_REWARD.get(s.env, 1.0) * bool(e.session.won)
        for turn in e.turns:
            turn.reward = e.reward
    return episodes

def seed_for(s, *where):
    """The seed of one random stream of the run, e.g. seed_for(s, "rollout", step)."""
    return int.from_bytes(hashlib.sha256(repr((s.seed, *where)).encode()).digest()[:7], "big")

def generator_for(policy, s, *where):
    """A torch generator on the policy's device for one random stream."""
    return torch.Generator(policy.device).manual_seed(seed_for(s, *where))

def draw_tasks(env, s, cursor, count):
    """`count` training tasks from position `cursor` of an endless sequence of shuffled epochs."""
    ids = env.tasks(env.splits[0])
    drawn = []
    while len(drawn) < count:
        epoch, start = divmod(cursor + len(drawn), len(ids))
        order = ids[:]
        random.Random(seed_for(s, "epoch", epoch)).shuffle(order)
        drawn += order[start:start + count - len(drawn)]
    return drawn

def choose_skills(env, tasks, s, state):
    """(name, text) of a skill per task, by the category of the task alone. ucb: the highest mean
    success + sqrt(ln N / n) within the category, untried skills first."""
    draw = random.Random(seed_for(s, "retrieval", state.step))
    tried = copy.deepcopy(state.bandit)               # {category: {skill: [n, successes]}}
    chosen = []
    compare = s.gap == "contrast" or (s.control_every and state.step % s.control_every == 0)
    for task in tasks:
        category = env.start(task).category
        names = {"km": category, "full": "full", "random": draw.choice(env.skill_names)}
        if s.retrieval == "ucb":
            arms = tried.setdefault(category, {})
            log_n = math.log(max(1, sum(n for n, _ in arms.values())))
            bound = {name: won / n + math.sqrt(log_n / n) for name, (n, won) in arms.items()}
            names["ucb"] = max(env.skill_names, key=lambda name: bound.get(name, math.inf))
            arms.setdefault(names["ucb"], [0, 0.0])[0] += 1
        name = names[s.retrieval]
        text = env.all_skills() if name == "full" else env.skill(name, s.prompt_style == "brief")
        if not text:
            raise UserError(f"the skill {name} is empty: there would be no teacher; check --skills")
        control = [control_skill(env, state.policy.tokenizer, name, s)] if compare else []
        chosen.append((name, text, *control))
    return chosen

def control_skill(env, tokenizer, name, s):
    """The text of another skill than `name`, the one nearest to it in tokens."""
    own, *others = [env.skill(n, s.prompt_style == "brief")
                    for n in sorted(env.skill_names, key=lambda n: n != name)]
    others = [text for text in others if text != own]       # a library may repeat a text
    lengths = [len(ids) for ids in tokenizer([own, *others])["input_ids"]]
    return min(zip(lengths[1:], others), key=lambda pair: abs(pair[0] - lengths[0]))[1]

def control_prompts(policy, episode, s):
    """Token ids of the current prompt with each of the episode's controls in the skill's place."""
    return [prompts(policy, [episode.session], s, [text])[0][0] for text in episode.controls]

def score_controls(model, turns, s, lap=lambda *args: None):
    """Set turn.extra["control"], "control1" ...: the log-probabilities under turn.control_ids, if
    it has any."""
    for i in range(len(turns[0].control_ids)):
        rows = [replace(t, prompt_ids=t.control_ids[i]) for t in turns]
        score_turns(model, rows, "prompt_ids", "teacher_logp", s, "control")
        for turn, row in zip(turns, rows):
            turn.extra[f"control{i or ''}"] = row.teacher_logp
        lap("control", rows)

def count_skills(bandit, episodes, s):
    """Count in the bandit's table how the skills of a step did."""
    for i, e in enumerate(episodes if s.retrieval == "ucb" else ()):
        arm = bandit.setdefault(e.session.category, {}).setdefault(e.skill, [0, 0.0])
        arm[0] += i % s.group_size == 0
        arm[1] += bool(e.session.won) / s.group_size

# ======== 12. Generation ==========================================================================
# Greedy output equals transformers' model.generate. That copies its cache for every token and pads
# the rows that have ended; here keys and values lie in fixed buffers and ended rows leave.

STEPS_PER_LOOK = {"cuda": 8}  # decode steps before sampled tokens are read: reading waits for a GPU
REFILL_AT = {"cuda": 0.2}     # share of rows that must have ended before others take their places;
                              # on a CPU all, because a step's cost is proportional to its rows

@dataclass
class Row:
    """A sequence that `generate` is working on."""
    prompt: int      # key of the prompt that it answers
    limit: int       # most tokens of its response
    slot: int        # position of its next token
    ids: list = field(default_factory=list)
    logps: list = field(default_factory=list)    # of ids
    ended: bool = False

@torch.no_grad()
def generate(policy, waiting, s, temperature, stop, generator, limits=None, logps=None):
    """Generator over the responses to waiting, {key: prompt ids}, which it empties: yields {key:
    response ids} of those that have ended. The caller may put further prompts into `waiting` before
    it asks for more, so an episode need not wait for the others' turns. A response ends with EOS,
    a closing tag of `stop`, or at limits[key] tokens (default: s.max_response). On a CPU in fp32
    decoding computes what scoring would: the dict logps gets {key: their log-probabilities}."""
    if policy.plain:
        yield from plain_generate(policy, waiting, s, temperature, stop, generator, limits)
        return
    look = STEPS_PER_LOOK.get(policy.device.type, 1)
    refill = REFILL_AT.get(policy.device.type, 1)
    exact = logps is not None and policy.device.type == "cpu" and temperature == s.temperature
    exact = exact and policy.model.dtype == torch.float32
    rows = []
    done = {}
    while True:
        live = [j for j, row in enumerate(rows) if not row.ended]
        enough = len(rows) - len(live) >= refill * len(rows)          # have ended
        batch = []
        drawn = ()
        if live:
            coming = (len(waiting) + len(done)) * (refill < 1)        # will take ended rows' places
            if len(live) + coming <= 0.8 * len(rows):                 # else copying costs more
                policy.cache.compact(live, max(row.slot for row in rows))
                rows = [rows[j] for j in live]
            batch = rows[:]
            drawn = decode(policy, rows, look, temperature, generator)
        if enough and done and not waiting:                           # meanwhile a GPU is decoding
            yield {key: done[key] for key in sorted(done)}
            done = {}
        fresh = []
        if enough:
            fresh = admit(policy, rows, waiting, s, temperature, generator, limits, look)
        for row, *sampled in [*zip(batch, *(x.tolist() for x in drawn)), *fresh]:
            if not row.ended and extend(policy, row, *sampled, stop):
                done[row.prompt] = row.ids
                if exact:
                    logps[row.prompt] = row.logps
        if not rows:
            return

def extend(policy, row, values, logps, stop):
    """Append sampled tokens up to the end of the row's response. Returns whether it has ended."""
    for value, logp in zip(values, logps):
        row.ids.append(value)
        row.logps.append(logp)
        closed = value in policy.closing_ids and any(
            tag in policy.tokenizer.decode(row.ids[-16:]) for tag in stop)
        if closed or value in policy.end_ids or len(row.ids) == row.limit:
            row.ended = True
            break
    return row.ended

def sample(logits, temperature, generator):
    """(token id, its log-probability), (n,) each, from logits (n, V), by inverting the cumulative
    distribution in float64: in float32 a sum over 152k probabilities swallows the rare ones
    (Apple's GPUs have no float64). Unlike multinomial it draws one number a row and never waits for
    the device."""
    if temperature == 0:
        token = logits.argmax(-1)                                                       # (n,)
        return token, torch.zeros_like(token)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    logits = logits if temperature == 1 else logits.float() / temperature
    p = torch.softmax(logits, -1, dtype=torch.float32)                                  # (n, V)
    upto = p.cumsum(-1, dtype=exact)
    uniform = torch.rand(len(upto), 1, dtype=exact, device=upto.device, generator=generator)
    token = torch.searchsorted(upto, upto[:, -1:] * uniform, right=True)                # (n, 1)
    token.clamp_(max=logits.shape[1] - 1)
    return token[:, 0], p.gather(1, token)[:, 0].log()

def decode(policy, rows, look, temperature, generator):
    """The next tokens of these rows and their log-probabilities, (n, steps <= look) each; a GPU may
    still be working on them when this returns. An ended row keeps stepping, in slot 0, where its
    attention is cheapest."""
    kv = policy.cache
    for j, row in enumerate(rows):
        if row.ended and row.slot > look:
            row.slot = 0
            kv.slot[j].zero_()
    drawn = []
    for _ in range(min(look, max(row.limit - len(row.ids) for row in rows if not row.ended))):
        logits = fast_step(policy, kv, len(rows), 1 + max(row.slot for row in rows))
        kv.slot[:len(rows)] += 1
        drawn.append(sample(logits, temperature, generator))                       # (n,) each
        kv.token[:len(rows)] = drawn[-1][0]
        for row in rows:
            row.slot += 1
    return [torch.stack(values, 1) for values in zip(*drawn)]

def admit(policy, rows, waiting, s, temperature, generator, limits, look):
    """Take prompts out of `waiting`, short ones first, read them in the places of ended rows or in
    new ones, s.rollout_rows at most, and sample their first tokens -> [(row, [token], [its
    log-probability])]. On a GPU this queues up behind the decode steps. A prompt too long for the
    cache waits for a new one."""
    limits = limits or dict.fromkeys(waiting, s.max_response)
    chosen = sorted(waiting, key=lambda key: len(waiting[key]))
    if all(row.ended for row in rows):
        rows.clear()
        chosen = chosen[:s.rollout_rows]
        longest = max((len(waiting[key]) + limits[key] for key in chosen), default=0) + look
        if policy.cache is None or policy.cache.rows < len(chosen) or policy.cache.length < longest:
            policy.cache = None                       # frees the old one first
            policy.cache = KeyValues(len(chosen), -(-longest // 256) * 256, policy.device)
    kv = policy.cache
    places = [j for j, row in enumerate(rows) if row.ended]
    places += range(len(rows), min(s.rollout_rows, kv.rows))
    chosen = [key for key in chosen if len(waiting[key]) + limits[key] + look <= kv.length]
    if not places or not chosen:
        return []
    fresh = []
    for place, key in zip(places, chosen):
        fresh.append(Row(key, limits[key], len(waiting[key])))
        rows[place:place + 1] = [fresh[-1]]
    places = places[:len(fresh)]
    prompts = [waiting.pop(row.prompt) for row in fresh]
    token, logp = sample(prefill(policy, prompts, places, s), temperature, generator)   # (n,)
    where = to_device(places, policy.device)
    kv.slot[where] = to_device([len(p) for p in prompts], policy.device)
    kv.token[where] = token
    return [(row, [first], [x]) for row, first, x in zip(fresh, token.tolist(), logp.tolist())]

class KeyValues:
    """Keys and values of a batch in buffers of fixed size: token t of row i is in slot t. It stands
    in for transformers' cache, which moves with every token, so that no CUDA graph could use it."""

    def __init__(self, rows, length, device):
        self.rows = rows
        self.length = length
        self.layers = []                              # [keys, values], each (rows, H, length, D)
        self.graphs = {}                              # {(n, span): graph of decode_step}
        self.logits = None                            # (rows, V), filled by the graphs
        self.index = torch.arange(rows, device=device)
        self.token = torch.zeros_like(self.index)     # the token that each row reads next ...
        self.slot = torch.zeros_like(self.index)      # ... and its position
        self.n = self.span = 0                        # rows and slots of the current step

    def write_prompts(self, cache, source, rows):
        """Copy prompts from transformers' cache: its row source[i] to our row rows[i] (lists)."""
        source = to_device(source, self.index.device)
        rows = to_device(rows, self.index.device)
        for number, layer in enumerate(cache.layers):
            if number == len(self.layers):            # zeros, because NaN would survive the mask
                shape = (self.rows, layer.keys.shape[1], self.length, layer.keys.shape[3])
                self.layers.append([layer.keys.new_zeros(shape) for _ in ("keys", "values")])
            for mine, new in zip(self.layers[number], (layer.keys, layer.values)):
                mine[rows, :, :new.shape[2]] = new[source]                            # (n, H, L, D)

    def update(self, key, value, number, *args, **kwargs):
        """Called by attention with a token's key and value (n, H, 1, D). Returns all of them."""
        keys, values = (buffer[:self.n] for buffer in self.layers[number])
        keys[self.index[:self.n], :, self.slot[:self.n]] = key[:, :, 0]
        values[self.index[:self.n], :, self.slot[:self.n]] = value[:, :, 0]
        return keys[:, :, :self.span], values[:, :, :self.span]

    def compact(self, rows, span):
        """Move these rows (a list) to the front; slots from `span` on are empty."""
        rows = to_device(rows, self.index.device)
        layers = [buffer[:, :, :span] for layer in self.layers for buffer in layer]
        for buffer in (self.token, self.slot, *layers):
            buffer[:len(rows)] = buffer[rows]

def prefill(policy, prompts, places, s):
    """Read the prompts into these rows of the cache, equal ones once, at most s.micro_tokens at a
    time, padded on the right. Returns the logits (n, V) of the first tokens."""
    from transformers import DynamicCache
    where = {}
    for prompt, place in zip(prompts, places):
        where.setdefault(tuple(prompt), []).append(place)
    hidden = {}
    for batch in within_budget(list(where), len, s.micro_tokens):
        cache = DynamicCache(config=policy.model.config)
        width = len(batch[0])                         # the longest comes first
        ids = to_device([p + (0,) * (width - len(p)) for p in batch], policy.device)    # (U, L)
        last = hidden_states(policy.model, ids, cache)                                  # (U, L, D)
        source = [i for i, p in enumerate(batch) for _ in where[p]]
        policy.cache.write_prompts(cache, source, [place for p in batch for place in where[p]])
        hidden.update((p, last[i, len(p) - 1]) for i, p in enumerate(batch))            # (D,) each
    return policy.head(torch.stack([hidden[tuple(p)] for p in prompts]))

def decode_step(policy, kv, n, span):
    """Logits (n, V) after each of n rows has read kv.token in kv.slot; span > every slot."""
    kv.n = n
    kv.span = span
    unseen = torch.arange(span, device=policy.device) > kv.slot[:n, None]               # (n, span)
    mask = torch.zeros(n, 1, 1, span, dtype=policy.model.dtype, device=policy.device)
    mask.masked_fill_(unseen[:, None, None], -math.inf)  # additive: each layer converts bools
    hidden = hidden_states(policy.model, kv.token[:n, None], kv, position_ids=kv.slot[:n, None],
                           attention_mask=mask)                                         # (n, 1, D)
    return policy.head(hidden[:, -1])

def fast_step(policy, kv, n, span):
    """decode_step; on a GPU as a CUDA graph, one launch instead of hundreds that take longer than
    their work. A graph repeats kernels on fixed addresses, which is safe here: all inputs and the
    logits lie in kv's buffers, the optimizer changes weights in place, and the logits are read
    before the next step. Sizes come in coarse buckets, so that few graphs are made."""
    if policy.device.type != "cuda":
        return decode_step(policy, kv, n, span)
    size = min(-(-n // 16) * 16 if n > 8 else 1 << (n - 1).bit_length(), kv.rows)
    slots = min(-(-span // 256) * 256, kv.length)
    if (size, slots) not in kv.graphs:
        kv.graphs[size, slots] = record_step(policy, kv, size, slots)
    kv.graphs[size, slots].replay()
    return kv.logits[:n]

side_stream = functools.cache(torch.cuda.Stream)      # one, because cuBLAS keeps 32 MiB for each

def record_step(policy, kv, n, span):
    """A CUDA graph of decode_step whose replay fills kv.logits[:n]."""
    side = side_stream(policy.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):                     # first calls set up libraries: not recorded
        logits = decode_step(policy, kv, n, span)
    torch.cuda.current_stream().wait_stream(side)
    if kv.logits is None:                             # shared, because a graph keeps what it makes
        kv.logits = logits.new_zeros(kv.rows, logits.shape[1])
    graph = torch.cuda.CUDAGraph()
    pool = next((other.pool() for other in kv.graphs.values()), None)
    try:
        with torch.cuda.graph(graph, pool=pool):
            kv.logits[:n] = decode_step(policy, kv, n, span)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise UserError(f"no CUDA graph can be made of this model: {first_line(error)}; take "
                        "another model, or --device cpu") from None
    return graph

def plain_generate(policy, waiting, s, temperature, stop, generator, limits):
    """`generate` for models that do not fit it, without policy.pads one prompt at a time, because
    transformers' own batches are wrong for some (RWKV)."""
    size = s.rollout_rows if policy.pads else 1
    while waiting:
        keys = sorted(waiting, key=lambda key: len(waiting[key]))
        rows = [Row(key, (limits or {}).get(key, s.max_response), 0) for key in keys]
        for first in range(0, len(rows), size):
            fill_rows(policy, rows[first:first + size], waiting, temperature, stop, generator)
        waiting.clear()
        yield {row.prompt: row.ids for row in sorted(rows, key=lambda row: row.prompt)}

def fill_rows(policy, rows, prompts, temperature, stop, generator):
    """Let transformers' generate decode rows.ids, with our way to sample and to end a response."""
    def choose(ids, logits):
        token, _ = sample(logits, temperature, generator)                               # (B,)
        return torch.full_like(logits, -math.inf).scatter(1, token[:, None], 0.0)

    def ended(ids, scores, **options):
        for row, token in zip(rows, ids[:, -1].tolist()):
            if not row.ended:
                extend(policy, row, [token], [0.0], stop)
        return to_device([row.ended for row in rows], policy.device)

    run_generate(policy.model, [prompts[row.prompt] for row in rows],
                 max(row.limit for row in rows), logits_processor=[choose],
                 stopping_criteria=[ended])

def run_generate(model, prompts, count, **options):
    """transformers' generate on prompts, padded on the left: the likeliest token, `count` times.
    The model's own generation_config, with its penalties and its ends, plays no part."""
    from transformers import GenerationConfig
    width = max(map(len, prompts))
    ids = to_device([[0] * (width - len(p)) + list(p) for p in prompts], model.device)  # (B, L)
    lengths = to_device([len(p) for p in prompts], model.device)                        # (B,)
    mask = torch.arange(width, device=model.device) >= width - lengths[:, None]         # (B, L)
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        return model.generate(ids, attention_mask=mask.long(), max_new_tokens=count, **options)
    finally:
        model.generation_config = own

# ======== 13. Faster kernels on a GPU =============================================================
def fuse(model):
    """Make every norm, rotary embedding and gated activation of a Llama or Qwen model one kernel
    instead of three to ten. Intermediates are no longer rounded to bf16. Other models stay."""
    if type(model).__name__ not in ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"):
        return
    try:
        compiled(gated)(*torch.ones(2, 2, 16, device=model.device))
    except Exception as error:                        # for example no compiler on this machine
        tqdm.write(f"torch.compile does not work here, so the run is slower: {first_line(error)}")
        return
    torch._dynamo.config.recompile_limit = 64         # about 8 kinds of shapes per function
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(fused_norm, module)
        if type(module).__name__.endswith("MLP") and "SiLU" in type(module.act_fn).__name__:
            module.forward = types.MethodType(fused_mlp, module)
    modeling = sys.modules[type(model).__module__]
    plain = getattr(modeling.apply_rotary_pos_emb, "plain", modeling.apply_rotary_pos_emb)
    def rotary(q, *rest, **options):                  # (q, k, cos, sin)
        return (compiled(plain) if q.is_cuda else plain)(q, *rest, **options)
    rotary.plain = plain
    modeling.apply_rotary_pos_emb = rotary

compiled = functools.cache(torch.compile)

def gated(gate, up):
    """The elementwise part of a gated MLP, (..., F)."""
    return F.silu(gate) * up

def fused_norm(self, x):
    """RMSNorm in one kernel."""
    return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

def fused_mlp(self, x):
    """A gated MLP with one kernel between its matrices."""
    return self.down_proj(compiled(gated)(self.gate_proj(x), self.up_proj(x)))

# ======== 14. Hidden states, the vocabulary head in chunks, padding ===============================
HEAD_CHUNK = 256    # positions whose logits exist at a time: no (B, T, vocabulary) tensor is built

def hidden_states(model, ids, cache=None, **options):
    """Last hidden states (B, L, D) of token ids (B, L). cache: the keys and values so far."""
    use = cache is not None
    return model.base_model(input_ids=ids, cache=cache, use_cache=use, **options).last_hidden_state

def by_chunks(function, *tensors):
    """function(chunks of the tensors) over all rows; the backward pass computes each again."""
    chunks = zip(*(x.split(HEAD_CHUNK) for x in tensors))
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False)
                      for chunk in chunks])

def log_softmax(logits, temperature):
    """Log-probabilities (n, V), at least float32."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)

def chunked_logps(head, hidden, targets, temperature=1.0, with_entropy=False):
    """(log pi(target) (N,), entropy in nats (N,) without gradient, or None) from hidden states
    (N, D), targets (N,), and head, the function (n, D) -> logits (n, V). with_entropy "gradient":
    the entropy has one too."""
    def one(h, target):
        logp = log_softmax(head(h), temperature)                                        # (n, V)
        chosen = logp.gather(1, target[:, None])                                        # (n, 1)
        p = logp if with_entropy == "gradient" else logp.detach()
        return torch.cat([chosen, -(p.exp() * p).sum(-1, True)], 1) if with_entropy else chosen
    logp, *entropy = by_chunks(one, hidden, targets).T                               # (N,) each
    if with_entropy == "gradient":
        return logp, entropy[0]
    return logp, entropy[0].detach() if with_entropy else None

def over_vocabulary(function, head, hidden, taught, temperature=1.0):
    """function(log pi, log pi_T) -> (N,), called on log-probabilities (n, V) of a chunk at a time;
    from hidden states (N, D) of student and teacher. The teacher's side has no gradient."""
    def one(h, t):
        with torch.no_grad():
            q = log_softmax(head(t), temperature)
        return function(log_softmax(head(h), temperature), q)
    return by_chunks(one, hidden, taught.detach())

def compare_views(policy, turns, s, hidden, mask, function):
    """Batch.compare: over_vocabulary of the turns' own prompt and the other view's, (B, T)."""
    responses = [t.response_ids for t in turns]
    with torch.no_grad():
        taught, _, _ = response_hidden(policy.model, [t.other_ids for t in turns], responses)
    return unflatten(over_vocabulary(function, policy.head, hidden, taught, s.temperature), mask)

@torch.no_grad()
def compare_prompts(policy, turns, s, function, names):
    """Set turn.extra[name] to the columns of function(log pi, log pi_T, token) -> (n, len(names)),
    called on (n, V), (n, V) and (n,), of the turns' prompt_ids and other_ids."""
    def one(h, t, token):
        return function(*(log_softmax(policy.head(x), s.temperature) for x in (h, t)), token)
    for batch in micro_batches(turns, s.micro_tokens, "other_ids"):
        responses = [t.response_ids for t in batch]
        hidden, targets, mask = response_hidden(
            policy.model, [t.prompt_ids for t in batch], responses)
        taught, _, _ = response_hidden(policy.model, [t.other_ids for t in batch], responses)
        columns = by_chunks(one, hidden, taught, targets)                               # (N, K)
        for name, column in zip(names, columns.T):
            set_extra(batch, name, unflatten(column, mask))

def unflatten(flat, mask):
    """(N,) values of the tokens in mask (B, T) as (B, T), zeros elsewhere."""
    # not masked_scatter, whose gradient waits for a GPU to count the mask
    places = mask.flatten().int().argsort(descending=True, stable=True)[:len(flat)]     # (N,)
    return flat.new_zeros(mask.numel()).scatter(0, places, flat).view(mask.shape)

def set_rows(turns, name, values):
    """Set turn.<name> to its row of values (B, T), without the padding and on the CPU."""
    for turn, row in zip(turns, values.cpu()):
        setattr(turn, name, row[:len(turn.response_ids)].clone())

def set_extra(turns, name, values):
    """Set turn.extra[name] to its row of values (B, T), without the padding and on the CPU."""
    for turn, row in zip(turns, values.cpu()):
        turn.extra[name] = row[:len(turn.response_ids)].clone()

def optimizer_steps(turns, s):
    """The number of optimizer steps that an update over these turns takes."""
    return -(-len(turns) // (s.mini_batch or len(turns)))

def within_budget(items, size, budget):
    """Lists of at most `budget` tokens when padded, longest first: memory runs out early or not."""
    batches = []
    for item in sorted(items, key=size, reverse=True):
        if batches and (len(batches[-1]) + 1) * size(batches[-1][0]) <= budget:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches

def micro_batches(turns, budget, prompt="prompt_ids"):
    """The turns in micro-batches of at most `budget` tokens, prompts included."""
    def size(turn):
        return len(getattr(turn, prompt)) + len(turn.response_ids) + len(turn.after)
    return within_budget(turns, size, budget)

def to_device(values, device):
    """Numbers (list or tensor) as a tensor on the device, copied without blocking."""
    values = torch.as_tensor(values)
    if torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)

# ======== 15. Models ==============================================================================
@dataclass
class Policy:
    """A causal language model, its tokenizer, and what generation must know about them."""
    model: torch.nn.Module
    tokenizer: object
    end_ids: frozenset        # token ids that end a response (EOS, end of turn)
    closing_ids: frozenset    # token ids with '>' in their text: only these can end a closing tag
    think_closed: bool        # the chat template closes the think block in the prompt (Qwen3)
    opened: str = ""          # "<think>" where the template opens the think block in the prompt
    special_ids: frozenset = frozenset()    # token ids that are no text: end, padding, roles
    cache: object = None      # KeyValues of the last generation, reused by the next
    plain: str = ""           # why transformers' generate decodes instead of section 12, and
    pads: bool = False        # whether it then may decode prompts together

    device = property(lambda self: self.model.device)
    head = property(lambda self: self.model.get_output_embeddings())    # (n, D) -> (n, V)

def pick_device(name):
    """The torch device of --device; UserError if it is not there."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used: {first_line(error)}; give --device cpu, "
                        "or leave it out") from None
    if probe.device.type == "cuda":
        torch.cuda.set_device(probe.device)             # CUDA graphs take the current device
        torch.backends.cuda.enable_cudnn_sdp(False)     # it re-plans per shape; most of ours differ
    return probe.device

def load_policy(name, device="auto", texts=(), seed=233):
    """A Policy, in bf16, on a CPU in fp32. name: Hugging Face model, folder (a run stands for its
    last checkpoint), .gguf file, or `tiny`, which is built from `texts`."""
    from transformers import logging
    logging.set_verbosity_error()
    logging.enable_progress_bar()
    device = pick_device(device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model, tokenizer = build_tiny(texts, seed) if name == "tiny" else read_model(name, dtype)
    logging.disable_progress_bar()      # of saving
    if not tokenizer.chat_template:
        raise UserError(f"{name!r} has no chat template; take an instruction-tuned model")
    for module in model.modules():      # scoring and training must use the same function
        for holder in (module, getattr(module, "config", module)):
            for key, value in list(vars(holder).items()):
                if type(value) is float and ("drop" in key or isinstance(holder, torch.nn.Dropout)):
                    setattr(holder, key, 0.0)
    for p in model.parameters():        # not model.to(dtype): that rounds the rotary frequencies
        # a copy, because memory of a file may be unaligned, which changes the rounding of products
        p.data = p.data.to(dtype, copy=True)
    small = device.type == "cpu" and model.num_parameters() < 1e7
    if small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)        # more threads gain little, and on a busy machine they spin
    model = model.to(device).eval()
    try:
        policy = wrap_policy(model, tokenizer)
        fault = text_fault(policy) or model_fault(policy)
    except Exception as error:          # a model or template that does not fit can fail anywhere
        if out_of_memory(error):
            raise
        fault = f"does not work here ({type(error).__name__}: {first_line(error)})"
    if fault:
        raise UserError(f"{name!r} {fault}; take a Qwen2.5, Qwen3, Llama or SmolLM2 model")
    return policy

def read_model(name, dtype):
    """(model, tokenizer) from a folder, a GGUF file or the hub; UserError if that fails, or if the
    model would start with random or quantised weights."""
    from transformers import AutoModelForCausalLM
    print(f"loading {name}", flush=True)
    path = Path(name)
    folder = path.parent if path.suffix == ".gguf" else last_checkpoint(path) or name
    file = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    if Path(folder, "adapter_config.json").is_file():
        raise UserError(f"{name!r} is an adapter; merge it into its base model (peft's "
                        "merge_and_unload), save that, and give its folder")
    try:
        tokenizer = read_tokenizer(folder, file)
        with contextlib.redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **file)
    except Exception as error:          # a folder or file can be wrong in any way
        if out_of_memory(error):
            raise
        raise UserError(f"cannot load the model {name!r}: {first_line(error)}; check its spelling "
                        "and the connection, or give a folder, a .gguf file, or tiny") from None
    if lost := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise UserError(f"{name!r} lacks weights that would be random ({lost[0]}; {len(lost)} in "
                        "all); take the folder of a whole causal language model")
    if unused := sorted(report["unexpected_keys"]):
        print(f"note: {name!r} holds weights that its config.json does not mention, which are left "
              f"out ({unused[0]}; {len(unused)} in all)", flush=True)
    if file:                            # dequantised: an ordinary model, which may be saved
        model.hf_quantizer = None
        del model.config.quantization_config
    floating = all(p.is_floating_point() for p in model.parameters())
    if hasattr(model.config, "quantization_config") or not floating:
        raise UserError(f"{name!r} is quantised and cannot be trained; take the original weights")
    return model, tokenizer

def read_tokenizer(folder, file):
    """The tokenizer of a folder, GGUF file or hub model. AutoTokenizer may take the model type's
    own instead of the one in tokenizer.json, and so give other ids."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import cached_file
    if Path(folder, "state.json").is_file():            # ours: no tokenizer without its settings
        Path(folder, "tokenizer_config.json").read_text("utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder, **file)
    own = None if file else cached_file(folder, "tokenizer.json",
                                        _raise_exceptions_for_missing_entries=False)
    sample = "step 12\n\n It's 3,400 \u00c9 <action>go\tto X2</action>\r\n"
    ids = tokenizer(sample, add_special_tokens=False)["input_ids"]
    if own and ids != Tokenizer.from_file(own).encode(sample, add_special_tokens=False).ids:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)   # not the model type's
    bpe = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(bpe, "dropout", None):
        bpe.dropout = None              # of merges, at random
    return tokenizer

def wrap_policy(model, tokenizer):
    """A Policy of a loaded model and tokenizer."""
    if model.device.type == "cuda":
        fuse(model)
    end = model.generation_config.eos_token_id
    end = set(end if isinstance(end, list) else [end]) | {tokenizer.eos_token_id}
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    closing = frozenset(i for i, piece in enumerate(pieces) if piece and ">" in piece)
    special = frozenset(special_tokens(tokenizer).values())
    ending = render_chat(tokenizer, "Hello", "I see").rpartition("I see")[2]
    turn_end = tokenizer(ending, add_special_tokens=False)["input_ids"]
    end.update([i for i in turn_end if i in special][:1])    # a base model's EOS is another
    chat = render_chat(tokenizer, "Hello")
    same = os.path.commonprefix([chat, render_chat(tokenizer, "Hello", begun=False)])
    after = chat.removeprefix(same) or chat.rpartition("Hello")[2]    # what begins the answer
    closed = "</think>" in after.rpartition("<think>")[2]
    opened = "<think>" if "<think>" in after and not closed else ""
    return Policy(model, tokenizer, frozenset(end - {None}), closing, closed, opened, special)

def text_fault(policy):
    """What template and tokenizer do to messages and tags, "" if these stay what they are."""
    tokenizer = policy.tokenizer
    said = ["<think>I look.</think><{0}>Open box 12</{0}>".format(tag)
            for tag in ("action", "search", "answer")]
    message = f"Put 2 mugs & 1 'pan':\n\n  {said}  -> [\u00c9mile]"
    chat = render_chat(tokenizer, message)
    if message not in chat or "I see" not in render_chat(tokenizer, "Hello", "I see"):
        return "has a chat template that leaves out or changes messages"
    if render_chat(tokenizer, message) != chat:
        return "has a chat template that gives another text each time"
    ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    responses = tokenizer(said, add_special_tokens=False)["input_ids"]
    for text, read in [(message, tokenizer.decode(ids)),
                       *zip(said, [response_text(policy, row) for row in responses])]:
        if "".join(text.split()) not in "".join(read.split()):
            return f"has a tokenizer that makes {envs.one_line(read)!r} of {text!r}"
    largest = max({*tokenizer.get_vocab().values()} - policy.special_ids | {*ids})
    known = policy.model.get_input_embeddings().num_embeddings
    return f"has token {largest}, but only {known} embeddings" if largest >= known else ""

@torch.no_grad()
def model_fault(policy):
    """Why a model cannot be trained, or "". transformers' generate continues two prompts of unequal
    length; the pass without a cache must give its tokens the same logits. Where the decoding of
    section 12 does not, policy.plain is the reason, and generate decodes."""
    model = policy.model
    if not all(p.requires_grad for p in model.parameters()):
        return "has frozen weights, perhaps of an adapter, which has to be merged first"
    if empty := [name for name, p in model.named_parameters() if p.dim() > 1 and not p.any()]:
        return f"has weights that are all 0 ({empty[0]}; {len(empty)} in all)"
    if getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        return "caps its logits, which is not done here"
    prompts = encode_chats(policy.tokenizer, ["Hello", "Look at the desk, then at the shelf."])
    logits, answers = map(torch.cat, zip(*(continuations(model, [p]) for p in prompts)))
    if logits.isnan().any():
        return "computes logits that are not numbers"
    limit = (3e-3 if model.dtype == torch.float32 else 0.3) * logits.float().std()

    def logps(logits):                                                       # (2, 4, V) -> (2, 4)
        return log_softmax(logits, 1).gather(-1, answers[..., None])[..., 0]

    def same(logp):
        return bool((logp - logps(logits)).norm() <= limit)

    for way, training in (("without a cache, by its head", False), ("in training mode", True)):
        scored = response_logps(model.train(training), prompts, answers.tolist(), Settings())[0]
        model.eval()
        if not same(scored):
            return f"computes other log-probabilities {way}"
    policy.plain = other_memory(model)
    try:
        if not policy.plain and not same(logps(decoded(policy, prompts, answers))):
            policy.plain = "other log-probabilities"
    except Exception as error:          # a model may expect anything of its cache
        if out_of_memory(error):
            raise
        policy.plain = type(error).__name__
    policy.pads = bool(policy.plain) and same(logps(continuations(model, prompts)[0]))
    return ""

def other_memory(model):
    """The layers of a model that remember otherwise than by all keys and values, "" without any."""
    from transformers import DynamicCache
    layers = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    layers |= {*(getattr(model.config, "attention_layers", None) or ())} & {"local"}     # GPT-Neo
    return ", ".join(sorted(layers - {"DynamicLayer"}))

def decoded(policy, prompts, tokens):
    """Logits (B, T, V) with which decode_step reads tokens (B, T) after the prompts."""
    rows = len(prompts)
    kv = policy.cache = KeyValues(rows, max(map(len, prompts)) + tokens.shape[1], policy.device)
    kv.slot[:] = to_device([len(prompt) for prompt in prompts], policy.device)
    logits = [prefill(policy, prompts, list(range(rows)), Settings())]                  # (B, V)
    for token in tokens.T[:-1]:
        kv.token[:] = token
        logits.append(decode_step(policy, kv, rows, kv.length))
        kv.slot += 1
    policy.cache = None
    return torch.stack(logits, 1)

def continuations(model, prompts):
    """Logits (B, 4, V) and ids (B, 4) with which transformers' generate continues the prompts."""
    out = run_generate(model, prompts, 4, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits, 1), out.sequences[:, -4:]

def check_lengths(policy, s):
    """UserError, or a line for rotary positions, if a prompt with its response can be too long."""
    rope = getattr(policy.model.config, "rope_parameters", None) or {}
    known = getattr(policy.model.config, "max_position_embeddings", None) or math.inf
    if moving := rope.get("rope_type") in ("dynamic", "longrope"):    # with a batch's longest row
        known = rope.get("original_max_position_embeddings", known)
    need = max(s.max_prompt, s.max_teacher_prompt) + s.max_response
    line = (f"{s.model} knows {known} positions, a prompt and its response may have {need}; "
            "lower --max-prompt, --max-teacher-prompt or --max-response")
    if need > known and (moving or not rope):
        raise UserError(line)
    notes = [line] * (need > known)
    if "strftime_now" in str(policy.tokenizer.chat_template):
        notes.append(f"the chat template prints the date, here always {DAY:%d %b %Y}")
    if policy.plain:
        notes.append(f"{s.model} does not fit the decoding here ({policy.plain}); it decodes "
                     "through transformers' generate, which is slower")
    print("".join(f"note: {note}\n" for note in notes), end="", flush=True)

def check_room(state, s):
    """A line on what a run needs besides weights and activations; UserError if it is not there."""
    model = state.policy.model
    size = model.num_parameters()
    weights = size * model.dtype.itemsize
    reference = weights * bool(s.kl or "reference" in method_of(s).needs)
    memory = size * (4 if state.optimizer.state else 12)      # gradients and Adam's moments in fp32
    checkpoint = weights + size * (8 if model.dtype == torch.float32 else 12)    # with fp32 masters
    kept = len(checkpoints(s.out))
    saves = math.ceil((s.steps - state.step) / s.save_every) + (state.warm_step < s.warm_start)
    disk = max(0, min(KEEP + 1, kept + saves) - kept) * checkpoint + (not kept) * reference
    place = torch.device("cpu") if s.small_gpu else model.device
    memory += reference * (place == model.device)      # --small-gpu: on the GPU, and not counted
    free = {place: free_memory(place), s.out: shutil.disk_usage(s.out).free}
    needs = {place: memory, s.out: disk}
    text = " and ".join(f"{need / 1e9:.2f} GB on {place} ({free[place] / 1e9:.1f} GB free)"
                        for place, need in needs.items())
    text = f"the run needs {text} besides weights and activations"
    if any(need > free[place] for place, need in needs.items()):
        raise UserError(f"{text}; make room, or take a smaller model, --kl 0 (no reference) or "
                        "--small-gpu")
    if memory > 1e8:                                   # not of `tiny`
        print(text, flush=True)

def free_memory(device):
    """Free bytes on a device; inf where that is not known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    file = Path("/proc/meminfo")                       # of Linux
    found = re.search(r"MemAvailable:\s+(\d+)", file.read_text()) if file.exists() else None
    return int(found[1]) * 1024 if found and device.type == "cpu" else math.inf

TINY = dict(width=96, layers=2, vocabulary=768)
TINY_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}")
TINY_PIECES = (                   # what can become one token: few tokens make a small model fast
    r" ?[a-z]+ \d+\b"            # a name with its number: " countertop 1"
    r"|\n?[A-Z]\w*(?: \w+)?:"    # the beginning of a line: "\nStep 3:"
    r"| \d+\."                    # " 1."
    r"|(?: ?\b[A-Za-z][a-z]{0,3}\b(?! \d))+"    # short words: " go to"
    r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s")

def build_tiny(texts, seed):
    """(model, tokenizer): a Qwen2 of 0.3 million random weights, and a byte-level BPE tokenizer
    trained on `texts`, with the tags as tokens. Nothing is downloaded."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer, Regex, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    bpe = ByteLevelBPETokenizer()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(TINY_PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    roles = ["user", "assistant"] * 500               # frequent enough to become one token each
    bpe.train_from_iterator([*roles, *map(envs.encodable, texts)], TINY["vocabulary"], 0, False,
                            ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    for tag in ("think", "action", "search", "answer"):  # added afterwards: the trainer drops them
        bpe.add_tokens([AddedToken(text, normalized=False) for text in (f"<{tag}>", f"</{tag}>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"], chat_template=TINY_TEMPLATE)
    width = TINY["width"]
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=TINY["layers"], num_attention_heads=width // 32,
        num_key_value_heads=width // 32, max_position_embeddings=8192, tie_word_embeddings=True,
        initializer_range=0.8 * width**-0.5,          # a small width needs more than the usual 0.02
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config), tokenizer

def tiny_texts(env, s, count=300):
    """Text for the tokenizer of `tiny`: prompts with skills and responses of expert episodes."""
    brief = s.prompt_style == "brief"
    for task in draw_tasks(env, s, 0, count):
        session = env.start(task, seed=seed_for(s, "texts", task))
        while not session.done and len(session.turns) < s.max_turns:
            yield session.prompt(env.skill(session.category, brief), s.history, brief=brief)
            yield session.expert()
            env.step([session], [session.expert()])
    yield env.all_skills()

# ======== 16. Optimizer: AdamW over fp32 master weights ===========================================
@dataclass
class State:
    """All that changes in a run. Random streams are functions of (seed, step), see seed_for."""
    policy: Policy
    optimizer: torch.optim.Optimizer   # over the fp32 masters
    step: int = 0                      # finished RL steps
    warm_step: int = 0                 # finished steps of cloning
    cursor: int = 0                    # training tasks drawn so far
    bandit: dict = field(default_factory=dict)    # {category: {skill: [n, successes]}}
    memory: dict = field(default_factory=dict)    # what a method remembers between steps
    teacher: torch.nn.Module = None    # frozen, of --teacher-model
    began: dict = field(default_factory=dict)     # hashes of the training tasks and the skills

    masters = property(lambda self: self.optimizer.param_groups[0]["params"])

def make_state(policy, s, beta2=0.999):
    """A State with a fresh AdamW over fp32 masters, because bf16 loses steps of 1e-6: its numbers
    near 0.01 are 6e-5 apart. A parameter in fp32 is its own master. With --small-gpu the masters
    are in host memory, and the backward pass recomputes activations."""
    if s.small_gpu:
        policy.model.activation_checkpointing_enable({"use_reentrant": False})
    masters = []
    for p in policy.model.parameters():
        master = p
        if s.small_gpu or p.dtype != torch.float32:
            place = "cpu" if s.small_gpu else p.device
            master = p.detach().to(place, torch.float32, copy=True).requires_grad_()
            p.register_post_accumulate_grad_hook(functools.partial(move_gradient, master))
        masters.append(master)
    fused = s.small_gpu or policy.device.type == "cuda" or None
    optimizer = torch.optim.AdamW(masters, s.lr, (0.9, beta2), weight_decay=0.01, fused=fused)
    return State(policy, optimizer)

def move_gradient(master, p):
    """Hook after each backward: add p's gradient to its master's, in fp32, where none is lost."""
    grad = p.grad.to(master.device, torch.float32)
    master.grad = grad if master.grad is None else master.grad.add_(grad)
    p.grad = None

@torch.no_grad()
def apply_update(state, lr, grad_clip):
    """Clip, step, copy the masters back -> (gradient norm before clipping, was it finite: if not,
    no step is taken)."""
    norm = torch.nn.utils.clip_grad_norm_(state.masters, grad_clip)
    finite = bool(norm.isfinite())
    if finite:
        state.optimizer.param_groups[0]["lr"] = lr
        state.optimizer.step()
        for p, master in zip(state.policy.model.parameters(), state.masters):
            if master is not p:
                p.copy_(master, non_blocking=True)
    state.optimizer.zero_grad(set_to_none=True)
    return norm.item(), finite

# ======== 17. Behaviour cloning before RL: an expert's turn is a turn with advantage 1 ============
WARM_TASKS = 4      # expert episodes per step
PROMPT_LOSS = 0.3   # advantage of the prompt's own tokens for `tiny`: guessing them teaches copying

def expert_turns(policy, env, task, s, seed):
    """An expert's episode as turns, a random half with the skill, which the teacher must know."""
    session = env.start(task, seed=seed)
    draw = random.Random(seed)
    turns = []
    while not session.done and len(turns) < s.max_turns:
        skilled = draw.random() < 0.5
        skill = env.skill(session.category, s.prompt_style == "brief") if skilled else ""
        text = envs.encodable(session.expert())
        prompt = prompts(policy, [session], s, [skill])[0][0]
        cut = 1 if s.model == "tiny" else len(prompt)         # tokens from here on are trained
        response = policy.tokenizer(text.removeprefix(policy.opened), add_special_tokens=False)
        response = response["input_ids"]
        turn = Turn(prompt[:cut], prompt[cut:] + response)
        turn.advantages = torch.tensor([PROMPT_LOSS] * (len(prompt) - cut) + [1.0] * len(response))
        turns.append(turn)
        env.step([session], [text])
    return turns

def clone_step(state, env, s):
    """One optimizer step on WARM_TASKS expert episodes -> mean loss per response token in nats."""
    turns = []
    for i, task in enumerate(draw_tasks(env, s, state.warm_step * WARM_TASKS, WARM_TASKS)):
        turns += expert_turns(state.policy, env, task, s, seed_for(s, "expert", state.warm_step, i))
    count = sum(int((t.advantages == 1).sum()) for t in turns)
    for turn in turns:
        turn.weight = 1 / count
    cosine = math.cos(math.pi * state.warm_step / s.warm_start)
    lr = s.warm_lr * min(1.0, (state.warm_step + 1) / 20) * (0.55 + 0.45 * cosine)
    state.policy.model.train()
    plain = replace(s, kl=0.0, gate="gap", gate_baseline=False, recipe="paper")
    optimizer_step(state, turns, [], plain, METHODS["grpo"], lr, progress(disable=True))
    state.policy.model.eval()
    state.warm_step += 1
    if state.warm_step == s.warm_start:
        state.optimizer.state.clear()                 # RL starts with a fresh optimizer
        state.optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    return -sum(float(t.logp[t.advantages == 1].sum()) for t in turns) / count

def clone_experts(state, env, s):
    """The remaining steps of the cloning, with a checkpoint at its end."""
    with progress(total=s.warm_start, initial=state.warm_step, desc="cloning", unit="step") as bar:
        while state.warm_step < s.warm_start:
            with uninterrupted():
                loss = clone_step(state, env, s)
                row = {"step": 0, "warm_step": state.warm_step, "warm_loss": loss}
                write_log(s, "metrics.jsonl", row)
            bar.set_postfix_str(f"{loss:.3f} nats a token")
            bar.update()
            if bar.disable and state.warm_step % max(1, s.warm_start // 10) == 0:
                print(f"cloning {state.warm_step}/{s.warm_start}  {loss:.3f} nats a token",
                      flush=True)
            if state.warm_step % (10 * s.save_every) == 0 or state.warm_step == s.warm_start:
                save_checkpoint(state, s)

# ======== 18. The log =============================================================================
progress = functools.partial(tqdm, leave=False, dynamic_ncols=True, disable=None)

@torch.no_grad()
def token_sums(b, s, loss):
    """Sums over a micro-batch's tokens for the log: the paper's diagnostics, clipping, divergences.
    A method's further rows (number -1) count in the loss only."""
    mask = b.mask & (b.number >= 0)[:, None]                                            # (B, T)
    ratio = (b.logp - b.old).exp()
    clipped = torch.where(b.advantages > 0, ratio > 1 + s.clip, ratio < 1 - s.clip)
    values = {"clip_fraction": clipped & (b.advantages != 0), "old_kl": b.old - b.logp,
              "entropy": -b.old}       # unbiased for the policy's entropy, because it sampled them
    if b.teacher is not None:
        gap = b.teacher - b.logp
        gate = gate_values(b, s)
        values |= {"gate": gate, "gate_active": gate > 0.5, "gap": gap, "negative_gap": gap < 0,
                   "distill_loss": gate * gap}
    if b.ref is not None:
        values["kl"] = k3_kl(b.logp, b.ref)
    sums = {name: (value * mask).sum() for name, value in values.items()}
    return {"loss": loss.detach(), "tokens": mask.sum(), **sums}

def update_metrics(results, turns, lr):
    """Metrics of an update from its optimizer steps: token means, mean loss and gradient norm."""
    parts = [sums for parts, _, _ in results for sums in parts]
    totals = {name: sum(sums[name] for sums in parts if name in sums) for name in parts[0]}
    norms = [norm for _, norm, taken in results if taken]
    if not norms:
        raise UserError("all gradients are infinite or NaN, the training has diverged; start a new "
                        "run with a lower --lr")
    loss = totals.pop("loss") / len(results)
    tokens = totals.pop("tokens")
    advantages = torch.cat([t.advantages for t in turns])
    return {"loss": loss, **{name: value / tokens for name, value in totals.items()},
            "grad_norm": fmean(norms), "updates": len(results), "lr": lr,
            "updates_skipped": len(results) - len(norms), "update_tokens": int(tokens),
            "advantage_min": advantages.min().item(), "advantage_max": advantages.max().item()}

def control_metrics(turns, s):
    """How the gap compares, token by token, with the gap under another category's skill; {} on
    steps without one. The correlation of a constant gap is None."""
    if "control" not in turns[0].extra:
        return {}
    rows = [(t.teacher_logp - t.logp, t.extra["control"] - t.logp) for t in turns]
    gaps = torch.stack([torch.cat(parts) for parts in zip(*rows)]).double()             # (2, N)
    gates = torch.sigmoid(s.beta * gaps)
    r = gaps.corrcoef()[0, 1].item()
    return {"control_gap": gaps[1].mean().item(), "control_correlation": r if r == r else None,
            "control_gate_moved": ((gates[0] - gates[1]).abs() > 0.1).double().mean().item()}

def episode_metrics(episodes):
    """Metrics of a list of episodes: lengths are means per turn, `turns` is per episode, `cut` is
    the share of responses that --max-response ended; [won, all] by task type; failures by kind."""
    turns = [t for e in episodes for t in e.turns]
    n = len(episodes)
    played = Counter(e.session.group for e in episodes)
    wins = Counter(e.session.group for e in episodes if e.session.won)
    won = wins.total()
    rewards = Counter(group for group, _ in {(e.turns[0].group, e.reward) for e in episodes})
    return {"episodes": n, "successes": won, "success": won / n, "success_95": wilson(won, n),
            "reward": fmean(e.reward for e in episodes),
            "score": sum(float(e.session.score) for e in episodes) / n, "turns": len(turns) / n,
            "response_tokens": fmean(len(t.response_ids) for t in turns),
            "prompt_tokens": fmean(len(t.prompt_ids) for t in turns),
            "valid": fmean(t.valid for t in turns),
            "admissible": fmean(t.admissible for t in turns),
            "prompts_shortened": sum(t.shortened for t in turns),
            "groups_without_variance": sum(count == 1 for count in rewards.values()),
            "failures": Counter(failure(e) for e in episodes if not e.session.won),
            "success_by_type": {name: [wins[name], count] for name, count in played.items()},
            "cut": fmean(t.cut for t in turns)}

def failure(episode):
    """Why an episode failed: it ended with a wrong purchase or answer; at least half its turns were
    malformed; ALFWorld's object was never within reach; or it ran out of turns."""
    x = episode.session
    if x.done:
        return "wrong_end"
    if 2 * sum(t.valid for t in episode.turns) <= len(episode.turns):
        return "malformed"
    return "out_of_turns" if getattr(x, "found_object", True) else "object_never_found"

def wilson(successes, n, z=1.959964):
    """95 % Wilson interval (low, high) of a rate."""
    if n == 0:
        return (0.0, 1.0)
    p = successes / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))

def stopwatch(phases, device):
    """lap(phase, turns, prompt) writes seconds and tokens per second since the last lap into
    `phases`, counting responses and turn.<prompt> (None: responses alone)."""
    last = time.perf_counter()
    def lap(phase, turns, prompt="prompt_ids"):
        nonlocal last
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - last
        tokens = sum(len(t.response_ids) + len(getattr(t, prompt) if prompt else ()) for t in turns)
        phases[f"seconds_{phase}"] = seconds
        phases[f"tokens_per_s_{phase}"] = tokens / seconds
        phases["seconds"] = phases.get("seconds", 0.0) + seconds
        last += seconds
    return lap

def peak_memory(device):
    """Peak memory in MiB of the GPU, on a CPU of this process (Linux; elsewhere None)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(peak[1]) / 2**10 if peak else None

def episode_text(policy, episode, step, s):
    """An episode as a JSON row that can be read alone. Where there is a teacher each turn has its
    tokens and, in lists of the same length, gate, gap and both log-probabilities."""
    x = episode.session
    row = {"step": step, "task_id": episode.task_id, "task": x.task, "goal": x.goal,
           "skill": episode.skill, "skill_text": episode.skill_text, "won": bool(x.won),
           "failure": "" if x.won else failure(episode), "score": float(x.score),
           "details": dict(x.details), "last_observation": x.observation, "turns": []}
    for t in episode.turns:
        turn = {"observation": t.observation, "response": t.text, "valid": t.valid,
                "admissible": t.admissible, "reward": t.reward}
        if t.role:
            turn["role"] = t.role
        if t.advantages is not None:
            turn["advantage"] = round(t.advantages.mean().item(), 4)
        if t.logp is not None and t.teacher_logp is not None:
            turn["tokens"] = [policy.tokenizer.decode([i]) for i in t.response_ids]
            base = t.extra["control"] if s.gap == "contrast" else t.logp
            columns = {"gate": sdar_gate(base, t.teacher_logp, s.beta),
                       "gap": t.teacher_logp - t.logp, "teacher_logp": t.teacher_logp,
                       "student_logp": t.logp}
            for name, values in columns.items():
                turn[name] = [round(value, 4) for value in values.tolist()]
        row["turns"].append(turn)
    return row

def rate_text(m):
    """A success rate with counts and interval, for the terminal."""
    low, high = m["success_95"]
    counts = f"{m['successes']}/{m['episodes']}, 95 % {100 * low:.0f}-{100 * high:.0f}"
    return f"success {100 * m['success']:.1f} % ({counts})"

def log_step(state, episodes, m, s):
    """Log a step: metrics.jsonl, an episode of two groups as text, a line on the terminal."""
    write_log(s, "metrics.jsonl", m)
    for episode in episodes[::s.group_size][:2]:
        write_log(s, "episodes.jsonl", episode_text(state.policy, episode, state.step, s))
    phases = " ".join(f"{k[8:]} {v:.1f}" for k, v in m.items() if k.startswith("seconds_"))
    line = (f"step {m['step']}/{s.steps}  {rate_text(m)}  turns {m['turns']:.1f}"
            f"  valid {100 * m['valid']:.0f} %")
    if "gap" in m:
        line += (f"  gap {m['gap']:+.3f} gate {m['gate']:.3f}"
                 f" ({100 * m['gate_active']:.0f} % open)")
    if "control_gap" in m:
        line += f"  control {m['control_gap']:+.3f}"
    if "kl" in m:
        line += f"  kl {m['kl']:.4f}"
    if m["updates_skipped"]:
        line += f"  {m['updates_skipped']} of {m['updates']} updates skipped: not finite"
    print(f"{line}  grad {m['grad_norm']:.2f}  {m['seconds']:.1f} s ({phases})")

# ======== 19. Files: logs and checkpoints =========================================================
# AutoTokenizer would give such a folder Qwen's pre-tokenizer; where the folder names code of its
# own (here none), which AutoTokenizer does not run, it takes tokenizer.json as it is
OWN_TOKENIZER = ("qwen2", "TokenizersBackend")
RESUMED = ("step", "warm_step", "cursor", "bandit", "memory", "began")    # State in state.json
KEEP = 2                                                                  # checkpoints that stay

def versions():
    """The versions that a run's config.json records; code: the git commit, None without one."""
    git = subprocess.run("git describe --always --dirty --abbrev=40 --exclude='*'", shell=True,
                         cwd=Path(__file__).parent, capture_output=True, text=True)
    return {"code": git.stdout.strip() or None, "torch": torch.__version__,
            "transformers": version("transformers")}

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
        raise UserError(f"{path} is damaged ({first_line(error)}); restore or replace it") from None

def write_text(path, text):
    """Write a file whole or not at all."""
    part = Path(f"{path}.part")
    part.write_text(text, encoding="utf-8", errors="replace")
    os.replace(part, path)

def write_log(s, name, row):
    """Append a row to one of the run's JSON-lines files."""
    with open(Path(s.out) / name, "a", encoding="utf-8", errors="replace") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")
    if s.track != "none" and name != "episodes.jsonl":
        types = {n: won / count for n, (won, count) in row.get("success_by_type", {}).items()}
        numbers = {f"{Path(name).stem}/{key}": value
                   for key, value in (row | types | row.get("failures", {})).items()
                   if isinstance(value, (int, float))}
        step = row["step"] + row.get("warm_step", s.warm_start)       # the cloning comes first
        tracker(s.track, s.out)(numbers, step)

@functools.cache
def tracker(kind, run):
    """--track: log({name: number}, step) of wandb (WANDB_MODE=offline works too) or tensorboard."""
    try:
        if kind == "wandb":
            import wandb
            config = read_json(Path(run) / "config.json", "there is no config.json")
            return wandb.init(project="sdar", name=Path(run).name, dir=run, config=config).log
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(run)
    except Exception as error:                        # no login, no network, no package ...
        raise UserError(f"--track {kind} does not start: {first_line(error)}; correct that (for "
                        "wandb often by wandb login), or take --track none") from None
    def log(numbers, step):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()
    return log

def read_lines(path):
    """The rows of one of a run's logs, [] if there is none; a half-written line is left out."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line.decode("utf-8", "replace")))
    return [row for row in rows if isinstance(row, dict) and "step" in row]

def cut_logs(state, s):
    """Remove the log rows of steps after the checkpoint: they will be taken again."""
    for name in ("metrics.jsonl", "validation.jsonl", "episodes.jsonl"):
        rows = [row for row in read_lines(Path(s.out) / name)
                if row["step"] <= state.step and row.get("warm_step", 0) <= state.warm_step]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_text(Path(s.out) / name, "".join(lines))

def checkpoints(run):
    """The checkpoint folders of a run, oldest first."""
    return sorted(Path(run).glob("checkpoints/step-*"))

def last_checkpoint(path):
    """The newest checkpoint of a run folder, the folder itself if it is a model, else None."""
    return ([path, *checkpoints(path)] if Path(path).is_dir() else [None])[-1]

def save_model(policy, folder, **options):
    """Write a model folder for from_pretrained."""
    if (policy.model.config.model_type, type(policy.tokenizer).__name__) == OWN_TOKENIZER:
        policy.tokenizer.init_kwargs["auto_map"] = ["", None]
    policy.model.save_pretrained(folder, **options)
    policy.tokenizer.save_pretrained(folder)

def check_saving(state, s):
    """UserError if the model, of which one small tensor is saved now, cannot be saved later."""
    part = Path(s.out) / "writing"
    weights = state.policy.model.named_parameters()
    try:
        save_model(state.policy, part, state_dict=dict([min(weights, key=lambda x: x[1].numel())]))
    except Exception as error:                        # every library has its own
        raise UserError(f"a checkpoint of {s.model} could not be saved: {first_line(error)}; "
                        "choose another --model or --out") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)

def save_checkpoint(state, s):
    """Write RUN/checkpoints/step-N: a model folder, optimizer.pt and state.json. It gets this name
    when it is whole, so an interrupted write leaves the previous checkpoint."""
    folder = Path(s.out) / "checkpoints"
    kind = f"cloning-{state.warm_step:06d}" if state.warm_step < s.warm_start else "rl"
    final = folder / f"step-{state.step:06d}-{kind}"
    part = folder / "writing"
    if final.exists():
        return
    try:
        shutil.rmtree(part, ignore_errors=True)       # left by a killed process
        part.mkdir(parents=True)
        save_model(state.policy, part)
        pairs = zip(state.policy.model.parameters(), state.masters)
        masters = [None if master is p else master for p, master in pairs]
        torch.save({"optimizer": state.optimizer.state_dict(), "masters": masters},
                   part / "optimizer.pt")
        rest = {name: getattr(state, name) for name in RESUMED} | {"settings": asdict(s)}
        write_text(part / "state.json", json.dumps(rest, indent=1))
        for path in part.iterdir():
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
        part.rename(final)
    except Exception as error:                        # every library has its own
        full = "No space left" in str(error) or not shutil.disk_usage(s.out).free >> 20
        shutil.rmtree(part, ignore_errors=True)
        kept = "the previous checkpoint is whole: " if checkpoints(s.out) else ""
        advice = "make room" if full else "put that right"
        raise OSError(f"cannot save to {folder}: {first_line(error)}; {kept}{advice}, then "
                      f"python sdar.py --resume {s.out}") from None
    for old in checkpoints(s.out)[:-KEEP]:
        shutil.rmtree(old)

def load_checkpoint(path, s):
    """The State in a checkpoint folder; UserError if anything in it cannot be read."""
    pick_device(s.device)                             # an error of its own: the checkpoint is whole
    try:
        kept = read_json(path / "state.json", "there is no state.json")
        state = make_state(load_policy(str(path), s.device), s)
        saved = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        with torch.no_grad():
            for master, own in zip(state.masters, saved["masters"]):
                if own is not None:
                    master.copy_(own)
        for old, new in zip(saved["optimizer"]["param_groups"], state.optimizer.param_groups):
            old["fused"] = new["fused"]               # the device or --small-gpu may have changed
        state.optimizer.load_state_dict(saved["optimizer"])
        for name in RESUMED:
            if type(kept[name]) is not type(getattr(state, name)):
                raise ValueError(f"{name} is {kept[name]!r}")
            setattr(state, name, kept[name])
        return state
    except Exception as error:                        # a damaged file can raise anything
        if out_of_memory(error):
            raise
        raise UserError(f"cannot read the checkpoint {path} ({first_line(error)[:100]}); if its "
                        "files are damaged, delete it to continue from the one before") from None

# ======== 20. A run from its first line to its last, and the command line =========================
def open_env(s, training=False):
    """The environment of a run; --env-args 'house=6 detours=2' become arguments of its class. A
    pretrained model trains on built-in games only if told to."""
    options = {}
    try:
        items = shlex.split(s.env_args)
    except ValueError:
        raise UserError(f"--env-args has an open quotation mark: {s.env_args!r}") from None
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or key in ("name", "data", "skills", "seed"):
            raise UserError(f"--env-args takes the environment's own options as KEY=VALUE, not "
                            f"{item!r}; see docs/environments.md")
        number = re.fullmatch(r"-?\d+(\.\d+)?", value)
        options[key] = json.loads(value) if number else value
        if key == "corpus":
            options[key] = str(envs.existing("corpus", value))
    s.env_args = shlex.join(f"{key}={value}" for key, value in options.items())
    env = envs.open_env(s.env, s.data or None, skills=s.skills or None, **options)
    if training and env.builtin and not s.data and s.model != "tiny":
        raise UserError(f"there is no {s.env} data: give its folder with --data, or say --data "
                        "built-in to train this model on built-in games")
    compare = s.gap == "contrast" or s.control_every
    if compare and len({env.skill(name) for name in env.skill_names}) < 2:
        raise UserError("all categories have the same skill, so there is no other to compare with; "
                        "leave out --control-every and --gap contrast, or give other --skills")
    s.data = s.data or "built-in" * env.builtin        # --resume never switches to other data
    return env

def start_or_resume(s, env, resume):
    """The State of a new run, its folder made, or of a resumed one."""
    if s.val_every:
        envs.panel(env, s.val_split or env.splits[1], s.val_episodes)    # fails now, not later
    began = {"training tasks": envs.panel_hash(env.tasks(env.splits[0])),
             "skills": envs.panel_hash([env.all_skills()])}
    print(env.source)
    out = Path(s.out)
    if resume is None and (out / "config.json").exists():
        raise UserError(f"{out} holds a run: continue it with --resume {out}, or change --out")
    if resume and checkpoints(out):
        state = load_checkpoint(checkpoints(out)[-1], s)
        check_resumed(state, s, began)
        print(f"resumed from {checkpoints(out)[-1]}")
    else:
        if resume:
            print(f"{out} has no checkpoint yet: it starts again")
        policy = load_policy(s.model, s.device, tiny_texts(env, s), s.seed)
        state = make_state(policy, s, 0.98 if s.warm_start else 0.999)   # faster beta2 for cloning
        state.began = began
    state.teacher = load_teacher(state.policy, s)
    check_lengths(state.policy, s)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --out {out}: {error.strerror}; choose another") from None
    check_room(state, s)
    check_saving(state, s)
    write_text(out / "config.json", json.dumps(asdict(s) | {"versions": versions()}, indent=1))
    if s.track != "none":
        tracker(s.track, s.out)
    cut_logs(state, s)
    for number in STOPS:                               # from here on there is something to save
        signal.signal(number, stop)
    model = state.policy.model
    size = f"{model.num_parameters() / 1e6:.2f}M parameters, {model.dtype}, {model.device}"
    print(f"{s.model}: {size}; {s.algo}, {s.groups} x {s.group_size} episodes a step; log in {out}")
    return state

def check_resumed(state, s, began):
    """UserError if a resumed run's settings, tasks or skills are not those of its checkpoint."""
    saved = read_json(checkpoints(s.out)[-1] / "state.json", "")["settings"]
    for name, value in saved.items():
        if name not in (*MAY_CHANGE, "out") and value != getattr(s, name, value):
            raise UserError(f"{flag(name)} was {value!r} when the run was saved; set it back in "
                            f"{s.out}/config.json")
    for what, name in (("training tasks", "--data"), ("skills", "--skills")):
        if state.began[what] != began[what]:
            raise UserError(f"{s.out} began with other {what} than are found now; give the original "
                            f"ones with {name}")
    if state.step > s.steps:
        raise UserError(f"{s.out} has taken {state.step} steps already; give more --steps")

def reference_policy(state, s):
    """The frozen model of the KL term: the weights that RL started from, kept in RUN/reference."""
    if not s.kl and "reference" not in method_of(s).needs:
        return None
    folder = Path(s.out) / "reference"
    try:
        if state.step == 0:
            save_model(state.policy, folder)
        return load_policy(str(folder), s.device).model.requires_grad_(False)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise UserError(f"the reference policy in {folder} cannot be saved or loaded: "
                        f"{first_line(error)}; make room or restore it and --resume, or start a "
                        "new run") from None

def validate(state, env, s):
    """Print and log the success on the fixed panel, without skills: at the start, every
    --val-every steps and at the end, unless the log has it already."""
    split = s.val_split or env.splits[1]
    due = s.val_every and (state.step % s.val_every == 0 or state.step == s.steps)
    earlier = read_lines(Path(s.out) / "validation.jsonl")
    if not due or state.step in [x["step"] for x in earlier]:
        return
    ids, digest = envs.panel(env, split, s.val_episodes)
    generator = generator_for(state.policy, s, "validation")
    m = episode_metrics(rollout(state.policy, env, ids, s, s.val_temperature, generator,
                                label=f"validation on {split}"))
    rates = [x["success"] for x in [*earlier, m]]
    blocks = "".join("▁▂▃▄▅▆▇█"[int(7.99 * rate / max(*rates, 0.01))] for rate in rates)
    print(f"validation after step {state.step}: {rate_text(m)} on {split}, panel {digest}  "
          f"{blocks}")
    row = {"step": state.step, "warm_step": state.warm_step, "split": split, "panel": digest}
    write_log(s, "validation.jsonl", row | m)

STOPS = [n for n in signal.Signals if n.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
         and signal.getsignal(n) != signal.SIG_IGN]    # nohup ignores SIGHUP
TERMINALS = [number for number in (1, 2) if os.isatty(number)]    # those of stdout and stderr
DELAYED = []    # for each open `uninterrupted` block, the STOPS that came within it

def stop(number, frame=None):
    """Handler of all STOPS: KeyboardInterrupt, which saves the run, now or after the block."""
    for terminal in TERMINALS * (signal.Signals(number).name == "SIGHUP"):
        os.dup2(os.open(os.devnull, os.O_RDWR), terminal)    # it is lost: write elsewhere
    if not DELAYED:
        raise KeyboardInterrupt
    DELAYED[-1].append(number)

@contextlib.contextmanager
def uninterrupted():
    """Delay Ctrl-C and the other STOPS until the block ends."""
    DELAYED.append([])
    try:
        yield
    finally:
        came = DELAYED.pop()
    if came:
        stop(came[0])

def save_and_say(state, s):
    """Save a run that is being stopped, and print how it is continued."""
    with uninterrupted():
        save_checkpoint(state, s)
        print(f"\nstopped and saved after step {state.step}; continue with: python sdar.py "
              f"--resume {s.out}")

def flag(name):
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")

def choices_of(f):
    """The values that a field of Settings may have, None for any."""
    return list(METHODS) if f.name == "algo" else f.metadata["choices"]

def make_parser(s=Settings()):
    """The command line of sdar.py, one flag per field of Settings; --help shows the values of s."""
    parser = argparse.ArgumentParser(
        prog="sdar.py", usage="python sdar.py [--env ENV] [--model MODEL] [flags]",
        description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
        epilog=f"The defaults shown are those of --env {s.env} --model {s.model} --algo {s.algo}.")

    def error(message):
        word = message.rpartition("arguments: ")[2].partition("=")[0]
        close = difflib.get_close_matches(word, parser._option_string_actions, 1)
        fail(f"{message}; " + (f"did you mean {close[0]}?" if close else "see sdar.py --help"))

    parser.error = error
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show this text and exit")
    add("--resume", metavar="RUN", help="continue the run in this folder")
    add("--config", metavar="FILE", help="repeat the run of this config.json, with what other "
        "flags change")
    for f in fields(Settings):
        if f.name in HEADINGS:
            group = parser.add_argument_group(HEADINGS[f.name])
        value = getattr(s, f.name)
        shown = "" if value == "" or value is False else f" (default: {value})"
        text = (f.metadata["help"] + shown).replace("%", "%%")
        kind = {"type": type(f.default), "choices": choices_of(f)}
        if isinstance(f.default, bool):
            kind = {"action": "store_true"}
        group.add_argument(flag(f.name), help=text, **kind)
    return parser

def preset(explicit):
    """Settings of a new run: defaults, PRESETS, those of the run that made --model, flags."""
    s = Settings(**explicit)
    for key, values in PRESETS.items():
        if set(key.split()) <= {s.env, s.algo, s.recipe, s.model}:
            s = replace(s, **values)
    saved = {} if s.model == "tiny" else saved_settings(s.model)
    names = INHERITED if saved.get("env") == s.env else INHERITED[:-3]     # not the world
    return replace(s, **{name: saved[name] for name in names if name in saved} | explicit)

def saved_settings(model):
    """{name: value} of the run that made a model folder, {} for any other model."""
    file = Path(last_checkpoint(model) or model, "state.json")
    saved = read_json(file, "") if file.is_file() else {"settings": {}}
    if not isinstance(saved, dict) or not isinstance(saved.get("settings"), dict):
        raise UserError(f"{file} is damaged; delete the checkpoint {file.parent} to use the one "
                        "before it")
    return saved["settings"]

def is_path(name, value):
    """Whether a flag's value is a path. A model may also be one of the hub's: one/two."""
    if name in ("resume", "config"):
        return True
    if name != "model" or value == "tiny":
        return name in ("data", "skills") and value not in ("", "built-in")
    home = Path(value.partition("/")[0] or "/").expanduser().is_dir() and "/" in value
    return home or value.endswith(".gguf") or Path(value).exists()

def read_settings(argv):
    """(Settings, run folder to resume or None) of a command line."""
    explicit = vars(make_parser().parse_args(argv))
    for name, value in explicit.items():
        if is_path(name, value):
            explicit[name] = str(envs.existing(flag(name), value))
    resume = explicit.pop("resume", None)
    wants_help = explicit.pop("help", False)
    s = resumed_settings(resume, explicit) if resume else new_settings(explicit)
    if wants_help:
        make_parser(s).print_help()
        sys.exit(0)
    if os.environ.get("WORLD_SIZE", "") not in ("", "1") and "RANK" in os.environ:
        raise UserError("sdar.py runs as one process on one GPU; start it without torchrun")
    check_settings(s)
    return s, resume

def resumed_settings(run, explicit):
    """The Settings of a run, with those changes that --resume may make."""
    for name in sorted(set(explicit) - set(MAY_CHANGE)):
        if name in ("out", "config"):
            raise UserError(f"{flag(name)} cannot be combined with --resume; leave it out")
        raise UserError(f"{flag(name)} cannot change within a run; start a new one with --out")
    for folder in Path(run).parents[:2]:
        if checkpoints(folder):
            raise UserError(f"{run} is a part of a run; continue it with --resume {folder}")
    saved = read_config(Path(run) / "config.json",
                        f"{run} holds no run (no config.json); give the folder of one")
    return replace(saved, **explicit, out=run)

def new_settings(explicit):
    """The Settings of a new run: of the flags and, below them, of --config."""
    told = told_settings(explicit.pop("config")) if "config" in explicit else {}
    s = preset(told | explicit)
    for name in set(without_effect(s)) & {*told} - {*explicit}:     # another method may use fewer
        setattr(s, name, getattr(Settings, name))
    short = re.sub(r"[^\w.-]+", "-", f"{Path(s.env).name}-{s.algo}-{Path(s.model).name}")
    s.out = os.path.expandvars(os.path.expanduser(s.out or f"runs/{short}"))
    if any(path.exists() and not path.is_dir() for path in (Path(s.out), *Path(s.out).parents)):
        raise UserError(f"--out {s.out} is a file, or lies under one; give a folder")
    return s

def read_config(path, missing):
    """The Settings in a run's config.json; UserError if they are not those of this version."""
    saved = read_json(path, missing)
    if not isinstance(saved, dict) or {*saved} - {"versions"} != {f.name for f in fields(Settings)}:
        raise UserError(f"{path} does not hold the settings of this version (it is damaged or "
                        "another version's); restore it, or start a new run")
    saved.pop("versions", None)
    return Settings(**saved)

def told_settings(path):
    """{name: value} of the settings in a run's config.json that its presets did not choose."""
    saved = read_config(path, f"{path} cannot be read; give the config.json of a run")
    check_settings(replace(saved, track="none"))       # this machine may lack the tracker's package
    main = {name: getattr(saved, name) for name in ("env", "algo", "recipe", "model")}
    plain = asdict(preset(main))
    return main | {name: value for name, value in asdict(saved).items()
                   if value != plain[name] and name != "out"}

def check_settings(s):
    """UserError for the first setting that cannot work, or has no effect on the method."""
    for f in fields(s):                               # a config.json may hold anything
        value = getattr(s, f.name)
        above = f.metadata["above"]
        kinds = (int, float) if isinstance(f.default, float) else (type(f.default),)
        fits = type(value) in kinds and value in (choices_of(f) or [value])
        if fits and f.name != "seed" and not isinstance(value, str):
            fits = (0 <= value if above is None else above < value) and value < math.inf
        if not fits:
            bound = "0 or more" if above is None else f"above {above}"
            bound = f"; it must be a finite number, {bound}"
            bound *= not isinstance(f.default, (str, bool)) and f.name != "seed"
            raise UserError(f"{flag(f.name)} cannot be {value!r}{bound}")
    if not -2**63 <= s.seed < 2**63:
        raise UserError("--seed must be at least -2**63 and below 2**63")
    if s.lr_warmup > 1:
        raise UserError("--lr-warmup is a share of the steps; it must be 0 to 1")
    if s.track != "none" and importlib.util.find_spec(s.track) is None:
        raise UserError(f"--track {s.track} needs a package: pip install {s.track}")
    if s.steps == s.warm_start == 0:
        raise UserError("--steps 0 trains nothing; to measure a model take eval.py --model")
    if s.gate_baseline and (s.gate != "gap" or s.divergence != "sampled"):
        raise UserError("--gate-baseline needs --gate gap and --divergence sampled")
    if s.gap == "contrast" and s.gate not in ("gap", "soft-or"):
        raise UserError("--gap contrast works only with --gate gap or soft-or, because the other "
                        "gates do not use the gap")
    if s.retrieval == "full" and (s.gap == "contrast" or s.control_every):
        raise UserError("with --retrieval full there is no other skill to compare with; leave out "
                        "--control-every and --gap contrast, or choose --retrieval km")
    for name in without_effect(s):
        if getattr(s, name) != getattr(Settings, name):
            raise UserError(f"{flag(name)} has no effect with --algo {s.algo}; leave it out")

def out_of_memory(error):
    """Whether this exception says that memory ran out, on a GPU or a CPU."""
    text = "out of memory|allocate memory|ALLOC_FAILED"
    return isinstance(error, MemoryError) or bool(re.search(text, str(error)))

def fail(message):
    """End with one line on what was wrong and what to do, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

def run_command(function):
    """function(), with a user's mistake, a full disk or too little memory as one line."""
    sys.stdout.reconfigure(errors="replace", line_buffering=True)      # any text, and at once
    try:
        return function()
    except (UserError, OSError, SafetensorError) as error:
        fail(first_line(error))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        fail("out of memory; lower --rollout-rows (in a rollout) or --micro-tokens (in scoring or "
             "the update), or use --small-gpu; a run that was saved continues with --resume")
    except KeyboardInterrupt:
        sys.exit(130)

def main(argv=None):
    """The command line."""
    run_command(lambda: train(*read_settings(argv)))

if __name__ == "__main__":
    main()
