"""`pisces serve` as a process of its own: started, watched, and ended."""

import os
import subprocess
import sys
import threading
from pathlib import Path


class ServerProcess:
    """A server on a free port; `said` are its lines on standard error."""

    def __init__(self, model: str, threads: int, *flags: str):
        command = [sys.executable, "-W", "ignore", "-m", "pisces_commands.console", "serve", "--model", model]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [*command, "--port", "0", *flags], stderr=subprocess.PIPE, text=True, env=environment
        )
        self.said: list[str] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            with self._changed:
                self.said.append(line.rstrip())
                self._changed.notify_all()

    def wait_for(self, words: str, times: int = 1, timeout_s: float = 300) -> str:
        """The line that has the words.

        Raises:
            ValueError: it was not said in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._count(words) >= times, timeout=timeout_s):
                raise ValueError(f"the server did not say {words!r} in {timeout_s} s; it said: {self.said}")
            return [line for line in self.said if words in line][-1]

    def _count(self, words: str) -> int:
        return sum(words in line for line in self.said)

    @property
    def address(self) -> str:
        """http://host:port/v1, once it is ready."""
        return self.wait_for("ready at ").split()[-1]

    @property
    def child(self) -> int:
        """The process that has the model."""
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()[0])

    def memory_mib(self) -> float:
        """Resident memory of the process that has the model."""
        pages = int(Path(f"/proc/{self.child}/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def cpu_s(self) -> float:
        """Processor time of that process so far, all threads."""
        words = Path(f"/proc/{self.child}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> int:
        """SIGTERM, and its exit code."""
        self.process.terminate()
        return self.process.wait(120)


__all__ = ["ServerProcess"]
