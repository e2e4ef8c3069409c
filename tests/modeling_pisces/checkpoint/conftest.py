"""A checkpoint folder that is right, and a copy of it that a test may break."""

import shutil

import pytest

from tests.fixtures import make_model, make_processor


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good_folder, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(good_folder, tmp_path / "copy")
