"""Pictures that somebody else chose: programs under a picture's name, headers that lie, things that are no picture."""

import http.server
import io
import os
import re
import socket
import stat
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_pisces import image_loading_pisces
from modeling_pisces.image_loading_pisces import PICTURE_FORMATS, PICTURE_SUFFIXES, load_image, open_picture


ROOT = Path(__file__).parents[3]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(sender's program) pop\nshowpage\n%%EOF\n"


def refusal(source, **settings) -> str:
    with pytest.raises(ValueError) as error:
        load_image(source, **settings)
    message = str(error.value)
    assert "\n" not in message and message.isprintable() and len(message) < 700, message
    return message


def png(width: int, height: int) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def encoded(format: str, **settings) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, format, **settings)
    return file.getvalue()


# Formats


@pytest.fixture
def ghostscript(tmp_path, monkeypatch) -> Path:
    """A program called gs that writes down that it was called; the path of its notes."""
    notes, program = tmp_path / "called", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho called >> {notes}\necho 10.0\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # ask again whether there is one
    return notes


def test_an_eps_under_any_name_starts_no_program(tmp_path, ghostscript):
    (tmp_path / "photo.png").write_bytes(EPS)
    message = refusal(tmp_path / "photo.png")
    assert "photo.png: EPS" in message and "Export it as PNG" in message
    assert "EPS" in refusal(EPS)
    with pytest.raises(ValueError, match="EPS"):
        open_picture(EPS)
    assert not ghostscript.exists()


def test_an_eps_that_the_caller_opened_but_did_not_decode_is_refused(ghostscript):
    image = Image.open(io.BytesIO(EPS))
    assert image.format == "EPS"
    assert "EPS" in (message := refusal(image)) and 'convert("RGB")' in message
    assert not ghostscript.exists()


def test_a_picture_of_another_format_that_the_caller_decoded_is_taken():
    image = Image.open(io.BytesIO(encoded("TGA")))
    assert "TGA" in refusal(image)
    image.load()
    assert load_image(image).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("format", sorted(set(PICTURE_FORMATS) - {"MPO"}))
def test_every_listed_format_is_read(tmp_path, format):
    if format not in Image.SAVE:
        pytest.skip(f"this PIL writes no {format}")
    for suffix in PICTURE_FORMATS[format]:
        path = tmp_path / f"picture{suffix}"
        path.write_bytes(encoded(format))
        red, green, blue = load_image(path).getpixel((4, 4))
        assert red > 240 and green < 15 and blue < 15
        assert open_picture(path).format == format


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"%PDF-1.7", "PDF"),
        (b"\xc5\xd0\xd3\xc6\x20\0\0\0", "EPS"),
        (b'<?xml version="1.0"?><svg/>', "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIF"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "video"),
        (b"8BPS\0\1", "PSD"),
        (b"DDS |\0\0\0", "DDS"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\0\0\1\0\1\0", "ICO"),
    ],
)
def test_other_formats_are_called_by_their_names(start, name):
    assert name in (message := refusal(start + b"\0" * 100)) and "PNG" in message


def test_a_format_that_this_pil_cannot_read_is_left_out_of_the_list(monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)  # older releases have none
    monkeypatch.delitem(Image.OPEN, "WEBP", raising=False)
    assert load_image(encoded("PNG")).size == (8, 8)
    assert "not a picture" in refusal(b"no picture at all")


def test_no_other_place_of_the_project_opens_pictures_with_pil():
    for room in (
        "modeling_pisces",
        "conversion",
        "curation",
        "finetune",
        "evaluation",
        "benchmarks",
        "demo",
        "pisces_demo",
        "pisces_serving",
    ):
        for path in (ROOT / room).rglob("*.py"):
            calls = len(re.findall(r"\bImage\.open\(", path.read_text(encoding="utf-8")))
            # one opens pictures for everybody; one times bare Pillow beside it, on pictures of its own
            wanted = path in (ROOT / "modeling_pisces/image_loading_pisces.py", ROOT / "benchmarks/curation.py")
            assert calls == wanted, f"{path}: open pictures with load_image"


def test_the_endings_of_pictures_are_written_down_once():
    from evaluation import picture_metrics
    from finetune.data.readers import files as data_files
    from finetune.data.readers import shards as data_tar
    from modeling_pisces.console import pictures

    for module in (picture_metrics, data_files, data_tar, pictures):
        assert module.PICTURE_SUFFIXES is PICTURE_SUFFIXES
    assert {".tif", ".tiff", ".gif", ".avif"} <= set(PICTURE_SUFFIXES)


