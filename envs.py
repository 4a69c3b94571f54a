"""ALFWorld, WebShop and Search-QA as text environments in plain Python and numpy.

The benchmarks' own data, read in place: no TextWorld, no planner, no Java, no Lucene, no spaCy, no faiss. Without data
each benchmark builds games of its own in the same format from a seed, so that everything runs offline.

Each is one class (`Alfworld`, `WebShopEnv`, `SearchQA`; open_env) with the same few members:

    source, splits, stop        a line on the data found; names of the splits; the tags that close a response
    tasks(split)                sorted task ids
    start(task_id, seed)        a session: one episode
    step(sessions, responses)   advance many sessions by the raw text that a model wrote
    skill(category, brief)      what the teacher of one task is told; all_skills() for one told everything; skill_names

A session has task, category, group, observation, turns, prompt(skill, history, room, brief), expert(), and after a step
action, valid, admissible, done, won, score, details. Nothing here knows of torch or of training.

    python envs.py download NAME [DIR]     fetch a benchmark's data; NAME is alfworld, webshop or webshop-full
    python envs.py bench DATA [GAMES]      the speed of ALFWorld, beside the original where it is installed
"""

import copy
import glob
import gzip
import hashlib
import http.client
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import string
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from array import array
from collections import Counter, namedtuple
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

# ======== Errors, data, downloads, skills, panels: what the three benchmarks share ====================================

class UserError(Exception):
    """A mistake of the user's; the message is one line and says what to do."""


def open_env(name, data=None, seed=233, skills=None, **options):
    """The environment called `name` (alfworld, webshop or search); `options` go to its class. Raises UserError."""
    classes = {"alfworld": Alfworld, "webshop": WebShopEnv, "search": SearchQA}
    if name not in classes:
        raise UserError(f"unknown environment {name!r}; choose one of {', '.join(classes)}")
    known = sorted(set(inspect.signature(classes[name]).parameters) - {"data", "seed", "skills"})
    if unknown := sorted(set(options) - set(known)):
        raise UserError(f"{name} has no option {unknown[0]!r}; it takes {', '.join(known)}")
    return classes[name](data=data, seed=seed, skills=skills, **options)


def find_data(name, data=None):
    """Path of a benchmark's data: `data` if given, else $<NAME>_DATA, else ~/.cache/<name>; None if there is none, or
    for "built-in". Raises UserError for a path the user named that does not exist."""
    variable = name.upper() + "_DATA"
    if data == "built-in":
        return None
    if not (named := data or os.environ.get(variable)):
        cache = Path(os.path.expanduser("~/.cache")) / name
        return cache if cache.is_dir() and any(cache.iterdir()) else None
    path = Path(os.path.expandvars(os.path.expanduser(str(named))))
    if not path.exists():
        source = "--data" if data else "$" + variable
        raise UserError(f"{source} names {path}, which does not exist; mend the path or leave it out")
    return path


def panel_hash(texts):
    """First 12 hex digits of the sha256 of texts joined by newlines: names a set of test tasks."""
    return hashlib.sha256("\n".join(texts).encode("utf-8", "replace")).hexdigest()[:12]


