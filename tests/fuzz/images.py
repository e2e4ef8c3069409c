"""Cases for `load_image`: arrays, files whole and broken, PIL images of all modes, names of files and addresses."""

import base64
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageOps

from modeling_pisces.image_loading_pisces import load_image
from tests.fuzz.outcomes import Case, Wrong


SURFACE = "images"
DTYPES = "u1 i1 u2 >u2 i2 u4 i4 >i4 i8 u8 f2 f4 >f4 f8 g ? c8 O U1 S1 M8[s] V4".split()
MODES = (
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "RGBX",
    "RGBa",
    "La",
    "I;16",
    "I;16B",
)
LOSSLESS = {
    "PNG": ("1", "L", "P", "RGB", "RGBA", "LA"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("L", "RGB", "RGBA"),
    "PPM": ("L", "RGB"),
}
LOSSY = {"JPEG": ("L", "RGB", "CMYK"), "GIF": ("L", "P"), "WEBP": ("RGB", "RGBA"), "AVIF": ("RGB", "RGBA")}
STARTS = (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", b"%PDF-1.4\n", b"DDS |\0\0\0", b"8BPS\0\1", b"\0\0\1\0\1\0",
          b"SIMPLE  =", b"P6 9 9 255\n", b"P5 2 1 65535\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"MM\0*",
          b"RIFF\0\0\0\0WEBP", b"\0\0\0\x18ftypavif", b"\xd7\xcd\xc6\x9a\0\0", b"qoif", b"\0\0\0\x0cjP  ", b"#define x_width 9\n", b"/* XPM */", b"\x01\xda\x01\x01")  # fmt: skip


def cases(seed: int) -> Iterator[Case]:
    yield make_case(np.random.default_rng(seed))


def make_case(random: Generator) -> Case:
    return random.choice(
        [array, pil_image, whole_file, broken_file, cut_file, contained, contained, other_bytes, name, thing]
    )(random)  # type: ignore[arg-type]


def array(random: Generator) -> Case:
    """Any shape, type, order and range; the pixels are reckoned here once more, one by one."""
    dtype = np.dtype(str(random.choice(DTYPES)))
    shape = tuple(int(side) for side in random.integers(0, 7, random.integers(0, 5)))
    if random.random() < 0.6:
        shape = (
            *random.integers(1, 7, 2).tolist(),
            *([int(random.choice([1, 3, 4]))] if random.random() < 0.7 else []),
        )
    top = random.choice([1, 255, 256, 65535, 70000])
    values = random.random(shape) * (1 if dtype.kind == "f" and random.random() < 0.7 else top)
    if dtype.kind in "iu":
        values = np.minimum(values, np.iinfo(dtype).max)
    given = values.astype(dtype) if dtype.kind not in "OUSMV" else np.zeros(shape, dtype)
    if dtype.kind == "f" and given.size and random.random() < 0.1:
        given.flat[0] = random.choice([np.nan, np.inf, -0.5])
    if dtype.kind in "iu" and random.random() < 0.1:
        given = (given % 2).astype(dtype)
    if given.ndim and random.random() < 0.3:
        given = given[::-1]
    expected = _expected_pixels(given)
    source = given
    if dtype.kind in "uif?" and dtype.newbyteorder("=").name in ("uint8", "int64", "float32", "float64", "float16", "bool") and random.random() < 0.4:  # fmt: skip
        source = torch.from_numpy(np.ascontiguousarray(given.astype(dtype.newbyteorder("="))))
        if given.ndim == 3 and random.random() < 0.5 and given.shape[0] not in (1, 3, 4):
            source = source.permute(2, 0, 1)
            expected = _expected_pixels(np.moveaxis(given, -1, 0))

    def check():
        found = np.asarray(load_image(source))
        if expected is not None and not np.array_equal(found, expected):
            raise Wrong(f"{found.ravel()[:6]} for {np.asarray(given).ravel()[:6]} of {given.dtype} {given.shape}")

    return Case(f"array {dtype.kind}", check, must=expected is None)


def _expected_pixels(given: np.ndarray) -> np.ndarray | None:
    """(H, W, 3) uint8, or None for what is no picture."""
    if given.dtype.kind not in "buif" or given.size == 0 or given.ndim not in (2, 3):
        return None
    if given.ndim == 3 and given.shape[-1] not in (1, 3, 4):
        if given.shape[0] not in (1, 3, 4):
            return None
        given = given.transpose(1, 2, 0)
    values = given.astype(np.float64)
    kind, size = given.dtype.kind, given.dtype.itemsize
    if not np.isfinite(values).all() or values.min() < 0:
        return None
    if kind in "iu" and not (kind == "u" and size == 1) and values.max() == 1:
        return None
    if kind == "b" or kind == "f":
        if values.max() > 1:
            return None
        values = np.rint(
            (given.astype(np.float32) if size < 8 else given).astype(np.float64 if size >= 8 else np.float32) * 255
        )
    elif kind == "u" and size == 2:
        values = np.floor(values / 257 + 0.5)
    elif values.max() > 255:
        return None
    values = values.astype(np.uint8)
    if values.ndim == 2 or values.shape[-1] == 1:
        return np.stack([values.reshape(values.shape[:2])] * 3, -1)
    return np.asarray(_over_white(Image.fromarray(values))) if values.shape[-1] == 4 else values


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _random_image(random: Generator, mode: str) -> Image.Image:
    size = tuple(int(side) for side in random.integers(1, 12, 2))
    pixels = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    if mode in ("La", "LA", "RGBa", "RGBA", "PA"):
        pixels.putalpha(Image.fromarray(random.integers(0, 256, size[::-1], dtype=np.uint8)))
    try:
        return pixels.convert({"La": "LA"}.get(mode, mode)).convert(mode)
    except ValueError:
        return Image.new(mode, size)


def pil_image(random: Generator) -> Case:
    mode = str(random.choice(MODES))
    image = _random_image(random, mode)
    width, height = image.size
    if random.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = orientation = int(random.integers(0, 11))
        image.info["exif"] = exif.tobytes()
        width, height = (height, width) if orientation in (5, 6, 7, 8) else (width, height)
    is_noted = random.random() < 0.3
    if is_noted:
        image.info["transparency"] = [0, 300, (1, 2, 3), b"\0\1", "x", None][random.integers(6)]
    if random.random() < 0.1:
        image.info["exif"] = random.bytes(30)
        is_noted, width, height = True, *image.size
    max_pixels = int(random.choice([10, 10**8]))
    before = image.mode, image.size

    def check():
        found = load_image(image, max_pixels=max_pixels)
        if found.mode != "RGB" or found.size != (width, height):
            raise Wrong(f"{found.mode} {found.size} for {mode} {width, height}")
        if (image.mode, image.size) != before:
            raise Wrong("the caller's picture was changed")
        if width * height > max_pixels:
            raise Wrong(f"{width * height} pixels above {max_pixels}")

    is_plain = mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "La", "RGBa") and max_pixels > 10
    return Case(f"PIL {mode}", check, must=None if is_noted or not is_plain else False)


