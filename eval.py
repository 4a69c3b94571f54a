"""Measure what sdar.py trained: fixed panels of test tasks, intervals, paired comparisons, the paper's table, speed.

    python eval.py --model RUN                        # the last checkpoint of a run on its benchmark's test split
    python eval.py --env alfworld --model Qwen/Qwen2.5-1.5B-Instruct --split valid_unseen --skills
    python eval.py compare A.json B.json              # the same tasks under two policies: difference, interval, p
    python eval.py table RUN ... [--markdown]         # the paper's Table 1 from finished runs, published rows beside
    python eval.py bench [flags of sdar.py]           # speed and memory beside the plain way, --random-weights CONFIG
    python eval.py gates RUN                          # a logged episode with the gate value behind each token
    python eval.py plot RUN ... [--out FILE]          # learning curves as a picture (needs matplotlib)

A panel is a sorted list of task ids, named by its hash. Every task is played once; an episode cut off at the turn
limit has failed. It is the last checkpoint that is measured, never the best. Means are over episodes, never over
batches; Search-QA's `Avg` is the mean over its data sets, as in the paper. Rates carry 95 % Wilson intervals. An
evaluation that was interrupted, started again, goes on after the last 1,024 tasks that it had finished.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

import envs
import sdar
from envs import UserError

FORMAT = "sdar-eval-2"
COLUMNS = {"alfworld": ("Pick", "Look", "Clean", "Heat", "Cool", "Pick2"),
           "search": ("NQ", "TriviaQA", "PopQA", "HotpotQA", "2Wiki", "MuSiQue", "Bamboogle"), "webshop": ()}
# Table 1 of arXiv 2605.15155, percent, Qwen2.5-3B-Instruct; a star: with skills in the agent's prompt.
PAPER = {  # ALFWorld's columns and average | Search-QA's columns and average | WebShop's score and accuracy
    "Vanilla": "44.4 11.1 6.2 15.4 28.6 12.5 21.9 | 24.6 48.1 31.0 26.3 25.3 7.2 59.7 31.7 | 6.7 0.8",
    "Skill-Prompt*": "51.7 66.7 48.4 0.0 4.3 10.0 28.9 | 23.7 46.2 30.6 24.4 22.1 7.5 12.5 23.9 | 0.2 0.8",
    "OPSD": "48.8 41.7 16.7 0.0 15.8 16.7 28.1 | 0.1 0.1 0.1 0.0 0.0 0.0 0.0 0.0 | 11.3 3.1",
    "GRPO": "91.2 62.5 96.2 61.9 65.0 47.4 75.0 | 39.3 60.6 41.1 37.4 34.6 15.4 26.4 36.4 | 79.8 63.3",
    "Skill-GRPO": "88.9 71.4 58.8 70.6 40.7 29.2 60.2 | 43.5 58.8 43.0 36.8 32.2 11.7 12.5 34.1 | 77.3 60.9",
    "Skill-GRPO*": "94.3 57.1 100 66.7 73.1 57.1 80.5 | 44.3 59.6 44.3 39.0 36.1 14.5 14.9 36.1 | 76.3 66.4",
    "GRPO+OPSD": "100 82.4 85.7 75.0 70.0 60.0 81.2 | 44.9 61.2 45.2 40.4 38.5 16.0 66.1 44.6 | 77.8 66.4",
    "Skill-SD": "88.2 50.0 96.2 52.4 65.0 57.9 73.4 | 44.4 60.4 44.0 39.5 40.4 15.4 64.9 44.1 | 75.9 64.0",
    "RLSD": "87.9 75.0 90.9 75.0 73.1 68.4 79.7 | 41.5 58.6 42.3 40.4 40.2 16.8 66.9 43.8 | 84.4 66.4",
    "SDAR": "97.1 62.5 100 61.9 75.0 84.2 84.4 | 44.8 58.1 44.3 38.6 36.2 15.7 66.1 43.4 | 85.0 68.0"
}
ORIGIN = ("Published: Qwen2.5-3B-Instruct, arXiv 2605.15155; another protocol (128 sampled tasks), for orientation.\n"
          "Most cells of Bamboogle, and so of Search-QA's Avg, fit a plain mean of batches of 124 questions and 1.")
NOTE = "The header counts tasks. Intervals: one run, Wilson's over its episodes; several, Student's over their rates."
KEPT = ("skills", "data", "env_args", "search_url", "corpus", "prompt_style", "history", "max_turns", "max_prompt",
        "max_teacher_prompt", "max_response", "rollout_rows", "no_graphs")  # settings that come from the checkpoint
OF_NO_WEIGHT = ("seed out data device keep log_episodes micro_tokens head_chunk rollout_rows offload recompute "
                "no_graphs save_every diagnose_every val_every val_episodes val_split").split()
OF_NO_RESULT = ("rollout_rows", "no_graphs", "search_url")  # may change when an interrupted evaluation goes on
CHUNK = 1024  # episodes played together: bounds the memory of a panel of 50,000 questions


# ---- statistics and tables ----

def mean_interval(values):
    """(mean, (low, high)) with Student's 95 % interval; of a single value that is (-inf, inf)."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return mean, (-math.inf, math.inf)
    t95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # for 1 to 9 degrees of freedom
    t = t95[n - 2] if n <= 10 else 1.96 + 2.5 / (n - 1)  # within 0.02 of the tabulated quantile
    half = t * statistics.stdev(values) / math.sqrt(n)
    return mean, (mean - half, mean + half)


def macro(parts):
    """Unweighted mean of independent estimates (p, (low, high)), with its 95 % interval: the distances to the limits
    are added in squares (MOVER; Zou & Donner, Statistics in Medicine 27, 2008, 1693-1702)."""
    mean = statistics.fmean(p for p, _ in parts)
    below = math.hypot(*(p - low for p, (low, _) in parts)) / len(parts)
    above = math.hypot(*(high - p for p, (_, high) in parts)) / len(parts)
    return mean, (mean - below, mean + above)


def mcnemar_exact(b, c):
    """Two-sided p of McNemar's exact test: of b + c discordant pairs, b is Binomial(b + c, 1/2) under no difference."""
    tail, term = 0, 1
    for k in range(min(b, c) + 1):
        tail, term = tail + term, term * (b + c - k) // (k + 1)  # term: b + c over k, exact
    return min(1.0, 2 * tail / 2 ** (b + c))


