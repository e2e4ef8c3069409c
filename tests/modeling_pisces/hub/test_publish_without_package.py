"""A pushed adapter loads by its name where the package is not installed: the base's own code and weights come with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from modeling_pisces.checkpoint.loading import load_model
from pisces_commands.console import main
from tests.checkpoint_folder import write_checkpoint
from tests.hub_server import local_hub


pytest.importorskip("diffusers")
BASE, MINE = "someone/base", "someone/mine"
CHILD = """
import json, sys
sys.path.insert(0, {root!r})
from tests.remote_code_child import PackageBlocker
sys.meta_path.insert(0, PackageBlocker())
sys.path.remove({root!r})
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor
torch.set_num_threads(1)
model, report = AutoModelForMultimodalLM.from_pretrained({mine!r}, trust_remote_code=True, output_loading_info=True)
processor = AutoProcessor.from_pretrained({mine!r}, trust_remote_code=True)
wish = processor(text=["a box"], generation_mode="image", return_tensors="pt")
torch.manual_seed(3)
with torch.no_grad():
    vectors = model.eval().generate(**wish, generation_mode="image")
kinds = [type(model).__module__, type(processor).__module__]
missing = sorted(map(str, report["missing_keys"]))
print("RESULT" + json.dumps({{"vectors": vectors.tolist(), "kinds": kinds, "missing": missing}}))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """What a process without the package makes of the name, and what the package makes of the folders."""
    place = tmp_path_factory.mktemp("published")
    base, folder = write_checkpoint(place / "base"), place / "mine"
    model, processor = load_model(base)
    options = {"target_modules": r"model\.language_model\..+\.(q_proj|v_proj)"}
    if not transformers.__version__.startswith("5.16."):  # which leaves an adapter's whole copies out there
        options["modules_to_save"] = ["gen_projector", "gen_head"]
    adapted = get_peft_model(model, LoraConfig(r=4, **options))
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    processor.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch, local_hub(patch, place / "cache") as hub:
        patch.setenv("HF_TOKEN", "none")
        assert main(["push", str(base), "--repo", BASE, "--license", "mit"]) == 0
        assert main(["push", str(folder), "--repo", MINE, "--base", BASE, "--license", "mit"]) == 0
        found = run_child(place / "child", hub.url)
    expected, processor = load_model(base)
    expected = PeftModel.from_pretrained(expected, folder).eval()
    wish = processor(text=["a box"], generation_mode="image", return_tensors="pt")
    torch.manual_seed(3)
    with torch.no_grad():
        vectors = expected.generate(**wish, generation_mode="image")
        with expected.disable_adapter():
            torch.manual_seed(3)
            plain = expected.generate(**wish, generation_mode="image")
    return found, vectors, plain


def run_child(work, url):
    work.mkdir()
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "TRANSFORMERS_"))
    }
    kept |= {"HF_HOME": str(work / "home"), "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "none"}
    child = CHILD.format(root=str(Path(__file__).parents[3]), mine=MINE)
    done = subprocess.run([sys.executable, "-I", "-c", child], cwd=work, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.split("RESULT")[1])


def test_a_pushed_adapter_draws_by_its_name_where_the_package_is_not_installed(published):
    found, expected, plain = published
    drawn = torch.tensor(found["vectors"])
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)
    assert float((drawn - plain).abs().max()) > 1e-2
    assert found["missing"] == []
    assert [kind.split(".")[0] for kind in found["kinds"]] == ["transformers_modules"] * 2