def shorten_middle(text, room):
    """`text` if it has at most `room` characters, else its head and tail around " ... "; room None: no limit."""
    if room is None or len(text) <= room:
        return text
    keep = max(room - 5, 0)
    return (text[:(keep + 1) // 2] + " ... " + text[len(text) - keep // 2:])[:max(room, 0)]


def encodable(text):
    """The text without halves of characters, as a cut JSON string may hold: neither files nor tokenizers take them."""
    return text.encode("utf-8", "replace").decode()


def one_line(text, limit=200):
    """A model's text made fit to be quoted: one line, no control or unencodable characters, cut at `limit`."""
    text = encodable(text[:4 * limit])
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:limit]


QUOTED_TURN = "[Observation {0}: '{1}', Action {0}: '{2}']"  # the public code's form


def last_turns(turns, history, room):
    """(number, observation cut to `room` characters, action) of the last `history` turns."""
    first = max(len(turns) - history, 0)
    return [(i, shorten_middle(seen, room), action) for i, (seen, action) in enumerate(turns[first:], first + 1)]


def step_each(sessions, responses, think_closed=False):
    """Advances every session by one raw response; those that are done stay as they are. think_closed: the chat template
    has closed the think block in the prompt, so that a response without <think> is valid."""
    for session, response in zip(sessions, responses, strict=True):
        if not session.done:
            session.step(response, think_closed)


def _table(text):
    """{name: text} from paragraphs "name: text", whose further lines are indented; one that ends in | or , goes on."""
    text = re.sub(r"([|,])\n\s+", r"\1", text)
    return {name: " ".join(body.split()) for name, body in re.findall(r"^(\w+): (.*?)(?=^\w|\Z)", text, re.S | re.M)}


# ---- skills in the form of the public skill directories ----

def _read_cards(text):
    """{name of a group of skills: its text} of a claude_style_skills.json."""
    def line(card):
        fields = (("{}:", card.get("title")), ("{}", card.get("principle") or card.get("description")),
                  ("When: {}", card.get("when_to_apply")), ("Instead: {}", card.get("how_to_avoid")))
        return "- " + " ".join(wording.format(str(field).strip()) for wording, field in fields if field)

    data = json.loads(text)
    cards = {name: data.get(name, []) for name in ("general_skills", "common_mistakes")}
    cards.update(data.get("task_specific_skills", {}), **data.get("query_type_skills", {}))
    return {name: "\n".join(map(line, items)) for name, items in cards.items()}


def read_skills(folder, own, categories, aliases=None):
    """{"general", "mistakes" and each of the `categories`: text}: `own` without a folder, else from a public skill
    directory: skill_mapping.json with its .md files, or claude_style_skills*.json. `aliases`: category -> further names
    it may have there. UserError if a file is missing or broken, or a category has no text of its own (general skills
    alone are no library)."""
    if not folder:
        return own
    folder, found = Path(os.path.expanduser(str(folder))), {}
    mapping_file, card_files = folder / "skill_mapping.json", sorted(folder.glob("claude_style_skills*.json"))
    if not mapping_file.is_file() and not card_files:
        raise UserError(f"no skills in {folder}: neither skill_mapping.json nor claude_style_skills.json is there")
    try:
        for file in card_files[:1]:
            found = _read_cards(file.read_text(encoding="utf-8"))
        if mapping_file.is_file():  # the .md files go before the cards, which still give the common mistakes
            file, texts = mapping_file, {}
            mapping = json.loads(file.read_text(encoding="utf-8"))
            for name, filename in mapping["skill_files"].items():
                file = folder / filename
                texts[name] = file.read_text(encoding="utf-8").strip()
            tasks = mapping.get("task_to_skill", {}).items()
            found.update(texts, **{task: texts[name] for task, name in tasks if name in texts})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read skills from {file} ({type(error).__name__}: {error})") from None
    aliases = {"general": ("general_skills",), "mistakes": ("common_mistakes",), **(aliases or {})}
    library = {name: next(filter(None, map(found.get, (name, *aliases.get(name, ())))), "")
               for name in ("general", "mistakes", *categories)}
    if missing := [category for category in categories if not library[category]]:
        only = "only general skills" if len(missing) == len(categories) else "no skills for " + ", ".join(missing)
        raise UserError(f"{folder} holds {only}; it needs a text for each of {', '.join(categories)}")
    return library


def skill_text(library, category=None, brief=False):
    """The text of a category: general skills, its own, common mistakes; brief: its own alone; without a category the
    whole library. Raises UserError for an unknown category."""
    categories = [name for name in library if name not in ("general", "mistakes")]
    if category not in (None, *categories):
        raise UserError(f"no skill {category!r}; there are {', '.join(categories)}")
    chosen = categories if category is None else [category]
    return "\n".join(library[name] for name in (chosen if brief else ["general", *chosen, "mistakes"]) if library[name])


# ---- downloads ----

def file_digest(path):
    """SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def download(url, path, sha256=None, tries=5):
    """Fetches `url` into `path` with a progress bar. A broken transfer is taken up again where it stopped (HTTP Range),
    in this call or a later one: until it is complete the data is in `path` + ".part". Checks the length, and `sha256`
    where known. Returns the path; raises UserError."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(tries):
        try:
            total, have = _transfer(url, part)
            if have and total in (None, have):
                break
            trouble = f"got {have} of {total} bytes: the connection closed early"
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise UserError(f"{url} answers {error.code} {error.reason}; check the address or try later") from None
            if error.headers.get("Content-Range") == f"bytes */{part.stat().st_size}":
                break  # it was whole already
            part.unlink()  # the file on the server is not longer than what was here: begin again
            trouble = str(error)
        except (OSError, http.client.HTTPException) as error:
            trouble = str(error) or type(error).__name__
            time.sleep(min(0.2 * 2 ** attempt, 5))
    else:
        raise UserError(f"{url}: {trouble}; run the same command again to resume")
    if sha256 and file_digest(part) != sha256:
        part.unlink()
        raise UserError(f"{url} is not the expected file (its sha256 differs); it was removed, download it again")
    part.replace(path)
    return path


def _transfer(url, part):
    """Appends to the file `part` what is missing of `url`. Returns (full length in bytes or None, bytes there now)."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as reply:
        if have and reply.headers.get_content_type() == "text/html":
            raise UserError(f"{url} answers with a page instead of the file (its quota?); try later, {part} is kept")
        have = have if reply.status == 206 else 0  # else the server sends the whole file
        length = reply.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True)
        with bar, open(part, "ab" if have else "wb") as file:
            for block in iter(lambda: reply.read(1 << 16), b""):
                bar.update(file.write(block))
    return total, part.stat().st_size


# ======== BM25 as Lucene computes it, in numpy ========================================================================

STOP_WORDS = frozenset("a an and are as at be but by for if in into is it no not of on or such that the their then "
                       "there these they this to was will with".split())
# Word-break classes that Python's \w does not separate (UAX #29 and emoji tables, as far as real text needs them).
_CJK = "\u2e80-\u2fdf\u3005\u3007\u3041-\u309f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_NUMERALS = "\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2089\u2150-\u215f\u2460-\u249b\u24ea-\u24ff\u2776-\u2793"
_EXTEND = ("\u00ad\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u064b-\u065f\u093a-\u094f\u200c-\u200f\u20d0-\u20f0"
           "\u2060-\u2064\u302a-\u302f\u3099\u309a\ufe00-\ufe0f\ufeff\uff9e\uff9f")
_PICTURE = ("\u00a9\u00ae\u203c\u2049\u2122\u2139\u2194-\u2199\u21a9\u21aa\u231a\u231b\u2328\u2388\u23cf\u23e9-\u23f3"
            "\u23f8-\u23fa\u24c2\u25aa\u25ab\u25b6\u25c0\u25fb-\u25fe\u2600-\u2605\u2607-\u2612\u2614-\u2685"
            "\u2690-\u2705\u2708-\u2712\u2714\u2716\u271d\u2721\u2728\u2733\u2734\u2744\u2747\u274c\u274e\u2753-\u2755"
            "\u2757\u2763-\u2767\u2795-\u2797\u27a1\u27b0\u27bf\u2934\u2935\u2b05-\u2b07\u2b1b\u2b1c\u2b50\u2b55\u3030"
            "\u303d\u3297\u3299\U0001f000-\U0001f3fa\U0001f400-\U0001faff")  # Lucene makes tokens of emoji
_LETTER = rf"(?:[^\W\d_{_CJK}{_NUMERALS}\uff9e\uff9f][{_EXTEND}]*)"
_MIDDLE = ":.'\u00b7\u2018\u2019\u2024\u2027\ufe55\uff07\uff0e\uff1a"  # joins letters
_POINT = ".,;'\u066c\u2018\u2019\u2024\u2044\uff07\uff0c\uff0e\uff1b"  # joins digits
_WORD = re.compile(rf"(?:{_LETTER}+(?:[{_MIDDLE}]{_LETTER}+)*|\d+(?:[{_POINT}]\d+)*[{_EXTEND}]*|_+)+|[{_CJK}]"
                   rf"|[{_PICTURE}](?:\u200d[{_PICTURE}]|[{_EXTEND}\U0001f3fb-\U0001f3ff])*")
_ASCII_WORD = re.compile(r"(?:[A-Za-z]+(?:[:.'][A-Za-z]+)*|[0-9]+(?:[.,;'][0-9]+)*|_+)+")  # the same, twice as fast
_PORTER_RULES = [dict(rule.split(":") for rule in rules.split()) for rules in (  # steps 2 to 4: suffix -> new suffix
    "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble alli:al entli:ent eli:e ousli:ous ization:ize "
    "ation:ate ator:ate alism:al iveness:ive fulness:ful ousness:ous aliti:al iviti:ive biliti:ble logi:log",
    "icate:ic ative: alize:al iciti:ic ical:ic ful: ness:",
    "al: ance: ence: er: ic: able: ible: ant: ement: ment: ent: ion: ou: ism: ate: iti: ous: ive: ize:")]
_PORTER_SUFFIXES = [re.compile(rf"({'|'.join(rules)})\Z") for rules in _PORTER_RULES]


def words(text):
    """The tokens of a text before the filters, in linear time for any input; those over 255 characters are split."""
    found = (_ASCII_WORD if text.isascii() else _WORD).findall(text)
    return [word[i:i + 255] for word in found for i in range(0, len(word), 255)] if len(text) > 255 else found


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
    """The original Porter stemmer with the two changes of its author's own code (bli, logi), as in Lucene."""
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
    if word.endswith("e") and (_measure(word[:-1]) > 1 or (_measure(word[:-1]) == 1 and not _ends_cvc(word[:-1]))):
        word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word


@lru_cache(1 << 18)  # nearly every word of a corpus has been seen before
def analyse_word(word):
    """One raw token through Lucene's English filters: the index term, or "" for a stop word."""
    word = (word[:-2] if re.search("['\u2019\uff07][sS]$", word) else word).lower()
    return "" if word in STOP_WORDS or not word.strip("_") else porter_stem(word)


# SmallFloat.byte4ToInt: the document length that each byte stands for; a length is rounded down to one of these.
BYTE_LENGTHS = np.array([n if n < 40 else 24 + ((8 | (n - 24) & 7) << ((n - 24 >> 3) - 1)) for n in range(256)])


class BM25:
    """An inverted index over texts (any iterable of str, read once) kept in a few arrays: 6 bytes a posting.
    docs[starts[t]:starts[t + 1]] are the documents with term t, rising; codes what they score by: term frequency (at
    most 255) * 256 + length byte."""

    K1, B = np.float32(0.9), np.float32(0.4)  # Anserini's
    BLOCK = 4096  # documents inverted at a time
    tie_rank = None  # an array: equal scores are ordered by it instead of by index

    def __init__(self, texts):
        self.terms = ids = {}
        texts, blocks, n_docs, total_length = iter(texts), [], 0, 0
        while block := [[ids.setdefault(term, len(ids)) for term in map(analyse_word, words(text)) if term]
                        for text in itertools.islice(texts, self.BLOCK)]:
            blocks.append(self._postings(block, n_docs))
            n_docs, total_length = n_docs + len(block), total_length + sum(map(len, block))
        self._join(blocks)
        self._prepare(n_docs, total_length)

    def _postings(self, block, first):
        """(terms, documents with each, documents, codes) of a list of documents, by term, then document."""
        size = np.array([len(ids) for ids in block])
        keys = np.fromiter(itertools.chain.from_iterable(block), np.int64, size.sum())
        keys, tf = np.unique(keys * self.BLOCK + np.repeat(np.arange(len(block)), size), return_counts=True)
        term, count = np.unique(keys // self.BLOCK, return_counts=True)
        doc, length_byte = keys % self.BLOCK, np.searchsorted(BYTE_LENGTHS, size, "right") - 1
        codes = np.minimum(tf, 255) * 256 + length_byte[doc]
        return term, count, (doc + first).astype(np.int32), codes.astype(np.uint16)

    def _join(self, blocks):
        """The postings of all blocks, term after term; empties the list as it goes, for the memory."""
        df = np.zeros(len(self.terms), np.int64)
        for term, count, _, _ in blocks:
            df[term] += count
        self.starts = np.concatenate([[0], np.cumsum(df)])
        self.docs, self.codes = np.empty(self.starts[-1], np.int32), np.empty(self.starts[-1], np.uint16)
        cursor = self.starts[:-1].copy()
        for i, (term, count, docs, codes) in enumerate(blocks):
            place = np.repeat(cursor[term] - (np.cumsum(count) - count), count) + np.arange(len(docs))
            self.docs[place], self.codes[place], blocks[i] = docs, codes, None
            cursor[term] += count

    def _prepare(self, n_docs, total_length):
        self.n_docs, self.total_length = n_docs, total_length
        mean_length = np.float32(total_length / max(n_docs, 1)) or np.float32(1)
        length = BYTE_LENGTHS.astype(np.float32)
        inverse_norm = np.float32(1) / (self.K1 * ((np.float32(1) - self.B) + self.B * length / mean_length))
        self._saturation = (np.float32(1) + np.arange(256, dtype=np.float32)[:, None] * inverse_norm).ravel()  # by code

    def search(self, query, k=10):
        """(indices, scores), best first, at most k, only documents with a query term; float32 scores as Lucene's.
        Scores every posting of every term: at about 5 ns each, that costs less than deciding which ones to skip."""
        counts = Counter(self.terms[term] for term in map(analyse_word, words(query)) if term in self.terms)
        scores = np.zeros(self.n_docs)
        for term, count in counts.items():
            low, high = self.starts[term:term + 2]
            weight = np.float32(count) * np.float32(np.log(1 + (self.n_docs - (high - low) + 0.5) / (high - low + 0.5)))
            gain = weight - weight / self._saturation.take(self.codes[low:high])
            np.add.at(scores, self.docs[low:high].astype(np.intp), gain.astype(float))  # without casts 10 times slower
        found = np.flatnonzero(scores > 0)
        values = scores[found].astype(np.float32)
        if len(found) > k:
            best = values >= np.partition(values, -k)[-k]
            found, values = found[best], values[best]
        order = np.lexsort((found if self.tie_rank is None else self.tie_rank[found], -values))[:k]
        return found[order], values[order]

    def save(self, path):
        """One .npz without pickles (np.load(..., allow_pickle=False))."""
        terms = np.frombuffer("\n".join(self.terms).encode(), np.uint8)
        with open(path, "wb") as file:
            np.savez(file, terms=terms, starts=self.starts, docs=self.docs, codes=self.codes,
                     settings=np.array([self.n_docs, self.total_length], np.float64))

    @classmethod
    def load(cls, path):
        """An index written by save. Raises ValueError if the file is missing, damaged or another kind of file."""
        index = cls.__new__(cls)
        try:
            with np.load(Path(path), allow_pickle=False) as file:
                terms = file["terms"].tobytes().decode()
                index.starts, index.docs, index.codes = file["starts"], file["docs"], file["codes"]
                n_docs, total_length = map(int, file["settings"][-2:])  # older files have k1 and b before these
            index.terms = {term: i for i, term in enumerate(terms.split("\n"))} if terms else {}
            if len(index.terms) + 1 != len(index.starts) or {len(index.docs), len(index.codes)} != {index.starts[-1]}:
                raise ValueError("its parts do not fit together")
            index._prepare(n_docs, total_length)
        except Exception as error:  # what numpy and zipfile raise for damaged bytes is documented nowhere
            raise ValueError(f"{path} is not a saved BM25 index ({type(error).__name__}); build it again") from error
        return index


# ======== ALFWorld ====================================================================================================

ALFWORLD_URL = "https://github.com/alfworld/alfworld/releases/download/0.4.2/json_2.1.3_tw-pddl.zip"
ALFWORLD_SHA256 = "5df77ea759f2211a4106082839ddbbb790f1ba4e7d097ed732cf453f72aa36cf"
ALFWORLD_TYPES = {  # task type, as in a game's path: (column of the paper's table, predicate of the goal that tells it)
    "look_at_obj_in_light": ("Look", "istoggled"), "pick_clean_then_place_in_recep": ("Clean", "isclean"),
    "pick_heat_then_place_in_recep": ("Heat", "ishot"), "pick_cool_then_place_in_recep": ("Cool", "iscool"),
    "pick_two_obj_and_place": ("Pick2", "not"), "pick_and_place": ("Pick", "inreceptacle")}

# ---- reading a game file: JSON with a PDDL domain, a grammar, a PDDL problem and a walkthrough ----

_ALFRED_ACTIONS = set("look inventory examineReceptacle examineObject GotoLocation OpenObject CloseObject PickupObject "
                      "PutObject CleanObject HeatObject CoolObject ToggleObject SliceObject".split())
_TREATMENTS = {  # verb: (effect, effect it undoes, receptacles it needs); the object must be cleanable and so on
    "clean": ("isclean", "isdirty", ("sink", "sinkbasin")), "heat": ("ishot", "iscool", ("microwave",)),
    "cool": ("iscool", "ishot", ("fridge",))}
_CHANGING = ("atlocation objectatlocation inreceptacle not_inreceptacle holds opened isclean isdirty ishot iscool "
             "istoggled issliced").split()  # predicates that an action adds or deletes
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


def _parse_facts(text):
    """{predicate: set of argument tuples} of the facts in a PDDL text."""
    facts = {}
    for predicate, arguments in re.findall(r"\((?!distance)([\w-]+)([^()]*)\)", text):  # distances are costs
        facts.setdefault(predicate, set()).add(tuple(arguments.split()))
    return facts


def _parse_goal(text):
    """The PDDL condition after "(:goal" as nested tuples."""
    def condition():  # from after its opening to its closing bracket
        return tuple(condition() if token == "(" else token for token in iter(lambda: next(tokens), ")"))

    text = text[text.index("(:goal"):]
    if odd := re.search(r"\((or|forall|imply|when)\b", text):
        raise ValueError(f"its goal uses {odd[1]}, which ALFWorld's do not")
    tokens = iter(re.findall(r"[()]|[^\s()]+", text))
    return condition()[0][1]


def _conjuncts(goal):
    """All that must hold together for `goal`, through nested conjunctions and existential quantifiers."""
    if goal[0] == "and":
        return [atom for part in goal[1:] for atom in _conjuncts(part)]
    return _conjuncts(goal[2]) if goal[0] == "exists" else [goal]


def _holds(goal, facts, bound):
    """Whether a PDDL condition holds. facts: predicate -> set of argument tuples; bound: variable -> value.
    A variable takes the values that all its atoms allow: exact, as in ALFWorld's goals each has an atom, and quick."""
    operator, *parts = goal
    if operator == "and":
        return all(_holds(part, facts, bound) for part in parts)
    if operator == "not":
        return not _holds(parts[0], facts, bound)
    if operator == "=":
        return bound.get(parts[0], parts[0]) == bound.get(parts[1], parts[1])
    if operator != "exists":
        return tuple([bound.get(name, name) for name in parts]) in facts.get(operator, ())
    variable, *others = [name for name in parts[0] if name[0] == "?"]  # types are redundant: so are the facts typed
    values = None
    for predicate, *names in _conjuncts(parts[1]):
        if variable in names and predicate != "=":
            at = names.index(variable)
            known = [(i, bound.get(name, name)) for i, name in enumerate(names) if name in bound or name[0] != "?"]
            fits = [fact for fact in facts.get(predicate, ()) if values is None or fact[at] in values]
            values = {fact[at] for fact in fits if all([fact[i] == name for i, name in known])}
    rest = ("exists", others, parts[1]) if others else parts[1]
    return any(_holds(rest, facts, {**bound, variable: value}) for value in values or ())


def _read_game(source, where):
    """The parts that AlfworldGame needs of a game.tw-pddl, a Path or its text. Raises UserError naming it `where`."""
    try:
        data = json.loads(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
        grammar, problem = data["grammar"], data["pddl_problem"].lower()
        actions = set(re.findall(r"\(:action\s+(\w+)", re.sub(";.*", "", data["pddl_domain"])))
        if actions - {"help"} != _ALFRED_ACTIONS:
            odd = sorted((actions ^ _ALFRED_ACTIONS) - {"help"})
            raise ValueError(f"its pddl_domain is not ALFRED's: {', '.join(odd)}")
        moves = "move {o} to {r}" in grammar  # games from before November 2024 say "put X in/on Y"
        if not moves and "put {o} in/on {r}" not in grammar:
            raise ValueError('its grammar has neither "move X to Y" nor "put X in/on Y"')
        put, other = ("move {} to {}", "put (.+) in/on (.+)") if moves else ("put {} in/on {}", "move (.+) to (.+)")
        walkthrough = [re.sub(other, put.format(r"\1", r"\2"), command)  # one release mixes the two wordings
                       for command in data.get("walkthrough") or ()]
        facts = _parse_facts(problem[problem.index("(:init"):problem.index("(:goal")])
        if missing := {"atlocation", "objecttype", "receptacletype", "receptacleatlocation"} - set(facts):
            raise ValueError("its pddl_problem lacks " + ", ".join(sorted(missing)))
        return dict(facts=facts, goal=_parse_goal(problem), help="help" in actions, put=put, walkthrough=walkthrough,
                    arrives_at_name="You arrive at {r.name}" in grammar,  # older games: "You arrive at loc 7"
                    task=re.search(r'Your task is to: (.*?)"', grammar)[1].strip())
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"cannot play {where} ({type(error).__name__}: {error}); is it a whole game.tw-pddl?") from None


# ---- the engine ----

def _series(names):
    """A list as the original prints it: "a mug 1, and a pen 2", or "nothing"."""
    return ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0] if names else "nothing"


def _player_names(facts):
    """Entity id -> name the player reads; as AlfredDemangler(shuffle=False), the sorted ids of a kind count DOWN."""
    ids = sorted({name for tuples in facts.values() for arguments in tuples for name in arguments if "_bar_" in name})
    kinds = [name.split("_bar_", 1)[0] + ("basin" if "basin" in name else "") for name in ids]
    left, names = Counter(kinds), {}
    for name, kind in zip(ids, kinds):
        names[name] = f"{kind} {left[kind]}"
        left[kind] -= 1
    return names


class AlfworldGame:
    """One game of ALFWorld, played to the letter as the original does (alfworld 0.4.2 on textworld 1.7.0).
    source: path of a game.tw-pddl, its JSON text, or its parts (_read_game); where: what messages call it. Has task,
    task_type, walkthrough; after reset() admissible_commands (sorted), won, held (name of the object in hand or None).
    A copy.copy() plays on its own after reset(). Raises UserError for an unplayable file."""

    def __init__(self, source, where=None):
        if isinstance(source, (str, os.PathLike)):
            is_text = str(source).lstrip().startswith("{")
            source = _read_game(source if is_text else Path(source), where or ("the game" if is_text else source))
        self._game, facts, self.task, self.walkthrough = source, source["facts"], source["task"], source["walkthrough"]
        predicates = {atom[0] for atom in _conjuncts(source["goal"])} | {"inreceptacle"}
        self.task_type = next(kind for kind, (_, sign) in ALFWORLD_TYPES.items() if sign in predicates)
        self._name, self._kind = _player_names(facts), dict(facts["objecttype"] | facts["receptacletype"])
        self._place, self._near, self._routes = dict(sorted(facts["receptacleatlocation"])), {}, []
        for receptacle, place in self._place.items():
            self._near.setdefault(place, []).append(receptacle)
            there = self._name[receptacle if source["arrives_at_name"] else place]
            self._routes.append(("go to " + self._name[receptacle], f"You arrive at {there}. ", receptacle, place))

    def reset(self):
        """Starts the game anew; returns the opening text."""
        self._facts = {**self._game["facts"], **{name: set(self._game["facts"].get(name, ())) for name in _CHANGING}}
        self._refresh()
        return f"-= Welcome to TextWorld, ALFRED! =-\n\n{self._look(self._place)}\n\nYour task is to: {self.task}"

    def step(self, command):
        """Plays a command; returns what the player reads: "Nothing happens." unless it is admissible to the letter."""
        text, shown, adds, deletes = self._options.get(command.strip(), ("Nothing happens.", None, (), ()))
        for predicate, *arguments in deletes:
            self._facts[predicate].discard(tuple(arguments))
        for predicate, *arguments in adds:
            self._facts[predicate].add(tuple(arguments))
        if adds or deletes:
            self._refresh()
        return text + (self._look() if shown == "look" else self._describe(shown) if shown else "")

    def fits(self, thing, receptacle):
        """Whether objects of that id's type may be put into the receptacle (id)."""
        return (self._kind.get(receptacle), self._kind.get(thing)) in self._game["facts"].get("cancontain", ())

    def _is(self, predicate, thing):
        return (thing,) in self._facts.get(predicate, ())

    def _refresh(self):
        """After a change: judges the goal and lists what can be done now, all that does something."""
        (self._agent, self._here), = self._facts["atlocation"]
        hand = next((thing for _, thing in self._facts["holds"]), None)
        self._options, self.held = {}, self._name.get(hand)
        self._offer("look", "", shown="look")
        self._offer("inventory", "You are carrying: a {}." if hand else "You are not carrying anything.", hand)
        if self._game["help"]:
            self._offer("help", _HELP)
        leave = [("atlocation", self._agent, self._here)]
        for command, text, spot, place in self._routes:
            if place != self._here:
                self._options[command] = text, spot, [("atlocation", self._agent, place)], leave
        for spot in self._near.get(self._here, ()):
            self._offer_at(spot, hand)
        if hand:
            self._offer("examine {}", "", hand, shown=hand)
        if self._kind.get(hand) in ("knifetype", "butterknifetype"):
            for thing, place in self._facts["objectatlocation"]:
                if place == self._here and self._is("sliceable", thing):
                    self._offer("slice {} with {}", "You sliced the {} with the {}.", thing, hand,
                                add=[("issliced", thing)])
        self.admissible_commands, self.won = sorted(self._options), _holds(self._game["goal"], self._facts, {})

    def _offer(self, command, text, *things, shown=None, add=(), delete=()):
        """Makes a command admissible. text: what it answers, then the description of `shown` (id, or "look"); the {} of
        both stand for the names of `things`; add, delete: facts."""
        names = [self._name.get(thing) for thing in things]
        self._options[command.format(*names)] = text.format(*names), shown, add, delete

    def _offer_at(self, spot, hand):
        """Offers what can be done with a receptacle within reach, with what is in it, and with what is in hand."""
        agent, here, offer = self._agent, self._here, self._offer
        shut = self._is("openable", spot) and not self._is("opened", spot)
        offer("examine {}", "", spot, shown=spot)
        if shut:
            offer("open {}", "You open the {}. ", spot, shown=spot, add=[("opened", spot)])
        elif self._is("openable", spot):
            offer("close {}", "You close the {}.", spot, delete=[("opened", spot)])
        for thing in [thing for thing, where in self._facts["inreceptacle"] if where == spot]:
            if self._is("toggleable", thing):  # isToggled is never taken back, so it always "turns on"
                offer("use {}", "You turn on the {}.", thing, add=[("istoggled", thing)])
            if not hand and not shut and self._is("pickupable", thing):
                offer("take {} from {}", "You pick up the {} from the {}.", thing, spot,
                      add=[("holds", agent, thing), ("not_inreceptacle", thing, spot)],
                      delete=[("inreceptacle", thing, spot), ("objectatlocation", thing, here)])
        if hand and not shut and self.fits(hand, spot):
            put = self._game["put"]
            offer(put, "You " + put.replace("{}", "the {}") + ".", hand, spot,
                  add=[("inreceptacle", hand, spot), ("objectatlocation", hand, here)],
                  delete=[("holds", agent, hand), ("not_inreceptacle", hand, spot)])
        for verb, (effect, undone, tools) in _TREATMENTS.items():
            if hand and self._is(verb + "able", hand) and self._kind.get(spot, "").removesuffix("type") in tools:
                offer(verb + " {} with {}", f"You {verb} the {{}} using the {{}}.", hand, spot,
                      add=[(effect, hand)], delete=[(undone, hand)])

    def _look(self, room=()):  # room: all receptacles, which the original lists in the opening text only
        near = self._near.get(self._here)
        if not near:
            things = _series(["a " + self._name[spot] for spot in room])
            return f"You are in the middle of a room. Looking quickly around you, you see {things}."
        here = sorted(thing for thing, place in self._facts["objectatlocation"] if place == self._here)
        out = ["a " + self._name[thing] for thing in here for spot in near  # taken from one, put in another
               if (thing, spot) in self._facts["not_inreceptacle"]]
        return f"You are facing the {_series([self._name[spot] for spot in near])}. Next to it, you see {_series(out)}."

    def _describe(self, thing):
        """The text of "examine" for a receptacle or an object (id)."""
        name, inner = self._name[thing], "inreceptacle" if thing in self._place else "inreceptacleobject"
        inside = _series(["a " + self._name[x] for x, outer in sorted(self._facts.get(inner, ())) if outer == thing])
        if thing in self._place and not self._is("openable", thing):
            return f"On the {name}, you see {inside}."
        if thing in self._place:
            return f"The {name} is " + (f"open. In it, you see {inside}." if self._is("opened", thing) else "closed.")
        if self._is("isreceptacleobject", thing):
            return f"This is a normal {name}. In it, you see {inside}."
        clean, hot, cool, cut = (self._is(state, thing) for state in ("isclean", "ishot", "iscool", "issliced"))
        if clean or hot or cool:
            words = ["hot"] * hot + ["cool" if clean or cut else "cold"] * (cool and not hot) + ["clean"] * clean
            return f"This is a {' and '.join(words)}{' sliced' * cut} {name}."
        if self._is("istoggled", thing):
            return f"This {name} is on."
        return f"This is a sliced {name}." if cut else f"There's nothing special about {name}."


# ---- built-in games: small houses from a seed, played by the same engine ----

_ROOMS = {  # room: kinds of receptacle, repeated where several are usual
    "kitchen": "cabinet cabinet drawer countertop diningtable shelf fridge sinkbasin garbagecan stoveburner microwave",
    "bathroom": "cabinet cabinet drawer countertop shelf sinkbasin bathtubbasin toilet garbagecan",
    "bedroom": "drawer drawer desk bed dresser shelf sidetable sofa safe garbagecan"}
_OPENABLE, _NARROW = set("cabinet drawer fridge microwave safe".split()), {"microwave", "stoveburner", "toilet"}
_THINGS = {  # object: (room, the two kinds of receptacle where it usually is, what can be done to it)
    name: (room, usual, can) for room, things in _table("""
kitchen: apple fridge diningtable clean heat cool, potato fridge countertop clean heat cool,
    tomato fridge countertop clean heat cool, egg fridge garbagecan clean heat cool,
    bread countertop diningtable heat cool, lettuce fridge diningtable clean cool,
    mug cabinet countertop clean heat cool, cup cabinet shelf clean heat cool,
    plate cabinet countertop clean heat cool, bowl cabinet shelf clean cool, pan stoveburner cabinet clean cool,
    fork drawer diningtable clean, spoon drawer sinkbasin clean, saltshaker shelf cabinet
bathroom: candle countertop shelf, soapbar sinkbasin bathtubbasin clean, cloth bathtubbasin drawer clean,
    toiletpaper toilet cabinet, spraybottle cabinet toilet
bedroom: alarmclock desk sidetable, book bed desk, cd drawer shelf, cellphone bed sidetable, creditcard drawer dresser,
    keychain drawer safe, laptop desk bed, pen desk drawer, pencil desk drawer, pillow bed sofa, vase shelf dresser,
    remotecontrol sofa sidetable, watch dresser sidetable""").items()
    for name, *usual, can in re.findall(r"(\w+) (\w+) (\w+)([\w ]*)", things)}
_HOSTS = {  # object: kinds of receptacle that can hold it
    name: sorted(set(_ROOMS[room].split()) - _NARROW | set(usual)) for name, (room, usual, _) in _THINGS.items()}
_TASKS = {  # task type: [treatment, where, two wordings, the goal's variables, its conditions]
    kind: parts.split("|") for kind, parts in _table("""
pick_and_place: ||put a {o} in {r}.|put some {o} on {r}.|
    ?o ?r|(objecttype ?o {o}) (receptacletype ?r {r}) (inreceptacle ?o ?r)
look_at_obj_in_light: ||look at {o} under the desklamp.|examine the {o} with the desklamp.|
    ?o ?p ?r ?l|(objecttype ?o {o}) (holds agent1 ?o) (objecttype ?p desklamp) (istoggled ?p) (inreceptacle ?p ?r)
    (receptacleatlocation ?r ?l) (atlocation agent1 ?l)
pick_two_obj_and_place: ||put two {o} in {r}.|find two {o} and put them in {r}.|
    ?o ?r ?p|(objecttype ?o {o}) (receptacletype ?r {r}) (inreceptacle ?o ?r) (objecttype ?p {o}) (inreceptacle ?p ?r)
    (not (= ?o ?p))
pick_clean_then_place_in_recep: clean|sinkbasin|put a clean {o} in {r}.|clean some {o} and put it in {r}.|
    ?o ?r|(objecttype ?o {o}) (receptacletype ?r {r}) (inreceptacle ?o ?r) (isclean ?o)
pick_heat_then_place_in_recep: heat|microwave|put a hot {o} in {r}.|heat some {o} and put it in {r}.|
    ?o ?r|(objecttype ?o {o}) (receptacletype ?r {r}) (inreceptacle ?o ?r) (ishot ?o)
pick_cool_then_place_in_recep: cool|fridge|put a cool {o} in {r}.|cool some {o} and put it in {r}.|
    ?o ?r|(objecttype ?o {o}) (receptacletype ?r {r}) (inreceptacle ?o ?r) (iscool ?o)""").items()}
_BUILT_IN_SIZES = {"train": 2000, "valid_seen": 140, "valid_unseen": 134}  # the last two as in the release


def _draw_house(rng, task_type, house):
    """(object, its target, kinds of receptacle, [objects in each], indices where it is, index of where it is to go)."""
    (treatment, tool, *_), look = _TASKS[task_type], task_type == "look_at_obj_in_light"
    thing = rng.choice([name for name, (room, _, can) in _THINGS.items()
                        if (not treatment or treatment in can) and (not look or room == "bedroom")])
    room, usual, _ = _THINGS[thing]
    target = rng.choice(["desk", "sidetable"] if look else [kind for kind in _HOSTS[thing] if kind != tool])
    sources = []
    for _ in range(2 if task_type == "pick_two_obj_and_place" else 1):
        likely = [kind for kind in usual if look or kind != target] if rng.random() < 0.85 else []
        sources.append(rng.choice(likely or [kind for kind in _HOSTS[thing] if look or kind != target]))
    kinds = list({target, *sources, tool or target})
    single = {"fridge", "microwave", "safe", "sinkbasin"}
    while len(kinds) < house:
        kinds.append(rng.choice([kind for kind in _ROOMS[room].split() + usual * 2 if kind not in single & set(kinds)]))
    kinds.sort()
    at = sorted(rng.choice([i for i, kind in enumerate(kinds) if kind == source]) for source in sources)
    inside = [[thing] * at.count(i) for i in range(house)]
    for other in rng.choices([name for name in _THINGS if _THINGS[name][0] == room and name != thing], k=house):
        likely = [i for i, kind in enumerate(kinds) if kind in _THINGS[other][1]] if rng.random() < 0.85 else []
        spots = likely or [i for i, kind in enumerate(kinds) if kind in _HOSTS[other]]
        if spots and len(inside[spot := rng.choice(spots)]) < 3:
            inside[spot].append(other)
    goal = rng.choice([i for i, kind in enumerate(kinds) if kind == target])
    inside[goal] += ["desklamp"] * look
    return thing, target, kinds, inside, at, goal


def _build_game(rng, task_type, house):
    """A generated game: the parts that AlfworldGame takes (see _read_game), and `pair`, its object and target."""
    thing, target, kinds, inside, at, goal = _draw_house(rng, task_type, house)
    treatment, tool, *wordings, variables, conditions = _TASKS[task_type]
    init = "(atlocation agent1 loc_bar_99)"
    spots = [re.sub("(basin)?$", rf"_bar_{i:02d}\1", kind, count=1) for i, kind in enumerate(kinds)]
    for i, (spot, kind) in enumerate(zip(spots, kinds)):
        init += (f"(receptacletype {spot} {kind})(receptacleatlocation {spot} loc_bar_{i:02d})"
                 f"({'openable' if kind in _OPENABLE else 'open'} {spot})")
        for n, what in enumerate(inside[i]):
            it, can = f"{what}_bar_{i:02d}_{n}", "toggle" if what == "desklamp" else "pickup" + _THINGS[what][2]
            init += f"(objecttype {it} {what})(inreceptacle {it} {spot})(objectatlocation {it} loc_bar_{i:02d})"
            init += "".join(f"({verb}able {it})" for verb in can.split())
    facts = _parse_facts(init) | {"cancontain": {(kind, name) for name in _THINGS for kind in _HOSTS[name]}}
    name, walkthrough, here, opened = _player_names(facts), [], None, set()
    for k, source in enumerate(at):
        it = name[f"{thing}_bar_{source:02d}_{at[:k].count(source)}"]
        treat = [(kinds.index(tool), f"{treatment} {it} with {{}}")] if tool else []
        finish = "use desklamp 1" if task_type == "look_at_obj_in_light" else f"move {it} to {{}}"
        for i, command in [(source, f"take {it} from {{}}"), *treat, (goal, finish)]:
            spot, enter = name[spots[i]], command[:4] in ("take", "move") and kinds[i] in _OPENABLE and i not in opened
            walkthrough += ["go to " + spot] * (i != here) + ["open " + spot] * enter + [command.format(spot)]
            here, opened = i, opened | {i} if enter else opened
    condition = f"(:goal (exists ({variables}) (and {conditions})))".format(o=thing, r=target)
    return dict(facts=facts, goal=_parse_goal(condition), task=rng.choice(wordings).format(o=thing, r=target),
                pair=f"{thing} {target}", walkthrough=walkthrough, put="move {} to {}", help=True, arrives_at_name=True)


def built_in_game(split, index, task_type, seed, house):
    """Game `index` of a split, the same for the same arguments. Splits cannot overlap: object and target decide whether
    a game is one of valid_unseen (whose pairs no other split has), its contents whether it is one of valid_seen."""
    rng = random.Random(f"{seed}/{split}/{index}/{house}")
    while True:
        game = _build_game(rng, task_type, house)
        contents = sorted(map(repr, game["facts"]["inreceptacle"] | game["facts"]["receptacletype"]))
        unseen = int(panel_hash([game["pair"]]), 16) % 6 == 0
        seen = int(panel_hash([task_type, game["pair"], *contents]), 16) % 6 == 0
        if split == ("valid_unseen" if unseen else "valid_seen" if seen else "train"):
            return game


# ---- skills: what the teacher is told ----

ALFWORLD_SKILLS = _table("""
general: Search likely receptacles first, each once; open what is closed before you call it empty. Take the object as
    soon as you see it. Food: fridge, countertop, diningtable. Dishes: cabinet, countertop, shelf. Cutlery: drawer.
    Pens, laptops, clocks: desk. Cards, keys, cds: drawer. Books, phones: bed. You can hold one object.
pick_and_place: Pick and place: 1. Find the object where its kind usually is. 2. Take it. 3. Go to the target
    receptacle. 4. Open it if closed. 5. Move the object to it.
look_at_obj_in_light: Look under a lamp: 1. Find the object and take it. 2. Find the desklamp: on a desk or a sidetable.
    3. Still holding the object, use the desklamp.
pick_clean_then_place_in_recep: Clean and place: 1. Find and take the object. 2. Go to the sinkbasin. 3. Clean the
    object with it. 4. Go to the target, open it if closed. 5. Move the object to it.
pick_heat_then_place_in_recep: Heat and place: 1. Find and take the object. 2. Go to the microwave, leave it closed. 3.
    Heat the object with it. 4. Go to the target, open it if closed. 5. Move the object to it.
pick_cool_then_place_in_recep: Cool and place: 1. Find and take the object, food often in the fridge. 2. Go to the
    fridge. 3. Cool the object with it. 4. Go to the target, open it if closed. 5. Move the object to it.
pick_two_obj_and_place: Two objects: 1. Find and take the first. 2. Move it to the target. 3. Find another of the same
    kind, not the one already placed. 4. Move it to the same target receptacle.
mistakes: Avoid: going back to searched places; leaving closed receptacles unopened; placing the object before it is
    clean, hot or cool; naming an action that is not offered.""")
_SKILL_ALIASES = {"look_at_obj_in_light": ("examine",), "pick_clean_then_place_in_recep": ("clean",),
                  "pick_heat_then_place_in_recep": ("heat",), "pick_cool_then_place_in_recep": ("cool",),
                  "pick_two_obj_and_place": ("pick_and_place",)}

# ---- expert ----

def expert_script(game, detours=0, seed=0):
    """[(thought, command)] that wins `game` along its walkthrough. Before each place where something is sought, up to
    `detours` others (drawn from `seed`, likely ones first) are searched in vain: the player cannot know where it is."""
    for most in (detours, 0):  # where a detour spoils the plan, the plain walkthrough
        game, script, visited, rng = copy.copy(game), [], set(), random.Random(f"{seed}/{game.task}")
        game.reset()
        places = {command: place for command, _, _, place in game._routes}
        for i, command in enumerate(game.walkthrough):
            place, acts = places.get(command), [("", command)]
            if place and place not in visited:
                visited.add(place)
                until = " / ".join(game.walkthrough[i + 1:]).split("go to ")[0]
                if found := re.search(r"(?:take|use) (.+?) \d+", until):
                    acts = _searches(game, found[1], command, visited, rng.randint(0, most), rng)
            for thought, act in acts:
                if act in game.admissible_commands and not game.won:
                    script.append((thought or _thought(act), act))
                    game.step(act)
        if game.won:
            return script
    raise UserError(f"the walkthrough of this game ({game.task}) does not solve it; fetch the data again")


def _thought(command):
    verb, rest = command.split(" ", 1)
    return {"go": f"I carry it {rest}", "open": f"{rest} is closed; open it", "take": f"here it is; {command}",
            "use": f"here is {rest}; turn it on"}.get(verb, f"I am there; {command}")


def _searches(game, sought, last, visited, count, rng):
    """[(thought, command)]: `count` visits where no object of the `sought` kind is, then the command `last`. Unvisited
    places; where such objects usually are comes before where they can be, then the rest (weighted draw)."""
    kind = {key: name.rsplit(" ", 1)[0] for key, name in game._name.items()}
    thing = next(key for key in kind if kind[key] == sought)
    has = {game._place.get(spot) for thing, spot in game._facts["inreceptacle"] if kind[thing] == sought}
    usual = ["desk", "sidetable"] if sought == "desklamp" else _THINGS[sought][1] if sought in _THINGS else ()
    drawn = []
    for command, _, spot, place in game._routes:
        if place not in visited | has:
            weight = 1 if kind[spot] in usual else 0.2 if game.fits(thing, spot) else 0.02
            drawn.append((rng.random() ** (1 / weight), command, place))
    acts, thought = [], f"I need a {sought}; look in {{}}"
    for _, command, place in sorted(drawn, reverse=True)[:count]:
        name = command.removeprefix("go to ")
        acts += [(thought.format(name), command), ("", "open " + name)]
        visited.add(place)
        thought = f"no {sought} here; look in {{}} next"
    return acts + [(thought.format(last.removeprefix("go to ")), last)]


# ---- episodes ----

_ALFWORLD_PROMPT = """
You are an expert agent acting in the ALFRED Embodied Environment. {skill}{task}{before}our current observation is: {o}
The admissible actions in your situation are: [{actions}].

Now it is your turn to act.
First reason step by step about the situation. The reasoning MUST stand between <think> and </think>.
When it is done, choose one admissible action for this step and put it between <action> and </action>.
"""


def parse_action(response, think_closed=False, kept=30):
    """(action, valid) of a response, judged as the public alfworld_projection does: in lower case, what stands between
    the first <action> and the first </action>; without these the last `kept` characters, invalid. Invalid too: <think>
    or </think> missing (not demanded with think_closed), or any CJK character."""
    low = response.lower()
    start, end = low.find("<action>"), low.find("</action>")
    if start < 0 or end < 0:
        return low[-kept:], False
    thinks = think_closed or ("<think>" in response and "</think>" in response)
    return low[start + len("<action>"):end].strip(), bool(thinks and not re.search("[\u4e00-\u9fff]", response))


def _terse(text):
    """An observation in few words, for models trained from scratch."""
    if text.startswith("-="):
        return "start"  # the places it names are those that can be gone to
    for pattern, short in ((r"^You (arrive at|open the) .*?\. (?=The|On)", ""), (r"^(You (?!are)).*", "done"),
                           (r"^(On|In) the (.*?), you see", r"\2:"), (r"^The (.*?) is (open\. In it, you see)", r"\1:"),
                           (r"^The (.*?) is closed\.$", r"\1 closed"), (r"\b(and )?a (?=\w+ \d)", ""), (r"\.$", "")):
        text = re.sub(pattern, short, text)
    return text


class AlfworldSession:
    """One episode, from Alfworld.start. turns: [(observation, action)], actions cut to one line of 200 characters."""

    def __init__(self, game, seed, detours):
        self._game, self._seed, self._detours, self._script = game, seed, detours, None
        self.observation, self.turns, self.details = game.reset(), [], {"invalid": 0, "inadmissible": 0}
        self.task, self.category, self.group = game.task, game.task_type, ALFWORLD_TYPES[game.task_type][0]
        self.action, self.valid, self.admissible, self.done, self.won, self.score = "", True, True, False, False, 0.0

    def prompt(self, skill="", history=2, room=None, brief=False):
        """The user message of this turn, with the public code's parts; observations are cut to `room` characters."""
        past, seen = last_turns(self.turns, history, room), shorten_middle(self.observation, room)
        commands = [command for command in self._game.admissible_commands if command != "help"]
        if brief:
            return self._brief_prompt(skill, past, seen, commands)
        count = len(self.turns)
        before = f"You are now at step {count + 1} and y" if count else "Y"
        if past:
            turns = "\n".join(QUOTED_TURN.format(*turn) for turn in past)
            before = (f"Before this step you have already taken {count} step(s). The most recent {len(past)} "
                      f"observations and the actions you took on them:\n{turns}\n{before}")
        named = not count and seen == self.observation  # the opening text itself names the task
        return _ALFWORLD_PROMPT.format(
            task="" if named else f"Your task is to: {self.task}\n", before=before, o=seen,
            skill=f"\nSkills that help with tasks of this kind:\n{skill}\n\n" if skill else "",
            actions="\n ".join(f"'{command}'" for command in commands))

    def _brief_prompt(self, skill, past, seen, commands):
        """The same parts in few tokens. Unlisted but playable: look, inventory, examine; what is held is told."""
        acts = [command for command in commands if not command.startswith(("go to", "examine", "look", "inventory"))]
        acts.append("go to " + ", ".join(command[6:] for command in commands if command.startswith("go to ")))
        lines = (("Task", self.task.rstrip(".")), ("Skill", skill), ("Have", self._game.held),
                 ("Last", " | ".join(f"{_terse(text)} > {action}" for _, text, action in past)),
                 (f"Step {len(self.turns) + 1}", _terse(seen)), ("Actions", "; ".join(acts)))
        return "".join(f"{name}: {text}\n" for name, text in lines if text)

    def step(self, response, think_closed=False):
        """Plays a raw response."""
        action, self.valid = parse_action(response, think_closed)
        self.admissible, self.action = action.strip() in self._game.admissible_commands, one_line(action)
        self.turns.append((self.observation, self.action))
        self.observation = self._game.step(action)
        self.won = self.done = self._game.won
        self.score = float(self.won)
        self.details["invalid"] += not self.valid
        self.details["inadmissible"] += not self.admissible

    def expert(self):
        """The expert's response now, if only expert responses were played before. UserError when none is left."""
        self._script = self._script or expert_script(self._game, self._detours, self._seed)
        if len(self.turns) >= len(self._script):
            raise UserError("the expert has no step left: play its responses only, and stop when the session is done")
        return "<think>{}</think><action>{}</action>".format(*self._script[len(self.turns)])


class Alfworld:
    """ALFWorld's games, or games built from `seed` where there are none. data: folder or zip of the release; skills: a
    public skill directory; task_types: those to keep, as "Pick,Heat"; house: receptacles of a built-in game, 4 to 12;
    detours: see expert_script. Raises UserError for bad values."""
    stop, splits = ("</action>",), ("train", "valid_seen", "valid_unseen")

    def __init__(self, data=None, seed=233, skills=None, house=6, task_types="", detours=0):
        self.seed, self.house, self.detours, self.skill_names = seed, house, detours, list(ALFWORLD_TYPES)
        library = read_skills(skills, ALFWORLD_SKILLS, self.skill_names, _SKILL_ALIASES)
        self.skill = self.all_skills = partial(skill_text, library)
        self._ids, self._parsed = {}, lru_cache(maxsize=512)(self._read)
        for option, value, least, most in (("house", house, 4, 12), ("detours", detours, 0, 100)):
            if not isinstance(value, int) or not least <= value <= most:
                raise UserError(f"{option}={value} must be a whole number from {least} to {most}")
        known = {alias: kind for kind, (group, _) in ALFWORLD_TYPES.items() for alias in (kind, group.lower())}
        wanted = str(task_types).lower().replace(" ", "").split(",") if task_types else list(known)
        if not set(wanted) <= set(known):
            raise UserError(f"task_types={task_types}: choose from {', '.join(ALFWORLD_TYPES)}, separated by commas")
        self.task_types = sorted({known[name] for name in wanted})
        path = find_data("alfworld", data)
        self._files = GameFiles(path) if path else None
        self.builtin = not (path and self._files.files)
        if self.builtin and path and (data or os.environ.get("ALFWORLD_DATA")):
            raise UserError(f"no game.tw-pddl in {path}; it lacks json_2.1.1/train: python envs.py download alfworld")
        sizes = _BUILT_IN_SIZES if self.builtin else Counter(name.split("/")[0] for name in self._files.files)
        sizes = ", ".join(f"{split} {size}" for split, size in sizes.items())
        self.source = f"ALFWorld in {path}: {sizes}" if not self.builtin else (
            f"built-in games (seed {seed}): {house} receptacles, {sizes}; for the real benchmark: "
            "python envs.py download alfworld")

    def tasks(self, split):
        """Sorted ids "split/task folder/trial folder" (built-in: "split/task type/number") of the solvable games."""
        if split not in self.splits:
            raise UserError(f"unknown split {split!r}; ALFWorld has {', '.join(self.splits)}")
        if split not in self._ids:
            kinds = self.task_types
            self._ids[split] = self._files.solvable(split, kinds) if not self.builtin else sorted(
                f"{split}/{kinds[i % len(kinds)]}/{i:05d}" for i in range(_BUILT_IN_SIZES[split]))
        if not self._ids[split]:
            raise UserError(f"no games in split {split} ({self.source}); check --data and task_types")
        return list(self._ids[split])

    def game(self, task_id):
        """An AlfworldGame, to be reset(). The last 512 games stay parsed, 110 KiB each: in a run of the paper's length
        (150 steps of 16 tasks, a panel of 128) no game is parsed twice."""
        return copy.copy(self._parsed(task_id))

    def _read(self, task_id):
        if not self.builtin:
            return AlfworldGame(self._files.read(task_id), f"{task_id} in {self._files.path}")
        split, kind, number = (task_id.split("/") + ["", ""])[:3]
        if task_id not in self.tasks(split):
            raise UserError(f"no built-in game {task_id!r}; see tasks(split)")
        return AlfworldGame(built_in_game(split, int(number), kind, self.seed, self.house))

    def start(self, task_id, seed=0, detours=None):
        """A new episode. `seed` and `detours` only decide how its expert searches."""
        return AlfworldSession(self.game(task_id), seed, self.detours if detours is None else detours)

    step = staticmethod(step_each)


class GameFiles:
    """The game files of a release, in a folder or in its zip, which is read in place. files: sorted id -> file."""

    def __init__(self, path):
        self.path, self._zip = path, None
        files = [*path.glob("*/*/*/game.tw-pddl"), *path.glob("json_2.1.*/*/*/*/game.tw-pddl")]
        if not files and (archives := [path] if path.is_file() else sorted(path.glob("json_2.1.*tw-pddl*.zip"))):
            self.path = archives[-1]
            try:
                self._zip = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError) as error:
                raise UserError(f"cannot read {self.path} as a zip archive ({error}); download it again") from None
            files = [name for name in self._zip.namelist() if name.endswith("/game.tw-pddl")]
        found = sorted(("/".join(Path(file).parts[-4:-1]), file) for file in files)
        self.files = {task_id: file for task_id, file in found if task_id.split("/")[0] in Alfworld.splits
                      and not re.search("movable|Sliced", task_id)}  # the original leaves these out

    def read(self, task_id):
        """The text of a game file. Raises UserError naming it."""
        if task_id not in self.files:
            raise UserError(f"no game {task_id!r} in {self.path}; see tasks(split)")
        try:
            file = self.files[task_id]
            return (self._zip.read(file) if self._zip else file.read_bytes()).decode("utf-8")
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise UserError(f"cannot read {task_id} in {self.path} ({error}); fetch it again") from None

    def solvable(self, split, kinds):
        """Sorted ids of a split's games of these task types, without those that the release marks as unsolvable."""
        ids = [name for name in self.files if name.startswith(split + "/") and any(kind in name for kind in kinds)]
        return [name for name in ids if not re.search(r'"solvable":\s*false', self.read(name)[-10_000:])]


