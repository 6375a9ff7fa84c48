"""Verifications by a model: what is asked, a hostile endpoint, crashes, and the local model through our sampler."""

import json
import os
import threading
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from s2r.data import load_trajectories, read_jsonl
from s2r.grammar import VERDICT_SENTENCE, VERIFY_OPENING
from s2r.hf.tokenizer import Tokenizer
from s2r.run.files import write_jsonl
from s2r.stage0 import build
from s2r.stage0.verifications import CHECK, REWORD, STYLES, Config, as_self_check, endpoint, main, wanted
from tiny_model import tiny_model


def rollouts(count: int) -> list[dict]:
    """Rows of `count` problems i+1?, each with a right, a wrong and an equal wrong answer."""
    return [
        {"unique_id": f"sum/{i}", "problem": f"{i}+1?", "answer": str(i + 1), "sample": j, "finished": True,
         "text": "I add the two numbers of the problem and find what they make in all, which is this much, I am sure, "
                 rf"and nothing else at all: \boxed{{{answer}}}."}
        for i in range(count) for j, answer in enumerate((i + 1, i + 2, f"{i + 2}.0"))
    ]  # fmt: skip


def test_wanted_are_the_distinct_answers_of_problems_with_a_right_one():
    hard = {"unique_id": "hard", "problem": "?", "answer": "7", "finished": True}
    rows = rollouts(2) + [hard | {"text": r"\boxed{8}"}, hard | {"text": "no idea"}]
    rows += [hard | {"text": r"\boxed{7}", "finished": False}]  # cannot serve as a solve, so nobody pays for its check
    assert wanted(rows) == [{"unique_id": f"sum/{i}", "problem": f"{i}+1?", "answer": answer}
                            for i, answer in ((0, "1"), (0, "2"), (1, "2"), (1, "3"))]  # fmt: skip


def test_questions_hold_problem_answer_style_and_the_three_sentences():
    row = {"problem": "What is 2+2?", "answer": "5"}
    confirm, solve = (CHECK.format(style=style, **row) for style in STYLES.values())
    assert all("What is 2+2?" in text and "5" in text for text in (confirm, solve)) and confirm != solve
    reworded = REWORD.format(check="2+2 is 4, not {5}.", **row)  # its braces are no placeholder
    assert "2+2 is 4, not {5}." in reworded and all(s in reworded for s in VERDICT_SENTENCE.values())


@pytest.mark.parametrize("reply, text", [
    (f"{VERIFY_OPENING} 1+1=2. So.", "1+1=2. So."),
    (f"  {VERIFY_OPENING}\n1+1=2. ", "1+1=2."),
    ("First,\n\nLet me try again. No.", "First, Let me try again. No."),
    (f"So\n{VERIFY_OPENING} yes", f"So {VERIFY_OPENING} yes"),
])  # fmt: skip
def test_as_self_check_is_one_verify_without_its_opening(reply, text):
    assert as_self_check(reply) == text


# --- the endpoint ---


class Server:
    """An OpenAI-compatible server on loopback; `behave(handler, question, times asked)` is True if it has replied."""

    def __init__(self, behave=lambda handler, question, times: False):
        self.asked: Counter[str] = Counter()
        self.headers: list[dict] = []
        self.settings: list[tuple] = []
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][0]["content"]
                with lock:
                    server.asked[question] += 1
                    server.headers.append(dict(self.headers))
                    server.settings.append((body["model"], body["temperature"], body["max_tokens"]))
                if behave(self, question, server.asked[question]):
                    return
                problem = next(line for line in question.splitlines() if line.startswith("Problem: "))
                i = int(problem.removeprefix("Problem: ").split("+")[0])
                answer = next(line for line in question.splitlines() if "nswer: " in line).split(": ")[1]
                verdict = "correct" if int(answer) == i + 1 else "incorrect"
                self.say(f"{i} and 1 are {i + 1}. {VERDICT_SENTENCE[verdict]}")

            def say(self, content, status: int = 200):
                text = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def run(server: Server, rows: list[dict], settings: dict = {}, **change) -> dict[tuple[str, str], str]:
    cfg = Config("r.jsonl", "v.jsonl", api_base=server.base, api_model="some-model", **settings)
    verified = endpoint(cfg, wanted(rows), **{"key": None, "pause": 0.01, "timeout": 5} | change)
    return {(row["unique_id"], row["answer"]): text for row, text in verified}


def test_endpoint_verifies_every_answer_with_two_questions():
    with Server() as server:
        found = run(server, rollouts(5), {"style": "solving", "temperature": 0.3, "max_new_tokens": 77}, key="secret")
    assert len(found) == 10 and set(server.asked.values()) == {1} and sum(server.asked.values()) == 20
    assert found["sum/3", "4"].endswith("is correct.") and found["sum/3", "5"].endswith("is incorrect.")
    assert {header["Authorization"] for header in server.headers} == {"Bearer secret"}
    assert set(server.settings) == {("some-model", 0.3, 77)}
    assert sum(STYLES["solving"] in question for question in server.asked) == 10  # the other ten are to reword


def test_endpoint_loses_nothing_to_failures_stalls_and_garbage():
    """Each question meets a trouble of its own the first two times."""
    stop = threading.Event()

    def misbehave(handler, question, times) -> bool:
        if times > 2:
            return False
        trouble = zlib.crc32(question.encode()) % 6
        if trouble == 0:
            handler.say("busy", status=(429, 503)[times - 1])
        elif trouble == 1:
            stop.wait(30)  # longer than the client waits
        elif trouble == 2:
            handler.say(None if times == 1 else "  ")
        elif trouble == 3:
            handler.connection.close()
        elif trouble == 4:
            handler.wfile.write(b"\x00\xff not HTTP\r\n\r\n")
        else:
            handler.send_response(200)
            handler.end_headers()
            handler.wfile.write(b'{"choices": [')
            handler.connection.close()
        return True

    with Server(misbehave) as server:
        found = run(server, rollouts(12), timeout=2)
        stop.set()
    assert len(found) == 24 and all(text.endswith("correct.") for text in found.values())
    assert set(server.asked.values()) == {3}


