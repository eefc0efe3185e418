"""configs/methods: on top of the demo's config, each is a setting of the benchmark."""

from pathlib import Path

import pytest

from am_diffusers.config import Config
from am_diffusers.config.command_line import parse_config
from am_diffusers.methods import METHODS
from am_diffusers.run.plan import make_plan
from benching.images.study import command_line
from benching.images.work import Work

ROOT = Path(__file__).parents[2]
DEMO, FOLDER = ROOT / "configs/tiny_sd3.yaml", ROOT / "configs/methods"
OTHERS = sorted(set(METHODS) - {"adjoint_matching"})  # that one is the demo
SECTIONS = ("model", "prompts", "method", "shared", "own")


def test_there_is_one_for_every_other_method() -> None:
    assert sorted(file.stem for file in FOLDER.iterdir()) == OTHERS


def compared(config: Config) -> list[object]:
    """What a setting of the benchmark fixes."""
    optimizer = config.optimizer
    return [
        *(getattr(config, section) for section in SECTIONS),
        optimizer.learning_rate,
        optimizer.train_batch_size,
    ]


@pytest.mark.parametrize("method", OTHERS)
def test_it_is_the_setting_that_the_benchmark_chose_or_one_that_it_declares(method: str) -> None:
    file = FOLDER / f"{method}.yaml"
    config = parse_config(["--config", str(DEMO), "--config", str(file)])
    make_plan(config, 1)
    assert file.name in file.read_text().splitlines()[0]
    assert config.run.output_dir != parse_config(["--config", str(DEMO)]).run.output_dir
    work = Work.of("methods", ROOT / "outputs")
    chosen = work.chosen(method)
    names = work.study.methods[method] if chosen is None else [chosen]
    settings = [parse_config(command_line(work.study.flags(name) | {"output_dir": "out"})) for name in names]
    assert compared(config) in [compared(setting) for setting in settings]
