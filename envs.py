"""ALFWorld, WebShop and Search-QA as text environments in plain Python and numpy.

The benchmarks' own data, read in place: no TextWorld, no planner, no Java, no Lucene, no spaCy,
no faiss. Without data each builds games of its own in the same format from a seed, to run offline.

Each benchmark is one class (`Alfworld`, `WebShop`, `SearchQA`; open_env) with the same members:

    source, builtin             a line on the data found; whether the data is the built-in one
    splits, stop                names of the splits; the tags that close a response
    tasks(split)                sorted task ids
    start(task_id, seed)        a session: one episode
    step(sessions, responses, think_closed)     advances many sessions by a model's raw responses
    skill(category, brief)      what the teacher of one task is told; all_skills(), skill_names

A session has task, goal (what success is, for people), category (of its skill), group (its column
in a table), observation, turns, prompt(skill, history, room, brief), expert(), and after a step
action, valid (its form is right), admissible (it could be played), done, won, score, details. A
class of your own with these members is an environment too, --env FILE.py:Class
(docs/environments.md has one). Nothing here knows of torch or of training.

What the three share comes first, then each benchmark in one order: environment, session, prompt,
skills, a bar, and below the bar, where a reader of the adapter can stop, the engine, the built-in
world and the expert. BM25 and Lucene's text analysis come last.

    python envs.py download NAME [DIR]     fetch data: NAME is alfworld, webshop or webshop-full
    python envs.py play NAME [TASK]        play an episode by hand: alfworld, webshop or search
"""

import ast
import contextlib
import copy
import difflib
import gzip
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import sys
import time
import unicodedata
import urllib.request
import zipfile
from array import array
from collections import Counter, namedtuple
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

# ======== What the three benchmarks share: errors, data, turns, skills, panels ====================
class UserError(Exception):
    """A mistake of the user's. The message is one line and says what to do."""

@contextlib.contextmanager
def refused(what, advice, *errors):
    """A block in which these errors become a UserError: what fails, the error, what to do."""
    try:
        yield
    except errors as error:
        raise UserError(f"{what} ({one_line(repr(error))}); {advice}") from None

def open_env(name, data=None, seed=233, skills=None, **options):
    """The environment called `name`, or FILE.py:Class; `options` go to its class. UserError."""
    classes = {"alfworld": Alfworld, "webshop": WebShop, "search": SearchQA}
    if name not in classes and ".py:" not in name:
        names = ", ".join([*classes, "FILE.py:Class"])
        raise UserError(f"--env {name!r} is unknown; choose one of {names}")
    made = classes.get(name) or _own_class(name)
    takes = {*inspect.signature(made).parameters}
    shared = {"data": data, "seed": seed, "skills": skills}  # an own class need not take them
    options |= {key: value for key, value in shared.items()
                if key in takes or value not in (None, "built-in", seed)}
    if unknown := sorted(set(options) - takes):
        known = ", ".join(sorted(takes - set(shared))) or "none"
        raise UserError(f"{name} has no option {unknown[0]!r}; it takes {known}")
    env = made(**options)
    if lacks := [] if name in classes else _lacking(env):
        raise UserError(f"{name} lacks {', '.join(lacks)}; envs.py documents what it needs")
    return env

def _own_class(name):
    """The class that FILE.py:Class names."""
    file, _, title = name.rpartition(":")
    with refused(f"cannot load {name}", "correct the name or the file", Exception):
        spec = importlib.util.spec_from_file_location("own_" + Path(file).stem, file)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)  # may do anything
        return getattr(module, title)

def _lacking(env):
    """Members that an environment or its first session lacks, of those that this file documents."""
    members = "source builtin splits stop tasks start step skill all_skills skill_names".split()
    own = """task goal category group observation turns prompt expert action valid admissible done
             won score details""".split()
    if lacks := [x for x in members if not hasattr(env, x)]:
        return lacks
    session = env.start(env.tasks(env.splits[0])[0])
    lacks = [f"a session's {x}" for x in own if not hasattr(session, x)]
    return lacks + ["a second split, to validate on"] * (len(env.splits) < 2)

def find_data(name, data=None):
    """Path of a benchmark's data: `data`, else $<NAME>_DATA, else ~/.cache/NAME; None: built-in."""
    variable = name.upper() + "_DATA"
    if data == "built-in":
        return None
    if not (named := data or os.environ.get(variable)):
        cache = Path(os.path.expanduser("~/.cache")) / name
        return cache if cache.is_dir() and any(cache.iterdir()) else None
    return existing("--data" if data else "$" + variable, named)

def existing(source, named):
    """The absolute path that `source` names. UserError with what is nearby if there is none."""
    path = Path(os.path.abspath(os.path.expandvars(os.path.expanduser(str(named)))))
    if path.exists():
        return path
    folder = next(x for x in path.parents if x.is_dir())
    names = sorted(x.name for x in folder.iterdir())
    close = difflib.get_close_matches(path.relative_to(folder).parts[0], names)
    more = ", or give built-in" * (source == "--data")
    raise UserError(f"{source} names {path}, which does not exist; {folder} holds "
                    f"{', '.join(close or names[:3]) or 'nothing'}; correct it{more}")

def download(url, path, sha256=None):
    """Fetches `url` into `path`, whole or not at all; returns the path. Raises UserError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, digest = path.with_name(path.name + ".part"), hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=60) as reply, open(part, "wb") as file:
            total = int(reply.headers.get("Content-Length") or 0)
            with tqdm(desc=path.name, total=total or None, unit="B", unit_scale=True) as bar:
                while block := reply.read(1 << 16):
                    digest.update(block)
                    bar.update(file.write(block))
            if reply.headers.get_content_type() == "text/html":
                raise OSError("a page came instead of the file (a quota?); try a browser")
        if total and part.stat().st_size != total:
            raise OSError(f"got {part.stat().st_size} of {total} bytes")
        if sha256 and digest.hexdigest() != sha256:
            raise OSError("it is not the expected file: its sha256 differs")
        return part.replace(path)
    except Exception as error:  # whatever a network or a disk can do to it
        raise UserError(f"cannot fetch {url} ({one_line(str(error))}); check the connection, or "
                        f"put the file there by hand: {path}") from None
    finally:
        part.unlink(missing_ok=True)

def post_json(name, url, body, read, timeout=30.0, retries=4, delay=1.0, total=math.inf):
    """read(reply in bytes) of the server `name` to a POST of `body` as JSON. After an error or None
    from `read` it tries again with doubling delay (s), but not after a refusal (4xx). A try has
    `timeout` seconds, all together `total`. UserError if the last try failed, None if `read`
    returned None."""
    ends = time.monotonic() + total
    for attempt in range(retries + 1):
        time.sleep(min(30.0, delay * 2 ** (attempt - 1)) if attempt else 0)
        problem = ""
        try:
            found = read(_post(url, body, max(0.1, min(timeout, ends - time.monotonic()))))
            if found is not None:
                return found
        except Exception as error:  # whatever a network or a broken server does to a request
            problem = one_line(f"{type(error).__name__}: {error}")
            if getattr(error, "code", 500) < 500 and error.code != 429:
                break  # refused: repeating it cannot help
    if problem:
        raise UserError(f"{name} {url} failed {attempt + 1} times ({problem}); check that it "
                        "answers there, then run again (a saved training with --resume)")

def _post(url, body, timeout):
    """The reply to a POST of `body` as JSON, at most MAX_REPLY bytes within `timeout` seconds."""
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), kind)
    # no proxy can reach this machine's own servers
    local = re.match(r"(?i)https?://([^/@]*@)?(localhost|127\.|0\.0\.0\.0|\[::1?\])", url)
    opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * bool(local))
    deadline, reply = time.monotonic() + timeout, b""
    with opener.open(request, timeout=timeout) as connection:
        while chunk := connection.read1(1 << 20):
            reply += chunk
            if len(reply) > MAX_REPLY or time.monotonic() > deadline:
                raise TimeoutError("the reply takes too long or is too large")
    return reply

def panel_hash(texts):
    """First 12 hex digits of the sha256 of the texts joined by newlines."""
    return hashlib.sha256("\n".join(texts).encode("utf-8", "replace")).hexdigest()[:12]

def panel(env, split, episodes=None, seed=233):
    """(sorted ids, panel_hash of ids and texts) of the first `episodes` by sha256(seed, id)."""
    ids = sorted(env.tasks(split), key=lambda task_id: hashlib.sha256(
        f"{seed}\n{task_id}".encode("utf-8", "replace")).digest())
    if episodes is not None and episodes < 1:
        raise UserError(f"a panel of {episodes} episodes is empty; give 1 to {len(ids)} with "
                        "--val-episodes of sdar.py or --episodes of eval.py")
    ids = sorted(ids[:episodes])
    return ids, panel_hash([text for i in ids for text in (i, env.start(i).task)])

QUOTED_TURN = "[Observation {0}: '{1}', Action {0}: '{2}']"  # the public code's form

def shorten_middle(text, room):
    """`text` if it has at most `room` characters (None: no limit), else head and tail of it."""
    if room is None or len(text) <= room:
        return text
    keep = max(room - 5, 0)
    return (text[:(keep + 1) // 2] + " ... " + text[len(text) - keep // 2:])[:max(room, 0)]

def encodable(text):
    """The text with "?" for lone surrogates, which neither files nor tokenizers accept."""
    return text.encode("utf-8", "replace").decode()

def one_line(text, limit=200):
    """The text as it can be quoted: one line, printable and encodable, cut at `limit`."""
    text = encodable(text[:4 * limit])
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:limit]

def last_turns(turns, history, room):
    """(number, observation cut to `room` characters, action) of the last `history` turns."""
    numbered = list(enumerate(turns, 1))[max(len(turns) - history, 0):]
    return [(number, shorten_middle(seen, room), action) for number, (seen, action) in numbered]

def parse_action(response, think_closed=False, kept=30):
    """(action, valid) of a response as the public alfworld_projection judges: what stands, in lower
    case, between the first <action> and </action>; else the last `kept` characters, invalid. Also
    invalid: <think> or </think> missing (unless think_closed), or any CJK character."""
    low = response.lower()
    start, end = low.find("<action>"), low.find("</action>")
    if start < 0 or end < 0:
        return low[-kept:], False
    thinks = think_closed or ("<think>" in response and "</think>" in response)
    valid = bool(thinks and not re.search("[\u4e00-\u9fff]", response))
    return low[start + len("<action>"):end].strip(), valid

def step_each(sessions, responses, think_closed=False):
    """Advances sessions by their raw responses. think_closed: the prompt holds a closed <think>."""
    for session, response in zip(sessions, responses, strict=True):
        if not session.done:
            session.step(response, think_closed)

# ---- skills in the form of the public skill directories ----
def _table(text):
    """{name: text} of paragraphs "name: text" with indented lines; no space after a final | or ,"""
    found = re.findall(r"^(\w+): (.*?)(?=^\w|\Z)", re.sub(r"([|,])\n\s+", r"\1", text), re.S | re.M)
    return {name: " ".join(body.split()) for name, body in found}

def _read_cards(text):
    """{name of a group of skills: its text} of a claude_style_skills.json."""
    def line(card):
        main = card.get("principle") or card.get("description")
        fields = (("{}:", card.get("title")), ("{}", main), ("When: {}", card.get("when_to_apply")),
                  ("Instead: {}", card.get("how_to_avoid")))
        return "- " + " ".join(form.format(str(field).strip()) for form, field in fields if field)
    data = json.loads(text)
    cards = {name: data.get(name, []) for name in ("general_skills", "common_mistakes")}
    cards.update(data.get("task_specific_skills", {}), **data.get("query_type_skills", {}))
    return {name: "\n".join(map(line, items)) for name, items in cards.items()}

def read_skills(folder, own, categories, aliases=None):
    """{"general", "mistakes" and each category: text}: `own`, or of a public skill directory, where
    `aliases` gives further names. UserError if a file is broken or a category has no text."""
    if not folder:
        return own
    path = existing("--skills", folder)
    folder = path.parent if path.is_file() else path
    mapping_file = folder / "skill_mapping.json"
    files = sorted(folder.glob("claude_style_skills*.json"))
    if path.is_file() and path != mapping_file:  # of several card files, this one
        files = [path]
    if len(files) > 1:
        raise UserError(f"{folder} holds {', '.join(file.name for file in files)}; give one of "
                        "these files with --skills")
    if not mapping_file.is_file() and not files:
        raise UserError(f"{folder} has neither skill_mapping.json nor claude_style_skills.json; "
                        "give the folder of a public skill library")
    found = {}
    try:
        for file in files:
            found = _read_cards(file.read_text(encoding="utf-8-sig"))
        if mapping_file.is_file():  # .md files replace cards, which still give common mistakes
            file, texts = mapping_file, {}
            mapping = json.loads(file.read_text(encoding="utf-8-sig"))
            for name, filename in mapping["skill_files"].items():
                file = folder / filename
                if Path(filename).is_absolute() or ".." in Path(filename).parts:
                    raise ValueError("it is not in the folder")
                texts[name] = file.read_text(encoding="utf-8-sig").strip()
            tasks = mapping.get("task_to_skill", {}).items()
            found.update(texts, **{task: texts[name] for task, name in tasks if name in texts})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read skills from {file} ({error!r}); correct it") from None
    aliases = {"general": ("general_skills",), "mistakes": ("common_mistakes",), **(aliases or {})}
    library = {name: next(filter(None, map(found.get, (name, *aliases.get(name, ())))), "")
               for name in ("general", "mistakes", *categories)}
    if missing := [category for category in categories if not library[category]]:
        lacks = "no skills for " + ", ".join(missing)
        holds = "only general skills" if len(missing) == len(categories) else lacks
        raise UserError(f"{folder} holds {holds}; it needs a text for each of "
                        f"{', '.join(categories)}")
    return library

def skill_text(library, category=None, brief=False):
    """General skills, the category's own (None: all), common mistakes; brief: only its own."""
    categories = [name for name in library if name not in ("general", "mistakes")]
    if category not in (None, *categories):
        raise UserError(f"no skill {category!r}; there are {', '.join(categories)}")
    chosen = categories if category is None else [category]
    names = chosen if brief else ["general", *chosen, "mistakes"]
    return "\n".join(library[name] for name in names if library[name])

# ======== ALFWorld ================================================================================
ALFWORLD_TYPES = {  # type, as in a game's path: (column of the paper's table, telling predicate)
    "look_at_obj_in_light": ("Look", "istoggled"),
    "pick_clean_then_place_in_recep": ("Clean", "isclean"),
    "pick_heat_then_place_in_recep": ("Heat", "ishot"),
    "pick_cool_then_place_in_recep": ("Cool", "iscool"),
    "pick_two_obj_and_place": ("Pick2", "not"),
    "pick_and_place": ("Pick", "inreceptacle")}

