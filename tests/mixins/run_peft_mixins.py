"""Runs PEFT's own common tests on our model: `python tests/mixins/run_peft_mixins.py [--source PATH] [pytest arguments]`.

`PeftCommonTester` and the list of methods that it runs on decoders are not in PEFT's wheel but in its source
distribution, so they are as new as the installed version. This script copies three files of it next to
`peft_mixin_pisces.py` of this folder and hands them to pytest. It is no part of `make test`: it takes minutes and,
without `--source`, downloads 1 MB.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import peft
from run_mixins import HERE, REPOSITORY, find_source


COPIED = ("testing_common.py", "testing_utils.py", "test_decoder_models.py")


def lay_out(source: Path, folder: Path) -> Path:
    """PEFT's files and ours in one package; returns our file."""
    package = folder / "peft_tests"
    package.mkdir()
    for name in COPIED:
        shutil.copy(source / "tests" / name, package / name)
    (package / "__init__.py").touch()
    return Path(shutil.copy(HERE / "peft_mixin_pisces.py", package / "test_pisces.py"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--source", help="folder or .tar.gz of a PEFT source distribution; default: download it")
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".mixins", help="where downloads are kept")
    args, pytest_arguments = parser.parse_known_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    try:
        source = find_source(args.source, args.cache, "peft", peft.__version__, f"tests/{COPIED[0]}")
    except ValueError as error:
        print(f"run_peft_mixins: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        ours = lay_out(source, Path(folder))
        search_path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": search_path}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--disable-warnings", str(ours)]
        return subprocess.run(command + pytest_arguments, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
