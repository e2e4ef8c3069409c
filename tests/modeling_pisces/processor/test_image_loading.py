"""Pictures as people really have them: what `load_image` makes of each, and what it says when it refuses one."""

import base64
import io
import re
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_pisces.image_loading_pisces import load_image


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture
def colours() -> np.ndarray:
    """(H, W, 3) uint8 with H = 6 and W = 10, every pixel different."""
    return np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)


def encoded(array: np.ndarray, format: str = "PNG", **settings) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, **settings)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def assert_refused(source, *words: str, **settings) -> None:
    """One line, and it contains every word: file, what was found, what to do."""
    with pytest.raises(ValueError) as error:
        load_image(source, **settings)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# Ways to give a picture


def test_every_way_to_give_a_picture_gives_the_same_pixels(tmp_path, colours):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(colours))
    data_url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    sources = {
        "str": str(path),
        "Path": path,
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "memoryview": memoryview(path.read_bytes()),
        "memoryview of an array": memoryview(colours),
        "data URL": data_url,
        "PIL": Image.fromarray(colours),
        "array": colours,
        "channels first": np.moveaxis(colours, -1, 0),
        "tensor": torch.from_numpy(colours).permute(2, 0, 1),
        "float array": colours.astype(np.float32) / 255,
        "int64 array": colours.astype(np.int64),
    }
    for name, source in sources.items():
        assert np.array_equal(pixels(load_image(source)), colours), name


def test_a_bfloat16_tensor_is_read():
    assert pixels(load_image(torch.ones(3, 2, 2, dtype=torch.bfloat16))).min() == 255


def test_a_picture_of_one_pixel_is_read():
    assert pixels(load_image(np.array([[[1, 2, 3]]], dtype=np.uint8))).tolist() == [[[1, 2, 3]]]


def test_the_given_image_is_left_as_it_was(colours):
    image = Image.fromarray(colours).convert("RGBA")
    load_image(image)
    assert image.mode == "RGBA"


# Pixels that need care


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(colours, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = pixels(load_image(encoded(colours, exif=exif.tobytes())))
    # from the EXIF standard: where the first stored row and column are seen
    turned = {
        1: colours,
        2: colours[:, ::-1],
        3: colours[::-1, ::-1],
        4: colours[::-1],
        5: colours.transpose(1, 0, 2),
        6: np.rot90(colours, -1),
        7: colours[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(colours, 1),
    }
    assert np.array_equal(upright, turned[orientation])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("orientation", [2, 3, 6, 7])
def test_a_turned_tiff_is_the_same_picture_as_bytes_as_a_file_and_as_a_pil_image(mode, orientation, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 7, 4), dtype=np.uint8), "RGBA").convert(mode)
    exif, path = Image.Exif(), tmp_path / "turned.tif"
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    given = Image.open(path)
    found = [pixels(load_image(source)) for source in (path.read_bytes(), path, str(path), given)]
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 6: "ROTATE_270", 7: "TRANSVERSE"}
    upright = image.transpose(getattr(Image.Transpose, turns[orientation]))
    assert all(np.array_equal(one, pixels(load_image(upright))) for one in found)
    assert given.filename == str(path)


def test_palette_images_get_their_colours():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert pixels(load_image(image)).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_transparent_palette_entries_become_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=0)
    assert pixels(load_image(file.getvalue())).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_alpha_is_composited_on_white():
    image = Image.fromarray(np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [255, 0, 0, 128]]], dtype=np.uint8))
    # half transparent red on white: 255 * 127 / 255 of white in green and blue
    assert pixels(load_image(image)).tolist() == [[[255, 255, 255], [0, 0, 0], [255, 127, 127]]]


def test_grey_with_alpha_is_composited_on_white():
    image = Image.merge("LA", [Image.new("L", (2, 1), 10), Image.frombytes("L", (2, 1), bytes([0, 255]))])
    assert pixels(load_image(image)).tolist() == [[[255] * 3, [10] * 3]]


def test_a_transparent_colour_key_becomes_white():
    file = io.BytesIO()
    Image.fromarray(np.array([[[9, 8, 7], [1, 2, 3]]], dtype=np.uint8)).save(file, "PNG", transparency=(9, 8, 7))
    assert pixels(load_image(file.getvalue())).tolist() == [[[255, 255, 255], [1, 2, 3]]]


def test_black_and_white_images_use_the_full_range():
    image = Image.frombytes("1", (2, 1), b"\x80")
    assert pixels(load_image(image)).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format):
    # PIL's own convert("RGB") gives 255 for everything above 255
    values = np.array([[0, 257, 300, 32768, 65535]], dtype=np.uint16)
    grey = pixels(load_image(encoded(values, format)))
    assert grey[0, :, 0].tolist() == [0, 1, 1, 128, 255]
    assert np.array_equal(grey[..., 0], grey[..., 2])


def test_big_endian_16_bit_grey_is_read():
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 65535, 257))
    assert pixels(load_image(image))[0, :, 0].tolist() == [255, 1]


def test_16_bit_colour_is_scaled(tmp_path):
    # PIL cannot write this, so the file is put together by hand: 2 x 1 pixels, 16 bits, colour type 2
    row = b"\x00" + struct.pack(">6H", 0, 257, 65535, 32896, 512, 65280)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    path = tmp_path / "deep.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(row)) + png_chunk(b"IEND", b""))
    assert pixels(load_image(path)).tolist() == [[[0, 1, 255], [128, 2, 255]]]


def test_mode_i_in_memory_keeps_8_bit_values():
    image = Image.fromarray(np.array([[0, 200, 255]], dtype=np.int32))
    assert pixels(load_image(image))[0, :, 0].tolist() == [0, 200, 255]


