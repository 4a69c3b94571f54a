"""Tests of models that decode through transformers' generate, and of what a run checks first."""

import contextlib
import dataclasses
import errno
import itertools
import json
import shutil
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import envs
import eval as ev
import sdar
from envs import UserError
from test_sdar import (EXPERTS, GPT, LOOP, SIZES, close, env, folder, handlers, settings,
                       no_data, sound, with_template)

# ======== To be moved: replaces FAMILIES and its test =============================================

SMALL = dict(SIZES, head_dim=16, pad_token_id=0)
HALF = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
DELTA = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
             linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"])
OTHERS = [  # a model type, its configuration, why it decodes plainly, and whether it may be padded
    ("mistral", dict(SMALL, sliding_window=8), "SlidingWindow", True),
    ("gemma3_text", SMALL | HALF, "SlidingWindow", True),
    ("gpt_oss", SMALL | HALF | dict(num_local_experts=4, num_experts_per_tok=2), "Sliding", True),
    ("phi3", dict(SMALL, sliding_window=8), "SlidingWindow", True),
    ("qwen2", dict(SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=0),
     "SlidingWindow", True),
    ("qwen3_5_text", SMALL | DELTA, "LinearAttention", True),
    ("lfm2", dict(SMALL, layer_types=["conv", "full_attention"]), "LinearAttention", True),
    ("mamba", dict(SMALL, state_size=8), "LinearAttention", True),
    ("rwkv", SMALL, "AttributeError", False),
    ("gpt_neo", dict(SIZES, num_layers=2, num_heads=4,
                     attention_types=[[["global", "local"], 1]]), "local", True),
    ("bloom", SIZES | GPT, "AttributeError", True),
    ("falcon", dict(SIZES, alibi=True), "AttributeError", True),
    ("deepseek_v2", SIZES | EXPERTS, "RuntimeError", True)]

def other_model(sound, folder, kind, config):
    """A random model of a type in a folder, with the tokenizer of `sound`."""
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sound)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **config, vocab_size=len(tokenizer)))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) * (p.dim() > 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sdar.load_policy(str(folder), "cpu")

def responses(policy, prompts, temperature=0, **options):
    """{key: response ids}, and the prompts are left as they are."""
    s = settings(max_response=12, **options)
    generator = sdar.generator_for(policy, s, "test")
    found = {}
    for ended in sdar.generate(policy, dict(prompts), s, temperature, ("</action>",), generator):
        found |= ended
    return found

@pytest.mark.parametrize("kind, config, why, pads", OTHERS, ids=[row[0] for row in OTHERS])
def test_models_with_another_memory_decode_through_generate(sound, tmp_path, kind, config, why,
                                                            pads):
    """Greedy tokens are those of generate on each prompt alone; the log-probabilities that are
    trained are those of generate's logits; sampling repeats with its seed; the model is saved."""
    policy = other_model(sound, tmp_path / "a", kind, config)
    assert why in policy.plain and policy.pads == pads
    texts = ["Hello", "Go to the desk now", "Look at the shelf", "Yes", "Hello again", "Hello"]
    prompts = dict(enumerate(sdar.encode_chats(policy.tokenizer, texts)))
    ends = [*policy.end_ids, policy.tokenizer.convert_tokens_to_ids("</action>")]
    alone = [policy.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False,
                                   eos_token_id=ends, pad_token_id=0)
             for ids in prompts.values()]
    want = {i: row[0, len(prompts[i]):].tolist() for i, row in enumerate(alone)}
    assert responses(policy, prompts) == want == responses(policy, prompts, rollout_rows=2)
    sampled = responses(policy, prompts, 1.0)
    assert sampled == responses(policy, prompts, 1.0) != want
    scored, _ = sdar.response_logps(policy.model, list(prompts.values()), [*sampled.values()],
                                    settings())
    for ids, answer, row in zip(prompts.values(), sampled.values(), scored):
        logits = policy.model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1:-1]
        logp = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert close(row[:len(answer)], logp, 1e-4)
    sdar.save_model(policy, tmp_path / "b")
    again = sdar.load_policy(str(tmp_path / "b"), "cpu")
    assert responses(again, prompts) == want

def test_a_plain_response_ends_where_ours_does(sound, tmp_path):
    """With a closing tag, an end token, or at its limit, whichever row is longest."""
    policy = other_model(sound, tmp_path, "mistral", dict(SMALL, sliding_window=8))
    prompts = dict(enumerate(sdar.encode_chats(policy.tokenizer, ["Hello", "Go", "Look here"])))
    free = responses(policy, prompts)
    tag, end = (policy.tokenizer(x)["input_ids"] for x in ("</action>", "<|im_end|>"))
    script = {0: free[0][:3] + tag, 1: [free[1][0]] + end, 2: free[2]}

    def told(logits, temperature, generator):
        step = next(steps)
        return torch.tensor([(script[i] + [20] * 12)[step] for i in order]), None

    order = sorted(prompts, key=lambda i: len(prompts[i]))
    steps = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdar, "sample", told)
        assert responses(policy, prompts) == script

