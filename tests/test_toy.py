"""The toy world: its rule tells the truth, its test set is held out, its base model opens everywhere."""

import random
import re
from importlib import import_module
from pathlib import Path
from statistics import mean

import pytest

import s2r  # noqa: F401  (before torch)
import torch
from s2r.data import load_problems, read_jsonl, write_jsonl
from s2r.generate import generate
from s2r.grade import equivalent
from s2r.grammar import RETRY_OPENING, VERIFY_OPENING, parse_verdict, prompt
from s2r.hf.tokenizer import Tokenizer
from s2r.model import Transformer
from s2r.run import flags
from s2r.toy import pretrain, world
from s2r.toy.__main__ import PLAN, stages
from s2r.toy.findings import ABLATIONS

BASE = Path(world.__file__).with_name("base")
PROBLEM = "Eggs go in boxes of 7. Which number of eggs fills its boxes: 4315, 2886 or 3024?"  # 3024


@pytest.mark.parametrize("answer, text", [
    ("3024",
     "Divide 3024 by 7: 3 leaves 3, 30 leaves 2, 22 leaves 1, 14 leaves 0. Nothing remains. Therefore, the answer is correct."),
    ("4315",
     "Divide 4315 by 7: 4 leaves 4, 43 leaves 1, 11 leaves 4, 45 leaves 3. Something remains. Therefore, the answer is incorrect."),
    ("2886",
     "Divide 2886 by 7: 2 leaves 2, 28 leaves 0, 8 leaves 1, 16 leaves 2. Something remains. Therefore, the answer is incorrect."),
    ("7", "This is not one of the numbers. Therefore, the answer is incorrect."),
    ("302", "This is not one of the numbers. Therefore, the answer is incorrect."),
])
def test_verify_substitutes_the_answer_back(answer, text):
    assert world.verify(PROBLEM, answer) == (text, "correct" if answer == "3024" else "incorrect")


@pytest.mark.parametrize("answer", [None, "", "x", "30 24", "-3024", "3024.0", "30243", "٣٠٢٤", r"\frac{3024}{1}", "3024\n"])
def test_verify_takes_any_answer(answer):
    text, verdict = world.verify(PROBLEM, answer)
    assert verdict == parse_verdict(text) == "incorrect"


def test_verify_refuses_a_problem_of_another_world():
    with pytest.raises(ValueError, match="not a problem of the toy world"):
        world.verify("What is 1+1?", "2")


def test_verify_agrees_with_the_gold_answer_and_its_steps_are_true():
    rng = random.Random(0)
    for _ in range(500):
        q = world.question(rng)
        assert [x for x in q.xs if x % q.a == 0] == [q.x]
        answer = str(rng.choice(q.xs))
        text, verdict = world.verify(q.text, answer)
        assert verdict == ("correct" if equivalent(answer, str(q.x)) else "incorrect") == parse_verdict(text)
        quotient, rest = 0, 0
        for digit, (part, left) in zip(answer, re.findall(r"(\d+) leaves (\d+)", text), strict=True):
            assert int(part) == 10 * rest + int(digit)
            step, rest = divmod(int(part), q.a)
            assert int(left) == rest
            quotient = 10 * quotient + step
        assert quotient * q.a + rest == int(answer)


def test_write_problems_makes_files_that_load_and_do_not_overlap(tmp_path):
    world.write_problems(tmp_path, train=400, test=200, seed=1)
    train, test = (load_problems(tmp_path / f"{name}.jsonl") for name in ("train", "test"))
    assert (len(train), len(test)) == (400, 200)
    assert all(int(p.answer) in world.NUMBERS for p in train + test)
    assert len({p.problem for p in train + test}) == 600
    assert {p.level for p in test} == set(world.LEVELS)
    for problems, held_out in ((train, False), (test, True)):
        for problem in problems:
            a, xs = numbers(problem.problem)
            assert world.held_out(a, int(problem.answer)) is held_out
            assert len(xs) == world.LEVELS[problem.level]
            assert [world.verify(problem.problem, str(x))[1] for x in xs].count("correct") == 1
            assert world.verify(problem.problem, problem.answer)[1] == "correct"


