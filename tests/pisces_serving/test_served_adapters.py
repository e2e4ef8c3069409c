"""`--adapter NAME=FOLDER`: served beside the base as MODEL:NAME, chosen request by request."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.modeling_pisces.console.test_adapter_flag import save_model_adapter
from tests.pisces_serving.serving_fixtures import Served


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    return save_model_adapter(checkpoint, tmp_path_factory.mktemp("adapters") / "words")


def test_base_and_adapter_answer_side_by_side_and_never_share_a_batch(checkpoint, served, folder):
    found = Served(checkpoint, adapters=(("emoji", str(folder)),), served_name="mine", batch_wait_ms=200)
    assert [card["id"] for card in found.ask("/v1/models").json()["data"]] == ["mine", "mine:emoji"]
    names = ["mine", "mine:emoji", None, "mine:emoji"]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda name: found.draw("red", seed=3, model=name).json(), names))
    found.close()
    base, adapted, unnamed, again = (answer["data"][0]["b64_json"] for answer in answers)
    assert base == unnamed == served.draw("red", seed=3).json()["data"][0]["b64_json"]
    assert adapted == again != base
    assert [answer["model"] for answer in answers] == ["mine", "mine:emoji", "mine", "mine:emoji"]


def test_an_adapter_given_as_the_model_brings_its_base_along(checkpoint, folder, capsys):
    found = Served(folder, start=False)
    assert list(found.server.models) == [checkpoint.name, f"{checkpoint.name}:{folder.name}"]
    assert "its base" in capsys.readouterr().err


def test_a_folder_that_is_no_adapter_is_named_before_anything_is_loaded(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="no adapter"):
        Served(checkpoint, adapters=(("x", str(tmp_path)),), start=False)