def download_alfworld(folder, url=ALFWORLD_URL):
    """Fetches the official games into `folder` as a zip, which is played in place; returns its path. UserError."""
    path = Path(folder) / url.rsplit("/", 1)[-1]
    if not path.exists():
        download(url, path, ALFWORLD_SHA256 if url == ALFWORLD_URL else None)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
        broken = error
    if broken:
        path.unlink()
        raise UserError(f"{path} is damaged ({broken}); it was removed, download it again")
    print(Alfworld(path).source)
    return path


# ======== WebShop =====================================================================================================

WEBSHOP_FILES = {  # name -> id on Google Drive, from WebShop's setup.sh
    "items_shuffle_1000.json": "1EgHdxQ_YxqIQlvvq5iKlCrkEKR6-j0Ib",
    "items_ins_v2_1000.json": "1IduG0xl544V_A_jv3tHXC0kyFi7PnyBu",
    "items_shuffle.json": "1A2whVgOO0euk5O13n2iYDM0bQRkkRduB", "items_ins_v2.json": "1s2j6NgHljiZzQNL3veZaAiyW_qDEgBNi",
    "items_human_ins.json": "14Kb5SPBk_jfdLZ_CDBNitW98QLDlKR5O"}
WEBSHOP_URL = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"
PRODUCT_TEXTS = ("asin", "name", "category", "query", "product_category")
SEARCH_RESULTS, RESULTS_PER_PAGE, TEST_GOALS, PANEL_GOALS = 50, 10, 500, 128


