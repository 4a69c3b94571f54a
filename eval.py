"""Measure what sdar.py trained.

    python eval.py --model RUN                    # last checkpoint on its benchmark's test split
    python eval.py --env alfworld --model Qwen/Qwen2.5-1.5B-Instruct --split valid_unseen --skills
    python eval.py compare A.json B.json          # two policies on the same tasks
    python eval.py table RUN ... [--paired]       # the paper's Table 1; or methods paired by seed
    python eval.py gates RUN [--html FILE]        # a logged episode with the gate of each token
    python eval.py plot RUN ... [--out FILE]      # learning curves as a picture (needs matplotlib)
    python eval.py gap --model MODEL [flags]      # is the gap of a model about the skill's content?
    python eval.py bench [flags of sdar.py]       # speed beside the plain way of doing the same

A panel is a sorted list of task ids, named by its hash. Every task is played once, by the last
checkpoint; an episode that is cut off at the turn limit has failed. Means are over episodes, except
that Search-QA's `Avg` is the mean over its data sets, as in the paper. Rates carry 95 % Wilson
intervals. An interrupted evaluation, started again, continues after the last 1,024 finished tasks.
"""

import argparse
import contextlib
import copy
import csv
import difflib
import json
import math
import os
import re
import statistics
import sys
import time
import timeit
from collections import Counter
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path

import torch

import envs
import sdar
from envs import UserError

# What the papers of the follow-ups print, percent ("-": nothing), each with code, prompts and
# metric of its own: never a ranking. Algorithm, model, method, ALFWorld, Search-QA, WebShop
FOLLOWUPS = """\
atod 0.6B GRPO 30.5 39.4 29.7 | SDAR 28.1 39.6 8.6 | OPD 76.6 41.5 85.2 | ATOD 82.8 42.3 86.7
atod 1.7B GRPO 31.3 42.0 47.7 | SDAR 39.8 42.2 43.8 | OPD 72.7 44.7 77.3 | ATOD 80.5 45.2 89.1
triage 1.7B GRPO 45.2 39.4 37.5 | TRIAGE 56.4 42.3 55.9
triage 7B GRPO 79.6 43.3 70.1 | TRIAGE 87.5 48.1 77.2 | no-thinking_judge 76.8 45.0 65.4
paw 1.5B GRPO 70.0 - 60.6 | GRPO+PaW 77.9 - 68.6 | GiGPO 87.6 - 66.2 | GiGPO+PaW 90.4 - 75.3
paw 3B GRPO - 43.9 - | GRPO+PaW - 44.8 -
ucob 1.7B GRPO 46.1 40.8 38.3 | GiGPO 79.7 41.0 45.3 | SDAR 53.9 41.9 58.6 | UCOB 89.1 42.1 79.7
ucob 1.7B fixed_bank 82.0 - 70.3
ucob 3B GRPO 75.0 36.4 63.3 | GiGPO 85.9 42.6 70.3 | SDAR 84.4 43.4 68.0 | UCOB 92.2 43.6 78.1
craft 1.7B SDAR 53.9 41.9 76.8 | CRAFT 57.3 44.5 82.3
craft 3B SDAR 84.4 43.4 85.0 | CRAFT 87.0 46.1 87.3 | P1_alone 86.3 45.4 86.5""".splitlines()
LABELS = {"atod": "ATOD 2606.27814: the best validation during training, which is optimistic",
          "triage": "TRIAGE 2606.32017: 10 runs, on Search-QA 1; its judge is Qwen3-8B",
          "paw": "PaW 2606.02388: 3 seeds, on GRPO and on GiGPO; ours is on GRPO",
          "ucob": "UCOB 2606.29502: success; ours has a fixed bank of skills",
          "craft": "CRAFT 2606.29476: WebShop's score; last checkpoint, one run"}
FORMAT = "sdar-eval-2"
COLUMNS = {"alfworld": ("Pick", "Look", "Clean", "Heat", "Cool", "Pick2"),
           "search": ("NQ", "TriviaQA", "PopQA", "HotpotQA", "2Wiki", "MuSiQue", "Bamboogle"),
           "webshop": ()}
# Table 1 of arXiv 2605.15155, percent, Qwen2.5-3B-Instruct; a star: skills in the agent's prompt.
# ALFWorld's columns, average | Search-QA's columns, average | WebShop's score, accuracy
PAPER = dict(line.split(maxsplit=1) for line in """\
Vanilla 44.4 11.1 6.2 15.4 28.6 12.5 21.9 | 24.6 48.1 31.0 26.3 25.3 7.2 59.7 31.7 | 6.7 0.8
Skill-Prompt* 51.7 66.7 48.4 0.0 4.3 10.0 28.9 | 23.7 46.2 30.6 24.4 22.1 7.5 12.5 23.9 | 0.2 0.8
OPSD 48.8 41.7 16.7 0.0 15.8 16.7 28.1 | 0.1 0.1 0.1 0.0 0.0 0.0 0.0 0.0 | 11.3 3.1
GRPO 91.2 62.5 96.2 61.9 65.0 47.4 75.0 | 39.3 60.6 41.1 37.4 34.6 15.4 26.4 36.4 | 79.8 63.3
Skill-GRPO 88.9 71.4 58.8 70.6 40.7 29.2 60.2 | 43.5 58.8 43.0 36.8 32.2 11.7 12.5 34.1 | 77.3 60.9
Skill-GRPO* 94.3 57.1 100 66.7 73.1 57.1 80.5 | 44.3 59.6 44.3 39.0 36.1 14.5 14.9 36.1 | 76.3 66.4
GRPO+OPSD 100 82.4 85.7 75.0 70.0 60.0 81.2 | 44.9 61.2 45.2 40.4 38.5 16.0 66.1 44.6 | 77.8 66.4
Skill-SD 88.2 50.0 96.2 52.4 65.0 57.9 73.4 | 44.4 60.4 44.0 39.5 40.4 15.4 64.9 44.1 | 75.9 64.0
RLSD 87.9 75.0 90.9 75.0 73.1 68.4 79.7 | 41.5 58.6 42.3 40.4 40.2 16.8 66.9 43.8 | 84.4 66.4
SDAR 97.1 62.5 100 61.9 75.0 84.2 84.4 | 44.8 58.1 44.3 38.6 36.2 15.7 66.1 43.4 | 85.0 68.0
""".splitlines())
ORIGIN = """\
Published: Qwen2.5-3B-Instruct, arXiv 2605.15155; another protocol (128 sampled tasks)."""
BAMBOOGLE = ("Most cells of Bamboogle, and so of Avg, fit a plain mean of batches of 124 questions "
             "and 1.")
NOTE = "Intervals: of one run, Wilson's over its episodes; of several, Student's over their rates."
INTERVALS = """\
Intervals: Newcombe's method 10 (score: Student's t; Avg of Search-QA: joined over data sets); p:
McNemar's exact test. How much training runs differ by seed is in neither."""
PAIRED = """\
Differences of success in points: the mean over seeds with Student's 95 % interval; p: exact sign
test, two-sided. Where the interval holds 0, the runs do not tell which one is better. Of one pair
python eval.py compare tells, game by game, whether its two checkpoints differ (McNemar)."""
KEPT = """skills data env_args prompt_style history max_turns max_prompt max_teacher_prompt
    max_response rollout_rows""".split()              # settings that come from the checkpoint
OF_GATES = ("algo", "beta", "temperature")            # so do these, for --save-episodes
OF_NO_WEIGHT = """seed out data device track micro_tokens rollout_rows small_gpu save_every
    control_every val_every val_episodes val_split""".split()   # without effect on the training
CHUNK = 1024  # episodes played together: bounds the memory of a panel of 50,000 questions

