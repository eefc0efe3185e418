"""Sharing a run's result on the Hugging Face hub: what is needed is checked first, only results go up."""

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.utils import HFValidationError, validate_repo_id

logger = logging.getLogger(__name__)

# Everything else stays at home: checkpoints, logs, error.txt.
SHARED = (
    "README.md",
    "config.yaml",
    "evaluation.json",
    "ema/pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.safetensors",
    "samples/*.png",
    "samples/pictures.json",
)


@dataclass(frozen=True)
class HubTarget:
    """Where a result goes.

    Attributes:
        repo_id: `owner/name` of a model repository.
        private: whether the repository is made private; an existing one stays as it is.
    """

    repo_id: str
    private: bool


def check_hub(model_id: str, *, private: bool) -> HubTarget:
    """Make sure, before a run, that its result can be uploaded after it.

    Args:
        model_id: `owner/name`, or `name` in the user's own namespace.
        private: see `HubTarget`.

    Raises:
        ValueError: if the hub is switched off or doesn't answer, the token is missing or can't write, or
            the name isn't one.
    """
    try:
        validate_repo_id(model_id)
    except HFValidationError as error:
        raise ValueError(f"--hub_model_id {model_id!r} is no repository name: {error}") from error
    if is_offline_mode():
        raise ValueError("--push_to_hub needs the hub, but HF_HUB_OFFLINE is set: unset it or don't push")
    if get_token() is None:
        raise ValueError("--push_to_hub needs a token: run `hf auth login`, or set HF_TOKEN")
    try:
        user = HfApi().whoami()
    except Exception as error:  # the client raises those of several libraries
        raise ValueError(
            f"--push_to_hub: the hub doesn't say whose token this is ({_first_line(error)}): run `hf auth "
            "login`, check HF_TOKEN and the network, or don't push"
        ) from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError("--push_to_hub needs a token that may write, this one reads: run `hf auth login`")
    return HubTarget(model_id if "/" in model_id else f"{user['name']}/{model_id}", private)


def upload(target: HubTarget, folder: Path) -> str | None:
    """Upload the LoRA, its card, its pictures and its settings, and nothing else in `folder`.

    Returns:
        The address of the repository; None if it failed: a line in the log says how to upload later.
    """
    api = HfApi()
    try:
        address = api.create_repo(target.repo_id, private=target.private, exist_ok=True)
        api.upload_folder(
            repo_id=target.repo_id,
            folder_path=folder,
            allow_patterns=list(SHARED),
            commit_message="LoRA by Adjoint Matching",
        )
    except Exception as error:  # hours of training end here: nothing that the network does may undo them
        logger.error(
            "the upload failed (%s); nothing is lost, upload later with: %s",
            _first_line(error),
            upload_command(target, folder),
        )
        return None
    return str(address)


def upload_command(target: HubTarget, folder: Path) -> str:
    """The shell command that uploads what `upload` does."""
    command = ["hf", "upload", target.repo_id, str(folder.resolve()), "."]
    if target.private:
        command.append("--private")
    return shlex.join([*command, *(word for pattern in SHARED for word in ("--include", pattern))])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