class Alfworld:
    """ALFWorld's games, or games built from `seed` where there is no data (folder or zip of the
    release). house: receptacles of a built-in game, 4 to 12; task_types: those to keep, as in
    "Pick,Heat"; detours: see expert_script. Raises UserError for bad values."""
    stop, splits = ("</action>",), ("train", "valid_seen", "valid_unseen")
    step, skill_names = staticmethod(step_each), list(ALFWORLD_TYPES)

    def __init__(self, data=None, seed=233, skills=None, house=6, task_types="", detours=0):
        for option, value, least, most in (("house", house, 4, 12), ("detours", detours, 0, 100)):
            if not isinstance(value, int) or not least <= value <= most:
                raise UserError(f"{option} must be a whole number from {least} to {most}, not "
                                f"{value!r}")
        self.seed, self.house, self.detours = seed, house, detours
        self.task_types = _read_task_types(task_types)
        library = read_skills(skills, ALFWORLD_SKILLS, self.skill_names, ALFWORLD_SKILL_ALIASES)
        self.skill = self.all_skills = partial(skill_text, library)
        path = find_data("alfworld", data)
        self._files = GameFiles(path) if path else None
        self.builtin = not (path and self._files.files)
        if self.builtin and path and (data or os.environ.get("ALFWORLD_DATA")):
            raise UserError(f"no game.tw-pddl in {path}; give the folder or zip that holds the "
                            "games, or run: python envs.py download alfworld")
        sizes = BUILT_IN_SIZES if self.builtin else self._files.sizes
        sizes = ", ".join(f"{split} {size}" for split, size in sizes.items())
        self.source = f"ALFWorld in {path}: {sizes}" if not self.builtin else (
            f"built-in games (seed {seed}): {house} receptacles, {sizes}; for the real benchmark: "
            "python envs.py download alfworld")
        self._ids, self._parsed = {}, lru_cache(maxsize=512)(self._read)  # 110 KiB a game

    def tasks(self, split):
        """Sorted ids of the solvable games: "split/task/trial", built-in "split/type/number"."""
        if split not in self.splits:
            raise UserError(f"ALFWorld has no split {split!r}; it has {', '.join(self.splits)}")
        if split not in self._ids:
            kinds, left_out, count = self.task_types, 0, BUILT_IN_SIZES[split]
            if self.builtin:
                ids = [f"{split}/{kinds[i % len(kinds)]}/{i:05d}" for i in range(count)]
            else:
                ids, left_out = self._files.solvable(split, kinds)
            self._ids[split] = sorted(ids)
            if left_out:
                self.source += f"; {left_out} games of {split} are not marked as solvable: left out"
        if not self._ids[split]:
            raise UserError(f"no games in {split} ({self.source}); check --data, and task_types in "
                            "--env-args")
        return list(self._ids[split])

    def game(self, task_id):
        """An AlfworldEngine of its own, to be reset()."""
        return copy.copy(self._parsed(task_id))

    def _read(self, task_id):
        if not self.builtin:
            return AlfworldEngine(parse_game(self._files.read(task_id), task_id))
        split, kind, number = (task_id.split("/") + ["", ""])[:3]
        if task_id not in self.tasks(split):
            raise UserError(f"no built-in game {task_id!r}; see tasks(split)")
        return AlfworldEngine(built_in_game(split, int(number), kind, self.seed, self.house))

    def start(self, task_id, seed=0, detours=None):
        """A new episode. `seed` and `detours` only decide how its expert searches."""
        detours = self.detours if detours is None else detours
        return AlfworldSession(self.game(task_id), seed, detours)

class AlfworldSession:
    """One episode. turns: [(observation, action)], an action cut to one line of 200 characters."""
    action, valid, admissible, done, won, score = "", True, True, False, False, 0.0  # set by step
    commands = property(lambda self: self.engine.admissible_commands)

    def __init__(self, engine, seed, detours):
        self.engine, self.observation = engine, engine.reset()
        self.task, self.category = engine.task, engine.task_type
        self.goal, self.found_object = self.task, False
        self.group = ALFWORLD_TYPES[self.category][0]
        self.turns, self.details = [], {"invalid": 0, "inadmissible": 0}
        self._script, self._detours, self._seed = None, detours, seed  # the expert's

    def step(self, response, think_closed=False):
        """Plays a raw response."""
        action, self.valid = parse_action(response, think_closed)
        self.action = one_line(action)
        self.admissible = action.strip() in self.engine.admissible_commands
        self.turns.append((self.observation, self.action))
        self.observation = self.engine.step(action)
        self.won = self.done = self.engine.won
        self.score = float(self.won)
        self.found_object |= any(map(self.engine.sought, self.engine.admissible_commands))
        self.details["invalid"] += not self.valid
        self.details["inadmissible"] += not self.admissible

    def expert(self):
        """The expert's response, if only its own were played so far. UserError: none is left."""
        self._script = self._script or expert_script(self.engine, self._detours, self._seed)
        step = 0  # its own moves among those that were played
        for _, action in self.turns:
            step += [action] == [act for _, act in self._script[step:step + 1]]
        if step == len(self._script):
            raise UserError("the expert has no further step: the episode is over, or other actions "
                            "were played")
        return "<think>{}</think><action>{}</action>".format(*self._script[step])

    def prompt(self, skill="", history=2, room=None, brief=False):
        """The user message now; observations are cut to `room` characters. brief: in few tokens."""
        past = last_turns(self.turns, history, room)
        seen = shorten_middle(self.observation, room)
        commands = [name for name in self.engine.admissible_commands if name != "help"]
        count = len(self.turns)
        if brief:  # playable but not listed: look, inventory, examine; what is held is told
            hidden = ("go to", "examine", "look", "inventory")
            can = [x for x in commands if not x.startswith(hidden)]
            places = " ".join(x[6:] for x in commands if x.startswith("go to "))
            did = " > ".join(action for _, _, action in past)
            rows = (("Task", self.task.rstrip(".")), ("Skill", skill), ("Have", self.engine.held),
                    ("Did", did), (f"Step {count + 1}", _terse(seen)),
                    ("Actions", "; ".join(can)),
                    ("Go to", places))
            return "\n".join(f"{name}: {text}" for name, text in rows if text)
        now = f"You are now at step {count + 1} and y" if count else "Y"
        if past:
            turns = "\n".join(QUOTED_TURN.format(*turn) for turn in past)
            now = (f"Before this step you have already taken {count} step(s). The most recent "
                   f"{len(past)} observations and the actions you took on them:\n{turns}\n{now}")
        task_is_seen = not count and seen == self.observation  # the opening text names the task
        return ALFWORLD_PROMPT.format(
            skill=f"\nSkills that help with tasks of this kind:\n{skill}\n\n" if skill else "",
            task="" if task_is_seen else f"Your task is to: {self.task}\n", before=now, o=seen,
            actions="\n ".join(f"'{command}'" for command in commands))

ALFWORLD_PROMPT = """
You are an expert agent acting in the ALFRED Embodied Environment. {skill}{task}{before}\
our current observation is: {o}
The admissible actions in your situation are: [{actions}].

Now it is your turn to act.
First reason step by step about the situation. The reasoning MUST stand between <think> and \
</think>.
When it is done, choose one admissible action for this step and put it between <action> and \
</action>.
"""

ALFWORLD_SKILLS = _table("""
general: Search likely receptacles first, each once; open what is closed before you call it empty.
    Take the object as soon as you see it. Food: fridge, countertop, diningtable. Dishes:
    cabinet, countertop, shelf. Cutlery: drawer. Pens, laptops, clocks: desk. Cards, keys, cds:
    drawer. Books, phones: bed. You can hold one object.
pick_and_place: Pick and place: 1. Find the object where its kind usually is. 2. Take it. 3. Go to
    the target receptacle. 4. Open it if closed. 5. Move the object to it.
look_at_obj_in_light: Look under a lamp: 1. Find the object and take it. 2. Find the desklamp: on a
    desk or a sidetable. 3. Still holding the object, use the desklamp.
pick_clean_then_place_in_recep: Clean and place: 1. Find and take the object. 2. Go to the
    sinkbasin. 3. Clean the object with it. 4. Go to the target, open it if closed. 5. Move the
    object to it.
pick_heat_then_place_in_recep: Heat and place: 1. Find and take the object. 2. Go to the
    microwave, leave it closed. 3. Heat the object with it. 4. Go to the target, open it if closed.
    5. Move the object to it.
pick_cool_then_place_in_recep: Cool and place: 1. Find and take the object, food often in the
    fridge. 2. Go to the fridge. 3. Cool the object with it. 4. Go to the target, open it if
    closed. 5. Move the object to it.
pick_two_obj_and_place: Two objects: 1. Find and take the first. 2. Move it to the target. 3. Find
    another of the same kind, not the one already placed. 4. Move it to the same target receptacle.
mistakes: Avoid: going back to searched places; leaving closed receptacles unopened; placing the
    object before it is clean, hot or cool; naming an action that is not offered.""")
ALFWORLD_SKILL_ALIASES = {  # names in public skill directories
    "look_at_obj_in_light": ("examine",), "pick_two_obj_and_place": ("pick_and_place",),
    **{f"pick_{verb}_then_place_in_recep": (verb,) for verb in ("clean", "heat", "cool")}}

# ---- below: the engine, the built-in world, the expert; a reader of the adapter can stop here ----
ALFWORLD_URL = "https://github.com/alfworld/alfworld/releases/download/0.4.2/json_2.1.3_tw-pddl.zip"
ALFWORLD_SHA256 = "5df77ea759f2211a4106082839ddbbb790f1ba4e7d097ed732cf453f72aa36cf"

def _read_task_types(names):
    """Sorted task types from a text such as "Pick,pick_two_obj_and_place"; "" means all."""
    known = {name.lower(): kind for kind, (group, _) in ALFWORLD_TYPES.items()
             for name in (kind, group)}
    wanted = str(names).lower().replace(" ", "").split(",") if names else list(known)
    if not set(wanted) <= set(known):
        raise UserError(f"task_types={names}: choose from {', '.join(ALFWORLD_TYPES)}")
    return sorted({known[name] for name in wanted})

def _terse(text):
    """An observation in few words, for models trained from scratch."""
    if text.startswith("-="):
        return "start"  # the places that it names are those of the "go to" actions
    for pattern, short in (
            (r"^You (arrive at|open the) .*?\. (?=The|On)", ""), (r"^(You (?!are)).*", "done"),
            (r"^(On|In) the (.*?), you see", r"\2:"),
            (r"^The (.*?) is (open\. In it, you see)", r"\1:"),
            (r"^The (.*?) is closed\.$", r"\1 closed"),
            (r",? (and )?a (?=\w+ \d)", " "), (r"\.$", "")):
        text = re.sub(pattern, short, text)
    return text

class GameFiles:
    """The games of a release, in a folder or in its zip, read in place. files: {task id: file}"""
    def __init__(self, path):
        self.path, self._read = path, Path.read_bytes
        files = [*path.glob("*/*/*/game.tw-pddl"), *path.glob("json_2.1.*/*/*/*/game.tw-pddl")]
        archives = [path] if path.is_file() else sorted(path.glob("json_2.1.*tw-pddl*.zip"))
        if not files and archives:
            self.path = archives[-1]
            broken = f"cannot read {self.path}"
            with refused(broken, "download it again", zipfile.BadZipFile, OSError):
                archive = zipfile.ZipFile(self.path)
            self._read = archive.read
            files = [name for name in archive.namelist() if name.endswith("/game.tw-pddl")]
        found = sorted(("/".join(Path(file).parts[-4:-1]), file) for file in files)
        # The original plays no others.
        played = re.compile(f"({'|'.join(Alfworld.splits)})/(?!.*(movable|Sliced))")
        self.files = {task_id: file for task_id, file in found if played.match(task_id)}
        self.sizes = Counter(task_id.split("/")[0] for task_id in self.files)

    def read(self, task_id):
        """The text of a game file. Raises UserError naming it."""
        what = f"cannot read {task_id!r} in {self.path}"
        with refused(what, "see tasks(split)", Exception):  # damaged archives raise anything
            return self._read(self.files[task_id]).decode("utf-8-sig")

    def solvable(self, split, kinds):
        """(ids of a split's games of these types marked as solvable, how many are not marked)."""
        ids = [name for name in self.files
               if name.startswith(split + "/") and any(kind in name for kind in kinds)]
        kept = []
        for name in ids:
            text = self.read(name)
            if not text.rstrip().endswith("}"):
                raise UserError(f"{name} is not a complete JSON object; download it again")
            kept += [name] * bool(re.search(r'"solvable":\s*true', text))
        return kept, len(ids) - len(kept)

def download_alfworld(folder, url=ALFWORLD_URL, sha256=ALFWORLD_SHA256):
    """Fetches the official games as a zip, which is played in place. Raises UserError."""
    path = folder / url.rsplit("/", 1)[-1]
    if not path.exists():
        download(url, path, sha256)
    print(Alfworld(path).source)

# ---- reading a game file: JSON with a PDDL domain, a grammar, a PDDL problem, a walkthrough ----
_ALFRED_ACTIONS = set("""
look inventory examineReceptacle examineObject GotoLocation OpenObject CloseObject PickupObject
PutObject CleanObject HeatObject CoolObject ToggleObject SliceObject""".split())

def parse_game(text, where="the game"):
    """What AlfworldEngine needs of a game.tw-pddl's JSON text. Raises UserError naming `where`."""
    with refused(f"cannot play {where}", "is it a whole game.tw-pddl?", ValueError, LookupError,
                 AttributeError, TypeError, RecursionError):
        data = json.loads(text)
        grammar, problem = data["grammar"], data["pddl_problem"].lower()
        actions = set(re.findall(r"\(:action\s+(\w+)", re.sub(";.*", "", data["pddl_domain"])))
        if odd := sorted((actions ^ _ALFRED_ACTIONS) - {"help"}):
            raise ValueError(f"its pddl_domain is not ALFRED's: {', '.join(odd)}")
        facts = _parse_facts(problem[problem.index("(:init"):problem.index("(:goal")])
        needed = {"atlocation", "objecttype", "receptacletype", "receptacleatlocation"}
        if missing := needed - set(facts):
            raise ValueError("its pddl_problem lacks " + ", ".join(sorted(missing)))
        put, other = "move {} to {}", "put (.+) in/on (.+)"
        if "move {o} to {r}" not in grammar:  # before November 2024; a release mixes both wordings
            put, other = "put {} in/on {}", "move (.+) to (.+)"
            if "put {o} in/on {r}" not in grammar:
                raise ValueError('its grammar has neither "move X to Y" nor "put X in/on Y"')
        plan = [re.sub(other, put.format(r"\1", r"\2"), x) for x in data.get("walkthrough") or ()]
        task = re.search(r'Your task is to: (.*?)"', grammar, re.S)[1]
        return {"facts": facts, "goal": _parse_goal(problem), "help": "help" in actions,
                "put": put, "task": " ".join(task.split()), "walkthrough": plan,
                "arrives_at_name": "You arrive at {r.name}" in grammar}  # older: "at loc 7"

def _parse_facts(text):
    """{predicate: set of argument tuples} of the facts in a PDDL text, without distances."""
    facts = {}
    for predicate, arguments in re.findall(r"\((?!distance)([\w-]+)([^()]*)\)", text):
        facts.setdefault(predicate, set()).add(tuple(arguments.split()))
    return facts

def _parse_goal(text):
    """The atoms of the PDDL condition after "(:goal", which must hold together for some values of
    its ?variables: [(predicate, name, ...)], a negated one as ("not", predicate, name, ...)."""
    text = text[text.index("(:goal"):]
    if odd := re.search(r"\((or|forall|imply|when|not \((?:exists|and|not))\b", text):
        raise ValueError(f"its goal uses {odd[1]}, which ALFWorld's do not")
    if text.count("(") > text.count(")"):
        raise ValueError("its goal is cut")
    found = re.findall(r"\((not \()?([^()?][^()]*)\)", text)  # lists without lists in them
    atoms = [("not", *inner.split()) if negated else (*inner.split(),) for negated, inner in found]
    typed = [atom for atom in atoms if atom[0] in ("objecttype", "receptacletype")]
    rank = {}  # variable: when it gets its value; an atom is tested as soon as all of its have one
    for name in itertools.chain(*typed, *atoms):
        rank.setdefault(name, len(rank) if name[0] == "?" else -1)
    return sorted(atoms, key=lambda x: (max(map(rank.get, x)), x not in typed, x[0] == "not"))