def _encoded(random: Generator) -> tuple[bytes, str, Image.Image]:
    formats = {**LOSSLESS, **LOSSY}
    format = str(random.choice(sorted(set(formats) & set(Image.SAVE) or {"PNG"})))
    image = _random_image(random, str(random.choice(formats[format])))
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue(), format, image


def whole_file(random: Generator) -> Case:
    Image.init()
    data, format, image = _encoded(random)

    def check():
        found = load_image(data)
        if found.size != image.size:
            raise Wrong(f"size {found.size} for {image.size}")
        if format in LOSSLESS:
            expected = (
                _over_white(image) if image.mode in ("RGBA", "LA") else ImageOps.exif_transpose(image).convert("RGB")
            )
            if found.tobytes() != expected.tobytes():
                raise Wrong(f"other pixels of {format} {image.mode}")

    return Case(f"file {format}", check, must=False)


def broken_file(random: Generator) -> Case:
    Image.init()
    data, format, _ = _encoded(random)
    broken = bytearray(data)
    for _ in range(random.integers(1, 5)):
        place = int(random.integers(0, len(broken)))
        broken[place : place + int(random.integers(0, 3))] = random.bytes(int(random.integers(0, 5)))
    cut = bytes(broken[: random.integers(1, len(broken) + 1)] if broken and random.random() < 0.3 else broken)

    def check():
        found = load_image(cut, max_pixels=10**6)
        if found.mode != "RGB" or found.width * found.height > 10**6:
            raise Wrong(f"{found.mode} {found.size}")

    return Case(f"broken {format}", check)


