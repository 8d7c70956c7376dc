"""Files and data sets of texts: what is read, and where what is wrong is."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from AutomaticEval.capture.texts.sources import DatasetTexts, FileTexts, objects_with, read_texts, texts_in
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
    for line in ("{", "[1]", '{"a": 1}', "7", "[" * 100_000):
        path.write_text('{"a": 1, "b": 2}\n' + line)
        with pytest.raises(PromptError, match=r"a\.jsonl, line 2: not an object with a and b\.$"):
            list(objects_with(("a", "b"), path))
