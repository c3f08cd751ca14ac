"""A small disk of its own for runs to fail on: it can be filled, and go read-only under them."""

import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

SIZE_MB = 64


class Disk:
    """An ext4 image in a loop mount (root); elsewhere a folder, which can do neither."""

    def __init__(self, place: Path) -> None:
        self.path, self.image = place / "disk", place / "disk.img"
        self.filler = self.path / "filler"
        self.path.mkdir(parents=True)
        self.real = os.geteuid() == 0 and shutil.which("mkfs.ext4") is not None
        if self.real:
            with open(self.image, "wb") as file:
                file.truncate(SIZE_MB * 2**20)
            _run("mkfs.ext4", "-q", "-m", "0", self.image)
            self._mount()

    def fill(self, left_kb: int) -> None:
        """Leave this much room."""
        with open(self.filler, "wb") as file, suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(2**16))
        os.truncate(self.filler, max(0, self.filler.stat().st_size - left_kb * 1024))

    def break_down(self) -> None:
        """As an error of the device does it: open files can no longer be written either."""
        device = _run("findmnt", "--noheadings", "--output", "SOURCE", self.path).strip()
        Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error").write_text("1")

    def mend(self) -> None:
        """Make it usable again; nothing may be running on it."""
        self.filler.unlink(missing_ok=True)

    def repair(self) -> None:
        """What an administrator does after it broke down."""
        self.close()
        subprocess.run(["e2fsck", "-p", "-f", self.image], capture_output=True, timeout=60)
        self._mount()

    def close(self) -> None:
        if not self.real:
            return
        for _ in range(50):  # a process that was just killed may still hold it
            if subprocess.run(["umount", self.path], capture_output=True).returncode == 0:
                return
            time.sleep(0.1)
        _run("umount", "--lazy", self.path)

    def _mount(self) -> None:
        _run("mount", "-o", "loop,errors=remount-ro", self.image, self.path)


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
