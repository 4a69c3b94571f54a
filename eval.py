"""Measure what sdar.py trained: fixed panels of test tasks, intervals, paired comparisons, the paper's table, speed.

    python eval.py --model RUN                       # the last checkpoint of a run on its whole validation split
    python eval.py --env alfworld --model Qwen/Qwen2.5-1.5B-Instruct --split valid_unseen --skills
    python eval.py compare A.json B.json             # the same tasks under two policies: difference, interval, p
    python eval.py table runs/* [--markdown]         # the paper's Table 1 from finished runs, published rows beside
    python eval.py bench [--random-weights config.json] [any flag of sdar.py]     # speed and memory, side by side
    python eval.py gates RUN                         # a logged episode with the gate value behind each token

A panel is a sorted list of task ids with a hash; every task is played once, and an episode cut off at the turn limit
has failed. Means are over episodes, never over batches; Search-QA's `Avg` is the mean over its data sets, as in the
paper. Rates carry 95 % Wilson intervals. It is the last checkpoint that is measured, never the best.
"""

from __future__ import annotations

import argparse, copy, dataclasses, hashlib, json, math, multiprocessing, os, re, statistics, sys, time
from pathlib import Path

import torch, transformers

import envs, sdar
from envs import UserError
from sdar import wilson

FORMAT = "sdar-eval-1"
COLUMNS = {"alfworld": ("Pick", "Look", "Clean", "Heat", "Cool", "Pick2"),
           "search": ("NQ", "TriviaQA", "PopQA", "HotpotQA", "2Wiki", "MuSiQue", "Bamboogle"), "webshop": ()}
PAPER = {  # Qwen2.5-3B-Instruct: ALFWorld columns and average | Search-QA columns and average | WebShop score, accuracy
    "Vanilla": "44.4 11.1 6.2 15.4 28.6 12.5 21.9 | 24.6 48.1 31.0 26.3 25.3 7.2 59.7 31.7 | 6.7 0.8",
    "Skill-Prompt*": "51.7 66.7 48.4 0.0 4.3 10.0 28.9 | 23.7 46.2 30.6 24.4 22.1 7.5 12.5 23.9 | 0.2 0.8",
    "OPSD": "48.8 41.7 16.7 0.0 15.8 16.7 28.1 | 0.1 0.1 0.1 0.0 0.0 0.0 0.0 0.0 | 11.3 3.1",
    "GRPO": "91.2 62.5 96.2 61.9 65.0 47.4 75.0 | 39.3 60.6 41.1 37.4 34.6 15.4 26.4 36.4 | 79.8 63.3",
    "Skill-GRPO": "88.9 71.4 58.8 70.6 40.7 29.2 60.2 | 43.5 58.8 43.0 36.8 32.2 11.7 12.5 34.1 | 77.3 60.9",
    "Skill-GRPO*": "94.3 57.1 100 66.7 73.1 57.1 80.5 | 44.3 59.6 44.3 39.0 36.1 14.5 14.9 36.1 | 76.3 66.4",
    "GRPO+OPSD": "100 82.4 85.7 75.0 70.0 60.0 81.2 | 44.9 61.2 45.2 40.4 38.5 16.0 66.1 44.6 | 77.8 66.4",
    "Skill-SD": "88.2 50.0 96.2 52.4 65.0 57.9 73.4 | 44.4 60.4 44.0 39.5 40.4 15.4 64.9 44.1 | 75.9 64.0",
    "RLSD": "87.9 75.0 90.9 75.0 73.1 68.4 79.7 | 41.5 58.6 42.3 40.4 40.2 16.8 66.9 43.8 | 84.4 66.4",
    "SDAR": "97.1 62.5 100 61.9 75.0 84.2 84.4 | 44.8 58.1 44.3 38.6 36.2 15.7 66.1 43.4 | 85.0 68.0"}
METHODS = {name.lower(): name for name in PAPER}
NOTE = {"": "Published: Qwen2.5-3B-Instruct, arXiv 2605.15155; another protocol (128 sampled tasks), for orientation.",
        "search": " Its Bamboogle column fits the mean of a batch of 124 and one of 1; here each question counts once."}
