"""Damaged and hostile small files: each is refused in one line that says what was found; nothing in it is executed."""

import ast
import csv
import io
import json
import os
import re
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, call_script
from helpers import message_of, save_tiny_vae
from PIL import Image
from safetensors.torch import load_file, save_file
from test_make_tables import classified, generated

import fetch_assets
from classification import report as classification_report
from core import cli, runs
from core.errors import UserError
from core.files import first_outside, read_array, read_json, read_jsonl, write_json
from core.schema import DEPTH, Number, check, parse
from core.tensors import write_tensors
from core.text import aligned, csv_text, latex, markdown, uncelled
from dataset import images, latents, outside
from dataset.images import center_crop, load_image
from dataset.root import read_split, write_split
from dataset.samples import about_samples, open_generated, seen_by
from dataset.tables import read_table
from dataset.vae import open_codec
from evaluation import curves
from evaluation import page as evaluation_page
from evaluation.page import Figures
from evaluation.pictures import Gallery
from evaluation.results import read as read_results
from evaluation.tables import Cell, Table
from generation import checkpoint as checkpoints
from generation import output
from scripts import throughput
from scripts.study_learning import read_rows

# ---- JSON: what every reader of ours refuses

SCHEMA = {"name": str, "size": Number(1, 2048), "rate?": float, "kind?": ("a", None), "rows?": [{"x": int}], str: bool}


@pytest.mark.parametrize("text, message", [
    ("", "Expecting value: line 1 column 1"), ("[]", "found [], expected an object"),
    ("null", "found null, expected an object"), ('"text"', 'found "text", expected an object'),
    ("7", "found 7, expected an object"),
    ("{}{}", "Extra data"), ("{'name': 1}", "Expecting property name"),
    ("[" * 5_000_000 + "]" * 5_000_000, f"more than {DEPTH} levels"),
    ('{"a":' * 200_000, f"more than {DEPTH} levels"),
    ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), f"more than {DEPTH} levels"),
    ('{"name": "x"}', "has no `size`"), ('{"name": "x", "name": "y", "size": 1}', 'has "name" twice'),
    ('{"name": null, "size": 1}', "`name` is null, expected text"),
    ('{"name": "x", "size": "1"}', '`size` is "1", expected a whole number from 1 to 2048'),
    ('{"name": "x", "size": -1}', "`size` is -1, expected a whole number from 1 to 2048"),
    ('{"name": "x", "size": 0}', "`size` is 0"), ('{"name": "x", "size": 2049}', "`size` is 2049"),
    ('{"name": "x", "size": true}', "`size` is true"), ('{"name": "x", "size": 1.5}', "`size` is 1.5"),
    ('{"name": "x", "size": NaN}', "found NaN, expected finite numbers"),
    ('{"name": "x", "size": 1, "rate": -Infinity}', "found -Infinity, expected finite numbers"),
    ('{"name": "x", "size": 1, "rate": 1e999}', "found 1e999, expected finite numbers"),
    ('{"name": "x", "size": 1' + "0" * 400 + "}", "expected whole numbers of at most 64 bit"),
    ('{"name": "x", "size": 1' + "0" * 9999 + "}", "expected whole numbers of at most 64 bit"),
    ('{"name": "x", "size": 1, "rate": "fast"}', '`rate` is "fast", expected a number'),
    ('{"name": "x", "size": 1, "kind": "b"}', '`kind` is "b", expected "a" or null'),
    ('{"name": "x", "size": 1, "rows": {}}', "`rows` is {}, expected a list"),
    ('{"name": "x", "size": 1, "rows": [{"x": 1}, {"x": []}]}', "`rows.1.x` is [], expected a whole number"),
    ('{"name": "x", "size": 1, "rows": [{}]}', "`rows.0` has no `x`"),
    ('{"name": "x", "size": 1, "rows": [null]}', "`rows.0` is null, expected an object"),
    ('{"name": "x", "size": 1, "other": 0}', "`other` is 0, expected true or false"),
    ('{"name": "\\ud800", "size": 1}', "can't encode character"),
    ('{"name": "x\ny", "size": 1}', "Invalid control character"),
    (b'{"name": "\xff", "size": 1}', "can't decode byte 0xff"),
    (b"\xff\xfe{\0}\0", "can't decode byte 0xff"),
])
def test_bad_json(tmp_path, text, message):
    file = tmp_path / "a.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = message_of(lambda: read_json(file, "remove it", SCHEMA))
    assert said.startswith(f"{file}: damaged (") and message in said and said.endswith("; remove it")
    assert len(said) < 350


def test_good_json():
    content = {"name": "x", "size": 2048, "rate": 1, "kind": None, "rows": [{"x": 2**63, "y": "more"}], "other": True}
    assert parse(json.dumps(content), SCHEMA) == content
    check([1, 2.5], [float])
    assert parse('{"a":' * DEPTH + "1" + "}" * DEPTH, {}).keys() == {"a"}


