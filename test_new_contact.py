"""Tests of --control-every, --gap contrast and `eval.py gap`; to be moved into test_sdar.py."""

import dataclasses
import json
import types

import pytest
import torch

import eval as ev
import sdar
from test_sdar import (F64, close, env, exact, expected_gradient, gated, gradient_of,
                       learned, policies, policy, printed, random_turns, refused, refused_line,
                       reverse_kl, same, settings, weighted_gradient)

# ======== --gap contrast: exact expectations ======================================================

def contrast(own, control, beta=5.0, baseline=0.0):
    """The contrast's loss of every token as a function of log pi (V,), by the code that trains."""
    s = settings(gap="contrast", beta=beta, lam=1.0)

    def token_loss(logp):
        turn = sdar.Turn([0], [0] * len(logp), teacher_logp=own, extra={"control": control})
        b = sdar.batch_of([turn])
        b.logp = logp[None]
        b.baseline = baseline
        return sdar.sdar(b, s)[0]
    return token_loss

@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_contrast_gate_rewards_what_only_the_own_skill_says(beta):
    """E[grad] is that of -E[g], g fixed: 0 where the skills agree, but not where the student does
    what its skill says; small beta: towards the own skill and away from the other."""
    logits, own = policies()
    control = policies(seed=5)[1]
    g = torch.sigmoid(beta * (own - control))
    loss = contrast(own, control, beta)
    assert close(expected_gradient(loss, logits), gradient_of(lambda p: -(p.exp() * g).sum(), logits))
    assert expected_gradient(contrast(own, own, beta), logits).abs().max() < 1e-15
    assert contrast(own, own, beta, baseline=0.5)(logits.log_softmax(-1)).abs().max() == 0
    assert expected_gradient(gated(own, beta), logits).abs().max() > 1e-3    # SDAR's goes on there
    taught = own.clone().requires_grad_()
    assert expected_gradient(gated(own, beta), taught).abs().max() < 1e-15
    assert expected_gradient(loss, taught).abs().max() > 1e-3
    apart = gradient_of(lambda p: reverse_kl(own)(p) - reverse_kl(control)(p), logits)
    tiny = expected_gradient(contrast(own, control, 1e-5), logits) / (1e-5 / 4)
    assert close(tiny, apart, 1e-5)

CONTRASTS = [{}, dict(gate_baseline=True), dict(gate="soft-or"), dict(divergence="reverse-kl")]

def contrasted(policy):
    """random_turns with log-probabilities under another category's skill."""
    turns = random_turns(policy)
    for t, other in zip(turns, random_turns(policy, seed=0)):
        t.extra["control"] = other.ref_logp
    return turns

@pytest.mark.parametrize("changes", CONTRASTS, ids=str)
def test_micro_batches_change_no_gradient_of_the_contrast(exact, changes):
    """Tokens per micro-batch, row order and padding: same gradient, same metrics."""
    results = []
    for micro_tokens, seed in ((1, 0), (70, 1), (10**6, 2)):
        s = settings(gap="contrast", lam=0.3, micro_tokens=micro_tokens, seed=seed, **changes)
        results.append(learned(exact, contrasted(exact), s))
    metrics, gradient = results[0]
    assert gradient.norm() > 1e-3
    for other, again in results[1:]:
        assert same(again, gradient) and other == pytest.approx(metrics, rel=1e-5, abs=1e-7)

def test_contrast_changes_the_gate_and_nothing_else(exact):
    """A token's gradient is -weight * lambda * gate * grad log pi; metrics compare both gaps."""
    turns = contrasted(exact)
    s = settings(gap="contrast", lam=0.3, algo="sdar")
    method = sdar.Method("teacher", sdar.METHODS["opsd"].advantages, sdar.sdar)
    metrics, gradient = learned(exact, turns, s, method)
    gates = [torch.sigmoid(5 * (t.teacher_logp - t.extra["control"])) for t in turns]
    coefficients = [-0.3 * t.weight * gate for t, gate in zip(turns, gates)]
    assert same(gradient, weighted_gradient(exact, turns, coefficients))
    own = torch.cat([t.teacher_logp - t.logp for t in turns])
    other = torch.cat([t.extra["control"] - t.logp for t in turns])
    moved = (torch.sigmoid(5 * own) - torch.sigmoid(5 * other)).abs() > 0.1
    assert metrics["gate"] == pytest.approx(torch.cat(gates).mean().item())
    assert metrics["gap"] == pytest.approx(own.mean().item())
    assert metrics["control_gap"] == pytest.approx(other.mean().item())
    assert metrics["control_gate_moved"] == pytest.approx(moved.double().mean().item())
    r = torch.corrcoef(torch.stack([own, other]))[0, 1].item()
    assert metrics["control_correlation"] == pytest.approx(r) and -1 < r < 1