KEPT = ("data", "env_args", "search_url", "corpus", "seed", "prompt_style", "history", "max_turns", "max_prompt",
        "max_teacher_prompt", "max_response", "rollout_rows")  # what a checkpoint's own settings decide, unless a flag does
CHUNK = 1024  # episodes played together: bounds the memory of a panel of 50,000 questions

# ---- statistics ----

def mean_interval(values):
    """(mean, (low, high)) with Student's 95 % interval; of a single value that is (-inf, inf)."""
    t95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by degrees of freedom
    n, mean = len(values), sum(values) / len(values)
    t = t95[n - 1] if n <= 10 else 1.96 + 2.5 / (n - 1)  # within 0.02 of the tabulated quantile
    half = t * math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n) if n > 1 else math.inf
    return mean, (mean - half, mean + half)


def macro(parts):
    """Unweighted mean of independent estimates (p, (low, high)) and its 95 % interval. The distances to the limits are
    added in squares (MOVER, Zou & Donner 2008): a single part keeps its interval, and rates of 0 or 1 keep a width."""
    k, mean = len(parts), sum(p for p, _ in parts) / len(parts)
    return mean, (mean - math.sqrt(sum((p - low) ** 2 for p, (low, _) in parts)) / k,
                  mean + math.sqrt(sum((high - p) ** 2 for p, (_, high) in parts)) / k)


def mcnemar_exact(b, c):
    """Two-sided p of McNemar's exact test: of b + c discordant pairs, b is Binomial(b + c, 1/2) under no difference."""
    tail, term = 0, 1
    for k in range(min(b, c) + 1):
        tail, term = tail + term, term * (b + c - k) // (k + 1)  # term: b + c over k, exact
    return min(1.0, 2 * tail / 2 ** (b + c))


def paired_difference(a, b):
    """(difference, low, high) of success rates, b minus a, with the 95 % interval of Newcombe's method 10 for paired
    proportions (Statistics in Medicine 17, 1998, 2635-2650): both Wilson intervals, joined through their correlation.
    a, b: lists of booleans, position by position the same task. ValueError unless equally long and not empty."""
    n, na, nb = len(a), sum(map(bool, a)), sum(map(bool, b))
    if n != len(b) or not n:
        raise ValueError("paired_difference needs two equally long lists that are not empty")
    both, margins = sum(1 for x, y in zip(a, b) if x and y), na * (n - na) * nb * (n - nb)
    covariance = both * (n - na - nb + both) - (na - both) * (nb - both)
    covariance = max(covariance - n / 2, 0) if covariance > 0 else covariance  # the method's continuity correction
    phi = covariance / math.sqrt(margins) if margins else 0.0
    pa, pb, (la, ua), (lb, ub) = na / n, nb / n, wilson(na, n), wilson(nb, n)
    joined = lambda x, y: math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))
    return pb - pa, pb - pa - joined(pb - lb, ua - pa), pb - pa + joined(ub - pb, pa - la)


def by_group(env_name, rows):
    """{group: its rows}, the paper's columns first and in its order."""
    names = sorted({r["group"] for r in rows})
    names.sort(key=lambda x: (COLUMNS[env_name] + (x,)).index(x))
    return {name: [r for r in rows if r["group"] == name] for name in names}


def summarize(env_name, rows):
    """One summary per group and, last, `Avg`: over all episodes; on Search-QA success and F1 average data sets."""
    out = []
    for name, part in [*by_group(env_name, rows).items(), ("Avg", rows)]:
        n, won, turns = len(part), sum(r["won"] for r in part), sum(r["turns"] for r in part)
        score, (low, high) = mean_interval([r["score"] for r in part])
        out.append({"group": name, "n": n, "successes": won, "success": won / n, "success_95": wilson(won, n),
                    "score": score, "score_95": (max(low, 0.0), min(high, 1.0)), "turns": turns / n,
                    "f1": sum(r.get("f1", 0) for r in part) / n,
                    **{k: sum(r[k] for r in part) / turns for k in ("valid", "admissible")}})
    if env_name == "search":
        out[-1]["success"], out[-1]["success_95"] = macro([(g["success"], g["success_95"]) for g in out[:-1]])
        out[-1]["f1"] = sum(g["f1"] for g in out[:-1]) / len(out[:-1])
    return out


# ---- printing ----