def test_a_digit_that_became_another_is_noticed(tmp_path):
    """Every flip of one bit in a file of ours: what is read is what was written, or an error."""
    content = {"kid": 0.0123, "names": ["ä", None], "folds": {"0": [1, -2.5e-7]}}
    write_json(tmp_path / "a.json", content)
    raw, refused = (tmp_path / "a.json").read_bytes(), 0
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = parse(flipped.decode(), {})
        except ValueError:
            refused += 1
        else:
            found = {name: value for name, value in found.items() if name in content}  # another name for the checksum
            assert found == content, flipped
    assert refused > 6 * len(raw)
    assert read_json(tmp_path / "a.json", "advice") == content


def test_a_line_with_a_digit_that_became_another_is_noticed(tmp_path):
    log = runs.RunLog(tmp_path, active=True)
    for step in (1, 2):
        log.metrics(step, loss=0.5)
    log.close()
    file = tmp_path / "metrics.jsonl"
    assert [row["loss"] for row in read_jsonl(file, "advice", runs.METRICS)] == [0.5, 0.5]
    file.write_text(file.read_text().replace("0.5", "0.7", 1))
    assert "line 1: it does not have its checksum" in message_of(lambda: read_jsonl(file, "advice", runs.METRICS))


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, found in (("pipe", "it is no file"), (".", "it is no file"), ("nowhere", "No such file")):
        assert f"cannot be read ({'' if found[0] == 'i' else '[Errno 2] '}{found}" in message_of(
            lambda name=name: read_json(tmp_path / name, "advice"))


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(1 << 33)  # takes no room
    assert "has 8,589,934,592 bytes, expected at most" in message_of(lambda: read_json(tmp_path / "a.json", "advice"))


def test_a_bad_line_of_many_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n{"step": "2"}\n{"step": 3}\n')
    said = message_of(lambda: read_jsonl(tmp_path / "a.jsonl", "remove it", runs.METRICS))
    assert said == (f'{tmp_path / "a.jsonl"}: damaged (line 2: `step` is "2", expected a whole number of at least 0); '
                    "remove it")


# ---- JSON: the files themselves

def changed(content, *path, to):
    """A copy of a JSON value in which what lies at `path` is something else, or lacks where that is `del`."""
    content = json.loads(json.dumps(content))
    place = content
    for key in path[:-1]:
        place = place[key]
    if to == "del":
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return content


CLASSIFIED, GENERATED = classified("GeCA-S", (0.6, 0.7), p=0.01), generated("GeCA-S")


@pytest.mark.parametrize("content, message", [
    (changed(CLASSIFIED, "folds", to={}), "`folds` is empty"),
    (changed(CLASSIFIED, "folds", to=[]), "`folds` is [], expected an object"),
    (changed(CLASSIFIED, "method", to=3), "`method` is 3, expected text"),
    (changed(CLASSIFIED, "data", to=1), "`data` is 1, expected text"),
    (changed(CLASSIFIED, "settings", to=None), "`settings` is null, expected an object"),
    (changed(CLASSIFIED, "settings", "global_seed", to="0"), "`settings.global_seed` is"),
    (changed(CLASSIFIED, "folds", "1", "n_train", to=-60), "`folds.1.n_train` is -60, expected a whole number of at"),
    (changed(CLASSIFIED, "folds", "1", "levels", to="del"), "`folds.1` has no `levels`"),
    (changed(CLASSIFIED, "folds", "1", "levels", "eye", to=None), "`folds.1.levels.eye` lacks scores that"),
    (changed(CLASSIFIED, "folds", "0", "levels", "image", "0.5", "macro", "ap", to="0.5"),
     "`folds.0.levels.image.0.5.macro.ap` is"),
    (changed(CLASSIFIED, "folds", "0", "remarks", to=[["x"]]), '`folds.0.remarks.0` is ["x"], expected text'),
    (changed(CLASSIFIED, "significance", "levels", "image", "permutation", "ap", "p", to=7), "ap.p` is 7, expected a"),
    (changed(CLASSIFIED, "significance", to=[]), "`significance` is [], expected an object or null"),
    (changed(CLASSIFIED, "summary", to=None), "`summary` is null"),
    (changed(CLASSIFIED, "label_names", to="AMD"), '`label_names` is "AMD", expected a list'),
    (changed(GENERATED, "rows", to={}), "`rows` is {}, expected a list"),
    (changed(GENERATED, "rows", 1, "kid", to={}), "a row has no `kid` in inception"),
    (changed(GENERATED, "rows", 1, "kid", "inception", "mean", to=None), "`rows.1.kid.inception.mean` is null"),
    (changed(GENERATED, "rows", 1, "about", "model", to=[]), "`rows.1.about.model` is [], expected text"),
    (changed(GENERATED, "spaces", to=[]), "`networks` does not have all of `spaces`"),
    (changed(GENERATED, "gg_space", to="clip"), "`networks` does not have all of `spaces` and `gg_space`"),
    (changed(GENERATED, "data", to="oct"), '`data` is "oct", expected an object'),
    (changed(GENERATED, "kind", to=["generation"]), '`kind` is ["generation"], expected text'),
    (changed(GENERATED, "format_version", to="1"), '`format_version` is "1", expected a whole number'),
])
def test_bad_results(tmp_path, content, message):
    (tmp_path / "results.json").write_text(json.dumps(content))
    said = message_of(lambda: read_results([tmp_path]))
    assert message in said and said.endswith("score again")
    if content["kind"] == "classification":
        assert message in message_of(lambda: classification_report.read_results(tmp_path))


