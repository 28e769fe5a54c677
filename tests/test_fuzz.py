"""Files that are not as they were written: each is read rightly or refused in one line, never read wrongly.

A bit of a file of ours is flipped, the file is cut or loses a sector: `test_damage`. Tables, JSON, checkpoints, arrays
and images are made up, or edited at random: `test_made_up`. A little of it here, much with `./test.sh --long`; what
came of it: docs/ROBUSTNESS.md.
"""

import io
import json
import random
import resource
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import counts, fingerprint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from test_faults import made_world  # noqa: F401 (the fixture `world`)

import fetch_assets
from classification import network as classifiers
from classification import report as classification_report
from core.claims import read_settings
from core.errors import UserError
from core.files import read_array, read_arrays, read_json, read_jsonl, write_json
from core.runs import METRICS
from dataset import latents
from dataset.images import load_image
from dataset.root import read_split
from dataset.samples import about_samples, open_generated, seen_by
from dataset.tables import read_table
from dataset.vae import open_codec
from evaluation import features as feature_spaces
from evaluation import results as evaluation_results
from generation import checkpoint as checkpoints
from generation.trained import open_trained

LONG = pytest.mark.long
MEMORY = 3_000_000  # kB by which the process may grow: an image of the largest size that is opened, and its crops


# ---- damage to each kind of file that we write: file -> a function that reads it


def converted(world):
    """A checkpoint as safetensors."""
    file = world.place / "converted.safetensors"
    checkpoints.save_safetensors(file, checkpoints.weights_alone(checkpoints.load(world.ckpt), "ema"))
    return file


def cached(world):
    """Features that evaluate.py keeps, and what reads them."""
    split, space = read_split(world.data, "val_0"), feature_spaces.open_features(world.vae)
    feature_spaces.extract(space, split.paths, 32, cache=world.place / "cache")
    (file,) = (world.place / "cache").iterdir()
    return file, lambda: feature_spaces.extract(space, split.paths, 32, cache=file.parent)


def training_data(world):
    """What train.py looks at before it trains on a data root and latents."""
    cache, codec = latents.load(world.store, 0), open_codec(world.vae)
    split = read_split(world.data, "train_0")
    latents.check(cache, latents.manifest_of(split, codec, 32), split.labels, codec, 4)
    return cache.mean, cache.std, cache.labels, split.labels, split.filenames, split.label_names


def autoencoder(world):
    """What the samplers look at before they decode with an autoencoder."""
    checkpoint = checkpoints.load(world.ckpt)
    return open_trained(world.ckpt, checkpoint, "ema", "cpu").codec.identity


def assets(world):
    write_json(world.place / "checksums.json", {"net": {"files": {"a": {"sha256": "0" * 64, "bytes": 5}}}})
    return world.place / "checksums.json"


def kinds(world):
    """Name of a kind -> (file, what reads it)."""
    classified, split = world.place / "scores" / "classified", read_split(world.data, "train_0")
    run, best = world.ckpt.parents[1], classified / "fold-0" / "checkpoints" / "best_ckpt.pt"
    generated, safe, (cache, read_cache) = world.samples, converted(world), cached(world)
    shard, = (world.store / "features_0").glob("shard-*")
    image = next((generated / "gen_samples_val").iterdir())

    def samples():
        images, _ = open_generated(generated, 0, split.label_names)
        return images.labels, images.filenames, images.about

    return {
        "checkpoint (.pt)": (world.ckpt, lambda: vars(checkpoints.load(world.ckpt))),
        "checkpoint (.safetensors)": (safe, lambda: vars(checkpoints.load(safe))),
        "classifier (.pt)": (best, lambda: classifiers.read(best)),
        "metrics.jsonl": (run / "metrics.jsonl", lambda: read_jsonl(run / "metrics.jsonl", "remove it", METRICS)),
        "settings.json of a run": (run / "settings.json", lambda: read_settings(run)),
        "latents (.safetensors)": (shard, lambda: training_data(world)),
        "manifest.json": (shard.parent / "manifest.json", lambda: training_data(world)),
        "table of a data root (.csv)": (split.csv, lambda: training_data(world)),
        "image of a data root (.png)": (split.paths[0], lambda: training_data(world)),
        "sample (.png)": (image, lambda: load_image(image)),
        "table of samples (.csv)": (generated / "val_syn_0.csv", samples),
        "labels of samples (.npy)": (generated / "val_syn_0.npy", samples),
        "settings.json of samples": (generated / "settings.json", samples),
        "seen.txt": (generated / "seen.txt", lambda: seen_by(generated)),
        "results.json": (classified / "results.json", lambda: evaluation_results.read([classified])),
        "result.json of a fold": (classified / "fold-0" / "result.json",
                                  lambda: classification_report.finished(classified)),
        "predictions (.npz)": (classified / "predictions_0.npz",
                               lambda: classification_report.load_predictions(classified, 0)),
        "features (.safetensors)": (cache, read_cache),
        "checksums.json": (assets(world), lambda: fetch_assets.read_checksums(world.place)),
        "autoencoder (.safetensors)": (*in_folder(world, "diffusion_pytorch_model.safetensors"),),
        "autoencoder (config.json)": (*in_folder(world, "config.json"),),
        "feature_scale.safetensors": (*in_folder(world, feature_spaces.SCALE_FILE,
                                                 lambda: feature_spaces.open_features(world.vae).identity),),
    }