def render(header, rows, markdown=False):
    """A table as text or Markdown; the first column is left-aligned."""
    rows = [[str(cell) for cell in row] for row in [header] + rows]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(header))]
    lines = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows]
    lines[1:1] = [["-" * (w - bool(i)) + ":" * bool(i) for i, w in enumerate(widths)]] if markdown else []
    return "\n".join("| " + " | ".join(line) + " |" if markdown else "  ".join(line).rstrip() for line in lines)


def percent(value, limits=None, sign=""):
    """A rate, or with limits its interval behind it, in percent."""
    if limits is None:
        return f"{100 * value:{sign}.1f}"
    low, high = ((100 * x for x in limits) if sign else (100 * min(max(x, 0), 1) for x in limits))
    form = f"[{low:+.1f}, {high:+.1f}]" if sign else f"[{low:.0f}-{high:.0f}]"
    return f"{100 * value:{sign}.1f} {form}"


def published(env_name, method):
    """{column: percent, as text} of the paper's row; WebShop has Score and Avg (its accuracy)."""
    columns = COLUMNS[env_name] or ("Score",)
    return dict(zip(columns + ("Avg",), PAPER[method].split("|")[list(COLUMNS).index(env_name)].split()))


def print_result(result):
    """One evaluation as a table, the paper's rows beside it."""
    env, paper = result["env"], {m: published(result["env"], m) for m in ("Vanilla", "GRPO", "SDAR")}
    extra = "f1" if env == "search" else "score"
    rows = [[g["group"], g["n"], percent(g["success"], g["success_95"]), percent(g[extra]), f"{g['turns']:.1f}",
             percent(g["valid"]), percent(g["admissible"]), *(p.get(g["group"], "-") for p in paper.values())]
            for g in result["summary"]]
    rows += [["published scores", *[""] * 6, *(p["Score"] for p in paper.values())]] if env == "webshop" else []
    header = ["", "n", "success % [95 %]", extra, "turns", "valid %", "admissible %", *(f"paper's {m}" for m in paper)]
    print(render(header, rows) + "\n" + NOTE[""] + NOTE.get(env, ""))


# ---- evaluating ----

def parser_for(command, description):
    """A parser whose mistakes are one line and exit status 2."""
    parser = argparse.ArgumentParser(prog=f"eval.py {command}".strip(), description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sdar.fail(f"{message}; see python {parser.prog} --help")
    return parser


FLAGS = {"split": (str, "split of the panel (default: valid_seen, test, or the second of the benchmark's)"),
         "episodes": (int, "only the first N tasks of a seeded order (default: the whole split)"),
         "temperature": (float, "of the sampling; 0: greedy (default: the paper's, 0.4, search 0)"),
         "out": (str, "JSON written (default: RUN/eval-ENV-SPLIT.json; other models: here, with their name)")}


def evaluation_flags(argv):
    """(flags of an evaluation, explicitly given Settings)."""
    p, taken = parser_for("", __doc__), [name for name in ("env", "model", "device", *KEPT) if name != "seed"]
    for name, (kind, text) in FLAGS.items():
        p.add_argument("--" + name, type=kind, help=text)
    p.add_argument("--seed", type=int, default=233, help="seed of the sampling (default: %(default)s)")
    p.add_argument("--skills", nargs="?", const="", metavar="DIR", help="skills in the agent's prompt (Skill-Prompt, "
                   "Skill-GRPO*): those in DIR, or the built-in ones")
    for f in (f for f in dataclasses.fields(sdar.Settings) if f.name in taken):
        text = f.metadata["help"] + " (default: the checkpoint's, else the paper's)" * (f.name in KEPT)
        p.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), choices=f.metadata["choices"],
                       default=argparse.SUPPRESS, help=text.replace("%", "%%"))
    flags = p.parse_args(argv)
    if "model" not in flags:
        raise UserError("no model; give --model with a run folder, a model folder or a Hugging Face name")
    if flags.temperature is not None and not 0 <= flags.temperature < math.inf:
        raise UserError(f"--temperature must be 0 (greedy) or more, not {flags.temperature}")
    return flags, {name: vars(flags)[name] for name in taken if name in flags}


