"""Interpretation of stored images: value range, orientation and background of transparent parts."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor

from fdl.errors import UserError

Range = tuple[float, float]
"""Values of black and of white."""

_DEPTHS = (255, 1023, 4095, 16383, 65535)
"""White of whole numbers of 8, 10, 12, 14 and 16 bits, which cameras and scanners have."""

_DARK = 16
"""Whole numbers that are all below this are no picture of any depth, but labels or something else."""

_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that puts an image upright, by EXIF orientation (CIPA DC-008, tag 0x0112)."""


@dataclass(frozen=True)
class Reading:
    """Settings of the conversion of image files to pixels of 8 bits.

    Attributes:
        background: red, green and blue of what shows through where an image is transparent.
        integers: black and white of greyscale images of whole numbers beyond 8 bits; None: by the file's largest value.
        floats: black and white of greyscale images of floating-point numbers; None: by the file's largest value.
    """

    background: tuple[int, int, int] = (255, 255, 255)
    integers: Range | None = None
    floats: Range | None = None


PLAIN = Reading()
"""White behind what is transparent, and deep greyscale each by its own largest value."""


def colour(name: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour's name in HTML or of ``#rrggbb``.

    Raises:
        UserError: there is no such colour.

    Example:
        >>> colour("white"), colour("#ff8000")
        ((255, 255, 255), (255, 128, 0))
    """
    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError as error:
        raise UserError(f"background must be the name of a colour, or #rrggbb; got {name!r}") from error


def is_deep(image: Image.Image) -> bool:
    """Test that an image is greyscale of more than 8 bits."""
    return image.mode.startswith(("I", "F"))


def is_float(image: Image.Image) -> bool:
    """Test that an image consists of floating-point numbers."""
    return image.mode.startswith("F")


def extremes(image: Image.Image) -> Range:
    """The smallest and the largest value of an image.

    Raises:
        UserError: some value is no finite number.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise UserError("holds values that are no finite numbers")
    return low, high


def white(low: float, high: float, whole: bool) -> float:
    """Infer the value of white from the values of images, black being 0.

    Whole numbers have 8, 10, 12, 14 or 16 bits, whichever is enough for the largest. Floating-point numbers are
    0 … 1 or 0 … 255.

    Args:
        low: the smallest value of all images.
        high: the largest.
        whole: whether the values are whole numbers.

    Raises:
        UserError: nothing of this fits.

    Example:
        >>> white(0, 200, whole=True), white(0, 4000, whole=True), white(0.0, 0.7, whole=False)
        (255, 4095, 1)
    """
    depths = _DEPTHS if whole else (1, 255)
    if high == low == 0 or (not whole and low >= 0 and high <= 1):
        return depths[0]
    if low >= 0 and _DARK <= high <= depths[-1]:
        return next(depth for depth in depths if high <= depth)
    kinds = "8 to 16 bits" if whole else "0 … 1 and 0 … 255"
    raise UserError(
        f"has values from {low:g} to {high:g}, which are not those of an image ({kinds}); set value_range to what is "
        f"black and what is white, such as [{low:g}, {high:g}]"
    )


def flat(image: Image.Image, reading: Reading) -> Image.Image:
    """An image as a viewer shows it: upright, opaque, and in 8 bits, greyscale or of any mode that becomes RGB.

    Args:
        image: as Pillow opens it.
        reading: how to read it.

    Raises:
        UserError: its values are not those of an image.
    """
    image.load()
    orientation = 1
    with contextlib.suppress(Exception):  # damaged EXIF data raise whatever their parser raises; the image is whole
        orientation = image.getexif().get(0x0112, 1)
    if is_deep(image):
        image = _eight_bits(image, reading.floats if is_float(image) else reading.integers)
    elif image.has_transparency_data:
        # convert("RGB") would bring out whatever colour the transparent parts have
        opaque = Image.new("RGBA", image.size, (*reading.background, 255))
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque.convert("RGB")
    return image.transpose(_TURNED[orientation]) if orientation in _TURNED else image


def _eight_bits(image: Image.Image, known: Range | None) -> Image.Image:
    if known is None:
        low, high = extremes(image)
        known = (0.0, white(low, high, not is_float(image)))
    # in double precision: 32 bits of whole numbers are kept
    shades = rescaled(np.asarray(image).astype(np.float64), known) * 255
    return Image.fromarray(np.rint(shades).astype(np.uint8))


def rescaled(values: np.ndarray, known: Range) -> np.ndarray:
    """Values from black to white as 0 … 1, those beyond cut off.

    Example:
        >>> import numpy as np
        >>> rescaled(np.array([-5.0, 50.0, 300.0]), (0.0, 200.0))
        array([0.  , 0.25, 1.  ])
    """
    black, white = known
    return ((values - black) / (white - black)).clip(0, 1)
