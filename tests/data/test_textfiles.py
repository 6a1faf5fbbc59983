"""Text as it really comes: encodings, line ends, what is cut short; each error says where and what to do."""

import json
import os
import stat

import pytest

from llava_fa import FourierError
from llava_fa.data.textfiles import lines_of, read_json, read_log, read_rows, read_table, read_text

ODD = "a\u2028b\u2029c\u0085d\x0be"
"""Every sign that `str.splitlines` ends a line at, and JSON and text files do not."""
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


def encoded(text, encoding):
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    return (mark + text).encode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_unicode_with_a_mark_and_utf8_without(tmp_path, encoding):
    path = tmp_path / "file"
    path.write_bytes(encoded("größe 图\n", encoding))
    assert read_text(path) == "größe 图\n"
    path.write_bytes(encoded(json.dumps([{"a": "图"}], ensure_ascii=False), encoding))
    assert read_json(path) == read_rows(path) == [{"a": "图"}]
    path.write_bytes(encoded('{"a": 1}\r\n\r\n{"a": 2}\r\n', encoding))
    assert read_rows(path) == [{"a": 1}, {"a": 2}]
    path.write_bytes(encoded("index\ttext\n1\t图\n", encoding))
    assert read_table(path) == [{"index": "1", "text": "图"}]


@pytest.mark.parametrize("encoding", ["latin-1", "gb18030", "shift-jis"])
def test_other_encodings_are_named_by_byte_and_line(tmp_path, encoding):
    text = "first\nthe é" if encoding == "latin-1" else "first\nthe 日"
    path = tmp_path / "file.txt"
    path.write_bytes(text.encode(encoding) + b" end")
    for read in (read_text, read_json, read_rows, read_table):
        with pytest.raises(
            FourierError, match=r"file\.txt: it is not UTF-8: byte 0x.. at offset 10 \(line 2\)"
        ) as caught:
            read(path)
        assert "iconv" in caught.value.remedy


def test_utf16_without_a_mark_is_not_taken_for_text(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes('{"a": 1}'.encode("utf-16-le"))
    with pytest.raises(FourierError, match="a zero byte at offset 1: it is no text, or in UTF-16 without a byte order"):
        read_json(path)


def test_utf16_cut_short(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes('{"a": 1}'.encode("utf-16")[:-1])
    with pytest.raises(FourierError, match="it is not UTF-16: byte 0x7d at offset 16"):
        read_json(path)


def test_lines_end_at_line_feeds_only(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text("".join(json.dumps({"text": ODD}, ensure_ascii=False) + "\n" for _ in range(2)), encoding="utf-8")
    assert read_rows(path) == [{"text": ODD}] * 2
    assert lines_of(f"{ODD}\r\nlast\n") == [ODD, "last"]
    assert lines_of("no end") == ["no end"]
    assert lines_of("") == []


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_whatever_the_ending(tmp_path, name):
    path = tmp_path / name
    for text in ('[{"a": 1}, {"a": 2}]', '\n[{"a": 1},\n{"a": 2}]\n', '{"a": 1}\n{"a": 2}', '{"a": 1}\n\n {"a": 2}\n'):
        path.write_text(text)
        assert read_rows(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{\n "a": 1\n}\n')
    assert read_rows(path) == [{"a": 1}]


CUT = "cut short: fetch or write it again"
BROKEN = {
    "nothing": ("", None, None),
    "a list cut short": ('[{"a": 1},\n {"a": ', r"line 2, column 8: Expecting value", CUT),
    "a string cut short": ('[{"a": "tex', r"line 1, column 8: Unterminated string", CUT),
    "lines cut short": ('{"a": 1}\n{"a": 2', r"line 2, column 8: Expecting ',' delimiter", CUT),
    "a comma too many": ('[{"a": 1},\n {"a": 2,}]', r"line 2, column 10: ", "Mend the file"),
    "one bad line": ('{"a": 1}\n{"a" 2}\n{"a": 3}\n', r"line 2, column 6: Expecting ':'", "Mend the file"),
    "a line cut short amid others": (
        '{"a": 1}\n{"a":\n{"a": 3}\n',
        r"line 2, column 6: Expecting value",
        "Mend the file",
    ),
    "numbers": ("[1, 2]", r"not a list of objects \(row 0 is of type int\)", "the official file"),
    "an object and a text": ('{"a": 1}\n"b"', r"not a list of objects \(row 1 is of type str\)", "the official file"),
    "too deep": ("[" * 100_000, "nested too deeply", "Mend the file"),
    "a number of 5000 digits": (f"[{'1' * 5000}]", "too many digits", "Mend the file"),
}


@pytest.mark.parametrize(("text", "message", "remedy"), BROKEN.values(), ids=BROKEN)
def test_broken_rows_are_told_by_line_and_column(tmp_path, text, message, remedy):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    if message is None:
        assert read_rows(path) == []
        return
    with pytest.raises(FourierError, match=rf"rows\.jsonl: .*{message}") as caught:
        read_rows(path)
    assert remedy in caught.value.remedy


def test_what_is_not_there_and_what_may_not_be_read(tmp_path, monkeypatch):
    with pytest.raises(FourierError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(FourierError, match=r"it cannot be read \(Is a directory\)\. Give a file"):
        read_json(tmp_path)
    path = tmp_path / "secret.json"
    path.write_text("[]")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything

        def refuse(self):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(FourierError, match=r"secret\.json: it cannot be read \(Permission denied\)\. Check its perm"):
        read_json(path)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)


def test_a_table_keeps_line_ends_in_its_cells(tmp_path):
    path = tmp_path / "table.tsv"
    path.write_bytes(f'\ufeffindex\ttext\r\n1\t"two\nlines"\r\n2\t{ODD}\r\n'.encode())
    assert read_table(path) == [{"index": "1", "text": "two\nlines"}, {"index": "2", "text": ODD}]
    path.write_text("index\ttext\n1\n")
    with pytest.raises(FourierError, match="row 2 has not as many cells as the header"):
        read_table(path)


def test_a_log_goes_on_after_a_kill_in_the_middle_of_a_letter(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_log(path) == []
    whole = json.dumps({"a": ODD}, ensure_ascii=False).encode() + b"\n"
    cut = whole + '{"a": "ü'.encode()[:-1]
    path.write_bytes(cut)
    assert read_log(path, shorten=False) == [{"a": ODD}]
    assert path.read_bytes() == cut
    assert read_log(path) == [{"a": ODD}]
    assert path.read_bytes() == whole
    path.write_bytes(b"\xef\xbb\xbf" + cut)  # an editor was at it
    assert read_log(path) == [{"a": ODD}]
    path.write_text('{"a": 1}\n{"a"}\n')
    with pytest.raises(FourierError, match="line 2, column 5"):
        read_log(path)