def find_checkpoint(name):
    """(folder or None, its state.json or {}, digest of its weights or "") of what --model names. UserError for a run
    that has no checkpoint yet, and for damaged weights."""
    folder, state = None if name == "tiny" else sdar.last_checkpoint(Path(name)), {}
    if folder and (folder / "state.json").is_file():
        state = sdar.read_json(folder / "state.json", "")
    elif folder and (folder / "config.json").is_file() and "algo" in sdar.read_json(folder / "config.json", ""):
        raise UserError(f"{name} is a run without a checkpoint yet; evaluate it when it has saved one")
    digests = {p.name: sdar.file_digest(p) for p in sorted(folder.glob("*.safetensors"))} if folder else {}
    if any(digests.get(k) != d for k, d in state.get("files", {}).items() if k.endswith(".safetensors")):
        raise UserError(f"the weights in {folder} are damaged; delete that folder to use the checkpoint before it")
    return folder, state, hashlib.sha256("".join(digests.values()).encode()).hexdigest()[:12] if digests else ""


def output_path(flags, s, folder, split, partial):
    """Where the JSON goes; UserError before the hours of playing if it cannot be written there."""
    run = folder.parent.parent if folder and folder.parent.name == "checkpoints" else None
    tags = ["skills"] * (flags.skills is not None) + [str(flags.episodes)] * partial
    tags += [] if run else [Path(s.model).name]  # a run has a folder of its own
    name = re.sub(r"[^\w.-]+", "-", "-".join(["eval", s.env, split, *tags])) + ".json"
    out = Path(flags.out or (run or Path()) / name)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"cannot write {out}; choose another --out")
    return out


def play(policy, env, ids, s, flags, temperature):
    """Every task once; one row per episode, in the order of `ids`."""
    rows, s = [], dataclasses.replace(s, seed=flags.seed)
    for start in range(0, len(ids), CHUNK):
        part, generator = ids[start:start + CHUNK], sdar.generator_for(policy, s, "evaluation", start)
        skills = None if flags.skills is None else [(c, env.skill(c)) for c in (env.start(i).category for i in part)]
        label = f"tasks {start + 1}-{start + len(part)} of {len(ids)}"
        for e in sdar.rollout(policy, env, part, s, generator, temperature, skills, label=label):
            row = {"id": e.task_id, "group": e.group, "won": e.won, "score": e.score, "done": e.done,
                   "turns": len(e.turns), **{k: sum(map(bool, (getattr(t, k) for t in e.turns)))
                                             for k in ("valid", "admissible")}}
            rows.append(row | ({"f1": float(e.details.get("f1", 0.0))} if s.env == "search" else {}))
    return rows


def evaluate(argv):
    """python eval.py --model ...: play the panel, print the table, write the JSON."""
    flags, explicit = evaluation_flags(argv)
    folder, state, weights = find_checkpoint(explicit["model"])
    saved = state.get("settings", {})
    name = explicit.get("env") or saved.get("env") or sdar.Settings.env
    tiny = {**sdar.TINY, **sdar.TINY_ENV.get(name, {})} if explicit["model"] == "tiny" else {}
    kept = {k: saved[k] for k in KEPT if k in saved} if saved.get("env") == name else {}
    s = sdar.Settings(**{**sdar.PRESETS[name], **tiny, **kept, "env": name, **explicit, "skills": flags.skills or ""})
    sdar.check_settings(s)
    temperature = sdar.PRESETS[name].get("val_temperature", 0.4) if flags.temperature is None else flags.temperature
    env = sdar.open_env(s)
    split = flags.split or next((x for x in ("valid_seen", "test") if x in env.splits), env.splits[1])
    (ids, digest), whole = envs.panel(env, split, flags.episodes), len(env.tasks(split))
    panel = f"{split}, " + (f"all {whole} tasks" if len(ids) == whole else f"{len(ids)} of {whole} tasks")
    out = output_path(flags, s, folder, split, len(ids) < whole)
    policy = sdar.load_policy(s.model, s.device, sdar.tiny_texts(env, s), s)
    model = s.model + (f", step {state['step']}" if state else "")
    print(f"{env.source}\n{model}: {policy.model.num_parameters() / 1e6:.1f}M parameters, temperature {temperature:g}, "
          f"seed {flags.seed}, {'no ' * (flags.skills is None)}skills in the prompt\npanel {panel}, hash {digest}",
          flush=True)
    began, rows = time.time(), play(policy, env, ids, s, flags, temperature)
    result = {"format": FORMAT, "env": s.env, "source": env.source, "builtin": env.builtin, "split": split,
              "panel": {"name": panel, "hash": digest}, "model": s.model, "checkpoint": str(folder or ""),
              "weights": weights or getattr(policy.model.config, "_commit_hash", None),
              **{k: state.get(k) for k in ("step", "warm_step")}, "algo": saved.get("algo"),
              "base_model": saved.get("model", s.model), "train_seed": saved.get("seed"), "seed": flags.seed,
              "skills": flags.skills or (None if flags.skills is None else "built-in"), "temperature": temperature,
              "settings": {k: getattr(s, k) for k in KEPT}, "device": str(policy.device), "finished": time.time(),
              "seconds": time.time() - began, "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
              "transformers": transformers.__version__}, "summary": summarize(s.env, rows), "results": rows}
    try:
        sdar.write_text(out, json.dumps(result, indent=1, allow_nan=False))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    print_result(result)
    print(f"written: {out} ({result['seconds']:.0f} s)")


