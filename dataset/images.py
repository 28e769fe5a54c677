"""Image files: read, checked, and cropped to squares."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageFile

from core.errors import UserError


def center_crop(image, size):
    """PIL image -> PIL image (size, size): the ADM recipe, as in the published `center_crop_arr`.

    Halve with a box filter while the short side is at least 2 × size; bicubic until it is `size`; then crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_image(path, size=None):
    """Read one image as uint8 (H, W, 3), cropped to (size, size) if `size` is given. Raises UserError."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # PIL would clip these to 255
                raise ValueError(f"mode {image.mode}, expected 8 bits per channel: convert it")
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL raises them all
        raise UserError(f"{path}: cannot be read as an image ({error}); replace or remove it") from None
    return np.asarray(image if size is None else center_crop(image, size))


def load_images(paths, size, workers=4):
    """Read and crop images in parallel threads: uint8 (n, size, size, 3), in the order of `paths`."""
    with ThreadPoolExecutor(workers) as pool:
        return np.stack(list(pool.map(lambda p: load_image(p, size), paths)))


def check_images(paths, workers=4):
    """Decode every image once, so that a damaged file is reported before any slow work. Raises UserError."""
    def check(path):
        load_image(path)  # and let go of it: the pool keeps what has no taker yet

    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(check, paths):
            pass


ImageFile.LOAD_TRUNCATED_IMAGES = False  # half an image is an error, whatever another library has set