# ======== Statistics and tables ===================================================================

def mean_interval(values):
    """(mean, (low, high)) with Student's 95 % interval; of a single value (-inf, inf)."""
    n = len(values)
    mean = statistics.fmean(values)
    t95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    t = t95[n - 1] if n <= 10 else 1.96 + 2.5 / (n - 1)    # within 0.02 of the tabulated quantile
    half = t * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return mean, (mean - half, mean + half)

def macro(parts):
    """Unweighted mean of independent estimates (p, (low, high)), with its 95 % interval: distances
    to the limits add in squares (MOVER; Zou & Donner, Statistics in Medicine 27, 2008, 1693)."""
    mean = statistics.fmean(p for p, _ in parts)
    below = math.hypot(*(p - low for p, (low, _) in parts)) / len(parts)
    above = math.hypot(*(high - p for p, (_, high) in parts)) / len(parts)
    return mean, (mean - below, mean + above)

def mcnemar_exact(b, c):
    """Two-sided p of McNemar's exact test, also of the sign test: b is Binomial(b + c, 1/2)."""
    tail = 0
    term = 1                                          # b + c over k
    for k in range(min(b, c) + 1):
        tail += term
        term = term * (b + c - k) // (k + 1)
    return min(1.0, 2 * tail / 2 ** (b + c))

def paired_difference(a, b):
    """(difference, (low, high)) of success rates, b minus a. a, b: lists of booleans, position by
    position the same task. 95 % interval by Newcombe's method 10 (Statistics in Medicine 17, 1998,
    2635): both Wilson intervals, joined through the correlation phi. ValueError without pairs."""
    n = len(a)
    if len(b) != n or n == 0:
        raise ValueError("paired_difference needs two equally long lists that are not empty")
    na = sum(a)
    nb = sum(b)
    both = sum(x and y for x, y in zip(a, b))
    covariance = n * both - na * nb
    if covariance > 0:
        covariance = max(covariance - n / 2, 0)       # the method's continuity correction
    margins = na * (n - na) * nb * (n - nb)
    phi = covariance / math.sqrt(margins) if margins else 0.0

    def joined(x, y):
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    low_a, high_a = sdar.wilson(na, n)
    low_b, high_b = sdar.wilson(nb, n)
    difference = (nb - na) / n
    return difference, (difference - joined(nb / n - low_b, high_a - na / n),
                        difference + joined(high_b - nb / n, na / n - low_a))

def summarize(env_name, rows):
    """A summary per group, the paper's columns first, and `Avg` last: over all episodes, but on
    Search-QA success and F1 are means over the data sets. Rates and scores are 0 to 1."""
    groups = {r["group"] for r in rows}
    known = [name for name in COLUMNS.get(env_name, ()) if name in groups]
    out = []
    for name in [*known, *sorted(groups.difference(known)), "Avg"]:
        part = [r for r in rows if name in (r["group"], "Avg")]
        n = len(part)
        won, turns, f1, valid, admissible = (
            sum(r.get(key, 0.0) for r in part) for key in "won turns f1 valid admissible".split())
        score, (low, high) = mean_interval([r["score"] for r in part])
        out.append({"group": name, "n": n, "successes": won, "success": won / n,
                    "success_95": sdar.wilson(won, n), "score": score,
                    "score_95": (max(low, 0.0), min(high, 1.0)), "turns": turns / n, "f1": f1 / n,
                    "valid": valid / turns, "admissible": admissible / turns,
                    "failures": Counter(r["failure"] for r in part if r.get("failure"))})
    *parts, average = out
    if env_name == "search":
        rates = [(g["success"], g["success_95"]) for g in parts]
        average["success"], average["success_95"] = macro(rates)
        average["f1"] = statistics.fmean(g["f1"] for g in parts)
    return out

def published(env_name, method):
    """{column: percent, as text} of one of the paper's rows; WebShop has Score and Avg."""
    values = PAPER[method].split("|")[list(COLUMNS).index(env_name)].split()
    return dict(zip((COLUMNS[env_name] or ("Score",)) + ("Avg",), values))