# Lying headers, damaged data


def test_a_header_of_a_very_long_side_is_refused_before_decoding():
    assert "99999999 x 1 pixels, a side above 65535" in refusal(png(99_999_999, 1))
    assert "1 x 70000 pixels" in refusal(np.zeros((70_000, 1), np.uint8))
    assert load_image(np.zeros((1, 65_535), np.uint8)).size == (65_535, 1)
    assert load_image(np.zeros((1, 70_000), np.uint8), max_pixels=10**10).size == (70_000, 1)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, MemoryError, OverflowError, AssertionError])
def test_whatever_a_decoder_raises_is_a_damaged_picture(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error("decoder\nfailed")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    assert "image bytes: the picture is damaged (decoder failed)" in refusal(encoded("PNG"))
    monkeypatch.setattr(image_loading_pisces.Image, "open", fail)
    assert "the picture is damaged (decoder failed)" in refusal(encoded("PNG"))


@pytest.mark.parametrize("format", [name for name in sorted(PICTURE_FORMATS) if name != "MPO"])
def test_flipped_and_missing_bytes_give_a_picture_or_one_line(format):
    if format not in Image.SAVE:
        pytest.skip(f"this PIL writes no {format}")
    data, random = encoded(format), np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(data[: random.integers(1, len(data) + 1)])
        for place in random.integers(0, len(broken), 3):
            broken[place] = random.integers(256)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert load_image(bytes(broken), max_pixels=10**6).mode == "RGB"
        except ValueError as error:
            assert "\n" not in str(error) and str(error).startswith("image bytes: ")


def test_a_warning_that_the_caller_made_an_error_stays_one(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="2 frames"):
            load_image(tmp_path / "moving.gif")


# Places


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "a pipe, a socket or a device" in refusal(tmp_path / "pipe.png")
    assert "a pipe, a socket or a device" in refusal("/dev/zero")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    assert "a pipe" in refusal(tmp_path / "link.png")


def test_a_file_that_may_not_be_read_is_refused_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "private.png").write_bytes(encoded("PNG"))

    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", forbidden)
    assert "private.png: cannot be opened (Permission denied)" in refusal(tmp_path / "private.png")


def test_names_with_line_breaks_stay_in_one_line(tmp_path):
    path = tmp_path / "two\nlines\x1b[31m.png"
    assert "two lines" in refusal(path)
    path.write_bytes(b"nothing")
    assert "two lines" in refusal(path)
    assert "b" in refusal("a\0b.png") and "no such file" in refusal("a\udc80b.png")


@pytest.mark.parametrize(
    "url",
    [
        "http://a b/",
        "http:///x.png",
        "http://ä ö/",
        "http://[::1",
        "https://",
        "http://127.0.0.1:99999/",
        "http://a\n/",
    ],
)
def test_malformed_addresses_are_refused_in_one_line(url):
    assert "could not be downloaded" in refusal(url)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a.png", "s3://bucket/a.png", "FILE:///etc/passwd"])
def test_other_schemes_are_refused(url):
    assert "only http, https and data URLs" in refusal(url)


@pytest.fixture
def server():
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
                return
            self.send_response(200)
            if self.path == "/short":
                self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(encoded("PNG") if self.path in ("/short", "/picture") else b"x" * 5000)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_redirects_lead_to_the_web_only(server, tmp_path):
    (tmp_path / "here.png").write_bytes(encoded("PNG"))
    assert load_image(f"{server}/to//picture").size == (8, 8)
    for target in (
        f"file://{tmp_path}/here.png",
        "ftp://127.0.0.1/here.png",
        "data:image/png;base64,AAAA",
        "http://a b/",
    ):
        assert "could not be downloaded" in refusal(f"{server}/to/{target}")


def test_a_port_that_would_wrap_to_another_one_is_refused(server):
    address, port = server.rsplit(":", 1)
    assert "Port out of range" in refusal(f"{address}:{int(port) + 65536}//picture")


def test_a_download_that_is_too_large_or_breaks_off_or_never_ends_is_refused(server, monkeypatch):
    assert "could not be downloaded" in refusal(f"{server}/short")
    monkeypatch.setattr(image_loading_pisces, "URL_MAX_BYTES", 1000)
    assert "more than 1000 bytes" in refusal(f"{server}/large")
    monkeypatch.setattr(image_loading_pisces, "URL_TOTAL_S", -1)
    assert "not complete after" in refusal(f"{server}/picture")