def _holds(atoms, facts, bound):
    """Whether all atoms hold for some values of the variables that have none in `bound` ({variable:
    value}): a join over the facts ({predicate: argument tuples}), atom after atom."""
    if not atoms:
        return True
    (predicate, *names), *rest = atoms
    if predicate == "not":
        return not _holds([(*names,)], facts, bound) and _holds(rest, facts, bound)
    values = tuple([bound.get(name, name) for name in names])
    free = [i for i, value in enumerate(values) if value[0] == "?"]
    known = {values[:1] * 2} if predicate == "=" else facts.get(predicate, set())
    for fact in known if free else known & {values}:
        if all([i in free or fact[i] == value for i, value in enumerate(values)]):
            if _holds(rest, facts, {**bound, **{names[i]: fact[i] for i in free}}):
                return True
    return False

# ---- the engine ----
_TREATMENTS = {  # verb: (effect, effect it undoes, kinds of receptacle); only for what is -able
    "clean": ("isclean", "isdirty", ("sink", "sinkbasin")),
    "heat": ("ishot", "iscool", ("microwave",)),
    "cool": ("iscool", "ishot", ("fridge",))}
# What a command does: its answer, what is described after it (an id or "look"), the facts that it
# adds, those that it deletes. This is the effect of all commands but the admissible ones:
_NOTHING = "Nothing happens.", None, (), ()
_CHANGING = """atlocation objectatlocation inreceptacle not_inreceptacle holds opened isclean
isdirty ishot iscool istoggled issliced""".split()  # predicates that an action adds or deletes
_HELP = """Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""

def _series(names):
    """A list as the original prints it: "a mug 1, and a pen 2", or "nothing"."""
    *first, last = names or ["nothing"]
    return ", ".join(first) + ", and " + last if first else last

def _player_names(facts):
    """{id: the player's name}; a kind's sorted ids are numbered downwards (AlfredDemangler)."""
    kinds, names = {}, {}
    for name in sorted(x for x in set().union(*itertools.chain(*facts.values())) if "_bar_" in x):
        kind = name.split("_bar_", 1)[0] + ("basin" if "basin" in name else "")
        kinds.setdefault(kind, []).append(name)
    for kind, ids in kinds.items():
        names |= {name: f"{kind} {len(ids) - i}" for i, name in enumerate(ids)}
    return names

class AlfworldEngine:
    """A game, played to the letter as by alfworld 0.4.2 on textworld 1.7.0. Has task, task_type,
    walkthrough, and after reset() admissible_commands (sorted), won, held. A copy.copy() plays on
    its own after reset()."""
    def __init__(self, game):
        self.game, facts = game, game["facts"]
        self.task, self.walkthrough = game["task"], game["walkthrough"]
        signs = {atom[0] for atom in game["goal"]} | {"inreceptacle"}
        self.task_type = next(kind for kind, (_, sign) in ALFWORLD_TYPES.items() if sign in signs)
        sought = "|".join(x[2].removesuffix("type") for x in game["goal"] if x[0] == "objecttype")
        self.sought = re.compile(f"take ({sought}) ").match  # commands that take what is sought
        self.names = _player_names(facts)
        self.kinds = dict(facts["objecttype"] | facts["receptacletype"])
        self.places = dict(sorted(facts["receptacleatlocation"]))  # receptacle: where it stands
        self.routes, self._near = [], {}  # [(command, text, receptacle, place)]; place: receptacles
        for spot, place in self.places.items():
            self._near.setdefault(place, []).append(spot)
            text = f"You arrive at {self.names[spot if game['arrives_at_name'] else place]}. "
            self.routes.append(("go to " + self.names[spot], text, spot, place))

    def reset(self):
        """Starts the game from its beginning; returns the opening text."""
        facts = self.game["facts"]
        self.facts = {**facts, **{name: set(facts.get(name, ())) for name in _CHANGING}}
        self._refresh()
        room = self._look(self.places)
        return f"-= Welcome to TextWorld, ALFRED! =-\n\n{room}\n\nYour task is to: {self.task}"

    def step(self, command):
        """Plays a command; returns what the player reads. Only an admissible one does anything."""
        text, shown, adds, deletes = self._options.get(command.strip(), _NOTHING)
        for predicate, *arguments in deletes:
            self.facts[predicate].discard(tuple(arguments))
        for predicate, *arguments in adds:
            self.facts[predicate].add(tuple(arguments))
        if adds or deletes:
            self._refresh()
        return text + (self._look() if shown == "look" else self._describe(shown) if shown else "")

    def fits(self, thing, receptacle):
        """Whether objects of that id's type may be put into the receptacle (id)."""
        kinds = self.kinds.get(receptacle), self.kinds.get(thing)
        return kinds in self.game["facts"].get("cancontain", ())

    def _is(self, predicate, thing):
        return (thing,) in self.facts.get(predicate, ())

    def _refresh(self):
        """After a change: lists all commands that do something now, and judges the goal."""
        (self._agent, self._here), = self.facts["atlocation"]
        hand = next((thing for _, thing in self.facts["holds"]), None)
        self.held = held = self.names.get(hand)
        carry = f"You are carrying: a {held}." if hand else "You are not carrying anything."
        self._options = can = {"look": ("", "look", (), ()), "inventory": (carry, None, (), ())}
        if self.game["help"]:
            can["help"] = _HELP, None, (), ()
        here = [("atlocation", self._agent, self._here)]
        for command, text, spot, place in self.routes:
            if place != self._here:
                can[command] = text, spot, [("atlocation", self._agent, place)], here
        for spot in self._near.get(self._here, ()):
            self._offer_at(spot, hand)
        if hand:
            can[f"examine {held}"] = "", hand, (), ()
        knife = self.kinds.get(hand) in ("knifetype", "butterknifetype")
        for thing, place in self.facts["objectatlocation"] if knife else ():
            if place == self._here and self._is("sliceable", thing):
                name = self.names.get(thing)
                answer = f"You sliced the {name} with the {held}."
                can[f"slice {name} with {held}"] = answer, None, [("issliced", thing)], ()
        self.admissible_commands = sorted(can)
        self.won = _holds(self.game["goal"], self.facts, {})

    def _offer_at(self, spot, hand):
        """Lists what can be done at a receptacle within reach, with its content and the hand's."""
        agent, here, can = self._agent, self._here, self._options
        place, held = self.names[spot], self.held
        shut = self._is("openable", spot) and not self._is("opened", spot)
        can[f"examine {place}"] = "", spot, (), ()
        if shut:
            can[f"open {place}"] = f"You open the {place}. ", spot, [("opened", spot)], ()
        elif self._is("openable", spot):
            can[f"close {place}"] = f"You close the {place}.", None, (), [("opened", spot)]
        for thing in [thing for thing, outer in self.facts["inreceptacle"] if outer == spot]:
            name = self.names.get(thing)
            if self._is("toggleable", thing):  # isToggled is never deleted, so it always "turns on"
                can[f"use {name}"] = f"You turn on the {name}.", None, [("istoggled", thing)], ()
            if not hand and not shut and self._is("pickupable", thing):
                can[f"take {name} from {place}"] = (
                    f"You pick up the {name} from the {place}.", None,
                    [("holds", agent, thing), ("not_inreceptacle", thing, spot)],
                    [("inreceptacle", thing, spot), ("objectatlocation", thing, here)])
        if hand and not shut and self.fits(hand, spot):
            put = self.game["put"]
            can[put.format(held, place)] = (
                f"You {put.format('the ' + held, 'the ' + place)}.", None,
                [("inreceptacle", hand, spot), ("objectatlocation", hand, here)],
                [("holds", agent, hand), ("not_inreceptacle", hand, spot)])
        kind = self.kinds.get(spot, "").removesuffix("type")
        for verb, (effect, undone, tools) in _TREATMENTS.items():
            if hand and self._is(verb + "able", hand) and kind in tools:
                answer = f"You {verb} the {held} using the {place}."
                can[f"{verb} {held} with {place}"] = (
                    answer, None, [(effect, hand)], [(undone, hand)])

    def _look(self, listed=()):
        """The text of "look". listed: receptacles to name where none is near (the opening text)."""
        near = self._near.get(self._here)
        if not near:
            things = _series(["a " + self.names[spot] for spot in listed])
            return f"You are in the middle of a room. Looking quickly around you, you see {things}."
        here = sorted(x for x, place in self.facts["objectatlocation"] if place == self._here)
        out = ["a " + self.names[thing] for thing in here for spot in near
               if (thing, spot) in self.facts["not_inreceptacle"]]  # taken from one, put in another
        near = _series([self.names[spot] for spot in near])
        return f"You are facing the {near}. Next to it, you see {_series(out)}."

    def _describe(self, thing):
        """The text of "examine" for a receptacle or an object (id)."""
        name, is_place = self.names[thing], thing in self.places
        inner = self.facts.get("inreceptacle" if is_place else "inreceptacleobject", ())
        inside = _series(["a " + self.names[x] for x, outer in sorted(inner) if outer == thing])
        if is_place and not self._is("openable", thing):
            return f"On the {name}, you see {inside}."
        if is_place:
            state = f"open. In it, you see {inside}" if self._is("opened", thing) else "closed"
            return f"The {name} is {state}."
        if self._is("isreceptacleobject", thing):
            return f"This is a normal {name}. In it, you see {inside}."
        clean, hot, cool, cut = (self._is("is" + x, thing) for x in "clean hot cool sliced".split())
        if clean or hot or cool:
            heat = "hot" if hot else "" if not cool else "cool" if clean or cut else "cold"
            states = " and ".join(filter(None, (heat, "clean" * clean)))
            return f"This is a {states}{' sliced' * cut} {name}."
        if self._is("istoggled", thing):
            return f"This {name} is on."
        return f"This is a sliced {name}." if cut else f"There's nothing special about {name}."

# ---- the built-in world: small houses from a seed, played by the same engine ----
_ROOMS = {  # room: kinds of receptacle, repeated where several are usual
    "kitchen": "cabinet cabinet drawer countertop diningtable shelf fridge sinkbasin garbagecan "
               "stoveburner microwave",
    "bathroom": "cabinet cabinet drawer countertop shelf sinkbasin bathtubbasin toilet garbagecan",
    "bedroom": "drawer drawer desk bed dresser shelf sidetable sofa safe garbagecan"}
_OPENABLE = {"cabinet", "drawer", "fridge", "microwave", "safe"}
_SINGLE = {"fridge", "microwave", "safe", "sinkbasin"}  # at most one in a house
_NARROW = {"microwave", "stoveburner", "toilet"}  # these hold only what is usual there
_LAMPS = ["desk", "sidetable"]  # where a desklamp stands
Thing = namedtuple("Thing", "room usual can")  # its room, its usual places, what can be done to it
_THINGS = {name: Thing(room, usual, can) for room, things in _table("""
kitchen: apple fridge diningtable clean heat cool, potato fridge countertop clean heat cool,
    tomato fridge countertop clean heat cool, egg fridge garbagecan clean heat cool,
    bread countertop diningtable heat cool, lettuce fridge diningtable clean cool,
    mug cabinet countertop clean heat cool, cup cabinet shelf clean heat cool,
    plate cabinet countertop clean heat cool, bowl cabinet shelf clean cool,
    pan stoveburner cabinet clean cool, fork drawer diningtable clean,
    spoon drawer sinkbasin clean, saltshaker shelf cabinet
bathroom: candle countertop shelf, soapbar sinkbasin bathtubbasin clean,
    cloth bathtubbasin drawer clean, toiletpaper toilet cabinet, spraybottle cabinet toilet
bedroom: alarmclock desk sidetable, book bed desk, cd drawer shelf, cellphone bed sidetable,
    creditcard drawer dresser, keychain drawer safe, laptop desk bed, pen desk drawer,
    pencil desk drawer, pillow bed sofa, vase shelf dresser, remotecontrol sofa sidetable,
    watch dresser sidetable""").items()
    for name, *usual, can in re.findall(r"(\w+) (\w+) (\w+)([\w ]*)", things)}
_HOSTS = {name: sorted({*_ROOMS[thing.room].split()} - _NARROW | {*thing.usual})
          for name, thing in _THINGS.items()}  # object: kinds of receptacle that can hold it
_PLACED = "(objecttype ?o {o}) (receptacletype ?r {r}) (inreceptacle ?o ?r)"
_TASKS = {  # task type: [treatment, its tool, two wordings, the goal's conditions]
    "pick_and_place": ["", "", "put a {o} in {r}.", "put some {o} on {r}.", _PLACED],
    "look_at_obj_in_light": [
        "", "", "look at {o} under the desklamp.", "examine the {o} with the desklamp.",
        "(objecttype ?o {o}) (holds agent1 ?o) (objecttype ?p desklamp) (istoggled ?p) "
        "(inreceptacle ?p ?r) (receptacleatlocation ?r ?l) (atlocation agent1 ?l)"],
    "pick_two_obj_and_place": [
        "", "", "put two {o} in {r}.", "find two {o} and put them in {r}.",
        _PLACED + "(objecttype ?p {o}) (inreceptacle ?p ?r) (not (= ?o ?p))"],
    **{f"pick_{verb}_then_place_in_recep": [
        verb, tool, f"put a {state} {{o}} in {{r}}.", f"{verb} some {{o}} and put it in {{r}}.",
        f"{_PLACED} (is{state} ?o)"] for verb, tool, state in (
            ("clean", "sinkbasin", "clean"), ("heat", "microwave", "hot"),
            ("cool", "fridge", "cool"))}}
BUILT_IN_SIZES = {"train": 2000, "valid_seen": 140, "valid_unseen": 134}  # valid: the release's

def _draw_house(rng, task_type, house):
    """(object, its target, kinds of receptacle, [objects in each], indices where the object is,
    index where it is to go)"""
    (treatment, tool, *_), look = _TASKS[task_type], task_type == "look_at_obj_in_light"
    thing = rng.choice([name for name, (room, _, can) in _THINGS.items()
                        if treatment in can and (not look or room == "bedroom")])
    room, usual, _ = _THINGS[thing]
    target = rng.choice(_LAMPS if look else [kind for kind in _HOSTS[thing] if kind != tool])
    sources = []  # kinds of receptacle that hold the object: in 85 % of the cases usual ones
    for _ in range(2 if task_type == "pick_two_obj_and_place" else 1):
        likely = usual if rng.random() < 0.85 else []
        likely, possible = ([kind for kind in x if look or kind != target]
                            for x in (likely, _HOSTS[thing]))
        sources.append(rng.choice(likely or possible))
    kinds = list({target, *sources, tool or target})
    while len(kinds) < house:
        more = _ROOMS[room].split() + usual * 2
        kinds.append(rng.choice([kind for kind in more if kind not in _SINGLE & set(kinds)]))
    kinds.sort()

    def spots(wanted):
        return [i for i, kind in enumerate(kinds) if kind in wanted]

    at = sorted(rng.choice(spots([source])) for source in sources)
    inside = [[thing] * at.count(i) for i in range(house)]
    others = [name for name in _THINGS if _THINGS[name].room == room and name != thing]
    for other in rng.choices(others, k=house):
        likely = spots(_THINGS[other].usual if rng.random() < 0.85 else [])
        possible = likely or spots(_HOSTS[other])
        if possible and len(inside[spot := rng.choice(possible)]) < 3:
            inside[spot].append(other)
    goal = rng.choice(spots([target]))
    inside[goal] += ["desklamp"] * look
    return thing, target, kinds, inside, at, goal

def _house_facts(kinds, inside):
    """(ids of the receptacles, the facts of a house as in a game file)"""
    spots = [re.sub("(basin)?$", rf"_bar_{i:02d}\1", kind, count=1) for i, kind in enumerate(kinds)]
    init = "(atlocation agent1 loc_bar_99)"
    for i, (spot, kind) in enumerate(zip(spots, kinds)):
        init += (f"(receptacletype {spot} {kind})(receptacleatlocation {spot} loc_bar_{i:02d})"
                 f"({'openable' if kind in _OPENABLE else 'open'} {spot})")
        for n, name in enumerate(inside[i]):
            it = f"{name}_bar_{i:02d}_{n}"
            init += (f"(objecttype {it} {name})(inreceptacle {it} {spot})"
                     f"(objectatlocation {it} loc_bar_{i:02d})")
            can = "toggle" if name == "desklamp" else "pickup" + _THINGS[name].can
            init += "".join(f"({verb}able {it})" for verb in can.split())
    cancontain = {(kind, name) for name, hosts in _HOSTS.items() for kind in hosts}
    return spots, _parse_facts(init) | {"cancontain": cancontain}

def _build_game(rng, task_type, house):
    """A generated game: the parts that parse_game gives, and `pair`, its object and target."""
    thing, target, kinds, inside, at, goal = _draw_house(rng, task_type, house)
    treatment, tool, *wordings, conditions = _TASKS[task_type]
    spots, facts = _house_facts(kinds, inside)
    names, plan = _player_names(facts), []  # the expert omits what is not possible or needed
    for k, source in enumerate(at):
        it = names[f"{thing}_bar_{source:02d}_{at[:k].count(source)}"]
        steps = [(source, "open {}", f"take {it} from {{}}")]
        if tool:
            steps.append((kinds.index(tool), f"{treatment} {it} with {{}}"))
        finish = "use desklamp 1" if "desklamp" in inside[goal] else f"move {it} to {{}}"
        for i, *commands in (*steps, (goal, "open {}", finish)):
            plan += [command.format(names[spots[i]]) for command in ("go to {}", *commands)]
    condition = _parse_goal(f"(:goal (and {conditions}))".format(o=thing, r=target))
    task = rng.choice(wordings).format(o=thing, r=target)
    return {"facts": facts, "goal": condition, "task": task, "pair": f"{thing} {target}",
            "walkthrough": plan, "put": "move {} to {}", "help": True, "arrives_at_name": True}

def built_in_game(split, index, task_type, seed, house):
    """Game `index` of a split. What a game holds decides its split: splits cannot overlap."""
    rng = random.Random(f"{seed}/{split}/{index}/{house}")
    while True:
        game = _build_game(rng, task_type, house)
        contents = game["facts"]["inreceptacle"] | game["facts"]["receptacletype"]
        texts = [task_type, game["pair"], *sorted(map(repr, contents))]
        unseen, seen = (int(panel_hash(x), 16) % 6 == 0 for x in ([game["pair"]], texts))
        if split == ("valid_unseen" if unseen else "valid_seen" if seen else "train"):
            return game

# ---- the expert ----
def expert_script(game, detours=0, seed=0):
    """[(thought, command)] that wins `game` along its walkthrough. A player cannot know where an
    object is: before its place, up to `detours` others are searched in vain, drawn from `seed`."""
    for most in (detours, 0):  # the plain walkthrough where a detour spoils the plan
        script, won = _play_script(copy.copy(game), most, random.Random(f"{seed}/{game.task}"))
        if won:
            return script
    raise UserError(f"the walkthrough of {game.task!r} does not solve it; the data may be damaged, "
                    "download it again")

def _play_script(game, most, rng):
    """([(thought, command)], whether it won) with at most `most` detours before each object."""
    game.reset()
    places = {command: place for command, _, _, place in game.routes}
    visited, script = set(), []
    for i, command in enumerate(game.walkthrough):
        place, plan = places.get(command), [("", command)]
        if place and place not in visited:
            visited.add(place)
            until = " / ".join(game.walkthrough[i + 1:]).split("go to ")[0]  # what is done there
            if found := re.search(r"(?:take|use) (.+?) \d+", until):
                plan = _searches(game, found[1], command, visited, rng.randint(0, most), rng)
        for thought, act in plan:
            if act in game.admissible_commands and not game.won:
                verb, rest = act.split(" ", 1)
                usual = _THOUGHTS.get(verb, "I am there").format(rest=rest)
                script.append((thought or usual, act))
                game.step(act)
    return script, game.won

_THOUGHTS = {"go": "I carry it {rest}", "open": "{rest} is closed; open it",
             "take": "here it is", "use": "here is {rest}; turn it on"}

def _searches(game, sought, last, visited, count, rng):
    """[(thought, command)]: up to `count` visits to places without the `sought` kind, likely ones
    first, then the command `last`."""
    kind = {key: name.rsplit(" ", 1)[0] for key, name in game.names.items()}
    thing = next(key for key in kind if kind[key] == sought)
    has = {game.places.get(spot) for x, spot in game.facts["inreceptacle"] if kind[x] == sought}
    usual = _THINGS[sought].usual if sought in _THINGS else _LAMPS * (sought == "desklamp")
    drawn = []
    for command, _, spot, place in game.routes:
        if place not in visited | has:
            weight = 1 if kind[spot] in usual else 0.2 if game.fits(thing, spot) else 0.02
            drawn.append((rng.random() ** (1 / weight), command, place))
    acts, thought = [], f"I need a {sought}; look in {{}}"
    for _, command, place in sorted(drawn, reverse=True)[:count]:
        name = command.removeprefix("go to ")
        acts += [(thought.format(name), command), ("", "open " + name)]
        visited.add(place)
        thought = f"no {sought} here; look in {{}}"
    return acts + [(thought.format(last.removeprefix("go to ")), last)]

# ======== WebShop =================================================================================
class WebShop:
    """WebShop's goals, or those of an invented catalogue where there is no data (a directory).
    catalogue: "small" or "full"; nouns: see noun_finder. Splits: "test500" (the first 500 goals),
    "test" (a fixed panel of 128 of these), "train" (the goals that equal none of the 500)."""
    stop, splits, step = ("</action>",), ("train", "test", "test500"), staticmethod(step_each)

    def __init__(self, data=None, seed=233, skills=None, human_goals=False, catalogue=None,
                 nouns=""):
        if catalogue not in (None, "small", "full") or human_goals not in (0, 1):
            raise UserError("catalogue in --env-args must be small or full, human_goals 0 or 1")
        path = find_data("webshop", data)
        self.builtin, self.skill_names = path is None, list(SHOP_KEYWORDS)
        source = path or build_catalogue(seed)
        self.catalogue = Catalogue(source, seed, human_goals, catalogue, nouns)
        self._page_size = 5 if self.builtin else 10  # 5: few products, yet pages to turn
        library = read_skills(skills, SHOP_SKILLS, self.skill_names)
        self.skill = self.all_skills = partial(skill_text, library)
        count = self.catalogue.n_goals
        held_out = min(TEST_GOALS, count // 4)
        panel = sorted(random.Random(233).sample(range(held_out), min(PANEL_GOALS, held_out)))
        self._goals = {"train": self._unseen(held_out, count), "test": np.array(panel, int),
                       "test500": np.arange(held_out)}
        kind = path or "an invented catalogue (the real one: python envs.py download webshop)"
        self.source = (f"{kind}: {len(self.catalogue.asins)} products, {count} goals, "
                       f"{len(self._goals['train'])} for training; "
                       f"test: {len(panel)} of the first {held_out}")

    def _unseen(self, held_out, count):
        """Indices of the training goals: no test goal has their product and instruction."""
        products, goal = self.catalogue.goals["product"], self.catalogue.goal
        tested = {(products[i], goal(i)["instruction_text"]) for i in range(held_out)}
        shared = held_out + np.flatnonzero(np.isin(products[held_out:], products[:held_out]))
        seen = [i for i in shared if (products[i], goal(i)["instruction_text"]) in tested]
        return np.setdiff1d(np.arange(held_out, count), seen)

    def tasks(self, split):
        """Sorted task ids such as "test/goal-00012". UserError for an unknown or empty split."""
        if not len(self._goals.get(split, ())):
            raise UserError(f"WebShop has no split {split!r}; it has {', '.join(self.splits)}")
        return [f"{split}/goal-{i:05d}" for i in self._goals[split].tolist()]

    def start(self, task_id, seed=0):
        """A new session on a task. `seed` only decides what the special query <r> shows."""
        found = re.fullmatch(r"(\w+)/goal-(\d{5,12})", str(task_id), re.ASCII)
        if not found or int(found[2]) not in self._goals.get(found[1], ()):
            raise UserError(f"WebShop has no task {task_id!r}; ask tasks(split) for them")
        return WebShopSession(ShopEngine(self.catalogue, seed, self._page_size), int(found[2]))

class WebShopSession:
    """One episode. turns: [(observation, action)], an action cut to one line of 300 characters."""
    action, valid, admissible, done, won, score = "", True, True, False, False, 0.0  # set by step

    def __init__(self, engine, goal_index):
        engine.reset(goal_index)
        self.engine = engine
        self.task = " ".join(engine.goal["instruction_text"].split())
        options = ", ".join(goal_options(engine.goal)) or "any"
        self.goal = (f"{self.task}; attributes: {', '.join(engine.goal['attributes'])}; options: "
                     f"{options}; for example {engine.goal['name']}")
        self.category = self.group = shop_category(self.task)
        self.turns, self.details = [], {}

    @property
    def observation(self):
        """The page without the instruction, each part in quotes (the public code's format)."""
        return " [SEP] ".join(f"'{part}'" for part in self.engine.parts)

    def step(self, response, think_closed=False):
        """Plays a raw response."""
        action, self.valid = parse_action(response, think_closed, 20)  # as webshop_projection
        action = action[:2000]
        self.action = one_line(action, 300)
        self.turns.append((self.observation, self.action))
        self.admissible = self.engine.admits(action)
        _, reward, self.done = self.engine.step(action)
        self.score, self.won = float(reward), reward == 1.0
        self.details = self.engine.details

    def expert(self):
        """The response now of a shopper who knows the product sought."""
        return "<think>{}</think><action>{}</action>".format(*shop_expert(self.engine))

    @property
    def commands(self):
        """What can be done now."""
        offered = ["search[<your query>]"] if self.engine.kind == "search" else []
        return offered + [f"click[{name}]" for name in self.engine.clickables]

    def prompt(self, skill="", history=2, room=None, brief=False):
        """The user message now; observations are cut to `room` characters. brief: in few tokens."""
        engine, past = self.engine, last_turns(self.turns, history, room)
        if brief:
            page = " ".join(f"[{part.lower()}]" if part.lower() in engine.clickables else part
                            for part in engine.parts)  # brackets: what can be clicked
            did = past and "did: " + " > ".join(action for _, _, action in past)
            return "\n".join(filter(None, (skill, self.task, did, shorten_middle(page, room))))
        count, old = len(self.turns), "\n".join(QUOTED_TURN.format(*turn) for turn in past)
        if past:
            old = f"Steps taken so far: {count}. The last {len(past)} with what you saw:\n{old}\n"
        return WEBSHOP_PROMPT.format(
            skill=skill + "\n\n" if skill else "", task=self.task, steps=old, number=count + 1,
            seen=shorten_middle(self.observation, room),
            actions="".join(f"'{action}',\n" for action in self.commands))

WEBSHOP_PROMPT = """\
{skill}You are an agent that shops in the online store WebShop.
Your task is: {task}
{steps}This is step {number}; you now see: {seen}
The admissible actions are:
[
{actions}]

Reason first, step by step, between <think> and </think>: which admissible action brings you \
closer to what the task asks for? Then write that one action between <action> and </action>."""

SHOP_SKILLS = _table("""
general: Search for the product type with its two or three most telling words, not the whole
    sentence. Open the result whose title fits, choose every option the task names, compare the
    price with the limit, then buy. Full reward needs type, attributes, options and price to match.
mistakes: Buying before all options are chosen. Repeating a failed search instead of rewording it.
    Reading every description: titles usually decide. Going back after choosing options: they are
    lost. Never buying: that scores zero.
apparel: Name the garment and who wears it (men's, women's) in the search, with fit or sleeve. Then
    choose color, size and fit type. Sizes are labels such as xx-large: take exactly the one asked
    for.
footwear: Search the kind of shoe with its sole or closure (rubber sole, slip on). Then pick color
    and the exact size; sizes may be plain numbers or pairs for women and men. Shoes often show a
    price range: check the limit.
home_decor: Search the piece and its room or material. Many options are dimensions: match every
    number and unit. Colors may have long names or codes; choose the one the task spells out.
electronics: Search the device with its key function or connector (usb, bluetooth, hdmi). Look out
    for capacity, length and pack options, and do not take an accessory for the device itself.
accessories: Search the item and its material or use. Often color is the only option, sometimes a
    size or pattern code: read the whole label before choosing.
beauty_health: Search the product with the hair or skin type and the claim (cruelty free, tea
    tree). Options are scent,shade or volume: choose the exact amount, such as 8 ounce.
other: Search the product with its dietary or material claim (gluten free, non gmo). Options are
    flavor and count: choose both, and check that the price of the pack stays under the limit.""")

# ---- below: the engine, the built-in world, the expert; a reader of the adapter can stop here ----
SHOP_KEYWORDS = {name: re.compile(rf"\b(?:{words})(?:s|es)?\b", re.I) for name, words in _table("""
apparel: shirt|tee|henley|polo|blouse|top|tunic|dresse?|skirt|pants?|jean|short|legging|jacket|
    coat|sweater|hoodie|sweatshirt|suit|blazer|tuxedo|jumpsuit|romper|overall|swimsuit|swimwear|
    bikini|underwear|bra|brief|lingerie|pajama|sock|vest|cardigan|tank|clothing|active ?wear|
    sleeve|slim fit|classic fit|sleep & lounge|costume
footwear: shoe|boot|sneaker|sandal|slipper|loafer|slip-on|pump|flats|oxford|clog|mule|footwear|
    rubber (?:out)?sole
home_decor: pillow|rug|curtain|drape|lamp|lighting|chandelier|sconce|vase|candle|decor|furniture|
    table|chair|desk|sofa|couch|bed|mattresse?|bedroom|living room|dining room|kitchen|shelve?|
    bookcase|cabinet|ottoman|bench|stool|rack|mirror|blanket|bedding|mat|artwork|wall|window|
    furnishing|island|vanitie|bedframe|throw
electronics: phone|charger|cable|speaker|headphone|earbud|batterie|battery|adapter|usb|camera|
    laptop|computer|tablet|monitor|tv|television|hdmi|bluetooth|projector|printer|drive|memory|
    receiver|amplifier|antenna|radio|keyboard|router|binocular|telescope|lense?|flashe?|tripod|
    stereo|home theater|screen protector|remote|console|wireless|video|audio|media|iphone|gaming|
    photography|wearable
accessories: bag|wallet|belt|watch|sunglasse|hat|scarf|glove|jewelry|necklace|earring|bracelet|
    backpack|purse|handbag|cap|beanie|necktie|umbrella|luggage|keychain
beauty_health: shampoo|conditioner|cream|lotion|makeup|brushe?|serum|moisturizer|soap|hair|skin|
    nail|lip|lipstick|eye|face|facial|body|fragrance|perfume|cologne|deodorant|toothbrushe?|
    toothpaste|teeth|dental|oral|mask|wig|shav(?:e|ing)|razor|beauty|foot|massage|spa|cosmetic|
    sunscreen|bath|mascara|eyelashe?|tea tree|essential oil|cruelty free|scrub
other: snack|food|cheese|milk|candy|meat|sugar|gmo|gluten|kosher|usda|keto|coffee|sauce|beverage|
    drink|toy|gift set""").items()}

def shop_category(instruction):
    """The skill category of a goal: most key words (whole words, no options) in its instruction."""
    text = re.split(r" with [^,:]*: |, and price lower", instruction)[0]
    hits = {category: len(words.findall(text)) for category, words in SHOP_KEYWORDS.items()}
    best = max(hits, key=hits.get)
    return best if hits[best] else "other"

WEBSHOP_FILES = {  # name -> id on Google Drive, from WebShop's setup.sh
    "items_shuffle_1000.json": "1EgHdxQ_YxqIQlvvq5iKlCrkEKR6-j0Ib",
    "items_ins_v2_1000.json": "1IduG0xl544V_A_jv3tHXC0kyFi7PnyBu",
    "items_shuffle.json": "1A2whVgOO0euk5O13n2iYDM0bQRkkRduB",
    "items_ins_v2.json": "1s2j6NgHljiZzQNL3veZaAiyW_qDEgBNi",
    "items_human_ins.json": "14Kb5SPBk_jfdLZ_CDBNitW98QLDlKR5O"}
WEBSHOP_URL = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"
PRODUCT_PAGES = ("description", "features", "reviews")
SEARCH_RESULTS, TEST_GOALS, PANEL_GOALS, NO_LIMIT = 50, 500, 128, 1000000

def download_webshop(folder, full=False, url=WEBSHOP_URL):
    """Fetches the catalogue of 1,000 (full: 1.18 M) products and the human goals; reads them."""
    for name, drive_id in WEBSHOP_FILES.items():
        wanted = name == "items_human_ins.json" or ("_1000" in name) != full
        if wanted and not (folder / name).exists():
            download(url.format(drive_id), folder / name)
    catalogue = Catalogue(folder, which="full" if full else "small")
    print(f"{folder}: {len(catalogue.asins)} products, {catalogue.n_goals} goals")

# ---- the catalogue ----
def stream_json(source, block=1 << 20, limit=1 << 26):
    """Yields (key or None, value, first byte, last byte + 1) of each member of a JSON array or
    object, in little memory. source: a path or bytes. UserError if it is damaged."""
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"[\s,:]*")
    name = "the catalogue" if isinstance(source, bytes) else source
    errors = OSError, ValueError, RecursionError
    with refused(f"cannot read {name}", "download it again", *errors), _open(source) as file:
        # in Latin-1 a character is a byte, so that places are known; base: that of text[0]
        text, base = file.read(block).decode("latin-1"), 0
        at = space.match(text).end() + 1
        keyed, key = text[at - 1:at] == "{", None
        if text[at - 1:at] not in ("[", "{"):
            raise ValueError("it is neither an array nor an object")
        while text[(at := space.match(text, at).end()):at + 1] not in ("]", "}"):
            try:
                key, start = decode(text, at) if keyed else (None, at)
                start = space.match(text, start).end()
                value, end = decode(text, start)
            except ValueError:  # the member goes on in the next block
                more = file.read(block)
                if not more or len(text) - at > limit:
                    raise ValueError(f"it is damaged near byte {base + at}") from None
                text, base, at = text[at:] + more.decode("latin-1"), base + at, 0
                continue
            if not text[start:end].isascii():
                value = json.loads(text[start:end].encode("latin-1"))
            yield key, value, base + start, base + end
            at = end

def _open(source):
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")

def _read_member(source, place):
    """One member of a file of JSON, from its (first byte, last byte + 1)."""
    with _open(source) as file:
        file.seek(place[0])
        return json.loads(file.read(place[1] - place[0]))

def _parse_product(raw):
    """A product's texts, bullets, options as the shop shows them ({name: [values]}), and one or two
    prices in dollars (100 if it has none)."""
    product = {"title": raw["name"] or "", "description": raw.get("full_description") or ""}
    product |= {x: raw[x] or "" for x in ("asin", "category", "query", "product_category")}
    if not product["asin"] or not all(isinstance(text, str) for text in product.values()):
        raise TypeError("a field is no text")
    prices = [re.sub(r"[^\d.]", "", part) for part in (raw.get("pricing") or "").split("$")[1:]]
    options = [x for x in (raw.get("customization_options") or {}).items() if x[1] is not None]
    bullets = raw.get("small_description")
    return product | {
        "prices": [float(price) for price in prices if price.strip(".")][:2] or [100.0],
        "options": {name.lower(): [str(x["value"]).strip().replace("/", " | ").lower()
                                   for x in values] for name, values in options},
        "bullets": [*map(str, bullets)] if isinstance(bullets, list) else [str(bullets or "")]}

def _text_nodes(*texts):
    """The text nodes that the original's HTML parser leaves: no blank ones with a newline."""
    return [x.strip() for x in texts if x.strip(" \n\t\f\r") or (x and "\n" not in x)]

def _find_catalogue(data, which):
    """Paths of the products, their instructions and the human goals."""
    for suffix in {"small": ["_1000"], "full": [""]}.get(which, ["_1000", ""]):
        items, instructions = (Path(data) / f"items_{name}{suffix}.json"
                               for name in ("shuffle", "ins_v2"))
        if items.is_file() and instructions.is_file():
            return items, instructions, Path(data) / "items_human_ins.json"
    name = "webshop-full" if which == "full" else "webshop"
    kind = which + " catalogue" if which else "catalogue"
    raise UserError(f"{data} holds no {kind} (items_shuffle*.json and items_ins_v2*.json); give "
                    f"--data a folder that does, or run: python envs.py download {name}")

def _read_human_goals(file, numbers):
    """{product: [(instruction, attributes, options) of each goal that people wrote for it]}"""
    if not file or not file.is_file():
        raise UserError("no items_human_ins.json; run: python envs.py download webshop")
    what = f"{file} is not in WebShop's form"
    with refused(what, "download it again", KeyError, TypeError, AttributeError):
        return {numbers[asin]: [(x["instruction"].strip("."), wanted, x["instruction_options"])
                                for x in entries if (wanted := x["instruction_attributes"])]
                for asin, entries, *_ in stream_json(file) if asin in numbers}

class Catalogue:
    """Products, prices, goals and index, shared by all sessions. Texts are read when needed: 1.18 M
    products fit in a few GB. data: a directory, or the bytes of (products, instructions)."""
    def __init__(self, data, seed=233, human_goals=False, which=None, nouns=""):
        self.nouns = noun_finder(nouns)
        files = (*data, None) if isinstance(data, tuple) else _find_catalogue(data, which)
        self.items, self.instructions, human = files
        self.asins, self._places, self._price_ranges, self._variants = [], [], [], []  # per product
        self.index = BM25(self._scan())
        self.index.tie_rank = np.argsort(np.argsort(np.array(self.asins, "U10")))  # as Anserini
        self._places = np.array(self._places, np.int64).reshape(-1, 2)
        self._instruction_places = np.full((len(self.asins), 2), -1)
        self._attribute_counts, self._human = Counter(), {}
        numbers = {asin: number for number, asin in enumerate(self.asins)}
        wanted = sorted(self._read_instructions(numbers))
        if human_goals:
            self._human = _read_human_goals(human, numbers)
            wanted = [(number, i, i + 1) for number, goals in sorted(self._human.items())
                      for i in range(len(goals))]
        self.product = lru_cache(8192)(self._read_product)
        self._draw(seed, wanted)
        self.n_goals = len(self.goals)

    def _scan(self):
        """Yields each product's text to index (as convert_product_file_format.py)."""
        seen, broken = set(), (KeyError, TypeError, AttributeError, ValueError)
        for _, raw, start, end in stream_json(self.items):
            with refused(f"product {len(self.asins)} is broken", "download again", *broken):
                product = _parse_product(raw)
            asin, options = product["asin"], product["options"]
            if asin == "nan" or len(asin) > 10 or asin in seen:
                continue
            seen.add(asin)
            self.asins.append(asin)
            self._places.append((start, end))
            self._price_ranges.append(product["prices"])
            self._variants.append(math.prod(map(len, options.values())))
            choices = ", and ".join(f"{name}: {', '.join(x)}" for name, x in options.items())
            text = product["title"], product["description"], *product["bullets"][:1], choices
            yield " ".join(text).lower()

    def _read_instructions(self, numbers):
        """Yields (product, 0, number of its choices of options); counts attributes."""
        for asin, entry, *place in stream_json(self.instructions):
            if asin not in numbers:
                continue
            number, sound = numbers[asin], isinstance(entry, dict)
            told = sound and entry.get("instruction") is not None
            attributes = sound and entry.get("instruction_attributes")
            if not sound or (told and not attributes):
                raise UserError(f"product {asin} has no valid entry in items_ins_v2; download it "
                                "again")
            self._instruction_places[number] = place
            if told:
                yield number, 0, self._variants[number]
                self._attribute_counts.update(dict.fromkeys(attributes, self._variants[number]))

    def _draw(self, seed, wanted):
        """Draws prices, limits and the order of goals as the original does. wanted: a product and
        a range of its choices for each price limit."""
        rng = random.Random(seed)
        rng.getrandbits(32)  # the original's first rich.print takes one word from this generator
        prices = [x[0] if len(x) == 1 else rng.uniform(*x) for x in self._price_ranges]
        self.prices = np.array(prices)
        goals = []
        for number, first, end in wanted:
            tens = [10.0 * k for k in range(1, 100) if 10.0 * k > self.prices[number]][:4]
            limit = max(rng.sample(tens, 2)) if len(tens) >= 2 else NO_LIMIT
            goals += [(number, choice, limit) for choice in range(first, end)]
        rng.seed(seed)
        rng.shuffle(goals)
        self.goals = np.array(goals, "i4, i4, f8")
        self.goals.dtype.names = "product", "choice", "limit"

    def _read_product(self, number):
        """A product as the shop shows it, with the parts of its pages that never change."""
        product = _parse_product(_read_member(self.items, self._places[number]))
        place = self._instruction_places[number]
        known = _read_member(self.instructions, place) if place[0] >= 0 else {}
        title, options, bullets = product["title"], product["options"], product["bullets"]
        price = " to ".join(f"${price}" for price in product["prices"])
        clickables = dict.fromkeys(("back to search", "< prev", *PRODUCT_PAGES, "buy now"))
        clickables.update((value, name) for name, values in options.items() for value in values)
        shown = [text for name, values in options.items() for text in (name, *values)]
        texts = title, " ".join(bullets), product["description"]
        return product | {
            "number": number, "clickables": clickables, "query": product["query"].lower().strip(),
            "instruction": known.get("instruction"), "texts": [text.lower() for text in texts],
            "attributes": known.get("attributes", ["DUMMY_ATTR"]),
            "instruction_attributes": known.get("instruction_attributes"),
            "line": _text_nodes(product["asin"], title, price), "reviews page": [],
            "item page": [*_text_nodes(*shown, title), f"Price: {price}", "Rating: N.A.",
                          "Description", "Features", "Reviews", "Buy Now"],
            "description page": _text_nodes(product["description"]),
            "features page": _text_nodes(*(" " + bullet for bullet in bullets))}

    def goal(self, i):
        """Goal i, in the shuffled order, as the original's dictionary; there can be millions."""
        number, choice, limit = self.goals[i].item()
        product = self.product(number)
        if self._human:
            (text, attributes, options), weight = self._human[number][choice], 1
        else:
            options, attributes = {}, product["instruction_attributes"]
            for name in sorted(product["options"], reverse=True):  # the last name varies fastest
                values = product["options"][name]
                options = {name: values[choice % len(values)], **options}
                choice //= len(values)
            chosen = ", and ".join(f"{name}: {value}" for name, value in options.items())
            text = product["instruction"] + (" with " + chosen if chosen else "")
            weight = sum(1. / self._attribute_counts[x] for x in attributes) / len(attributes)
        text += f", and price lower than {limit:.2f} dollars" if limit < NO_LIMIT else ""
        same = {name: product[name] for name in ("asin", "category", "query", "product_category")}
        return {**same, "name": product["title"], "instruction_text": text,
                "attributes": attributes, "price_upper": limit, "goal_options": options,
                "weight": weight}

    def search(self, keywords, rng=random):
        """Numbers of at most 50 products for a query's words. After <a>, <c>, <q>: all that have
        this attribute, category or product type; after <r>: random ones."""
        everything = range(len(self.asins))
        field = {"<a>": "attributes", "<c>": "category", "<q>": "query"}.get(keywords[0])
        if keywords[0] == "<r>":
            return rng.sample(everything, min(SEARCH_RESULTS, len(everything)))
        if field:
            wanted, within = " ".join(keywords[1:]).strip(), field == "attributes"
            values = ((i, self.product(i)[field]) for i in everything)
            return [i for i, value in values if wanted == value or (within and wanted in value)]
        return self.index.search(" ".join(keywords), SEARCH_RESULTS)[0].tolist()

# ---- the reward ----
COLORS = """
alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown
burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac
copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia gold granite
grape graphite grass gray green grey heather indigo ivory ivy khaki lavender lemon leopard light
lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom mustard natural navy
nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire seashell
silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet walnut
wheat white wine yellow""".split()
# In titles a tagger calls nearly every capitalised word a name; not these, nor lower-case
# adjectives, nor _NO_WORD: possessives, numbers before units, "oz" before a word, Slip in
# Non-Slip, a final colour.
_NOT_NOUNS = frozenset("""
a an the this that these those my your his her its our their i you he she it we they me him them
who which what whose and or but nor so yet if then than as when where how why not no of in on at by
for with from to into onto under above below between through during without within against around
up out about after before behind like per via upon is are was were be been being do does did has
have had can could will would should may might must any both every each all some such own only more
very too just also even still ever once many well one two three four five six seven eight nine ten
twelve includes included including make made makes designed comes used get need full fully large x
etc""".split())
_ADJECTIVES = frozenset("high low new free easy deep natural black white blue".split())
_NO_WORD = re.compile(r"""['\u2019]s\b|(?<=\b[Nn]on-)[^\W\d_]+|,\ (?:black|white|Black|White)$
    |\boz\b(?=\ [A-Z])|(?<![\w.])[\d.]+(?=(?i:[kmgt]b|[kmc]?m|k?g|k)\b)""", re.X)
_TITLE_WORD = re.compile(r"[^\W_]+(?:[-/,.&+'][0-9][^\W_]*|[&+.'][^\W_]+)*|[|%]")  # as spaCy

def _normal_color(option):
    """The first colour word in an option's text; of a (name, value) pair a whole one counts."""
    return next((color for color in COLORS if color in option), option)

def _common_length(a, b):
    """Length of the longest common subsequence (bit-parallel, Hyyro 2004)."""
    places, row = {}, (1 << len(a)) - 1
    for i, letter in enumerate(a):
        places[letter] = places.get(letter, 0) | 1 << i
    for letter in b:
        match = row & places.get(letter, 0)
        row = (row + match) | (row - match)
    return len(a) - (row & ((1 << len(a)) - 1)).bit_count()

@lru_cache(65536)
def token_set_ratio(first, second):
    """thefuzz.fuzz.token_set_ratio (0.19.0): 0..100, on the lower-case words of str(...), without
    U+0080 to U+00FF."""
    a, b = ({*re.sub(r"\W", " ", re.sub("[\x80-\xff]", "", str(text)).lower()).split()}
            for text in (first, second))
    both, only_a, only_b = (" ".join(sorted(part)) for part in (a & b, a - b, b - a))
    if not a or not b:
        return 0
    if both and not (only_a and only_b):
        return 100
    known = len(both) + bool(both)
    length_a, length_b = known + len(only_a), known + len(only_b)
    different = len(only_a) + len(only_b) - 2 * _common_length(only_a, only_b)
    ratios = [1 - different / (length_a + length_b)]
    if both:
        ratios += [2 * len(both) / (len(both) + length) for length in (length_a, length_b)]
    return round(100 * max(ratios))

@lru_cache(8192)
def title_nouns(title):
    """A title's nouns by a rule instead of the original's tagger (spaCy's en_core_web_sm). r_type
    agrees in 98.4 % of all pairs of titles, in 92.3 % of a title and its ten nearest."""
    found = _TITLE_WORD.findall(_NO_WORD.sub(" ", title))
    return [word.lower() for word in found
            if word.lower() not in _NOT_NOUNS and word not in _ADJECTIVES
            and not re.search(r"([^aeiou])\1ed$", word)
            and not re.match(r"\d(?!\d*(?:ml|pcs|[dD])$)", word)]

def noun_finder(model=""):
    """title_nouns, or a function by a spaCy model (the original's: en_core_web_sm). UserError."""
    if not model:
        return title_nouns
    with refused(f"nouns={model} needs spacy and that model", "or omit it", ImportError, OSError):
        import spacy
        tagger = spacy.load(model)
    return lru_cache(8192)(lambda title: [word.text.lower() for word in tagger(title)
                                          if word.pos_ in ("NOUN", "PROPN")])

def type_reward(wanted, bought, match):
    """(r_type, title score) of two titles' nouns; match: whether query or category are the same."""
    title_score = len(set(wanted) & set(bought)) / len(wanted) if wanted else 0.2
    r_type = 1.0 if match or title_score > 0.2 else 0.5
    return 0.0 if title_score == 0 else 0.1 if title_score < 0.1 else r_type, title_score

def shop_reward(product, goal, price, chosen, nouns=title_nouns):
    """(reward 0..1, its parts) for buying `product` at `price` with `chosen` options (goal.py)."""
    bought, wanted = (set(map(str.strip, x["product_category"].split("\u203a")))
                      for x in (product, goal))
    category_match, query_match = len(bought & wanted) >= 2, product["query"] == goal["query"]
    r_type, title_score = type_reward(nouns(goal["name"]), nouns(product["title"]),
                                      query_match or category_match)
    attributes, options = goal["attributes"], goal["goal_options"]
    n_attributes = sum(any(token_set_ratio(have, want) > 85 for have in product["attributes"])
                       or any(want in text for text in product["texts"]) for want in attributes)
    options = options.items() if isinstance(options, dict) else options
    have = [_normal_color(value) for value in chosen.values()]
    n_options = sum(any(token_set_ratio(value, want) > 85 for value in have)
                    for want in map(_normal_color, options))
    r_price = bool(price <= goal["price_upper"])
    met, wishes = n_attributes + n_options + r_price, len(attributes) + len(options) + 1
    reward = met / wishes * r_type
    return reward, {"r_type": r_type, "r_att": n_attributes / len(attributes),
                    "query_match": query_match, "category_match": category_match,
                    "title_score": title_score, "r_price": r_price,
                    "r_option": n_options / len(options) if options else None,
                    "price": float(price)}

# ---- the shop ----
DONE_PAGE = """\
Thank you for shopping with us!|Your code:|None|(Paste it in your MTurk interface.)|Purchased|\
asin|{asin}|options|{options}|attrs|None|category|None|query|None|product category|None|Target|\
asin|options|attrs|price upper|instuction text|category|product category|query|Goal|None|\
Reward|Your score (min 0.0, max 1.0)|{reward}|Reward Details|None"""

def parse_shop_action(action):
    """(name, lower-case argument or None) as by the original's (.+)\\[(.+)\\], in linear time."""
    line = action.split("\n", 1)[0]
    close = line.rfind("]")
    start = line.rfind("[", 1, max(close - 1, 0))
    return (line[:start], line[start + 1:close].lower()) if start > 0 else (line, None)

class ShopEngine:
    """One session in the original's text mode. Has goal, sought (its product), observation, done,
    details; of the page kind (search, results, item, part, done), parts, clickables (name: its
    option or None)."""
    def __init__(self, catalogue, seed=233, page_size=10):
        self.catalogue, self.page_size, self.rng = catalogue, page_size, random.Random(seed)

    def reset(self, goal_index):
        """Opens the search page of a goal; returns the observation."""
        self.goal, self.done, self.details = self.catalogue.goal(goal_index), False, {}
        self.sought = int(self.catalogue.goals["product"][goal_index])
        self._home()
        return self.observation

    def admits(self, action):
        """Whether the page offers this action."""
        name, argument = parse_shop_action(action)
        if name == "search":
            return bool(argument) and self.kind == "search"
        return name == "click" and argument in self.clickables and argument != "search"

    def step(self, action):
        """(observation, reward, done) after search[words] or click[a clickable]; else no change."""
        name, argument = parse_shop_action(action)
        if name == "search" and argument and not self.done:
            self.found = self.catalogue.search(argument.split(" "), self.rng)
            self._results(1)
        elif name == "click" and self.admits(action):
            if argument == "buy now":
                return self._buy()
            self._click(argument)
        return self.observation, 0.0, self.done

    def _show(self, kind, clickables, *parts):
        self.kind, self.clickables, self.parts = kind, clickables, parts
        head = () if kind == "done" else (
            "Instruction:", *_text_nodes(self.goal["instruction_text"]))
        self.observation = " [SEP] ".join(["WebShop"] * (kind == "search") + [*head, *parts])

    def _home(self):
        self.product, self.options = None, {}
        self._show("search", {"search": None}, "Search")

    def _results(self, page):
        self.page, self.product, self.options = page, None, {}
        end = page * self.page_size
        shown = [self.catalogue.product(i) for i in self.found[end - self.page_size:end]]
        self.links = {product["asin"].lower(): product for product in shown}
        buttons = ["< Prev", "Next >"] if page > 1 else ["Next >"]
        names = ["back to search", *map(str.lower, buttons), *self.links]
        total = f"Page {page} (Total results: {len(self.found)})"
        self._show("results", dict.fromkeys(names), "Back to Search", total, *buttons,
                   *(part for product in shown for part in product["line"]))

    def _click(self, name):
        if name == "back to search":
            self._home()
        elif self.kind == "results" and name in ("next >", "< prev"):
            self._results(self.page + (1 if name == "next >" else -1))
        elif name == "< prev" and self.kind == "item":
            self._results(self.page)
        elif name in PRODUCT_PAGES:
            self._show("part", dict.fromkeys(("back to search", "< prev")), "Back to Search",
                       "< Prev", *self.product[name + " page"])
        else:
            if self.kind == "results":
                self.product = self.links[name]
            elif name != "< prev":
                self.options = {**self.options, self.clickables[name]: name}
            self._show("item", self.product["clickables"], "Back to Search", "< Prev",
                       *self.product["item page"])

    def _buy(self):
        price = self.catalogue.prices[self.product["number"]]
        reward, self.details = shop_reward(self.product, self.goal, price, self.options,
                                           self.catalogue.nouns)
        self.details.update(asin=self.product["asin"], options=self.options, reward=reward)
        options = json.dumps(self.options, sort_keys=True)
        options = re.sub("[<>&']", lambda letter: f"\\u{ord(letter[0]):04x}", options)
        filled = {"{asin}": self.product["asin"], "{options}": options, "{reward}": str(reward)}
        self.done = True
        self._show("done", {}, *(filled.get(part, part) for part in DONE_PAGE.split("|")))
        return self.observation, reward, True

# ---- the built-in world ----
# skill category: WebShop's category | product types | attributes | options
SHOP_WORLD = _table("""
apparel: fashion|shirt,dress,jacket,jeans,sweater|machine wash,slim fit,long sleeve,cotton blend,
    quick dry|color:black,navy,red,white|size:small,medium,large
footwear: fashion|sneakers,boots,sandals,loafers,slippers|rubber sole,anti slip,memory foam,
    arch support,wide toe|color:black,brown,tan|size:7,8,9,10
home_decor: garden|lamp,rug,curtain,pillow,vase|easy clean,hand painted,solid wood,space saving,
    fade resistant|color:beige,grey,blue|style:plain,classic
electronics: electronics|charger,cable,speaker,headphones,camera|fast charging,high speed,
    noise cancelling,long lasting,plug play|color:black,white|pack:1 pack,2 pack
accessories: fashion|wallet,belt,watch,hat,backpack|water resistant,genuine leather,light weight,
    gift ready,easy carry|color:brown,black,green
beauty_health: beauty|shampoo,lotion,serum,soap,lipstick|cruelty free,sulfate free,tea tree,
    dry skin,travel size|scent:rose,mint,lemon|size:2 ounce,8 ounce
other: grocery|cookies,coffee,pasta,almonds,popcorn|gluten free,low sugar,plant based,non gmo,
    nut free|flavor:original,spicy,honey|count:6 count,12 count""")
SHOP_BRANDS = "Alder Birk Corvin Dunmore Elwick Farrow Garnet".split()

def build_catalogue(seed):
    """245 invented products over the seven categories, as the bytes of the benchmark's files."""
    rng, products, instructions = random.Random(seed), [], {}
    for path, spec in SHOP_WORLD.items():
        category, kinds, attributes, *options = spec.split("|")
        for kind, brand in itertools.product(kinds.split(","), SHOP_BRANDS):
            asin = f"B{len(products) + 1:03d}"
            first, second, third = rng.sample(attributes.split(","), 3)
            low, choices = rng.randrange(500, 9000) / 100, {}
            for name, values in (option.split(":") for option in options):
                values = values.split(",")
                chosen = rng.sample(values, rng.randint(2, len(values)))
                choices[name] = [{"value": value} for value in chosen]
            products.append({
                "asin": asin, "name": f"{brand} {kind.title()}, {first.title()}",
                "category": category, "query": kind,
                "product_category": f"Shop \u203a {path} \u203a {kind}",
                "full_description": f"A {kind} by {brand}.", "small_description": [second, third],
                "pricing": f"${low}" if rng.random() < 0.5 else f"${low} - ${low + 5:.2f}",
                "customization_options": choices})
            instructions[asin] = {"attributes": [first, second, third],
                                  "instruction_attributes": [second, first],
                                  "instruction": f"Find me {second} {kind} with {first}"}
    rng.shuffle(products)
    return json.dumps(products).encode(), json.dumps(instructions).encode()

# ---- the expert ----
def shop_expert(shop):
    """(thought, action) now of a shopper who knows the product sought."""
    if shop.kind == "search":
        return "I search for the product with its main features.", f"search[{_shop_query(shop)}]"
    if shop.kind == "results":
        asin = shop.catalogue.asins[shop.sought].lower()
        if asin in shop.links:
            return "This product fits the task.", f"click[{asin}]"
        if shop.sought in shop.found[shop.page * shop.page_size:]:
            return "Nothing here fits; I look at the next page.", "click[next >]"
        return "This search does not help; I start again.", "click[back to search]"
    if shop.kind == "part" or shop.product["number"] != shop.sought:
        return "I go back.", "click[< prev]"
    if option := _missing_option(shop):
        return "The task asks for this option.", f"click[{option}]"
    return "Product and options match; I buy it.", "click[buy now]"

def _shop_query(shop):
    """The goal's own words if they bring the product within two pages, else its title."""
    goal = shop.goal
    own = f"{' '.join(goal['attributes'])} {goal['query']}"
    options = " ".join(goal_options(goal))
    for text in (own, f"{own} {options}", goal["name"], goal["instruction_text"]):
        query = " ".join(re.sub(r"[\[\]]", " ", text).split())
        if shop.sought in shop.catalogue.search(query.lower().split(" "))[:2 * shop.page_size]:
            break
    return query

def goal_options(goal):
    """The options that a goal asks for; of human goals they are a list, else {name: value}."""
    options = goal["goal_options"]
    return [*options.values()] if isinstance(options, dict) else options

def _missing_option(shop):
    """An option of the goal that is still to be clicked, or None."""
    wanted, chosen = shop.goal["goal_options"], shop.options
    offered = {value: name for value, name in shop.clickables.items()
               if name and parse_shop_action(f"click[{value}]")[1] == value}
    if isinstance(wanted, dict):
        return next((value for value, name in offered.items()
                     if wanted.get(name) == value != chosen.get(name)), None)
    for want in wanted:
        close = [value for value in offered if token_set_ratio(value, want) > 85]
        if close and not set(close) & set(chosen.values()):
            return min(close, key=lambda value: (value != want, len(value)))
    return None

# ======== Search-QA ===============================================================================
class SearchQA:
    """Questions of a file or folder, or of a world drawn from `seed`. corpus: passage file;
    search_url: a Search-R1 server, with timeout (s) and retries; topk: passages of a search."""
    stop = ("</search>", "</answer>")

    def __init__(self, data=None, seed=233, skills=None, search_url=None, corpus=None, topk=3,
                 max_turns=4, timeout=30.0, retries=4):
        for x, n, low in [("topk", topk, 1), ("max_turns", max_turns, 1), ("retries", retries, 0)]:
            if not isinstance(n, int) or n < low:
                raise UserError(f"{x} must be a whole number, {low} or more, not {n!r}")
        if not isinstance(timeout, (int, float)) or timeout < 1:
            raise UserError(f"timeout must be a number of seconds, 1 or more, not {timeout!r}")
        self.topk, self.max_turns = topk, max_turns
        self.skill_names = list(SEARCH_CATEGORIES)
        aliases = {"compare": ("comparison",)}
        library = read_skills(skills, SEARCH_SKILLS, self.skill_names, aliases)
        self.skill = self.all_skills = partial(skill_text, library)
        path = find_data("search", data)
        self.builtin = path is None
        if self.builtin and (search_url or corpus):
            raise UserError("search_url and corpus need questions of their own; give --data FILE "
                            "(JSONL or parquet)")
        self.questions, passages, *others = (
            build_world(seed) if self.builtin else load_questions(path))
        if not any(self.questions.values()):
            raise UserError(f"{path} holds no questions; give a .jsonl, .jsonl.gz or .parquet file")
        if self.builtin:
            self.engine, where = SearchEngine(passages), f"{len(passages)} passages"
        elif search_url:
            self.engine = SearchServer(search_url, timeout, retries)
            where = f"search server {search_url}"
        elif corpus or len(passages) == 1:
            self.engine = SearchEngine(read_corpus(corpus or passages[0]))
            where = f"{len(self.engine.passages)} passages of {corpus or passages[0]}"
        else:
            raise UserError(f"{path} holds {len(passages)} passage files; give one with --env-args "
                            "corpus=FILE, or search_url=URL")
        self.splits = tuple(x for x in ("train", "dev", "test") if x in self.questions)
        counts = ", ".join(f"{split} {len(self.questions[split])}" for split in self.splits)
        built_in = (f"BUILT-IN generated world (seed {seed}), not the benchmark: for that give "
                    "--data with Search-R1's questions and corpus= or search_url=")
        self.source = f"search: {path or built_in}; questions: {counts}; {where}"
        if names := [file.name for file in sum(others, [])]:
            more = f" and {len(names) - 5} more" * (len(names) > 5)
            self.source += f"; neither questions nor passages: {', '.join(names[:5])}{more}"

    def tasks(self, split):
        """Sorted task ids of a split; UserError for an unknown or empty one."""
        if not self.questions.get(split):
            known = ", ".join(filter(self.questions.get, self.splits))
            raise UserError(f"search has no questions in split {split!r}; choose one of {known}")
        return sorted(self.questions[split])

    def start(self, task_id, seed=0):
        """A new episode. Nothing in it is drawn, so `seed` changes nothing."""
        found = [rows[task_id] for rows in self.questions.values() if task_id in rows]
        if not found:
            raise UserError(f"search has no question {task_id!r}; take an id from tasks(split)")
        return SearchQASession(found[0], self.max_turns)

    def step(self, sessions, responses, think_closed=False):
        """Advances sessions, all queries in one request; a UserError leaves all as they were."""
        moves = [(session, *parse_search(text)) for session, text in zip(sessions, responses)
                 if not session.done]
        asked = [one_line(x, MAX_QUERY) if kind == "search" else "" for _, kind, x, _ in moves]
        queries = list(dict.fromkeys(filter(None, asked)))
        found = dict(zip(queries, self.engine.search(queries, self.topk))) if queries else {}
        for (session, kind, content, valid), query in zip(moves, asked):
            session.step(kind, content, valid, found.get(query, [])[:self.topk])

class SearchQASession:
    """One episode. turns: [(observation, action)]; found: the passages that each action brought."""
    observation = action = ""
    valid, admissible, done, won, score = False, False, False, False, 0.0  # set by step
    commands = "search <your query>", "answer <the bare answer>"  # as typed by hand

    def __init__(self, question, max_turns):
        self.question, self.max_turns = question, max_turns
        self.task, self.group = question.text, question.group
        self.goal = " or ".join(question.answers)
        self.category = search_category(self.task, self.group)
        self.turns, self.found, self.details = [], [], {}

    def step(self, kind, content, valid, passages):
        """Plays one response, parsed by parse_search, and the passages found for it."""
        self.action = f"<{kind}>{one_line(content, MAX_QUERY)}</{kind}>" if kind else ""
        self.turns.append((self.observation, self.action))
        self.found.append([encodable(text[:MAX_PASSAGE]) for text in passages])
        self.observation = show_passages(self.found[-1]) if kind == "search" else ""
        self.valid, self.admissible, self.done = valid, bool(kind), kind == "answer"
        if self.done:
            match, f1 = score_answer(content[:MAX_ANSWER], self.question.answers)
            self.won = match == 1 and len(content) <= MAX_ANSWER
            self.score, self.details = float(self.won), {"em": float(self.won), "f1": f1}

    def expert(self):
        """The next response of an expert (search_expert)."""
        thought, query, answer = search_expert(self)
        action = f"<search>{query}</search>" if query else f"<answer>{answer}</answer>"
        return f"<think>{thought}</think>{action}"

    def prompt(self, skill="", history=4, room=None, brief=False):
        """The user message of this turn; `room` bounds the characters of all passages shown."""
        first, steps = max(len(self.turns) - max(history, 1), 0), ""
        each = room and max(1, room // max(1, sum(map(len, self.found[first:]))) - 8)
        for i, (_, action) in enumerate(self.turns[first:], first):
            searched = action.startswith("<search>")
            shown = show_passages(self.found[i], each, brief) if searched else ""
            steps += f"{action}\n{shown}\n" if brief else f"Step {i + 1}: {action} {shown}\n"
        skill = skill + "\n\n" if skill else ""
        if brief:
            return f"{skill}{self.task}\n{steps}<think>, then <search> or <answer>:"
        past = "" if not steps else (
            f"You have taken {i + 1} step(s) so far. Your queries stand in <search> </search>"
            f", what the search engine returned in <information> </information>:\n{steps}\n")
        return SEARCH_PROMPT.format(skill=skill, task=self.task, past=past)

SEARCH_PROMPT = """\
{skill}You are an expert at answering questions step by step with a search engine.
Question: {task}

{past}Now take the next step. First reason inside <think> </think>. Then do one of these, never \
both:
(1) If a fact is missing, search for it: <search> your query </search>
(2) If you know enough, give the bare final answer, as in <answer>Beijing</answer>"""

def show_passages(passages, room=4000, brief=False):
    """The text of found passages, each cut to `room` characters; brief: without titles and tags."""
    texts = [shorten_middle(text.split('"\n', 1)[-1] if brief else text, room) for text in passages]
    docs = "".join(f"Doc {i}: {text}\n" for i, text in enumerate(texts, 1))
    return "\n".join(texts) if brief else f"<information>{docs}</information>"

def parse_search(response):
    """(kind "search", "answer" or "", content, valid) as in the public projection.py: what follows
    the first </search> (else </answer>) is dropped, search goes first, one opening tag is valid."""
    closed = [tag for tag in ("</search>", "</answer>") if tag in response]
    trimmed = response[:response.index(closed[0]) + len(closed[0])] if closed else response
    for kind in ("search", "answer"):
        start = re.compile(f"<{kind}>", re.I).search(trimmed)  # if it is not closed, none is
        end = start and re.compile(f"</{kind}>", re.I).search(trimmed, start.end())
        if end:
            valid = len(re.findall("<(?:search|answer)>", response, re.I)) == 1
            return kind, trimmed[start.end():end.start()].strip(), valid
    return "", "", False

SEARCH_SKILLS = _table("""
general: Name the missing fact before searching. Query with the entity's full name and the wanted
    property. Check that a passage speaks of the right entity; answer once one states the fact, or
    in the last turn.
direct_retrieval: One passage usually holds the answer. Search the question's rarest words
    together. If the passages miss, try synonyms or the likely page title, not the same query.
    Answer in the passage's words.
entity_attribute_lookup: Search the entity's exact name plus the property
    (birthplace, genre, capital). Where several entities share a name, add occupation, year or
    country. Answer with the property's value alone.
multi_hop_reasoning: Find the innermost entity first: who made, led or founded the thing. Put the
    name found into the next query, with the next property. One link per search. Answer the
    outermost question.
compare: Search each candidate by itself and note its date, number or place. Compare when both are
    known; mind the direction: older means the earlier year. Answer what is asked:
    candidate, property, or yes or no.
mistakes: Common mistakes: answering from memory while searches are left; repeating a failed query;
    searching and answering in one response; explaining inside the answer tags instead of giving
    the bare fact.""")

# ---- below: the engine, the built-in world, the expert; a reader of the adapter can stop here ----
SEARCH_CATEGORIES = DIRECT, ATTRIBUTE, HOPS, COMPARE = tuple(SEARCH_SKILLS)[1:5]
SEARCH_DATASETS = "NQ TriviaQA PopQA HotpotQA 2Wiki MuSiQue Bamboogle".split()  # paper's columns
COMPARING = re.compile(
    r"^(which|who|what|where|are|is|was|were|do|does|did|between)\b.*\bor\b"
    r"|\b(both|same|share)\b.*\band\b|\band\b.*\b(both|same|share|in common)\b"
    r"|\b(older|elder|younger|earlier|later|first|larger|bigger|smaller|longer|taller|higher"
    r"|more|fewer)\b.*(\bor\b|\bof\b.*\band\b)", re.I)
RELATION = re.compile(r"\b(of|by|whose|that|who|which|where|when|birthplace)\b|['\u2019]s\b", re.I)
PROPERTY = re.compile(
    r"\b(occupation|genre|capital|director|producer|screenwriter|composer|author|religion|sport"
    r"|mother|father|country|born|river|colou?r)\b|^what (is|was) the \w+ of\b", re.I)

def search_category(text, group):
    """Skill category: of the data set where that tells, else of the question, on whole words."""
    known = {"NQ": DIRECT, "TriviaQA": DIRECT, "PopQA": ATTRIBUTE}
    known |= {category: category for category in SEARCH_CATEGORIES}  # the built-in world's groups
    if group in known or COMPARING.search(text[:1000]):
        return known.get(group, COMPARE)
    if group in SEARCH_DATASETS or len(RELATION.findall(text.partition(" ")[2])) > 1:
        return HOPS
    return ATTRIBUTE if PROPERTY.search(text) else DIRECT

MAX_QUERY, MAX_ANSWER, MAX_PASSAGE = 400, 1000, 4000  # characters
MAX_REPLY = 1 << 28  # bytes of a server

def normalize_answer(text):
    """SQuAD's normalisation (qa_em.py of Search-R1): lower case, no punctuation, no articles."""
    text = re.sub(r"[!-/:-@[-`{-~]", "", text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

def score_answer(prediction, golden):
    """(exact match, best F1) over the golden answers. F1 takes yes, no and noanswer as a whole."""
    said, golden, best = normalize_answer(prediction), [*map(normalize_answer, golden)], 0.0
    for answer in golden:
        if said == answer or not {said, answer} & {"yes", "no", "noanswer"}:
            shared = (Counter(said.split()) & Counter(answer.split())).total()
            best = max(best, 2 * shared / max(1, len(said.split()) + len(answer.split())))
    return float(said in golden), best

# ---- question files ----
Question = namedtuple("Question", "id text answers group chain", defaults=((),))
DATASET_ALIASES = {x.lower(): x for x in SEARCH_DATASETS}
DATASET_ALIASES |= {"hotpot": "HotpotQA", "2wikimultihopqa": "2Wiki"}

def read_rows(path):
    """Yields (number, dict) of a .jsonl, .jsonl.gz, .json (an array) or (by pyarrow) .parquet file.
    Raises UserError."""
    number = 0
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet
            batches = parquet.ParquetFile(path).iter_batches(1000)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
            return
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            start = file.peek(4).removeprefix(b"\xef\xbb\xbf").lstrip()
            if start[:2] == b"PK":
                raise ValueError("a zip archive, which has to be unpacked")
            array = path.suffix == ".json" and start[:1] == b"["
            lines = map(json.dumps, json.load(file)) if array else file
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, dict(json.loads(line).items())  # AttributeError: no object
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow: pip install pyarrow, or convert it to "
                        "JSONL") from None
    except Exception as error:  # what gzip, json and pyarrow raise for damaged bytes
        raise UserError(f"{path}, line {number}: {one_line(str(error))}; correct the file, which "
                        "needs one JSON object a line") from None

def read_answers(value):
    """The answers in a field: a text, a number, a list, a list as text, or TriviaQA's dict. [None]
    where they cannot be told apart."""
    if isinstance(value, dict):
        return read_answers(value.get("value")) + read_answers(value.get("aliases"))
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, str) and re.fullmatch(r"\[.*\]", value.strip(), re.S):
        if re.search(r"""['"]\s+['"]""", value):  # an array as numpy prints it
            return [None]
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value.strip())
    if isinstance(value, list):
        return [answer for item in value for answer in read_answers(item)]
    return [value] if value or value == 0 else []