def test_mode_f_takes_values_between_0_and_1():
    image = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert pixels(load_image(image))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("values", [[[0, 70000]], [[-1, 3]]])
def test_integer_pixels_of_unknown_range_are_refused(values):
    assert_refused(Image.fromarray(np.array(values, dtype=np.int32)), "values from", "Expected", "rescale")


def test_cmyk_jpeg_shows_its_colours():
    # red, written by PIL as Adobe software does: inverted; reading it without undoing that gives cyan
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK").save(file, "JPEG", quality=95)
    assert b"Adobe" in file.getvalue()
    red, green, blue = pixels(load_image(file.getvalue()))[8, 8].tolist()
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame_and_one_warning(tmp_path, format):
    path = tmp_path / f"moving.{format.lower()}"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(
        path, format, save_all=True, append_images=frames[1:], **({} if format == "GIF" else {"lossless": True})
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = load_image(path)
    assert pixels(image)[4, 4].tolist() == [255, 0, 0]
    assert [str(w.message) for w in caught] == [f"{path}: 3 frames; only the first is used."]


def test_a_pil_animation_gives_the_frame_it_stands_at_and_is_not_moved(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "moving.gif") as image:
        image.seek(2)
        with pytest.warns(UserWarning, match="3 frames; only frame 2 is used"):
            assert pixels(load_image(image))[4, 4].tolist() == [0, 0, 255]
        assert image.tell() == 2


def test_a_phone_jpeg_with_a_second_view_is_read_without_a_warning(tmp_path):
    path = tmp_path / "phone.mpo"
    Image.new("RGB", (8, 8), "red").save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(load_image(path))[4, 4, 0] > 240


# Refusals


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_file_cut_in_half_is_refused_by_name(tmp_path, format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(noise, format)
    path = tmp_path / f"cut.{format.lower()}"
    path.write_bytes(data[: len(data) // 2])
    assert_refused(path, str(path), "again")


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.99])
def test_a_jpeg_cut_anywhere_is_refused(tmp_path, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(noise, "JPEG")
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: int(len(data) * share)])
    assert_refused(path, "cut.jpg", "damaged", "again")


def test_a_png_with_flipped_bytes_is_refused(tmp_path, colours):
    data = bytearray(encoded(colours))
    data[len(data) // 2] ^= 0xFF
    path = tmp_path / "flipped.png"
    path.write_bytes(bytes(data))
    assert_refused(path, "flipped.png", "damaged")


def test_an_empty_file_is_refused_by_name(tmp_path):
    path = tmp_path / "empty.jpg"
    path.touch()
    assert_refused(path, str(path), "0 bytes", "again")
    assert_refused(b"", "0 bytes")


def test_a_text_file_named_png_is_refused_by_name(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("Hello, I am not a picture.")
    assert_refused(path, str(path), "not a picture", "b'Hello, I", "Give a PNG")


def test_a_missing_path_and_a_folder_are_refused_by_name(tmp_path):
    assert_refused(tmp_path / "absent.png", "absent.png", "no such file", "Check the path")
    assert_refused(str(tmp_path), str(tmp_path), "folder", "one picture")
    assert_refused("x" * 5000, "xxx", "Check the path")


def test_an_absurdly_large_picture_is_refused_by_name_without_decoding_it(tmp_path):
    # the header alone says 20000 x 20000; nothing behind it could be decoded
    path = tmp_path / "huge.png"
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b""))
    start = time.perf_counter()
    assert_refused(path, str(path), "400000000 pixels", "limit of 100000000", "Shrink")
    assert time.perf_counter() - start < 0.5


def test_the_limit_is_a_parameter_and_counts_pixels(colours):
    assert_refused(encoded(colours), "10 x 6 pixels", "limit of 59", max_pixels=59)
    assert_refused(Image.fromarray(colours), "10 x 6 pixels", max_pixels=59)
    assert load_image(encoded(colours), max_pixels=60).size == (10, 6)


def test_between_pils_warning_and_its_error_only_our_limit_speaks(tmp_path):
    # 100 to 178 megapixels: PIL would warn and decode
    path = tmp_path / "wide.png"
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 15000, 10000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_refused(path, "15000 x 10000 pixels", "limit of 100000000")


def test_arrays_that_are_no_pictures_are_refused():
    assert_refused(np.zeros((6, 7, 5)), "(6, 7, 5)", "Reshape")
    assert_refused(np.zeros((0, 4, 3)), "(0, 4, 3)", "Reshape")
    assert_refused(np.full((2, 2, 3), -0.5), "-0.5", "not yet normalised")
    assert_refused(np.full((2, 2, 3), np.nan), "nan", "Expected")


def test_other_objects_are_refused_by_type():
    assert_refused(3.5, "float", "expected a path")


def test_bad_urls_are_refused_by_name():
    assert_refused("data:image/png;base64,@@@", "data:image/png", "base64")
    assert_refused("data:text/plain,hello", "data:text/plain", "base64")
    assert_refused("http://127.0.0.1:9/none.png", "http://127.0.0.1:9/none.png", "give the path")


def test_a_url_is_downloaded(tmp_path, colours):
    import functools
    import http.server
    import threading

    (tmp_path / "served.png").write_bytes(encoded(colours))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(pixels(load_image(f"{url}/served.png")), colours)
        assert_refused(f"{url}/absent.png", "absent.png", "404", "give the path")
    finally:
        server.shutdown()
        server.server_close()


def test_no_message_is_longer_than_a_line_of_sense():
    with pytest.raises(ValueError) as error:
        load_image("data:image/png;base64," + "A" * 10_000)
    assert len(str(error.value)) < 300 and re.search(r"\.\.\.", str(error.value))