def download_webshop(folder, full=False, url=WEBSHOP_URL):
    """Fetches the small (full: the 1.18 M) catalogue and the human instructions into `folder` and reads them to check.
    Raises UserError: no network, Drive's quota page instead of a file, a damaged file."""
    for name, drive_id in WEBSHOP_FILES.items():
        path = Path(folder) / name
        if name != "items_human_ins.json" and ("_1000" in name) == full:
            continue
        if not path.exists():
            download(url.format(drive_id), path)
        with open(path, "rb") as file:
            is_json = file.read(64).lstrip()[:1] in (b"[", b"{")
        if not is_json:
            path.unlink()
            raise UserError(f"Google Drive sent a page instead of {name} (its quota?); try later or fetch it in a "
                            f"browser: https://drive.google.com/uc?id={drive_id}")
    catalogue = Catalogue(folder, which="full" if full else "small")
    print(f"{folder}: {len(catalogue.asins)} products, {catalogue.n_goals} goals")


# ---- the catalogue ----

def stream_json(source, block=1 << 20, limit=1 << 26):
    """(key or None, value, first byte, last byte + 1) for every member of one JSON array or object, in bounded memory.
    `source`: a path or bytes. Read as Latin-1, where a character is a byte, so that a member's place can be kept and
    the member read again by itself; what is not ASCII is decoded twice. Raises UserError for anything broken."""
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"[\s,:]*")
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
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
                except ValueError:
                    more = file.read(block)
                    if not more or len(text) - at > limit:
                        raise ValueError(f"it breaks off or is damaged near byte {base + at}") from None
                    text, base, at = text[at:] + more.decode("latin-1"), base + at, 0
                    continue
                if not text[start:end].isascii():
                    value = json.loads(text[start:end].encode("latin-1"))
                yield key, value, base + start, base + end
                at = end
    except (OSError, ValueError, RecursionError) as error:
        name = "the catalogue" if isinstance(source, bytes) else source
        raise UserError(f"cannot read {name}: {error}; download it again") from None