def cut_file(random: Generator) -> Case:
    """A file that ends too early is refused, or nothing of the picture was missing."""
    Image.init()
    data, format, _ = _encoded(random)
    cut = data[: int(random.integers(1, len(data)))]

    def check():
        found = load_image(cut)
        if found.tobytes() != load_image(data).tobytes():
            raise Wrong(f"a part of {format}, {len(cut)} of {len(data)} bytes")

    return Case(f"cut {format}", check)


TURNS = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}  # fmt: skip


def contained(random: Generator) -> Case:
    """One picture in two containers, however it is handed over, turned by EXIF or not, gives the same pixels."""
    Image.init()
    image = _random_image(random, "RGB" if random.random() < 0.7 else "RGBA")
    orientation = int(random.integers(1, 9)) if random.random() < 0.4 else 1
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = image if TURNS[orientation] is None else image.transpose(TURNS[orientation])
    expected = np.asarray(_over_white(turned) if image.mode == "RGBA" else turned)
    options: dict[str, dict] = {
        "PNG": {},
        "TIFF": {"compression": str(random.choice(["raw", "tiff_lzw", "tiff_deflate", "packbits"]))},
        "WEBP": {"lossless": True, "exact": True},
    }
    if orientation == 1 and image.mode == "RGB":
        options |= {"BMP": {}, "PPM": {}}
    format = str(random.choice(sorted(options)))
    is_animated = format != "TIFF" and "BMP PPM".find(format) < 0 and random.random() < 0.2
    more = {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]} if is_animated else {}
    file = io.BytesIO()
    image.save(file, format, **options[format], **more, **({"exif": exif} if orientation > 1 else {}))
    data, folder = file.getvalue(), Path(tempfile.mkdtemp())
    suffix = str(random.choice([".png", ".jpg", ".eps", "", ".txt", ".PNG"]))
    way = str(random.choice(["bytes", "bytearray", "memoryview", "path", "text", "data URL", "PIL", "PIL read", "array", "fortran", "tensor", "channels first", "float", "float64", "deep", "view"]))  # fmt: skip
    pixels = np.asarray(turned.convert("RGB")) if image.mode == "RGB" else np.asarray(turned)

    def given():
        path = folder / f"photo ü{suffix}"
        if way in ("path", "text"):
            path.write_bytes(data)
        forms = {
            "bytes": lambda: data,
            "bytearray": lambda: bytearray(data),
            "memoryview": lambda: memoryview(data),
            "path": lambda: path,
            "text": lambda: str(path),
            "data URL": lambda: f"data:image/png;base64,{base64.b64encode(data).decode()}",
            "PIL": lambda: Image.open(io.BytesIO(data)),
            "PIL read": lambda: image if orientation == 1 else turned,
            "array": lambda: pixels,
            "fortran": lambda: np.asfortranarray(pixels),
            "tensor": lambda: torch.from_numpy(pixels.copy()),
            "channels first": lambda: torch.from_numpy(pixels.copy()).permute(2, 0, 1),
            "float": lambda: pixels.astype(np.float32) / 255,
            "float64": lambda: torch.from_numpy(pixels / 255.0),
            "deep": lambda: pixels.astype(np.uint16) * 257,
            "view": lambda: np.repeat(pixels, 2, axis=0)[::2],
        }
        return forms[way]()

    is_ambiguous = way == "channels first" and turned.height in (1, 3, 4)  # its last side may be 3 by chance

    def check():
        try:
            found = np.asarray(load_image(given()))
        finally:
            shutil.rmtree(folder)
        if not is_ambiguous and turned.width not in (1, 3, 4) and not np.array_equal(found, expected):
            raise Wrong(f"other pixels of {format} {image.mode} {image.size} turned by {orientation} as {way}")

    return Case(f"as {way}", check, None if is_ambiguous else False, (folder,))