def test_a_run_of_a_plain_model_resumes_to_the_same_numbers(sound, tmp_path, handlers, capsys):
    """Rollout, teacher, reference and update; the line says that it is slower."""
    other_model(sound, tmp_path / "m", "gemma3_text", SMALL | HALF)
    flags = ["--model", tmp_path / "m", "--data", "built-in", "--env-args", "house=4", "--groups",
             1, "--group-size", 2, "--max-turns", 2, "--max-response", 6, "--val-every", 0,
             "--save-every", 1, "--device", "cpu", "--prompt-style", "brief", "--max-prompt", 400,
             "--max-teacher-prompt", 500]
    def run(*words):
        sdar.train(*sdar.read_settings(list(map(str, words))))
    run(*flags, "--steps", 2, "--out", tmp_path / "whole")
    assert "generate, which is slower" in capsys.readouterr().out
    run(*flags, "--steps", 1, "--out", tmp_path / "parts")
    run("--resume", tmp_path / "parts", "--steps", 2)
    last = [load_file(sdar.checkpoints(tmp_path / name)[-1] / "model.safetensors")
            for name in ("whole", "parts")]
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])

# ======== To be moved: what a run checks before its first step ====================================

def test_a_run_says_what_it_needs_and_is_refused_where_that_is_not_there(
        sound, tmp_path, monkeypatch):
    """Memory and disk, before any work; nothing that looks like a run is left."""
    s = settings(out=str(tmp_path / "run"), kl=0.01, steps=30, save_every=10)
    state = sdar.make_state(sdar.load_policy(str(sound), "cpu"), s)
    Path(s.out).mkdir()
    size = 4 * state.policy.model.num_parameters()
    for memory, disk, fits in ((4, 10, True), (4, 9.9, False), (3.9, 10, False)):
        monkeypatch.setattr(sdar, "free_memory", lambda device: memory * size)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(
            free=disk * size))
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="make room"):
            sdar.check_room(state, s)

def test_a_model_that_cannot_be_saved_is_refused_before_training(
        sound, tmp_path, monkeypatch, handlers, capsys):
    """Also with --kl 0; the message names what failed, and no run is left."""
    from transformers import PreTrainedModel
    monkeypatch.setattr(PreTrainedModel, "save_pretrained",
                        lambda *a, **k: (_ for _ in ()).throw(ValueError("not\nserializable")))
    s = settings(model=str(sound), out=str(tmp_path / "run"))
    with pytest.raises(UserError, match="could not be saved: not;") as error:
        sdar.train(s)
    assert "make room" not in str(error.value)
    assert not list((tmp_path / "run").glob("*"))

def test_only_a_full_disk_asks_for_room(sound, tmp_path, monkeypatch):
    """Other errors in saving are named, never a traceback."""
    s = settings(out=str(tmp_path / "run"))
    state = sdar.make_state(sdar.load_policy(str(sound), "cpu"), s)
    for error, advice in ((ValueError("not\nserializable"), "not; put that right"),
                          (OSError(errno.ENOSPC, "No space left on device"), "make room")):
        with monkeypatch.context() as patch:
            def fails(*a, **k):
                raise error
            patch.setattr(type(state.policy.model), "save_pretrained", fails)
            with pytest.raises(OSError, match=advice) as refused:
                sdar.save_checkpoint(state, s)
        assert "previous" not in str(refused.value) and not sdar.checkpoints(s.out)

def test_a_saved_tiny_is_loaded_by_auto_tokenizer(sound, tmp_path):
    """To the same ids, also when it is saved once more."""
    from transformers import AutoTokenizer
    policy = sdar.load_policy(str(sound), "cpu")
    text = "step 12\n\nput 2 mugs in cabinet 10\n<action>go</action> it's"
    sdar.save_model(policy, tmp_path / "a")
    other = AutoTokenizer.from_pretrained(tmp_path / "a")
    other.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text((tmp_path / "a" / "config.json").read_text())
    for name in ("a", "b"):
        ids = AutoTokenizer.from_pretrained(tmp_path / name)(text)["input_ids"]
        assert ids == policy.tokenizer(text)["input_ids"]

# ======== To be moved: eval.py's commands, the judge ==============================================

@pytest.mark.parametrize("words, shown", [
    ("comapre a b", "compare?"), ("tabel a", "table?"), ("zzz", "--model?"),
    ("runs/x --env search", "--model?")])
def test_an_unknown_command_of_eval_names_the_closest(capsys, words, shown):
    """As an unknown flag does."""
    with pytest.raises(SystemExit) as end:
        ev.main(words.split())
    assert end.value.code == 2 and capsys.readouterr().err.endswith(f"did you mean {shown}\n")

def test_the_footnote_on_bamboogle_appears_with_search_only():
    """It is about one of Search-QA's columns."""
    assert [name for name in ev.COLUMNS if "Bamboogle" in ev.origin(name)] == ["search"]

