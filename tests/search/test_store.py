from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from search.store import Store, StoreError

HOLD = """
import sys
from pathlib import Path
from search.store import Store
with Store(root=Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_driver_a_search_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    store = Store(root=tmp_path)
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(StoreError, match="runs already"), store.lock():
        pass
    other.kill()
    other.wait()
    with store.lock():
        pass
    with store.lock():
        pass
