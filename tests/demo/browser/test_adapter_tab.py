"""The adapter's tab in the browser: side by side on the same seeds; and what it says where there is none."""

import numpy as np
import pytest

from pisces_demo.model import DemoModel
from tests.demo.browser.conftest import TINY
from tests.demo.browser.visitor import is_drawn, is_free, serve, slowed
from tests.modeling_pisces.console.test_adapter_flag import save_model_adapter


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return DemoModel.load(str(TINY), [str(save_model_adapter(TINY, tmp_path_factory.mktemp("adapters") / "mine"))])


@pytest.fixture(scope="module")
def adapted_address(adapted):
    with serve(adapted) as url:
        yield url


@pytest.fixture
def comparer(new_visitor, adapted_address):
    visitor = new_visitor(adapted_address)
    visitor.go_to("Adapter")
    return visitor


def test_without_an_adapter_the_tab_says_how_to_name_and_how_to_train_one(visitor):
    visitor.go_to("Adapter")
    visitor.page.locator("#no-adapter").wait_for()
    text = visitor.text("no-adapter")
    assert "python demo/app.py --adapter FOLDER_OR_ID" in text and "finetune.lora_generation" in text


def test_the_same_seeds_are_drawn_without_and_with_the_adapter(comparer, model):
    assert "mine" in comparer.text("adapter-facts") and "language model: LORA" in comparer.text("adapter-facts")
    comparer.fill("compare-seed", 5)
    comparer.click("compare")
    comparer.wait_for_text("compare-status", "4 pictures, seeds 5 to 6, in ")
    comparer.wait_for_pictures("without", 2)
    comparer.wait_for_pictures("with", 2)
    without, with_adapter = comparer.pictures("without"), comparer.pictures("with")
    *_, base = model.draw("a red circle", 2, 5, model.default_steps, model.default_guidance)
    assert all(np.array_equal(a, np.asarray(b)) for a, (b, _) in zip(without, base.pictures, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(without, with_adapter, strict=True))
    assert all(is_drawn(pixels) for pixels in without)
    for name in ("without", "with"):
        assert comparer.page.locator(f"#{name}").get_by_text("seed 6").count() == 1


def test_a_stop_while_the_adapter_is_off_leaves_it_on(comparer, adapted):
    *_, before = adapted.draw("a red circle", 1, 5, 2, 1)
    with slowed(adapted.pipeline.unet, 0.3):
        comparer.click("compare")
        comparer.wait_for_text("compare-status", "without the adapter, seed 0: step")
        comparer.click("compare-stop")
        comparer.wait_for_text("compare-status", "stopped")
        assert is_free(adapted)
    *_, after = adapted.draw("a red circle", 1, 5, 2, 1)
    assert after.pictures[0][0].tobytes() == before.pictures[0][0].tobytes()


def test_the_title_names_the_adapter_that_all_tabs_use(comparer):
    assert "adapter: mine" in comparer.text("title")
