"""RetinaMNIST and OCTMNIST (MedMNIST v2; Yang et al., Scientific Data 2023; CC BY 4.0): one .npz per data set and size.

Download: https://zenodo.org/records/10519652, `retinamnist.npz`, `retinamnist_64.npz`, `_128`, `_224`, octmnist alike.
Arrays `{train,val,test}_images`, uint8 (N, H, W, 3), (N, H, W) or (N, H, W, 1), and `{train,val,test}_labels` (N, 1).
RetinaMNIST has grades 0 to 4 of diabetic retinopathy and comes from DeepDRiD, OCTMNIST four classes and comes from
Kermany's OCT2017. No file says which patient an image shows.
"""

from functools import partial

import numpy as np
from PIL import Image

from core.errors import UserError
from core.files import NUMBERS, file_hash, read_arrays
from dataset.collection import SPLITS, Collection, Record
from dataset.tables import GRADES

OCT_LABELS = ("CNV", "DME", "DRUSEN", "NORMAL")
MD5 = {"retinamnist.npz": "bd4c0672f1bba3e3a89f0e4e876791e4", "retinamnist_64.npz": "afda852cc34dcda56f86ad2b2457dbcc",
       "retinamnist_128.npz": "e48e916a24454daf90583d4e6efb1a18",
       "retinamnist_224.npz": "eae7e3b6f3fcbda4ae613ebdcbe35348",
       "octmnist_224.npz": "abc493b6d529d5de7569faaef2773ba3"}
STATED = {"retina": {"images": 1600, **dict(zip(GRADES, (714, 194, 346, 254, 92), strict=True))},
          "oct": {"images": 109309}}
DEEPDRID = ("the patients are unknown; RetinaMNIST comes from DeepDRiD, four images of each patient: its training, "
            "validation and test images may share patients")
OCT2017 = ("the patients are unknown; OCTMNIST comes from OCT2017, several images of each patient: its training, "
           "validation and test images may share patients")


def read_retinamnist(path):
    """retinamnist*.npz, or a folder with one -> Collection with five grades."""
    return _read(path, "retinamnist", GRADES, STATED["retina"], (DEEPDRID,))


def read_octmnist(path):
    """octmnist*.npz, or a folder with one -> Collection with four classes."""
    return _read(path, "octmnist", OCT_LABELS, STATED["oct"], (OCT2017,))


def _read(path, name, labels, stated, remarks):
    file = _file(path, name)
    arrays = _arrays(file)
    known = MD5.get(file.name)
    if known and file_hash(file, "md5") != known:
        remarks += (f"{file.name}: its MD5 is not the {known} that MedMNIST states",)
    records = [record for split in SPLITS for record in _records(file, split, arrays, len(labels))]
    return Collection(labels, records, len(records), stated, remarks)


def _file(path, name):
    if path.is_file():
        return path
    found = sorted(path.glob(f"{name}*.npz"))
    if len(found) != 1:
        listed = ", ".join(file.name for file in found) or "none"
        raise UserError(f"--input {path}: found {listed}, expected one {name}*.npz; give the file")
    return found[0]


def _arrays(file):
    """Name -> array. Nothing in the file is executed."""
    wanted = {f"{split}_{kind}": (dimensions, NUMBERS) for split in SPLITS
              for kind, dimensions in (("images", (3, 4)), ("labels", (1, 2)))}
    return read_arrays(file, "download it again", wanted)


def _records(file, split, arrays, classes):
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"].reshape(-1)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise UserError(f"{file}: {split}_images is {images.dtype} {images.shape}, expected uint8 (N, H, W) or "
                        "(N, H, W, 1 or 3); download it again")
    if len(images) != len(labels):
        raise UserError(f"{file}: {len(images)} {split} images and {len(labels)} labels; download it again")
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    for i, label in enumerate(labels.tolist()):
        if label not in range(classes):
            raise UserError(f"{file}: {split}_labels[{i}] is {label}, expected 0 to {classes - 1}; download it "
                            "again")
        yield Record(f"{split}/{i:06d}", tuple(int(k == label) for k in range(classes)),
                     draw=partial(Image.fromarray, images[i]), split=split)