def paired_difference(a, b):
    """(difference, (low, high)) of success rates, b minus a, with the 95 % interval of Newcombe's method 10 for paired
    proportions (Statistics in Medicine 17, 1998, 2635-2650): both Wilson intervals, joined through their correlation.
    a, b: lists of booleans, position by position the same task. ValueError unless equally long and not empty."""
    n, na, nb = len(a), sum(map(bool, a)), sum(map(bool, b))
    if n != len(b) or not n:
        raise ValueError("paired_difference needs two equally long lists that are not empty")
    both = sum(bool(x and y) for x, y in zip(a, b))
    covariance = both * (n - na - nb + both) - (na - both) * (nb - both)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0)  # the method's continuity correction
    margins = na * (n - na) * nb * (n - nb)
    phi = covariance / math.sqrt(margins) if margins else 0.0
    pa, pb, (la, ua), (lb, ub) = na / n, nb / n, sdar.wilson(na, n), sdar.wilson(nb, n)

    def joined(x, y):
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))
    return pb - pa, (pb - pa - joined(pb - lb, ua - pa), pb - pa + joined(ub - pb, pa - la))


def summarize(env_name, rows):
    """One summary per group, the paper's columns first and in its order, and `Avg` last: over all episodes, but on
    Search-QA success and F1 are means over the data sets. Rates and scores are 0 to 1, turns are per episode."""
    names = sorted({r["group"] for r in rows}, key=lambda name: ((COLUMNS[env_name] + (name,)).index(name), name))
    out = []
    for name in [*names, "Avg"]:
        part = [r for r in rows if name in (r["group"], "Avg")]
        n, won, turns = len(part), sum(r["won"] for r in part), sum(r["turns"] for r in part)
        score, (low, high) = mean_interval([r["score"] for r in part])
        out.append({"group": name, "n": n, "successes": won, "success": won / n, "success_95": sdar.wilson(won, n),
                    "score": score, "score_95": (max(low, 0.0), min(high, 1.0)), "turns": turns / n,
                    "f1": sum(r.get("f1", 0.0) for r in part) / n,
                    **{key: sum(r[key] for r in part) / turns for key in ("valid", "admissible")}})
    if env_name == "search":
        out[-1]["success"], out[-1]["success_95"] = macro([(g["success"], g["success_95"]) for g in out[:-1]])
        out[-1]["f1"] = statistics.fmean(g["f1"] for g in out[:-1])
    return out


def published(env_name, method):
    """{column: percent, as text} of one of the paper's rows; WebShop has Score and Avg (its accuracy)."""
    values = PAPER[method].split("|")[list(COLUMNS).index(env_name)].split()
    return dict(zip((COLUMNS[env_name] or ("Score",)) + ("Avg",), values))


def render(header, rows, markdown=False):
    """A table as text or Markdown; the first column is left-aligned."""
    rows = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    lines = [[row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])] for row in rows]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    lines.insert(1, ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(value, limits=None, sign=""):
    """A rate in percent, with limits its interval behind it; sign "+": a difference of rates in percentage points."""
    if limits is None:
        return f"{100 * value:{sign}.1f}"
    low, high = limits if sign else (max(limits[0], 0), min(limits[1], 1))
    digits = 1 if sign else 0
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.{digits}f}, {100 * high:{sign}.{digits}f}]"


# ---- evaluating ----

def parser_for(command, description, usage):
    """A parser whose mistakes are one line and exit status 2."""
    prog = f"python eval.py {command}".strip()
    parser = argparse.ArgumentParser(
        prog, f"{prog} {usage}", description, allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=118))
    parser.error = lambda message: sdar.fail(f"{message}; see {prog} --help")
    return parser


def read_flags(argv):
    """(flags, Settings, checkpoint folder or None, its state.json or {}) of an evaluation; UserError for what cannot
    work. Settings are, in this order: those given as flags, those of the checkpoint, the paper's."""
    p = parser_for("", __doc__, "--model MODEL [flags] | compare ... | table ... | bench ... | gates ... | plot ...")
    p.add_argument("--model", required=True, help="run folder, model folder, GGUF file, Hugging Face name, or tiny")
    p.add_argument("--env", choices=list(COLUMNS), help="benchmark (default: the run's, else alfworld)")
    p.add_argument("--split", help="split of the panel (default: test, in ALFWorld valid_seen)")
    p.add_argument("--episodes", type=int, metavar="N", help="only N tasks, drawn with a fixed seed (default: all)")
    p.add_argument("--skills", nargs="?", const="", metavar="DIR", help="put skills into the agent's prompt (the "
                   "paper's starred rows): those in DIR; without DIR those of the training, else the built-in ones")
    p.add_argument("--temperature", type=float, metavar="T", help="of sampling; 0: greedy (default: the paper's)")
    p.add_argument("--out", metavar="FILE", help="JSON written (default: eval-ENV-SPLIT.json in the model's folder)")
    names = [sdar.flag(name) for name in (*KEPT[1:], "seed", "device")]
    p.epilog = ("These flags of sdar.py work too; by default the settings are the checkpoint's, else the paper's:\n  "
                + " ".join(names[:8]) + "\n  " + " ".join(names[8:]))
    flags, rest = p.parse_known_args(argv)
    explicit = vars(sdar.make_parser().parse_args(rest))
    if useless := sorted(set(explicit) - {*KEPT, "seed", "device"}):
        raise UserError(f"{sdar.flag(useless[0])} has no effect on an evaluation; leave it out")
    folder = None if flags.model == "tiny" else sdar.last_checkpoint(Path(flags.model))
    trained = folder and (folder / "state.json").is_file()
    state = sdar.read_state(folder, unread=("optimizer.pt",)) if trained else {}
    saved = state.get("settings", {})
    name = flags.env or saved.get("env") or sdar.Settings.env
    s, _ = sdar.read_settings(["--env", name, "--model", flags.model])
    if saved.get("env") == name:
        explicit = {key: saved[key] for key in KEPT if key in saved} | explicit
    explicit["skills"] = "" if flags.skills is None else flags.skills or explicit.get("skills", "")
    if flags.temperature is not None:
        explicit["val_temperature"] = flags.temperature
    s = dataclasses.replace(s, **explicit)
    sdar.check_settings(s)
    return flags, s, folder, state


