"""`shot generate`, `shot chat` and `shot serve` as they are typed."""

import errno
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

from calledshot.cli import main
from calledshot.recipe import Recipe, identity, schema, to_toml
from calledshot.rundir import RunDirectory
from calledshot.serving import listen
from calledshot.training import state


@pytest.fixture(scope="session")
def lab(decoder, tokenizer, tmp_path_factory) -> Path:
    """A lab with one run, whose model has a context of 100,000 tokens and seldom stops by itself."""
    lab = tmp_path_factory.mktemp("lab")
    (lab / "lab.toml").touch()
    batch = schema.Batch(tokens=decoder.config.context)
    recipe = Recipe(model=decoder.config, batch=batch, duration=schema.Duration(tokens=batch.tokens))
    run = RunDirectory.create(lab / "runs" / "tiny", recipe_toml=to_toml(recipe), identity=identity(recipe))
    tokenizer.save(run.path / "tokenizer.json")
    state.save(run, state.Counters(step=7), decoder.state_dict(), {})
    return lab


@pytest.fixture(autouse=True)
def in_lab(lab, monkeypatch):
    monkeypatch.chdir(lab)
    monkeypatch.delenv("CALLEDSHOT_API_KEY", raising=False)


def typed(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_a_text_is_completed_and_a_seed_repeats_it(capsys, monkeypatch):
    texts = []
    for _ in range(2):
        assert main(["generate", "tiny", "def f", "--tokens", "20", "--seed", "1"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""
    assert main(["generate", "tiny@7", "def f", "--tokens", "20", "--seed", "1", "-n", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["run"], answer["step"], answer["seed"], answer["prompt"]) == ("tiny", 7, 1, "def f")
    completions = [one["text"] for one in answer["completions"]]
    assert completions[0] == texts[0].removesuffix("\n") and len(set(completions)) == 3
    typed(monkeypatch, b"def f")
    assert main(["generate", "tiny", "-", "--tokens", "20", "--seed", "1"]) == 0
    assert capsys.readouterr().out == texts[0]


def test_special_tokens_are_not_written_though_nearly_half_of_this_vocabulary_are(capsys, monkeypatch):
    rules = ["--tokens", "60", "--temperature", "5", "--top-p", "1", "--seed", "0"]
    assert main(["generate", "tiny", "def f", "-n", "9", *rules]) == 0
    written = capsys.readouterr().out
    typed(monkeypatch, b"hello\n" * 9)
    assert main(["chat", "tiny", "--template", "turns", *rules]) == 0
    answered = capsys.readouterr().out
    assert len(written) > 300 and len(answered) > 100
    assert "<|" not in written + answered


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "tine", "x"], "did you mean 'tiny'"),
        (["generate", "tiny@8", "x"], "no complete checkpoint of step 8"),
        (["generate", "tiny", "x", "--temperature", "-1"], "temperature -1"),
        (["generate", "tiny", "x", "--tokens", "0"], "--tokens 0"),
        (["generate", "tiny", "\x01\x02" * 60_000], "more than the model's context of 100,000"),
        (["chat", "tiny", "--top-p", "2"], "top_p 2"),
        (["serve", "tiny", "--port", "70000"], "--port 70000"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, words, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and not said.out


def test_stdin_that_is_no_text_is_refused(capsys, monkeypatch):
    typed(monkeypatch, b"abc\xff")
    assert main(["generate", "tiny", "-"]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_chat_answers_each_line_and_says_that_a_base_model_is_one(capsys, monkeypatch):
    typed(monkeypatch, "def f(x):\nnaïve\n/quit\n".encode())
    assert main(["chat", "tiny", "--tokens", "8", "--seed", "1"]) == 0
    said = capsys.readouterr()
    assert "base model" in said.err and "/quit" in said.err
    assert said.out.count("\n") >= 2 and "> " not in said.out


def shot(*arguments: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "calledshot", *arguments], env=environment, **options)


def test_at_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves():
    master, slave = pty.openpty()
    arguments = ("chat", "tiny", "--tokens", "50000", "--temperature", "0", "--dtype", "float32")
    process = shot(*arguments, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    seen = b""

    def until(pattern: bytes) -> bytes:
        nonlocal seen
        while not re.search(pattern, seen):
            try:
                seen += os.read(master, 4096)
            except OSError as error:  # Linux says so when the last process has left the terminal
                assert error.errno == errno.EIO
                break
        found, seen = seen, b""
        return found

    try:
        assert b"base model" in until(rb"> $")
        os.write(master, b"def f\n")
        until(rb"\n.{40}")
        # The terminal is not this process's, so the signal that Ctrl-C makes is sent by hand.
        process.send_signal(signal.SIGINT)
        until(rb"\n(?:\x1b\S*)?> $")
        os.write(master, b"\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(master)


def test_serve_prints_its_url_answers_and_ends_after_the_answer_in_progress():
    process = shot("serve", "tiny", "--port", "0", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", address)
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny"]
        asked = {"model": "tiny", "prompt": "x", "max_tokens": 400, "temperature": 0}
        stream = client.completions.create(**asked, stream=True)
        first = next(iter(stream)).choices[0].text
        process.send_signal(signal.SIGINT)
        rest = "".join(chunk.choices[0].text for chunk in stream)
        assert process.wait(20) == 0
        errors = process.stderr.read()
        assert "base model" in errors and "Traceback" not in errors
        assert first + rest
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()


def test_a_port_that_is_taken_ends_it_at_once(capsys):
    with listen("127.0.0.1", 0) as taken:
        start = time.monotonic()
        assert main(["serve", "tiny", "--port", str(taken.getsockname()[1])]) == 1
        assert time.monotonic() - start < 5
    said = capsys.readouterr()
    assert "is taken" in said.err and "--port" in said.err and said.err.count("\n") == 1 and not said.out


def test_the_key_of_the_environment_is_asked_for_and_not_printed(lab):
    environment = {**os.environ, "CALLEDSHOT_API_KEY": "right-key"}
    command = [sys.executable, "-m", "calledshot", "serve", "tiny", "--port", "0"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().strip()
        assert openai.OpenAI(base_url=address, api_key="right-key").models.list().data
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=address, api_key="wrong-key").models.list()
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=20)
        assert process.returncode == 0 and "right-key" not in out + errors
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()
