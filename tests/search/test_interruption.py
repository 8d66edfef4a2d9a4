"""Signals to the driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from search.interruption import Interrupted, Interruption

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_noted_and_raised_where_it_is_asked_for(signum: signal.Signals, exit_code: int) -> None:
    before = signal.getsignal(signum)
    with Interruption("paretune resume mine") as interruption:
        interruption.check()
        os.kill(os.getpid(), signum)
        assert interruption.is_asked
        with pytest.raises(Interrupted, match=f"by {signum.name}; `paretune resume mine`") as raised:
            interruption.check()
    assert raised.value.exit_code == exit_code
    assert signal.getsignal(signum) is before


def test_the_second_signal_ends_the_process_at_once() -> None:
    code = (
        "import os, signal\n"
        "from search.interruption import Interruption\n"
        "with Interruption('paretune resume mine'):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('too late', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert done.stdout == "still here\n"
    assert "once more leaves at once" in done.stderr


@pytest.mark.parametrize("is_ended", [True, False])
def test_where_the_signal_ended_ray_too_the_process_does_not_wait_for_it(tmp_path: Path, is_ended: bool) -> None:
    """As `timeout` does, which sends it to the whole process group."""
    ray = tmp_path / "raylet"
    ray.symlink_to("/bin/sleep")
    code = (
        "import os, signal, subprocess, sys, time\n"
        "from search.interruption import Interruption\n"
        f"ray = subprocess.Popen(['{ray}', '60'])\n"
        "with Interruption('paretune resume mine') as interruption, interruption.following_ray():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        f"    {'ray.kill()' if is_ended else 'pass'}\n"
        f"    time.sleep({60 if is_ended else 2})\n"
        "ray.kill()\n"
        "print('saved', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (143 if is_ended else 0)
    assert done.stdout == ("" if is_ended else "saved\n")
    assert ("ended Ray too, so that nothing more was saved; `paretune resume mine` goes on" in done.stderr) == is_ended
