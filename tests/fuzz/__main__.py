"""Random cases by the thousand, from the command line; each failure is printed with the seed that repeats it.

python -m tests.fuzz --surface processor,images --seeds 5000 --start 0
"""

import argparse
import time

from tests.fuzz import images, outcomes, processor


SURFACES = {"images": images.make_case, "processor": processor.make_case}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--surface", default=",".join(SURFACES), help=f"some of {', '.join(SURFACES)}, by commas")
    parser.add_argument("--seeds", type=int, default=1000, help="cases of each surface")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--kinds", action="store_true", help="count by kind of case too")
    arguments = parser.parse_args()
    num_failures = 0
    for surface in arguments.surface.split(","):
        if surface not in SURFACES:
            parser.error(f"--surface {surface}: expected some of {', '.join(SURFACES)}.")
        start = time.monotonic()
        counts, failures = outcomes.run(SURFACES[surface], range(arguments.start, arguments.start + arguments.seeds))
        totals = {
            name: sum(n for (_, found), n in counts.items() if found == name)
            for name in ("right", "refused", "failure")
        }
        print(f"{surface}: {totals} in {time.monotonic() - start:.0f} s")
        if arguments.kinds:
            for (kind, outcome), number in sorted(counts.items()):
                print(f"  {kind:24} {outcome:8} {number}")
        for failure in failures[:50]:
            print(f"  seed {failure.seed} ({failure.name}): {failure.problem[:400]}")
        num_failures += len(failures)
    return int(num_failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
