"""Files of tensors (safetensors) that tell when they are damaged, and what identifies tensors."""

import hashlib
import zlib

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from core.files import refused, write_atomically

CHECKSUM, ABOUT = "sha256", "crc32"  # names in the header of the checksums of tensors and of what is said of them


def tensors_hash(tensors):
    """SHA-256 that changes whenever a value of a dict of tensors, or its name, does."""
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def all_finite(tensors):
    """Whether no value of these tensors is infinite or not a number."""
    checks = [value.isfinite().all() for value in tensors if value.is_floating_point()]
    return not checks or bool(torch.stack(checks).all())


def weights_hash(module):
    """16 hex digits that change whenever a weight of a network, or its name, does."""
    return tensors_hash(module.state_dict())[:16]


def write_tensors(path, tensors, about=None):
    """Write a dict of tensors and, in the header, `about` (texts) and a checksum; atomically."""
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    about = {**(about or {}), CHECKSUM: tensors_hash(tensors), ABOUT: _checksum(about or {})}
    # Not by save_file: it writes to a file of another name first, which a killed process would leave behind for ever.
    write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors, about)))


def read_tensors(path, advice, sealed=False):
    """A file of tensors -> (dict of tensors, mapped into memory; what `about` said).

    Raises UserError for a file that cannot be read or does not have its checksum; one of other origin need not say any,
    unless `sealed`. `advice` ends the message.
    """
    with refused(path, advice):
        with safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
        tensors = load_file(path)
        if (CHECKSUM in about or sealed) and about.pop(CHECKSUM, None) != tensors_hash(tensors):
            raise ValueError("it does not have its checksum")
        if ABOUT in about and about.pop(ABOUT) != _checksum(about):
            raise ValueError("its header does not have its checksum")
    return tensors, about


def _checksum(about):
    return f"{zlib.crc32(repr(sorted(about.items())).encode()):08x}"
