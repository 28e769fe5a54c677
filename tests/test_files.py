"""Files that are whole or not there, that may be damaged, and tables of text."""

import os
import resource
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from helpers import message_of

from core import claims, files
from core.claims import built_whole
from core.files import read_json, read_jsonl, read_torch, write_json, write_text, write_together, write_torch
from core.tensors import all_finite, read_tensors, tensors_hash, write_tensors
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


def test_a_path_that_is_no_text_is_written_and_read_back(tmp_path):
    """Linux has paths of any bytes; those that are no UTF-8 are halves of surrogate pairs for Python."""
    path = os.fsdecode(b"/data/sch\xfcler/\xc3\xa4")
    write_text(tmp_path / "a.txt", path)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "/data/sch\\udcfcler/ä"
    write_json(tmp_path / "a.json", {"path": path})
    assert read_json(tmp_path / "a.json", "advice") == {"path": "/data/sch\\udcfcler/ä"}
    claims.write_settings(tmp_path, {"path": path})  # and the folder is known again
    assert claims.differences(claims.read_settings(tmp_path), {"path": path}) == {}
    assert "--output" in message_of(lambda: files.make_folder(tmp_path / path, "--output"))


# ---- written whole


def test_several_files_appear_together_or_not_at_all(tmp_path):
    (tmp_path / "a").write_text("old")

    def fails(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    said = message_of(lambda: write_together({tmp_path / "a": lambda path: path.write_text("new"),
                                              tmp_path / "b": fails}))
    assert said.startswith(f"{tmp_path / 'b'}: cannot be written ([Errno 28] No space left on device); make room")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("write", [
    lambda path: write_torch(path, {"a": torch.zeros(200_000)}),
    lambda path: write_tensors(path, {"a": torch.zeros(200_000)}),
    lambda path: write_json(path, {"a": "x" * 800_000})], ids=["torch", "safetensors", "json"])
def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path, write):
    """torch and safetensors have errors of their own for it, which are no OSError."""
    file = tmp_path / "a"
    file.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        said = message_of(lambda: write(file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said.startswith(f"{file}: cannot be written (") and file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    """safetensors itself makes files that nobody else may read."""
    program = ("import os, sys; os.umask(0o027); import torch; from core.tensors import write_tensors;"
               "write_tensors(sys.argv[1], {'a': torch.zeros(1)})")
    subprocess.run([sys.executable, "-c", program, tmp_path / "a"], cwd=ROOT, check=True)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_what_is_renamed_is_on_the_disk_before(tmp_path, monkeypatch):
    """Else a power cut may leave the new name with no contents."""
    done = []
    monkeypatch.setattr(files, "_sync", lambda path: done.append(("sync", path.name)))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("rename", b.name)), replace(a, b)))
    write_json(tmp_path / "a.json", {})
    assert [kind for kind, _ in done] == ["sync", "rename", "sync"]
    assert done[0][1].startswith(".a.json.") and done[2][1] == tmp_path.name


def test_a_folder_appears_whole_and_a_killed_job_goes_on(tmp_path):
    """With the same settings; what others left is of no use."""
    class Killed(BaseException):
        pass

    seen = []

    def build(settings, error):
        with built_whole(tmp_path / "data", settings) as folder:
            seen.append(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))
            (folder / "x").touch()
            if error:
                raise error

    with pytest.raises(Killed):
        build({"a": 1}, Killed())
    with pytest.raises(Killed):
        build({"a": 1}, Killed())
    assert seen == [["settings.json"], ["settings.json", "x"]]
    with pytest.raises(Killed):
        build({"a": 2}, Killed())
    assert seen[-1] == ["settings.json"]
    with pytest.raises(KeyError):
        build({"a": 2}, KeyError())
    assert seen[-1] == ["settings.json", "x"] and [*tmp_path.iterdir()] == []
    build({"a": 2}, None)
    assert seen[-1] == ["settings.json"] and [path.name for path in (tmp_path / "data").iterdir()] == ["x"]


# ---- damaged by single bits


def test_every_flipped_bit_of_a_checkpoint_is_noticed_or_changes_nothing(tmp_path):
    content = {"weights": torch.arange(300.0), "step": 3}
    write_torch(tmp_path / "a.pt", content)
    whole, noticed = (tmp_path / "a.pt").read_bytes(), 0
    for place in range(0, len(whole), 11):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << place % 8
        (tmp_path / "b.pt").write_bytes(spoilt)
        try:
            found = read_torch(tmp_path / "b.pt", "--ckpt", "advice")
        except files.UserError as error:
            assert "cannot be loaded safely" in str(error) and "\n" not in str(error)
            noticed += 1
        else:  # in the space between two records
            assert torch.equal(found["weights"], content["weights"]) and found["step"] == 3
    assert noticed > len(range(0, len(whole), 11)) / 2