def play(policy, env, ids, s, with_skills, unfinished, key):
    """Every task once; one row per episode, in the order of `ids`. The file `unfinished` keeps what has been played, so
    that the same evaluation (`key`, text) goes on there after an interruption, with the same results."""
    rows = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none there, or not whole
        saved = json.loads(unfinished.read_text(encoding="utf-8"))
        rows = saved["rows"] if saved["key"] == key else []
        if not rows:
            print(f"{unfinished} is of other settings, weights or skills: not used", flush=True)
    if rows:
        print(f"the first {len(rows)} tasks were played before an interruption", flush=True)
    for start in range(len(rows), len(ids), CHUNK):
        part, skills = ids[start:start + CHUNK], None
        if with_skills:
            categories = [env.start(i).category for i in part]
            skills = [(c, env.skill(c, s.prompt_style == "brief")) for c in categories]
        generator = sdar.generator_for(policy, s, "evaluation", start)
        label = f"tasks {start + 1}-{start + len(part)} of {len(ids)}"
        for e in sdar.rollout(policy, env, part, s, generator, s.val_temperature, skills, label=label):
            rows.append({"id": e.task_id, "task": env.start(e.task_id).task, "group": e.group, "won": e.won,
                         "score": e.score, "done": e.done, "f1": float(e.details.get("f1", 0.0)), "turns": len(e.turns),
                         "valid": sum(t.valid for t in e.turns), "admissible": sum(t.admissible for t in e.turns)})
        sdar.write_text(unfinished, json.dumps({"key": key, "rows": rows}, allow_nan=False))
    return rows


def evaluate(argv):
    """python eval.py --model ...: play the panel, write the JSON, print the table."""
    flags, s, folder, state = read_flags(argv)
    saved, env = state.get("settings", {}), sdar.open_env(s)
    split = flags.split or ("test" if "test" in env.splits else env.splits[:2][-1])
    (ids, digest), whole = envs.panel(env, split, flags.episodes), len(env.tasks(split))
    panel = f"{split}, {'all' if len(ids) == whole else f'{len(ids)} of'} {whole} tasks"
    skills = None if flags.skills is None else s.skills or "built-in"
    tags = ["eval", s.env, split] + ["skills"] * bool(skills) + [str(len(ids))] * (len(ids) < whole)
    tags += [] if folder else [Path(s.model).name]
    out = Path(flags.out or Path(s.model if folder else "") / ("-".join(tags) + ".json"))
    if out.is_dir() or not os.access(out.parent, os.W_OK):  # said now, not after hours of playing
        raise UserError(f"cannot write {out}; choose another --out")
    policy = sdar.load_policy(s.model, s.device, sdar.tiny_texts(env, s), s)
    print(f"{env.source}\n{s.model}: {policy.model.num_parameters() / 1e6:.1f}M parameters, temperature "
          f"{s.val_temperature:g}, seed {s.seed}, {skills or 'no'} skills in the prompt\npanel {panel}, hash {digest}",
          flush=True)
    header = {"format": FORMAT, "env": s.env, "source": env.source, "builtin": env.builtin, "split": split,
              "panel": {"name": panel, "hash": digest}, "model": s.model, "checkpoint": str(folder or ""),
              "algo": saved.get("algo"), "base_model": saved.get("model", s.model), "step": state.get("step"),
              "steps": saved.get("steps"), "training": saved, "skills": skills, "device": str(policy.device),
              "settings": {key: getattr(s, key) for key in (*KEPT, "seed", "val_temperature")},
              "torch": torch.__version__, "transformers": version("transformers")}
    weights = sorted(folder.glob("*.safetensors")) if folder else []
    same = {**header, "device": "", "settings": {k: v for k, v in header["settings"].items() if k not in OF_NO_RESULT}}
    key = json.dumps([same, env.all_skills(), [(f.name, f.stat().st_size, f.stat().st_mtime) for f in weights]])
    refuse_another(out, same)
    began, unfinished = time.time(), Path(f"{out}.unfinished")
    rows = play(policy, env, ids, s, bool(skills), unfinished, key)
    result = {**header, "seconds": time.time() - began, "finished": time.time(), "summary": summarize(s.env, rows),
              "results": rows}
    sdar.write_text(out, json.dumps(result, indent=1, allow_nan=False))
    unfinished.unlink()
    print_summary(result)
    print(f"written: {out} ({result['seconds']:.0f} s)")


def refuse_another(out, header):
    """UserError if `out` holds an evaluation of the same weights in other settings, which would be lost."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        old = json.loads(out.read_text(encoding="utf-8"))
        differing = [key for key, value in header["settings"].items() if old["settings"][key] != value]
        differing += [key for key in ("panel", "skills") if old[key] != header[key]]
        if differing and all(old[key] == header[key] for key in ("format", "model", "checkpoint", "step")):
            other = differing[0].removeprefix("val_")  # the name of its flag
            raise UserError(f"{out} holds an evaluation of this model with other {other}; choose another --out")


def print_summary(result):
    """One evaluation as a table; beside real tasks the paper's rows, for orientation."""
    env, extra = result["env"], {"search": "f1", "webshop": "score"}.get(result["env"])  # ALFWorld's is the success
    paper = {} if result["builtin"] else {m: published(env, m) for m in ("Vanilla", "GRPO", "SDAR")}
    second = lambda g: [percent(g[extra], known_spread(g.get(f"{extra}_95")))] if extra else []
    rows = [[g["group"], g["n"], percent(g["success"], g["success_95"]), *second(g), f"{g['turns']:.1f}",
             percent(g["valid"]), percent(g["admissible"]), *(row.get(g["group"], "-") for row in paper.values())]
            for g in result["summary"]]
    header = ["", "n", "success % [95 %]", *([f"{extra} %"] if extra else []), "turns", "valid %", "admissible %"]
    print(render(header + [f"paper's {m}" for m in paper], rows))
    print(ORIGIN if paper else "Built-in tasks: nothing published compares with them.")


# ---- reading evaluations: compare, table, gates ----

