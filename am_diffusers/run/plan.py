"""Plan a run: check everything that can be wrong with it before a model is loaded."""

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from am_diffusers.config import Config, RewardConfig
from am_diffusers.config.checks import cautions
from am_diffusers.config.command_line import to_yaml
from am_diffusers.evaluation.frontier_table import frontier_table
from am_diffusers.models.pretrained import MissingModelError, Pretrained
from am_diffusers.models.schedulers import NoiseLevels
from am_diffusers.noise import generator_for
from am_diffusers.prompts.order import fill_up, prompt_rows
from am_diffusers.run.base_scores import stored_frontier, trained_scales
from am_diffusers.run.checked_rewards import check_devices, check_method, resolve
from am_diffusers.run.counting import count, described_latents
from am_diffusers.run.init_lora import check_init_lora
from am_diffusers.run.leftovers import find_refusal
from am_diffusers.run.prompts import check_leaks, load_lists
from am_diffusers.system.gpus import find_gpu
from am_diffusers.system.offline import offline
from am_diffusers.training.optimizers import check_optimizer
from am_diffusers.training.trackers import PROJECT, check_tracker


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
            *self._output(),
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

    def _output(self) -> list[str]:
        """Return a line on an output folder that the run itself would refuse."""
        options = self.config.run
        folder = Path(options.output_dir)
        events = folder / options.logging_dir / PROJECT
        refusal = find_refusal(folder, events, overwrite=options.overwrite_output_dir)
        return [] if refusal is None else [f"the run itself would be refused: --output_dir {refusal}"]

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

    A dry run reads nothing from the network either.

    Raises:
        ValueError: what is wrong and what to do about it.
    """
    with offline() if config.run.dry_run else nullcontext():
        return _make_plan(config, num_processes)


def _make_plan(config: Config, num_processes: int) -> Plan:
    if config.optimizer.train_batch_size % (num_processes * config.shared.samples_per_prompt):
        raise ValueError(
            f"--train_batch_size {config.optimizer.train_batch_size} is the total over all processes: it "
            f"must be a multiple of their number, {num_processes}, times --samples_per_prompt"
        )
    check_tracker(config.run.report_to)
    config = resolve(config)
    check_method(config)
    check_devices(config, num_processes)
    if config.evaluation.frontier is not None:
        stored_frontier(config)
    counted = count(config)
    check_optimizer(config.optimizer.optimizer, config.optimizer.learning_rate)
    if config.run.gpu is not None:
        find_gpu(config.run.gpu)
    model = config.model
    source = Pretrained(model.pretrained_model_name_or_path, model.revision, model.variant)
    try:
        source.family.check_length(model.max_sequence_length)
        latents = described_latents(source, model.size)
        counted.method.check_size(counted.rows, latents)
        _check_levels(config, source.levels(), latents.shape)
        check_init_lora(config, source)
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


def _check_levels(config: Config, levels: NoiseLevels, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless the model's scheduler makes noise levels for training and evaluation."""
    evaluation, shared = config.evaluation, config.shared
    try:
        levels.solver("ode_euler", evaluation.eval_inference_steps, shape)
        if evaluation.certificate_images:
            levels.solver(shared.transitions, shared.num_inference_steps, shape)
        count(config, lambda steps, noisy: levels.sigmas(steps, shape, stochastic=noisy))
    except ValueError as error:
        raise ValueError(f"the model's scheduler doesn't suit these flags: {error}") from error


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder}: cannot write there: {error}") from error