# ======== --control-every: runs ===================================================================

CONTROLS = {"control_gap", "control_correlation", "control_gate_moved"}

def numbers(run):
    """The metrics of a run without its times, by step."""
    return [{name: value for name, value in row.items() if "second" not in name
             and "per_s" not in name and "memory" not in name}
            for row in sdar.read_lines(run / "metrics.jsonl")]

@pytest.mark.parametrize("algo", ["sdar", "skill-sd", "rlsd", "atod", "craft"])
def test_control_is_logged_and_changes_no_number(tmp_path, capsys, algo):
    """Every second step, from the first, has the control's metrics; all else stays as it was."""
    s = settings(algo=algo, steps=3, group_size=2, max_turns=2, max_response=6)
    sdar.train(dataclasses.replace(s, out=str(tmp_path / "plain")))
    assert "  control " not in capsys.readouterr().out
    sdar.train(dataclasses.replace(s, out=str(tmp_path / "control"), control_every=2))
    assert capsys.readouterr().out.count("  control -") >= 1
    rows = numbers(tmp_path / "control")
    assert [CONTROLS <= row.keys() for row in rows] == [True, False, True]
    assert numbers(tmp_path / "plain") == [
        {name: value for name, value in row.items() if name not in CONTROLS} for row in rows]

def test_contrast_resumes_bit_for_bit(tmp_path):
    """An interrupted run ends with the same metrics and weights; its log shows the gate used."""
    s = settings(gap="contrast", gate_baseline=True, mini_batch=5, out=str(tmp_path / "whole"))
    whole = sdar.train(s)
    part = dataclasses.replace(s, out=str(tmp_path / "part"))
    sdar.train(dataclasses.replace(part, steps=1))
    resumed = sdar.train(part, resume=part.out)
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "part")
    pairs = zip(whole.policy.model.parameters(), resumed.policy.model.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)
    turn = sdar.read_lines(tmp_path / "whole" / "episodes.jsonl")[0]["turns"][0]
    shown = torch.tensor([turn["gate"], turn["gap"]])
    assert (shown[0] - torch.sigmoid(5 * shown[1])).abs().max() > 1e-3

def test_the_control_is_the_nearest_other_skill_in_the_same_prompt(policy, env):
    """In the teacher's prompt another skill stands for the own one, and nothing else differs."""
    s = settings(control_every=1)
    tasks = env.tasks("train")[:4]
    state = sdar.State(policy, None)
    skills = sdar.choose_skills(env, tasks, s, state)
    assert [skill[:2] for skill in skills] == sdar.choose_skills(env, tasks, settings(), state)

    def length(text):
        return len(policy.tokenizer(text)["input_ids"])

    for name, text, control in skills:
        others = [env.skill(other, True) for other in env.skill_names if other != name]
        distance = [abs(length(other) - length(text)) for other in others]
        assert control in others and abs(length(control) - length(text)) == min(distance)
    episodes = sdar.rollout(policy, env, tasks, s, 1.0, sdar.generator_for(policy, s, "a"),
                            skills=skills, both=True)
    for e, (_, text, control) in zip(episodes, skills):
        for t in e.turns:
            own, other = map(policy.tokenizer.decode, (t.other_ids, t.control_ids[0]))
            assert own.replace(text, control) == other != own