def load_result(path):
    """An evaluation written by this file, summarized anew; UserError if it is not one, or its panel was changed."""
    result = sdar.read_json(path, f"{path} cannot be read; give a JSON that python eval.py wrote")
    try:
        panel = result["panel"]
        texts = [text for r in result["results"] for text in (r["id"], r["task"])]
        if (result["format"], panel["hash"]) != (FORMAT, envs.panel_hash(texts)):
            raise ValueError
        result["summary"] = summarize(result["env"], result["results"])
        # what two evaluations must share to be compared; built-in tasks are other ones if their world has other options
        result["tasks"] = f"{result['env']}, {panel['name']}, hash {panel['hash']}" + (
            f", BUILT-IN tasks ({result['settings']['env_args'] or 'no --env-args'})" * result["builtin"])
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError):
        raise UserError(f"{path} is not a whole evaluation; give a JSON that python eval.py wrote") from None
    return result


def compare(argv):
    """python eval.py compare A.json B.json: B against A, task by task."""
    p = parser_for("compare", "Pair two evaluations of one panel: B minus A.", "A.json B.json")
    p.add_argument("files", nargs=2, metavar="FILE", help="JSON that python eval.py wrote")
    files = p.parse_args(argv).files
    a, b = (load_result(path) for path in files)
    if a["tasks"] != b["tasks"]:
        raise UserError(f"different panels, {a['tasks']} and {b['tasks']}: only evaluations of the same tasks pair")
    rows, parts = [], []
    for u, v in zip(a["results"], b["results"]):
        v["group"] = u["group"]  # another version of the code may have called it otherwise
    for ga, gb in zip(a["summary"], summarize(b["env"], b["results"])):
        x, y = ([row["won"] for row in r["results"] if ga["group"] in (row["group"], "Avg")] for r in (a, b))
        only_a, only_b = sum(u and not v for u, v in zip(x, y)), sum(v and not u for u, v in zip(x, y))
        parts.append(paired_difference(x, y))
        pairs = [only_a, only_b, f"{mcnemar_exact(only_a, only_b):.3g}"]
        if ga["group"] == "Avg" and a["env"] == "search":  # over data sets, which counts of episodes are not
            parts[-1], pairs = macro(parts[:-1]), ["-"] * 3
        rows.append([ga["group"], ga["n"], percent(ga["success"]), percent(gb["success"]), percent(*parts[-1], "+"),
                     *pairs])
    for letter, path, r in zip("AB", files, (a, b)):
        print(f"{letter}: {path}: {r['model']}, step {r['step']}, {r['skills'] or 'no'} skills in the prompt")
    print(a["tasks"] + "\n" + render(["", "n", "A %", "B %", "B - A [95 %]", "only A", "only B", "p"], rows))
    if a["env"] == "webshop":  # elsewhere the score is the success
        score = mean_interval([v["score"] - u["score"] for u, v in zip(a["results"], b["results"])])
        print(f"score, B - A [95 %]: {percent(*score, '+')}")
    print("Intervals: Newcombe's method 10 for paired proportions (score: Student's t; Avg of Search-QA: joined over\n"
          "data sets); p: McNemar's exact test, two-sided. How much training runs differ by seed is in neither.")
    for key, value in a["settings"].items():
        if value != b["settings"].get(key):
            print(f"note: {key} differs, {value} and {b['settings'].get(key)}")


def method_name(result):
    """The paper's name of the row that an evaluation belongs to; a star where skills were in the agent's prompt."""
    if result["algo"] is None:
        return "Skill-Prompt*" if result["skills"] else "Vanilla"
    known = {name.lower(): name for name in PAPER}
    name = "Warm start" if result["step"] == 0 else known.get(result["algo"], result["algo"])
    return name + "*" * bool(result["skills"])


def table(argv):
    """python eval.py table RUN ...: one table per panel and base model, published rows beside one's own."""
    p = parser_for("table", "The paper's Table 1 from evaluations, one table per panel and base model.",
                   "RUN ... [--markdown]")
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folder with evaluations in it, or a JSON of one")
    p.add_argument("--markdown", action="store_true", help="Markdown instead of text")
    flags, tables, notes = p.parse_args(argv), {}, []
    for run in flags.runs:
        path = Path(run)
        if not path.exists():
            raise UserError(f"{run} does not exist; give run folders or JSONs of python eval.py")
        found = [load_result(p) for p in ([path] if path.is_file() else sorted(path.glob("eval-*.json")))]
        last = sdar.last_checkpoint(path)
        results = [r for r in found if not last or Path(r["checkpoint"]).name in ("", last.name)]
        if not results:
            notes.append(f"{run}: missing, evaluate it with python eval.py --model {run}")
        if len(results) < len(found):
            notes.append(f"{run}: {len(found) - len(results)} evaluation(s) of an earlier checkpoint left out")
        for r in results:
            settings = {key: value for key, value in r["settings"].items() if key != "seed"}
            which = json.dumps([r["checkpoint"] or r["model"], r["training"], settings])  # however the path is spelt
            rows = tables.setdefault((r["tasks"], r["base_model"]), {}).setdefault(method_name(r), {})
            old = rows.setdefault(which, r)
            rows[which] = max(r, old, key=lambda r: r["finished"])
            if r["finished"] != old["finished"]:
                notes.append(f"{run}: evaluated more than once in the same settings, the newest is shown")
        if results and results[0]["step"] != results[0]["steps"]:
            notes.append(f"{run}: not finished, step {results[0]['step']} of {results[0]['steps']}")
    for (tasks, base), methods in sorted(tables.items()):
        rows = render(*method_table(told_apart(methods)), flags.markdown)
        print(f"{tasks}, model {base}\n\n{rows}\n\n{ORIGIN}\n{NOTE}\n")
    print("\n".join(notes), end="\n" if notes else "")


def trained_as(result):
    """The settings of a model's training; those that an evaluation has too under another name."""
    names = {key: f"training's {key}" if key in KEPT else key for key in result["training"] if key not in OF_NO_WEIGHT}
    world = "built-in" if result["training"].get("data") == "built-in" else "other"  # the same data may lie elsewhere
    return {"training's data": world, **{name: result["training"][key] for key, name in names.items()}}


def told_apart(methods):
    """{name: {run: its evaluation}} with a row of its own for each setting, of training or evaluation, that runs of a
    method differ in, called as "SDAR, beta 0.0": only runs that differ in nothing but seed and bookkeeping
    (OF_NO_WEIGHT) may be averaged."""
    rows = {}
    for name, runs in methods.items():
        used = {run: {**trained_as(r), **r["settings"]} for run, r in runs.items()}
        keys = dict.fromkeys(key for own in used.values() for key in own if key not in OF_NO_WEIGHT)
        differing = [key for key in keys if len({str(own.get(key)) for own in used.values()}) > 1]
        for run, r in runs.items():
            rows.setdefault(", ".join([name, *(f"{key} {used[run].get(key)}" for key in differing)]), {})[run] = r
    return rows


