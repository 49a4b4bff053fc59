"""`fedsim metrics` as a command."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments, code="from fedsim.cli import main; main()", **options):
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code, "metrics", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **options,
    )


def ended(*arguments, **options):
    process = command(*arguments, **options)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_it_serves_until_it_is_ended(tmp_path):
    process = command(tmp_path, "--listen", "127.0.0.1:0")
    try:
        said = process.stderr.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+/metrics", said)[0]
        with urllib.request.urlopen(url, timeout=20) as answer:
            assert b"fedsim_runs_found 0.0" in answer.read()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (143, "fedsim: terminated\n")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: no such folder"),
        ([".", "--listen", "9464"], "--listen 9464: must be HOST:PORT"),
        ([".", "--runs", "0"], "--runs 0: must be from 1 to 1000"),
    ],
)
def test_what_it_cannot_do_is_refused(words, said, tmp_path):
    code, out, err = ended(*words, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_without_prometheus_client_it_says_in_a_line_how_to_get_it(tmp_path):
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "class Without:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] == 'prometheus_client':\n"
        "            raise ModuleNotFoundError(name=name.partition('.')[0])\n"
        "del sys.modules['prometheus_client']; sys.meta_path.insert(0, Without())\n"
        "from fedsim.cli import main; main()"
    )
    found = ended(tmp_path, code=code)
    assert found == (
        2, "",
        "fedsim: prometheus_client is not installed: pip install 'fedsim-engine[metrics]'\n",
    )  # fmt: skip
