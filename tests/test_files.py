"""Files that may be damaged, and tables of text."""

import pytest
from helpers import message_of

from core.files import read_json, read_jsonl, write_json
from core.text import aligned


def test_json_round_trip(tmp_path):
    content = {"lr": 1e-4, "names": ["ä", None], "nested": {"a": 0.1 + 0.2}}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json", "advice") == content
    assert (tmp_path / "a.json").read_text().startswith('{\n "lr": 0.0001,') and [*tmp_path.iterdir()] == [
        tmp_path / "a.json"]


@pytest.mark.parametrize("content, message", [
    (b'{"lr": 1e', "damaged (Expecting"), (b"", "damaged (Expecting value"), (b"{}{}", "damaged (Extra data"),
    (b"[1, 2]", "damaged (found [1, 2], expected"), (b'{"a": "\xff"}', "damaged ('utf-8' codec can't decode")])
def test_damaged_json_is_named_with_what_to_do(tmp_path, content, message):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    said = message_of(lambda: read_json(file, "remove it"))
    assert said.startswith(f"{file}: {message}") and said.endswith("; remove it")
    assert message_of(lambda: read_json(tmp_path / "b.json", "x")).startswith(f"{tmp_path / 'b.json'}: cannot be read")


def test_a_torn_last_line_is_left_out(tmp_path):
    file = tmp_path / "a.jsonl"
    for text, steps in (('{"step": 1}\n{"step": 2}\n', [1, 2]), ('{"step": 1}\n{"step": 2}', [1, 2]), ("", []),
                        ('{"step": 1}\n{"st', [1]), ('{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.', [1, 2])):
        file.write_text(text)
        assert [record["step"] for record in read_jsonl(file, "advice")] == steps
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    assert message_of(lambda: read_jsonl(file, "remove it")).startswith(f"{file}: damaged (")
    assert "cannot be read" in message_of(lambda: read_jsonl(tmp_path / "b.jsonl", "remove it"))


def test_columns_stand_below_each_other():
    rows = [["", "n", "name"], ["GeCA-S", 12, "a"], ["x", 3, ""]]
    assert aligned(rows).splitlines() == ["         n  name", "GeCA-S  12     a", "x        3"]
    assert aligned(rows, left=0).splitlines()[2] == "     x   3"
    assert aligned(rows, left=3).splitlines()[1] == "GeCA-S  12  a"
    with pytest.raises(ValueError):
        aligned([["a", "b"], ["c"]])
