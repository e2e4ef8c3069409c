"""The page in the browser: `make web`, or `python demo/app.py --model FOLDER --adapter FOLDER`.

All of it lives in `pisces_demo`, which the wheel carries, because a Space needs it too.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere, with or without an installation

from pisces_demo.app import main


if __name__ == "__main__":
    main()