# ---- reading evaluations: compare, table, gates ----

def load_result(path):
    """An evaluation written by this file, summarized anew; UserError if it is not one, or its panel was changed."""
    result = sdar.read_json(path, f"{path} cannot be read; give a JSON that python eval.py wrote")
    try:
        whole = envs.panel_hash([r["id"] for r in result["results"]]) == result["panel"]["hash"]
        result["summary"] = summarize(result["env"], result["results"])
        # built-in tasks are the same under the same name only if the seed and the options of their world agree
        result["world"] = [result["settings"][k] for k in ("env_args", "seed")] if result["builtin"] else []
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):
        whole = False
    if not whole or result.get("format") != FORMAT:
        raise UserError(f"{path} is not a whole evaluation; give a JSON that python eval.py wrote")
    return result


def compare(argv):
    """python eval.py compare A.json B.json: B against A, task by task."""
    p = parser_for("compare", "Pair two evaluations of one panel: B minus A.")
    p.add_argument("files", nargs=2, metavar="A.json B.json")
    files = p.parse_args(argv).files
    a, b = both = [load_result(path) for path in files]
    names = [" ".join(map(str, (r["env"], r["panel"]["hash"], *r["world"]))) for r in both]
    if names[0] != names[1]:
        raise UserError(f"different panels, {names[0]} and {names[1]}: only evaluations of the same tasks pair")
    groups, rows, parts = [by_group(a["env"], r["results"]) | {"All": r["results"]} for r in both], [], []
    for label in groups[0]:
        x, y = ([r["won"] for r in group[label]] for group in groups)
        only_a, only_b = sum(u and not v for u, v in zip(x, y)), sum(v and not u for u, v in zip(x, y))
        difference, *limits = paired_difference(x, y)
        parts.append((difference, limits))
        rows.append([label, len(x), percent(sum(x) / len(x)), percent(sum(y) / len(y)),
                     percent(difference, limits, "+"), only_a, only_b, f"{mcnemar_exact(only_a, only_b):.3g}"])
    for letter, path, r in zip("AB", files, both):
        print(f"{letter}: {path}: {r['model']}, step {r['step']}")
    print(f"{a['env']}, panel {a['panel']['name']}, hash {a['panel']['hash']}\n"
          + render(["", "n", "A %", "B %", "B - A [95 %]", "only A", "only B", "p"], rows))
    score = mean_interval([v["score"] - u["score"] for u, v in zip(a["results"], b["results"])])
    print(f"score, B - A [95 %]: {percent(*score, '+')}")
    if a["env"] == "search":
        print(f"success, mean over data sets, B - A [95 %]: {percent(*macro(parts[:-1]), '+')}")
    print("Intervals: Newcombe's method 10 for paired proportions (score: Student's t); p: McNemar's exact test, "
          "two-sided.\nHow much one training run differs from the next is in neither.")
    for key in ("skills", "temperature", "seed"):
        print(f"note: {key} differs, {a[key]} and {b[key]}\n" * (a[key] != b[key]), end="")


