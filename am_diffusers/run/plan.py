"""Plan a run: check everything that can be wrong with it before a model is loaded."""

import re
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from am_diffusers.config import Config, RewardConfig
from am_diffusers.config.checks import cautions
from am_diffusers.config.command_line import to_yaml
from am_diffusers.evaluation.frontier_table import frontier_table
from am_diffusers.methods import METHODS
from am_diffusers.models.pretrained import MissingModelError, Pretrained
from am_diffusers.noise import generator_for
from am_diffusers.prompts.order import fill_up, prompt_rows
from am_diffusers.rewards import REWARDS, LearnedReward, RewardScale
from am_diffusers.rewards.parts.packaged import PACKAGED
from am_diffusers.run.base_scores import stored_frontier, trained_scales
from am_diffusers.run.counting import count, described_latents
from am_diffusers.run.prompts import check_leaks, load_lists
from am_diffusers.system.files import asset_path
from am_diffusers.system.gpus import find_gpu
from am_diffusers.system.text import suggest
from am_diffusers.training.optimizers import check_optimizer
from am_diffusers.training.trackers import check_tracker


@dataclass(frozen=True)
class Plan:
    """A checked config with its prompts.

    Attributes:
        config: the config as given, with left-out reward weights and held-out rewards filled in.
        num_processes: processes of the run.
        train_prompts: all training prompts.
        eval_prompts: held-out prompts; empty = no evaluation.
        validation_prompts: prompts that are scored during training.
        num_grid_prompts: number of validation prompts, the first ones, that the grids show.
    """

    config: Config
    num_processes: int
    train_prompts: list[str]
    eval_prompts: list[str]
    validation_prompts: list[str]
    num_grid_prompts: int

    @property
    def held_out(self) -> list[RewardConfig]:
        """Rewards that are evaluated and not trained; none without evaluation prompts."""
        return self.config.evaluation.eval_rewards or []

    def used_train_prompts(self) -> list[str]:
        """Return the training prompts that the run's iterations use, without repetition."""
        config = self.config.optimizer
        size, steps = config.train_batch_size // self.config.shared.samples_per_prompt, config.max_train_steps
        total, seed = len(self.train_prompts), self.config.run.seed
        if size * steps >= total:
            return list(dict.fromkeys(self.train_prompts))
        rows = (row for step in range(steps) for row in prompt_rows(seed, step, size, total))
        return list(dict.fromkeys(self.train_prompts[row] for row in rows))

    def some_train_prompts(self, number: int, purpose: str) -> list[str]:
        """Return at most `number` of these prompts, at random: in files the similar ones are neighbours."""
        prompts = self.used_train_prompts()
        if len(prompts) <= number:
            return prompts
        order = torch.randperm(len(prompts), generator=generator_for(self.config.run.seed, purpose))
        return [prompts[row] for row in order[:number].tolist()]

    def describe(self) -> str:
        """Return the resolved config as YAML, with what follows from it as comments."""
        optimizer, evaluation = self.config.optimizer, self.config.evaluation
        samples = optimizer.train_batch_size
        epochs = samples * optimizer.max_train_steps / len(self.train_prompts)
        share = samples // self.num_processes
        calls = count(self.config).calls
        images = evaluation.eval_images_per_prompt * len(self.eval_prompts)
        lines = [
            f"samples an iteration: {samples} = {self.num_processes} processes x {share}",
            f"iterations: {optimizer.max_train_steps}",
            f"training prompts: {len(self.train_prompts)} ({epochs:.3g} epochs)",
            *(f"transformer calls a sample, {name}: {number:.3g}" for name, number in calls.items()),
            *self._base_images(),
            self._validation(),
            *self._frontier(),
            f"evaluation: {len(self.eval_prompts)} prompts, {images} images of base and tuned each",
            *(f"caution: {text}" for text in self.cautions()),
        ]
        return to_yaml(self.config) + "".join(f"# {line}\n" for text in lines for line in text.splitlines())

    @cached_property
    def leaks(self) -> str:
        """Text about evaluation prompts that the run trains on; empty if there are none."""
        return check_leaks(self.eval_prompts, self.used_train_prompts())

    def cautions(self) -> list[str]:
        """Say what a user should know before the run: of the flags, and of prompts in both lists."""
        return [*cautions(self.config), *([self.leaks] if self.leaks else [])]

    def _validation(self) -> str:
        options = self.config.evaluation
        prompts, images = len(self.validation_prompts), options.num_validation_images
        certificate = (
            f"; as many for the certificate, and once {prompts * options.certificate_images} of the base"
            if options.certificate_images and self.config.shared.divergence == "kl"
            else ""
        )
        return (
            f"validation every {options.validation_steps} iterations: {prompts * images} images ({prompts} "
            f"prompts x {images} images, {self.num_grid_prompts} in the grid), and once of the base"
            f"{certificate}"
        )

    def _frontier(self) -> list[str]:
        """Return what tilts of the base are worth, where base images have been scored."""
        frontier = stored_frontier(self.config)
        return [] if frontier is None else frontier_table(frontier, list(trained_scales(self.config)))

    def _base_images(self) -> list[str]:
        """Return a line on the base images that a divergence needs before the first iteration."""
        options = self.config.shared
        if options.divergence == "kl":
            return []
        num_prompts = min(options.divergence_prompts, len(self.used_train_prompts()))
        return [
            f"base images for divergence {options.divergence}: {num_prompts * options.divergence_samples}"
        ]


