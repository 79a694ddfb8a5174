import gzip
import json
import lzma
import sysconfig
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_helpers import story
from hypothesis import given, settings
from hypothesis import strategies as st

from calledshot.data import readers
from calledshot.data.readers import Chunk, File, read
from calledshot.data.sources import resolve
from calledshot.recipe import UsageError
from calledshot.recipe.schema import Data, Source

SOURCE = Source(path="x", name="x")
TEXTS = {f"{folder}/{number}.txt": story(number, 20) for number in range(5) for folder in ("a", "b")}


def documents(corpus, skipped=None):
    return [
        doc
        for chunk in corpus.chunks()
        for doc in read(chunk, corpus.source, Counter() if skipped is None else skipped)
    ]


def one(source: Source, lab: Path):
    return resolve(Data(sources=(source,)), lab)[0]


@pytest.fixture
def folder(tmp_path):
    for name, text in TEXTS.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(text, newline="")
    (tmp_path / "texts" / ".hidden").mkdir()
    (tmp_path / "texts" / ".hidden" / "x.txt").write_text("hidden")
    (tmp_path / "texts" / "empty.txt").touch()
    return tmp_path / "texts"


def test_a_folder_is_a_document_a_file(folder, tmp_path):
    corpus = one(Source(path=str(folder), language="en"), tmp_path)
    assert {doc.id: doc.text for doc in documents(corpus)} == TEXTS
    assert {(doc.source, doc.language, doc.modality) for doc in documents(corpus)} == {("texts", "en", "text")}
    assert corpus.skipped == (("empty file", 1),)


def test_globs_and_exclusions(folder, tmp_path):
    corpus = one(Source(path=str(folder / "**" / "[0-3].txt"), exclude=("b/*",)), tmp_path)
    assert [doc.id for doc in documents(corpus)] == [f"a/{n}.txt" for n in range(4)]
    assert [file.name for file in one(Source(path="texts/a/*.txt"), tmp_path).files] == [f"{n}.txt" for n in range(5)]
    with pytest.raises(UsageError, match="no file matches"):
        one(Source(path=str(folder / "*.rst")), tmp_path)
    with pytest.raises(UsageError, match="no such file or folder"):
        one(Source(path="nowhere"), tmp_path)


def test_links_give_no_document_twice(folder, tmp_path):
    (folder / "a" / "up").symlink_to("..")
    (folder / "b" / "again.txt").symlink_to("0.txt")
    corpus = one(Source(path="texts/**/*.txt"), tmp_path)
    assert {doc.id: doc.text for doc in documents(corpus)} == TEXTS
    assert dict(corpus.skipped)["links to files that are here already"] > 1


def test_python_is_the_standard_library_without_its_tests(tmp_path):
    corpus = one(Source(), tmp_path)
    names = [file.name for file in corpus.files]
    root = Path(sysconfig.get_paths()["stdlib"])
    assert {"os.py", "json/decoder.py", "collections/__init__.py"} <= set(names)
    assert not [n for n in names if {"test", "tests", "idle_test", "site-packages"} & set(n.split("/"))]
    assert names == sorted(names) and len(names) > 300
    text = {doc.id: doc for doc in documents(corpus)}["json/decoder.py"]
    assert text.text == (root / "json" / "decoder.py").read_bytes().decode()
    assert text.language == "python"


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_jsonl_compressed_or_not_gives_the_same_documents(tmp_path, suffix):
    records = [{"text": story(n, 9), "id": n, "lang": "en"} for n in range(40)] + [{"text": "", "id": 40, "lang": None}]
    records += [{"text": "no id\ud800", "lang": None}]
    content = b"\n\n".join(json.dumps(record).encode() for record in records)
    wrap = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}[suffix]
    # Two frames in one file are what `cat a.zst b.zst` makes.
    half = content.index(b"\n\n", len(content) // 2)
    (tmp_path / f"f.jsonl{suffix}").write_bytes(wrap(content[:half]) + wrap(content[half:]))
    skipped = Counter()
    found = documents(one(Source(path=f"f.jsonl{suffix}", language_field="lang", language="xx"), tmp_path), skipped)
    assert [doc.text for doc in found[:40]] == [record["text"] for record in records[:40]]
    assert [doc.id for doc in found[:2]] == ["0", "1"] and {doc.language for doc in found[:40]} == {"en"}
    last = content.rindex(b"\n") + 1
    assert (found[-1].id, found[-1].text, found[-1].language) == (f"f.jsonl{suffix}:{last}", "no id\ufffd", "xx")
    assert skipped == {"empty": 1}


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=12), st.integers(1, 40))
@settings(max_examples=60)
def test_wherever_jsonl_is_cut_each_line_is_read_once(tmp_path_factory, texts, size):
    path = tmp_path_factory.mktemp("cut") / "f.jsonl"
    path.write_text("".join(json.dumps({"text": "t" + text}, ensure_ascii=False) + "\n" for text in texts), newline="")
    total = path.stat().st_size
    file = File(str(path), "f.jsonl", total, "jsonl")
    cuts = [Chunk((file,), start, min(start + size, total)) for start in range(0, total, size)]
    assert [doc.text for cut in cuts for doc in read(cut, SOURCE, Counter())] == ["t" + text for text in texts]


