"""A whole run: train, export the LoRA, evaluate on held-out prompts."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from filelock import BaseFileLock

from am_diffusers.evaluation.held_out import Evaluation, HeldOut, summarise
from am_diffusers.evaluation.images import pictures_of, share_of
from am_diffusers.system.processes import Processes
from am_diffusers.training.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Objects of a run, ready to start.

    Attributes:
        trainer: the loop.
        save_lora: function that writes the LoRA into a folder, averaged too if there is an EMA, and returns
            the files.
        verify_lora: function that loads a written file into a fresh model and compares.
        held_out: the evaluation at the end; None = no evaluation.
        share: what the main process does with the result at the end: model card, upload.
        processes: processes of the run.
        folder: output folder.
        lock: lock of the folder, on the main process; held until the run is over.
    """

    trainer: Trainer
    save_lora: Callable[[Path], list[Path]]
    verify_lora: Callable[[Path], dict[str, float]]
    held_out: HeldOut | None
    share: Callable[[Evaluation | None], None]
    processes: Processes
    folder: Path
    lock: BaseFileLock | None

    def execute(self) -> Evaluation | None:
        """Train, export, evaluate, share; after an interruption the same command resumes.

        Returns:
            The evaluation, the same on all processes; None without held-out prompts.

        Raises:
            Interrupted: a signal came; a checkpoint of the last finished iteration is written.
            IterationError: training met something that is not finite.
            ValueError: a checkpoint could not be written, or the written LoRA doesn't reproduce the
                trained model.
        """
        try:
            self.trainer.train()
            self.processes.on_main(self._export)
            evaluation = None if self.held_out is None else self._evaluate(self.held_out)
            self.processes.on_main(lambda: self.share(evaluation))
            self.processes.accelerator.end_training()
        finally:
            if self.lock is not None:
                self.lock.release()
        return evaluation

    def _export(self) -> None:
        state = self.trainer.state
        plain, *averaged = self.save_lora(self.folder)
        if self.processes.lockstep:  # the comparison takes a pass of the model, which all would have to make
            logger.warning("%s is written; with sharded weights it isn't loaded back to verify it", plain)
            return
        try:
            self.verify_lora(plain)
            with state.ema_weights():
                for file in averaged:
                    self.verify_lora(file)
        except torch.OutOfMemoryError:
            logger.warning(
                "%s is written, but there's no memory for a second transformer to verify it", plain
            )

    def _evaluate(self, held_out: HeldOut) -> Evaluation:
        """Make and score this process's share of the images, with the EMA if there is one."""
        which = pictures_of(len(held_out.prompts), held_out.images_per_prompt)
        mine = share_of(which, self.processes.index, self.processes.number)
        with self.processes.together(), self.trainer.state.ema_weights():
            pairs = held_out.scorer.pairs(held_out.prompts, mine)
        features = held_out.scorer.features
        name = features.name if features is not None else None
        found = {(pair.prompt, pair.image): pair for pair in gather_object(pairs)}
        evaluation = summarise([found[image] for image in which], held_out.roles, name)
        text = json.dumps(evaluation.to_dict(), indent=1, allow_nan=False) + "\n"
        self.processes.on_main(lambda: (self.folder / "evaluation.json").write_text(text, "utf-8"))
        return evaluation