def method_table(methods):
    """(header, rows) of one table in the paper's order; methods: what told_apart returns."""
    first = next(r for runs in methods.values() for r in runs.values())
    env, counts = first["env"], {g["group"]: g["n"] for g in first["summary"]}
    columns = ("Score", "Avg") if env == "webshop" else tuple(counts)
    rows = []
    owner = {label: label.split(", ")[0] for label in methods}
    for name in dict.fromkeys([*sorted(set(owner.values()) - set(PAPER)), *PAPER]):
        for label in sorted(label for label in methods if owner[label] == name):
            results = list(methods[label].values())
            rows.append([label, len(results), *(cell(results, column) for column in columns)])
        if name in PAPER:
            rows.append([f"{name}, published", "", *(published(env, name).get(column, "-") for column in columns)])
    return ["method", "runs", *(f"{c} ({counts[c]})" if c in counts else c for c in columns)], rows


def known_spread(limits):
    """An interval, or None where equal values would make it a single point: they do not tell how far others may lie."""
    return limits if limits and limits[0] < limits[1] else None


def cell(results, column):
    """The mean over runs of what stands in a column, in percent with its 95 % interval (see NOTE)."""
    kind, group = ("score", "Avg") if column == "Score" else ("success", column)
    found = [g for r in results for g in r["summary"] if g["group"] == group]
    mean, limits = mean_interval([g[kind] for g in found])
    limits = found[0][kind + "_95"] if len(found) == 1 else limits
    return percent(mean, known_spread(limits))


def gates(argv):
    """python eval.py gates RUN: the newest logged episode that has gate values, as text."""
    p = parser_for("gates", "Print the newest logged episode; behind each token the value of its gap gate.", "RUN")
    p.add_argument("run", metavar="RUN", help="run folder of a method with a teacher")
    path = Path(p.parse_args(argv).run) / "episodes.jsonl"
    try:
        shown = [row for row in sdar.read_lines(path) if any("gates" in turn for turn in row["turns"])][-1]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"{path} holds no gate values; give the folder of a run whose method has a teacher") from None
    outcome = "won" if shown["won"] else "not won"
    print(f"step {shown['step']}, task {shown['task_id']}, skill {shown['skill']}, {outcome}")
    for turn in shown["turns"]:
        text = f"\n> {turn['observation']}\n{turn.get('gates', turn['response'])}"
        print("".join(c for c in text if c.isprintable() or c in "\n\t"))  # a web page may command a terminal


def plot(argv):
    """python eval.py plot RUN ...: success on the validation panel with its 95 % interval, and the mean gap between
    teacher and student, over the steps of RL; a column for each benchmark."""
    p = parser_for("plot", "Draw learning curves from the logs of runs, a column for each benchmark.", "RUN ...")
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    p.add_argument("--out", default="curves.png", metavar="FILE", help="picture to write (default: %(default)s)")
    flags, columns = p.parse_args(argv), {}
    try:
        from matplotlib.figure import Figure  # without pyplot there is no window and no global state
    except ImportError:
        raise UserError("plot needs matplotlib, which is no requirement: pip install matplotlib") from None
    for run in map(Path, flags.runs):
        config = sdar.read_json(run / "config.json", f"{run} holds no run (no config.json)")
        columns.setdefault(config.get("env"), []).append(run)
    figure = Figure(figsize=(1 + 4 * len(columns), 6), layout="constrained")
    for (env, runs), (above, below) in zip(columns.items(), figure.subplots(2, len(columns), squeeze=False).T):
        for run in runs:
            plot_run(run, above, below)
        above.set(title=env, ylabel="validation success, %", ylim=(0, 100))
        above.legend()
        below.set(xlabel="step", ylabel="mean gap, nats per token")
    try:
        figure.savefig(flags.out, dpi=120)
    except ValueError as error:  # a format that matplotlib does not write
        raise UserError(f"cannot write {flags.out}: {sdar.first_line(error)}") from None
    print(f"written: {flags.out}")


def plot_run(run, above, below):
    """The curves of one run on two of matplotlib's axes; UserError if its log holds no validation."""
    tests = [row for row in sdar.read_lines(run / "validation.jsonl") if "success_95" in row]
    gaps = [row for row in sdar.read_lines(run / "metrics.jsonl") if "gap" in row]
    if not tests:
        raise UserError(f"{run} has no validation in its log; leave it out")
    steps, (low, high) = [row["step"] for row in tests], zip(*(row["success_95"] for row in tests))
    line, = above.plot(steps, [100 * row["success"] for row in tests], label=run.name)
    above.fill_between(steps, [100 * p for p in low], [100 * p for p in high], color=line.get_color(), alpha=0.15)
    below.plot([row["step"] for row in gaps], [row["gap"] for row in gaps], color=line.get_color())


# ---- speed and memory: what is compared runs in one process on the same inputs, turn by turn ----

SHAPES = {"Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", 896, 4864, 24, 14, 2),  # random_policy says what the figures are
          "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", 1536, 8960, 28, 12, 2),
          "Qwen/Qwen2.5-3B-Instruct": ("qwen2", 2048, 11008, 36, 16, 2),
          "Qwen/Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8)}
ALFWORLD_LIKE = "--prompt-style paper --max-prompt 2048 --max-teacher-prompt 3072 --max-response 512".split()
# Measured: 64 responses of SmolLM2-135M-Instruct, untrained, temperature 1, to prompts of ALFWorld's own games (turns 1
# and 4, 579 tokens), limit 512. No published lengths were found; a trained model's may differ.
LENGTHS = [6, 7, 7, 8, 9, 10, 11, 12, 15, 19, 19, 20, 22, 22, 24, 28, 31, 31, 32, 35, 36, 40, 40, 40, 46, 46, 47, 50,
           50, 59, 69, 71, 74, 75, 86, 98, 112, 122, 123, 129, 153, 159, 209, 229, 299, 351, 373, *[512] * 17]
