"""The small program that ends a process group when its parent is gone."""

from __future__ import annotations

# It is started before the group and gets its number. Its standard input closes when the process that started it is
# gone, whatever ended that process. From then on it reads the group's output: a stage that writes into a pipe which
# nobody reads would die before it has saved its state.
GUARD = """
import os, signal, sys, threading, time
grace, output = float(sys.argv[1]), int(sys.argv[2])
signal.signal(signal.SIGINT, signal.SIG_IGN)
group = sys.stdin.buffer.readline()
def drain():
    while os.read(output, 65536):
        pass
if group.strip() and not sys.stdin.buffer.read(1):
    threading.Thread(target=drain, daemon=True).start()
    try:
        os.killpg(int(group), signal.SIGTERM)
        until = time.monotonic() + grace
        while time.monotonic() < until:
            os.killpg(int(group), 0)
            time.sleep(0.1)
        os.killpg(int(group), signal.SIGKILL)
    except ProcessLookupError:
        pass
"""