def in_folder(world, name, read=None):
    return Path(world.vae) / name, read or (lambda: autoencoder(world))


def damaged(raw, draw):
    """A file with one bit flipped, cut, or with a sector of zeros; half of all places are near its ends."""
    place = draw.randrange(len(raw))
    if draw.random() < 0.5:
        place = draw.choice((place % min(4096, len(raw)), len(raw) - 1 - place % min(4096, len(raw))))
    kind = draw.choice(("bit", "bit", "cut", "sector"))
    if kind == "cut":
        return raw[:place]
    if kind == "sector":
        return raw[:place] + bytes(min(512, len(raw) - place)) + raw[place + 512:]
    return raw[:place] + bytes([raw[place] ^ 1 << draw.randrange(8)]) + raw[place + 1:]


@pytest.mark.parametrize("times", [3, pytest.param(80, marks=LONG)])
def test_damage(times, world):
    for name, (file, read) in kinds(world).items():
        raw, right, draw = file.read_bytes(), fingerprint(read()), random.Random(name)
        for _ in range(times):
            now = damaged(raw, draw)
            file.unlink()  # what is mapped into memory stays what it is
            file.write_bytes(now)
            try:
                found = fingerprint(read())
            except UserError as error:
                assert "\n" not in str(error)
                outcome = "one line"
            else:
                if name == "metrics.jsonl":  # a log that is cut is a shorter log
                    assert found == right[:len(found)], now
                else:
                    assert found == right, f"{name}: read wrongly, and nobody says so"
                outcome = "read rightly"
            finally:
                file.unlink()
                file.write_bytes(raw)
            counts.add("A flipped bit, a cut or a lost sector in a file", name, outcome)
        assert fingerprint(read()) == right


# ---- made up


def png(mode="RGB", size=(5, 4), **how):
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(file, **how)
    return file.getvalue()


IMAGES = [png(format="PNG"), png("L", format="PNG"), png("P", format="PNG"), png("RGBA", format="PNG"),
          png(format="JPEG"), png("CMYK", format="JPEG"), png(format="TIFF"), png("L", format="TIFF"),
          png(format="TIFF", compression="tiff_lzw"), png(format="BMP"), png(format="WEBP"),
          png(format="WEBP", lossless=True), png("P", format="GIF"), png(format="PPM"), b"%!PS-Adobe-3.0 EPSF-3.0\n",
          b"P6 60000 1 255\n", b"P5 99999 99999 255\n"]
TABLES = [b",filename,A,B,patient_name\n0,a.png,1,0,p1\n1,b.png,0,1,p2\n", b'filename,"A ""x""",B\r\na.png,0,1\r\n',
          b"\xef\xbb\xbffilename;A\na.png;1\n", b"filename\tA\nb.png\t0\n", b"filename,A,eye\na.png,1.0,L\n"]
PARTS = [b",", b"\n", b'"', b"\r", b";", b"\0", b"\xff", b"filename", b"..", b"/", b"1", b"'", b"=", b"\xe2\x80\xa8",
         b"eye", b"[", b"{", b"}", b":", b"null", b"1e999", b"-1", b"\\ud800", b"NaN", b'"crc32"', b"\x00\x00\x00\xff",
         b"\xff\xff\xff\xff", b"9" * 30]


def edited(seeds):
    """Bytes of one of these files after some random edits, or bytes of nothing at all."""
    edit = st.tuples(st.integers(0, 1 << 16), st.integers(0, 40), st.one_of(st.sampled_from(PARTS),
                                                                           st.binary(max_size=8)))

    def edits(arguments):
        raw, changes = arguments
        for place, length, new in changes:
            place %= len(raw) + 1
            raw = raw[:place] + new + raw[place + (length if length < 10 else len(new)):]
        return raw

    return st.one_of(st.tuples(st.sampled_from(seeds), st.lists(edit, max_size=5)).map(edits), st.binary(max_size=200))


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(
        ["GeCA-XS", "DiT-S", 32, 3, 64, "retina", "ema", 1, 0])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8)


def objects(*names):
    """Objects in which these names may occur, with whatever value."""
    return st.dictionaries(st.one_of(st.sampled_from(names), st.text(max_size=5)), PLAIN, max_size=6)