HEAD_TOKENS, HEAD_VOCAB = (4096, 8192), 151936  # response tokens (on a CPU, on a GPU) and words of the memory row
LEGEND = """plain: in rollouts model.generate of transformers, same prompts and response lengths; else padded batches of
as many turns in the order given, with full fp32 logits. ratio: how many times as fast, or as small, sdar.py is.
teacher: what its prompts share counts for each of them, though it is read once."""


def random_policy(config, s, env):
    """A policy with random weights of the shape in a config.json (file or folder) or in SHAPES, and `tiny`'s tokenizer;
    nothing is downloaded. UserError if there is no such shape."""
    path, device = Path(config), sdar.pick_device(s.device)
    keys = "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
    shape = dict(zip(keys, SHAPES.get(config, ())), vocab_size=151936, tie_word_embeddings=True, rms_norm_eps=1e-6,
                 max_position_embeddings=32768, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    if config not in SHAPES:
        shape = sdar.read_json(path / "config.json" if path.is_dir() else path, f"no model shape {config!r}; give a "
                               f"config.json, its folder, or one of {', '.join(SHAPES)}")
    from transformers import AutoConfig, AutoModelForCausalLM, logging
    logging.set_verbosity_error()
    try:
        with device:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=sdar.weight_dtype(device))
    except Exception as error:  # a file of the user's can be wrong in any way
        raise UserError(f"no model can be built from {config!r}: {sdar.first_line(error)}") from None
    return sdar.wrap_policy(model.eval(), sdar.build_tiny(sdar.tiny_texts(env, s, 50), s)[1])


def draw_lengths(count, s):
    """Response lengths in tokens, the same in every run: drawn from LENGTHS, scaled to --max-response."""
    lot = random.Random(233)
    return [max(round(n * s.max_response / 512), 1) for n in lot.choices(LENGTHS, k=count)]


def endless(policy):
    """The policy without anything that would end a response before its limit; with a cache of its own."""
    return dataclasses.replace(policy, end_ids=frozenset(), closing_ids=frozenset(), cache=None)


