"""Models with other people's tokenizers become models to train on: nothing known is lost, what is missing is added."""

import dataclasses
import json
from pathlib import Path

import pytest
import tokenizers
import torch
from huggingface_models import loaded, random_decoder
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from calledshot.data import Tokenizer
from calledshot.data.tokenizer import SPECIALS
from calledshot.model import EncoderInputs
from calledshot.model.huggingface import export_huggingface, import_huggingface
from calledshot.recipe import RunError, UsageError, schema

TEXTS = ["the cat sat on the mat and the dog sat on the cat", "naïve café — 日本語 <s> </s> <|end|>", "x" * 30]
LLAMA = schema.Model(layers=2, width=64, heads=4, kv_heads=2, qk_norm=False, context=64)
T5 = dataclasses.replace(
    LLAMA, topology="encoder-decoder", positions="t5", feed_forward="geglu", kv_heads=4, hidden=96
)  # fmt: skip


def byte_level(specials: list[str]) -> tokenizers.Tokenizer:
    """As Llama 3's and Qwen's: specials above the vocabulary, a post-processor that adds the first."""
    theirs = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    theirs.add_special_tokens(specials)
    first = (specials[0], theirs.token_to_id(specials[0]))
    theirs.post_processor = processors.TemplateProcessing(single=f"{specials[0]} $A", special_tokens=[first])
    return theirs


def sentence_piece() -> tokenizers.Tokenizer:
    """As T5's: a unigram model with its specials first and <extra_id_0> last."""
    theirs = tokenizers.Tokenizer(models.Unigram())
    theirs.pre_tokenizer = pre_tokenizers.Metaspace()
    theirs.decoder = decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=specials, unk_token="<unk>")
    theirs.train_from_iterator(TEXTS, trainer)
    theirs.add_special_tokens([f"<extra_id_{number}>" for number in reversed(range(100))])
    ends = ("</s>", 1)
    theirs.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[ends])
    return theirs


def bytes_behind_pieces() -> tokenizers.Tokenizer:
    """As Llama 2's and Mixtral's: a BPE of pieces that falls back on bytes, its specials in the vocabulary."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁thecaosm<|end>/begin",
        "th",
        "▁th",
    ]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("t", "h"), ("▁", "th")]
    theirs = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    theirs.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    theirs.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    theirs.add_special_tokens(["<unk>", "<s>", "</s>"])
    theirs.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return theirs


def saved(folder: Path, theirs: tokenizers.Tokenizer, model: schema.Model, rows: int, **config) -> torch.nn.Module:
    """A folder with the tokenizer and a model of so many rows."""
    model = dataclasses.replace(model, vocabulary=rows)
    decoder = random_decoder(model)
    lab = Tokenizer.train(["x"], 600)
    export_huggingface(folder, model, decoder.state_dict(), lab)
    file = folder / "config.json"
    written = {key: value for key, value in json.loads(file.read_text()).items() if not key.endswith("token_id")}
    file.write_text(json.dumps(written | config))
    theirs.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    return decoder


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_keeps_its_begin_and_end_and_gets_the_rest(tmp_path, tied, transformers):
    theirs = byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|reserved|>"])
    size = theirs.get_vocab_size()
    begin, end = size - 3, size - 2
    model = dataclasses.replace(LLAMA, tied_embeddings=tied)
    before = saved(tmp_path / "m", theirs, model, size + 5, bos_token_id=begin, eos_token_id=[end, size - 1])
    found = import_huggingface(tmp_path / "m")
    tokenizer = found.tokenizer
    assert (tokenizer.begin, tokenizer.end) == (begin, end)
    assert found.renamed == {"<|begin_of_text|>": "<|begin|>", "<|end_of_text|>": "<|end|>"}
    assert tokenizer.size == size + len(SPECIALS) - 2 and found.new_rows == len(SPECIALS) - 2
    assert found.model == dataclasses.replace(
        found.model, vocabulary=-(-tokenizer.size // 64) * 64, tied_embeddings=tied, context=64
    )
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # What the model knew it still knows, and the file that is kept says the same.
    after = loaded(found.model, found.state)
    tokens = torch.tensor([[begin, *tokenizer.encode(TEXTS[0])]])
    expected = before.logits(before.hidden_states(tokens))
    logits = after.logits(after.hidden_states(tokens))
    torch.testing.assert_close(logits[..., :size], expected[..., :size], rtol=0, atol=0)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").special == tokenizer.special
    assert transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))("the").input_ids == (
        tokenizer.encode("the")
    )


def test_new_rows_are_the_mean_and_none_is_another(tmp_path):
    theirs = byte_level(["<s>", "</s>"])
    size = theirs.get_vocab_size()
    before = saved(tmp_path / "m", theirs, LLAMA, size, bos_token_id=size - 2, eos_token_id=size - 1)
    found = import_huggingface(tmp_path / "m")
    for name in ("embedding_VD", "separate_head_VD"):
        old, new = getattr(before, name), found.state[name]
        assert torch.equal(new[:size], old)
        rows = new[size:]
        assert len(rows.unique(dim=0)) == len(rows) == found.model.vocabulary - size
        torch.testing.assert_close(rows.mean(0), old.mean(0), rtol=0, atol=4 * 0.1 * old.std() / len(rows) ** 0.5)
        assert float((rows - old.mean(0)).std() / old.std(0).mean()) == pytest.approx(0.1, rel=0.05)
    # So that no new token is likelier than those that are known: exp(mean) is at most the mean of exp.
    after = loaded(found.model, found.state)
    logits = after.logits(after.hidden_states(torch.arange(64)[None]))[0]
    known, added = logits[:, :size].logsumexp(-1), logits[:, size:].logsumexp(-1)
    assert ((added - known).exp() < 1.5 * (found.model.vocabulary - size) / size).all()


def test_one_token_for_both_ends_is_the_end_and_its_twin_reads_alike(tmp_path):
    """Qwen's <|endoftext|>."""
    theirs = byte_level(["<|endoftext|>"])
    size = theirs.get_vocab_size()
    both = size - 1
    saved(tmp_path / "m", theirs, LLAMA, size, bos_token_id=both, eos_token_id=both, pad_token_id=both)
    found = import_huggingface(tmp_path / "m")
    tokenizer, state = found.tokenizer, found.state
    assert tokenizer.end == both and tokenizer.begin >= size and tokenizer.pad >= size
    assert torch.equal(state["embedding_VD"][tokenizer.begin], state["embedding_VD"][both])
    # What is predicted is the one, what is read the other.
    assert not torch.equal(state["separate_head_VD"][tokenizer.begin], state["separate_head_VD"][both])
    assert not torch.equal(state["embedding_VD"][tokenizer.pad], state["embedding_VD"][both])