def read_question(path, number, row):
    """One row, in any of the known layouts, as a Question. UserError naming the line."""
    row = {key.lower(): value for key, value in row.items()}
    extra, reward = (x if isinstance(x, dict) else {}
                     for x in map(row.get, ("extra_info", "reward_model")))
    truth = reward.get("ground_truth")
    truth = truth["target"] if isinstance(truth, dict) and "target" in truth else truth
    given = (row.get("golden_answers"), truth,
             *map(row.get, ("answers", "possible_answers", "answer")))
    answers = next(filter(None, map(read_answers, given)), [])
    answers += read_answers(row.get("answer_aliases"))
    text = row.get("question") or extra.get("question")
    plain = answers and all(isinstance(answer, (str, int, float)) for answer in answers)
    if not isinstance(text, str) or not text.strip() or not plain:
        raise UserError(f"{path}, line {number}: no `question` with texts in golden_answers, "
                        "answers, answer or reward_model.ground_truth.target; correct or delete it")
    named = str(row.get("data_source") or row.get("dataset") or "")
    for name in [named] if named else (path.name, path.parent.name, path.parent.parent.name):
        words = re.split("[^a-z0-9]+", name.lower())
        if found := {DATASET_ALIASES[word] for word in words if word in DATASET_ALIASES}:
            break
    group = found.pop() if len(found) == 1 else named or "other"
    key = row.get("id", row.get("idx", extra.get("index")))
    key = panel_hash([text.encode("ascii", "replace").decode()]) if key is None else key
    answers = tuple(encodable(str(answer)) for answer in answers)
    return Question(one_line(f"{group}/{key}"), encodable(text).strip(), answers, group)

