"""Work that is left to do for a study, and doing it; several programs can share the work."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from am_diffusers.training.trainer import IterationError
from benching.images.measuring import measure
from benching.images.records import Record, Snapshot, read_record, record_file, write_record
from benching.images.study import Study, read_study
from benching.images.training import machine, train
from evaluating.candidates import BASE, Candidate

HERE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Work:
    """A study on this disk.

    Attributes:
        study: the declared study.
        data: folder of the records.
        outputs: folder of LoRAs and images, which aren't kept with the records.
    """

    study: Study
    data: Path
    outputs: Path

    @classmethod
    def of(cls, name: str, outputs: Path) -> "Work":
        """Open a study of this repository.

        Args:
            name: name of its file beside this one and of the folder of its records.
            outputs: folder of the outputs of all studies.

        Raises:
            ValueError: if there is no such study.
        """
        return cls(read_study(HERE / f"{name}.yaml"), HERE / "data" / name, outputs / name)

    def declared(self, setting: str) -> dict[str, object]:
        """Return the settings that a record of a setting depends on."""
        return {
            "flags": self.study.flags(setting),
            "marks": [mark.name for mark in self.study.marks],
            "evaluation": asdict(self.study.evaluation),
        }

    def record(self, setting: str, seed: int) -> Record | None:
        """Return the record of a run, if it is there.

        Raises:
            ValueError: if it is damaged, or of other flags than are declared.
        """
        file = record_file(self.data, setting, seed)
        return read_record(file, self.declared(setting)) if file.exists() else None

    @property
    def base_scores(self) -> Path:
        """Folder of the base's scores by the chain of the certificate, kept with the records."""
        return self.data / f"base-{self.study.evaluation.certificate.num_inference_steps}-steps"

    @property
    def base_images(self) -> Path:
        """Folder of the base's images."""
        return self._images(Candidate(BASE, self.study.evaluation.num_inference_steps))

    def images(self, setting: str, seed: int, mark: str) -> Path:
        """Return the folder of the images of a run at a mark; they aren't kept with the records."""
        name = f"{setting}-seed{seed}-{mark}"
        steps = self.study.evaluation.num_inference_steps
        return self._images(Candidate(name, steps, lora=Path(name)))

    def _images(self, candidate: Candidate) -> Path:
        return self.outputs / "evaluation/pictures" / candidate.key

    def chosen(self, method: str) -> str | None:
        """Return the setting of a method to compare with other methods; None if not all have been tried.

        It has the highest mean gain of the held-out rewards at the budget, on the first seed. None also if
        all of them failed.
        """
        tried = [self.record(setting, self.study.seeds[0]) for setting in self.study.methods[method]]
        if any(record is None for record in tried):
            return None
        known = [record for record in tried if record is not None and not record.failed]
        if not known:
            return None
        return max(known, key=lambda record: record.at(self.study.budget).gain("held-out")).setting

    def compared(self) -> dict[str, list[Record]]:
        """Return the records of all seeds there are of each setting that is compared, by its name.

        Raises:
            ValueError: runs that are compared by time were made on different machines.
        """
        if self.study.select == "all":
            settings = list(self.study.settings)
        else:
            chosen = [self.chosen(method) for method in self.study.methods]
            settings = [setting for setting in chosen if setting is not None]
        found = {setting: [self.record(setting, seed) for seed in self.study.seeds] for setting in settings}
        known = {
            setting: [record for record in records if record is not None and not record.failed]
            for setting, records in found.items()
        }
        if self.study.timed:
            check_machines([record for records in known.values() for record in records])
        return {setting: records for setting, records in known.items() if records}

    def missing(self) -> Iterator[tuple[str, int]]:
        """Yield runs that can be done now: settings on the first seed, then the chosen ones on the others."""
        first, *others = self.study.seeds
        for setting in self.study.settings:
            if self.record(setting, first) is None:
                yield setting, first
        for seed in others:
            for method, settings in self.study.methods.items():
                chosen = settings if self.study.select == "all" else [self.chosen(method)]
                for setting in chosen:
                    if setting is not None and self.record(setting, seed) is None:
                        yield setting, seed

    def do_next(self) -> str | None:
        """Do the first missing run that no other program does; return its name, None if there is none.

        Raises:
            ValueError: a run can't be started, or its time would not be comparable.
        """
        for setting, seed in self.missing():
            check_threads()
            name = f"{setting}-seed{seed}"
            self.outputs.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(self.outputs / f"{name}.lock", timeout=0):
                    if self.record(setting, seed) is None:
                        self._do(setting, seed, self.outputs / name)
                        return name
            except Timeout:
                continue
        return None

    def _do(self, setting: str, seed: int, folder: Path) -> None:
        flags, snapshots, failed = self.study.flags(setting), list[Snapshot](), ""
        try:
            reached = train(flags, seed, self.study.marks, folder)
        except IterationError as error:  # a result, too: other settings are still to be run
            failed = str(error)
        else:
            evaluations = self.outputs / "evaluation"
            snapshots = measure(self.study, reached, folder, evaluations, self.base_scores)
        declared, method = self.declared(setting), str(flags["method"])
        record = Record(setting, method, seed, declared, machine(), snapshots, failed)
        write_record(record, record_file(self.data, setting, seed))


def check_threads() -> None:
    """Check that a run would have one CPU thread and nothing else: times are compared, also between studies.

    Raises:
        ValueError: it would have more; says what to set.
    """
    if machine()["threads"] != "1" or torch.cuda.is_available():
        raise ValueError(
            "runs are compared by time, on one CPU thread each: set OMP_NUM_THREADS=1, and "
            "CUDA_VISIBLE_DEVICES= where there is a GPU"
        )


def check_machines(records: Sequence[Record]) -> None:
    """Check that all runs were made on the same kind of machine.

    Raises:
        ValueError: naming two that were not.
    """
    for record in records:
        if record.machine != records[0].machine:
            raise ValueError(
                f"{records[0].setting} ran on {records[0].machine}, {record.setting} on {record.machine}: "
                "their seconds can't be compared; remove the records of one and run them again"
            )