FILES = {  # name of a file -> what reads it from a folder
    "settings.json": about_samples,
    "features_0/manifest.json": lambda folder: latents.load(folder, 0),
    "fold-0/result.json": classification_report.finished,
    "checksums.json": fetch_assets.read_checksums,
    "metrics.jsonl": curves.read,
    "points.jsonl": lambda folder: read_rows(folder / "points.jsonl"),
    "bench.json": lambda folder: throughput.read_benchmark(folder / "bench.json"),
    "results.json": lambda folder: read_results([folder]),
}


@pytest.mark.parametrize("name, content, message", [
    ("settings.json", {"about": []}, "`about` is [], expected an object"),
    ("settings.json", {"about": {"seed": "1"}}, '`about.seed` is "1", expected a whole number'),
    ("settings.json", {"about": {"model": {}}}, "`about.model` is {}, expected text"),
    ("features_0/manifest.json", {"vae": "x:1"}, "has no `filenames`"),
    ("features_0/manifest.json", {"vae": 1, "filenames": []}, "`vae` is 1, expected text"),
    ("features_0/manifest.json", {"vae": "x:1", "filenames": [1]}, "`filenames.0` is 1, expected text"),
    ("features_0/manifest.json", {"vae": "x:1", "filenames": ["a"], "label_names": "AB"}, "`label_names` is"),
    ("fold-0/result.json", CLASSIFIED["folds"]["0"] | {"fold": "0"}, '`fold` is "0"'),
    ("fold-0/result.json", {"fold": 0}, "has no `n_train`"),
    ("checksums.json", {"vae-ema": []}, "`vae-ema` is [], expected an object"),
    ("checksums.json", {"vae-ema": {"files": {"a": {"sha256": "", "bytes": -1}}}}, "`vae-ema.files.a.bytes` is -1"),
    ("metrics.jsonl", {"loss": 1.0}, "line 1: has no `step`"),
    ("metrics.jsonl", {"step": 1, "loss": "low"}, '`loss` is "low", expected a number or null'),
    ("points.jsonl", {"model": "GeCA-XS"}, "line 1: has no `steps`"),
    ("bench.json", {"device": "cpu", "results": []}, "`results` is [], expected an object"),
    ("bench.json", {"device": "cpu", "results": {"fp32": {"rows": [{"model": "x", "task": "train", "cells": 8,
                                                                   "variant": "model", "images": 1, "seconds": 0}]}}},
     "`results.fp32.rows.0.seconds` is 0"),
    *((name, value, "expected an object") for name in FILES for value in ([], None, 7)),
])
def test_bad_small_files(tmp_path, name, content, message):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content) + "\n")
    said = message_of(lambda: FILES[name](tmp_path))
    assert said.startswith(f"{file}: damaged (") and message in said


def test_metrics_that_are_not_finite_are_null(tmp_path):
    log = runs.RunLog(tmp_path, active=True)
    log.metrics(1, loss=0.5, gradient_norm=float("inf"), kid=float("nan"))
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert {"step": 1, "loss": 0.5, "gradient_norm": None, "kid": None}.items() <= json.loads(line).items()
    assert {name: curve.tolist() for name, curve in curves.read(tmp_path).items()} == {"loss": [[1], [0.5]]}


# ---- safetensors and autoencoders

@pytest.mark.parametrize("header", [b"[]", b"null", b"[" * 100_000, b'{"x":' * 100_000, b'{"ema.x": 3}', b"{}" * 9,
                                    b'{"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}',
                                    b'{"x":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,4]}}'])