def _prices(pricing):
    """The one or two prices of a product's "pricing" text, in dollars; [] if it has none."""
    numbers = [re.sub(r"[^\d.]", "", part) for part in (pricing or "").split("$")[1:]]
    return [float(number) for number in numbers if number.strip(".")][:2]


def _options(raw):
    """{option name: [values]} of a product as the shop shows them."""
    return {name.lower(): [str(value["value"]).strip().replace("/", " | ").lower() for value in values]
            for name, values in (raw.get("customization_options") or {}).items() if values is not None}


def _bullets(raw):
    bullets = raw.get("small_description")
    return [str(bullet) for bullet in bullets] if isinstance(bullets, list) else [str(bullets or "")]


def _text_nodes(*texts):
    """What the original's HTML parser leaves of text nodes: empty ones vanish, so do blank ones that hold a newline."""
    return [text.strip() for text in texts if text.strip(" \n\t\f\r") or (text and "\n" not in text)]


class Catalogue:
    """Products, prices, goals and search index, read-only and shared by all sessions.
    Kept per product: its place in the files, its price and its postings; texts are read again when needed (the last few
    thousand stay parsed), so that 1.18 M products fit in a few GB. `data`: a directory, or (products, instructions) as
    bytes; `which`: "small", "full" or None, the small one first. Raises UserError for missing or broken files."""

    def __init__(self, data, seed=233, human_goals=False, which=None, nouns=""):
        self.nouns = noun_finder(nouns)
        self.items, self.instructions, human = (*data, None) if isinstance(data, tuple) else self._find(data, which)
        self.asins, places, price_ranges, self._variants = [], [], [], []
        self.index = BM25(self._scan(places, price_ranges))
        self.index.tie_rank = np.argsort(np.argsort(np.array(self.asins, "U10")))  # Anserini: equal scores by id
        self._places = np.array(places, np.int64).reshape(-1, 2)
        self._instruction_places, self._attribute_counts = np.full((len(self.asins), 2), -1), Counter()
        numbers = {asin: number for number, asin in enumerate(self.asins)}
        wanted = sorted(self._read_instructions(numbers))
        self._human = self._read_human(human, numbers) if human_goals else {}
        if human_goals:
            wanted = [(number, i, i + 1) for number in sorted(self._human) for i in range(len(self._human[number]))]
        self.product = lru_cache(8192)(self._read_product)
        self._draw(seed, wanted, price_ranges)
        self.n_goals = len(self._goal_product)

    @staticmethod
    def _find(data, which):
        """Paths of the products, their instructions and the human goals."""
        for suffix in {"small": ["_1000"], "full": [""]}.get(which, ["_1000", ""]):
            files = [Path(data) / f"{name}{suffix}.json" for name in ("items_shuffle", "items_ins_v2")]
            if all(file.is_file() for file in files):
                return (*files, Path(data) / "items_human_ins.json")
        raise UserError(f"no {which + ' ' if which else ''}WebShop catalogue (items_shuffle*.json, items_ins_v2*.json) "
                        f"in {data}; run: python envs.py download webshop{'-full' if which == 'full' else ''}")

    def _scan(self, places, price_ranges):
        """Yields the text to index of every product (the original's convert_product_file_format.py); notes the rest."""
        seen = set()
        for _, raw, start, end in stream_json(self.items):
            try:
                if not all(isinstance(raw[name] or "", str) for name in PRODUCT_TEXTS):
                    raise TypeError("a field is no text")
                asin, options, price_range = raw["asin"], _options(raw), _prices(raw.get("pricing")) or [100.0]
                if asin == "nan" or len(asin) > 10 or asin in seen:
                    continue
                choices = ", and ".join(f"{name}: {', '.join(values)}" for name, values in options.items())
                text = " ".join([raw["name"] or "", raw.get("full_description") or "", *_bullets(raw)[:1], choices])
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise UserError(f"product {len(self.asins)} of the catalogue is not in WebShop's form ({error!r}); "
                                "download it again") from None
            seen.add(asin)
            self.asins.append(asin)
            places.append((start, end))
            price_ranges.append(price_range)
            self._variants.append(math.prod(map(len, options.values())))
            yield text.lower()

    def _read_instructions(self, numbers):
        """Yields (product, 0, how many goals: one for every combination of its options) and notes the attributes."""
        for asin, entry, *place in stream_json(self.instructions):
            if asin not in numbers:
                continue
            number, attributes = numbers[asin], isinstance(entry, dict) and entry.get("instruction_attributes")
            if not isinstance(entry, dict) or (entry.get("instruction") is not None and not attributes):
                raise UserError(f"{asin} has no sound entry in the file of instructions; download it again")
            self._instruction_places[number] = place
            if entry.get("instruction") is not None:
                yield number, 0, self._variants[number]
                self._attribute_counts.update(dict.fromkeys(attributes, self._variants[number]))

    @staticmethod
    def _read_human(file, numbers):
        """{product: the (instruction, attributes, options) of the goals that people wrote for it}"""
        if not file or not file.is_file():
            raise UserError("human goals need items_human_ins.json beside the catalogue; "
                            "run: python envs.py download webshop")
        try:
            return {numbers[asin]: [(entry["instruction"].strip("."), attributes, entry["instruction_options"])
                                    for entry in entries if (attributes := entry["instruction_attributes"])]
                    for asin, entries, _, _ in stream_json(file) if asin in numbers}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is not in WebShop's form ({error!r}); download it again") from None

    def _draw(self, seed, wanted, price_ranges):
        """Prices, price limits and the order of goals, from one seed as the original draws them. `wanted`: (product,
        first goal, last + 1) of the goals that share one draw of a limit."""
        rng = random.Random(seed)
        rng.getrandbits(32)  # the original's first rich.print takes one word from the same generator
        self.prices = np.array([low[0] if len(low) == 1 else rng.uniform(*low) for low in price_ranges])
        product, choice, limit = [], [], []
        for number, first, end in wanted:
            above = [10.0 * k for k in range(1, 100) if 10.0 * k > self.prices[number]][:4]
            top = max(rng.sample(above, 2)) if len(above) >= 2 else 1000000
            product += [number] * (end - first)
            choice += range(first, end)
            limit += [top] * (end - first)
        order = list(range(len(product)))
        rng.seed(seed)
        rng.shuffle(order)
        self._goal_product, self._goal_choice = np.array(product, np.int32)[order], np.array(choice, np.int32)[order]
        self._goal_limit = np.array(limit, np.float64)[order]

    @staticmethod
    def _read(source, place):
        """One member of a file, from its (first byte, last byte + 1)."""
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            file.seek(place[0])
            return json.loads(file.read(place[1] - place[0]))

    def _read_product(self, number):
        """A product as the shop shows it, with the parts of its pages that never change."""
        raw, place = self._read(self.items, self._places[number]), self._instruction_places[number]
        known = self._read(self.instructions, place) if place[0] >= 0 else {}
        title, options, description = raw["name"] or "", _options(raw), raw.get("full_description") or ""
        price = " to ".join(f"${price}" for price in _prices(raw.get("pricing")) or [100.0])
        clickables = dict.fromkeys(("back to search", "< prev", "description", "features", "reviews", "buy now"))
        clickables.update((value, name) for name, values in options.items() for value in values)
        shown = [text for name, values in options.items() for text in (name, *values)]
        return {"number": number, "asin": raw["asin"], "title": title, "options": options, "clickables": clickables,
                "category": raw["category"] or "", "query": (raw["query"] or "").lower().strip(),
                "product_category": raw["product_category"] or "",
                "attributes": known.get("attributes", ["DUMMY_ATTR"]), "instruction": known.get("instruction"),
                "instruction_attributes": known.get("instruction_attributes"),
                "texts": (title.lower(), " ".join(_bullets(raw)).lower(), description.lower()),
                "line": _text_nodes(raw["asin"], title, price), "reviews page": [],
                "item page": [*_text_nodes(*shown, title), f"Price: {price}", "Rating: N.A.", "Description", "Features",
                              "Reviews", "Buy Now"],
                "description page": _text_nodes(description),
                "features page": _text_nodes(*(" " + bullet for bullet in _bullets(raw)))}

    def goal(self, i):
        """Goal number i, in the shuffled order, as the original's dictionary; made anew, for there can be millions."""
        number, choice, limit = int(self._goal_product[i]), int(self._goal_choice[i]), float(self._goal_limit[i])
        product = self.product(number)
        if self._human:
            (text, attributes, options), weight = self._human[number][choice], 1
        else:
            options, attributes = {}, product["instruction_attributes"]
            for name in sorted(product["options"], reverse=True):  # the last option name varies fastest
                values = product["options"][name]
                options, choice = {name: values[choice % len(values)], **options}, choice // len(values)
            chosen = ", and ".join(f"{name}: {value}" for name, value in options.items())
            text = product["instruction"] + (" with " + chosen if chosen else "")
            weight = sum(1. / self._attribute_counts[attribute] for attribute in attributes) / len(attributes)
        text += f", and price lower than {limit:.2f} dollars" if limit < 1000000 else ""
        same = {name: product[name] for name in ("asin", "category", "query", "product_category")}
        return {**same, "name": product["title"], "instruction_text": text, "attributes": attributes,
                "price_upper": limit, "goal_options": options, "weight": weight}

    def search(self, keywords, rng=random):
        """Product numbers for the words of a query, at most 50; <r>, <a>, <c>, <q> are special queries there."""
        everything = range(len(self.asins))
        field = {"<a>": "attributes", "<c>": "category", "<q>": "query"}.get(keywords[0])
        if keywords[0] == "<r>":
            return rng.sample(everything, min(SEARCH_RESULTS, len(everything)))
        if field:
            wanted, found = " ".join(keywords[1:]).strip(), ((i, self.product(i)[field]) for i in everything)
            return [i for i, value in found if wanted == value or (field == "attributes" and wanted in value)]
        return self.index.search(" ".join(keywords), SEARCH_RESULTS)[0].tolist()


# ---- the reward ----

COLORS = """
alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel camo
caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream crystal dark
denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather indigo ivory ivy
khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom
mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire seashell
silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet walnut wheat white wine
yellow""".split()
# In titles a tagger calls nearly every capitalised word a name. Not these, nor the adjectives in lower case, nor what
# _NO_WORD finds: possessives, numbers before units, "oz" before a word, Slip in Non-Slip, a colour that ends a title
_NOT_NOUNS = frozenset("""
a an the this that these those my your his her its our their i you he she it we they me him them who which what whose
and or but nor so yet if then than as when where how why not no of in on at by for with from to into onto under above
below between through during without within against around up out about after before behind like per via upon is are was
were be been being do does did has have had can could will would should may might must any both every each all some such
own only more very too just also even still ever once many well one two three four five six seven eight nine ten twelve
includes included including make made makes designed comes used get need full fully large x etc""".split())
_ADJECTIVES = frozenset("high low new free easy deep natural black white blue".split())
_NO_WORD = re.compile(r"""['\u2019]s\b|(?<=\b[Nn]on-)[^\W\d_]+|,\ (?:black|white|Black|White)$|\boz\b(?=\ [A-Z])
    |(?<![\w.])[\d.]+(?=(?i:[kmgt]b|[kmc]?m|k?g|k)\b)""", re.X)
_TITLE_WORD = re.compile(r"[^\W_]+(?:[-/,.&+'][0-9][^\W_]*|[&+.'][^\W_]+)*|[|%]")  # as spaCy cuts them; it tags | and %


def _normal_color(option):
    """The first colour word inside an option's text; inside a (name, value) pair only a whole value counts."""
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
    """thefuzz.fuzz.token_set_ratio (rapidfuzz): 0..100, on lower-case ASCII words; what is no str is taken by str()."""
    words_a, words_b = ({*re.sub(r"\W", " ", re.sub(r"[^\x00-\x7f]", "", str(text)).lower()).split()}
                        for text in (first, second))
    both, only_a, only_b = (" ".join(sorted(part))
                            for part in (words_a & words_b, words_a - words_b, words_b - words_a))
    if not words_a or not words_b:
        return 0
    if both and not (only_a and only_b):
        return 100
    gap = bool(both)
    length_a, length_b = len(both) + gap + len(only_a), len(both) + gap + len(only_b)
    different = len(only_a) + len(only_b) - 2 * _common_length(only_a, only_b)
    ratios = [1 - different / (length_a + length_b)]
    if both:
        ratios += [2 * len(both) / (len(both) + length) for length in (length_a, length_b)]
    return round(100 * max(ratios))


@lru_cache(8192)
def title_nouns(title):
    """The words of a title that the original's tagger (spaCy's en_core_web_sm) calls nouns, by rule. In the small
    catalogue r_type agrees in 92.3 % of the pairs of a title and its ten nearest, in 98.4 % of all pairs."""
    found = _TITLE_WORD.findall(_NO_WORD.sub(" ", title))
    return [word.lower() for word in found if word.lower() not in _NOT_NOUNS and word not in _ADJECTIVES
            and not re.search(r"([^aeiou])\1ed$", word) and not re.match(r"\d(?!\d*(?:ml|pcs|[dD])$)", word)]


def noun_finder(model=""):
    """The function title -> nouns: title_nouns, or what a spaCy model of that name says (the original's is called
    en_core_web_sm). UserError where it is not installed."""
    if not model:
        return title_nouns
    try:
        import spacy
        tagger = spacy.load(model)
    except (ImportError, OSError) as error:
        raise UserError(f"nouns={model} needs the package spacy and that model ({one_line(str(error))}); leave it out "
                        "for the built-in rule") from None
    return lru_cache(8192)(lambda title: [x.text.lower() for x in tagger(title) if x.pos_ in ("NOUN", "PROPN")])


def type_reward(wanted, bought, match):
    """(r_type, title score) of the nouns of two titles; match: whether query or category are the same."""
    title_score = len(set(wanted) & set(bought)) / len(wanted) if wanted else 0.2
    r_type = 1.0 if match or title_score > 0.2 else 0.5
    return 0.0 if title_score == 0 else 0.1 if title_score < 0.1 else r_type, title_score


