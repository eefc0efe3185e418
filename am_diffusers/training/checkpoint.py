"""Saving and resuming a run: state, method and config in one checkpoint."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError

from am_diffusers.methods import Method
from am_diffusers.methods.parts.kept import PartShare
from am_diffusers.system.files import StorageError
from am_diffusers.system.processes import PeerError, Processes
from am_diffusers.training.checkpoint_folder import CheckpointError, Checkpoints, DiskFullError
from am_diffusers.training.state import Progress, TrainState
from am_diffusers.training.state_files import load_state, save_state, tensor_bytes

logger = logging.getLogger(__name__)

STATE, SETTINGS, LOCAL = "state", "settings", "local"
STALE = "%s: its stored training rows were made with another %s and are dropped: the buffer starts empty"
REVALUED = "%s: counts and running means of its method are those of another %s and start anew"


class Outdated(NamedTuple):
    """Changed settings that a checkpoint's method state was made with; what was is left behind.

    Attributes:
        rows: settings that stored training rows depend on.
        means: settings that all else it has measured depends on: thresholds of the mask and of clipping,
            sizes of steps, references of adjoint norms.
    """

    rows: Sequence[str] = ()
    means: Sequence[str] = ()


UP_TO_DATE = Outdated()


@dataclass(frozen=True)
class Saver:
    """Writer and reader of everything that a run needs to be resumed.

    Attributes:
        checkpoints: checkpoints of the output folder.
        processes: processes of the run. The main one writes, all read; each writes its part of a method's
            state that differs between them, for which they must see the same folder.
        state: parameters, optimizer, EMA, counters.
        method: with a state of its own.
        settings: settings of the run, JSON-serialisable; compared when it is resumed.
        save_lora: writes the LoRA, averaged too if there is an EMA, into a folder: a checkpoint can be
            loaded into a pipeline as it is.
        on_full_disk: `stop` with an error, or `skip` the checkpoint with a warning.
    """

    checkpoints: Checkpoints
    processes: Processes
    state: TrainState
    method: Method
    settings: Mapping[str, Any]
    save_lora: Callable[[Path], object]
    on_full_disk: Literal["stop", "skip"] = "stop"

    def save(self) -> None:
        """Write a checkpoint of the finished iterations; called on all processes, not to be stopped.

        Raises:
            CheckpointError: no room for it, and such checkpoints aren't to be skipped.
        """
        try:
            with self.processes.together(stoppable=False):
                self._save()
        except PeerError as error:
            raise CheckpointError("another process could not write a checkpoint; it says why") from error

    def _save(self) -> None:
        """Begin, write, publish: each on all processes, or the checkpoint is given up on all."""
        local = self.method.local_state_dict()
        sums = self.processes.sum_numbers({"bytes": tensor_bytes(local), "parts": bool(local)})
        if not self._everywhere(lambda: self._begin(int(sums["bytes"]))):
            return
        if self._everywhere(lambda: self._write(local if sums["parts"] else None)):
            self._everywhere(self._publish)

    def _publish(self) -> None:
        if self.processes.is_main:
            self.checkpoints.publish(self.state.iteration)

    def _begin(self, local_bytes: int) -> None:
        if self.processes.is_main:
            train = self.state.state_dict()
            # Twice the parameters for the LoRA as Diffusers reads it, and its mean.
            own = tensor_bytes([train, self.method.state_dict()]) + 2 * tensor_bytes(train["parameters"])
            self.checkpoints.begin(self.state.iteration, own + local_bytes)

    def _write(self, local: dict[str, Any] | None) -> None:
        """Write this process's files; the main one's are those that all processes have in common."""
        folder = self.checkpoints.staging(self.state.iteration)
        try:
            if self.processes.is_main:
                common = {"train": self.state.state_dict(), "method": self.method.state_dict()}
                save_state(folder, STATE, common)
                save_state(folder, SETTINGS, dict(self.settings))
                self.save_lora(folder)
            if local is not None:
                save_state(folder, local_name(self.processes.index, self.processes.number), local)
        except (OSError, SafetensorError, StorageError) as error:  # safetensors has its own for a full disk
            where = "" if folder.exists() else f"; do all processes see the same folder? {folder} is missing"
            raise DiskFullError(
                f"{self.checkpoints.folder}: cannot write a checkpoint ({error}){where}: free some space or "
                "check the permissions; checkpoints that exist are untouched"
            ) from error

    def _everywhere(self, action: Callable[[], object]) -> bool:
        """Run `action` on each process; False if one had no room and such checkpoints are skipped."""
        failure: DiskFullError | None = None
        try:
            action()
        except DiskFullError as error:
            failure = error
        if not self.processes.sum_numbers({"failures": failure is not None})["failures"]:
            return True
        if self.processes.is_main:
            self.checkpoints.clean()  # only now that nobody writes there any more
        if self.on_full_disk == "stop":
            if failure is not None:
                raise failure
            self.processes.agree()  # the one without room leaves here, and so do all
        if failure is not None:
            logger.warning("no checkpoint after iteration %d: %s", self.state.iteration, failure)
        return False

    def restore(self, folder: Path, *, outdated: Outdated = UP_TO_DATE) -> None:
        """Resume from a verified checkpoint; called on all processes, of which there may be more or fewer.

        Each reads the parts that its share of the samples is in alone; they may be as large as buffers.

        Args:
            folder: the checkpoint.
            outdated: changed settings for which rows or running means of the method start anew, as in a new
                run: a method whose means do isn't told anything of the checkpoint but its rows.

        Raises:
            CheckpointError: if it belongs to another model or method, or cannot be shared by this number of
                processes.
        """
        state = load_state(folder, STATE)
        parts = sorted(folder.glob(f"{LOCAL}-*.json"))  # the manifest says that none is missing
        self._warn(folder, outdated, has_rows=bool(parts), has_means=bool(state["method"]))
        parts = [] if outdated.rows else parts
        share = PartShare(self.processes.index, self.processes.number, len(parts))
        local = [load_state(folder, parts[part].stem) for part in share.needed]
        try:
            self.state.load_state_dict(state["train"])
            if not outdated.means:
                self.method.load_state_dict(state["method"])
            if local:
                self.method.load_local_state_dicts(local, share)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder}: {error}") from error

    def _warn(self, folder: Path, outdated: Outdated, *, has_rows: bool, has_means: bool) -> None:
        """Say once what of the method is left behind."""
        if not self.processes.is_main:
            return
        if has_rows and outdated.rows:
            logger.warning(STALE, folder, ", ".join(outdated.rows))
        if has_means and outdated.means:
            logger.warning(REVALUED, folder, ", ".join(outdated.means))


def local_name(index: int, number: int) -> str:
    """Return the name of one process's part; in alphabetical order the names are in rank order."""
    return f"{LOCAL}-{index:05d}-of-{number:05d}"


def load_settings(folder: Path) -> dict[str, Any]:
    """Load the settings of the run that wrote a checkpoint."""
    return load_state(folder, SETTINGS)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return `old -> new` of each setting that differs, by name."""
    names = [*before, *(name for name in now if name not in before)]
    return {
        name: f"{json.dumps(before.get(name))} -> {json.dumps(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    }


def load_progress(folder: Path) -> Progress:
    """Load the counters of a checkpoint."""
    return Progress(**load_state(folder, STATE)["train"]["progress"])
