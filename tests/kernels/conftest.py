"""Makes the helper modules here importable under pytest's importlib mode, and checks where kernels read and write."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from bounds import check_accesses
from triton import knobs

from tests.interpreting import hasten, steady_products

if knobs.runtime.interpret:
    check_accesses()
    hasten()
    steady_products()