def shop_reward(product, goal, price, chosen, nouns=title_nouns):
    """(reward 0..1, its parts) for buying `product` at `price` with `chosen` options; goal.py's get_reward."""
    query_match = product["query"] == goal["query"]
    levels, goal_levels = ({part.strip() for part in x["product_category"].split("\u203a")} for x in (product, goal))
    category_match = len(levels & goal_levels) >= 2
    r_type, title_score = type_reward(nouns(goal["name"]), nouns(product["title"]), query_match or category_match)
    attributes = goal["attributes"]
    n_attributes = sum(any(token_set_ratio(have, want) > 85 for have in product["attributes"])
                       or any(want in text for text in product["texts"]) for want in attributes)
    options = goal["goal_options"].items() if isinstance(goal["goal_options"], dict) else goal["goal_options"]
    have = [_normal_color(value) for value in chosen.values()]
    n_options = sum(any(token_set_ratio(value, want) > 85 for value in have) for want in map(_normal_color, options))
    r_price = bool(price <= goal["price_upper"])
    reward = (n_attributes + n_options + r_price) / (len(attributes) + len(options) + 1) * r_type
    return reward, {"r_type": r_type, "r_att": n_attributes / len(attributes), "query_match": query_match,
                    "category_match": category_match, "title_score": title_score, "r_price": r_price,
                    "r_option": n_options / len(options) if options else None, "price": float(price)}


# ---- the shop ----

DONE_PAGE = ("Thank you for shopping with us!|Your code:|None|(Paste it in your MTurk interface.)|Purchased|asin|"
             "{asin}|options|{options}|attrs|None|category|None|query|None|product category|None|Target|asin|options|"
             "attrs|price upper|instuction text|category|product category|query|Goal|None|Reward|"
             "Your score (min 0.0, max 1.0)|{reward}|Reward Details|None")


def parse_shop_action(action):
    """(name, lower-case argument) of "name[argument]" as the original's pattern (.+)\\[(.+)\\] takes it, in linear
    time; the argument is None if the text is not of that form."""
    line = action.split("\n", 1)[0]
    close = line.rfind("]")
    start = line.rfind("[", 1, max(close - 1, 0))
    return (line[:start], line[start + 1:close].lower()) if start > 0 else (line, None)


class WebShop:
    """One shopping session in the original's text mode, on a Catalogue that all share."""

    def __init__(self, catalogue, seed=233, page_size=RESULTS_PER_PAGE):
        self.catalogue, self.page_size, self.rng = catalogue, page_size, random.Random(seed)

    def reset(self, goal_index):
        """Opens the search page of a goal; returns the observation."""
        self.goal, self.done, self.details = self.catalogue.goal(goal_index), False, {}
        self.sought = int(self.catalogue._goal_product[goal_index])
        self.task = _text_nodes(self.goal["instruction_text"])
        self._home()
        return self.observation

    def _show(self, kind, clickables, *parts):
        """Makes a page the current one; `parts` are what follows the instruction."""
        self.kind, self.clickables, self.parts = kind, clickables, parts
        head = () if kind == "done" else ("Instruction:", *self.task)
        self.observation = " [SEP] ".join((*(("WebShop",) if kind == "search" else ()), *head, *parts))

    def _home(self):
        self.product, self.options = None, {}
        self._show("search", {"search": None}, "Search")

    def _results(self, page):
        self.page, self.product, self.options = page, None, {}
        shown = [self.catalogue.product(i) for i in self.found[(page - 1) * self.page_size:page * self.page_size]]
        self.links = {product["asin"].lower(): product for product in shown}
        buttons = ["< Prev", "Next >"] if page > 1 else ["Next >"]
        clickables = dict.fromkeys(["back to search", *map(str.lower, buttons), *self.links])
        self._show("results", clickables, "Back to Search", f"Page {page} (Total results: {len(self.found)})",
                   *buttons, *(part for product in shown for part in product["line"]))

    def _buy(self):
        price = self.catalogue.prices[self.product["number"]]
        reward, self.details = shop_reward(self.product, self.goal, price, self.options, self.catalogue.nouns)
        self.details.update(asin=self.product["asin"], options=self.options, reward=reward)
        options = re.sub("[<>&']", lambda letter: f"\\u{ord(letter[0]):04x}", json.dumps(self.options, sort_keys=True))
        filled = {"{asin}": self.product["asin"], "{options}": options, "{reward}": str(reward)}
        self.done = True
        self._show("done", {}, *(filled.get(part, part) for part in DONE_PAGE.split("|")))
        return self.observation, reward, True

    def step(self, action):
        """(observation, reward, done) after search[words] or click[a clickable]; anything else changes nothing."""
        name, argument = parse_shop_action(action)
        if name == "search" and argument and not self.done:
            self.found = self.catalogue.search(argument.split(" "), self.rng)
            self._results(1)
        elif name == "click" and argument in self.clickables and argument != "search":
            if argument == "buy now":
                return self._buy()
            self._click(argument)
        return self.observation, 0.0, self.done

    def _click(self, name):
        if name == "back to search":
            self._home()
        elif self.kind == "results" and name in ("next >", "< prev"):
            self._results(self.page + (1 if name == "next >" else -1))
        elif name == "< prev" and self.kind == "item":
            self._results(self.page)
        elif name in ("description", "features", "reviews"):
            self._show("part", dict.fromkeys(("back to search", "< prev")), "Back to Search", "< Prev",
                       *self.product[name + " page"])
        else:
            if self.kind == "results":
                self.product = self.links[name]
            elif name != "< prev":
                self.options = {**self.options, self.clickables[name]: name}
            self._show("item", self.product["clickables"], "Back to Search", "< Prev", *self.product["item page"])


# ---- the built-in catalogue ----

# skill category: WebShop's category | product types | attributes | options
SHOP_WORLD = _table("""
apparel: fashion|shirt,dress,jacket,jeans,sweater|machine wash,slim fit,long sleeve,cotton blend,quick dry|
    color:black,navy,red,white|size:small,medium,large
footwear: fashion|sneakers,boots,sandals,loafers,slippers|rubber sole,anti slip,memory foam,arch support,
    wide toe|color:black,brown,tan|size:7,8,9,10
home_decor: garden|lamp,rug,curtain,pillow,vase|easy clean,hand painted,solid wood,space saving,
    fade resistant|color:beige,grey,blue|style:plain,classic
electronics: electronics|charger,cable,speaker,headphones,camera|fast charging,high speed,noise cancelling,
    long lasting,plug play|color:black,white|pack:1 pack,2 pack
accessories: fashion|wallet,belt,watch,hat,backpack|water resistant,genuine leather,light weight,gift ready,
    easy carry|color:brown,black,green
beauty_health: beauty|shampoo,lotion,serum,soap,lipstick|cruelty free,sulfate free,tea tree,dry skin,
    travel size|scent:rose,mint,lemon|size:2 ounce,8 ounce
other: grocery|cookies,coffee,pasta,almonds,popcorn|gluten free,low sugar,plant based,non gmo,nut free|
    flavor:original,spicy,honey|count:6 count,12 count""")
SHOP_BRANDS = "Alder Birk Corvin Dunmore Elwick Farrow Garnet".split()


def build_catalogue(seed):
    """245 invented products over the seven categories, as the bytes of the benchmark's two files."""
    rng, products, instructions = random.Random(seed), [], {}
    for path, spec in SHOP_WORLD.items():
        category, kinds, attributes, *options = spec.split("|")
        for kind, brand in itertools.product(kinds.split(","), SHOP_BRANDS):
            asin, (first, second, third) = f"B{len(products) + 1:03d}", rng.sample(attributes.split(","), 3)
            low, choices = rng.randrange(500, 9000) / 100, {}
            for name, values in (option.split(":") for option in options):
                values = values.split(",")
                choices[name] = [{"value": value} for value in rng.sample(values, rng.randint(2, len(values)))]
            products.append({
                "asin": asin, "name": f"{brand} {kind.title()}, {first.title()}", "category": category, "query": kind,
                "product_category": f"Shop \u203a {path} \u203a {kind}", "full_description": f"A {kind} by {brand}.",
                "pricing": f"${low}" if rng.random() < 0.5 else f"${low} - ${low + 5:.2f}",
                "small_description": [second, third], "customization_options": choices})
            instructions[asin] = {"attributes": [first, second, third], "instruction_attributes": [second, first],
                                  "instruction": f"Find me {second} {kind} with {first}"}
    rng.shuffle(products)
    return json.dumps(products).encode(), json.dumps(instructions).encode()


# ---- skills ----

SHOP_SKILLS = _table("""
general: Search for the product type with its two or three most telling words, not the whole sentence. Open the result
    whose title fits, choose every option the task names, compare the price with the limit, then buy. Full reward needs
    type, attributes, options and price to match.
mistakes: Buying before all options are chosen. Repeating a failed search instead of rewording it. Reading every
    description: titles usually decide. Going back after choosing options: they are lost. Never buying: that scores
    zero.
apparel: Name the garment and who wears it (men's, women's) in the search, with fit or sleeve. Then choose color, size
    and fit type. Sizes are labels such as xx-large: take exactly the one asked for.
footwear: Search the kind of shoe with its sole or closure (rubber sole, slip on). Then pick color and the exact size;
    sizes may be plain numbers or pairs for women and men. Shoes often show a price range: check the limit.
home_decor: Search the piece and its room or material. Many options are dimensions: match every number and unit. Colors
    may have long names or codes; choose the one the task spells out.
electronics: Search the device with its key function or connector (usb, bluetooth, hdmi). Look out for capacity, length
    and pack options, and do not take an accessory for the device itself.
accessories: Search the item and its material or use. Often color is the only option, sometimes a size or pattern code:
    read the whole label before choosing.
beauty_health: Search the product with the hair or skin type and the claim (cruelty free, tea tree). Options are scent,
    shade or volume: choose the exact amount, such as 8 ounce.
other: Search the product with its dietary or material claim (gluten free, non gmo). Options are flavor and count:
    choose both, and check that the price of the pack stays under the limit.""")
SHOP_KEYWORDS = {name: re.compile(rf"\b(?:{pattern})(?:s|es)?\b", re.I) for name, pattern in _table("""
apparel: shirt|tee|henley|polo|blouse|top|tunic|dresse?|skirt|pants?|jean|short|legging|jacket|coat|sweater|hoodie|
    sweatshirt|suit|blazer|tuxedo|jumpsuit|romper|overall|swimsuit|swimwear|bikini|underwear|bra|brief|lingerie|pajama|
    sock|vest|cardigan|tank|clothing|active ?wear|sleeve|slim fit|classic fit|sleep & lounge|costume
footwear: shoe|boot|sneaker|sandal|slipper|loafer|slip-on|pump|flats|oxford|clog|mule|footwear|rubber (?:out)?sole
home_decor: pillow|rug|curtain|drape|lamp|lighting|chandelier|sconce|vase|candle|decor|furniture|table|chair|desk|sofa|
    couch|bed|mattresse?|bedroom|living room|dining room|kitchen|shelve?|bookcase|cabinet|ottoman|bench|stool|rack|
    mirror|blanket|bedding|mat|artwork|wall|window|furnishing|island|vanitie|bedframe|throw
electronics: phone|charger|cable|speaker|headphone|earbud|batterie|battery|adapter|usb|camera|laptop|computer|tablet|
    monitor|tv|television|hdmi|bluetooth|projector|printer|drive|memory|receiver|amplifier|antenna|radio|keyboard|
    router|binocular|telescope|lense?|flashe?|tripod|stereo|home theater|screen protector|remote|console|wireless|
    video|audio|media|iphone|gaming|photography|wearable
accessories: bag|wallet|belt|watch|sunglasse|hat|scarf|glove|jewelry|necklace|earring|bracelet|backpack|purse|handbag|
    cap|beanie|necktie|umbrella|luggage|keychain
beauty_health: shampoo|conditioner|cream|lotion|makeup|brushe?|serum|moisturizer|soap|hair|skin|nail|lip|lipstick|eye|
    face|facial|body|fragrance|perfume|cologne|deodorant|toothbrushe?|toothpaste|teeth|dental|oral|mask|wig|
    shav(?:e|ing)|razor|beauty|foot|massage|spa|cosmetic|sunscreen|bath|mascara|eyelashe?|tea tree|essential oil|
    cruelty free|scrub
other: snack|food|cheese|milk|candy|meat|sugar|gmo|gluten|kosher|usda|keto|coffee|sauce|beverage|drink|toy|
    gift set""").items()}


def shop_category(instruction):
    """The skill category of a goal, from its instruction alone: most key words, whole words only, options left out."""
    text = re.split(r" with [^,:]*: |, and price lower", instruction)[0]
    hits = {category: pattern.findall(text) for category, pattern in SHOP_KEYWORDS.items()}
    best = max(hits, key=lambda category: len(hits[category]))
    return best if hits[best] else "other"


# ---- the environment as sdar.py and eval.py see it ----

class ShopSession:
    """One episode on one goal; attributes as in every environment of this file."""

    def __init__(self, shop, goal_index):
        shop.reset(goal_index)
        self.shop, self.turns, self.action = shop, [], ""
        self.task = " ".join(shop.goal["instruction_text"].split())
        self.category = self.group = shop_category(self.task)
        self.valid, self.admissible, self.done, self.won, self.score, self.details = True, True, False, False, 0.0, {}

    @property
    def observation(self):
        """The page without the instruction, each part in quotes (the public code's format)."""
        return " [SEP] ".join(f"'{part}'" for part in self.shop.parts)

    def step(self, response, think_closed=False):
        """Plays a raw response."""
        action, self.valid = parse_action(response, think_closed, 20)  # as the public webshop_projection has it
        action = action[:2000]
        self.action = one_line(action, 300)
        self.turns.append((self.observation, self.action))
        name, argument = parse_shop_action(action)
        self.admissible = bool(argument) and (name == "search" and self.shop.kind == "search" or name == "click"
                                              and argument in self.shop.clickables and argument != "search")
        _, reward, self.done = self.shop.step(action)
        self.score, self.won, self.details = float(reward), reward == 1.0, self.shop.details

    def prompt(self, skill="", history=2, room=None, brief=False):
        """The user message of this turn; `room` cuts every observation in it in the middle (in characters)."""
        past, count = last_turns(self.turns, history, room), len(self.turns)
        if brief:  # clickable parts in brackets: observation and admissible actions in one
            page = " ".join(f"[{part.lower()}]" if part.lower() in self.shop.clickables else part
                            for part in self.shop.parts)
            did = past and "did: " + " > ".join(action for _, _, action in past)
            return "\n".join(filter(None, [skill, self.task, did, shorten_middle(page, room)]))
        steps = "\n".join(QUOTED_TURN.format(*turn) for turn in past)
        if past:
            steps = f"Steps taken so far: {count}. The last {len(past)} with what you saw:\n{steps}\n"
        offered = ["search[<your query>]"] if self.shop.kind == "search" else []
        offered += [f"click[{name}]" for name in self.shop.clickables]
        skill = skill + "\n\n" if skill else ""
        return (f"{skill}You are an agent that shops in the online store WebShop.\n"
                f"Your task is: {self.task}\n{steps}This is step {count + 1}; you now see: "
                f"{shorten_middle(self.observation, room)}\nThe admissible actions are:\n[\n"
                + "".join(f"'{action}',\n" for action in offered) + "]\n\nReason first, step by step, between <think> "
                "and </think>: which admissible action brings you closer to what the task asks for? Then write that "
                "one action between <action> and </action>.")

    def _query(self):
        """The expert's search words: the goal's own if they bring the product within two pages, else its title."""
        goal, catalogue = self.shop.goal, self.shop.catalogue
        wanted, options = f"{' '.join(goal['attributes'])} {goal['query']}", goal["goal_options"]
        options = " ".join(options.values() if isinstance(options, dict) else options)
        for words in (wanted, f"{wanted} {options}", goal["name"], goal["instruction_text"]):
            words = " ".join(re.sub(r"[\[\]]", " ", words).split())
            if self.shop.sought in catalogue.search(words.lower().split(" "))[:2 * self.shop.page_size]:
                break
        return words

    def _missing_option(self):
        """An option of the goal that is still to be clicked, or None."""
        shop, goal = self.shop, self.shop.goal["goal_options"]
        offered = {value: name for value, name in shop.clickables.items()
                   if name and parse_shop_action(f"click[{value}]")[1] == value}
        if isinstance(goal, dict):
            return next((value for value, name in offered.items()
                         if goal.get(name) == value != shop.options.get(name)), None)
        for want in goal:
            close = [value for value in offered if token_set_ratio(value, want) > 85]
            if close and not set(close) & set(shop.options.values()):
                return min(close, key=lambda value: (value != want, len(value)))
        return None

    def expert(self):
        """What a shopper who knows the product sought would answer now."""
        shop = self.shop
        if shop.kind == "search":
            thought, action = "I search for the product with its main features.", f"search[{self._query()}]"
        elif shop.kind == "results":
            asin = shop.catalogue.asins[shop.sought].lower()
            if asin in shop.links:
                thought, action = "This product fits the task.", f"click[{asin}]"
            elif shop.sought in shop.found[shop.page * shop.page_size:]:
                thought, action = "Nothing here fits; I look at the next page.", "click[next >]"
            else:
                thought, action = "This search does not help; I start again.", "click[back to search]"
        elif shop.kind == "part" or shop.product["number"] != shop.sought:
            thought, action = "I go back.", "click[< prev]"
        else:
            option = self._missing_option()
            thought, action = ("The task asks for this option.", f"click[{option}]") if option else (
                "Product and options match; I buy it.", "click[buy now]")
        return f"<think>{thought}</think><action>{action}</action>"


