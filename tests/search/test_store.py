from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import _dir_travel
from tiny import make_spec

from search.errors import UserError
from search.ledger import Ledger
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


def test_a_name_is_free_until_a_search_of_it_has_a_trial(tmp_path: Path) -> None:
    loaded = load_spec(make_spec(tmp_path, name="mine"))
    store = Store.create(loaded)
    store.check_free()
    ledger = Ledger(store.ledger_path)
    ledger.append("search_started", name="mine")
    again = Store.create(loaded)
    assert again.state().started is None, "it never came to a trial"
    Ledger(again.ledger_path).append("trial_started", number=0, params={}, config=None)
    for refused in (again.check_free, lambda: Store.create(loaded)):
        with pytest.raises(UserError, match=r"a search named 'mine' is in .* already: go on with `paretune resume mine"):
            refused()


def test_a_new_directory_of_searches_is_left_out_of_git_and_of_what_ray_uploads_and_an_old_one_is_left_alone(tmp_path: Path) -> None:
    loaded = load_spec(make_spec(tmp_path, name="mine"))
    runs = Path(loaded.spec.directory)
    store = Store.create(loaded)
    (store.root / "weights.bin").write_bytes(b"0" * 1000)
    (tmp_path / "mine.py").write_text("pass")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    found = subprocess.run(["git", "-C", str(tmp_path), "status", "--short", "-uall"], check=True, capture_output=True, text=True)
    assert "mine.py" in found.stdout
    assert runs.name not in found.stdout
    uploaded: list[str] = []
    _dir_travel(tmp_path, [], lambda path: uploaded.append(path.name), include_gitignore=True)
    assert "mine.py" in uploaded
    assert "weights.bin" not in uploaded
    (tmp_path / "old").mkdir()
    Store.create(load_spec(make_spec(tmp_path, name="other"), [f"directory={tmp_path / 'old'}"]))
    assert not (tmp_path / "old" / ".gitignore").exists()