def stretched(policy, sessions, s, skills, student_prompts=sdar.student_prompts):
    """student_prompts, but of the longest prompts that the settings allow: each is repeated up to its budget."""
    sizes = [s.max_teacher_prompt if skill else s.max_prompt for skill in skills]
    return [((ids * (size // len(ids) + 1))[:size], cut)
            for (ids, cut), size in zip(student_prompts(policy, sessions, s, skills), sizes)]


def alternate(calls, pairs, device):
    """Median seconds of each function in `calls`, run in turns, `pairs` rounds after one to warm up; nan for one that
    runs out of memory."""
    seconds = [[] for _ in calls]
    for call, kept in list(zip(calls, seconds)) * (pairs + 1):
        began = time.perf_counter()
        try:
            if math.nan not in kept:
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            kept.append(time.perf_counter() - began)
        except (MemoryError, RuntimeError) as error:
            if not sdar.out_of_memory(error):
                raise
            kept += [math.nan] * (pairs + 1)
    return [math.nan if math.nan in kept else statistics.median(kept[1:]) for kept in seconds]


def compared(title, tokens, seconds):
    """A table row: tokens per second of both ways, and how many times as fast the first one is."""
    return [title, *(f"{tokens / t:,.0f}" for t in seconds), f"{seconds[1] / seconds[0]:.2f}", "tokens/s"]


def weights_met(policy, tokens, written):
    """Sum over tokens of the weights that each meets: the trunk's, and the head's where one of the `written` response
    tokens is predicted. Twice this is FLOPs, without attention, padding and recomputation."""
    trunk = policy.model.base_model
    trunk = sum(p.numel() for p in trunk.parameters()) - trunk.get_input_embeddings().weight.numel()
    return trunk * tokens + policy.head.weight.numel() * written


def bench_env(policy, env, s):
    """(prompts, table rows). Experts play s.group_size episodes of each task, each some turns further than the one
    before, as a rollout is in its middle; `prompts` holds for every episode those that it has seen."""
    tasks, played, times = sdar.draw_tasks(env, s, 0, s.groups), [], []
    clock = time.perf_counter
    for i in range(s.groups * s.group_size):
        session, prompts = env.start(tasks[i // s.group_size], seed=i), []
        while not session.done and len(prompts) <= i % s.group_size + 1:
            text, began = session.expert(), clock()
            prompts.append(sdar.student_prompts(policy, [session], s, [""])[0][0])
            encoded = clock()
            session.prompt(history=s.history, brief=s.prompt_style == "brief")
            env.step([session], [text])
            times.append((encoded - began, clock() - encoded))
        played.append(prompts)
    encoding, engine = (sum(column) / len(times) for column in zip(*times))
    mean = statistics.fmean(len(p) for prompts in played for p in prompts)
    return played, [[f"environment: text of the prompt and step, {len(times)} expert steps in one process",
                     f"{1 / engine:,.0f}", "", "", "steps/s"],
                    [f"  text and encoding of a prompt, {mean:.0f} tokens", f"{1000 * encoding:.2f}", "", "", "ms"]]


@torch.no_grad()
def plain_generate(policy, prompts, limits):
    """Responses of model.generate as its users call it, (B, longest limit). Row i ends after limits[i] tokens, as if
    its EOS came there; generate pads it with token 0 until the last row has ended."""
    width, device = max(map(len, prompts)), policy.device
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)                    # (B, L)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)        # (B, L)
    ends = torch.tensor(limits, device=device) + width                                                  # (B,)
    return policy.model.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                 max_new_tokens=max(limits), pad_token_id=0, eos_token_id=-1,  # no token is an EOS
                                 stopping_criteria=[lambda ids, scores, **_: ids.shape[1] >= ends])[:, width:]


def bench_rollout(policy, name, prompts, s, flags):
    """Table rows on sdar.generate beside model.generate: the same prompts and response lengths."""
    limits, generator, policy = draw_lengths(len(prompts), s), sdar.generator_for(policy, s, "bench"), endless(policy)
    pair = lambda limits: alternate((lambda: sdar.generate(policy, prompts, s, 1.0, (), generator, limits.__getitem__),
                                     lambda: plain_generate(policy, prompts, limits)), flags.pairs, policy.device)
    seconds = pair(limits)
    rows = [compared(f"rollout, {name}: {len(prompts)} rows, {len(set(map(tuple, prompts)))} prompts of "
                     f"{statistics.fmean(map(len, prompts)):.0f} tokens, responses of {statistics.fmean(limits):.0f}, "
                     f"at most {max(limits)}", sum(limits), seconds)]
    if policy.device.type == "cuda" or flags.peak_gbps:
        steps = max(max(limits) - 1, 1)  # the first token comes with the prompt
        ms = [1000 * (a - b) / steps for a, b in zip(seconds, pair([1] * len(prompts)))]
        rows.append(["  a decode step, prompts not counted", *(f"{t:.2f}" for t in ms), f"{ms[1] / ms[0]:.2f}", "ms"])
    if flags.peak_gbps:  # what a step must read: all weights, and the keys and values of the rows that have not ended
        config, size = policy.model.config, policy.head.weight.element_size()
        alive = sum((n - 1) * (len(p) + n / 2) for p, n in zip(prompts, limits)) / steps  # tokens a step, on average
        cached = 2 * config.num_hidden_layers * config.num_key_value_heads * sdar.head_width(config)
        read = weights_met(policy, 1, 1) + cached * alive
        rows.append([f"    of the bandwidth limit, {size * read / 1e9:.2f} GB a step",
                     *(f"{100 * size * read / flags.peak_gbps / 1e6 / t:.0f}" for t in ms), "", "%"])
    return rows


def plain_logps(model, turns, s):
    """Log-probabilities and mask, (B, T), as usually written: prompts padded on the left, responses on the right, the
    logits of all response positions at once in fp32."""
    width, steps = max(len(t.prompt_ids) for t in turns), max(len(t.response_ids) for t in turns)
    pads = [(width - len(t.prompt_ids), steps - len(t.response_ids)) for t in turns]
    ids = torch.tensor([[0] * a + t.prompt_ids + t.response_ids + [0] * b for t, (a, b) in zip(turns, pads)],
                       device=model.device)                                                             # (B, L)
    mask = torch.tensor([[0] * a + [1] * (width + steps - a - b) + [0] * b for a, b in pads], device=model.device)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False,
                   logits_to_keep=steps + 1).logits[:, :-1].float() / s.temperature                     # (B, T, V)
    return torch.log_softmax(logits, -1).gather(2, ids[:, -steps:, None])[..., 0], mask[:, -steps:]


def bench_learning(policy, turns, s, flags):
    """Table rows on scoring, and on forward and backward, of the same turns in both ways."""
    model, batches = policy.model, sdar.batches_of(turns, s)
    size = -(-len(turns) // len(batches))
    plain = [turns[i:i + size] for i in range(0, len(turns), size)]
    read, written = sum(len(t.prompt_ids) for t in turns), sum(len(t.response_ids) for t in turns)
    ours = lambda batch: sdar.response_logps(model, [t.prompt_ids for t in batch], [t.response_ids for t in batch], s)
    theirs, rows = lambda batch: plain_logps(model, batch, s), []

    def update(batches, logps):
        model.train()
        for batch in batches:
            logp, mask = logps(batch)[:2]
            (-(logp * mask).sum() / written).backward()
        model.zero_grad(set_to_none=True)
        model.eval()
    for name, flops, *pair in (
            ("scoring", 2, lambda: sdar.score_turns(model, [turns], "prompt_ids", "old_logp", s, "scoring"),
             torch.no_grad()(lambda: [theirs(batch)[0].cpu() for batch in plain])),
            ("forward and backward", 6, lambda: update(batches, ours), lambda: update(plain, theirs))):
        seconds = alternate(pair, flags.pairs, policy.device)
        rows.append(compared(f"{name}: {len(turns)} turns of {read / len(turns):.0f} + {written / len(turns):.0f} "
                             "tokens", read + written, seconds))
        if flags.peak_tflops:
            work = flops * weights_met(policy, read + written, written) / flags.peak_tflops / 1e10
            rows.append(["  MFU", *(f"{work / t:.1f}" for t in seconds), "", "%"])
    return rows


def head_memory(kind, device, tokens, width, chunk):
    """MiB beyond inputs, weight and their gradients while log-probabilities of `tokens` positions over HEAD_VOCAB words
    are computed and differentiated; kind: "chunked" as in training, or "full" logits. nan where nobody can tell."""
    kind_of = {"device": device, "dtype": sdar.weight_dtype(device)}
    hidden, weight = (torch.randn(n, width, **kind_of).requires_grad_() for n in (tokens, HEAD_VOCAB))
    targets = torch.arange(tokens, device=device)                                                       # (N,)
    small = weight.detach()[:64].clone().requires_grad_()
    sdar.chunked_logps(hidden[:8].detach(), small, targets[:8]).sum().backward()  # start-up costs are not counted
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = sdar.peak_memory(device) or math.nan
    if kind == "chunked":
        sdar.chunked_logps(hidden, weight, targets, chunk=chunk).sum().backward()
    else:
        torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None]).sum().backward()
    grads = (hidden.nbytes + weight.nbytes) / 2**20
    return (sdar.peak_memory(device) or math.nan) - before - grads


def bench_memory(device, width, chunk):
    """Table row on head_memory, each kind in a process of its own: the peak of a process never falls."""
    tokens, peaks = HEAD_TOKENS[device.type == "cuda"], []
    torch.cuda.empty_cache()
    for kind in ("chunked", "full"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                peaks.append(pool.submit(head_memory, kind, device, tokens, width, chunk).result())
            except (MemoryError, RuntimeError):  # did not fit, or the system ended the process
                peaks.append(math.nan)
    return [[f"peak of log-probabilities with gradient: {tokens:,} x {HEAD_VOCAB:,}, width {width}, chunks of {chunk}",
             *(f"{p:,.0f}" for p in peaks), f"{peaks[1] / max(peaks[0], 1):.1f}", "MiB"]]


def bench_step(policy, env, s, flags):
    """Table rows on one training step by phases, after one of a single turn. Responses are as long as draw_lengths
    says, for random weights would never end one."""
    state, generate = sdar.make_state(endless(policy), s), sdar.generate
    reference = copy.deepcopy(policy.model).eval() if sdar.uses_reference(s) else None
    def limited(*args, follow):
        lengths = iter(draw_lengths(part.groups * part.group_size * part.max_turns, s))
        return generate(*args, limit=lambda i: next(lengths), follow=follow)
    for part in [dataclasses.replace(s, max_turns=n) for n in sorted({1, s.max_turns})]:
        if policy.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(policy.device)
        with mock.patch.object(sdar, "generate", limited):
            m = sdar.learn_step(state, *sdar.play_step(state, env, reference, part), part)
    turns = m["turns"] * m["episodes"]
    rows = [[f"one step of {s.algo}: {m['episodes']} episodes, {turns:.0f} turns of {m['prompt_tokens']:.0f} + "
             f"{m['response_tokens']:.0f} tokens", f"{m['seconds']:.2f}", "", "", "s"]]
    for name in [key.removeprefix("seconds_") for key in m if key.startswith("seconds_")]:
        seconds, speed, share = m[f"seconds_{name}"], m[f"tokens_per_s_{name}"], ""
        if flags.peak_tflops and name not in ("rollout", "teacher"):  # the teacher reads a prefix once
            work = weights_met(policy, speed * seconds, turns * m["response_tokens"]) * (6 if name == "update" else 2)
            share = f", MFU {work / seconds / flags.peak_tflops / 1e10:.1f} %"
        rows.append([f"  {name}: {speed:,.0f} tokens/s{share}", f"{seconds:.2f}", "", "", "s"])
    where = "of the step" if policy.device.type == "cuda" else "of the process so far"
    return rows + [[f"  peak memory {where}", f"{m['peak_memory_mib'] or math.nan:,.0f}", "", "", "MiB"]]


def bench_flags(argv):
    """(flags, Settings) of the benchmark; UserError for what cannot work."""
    p = parser_for("bench", "Speed and memory, beside the plain way of doing the same. All flags of sdar.py work too;\n"
                   "without any it is a job of `tiny` that takes some minutes.", "[flags of sdar.py]")
    p.add_argument("--random-weights", metavar="CONFIG", help="random weights of this shape, no download: a "
                   "config.json, its folder, or " + ", ".join(SHAPES))
    p.add_argument("--peak-tflops", type=float, metavar="X", help="TFLOP/s of the device: prints the MFU, 2 FLOPs per "
                   "weight and token forward, 6 with backward; attention, padding and recomputation do not count")
    p.add_argument("--peak-gbps", type=float, metavar="X", help="GB/s of its memory: prints the share that decoding "
                   "reaches, counting the weights and the keys and values of rows that have not ended")
    p.add_argument("--cap-gb", type=float, metavar="X", help="let this process have no more than so many GB of the GPU")
    p.add_argument("--only", choices=("rollout", "step", "learning", "memory"), help="one part of the table")
    p.add_argument("--longest", action="store_true", help="prompts and responses as long as the settings allow: what "
                   "memory must suffice for")
    p.add_argument("--pairs", type=int, default=3, metavar="N", help="timed pairs of each comparison (default: 3)")
    p.add_argument("--model", default="tiny", help=argparse.SUPPRESS)
    flags, rest = p.parse_known_args(argv)
    if not all(x is None or 0 < x < math.inf for x in (flags.pairs, flags.peak_tflops, flags.peak_gbps, flags.cap_gb)):
        raise UserError("--pairs, --peak-tflops, --peak-gbps and --cap-gb must be above 0")
    model = flags.random_weights or flags.model
    small = ["--groups", "8", "--max-turns", "2"] + ALFWORLD_LIKE * (model == "tiny")
    return flags, sdar.read_settings(["--model", model, *small, *rest])[0]


def bench(argv):
    """python eval.py bench: one table on speed and memory."""
    flags, s = bench_flags(argv)
    with contextlib.ExitStack() as stack:
        if flags.longest:
            stack.enter_context(mock.patch.object(sdar, "student_prompts", stretched))
            stack.enter_context(mock.patch.object(sys.modules[__name__], "LENGTHS", [512]))
        bench_table(flags, s)


def bench_table(flags, s):
    """Measure and print the table, part by part."""
    env = sdar.open_env(s)
    if flags.cap_gb:
        device = sdar.pick_device(s.device)
        if device.type != "cuda":
            raise UserError("--cap-gb needs a GPU: the memory of a CPU process cannot be capped from within")
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(flags.cap_gb * 1e9 / whole, 1.0), device)
    policy = (random_policy(s.model, s, env) if flags.random_weights
              else sdar.load_policy(s.model, s.device, sdar.tiny_texts(env, s), s))
    where = torch.cuda.get_device_name(policy.device) if policy.device.type == "cuda" else policy.device
    print(f"{env.source}\n{s.model}{', random weights' * bool(flags.random_weights)}: "
          f"{policy.model.num_parameters() / 1e6:.1f}M parameters, {policy.model.dtype}, {where}, torch "
          f"{torch.__version__}, transformers {version('transformers')}, {torch.get_num_threads()} threads, "
          f"medians of {flags.pairs}")
    def show(rows):
        with tqdm.external_write_mode():
            for row in rows:
                print("{:<104}{:>9}{:>9}{:>7}  {}".format(*row), flush=True)
    played, rows = bench_env(policy, env, s)
    show([["", "sdar.py", "plain", "ratio", "unit"], *rows])
    first, later = ([prompts[i] for prompts in played][:s.rollout_rows] for i in (0, -1))
    turns = [sdar.Turn(prompt, [7] * n, "", "", "", True, True)  # which tokens they are changes nothing
             for prompt, n in zip(later, draw_lengths(len(later), s))]
    parts = {"rollout": lambda: bench_rollout(policy, f"first turn, groups of {s.group_size}", first, s, flags)
             + bench_rollout(policy, "later turns", later, s, flags),
             "step": lambda: bench_step(policy, env, s, flags),
             "learning": lambda: bench_learning(policy, turns, s, flags),
             "memory": lambda: bench_memory(policy.device, policy.head.weight.shape[1], s.head_chunk)}
    with tqdm([flags.only] if flags.only else list(parts), leave=False, dynamic_ncols=True) as bar:
        for name in bar:
            bar.set_description(f"bench: {name}")
            show(parts[name]())
    print(LEGEND)


def main(argv=None):
    """The command line; a user's mistake is one line and exit status 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = {"compare": compare, "table": table, "bench": bench, "gates": gates, "plot": plot}
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a model may write what this terminal cannot show
    try:
        try:
            with sdar.enough_memory():
                commands[argv[0]](argv[1:]) if argv and argv[0] in commands else evaluate(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, as in `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:  # OSError: a full disk, a file that may not be read
        sdar.fail(sdar.first_line(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
