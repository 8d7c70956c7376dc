"""Files and data sets of texts: what is read, and where what is wrong is."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from AutomaticEval.capture.texts.item_files import objects_with
from AutomaticEval.capture.texts.sources import DatasetTexts, FileTexts, name_of_texts, read_texts, texts_in, texts_of
from AutomaticEval.errors import DatasetUnavailable, PromptError, SelectionError

GOOD = {
    "a.jsonl": '{"text": "one"}\n\n{"prompt": "two", "id": 3}\n"three"\n',
    "a.json": '[{"question": "one"}, "two", {"input": "three"}]',
    "a.csv": 'id,text\n1,one\n2,"two"\n3,three\n',
    "a.txt": "one\r\ntwo\nthree",
}


@pytest.mark.parametrize("name", list(GOOD))
def test_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + GOOD[name].encode())  # a mark of byte order is no text
    assert read_texts(tmp_path / name) == ["one", "two", "three"]
    assert [text.text for text in FileTexts(tmp_path / name, most=2)] == ["one", "two"]


def test_text_over_several_lines_of_csv_and_a_named_field(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert len(read_texts(tmp_path / "long.csv")[0]) == 200_000
    (tmp_path / "a.csv").write_text('text,body\nx,"one\nmore"\ny,two\n')
    assert read_texts(tmp_path / "a.csv", "body") == ["one\nmore", "two"]
    with pytest.raises(PromptError, match=r"line 3: none of the fields bodi\. Did you mean 'body'\? Found text, body"):
        read_texts(tmp_path / "a.csv", "bodi")


@pytest.mark.parametrize(
    ("name", "written", "says"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ""}\n', "line 2, field 'text': an empty text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', "line 2, field 'text': NoneType, not a text"),
        ("a.jsonl", b'{"text": "a"}\n{"tex\n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\xff\n', r"line 2, is not UTF-8: byte 14 of the file"),
        ("a.txt", b"a\n\nb\n", "line 2: an empty text"),
        ("a.csv", b"text\na\n  \n", "line 3, field 'text': an empty text"),
        ("a.csv", b"text\na,b\n", "line 2: more fields than the first line names"),
        ("a.csv", b"id,text\n1\n", "line 2, field 'text': NoneType, not a text"),
        ("a.csv", b"", "holds no texts"),
        ("a.jsonl", b'{"text": "half \\ud800"}', "half a character"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "line 1: JSON that cannot be read"),
        ("a.jsonl", b'"a"\n' + b"[" * 100_000, "line 2: JSON that cannot be read"),
        ("a.json", b"[]", "holds no texts"),
        ("a.txt", b"", "holds no texts"),
    ],
)
def test_what_is_wrong_in_a_file_has_its_line(name: str, written: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(written)
    with pytest.raises(PromptError, match=says):
        read_texts(tmp_path / name)


def test_a_large_file_is_read_line_by_line(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"text {number}"}) + "\n" for number in range(1000))
        file.write("broken")
    items = texts_in(tmp_path / "a.jsonl")
    assert [next(items).text for _ in range(1000)][-1] == "text 999"
    with pytest.raises(PromptError, match="line 1001: not JSON"):
        next(items)


def test_data_sets(tmp_path: Path) -> None:
    """Of a folder of files, streamed, and of one that `datasets` saved."""
    (tmp_path / "files").mkdir()
    lines = [json.dumps({"id": number, "text": text}) for number, text in enumerate(["one", "", "two", "three"])]
    (tmp_path / "files" / "train.jsonl").write_text("\n".join(lines))
    found = DatasetTexts(str(tmp_path / "files"), most=2)
    assert [text for text, _ in found] == ["one", "two"]
    assert found.n_empty == 1
    assert [text for text, _ in found] == ["one", "two"]  # again from the beginning
    with pytest.raises(PromptError, match="item 1, field 'text': an empty text"):
        list(DatasetTexts(str(tmp_path / "files"), strict=True))
    with pytest.raises(PromptError, match=r"item 0: none of the fields words\. Found id, text"):
        list(DatasetTexts(str(tmp_path / "files"), field="words"))
    with pytest.raises(PromptError, match="item 0, field 'id': int, not a text"):
        list(DatasetTexts(str(tmp_path / "files"), field="id"))
    with pytest.raises(DatasetUnavailable, match="cannot be read"):
        list(DatasetTexts(str(tmp_path / "files"), split="nope"))
    with pytest.raises(DatasetUnavailable, match="'/no/such' "):
        list(DatasetTexts("/no/such"))
    with pytest.raises(PromptError, match="0 texts were asked for"):
        DatasetTexts("x", most=0)
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"prompt": ["one", "two"]})})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert [text for text, _ in DatasetTexts(str(tmp_path / "saved"))] == ["one", "two"]
    datasets.Dataset.from_dict({"prompt": ["one"]}, split="train").save_to_disk(str(tmp_path / "single"))
    with pytest.raises(SelectionError, match="holds the split 'train', not 'test'"):
        list(DatasetTexts(str(tmp_path / "single"), split="test"))
    with pytest.raises(SelectionError, match="has no split 'test'"):
        list(DatasetTexts(str(tmp_path / "saved"), split="test"))


def test_objects_give_their_named_fields_and_the_line_that_lacks_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"b": 1, "a": "x", "c": 0}\n\n{"a": null, "b": []}\n')
    path = tmp_path / "a.jsonl"
    assert list(objects_with(("a", "b"), path)) == [(f"{path}, line 1", ["x", 1]), (f"{path}, line 3", [None, []])]
    for line in ("[1]", '{"a": 1}', "7"):
        path.write_text('{"a": 1, "b": 2}\n' + line)
        with pytest.raises(PromptError, match=r"a\.jsonl, line 2: not an object with a and b\.$"):
            list(objects_with(("a", "b"), path))
    for line in ("{", "[" * 100_000):
        path.write_text('{"a": 1, "b": 2}\n' + line)
        with pytest.raises(PromptError, match=r"a\.jsonl, line 2: (not JSON|JSON that cannot be read)"):
            list(objects_with(("a", "b"), path))
    pd.DataFrame({"z": [0, 0], "b": ['é\t"x"', "y"], "a": ["line\none", "p"]}).to_csv(
        tmp_path / "a.tsv.gz", sep="\t", index=False
    )
    found = list(objects_with(("a", "b"), tmp_path / "a.tsv.gz"))
    assert [values for _, values in found] == [["line\none", 'é\t"x"'], ["p", "y"]]


def test_files_that_other_programs_wrote(tmp_path: Path) -> None:
    """By pandas: quotes, tabs and lines within a text, other columns, gzip by its name and without it; an index of pandas is no text."""
    frame = pd.DataFrame({"id": [7, 8, 9], "text": ["one\ttab", 'two "quoted"\nlines', "drei ü"], "label": [0, 1, 0]})
    wanted = list(frame["text"])
    frame.to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    frame.to_csv(tmp_path / "A.TSV.GZ", sep="\t", index=False, compression="gzip")
    frame.to_csv(tmp_path / "a.csv.gz", index=False)
    frame.to_json(tmp_path / "a.jsonl.gz", orient="records", lines=True)
    frame.to_json(tmp_path / "a.json.gz", orient="records")
    frame.set_index("id").to_parquet(tmp_path / "a.parquet")
    frame.iloc[:0].to_parquet(tmp_path / "empty.parquet")
    (tmp_path / "a.jsonl").write_bytes((tmp_path / "a.jsonl.gz").read_bytes())  # gzip that does not say so
    for name in ("a.tsv", "A.TSV.GZ", "a.csv.gz", "a.jsonl.gz", "a.json.gz", "a.parquet", "a.jsonl"):
        assert read_texts(tmp_path / name) == wanted, name
        assert name_of_texts(tmp_path / name).lower() == "a"
    assert read_texts(tmp_path / "a.parquet", "text") == wanted
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("one\ntwo")
    assert read_texts(tmp_path / "a.txt.gz") == ["one", "two"]
    with pytest.raises(PromptError, match=r"row 1: none of the fields txt\. Did you mean 'text'\? Found text, label"):
        read_texts(tmp_path / "a.parquet", "txt")
    with pytest.raises(PromptError, match="row 1, field 'label': int, not a text"):
        read_texts(tmp_path / "a.parquet", "label")
    with pytest.raises(PromptError, match="holds no texts"):
        read_texts(tmp_path / "empty.parquet")
    (tmp_path / "a.tsv").write_text('id\ttext\n0\ta\n1\t"never closed\n2\tb\n')
    with pytest.raises(PromptError, match=r"a\.tsv, line 3: the row that begins here is not TSV \(unexpected end"):
        read_texts(tmp_path / "a.tsv")


def test_a_packed_file_that_is_cut_or_broken_gives_one_error(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"text {number * 7919 % 1000003}"}) + "\n" for number in range(5000))
    whole = gzip.compress(lines.encode())
    for broken in (
        whole[: len(whole) // 2],
        whole[:2000] + bytes(40) + whole[2040:],
        whole[:-6],
        b"plain text",
        b"\x1f",
    ):
        (tmp_path / "a.jsonl.gz").write_bytes(broken)
        with pytest.raises(
            PromptError, match=r"a\.jsonl\.gz(, line \d+: not JSON| is no whole gzip file|, line \d+, is not UTF-8)"
        ):
            read_texts(tmp_path / "a.jsonl.gz")
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(b"text\n" + b"a\n" * 9999)[:-9])
    with pytest.raises(PromptError, match=r"cut\.tsv\.gz is no whole gzip file: it breaks off after line \d+ \("):
        read_texts(tmp_path / "cut.tsv.gz")
    pd.DataFrame({"text": [f"text {number}" for number in range(5000)]}).to_parquet(tmp_path / "whole.parquet")
    stored = (tmp_path / "whole.parquet").read_bytes()
    for broken in (stored[:-100], b"", b"text", stored[:400] + bytes(2000) + stored[2400:]):
        (tmp_path / "a.parquet").write_bytes(broken)
        with pytest.raises(
            PromptError, match=r"a\.parquet(, row \d+| is no whole parquet file: it cannot be read after row \d+)"
        ):
            read_texts(tmp_path / "a.parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(stored))
    with pytest.raises(PromptError, match="packed within, and is not read through gzip; unpack it"):
        read_texts(tmp_path / "a.parquet.gz")


def test_a_large_packed_file_is_read_little_by_little(tmp_path: Path) -> None:
    """The first texts are there although the file breaks off later."""
    texts = [f"{number * 7919 % 1000003} {number**3 % 99991}" for number in range(50_000)]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode())[:-20_000])
    items = texts_in(tmp_path / "a.txt.gz")
    assert [next(items).text for _ in range(1000)] == texts[:1000]
    with pytest.raises(PromptError, match="no whole gzip file"):
        list(items)


def test_objects_in_python(tmp_path: Path) -> None:
    """A DataFrame, a Series, a list, objects, a data set of `datasets`, and a generator that is read once, little by little."""
    wanted = ["one", "two"]
    frame = pd.DataFrame({"id": [1, 2], "question": wanted, "review": ["x", "y"]}, index=[5, 5])
    objects = frame.to_dict("records")
    again: list[Any] = [frame, frame["question"], wanted, tuple(wanted), objects, datasets.Dataset.from_list(objects)]
    for given in again:
        texts = texts_of(given)
        assert [text for text, _ in texts] == [text for text, _ in texts] == wanted, type(given)
    assert [text for text, _ in texts_of(frame, field="review")] == ["x", "y"]
    assert [text for text, _ in texts_of(objects, field="review")] == ["x", "y"]
    taken: list[int] = []

    def made() -> Iterator[str]:
        for number in range(10**9):
            taken.append(number)
            yield f"text {number}"

    streamed = texts_of(made())
    assert iter(streamed) is streamed  # it says that it is gone through once
    assert [text for text, _ in islice(streamed, 3)] == ["text 0", "text 1", "text 2"]
    assert len(taken) == 3
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (frame[["id"]], {}, r"the DataFrame: none of the fields text, input, question, prompt\. Found id\."),
        (frame, {"field": "reviw"}, "Did you mean 'review'"),
        (pd.DataFrame({"text": ["a", None]}), {}, r"row 1 \(from 0\), field 'text': \w+, not a text"),
        (objects, {"field": "x"}, r"item 0 \(from 0\): none of the fields x\. Found id, question, review"),
        ({"text": wanted}, {}, "given as a dict; give a file, a data set, a DataFrame, or a list"),
        (3, {}, "given as a int"),
        (["a", 3], {}, "int among the texts"),
    ]
    for given, how, says in wrong:
        with pytest.raises(PromptError, match=says):
            list(texts_of(given, **how))