def method_name(result):
    """The paper's name of the row that an evaluation belongs to."""
    if result["algo"] is None:
        return "Skill-Prompt*" if result["skills"] else "Vanilla"
    name = "Warm start" if result["step"] == 0 else METHODS.get(result["algo"], result["algo"])
    return name + "*" * bool(result["skills"])


def run_results(run):
    """({(panel, method): newest evaluation}, notes) of a run's last checkpoint; a JSON file stands for itself."""
    path = Path(run)
    if not path.exists():
        raise UserError(f"{run} does not exist; give run folders or JSONs of python eval.py")
    results = [load_result(p) for p in ([path] if path.is_file() else sorted(path.glob("eval-*.json")))]
    last, notes, newest = sdar.last_checkpoint(path), [], {}
    if last and (last / "state.json").is_file():
        state = sdar.read_json(last / "state.json", "")
        current = [r for r in results if (r["step"], r["warm_step"]) == (state["step"], state["warm_step"])]
        old, steps, results = len(results) - len(current), state["settings"]["steps"], current
        notes += [f"{run}: {old} evaluation(s) of an earlier checkpoint left out"] if old else []
        notes += [f"{run}: not finished, step {state['step']} of {steps}"] if state["step"] < steps else []
    notes += [] if results else [f"{run}: missing, evaluate it with python eval.py --model {run}"]
    for r in sorted(results, key=lambda r: r["finished"]):
        panel = (r["env"], r["panel"]["name"], r["panel"]["hash"], r["base_model"], *map(str, r["world"]))
        newest[panel, method_name(r)] = r
    return newest, notes


def table(argv):
    """python eval.py table RUN...: one table per panel and base model, published rows beside one's own."""
    p = parser_for("table", "The paper's Table 1 from the evaluations in run folders (or given as JSON files).")
    p.add_argument("runs", nargs="+", metavar="RUN")
    p.add_argument("--markdown", action="store_true", help="Markdown instead of text")
    flags, tables, notes = p.parse_args(argv), {}, []
    for run in flags.runs:
        newest, more = run_results(run)
        notes += more
        for (panel, method), result in newest.items():
            tables.setdefault(panel, {}).setdefault(method, []).append(result)
    for (env, panel, digest, base, *built), methods in sorted(tables.items()):
        print(f"{env}{', BUILT-IN tasks' * bool(built)}, {panel}, hash {digest}, model {base}\n\n"
              + render(*method_table(env, methods), flags.markdown) + "\n\nThe header counts tasks. Intervals: "
              f"one run, Wilson over its episodes; more, Student over their rates.\n{NOTE['']}{NOTE.get(env, '')}\n")
    print("\n".join(notes), end="\n" * bool(notes))


def method_table(env, methods):
    """(header, rows) of one table in the paper's order; methods: {name: [evaluations, one per run]}."""
    counts, rows = {g["group"]: g["n"] for g in next(iter(methods.values()))[0]["summary"]}, []
    columns = ["Score", "Avg"] if env == "webshop" else list(counts)
    for name in dict.fromkeys(["Vanilla", *sorted(set(methods) - set(PAPER)), *PAPER]):
        cells = []
        for column in columns if name in methods else ():
            kind, group = ("score", "Avg") if column == "Score" else ("success", column)
            found = [next(g for g in r["summary"] if g["group"] == group) for r in methods[name]]
            mean, limits = mean_interval([g[kind] for g in found])
            limits = found[0][kind + "_95"] if len(found) == 1 else limits
            cells.append(percent(mean, limits if limits[0] < limits[1] else None))  # runs that agree have no spread
        rows += [[name, len(methods[name]), *cells]] if cells else []
        paper = published(env, name) if name in PAPER else {}
        rows += [[f"{name}, published", "", *(paper.get(c, "-") for c in columns)]] if paper else []
    return ["method", "runs", *(f"{c} ({counts[c]})" if c in counts else c for c in columns)], rows


def gates(argv):
    """python eval.py gates RUN: the newest logged episode that has gate values, as text."""
    p = parser_for("gates", "Print a logged episode; behind each token the value of its gate.")
    p.add_argument("run", metavar="RUN")
    path = Path(p.parse_args(argv).run) / "episodes.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        shown = [row for row in rows if any("gates" in turn for turn in row["turns"])][-1]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"{path} holds no gate values; give the folder of a run whose method has a teacher") from None
    print(f"step {shown['step']}, task {shown['task_id']}, skill {shown['skill']}, {'not ' * (not shown['won'])}won")
    for turn in shown["turns"]:
        print(f"\n> {turn['observation']}\n{turn.get('gates', turn['response'])}")