def make_plan(config: Config, num_processes: int) -> Plan:
    """Check a config against files and processes, and read its prompts; no weights are read.

    Raises:
        ValueError: what is wrong and what to do about it.
    """
    if config.optimizer.train_batch_size % (num_processes * config.shared.samples_per_prompt):
        raise ValueError(
            f"--train_batch_size {config.optimizer.train_batch_size} is the total over all processes: it "
            f"must be a multiple of their number, {num_processes}, times --samples_per_prompt"
        )
    check_tracker(config.run.report_to)
    config = _resolve(config)
    _check_method(config)
    stored_frontier(config)
    counted = count(config)
    check_optimizer(config.optimizer.optimizer, config.optimizer.learning_rate)
    if config.run.gpu is not None:
        find_gpu(config.run.gpu)
    model = config.model
    source = Pretrained(model.pretrained_model_name_or_path, model.revision, model.variant)
    try:
        counted.method.check_size(counted.rows, described_latents(source, model.resolution))
    except MissingModelError:
        if not config.run.dry_run:  # which says what is missing where it estimates memory
            raise
    train, evaluation = load_lists(config)
    shown = config.evaluation.validation_prompts or (evaluation or train)[:4]
    number = config.evaluation.num_validation_prompts
    validation = fill_up(shown, evaluation or train, number, config.run.seed)
    if not config.run.dry_run:
        _check_writable(Path(config.run.output_dir))
    return Plan(config, num_processes, train, evaluation, validation, len(shown))


def _resolve(config: Config) -> Config:
    """Fill in released weights and held-out rewards where the config leaves them out."""
    evaluation = config.evaluation
    trained = [resolve_reward(reward) for reward in config.method.rewards]
    held_out = evaluation.eval_rewards
    if evaluation.eval_prompts is None:
        if held_out:
            raise ValueError("--eval_rewards needs --eval_prompts: add held-out prompts, or leave it out")
        held_out = []
    elif held_out is None:
        held_out = [RewardConfig(_other_reward([reward.name for reward in trained]))]
    return replace(
        config,
        method=replace(config.method, rewards=trained),
        evaluation=replace(evaluation, eval_rewards=[resolve_reward(reward) for reward in held_out]),
    )


def _other_reward(trained: list[str]) -> str:
    for name in ("hpsv2", "pickscore"):
        if name not in trained:
            return name
    raise ValueError("pickscore and hpsv2 are both trained: name a held-out reward in --eval_rewards")


def resolve_reward(reward: RewardConfig) -> RewardConfig:
    """Fill in the weights of a reward, and check that they can exist; nothing is loaded.

    Raises:
        ValueError: unknown name (with the nearest known one), numbers that make no sense, or no such file.
    """
    RewardScale(reward.weight, reward.mean, reward.std)  # checks its numbers
    kind = REWARDS.get(reward.name)
    if kind is None:
        raise ValueError(f"rewards: unknown reward {suggest(reward.name, REWARDS)}")
    if not issubclass(kind, LearnedReward):
        if reward != RewardConfig(reward.name, weight=reward.weight, mean=reward.mean, std=reward.std):
            raise ValueError(f"rewards: {reward.name} has no weights: it takes only weight, mean and std")
        return reward
    model = reward.model or kind.released
    if model in PACKAGED:
        PACKAGED[model].find()
    elif not Path(asset_path(model)).exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+){1,2}", model):
        raise ValueError(f"rewards: {reward.name}: no such file or folder: {model}")
    return replace(reward, model=model)


def _check_method(config: Config) -> None:
    method = METHODS.get(config.method.method)
    if method is None:
        raise ValueError(f"--method: unknown method {suggest(config.method.method, METHODS)}")
    trained = [reward.name for reward in config.method.rewards]
    names = trained + [reward.name for reward in config.evaluation.eval_rewards or []]
    if len(set(names)) < len(names):
        raise ValueError(f"rewards and eval_rewards must differ in name, got {names}: merge their weights")
    if method.needs_reward_gradient:
        _check_gradients(config)
    if method.compares_samples and config.shared.samples_per_prompt < 2:
        raise ValueError(
            f"{config.method.method} compares samples of a prompt: set --samples_per_prompt to 2 or more and "
            "--train_batch_size to a multiple of it on each process"
        )


def _check_gradients(config: Config) -> None:
    # A learned reward is differentiable in every mode but the official one; the others say it on the class.
    trained = config.method.rewards
    needs = f"is not differentiable and {config.method.method} needs its gradient: use"
    blocked = [reward.name for reward in trained if REWARDS[reward.name].differentiable is False]
    if blocked:
        usable = [name for name, kind in REWARDS.items() if kind.differentiable is not False]
        raise ValueError(f"reward {blocked[0]} {needs} one of {', '.join(usable)}")
    official = [reward.name for reward in trained if reward.mode == "official"]
    if official:
        raise ValueError(f"reward {official[0]} in mode official {needs} mode differentiable or rounded")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder}: cannot write there: {error}") from error
