"""The certificate of a benchmark: all LoRAs on one memoryless chain, whichever their methods train by."""

from collections.abc import Sequence
from pathlib import Path

from am_diffusers.config import Config
from am_diffusers.config.command_line import parse_config
from am_diffusers.evaluation.certificate import Certificate, certify_means
from am_diffusers.evaluation.frontier import Frontier
from am_diffusers.evaluation.scores import load_scores
from am_diffusers.evaluation.statistics import Array
from am_diffusers.run.base_scores import CERTIFICATE
from am_diffusers.run.certificate import make_certifier
from am_diffusers.run.load import load_model, load_rewards
from am_diffusers.run.plan import make_plan
from am_diffusers.system.joining import join
from am_diffusers.system.processes import Processes
from benching.images.records import Chain
from benching.images.study import Flag, Study, command_line
from benching.images.training import Reached

SHARED = (
    "pretrained_model_name_or_path",
    "resolution",
    "max_sequence_length",
    "train_prompts",
    "rewards",
)
RESAMPLES = 2000


def certificate_config(study: Study, folder: Path) -> Config:
    """Return the config of a run whose chain, rewards and prompts are those of the certificate.

    Args:
        study: study that declares the certificate.
        folder: where scores of the base's images are kept.
    """
    options = study.evaluation.certificate
    own: dict[str, Flag] = {
        "output_dir": str(folder),
        "num_inference_steps": options.num_inference_steps,
        "reward_scale": options.reward_scale,
        "eval_prompts": study.evaluation.prompts,
        "eval_rewards": [],
        "num_validation_prompts": options.num_prompts,
        "num_validation_images": options.images,
        "certificate_images": options.base_images,
    }
    return parse_config(command_line({name: study.common[name] for name in SHARED} | own))


def take_chains(study: Study, reached: Sequence[Reached], run: Path, scores: Path) -> list[Chain]:
    """Make the images of every LoRA of a run by the chain; the base's are scored once per study.

    Args:
        study: study that declares the certificate.
        reached: marks of the run.
        run: folder of the run.
        scores: folder of the scores of the base's images.

    Raises:
        ValueError: if the reward tells no two images of a prompt apart.
    """
    accelerator = join()
    plan, processes = make_plan(certificate_config(study, scores), 1), Processes(accelerator)
    model, (trained, _) = load_model(plan, accelerator.device), load_rewards(plan, accelerator.device)
    file = scores / CERTIFICATE
    known = load_scores(file, plan.validation_prompts) if file.exists() else None
    certifier = make_certifier(plan, model, trained, [], processes, scores=known)
    if certifier is None:
        raise ValueError("the trained reward is the same for all base images of a prompt: train another one")
    chains = []
    for done in reached:
        model.unload_lora()
        model.load_lora(done.lora(run))
        with processes.together():
            tuned = certifier.score()
        chains.append(Chain(tuned.gain(certifier.frontier).tolist(), tuned.path_kl.mean(axis=1).tolist()))
    return chains


def read_frontier(study: Study, scores: Path) -> Frontier:
    """Return the frontier of the base's images, which runs are compared with.

    Raises:
        ValueError: if their scores are missing or damaged.
    """
    file = scores / CERTIFICATE
    if not file.exists():
        raise ValueError(f"{file} is missing: get it back, or remove the study's records and run it again")
    return Frontier.of(load_scores(file), study.trained)


def certificate_of(frontier: Frontier, scale: float, gains: Array, path_kl: Array) -> Certificate:
    """Return the certificate of some runs, means over them first.

    Args:
        frontier: frontier of P prompts.
        scale: reward_scale of the tilt.
        gains: mean reward over the base's, (S runs, P).
        path_kl: KL divergence of the chain from the base's in nats, (S, P).
    """
    means = gains.mean(axis=0), path_kl.mean(axis=0)
    return certify_means(frontier, scale, *means, {}, resamples=RESAMPLES)
