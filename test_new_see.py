"""New tests of the helper `see`, to be moved into test_sdar.py: transcripts of evaluations, runs
paired by seed, README."""

import json
import re

import pytest

import eval as ev
import sdar
from test_sdar import HERE, evaluated, evaluated_run, page, printed, refused

# ---- Evaluation, after `test_an_interrupted_evaluation_continues` ----

SHORT = ["--episodes", 3, "--max-turns", 2]

def test_an_evaluations_episodes_can_be_read(evaluated_run, tmp_path, capsys):
    """--save-episodes N keeps N episodes as a run's log does; playing them changes no result."""
    plain = evaluated(evaluated_run, tmp_path / "plain.json", *SHORT)
    kept = evaluated(evaluated_run, tmp_path / "kept.json", *SHORT, "--save-episodes", 2)
    assert kept["results"] == plain["results"]
    path = tmp_path / "kept.episodes.jsonl"
    rows = sdar.read_lines(path)
    assert [row["task_id"] for row in rows] == [r["id"] for r in kept["results"][:2]]
    assert [row["failure"] for row in rows] == [r["failure"] for r in kept["results"][:2]]
    assert rows[0]["step"] == 2 and rows[0]["skill_text"] and len(rows[0]["turns"]) == 2
    capsys.readouterr()
    shown = printed(capsys, "gates", path, "--episode", 1)
    assert re.search(r"\[0\.\d\d\]", shown) and f"task {rows[0]['task_id']}" in shown
    assert not (tmp_path / "plain.episodes.jsonl").exists()

@pytest.mark.parametrize("algo, flags", [("grpo", []), ("sdar", ["--skills"])])
def test_episodes_without_a_teacher_are_shown_without_gates(evaluated_run, tmp_path, capsys,
                                                            monkeypatch, algo, flags):
    """So it is where the method has no teacher, or the agent itself has read the skill."""
    read = ev.read_flags

    def other(argv):
        flags, s, *rest = read(argv)
        s.algo = algo
        return flags, s, *rest

    monkeypatch.setattr(ev, "read_flags", other)
    evaluated(evaluated_run, tmp_path / "x.json", *SHORT, "--save-episodes", *flags)
    rows = sdar.read_lines(tmp_path / "x.episodes.jsonl")
    assert len(rows) == 3 and not any("gate" in turn for row in rows for turn in row["turns"])
    assert all(bool(row["skill_text"]) == bool(flags) for row in rows)
    capsys.readouterr()
    text = printed(capsys, "gates", tmp_path / "x.episodes.jsonl")
    assert f"task {rows[-1]['task_id']}" in text and rows[-1]["turns"][0]["observation"] in text
    printed(capsys, "gates", tmp_path / "x.episodes.jsonl", "--html", tmp_path / "x.html")
    assert "gate 1" not in (tmp_path / "x.html").read_text()

def test_failures_of_an_evaluation_are_counted_by_kind(evaluated_run, tmp_path, capsys):
    """In the JSON per group and, for the whole panel, below the table."""
    result = evaluated(evaluated_run, tmp_path / "x.json", *SHORT)
    kinds = [r["failure"] for r in result["results"] if not r["won"]]
    counts = result["summary"][-1]["failures"]
    assert kinds and counts == {kind: kinds.count(kind) for kind in kinds}
    for kind, n in counts.items():
        assert f"{kind.replace('_', ' ')} {n}" in capsys.readouterr().out

@pytest.mark.parametrize("name", ["guess.py:Guess", "alfworld"])
def test_the_papers_lines_stand_below_its_benchmarks_alone(name, monkeypatch, capsys):
    """`table` of an environment of one's own says nothing about what the paper published."""
    summary = ev.summarize(name, [{"group": "x", "won": True, "score": 1.0, "turns": 1,
                                   "valid": 1, "admissible": 1}])
    result = dict(env=name, algo="sdar", checkpoint="c", model="m", training={}, tasks="t",
                  settings={}, finished=0, base_model="tiny", skills=None, step=1, summary=summary)
    monkeypatch.setattr(ev, "evaluations", lambda run, notes: [result])
    text = printed(capsys, "table", "run")
    assert ("Published" in text) == ("2605.15155" in text) == (name == "alfworld")
    assert ev.NOTE in text

# ---- Evaluation, after the tests of `table`: runs paired by seed ----

STUDY = """\
seed,method,setting,successes,episodes,seconds
1,grpo,"env alfworld, steps 9",40,100,1800
2,grpo,"env alfworld, steps 9",50,100,1800
3,grpo,"env alfworld, steps 9",60,100,1800
1,sdar,"env alfworld, steps 9",44,100,1800
2,sdar,"env alfworld, steps 9",58,100,1800
3,sdar,"env alfworld, steps 9",72,100,1800
3,sdar,"env alfworld, lam 0.1, steps 9",60,100,1800
4,sdar,"env alfworld, lam 0.1, steps 9",99,100,1800
"""

def study_file(folder, text=STUDY):
    """A CSV of runs."""
    path = folder / "study.csv"
    path.write_text(text)
    return path

def rows_of(text):
    """{first cell: the other cells} of a printed table."""
    rows = [re.split("  +", line) for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 2}