def render(rows, markdown=False):
    """A table as text or Markdown; the first row is its header, the first column left-aligned."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    if markdown:
        rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:]))]
        lines.append("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip())
    return "\n".join(lines)

def percent(value, limits=None, sign=""):
    """A rate in percent, with its interval if there are limits; sign "+": a difference of rates.
    Limits of one value or of equal ones are not shown: they do not tell how far others may lie."""
    text = f"{100 * value:{sign}.1f}"
    if limits is None or not -math.inf < limits[0] < limits[1]:
        return text
    low, high = limits if sign else (max(limits[0], 0), min(limits[1], 1))
    digits = 1 if sign else 0
    return f"{text} [{100 * low:{sign}.{digits}f}, {100 * high:{sign}.{digits}f}]"

# ======== Evaluation ==============================================================================

def parser_for(command, usage, description):
    """A parser whose mistakes are one line and exit status 2."""
    prog = f"python eval.py {command}".strip()
    p = argparse.ArgumentParser(prog, f"{prog} {usage}", description, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: sdar.fail(f"{message}; see {prog} --help")
    return p

def read_flags(argv):
    """(flags, Settings, checkpoint folder or None, its state.json) of an evaluation. Settings come
    from the flags, else from the checkpoint, else from the paper."""
    shared = [*KEPT[1:], "seed", "device"]
    p = parser_for("", f"--model MODEL [flags] | {' ... | '.join(COMMANDS)} ...", __doc__)
    p.epilog = "flags of sdar.py that work too: " + " ".join(map(sdar.flag, shared))
    add = p.add_argument
    add("--model", required=True, help="run or model folder, GGUF file, Hugging Face name, tiny")
    add("--env", help="benchmark or FILE.py:Class (default: the run's, else alfworld)")
    add("--split", help="split of the panel (default: test, in ALFWorld valid_seen)")
    add("--episodes", type=int, metavar="N", help="only N tasks, drawn with a fixed seed")
    add("--skills", nargs="?", const="", metavar="DIR", help="put skills into the agent's prompt "
        "(the paper's starred rows): those in DIR, or the training's, or the built-in ones")
    add("--temperature", type=float, metavar="T", help="0: greedy (default: the paper's)")
    add("--out", metavar="FILE", help="JSON to write (default: in the folder of the model)")
    add("--save-episodes", nargs="?", type=int, const=10**9, default=0, metavar="N", help="keep N "
        "episodes (default: all) beside the JSON, to be read with python eval.py gates")
    flags, rest = p.parse_known_args(argv)
    explicit = vars(sdar.make_parser().parse_args(rest))
    for name in sorted(set(explicit).difference(shared)):
        raise UserError(f"{sdar.flag(name)} has no effect on an evaluation; leave it out")
    folder = None if flags.model == "tiny" else sdar.last_checkpoint(Path(flags.model))
    path = Path(folder or "", "state.json")           # a model folder has none
    state = sdar.read_json(path, "") if folder and path.exists() else {"settings": {}}
    saved = state.get("settings") if isinstance(state, dict) else None
    if not isinstance(saved, dict):
        raise UserError(f"{path} is damaged; delete the checkpoint {folder} to use the one before "
                        "it")
    name = flags.env or saved.get("env", sdar.Settings.env)
    s, _ = sdar.read_settings(["--env", name, "--model", flags.model])
    if saved.get("env") == name:
        explicit = {key: saved[key] for key in (*KEPT, *OF_GATES) if key in saved} | explicit
    explicit["skills"] = "" if flags.skills is None else flags.skills or explicit.get("skills", "")
    if flags.temperature is not None:
        explicit["val_temperature"] = flags.temperature
    s = replace(s, **explicit)
    sdar.check_settings(s)
    return flags, s, folder, state

def play(policy, env, ids, s, with_skills, keep, unfinished, key):
    """Every task once; one row per episode, in the order of `ids`, the first `keep` with the whole
    episode. The file `unfinished` keeps what has been played, so that the same evaluation (`key`, a
    text) continues after an interruption."""
    rows = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):   # no file, or not whole
        saved = json.loads(Path(unfinished).read_text(encoding="utf-8"))
        rows = saved["rows"] if saved["key"] == key else []
        print(f"the first {len(rows)} tasks were played before an interruption" if rows else
              f"{unfinished} is of other settings, weights or skills: not used", flush=True)
    taught = keep > 0 and not with_skills and "teacher" in sdar.method_of(s).needs
    for start in range(len(rows), len(ids), CHUNK):
        part = ids[start:start + CHUNK]
        names = [env.start(i).category for i in part] if with_skills or taught else []
        skills = [(name, env.skill(name, s.prompt_style == "brief")) for name in names]
        generator = sdar.generator_for(policy, s, "evaluation", start)
        episodes = sdar.rollout(
            policy, env, part, s, s.val_temperature, generator, skills=skills, both=taught,
            acts="skilled" if with_skills else "plain",
            label=f"tasks {start + 1}-{start + len(part)} of {len(ids)}")
        kept = episodes[:max(0, keep - start)]
        if taught:                                    # gates, as the training would log them
            turns = [t for e in kept for t in e.turns]
            sdar.score_turns(policy.model, turns, "prompt_ids", "logp", s, "student")
            sdar.score_turns(policy.model, turns, "other_ids", "teacher_logp", s, "teacher")
        rows += map(result_row, episodes)
        for row, e in zip(rows[start:], kept):
            row["episode"] = sdar.episode_text(policy, e, 0, s)
        sdar.write_text(unfinished, json.dumps({"key": key, "rows": rows}))
    return rows

def result_row(e):
    """What an evaluation keeps of an episode."""
    x = e.session
    return {"id": e.task_id, "task": x.task, "group": x.group, "won": bool(x.won),
            "score": float(x.score), "done": x.done, "f1": float(x.details.get("f1", 0.0)),
            "turns": len(e.turns), "valid": sum(t.valid for t in e.turns),
            "admissible": sum(t.admissible for t in e.turns),
            "failure": "" if x.won else sdar.failure(e)}

def evaluate(argv):
    """python eval.py --model ...: play the panel, write the JSON, print the table."""
    flags, s, folder, state = read_flags(argv)
    env = sdar.open_env(s)
    split = flags.split or ("test" if "test" in env.splits else env.splits[1])
    ids, digest = envs.panel(env, split, flags.episodes)
    whole = len(env.tasks(split))
    panel = f"{split}, {'all' if len(ids) == whole else f'{len(ids)} of'} {whole} tasks"
    skills = None if flags.skills is None else s.skills or "built-in"
    training = state["settings"]
    header = {
        "format": FORMAT, "env": s.env, "source": env.source, "builtin": env.builtin,
        "split": split, "panel": {"name": panel, "hash": digest}, "skills": skills,
        "model": s.model, "base_model": training.get("model", s.model), "training": training,
        "checkpoint": str(folder or ""), "algo": training.get("algo"), "step": state.get("step"),
        "steps": training.get("steps"), **sdar.versions(),
        "settings": {key: getattr(s, key) for key in (*KEPT, "seed", "val_temperature")}}
    out = output_file(flags.out, header, folder, f"-{len(ids)}" * (len(ids) < whole))
    policy = sdar.load_policy(s.model, s.device, sdar.tiny_texts(env, s), s.seed)
    sdar.check_lengths(policy, s)
    print(f"{env.source}\n{s.model}: {policy.model.num_parameters() / 1e6:.1f}M parameters, "
          f"temperature {s.val_temperature:g}, seed {s.seed}, {skills or 'no'} skills in the prompt"
          f"\npanel {panel}, hash {digest}", flush=True)
    began = time.time()
    weights = sorted(folder.glob("*.safetensors")) if folder else []
    files = [(path.stat().st_size, path.stat().st_mtime) for path in weights]
    key = json.dumps([comparable(header), s.model, state, torch.__version__, env.all_skills(),
                      files, flags.save_episodes])
    rows = play(policy, env, ids, s, bool(skills), flags.save_episodes, f"{out}.unfinished", key)
    step = {"step": header["step"] or 0}
    episodes = [json.dumps(row.pop("episode") | step) + "\n" for row in rows if "episode" in row]
    result = {**header, "device": str(policy.device), "seconds": time.time() - began,
              "finished": time.time(), "summary": summarize(s.env, rows), "results": rows}
    sdar.write_text(out, json.dumps(result, indent=1, allow_nan=False))
    kept = out.with_suffix(".episodes.jsonl")
    if episodes:
        sdar.write_text(kept, "".join(episodes))
    os.remove(f"{out}.unfinished")
    print_summary(result)
    print(f"written: {out} ({result['seconds']:.0f} s)"
          + f"; its episodes: python eval.py gates {kept}" * bool(episodes))

def output_file(given, header, folder, part):
    """The JSON to write. UserError, before hours of playing, if it cannot be written or holds an
    evaluation of the same weights in other settings."""
    name = f"eval-{Path(header['env']).name.replace(':', '-')}-{header['split']}"
    name += "-skills" * bool(header["skills"]) + part
    name = f"{header['model']}/{name}" if folder else f"{name}-{Path(header['model']).name}"
    out = Path(given or f"{name}.json")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"cannot write {out}; give a file that can be written with --out")
    refuse_another(out, header)
    return out

def refuse_another(out, header):
    """UserError if `out` holds an evaluation of the same weights in other settings."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        old = json.loads(out.read_text(encoding="utf-8"))
        before = comparable(old)
        differing = [key for key, value in comparable(header).items() if before[key] != value]
        if differing and all(old[x] == header[x] for x in "format model checkpoint step".split()):
            raise UserError(f"{out} holds an evaluation of this model with other "
                            f"{differing[0].removeprefix('val_')}; choose another --out")

def comparable(result):
    """What evaluations of the same weights may differ in, as text, without what changes no result:
    the number of rows decoded together and the address of a search server."""
    values = result["settings"] | {"panel": result["panel"], "skills": result["skills"]}
    values["rollout_rows"] = ""
    return {key: re.sub(r"https?://\S+", "", str(value)) for key, value in values.items()}

def print_summary(result):
    """One evaluation as a table; for real tasks with the paper's rows, for orientation."""
    extra = {"search": ["f1"], "webshop": ["score"]}.get(result["env"], [])
    known = result["env"] in COLUMNS and not result["builtin"]
    names = ["Vanilla", "GRPO", "SDAR"] if known else []
    paper = [published(result["env"], name) for name in names]
    rows = [["", "n", "success % [95 %]", *(f"{key} %" for key in extra), "turns", "valid %",
             "admissible %", *(f"paper's {name}" for name in names)]]
    for g in result["summary"]:
        rows.append([g["group"], g["n"], percent(g["success"], g["success_95"]),
                     *(percent(g[key], g.get(f"{key}_95")) for key in extra), f"{g['turns']:.1f}",
                     percent(g["valid"]), percent(g["admissible"]),
                     *(row.get(g["group"], "-") for row in paper)])
    print(render(rows))
    if counts := result["summary"][-1]["failures"].most_common():
        kinds = ", ".join(f"{kind.replace('_', ' ')} {n}" for kind, n in counts)
        print(f"Not won: {kinds}")
    print(origin(result["env"]) if paper else "Nothing published compares with these tasks.")