@pytest.mark.parametrize("words, hint", [
    ("--algo grpo --control-every 5", "--control-every has no effect with --algo grpo"),
    ("--algo ucob --control-every 5", "--control-every has no effect with --algo ucob"),
    ("--algo atod --teacher-model x --control-every 5", "--control-every has no effect"),
    ("--algo rlsd --gap contrast", "--gap has no effect with --algo rlsd"),
    ("--gap contrast --gate none", "--gap contrast needs --gate gap or soft-or"),
    ("--gap contrast --retrieval full", "--retrieval full leaves no other skill"),
    ("--control-every 5 --retrieval full", "--retrieval full leaves no other skill"),
    ("--control-every -1", "--control-every cannot be -1"),
    ("--gap other", "invalid choice: 'other'"),
    ("--control-every 1 --env {one}:One", "all categories have the same skill"),
], ids=str)
def test_a_control_that_cannot_be_is_refused(tmp_path, capsys, words, hint):
    """One line before any work, for methods, gates and skills that have no control."""
    (tmp_path / "one.py").write_text("import envs\nclass One(envs.Alfworld):\n"
                                     "    skill = property(lambda self: lambda *args: 'look',\n"
                                     "                     lambda self, value: None)\n")
    words = words.format(one=tmp_path / "one.py").split()
    flags = ["--model", "tiny", "--out", tmp_path / "run", "--warm-start", 0, "--steps", 1]
    line = refused_line(capsys, *flags, *words)
    assert hint in line and not (tmp_path / "run").exists()

# ======== eval.py gap =============================================================================

def test_gap_measures_three_texts_in_each_place(tmp_path, capsys):
    """Table and JSON: tokens, the statistics with intervals, the paper's figures, the control."""
    out = tmp_path / "gap.json"
    text = printed(capsys, "gap", "--model", "tiny", "--env", "alfworld", "--data", "built-in",
                   "--episodes", 4, "--out", out, "--max-response", 40)
    facts = json.loads(out.read_text())
    whole = [row for row in facts["rows"] if row["place"] == "all"]
    assert [row["text"] for row in whole] == list(ev.TEXTS)
    assert facts["responses"] == 8 and len({row["tokens"] for row in whole}) == 1
    for row in facts["rows"]:
        for name in ev.OF_TEXT + ev.BESIDE:
            value, low, high = row[name]
            assert low <= value + 1e-9 and value <= high + 1e-9
    for name, value in zip(ev.BESIDE, (0, 1, 0)):    # the own skill beside itself
        assert whole[0][name] == pytest.approx([value] * 3)
    parts = [row for row in facts["rows"] if row["text"] == "unrelated text"][1:]
    mean = sum(row["tokens"] * row["mean gap [95 %]"][0] for row in parts) / whole[2]["tokens"]
    assert mean == pytest.approx(whole[2]["mean gap [95 %]"][0])
    assert "-0.18" in text and f"{whole[0]['tokens']}" in text and "% well-formed" in text
    assert "--episodes" in refused(capsys, "gap", "--model", "tiny", "--episodes", 1)

def test_intervals_are_over_episodes():
    """Tokens that repeat each other narrow no interval; the bootstrap agrees with the formula."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(200, generator=g, dtype=F64)
    owners = torch.arange(200)
    mean, low, high = ev.clustered(owners, x)
    assert mean == pytest.approx(x.mean().item())
    assert (high - low) / 2 == pytest.approx(1.96 * x.std().item() / 200 ** 0.5, rel=0.1)
    assert ev.clustered(owners.repeat(7), x.repeat(7)) == pytest.approx([mean, low, high])
    y = x + torch.randn(200, generator=g, dtype=F64)
    r, low, high = ev.clustered(owners, x, y)
    assert r == pytest.approx(torch.stack([x, y]).corrcoef()[0, 1].item()) and low < r < high

@pytest.mark.parametrize("name", ["alfworld", "webshop", "search"])
def test_unrelated_text_is_as_long_as_the_skill(policy, name, monkeypatch):
    """It has the skill's number of tokens, give or take one, and nothing of this benchmark."""
    s = settings(env=name, env_args="", control_every=1, max_turns=1, max_teacher_prompt=4096,
                 max_prompt=4096, max_response=4)
    seen = []
    monkeypatch.setattr(sdar, "rollout", lambda *args, skills, **rest: seen.extend(skills) or [
        types.SimpleNamespace(turns=random_turns(policy))])
    ev.gap_turns(policy, sdar.open_env(s), s, 3)
    for _, own, _, text in seen:
        a, b = policy.tokenizer([own, text], add_special_tokens=False)["input_ids"]
        assert abs(len(a) - len(b)) <= 1 and own[:40] not in text
    assert len(seen) == 3