def test_parquet_reads_its_columns_by_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "SMALLEST_CHUNK", 1000)
    texts = [story(n, 30) for n in range(100)]
    table = pa.table({"content": texts, "lang": ["en"] * 100, "embedding": [[0.0] * 50] * 100})
    pq.write_table(table, tmp_path / "f.parquet", row_group_size=20)
    source = Source(path="f.parquet", text_field="content", language_field="lang")
    corpus = one(source, tmp_path)
    assert len(corpus.chunks()) > 1
    found = documents(corpus)
    assert [doc.text for doc in found] == texts
    assert [doc.id for doc in found] == [f"f.parquet:{n}" for n in range(100)]
    with pytest.raises(UsageError, match=r"f\.parquet: no field 'text'; there are content, lang, embedding"):
        documents(one(replace(source, text_field="text"), tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("f.txt", b"", "f.txt: empty"),
        ("f.txt", b"a\0b", r"f.txt: a binary file"),
        ("f.txt", "é".encode("latin-1"), r"f.txt: not UTF-8 at byte 0"),
        ("f.jsonl", b'{"text": "a"}\n{"body": "b", "n": 1}\n', r"f.jsonl, byte 14: no field 'text'; there are body, n"),
        ("f.jsonl", b'{"text": 3}', r"'text' holds int, not text"),
        ("f.jsonl", b"[1]", "not an object"),
        ("f.jsonl", b"{", "not a JSON object on one line"),
        ("f.jsonl", b'{"text": "\xff"}', "not UTF-8"),
        ("f.jsonl.gz", b"no gzip", r"f.jsonl.gz: cannot be decompressed"),
        ("f.txt.xz", lzma.compress(b"text" * 1000)[:-30], r"f.txt.xz: cannot be decompressed"),
        ("f.txt.zst", b"no zstandard", r"f.txt.zst: cannot be decompressed"),
        ("f.txt.zst", zstandard.compress(story(0, 100_000).encode())[:-30], r"f.txt.zst: cannot be decompressed"),
        ("f.parquet", b"PAR1 no parquet", r"f.parquet: not a Parquet file"),
    ],
)
def test_bad_files_are_named_with_the_way_out(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=complaint) as caught:
        documents(one(Source(path=name), tmp_path))
    assert "\n" not in str(caught.value)


def test_real_books(corpora, tmp_path):
    source = Source(path=str(corpora / "text" / "standard_ebooks.jsonl.xz"))
    corpus = one(source, tmp_path)
    chapter = next(read(corpus.chunks()[0], corpus.source, Counter()))
    assert corpus.source.name == "standard_ebooks" and len(chapter.text) > 1000 and chapter.id
