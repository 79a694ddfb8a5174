import json
import subprocess
import sys

import pytest
import tokenizers
from data_helpers import story
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from calledshot.data.tokenizer import PROBES, SPECIALS, Tokenizer, well_formed
from calledshot.recipe import UsageError

CODE = 'def f(self, *args):\n    """Say it."""\n    return [x for x in args if x != 10_000]\n\n\n'
TEXTS = [story(n, 60) + CODE * (n % 3) + "naïve café — 日本語 🎉\r\n" for n in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 1000)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(path)
    return path


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60)
AWKWARD = st.lists(st.sampled_from([*PROBES, *SPECIALS[:5], "def f", "  ", "\ud800", "return x\n", "ﷺ"]), max_size=6)


@given(st.one_of(ANY_TEXT, AWKWARD.map("".join)))
@settings(max_examples=300)
@example("\ud800\udc00\ud800")
def test_any_text_comes_back_and_both_encoders_agree(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == well_formed(text)
    assert tokenizer.decode_bytes(ids) == well_formed(text).encode()
    assert not set(ids) & set(tokenizer.special.values())
    assert ids == tokenizer.without_tiktoken().encode(text)


def test_it_is_fast_and_special_tokens_come_last(tokenizer):
    assert tokenizer.encoder == "tiktoken"
    assert tokenizer.size <= 1000
    assert list(tokenizer.special.values()) == list(range(tokenizer.size - len(SPECIALS), tokenizer.size))
    assert len(tokenizer.sentinels) == 256
    assert tokenizer.encode("<|end|>") != [tokenizer.end]
    assert tokenizer.decode([tokenizer.begin, *tokenizer.encode("hi"), tokenizer.end]) == "<|begin|>hi<|end|>"
    assert tokenizer.decode([tokenizer.size + 5]) == ""


def test_white_space_that_overflows_a_regex_stack(tokenizer):
    for text in (" " * 3_000_000, "x" + "\n " * 30_000 + "y", "a" * 1_000_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_texts_longer_than_one_encoding_come_back(tokenizer, monkeypatch):
    monkeypatch.setattr("calledshot.data.tokenizer.PART", 100)
    text = "".join(TEXTS[:20]) + "x" * 500
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_saved_tokenizer_is_the_same_here_and_in_transformers(tokenizer, saved):
    from transformers import PreTrainedTokenizerFast

    again = Tokenizer.load(saved)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(saved))
    for text in [*TEXTS[:20], *(probe for probe in PROBES if "<|" not in probe)]:
        assert again.encode(text) == tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert again.to_json() == tokenizer.to_json()
    assert theirs.convert_tokens_to_ids("<|end|>") == tokenizer.end
    assert len(theirs) == tokenizer.size


def test_the_same_texts_give_the_same_bytes_in_another_process(tokenizer, saved):
    script = "import sys, json; from calledshot.data import Tokenizer; " + (
        "sys.stdout.write(Tokenizer.train(json.load(sys.stdin), 1000).to_json())"
    )
    made = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(TEXTS), capture_output=True, text=True, check=True
    )
    assert made.stdout == saved.read_text()


def gpt2_like() -> tokenizers.Tokenizer:
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    theirs.train_from_iterator(TEXTS, trainer)
    return theirs


def test_a_loaded_tokenizer_keeps_its_ids_and_gets_ours_above(tmp_path):
    theirs = gpt2_like()
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    assert ours.encoder == "tiktoken"
    assert ours.size == theirs.get_vocab_size() + len(SPECIALS)
    assert ours.begin == theirs.get_vocab_size()
    theirs.encode_special_tokens = True
    for text in [*TEXTS[:20], *PROBES, "a<|endoftext|>b"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("twist", ["normalizer", "prefix", "added"])
def test_tiktoken_is_not_used_where_its_ids_would_differ(tmp_path, twist):
    theirs = gpt2_like()
    if twist == "normalizer":
        theirs.normalizer = tokenizers.normalizers.Lowercase()
    elif twist == "prefix":
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        theirs.add_tokens(["the cat"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    assert ours.encoder == "tokenizers"
    theirs.encode_special_tokens = True
    assert ours.encode("The cat saw the cat.") == theirs.encode("The cat saw the cat.", add_special_tokens=False).ids


def test_a_tokenizer_without_bytes_works_too(tmp_path):
    theirs = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    theirs.pre_tokenizer = pre_tokenizers.Whitespace()
    theirs.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    assert ours.encoder == "tokenizers" and ours.decode(ours.encode("the cat")) == "the cat"
    assert not ours.lossless and Tokenizer.train(TEXTS, 600).lossless


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    for path, complaint in ((tmp_path / "bad.json", "not a tokenizer.json"), (tmp_path / "none", "no such tokenizer")):
        with pytest.raises(UsageError, match=complaint):
            Tokenizer.load(path)
    with pytest.raises(UsageError, match=r"model\.vocabulary: 300 .* at least 525"):
        Tokenizer.train(TEXTS, 300)


@pytest.mark.slow
def test_both_encoders_agree_on_every_code_point(tokenizer):
    points = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for start in range(0, len(points), 4096):
        assert tokenizer.agrees([f"the{c}the {c} 10{c}10{c}{c}\n {c}'{c}s  {c}x" for c in points[start : start + 4096]])
