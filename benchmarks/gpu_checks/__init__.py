"""The checks of `gpu_check.py`: in each file generators of cases, `(name, function)`, that the script runs."""

import sys
from pathlib import Path

# plain forms of the losses, and trainers whose raw gradients can be read
sys.path.append(str(Path(__file__).parents[2] / "tests"))