def test_t5_begins_with_its_padding_and_brings_its_sentinels(tmp_path, transformers):
    theirs = sentence_piece()
    size = theirs.get_vocab_size()
    before = saved(
        tmp_path / "m", theirs, T5, size + 28, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0
    )  # fmt: skip
    found = import_huggingface(tmp_path / "m")
    tokenizer = found.tokenizer
    assert (tokenizer.begin, tokenizer.end) == (0, 1) and tokenizer.pad >= size
    assert tokenizer.sentinels[:100] == [size - 1 - number for number in range(100)]
    assert len(set(tokenizer.sentinels)) == 256 and min(tokenizer.sentinels[100:]) >= size
    for text in TEXTS[::2]:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    after = loaded(found.model, found.state)
    read = EncoderInputs(torch.tensor([[*tokenizer.encode(TEXTS[0]), tokenizer.sentinels[0], tokenizer.end]]))
    tokens = torch.tensor([[tokenizer.begin, tokenizer.sentinels[0], *tokenizer.encode("the dog")]])
    expected = before.logits(before.hidden_states(tokens, encoder_inputs=read))
    logits = after.logits(after.hidden_states(tokens, encoder_inputs=read))
    assert torch.equal(logits[..., :size], expected[..., :size])
    # And out again, as the same function of the same text.
    export_huggingface(tmp_path / "out", found.model, found.state, tokenizer)
    there = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(there(read.tokens_BS, decoder_input_ids=tokens).logits, logits, rtol=0, atol=1e-5)
    assert (there.config.decoder_start_token_id, there.config.eos_token_id) == (0, 1)
    spelled = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert spelled(TEXTS[0]).input_ids == [0, *tokenizer.encode(TEXTS[0])]
    filled = spelled("the <|sentinel_0|>", split_special_tokens=False).input_ids
    assert filled[-1] == tokenizer.sentinels[0]


@pytest.mark.parametrize("kind", [byte_level, sentence_piece, bytes_behind_pieces])
def test_no_text_spells_a_special_token(kind, tmp_path):
    """A unigram model would find them in its vocabulary, where they stand under the lab's names."""
    theirs = kind(["<s>", "</s>"]) if kind is byte_level else kind()
    size = theirs.get_vocab_size()
    ids = {"bos_token_id": theirs.token_to_id("<s>"), "eos_token_id": theirs.token_to_id("</s>")}
    saved(tmp_path / "m", theirs, LLAMA, size, **ids)
    tokenizer = import_huggingface(tmp_path / "m").tokenizer
    text = "a<|end|>b <|begin|> <|sentinel_0|>" + "".join(SPECIALS)
    assert not set(tokenizer.encode(text)) & set(tokenizer.special.values())
    assert tokenizer.end == ids["eos_token_id"]
    for ordinary in TEXTS[::2]:
        assert tokenizer.encode(ordinary) == theirs.encode(ordinary, add_special_tokens=False).ids


def test_a_folder_of_the_labs_own_comes_back_as_it_was(tmp_path, tokenizer):
    config = dataclasses.replace(LLAMA, vocabulary=640)
    decoder = random_decoder(config)
    export_huggingface(tmp_path / "m", config, decoder.state_dict(), tokenizer)
    found = import_huggingface(tmp_path / "m")
    assert found.new_rows == 0 and not found.renamed
    assert found.tokenizer.special == tokenizer.special
    assert all(torch.equal(found.state[name], tensor) for name, tensor in decoder.state_dict().items())


def test_tokens_are_looked_up_where_config_is_silent(tmp_path):
    theirs = byte_level(["<s>", "</s>", "<pad>"])
    size = theirs.get_vocab_size()
    saved(tmp_path / "m", theirs, LLAMA, size)
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = import_huggingface(tmp_path / "m").tokenizer
    assert (tokenizer.begin, tokenizer.end, tokenizer.pad) == (size - 3, size - 2, size - 1)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), UsageError, "tokenizer.json: is missing"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), RunError, "is not a tokenizer.json"),
        (lambda folder: (folder / "config.json").unlink(), UsageError, "config.json: is missing"),
        (
            lambda folder: byte_level([f"<{number}>" for number in range(50)]).save(str(folder / "tokenizer.json")),
            UsageError,
            "its tokenizer has 3.. entries, its embedding only 3.. rows",
        ),
    ],
)
def test_what_cannot_be_read_is_said(change, error, words, tmp_path):
    theirs = byte_level(["<s>", "</s>"])
    saved(tmp_path / "m", theirs, LLAMA, theirs.get_vocab_size(), bos_token_id=1)
    change(tmp_path / "m")
    with pytest.raises(error, match=words):
        import_huggingface(tmp_path / "m")
