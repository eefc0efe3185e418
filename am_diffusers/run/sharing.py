"""The end of a run: its model card, and the upload to the Hugging Face hub, checked first."""

import json
import logging
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.utils import HFValidationError, validate_repo_id

from am_diffusers.config import Config
from am_diffusers.config.command_line import to_yaml
from am_diffusers.evaluation.held_out import Evaluation
from am_diffusers.methods import METHODS
from am_diffusers.models.family import Family
from am_diffusers.models.origin import Origin, TrainedReward, model_spec
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.run.card import CardFacts, Loading, write_card
from am_diffusers.run.plan import Plan
from am_diffusers.system.processes import Processes
from am_diffusers.system.text import redact

logger = logging.getLogger(__name__)

# Everything else stays on this machine: checkpoints, logs, error.txt.
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
    """Destination of a result on the hub.

    Attributes:
        repo_id: `owner/name` of a model repository.
        private: whether the repository is made private; an existing one stays as it is.
    """

    repo_id: str
    private: bool


def check_hub(model_id: str, *, private: bool) -> HubTarget:
    """Check, before a run, that its result can be uploaded after it.

    Args:
        model_id: `owner/name`, or `name` in the user's own namespace.
        private: see `HubTarget`.

    Raises:
        ValueError: if the hub is switched off or doesn't answer, the token is missing or can't write, or
            `model_id` is no name of a repository.
    """
    try:
        validate_repo_id(model_id)
    except HFValidationError as error:
        raise ValueError(f"--hub_model_id {model_id!r} is no owner/name: {error}") from error
    if is_offline_mode():
        raise ValueError("--push_to_hub needs the hub, but HF_HUB_OFFLINE is set: unset it or don't push")
    if get_token() is None:
        raise ValueError("--push_to_hub needs a token: run `hf auth login`, or set HF_TOKEN")
    try:
        user = HfApi().whoami()
    except Exception as error:  # the client raises errors of several libraries
        raise ValueError(
            f"--push_to_hub: the hub didn't confirm the token ({_first_line(error)}): run `hf auth "
            "login`, check HF_TOKEN and the network, or don't push"
        ) from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError("--push_to_hub needs a token with write access: run `hf auth login` with one")
    return HubTarget(model_id if "/" in model_id else f"{user['name']}/{model_id}", private)


def upload(target: HubTarget, folder: Path) -> str | None:
    """Upload the LoRA, its card, its images and its settings, and nothing else in `folder`.

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
    """Return the shell command that uploads what `upload` does."""
    command = ["hf", "upload", target.repo_id, str(folder.resolve()), "."]
    if target.private:
        command.append("--private")
    return shlex.join([*command, *(word for pattern in SHARED for word in ("--include", pattern))])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def hub_target(config: Config) -> HubTarget | None:
    """Return the destination of the result; None = it isn't uploaded.

    Raises:
        ValueError: if it can't be uploaded, see `check_hub`.
    """
    run = config.run
    if not run.push_to_hub:
        return None
    return check_hub(run.hub_model_id or Path(run.output_dir).resolve().name, private=run.hub_private_repo)


def make_sharing(
    plan: Plan, processes: Processes, target: HubTarget | None, family: Family
) -> Callable[[Evaluation | None], None]:
    """Return a function that writes the model card, then uploads; for the main process."""
    folder = Path(plan.config.run.output_dir)

    def share(evaluation: Evaluation | None) -> None:
        write_card(folder, card_facts(plan, target, family), evaluation)
        address = None if target is None else upload(target, folder)
        if address is not None:
            processes.accelerator.print(f"uploaded to {address}")

    return share


def about_lora(
    plan: Plan, family: Family, base_sha256: str, init_lora_sha256: Sequence[str] | None, iteration: int
) -> dict[str, str]:
    """Return what a LoRA file says of its run after so many iterations, as metadata.

    Args:
        plan: the run.
        family: family of its base model.
        base_sha256: `weights_sha256` of the base model.
        init_lora_sha256: `init_lora_hashes` of the run.
        iteration: optimizer steps taken.
    """
    config = plan.config
    model = config.model
    source = Pretrained(model.pretrained_model_name_or_path, model.revision, model.variant)
    origin = Origin(
        base_model=redact(model.pretrained_model_name_or_path),
        base_model_sha256=base_sha256,
        method=config.method.method,
        rewards=[TrainedReward(r.name, r.weight, r.mean, r.std) for r in config.method.rewards],
        divergence=config.shared.divergence,
        reward_scale=config.shared.scale,
        seed=config.run.seed,
        iteration=iteration,
        negative_prompt=redact(model.negative_prompt) if config.shared.rollout_guidance_scale > 1 else None,
        init_lora=redact(model.init_lora) if model.init_lora and model.init_lora_as_base else None,
        init_lora_sha256=init_lora_sha256,
    )
    spec = model_spec(
        architecture=family.architecture(source.config_of),
        title=redact(Path(config.run.output_dir).resolve().name),
        description=f"LoRA by {METHODS[config.method.method].title}: {origin.summary()}",
        resolution=model.size,
    )
    return origin.metadata() | spec


def card_facts(plan: Plan, target: HubTarget | None, family: Family) -> CardFacts:
    """Return the facts about a run for its model card."""
    config = plan.config
    base = config.model.pretrained_model_name_or_path
    is_hub_id = not Path(base).exists() and HUB_ID.fullmatch(base) is not None
    folder, method = Path(config.run.output_dir), METHODS[config.method.method]
    size = f"{config.optimizer.max_train_steps} iterations of {config.optimizer.train_batch_size} images"
    return CardFacts(
        title=folder.resolve().name if target is None else target.repo_id.split("/")[1],
        base_model=base,
        hub_base=base if is_hub_id else None,
        rewards=[f"{reward.name} (weight {reward.weight:g})" for reward in config.method.rewards],
        method=method.title,
        paper=method.paper,
        law=f"{size}{method.law(config.shared, config.settings)}.{_start(config)}",
        source=config.prompts.train_prompts,
        prompts=plan.train_prompts,
        settings=to_yaml(config),
        resolution=str(config.model.size),
        loading=_loading(plan, family, str(folder) if target is None else target.repo_id),
    )


def _start(config: Config) -> str:
    """Return a sentence on the LoRA that the run started from; empty without one."""
    if config.model.init_lora is None:
        return ""
    if config.model.init_lora_as_base:
        return " The LoRA `init_lora` was part of the base; this file contains it: load it alone."
    return " Training started from the LoRA `init_lora`."


def _loading(plan: Plan, family: Family, load_from: str) -> Loading:
    model, evaluation = plan.config.model, plan.config.evaluation
    options = {"revision": model.revision, "variant": model.variant}
    guided = evaluation.eval_guidance_scale > 1 and model.negative_prompt
    negative = {"negative_prompt": model.negative_prompt} if guided else {}
    source = {name: json.dumps(value) for name, value in options.items() if value is not None}
    if model.mixed_precision != "no":
        source["torch_dtype"] = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[model.mixed_precision]
    return Loading(
        pipeline=family.pipeline.__name__,
        # As in the README: a path in a checkout of this project.
        base=re.sub("^asset:", "am_diffusers/assets/", model.pretrained_model_name_or_path),
        base_options=source,
        load_from=load_from,
        subfolder="ema" if plan.config.optimizer.use_ema else None,
        prompt=plan.validation_prompts[0],
        call={
            "height": model.size.height,
            "width": model.size.width,
            "num_inference_steps": evaluation.eval_inference_steps,
            **family.call(evaluation.eval_guidance_scale, model.max_sequence_length),
            **negative,
        },
    )