def load_questions(path):
    """({split: {id: Question}}, passage files, other files) of a file or a folder and its folders.
    Split: by the name of the file or its folder (train, dev, val, test); else test where other
    names tell, else by a hash of the id (20 % test). Wordings of another split leave train."""
    splits, passages, others = {"train": {}, "test": {}}, [], []
    files = [path]
    if path.is_dir():
        files = sorted(x for x in [*path.glob("[!.]*"), *path.glob("[!.]*/[!.]*")] if x.is_file())
    names = {file: re.search("(?<![a-z])(?:train|test|dev|val)", file.name.lower())
             or re.fullmatch("(train|test|dev|val)(idation)?", file.parent.name.lower())
             for file in files}
    for file, named in names.items():
        rows = read_rows(file) if file == path or _may_hold_rows(file) else iter(())
        first = next(rows, (0, {}))
        keys = set(map(str.lower, first[1]))
        if file != path and not {"question", "extra_info"} & keys:
            is_corpus = "contents" in keys or {"title", "text"} <= keys
            (passages if is_corpus else others).append(file)
            continue
        for number, row in itertools.chain([first] * (first[0] > 0), rows):
            question = read_question(file, number, row)
            drawn = "test" if int(panel_hash([question.id])[:4], 16) < 0.2 * 65536 else "train"
            drawn = "test" if any(names.values()) else drawn
            if named:
                drawn = re.match("train|test|dev", named[0].replace("val", "dev"))[0]
            split = splits.setdefault(drawn, {})
            if any(other.get(question.id, question).text != question.text
                   for other in splits.values()):
                question = question._replace(id=f"{question.id}-{panel_hash([question.text])}")
            if question.id in split:  # the answers of both rows are right
                answers = split[question.id].answers + question.answers
                question = question._replace(answers=tuple(dict.fromkeys(answers)))
            split[question.id] = question
    held = {normalize_answer(question.text) for name, rows in splits.items() if name != "train"
            for question in rows.values()}
    splits["train"] = {key: question for key, question in splits["train"].items()
                       if normalize_answer(question.text) not in held}
    return splits, passages, others