class WebShopEnv:
    """WebShop for training and evaluation. `data`: a directory (see find_data), else an invented catalogue.
    Splits: "train" (all goals but the first 500), "test" (a fixed panel of 128 of those 500), "test500" (all of them).
    Goals of "train" that are the same product and the same instruction as one of the 500 are left out.
    Options: human_goals; catalogue "small" or "full"; nouns: see noun_finder."""

    stop, splits, skill_names = ("</action>",), ("train", "test", "test500"), list(SHOP_KEYWORDS)

    def __init__(self, data=None, seed=233, skills=None, human_goals=False, catalogue=None, nouns=""):
        if catalogue not in (None, "small", "full") or human_goals not in (0, 1):
            raise UserError("catalogue is small or full, human_goals 0 or 1")
        path = find_data("webshop", data)
        self.builtin = path is None
        source = build_catalogue(seed) if self.builtin else path
        self.catalogue = Catalogue(source, seed, human_goals, catalogue, nouns)
        self._page_size = 5 if self.builtin else RESULTS_PER_PAGE  # 5: few products, yet pages to turn
        self.skill = self.all_skills = partial(skill_text, read_skills(skills, SHOP_SKILLS, self.skill_names))
        count = self.catalogue.n_goals
        held_out = min(TEST_GOALS, count // 4)
        panel = sorted(random.Random(233).sample(range(held_out), min(PANEL_GOALS, held_out)))
        self._goals = {"train": self._unseen(held_out, count), "test": np.array(panel, int),
                       "test500": np.arange(held_out)}
        kind = "an invented catalogue (the real one: python envs.py download webshop)" if self.builtin else str(path)
        self.source = (f"{kind}: {len(self.catalogue.asins)} products, {count} goals, {len(self._goals['train'])} "
                       f"for training; test: {len(panel)} of the first {held_out}")

    def _unseen(self, held_out, count):
        """Indices of the training goals: no product with the same instruction is among the test goals."""
        products, goal = self.catalogue._goal_product, self.catalogue.goal
        tested = {(products[i], goal(i)["instruction_text"]) for i in range(held_out)}
        shared = held_out + np.flatnonzero(np.isin(products[held_out:], products[:held_out]))
        seen = [i for i in shared if (products[i], goal(i)["instruction_text"]) in tested]
        return np.setdiff1d(np.arange(held_out, count), seen)

    def tasks(self, split):
        """Sorted task ids such as "test/goal-00012". Raises UserError for an unknown or empty split."""
        if not len(self._goals.get(split, ())):
            raise UserError(f"WebShop has no tasks in split {split!r}; its splits are {', '.join(self.splits)}")
        return [f"{split}/goal-{i:05d}" for i in self._goals[split].tolist()]

    def start(self, task_id, seed=0):
        """A new session on a task; `seed` decides only what the special query <r> shows."""
        found = re.fullmatch(r"(\w+)/goal-(\d{5,12})", str(task_id), re.ASCII)
        if not found or int(found[2]) not in self._goals.get(found[1], ()):
            raise UserError(f"WebShop has no task {task_id!r}; ask tasks(split) for them")
        return ShopSession(WebShop(self.catalogue, seed, self._page_size), int(found[2]))

    step = staticmethod(step_each)


# ======== Search-QA ===================================================================================================

SEARCH_DATASETS = ("NQ", "TriviaQA", "PopQA", "HotpotQA", "2Wiki", "MuSiQue", "Bamboogle")  # the paper's columns
DATASET_ALIASES = {"hotpot": "HotpotQA", "2wikimultihopqa": "2Wiki", **{name.lower(): name for name in SEARCH_DATASETS}}
MAX_QUERY, MAX_ANSWER, MAX_PASSAGE, MAX_REPLY = 400, 1000, 4000, 1 << 28  # characters kept; bytes read from a server
SEARCH_SKILLS = _table("""
general: Name the missing fact before searching. Query with the entity's full name and the wanted property. Check that a
    passage speaks of the right entity; answer once one states the fact, or in the last turn.
direct_retrieval: One passage usually holds the answer. Search the question's rarest words together. If the passages
    miss, try synonyms or the likely page title, not the same query. Answer in the passage's words.
entity_attribute_lookup: Search the entity's exact name plus the property (birthplace, genre, capital). Where several
    entities share a name, add occupation, year or country. Answer with the property's value alone.
multi_hop_reasoning: Find the innermost entity first: who made, led or founded the thing. Put the name found into the
    next query, with the next property. One link per search. Answer the outermost question.
compare: Search each candidate by itself and note its date, number or place. Compare when both are known; mind the
    direction: older means the earlier year. Answer what is asked: candidate, property, or yes or no.
mistakes: Common mistakes: answering from memory while searches are left; repeating a failed query; searching and
    answering in one response; explaining inside the answer tags instead of giving the bare fact.""")
DIRECT, ATTRIBUTE, HOPS, COMPARE = SEARCH_CATEGORIES = tuple(SEARCH_SKILLS)[1:5]
Question = namedtuple("Question", "id text answers group chain", defaults=((),))  # chain: queries that lead to it
COMPARING = re.compile(r"^(which|who|what|where|are|is|was|were|do|does|did|between)\b.*\bor\b|\b(both|same|share)\b.*"
                       r"\band\b|\band\b.*\b(both|same|share|in common)\b|\b(older|elder|younger|earlier|later|first|"
                       r"larger|bigger|smaller|longer|taller|higher|more|fewer)\b.*(\bor\b|\bof\b.*\band\b)", re.I)
RELATION = re.compile(r"\b(of|by|whose|that|who|which|where|when|birthplace)\b|['\u2019]s\b", re.I)
PROPERTY = re.compile(r"\b(occupation|genre|capital|director|producer|screenwriter|composer|author|religion|sport|"
                      r"mother|father|country|born|river|colou?r)\b|^what (is|was) the \w+ of\b", re.I)


def normalize_answer(text):
    """SQuAD normalisation: lower case, no ASCII punctuation, no articles, single spaces (Search-R1, qa_em.py)."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def score_answer(prediction, golden):
    """(exact match, F1), each the best over the golden answers; for F1, yes, no and noanswer count only as a whole."""
    words, best = normalize_answer(prediction), 0.0
    golden = [normalize_answer(answer) for answer in golden]
    for answer in golden:
        if words == answer or not {words, answer} & {"yes", "no", "noanswer"}:
            shared = sum((Counter(words.split()) & Counter(answer.split())).values())
            best = max(best, 2 * shared / max(1, len(words.split()) + len(answer.split())))
    return float(words in golden), best


def parse_search(response):
    """Response text -> (kind "search" | "answer" | "", content, valid), in linear time. As the public projection.py
    has it: what follows the first </search> (else </answer>) is dropped, a whole search block goes before an answer
    block, and exactly one opening tag is valid. <think> is never demanded."""
    closed = [tag for tag in ("</search>", "</answer>") if tag in response]
    trimmed = response[:response.index(closed[0]) + len(closed[0])] if closed else response
    for kind in ("search", "answer"):
        start = re.compile(f"<{kind}>", re.I).search(trimmed)
        end = start and re.compile(f"</{kind}>", re.I).search(trimmed, start.end())  # none here: none for a later tag
        if end:
            valid = len(re.findall("<(?:search|answer)>", response, re.I)) == 1
            return kind, trimmed[start.end():end.start()].strip(), valid
    return "", "", False


def search_category(text, group):
    """Skill category: from the data set where that tells, else from the question, on whole words."""
    known = {"NQ": DIRECT, "TriviaQA": DIRECT, "PopQA": ATTRIBUTE, **{name: name for name in SEARCH_CATEGORIES}}
    if group in known or COMPARING.search(text[:1000]):
        return known.get(group, COMPARE)
    if group in SEARCH_DATASETS or len(RELATION.findall(text.partition(" ")[2])) > 1:
        return HOPS
    return ATTRIBUTE if PROPERTY.search(text) else DIRECT


# ---- questions and passages ----

def read_rows(path):
    """(line number, dict) of a .jsonl, .jsonl.gz or, where pyarrow is installed, .parquet file; else UserError."""
    number = 0
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet
            batches = parquet.ParquetFile(path).iter_batches(1000)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
            return
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, dict(json.loads(line).items())  # AttributeError for anything but an object
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow; pip install pyarrow, or convert the file to JSONL") from None
    except (OSError, EOFError, zlib.error, ValueError, AttributeError, RecursionError) as error:  # pyarrow's among them
        raise UserError(f"{path}, line {number}: {one_line(str(error))}; mend the file or fetch it again") from None


def read_question(path, number, row):
    """One row in any of the known layouts -> Question; UserError naming the line if it is none."""
    extra, reward = (row[key] if isinstance(row.get(key), dict) else {} for key in ("extra_info", "reward_model"))
    truth = reward.get("ground_truth")
    given = (row.get("golden_answers"), truth["target"] if isinstance(truth, dict) and "target" in truth else truth,
             row.get("answers"), row.get("answer"))
    answers = next((value if isinstance(value, list) else [value] for value in given if value), [])
    text = row.get("question") or extra.get("question")
    plain = answers and all(isinstance(answer, (str, int, float)) for answer in answers)
    if not isinstance(text, str) or not text.strip() or not plain:
        raise UserError(f"{path}, line {number}: no `question` with answers (golden_answers, answers, answer or "
                        "reward_model.ground_truth.target: a text or a list of texts); mend the line or take it out")
    named = str(row.get("data_source") or row.get("dataset") or "")
    found = {DATASET_ALIASES.get(word) for word in re.split("[^a-z0-9]+", (named or path.name).lower())} - {None}
    group = found.pop() if len(found) == 1 else named or "other"
    key = row.get("id", row.get("idx", extra.get("index")))
    key = panel_hash([text.encode("ascii", "replace").decode()]) if key is None else key
    answers = tuple(encodable(str(answer)) for answer in answers)
    return Question(one_line(f"{group}/{key}"), encodable(text).strip(), answers, group)


def load_questions(path):
    """File or folder -> ({split: {id: Question}}, passage files in the folder). Split by file name (a word in it begins
    with train, dev, val or test), else by hash of the id (20 % test); wordings found in another split are taken out of
    train."""
    splits, passages, folder = {"train": {}, "test": {}}, [], path.is_dir()
    for file in sorted(path.iterdir()) if folder else [path]:
        named = re.search("(?<![a-z])(?:train|test|dev|val)", file.name.lower())
        rows = read_rows(file) if not folder or file.name.endswith((".jsonl", ".jsonl.gz", ".parquet")) else ()
        for count, (number, row) in enumerate(rows):
            if folder and not count and "question" not in row and "extra_info" not in row:
                passages += [file] if "contents" in row else []
                break  # another kind of file: passages, predictions
            question = read_question(file, number, row)
            drawn = "test" if int(panel_hash([question.id])[:4], 16) < 0.2 * 65536 else "train"
            split = splits.setdefault(named[0].replace("val", "dev") if named else drawn, {})
            if any(other.get(question.id, question).text != question.text for other in splits.values()):
                question = question._replace(id=f"{question.id}-{panel_hash([question.text])}")
            split[question.id] = question
    held = {normalize_answer(q.text) for name in splits if name != "train" for q in splits[name].values()}
    splits["train"] = {key: q for key, q in splits["train"].items() if normalize_answer(q.text) not in held}
    return splits, passages


def search_server(url, timeout=30.0, retries=4, delay=1.0):
    """Client of Search-R1's server: function (queries, k) -> [[passage, ...] per query], one POST for all queries.
    Failures are repeated `retries` times with doubling delay (s), refusals (4xx) never; then UserError."""
    if not re.match(r"https?://[^/]", str(url)):
        raise UserError(f"search_url {url!r} is no http address; give for example http://127.0.0.1:8000/retrieve")
    url = url if re.match(r"https?://[^/]+/.", url) else url.rstrip("/") + "/retrieve"

    def ask(queries, k):
        body = json.dumps({"queries": queries, "topk": k, "return_scores": True}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        deadline, reply = time.monotonic() + timeout, b""
        with urllib.request.urlopen(request, timeout=timeout) as connection:
            while chunk := connection.read1(1 << 20):
                reply += chunk
                if len(reply) > MAX_REPLY or time.monotonic() > deadline:
                    raise TimeoutError("the reply takes too long or is too large")
        found = [[hit["document"]["contents"].strip() for hit in hits] for hits in json.loads(reply)["result"]]
        if len(found) != len(queries):
            raise ValueError(f"{len(found)} results for {len(queries)} queries")
        return found

    def retrieve(queries, k):
        for attempt in range(retries + 1):
            time.sleep(min(30.0, delay * 2 ** (attempt - 1)) if attempt else 0)
            try:
                return ask(queries, k)
            except Exception as error:  # whatever a network and a broken server can do to a request
                problem = one_line(f"{type(error).__name__}: {error}")
                if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429:
                    break  # refused: repeating it cannot help
        raise UserError(f"search server {url} failed {attempt + 1} times ({problem}); see that it answers "
                        "POST /retrieve, then run again (a training is saved and goes on with --resume)")
    return retrieve


def passage_search(passage, index):
    """The same function as search_server's from a BM25 index; `passage` gives the text of a number."""
    return lambda queries, k: [[passage(i) for i in index.search(query, k)[0]] for query in queries]


def corpus_search(path):
    """BM25 over {"id", "contents"} lines (.jsonl, .jsonl.gz) -> (function as of search_server, number of passages). The
    index is kept beside the corpus, or in ~/.cache/search-index if that is read-only, until the corpus changes."""
    path, text, ends = Path(str(path)).expanduser(), bytearray(), array("q", [0])
    for number, row in read_rows(path):
        if not isinstance(row.get("contents"), str):
            raise UserError(f"{path}, line {number}: no `contents`; mend the line or take it out")
        text += row["contents"].strip().encode("utf-8", "replace")
        ends.append(len(text))
    n = len(ends) - 1
    if not n:
        raise UserError(f"{path} holds no passages; give a file of {{\"id\", \"contents\"}} lines")

    def passage(i):
        return text[ends[i]:ends[i + 1]].decode()

    stat = path.stat()
    name = f"{path.name}.{panel_hash([str(stat.st_size), str(stat.st_mtime_ns)])}.bm25.npz"
    files, index = [path.parent / name, Path(os.path.expanduser("~/.cache")) / "search-index" / name], None
    for file in files:
        with suppress(ValueError):  # none there, or damaged: the next one, or built anew
            index = index or BM25.load(file)
    if index is None:
        index = BM25(map(passage, tqdm(range(n), "indexing passages", disable=n < 50_000)))
        any(_keep_index(index, file, f"{glob.escape(path.name)}.*.bm25.npz") for file in files)  # until one can
    return passage_search(passage, index), n


def _keep_index(index, file, older):
    """Saves an index in place of those that match the pattern `older`; False where the folder cannot be written."""
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        index.save(part)
        for old in file.parent.glob(older):
            old.unlink()
        part.replace(file)
        return True
    except OSError:
        with suppress(OSError):
            part.unlink()  # a full disk must not keep half an index
        return False


def build_world(seed):
    """A world drawn from `seed` -> ({split: {id: Question}}, passages). The splits share neither people nor places. The
    training part is so large that a small model learns to read it sooner than to know it by heart."""
    rng, passages, splits = random.Random(seed), [], {"train": {}, "test": {}}
    syllables = "ba dor fi gel kan lur mo nev pit ra sol tun ve zim hu cor lin po".split()
    names = ["".join(parts).title() for parts in itertools.product(syllables, repeat=3)]
    rng.shuffle(names)  # every name is used once
    signs, kinds = "Amber Silent Golden Hollow Paper Iron Frozen Broken Green".split(), "novel opera play poem".split()
    for split, n in (("train", 1200), ("test", 60)):
        towns = [(names.pop(), names.pop(), names.pop()) for _ in range(n // 4)]
        people = [(f"{names.pop()} {names.pop()}", rng.choice(towns), year) for year in rng.sample(range(300, 1900), n)]
        works = [(f"The {rng.choice(signs)} {names.pop()}", rng.choice(kinds), maker, year)
                 for maker, year in zip(people, rng.sample(range(400, 1980), n))]
        passages += [f'"{t}"\n{t} is a town in {region}, on the river {river}.' for t, river, region in towns]
        passages += [f'"{p}"\n{p} was born in {town[0]} in {year}.' for p, town, year in people]
        passages += [f'"{w}"\n{w} is a {kind} of {year} by {maker[0]}.' for w, kind, maker, year in works]
        for (work, kind, maker, year), (work2, _, maker2, year2) in zip(works, works[1:] + works[:1]):
            name, (town, river, _), born = maker
            older, earlier = maker if born < maker2[2] else maker2, maker if year < year2 else maker2
            for category, text, answer, *chain in (
                    (DIRECT, f"Who made the {kind} {work}?", name, work),
                    (DIRECT, f"In which year was the {kind} {work} made?", year, work),
                    (ATTRIBUTE, f"In which town was {name} born?", town, name),
                    (ATTRIBUTE, f"In which year was {name} born?", born, name),
                    (HOPS, f"In which town was the maker of {work} born?", town, work, f"{name} born"),
                    (HOPS, f"Which river flows through the birthplace of {name}?", river, name, f"{town} river"),
                    (COMPARE, f"Where was the older of {name} and {maker2[0]} born?", older[1][0], name, maker2[0]),
                    (COMPARE, f"Who made the earlier of {work} and {work2}?", earlier[0], work, work2)):
                key = f"world/{split}/{category}/{len(splits[split]):04d}"
                splits[split][key] = Question(key, text, (str(answer),), category, chain)
    return splits, passages


def show_passages(passages, room=MAX_PASSAGE, brief=False):
    """The text a search returns; each passage cut to `room` characters. brief: bare bodies, without titles and tags."""
    texts = [shorten_middle(text.split('"\n', 1)[-1] if brief else text, room) for text in passages]
    docs = "".join(f"Doc {i}: {text}\n" for i, text in enumerate(texts, 1))
    return "\n".join(texts) if brief else f"<information>{docs}</information>"


class SearchSession:
    """One episode; made by SearchQA.start, advanced by SearchQA.step."""

    def __init__(self, question, max_turns):
        self.question, self.max_turns, self.task = question, max_turns, question.text
        self.group, self.category = question.group, search_category(question.text, question.group)
        self.turns, self.found = [], []  # (observation, action), and the passages that the action brought
        self.observation, self.action, self.score, self.details = "", "", 0.0, {}
        self.valid = self.admissible = self.done = self.won = False

    def advance(self, kind, content, valid, passages):
        """Takes in one parsed response and the passages found for it."""
        self.action = f"<{kind}>{one_line(content, MAX_QUERY)}</{kind}>" if kind else ""
        self.turns.append((self.observation, self.action))
        self.found.append([text[:MAX_PASSAGE].encode("utf-8", "replace").decode() for text in passages])
        self.observation = show_passages(self.found[-1]) if kind == "search" else ""
        self.valid, self.admissible, self.done = valid, bool(kind), kind == "answer"
        if self.done:
            match, f1 = score_answer(content[:MAX_ANSWER], self.question.answers)
            self.won = match == 1 and len(content) <= MAX_ANSWER
            self.score, self.details = float(self.won), {"em": float(self.won), "f1": f1}

    def prompt(self, skill="", history=4, room=None, brief=False):
        """The user message of this turn; `room` bounds the characters of all passages shown, each cut in its middle."""
        shown = list(enumerate(zip(self.turns, self.found), 1))[-max(history, 1):]
        each = room and max(1, room // max(1, sum(len(found) for _, (_, found) in shown)) - 8)
        steps = [("" if brief else f"Step {n}: ") + action + ("\n" if brief else " ")
                 + (show_passages(found, each, brief) if action.startswith("<search>") else "") + "\n"
                 for n, ((_, action), found) in shown]
        skill = skill + "\n\n" if skill else ""
        if brief:
            return f"{skill}{self.task}\n{''.join(steps)}<think>, then <search> or <answer>:"
        past = (f"You have taken {len(self.turns)} step(s) so far. Your queries stand in <search> </search>, what the "
                f"search engine returned in <information> </information>:\n{''.join(steps)}\n" if shown else "")
        return (f"{skill}You are an expert at answering questions step by step with a search engine.\nQuestion: "
                f"{self.task}\n\n{past}Now take the next step. First reason inside <think> </think>. Then do one of "
                "these, never both:\n(1) If a fact is missing, search for it: <search> your query </search>\n"
                "(2) If you know enough, give the bare final answer, as in <answer>Beijing</answer>")

    def expert(self):
        """The next response of an expert: it knows the chain of a built-in question, else waits for a golden answer."""
        turn, chain, answers = len(self.turns), self.question.chain, self.question.answers
        if chain:
            query = chain[turn] if turn < len(chain) else ""
            say = f"Next I look up {query}." if query else "The passages tell it."
        else:
            shown = f" {normalize_answer(' '.join(text for found in self.found for text in found))} "
            seen = [text for text in filter(normalize_answer, answers) if f" {normalize_answer(text)} " in shown]
            answers = seen or answers
            say = "A passage states it." if seen else "No passage states it yet." if turn else "I search for it."
            rarer = " ".join(word for word in self.task.split() if len(word) > 3 or word[0].isupper())
            query = "" if seen or turn >= self.max_turns - 1 else rarer if turn and rarer else self.task
        return f"<think>{say}</think>" + (f"<search>{query}</search>" if query else f"<answer>{answers[0]}</answer>")


class SearchQA:
    """The benchmark. `data`: question file or folder; `corpus`: passage file; `search_url`: a Search-R1 server;
    topk: passages a search returns; timeout (s) and retries: see search_server. UserError for unusable data."""
    stop, skill_names = ("</search>", "</answer>"), list(SEARCH_CATEGORIES)

    def __init__(self, data=None, seed=233, skills=None, search_url=None, corpus=None, topk=3, max_turns=4,
                 timeout=30.0, retries=4):
        for option, value, least in (("topk", topk, 1), ("max_turns", max_turns, 1), ("retries", retries, 0)):
            if not isinstance(value, int) or value < least:
                raise UserError(f"{option}={value} must be a whole number of {least} or more")
        if not isinstance(timeout, (int, float)) or timeout < 1:
            raise UserError(f"timeout={timeout} must be a number of 1 or more")
        self.skill = self.all_skills = partial(skill_text, read_skills(skills, SEARCH_SKILLS, self.skill_names))
        path, self.topk, self.max_turns = find_data("search", data), topk, max_turns
        self.builtin = path is None
        if self.builtin and (search_url or corpus):
            raise UserError("a search server or corpus needs questions; give them with --data FILE (JSONL or parquet)")
        self.questions, files = build_world(seed) if self.builtin else load_questions(path)
        if not any(self.questions.values()):
            raise UserError(f"{path} holds no questions; give a .jsonl, .jsonl.gz or .parquet file of them")
        if self.builtin:
            self.retrieve, where = passage_search(files.__getitem__, BM25(files)), f"{len(files)} passages"
        elif search_url:
            self.retrieve, where = search_server(search_url, timeout, retries), f"search server {search_url}"
        elif corpus or len(files) == 1:
            self.retrieve, n = corpus_search(corpus or files[0])
            where = f"{n} passages of {corpus or files[0]}"
        else:
            raise UserError(f"{path} comes with {len(files)} passage files; give corpus=FILE or search_url=ADDRESS")
        self.splits = tuple(split for split in ("train", "dev", "test") if split in self.questions)
        counts = ", ".join(f"{split} {len(self.questions[split])}" for split in self.splits)
        built_in = (f"BUILT-IN generated world (seed {seed}), not the benchmark: for that give --data with Search-R1's "
                    "questions and corpus= or search_url=")
        self.source = f"search: {path or built_in}; questions: {counts}; {where}"

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
        return SearchSession(found[0], self.max_turns)

    def step(self, sessions, responses, think_closed=False):
        """Advance sessions by their responses, all queries in one request; a UserError leaves every session as it was.
        `think_closed` changes nothing: the public code judges Search responses by their tags alone."""
        moves = [(session, *parse_search(text)) for session, text in zip(sessions, responses) if not session.done]
        asked = [one_line(content, MAX_QUERY) if kind == "search" else "" for _, kind, content, _ in moves]
        queries = list(dict.fromkeys(filter(None, asked)))
        found = dict(zip(queries, self.retrieve(queries, self.topk))) if queries else {}
        for (session, kind, content, valid), query in zip(moves, asked):
            session.advance(kind, content, valid, found.get(query, [])[:self.topk])


def panel(env, split, episodes=None, seed=233):
    """(sorted task ids, panel_hash of ids and task texts) of a test panel: the whole split, or the first `episodes` of
    an order by sha256(seed, id), so that a smaller panel lies in a larger one. Raises UserError for an empty panel."""
    ids = sorted(env.tasks(split), key=lambda i: hashlib.sha256(f"{seed}\n{i}".encode("utf-8", "replace")).digest())
    if episodes is not None and episodes < 1:
        raise UserError(f"a panel of {episodes} episodes is empty; give 1 to {len(ids)}, or nothing for all of {split}")
    ids = sorted(ids[:episodes])
    return ids, panel_hash([text for i in ids for text in (i, env.start(i).task)])


# ======== Command line ================================================================================================

def original_alfworld():
    """The original engine, unloaded, or None where `alfworld` and `textworld` are not installed."""
    try:
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld.envs.pddl import PddlEnv
    except ImportError:
        return None
    return AlfredDemangler(PddlEnv(textworld.EnvInfos(admissible_commands=True, won=True)), shuffle=False)


def bench_alfworld(data, games=20, wandering=10):
    """Print the mean milliseconds of a load, a reset and a step (text and admissible commands), beside the original
    engine's where it is installed: the same games, random commands, then the walkthrough, every text compared."""
    env, rng, differences = Alfworld(data=data), random.Random(0), 0
    if env.builtin:
        raise UserError("the benchmark needs the official games; give their folder or archive")
    seconds = {what: ([], []) for what in ("load", "reset", "step")}  # here, and the original's

    def timed(what, *calls):
        results = [None, None]
        for i, call in enumerate(filter(None, calls)):
            began = time.perf_counter()
            results[i] = call()
            seconds[what][i].append(time.perf_counter() - began)
        return results

    ids = [task_id for split in env.splits for task_id in env.tasks(split)]
    for task_id in tqdm(rng.sample(ids, min(games, len(ids))), desc="games"):
        other = original_alfworld()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "game.tw-pddl"
            path.write_text(env._files.read(task_id), encoding="utf-8")
            game, _ = timed("load", lambda: AlfworldGame(path), other and (lambda: other.load(str(path))))
        text, state = timed("reset", game.reset, other and other.reset)
        for step in range(wandering + len(game.walkthrough)):
            if other and (state.feedback, state["admissible_commands"]) != (text, game.admissible_commands):
                differences += 1
            command = rng.choice(game.admissible_commands) if step < wandering else game.walkthrough[step - wandering]
            text, state = timed("step", lambda: (game.step(command), game.admissible_commands)[0],
                                other and (lambda: other.step(command)[0]))
    for what, times in seconds.items():
        here, there = (1e3 * sum(part) / max(len(part), 1) for part in times)
        beside = f"   original {there:8.1f} ms   {there / here:6.0f} x" if there else ""
        print(f"{what:6} {here:8.3f} ms   {1e3 / here:8.0f} a second{beside}")
    print(f"{len(seconds['step'][0])} steps; " + (f"{differences} differences" if seconds["step"][1] else
          "the original is not installed: pip install alfworld textworld"))


def main(argv=None):
    """python envs.py download NAME [DIR], or bench DATA [GAMES]; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    fetch = {"alfworld": download_alfworld, "webshop": download_webshop,
             "webshop-full": partial(download_webshop, full=True)}
    try:
        match argv:
            case ["download", name, *folder] if name in fetch and len(folder) < 2:
                benchmark = name.removesuffix("-full")
                default = os.environ.get(benchmark.upper() + "_DATA") or f"~/.cache/{benchmark}"
                fetch[name](Path(os.path.expanduser(os.path.expandvars(*folder or [default]))))
            case ["bench", data]:
                bench_alfworld(data)
            case ["bench", data, games] if re.fullmatch("[1-9][0-9]*", games):
                bench_alfworld(data, int(games))
            case _:
                raise UserError(f"usage: python envs.py download {'|'.join(fetch)} [DIR], or: bench DATA [GAMES]")
    except (UserError, OSError) as error:  # OSError: a folder that may not be written, a full disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
