"""Uploading a model folder to the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from atp.ground.errors import InputError, is_disk_full, reason
from atp.ground.places import refuse_no_model, run_of

_TOKEN = "HF_TOKEN"


def model_files(source: Path) -> tuple[Path, list[Path]]:
    """The model folder of a run folder, or the folder itself, and its files in rising order.

    Raises `InputError` for a folder that holds no whole model, because half of one would be uploaded.
    """
    if run_of(str(source)) is not None:
        refuse_no_model(str(source))  # a run that has none yet says where it stands
    folder = source / "model" if (source / "model").is_dir() else source
    missing = [name for name in ("config.json", "README.md") if not (folder / name).is_file()]
    if missing or not list(folder.glob("*.safetensors")):
        what = " and ".join(missing) or "no weights in safetensors"
        raise InputError(f"{folder} lacks {what}, so it is not pushed: give a finished run or a model folder")
    return folder, sorted(path for path in folder.rglob("*") if path.is_file())


def push(source: Path, repository: str, *, private: bool = True) -> str:
    """Uploads a model folder and returns its address. The repository is made if there is none.

    The token comes from the environment (HF_TOKEN) alone. Raises `InputError` for a wrong name, without a token, and
    for whatever the Hub refuses.
    """
    folder, _ = model_files(source)
    check_name(repository)
    token = os.environ.get(_TOKEN, "").strip()  # a line break would be refused by name, with the token
    if not token:
        raise InputError(f"{_TOKEN} is not set: export a token of the Hub with the right to write, then push again")
    hub = HfApi(token=token)
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="A model cut by ATP"))
    except (HfHubHTTPError, OSError) as error:
        if is_disk_full(error):  # of this machine, where the Hub's client keeps what it is about to send
            raise
        raise InputError(f"the Hub did not take {repository} ({reason(error)}): check name and token") from error


def check_name(repository: str) -> None:
    """Raises `InputError` unless the text is OWNER/NAME as the Hub allows it."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"'{repository}' is no name on the Hub ({reason(error)}): give OWNER/NAME") from error
    if "/" not in repository:
        raise InputError(f"'{repository}' names no owner: give OWNER/NAME")