def _may_hold_rows(file):
    """Whether a file beside others is JSONL, parquet or a JSON array."""
    if file.suffix != ".json":
        return file.name.endswith((".jsonl", ".jsonl.gz", ".parquet"))
    with open(file, "rb") as start:
        return start.read(9).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["

# ---- the engines: search(queries, k) gives a list of passages for each query ----
class SearchServer:
    """Client of Search-R1's server, see post_json."""
    def __init__(self, url, timeout=30.0, retries=4, delay=1.0):
        if not re.match(r"https?://[^/]", str(url)):
            raise UserError(f"search_url {url!r} must be like http://127.0.0.1:8000/retrieve")
        self.url = url if re.match(r"https?://[^/]+/.", url) else url.rstrip("/") + "/retrieve"
        self.patience = timeout, retries, delay

    def search(self, queries, k):
        """[[passage, ...] of each query], by one POST for all."""
        def read(reply):
            found = [[hit["document"]["contents"].strip() for hit in hits]
                     for hits in json.loads(reply)["result"]]
            if len(found) != len(queries):
                raise ValueError(f"{len(found)} results for {len(queries)} queries")
            return found

        body = {"queries": queries, "topk": k, "return_scores": True}
        return post_json("search server", self.url, body, read, *self.patience)

class SearchEngine:
    """BM25 over passages, an iterable of texts, which are kept as UTF-8."""
    def __init__(self, passages):
        self.passages = [text.encode("utf-8", "replace") for text in passages]
        self._index = BM25(map(bytes.decode, self.passages))

    def search(self, queries, k):
        """[[passage, ...] of each query], best first."""
        found = (self._index.search(query, k)[0] for query in queries)
        return [[self.passages[i].decode() for i in indices] for indices in found]

def read_corpus(path):
    """Yields the passages of a file of {"id", "contents"} lines. UserError names a broken one."""
    path, number = Path(str(path)).expanduser(), 0
    for number, row in tqdm(read_rows(path), "indexing passages", delay=5):
        if isinstance(row.get("text"), str) and "title" in row and "contents" not in row:
            row["contents"] = f'"{row["title"]}"\n{row["text"]}'  # as Search-R1 builds its index
        if not isinstance(row.get("contents"), str):
            raise UserError(f"{path}, line {number}: no `contents`; correct the line or delete it")
        yield encodable(row["contents"].strip())
    if not number:
        raise UserError(f'{path} holds no passages; give a file of {{"id", "contents"}} lines')

# ---- the built-in world ----
def build_world(seed):
    """({split: {id: Question}}, passages) from `seed`; splits share neither people nor places."""
    rng = random.Random(seed)
    syllables = "ba dor fi gel kan lur mo nev pit ra sol tun ve zim hu cor lin po".split()
    names = ["".join(parts).title() for parts in itertools.product(syllables, repeat=3)]
    rng.shuffle(names)  # every name is used once
    signs = "Amber Silent Golden Hollow Paper Iron Frozen Broken Green".split()
    kinds = "novel opera play poem".split()
    passages, splits = [], {"train": {}, "test": {}}
    for split, n in (("train", 1200), ("test", 60)):
        towns = [(names.pop(), names.pop(), names.pop()) for _ in range(n // 4)]
        people = [(f"{names.pop()} {names.pop()}", rng.choice(towns), year)
                  for year in rng.sample(range(300, 1900), n)]
        works = [(f"The {rng.choice(signs)} {names.pop()}", rng.choice(kinds), maker, year)
                 for maker, year in zip(people, rng.sample(range(400, 1980), n))]
        pages = [(x, f"is a town in {region}, on the river {river}") for x, river, region in towns]
        pages += [(name, f"was born in {town[0]} in {year}") for name, town, year in people]
        pages += [(x, f"is a {kind} of {year} by {maker[0]}") for x, kind, maker, year in works]
        passages += [f'"{title}"\n{title} {told}.' for title, told in pages]
        for work, other in zip(works, works[1:] + works[:1]):
            for category, text, answer, *chain in _world_questions(work, other):
                key = f"world/{split}/{category}/{len(splits[split]):04d}"
                splits[split][key] = Question(key, text, (str(answer),), category, chain)
    return splits, passages

def _world_questions(work, other):
    """(category, question, answer, queries that lead to it) about a work and another one."""
    title, kind, (name, (town, river, _), born), year = work
    title2, _, (name2, town2, born2), year2 = other
    older = town if born < born2 else town2[0]
    earlier = name if year < year2 else name2
    return (
        (DIRECT, f"Who made the {kind} {title}?", name, title),
        (DIRECT, f"In which year was the {kind} {title} made?", year, title),
        (ATTRIBUTE, f"In which town was {name} born?", town, name),
        (ATTRIBUTE, f"In which year was {name} born?", born, name),
        (HOPS, f"In which town was the maker of {title} born?", town, title, f"{name} born"),
        (HOPS, f"Which river flows through the birthplace of {name}?", river, name,
         f"{town} river"),
        (COMPARE, f"Where was the older of {name} and {name2} born?", older, name, name2),
        (COMPARE, f"Who made the earlier of {title} and {title2}?", earlier, title, title2))

# ---- the expert ----
def search_expert(session):
    """(thought, query, answer) of an expert. It answers, without a query, once a passage states an
    answer or the last turn has come."""
    turn, (_, task, answers, _, chain) = len(session.turns), session.question
    if chain:
        query = chain[turn] if turn < len(chain) else ""
        return f"Next I look up {query}." if query else "The passages tell it.", query, answers[0]
    shown = normalize_answer(" ".join(itertools.chain.from_iterable(session.found)))
    for text in filter(normalize_answer, answers):
        if f" {normalize_answer(text)} " in f" {shown} ":
            return "A passage states it.", "", text
    thought = "No passage states it yet." if turn else "I search for it."
    rarer = " ".join(word for word in task.split() if len(word) > 3 or word[0].isupper())
    query = "" if turn >= session.max_turns - 1 else rarer if turn and rarer else task
    return thought, query, answers[0]

# ======== BM25 as Lucene computes it, in numpy ====================================================
class BM25:
    """An inverted index over texts, 6 bytes a posting. docs[starts[t]:starts[t + 1]] are the
    documents with term t, rising; codes is what they score by: term frequency (at most 255) * 256
    + length byte."""
    K1, B = np.float32(0.9), np.float32(0.4)  # Anserini's
    tie_rank = None  # an array: equal scores are ordered by it instead of by index

    def __init__(self, texts):
        self.terms = {}  # term: its number
        terms, frequencies = array("i"), array("B")  # of all postings, document after document
        sizes, lengths = array("i"), array("i")  # of each document: its postings, its words
        for text in texts:
            found = filter(None, map(analyse_word, words(text)))
            counts = Counter(self.terms.setdefault(term, len(self.terms)) for term in found)
            terms.extend(counts)
            frequencies.extend(min(count, 255) for count in counts.values())
            sizes.append(len(counts))
            lengths.append(counts.total())
        order = np.argsort(np.asarray(terms), kind="stable")  # by term, documents still rising
        self.n_docs = len(sizes)
        self.docs = np.repeat(np.arange(self.n_docs, dtype=np.int32), sizes)[order]
        length_bytes = (np.searchsorted(BYTE_LENGTHS, lengths, "right") - 1).astype(np.uint16)
        self.codes = np.asarray(frequencies, np.uint16)[order] * 256 + length_bytes[self.docs]
        counts = np.bincount(terms, minlength=len(self.terms))
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        mean = np.float32(sum(lengths) / max(self.n_docs, 1)) or np.float32(1)
        norms = self.K1 * ((1 - self.B) + self.B * BYTE_LENGTHS.astype(np.float32) / mean)
        tf = np.arange(256, dtype=np.float32)[:, None]
        self._saturation = (1 + tf * (1 / norms)).ravel()  # of each code

    def search(self, query, k=10):
        """(indices, float32 scores as Lucene's) of the best k documents with a query term."""
        terms = (self.terms.get(analyse_word(word)) for word in words(query))
        scores = np.zeros(self.n_docs)
        for term, count in Counter(term for term in terms if term is not None).items():
            low, high = self.starts[term:term + 2]
            df = high - low
            idf = np.float32(np.log(1 + (self.n_docs - df + 0.5) / (df + 0.5)))
            weight = np.float32(count) * idf
            gain = weight - weight / self._saturation.take(self.codes[low:high])
            docs = self.docs[low:high].astype(np.intp)
            np.add.at(scores, docs, gain.astype(float))  # without these casts 10 times slower
        found = np.flatnonzero(scores > 0)
        values = scores[found].astype(np.float32)
        if len(found) > k:
            best = values >= np.partition(values, -k)[-k]
            found, values = found[best], values[best]
        order = np.lexsort((found if self.tie_rank is None else self.tie_rank[found], -values))[:k]
        return found[order], values[order]

# SmallFloat.byte4ToInt: the document length of each byte; a length is rounded down to one of these
BYTE_LENGTHS = np.array([n if n < 40 else 24 + ((8 | n & 7) << ((n >> 3) - 4)) for n in range(256)])

# ---- Lucene's text analysis: Unicode words, English filters, Porter's stemmer ----
STOP_WORDS = frozenset("""a an and are as at be but by for if in into is it no not of on or such
that the their then there these they this to was will with""".split())
# UAX #29, as far as real text needs it. Character classes that Python's \w does not separate:
# ideographs with hiragana, numerals that are part of no word, scripts without spaces, katakana,
# marks and joiners of the character before, emoji.
_CJK = ("\u2e80-\u2fdf\u3005\u3007\u3041-\u309f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
        "\U00020000-\U0003ffff")
_NUMERALS = ("\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2089\u2150-\u215f\u2460-\u249b\u24ea-\u24ff"
             "\u2776-\u2793")
_SOUTHEAST = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aad\ua9e0-\ua9ff"
              "\uaa60-\uaadf")
_KATAKANA = ("\u3031-\u3035\u309b\u309c\u30a0-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u32d0-\u32fe"
             "\u3300-\u3357\uff66-\uff9d")
_EXTEND = "\u00ad\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufeff\uff9e\uff9f" + "".join(  # and marks
    char for char in map(chr, (*range(0x300, 0x12000), *range(0xe0100, 0xe01f0)))
    if unicodedata.category(char) in ("Mn", "Mc", "Me"))
_PICTURE = (
    "\u00a9\u00ae\u203c\u2049\u2122\u2139\u2194-\u2199\u21a9\u21aa\u231a\u231b\u2328\u2388\u23cf"
    "\u23e9-\u23f3\u23f8-\u23fa\u24c2\u25aa\u25ab\u25b6\u25c0\u25fb-\u25fe\u2600-\u2605"
    "\u2607-\u2612\u2614-\u2685\u2690-\u2705\u2708-\u2712\u2714\u2716\u271d\u2721\u2728\u2733"
    "\u2734\u2744\u2747\u274c\u274e\u2753-\u2755\u2757\u2763-\u2767\u2795-\u2797\u27a1\u27b0"
    "\u27bf\u2934\u2935\u2b05-\u2b07\u2b1b\u2b1c\u2b50\u2b55\u3030\u303d\u3297\u3299"
    "\U0001f000-\U0001f3fa\U0001f400-\U0001faff")
_IN_WORD = ":.'\u00b7\u2018\u2019\u2024\u2027\ufe55\uff07\uff0e\uff1a"  # between two letters
_IN_NUMBER = ".,;'\u066c\u2018\u2019\u2024\u2044\uff07\uff0c\uff0e\uff1b"  # between two digits
_LETTER = rf"(?:[^\W\d_{_CJK}{_NUMERALS}{_SOUTHEAST}{_KATAKANA}\uff9e\uff9f][{_EXTEND}]*)"
_WORD = re.compile(rf"""
    (?: {_LETTER}+ (?:[{_IN_WORD}]{_LETTER}+)*           # letters, as in can't and U.S.A
      | \d+ (?:[{_IN_NUMBER}]\d+)* [{_EXTEND}]* | _+)+   # digits, as in 10,000; mixed: 2x4, a_b
    | [{_CJK}]
    | (?: [{_KATAKANA}] [{_EXTEND}]* )+
    | (?: (?=[{_SOUTHEAST}]) [^\W\d_] [{_EXTEND}]* )+     # Thai, Lao, Burmese, Khmer: not separated
    | [{_PICTURE}] (?:\u200d[{_PICTURE}] | [{_EXTEND}\U0001f3fb-\U0001f3ff])*  # with skin tones
    """, re.X)
# The same for ASCII, twice as fast.
_ASCII_WORD = re.compile(r"(?:[A-Za-z]+(?:[:.'][A-Za-z]+)*|[0-9]+(?:[.,;'][0-9]+)*|_+)+")

def words(text):
    """The tokens of a text before the filters, in linear time, at most 255 characters each."""
    found = (_ASCII_WORD if text.isascii() else _WORD).findall(text)
    return [word[i:i + 255] for word in found for i in range(0, len(word), 255)]

@lru_cache(1 << 18)  # nearly every word of a corpus has been seen before
def analyse_word(word):
    """One raw token through Lucene's English filters: the index term, or "" for a stop word."""
    word = word[:-2] if re.search("['\u2019\uff07][sS]$", word) else word
    word = "".join(letter.lower()[0] for letter in word)  # one by one, unlike str.lower
    return "" if word in STOP_WORDS or not word.strip("_") else porter_stem(word)

_PORTER_RULES = [dict(rule.split(":") for rule in rules.split()) for rules in (  # steps 2 to 4
    """ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble alli:al entli:ent eli:e
    ousli:ous ization:ize ation:ate ator:ate alism:al iveness:ive fulness:ful ousness:ous aliti:al
    iviti:ive biliti:ble logi:log""",
    "icate:ic ative: alize:al iciti:ic ical:ic ful: ness:",
    """al: ance: ence: er: ic: able: ible: ant: ement: ment: ent: ion: ou: ism: ate: iti: ous: ive:
    ize:""")]
_PORTER_SUFFIXES = [re.compile(rf"({'|'.join(rules)})\Z") for rules in _PORTER_RULES]

def _kinds(word):
    """c or v for every letter; y is a vowel after a consonant."""
    kinds = ""
    for letter in word:
        kinds += "v" if letter in "aeiou" or (letter == "y" and kinds[-1:] == "c") else "c"
    return kinds

def _measure(word):
    """Porter's m: the number of vowel-consonant sequences."""
    return _kinds(word).count("vc")

def _ends_cvc(word):
    return _kinds(word).endswith("cvc") and word[-1] not in "wxy"

def porter_stem(word):
    """Porter's original stemmer with the two changes of his own code (bli, logi), as in Lucene."""
    if len(word) <= 2:
        return word
    word = re.sub("(ss|i)es$|(?<!s)s$", r"\1", word)
    ending = re.search("(eed|ed|ing)$", word)
    if ending and ending[0] == "eed":
        word = word[:-1] if _measure(word[:-3]) > 0 else word
    elif ending and "v" in _kinds(word[:ending.start()]):
        word = word[:ending.start()]
        if word.endswith(("at", "bl", "iz")) or (_measure(word) == 1 and _ends_cvc(word)):
            word += "e"
        elif word[-2:-1] == word[-1] and _kinds(word).endswith("c") and word[-1] not in "lsz":
            word = word[:-1]
    if word.endswith("y") and "v" in _kinds(word[:-1]):
        word = word[:-1] + "i"
    for suffixes, new, least in zip(_PORTER_SUFFIXES, _PORTER_RULES, (0, 0, 1)):
        if found := suffixes.search(word):  # the leftmost, so the longest
            stem, suffix = word[:found.start()], found[0]
            if _measure(stem) > least and (suffix != "ion" or stem.endswith(("s", "t"))):
                word = stem + new[suffix]
    stem = word[:-1]
    if word.endswith("e") and _measure(stem) > _ends_cvc(stem):  # m > 1, or m = 1 and not *o
        word = stem
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word

# ======== Command line ============================================================================
def play(name, task=None):
    """An episode by hand: the agent's own prompts, answered from the keyboard."""
    env = open_env(name)
    task = task or random.choice(env.tasks(env.splits[0]))
    session, line = env.start(task), ""
    print(env.source)
    print(f"task {task}: type a command; ? lists them, ! plays the expert's move, Ctrl-D leaves")
    while not session.done and len(session.turns) < {"webshop": 15, "search": 4}.get(name, 50):
        if line != "?":
            print("\n" + "".join(c for c in session.prompt() if c.isprintable() or c == "\n"))
        line = input("> ").strip() or "?"
        if line == "?":
            print("\n".join(getattr(session, "commands", ["this environment lists no commands"])))
            continue
        kind, _, words = line.partition(" ")  # "search a lamp" of Search-QA has its own tag
        tag, words = (kind, words) if f"</{kind}>" in env.stop else ("action", line)
        typed = line if line.startswith("<") else f"<{tag}>{words}</{tag}>"
        response = session.expert() if line == "!" else f"<think></think>{typed}"
        env.step([session], [response])
        refused = "" if session.admissible else "that cannot be played now: a turn is lost"
        print(response * (line == "!") + refused)
    print(f"{'won' if session.won else 'lost'} after {len(session.turns)} turns, score "
          f"{session.score:g}; success was: {one_line(session.goal, 2000)}")

def main(argv=None):
    """Does what a command line says, the process's own by default; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    fetch = {"alfworld": download_alfworld, "webshop": download_webshop,
             "webshop-full": partial(download_webshop, full=True)}
    try:
        if {"-h", "--help"} & set(argv):
            print(__doc__)
        elif argv[:1] == ["play"] and len(argv) in (2, 3):
            play(*argv[1:])
        elif argv[:1] == ["download"] and len(argv) in (2, 3) and argv[1] in fetch:
            name = argv[1].removesuffix("-full")
            default = os.environ.get(name.upper() + "_DATA") or f"~/.cache/{name}"
            folder = (argv + [default])[2]
            fetch[argv[1]](Path(os.path.expanduser(os.path.expandvars(folder))))
        else:
            known = ["download", "play", *fetch]
            close = sum((difflib.get_close_matches(word, known, 1) for word in argv), [])
            meant = f"; did you mean {' '.join(close)}?" if close else ""
            raise UserError(f"usage: python envs.py download {'|'.join(fetch)} [DIR], or "
                            f"python envs.py play alfworld|webshop|search [TASK]{meant}")
    except (UserError, OSError) as error:  # OSError: a read-only folder, a full disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EOFError:  # Ctrl-D in play
        print("\nleft")
    except KeyboardInterrupt:
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