def test_bad_safetensors(tmp_path, header):
    for name in ("a.safetensors", "features_0/shard-00000000.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    (tmp_path / "features_0" / "manifest.json").write_text('{"vae": "x:1", "filenames": ["a"]}')
    assert "a.safetensors: damaged (" in message_of(lambda: checkpoints.load(tmp_path / "a.safetensors"))
    assert "shard-00000000.safetensors: damaged (" in message_of(lambda: latents.load(tmp_path, 0))
    assert latents.finished(tmp_path / "features_0", 3).tolist() == [False] * 3


@pytest.mark.parametrize("said, message", [("[]", "found []"), ("null", "found null"), ("[" * 9999, "levels"),
                                           ('{"kind": []}', "`kind` is []"), ('{"step": NaN}', "found NaN"),
                                           ('{"ema": {}}', "its header holds weights"), ("{", "Expecting")])
def test_bad_values_in_the_header_of_safetensors(tmp_path, said, message):
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", {checkpoints.METADATA: said})
    found = message_of(lambda: checkpoints.load(tmp_path / "a.safetensors"))
    assert "a.safetensors: damaged (" in found and message in found


@pytest.mark.parametrize("tensors, message", [
    ({"first": torch.zeros(2), "mean": torch.zeros(1, 2, 4, 3, 3), "labels": torch.zeros(1, 2)}, "'first': 1"),
    ({"first": torch.tensor(0), "mean": torch.tensor(0.0), "labels": torch.zeros(1, 2)}, "'mean': 0"),
    ({"first": torch.tensor(0), "mean": torch.zeros(1, 2, 4, 3, 3), "labels": torch.tensor(1)}, "'labels': 0"),
])
def test_shards_of_other_shapes(tmp_path, tensors, message):
    (tmp_path / "features_0").mkdir()
    write_tensors(tmp_path / "features_0" / "shard-00000000.safetensors", tensors)
    (tmp_path / "features_0" / "manifest.json").write_text('{"vae": "x:1", "filenames": ["a"]}')
    assert message in message_of(lambda: latents.load(tmp_path, 0))


CONFIG = json.loads((ROOT / "assets" / "vae-retina" / "config.json").read_text())


@pytest.mark.parametrize("config, message", [
    ([], "found [], expected an object"), ({}, "has no `_class_name`"),
    (changed(CONFIG, "_class_name", to="UNet2DModel"), '`_class_name` is "UNet2DModel", expected "AutoencoderKL"'),
    (changed(CONFIG, "scaling_factor", to="0.18"), '`scaling_factor` is "0.18", expected a number from'),
    (changed(CONFIG, "scaling_factor", to=0), "`scaling_factor` is 0"),
    (changed(CONFIG, "block_out_channels", to=[10**9]), "`block_out_channels.0` is 1000000000"),
    (changed(CONFIG, "block_out_channels", to=8), "`block_out_channels` is 8, expected a list"),
    (changed(CONFIG, "in_channels", to=1), "`in_channels` is 1, expected 3"),
    (changed(CONFIG, "auto_map", to={"AutoModel": "evil.py"}), "`auto_map` is"),
    (changed(CONFIG, "quantization_config", to={"quant_method": "x"}), "`quantization_config` is"),
    (changed(CONFIG, "act_fn", to=[]), "not a diffusers AutoencoderKL folder"),
    (changed(CONFIG, "down_block_types", to=["Evil"] * 4), "not a diffusers AutoencoderKL folder"),
    (changed(CONFIG, "latent_channels", to=5), "not a diffusers AutoencoderKL folder"),
])
def test_bad_autoencoders(tmp_path, config, message):
    save_tiny_vae(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert message in message_of(lambda: open_codec(str(tmp_path)))


def test_an_autoencoder_without_one_of_its_weights_is_refused(tmp_path):
    save_tiny_vae(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["decoder.conv_in.bias"]
    save_file(weights, file)
    assert "has no decoder.conv_in.bias" in message_of(lambda: open_codec(str(tmp_path)))


def test_autoencoders_in_other_formats_are_not_opened(tmp_path):
    """A pickle would be executed; whoever calls this one makes the file `executed`."""
    save_tiny_vae(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")  # weights of any file, anywhere
    assert "with all weights (no other format is read" in message_of(lambda: open_codec(str(tmp_path)))
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch " + str(tmp_path / "executed").encode() + b"'\ntR.")
    assert "expected the diffusers files config.json and diffusion_pytorch_model.safetensors" in message_of(
        lambda: open_codec(str(tmp_path)))
    assert not (tmp_path / "executed").exists()


# ---- arrays

@pytest.mark.parametrize("shape, message", [
    ("(1000000000000,)", "larger|greater"), ("(-1,)", "negative dimensions"), ("'x'", "shape is not valid"),
    ("(2, 1)", "found float64 (2, 1), expected 1 dimension"), ("()", "expected 1 dimension"), ("(9**99,)", "malformed"),
])
def test_bad_arrays(tmp_path, shape, message):
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", 118) + header + b"\0" * 16)
    said = message_of(lambda: read_array(tmp_path / "a.npy", "advice", 1))
    assert "a.npy: damaged (" in said and any(part in said for part in message.split("|"))


def test_arrays_of_objects_and_other_files_are_not_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    assert "a.npy: damaged (Array can't be memory-mapped: Python objects" in message_of(
        lambda: read_array(tmp_path / "a.npy", "advice", 1))
    for content in (b"", b"[]", b"\x80\x04N.", b"PK\3\4", b"\x93NUMPY"):
        (tmp_path / "a.npy").write_bytes(content)
        assert "a.npy: damaged (" in message_of(lambda: read_array(tmp_path / "a.npy", "advice", 1))


def predictions(**arrays):
    return {"filenames": ["a", "b"], "patients": ["p", "q"], "eyes": [], "label_names": ["A"], "labels": [[1], [0]],
            "scores": [[0.5], [0.25]], "image_thresholds": [0.5], "eye_thresholds": [np.nan], **arrays}


@pytest.mark.parametrize("content, message", [
    (predictions(scores=[[0.5]]), "`scores` is not of 2 images and 1 labels"),
    (predictions(scores=[["0.5"], ["0.25"]]), "scores: found <U4 (2, 1), expected 2 dimension(s) of numbers"),
    (predictions(scores=[[np.nan], [0.25]]), "`eyes or scores` is not"),
    (predictions(eyes=["x"]), "`eyes or scores` is not"),
    (predictions(patients=[1, 2]), "patients: found int64 (2,), expected 1 dimension(s) of text"),
    (predictions(image_thresholds=[]), "`image_thresholds` is not"), ({"scores": [1.0]}, "has no `filenames`"),
    (b"PK\3\4", "File is not a zip file"), (b"", "File is not a zip file"),
])
def test_bad_predictions(tmp_path, content, message):
    file = tmp_path / "predictions_0.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.savez(file, **content)
    said = message_of(lambda: classification_report.load_predictions(tmp_path, 0))
    assert said.startswith(f"{file}: damaged (") and message in said


# ---- tables

def data_root(folder, rows, encoding="utf-8"):
    (folder / "images").mkdir(exist_ok=True)
    for i in range(3):
        Image.new("RGB", (8, 8)).save(folder / "images" / f"{i}.png")
    (folder / "test.csv").write_bytes(rows if isinstance(rows, bytes) else rows.encode(encoding))
    return folder


HEAD = ",filename,A,B,patient_name\n"
GOOD = "0,images/0.png,1,0,p\n"


@pytest.mark.parametrize("text, message", [
    (",filename,A,B,A\n0,images/0.png,1,0,0\n", ": has two columns 'A'; rename or remove one"),
    (",filename,A,eye,eye\n0,images/0.png,1,L,R\n", ": has two columns 'eye'"),
    (HEAD + GOOD + "1,images/1.png,1,0\n", ", line 3: 4 cells, expected 5 as in the header"),
    (HEAD + GOOD + "1,images/1.png,1,0,p,q\n", ", line 3: 6 cells, expected 5 as in the header"),
    (HEAD + GOOD + '1,"images/1.png,1,0,p\n2,images/2.png,1,0,p\n', ", line 3: is no table (unexpected end of data)"),
    (HEAD + GOOD + '1,"images/1.png"x,1,0,p\n', ", line 3: is no table (',' expected after '\"')"),
    (HEAD + GOOD + f"1,images/1.png,1,0,{'p' * 200_000}\n", ", line 3: is no table (field larger than field limit"),
    (HEAD + f'0,images/0.png,1,0,"{"p,q" * 70_000}\n', ", line 2: is no table (field larger than field limit"),
    ((HEAD + GOOD).encode() + b"1,images/1\0.png,1,0,p\n", ", line 3: is no text (holds a NUL byte)"),
    ((HEAD + GOOD).encode("utf-16"), ", line 1: is no text (holds a NUL byte)"),
    (",filename,Ä,Ö\n0,images/0.png,1,0\n".encode("latin-1"), ", line 1: is not UTF-8 (byte 0xc4)"),
    ((HEAD + GOOD).encode() + b"1,images/1.png,1,0,M\xfcller\n", ", line 3: is not UTF-8 (byte 0xfc)"),
    (HEAD + GOOD + '1,images/1.png,1,0,"p\n# Heading"\n', ", line 4: a cell holds 'p\\n# Heading', expected one line"),
    (HEAD + GOOD + "1,images/1.png,1,0,p\x1b[31m\n", ", line 3: a cell holds 'p\\x1b[31m', expected one line"),
    (HEAD + GOOD + "1,images/1.png,yes,0,p\n", ", line 3: label A is 'yes', expected 0 or 1"),
    (HEAD + GOOD + "1,images/1.png,٣,0,p\n", ", line 3: label A is '٣', expected 0 or 1"),
    ("filename;A\nimages/0.png;1\n", ": no column `filename` (found: 'filename;A'; expected UTF-8, separated by"),
    ("\n\n \n", ": is empty"), (HEAD, ": holds no image"), (HEAD + f"0,{'n' * 5000}.png,1,0,p\n", ": names 1 missing"),
    (HEAD + "0,,1,0,p\n", ": names 1 missing file"),
])
def test_bad_tables(tmp_path, text, message):
    said = message_of(lambda: read_split(data_root(tmp_path, text), "test"))
    assert said.startswith(f"{tmp_path / 'test.csv'}{message}")


def test_empty_cells_at_the_end_and_a_byte_order_mark_are_no_fault(tmp_path):
    text = "\ufeff" + HEAD + GOOD.replace("\n", ",,\r\n") + "\r\n" + '1,"images/1.png",0,1,"q, r"\n'
    assert read_split(data_root(tmp_path, text), "test").patients == ("p", "q, r")


def test_foreign_tables_have_line_breaks_in_cells_but_names_have_none(tmp_path):
    (tmp_path / "t.csv").write_text('name,"note\nof 2020"\na,"x\ny"\n')
    table = read_table(tmp_path / "t.csv")
    assert table.columns == ("name", "note of 2020") and table.rows[0]["note of 2020"] == "x y"
    (tmp_path / "t.csv").write_bytes(b'name,note\na,"x\n')
    assert "t.csv, line 2: is no table (unexpected end of data)" in message_of(lambda: read_table(tmp_path / "t.csv"))


# ---- what leads out of a folder

@pytest.fixture
def rooms(tmp_path, monkeypatch):
    """A data root and, beside it, a picture that no table of it should reach."""
    monkeypatch.setattr(outside, "_allowed", False)
    (tmp_path / "root").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    root = data_root(tmp_path / "root", HEAD + GOOD)
    (root / "link.png").symlink_to("../secret.png")
    (root / "folder").symlink_to("..")
    (root / "inner.png").symlink_to("images/0.png")
    os.link(tmp_path / "secret.png", root / "hard.png")
    return root


@pytest.mark.parametrize("name", ["../secret.png", "images/../../secret.png", "link.png", "folder/secret.png", ""])
def test_no_file_outside_of_a_root_is_followed_unless_allowed(rooms, name):
    name = name or str(rooms.parent / "secret.png")
    write_split(rooms, "test", [name], [[1]], ["A"], ["p"])
    assert message_of(lambda: read_split(rooms, "test")) == (
        f"{rooms / 'test.csv'}: {name} leads out of {rooms}; put the file there, or give --allow-outside if you trust "
        "it")
    parser = cli.Parser("A toy.")
    outside.add_flag(parser)
    assert vars(parser.parse_args(["--allow_outside"])) == {} and outside.flags() == ["--allow-outside"]
    assert read_split(rooms, "test").paths[0].samefile(rooms.parent / "secret.png")


def test_links_that_stay_in_a_root_are_followed(rooms):
    names = ["images/0.png", "inner.png", "hard.png", "images/../images/1.png"]
    write_split(rooms, "test", names, [[1]] * 4, ["A"], names)
    (rooms.parent / "other").symlink_to(rooms)  # the root itself may be a link
    assert len(read_split(rooms, "test")) == 4 == len(read_split(rooms.parent / "other", "test"))
    assert first_outside(rooms, ["nowhere.png", "..hidden", "a/../../root2/x"]) == "a/../../root2/x"


def test_prepare_data_does_not_follow_links_out_of_its_input(rooms):
    columns = ["--csv", rooms / "labels.csv", "--image-column", "image"]
    for source, more in (("csv", columns), ("folder", [])):
        place = rooms / "classes" if source == "folder" else rooms
        (place / "A").mkdir(parents=True, exist_ok=True)
        (place / "A" / "x.png").symlink_to(rooms.parent / "secret.png")
        (rooms / "labels.csv").write_text("image,A\nA/x.png,1\n")
        done = call_script("prepare_data.py", "--source", source, "--input", place, *more, "--output",
                           rooms.parent / "made")
        assert done.returncode == 2 and "leads out of" in done.stderr and len(done.stderr.splitlines()) == 1
        assert not (rooms.parent / "made").exists()


def test_checksums_name_no_file_outside(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "mine").write_text("to be kept")
    (tmp_path / "weights" / "checksums.json").write_text(json.dumps(
        {"alexnet": {"files": {"../mine": {"sha256": "x", "bytes": 1}}}}))
    assert "../mine leads out of" in message_of(lambda: fetch_assets.fetch(tmp_path / "weights", ["alexnet"]))
    assert (tmp_path / "mine").exists()


# ---- images

def test_only_known_formats_are_opened(tmp_path):
    for name, kind in (("a.eps", "EPS"), ("a.png", "EPS"), ("b.png", "ICO"), ("c.png", "PDF")):
        Image.new("RGB", (8, 8)).save(tmp_path / name, kind)
        assert message_of(lambda name=name: load_image(tmp_path / name)) == (
            f"{tmp_path / name}: cannot be read as an image (expected PNG, JPEG, TIFF, BMP, WEBP, GIF, PPM); replace "
            "or remove it")
    for kind in images.FORMATS:
        Image.new("RGB", (8, 8)).save(tmp_path / "d.png", kind)
        assert load_image(tmp_path / "d.png").shape == (8, 8, 3)


def png(width, height):
    """The head of a PNG file of that size: it says so and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
            + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + struct.pack(">I", 0) + b"IEND\xaeB`\x82")


@pytest.mark.parametrize("size, message", [
    ((60_000, 1), "60000 × 1 pixels, expected one side at most 32 times the other"),
    ((1, 33), "1 × 33 pixels, expected one side"),
    ((10_000, 9_000), "10000 × 9000 pixels, expected at most 80,000,000"), ((20_000, 20_000), "exceeds limit"),
    ((2**31 - 1, 2**31 - 1), ""), ((0, 8), ""),
])
def test_pictures_that_would_take_gigabytes_are_not_decoded(tmp_path, size, message):
    (tmp_path / "a.png").write_bytes(png(*size))
    said = message_of(lambda: load_image(tmp_path / "a.png", 256))
    assert "a.png: cannot be read as an image (" in said and message in said


def test_the_longest_picture_is_cropped(tmp_path):
    Image.new("L", (32 * 20, 20)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 64).shape == (64, 64, 3)
    assert center_crop(Image.new("L", (640, 20)), 64).size == (64, 64)


# ---- names in what is written

HOSTILE = "x\n\n# Headline\n![](http://127.0.0.1/pixel)\r<script>|`$1$`"


def test_names_stay_in_their_cell():
    table = Table(HOSTILE, ["Method", HOSTILE], [[HOSTILE, "[1] * \\\\"], ["=1+1", Cell(-1.5)]], [HOSTILE], "tab:x")
    lines = table.markdown().splitlines()
    assert len(lines) == 8 and not [text for text in lines if text.startswith(("#", "!"))]
    assert lines[4].startswith(r"| x \# Headline !\[\](http://127.0.0.1/pixel) \<script\>\|\`\$1\$\` | \[1\] \* \\\\ |")
    source = table.latex()
    assert len(source.splitlines()) == len(Table("", ["", ""], [["", ""]] * 2, [""], "tab:x").latex().splitlines())
    assert r"x \# Headline !{[}{]}(http" in source and r"{[}1{]} {*} \textbackslash{}\textbackslash{} \\" in source


@pytest.mark.parametrize("text", [
    "=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "＝1", "'=1", "''@x", "-", "- a", "+NV", "-inf", "-1_0"])
def test_formulas_are_no_formulas_in_csv_and_come_back(tmp_path, text):
    cell = next(csv.reader(io.StringIO(csv_text([[text, 1]]))))[0]
    assert cell == f"'{text}" and uncelled(cell) == text
    if "\t" not in text:
        root = data_root(tmp_path, "")
        write_split(root, "test", ["images/0.png"], [[1]], [text], [text])
        split = read_split(root, "test")
        assert split.label_names == (text,) and split.patients == (text,)


@pytest.mark.parametrize("value", ["-3.2", "+7", "-1e-3", "007", "'tis", "a=b", "", -3.2, Cell(-1.5, 0.5), None])
def test_numbers_and_words_stay_as_they_are(value):
    cell = next(csv.reader(io.StringIO(csv_text([[value, 1]]))))[0]
    assert cell == ("" if value is None else str(value)) and uncelled(cell) == cell


def test_every_name_in_the_page_is_escaped():
    row = {"name": HOSTILE, "folder": HOSTILE, "about": {"run": HOSTILE, "sampler": HOSTILE, "checkpoint": HOSTILE},
           "images": 4, "kind": "generated", "kid": {}, "fid": {}, "fidelity": {}, "lpips": None, "gg": None,
           "memorisation": None, "conditioning": None, "label_share": {HOSTILE: 0.5}, "kid_of_labels": None}
    pair = {"a": HOSTILE, "b": HOSTILE, "space": HOSTILE, "difference": 1.0, "p": 0.01, "interval": [0.5, 1.5]}
    report = {"rows": [row], "spaces": [], "gg_space": HOSTILE, "image_size": 64, "seed": 0, "subsets": 2,
              "paired": [{**pair, "images": 4}], "remarks": [HOSTILE],
              "over_seeds": [{"name": HOSTILE, "runs": 2, "differ_in": [], "values": {}}], "warnings": [HOSTILE],
              "versions": HOSTILE, "networks": {HOSTILE: {"identity": HOSTILE, "preprocessing": HOSTILE}},
              "data": {"root": HOSTILE, "fold": 0, "validation_images": 4, "labels": [HOSTILE]}}
    tile = np.zeros((1, 1, 3), np.uint8)
    gallery = Gallery([HOSTILE, HOSTILE], [[tile], [tile]], [[HOSTILE], [HOSTILE * 2]])
    figures = Figures(gallery, {HOSTILE: gallery}, {HOSTILE: (HOSTILE, Image.new("RGB", (1, 1)))}, [], [HOSTILE])
    page = evaluation_page.page(report, figures)
    assert "<script" not in page and page.count("&lt;script&gt;") > 25
    assert len(aligned([["a", HOSTILE]]).splitlines()) == 1


def test_escapes_of_single_lines():
    assert markdown("a_b\u2028*c*\x1b[0m") == r"a\_b \*c\* \[0m" and latex("a\r\nb&c") == r"a b\&c"


# ---- what samplers write

def test_a_bit_of_a_png_that_became_another_is_noticed(tmp_path):
    """Pillow decodes pixels without a look at their checksums."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    raw, refused = (tmp_path / "a.png").read_bytes(), 0
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "b.png").write_bytes(flipped)
        try:
            assert np.array_equal(load_image(tmp_path / "b.png"), pixels)
        except UserError:
            refused += 1
    assert refused > 6 * len(raw)


def sampled(folder):
    """A sample folder, as the samplers leave it, of two images."""
    (folder / "gen_samples_val").mkdir(parents=True)
    labels = np.array([[1, 0], [0, 1]])
    output.claim(folder, {"about": {"model": "GeCA-XS"}}, folder / "val_syn_0.npy", labels, ["0123", "4567"])
    for i in range(2):
        output.write_image(folder / "gen_samples_val" / f"{i:06d}.png", np.full((8, 8, 3), 99, np.uint8))
    output.describe(folder, "gen_samples_val", "val_syn_0", labels, ["A", "B"])
    return folder


def test_samples_that_are_not_as_they_were_written_are_refused(tmp_path):
    folder = sampled(tmp_path / "s")
    assert seen_by(folder) == ["0123", "4567"]
    assert open_generated(folder, 0, ("A", "B"))[0].labels.tolist() == [[1, 0], [0, 1]]
    table = (folder / "val_syn_0.csv").read_text()
    (folder / "val_syn_0.csv").write_text(table.replace(",1,0,", ",1,1,"))
    assert "its labels are not those of val_syn_0.npy" in message_of(lambda: open_generated(folder, 0, ("A", "B")))
    (folder / "seen.txt").write_text("0123\n4566\n")
    assert "seen.txt: damaged (it does not have its checksum); sample again" in message_of(lambda: seen_by(folder))
    (folder / "seen.txt").unlink()
    assert "seen.txt: cannot be read" in message_of(lambda: seen_by(folder))


# ---- command lines

SCRIPTS = ("train.py", "extract_features.py", "sample_ddp.py", "sample_ddp_val.py", "classify.py", "evaluate.py",
           "prepare_data.py", "train_vae.py", "scripts/plan.py", "scripts/check_metrics.py",
           "scripts/study_grids.py", "scripts/study_learning.py", "scripts/study_limits.py",
           "scripts/study_memorisation.py", "scripts/study_samplers.py", "scripts/study_weight_tying.py")


@pytest.mark.parametrize("given, message", [
    (str(2**63), "and at most 9223372036854775807 (64 bit)"), ("9" * 400, "(64 bit)"),
    ("9" * 9999, "expected an integer"), ("-1", "found -1, expected an integer of at least 0"),
    ("1.5", "found '1.5', expected an integer"), ("nan", "found 'nan'"), ("1\n2", "found '1\\n2', expected"),
])
@pytest.mark.parametrize("script", SCRIPTS[:8])
def test_seeds_above_64_bit_are_refused_by_the_parser(script, given, message):
    done = call_script(script, "--global-seed", given)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert len(done.stderr) < 300


def test_a_method_is_one_line(tmp_path):
    done = call_script("classify.py", "--data-path", tmp_path, "--method", "x\n# y")
    assert done.returncode == 2 and "--method: found 'x\\n# y', expected one line of text" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_signs_that_an_encoding_lacks_are_written_otherwise(encoding, monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in "12")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    cli.run(lambda: print("KID ↓ 1 ± 2 \udcff", "é", file=out) or print("→", file=err))
    out.flush(), err.flush()
    assert out.buffer.getvalue().startswith(b"KID \\u2193 1 ") and err.buffer.getvalue() == b"\\u2192\n"


# ---- no second reader

def calls(path):
    """Dotted names of what a file calls."""
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)}


def test_each_kind_of_file_has_one_reader():
    """Another json.load would know less of what can be wrong; core/files.py reads back what it is about to write."""
    readers = {"json.load": (), "json.loads": ("core/schema.py", "core/files.py"), "np.load": ("core/files.py",),
               "Image.open": ("dataset/images.py",), "csv.reader": ("dataset/tables.py",), "csv.DictReader": (),
               "csv.writer": ("core/text.py",), "pickle.load": (), "pickle.loads": ()}
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith((".venv", "tests/")):
            assert not [call for call in calls(path) & readers.keys() if name not in readers[call]], name


def test_every_script_that_reads_a_data_root_has_the_flag():
    """Those that call `read_split`, or whose library does, show --allow-outside in their help."""
    for script in SCRIPTS:
        assert "--allow-outside" in call_script(script, "--help").stdout, script
    readers = {path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]
               if re.search(r"\bread_(split|fold)\(|\bopen_sets\(|audit\.audit\(", path.read_text(encoding="utf-8"))}
    assert readers - {"scripts/check_synthetic.py"} <= {*SCRIPTS}  # which makes its own data root
