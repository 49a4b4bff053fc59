"""The standing search: `python -m tests.zoo [minutes]`, an hour if nothing is said.

Draws anew until the time is over or something is found, and says how to see it again.
"""

import subprocess
import sys
import tempfile
import time

EXAMPLES = 60  # of each test in one go; as the profile "search" in tests/conftest.py says


def main() -> int:
    """Search; returns 1 if something was found."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    ends, goes = time.monotonic() + 60 * minutes, 0
    first = int(time.time()) % 10**6
    while time.monotonic() < ends:
        seed = first + goes
        command = [
            sys.executable, "-m", "pytest", "-q", "-x", "tests/zoo/test_search.py",
            "--hypothesis-profile=search", f"--hypothesis-seed={seed}", "--show-capture=no",
        ]  # fmt: skip
        # pytest clears away what its other sessions have left, also while they go on
        with tempfile.TemporaryDirectory(prefix="fedsim-zoo-") as own:
            ended = subprocess.run(
                [*command, f"--basetemp={own}/go"], capture_output=True, text=True, check=False
            )
        if ended.returncode:
            print(ended.stdout[-6000:], ended.stderr[-2000:])
            print("found; again by:", " ".join(command[1:]))
            return 1
        goes += 1
        print(f"go {goes}, seed {seed}: nothing found; {ends - time.monotonic():.0f} s left",
              flush=True)  # fmt: skip
    print(f"nothing found in {minutes:g} minutes, {goes} goes of {EXAMPLES} examples of each test")
    return 0


if __name__ == "__main__":
    sys.exit(main())