def origin(env_name):
    """Where the published rows of a benchmark are from."""
    return f"{ORIGIN}\n{BAMBOOGLE}" if env_name == "search" else ORIGIN

# ======== Reading evaluations: compare, table, gates, plot ========================================

def load_result(path):
    """An evaluation written by this file; UserError if it is not one, or its panel was changed."""
    result = sdar.read_json(path, f"{path} cannot be read; give a JSON that python eval.py wrote")
    try:
        texts = [text for r in result["results"] for text in (r["id"], r["task"])]
        panel = result["panel"]
        if (result["format"], panel["hash"]) != (FORMAT, envs.panel_hash(texts)):
            raise ValueError
        result["summary"] = summarize(result["env"], result["results"])
        result["tasks"] = f"{result['env']}, {panel['name']}, hash {panel['hash']}"
        if result["builtin"]:                         # other options, other tasks
            options = result["settings"]["env_args"] or "no --env-args"
            result["tasks"] += f", BUILT-IN tasks ({options})"
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError):
        raise UserError(f"{path} is not a complete evaluation of this version, or was changed; run "
                        "python eval.py again") from None
    return result

def compare(argv):
    """python eval.py compare A.json B.json: B against A, task by task."""
    p = parser_for("compare", "A.json B.json", "Pair two evaluations of one panel: B minus A.")
    p.add_argument("files", nargs=2, metavar="FILE", help="JSON that python eval.py wrote")
    files = p.parse_args(argv).files
    a, b = map(load_result, files)
    if a["tasks"] != b["tasks"]:
        raise UserError(f"only the same tasks can be paired, not {a['tasks']} and {b['tasks']}; "
                        "evaluate both with the same --split, --episodes and --env-args")
    for letter, path, r in zip("AB", files, (a, b)):
        skills = f"{r['skills'] or 'no'} skills in the prompt"
        print(f"{letter}: {path}: {r['model']}, step {r['step']}, {skills}")
    print(a["tasks"] + "\n" + render(paired_rows(a, b)))
    if a["env"] == "webshop":                         # elsewhere the score is the success
        scores = [v["score"] - u["score"] for u, v in zip(a["results"], b["results"])]
        print(f"score, B - A [95 %]: {percent(*mean_interval(scores), '+')}")
    print(INTERVALS)
    for key, value in a["settings"].items():
        if value != b["settings"].get(key):
            print(f"note: {key} differs, {value} and {b['settings'].get(key)}")

def paired_rows(a, b):
    """The table of a comparison."""
    for u, v in zip(a["results"], b["results"]):
        v["group"] = u["group"]             # other versions of the code may have named it otherwise
    rows = [["", "n", "A %", "B %", "B - A [95 %]", "only A", "only B", "p"]]
    parts = []
    for ga, gb in zip(a["summary"], summarize(b["env"], b["results"])):
        x, y = ([row["won"] for row in r["results"] if ga["group"] in (row["group"], "Avg")]
                for r in (a, b))
        only_a = sum(u and not v for u, v in zip(x, y))
        only_b = sum(v and not u for u, v in zip(x, y))
        parts.append(paired_difference(x, y))
        pairs = [only_a, only_b, f"{mcnemar_exact(only_a, only_b):.3g}"]
        if ga["group"] == "Avg" and a["env"] == "search":     # over data sets, not over episodes
            parts[-1] = macro(parts[:-1])
            pairs = ["-"] * 3
        rows.append([ga["group"], ga["n"], percent(ga["success"]), percent(gb["success"]),
                     percent(*parts[-1], "+"), *pairs])
    return rows

def method_name(result):
    """The paper's name of an evaluation's row; a star where the agent's prompt had skills."""
    if result["algo"] is None:
        return "Skill-Prompt*" if result["skills"] else "Vanilla"
    known = {name.lower(): name for name in PAPER}
    name = "Warm start" if result["step"] == 0 else known.get(result["algo"], result["algo"])
    return name + "*" * bool(result["skills"])

def table(argv):
    """python eval.py table RUN ...: one table per panel and base model."""
    p = parser_for("table", "RUN ... [--paired]", "The paper's Table 1 from evaluations, or "
                   "differences between methods.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or JSON of an evaluation; "
                   "with --paired run folder, or CSV of runs")
    p.add_argument("--markdown", action="store_true", help="Markdown instead of text")
    p.add_argument("--paired", nargs="?", const="", metavar="BASELINE", help="differences of runs "
                   "with the same seed, from the validation after the last step (default: to GRPO)")
    p.add_argument("--csv", metavar="FILE", help="with --paired: write the runs, a line each")
    flags = p.parse_args(argv)
    if flags.csv or flags.paired is not None or flags.runs[0].endswith(".csv"):
        return study(flags)
    newest = {}
    notes = []
    for run in flags.runs:
        for r in evaluations(run, notes):
            settings = {**r["settings"], "seed": 0}
            which = json.dumps([r["checkpoint"] or r["model"], r["training"], r["tasks"], settings])
            old = newest.setdefault(which, r)         # the same file may be named twice
            newest[which] = max(r, old, key=lambda r: r["finished"])
            if r["finished"] != old["finished"]:
                notes.append(f"{run}: evaluated more than once in the same settings, newest shown")
    for tasks, base in sorted({(r["tasks"], r["base_model"]) for r in newest.values()}):
        results = [r for r in newest.values() if (r["tasks"], r["base_model"]) == (tasks, base)]
        name = results[0]["env"]
        notes_below = f"{origin(name)}\n{NOTE}" if name in COLUMNS else NOTE
        print(f"{tasks}, model {base}\n\n{render(method_table(results), flags.markdown)}\n\n"
              f"{notes_below}\n")
        if rows := followup_rows(results):
            rows = [["published by", "model and method", "percent"], *rows]
            print(f"Follow-ups: other code, prompts and metrics, not a ranking, not confirmed by "
                  f"others\n\n{render(rows, flags.markdown)}\n")
    for note in notes:
        print(note)

def evaluations(run, notes):
    """The evaluations of a run's last checkpoint; `notes` gets a line on what is missing."""
    path = Path(run)
    if not path.exists():
        raise UserError(f"{run} does not exist; give run folders or JSONs of python eval.py")
    last = sdar.last_checkpoint(path)
    found = [load_result(p) for p in (sorted(path.glob("eval-*.json")) if last else [path])]
    results = [r for r in found if not last or Path(r["checkpoint"]).name in ("", last.name)]
    if not results:
        notes.append(f"{run}: missing, evaluate it with python eval.py --model {run}")
    elif results[0]["step"] != results[0]["steps"]:
        notes.append(f"{run}: not finished, step {results[0]['step']} of {results[0]['steps']}")
    if left := len(found) - len(results):
        notes.append(f"{run}: {left} evaluation(s) of an earlier checkpoint left out")
    return results

def told_apart(name, results):
    """{row: evaluations of a method}. Only runs that differ in nothing but seed and bookkeeping
    share a row; others are named by what they differ in, as "SDAR, beta 0.0"."""
    used = []
    for r in results:
        built_in = r["training"].get("data") == "built-in"    # other data may have moved since
        own = {f"training's {key}" if key in KEPT else key: str(value)
               for key, value in r["training"].items() if key not in OF_NO_WEIGHT}
        own |= {key: str(value) for key, value in r["settings"].items() if key not in OF_NO_WEIGHT}
        used.append(own | {"training's data": "built-in" if built_in else "other"})
    names = sorted(set().union(*used))
    differing = [key for key in names if len({own.get(key) for own in used}) > 1]
    rows = {}
    for own, r in zip(used, results):
        label = ", ".join([name, *(f"{key} {own.get(key)}" for key in differing)])
        rows.setdefault(label, []).append(r)
    return rows

