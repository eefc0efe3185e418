"""Uploading by the real client of huggingface_hub, to a hub on localhost."""

import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from am_diffusers.config.command_line import parse_config
from am_diffusers.run.sharing import HubTarget, check_hub, hub_target, upload, upload_command
from finetune_runs import FINETUNE, tiny_config, write_rewards
from hub_server import TOKEN, Hub, running_hub

SHARED = {
    "README.md",
    "config.yaml",
    "evaluation.json",
    "ema/pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.safetensors",
    "samples/iteration-000000.png",
    "samples/panel.png",
    "samples/pictures.json",
}
PRIVATE = {
    "error.txt",
    "metrics.jsonl",
    "logs/am_diffusers/events.out.tfevents.0",
    "checkpoint-2/config.yaml",
    "checkpoint-2/pytorch_lora_weights.safetensors",
    "checkpoint-2/samples/iteration-000000.png",
    "samples/notes.txt",
}


@pytest.fixture
def hub(monkeypatch):
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def output(tmp_path):
    """An output folder with files of every kind."""
    for name in SHARED | PRIVATE:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(f"this is {name}")
    return tmp_path / "out"


def test_only_results_are_uploaded(hub: Hub, output: Path):
    target = check_hub("my-lora", private=True)
    assert target == HubTarget("tester/my-lora", private=True)
    assert upload(target, output) == f"{hub.address}/tester/my-lora"
    assert hub.files == {f"tester/my-lora/{name}": f"this is {name}".encode() for name in SHARED}
    (repository,) = hub.repositories
    assert (repository["organization"], repository["name"]) == ("tester", "my-lora")
    assert repository["visibility"] == "private"


def test_a_repository_of_somebody_else_is_named_in_full(hub: Hub, output: Path):
    upload(check_hub("group/my-lora", private=False), output)
    assert {name.rsplit("/my-lora/")[0] for name in hub.files} == {"group"}
    assert hub.repositories[0].get("visibility") != "private"


def test_a_missing_token_names_the_command(hub: Hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"--push_to_hub needs a token: run `hf auth login`"):
        check_hub("my-lora", private=False)


def test_an_unknown_token_names_the_command(hub: Hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ValueError, match=r"confirm the token \(Invalid user token(.|\n)*hf auth login"):
        check_hub("my-lora", private=False)


def test_a_token_that_only_reads_is_refused(hub: Hub):
    hub.role = "read"
    with pytest.raises(ValueError, match="needs a token with write access"):
        check_hub("my-lora", private=False)


def test_offline_is_named(hub: Hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        check_hub("my-lora", private=False)


def test_a_hub_that_does_not_answer_is_named(monkeypatch, hub: Hub):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="hf auth login`, check HF_TOKEN and the network"):
        check_hub("my-lora", private=False)


@pytest.mark.parametrize("name", ["a/b/c", "with space", "..", "x" * 97])
def test_a_name_that_is_none_is_refused_without_a_hub(name):
    with pytest.raises(ValueError, match=r"--hub_model_id .* is no owner/name"):
        check_hub(name, private=False)


