"""configs/methods: on top of the demo's config, each is what the benchmark compared."""

from pathlib import Path

import pytest

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


@pytest.mark.parametrize("method", OTHERS)
def test_it_is_the_setting_that_the_benchmark_chose(method: str) -> None:
    file = FOLDER / f"{method}.yaml"
    config = parse_config(["--config", str(DEMO), "--config", str(file)])
    make_plan(config, 1)
    assert file.name in file.read_text().splitlines()[0]
    work = Work.of("methods", ROOT / "outputs")
    chosen = work.chosen(method)
    assert chosen is not None
    flags = work.study.flags(chosen) | {"output_dir": "out"}
    assert config.run.output_dir != parse_config(["--config", str(DEMO)]).run.output_dir
    compared = parse_config(command_line(flags))
    for section in SECTIONS:
        assert getattr(config, section) == getattr(compared, section)
    assert config.optimizer.learning_rate == compared.optimizer.learning_rate
    assert config.optimizer.train_batch_size == compared.optimizer.train_batch_size