def method_table(results):
    """The table of one panel, in the paper's order."""
    env = results[0]["env"]
    counts = {g["group"]: f"{g['group']} ({g['n']})" for g in results[0]["summary"]}
    columns = ["Score", "Avg"] if env == "webshop" else list(counts)
    rows = [["method", "runs", *(counts.get(column, column) for column in columns)]]
    found = {}
    for r in results:
        found.setdefault(method_name(r), []).append(r)
    for name in [*sorted(found.keys() - PAPER.keys()), *PAPER]:
        for label, runs in sorted(told_apart(name, found.get(name, [])).items()):
            rows.append([label, len(runs), *(cell(runs, column) for column in columns)])
        if name in PAPER and env in COLUMNS:
            row = published(env, name)
            rows.append([f"{name}, published", "", *(row.get(column, "-") for column in columns)])
    return rows

def followup_rows(results):
    """What the papers of the follow-ups among these evaluations print for their benchmark; GiGPO's
    row is in the papers that build on it. [] if there is none."""
    if results[0]["env"] not in COLUMNS:
        return []
    column = 1 + ("alfworld", "search", "webshop").index(results[0]["env"])
    named = {r["algo"] for r in results}
    named |= {"ucob", "paw"} if "gigpo" in named else set()
    rows = []
    for line in FOLLOWUPS:
        algo, model, methods = line.split(maxsplit=2)
        for cells in map(str.split, methods.split("|") if algo in named else ()):
            if cells[column] != "-":
                rows.append([LABELS[algo], f"{model} {cells[0].replace('_', ' ')}", cells[column]])
    return rows

def cell(results, column):
    """The mean over runs of a column, in percent with its 95 % interval (see NOTE)."""
    kind, group = ("score", "Avg") if column == "Score" else ("success", column)
    found = [g for r in results for g in r["summary"] if g["group"] == group]
    mean, limits = mean_interval([g[kind] for g in found])
    return percent(mean, found[0][f"{kind}_95"] if len(found) == 1 else limits)

# ======== A study: runs paired by seed ============================================================

STUDY = {"seed": int, "method": str, "setting": str, "successes": int, "episodes": int,
         "seconds": float}                            # the columns of its CSV, a line a run

def study_rows(paths):
    """The rows of STUDY in run folders and CSV files."""
    rows = []
    for path in map(Path, paths):
        try:
            if path.suffix != ".csv":
                rows += run_row(path)
                continue
            with open(path, encoding="utf-8", newline="") as f:
                rows += [{name: kind(row[name]) for name, kind in STUDY.items()}
                         for row in csv.DictReader(f)]
            if any(row["episodes"] < 1 for row in rows):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path} is damaged, or neither a run nor a CSV with the columns "
                            f"{','.join(STUDY)}") from None
    return rows

def run_row(run):
    """[a run's row of STUDY], [] if it is not finished. It takes the validation after the last step
    and the seconds of RL's steps; setting: the panel and what differs from GRPO's defaults."""
    saved = sdar.read_json(run / "config.json", f"{run} holds no run (no config.json)")
    last = (sdar.read_lines(run / "validation.jsonl") or [{}])[-1]
    if last.get("step") != saved["steps"]:
        print(f"{run} is left out, because it has no validation after its last step")
        return []
    told = {"env": saved["env"], "model": saved["model"], "panel": last["panel"]}
    if sdar.is_path("model", saved["model"]):         # the warm start of this seed
        del told["model"]
    plain = sdar.preset({"env": saved["env"], "model": saved["model"], "algo": "grpo"})
    for name, usual in vars(plain).items():
        if name not in (*OF_NO_WEIGHT, "algo") and saved.get(name, usual) != usual:
            told[name] = saved[name]
    seconds = sum(row.get("seconds", 0) for row in sdar.read_lines(run / "metrics.jsonl"))
    setting = ", ".join(f"{name} {value}" for name, value in told.items())
    return [dict(zip(STUDY, (saved["seed"], saved["algo"], setting, last["successes"],
                             last["episodes"], round(seconds, 1))))]

def paired_arms(rows, baseline):
    """[(arm, its baseline, differences of success of the runs with the same seed)]. An arm is a
    method and what of its setting not all runs share. Its baseline is the arm that is named, else
    that of GRPO with most in common, else the first."""
    settings = [row["setting"].split(", ") for row in rows]
    shared = {"", *set.intersection(*map(set, settings))} if rows else ()
    arms = {}
    for row, setting in zip(rows, settings):
        name = ", ".join([row["method"], *(part for part in setting if part not in shared)])
        if row["seed"] in arms.setdefault(name, {}):
            raise UserError(f"{name} has seed {row['seed']} twice; leave one of them out")
        arms[name][row["seed"]] = row["successes"] / row["episodes"]
    if baseline and baseline not in arms:
        raise UserError(f"no finished run is of {baseline}; give --paired one of: "
                        f"{'; '.join(arms) or 'nothing'}")
    grpo = [arm for arm in arms if arm.split(", ")[0] == "grpo"] or list(arms)[:1]
    found = []
    for name, own in arms.items():
        parts = set(name.split(", "))
        base = baseline or max(grpo, key=lambda arm: len(parts.intersection(arm.split(", "))))
        differences = [rate - arms[base][seed] for seed, rate in own.items() if seed in arms[base]]
        if len(differences) < len(own):
            print(f"{name}: no partner in {base} for {len(own) - len(differences)} of its seeds")
        if name != base and differences:
            found.append((name, base, differences))
    return found

def study(flags):
    """Print the paired differences of a study; --csv keeps its runs."""
    rows = study_rows(flags.runs)
    if flags.csv:
        with open(flags.csv, "w", encoding="utf-8", newline="") as f:
            csv.writer(f, lineterminator="\n").writerows([STUDY, *(row.values() for row in rows)])
    cells = [["", "against", "pairs", "difference [95 %]", "higher", "lower", "sign test p"]]
    arms = paired_arms(rows, flags.paired)
    if not arms:
        raise UserError("no two finished runs share a seed and differ in method or setting; give "
                        "more runs")
    for name, base, differences in arms:
        higher = sum(x > 0 for x in differences)
        lower = sum(x < 0 for x in differences)
        mean, limits = mean_interval(differences)
        cells.append([name, base, len(differences), percent(mean, limits, "+"), higher, lower,
                      f"{mcnemar_exact(higher, lower):.3g}"])
    hours = sum(row["seconds"] for row in rows) / 3600
    print(f"{render(cells, flags.markdown)}\n\n{len(rows)} runs, {hours:.1f} h of RL.\n{PAIRED}")

def gates(argv):
    """python eval.py gates RUN: a logged episode with each token's gap gate, as text or a page."""
    p = parser_for("gates", "RUN [--episode N] [--html FILE]", "Show a logged episode; a token "
                   "whose gate is closed (0) is red, one whose gate is open (1) is green.")
    p.add_argument("run", metavar="RUN", help="run folder, or file of --save-episodes")
    p.add_argument("--episode", type=int, metavar="N", help="line of that file, from 1 (default: "
                   "the last episode, if possible one with gates)")
    p.add_argument("--html", metavar="FILE", help="write a page to open in a browser")
    flags = p.parse_args(argv)
    path = Path(flags.run)
    path = path / "episodes.jsonl" if path.is_dir() else path
    rows = sdar.read_lines(path)
    if not rows:
        raise UserError(f"{path} holds no episodes; give a run folder, or the .episodes.jsonl of "
                        "eval.py --save-episodes")
    try:
        gated = [n for n, row in enumerate(rows, 1) if any("gate" in turn for turn in row["turns"])]
        number = flags.episode if flags.episode is not None else (gated or [len(rows)])[-1]
        if not 1 <= number <= len(rows):
            raise UserError(f"{path} has no episode {number}; choose 1 to {len(rows)}")
        shown = episode_page(rows[number - 1]) if flags.html else episode_lines(rows[number - 1])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({sdar.first_line(error)}); choose another --episode, "
                        "or train again") from None
    if flags.html:
        sdar.write_text(flags.html, shown)
        shown = f"written: {flags.html} (episode {number} of {len(rows)})"
    print(shown)

