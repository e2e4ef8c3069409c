"""Runs transformers' own common tests on our classes: `python tests/mixins/run_mixins.py [--source PATH] [pytest arguments]`.

The mixins (`ModelTesterMixin`, `ConfigTester`, `ProcessorTesterMixin`) are not in the transformers wheel but in its source
distribution, so they are as new as the installed version and need no clone. This script copies the common files next
to our tester classes (`mixin_*.py` in this folder) and hands them to pytest. It is no part of `make test`: it takes
minutes and, without `--source`, downloads 11 MB. Remaining failures are explained one by one in docs/log.md.

A source distribution holds a part of the tests only. With `--source` at a checkout of the transformers repository that
fits the installed version, the tests of generation, of the pipelines and of vision-language models run too.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers
from PIL import Image


HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
# folders beside the common files that only a checkout has
CHECKOUT_FOLDERS = ("exporters", "generation", "pipelines")
# our files that need more than the source distribution, and what they need
NEEDS_CHECKOUT = {
    "mixin_pipelines_pisces.py": "pipelines/test_pipelines_common.py",
    "mixin_vlm_pisces.py": "vlm_tester.py",
}
PICTURE = "tests/fixtures/tests_samples/COCO/000000039769.png"  # what the pipeline tests open; any picture does
# what the common files import, but the source distribution lacks; none of it is about our classes
STUBS = {
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n\nclass ExportGenerateTesterMixin:\n    pass\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "tests/utils/tiny_model_summary.json": "{}\n",
    "utils/fetch_hub_objects_for_ci.py": """
import tempfile
from PIL import Image

def url_to_local_path(url):
    '''A made-up picture for every picture address: the tests run offline.'''
    if not url.endswith((".png", ".jpg", ".jpeg")):
        return url
    path = tempfile.mktemp(suffix=".png")
    Image.effect_noise((64, 48), 90).convert("RGB").save(path)
    return path
""",
}


def find_source(source: str | None, cache: Path, package: str, version: str, needed: str) -> Path:
    """The unpacked source distribution: a folder, an archive, or a download for the installed version.

    Args:
        source: what the user gave.
        cache: where downloads are kept.
        package, version: what is downloaded when nothing was given.
        needed: a file that the source distribution must hold.

    Raises:
        ValueError: the path holds no source distribution with that file.
    """
    if source is None:
        archive = cache / f"{package}-{version}.tar.gz"
        if not archive.exists():
            print(f"downloading the source distribution of {package} {version} ...", flush=True)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
            command += ["--no-binary", ":all:", "--dest", str(cache), f"{package}=={version}"]
            subprocess.run(command, check=True)
    else:
        archive = Path(source)
    if archive.is_file():
        with tarfile.open(archive) as contents:
            contents.extractall(cache, filter="data")
        archive = cache / archive.name.removesuffix(".tar.gz")
    if not (archive / needed).exists():
        raise ValueError(
            f"{archive} has no {needed}. Give --source a checkout of {package}, or the folder or .tar.gz of a source "
            "distribution, or leave it out to download the one that fits."
        )
    return archive


def lay_out(source: Path, folder: Path) -> Path:
    """Common tests, stubs and our tester classes in the places where the relative imports look; returns our tests."""
    tests = folder / "tests"
    ours = tests / "models" / "pisces"
    ours.mkdir(parents=True)
    for path in (source / "tests").glob("*.py"):
        shutil.copy(path, tests / path.name)
    for name in CHECKOUT_FOLDERS:
        if (source / "tests" / name).is_dir():
            shutil.copytree(source / "tests" / name, tests / name)
    if (source / "utils" / "test_module").is_dir():  # the pipelines' tests import it
        shutil.copytree(source / "utils" / "test_module", folder / "utils" / "test_module")
    for name, text in STUBS.items():
        path = folder / name
        if name.startswith("tests/") and path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for path in HERE.glob("mixin_*.py"):
        needed = NEEDS_CHECKOUT.get(path.name)
        if needed is None or (tests / needed).exists():
            shutil.copy(path, ours / path.name.replace("mixin_", "test_", 1))
        else:
            print(f"left out: {path.name} needs tests/{needed}, which only a checkout of transformers has (--source)")
    for package in {path.parent for path in tests.rglob("*.py")} | {ours.parent}:
        (package / "__init__.py").touch()
    # some common tests look for the package's sources beside the tests
    (folder / "src").mkdir()
    (folder / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    (folder / PICTURE).parent.mkdir(parents=True)
    Image.effect_noise((64, 48), 90).convert("RGB").save(folder / PICTURE)
    return ours


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--source",
        help="checkout, folder or .tar.gz of a transformers source distribution; default: download the last",
    )
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".mixins", help="where downloads are kept")
    args, pytest_arguments = parser.parse_known_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    try:
        needed = "tests/test_modeling_common.py"
        source = find_source(args.source, args.cache, "transformers", transformers.__version__, needed)
    except ValueError as error:
        print(f"run_mixins: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        ours = lay_out(source, Path(folder))
        search_path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": search_path}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--disable-warnings", str(ours)]
        command += pytest_arguments
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
