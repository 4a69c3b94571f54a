"""The environments."""

import bisect
import copy
import functools
import hashlib
import http.client
import inspect
import json
import numpy as np
import os
import random
import re
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------------------------
# common
# --------------------------------------------------------------------------------------------------------------------

class UserError(Exception):
    """A mistake of the user's; the message is one line and says what to do."""


def open_env(name, data=None, seed=233, skills=None, **options):
    """The environment called `name` ("alfworld", "webshop" or "search"); `options` go to its class. Raises UserError."""
    classes = {"alfworld": "Alfworld", "webshop": "WebShopEnv", "search": "SearchQA"}
    if name not in classes:
        raise UserError(f"unknown environment {name!r}; choose one of {', '.join(classes)}")
    cls = globals()[classes[name]]
    unknown = set(options) - set(inspect.signature(cls).parameters)
    if unknown:
        raise UserError(f"{name} has no option {sorted(unknown)[0]!r}; it takes " + ", ".join(inspect.signature(cls).parameters))
    return cls(data=data, seed=seed, skills=skills, **options)


def find_data(name, data=None):
    """Path of a benchmark's data: `data` if given, else $<NAME>_DATA, else ~/.cache/<name>; None if there is none.
    Raises UserError for a path the user named that does not exist."""
    variable = name.upper() + "_DATA"
    for source, value in (("--data", data), ("$" + variable, os.environ.get(variable))):
        if value:
            path = Path(os.path.expandvars(os.path.expanduser(str(value))))
            if not path.exists():
                raise UserError(f"{source} names {path}, which does not exist; mend the path or leave it out")
            return path
    path = Path.home() / ".cache" / name
    return path if path.exists() else None


def panel_hash(ids):
    """First 12 hex digits of the sha256 of the ids joined by newlines: names a set of test tasks."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:12]


def shorten_middle(text, room):
    """`text` if it has at most `room` characters, else its head and tail around " ... "; room None: no limit."""
    if room is None or len(text) <= room:
        return text
    keep = max(room - 5, 0)
    head = (keep + 1) // 2
    return (text[:head] + " ... " + (text[len(text) - (keep - head):] if keep > head else ""))[:max(room, 0)]


def one_line(text, limit=200):
    """A model's text made fit to be quoted in a prompt: one line, no control or unencodable characters, cut at `limit`."""
    text = text[:4 * limit].encode("utf-8", "replace").decode()
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:limit]


# ---- skills in the form of the public skill directories ----

def _skill_item(item):
    """One entry of claude_style_skills.json as a line of text."""
    if isinstance(item, str):
        return item
    parts = (item.get("title"), item.get("principle") or item.get("description"), item.get("when_to_apply"),
             item.get("how_to_avoid"))
    labels = ("{}:", "{}", "When: {}", "Instead: {}")
    return " ".join(label.format(str(part).strip()) for label, part in zip(labels, parts) if part)


def read_skills(folder, categories, aliases=None):
    """Reads a public skill directory: skill_mapping.json with its .md files, or claude_style_skills*.json.

    `categories` are the names wanted, `aliases` maps a category to further names it may have there. Returns a dict with
    the keys "general", "mistakes" and every category (texts; "mistakes" may be empty). Raises UserError if a file is
    missing or broken, or if a category has no text of its own (general skills alone are no library).
    """
    folder = Path(os.path.expanduser(str(folder)))
    mapping_file, cards = folder / "skill_mapping.json", sorted(folder.glob("claude_style_skills*.json"))
    if not mapping_file.is_file() and not cards:
        raise UserError(f"no skills in {folder}: neither skill_mapping.json nor claude_style_skills.json is there")
    file, found = mapping_file, {"general": "", "mistakes": ""}
    try:
        if cards:
            file = cards[0]
            card = json.loads(file.read_text(encoding="utf-8"))
            special = {**card.get("task_specific_skills", {}), **card.get("query_type_skills", {})}
            for name, items in {"general": card.get("general_skills", []), "mistakes": card.get("common_mistakes", []),
                                **special}.items():
                found[name] = "\n".join("- " + _skill_item(item) for item in items)
        if mapping_file.is_file():  # the .md files go before the cards; the cards still give the common mistakes
            file = mapping_file
            mapping = json.loads(file.read_text(encoding="utf-8"))
            texts = {}
            for name, filename in mapping["skill_files"].items():
                file = folder / filename
                texts[name] = file.read_text(encoding="utf-8").strip()
            found["general"] = texts.pop("general_skills", "") or found["general"]
            found.update(texts)
            found.update({task: texts[name] for task, name in mapping.get("task_to_skill", {}).items() if name in texts})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read skills from {file}: {error!r}") from None
    library = {"general": found["general"], "mistakes": found["mistakes"]}
    for category in categories:
        names = (category, *(aliases or {}).get(category, ()))
        library[category] = next((found[name] for name in names if found.get(name)), "")
    missing = [category for category in categories if not library[category]]
    if missing:
        only = "only general skills" if len(missing) == len(categories) else "no skills for " + ", ".join(missing)
        raise UserError(f"{folder} holds {only}; it needs a text for each of {', '.join(categories)}")
    return library


# ---- downloads ----

def download(url, path, sha256=None, size=None, tries=5):
    """Fetches `url` into `path` with a progress bar. A broken transfer is taken up again where it stopped (HTTP Range),
    in this call or a later one: until it is complete the data is in `path` + ".part". Checks the length, `size` (bytes)
    and `sha256` where known. Returns the path; raises UserError."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    total, trouble = size, ""
    for attempt in range(tries):
        have = part.stat().st_size if part.exists() else 0
        if total is not None and have == total and have:
            break
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                resumed = reply.status == 206
                length = reply.headers.get("Content-Length")
                total = (have if resumed else 0) + int(length) if length else size
                bar = tqdm(desc=path.name, total=total, initial=have if resumed else 0, unit="B", unit_scale=True)
                with bar, open(part, "ab" if resumed else "wb") as file:
                    for block in iter(lambda: reply.read(1 << 16), b""):
                        file.write(block)
                        bar.update(len(block))
            trouble = "the connection closed early"
            if total is None or part.stat().st_size == total:
                break
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise UserError(f"{url} answers {error.code} {error.reason}; check the address or try later") from None
            part.unlink()  # what is there is longer than the file on the server: begin again
        except (OSError, http.client.HTTPException) as error:
            trouble = str(error) or type(error).__name__
            time.sleep(min(0.2 * 2 ** attempt, 5))
    have = part.stat().st_size if part.exists() else 0
    if not have or (total is not None and have != total):
        raise UserError(f"{url}: got {have} of {total or '?'} bytes ({trouble}); run the same command again to resume")
    if (size and have != size) or (sha256 and _sha256(part) != sha256):
        part.unlink()
        raise UserError(f"{url} is not the expected file (size or sha256 differ); it was removed, download it again")
    part.replace(path)
    return path


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def check_zip(path):
    """Raises UserError (and removes the file) unless `path` is a whole zip archive with sound checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        broken = str(error)
    if broken:
        Path(path).unlink()
        raise UserError(f"{path} is damaged ({broken}); it was removed, download it again")


def main(argv=None):
    """Command line: python envs.py download alfworld|webshop [DIR]"""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if len(argv) not in (2, 3) or argv[0] != "download" or argv[1] not in ("alfworld", "webshop"):
            raise UserError("usage: python envs.py download alfworld|webshop [DIR]")
        folder = Path(argv[2] if len(argv) == 3 else os.environ.get(argv[1].upper() + "_DATA") or
                      Path.home() / ".cache" / argv[1])
        globals()["download_" + argv[1]](folder)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


# --------------------------------------------------------------------------------------------------------------------
# bm25
# --------------------------------------------------------------------------------------------------------------------

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
_STEP2, _STEP3, _STEP4 = [sorted((tuple(rule.split(":")) for rule in rules.split()), key=lambda rule: -len(rule[0]))
                          for rules in (
    "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble alli:al entli:ent eli:e ousli:ous ization:ize ation:ate "
    "ator:ate alism:al iveness:ive fulness:ful ousness:ous aliti:al iviti:ive biliti:ble logi:log",
    "icate:ic ative: alize:al iciti:ic ical:ic ful: ness:",
    "al: ance: ence: er: ic: able: ible: ant: ement: ment: ent: ion: ou: ism: ate: iti: ous: ive: ize:")]