def test_runs_are_paired_by_seed(tmp_path, capsys):
    """Differences 4, 8 and 12 points: mean 8, sd 4, t(2) 4.303; sign test 2 / 2^3; a seed without
    a partner and what all settings share are left out; one pair has no interval."""
    text = printed(capsys, "table", study_file(tmp_path), "--paired")
    rows = rows_of(text)
    assert rows["sdar"] == ["grpo", "3", "+8.0 [-1.9, +17.9]", "3", "0", "0.25"]
    assert rows["sdar, lam 0.1"] == ["grpo", "1", "+0.0", "0", "0", "1"]
    assert "sdar, lam 0.1: no partner in grpo for 1 of its seeds" in text
    assert "8 runs, 4.0 h" in text

def test_runs_are_paired_with_the_baseline_that_is_named(tmp_path, capsys):
    """Without a name it is the row of GRPO with most in common, without GRPO the first row."""
    path = study_file(tmp_path)
    rows = rows_of(printed(capsys, "table", path, "--paired", "sdar"))
    assert rows["grpo"][:3] == ["sdar", "3", "-8.0 [-17.9, +1.9]"]
    assert rows["sdar, lam 0.1"][:3] == ["sdar", "1", "-12.0"]
    study_file(tmp_path, STUDY.replace("grpo", "rlsd"))
    assert rows_of(printed(capsys, "table", path, "--paired"))["sdar"][0] == "rlsd"
    study_file(tmp_path, re.sub('"env alfworld, steps 9"', "", STUDY))
    assert rows_of(printed(capsys, "table", path))["sdar"][0] == "grpo"
    longer = STUDY.replace("steps 9", "steps 20").partition("\n")[2]
    study_file(tmp_path, STUDY + longer)
    rows = rows_of(printed(capsys, "table", path, "--paired"))
    assert rows["sdar, lam 0.1, steps 20"][0] == rows["sdar, steps 20"][0] == "grpo, steps 20"
    assert rows["sdar, steps 9"][:3] == ["grpo, steps 9", "3", "+8.0 [-1.9, +17.9]"]

@pytest.mark.parametrize("old, new, hint", [
    ("1,sdar", "2,sdar", "sdar has seed 2 twice"), ("44,100", "44,many", "damaged"),
    ("successes", "won", "seed,method,setting,successes"), ("44,100", "44,0", "damaged")])
def test_a_study_that_cannot_be_paired_is_one_line(tmp_path, capsys, old, new, hint):
    """A seed that is there twice, other columns, what is no number."""
    path = study_file(tmp_path, STUDY.replace(old, new))
    assert hint in refused(capsys, "table", path, "--paired")
    assert "takes one of: grpo; sdar; sdar, lam 0.1" in refused(
        capsys, "table", study_file(tmp_path), "--paired", "other")

def test_run_folders_become_lines_of_a_study(tmp_path, capsys):
    """--csv keeps seed, method, what the run was told, its last validation and its seconds; the
    file reads as the runs do. A run that is not finished is left out, a warm start is no setting."""
    (tmp_path / "warm").mkdir()
    for name, seed, algo, flags, won in (
            ("a", 1, "grpo", [], 5), ("b", 1, "sdar", [], 6), ("c", 1, "sdar", ["--lam", "0.1"], 8),
            ("d", 2, "sdar", [], 9)):
        run = tmp_path / name
        run.mkdir()
        s, _ = sdar.read_settings(["--env", "alfworld", "--model", str(tmp_path / "warm"), "--seed",
                                   str(seed), "--algo", algo, "--steps", "3", *flags])
        (run / "config.json").write_text(json.dumps(vars(s) | {"versions": {}}))
        tests = [{"step": n, "panel": "abc", "successes": won, "episodes": 10}
                 for n in (0, 3 if name != "d" else 2)]
        (run / "validation.jsonl").write_text("\n".join(map(json.dumps, tests)))
        (run / "metrics.jsonl").write_text('{"step": 1, "seconds": 2.5}\n' * 3)
    runs = [tmp_path / name for name in "abcd"]
    text = printed(capsys, "table", *runs, "--paired", "--csv", tmp_path / "study.csv")
    assert rows_of(text)["sdar"][:3] == ["grpo", "1", "+10.0"]
    assert rows_of(text)["sdar, lam 0.1"][2] == "+30.0" and f"{runs[3]} is left out" in text
    lines = (tmp_path / "study.csv").read_text().splitlines()
    assert lines[0] == STUDY.splitlines()[0] and len(lines) == 4
    assert lines[3] == '1,sdar,"env alfworld, panel abc, lam 0.1, steps 3",8,10,7.5'
    again = printed(capsys, "table", tmp_path / "study.csv")
    assert again == text.split("last step\n")[1]
    assert "config.json" in refused(capsys, "table", tmp_path, "--paired")

def test_plot_draws_the_pairs(tmp_path, capsys):
    """Of a CSV of runs, or with --paired, `plot` shows what `table` prints."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "x.png"
    printed(capsys, "plot", study_file(tmp_path), "--out", out)
    assert out.read_bytes().startswith(b"\x89PNG")

# ---- README ----

def test_readme_tells_a_newcomer_what_he_needs():
    """It opens with a picture of gates; clone, Python, hub, citation and what is kept out."""
    text = page("README.md")
    assert re.search(r"!\[.*?\]\((.*?)\)", text)[1] == "docs/gates.png"
    assert (HERE / "docs" / "gates.png").stat().st_size < 200_000
    for part in ("git clone ", "Python 3.", "hf upload ", "eprint={2605.15155}", "docs/results.md",
                 "Kept out on purpose: LoRA, vLLM, notebooks, Docker"):
        assert part in text, part