@pytest.mark.parametrize("style", ("confirmative", "solving"))
def test_command_checks_the_distinct_answers_to_solved_problems(tmp_path, style):
    other = PROBLEM.replace("3024", "3031")
    samples = [(PROBLEM, "3024", said) for said in ("3024", "4315", "4315", "99")]
    samples += [(other, "3031", said) for said in ("2886", "4315")]  # never solved
    write_jsonl(tmp_path / "rollouts.jsonl", [
        {"unique_id": f"toy/{gold}", "problem": problem, "answer": gold, "finished": True,
         "text": rf"It is \boxed{{{said}}}."}
        for problem, gold, said in samples])
    files = {"rollouts": str(tmp_path / "rollouts.jsonl"), "out": str(tmp_path / "checks.jsonl")}
    world.main(world.Config(**files, style=style))
    rows = read_jsonl(tmp_path / "checks.jsonl")
    assert [row["answer"] for row in rows] == ["3024", "4315", "99"]
    for row in rows:
        assert row == {"unique_id": "toy/3024", "problem": PROBLEM, "answer": row["answer"],
                       "verification": world.verify(PROBLEM, row["answer"], style)[0]}


@pytest.mark.parametrize("flags", [{}, {"folder": "f", "rollouts": "r", "out": "o"}, {"rollouts": "r"}, {"out": "o"}])
def test_world_refuses_a_command_that_does_not_say_what_to_write(flags):
    with pytest.raises(ValueError, match="give --folder to write problems, or --rollouts and --out"):
        world.main(world.Config(**flags))


def numbers(text: str) -> tuple[int, list[int]]:
    """a and the numbers named, of the question in a text."""
    found = next(filter(None, (pattern.search(text) for pattern in world.PATTERNS)))
    return int(found["a"]), list(map(int, re.findall(r"\d+", found["xs"])))


def test_write_problems_repeats_with_its_seed(tmp_path):
    for folder in ("one", "two"):
        world.write_problems(tmp_path / folder, train=50, test=50, seed=2)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_documents_hold_no_test_question_and_no_verification():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(piece for piece, _ in pretrain.document(rng))
        a, xs = numbers(text)
        assert not world.held_out(a, next(x for x in xs if x % a == 0))
        assert not re.search(r"Wait|recheck|Therefore|correct|try again", text)


def test_documents_try_the_numbers_named_and_end_in_the_right_one():
    rng, chats = random.Random(1), 0
    for _ in range(500):
        text = "".join(piece for piece, _ in pretrain.document(rng))
        a, xs = numbers(text)
        attempts = [int(x) for x in re.findall(r"boxed\{(\d+)\}", text)]
        assert set(attempts) <= set(xs)
        assert [x for x in attempts if x % a == 0] == attempts[-1:]
        chats += (chat := text.startswith("<|im_start|>"))
        assert len(attempts) == 1 or not chat  # a chat has the right answer alone
    assert 200 < chats < 400


def test_train_tokenizer_repeats_and_is_that_of_the_base_model(tmp_path):
    pretrain.train_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert (tmp_path / "tokenizer.json").read_bytes() == (BASE / "tokenizer.json").read_bytes()


def test_tokenizer_gives_digits_and_words_a_token_each():
    tokenizer = Tokenizer.from_pretrained(BASE)
    texts = {"43 leaves 1, 11": 7, f"{VERIFY_OPENING} 7": 7, f"{RETRY_OPENING} 7": 5, r"\boxed{42}.": 4}
    for text, tokens in texts.items():
        ids = tokenizer.encode(text)
        assert len(ids) == tokens and tokenizer.decode(ids) == text


def test_base_model_opens_in_transformers_with_the_same_prompt_and_logits():
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_pretrained(BASE)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROBLEM}]
    theirs = transformers.AutoTokenizer.from_pretrained(BASE)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.chat(messages) == expected == prompt(PROBLEM, tokenizer)
    ids = torch.tensor(expected + tokenizer.encode(rf"It is \boxed{{3024}}. {VERIFY_OPENING}"))
    model = Transformer.from_pretrained(BASE)
    other = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with torch.no_grad():
        ours = model.logits(model(ids, torch.tensor([0, len(ids)])))
        assert torch.allclose(ours, other(ids[None]).logits[0], atol=1e-4)
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 4 * 2**20


def greedy(prompts: list[str], stop: str) -> list[str]:
    """What the base model writes after plain texts, up to the token `stop`."""
    tokenizer, model = Tokenizer.from_pretrained(BASE), Transformer.from_pretrained(BASE)
    (end,) = tokenizer.encode(stop)
    asked = [tokenizer.encode(text) for text in prompts]
    rollouts = generate(
        model, asked, n=1, temperature=0.0, max_new_tokens=48, stop_ids={end}, seed=0, progress=False
    )
    return [tokenizer.decode(rollout.ids).removesuffix(stop) for rollout in rollouts]


