"""Image files: read, checked, and cropped to squares.

Every file becomes 8 bits per channel in RGB: grey and palette images by value, CMYK by Pillow's conversion, 16 bits
scaled from 0…65535 to 0…255 whatever range they use, transparent places over black, turned as their EXIF tag says;
of several pages the first. Floating point and 32-bit integers have no known range and are refused. So are, before they
are decoded, pictures that would take gigabytes: of more than PIXELS pixels, or longer than ASPECT times their width.
"""

import hashlib
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from core.errors import UserError, first_line

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM")  # no other: Pillow's reader of EPS starts Ghostscript
PIXELS = 80_000_000  # 240 MB decoded
ASPECT = 32  # the crop resizes all of a picture: of 1 × 60,000 pixels it would make 256 × 15,360,000


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
        with Image.open(path, formats=FORMATS) as image:
            _check_size(image.size)
            if image.format == "PNG":  # Pillow decodes without a look at the checksums
                with Image.open(path, formats=FORMATS) as other:
                    other.verify()
            image = _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's readers raise a dozen kinds for what is damaged
        raise UserError(f"{path}: cannot be read as an image ({_reason(error)}); replace or remove it") from None
    return np.asarray(image if size is None else center_crop(image, size))


def _check_size(size):
    if size[0] * size[1] > PIXELS:
        raise ValueError(f"{size[0]} × {size[1]} pixels, expected at most {PIXELS:,}")
    if max(size) > ASPECT * min(size):
        raise ValueError(f"{size[0]} × {size[1]} pixels, expected one side at most {ASPECT} times the other")


def _reason(error):
    if isinstance(error, UnidentifiedImageError):  # its own message repeats the path
        return f"expected {', '.join(FORMATS)}"
    return first_line(error)


def _rgb(image):
    """A PIL image of any mode -> RGB. Raises ValueError for pixels without a known range."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values {values.min()} to {values.max()}, expected 8 or 16 bits per channel: convert it")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating point, expected 8 or 16 bits per channel: convert it")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    return image.convert("RGB")


def pixel_hash(pixels):
    """SHA-256 of size and values of a uint8 image (H, W, 3): the same for one picture in two formats."""
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


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


warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # at a size that `load_image` refuses in a line
ImageFile.LOAD_TRUNCATED_IMAGES = False  # half an image is an error, whatever another library has set
