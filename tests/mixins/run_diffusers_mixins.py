"""Runs diffusers' own common pipeline tests on `PiscesPipeline`: `python tests/mixins/run_diffusers_mixins.py --source PATH`.

The mixins (`PipelineTesterMixin` and its kin) are neither in diffusers' wheel nor in its source distribution, which
holds a single file of tests (checked: 0.42.1). So this script takes them from a checkout of the repository, or from
the archive that its release page offers. It copies them beside our tester class (`diffusers_pipeline.py` in this
folder) and hands that to pytest. Without `--source` it says where the tests are, and runs nothing.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import diffusers


HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
WHERE = (
    "diffusers' common pipeline tests come with its repository only. Get the release that is installed, "
    f"git clone --depth 1 --branch v{diffusers.__version__} https://github.com/huggingface/diffusers, and pass its "
    "folder: --source diffusers (make test-mixins DIFFUSERS=diffusers)."
)
# what the common tests import for IP-Adapters, which this pipeline does not have; the real files need more packages
STUBS = {
    "models/transformers/test_models_transformer_flux.py": "create_flux_ip_adapter_state_dict = None\n",
    "models/unets/test_models_unet_2d_condition.py": (
        "create_ip_adapter_faceid_state_dict = create_ip_adapter_state_dict = None\n"
    ),
}


def find_source(source: Path, folder: Path) -> Path:
    """The root of a checkout: a folder, or a .tar.gz of one, which is unpacked into `folder`.

    Raises:
        ValueError: the common tests are not in it.
    """
    if source.is_file():
        with tarfile.open(source) as contents:
            contents.extractall(folder, filter="data")
        source = next((path for path in folder.iterdir() if path.is_dir()), folder)
    if not (source / "tests" / "pipelines" / "test_pipelines_common.py").is_file():
        raise ValueError(f"{source} has no tests/pipelines/test_pipelines_common.py. {WHERE}")
    return source


def version_of(source: Path) -> str | None:
    setup = source / "setup.py"
    found = re.search(r'version="([^"]+)"', setup.read_text(encoding="utf-8")) if setup.is_file() else None
    return found and found[1]


def lay_out(source: Path, folder: Path) -> Path:
    """The common tests, what they import, and our tester class; returns the file to run.

    The package is called `diffusers_tests`, because our tester class also needs our own `tests`.
    """
    tests = folder / "diffusers_tests"
    ours = tests / "pipelines" / "pisces"
    ours.mkdir(parents=True)
    for pattern in ("testing_utils.py", "pipelines/*.py", "models/autoencoders/vae.py"):
        for path in (source / "tests").glob(pattern):
            target = tests / path.relative_to(source / "tests")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    for name, text in STUBS.items():
        (tests / name).parent.mkdir(parents=True, exist_ok=True)
        (tests / name).write_text(text, encoding="utf-8")
    for package in {path.parent for path in tests.rglob("*.py")} | {tests, tests / "models", ours}:
        (package / "__init__.py").touch()
    return Path(shutil.copy(HERE / "diffusers_pipeline.py", ours / "test_pisces.py"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--source", type=Path, help="checkout of diffusers, or a .tar.gz of one")
    args, pytest_arguments = parser.parse_known_args()
    if args.source is None:
        print(f"run_diffusers_mixins: nothing run. {WHERE}")
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            source = find_source(args.source, folder)
        except ValueError as error:
            print(f"run_diffusers_mixins: {error}", file=sys.stderr)
            return 2
        if (found := version_of(source)) != diffusers.__version__:
            print(
                f"run_diffusers_mixins: tests of diffusers {found}, installed is {diffusers.__version__}", flush=True
            )
        ours = lay_out(source, folder)
        search_path = os.pathsep.join([str(folder), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": search_path}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--disable-warnings", "-rs"]
        command += ["--rootdir", str(folder), str(ours), *pytest_arguments]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
