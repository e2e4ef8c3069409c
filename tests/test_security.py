"""Claims about SECURITY.md: each promise is held by tests that exist, and the one that needs a test of its own."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "SECURITY.md"


def promises() -> list[str]:
    """The points of the first list, each with the tests below it."""
    listed = PAGE.read_text(encoding="utf-8").split("## Promised")[1].split("\n## ")[0]
    return re.split(r"^- ", listed.split('"Refused" means')[0], flags=re.MULTILINE)[1:]


def test_every_promise_names_tests_and_every_test_exists():
    assert len(promises()) >= 12
    for row in promises():
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, name in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (file, name)


CHILD = """
import sys
from pathlib import Path

try:
    import urllib3.util.connection  # binds to ::1 once, to learn whether this machine has IPv6
except ImportError:
    pass
found = []
sys.addaudithook(lambda event, args: found.append((event, args[:2])) if event.startswith("socket.") else None)
import modeling_pisces
from modeling_pisces import PiscesConfig, PiscesForConditionalGeneration
from modeling_pisces.checkpoint.loading import load_pipeline
from tests.fixtures import make_config, make_model, make_processor

make_model(), make_processor(), PiscesConfig()
load_pipeline(Path(sys.argv[1]), "cpu")
print([one for one in found if one[0] in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind")])
"""


def test_building_and_loading_from_a_folder_open_no_connection(tmp_path):
    pytest.importorskip("diffusers")
    from tests.checkpoint_folder import write_checkpoint

    folder = write_checkpoint(tmp_path / "checkpoint")
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "[]"