def test_a_server_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(image_loading_pisces, "URL_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "could not be downloaded" in refusal(f"http://127.0.0.1:{silent.getsockname()[1]}/")


# Arrays


@pytest.mark.parametrize(
    "array",
    [
        np.full((4, 4), "1"),
        np.full((4, 4), None),
        np.ones((4, 4), complex),
        np.zeros((4, 4), [("red", "u1")]),
        np.zeros((4, 4), "M8[s]"),
        torch.ones(4, 4).to(torch.float8_e4m3fn),
        torch.ones(4, 4, dtype=torch.complex64),
        torch.ones(4, 4).to_sparse(),
        torch.ones(4, 4, device="meta"),
    ],
    ids=lambda array: str(array.dtype),
)
def test_arrays_that_hold_no_real_numbers_are_refused(array):
    message = refusal(array)
    assert "(4, 4)" in message and ("not real numbers" in message or "cannot be read as numbers" in message)


def test_arrays_of_no_or_too_many_dimensions_are_refused():
    for array in (np.array(3), np.zeros(5), np.zeros((1, 1, 4, 4, 3)), np.zeros((4, 0))):
        assert "expected (H, W)" in refusal(array)


def test_an_array_is_read_whatever_its_strides_and_byte_order():
    colours = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    for array in (colours[::-1, ::-1], colours[::2], np.asfortranarray(colours), colours[..., ::-1]):
        assert np.array_equal(np.asarray(load_image(array)), array)
    for dtype in (">u2", "<u2"):
        assert np.asarray(load_image(np.array([[0, 257, 65535]], dtype)))[0, :, 0].tolist() == [0, 1, 255]
    assert np.asarray(load_image(np.array([[0, 0.5, 1]], np.float16)))[0, :, 0].tolist() == [0, 128, 255]


def test_a_mask_of_integers_is_refused_instead_of_turning_black():
    mask = np.array([[0, 1], [1, 0]])
    for dtype in (np.int64, np.int32, np.int8, np.uint16):
        message = refusal(mask.astype(dtype))
        assert "only 0 and 1" in message and "bool" in message and "255" in message
    assert "only 0 and 1" in refusal(torch.from_numpy(mask))
    assert np.asarray(load_image(mask.astype(bool))).max() == 255
    assert np.asarray(load_image(mask.astype(np.float32))).max() == 255
    assert np.asarray(load_image(mask.astype(np.uint8))).max() == 1  # as it says
    assert np.asarray(load_image(np.zeros((2, 2), np.int64))).max() == 0


def test_not_a_number_is_refused_in_any_channel():
    for channel in range(4):
        array = np.ones((3, 3, 4), np.float32)
        array[1, 1, channel] = np.nan
        assert "nan" in refusal(array)
    assert "nan" in refusal(Image.fromarray(np.full((2, 2), np.nan, np.float32)))


# Colour modes


@pytest.mark.parametrize("mode", ["La", "LA", "RGBa", "RGBA", "PA"])
def test_every_mode_with_alpha_is_laid_on_white(mode):
    assert load_image(Image.new(mode, (2, 2))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "I;16B"]
)
def test_every_other_mode_becomes_rgb(mode):
    for info in ({}, {"transparency": 5}):
        image = Image.new(mode, (2, 2))
        image.info = info if mode not in ("RGB",) else {}
        assert load_image(image).mode == "RGB"


def test_a_note_of_transparency_that_makes_no_sense_is_refused_in_one_line():
    image = Image.new("RGB", (2, 2))
    image.info["transparency"] = "x"
    assert "colour mode RGB" in refusal(image)


def test_16_bit_pgm_is_scaled():
    assert np.asarray(load_image(b"P5 2 1 65535\n\x01\x01\xff\xff"))[0, :, 0].tolist() == [1, 255]
    assert np.asarray(load_image(b"P5 2 1 255\n\x10\xff"))[0, :, 0].tolist() == [16, 255]


def test_a_lazily_opened_picture_is_judged_by_its_class_too(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    picture = Image.open(path)
    picture.format = None
    assert "EPS, not one of" in refusal(picture)


# ---- found by `python -m tests.fuzz --surface images`


def test_masked_values_of_an_array_are_not_shown_in_silence():
    pixels = np.full((4, 5), 9, np.uint8)
    masked = np.ma.masked_array(pixels, mask=np.eye(4, 5))
    with pytest.raises(ValueError, match=r"array of shape \(4, 5\), uint8: 4 of its values are masked. Give what"):
        load_image(masked)
    assert load_image(np.ma.masked_array(pixels)).size == (5, 4)


def test_a_tensor_whose_shape_cannot_be_said_is_refused():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(ValueError, match="cannot be read as numbers"):
        load_image(nested)