def test_the_name_defaults_to_that_of_the_folder(hub: Hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--train_prompts", "p.txt", "--rewards", '[{"name": "brightness"}]', "--output_dir", "runs/fox/"]
    flags += ["--pretrained_model_name_or_path", "asset:tiny_sd3"]
    assert hub_target(parse_config(flags)) is None
    assert hub_target(parse_config([*flags, "--push_to_hub"])) == HubTarget("tester/fox", private=False)
    full = [*flags, "--push_to_hub", "--hub_private_repo", "--hub_model_id", "group/x"]
    assert hub_target(parse_config(full)) == HubTarget("group/x", private=True)
    with pytest.raises(ValueError, match=r"--hub_model_id must be null without --push_to_hub, got x"):
        parse_config([*flags, "--hub_model_id", "x"])
    with pytest.raises(ValueError, match=r"--hub_private_repo must be false without --push_to_hub"):
        parse_config([*flags, "--hub_private_repo"])


@pytest.mark.parametrize("step", ["/repos/create", "/preupload/", "/commit/"])
def test_a_failed_upload_says_how_to_do_it_later(hub: Hub, output: Path, caplog, step):
    hub.refuse = (step,)
    target = HubTarget("tester/my-lora", private=True)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert upload(target, output) is None
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    (record,) = [record for record in caplog.records if record.name == "am_diffusers.run.sharing"]
    message = record.getMessage()
    assert len(message.splitlines()) == 1
    assert "403" in message
    assert message.endswith(upload_command(target, output))


def test_the_command_uploads_the_same(hub: Hub, output: Path):
    """The command of the failure message, run in a shell by the real `hf`."""
    words = shlex.split(upload_command(HubTarget("tester/my-lora", private=True), output))
    words[0] = str(Path(sys.executable).parent / "hf")
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert set(hub.files) == {f"tester/my-lora/{name}" for name in SHARED}


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_is_shared_and_keeps_its_secrets(tiny_sd3_dir, tmp_path):
    """Tokens in the environment, in paths and in a prompt: in no file and no line of output."""
    planted = "hf_" + "Pl4nt3d" * 5
    secrets = [planted, TOKEN, "open sesame, please"]
    folder = tmp_path / f"run_{planted}"
    folder.mkdir()
    write_rewards(folder)
    shutil.copytree(
        tiny_sd3_dir, folder / "model"
    )  # its path goes into the file of the LoRA, if anything does
    config = tiny_config(
        folder / "model",
        folder,
        max_train_steps=2,
        learning_rate=0.01,
        push_to_hub=True,
        hub_model_id="my-lora",
        validation_prompts=["a red fox", f"{secrets[2]} {planted}"],
    )
    for name in ("others/pytorch_lora_weights.safetensors", "samples/mine.txt"):
        (folder / "out" / name).parent.mkdir(parents=True)
        (folder / "out" / name).write_text("private")
    environment = os.environ | {
        "HF_TOKEN": TOKEN,
        "DOOR_PASSWORD": secrets[2],
        "HF_HUB_OFFLINE": "0",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(FINETUNE), "--config", str(config)]
    with running_hub() as hub:
        environment["HF_ENDPOINT"] = hub.address
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        sent = {name.removeprefix("tester/my-lora/"): content for name, content in hub.files.items()}
    written = read_all(folder / "out")
    assert {"README.md", "config.yaml", "evaluation.json", "samples/pictures.json"} < set(sent)
    kept = set(written) - set(sent)
    assert {"metrics.jsonl", "samples/mine.txt", "others/pytorch_lora_weights.safetensors"} <= kept
    assert any(re.fullmatch(r"checkpoint-\d+/pytorch_lora_weights.safetensors", name) for name in kept)
    assert all(written[name] == content for name, content in sent.items())
    assert f"uploaded to {hub.address}/tester/my-lora" in done.stdout
    assert 'pipe.load_lora_weights("tester/my-lora")' in written["README.md"].decode()
    found = {
        name: secret
        for secret in secrets
        for name, content in {
            **written,
            "stdout": done.stdout.encode(),
            "stderr": done.stderr.encode(),
        }.items()
        if secret.encode() in content
    }
    assert found == {}
    assert "***" in done.stdout
    assert b"***" in written["config.yaml"]


@pytest.fixture
def output_guard_restored(monkeypatch):
    factory = logging.getLogRecordFactory()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield
    logging.setLogRecordFactory(factory)


@pytest.mark.usefixtures("output_guard_restored")
@pytest.mark.parametrize(
    ("changes", "flags", "expected"),
    [
        ({"pretrained_model_name_or_path": "URL"}, [], "error: cannot load the model https://***@host/model"),
        ({"output_dir": "outputs/SECRET"}, ["--dry_run"], "output_dir: outputs/***"),
        ({}, ["--learning_rate", "SECRET"], "error: "),
    ],
)
def test_errors_and_plans_keep_secrets(tiny_sd3_dir, tmp_path, monkeypatch, capsys, changes, flags, expected):
    secret = "hf_" + "Pl4nt3d" * 5
    real = {"URL": f"https://me:{secret}@host/model", "outputs/SECRET": f"outputs/{secret}", "SECRET": secret}
    write_rewards(tmp_path)
    config = tiny_config(tiny_sd3_dir, tmp_path, **{key: real[value] for key, value in changes.items()})
    command = [str(FINETUNE), "--config", str(config), *(real.get(flag, flag) for flag in flags)]
    monkeypatch.setattr(sys, "argv", command)
    try:
        runpy.run_path(str(FINETUNE), run_name="__main__")
        said = ""
    except SystemExit as stopped:
        said = str(stopped.code)
    captured = capsys.readouterr()
    said += captured.out + captured.err
    assert expected in said
    assert secret not in said


def test_logs_and_crashes_keep_secrets():
    secret = "hf_" + "Pl4nt3d" * 5
    crash = (
        "import logging; from am_diffusers.system.text import guard_output; guard_output();"
        f"logging.warning('read %s', '{secret}'); raise RuntimeError('{secret}')"
    )
    done = subprocess.run([sys.executable, "-c", crash], capture_output=True, text=True)
    assert done.returncode == 1
    assert secret not in done.stderr
    assert "WARNING:root:read ***" in done.stderr
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("RuntimeError: ***\n")


@pytest.mark.usefixtures("output_guard_restored")
def test_the_file_of_an_error_keeps_secrets(tiny_sd3_dir, tmp_path, monkeypatch):
    secret = "hf_" + "Pl4nt3d" * 5

    def fail(*_):
        raise ValueError(f"no file {secret}")

    write_rewards(tmp_path)
    config = tiny_config(tiny_sd3_dir, tmp_path)
    monkeypatch.setattr("am_diffusers.run.build.load_rewards", fail)
    monkeypatch.setattr(sys, "argv", [str(FINETUNE), "--config", str(config)])
    with pytest.raises(SystemExit, match=r"error: no file \*\*\*\n\(details: .*error.txt"):
        runpy.run_path(str(FINETUNE), run_name="__main__")
    written = (tmp_path / "out/error.txt").read_text()
    assert "ValueError: no file ***" in written
    assert secret not in written