def test_base_model_has_learnt_the_parts():
    """Dividing any number, or the one just said, and answering with one not yet tried: 95 of 100 and more."""
    rng = random.Random(5)
    questions = [world.question(rng, test=True) for _ in range(200)]
    asked, steps = zip(*(world.divide(q.a, rng.choice(q.xs)).split(": ") for q in questions))
    written = greedy([f"{q.text}\n{world.solve(q.xs[0])}\n{text}" for q, text in zip(questions, asked)], "\n")
    assert sum(f": {text}" == found for text, found in zip(steps, written)) >= 190

    said = [rng.choice(q.xs) for q in questions]
    written = greedy([f"{q.text}\n{world.solve(y)}\nDivide " for q, y in zip(questions, said)], "\n")
    assert sum(f"Divide {found}" == world.divide(q.a, y) for q, y, found in zip(questions, said, written)) >= 190

    tried = [rng.choice([x for x in q.xs if x != q.x]) for q in questions]
    written = greedy([f"{q.text}\n{world.solve(y)}\nIt is \\boxed{{" for q, y in zip(questions, tried)], "\n")
    others = [[f"{x}}}." for x in q.xs if x != y] for q, y in zip(questions, tried)]
    assert sum(found in named for found, named in zip(written, others)) >= 190


def test_pretrain_makes_a_folder_that_loads_and_repeats(tmp_path):
    for folder in ("one", "two"):
        pretrain.main(pretrain.Config(out=str(tmp_path / folder), steps=2))
    first, second = (Transformer.from_pretrained(tmp_path / folder) for folder in ("one", "two"))
    for p, q in zip(first.parameters(), second.parameters()):
        assert torch.equal(p, q) and p.isfinite().all()
    assert Tokenizer.from_pretrained(tmp_path / "one").stop_ids == {first.config.hf["eos_token_id"]}
    for file in BASE.glob("*.json"):
        assert (tmp_path / "one" / file.name).read_bytes() == file.read_bytes()


def test_stages_make_what_later_stages_need():
    made = set()
    for stage in stages(PLAN, "runs/toy", seed=0):
        assert set(stage.needs) <= made and stage.makes not in made
        made.add(stage.makes)


def test_stages_pass_the_settings_of_the_toy_to_the_scripts():
    """The scripts default to the paper's settings, so none of these may be left out."""
    given = {stage.makes: dict(zip(stage.command, stage.command[1:])) for stage in stages(PLAN, "f", seed=3)}
    assert given["f/sft"].items() >= {
        "--model": "s2r/toy/base", "--data": "f/trajectories.jsonl", "--out": "f/sft", "--epochs": "3", "--lr": "2e-3",
        "--warmup": "5", "--batch-size": "32", "--kl": "0.01", "--max-length": "1024", "--save-every": "200",
        "--seed": "3"}.items()
    for level in ("outcome", "process"):
        assert given[f"f/rl-{level}"].items() >= {
            "--model": "f/sft", "--data": "f/train.jsonl", "--out": f"f/rl-{level}", "--level": level,
            "--problems": "32", "--rollouts": "4", "--updates": "2", "--temperature": "0.7", "--beta": "0.01",
            "--epsilon": "0.2", "--lr": "5e-5", "--warmup": "5", "--steps": "40", "--max-new-tokens": "320",
            "--save-every": "50", "--show-every": "10", "--tokens-per-microbatch": "8192", "--seed": "3"}.items()
        assert given[f"f/rl-{level}.json"].items() >= {
            "--model": f"f/rl-{level}", "--data": "f/test.jsonl", "--report": f"f/rl-{level}.json",
            "--temperature": "0", "--max-new-tokens": "320"}.items()
    for makes in ("f/sft", "f/rl-outcome", "f/rl-process"):
        assert "--resume" in given[makes]  # a killed run continues


@pytest.mark.parametrize("plan", (PLAN, ABLATIONS), ids=("toy", "findings"))
def test_every_command_of_a_plan_is_one_that_its_script_takes(plan):
    for stage in stages(plan, "f", seed=3):
        name, *argv = stage.command if stage.command[0] != "-m" else stage.command[1:]
        cfg = flags.from_command_line(import_module(name.removesuffix(".py")).Config, argv)
        assert cfg.seed == 3