# ---- speed and memory ----

def head_memory(kind, device, tokens, width, chunk, vocab=151936):
    """MiB beyond inputs, weight and their gradients while log-probabilities of `tokens` positions are computed and
    differentiated; kind: "chunked" as in training, "full": log-softmax of all logits at once. nan on Windows."""
    hidden, weight = (torch.randn(n, width, device=device, requires_grad=True) for n in (tokens, vocab))
    targets = torch.arange(tokens, device=device)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    sdar.chunked_logps(hidden[:8], weight, targets[:8]).sum().backward()  # start-up costs, paid before counting
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = (sdar.peak_memory(device) or math.nan)
    if kind == "chunked":
        sdar.chunked_logps(hidden, weight, targets, chunk=chunk).sum().backward()
    else:
        torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None]).sum().backward()
    return (sdar.peak_memory(device) or math.nan) - before


def bench_memory(device):
    """Table rows on head_memory, in fresh processes: a CPU process's peak never falls. The width hardly matters."""
    size, peaks = (8192, 1536, 1024) if device.type == "cuda" else (1024, 64, 128), []
    for kind in ("full", "chunked"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks.append(pool.apply(head_memory, (kind, device, *size)))
    return [[f"log-probs of {size[0]} tokens x 151,936 words: full logits", f"{peaks[0]:.0f}", "MiB"],
            [f"  in chunks of {size[2]}", f"{peaks[1]:.0f}", "MiB"],
            ["  full / chunked", f"{peaks[0] / max(peaks[1], 1):.1f}", "x"]]


def bench_generate(policy, prompts, s, pairs):
    """Table rows on sdar.generate against model.generate: same prompts, s.max_response tokens each, in turns."""
    endless, width = dataclasses.replace(policy, end_ids=frozenset(), closing_ids=frozenset()), max(map(len, prompts))
    ids, mask = (torch.tensor([[0] * (width - len(row)) + row for row in rows], device=policy.device)
                 for rows in (prompts, [[1] * len(p) for p in prompts]))
    options = dict(attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
                   min_new_tokens=s.max_response, max_new_tokens=s.max_response)
    calls, speeds = (lambda: sdar.generate(endless, prompts, s, 1.0, (), sdar.generator_for(policy, s, "bench")),
                     lambda: policy.model.generate(input_ids=ids, **options)[:, width:].tolist()), []
    for call in calls * (pairs + 1):
        began = time.perf_counter()
        speeds.append(sum(map(len, call())) / (time.perf_counter() - began))
    ours, theirs = speeds[2::2], speeds[3::2]  # the first pair warmed up
    ratios = [x / y for x, y in zip(ours, theirs)]
    where = f"{len(prompts)} rows, {len(set(map(tuple, prompts)))} prompts, {width} + {s.max_response} tokens"
    return [[f"sdar.generate, {where}", f"{statistics.median(ours):.0f}", "tokens/s"],
            ["model.generate of transformers, same", f"{statistics.median(theirs):.0f}", "tokens/s"],
            [f"  ratio, median of {', '.join(f'{x:.2f}' for x in ratios)}", f"{statistics.median(ratios):.2f}", "x"]]


def bench_env(env, ids, s):
    """Table row on the environment: prompt and step along expert episodes, one process."""
    sessions, steps, seconds = [env.start(i) for i in ids], 0, 0.0
    while sessions and steps < 500:
        responses, began = [x.expert() for x in sessions], time.perf_counter()
        [x.prompt(history=s.history, brief=s.prompt_style == "brief") for x in sessions]
        env.step(sessions, responses)
        steps, seconds = steps + len(sessions), seconds + time.perf_counter() - began
        sessions = [x for x in sessions if not x.done]
    return [[f"environment, prompt and step, {steps} expert steps", f"{steps / max(seconds, 1e-9):.0f}", "steps/s"]]


def bench_step(policy, env, s, peak_tflops):
    """Table rows on one training step, the second of two. MFU: 2 FLOPs per token and weight forward, 6 forward and
    backward; embedding, head, attention and recomputation are not counted."""
    state, reference = sdar.make_state(policy, s), copy.deepcopy(policy.model).eval() if s.kl else None
    for _ in range(2):
        episodes, *rest = sdar.play_step(state, env, reference, s)
        m = sdar.learn_step(state, episodes, *rest, s)
    trunk = policy.model.base_model
    weights = sum(p.numel() for p in trunk.parameters()) - trunk.get_input_embeddings().weight.numel()
    rows = [[f"one step of {s.algo}: {len(episodes)} episodes, {sum(len(e.turns) for e in episodes)} turns",
             f"{m['seconds']:.2f}", "s"]]
    for name in [k[8:] for k in m if k.startswith("seconds_")]:
        flops = m[f"tokens_per_s_{name}"] * weights * (6 if name == "update" else 2)
        mfu = f", MFU {flops / peak_tflops / 1e10:.1f} %" if peak_tflops and name != "rollout" else ""
        rows.append([f"  {name}", f"{m[f'seconds_{name}']:.2f}", f"s, {m[f'tokens_per_s_{name}']:.0f} tokens/s{mfu}"])
    return rows + [["peak memory so far", f"{m['peak_memory_mib'] or math.nan:.0f}", "MiB"]]


def random_policy(config, s, env):
    """A policy of the shape in a config.json with random weights and the tokenizer of `tiny`; nothing is downloaded."""
    try:
        config = transformers.AutoConfig.from_pretrained(config)
    except (OSError, ValueError) as error:
        raise UserError(f"no model shape in {config!r} ({sdar.first_line(error)}); give a config.json") from None
    with sdar.pick_device(s.device) as device:
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    _, tokenizer = sdar.build_tiny(sdar.tiny_texts(env, s, 50), s)
    return sdar.wrap_policy(model.to(torch.float32 if device.type == "cpu" else torch.bfloat16), tokenizer)


def bench(argv):
    """python eval.py bench: one table; what is compared runs side by side."""
    p = parser_for("bench", "Speed and memory. All flags of sdar.py work too; without them it is a small step.")
    p.add_argument("--random-weights", metavar="CONFIG", help="a config.json: its shape with random weights")
    p.add_argument("--peak-tflops", type=float, help="the device's, in TFLOP/s, for the model FLOP utilisation (MFU)")
    p.add_argument("--pairs", type=int, default=3, help="timed pairs of sdar.generate and model.generate")
    flags, rest = p.parse_known_args(argv)
    if flags.pairs < 1 or not (flags.peak_tflops is None or flags.peak_tflops > 0):
        raise UserError("--pairs and --peak-tflops must be above 0")
    s, _ = sdar.read_settings(["--groups", "2", "--group-size", "4", "--max-turns", "4"] + rest)
    rows = bench_memory(sdar.pick_device(s.device))
    env = sdar.open_env(s)
    policy = random_policy(flags.random_weights, s, env) if flags.random_weights else sdar.load_policy(
        s.model, s.device, sdar.tiny_texts(env, s), s)
    ids = sdar.draw_tasks(env, s.split or env.splits[0], s, 0, max(s.groups, 50))
    prompts = [sdar.student_prompt(policy, env.start(i), s)[0] for i in ids[:s.groups] for _ in range(s.group_size)]
    rows += bench_generate(policy, prompts[:s.rollout_rows], s, flags.pairs) + bench_env(env, ids, s)
    rows += bench_step(policy, env, s, flags.peak_tflops)
    print(f"{env.source}\n{flags.random_weights or s.model}: {policy.model.num_parameters() / 1e6:.1f}M parameters, "
          f"{policy.model.dtype}, {policy.device}, torch {torch.__version__}, {torch.get_num_threads()} threads\n"
          + render(["", "value", "unit"], rows))


def main(argv=None):
    """The command line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = {"compare": compare, "table": table, "bench": bench, "gates": gates}
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a model may write what this terminal cannot show
    try:
        commands[argv[0]](argv[1:]) if argv and argv[0] in commands else evaluate(argv)
    except UserError as error:
        sdar.fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        sdar.fail("out of memory; lower --rollout-rows")


if __name__ == "__main__":
    main()
