from __future__ import annotations

import subprocess
import sys


def test_importing_data_loads_no_optional_library():
    code = (
        "import sys, thintune.data; "
        "print([m for m in ('torchvision', 'PIL', 'sklearn', 'scipy', 'timm') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