def printable(text):
    """The text without characters that command a terminal."""
    return "".join(c for c in str(text) if c.isprintable() or c in "\n\t")

def tokens_of(turn):
    """[(token, its gate, its numbers as text)] of a logged turn; without a teacher no gate."""
    if "gate" not in turn:
        return [(printable(turn["response"]), None, "")]
    names = ("tokens", "gate", "gap", "teacher_logp", "student_logp")
    return [(printable(token), gate, f"gate {gate:.2f}   gap {gap:+.3f}   "
             f"log-probability: teacher {teacher:.3f}, student {student:.3f}")
            for token, gate, gap, teacher, student in zip(*(turn[name] for name in names))]

def episode_parts(row):
    """[(kind, content)] of an episode in the order of reading: "fact", "turn" and "seen" are texts,
    "said" is the list of a response's tokens."""
    kind = str(row.get("failure") or "").replace("_", " ")
    outcome = "won" if row["won"] else "not won" + f" ({kind})" * bool(kind)
    skill = ": ".join(filter(None, (row["skill"], row.get("skill_text"))))
    goal = row.get("goal") if row.get("goal") != row.get("task") else ""
    facts = {"Outcome": f"{outcome}, step {row['step']}, task {row['task_id']}",
             "Task": row.get("task"), "Success is": goal, "Skill": skill}
    parts = [("fact", f"{name}: {printable(text)}") for name, text in facts.items() if text]
    for number, turn in enumerate(row["turns"], 1):
        notes = [f"{name} {turn[name]:g}" for name in ("reward", "advantage") if name in turn]
        notes += [text for key, text in (("valid", "malformed"), ("admissible", "not admissible"))
                  if not turn.get(key, True)]
        parts += [("turn", f"turn {number}" + ": " * bool(notes) + ", ".join(notes)),
                  ("seen", printable(turn["observation"])), ("said", tokens_of(turn))]
    if last := printable(row.get("last_observation", "")):
        parts += [("turn", "after the last turn"), ("seen", last)]
    return parts

def episode_lines(row):
    """An episode for the terminal: coloured tokens where it has colour, else each gate's number."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def shown(token, gate, _):
        if gate is None or not colour:
            return token if gate is None else f"{token}[{gate:.2f}]"
        end = (230, 90, 80) if gate < 0.5 else (70, 185, 100)
        red, green, blue = (round(255 - (255 - c) * abs(2 * gate - 1)) for c in end)
        start = f"\033[48;2;{red};{green};{blue};38;5;16m"
        return start + token.replace("\n", f"\033[0m\n{start}") + "\033[0m"

    before = {"turn": "\n", "seen": "> "}
    return "\n".join("".join(shown(*token) for token in content) if kind == "said" else
                     before.get(kind, "") + content for kind, content in episode_parts(row))

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>An episode and its gates</title><style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: auto;
       padding: 1rem 1rem 6rem; overflow-wrap: anywhere; white-space: pre-wrap }
.fact, .seen { margin: .3rem 0 } .turn { font-weight: bold; margin: 1.4rem 0 .3rem }
.said { font: 15px/1.8 ui-monospace, monospace; padding: .4rem .7rem; border-radius: .4rem;
        border: 1px solid #8886 }
.said span { border-radius: .2rem } .said span:focus { outline: 2px solid }
.said span:hover::after, .said span:focus::after { content: attr(data-numbers); position: fixed;
        left: 0; right: 0; bottom: 0; z-index: 1; padding: .8rem 1rem; background: #223;
        color: #fff }
.bar { display: flex; justify-content: space-between; padding: 0 .4rem; border-radius: .3rem;
       background: linear-gradient(90deg, rgb(220 50 40/.65), transparent, rgb(30 160 70/.65)) }
</style></head><body><h1>An episode and its gates</h1>"""
LEGEND = """<div class="bar"><small>gate 0</small><small>0.5</small><small>gate 1</small></div>\
<small>Point at a token, or tap it, to see its numbers.</small>"""

def episode_page(row):
    """An episode as one HTML page without scripts. All of its text is escaped."""
    def shown(token, gate, numbers):
        if gate is None:
            return escape(token)
        colour = f"{'220 50 40' if gate < 0.5 else '30 160 70'}/{0.65 * abs(2 * gate - 1):.2f}"
        return (f'<span tabindex="0" data-numbers="{escape(numbers)}" '
                f'style="background:rgb({colour})">{escape(token)}</span>')

    lines = []
    for kind, content in episode_parts(row):
        said = kind == "said"
        text = "".join(shown(*token) for token in content) if said else escape(content)
        lines.append(f'<div class="{kind}">{text}</div>')
    legend = LEGEND * any("<span" in line for line in lines)
    return "".join([PAGE, legend, *lines, "</body></html>"])

def plot(argv):
    """python eval.py plot RUN ...: learning curves, or the paired differences of a study."""
    p = parser_for("plot", "RUN ...", "Draw learning curves, a column for each benchmark.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folder, with --paired also a CSV")
    p.add_argument("--paired", nargs="?", const="", metavar="BASELINE", help="draw the differences "
                   "that table --paired prints")
    p.add_argument("--out", default="curves.png", metavar="FILE", help="picture (%(default)s)")
    flags = p.parse_args(argv)
    try:
        from matplotlib.figure import Figure          # without pyplot: no window, no global state
    except ImportError:
        raise UserError("plot needs matplotlib: pip install matplotlib") from None
    if flags.paired is not None or flags.runs[0].endswith(".csv"):
        figure = plot_forest(Figure, paired_arms(study_rows(flags.runs), flags.paired))
    else:
        figure = plot_curves(Figure, flags.runs)
    try:
        figure.savefig(flags.out, dpi=120)
    except ValueError as error:                       # a format that matplotlib does not write
        raise UserError(f"cannot write {flags.out}: {sdar.first_line(error)}; choose another "
                        "--out") from None
    print(f"written: {flags.out}")