def test_the_judge_may_change_with_resume(tmp_path):
    """A server that has moved, or none any more."""
    s = settings(algo="triage", judge="http://127.0.0.1:1", out=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(s)))
    words = ["--resume", str(tmp_path), "--judge"]
    assert sdar.read_settings([*words, "http://x"])[0].judge == "http://x"
    assert sdar.read_settings([*words, ""])[0].judge == ""

# ======== To be moved: further cases of the ten kinds =============================================

def spoilt_tokenizer(folder, **changes):
    """Change keys of the model in tokenizer.json."""
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"] |= changes
    file.write_text(json.dumps(data))

def test_merges_are_never_left_out_at_random(folder):
    """BPE dropout, which some training scripts leave in tokenizer.json."""
    text = "put 2 mugs in cabinet 10, then look at the desk"
    want = sdar.load_policy(str(folder), "cpu").tokenizer(text)["input_ids"]
    spoilt_tokenizer(folder, dropout=0.5)
    tokenizer = sdar.load_policy(str(folder), "cpu").tokenizer
    assert [tokenizer(text)["input_ids"] for _ in range(5)] == [want] * 5

BEGIN = "{% if add_generation_prompt %}<|im_start|>assistant\n%s{% endif %}"
TURN = LOOP + "{{ m.content }}%s<|im_end|>\n{% endfor %}"

@pytest.mark.parametrize("after, begin, closed, opened", [
    ("\nThink in <think> ... </think>.", "", False, ""), ("\nStart with <think>", "", False, ""),
    ("\nThink in <think> ... </think>.", "<think>\n", False, "<think>"),
    ("\nStart with <think>", "<think>\n\n</think>\n\n", True, ""), ("", "<think> ", False, "<think>")])
def test_only_what_begins_the_answer_opens_or_closes_its_think_block(folder, after, begin, closed,
                                                                     opened):
    """A template may mention the tags in the user's turn."""
    template = TURN.replace("%s", after) + BEGIN.replace("%s", begin)
    policy = sdar.load_policy(str(with_template(folder, template)), "cpu")
    assert (policy.think_closed, policy.opened) == (closed, opened)

@pytest.mark.parametrize("change", ["replace('\\n\\n', '\\n')", "replace('  ', ' ')"])
def test_blank_lines_and_spaces_of_a_message_stay(folder, change):
    """A template that takes them out is refused."""
    template = LOOP + "{{ m.content | %s }}<|im_end|>\n{%% endfor %%}" % change
    with pytest.raises(UserError, match="leaves out or changes messages"):
        sdar.load_policy(str(with_template(folder, template)), "cpu")

def test_a_date_whose_format_is_a_variable_is_fixed_too(folder):
    """As one that stands in the call."""
    template = "{% set f = '%-d %B %Y' %}{{ strftime_now(f) }} " + sdar.TINY_TEMPLATE
    policy = sdar.load_policy(str(with_template(folder, template)), "cpu")
    assert sdar.render_chat(policy.tokenizer, "x").startswith("1 January 2026 <|im_start|>user")

@pytest.mark.parametrize("file, rows, found", [
    ("nq/test/0000.jsonl", 1, {"test": [("NQ", "a")]}),
    ("nq/validation/0000.jsonl", 1, {"dev": [("NQ", "a")]}),
    ("nq_test.jsonl", 2, {"test": [("NQ", "a b")]})])
def test_folders_name_splits_and_equal_rows_share_their_answers(tmp_path, file, rows, found):
    """In the layout of a data set's snapshot; a question with two rows has both answers."""
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"question": "Who?", "answer": x}) for x in "ab"[:rows]]
    path.write_text("\n".join(lines))
    splits, _, _ = envs.load_questions(path.parent)
    assert {name: [(q.group, " ".join(q.answers)) for q in split.values()]
            for name, split in splits.items() if split} == found

def test_skill_files_with_a_bom_and_folders_with_several(tmp_path):
    """A byte order mark is no text; which of two card files is meant has to be said."""
    names = envs.Alfworld.skill_names
    (tmp_path / "skill_mapping.json").write_text(json.dumps(
        {"skill_files": {name: "all.md" for name in names}}), encoding="utf-8-sig")
    (tmp_path / "all.md").write_text("text", encoding="utf-8-sig")
    assert envs.read_skills(tmp_path, {}, names)[names[0]] == "text"
    for name in ("claude_style_skills.json", "claude_style_skills_2.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="holds claude_style_skills.json, claude.*give one"):
        envs.read_skills(tmp_path, {}, names)

@pytest.mark.parametrize("text, terms", [
    ("x\u200by", ["x", "y"]), ("x\u200cy", ["x\u200cy"]), ("co\u00adop", ["co\u00adop"]),
    ("a\u2066b", ["a\u2066b"])])
def test_a_zero_width_space_separates_words(text, terms):
    """Of the invisible characters it alone does, by UAX #29."""
    assert envs.words(text) == terms