def test_endpoint_skips_a_question_that_keeps_failing_and_no_other():
    def deaf(handler, question, times) -> bool:
        if "Problem: 1+1?" in question:
            handler.say("no", status=500)
            return True
        return False

    with Server(deaf) as server:
        found = run(server, rollouts(3), retries=2)
    assert len(found) == 4 and not any(unique_id == "sum/1" for unique_id, _ in found)


def test_endpoint_refusal_is_an_error_without_the_key():
    def refuse(handler, question, times) -> bool:
        handler.say("bad key", status=401)
        return True

    with Server(refuse) as server, pytest.raises(ValueError, match="refused with status 401: .*bad key") as caught:
        run(server, rollouts(3), key="sk-secret")
    assert "sk-secret" not in str(caught.value)


# --- the command ---


def command(tmp_path, **flags) -> None:
    main(Config(str(tmp_path / "r.jsonl"), str(tmp_path / "v.jsonl"), **flags))


def trajectories(tmp_path) -> list:
    """What stage 0 builds of the two files."""
    paths = [str(tmp_path / name) for name in ("r.jsonl", "v.jsonl", "t.jsonl")]
    build.main(build.Config(*paths, keep=(1, 1, 1, 1)))
    return load_trajectories(paths[2])


def test_command_resumes_after_a_crash_without_asking_again(tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "r.jsonl", rollouts(8))
    monkeypatch.setenv("S2R_TEST_KEY", "k")
    with Server() as server:
        flags = {"api_base": server.base, "api_model": "m", "api_key_variable": "S2R_TEST_KEY"}
        command(tmp_path, **flags)
        assert sum(server.asked.values()) == 32
        whole = (tmp_path / "v.jsonl").read_bytes()
        lines = whole.splitlines(keepends=True)
        (tmp_path / "v.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:20])  # killed while writing the tenth
        server.asked.clear()
        command(tmp_path, **flags)
        assert sum(server.asked.values()) == 2 * 7
        server.asked.clear()
        command(tmp_path, **flags)
        assert not server.asked
    rows = read_jsonl(tmp_path / "v.jsonl")
    assert len(rows) == len({(row["unique_id"], row["answer"]) for row in rows}) == 16
    assert "16 of them verified before" in capsys.readouterr().out
    examples = trajectories(tmp_path)
    assert len(examples) == 8 and all(len(e.trajectory) == 4 for e in examples)


def test_command_with_a_local_model_runs_through_our_sampler(tmp_path, capsys, monkeypatch):
    """A random model's replies are worthless, and stage 0 says so; what matters is that each answer has one."""
    write_jsonl(tmp_path / "r.jsonl", rollouts(3))
    folder, asked = tiny_model(tmp_path / "model", context=1024), []

    def watched(self, messages, chat=Tokenizer.chat):
        asked.append(messages[0]["content"])
        return chat(self, messages)

    monkeypatch.setattr(Tokenizer, "chat", watched)
    command(tmp_path, model=str(folder), max_new_tokens=8, batch=2, style="solving")
    assert len(read_jsonl(tmp_path / "v.jsonl")) == 6 and sum(STYLES["solving"] in question for question in asked) == 6
    with pytest.raises(ValueError, match="no problem gives a trajectory"):
        trajectories(tmp_path)
    assert "does not match the truth" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    ({}, "give --model, or --api-base"), ({"api_base": "http://x"}, "with --api-model"),
    ({"api_base": "localhost:8000/v1", "api_model": "m"}, "localhost:8000/v1: no address; it begins with http"),
    ({"model": "m", "api_base": "http://x", "api_model": "m"}, "give --model, or"),
])  # fmt: skip
def test_command_wants_one_source(tmp_path, flags, words):
    write_jsonl(tmp_path / "r.jsonl", rollouts(1))
    with pytest.raises(ValueError, match=words):
        command(tmp_path, **flags)


def test_command_refuses_a_fifo_before_it_loads_a_model(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", rollouts(1))
    os.mkfifo(tmp_path / "v.jsonl")
    with pytest.raises(ValueError, match="v.jsonl"):
        command(tmp_path, model=str(tmp_path / "no-model"))


@pytest.mark.parametrize("setting", [{"temperature": float("inf")}, {"seed": -3}, {"batch": 0}, {"max_new_tokens": 0}])
def test_command_refuses_numbers_that_mean_nothing(tmp_path, setting):
    write_jsonl(tmp_path / "r.jsonl", rollouts(1))
    with pytest.raises(ValueError, match=f"--{next(iter(setting)).replace('_', '-')} .*: give a finite number"):
        command(tmp_path, model="m", **setting)


def test_command_says_that_nothing_is_right(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", [row | {"text": "It is 5, unboxed."} for row in rollouts(2)])
    with pytest.raises(ValueError, match="r.jsonl: no problem has a right answer.* give more samples"):
        command(tmp_path, model="m")


def test_command_names_rows_that_are_no_rollouts(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", [{"problem": "x"}])
    with pytest.raises(ValueError, match=r"r.jsonl: row 1: not a rollout"):
        command(tmp_path, model="m")
