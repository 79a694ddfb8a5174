"""Text that grows token by token: whole characters, and nothing of a stop string."""

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from calledshot.data import Tokenizer
from calledshot.data.tokenizer import SPECIALS
from calledshot.serving import TextStream

BYTES = Tokenizer.train([], 256 + len(SPECIALS))
"""Every token is one byte, so that every character beyond ASCII is spread over several."""


def pushed(tokens: list[int], stop: list[str], tokenizer: Tokenizer = BYTES) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push([token]) for token in tokens]
    return [*pieces, stream.finish()], stream


@given(st.text(max_size=60))
def test_pieces_are_whole_characters_and_make_the_text(text):
    pieces, stream = pushed(BYTES.encode(text), [])
    assert "".join(pieces) == text
    assert text.count("\ufffd") == sum(piece.count("\ufffd") for piece in pieces)
    begins = [len(text.encode()[:place].decode(errors="ignore")) for place in range(len(stream.offsets))]
    assert stream.offsets == begins


@settings(max_examples=300)
@given(st.text("ab\né", max_size=40), st.lists(st.text("ab\né", min_size=1, max_size=4), min_size=1, max_size=3))
def test_it_ends_before_the_first_stop_string_wherever_tokens_cut_it(text, stop):
    pieces, stream = pushed(BYTES.encode(text), stop)
    complete = min((text.find(one) + len(one) for one in stop if one in text), default=len(text))
    expected = min((text[:complete].find(one) for one in stop if one in text[:complete]), default=len(text))
    assert "".join(pieces) == text[:expected]
    assert stream.stopped == any(one in text for one in stop)


def test_what_may_begin_a_stop_string_is_held_and_given_out_once_it_does_not():
    stream = TextStream(BYTES, ["\n\ndef"])
    assert stream.push(BYTES.encode("x\n")) == "x"
    assert stream.push(BYTES.encode("\nde")) == ""
    assert stream.push(BYTES.encode("l")) == "\n\ndel"
    assert stream.push(BYTES.encode("\n\n")) == ""
    assert stream.finish() == "\n\n"


def test_bytes_that_are_no_utf8_become_replacement_characters_once_nothing_can_complete_them():
    thumb = BYTES.encode("👍")
    assert pushed(thumb[:2], [])[0] == ["", "", "\ufffd"]
    assert "".join(pushed([thumb[0], *BYTES.encode("a")], [])[0]) == "\ufffda"
    assert "".join(pushed([*thumb[:3], *thumb], [])[0]) == "\ufffd👍"


def test_a_vocabulary_that_is_not_byte_level_keeps_its_spaces_and_its_bytes():
    """SentencePiece's kind: words carry a space, which a text's first word loses; bytes stand in for the rest."""
    words = ["▁the", "▁cat", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: place for place, word in enumerate(["<unk>", *words])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(list(SPECIALS))
    tokenizer = Tokenizer(backend)
    ids = [vocabulary[word] for word in ("▁the", "▁cat", "s", "<0xF0>", "<0x9F>", "<0x91>", "<0x8D>", "▁the")]
    assert pushed(ids, [], tokenizer)[0] == ["the", " cat", "s", "", "", "", "👍", " the", ""]
    after = TextStream(tokenizer, before=ids[:1])
    assert after.push(ids[1:3]) == " cats"