def words(text):
    """The tokens of a text before the filters; linear time for any input; longer than 255 characters are split."""
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
    return len(re.findall("vc", _kinds(word)))


def _ends_cvc(word):
    return _kinds(word).endswith("cvc") and word[-1] not in "wxy"


def _ends_double(word):
    return word[-2:-1] == word[-1:] and _kinds(word).endswith("c")


def _replace_suffix(word, rules, least_measure):
    for suffix, new in rules:  # only the longest suffix that matches is tried
        if word.endswith(suffix):
            stem = word[:-len(suffix)]
            fits = _measure(stem) > least_measure and (suffix != "ion" or stem.endswith(("s", "t")))
            return stem + new if fits else word
    return word


def porter_stem(word):
    """The original Porter stemmer with the two changes of its author's own code (bli, logi), as in Lucene."""
    if len(word) <= 2:
        return word
    if word.endswith("s"):
        word = word[:-2] if word.endswith(("sses", "ies")) else word if word.endswith("ss") else word[:-1]
    ending = re.search("(eed|ed|ing)$", word)
    if ending and ending[0] == "eed":
        word = word[:-1] if _measure(word[:-3]) > 0 else word
    elif ending and "v" in _kinds(word[:ending.start()]):
        word = word[:ending.start()]
        if word.endswith(("at", "bl", "iz")) or (_measure(word) == 1 and _ends_cvc(word)):
            word += "e"
        elif _ends_double(word) and word[-1] not in "lsz":
            word = word[:-1]
    if word.endswith("y") and "v" in _kinds(word[:-1]):
        word = word[:-1] + "i"
    for rules, least_measure in ((_STEP2, 0), (_STEP3, 0), (_STEP4, 1)):
        word = _replace_suffix(word, rules, least_measure)
    if word.endswith("e") and (_measure(word[:-1]) > 1 or (_measure(word[:-1]) == 1 and not _ends_cvc(word[:-1]))):
        word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word


def analyse_word(word):
    """One raw token through Lucene's English filters: the index term, or "" for a stop word."""
    word = (word[:-2] if re.search("['\u2019\uff07][sS]$", word) else word).lower()
    return "" if word in STOP_WORDS or not word.strip("_") else porter_stem(word)


# SmallFloat.byte4ToInt: the document length that each byte stands for; a length is rounded down to one of these.
BYTE_LENGTHS = np.array([n if n < 40 else 24 + ((8 | (n - 24) & 7) << ((n - 24 >> 3) - 1)) for n in range(256)])


