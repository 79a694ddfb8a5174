"""Completions and conversations in text."""

import signal

import pytest

from calledshot.model import Request, Sampling, generate
from calledshot.recipe import UsageError
from calledshot.serving import Message, prompt
from calledshot.serving.console import Conversation, converse, write


def test_pieces_make_the_texts_and_a_stop_string_ends_one_without_the_others(decoder, tokenizer):
    requests = [
        Request((tokenizer.begin, *tokenizer.encode(text)), 40, Sampling(1.0, seed=seed), frozenset({tokenizer.end}))
        for seed, text in enumerate(["def ", "naïve", ""])
    ]
    expected = generate(decoder, requests, vocabulary=tokenizer.size)
    texts = [tokenizer.decode(one.tokens) for one in expected]
    pieces = ["", "", ""]

    def show(number: int, text: str) -> None:
        pieces[number] += text

    written = write(decoder, tokenizer, requests, (), show)
    assert pieces == [one.text for one in written] == texts
    assert [(one.tokens, one.finish) for one in written] == [(len(one.tokens), one.finish) for one in expected]
    stop = texts[1][9:12]
    cut = write(decoder, tokenizer, requests, [stop])
    assert [one.text for one in cut] == [text.split(stop)[0] for text in texts]
    assert cut[1].finish == "stop" and cut[1].tokens < written[1].tokens


def test_an_empty_stop_string_is_refused(decoder, tokenizer):
    with pytest.raises(UsageError, match="--stop"):
        write(decoder, tokenizer, [Request((tokenizer.begin,), 4)], [""])


def conversation(decoder, tokenizer, **options) -> Conversation:
    return Conversation(decoder, tokenizer, "plain", **{"tokens": 10, "sampling": Sampling(0), **options})


def test_a_conversation_goes_on_from_all_that_was_said(decoder, tokenizer):
    talk = conversation(decoder, tokenizer)
    said = []
    for text in ("def read", "naïve"):
        talk.say(text, said.append)
    roles = [message.role for message in talk.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    ids = prompt(tokenizer, talk.messages[:3], "plain")
    assert tokenizer.decode(ids[1:]) == "\n\n".join(message.text for message in talk.messages[:3])
    expected = generate(decoder, [Request(ids, 10, Sampling(0))], vocabulary=tokenizer.size)[0]
    assert talk.messages[3].text == tokenizer.decode(expected.tokens)
    assert "".join(said) == talk.messages[1].text + talk.messages[3].text


def test_under_one_seed_answers_differ_from_each_other_and_not_from_those_of_another_time(decoder, tokenizer):
    def answers() -> list[str]:
        talk = conversation(decoder, tokenizer, sampling=Sampling(1.0, seed=1))
        for _ in range(3):
            talk.say("x", lambda text: None)
            talk.reset()
            talk.say("x", lambda text: None)
        return [message.text for message in talk.messages if message.role == "assistant"]

    first = answers()
    assert len(set(first)) == len(first) and first == answers()


def test_the_oldest_messages_are_forgotten_when_the_context_is_full(decoder, tokenizer, monkeypatch):
    monkeypatch.setattr(decoder, "config", decoder.config.__class__(**{**vars(decoder.config), "context": 60}))
    talk = conversation(decoder, tokenizer)
    forgotten = [talk.say("def read(path):", lambda text: None) for _ in range(6)]
    assert forgotten[0] == 0 and forgotten[-1] > 0
    assert 0 < len(talk.messages) < 12
    before = list(talk.messages)
    with pytest.raises(UsageError, match="shorten it"):
        talk.say("日" * 60, lambda text: None)
    assert talk.messages == before


def test_an_interrupted_answer_ends_there_and_the_conversation_goes_on(decoder, tokenizer):
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    talk = conversation(decoder, tokenizer, tokens=50_000)
    talk.say("def ", interrupt)
    assert len(talk.messages) == 2 and len(talk.messages[1].text) > 0
    talk.tokens = 3
    talk.say("x", lambda text: None)
    assert len(talk.messages) == 4


def test_lines_are_turns_and_commands_are_not(decoder, tokenizer):
    talk = conversation(decoder, tokenizer)
    shown, told = [], []
    lines = iter(["def", "", "/reset", "/wrong", "naïve", "/usr is a folder", "/quit", "never"])
    converse(talk, lines, shown.append, told.append)
    assert [message.text for message in talk.messages if message.role == "user"] == ["naïve", "/usr is a folder"]
    assert len(told) == 2 and "/wrong" in told[1]
    assert "".join(shown).count("\n") >= 3
    assert isinstance(talk.messages[0], Message)


class Dying:
    """What Python cleans up at the moment at which Ctrl-C is pressed: an exception in there goes nowhere."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_heeded_at_whatever_moment_it_comes(decoder, tokenizer):
    before, shown = signal.getsignal(signal.SIGINT), []

    def show(text: str) -> None:
        shown.append(text)
        Dying()

    talk = conversation(decoder, tokenizer, tokens=2_000)
    talk.say("def ", show)
    assert len(shown) == 1 and talk.messages[1].text == shown[0]
    assert signal.getsignal(signal.SIGINT) is before