def other_bytes(random: Generator) -> Case:
    data = STARTS[random.integers(len(STARTS))] + random.bytes(int(random.integers(0, 200)))
    if random.random() < 0.2:
        data = random.bytes(int(random.integers(0, 100)))
    is_open = random.random() < 0.3

    def check():
        source = data
        if is_open:
            try:
                source = Image.open(io.BytesIO(data))
            except Exception:  # PIL's own; not ours to judge
                source = data
        if load_image(source, max_pixels=10**6).mode != "RGB":
            raise Wrong("not RGB")

    return Case("bytes", check)


def name(random: Generator) -> Case:
    pieces = ["http://", "https://", "file://", "ftp://", "data:", "data:image/png;base64,", "s3://", "HTTP://", "/", "..", "\n", "\0", " ", "ä", "\ud800",
              "[::1", "127.0.0.1:9", "127.0.0.1:99999", "@", "?", "#", "%zz", "\x1b[31m", "\u202e", "x" * 300, "a.png", "AAAA", "=", ":", "/dev/zero", "\U0001f600"]  # fmt: skip
    text = "".join(pieces[i] for i in random.integers(0, len(pieces), random.integers(0, 5)))
    if text.lower().startswith("http"):  # nothing is called but this machine
        odd = ["http://[::1", "http://127.0.0.1:x/a.png", "http://", "HTTP://127.0.0.1:9"]
        text = odd[random.integers(4)] if random.random() < 0.3 else "http://127.0.0.1:9/" + text[7:].replace("@", "")

    def check():
        with mock.patch.dict(os.environ, http_proxy="", https_proxy="", no_proxy="*"):
            load_image(text)
        raise Wrong("a picture where there is none")

    return Case("name", check, must=True)


def thing(random: Generator) -> Case:
    class Shaped:
        shape = "no shape"

    things = [None, 3, 2.5, {}, [], (), {"bytes": b""}, object(), Shaped(), io.BytesIO(b"GIF89a"), iter([1]), Image, np.float32(1), np.array(None),
              torch.ones(3, 3).to_sparse(), torch.ones(3, 3, device="meta"), torch.ones(2, 2, 3).to(torch.float8_e5m2), memoryview(b""), bytearray(b"x"), range(3), np.ma.masked_array(np.full((3, 3), 9, np.uint8), mask=np.eye(3)), np.array([[1, None]]), np.zeros((0, 3, 3), np.uint8),
              np.full((5, 5, 2), 9, np.uint8), np.full((2, 2), np.nan), np.full((2, 2), -1), torch.full((3, 4, 4), 2.5), np.array([["a"]]), torch.nested.nested_tensor([torch.ones(2)]),
              torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.quint8), [[1, 2], [3, 4]], "", "\0", b"", Path(""), Path("/"), np.zeros((70000, 1), np.uint8), Image.new("RGB", (70000, 1))]  # fmt: skip
    picked = things[random.integers(len(things))]

    def check():
        load_image(picked)
        raise Wrong(f"a picture of {picked!r}")

    return Case("thing", check, must=True)