def plot_forest(Figure, arms):
    """A row for each arm: its pairs as dots, their mean and its interval."""
    figure = Figure(figsize=(8, 1.5 + 0.4 * len(arms)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.6", linewidth=1)
    for y, (_, _, differences) in enumerate(arms):
        mean, limits = mean_interval(differences)
        axes.plot([100 * x for x in differences], [y] * len(differences), "C0.", alpha=0.4)
        axes.plot([100 * x for x in limits], [y, y], "C0")
        axes.plot(100 * mean, y, "C0D")
    names = [f"{name} against {base}, {len(differences)} pair{'s' * (len(differences) > 1)}"
             for name, base, differences in arms]
    axes.set_yticks(range(len(arms)), names)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel("difference of success, points; dots: pairs, bar: 95 % over seeds")
    return figure

def plot_curves(Figure, runs):
    """Validation success with its intervals, and mean gap, over the steps of RL; a column for each
    benchmark."""
    columns = {}
    for run in map(Path, runs):
        config = sdar.read_json(run / "config.json", f"{run} holds no run (no config.json)")
        columns.setdefault(config.get("env"), []).append(run)
    figure = Figure(figsize=(1 + 4 * len(columns), 6), layout="constrained")
    axes = figure.subplots(2, len(columns), squeeze=False)
    for (env, runs), (above, below) in zip(columns.items(), axes.T):
        for run in runs:
            tests = sdar.read_lines(run / "validation.jsonl")
            gaps = [row for row in sdar.read_lines(run / "metrics.jsonl") if "gap" in row]
            if not tests:
                raise UserError(f"{run} has no validation in its log; leave it out")
            steps = [row["step"] for row in tests]
            rates = [[100 * p for p in (row["success"], *row["success_95"])] for row in tests]
            mean, low, high = zip(*rates)
            line, = above.plot(steps, mean, label=run.name)
            color = line.get_color()
            above.fill_between(steps, low, high, color=color, alpha=0.15)
            below.plot([row["step"] for row in gaps], [row["gap"] for row in gaps], color=color)
        above.set(title=env, ylabel="validation success, %", ylim=(0, 100))
        above.legend()
        below.set(xlabel="step", ylabel="mean gap, nats per token")
    return figure

# ======== First contact: is a model's gap about the skill's content? ==============================

TEXTS = {"its own skill": lambda t: t.teacher_logp,
         "another category's": lambda t: t.extra["control"],
         "unrelated text": lambda t: t.extra["control1"]}
PLACES = {"all": (0, math.inf), "1-7": (0, 7), "8-31": (7, 31), "32-63": (31, 63),
          "64-": (63, math.inf)}                      # in the response
OF_TEXT = ("mean gap [95 %]", "share < 0", "mean gate", "share > .5")
BESIDE = ("own gap minus this", "correlation", "gate moved by > .1")
PAPER_GAP = ["paper, Qwen2.5-3B, first step", "all", "", "-0.18", "above .5", "0.43", "about .25"]

def gap_turns(policy, env, s, count):
    """The turns of rollouts of `count` training tasks, scored without a skill and with each of
    TEXTS. The unrelated one is another benchmark's skills, repeated and cut to the same length."""
    tasks = sdar.draw_tasks(env, s, 0, count)
    skills = sdar.choose_skills(env, tasks, s, sdar.State(policy, None))
    table = envs.SHOP_SKILLS if s.env == "alfworld" else envs.ALFWORLD_SKILLS
    texts = [" ".join(table.values()), *(skill[1] for skill in skills)]
    other, *own = policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
    unrelated = [policy.tokenizer.decode((other * len(ids))[:len(ids)]) for ids in own]
    skills = [(*skill, text) for skill, text in zip(skills, unrelated)]
    draw = sdar.generator_for(policy, s, "gap")
    played = sdar.rollout(policy, env, tasks, s, s.temperature, draw, skills=skills, both=True)
    turns = [t for e in played for t in e.turns]
    for prompt, result in (("prompt_ids", "logp"), ("other_ids", "teacher_logp")):
        sdar.score_turns(policy.model, turns, prompt, result, s, result)
    sdar.score_controls(policy.model, turns, s)
    return turns

def clustered(owners, x, y=None):
    """[mean of x (N,), or Pearson's r of x and y, and its 95 % interval], by a bootstrap of whole
    episodes (owners (N,)), because the tokens of one are not independent."""
    z = x if y is None else y
    values = torch.stack([torch.ones_like(x), x, z, x * x, z * z, x * z], 1)            # (N, 6)
    names, index = owners.unique(return_inverse=True)
    sums = values.new_zeros(len(names), 6).index_add(0, index, values)                  # (E, 6)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(names), (2000, len(names)), generator=generator)
    sums = torch.cat([sums.sum(0)[None], sums[draws].sum(1)])                           # (2001, 6)
    n, x, z, xx, zz, xz = sums.T
    r = (n * xz - x * z) / ((n * xx - x * x) * (n * zz - z * z)).sqrt()
    results = x / n if y is None else r
    return [results[0].item(), *results[1:].nanquantile(x.new_tensor([0.025, 0.975])).tolist()]

def gap_rows(turns, s):
    """A dict for each of TEXTS and PLACES: tokens, and OF_TEXT and BESIDE with their intervals."""
    lengths = torch.tensor([len(t.response_ids) for t in turns])
    owners = torch.tensor([t.rollout for t in turns]).repeat_interleave(lengths)        # (N,)
    places = torch.cat([torch.arange(n) for n in lengths])                              # (N,)
    gaps = [torch.cat([score(t) - t.logp for t in turns]) for score in TEXTS.values()]
    gaps = torch.stack(gaps).double()                                                   # (3, N)
    gates = torch.sigmoid(s.beta * gaps)
    rows = []
    for text, gap, gate in zip(TEXTS, gaps, gates):
        columns = (gap, gap < 0, gate, gate > 0.5, gaps[0] - gap, (gate - gates[0]).abs() > 0.1)
        for place, (first, end) in PLACES.items():
            at = (places >= first) & (places < end)
            if at.any():
                values = [clustered(owners[at], x[at].double()) for x in columns]
                values.insert(5, clustered(owners[at], gaps[0][at], gap[at]))
                row = {"text": text, "place": place, "tokens": int(at.sum())}
                rows.append(row | dict(zip(OF_TEXT + BESIDE, values)))
    return rows

def gap(argv):
    """python eval.py gap: the gap of a model on its own rollouts, and under texts of no use."""
    p = parser_for("gap", "--model MODEL [flags of sdar.py]", "Is a model's gap about the skill? "
                   "Beside it stands the gap under other texts. The default is --max-turns 2.")
    p.add_argument("--model", required=True, help="run or model folder, GGUF file, hub name, tiny")
    p.add_argument("--episodes", type=int, default=16, metavar="N", help="training tasks (16)")
    p.add_argument("--out", metavar="FILE", help="JSON to write (default: gap-ENV-MODEL.json)")
    flags, rest = p.parse_known_args(argv)
    if flags.episodes < 2:
        raise UserError("--episodes must be at least 2, because the intervals are over episodes")
    s, _ = sdar.read_settings(["--model", flags.model, "--max-turns", "2", *rest])
    s = replace(s, control_every=1, retrieval="km")
    env = sdar.open_env(s, training=True)
    policy = sdar.load_policy(s.model, s.device, sdar.tiny_texts(env, s), s.seed)
    turns = gap_turns(policy, env, s, flags.episodes)
    n = len(turns)
    valid = sum(t.valid for t in turns)
    told = {name: getattr(s, name) for name in "env model temperature beta max_turns seed".split()}
    facts = {**told, "source": env.source, "episodes": flags.episodes, "responses": n,
             "well_formed": valid, "cut": sum(t.cut for t in turns), "rows": gap_rows(turns, s)}
    out = Path(flags.out or f"gap-{Path(s.env).name}-{Path(s.model).name}.json")
    sdar.write_text(out, json.dumps(facts, indent=1))
    print(f"{env.source}\n{s.model}: {flags.episodes} episodes, {n} responses at temperature "
          f"{s.temperature:g}, {percent(valid / n, sdar.wilson(valid, n))} % well-formed, "
          f"{facts['cut']} cut at --max-response\n{gap_text(facts['rows'])}\nwritten: {out}")

def gap_text(rows):
    """The rows as two tables: each text by itself, and other texts beside the skill."""
    def cells(row, names):
        return ["{:.3f} [{:.3f}, {:.3f}]".format(*row[name]) for name in names]

    table = [[r["text"], r["place"], r["tokens"], *cells(r, OF_TEXT)] for r in rows]
    beside = [[r["text"], *cells(r, BESIDE)] for r in rows if r["place"] == "all"]
    return "\n".join([render([["in the prompt", "place", "tokens", *OF_TEXT], *table, PAPER_GAP]),
                      render([["beside its own skill", *BESIDE], *beside[1:]])])

# ======== Speed: one training step, then its parts beside the plain way ===========================

SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
SHAPES = {"0.5B": (896, 4864, 24, 14, 2), "1.5B": (1536, 8960, 28, 12, 2),
          "3B": (2048, 11008, 36, 16, 2)}             # of Qwen2.5
LONG = "--prompt-style paper --max-prompt 2048 --max-teacher-prompt 3072 --max-response 512".split()

def random_policy(shape, s, env):
    """A policy with random weights of one of SHAPES and `tiny`'s tokenizer."""
    from transformers import AutoModelForCausalLM, Qwen2Config
    sizes = dict(zip(SIZES.split(), SHAPES[shape]))
    config = Qwen2Config(vocab_size=151936, tie_word_embeddings=True, **sizes)
    device = sdar.pick_device(s.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return sdar.wrap_policy(model, sdar.build_tiny(sdar.tiny_texts(env, s, 50), s.seed)[1])

def bench_step(policy, env, s):
    """The turns of one training step, whose phases it prints. Any token may end a response, so that
    0.4 of --max-response is the mean, as measured for SmolLM2-135M-Instruct on ALFWorld."""
    ending = range(math.ceil(len(policy.head.weight) / (0.4 * s.max_response)))
    state = sdar.make_state(replace(policy, end_ids=frozenset(ending), closing_ids=frozenset()), s)
    state.teacher = sdar.load_teacher(policy, s)
    needed = s.kl or "reference" in sdar.method_of(s).needs
    reference = copy.deepcopy(policy.model) if needed else None
    for part in (replace(s, max_turns=1), s):         # one turn to warm up
        episodes, phases = sdar.play_step(state, env, reference, part)
        m = sdar.learn_step(state, episodes, phases, part)
    print(f"one step of {s.algo}: {m['episodes']} episodes of {m['turns']:.1f} turns")
    for name, value in m.items():
        if name.startswith(("prompt_t", "response_t", "seconds", "tokens_per", "peak")) and value:
            print(f"  {name:<24}{value:>12,.2f}")
    return [t for e in episodes for t in e.turns]

def padded(rows, side, device):
    """Token ids and mask, (B, L), of lists of ids."""
    rows = [torch.tensor(row, device=device) for row in rows]
    ones = [torch.ones_like(row) for row in rows]
    return [torch.nn.utils.rnn.pad_sequence(x, True, 0, side) for x in (rows, ones)]

@torch.no_grad()
def plain_generate(policy, prompts, limits):
    """Responses of transformers' generate, (B, longest limit). Row i ends after limits[i] tokens,
    as if its EOS came there; generate pads it with token 0 until the last row has ended."""
    ids, mask = padded(prompts, "left", policy.device)                                  # (B, L)
    ends = torch.tensor(limits, device=policy.device) + ids.shape[1]                    # (B,)
    return policy.model.generate(
        ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=max(limits),
        pad_token_id=0, eos_token_id=len(policy.head.weight), stopping_criteria=[
            lambda ids, scores, **_: ids.shape[1] >= ends])[:, ids.shape[1]:].cpu()

def plain_logps(model, prompts, responses, s):
    """Log-probabilities and mask, (B, T), as usually written: prompts padded on the left, responses
    on the right, the logits of all response positions at once in fp32."""
    left, left_mask = padded(prompts, "left", model.device)
    right, right_mask = padded(responses, "right", model.device)
    mask = torch.cat([left_mask, right_mask], 1)                                        # (B, L)
    logits = model(input_ids=torch.cat([left, right], 1), attention_mask=mask, use_cache=False,
                   position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                   logits_to_keep=right.shape[1] + 1).logits[:, :-1]                    # (B, T, V)
    logps = torch.log_softmax(logits.float() / s.temperature, -1)
    return logps.gather(2, right[..., None])[..., 0], right_mask

def comparisons(policy, turns, s):
    """{title: (call here, call of the plain way)} on the same turns."""
    prompts = [t.prompt_ids for t in turns]
    limits = [len(t.response_ids) for t in turns]
    endless = replace(policy, end_ids=frozenset(), closing_ids=frozenset(), cache=None)
    generator = sdar.generator_for(policy, s, "bench")
    batches = sdar.micro_batches(turns, s.micro_tokens)
    size = -(-len(turns) // len(batches))
    in_order = [turns[i:i + size] for i in range(0, len(turns), size)]

    def generate():
        return list(sdar.generate(endless, dict(enumerate(prompts)), s, 1.0, (), generator, limits))

    def run(logps, batches, backward):
        for batch in batches:
            with torch.set_grad_enabled(backward):
                logp, mask = logps(policy.model, [t.prompt_ids for t in batch],
                                   [t.response_ids for t in batch], s)
            if backward:
                (logp * mask).sum().backward()
        logp.cpu()                                    # waits for a GPU

    pairs = {"rollout": (generate, partial(plain_generate, policy, prompts, limits))}
    for title, backward in (("scoring", False), ("forward and backward", True)):
        pairs[title] = (partial(run, sdar.response_logps, batches, backward),
                        partial(run, plain_logps, in_order, backward))
    return pairs

def bench(argv):
    """python eval.py bench: a training step by phases, then its parts beside the plain way."""
    p = parser_for("bench", "[flags of sdar.py]", "Speed; without flags of a job of `tiny`.")
    p.add_argument("--random-weights", choices=list(SHAPES), help="random weights of this Qwen2.5")
    p.add_argument("--pairs", type=int, default=3, help="timed rounds of each comparison (3)")
    p.add_argument("--model", default="tiny", help=argparse.SUPPRESS)
    flags, rest = p.parse_known_args(argv)
    if flags.pairs < 1:
        raise UserError("--pairs must be above 0")
    name = flags.random_weights or flags.model
    small = ["--groups", "8", "--max-turns", "2"] + LONG * (name == "tiny")
    s, _ = sdar.read_settings(["--model", name, *small, *rest])
    env = sdar.open_env(s)
    policy = random_policy(name, s, env) if flags.random_weights else sdar.load_policy(
        name, s.device, sdar.tiny_texts(env, s), s.seed)
    print(f"{env.source}\n{name}: {policy.model.num_parameters() / 1e6:.1f}M parameters, "
          f"{policy.device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    turns = bench_step(policy, env, s)[-s.rollout_rows:]
    table = [["seconds", "sdar.py", "plain", "ratio"]]
    for title, calls in comparisons(policy, turns, s).items():
        rounds = [[timeit.timeit(call, number=1) for call in calls] for _ in range(flags.pairs + 1)]
        ours, plain = map(statistics.median, zip(*rounds[1:]))    # the first round warms up
        table.append([title, f"{ours:.3f}", f"{plain:.3f}", f"{plain / ours:.2f}"])
    lengths = [len(t.response_ids) for t in turns]
    print(f"{len(turns)} turns, {sum(len(t.prompt_ids) for t in turns)} + {sum(lengths)} tokens, "
          f"longest response {max(lengths)}\n{render(table)}\nplain: transformers' generate with "
          "the same lengths; padded batches in order with full logits")

COMMANDS = {"compare": compare, "table": table, "gates": gates, "plot": plot, "gap": gap,
            "bench": bench}

def main(argv=None):
    """The command line; a user's mistake is one line and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] not in COMMANDS and not argv[0].startswith("-"):
        close = difflib.get_close_matches(argv[0], COMMANDS, 1) or [*COMMANDS]
        sdar.fail(f"there is no command {argv[0]!r}; choose {', '.join(close)}, or give --model")
    command, *rest = argv if argv and argv[0] in COMMANDS else ["", *argv]

    def run():
        try:
            COMMANDS.get(command, evaluate)(rest)
            sys.stdout.flush()
        except BrokenPipeError:                       # the reader, as in `| head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    sdar.run_command(run)

if __name__ == "__main__":
    main()
