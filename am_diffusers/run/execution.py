"""A whole run: train, export the LoRA, evaluate on held-out prompts."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import BaseFileLock

from am_diffusers.evaluation.held_out import Evaluation, HeldOut
from am_diffusers.models.lora_files import LORA_FILE
from am_diffusers.run.leftovers import remove_about_lora
from am_diffusers.system.failures import is_out_of_memory
from am_diffusers.system.files import sha256, write_json
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
    verify_lora: Callable[[Path], object]
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
        earlier = _digest(self.folder / LORA_FILE)
        plain, *averaged = self.save_lora(self.folder)
        if _digest(plain) != earlier:
            remove_about_lora(self.folder, averaged=bool(averaged))
        if self.processes.lockstep:  # the comparison takes a pass of the model, which all would have to make
            logger.warning("%s is written; with sharded weights it isn't loaded back to verify it", plain)
            return
        try:
            self.verify_lora(plain)
            with state.ema_weights():
                for file in averaged:
                    self.verify_lora(file)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.warning(
                "%s is written, but there's no memory for a second transformer to verify it", plain
            )

    def _evaluate(self, held_out: HeldOut) -> Evaluation:
        """Evaluate the model, its running mean if there is an EMA, and write evaluation.json."""
        with self.processes.together(), self.trainer.state.ema_weights():
            evaluation = held_out.evaluate(self.processes)
        document = evaluation.to_dict()
        self.processes.on_main(lambda: write_json(self.folder / "evaluation.json", document))
        return evaluation


def _digest(file: Path) -> str | None:
    return sha256(file) if file.exists() else None
