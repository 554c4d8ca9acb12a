"""What several test files share."""
import os
from pathlib import Path

import pytest


def asset(name):
    folder = os.environ.get('NANOSEEK_ASSETS')
    if not folder or not (Path(folder) / name).exists():
        pytest.skip(f'$NANOSEEK_ASSETS/{name} is not there')
    return str(Path(folder).resolve() / name)
