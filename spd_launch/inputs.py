"""What a run needs from outside, looked at before anything is sent: files, classes, hub names."""

import os
from pathlib import Path

from spd_core.config import config_digest
from spd_core.data.documents import WITHOUT_HUB, check_files
from spd_launch.config import JobConfig
from spd_launch.errors import LaunchError

HUB_TIMEOUT_S = 10


def check_inputs(config: JobConfig) -> None:
    """Look for what is not there, as far as that takes seconds; the run itself looks at the rest.

    Raises:
        LaunchError: a class, file or hub name that is not there, or a hub that cannot be reached.
    """
    target, data = config.target, config.data
    try:
        if target.kind == "custom":
            from spd_core.targets.train_target import load_class  # loads torch

            load_class(target.class_path)
            if target.pretrained is not None and target.class_path.startswith("transformers."):
                _check_name("target.pretrained", target.pretrained, "model", config)
        tokenised = config.launch.out_dir / "data" / config_digest(data)
        if data.kind != "text" or tokenised.is_dir():
            return
        if data.tokenizer is not None:
            _check_name("data.tokenizer", data.tokenizer, "model", config)
        match data.source:
            case "files":
                check_files(data)
            case "hub":
                assert data.path is not None
                _check_name("data.path", data.path, "dataset", config)
            case "stories":
                pass
    except LaunchError:
        raise
    except ValueError as error:  # the core's word for what a user asked wrongly
        raise LaunchError(str(error)) from None


def _check_name(field: str, name: str, kind: str, config: JobConfig) -> None:
    """Whether this is a folder, was downloaded, or is on the hub."""
    own_cache = any(key.startswith("HF_") for key in config.cluster.env)
    if own_cache or Path(name).expanduser().is_dir():
        return  # the jobs may know a hub, or a cache, that this machine does not
    from huggingface_hub import HfApi, constants, errors  # takes a second to import

    folder = f"{kind}s--{name.replace('/', '--')}"
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets"))
    downloaded = [Path(constants.HF_HUB_CACHE) / folder, prepared / name.replace("/", "___")]
    if any(path.is_dir() for path in downloaded):
        return
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=HUB_TIMEOUT_S)
    except errors.HFValidationError:
        problem = "there is no such folder, and names on the hub are OWNER/NAME"
    except errors.RepositoryNotFoundError:
        problem = f"{constants.ENDPOINT} has no such {kind} (or wants `hf auth login`)"
    # The base of its client's errors, whichever client this version has.
    except (errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]
        words = " ".join(str(error).split())
        problem = f"it is no folder, was not downloaded, and the hub cannot be reached: {words}"
    else:
        return
    raise LaunchError(f"{field}={name}: {problem}; {WITHOUT_HUB[field]}")
