"""`import modeling_pisces` against importing just what it takes from other packages, in fresh processes.

`python -m benchmarks.import_time --output results/import_time.json`. The baseline's imports are read from our own
files, so they cannot drift apart.
"""

import argparse
import ast
import subprocess
import sys
import time
from pathlib import Path

from pisces_commands.arguments import COUNT, LineParser
from pisces_commands.ending import run_command
from pisces_commands.measurement import paired, write_result


PACKAGE = Path(__file__).parents[1] / "modeling_pisces"


def loaded_files() -> list[Path]:
    """The files of the package that `import modeling_pisces` runs."""
    code = "import sys, modeling_pisces; print(*(m for m in sys.modules if m.startswith('modeling_pisces')))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    names = [name.partition(".")[2] or "__init__" for name in output.stdout.split()]
    return [PACKAGE / f"{name}.py" for name in names]


def third_party_imports(files: list[Path]) -> str:
    """Every import statement of these files that runs at import time and names another package."""
    statements = set()
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0):
                statements.add(ast.unparse(node))
    return "\n".join(sorted(statements))


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
    return time.perf_counter() - start


def main() -> None:
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="results file to write")
    parser.add_argument("--pairs", type=COUNT, default=7)
    arguments = parser.parse_args()
    baseline = third_party_imports(loaded_files())
    ours = "import sys, modeling_pisces; assert 'diffusers' not in sys.modules, 'diffusers was imported'"
    measured = paired(lambda: seconds(ours), lambda: seconds(baseline), arguments.pairs)
    write_result(arguments.output, "import_time", "ratio <= 1.10; diffusers not imported", measured)


if __name__ == "__main__":
    run_command(main)