def test_every_flipped_bit_of_a_file_of_tensors_is_noticed(tmp_path):
    tensors = {"a": torch.arange(30.0), "b": torch.ones(2, 3, dtype=torch.bfloat16), "n": torch.tensor(3)}
    write_tensors(tmp_path / "a", tensors, {"made": "here"})
    found, about = read_tensors(tmp_path / "a", "advice", sealed=True)
    assert about == {"made": "here"} and all(torch.equal(found[key], tensors[key]) for key in tensors)
    whole = (tmp_path / "a").read_bytes()
    start = len(whole) - 30 * 4 - 12 - 8
    for place in range(start, len(whole)):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << place % 8
        (tmp_path / "b").write_bytes(spoilt)
        assert message_of(lambda: read_tensors(tmp_path / "b", "advice")).startswith(f"{tmp_path / 'b'}: damaged (")


def test_a_file_of_tensors_without_a_checksum_is_another_programs(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "a")
    assert read_tensors(tmp_path / "a", "advice")[1] == {}
    assert "does not have its checksum" in message_of(lambda: read_tensors(tmp_path / "a", "advice", sealed=True))


def test_a_hash_of_tensors_sees_names_and_values():
    a = {"x": torch.ones(2), "y": torch.zeros(1)}
    assert tensors_hash(a) == tensors_hash({"y": torch.zeros(1), "x": torch.ones(2)})
    assert len({tensors_hash(a), tensors_hash({"x": torch.ones(2), "z": torch.zeros(1)}),
                tensors_hash({**a, "y": -torch.zeros(1)})}) == 3


def test_finite_or_not():
    assert all_finite([torch.ones(2), torch.ones(1, dtype=torch.int64)]) and all_finite([])
    assert not all_finite([torch.ones(2), torch.tensor([1.0, float("nan")])])
    assert not all_finite([torch.tensor(float("-inf"))])


def test_what_a_killed_job_left_half_written_is_not_in_the_folder(tmp_path):
    """It lies deeper than the folder itself, and goes on with the same settings."""
    class Killed(BaseException):
        pass

    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    with pytest.raises(Killed), built_whole(tmp_path / "data", {}) as folder:
        (folder / "images").mkdir()
        (folder / "images" / "a.png").touch()
        (folder / "images" / f".b.png.{dead.stdout.strip()}@{files.HOST}.tmp").touch()
        raise Killed
    with built_whole(tmp_path / "data", {}):
        pass
    assert [path.name for path in (tmp_path / "data" / "images").iterdir()] == ["a.png"]


@pytest.mark.parametrize("make", [lambda folder: files.make_folder(folder, "--output"),
                                  lambda folder: files.make_writable(folder, "--output")])
def test_what_killed_jobs_left_goes_when_a_folder_is_used_again(tmp_path, make):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / f".a.{dead.stdout.strip()}@{files.HOST}.tmp").touch()
    (tmp_path / f".b.{os.getpid()}@{files.HOST}.tmp").touch()
    make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f".b.{os.getpid()}@{files.HOST}.tmp"]


def test_a_killed_writer_of_tensors_leaves_nothing_under_another_name(tmp_path, monkeypatch):
    """safetensors' own save_file makes a .tmpXXXXXX of which nobody knows whose it is."""
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.extend(p.name for p in tmp_path.iterdir()), replace(a, b)))
    write_tensors(tmp_path / "a", {"a": torch.zeros(2)})
    assert len(seen) == 1 and files.TEMPORARY.fullmatch(seen[0])


# ---- text

def test_columns_stand_below_each_other():
    rows = [["", "n", "name"], ["GeCA-S", 12, "a"], ["x", 3, ""]]
    assert aligned(rows).splitlines() == ["         n  name", "GeCA-S  12     a", "x        3"]
    assert aligned(rows, left=0).splitlines()[2] == "     x   3"
    assert aligned(rows, left=3).splitlines()[1] == "GeCA-S  12  a"
    with pytest.raises(ValueError):
        aligned([["a", "b"], ["c"]])
