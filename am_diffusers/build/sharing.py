"""What becomes of a finished run: its model card, and the upload if that is wanted."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from am_diffusers.build.aims import LABELS, aim
from am_diffusers.config import Config
from am_diffusers.config.command_line import to_yaml
from am_diffusers.evaluation.held_out import Evaluation
from am_diffusers.hub import HubTarget, check_hub, upload
from am_diffusers.model_card import CardFacts, Loading, write_card
from am_diffusers.plan import Plan
from am_diffusers.system.processes import Processes

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def hub_target(config: Config) -> HubTarget | None:
    """Where the result will be uploaded; None = nowhere.

    Raises:
        ValueError: if it couldn't be, see `hub.check_hub`.
    """
    run = config.run
    if not run.push_to_hub:
        return None
    return check_hub(run.hub_model_id or Path(run.output_dir).resolve().name, private=run.hub_private_repo)


def find_target(config: Config, processes: Processes) -> HubTarget | None:
    """`hub_target` on the main process, None on the others; its failure is theirs."""
    found: list[HubTarget | None] = [None]

    def look() -> None:
        found[0] = hub_target(config)

    processes.on_main(look)
    return found[0]


def make_sharing(
    plan: Plan, processes: Processes, target: HubTarget | None
) -> Callable[[Evaluation | None], None]:
    """Writes the model card, then uploads; for the main process."""
    folder = Path(plan.config.run.output_dir)

    def share(evaluation: Evaluation | None) -> None:
        write_card(folder, card_facts(plan, target), evaluation)
        address = None if target is None else upload(target, folder)
        if address is not None:
            processes.accelerator.print(f"uploaded to {address}")

    return share


def card_facts(plan: Plan, target: HubTarget | None) -> CardFacts:
    """What the model card says of a run."""
    config = plan.config
    base = config.model.pretrained_model_name_or_path
    is_hub_id = not Path(base).exists() and HUB_ID.fullmatch(base) is not None
    folder, label = Path(config.run.output_dir), LABELS[config.method.method]
    return CardFacts(
        title=folder.resolve().name if target is None else target.repo_id.split("/")[1],
        base_model=base,
        hub_base=base if is_hub_id else None,
        rewards=[f"{reward.name} (weight {reward.weight:g})" for reward in config.method.rewards],
        method=label.title,
        paper=label.paper,
        law=aim(config),
        source=config.prompts.train_prompts,
        prompts=plan.train_prompts,
        settings=to_yaml(config),
        resolution=config.model.resolution,
        loading=_loading(plan, str(folder) if target is None else target.repo_id),
    )


def _loading(plan: Plan, load_from: str) -> Loading:
    model, evaluation = plan.config.model, plan.config.evaluation
    options = {"revision": model.revision, "variant": model.variant}
    source = {name: json.dumps(value) for name, value in options.items() if value is not None}
    if model.mixed_precision != "no":
        source["torch_dtype"] = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[model.mixed_precision]
    return Loading(
        # As in the README: a path in a checkout of this project.
        base=re.sub("^asset:", "am_diffusers/assets/", model.pretrained_model_name_or_path),
        base_options=source,
        load_from=load_from,
        subfolder="ema" if plan.config.optimizer.use_ema else None,
        prompt=plan.validation_prompts[0],
        call={
            "height": model.resolution,
            "width": model.resolution,
            "max_sequence_length": model.max_sequence_length,
            "num_inference_steps": evaluation.eval_inference_steps,
            "guidance_scale": evaluation.eval_guidance_scale,
        },
    )
