from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_spec

from search.errors import UserError
from search.store import Store
from spaces.loading import load_spec

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
    with pytest.raises(UserError, match="runs already"), store.lock():
        pass
    other.kill()
    other.wait()
    with store.lock():
        pass
    with store.lock():
        pass


def test_another_search_of_a_name_that_is_about_to_begin_does_not_change_its_spec(tmp_path: Path) -> None:
    first = load_spec(make_spec(tmp_path, name="mine"))
    store = Store.create(first)
    before = store.spec_path.read_bytes()
    with store.lock(), pytest.raises(UserError, match="runs already"):
        Store.create(load_spec(make_spec(tmp_path, name="mine", space={"epochs": 7})))
    assert store.spec_path.read_bytes() == before
