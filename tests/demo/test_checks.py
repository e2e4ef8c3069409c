"""What the page refuses: one sentence for each thing that cannot be used, whatever was posted."""

import io
import re

import pytest
from PIL import Image

from pisces_demo.checks import (
    MAX_SEED,
    check_count,
    check_number,
    check_seed,
    check_text,
    check_whole,
    open_upload,
)


@pytest.mark.parametrize("value", [None, "", "7", -1, 0.5, float("nan"), float("inf"), MAX_SEED + 1, True, [1], {}])
def test_a_seed_that_is_no_whole_number_in_range_is_refused_with_its_range(value):
    with pytest.raises(ValueError, match=rf"^The seed is .*: expected a whole number from 0 to {MAX_SEED}\.$"):
        check_seed(value)


def test_numbers_come_back_as_what_they_say():
    assert check_seed(7.0) == 7 and isinstance(check_seed(7.0), int)
    assert check_seed(MAX_SEED) == MAX_SEED and check_count(8) == 8
    assert check_number(0, "The strength", 0, 1) == 0.0


def test_an_emptied_field_is_called_empty():
    with pytest.raises(ValueError, match=r"^The number of steps is empty: expected a whole number from 1 to 200\.$"):
        check_whole(None, "The number of steps", 1, 200)
    with pytest.raises(ValueError, match=r"^The guidance is empty: expected a number from 1 to 30\.$"):
        check_number(None, "The guidance", 1, 30)


@pytest.mark.parametrize("value", [9, 0, -3, 10**9])
def test_a_number_of_pictures_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=r"^The number of pictures is .* from 1 to 8\.$"):
        check_count(value)


@pytest.mark.parametrize("value", ["", "  \n\t ", None, 3, ["a"], {"text": "a"}])
def test_text_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=r"^The prompt is empty\. Say what to draw\.$"):
        check_text(value, "prompt", "Say what to draw.")


def test_text_far_too_long_is_refused_with_its_length():
    with pytest.raises(ValueError, match=r"^The prompt has 4001 characters, the limit is 4000\. Shorten it\.$"):
        check_text("a" * 4001, "prompt", "")
    assert check_text(f" {'a' * 4000} ", "prompt", "") == "a" * 4000


def test_an_upload_is_opened_upright_in_rgb(tmp_path):
    picture = Image.new("RGB", (4, 2), (10, 20, 30))
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    opened = open_upload(str(tmp_path / "turned.png"))
    assert (opened.mode, opened.size) == ("RGB", (2, 4))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n(owned) print\nshowpage\n%%EOF\n"
TIFF_IN_PNG = io.BytesIO()
Image.new("RGB", (4, 4)).save(TIFF_IN_PNG, format="TIFF")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (EPS, r"photo\.png: EPS \(PostScript\), not one of .*PNG.*"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", r"photo\.png: SVG or other XML.*"),
        (b"", r"photo\.png: the file has 0 bytes.*"),
        (b"hello", r"photo\.png: not a picture.*"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, r"photo\.png: .*"),
    ],
    ids=["eps", "svg", "empty", "text", "damaged"],
)
def test_an_upload_that_is_no_picture_is_refused_by_its_name_and_not_by_where_it_lies(tmp_path, content, says):
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(ValueError) as refused:
        open_upload(tmp_path / "photo.png")
    assert re.fullmatch(says, str(refused.value)), refused.value
    assert str(tmp_path) not in str(refused.value) and "\n" not in str(refused.value)


def test_formats_that_we_read_are_opened_whatever_their_name_says(tmp_path):
    (tmp_path / "photo.png").write_bytes(TIFF_IN_PNG.getvalue())
    assert open_upload(tmp_path / "photo.png").size == (4, 4)


def test_a_picture_of_too_many_pixels_is_refused_from_its_header_without_advice_for_programmers(tmp_path):
    Image.new("1", (8000, 6000)).save(tmp_path / "huge.png")
    with pytest.raises(
        ValueError, match=r"^huge\.png: 8000 x 6000 pixels, more than the limit of 40000000 .*first\.$"
    ):
        open_upload(tmp_path / "huge.png")


@pytest.mark.parametrize(
    "path", ["http://127.0.0.1:9/x.png", "data:image/png;base64,AAAA", "nowhere.png", "/dev/zero", "."]
)
def test_an_address_or_a_file_that_is_no_upload_is_never_opened(path):
    with pytest.raises(ValueError, match=r"the upload is gone\. Choose the picture again\.$"):
        open_upload(path)


@pytest.mark.parametrize("path", [None, "", 3])
def test_no_picture_is_refused_with_what_to_do(path):
    with pytest.raises(ValueError, match=r"^There is no picture\. Drop one into the field, or click an example\.$"):
        open_upload(path)