JSON = st.one_of(
    objects("vae", "filenames", "label_names", "format", "image_size", "csv", "states", "contents", "about", "weights",
            "kind", "format_version", "rows", "folds", "spaces", "step", "crc32").map(lambda v: json.dumps(v).encode()),
    edited([b'{"vae": "x:1", "filenames": ["a"], "states": [[1, 2]]}', b'{"about": {"model": "GeCA-XS", "seed": 1}}',
            b'{"kind": "generation", "format_version": 1, "rows": [], "crc32": "00000000"}',
            b'{"step": 1, "loss": 0.5}', b"[" * 60 + b"]" * 60]))
TENSORS = st.sampled_from([torch.zeros(2), torch.ones(3, 4), torch.tensor(5), torch.tensor(float("nan")),
                           torch.zeros(0), torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.bool)])
STATE = st.dictionaries(st.one_of(st.sampled_from(["alpha", "module.final_layer.linear.weight", "pos_embed",
                                                   "cell_to_embedding.weight", "x_embedder.proj.weight",
                                                   "y_embedder.embedding_table.weight", "unet.conv_in.weight"]),
                                  st.integers(0, 3)), TENSORS, max_size=4)


def as_torch(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


CHECKPOINTS = st.one_of(
    st.builds(lambda said, weights: as_torch({**said, **weights}),
              objects("model", "ema", "args", "model_args", "label_names", "step", "best_kid", "format_version", "seen",
                      "averages", "opt", "kind", "backbone", "image_size", "training", "codec"),
              st.dictionaries(st.sampled_from(["model", "ema", "averages", "validated"]),
                              st.one_of(STATE, TENSORS, PLAIN), max_size=3)),
    STATE.map(as_torch), edited([as_torch({"ema": {"a": torch.ones(2)}, "args": {}}), as_torch([1]),
                                 as_torch({"kind": "classifier", "format_version": 1, "model": {}})]))
SAFETENSORS = edited([save({"a": torch.ones(2)}, {"checkpoint": '{"kind": "ema", "step": 1}'}), save({}),
                      save({"first": torch.tensor(0), "labels": torch.ones(1, 2)})])


def as_npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def as_npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


ARRAYS = edited([as_npy(np.zeros((2, 3))), as_npy(np.array(["a"])), as_npy(np.array([1], dtype=np.int8)),
                 as_npz(a=np.zeros(3), b=np.array(["x"])), as_npz(b=np.ones((2, 2)))])


def read_images(place, raw):
    (place / "a").write_bytes(raw)
    image = load_image(place / "a", 8)
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8


def read_tables(place, raw):
    (place / "test.csv").write_bytes(raw)
    for name in ("a.png", "b.png"):
        (place / name).touch()
    try:
        split = read_split(place, "test")
    except UserError:
        read_table(place / "test.csv")
    else:
        assert len(split.paths) == len(split.labels) and set(split.labels.flat) <= {0, 1}


def read_objects(place, raw):
    (place / "settings.json").write_bytes(raw)
    for read in (lambda: read_settings(place), lambda: read_json(place / "settings.json", "advice", latents.MANIFEST),
                 lambda: read_jsonl(place / "settings.json", "advice", METRICS), lambda: about_samples(place)):
        either(read)
    evaluation_results.read([place / "settings.json"])


def read_checkpoints(place, raw):
    (place / "a.pt").write_bytes(raw)
    either(lambda: classifiers.read(place / "a.pt"))
    checkpoints.load(place / "a.pt")


def read_safetensors(place, raw):
    (place / "features_0").mkdir(exist_ok=True)
    (place / "features_0" / "manifest.json").write_text('{"vae": "x:1", "filenames": ["a"]}')
    for name in ("a.safetensors", "features_0/shard-00000.safetensors"):
        (place / name).unlink(missing_ok=True)
        (place / name).write_bytes(raw)
    either(lambda: latents.load(place, 0))
    checkpoints.load(place / "a.safetensors")


def read_any_array(place, raw):
    (place / "a").write_bytes(raw)
    either(lambda: read_array(place / "a", "advice", (1, 2)))
    read_arrays(place / "a", "advice", {"a": (1, "f"), "b": (1, "UT")})


def either(read):
    """Read, or be refused."""
    try:
        read()
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name, share, files, read", [
    ("images", 0.25, edited(IMAGES), read_images), ("tables", 0.25, edited(TABLES), read_tables),
    ("JSON", 0.2, JSON, read_objects), ("checkpoints", 0.15, CHECKPOINTS, read_checkpoints),
    ("safetensors", 0.1, SAFETENSORS, read_safetensors), ("arrays", 0.05, ARRAYS, read_any_array)],
    ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("times", [400, pytest.param(60_000, marks=LONG)])
def test_made_up(name, share, files, read, times, tmp_path):
    """No error but a line, no file that takes seconds, and no more memory than the largest image does."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=int(share * times), derandomize=True, database=None, deadline=timedelta(seconds=20),
              suppress_health_check=list(HealthCheck))
    @given(files)
    def read_or_refuse(raw):
        try:
            read(tmp_path, raw)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            counts.note("Files made up at random", name, "one line")
        else:
            counts.note("Files made up at random", name, "read")

    read_or_refuse()
    counts.write()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY
