"""What a rank looks at before it works: the code that runs, what an attempt left, and its node."""

import gc
import os
import socket
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from spd_core.run_dir import RunDir

if TYPE_CHECKING:
    from spd_core.distributed import Dist


def check_code() -> None:
    """The imported packages are the snapshot's, not what lies in another place of sys.path."""
    import spd_core

    code = Path(os.environ.get("SPD_CODE", Path(__file__).parent.parent)).resolve()
    for file in (__file__, spd_core.__file__):
        if not Path(str(file)).resolve().is_relative_to(code):
            raise RuntimeError(f"{file} was imported, which is not in the launch's code, {code}")


def drop_half_result() -> None:
    """Remove what a kill left of the file that tells submitit how this rank's last attempt ended.

    Submitit would refuse to write it again, and a run that has finished would be called failed.
    """
    if "SUBMITIT_FOLDER" in os.environ:
        from submitit import JobEnvironment

        result = JobEnvironment().paths.result_pickle
        result.with_name(f"{result.name}.save_tmp").unlink(missing_ok=True)


def load_torch() -> None:
    """Import what all runs need, without the search for garbage: all of it stays, and the search
    takes a fifth of the time of a rank's start.
    """
    gc.disable()
    import torch._dynamo  # noqa: F401  that of torch.optim, with its first step

    import spd_core.train  # noqa: F401

    gc.freeze()  # later searches leave all this out
    gc.enable()


def check_node(run_dir: RunDir, dist: "Dist") -> None:
    """Before any work: this rank's device answers, and its node can write to the run's folder.

    Raises:
        RuntimeError: it does not; with the name of the node, and how to keep away from it.
    """
    import torch

    try:
        torch.ones(64, 64, device=dist.device).sum().item()
        with TemporaryFile(dir=run_dir.path) as file:
            file.write(b"x")
    except (RuntimeError, OSError, AssertionError) as error:  # torch asserts that it has CUDA
        node = socket.gethostname()
        raise RuntimeError(
            f"{node} is not fit to train ({dist.device}): {error}; "
            f"on Slurm, python -m spd_launch.resume LAUNCH --exclude={node} goes on without it"
        ) from error
