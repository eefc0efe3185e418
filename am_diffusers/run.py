"""A whole run: train, export the LoRA, evaluate on held-out prompts."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from am_diffusers.evaluation import Evaluation, summarise
from am_diffusers.samples import pictures_of
from am_diffusers.scoring import Scorer
from am_diffusers.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """The evaluation at the end.

    Attributes:
        scorer: makes and scores pairs of pictures.
        prompts: held-out prompts.
        images_per_prompt: pictures a prompt, for base and tuned each.
        roles: trained or held-out, by reward name, in the order of the report.
    """

    scorer: Scorer
    prompts: Sequence[str]
    images_per_prompt: int
    roles: dict[str, str]


@dataclass(frozen=True)
class Run:
    """Objects of a run, ready to start.

    Attributes:
        trainer: the loop.
        save_lora: writes the LoRA into the output folder and returns its path.
        verify_lora: loads the written file into a fresh model and compares.
        held_out: None = no evaluation.
        share: what the main process does with the result at the end: model card, upload.
        accelerator: processes of the run.
        folder: output folder.
    """

    trainer: Trainer
    save_lora: Callable[[], Path]
    verify_lora: Callable[[Path], dict[str, float]]
    held_out: HeldOut | None
    share: Callable[[Evaluation | None], None]
    accelerator: Accelerator
    folder: Path

    def execute(self) -> Evaluation | None:
        """Train, export, evaluate, share.

        Returns:
            The evaluation, the same on all processes; None without held-out prompts.

        Raises:
            IterationError: training met something that is not finite.
            ValueError: the written LoRA doesn't reproduce the trained model.
        """
        self.trainer.train()
        if self.accelerator.is_main_process:
            self._export()
        evaluation = None if self.held_out is None else self._evaluate(self.held_out)
        if self.accelerator.is_main_process:
            self.share(evaluation)
        self.accelerator.end_training()
        return evaluation

    def _export(self) -> None:
        file = self.save_lora()
        try:
            self.verify_lora(file)
        except torch.OutOfMemoryError:
            logger.warning("%s is written, but there's no memory for a second transformer to verify it", file)

    def _evaluate(self, held_out: HeldOut) -> Evaluation:
        """Every process makes and scores its share of the pictures."""
        which = pictures_of(len(held_out.prompts), held_out.images_per_prompt)
        mine = which[self.accelerator.process_index :: self.accelerator.num_processes]
        pairs = gather_object(held_out.scorer.pairs(held_out.prompts, mine))
        features = held_out.scorer.features
        evaluation = summarise(pairs, held_out.roles, features.name if features is not None else None)
        if self.accelerator.is_main_process:
            text = json.dumps(evaluation.to_dict(), indent=1, allow_nan=False)
            (self.folder / "evaluation.json").write_text(text + "\n", "utf-8")
        return evaluation
