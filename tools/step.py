"""Runs a step of the Makefile, and says every few seconds how far it is.

    python tools/step.py TITLE COMMAND...

What the command prints is kept, and shown if it fails; but for lines of fastvae's own, which are
shown at once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from typing import Any

EVERY = 5.0  # seconds


class Progress:
    """What a command printed, and what the last of it says."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done = self.total = 0  # files that compilers were called for

    def add(self, line: str) -> None:
        self.lines.append(line)
        if count := re.match(r"\[(\d+)/(\d+)\] ", line):  # ninja's
            self.done += 1
            self.total += int(count[2]) if count[1] == "1" else 0
        if line.startswith("fastvae: "):
            print(line, end="", flush=True)

    def __str__(self) -> str:
        if self.total:
            return f"{self.done} of {self.total} files compiled"
        return self.lines[-1].strip()[:90] if self.lines else ""


def run(title: str, *command: str, **options: Any) -> tuple[int, str]:
    """The exit status of a command and what it printed. The options are `subprocess.Popen`'s."""
    begin, progress, ended = time.monotonic(), Progress(), threading.Event()

    def say(text: str) -> None:
        print(f"{title}: {time.monotonic() - begin:.0f} s, {text}", flush=True)

    def watch() -> None:
        while not ended.wait(EVERY):
            say(str(progress))

    print(f"{title} ...", flush=True)
    options["env"] = {**(options.get("env") or os.environ), "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        **options,
    )
    threading.Thread(target=watch, daemon=True).start()
    try:
        assert child.stdout is not None
        for line in child.stdout:
            progress.add(line)
        status = child.wait()
    except KeyboardInterrupt:  # which the command was sent too
        child.wait()
        status = 130
    ended.set()
    output = "".join(progress.lines)
    if status:
        sys.stderr.write(output)
    say(f"failed with status {status}" if status else "done")
    return status, output


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:])[0])