class BM25:
    """An inverted index over texts (any iterable of str, read once) kept in a few arrays: 6 bytes a posting."""

    CHUNK = 4096

    def __init__(self, texts=(), k1=0.9, b=0.4):
        self.k1, self.b, self.terms, self._cache = float(k1), float(b), {}, {}
        chunks, lengths, chunk = [], [np.zeros(0, np.int64)], []
        for text in texts:
            chunk.append(self._term_ids(text, grow=True))
            if len(chunk) == self.CHUNK:
                self._add(chunk, chunks, lengths)
                chunk = []
        self._add(chunk, chunks, lengths)
        lengths = np.concatenate(lengths)
        self._invert(chunks, (np.searchsorted(BYTE_LENGTHS, lengths, 'right') - 1).astype(np.uint16), len(lengths), float(lengths.sum()))

    def _term_ids(self, text, grow=False):
        """Ids of the index terms of a text, in order; unknown terms are added (building) or left out (searching)."""
        ids, cache = [], self._cache
        for word in words(text):
            number = cache.get(word)
            if number is None:
                term = analyse_word(word)
                number = -1 if not term else self.terms.setdefault(term, len(self.terms)) if grow else \
                    self.terms.get(term, -1)
                if len(cache) > 2_000_000 or (not grow and len(cache) > 200_000):
                    cache.clear()  # bounded: what a model types must not grow the memory
                cache[word] = number
            if number >= 0:
                ids.append(number)
        return ids

    def _add(self, chunk, chunks, lengths):
        """Up to CHUNK documents as postings sorted by term, then document; 3 bytes each until the end."""
        size = np.array([len(ids) for ids in chunk], np.int64)
        keys = np.fromiter((i for ids in chunk for i in ids), np.int64, int(size.sum()))
        keys, tf = np.unique(keys * self.CHUNK + np.repeat(np.arange(len(chunk)), size), return_counts=True)
        term, df = np.unique(keys // self.CHUNK, return_counts=True)
        chunks.append((term.astype(np.int32), df.astype(np.int32), (keys % self.CHUNK).astype(np.uint16),
                       np.minimum(tf, 255).astype(np.uint8)))
        lengths.append(size)

    def _invert(self, chunks, length_byte, n_docs, total_length):
        df = np.zeros(len(self.terms), np.int64)
        for term, count, _, _ in chunks:
            df[term] += count
        self.starts = np.concatenate([[0], np.cumsum(df)])
        self.docs, self.codes = np.empty(self.starts[-1], np.int32), np.empty(self.starts[-1], np.uint16)
        cursor, first_doc = self.starts[:-1].copy(), 0
        for i, (term, count, doc, tf) in enumerate(chunks):
            chunks[i] = None  # freed as we go
            before = np.cumsum(count) - count
            place = np.repeat(cursor[term] - before, count) + np.arange(len(doc))
            self.docs[place] = doc.astype(np.int32) + first_doc
            self.codes[place] = (tf.astype(np.uint16) << 8) | length_byte[self.docs[place]]
            cursor[term] += count
            first_doc += self.CHUNK
        self._prepare(n_docs, total_length)

    def _prepare(self, n_docs, total_length):
        self.n_docs, self.total_length, self._cache = n_docs, total_length, {}
        mean_length = np.float32(total_length / max(n_docs, 1)) or np.float32(1)
        length, k1, b = BYTE_LENGTHS.astype(np.float32), np.float32(self.k1), np.float32(self.b)
        inverse_norm = np.float32(1) / (k1 * ((np.float32(1) - b) + b * length / mean_length))
        tf = np.arange(256, dtype=np.float32)
        self.saturation = (np.float32(1) + tf[:, None] * inverse_norm).reshape(-1)  # by code: tf * 256 + length byte

    def search(self, query, k=10):
        """(indices, scores), best first, at most k, only documents with a query term; float32 scores as Lucene's."""
        counts = Counter(self._term_ids(query))
        lists = []
        for term, count in counts.items():
            low, high = self.starts[term], self.starts[term + 1]
            weight = np.float32(count) * np.float32(np.log(1 + (self.n_docs - (high - low) + 0.5) / (high - low + 0.5)))
            lists.append((high - low, weight, self.docs[low:high], self.codes[low:high]))
        lists.sort(key=lambda item: item[0])
        return self._top(lists, k)

    def _top(self, lists, k):
        """Exact top k. Rare terms first; once the terms left cannot lift an unseen document into the top k, they are
        looked up for the documents still in question only (the MaxScore bound of Turtle and Flood)."""
        scores, seen, left = np.zeros(self.n_docs), None, float(sum(item[1] for item in lists))
        best_possible = 0.0
        for size, weight, docs, codes in lists:
            if seen is None and size > 20_000 and left < best_possible:
                nonzero = np.flatnonzero(scores)
                if len(nonzero) >= k:
                    threshold = np.partition(scores[nonzero], -k)[-k]
                    if left < threshold:
                        seen = nonzero[scores[nonzero] + left >= threshold].astype(np.int32)
            if seen is not None:
                place = np.searchsorted(docs, seen)
                place = place[docs[np.minimum(place, size - 1)] == seen]
                docs, codes = docs[place], codes[place]
            scores[docs] += weight - weight / self.saturation[codes]
            left, best_possible = left - float(weight), best_possible + float(weight)
        found = np.flatnonzero(scores) if seen is None else seen
        value = scores[found].astype(np.float32)
        if len(found) > k > 0:
            keep = value >= np.partition(value, -k)[-k]
            found, value = found[keep], value[keep]
        order = np.lexsort((found, -value))[:max(k, 0)]
        return found[order].astype(np.int64), value[order]

    def save(self, path):
        """One .npz without pickles (np.load(..., allow_pickle=False))."""
        terms = np.frombuffer("\n".join(self.terms).encode(), np.uint8)
        with open(path, "wb") as file:
            np.savez(file, terms=terms, starts=self.starts, docs=self.docs, codes=self.codes,
                     settings=np.array([self.k1, self.b, self.n_docs, self.total_length], np.float64))

    @classmethod
    def load(cls, path):
        """An index written by save. Raises ValueError if the file is not one."""
        index = cls.__new__(cls)
        try:
            with np.load(Path(path), allow_pickle=False) as file:
                terms = file["terms"].tobytes().decode()
                index.starts, index.docs, index.codes = file["starts"], file["docs"], file["codes"]
                index.k1, index.b, n_docs, total_length = file["settings"].tolist()
        except (KeyError, OSError, EOFError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path} is not a saved BM25 index ({type(error).__name__}); build it again") from error
        index.terms = {term: i for i, term in enumerate(terms.split("\n"))} if terms else {}
        index._prepare(int(n_docs), total_length)
        return index


# --------------------------------------------------------------------------------------------------------------------
# alfworld
# --------------------------------------------------------------------------------------------------------------------

ALFWORLD_URL = "https://github.com/alfworld/alfworld/releases/download/0.4.2/json_2.1.3_tw-pddl.zip"
ALFWORLD_GROUPS = {  # task type as it stands in a game's path -> column of the paper's table
    "pick_and_place": "Pick", "look_at_obj_in_light": "Look", "pick_clean_then_place_in_recep": "Clean",
    "pick_heat_then_place_in_recep": "Heat", "pick_cool_then_place_in_recep": "Cool", "pick_two_obj_and_place": "Pick2"}

# ---- reading a game file ----

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
_ACTIONS = set("look inventory help examineReceptacle examineObject GotoLocation OpenObject CloseObject PickupObject PutObject "
               "CleanObject HeatObject CoolObject ToggleObject SliceObject".split())
_TOOLS = {"clean": {"sinktype", "sinkbasintype"}, "heat": {"microwavetype"}, "cool": {"fridgetype"}}
_ABLE = {"clean": "cleanable", "heat": "heatable", "cool": "coolable"}
_DYNAMIC = ("atlocation objectatlocation inreceptacle holds holdsany opened checked isclean ishot iscool istoggled ison "
            "issliced").split()


@functools.lru_cache(maxsize=8)
def _read_domain(domain):
    """(has help, {verb: receptacle types that can do it}) of a pddl_domain; UserError if it is not ALFRED's."""
    blocks = re.sub(r";.*", "", domain).split("(:action")[1:]
    actions = {block.split(None, 1)[0]: block for block in blocks}
    if not (_ACTIONS - {"help"} <= set(actions) <= _ACTIONS):
        raise UserError("its pddl_domain is not ALFRED's: " + ", ".join(sorted(_ACTIONS ^ set(actions))))
    tools = {verb: {kind.lower() for kind in re.findall(r"receptacleType \?r (\w+)", actions[verb.title() + "Object"])}
             for verb in _ABLE}
    return "help" in actions, tools


def _parse_goal(text):
    """The nested tuples of the PDDL condition that follows "(:goal" in `text` (lower-cased)."""
    stack = [[]]
    for token in re.findall(r"[()]|[^\s()]+", text[text.index("(:goal") + len("(:goal"):]):
        if token == "(":
            stack.append([])
        elif token == ")":
            done = tuple(stack.pop())
            if not stack or len(stack) == 1:
                return done
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    raise ValueError("the goal is not closed")


def _goal_atoms(goal):
    """The conditions that must all hold in `goal`, with nested conjunctions and existential quantifiers opened."""
    if goal[0] == "and":
        return [atom for part in goal[1:] for atom in _goal_atoms(part)]
    return _goal_atoms(goal[2]) if goal[0] == "exists" else [goal]


def _holds(goal, facts, objects, bound):
    """Whether a PDDL condition holds. facts: predicate -> set of argument tuples; objects: type -> names; bound: variable ->
    name. A variable runs over the arguments of the facts that its atoms allow, not over all objects: exact and quick."""
    operator = goal[0]
    if operator == "and":
        return all(_holds(part, facts, objects, bound) for part in goal[1:])
    if operator == "or":
        return any(_holds(part, facts, objects, bound) for part in goal[1:])
    if operator == "not":
        return not _holds(goal[1], facts, objects, bound)
    if operator == "forall":
        return not _holds(("exists", goal[1], ("not", goal[2])), facts, objects, bound)
    if operator == "=":
        return bound.get(goal[1], goal[1]) == bound.get(goal[2], goal[2])
    if operator != "exists":
        return tuple(bound.get(name, name) for name in goal[1:]) in facts.get(operator, ())
    if not goal[1]:
        return _holds(goal[2], facts, objects, bound)
    variable, rest = goal[1][0], goal[1][1:]
    kind = next((rest[i + 1] for i, name in enumerate(rest) if name == "-"), "object")
    rest = rest[2:] if rest[:1] == ("-",) else rest
    candidates = objects.get(kind, ())
    for atom in _goal_atoms(goal[2]):
        if variable in atom[1:] and atom[0] not in ("not", "or", "forall", "="):
            names = [bound.get(name, name) for name in atom[1:]]
            fits = {fact[names.index(variable)] for fact in facts.get(atom[0], ())
                    if all(name == value or name[0] == "?" for name, value in zip(names, fact))}
            candidates = fits.intersection(candidates)
    return any(_holds(("exists", rest, goal[2]), facts, objects, {**bound, variable: name}) for name in candidates)


def _read_game(text, where="game"):
    """Parses the JSON text of a game.tw-pddl into the parts that AlfworldGame needs. Raises UserError naming `where`."""
    try:
        data = json.loads(text)
        grammar, problem = data["grammar"], data["pddl_problem"].lower()
        has_help, tools = _read_domain(data["pddl_domain"])
        head, init = problem[:problem.index("(:goal")].split("(:init", 1)
        facts = {}
        for name, arguments in re.findall(r"\(([\w-]+)([^()]*)\)", init):
            if name != "distance":
                facts.setdefault(name, set()).add(tuple(arguments.split()))
        objects = {}
        for name, kind in re.findall(r"([\w-]+)\s+-\s+([\w-]+)", head):
            objects.setdefault(kind, []).append(name)
        task = re.search(r"Your task is to: (.*?)\"", grammar).group(1)
        moves = "move {o} to {r}" in grammar
        if not moves and "put {o} in/on {r}" not in grammar:
            raise UserError("its grammar has neither \"move X to Y\" nor \"put X in/on Y\"")
        walkthrough = [_in_grammar(command, moves) for command in data.get("walkthrough") or ()]
        return dict(facts=facts, objects=objects, goal=_parse_goal(problem), task=task.strip(), walkthrough=walkthrough,
                    moves=moves, named_places="You arrive at {r.name}" in grammar, help=has_help, tools=tools,
                    solvable=bool(data.get("solvable", True)))
    except UserError as error:
        raise UserError(f"{where} cannot be played: {error}") from None
    except (ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise UserError(f"{where} is not a readable game.tw-pddl ({error!r}); fetch it again") from None


def _in_grammar(command, moves):
    """A walkthrough's command in the wording of the game's own grammar (some releases mix the two)."""
    old = re.fullmatch(r"put (.+) in/on (.+)", command)
    new = re.fullmatch(r"move (.+) to (.+)", command)
    if old and moves:
        return f"move {old[1]} to {old[2]}"
    return f"put {new[1]} in/on {new[2]}" if new and not moves else command


def _names(facts):
    """Entity id -> the name the player sees. As AlfredDemangler(shuffle=False): the ids of one kind, sorted, count DOWN."""
    ids = sorted({name for tuples in facts.values() for arguments in tuples for name in arguments})
    kinds = [(name, name.split("_bar_", 1)[0] + ("basin" if "basin" in name else "")) for name in ids if "_bar_" in name]
    left = Counter(kind for _, kind in kinds)
    names = {}
    for name, kind in kinds:
        names[name] = f"{kind} {left[kind]}"
        left[kind] -= 1
    return names


def _series(names):
    """"a mug 1, and a pen 2" (or "nothing"): the original's way to print a list."""
    if len(names) < 2:
        return names[0] if names else "nothing"
    return ", ".join(names[:-1]) + ", and " + names[-1]


def _goal_task_type(goal):
    """Task type read off the goal itself, for games that come without a path."""
    predicates = {atom[0] for atom in _goal_atoms(goal)}
    for predicate, kind in (("istoggled", "look_at_obj_in_light"), ("isclean", "pick_clean_then_place_in_recep"),
                            ("ishot", "pick_heat_then_place_in_recep"), ("iscool", "pick_cool_then_place_in_recep"),
                            ("not", "pick_two_obj_and_place")):
        if predicate in predicates:
            return kind
    return "pick_and_place"


class AlfworldGame:
    """One game of ALFWorld, played as the original (alfworld 0.4.2 on textworld 1.7.0) plays it.

    source: path of a game.tw-pddl, its JSON text, or the parts as _read_game returns them; where: the path to read the
    task type from when the source is not a path. Attributes: task, task_type, walkthrough, solvable; after reset() also
    admissible_commands (sorted) and won. The parsed file is never changed: copy.copy(game) plays independently after its
    own reset(). Raises UserError for a file that cannot be played.
    """

    def __init__(self, source, where=""):
        if not isinstance(source, dict):
            text = str(source)
            if not text.lstrip().startswith("{"):
                where = where or text
                try:
                    text = Path(text).read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError) as error:
                    raise UserError(f"cannot read {where}: {error}") from None
            source = _read_game(text, where or "game")
        self._spec, self._static = source, source["facts"]
        self.task, self.walkthrough, self.solvable = source["task"], list(source["walkthrough"]), source["solvable"]
        self.task_type = next((kind for kind in ALFWORLD_GROUPS if kind in where), None) or _goal_task_type(source["goal"])
        static = self._static
        self._name = _names(static)
        self._place, self._at, self._kinds = {}, {}, {}
        for receptacle, place in sorted(static.get("receptacleatlocation", ())):
            self._place[receptacle] = place
            self._at.setdefault(place, []).append(receptacle)
        for thing, kind in static.get("objecttype", set()) | static.get("receptacletype", set()):
            self._kinds.setdefault(thing, set()).add(kind)
        self._agent = next(iter(static["atlocation"]))[0]
        self.won, self._options, self._commands = False, {}, None

    def reset(self):
        """Starts the game anew; returns the opening text."""
        self._facts = dict(self._static)
        for name in _DYNAMIC:
            self._facts[name] = set(self._static.get(name, ()))
        self._taken_from = set()  # (object, receptacle) it was taken out of; only the original's "look" tells the difference
        self._refresh()
        if self._at.get(self._here):
            seen = self._look()
        else:
            everything = _series(["a " + self._name[receptacle] for receptacle in sorted(self._place)])
            seen = f"You are in the middle of a room. Looking quickly around you, you see {everything}."
        return f"-= Welcome to TextWorld, ALFRED! =-\n\n{seen}\n\nYour task is to: {self.task}"

    def step(self, command):
        """Plays one command; returns what happens ("Nothing happens." unless it is admissible to the letter)."""
        option = self._options.get(command.strip())
        if option is None:
            return "Nothing happens."
        verb, *things = option
        text = getattr(self, "_do_" + verb)(*things)
        if verb not in ("look", "inventory", "examine", "help"):
            self._refresh()
        return text

    @property
    def admissible_commands(self):
        """All commands that do something now, sorted."""
        if self._commands is None:
            self._commands = sorted(self._options)
        return list(self._commands)

    @property
    def held_name(self):
        """Name of the object in the player's hand, or None."""
        return self._name[self._held] if self._held else None

    def location_of(self, name):
        """The names of the receptacles standing where the receptacle called `name` stands (visited together)."""
        place = next((self._place[r] for r in self._place if self._name[r] == name), None)
        return [self._name[r] for r in self._at.get(place, ())]

    # The state: self._facts as in PDDL. The agent's place, what it holds and the options are derived from it.

    def _refresh(self):
        self._here = next(place for _, place in self._facts["atlocation"])
        self._held = next((thing for _, thing in self._facts["holds"]), None)
        self._options, self._commands = self._list_options(), None
        self.won = _holds(self._spec["goal"], self._facts, self._spec["objects"], {})

    def _is(self, predicate, thing):
        return (thing,) in self._facts.get(predicate, ())

    def _shut(self, receptacle):
        return self._is("openable", receptacle) and not self._is("opened", receptacle)

    def _contents(self, receptacle):
        return sorted(thing for thing, where in self._facts["inreceptacle"] if where == receptacle)

    def _fits(self, thing, receptacle):
        allowed = self._static.get("cancontain", ())
        return any((kind, what) in allowed for kind in self._kinds.get(receptacle, ()) for what in self._kinds.get(thing, ()))

    def _list_options(self):
        """command -> (verb, ids...) for every action whose precondition holds."""
        name, held = self._name, self._held
        options = {"look": ("look",), "inventory": ("inventory",)}
        if self._spec["help"]:
            options["help"] = ("help",)
        for receptacle, place in self._place.items():
            if place != self._here:
                options["go to " + name[receptacle]] = ("go", receptacle)
        for receptacle in self._at.get(self._here, ()):
            where, shut = name[receptacle], self._shut(receptacle)
            options["examine " + where] = ("examine", receptacle)
            if self._is("openable", receptacle):
                options[("open " if shut else "close ") + where] = ("open" if shut else "close", receptacle)
            for thing in self._contents(receptacle):
                if self._is("toggleable", thing):
                    options["use " + name[thing]] = ("use", thing)
                if held is None and not shut and self._is("pickupable", thing):
                    options[f"take {name[thing]} from {where}"] = ("take", thing, receptacle)
            if held is not None:
                if not shut and self._fits(held, receptacle):
                    put = "move {} to {}" if self._spec["moves"] else "put {} in/on {}"
                    options[put.format(name[held], where)] = ("put", held, receptacle)
                for verb, kinds in self._spec["tools"].items():
                    if self._is(_ABLE[verb], held) and self._kinds.get(receptacle, set()) & kinds:
                        options[f"{verb} {name[held]} with {where}"] = ("treat", verb, held, receptacle)
        if held is not None:
            options["examine " + name[held]] = ("examine", held)
            if self._kinds.get(held, set()) & {"knifetype", "butterknifetype"}:
                for thing, place in self._facts["objectatlocation"]:
                    if place == self._here and self._is("sliceable", thing):
                        options[f"slice {name[thing]} with {name[held]}"] = ("slice", thing, held)
        return options

    def _do_look(self):
        return self._look()

    def _look(self):
        if not self._at.get(self._here):  # the original names the receptacles in the opening text only
            return "You are in the middle of a room. Looking quickly around you, you see nothing."
        near = self._at[self._here]
        beside = ["a " + self._name[thing] for thing, place in sorted(self._facts["objectatlocation"]) if place == self._here
                  for receptacle in near if (thing, receptacle) in self._taken_from]
        return f"You are facing the {_series([self._name[r] for r in near])}. Next to it, you see {_series(beside)}."

    def _do_help(self):
        return _HELP

    def _do_inventory(self):
        return f"You are carrying: a {self._name[self._held]}." if self._held else "You are not carrying anything."

    def _do_examine(self, thing):
        name = self._name[thing]
        if thing in self._place:
            things = _series(["a " + self._name[inside] for inside in self._contents(thing)])
            if self._shut(thing):
                return f"The {name} is closed."
            return f"The {name} is open. In it, you see {things}." if self._is("openable", thing) else \
                f"On the {name}, you see {things}."
        if self._is("isreceptacleobject", thing):
            inside = sorted(x for x, outer in self._static.get("inreceptacleobject", ()) if outer == thing)
            return f"This is a normal {name}. In it, you see {_series(['a ' + self._name[x] for x in inside])}."
        clean, hot, cool, cut = (self._is(p, thing) for p in ("isclean", "ishot", "iscool", "issliced"))
        if not (clean or hot or cool):
            if self._is("toggleable", thing) and self._is("istoggled", thing):
                return f"This {name} is on."
            return f"This is a sliced {name}." if cut and self._is("sliceable", thing) else \
                f"There's nothing special about {name}."
        words = ["hot"] if hot else ["cool" if clean or cut else "cold"] if cool else []
        return f"This is a {' and '.join(words + ['clean'] * clean)}{' sliced' * cut} {name}."

    def _do_go(self, receptacle):
        self._facts["atlocation"] = {(self._agent, self._place[receptacle])}
        place = receptacle if self._spec["named_places"] else self._place[receptacle]  # older games print "loc 7" here
        return f"You arrive at {self._name[place]}. {self._do_examine(receptacle)}"

    def _do_open(self, receptacle):
        self._facts["opened"].add((receptacle,))
        self._facts["checked"].add((receptacle,))
        return f"You open the {self._name[receptacle]}. {self._do_examine(receptacle)}"

    def _do_close(self, receptacle):
        self._facts["opened"].discard((receptacle,))
        return f"You close the {self._name[receptacle]}."

    def _do_take(self, thing, receptacle):
        self._facts["inreceptacle"].discard((thing, receptacle))
        self._facts["objectatlocation"].discard((thing, self._here))
        self._facts["holds"].add((self._agent, thing))
        self._facts["holdsany"].add((self._agent,))
        self._taken_from.add((thing, receptacle))
        return f"You pick up the {self._name[thing]} from the {self._name[receptacle]}."

    def _do_put(self, thing, receptacle):
        self._facts["inreceptacle"].add((thing, receptacle))
        self._facts["objectatlocation"].add((thing, self._here))
        self._facts["holds"].clear()
        self._facts["holdsany"].clear()
        self._taken_from.discard((thing, receptacle))
        text = "You move the {} to the {}." if self._spec["moves"] else "You put the {} in/on the {}."
        return text.format(self._name[thing], self._name[receptacle])

    def _do_treat(self, verb, thing, receptacle):
        self._facts[{"clean": "isclean", "heat": "ishot", "cool": "iscool"}[verb]].add((thing,))
        if verb != "clean":
            self._facts["iscool" if verb == "heat" else "ishot"].discard((thing,))
        return f"You {verb} the {self._name[thing]} using the {self._name[receptacle]}."

    def _do_use(self, thing):
        self._facts["ison"] ^= {(thing,)}
        self._facts["istoggled"].add((thing,))  # never taken back: the original says "turn on" every time
        return f"You turn on the {self._name[thing]}."

    def _do_slice(self, thing, knife):
        self._facts["issliced"].add((thing,))
        return f"You sliced the {self._name[thing]} with the {self._name[knife]}."


# ---- built-in games: small houses from a seed, in the engine's own terms ----

_ROOMS = {  # room -> kinds of receptacle, as often as they are likely to be added
    "kitchen": "cabinet cabinet drawer countertop diningtable shelf fridge sinkbasin garbagecan stoveburner microwave",
    "bathroom": "cabinet cabinet drawer countertop shelf sinkbasin bathtubbasin toilet garbagecan",
    "bedroom": "drawer drawer desk bed dresser shelf sidetable sofa safe garbagecan"}
_OPENABLE = set("cabinet drawer fridge microwave safe".split())
_THINGS = {  # object: room, the two kinds of receptacle it likely is in, what can be done to it (clean, heat, cool)
    "apple": "kitchen fridge diningtable clean heat cool", "potato": "kitchen fridge countertop clean heat cool",
    "tomato": "kitchen fridge countertop clean heat cool", "egg": "kitchen fridge garbagecan clean heat cool",
    "bread": "kitchen countertop diningtable heat cool", "lettuce": "kitchen fridge diningtable clean cool",
    "mug": "kitchen cabinet countertop clean heat cool", "cup": "kitchen cabinet shelf clean heat cool",
    "plate": "kitchen cabinet countertop clean heat cool", "bowl": "kitchen cabinet shelf clean cool",
    "pan": "kitchen stoveburner cabinet clean cool", "fork": "kitchen drawer diningtable clean",
    "spoon": "kitchen drawer sinkbasin clean", "saltshaker": "kitchen shelf cabinet",
    "soapbar": "bathroom sinkbasin bathtubbasin clean", "cloth": "bathroom bathtubbasin drawer clean",
    "toiletpaper": "bathroom toilet cabinet", "spraybottle": "bathroom cabinet toilet", "candle": "bathroom countertop shelf",
    "alarmclock": "bedroom desk sidetable", "book": "bedroom bed desk", "cd": "bedroom drawer shelf",
    "cellphone": "bedroom bed sidetable", "creditcard": "bedroom drawer dresser", "keychain": "bedroom drawer safe",
    "laptop": "bedroom desk bed", "pen": "bedroom desk drawer", "pencil": "bedroom desk drawer",
    "pillow": "bedroom bed sofa", "remotecontrol": "bedroom sofa sidetable", "vase": "bedroom shelf dresser",
    "watch": "bedroom dresser sidetable"}
_SPECIAL = {"microwave", "stoveburner", "toilet"}  # hold only what likely is there
_TASK_TEXTS = {
    "pick_and_place": ("put a {o} in {r}.", "put some {o} on {r}."),
    "look_at_obj_in_light": ("look at {o} under the desklamp.", "examine the {o} with the desklamp."),
    "pick_clean_then_place_in_recep": ("put a clean {o} in {r}.", "clean some {o} and put it in {r}."),
    "pick_heat_then_place_in_recep": ("put a hot {o} in {r}.", "heat some {o} and put it in {r}."),
    "pick_cool_then_place_in_recep": ("put a cool {o} in {r}.", "cool some {o} and put it in {r}."),
    "pick_two_obj_and_place": ("put two {o} in {r}.", "find two {o} and put them in {r}.")}
_VERBS = {"pick_clean_then_place_in_recep": ("clean", "sinkbasin", "isclean"),
          "pick_heat_then_place_in_recep": ("heat", "microwave", "ishot"),
          "pick_cool_then_place_in_recep": ("cool", "fridge", "iscool")}


def _may_hold(thing):
    room, *likely = _THINGS[thing].split()
    return sorted((set(_ROOMS[room].split()) - _SPECIAL) | set(likely[:2]))


def _draw_house(rng, task_type, house):
    """One game's contents: (object, target, receptacles [kind], {receptacle index: [objects]}, indices of what the task needs)."""
    verb, tool, _ = _VERBS.get(task_type, (None, None, None))
    look, copies = task_type == "look_at_obj_in_light", 2 if task_type == "pick_two_obj_and_place" else 1
    thing = rng.choice([name for name, facts in _THINGS.items() if (not verb or verb in facts.split()[3:])
                        and (not look or facts.startswith("bedroom"))])
    room, likely = _THINGS[thing].split()[0], _THINGS[thing].split()[1:3]
    target = rng.choice(["desk", "sidetable"]) if look else rng.choice([k for k in _may_hold(thing) if k != tool])
    sources = [rng.choice(likely if rng.random() < 0.85 else _may_hold(thing)) for _ in range(copies)]
    sources = [kind if look or kind != target else rng.choice([k for k in _may_hold(thing) if k != target]) for kind in sources]
    kinds = sorted({target, *sources, *([tool] if tool else [])})
    pool = _ROOMS[room].split() + likely * 2
    while len(kinds) < house:
        kinds.append(rng.choice([kind for kind in pool if kind not in ("fridge", "microwave", "safe") or kind not in kinds]))
    kinds.sort()
    inside = {i: [] for i in range(len(kinds))}
    at = [rng.choice([i for i, kind in enumerate(kinds) if kind == source]) for source in sources]
    for i in at:
        inside[i].append(thing)
    others = [name for name, facts in _THINGS.items() if facts.startswith(room) and name != thing]
    for _ in range(house):
        other = rng.choice(others)
        hosts = [i for i, kind in enumerate(kinds) if kind in _THINGS[other].split()[1:3]] if rng.random() < 0.85 else []
        hosts = hosts or [i for i, kind in enumerate(kinds) if kind in _may_hold(other)]
        if hosts and len(inside[place := rng.choice(hosts)]) < 3:
            inside[place].append(other)
    goal = rng.choice([i for i, kind in enumerate(kinds) if kind == target])
    if look:
        inside[goal].append("desklamp")
    return thing, target, kinds, inside, (at, kinds.index(tool) if tool else None, goal)


def _receptacle_id(kind, i):
    return f"{kind.removesuffix('basin')}_bar_{i:02d}" + "_bar_basin" * kind.endswith("basin")  # as the benchmark's ids


def _built_in_game(rng, task_type, house):
    """One generated game as the parts that AlfworldGame takes (see _read_game), with its expert walkthrough."""
    thing, target, kinds, inside, (sources, tool, goal) = _draw_house(rng, task_type, house)
    facts = {name: set() for name in ("receptacletype objecttype receptacleatlocation objectatlocation openable inreceptacle "
                                      "pickupable toggleable cleanable heatable coolable isreceptacleobject cancontain").split()}
    receptacles, placed = [], {}
    for i, kind in enumerate(kinds):
        receptacles.append(name := _receptacle_id(kind, i))
        facts["receptacletype"].add((name, kind + "type"))
        facts["receptacleatlocation"].add((name, f"loc_bar_{i:02d}"))
        if kind in _OPENABLE:
            facts["openable"].add((name,))
        for kind_in in inside[i]:
            thing_id = f"{kind_in}_bar_{sum(map(len, placed.values())):02d}"
            placed.setdefault(i, []).append(thing_id)
            facts["objecttype"].add((thing_id, kind_in + "type"))
            facts["inreceptacle"].add((thing_id, name))
            facts["objectatlocation"].add((thing_id, f"loc_bar_{i:02d}"))
            facts["toggleable" if kind_in == "desklamp" else "pickupable"].add((thing_id,))
            for verb in _THINGS.get(kind_in, "").split()[3:]:
                facts[_ABLE[verb]].add((thing_id,))
            if kind_in in ("mug", "cup", "bowl", "plate", "pan"):
                facts["isreceptacleobject"].add((thing_id,))
    facts["cancontain"] = {(kind + "type", name + "type") for name in _THINGS for kind in _may_hold(name)}
    facts["atlocation"] = {("agent1", "loc_bar_99")}
    _, _, state = _VERBS.get(task_type, (None, None, None))
    wanted = f"(objecttype ?o {thing}type) (receptacletype ?r {target}type) (inreceptacle ?o ?r)" + (f" ({state} ?o)" if state else "")
    if task_type == "look_at_obj_in_light":
        wanted = (f"(objecttype ?o {thing}type) (holds agent1 ?o) (objecttype ?t desklamptype) (istoggled ?t) (inreceptacle ?t ?r) "
                  "(receptacleatlocation ?r ?l) (atlocation agent1 ?l)")
    elif task_type == "pick_two_obj_and_place":
        wanted += f" (objecttype ?p {thing}type) (inreceptacle ?p ?r) (not (= ?o ?p))"
    names = [name for tuples in facts.values() for arguments in tuples for name in arguments]
    objects = {"object": names, "receptacle": receptacles, "location": names}
    quantified = "?o - object ?p - object ?t - object ?r - receptacle ?l - location"
    quantified = " ".join(f"{name} - {kind}" for name, kind in re.findall(r"(\?\w) - (\w+)", quantified) if name in wanted)
    seen = _names(facts)
    return dict(facts=facts, objects=objects, goal=_parse_goal(f"(:goal (exists ({quantified}) (and {wanted})))"),
                task=rng.choice(_TASK_TEXTS[task_type]).format(o=thing, r=target), moves=True, named_places=True, help=True,
                tools=_TOOLS, solvable=True, pair=f"{thing}-{target}",
                walkthrough=_built_in_walkthrough(task_type, thing, kinds, placed, (sources, tool, goal), seen))


def _built_in_walkthrough(task_type, thing, kinds, placed, needs, seen):
    """The shortest sensible solution as commands; `seen` maps ids to names."""
    (sources, tool, goal), commands, opened, here = needs, [], set(), [None]

    def visit(i):
        name = seen[_receptacle_id(kinds[i], i)]
        if here[0] != i:
            commands.append("go to " + name)
            here[0] = i
        return name

    def ready(i):
        name = visit(i)
        if kinds[i] in _OPENABLE and i not in opened:
            commands.append("open " + name)
            opened.add(i)
        return name

    taken = set()
    for source in sources:
        thing_id = next(x for x in placed[source] if x.startswith(thing + "_bar_") and x not in taken)
        taken.add(thing_id)
        commands.append(f"take {seen[thing_id]} from {ready(source)}")
        commands[-1:] = [commands[-1]]
        if tool is not None:
            commands.append(f"{_VERBS[task_type][0]} {seen[thing_id]} with {visit(tool)}")
        if task_type == "look_at_obj_in_light":
            visit(goal)
            commands.append("use " + next(seen[x] for x in placed[goal] if x.startswith("desklamp")))
        else:
            commands.append(f"move {seen[thing_id]} to {ready(goal)}")
    return commands


def built_in_game(split, index, task_type, seed, house):
    """Game number `index` of a split, deterministic in (seed, split, index, house). The splits cannot overlap: object and
    target together decide whether a game may be in valid_unseen, the whole contents whether it may be in valid_seen."""
    rng = random.Random(f"{seed}/{split}/{index}/{house}")
    for _ in range(10_000):
        game = _built_in_game(rng, task_type, house)
        contents = repr((task_type, game["pair"], sorted(game["facts"]["inreceptacle"]), sorted(game["facts"]["receptacletype"])))
        unseen = int(panel_hash([game["pair"]]), 16) % 6 == 0
        seen = int(panel_hash([contents]), 16) % 6 == 0
        if split == ("valid_unseen" if unseen else "valid_seen" if seen else "train"):
            return game
    raise UserError(f"no built-in game for {split}/{index} with house={house}; choose another seed or a larger house")


# ---- skills: what the teacher is told ----

ALFWORLD_SKILLS = {
    "general": "Search likely receptacles first, each once; open what is closed before you call it empty. Take the sought object "
               "as soon as you see it. Food: fridge, countertop, diningtable. Dishes: cabinet, countertop, shelf. Cutlery: drawer. "
               "Pens, laptops, clocks: desk. Cards, keys, cds: drawer. Books, phones: bed. You hold one object at a time.",
    "pick_and_place": "Pick and place. 1. Find the object where its kind usually is. 2. Take it. 3. Go to the target receptacle. "
                      "4. Open it if closed. 5. Move the object to it.",
    "look_at_obj_in_light": "Look under a lamp. 1. Find the object and take it. 2. Find the desklamp: on a desk or a sidetable. "
                            "3. Holding the object, use the desklamp. Do not put the object down.",
    "pick_clean_then_place_in_recep": "Clean and place. 1. Find and take the object. 2. Go to the sinkbasin. 3. Clean it with the "
                                      "sinkbasin. 4. Go to the target, open it if closed. 5. Move the object to it.",
    "pick_heat_then_place_in_recep": "Heat and place. 1. Find and take the object. 2. Go to the microwave; no need to open it. "
                                     "3. Heat the object with the microwave. 4. Go to the target, open it if closed. 5. Move it there.",
    "pick_cool_then_place_in_recep": "Cool and place. 1. Find and take the object; look into the fridge early. 2. Go to the fridge. "
                                     "3. Cool the object with the fridge. 4. Go to the target, open it if closed. 5. Move it there.",
    "pick_two_obj_and_place": "Two objects. 1. Find and take the first. 2. Move it to the target. 3. Find a second one of the same "
                              "kind, not the one already placed. 4. Move it to the same target receptacle.",
    "mistakes": "Avoid: going back to places already searched; leaving closed receptacles unopened; placing the object before it "
                "is clean, hot or cool; naming an action that is not offered."}
_SKILL_ALIASES = {"pick_and_place": ("pick_and_place_simple",), "look_at_obj_in_light": ("examine",),
                  "pick_clean_then_place_in_recep": ("clean",), "pick_heat_then_place_in_recep": ("heat",),
                  "pick_cool_then_place_in_recep": ("cool",), "pick_two_obj_and_place": ("pick_two", "pick_and_place")}

# ---- expert ----


def _kind_of(name):
    return name.rsplit(" ", 1)[0]


def _sought(commands):
    """The object looked for at the place that the first command goes to, if the next ones take or use one there."""
    for command in commands[1:]:
        if command.startswith("go to "):
            return None
        if found := re.match(r"(?:take|use) (.+? \d+)", command):
            return found[1]
    return None


def _thought(command, sought, looking):
    """A short reason for the command. sought: kind searched at the place gone to; looking: already searched in vain."""
    verb, *words = command.split()
    rest = " ".join(words)
    if verb == "go":
        place = rest.removeprefix("to ")
        if sought:
            return f"no {sought} here; look in {place} next" if looking else f"I need a {sought}; look in {place}"
        return f"I go to {place} with it"
    return {"open": f"{rest} is closed; open it", "take": f"found it; {command}", "use": f"here is {rest}; turn it on",
            "move": f"this is the place; {command}", "put": f"this is the place; {command}"}.get(verb, f"now {command}")


def expert_script(game, detours=0, seed=0):
    """[(thought, command)] that wins `game` along its walkthrough. Before each place where something is sought, up to `detours`
    other places are searched (drawn from `seed`, likely ones first), as a player must who does not know where it is."""
    for budget in ([detours] if detours else []) + [0]:
        game = copy.copy(game)
        game.reset()
        script = _play_expert(game, budget, random.Random(f"{seed}/{game.task}"))
        if game.won:
            return script
    raise UserError(f"the walkthrough of this game ({game.task}) does not solve it; take another release of the data")


def _play_expert(game, detours, rng):
    script, visited, looking = [], set(), False

    def play(command, sought=None):
        if command in game._options and not game.won:
            script.append((_thought(command, sought, looking), command))
            game.step(command)

    for i, command in enumerate(game.walkthrough):
        place = command.removeprefix("go to ")
        thing = _sought(game.walkthrough[i:]) if command != place else None
        if command == place or not thing or place in visited:
            play(command)
            visited.add(place)
            continue
        sought = _kind_of(thing)
        for stop in _search_order(game, thing, place, visited, rng)[:rng.randint(0, detours)]:
            play("go to " + stop, sought)
            play("open " + stop)
            visited.update(game.location_of(stop))
            looking = True
        play(command, sought)
        visited.update(game.location_of(place))
        looking = False
    return script


def _search_order(game, thing, place, visited, rng):
    """Receptacles to search in vain for `thing` (a name, found at `place`) in a plausible random order: unvisited, none of its
    kind there, those where such objects usually are before those that can hold it before the others."""
    sought, near = _kind_of(thing), set(game.location_of(place))
    held = {spot for thing_id, spot in game._facts["inreceptacle"] if _kind_of(game._name[thing_id]) == sought}
    thing_id = next((key for key, name in game._name.items() if name == thing), None)
    likely = _THINGS.get(sought, "x desk sidetable").split()[1:3]
    scored = []
    for receptacle in sorted(game._place):
        name = game._name[receptacle]
        if name in visited or name in near or held & set(game._at[game._place[receptacle]]):
            continue
        weight = 1.0 if _kind_of(name) in likely else 0.2 if game._fits(thing_id, receptacle) else 0.02
        scored.append((rng.random() ** (1 / weight), name))  # weighted sampling without replacement
    return [name for _, name in sorted(scored, reverse=True)]


# ---- sessions and the environment ----

_PROMPT = """
You are an expert agent acting in the ALFRED Embodied Environment. {task}{skill}{history}your current observation is: {observation}
The admissible actions in your situation are: [{actions}].

Now it is your turn to act.
First reason step by step about the situation. The reasoning MUST stand between <think> and </think>.
When it is done, choose one admissible action for this step and put it between <action> and </action>.
"""


def parse_action(response, think_closed=False):
    """(action, valid) of a response, judged as the public projection does: lower case, text between the first <action> and the
    first </action>; without both tags the last 30 characters, invalid. Invalid too: a missing <think> or </think> (not
    demanded with think_closed) and any CJK character."""
    low = response.lower()
    start, end = low.find("<action>"), low.find("</action>")
    if start < 0 or end < 0:
        return low[-30:], False
    thinks = think_closed or ("<think>" in response and "</think>" in response)
    return low[start + len("<action>"):end].strip(), bool(thinks and not re.search("[\u4e00-\u9fff]", response))


def _terse(observation):
    """An observation in few words, for models trained from scratch."""
    if observation.startswith("-="):
        return "start"  # the places named there are the ones that can be gone to
    text = re.sub(r"^You (?:arrive at|open the) .*?\. (?=The|On)", "", observation)
    text = re.sub(r"^On the (.*?), you see", r"\1:", text)
    text = re.sub(r"^The (.*?) is open\. In it, you see", r"\1:", text)
    text = re.sub(r"^The (.*?) is closed\.$", r"\1 closed", text)
    text = re.sub(r"^You (?:pick up|turn on|heat|cool|clean|move|put|open|close) (?:the )?.*", "done", text)
    return re.sub(r"\b(?:and )?a (?=\w+ \d)", "", text).rstrip(".")


class AlfworldSession:
    """One episode; see Alfworld.start. `turns` holds (observation, action) so far, actions cut to one line of 200 characters."""

    def __init__(self, task_id, game, seed, detours):
        self.task_id, self.game, self._seed, self._detours = task_id, game, seed, detours
        self.observation = game.reset()
        self.task, self.category, self.group = game.task, game.task_type, ALFWORLD_GROUPS[game.task_type]
        self.turns, self._script = [], None
        self.action, self.valid, self.admissible, self.done, self.won = "", True, True, game.won, game.won
        self.details = {"inadmissible": 0, "invalid": 0}

    @property
    def score(self):
        return float(self.won)

    def prompt(self, skill="", history=2, room=None, brief=False):
        """The user message of this turn; `room` limits every observation in it (characters)."""
        past = self.turns[-history:] if history > 0 else []
        if brief:
            return self._brief_prompt(skill, past, room)
        observation = shorten_middle(self.observation, room)
        told = not self.turns and observation == self.observation  # the opening text names the task itself
        lines = [f"[Observation {i}: '{shorten_middle(seen, room)}', Action {i}: '{action}']"
                 for i, (seen, action) in enumerate(past, len(self.turns) - len(past) + 1)]
        count = len(self.turns)
        before = (f"Before this step you have already taken {count} step(s). The most recent {len(past)} observations and the "
                  "actions you took on them:\n" + "\n".join(lines) + "\n") if past else ""
        return _PROMPT.format(
            task="" if told else f"Your task is to: {self.task}\n", history=before + (f"You are now at step {count + 1} and " if count else "Now "),
            skill=f"\nSkills that help with tasks of this kind:\n{skill}\n\n" if skill else "", observation=observation,
            actions="\n ".join(f"'{command}'" for command in self.game.admissible_commands if command != "help"))

    def _brief_prompt(self, skill, past, room):
        """The same parts in few tokens. look, inventory and examine are not listed (they can be played); what is held is."""
        commands = self.game.admissible_commands
        places = [command.removeprefix("go to ") for command in commands if command.startswith("go to ")]
        other = [command for command in commands if not command.startswith(("go to ", "examine ", "look", "inventory", "help"))]
        held = self.game.held_name
        lines = ["Task: " + self.task.rstrip("."), "Skill: " + skill if skill else "",
                 "Last: " + " | ".join(f"{_terse(shorten_middle(seen, room))} > {action}" for seen, action in past) if past else "",
                 "Have: " + held if held else "", f"Step {len(self.turns) + 1}: " + _terse(shorten_middle(self.observation, room)),
                 "Actions: " + "; ".join(other + ["go to " + ", ".join(places)])]
        return "\n".join(line for line in lines if line) + "\n"

    def step(self, response, think_closed=False):
        """Plays one raw response. Does nothing after the end."""
        if self.done:
            return
        action, self.valid = parse_action(response, think_closed)
        self.admissible = action.strip() in self.game._options
        self.action = one_line(action)
        self.turns.append((self.observation, self.action))
        self.observation = self.game.step(action)
        self.won = self.done = self.game.won
        self.details["inadmissible"] += not self.admissible
        self.details["invalid"] += not self.valid

    def expert(self):
        """The expert's response for this turn, as long as only expert responses were played."""
        if self._script is None:
            self._script = expert_script(self.game, self._detours, self._seed)
        if len(self.turns) >= len(self._script):
            raise UserError("the expert has no step left: the game is won, or other actions than the expert's were played")
        return "<think>{}</think><action>{}</action>".format(*self._script[len(self.turns)])


class Alfworld:
    """The benchmark ALFWorld, or games built from `seed` where its data is not found.

    data: folder or zip of the release; skills: public skill directory; task_types: types or columns to keep ("Pick", "pick_heat_...");
    house: receptacles of a built-in game (4..12); detours: default for start(). Raises UserError for unusable input.
    """
    name, stop = "alfworld", ("</action>",)
    splits = ("train", "valid_seen", "valid_unseen")

    def __init__(self, data=None, seed=233, skills=None, house=6, task_types=None, detours=0, train_games=2000):
        self.seed, self.house, self.detours = seed, int(house), int(detours)
        if not 4 <= self.house <= 12:
            raise UserError(f"house={house}: a built-in house has 4 to 12 receptacles")
        self.skill_names = list(ALFWORLD_GROUPS)
        self._skills = read_skills(skills, self.skill_names, _SKILL_ALIASES) if skills else ALFWORLD_SKILLS
        self.task_types = self._pick_types(task_types)
        self._cache, self._kept = OrderedDict(), {}
        path = find_data("alfworld", data)
        self._files = GameFiles(path) if path else None
        if self._files and not self._files.splits:
            if data or os.environ.get("ALFWORLD_DATA"):
                raise UserError(f"no game.tw-pddl under {path}; it should hold json_2.1.1/train, valid_seen, valid_unseen "
                                "(python envs.py download alfworld)")
            self._files = None
        self.builtin = self._files is None
        self._sizes = {"train": int(train_games), "valid_seen": 140, "valid_unseen": 134}
        if self.builtin:
            self.source = (f"built-in games (seed {seed}): {self.house} receptacles, train {train_games}, valid_seen 140, "
                           "valid_unseen 134; for the real benchmark: python envs.py download alfworld")
        else:
            counts = ", ".join(f"{split} {len(games)}" for split, games in self._files.splits.items())
            self.source = f"ALFWorld games in {path}: {counts}"

    @staticmethod
    def _pick_types(wanted):
        if not wanted:
            return tuple(ALFWORLD_GROUPS)
        wanted = [name.strip().lower() for name in (wanted.split(",") if isinstance(wanted, str) else wanted)]
        chosen = tuple(kind for kind, group in ALFWORLD_GROUPS.items() if kind in wanted or group.lower() in wanted)
        if len(chosen) != len(set(wanted)):
            raise UserError(f"task_types {','.join(wanted)}: choose from {', '.join(ALFWORLD_GROUPS.values())}")
        return chosen

    def tasks(self, split):
        """Sorted ids "split/task folder/trial folder" (built-in: "split/task type/number")."""
        if split not in self.splits:
            raise UserError(f"unknown split {split!r}; ALFWorld has {', '.join(self.splits)}")
        if split not in self._kept:
            if self.builtin:
                kinds = self.task_types
                self._kept[split] = sorted(f"{split}/{kinds[i % len(kinds)]}/{i:05d}" for i in range(self._sizes[split]))
            else:
                self._kept[split] = [name for name in self._files.solvable(split)
                                     if any(kind in name.split("/")[1] for kind in self.task_types)]
        if not self._kept[split]:
            raise UserError(f"no solvable games in split {split} of {self.source}; check --data and task_types")
        return list(self._kept[split])

    def game(self, task_id):
        """A fresh AlfworldGame for the id; the parsed file is kept for the next time (the last 64 of them)."""
        if task_id in self._cache:
            self._cache.move_to_end(task_id)
        else:
            self._cache[task_id] = self._load(task_id)
            if len(self._cache) > 64:
                self._cache.popitem(last=False)
        return copy.copy(self._cache[task_id])

    def _load(self, task_id):
        if self.builtin:
            found = re.fullmatch(r"(train|valid_seen|valid_unseen)/(\w+)/(\d+)", task_id)
            if not found or found[2] not in ALFWORLD_GROUPS:
                raise UserError(f"no built-in game is called {task_id!r}; see tasks(split)")
            return AlfworldGame(built_in_game(found[1], int(found[3]), found[2], self.seed, self.house), where=task_id)
        return AlfworldGame(self._files.read(task_id), where=self._files.place(task_id))

    def start(self, task_id, seed=0, detours=None):
        """A new episode of the game. seed and detours only decide how the expert searches (see expert_script)."""
        return AlfworldSession(task_id, self.game(task_id), seed, self.detours if detours is None else detours)

    def step(self, sessions, responses, think_closed=False):
        """Advances every session by one raw response."""
        for session, response in zip(sessions, responses):
            session.step(response, think_closed)

    def skill(self, category, brief=False):
        """Privileged text for a task type: general, its own, common mistakes; brief: its own alone."""
        if category not in self.skill_names:
            raise UserError(f"no skill {category!r}; there are {', '.join(self.skill_names)}")
        parts = [category] if brief else ["general", category, "mistakes"]
        return "\n".join(self._skills[part] for part in parts if self._skills[part])

    def all_skills(self):
        """The whole library as one text."""
        return "\n".join(text for text in (self._skills[part] for part in ("general", *self.skill_names, "mistakes")) if text)


class GameFiles:
    """The game files of a release: a folder or its zip, which is read in place. splits: split -> {id: file}."""

    def __init__(self, path):
        self.path, self._zip, self._pid = Path(path), None, None
        if self.path.is_dir():
            bases = [self.path, *sorted(self.path.glob("json_2.1.*/"))]
            files = [file for base in bases for split in Alfworld.splits for file in (base / split).glob("*/*/game.tw-pddl")]
            if not files and (archives := sorted(self.path.glob("json_2.1.*tw-pddl*.zip"))):
                self.path = archives[-1]
        if self.path.is_file():
            files = self._archive().namelist()
        self.splits = {}
        for file in files:
            name = file if isinstance(file, str) else file.as_posix()
            if (found := re.search(r"(?:^|/)((train|valid_seen|valid_unseen)/[^/]+/[^/]+)/game\.tw-pddl$", name)) \
                    and "movable" not in found[1] and "Sliced" not in found[1]:
                self.splits.setdefault(found[2], {})[found[1]] = file
        self.splits = {split: dict(sorted(self.splits[split].items())) for split in Alfworld.splits if split in self.splits}

    def _archive(self):
        if self._pid != os.getpid():  # a forked process must not share the file position
            try:
                self._zip, self._pid = zipfile.ZipFile(self.path), os.getpid()
            except (zipfile.BadZipFile, OSError) as error:
                raise UserError(f"cannot read {self.path} as a zip archive ({error}); download it again") from None
        return self._zip

    def place(self, task_id):
        file = self.splits.get(task_id.split("/")[0], {}).get(task_id)
        if file is None:
            raise UserError(f"no game {task_id!r} in {self.path}; see tasks(split)")
        return f"{self.path}:{file}" if isinstance(file, str) else str(file)

    def read(self, task_id, tail=None):
        """Text of a game file (its last `tail` bytes, if given, where that is cheaper). Raises UserError naming the file."""
        where, file = self.place(task_id), self.splits[task_id.split("/")[0]][task_id]
        try:
            if isinstance(file, str):
                return self._archive().read(file).decode("utf-8")
            with open(file, "rb") as handle:
                if tail:
                    handle.seek(max(os.path.getsize(file) - tail, 0))
                return handle.read().decode("utf-8", "replace" if tail else "strict")
        except (OSError, ValueError, zipfile.BadZipFile, EOFError, zipfile.zlib.error) as error:
            raise UserError(f"cannot read {where}: {error}; fetch it again") from None

    def solvable(self, split):
        """Sorted ids of the games of a split that the release marks as solvable."""
        def unsolvable(name):
            marks = re.findall(r'"solvable":\s*(\w+)', self.read(name, tail=1 << 13)[-(1 << 13):])
            return marks == ["false"]
        return [name for name in self.splits.get(split, {}) if not unsolvable(name)]


def download_alfworld(folder, url=ALFWORLD_URL):
    """Fetches the official games into `folder` as a zip, which is played in place. Raises UserError."""
    path = Path(folder) / url.rsplit("/", 1)[-1]
    if path.exists():
        print(f"{path} is already there")
    else:
        download(url, path)
    check_zip(path)
    games = GameFiles(path).splits
    if not games:
        raise UserError(f"{path} holds no games; {url} is not the release this program knows")
    print(f"ALFWorld is in {path}: " + ", ".join(f"{split} {len(names)}" for split, names in games.items()))
    return path


# --------------------------------------------------------------------------------------------------------------------
# panel
# --------------------------------------------------------------------------------------------------------------------

def panel(env, split, episodes=None, seed=233):
    """(sorted task ids, hash) of an evaluation panel: the whole split, or `episodes` of it, the first of a seeded order, so
    that smaller panels lie within larger ones. Raises UserError for an unknown or empty split."""
    ids = env.tasks(split)
    if episodes and episodes < len(ids):
        ids = sorted(sorted(ids, key=lambda i: hashlib.sha256(f"{seed}/{i}".encode()).digest())[:episodes])
    return ids, panel_hash(ids)


if __name__ == "__main__":
    sys.exit(main())
