"""Real processes of Flow-GRPO, killed between two passes on kept rows: the final LoRA is bit-identical."""

import json
import signal

import pytest
from test_kills import arguments, assert_same_run, make_folder, run

from finetune_runs import read_metrics, start, wait_for


def kill_after(folder, name, iteration):
    """Kill a run as soon as it has logged an iteration; the newest checkpoint."""
    process, metrics = start(arguments(folder, name), folder / f"{name}.log"), folder / name / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and f'"iteration": {iteration},' in metrics.read_text(), process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (folder / f"{name}.log").read_text()[-3000:]
    return max((folder / name).glob("checkpoint-??????"))


@pytest.mark.slow
def test_killed_twice_between_two_passes_the_final_lora_is_bit_identical(tmp_path, tiny_sd3_dir):
    """Rollouts are at even iterations: the checkpoints after 3 and 9 hold rows with a pass left.

    Each kill comes when the second pass is logged, which is done again, on the stored rows.
    """
    own = {"method": "flow_grpo", "samples_per_prompt": 2, "grpo_passes": 2, "checkpointing_steps": 3}
    unread = {"mask_quantile": None, "reward_clip_quantile": None}  # left at their defaults
    folder = make_folder(tmp_path, tiny_sd3_dir, **own, **unread)
    run(folder, "whole")
    for done in (3, 9):
        checkpoint = kill_after(folder, "killed", done)
        assert checkpoint.name == f"checkpoint-{done:06d}"
        (rows,) = checkpoint.glob("local-*.json")
        assert len(json.loads(rows.read_text())["examples"]["cond"]["prompts"]["$tuple"]) == 4
    run(folder, "killed")
    assert_same_run(folder / "killed", folder / "whole")
    log, lines = (folder / "killed.log").read_text(), read_metrics(folder / "killed")
    assert "after 3 iterations" in log
    assert "after 9 iterations" in log
    assert [line["grpo_pass"] for line in lines] == [1, 2] * 6
    assert ["reward" in line for line in lines] == [True, False] * 6
