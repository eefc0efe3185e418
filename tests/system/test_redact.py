"""No secret survives `redact`; what isn't one does."""

import pytest
import yaml

from am_diffusers.system.text import redact, redact_values

HF = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
HEX = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"runs/{HF}/out", "runs/***/out"),
        (f"run_{HF}_2", "run_***_2"),
        ("api_org_" + "a" * 30, "***"),
        ("hf_oauth_" + "eyJhbGciOiJSUzI1NiJ9.eyJzdWIi.c2ln-_x", "***"),
        (f"https://user:{HF}@host/m", "https://***@host/m"),
        ("https://user:p@ss@host/m", "https://***@host/m"),
        ("cannot load git+ssh://me@host/m", "cannot load git+ssh://***@host/m"),
        ("'s3://AKIAIOSFODNN7EXAMPLE/x'", "'s3://***/x'"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "aws_secret_access_key = ***"),
        ('{"api_key": "sk-123456789", "n": 1}', '{"api_key": "***", "n": 1}'),
        (f"wandb: login with {HEX}", "wandb: login with ***"),
        (f"machine api.wandb.ai login user password {HEX}", "machine api.wandb.ai login user password ***"),
        ("wandb_v1_" + "Zz9_" * 10, "***"),
    ],
)
def test_secrets_go(text, expected):
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        f"revision: {HEX}\nrewards: [{{name: hpsv2, revision: {HEX}, sha256: {HEX}{'0' * 24}}}]",
        "max_sequence_length: 256",
        "hf_hub_download of hf_transfer",
        "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium",
        "unexpected token: background",
        "mail me@example.org",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_values_of_the_environment_go(monkeypatch):
    monkeypatch.setenv("MY_SECRET", "correct horse battery")
    monkeypatch.setenv("MY_OTHER_SECRET", "correct horse")
    monkeypatch.setenv("SERVICE_API_KEY", "0000-1111-2222")
    monkeypatch.setenv("DB_PASSWORD", "letmein")  # 7 characters: too short to tell from a word
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled")
    monkeypatch.setenv("EDITOR", "a good editor")
    text = "correct horse battery, 0000-1111-2222, letmein, disabled, a good editor"
    assert redact(text) == "***, ***, letmein, disabled, a good editor"


def test_data_stays_readable_as_yaml():
    data = {"output_dir": HF, "prompts": [f"a {HF}"], "seed": 0, "rewards": [{"model": None, "weight": 1.5}]}
    assert yaml.safe_load(yaml.safe_dump(redact_values(data))) == {
        "output_dir": "***",
        "prompts": ["a ***"],
        "seed": 0,
        "rewards": [{"model": None, "weight": 1.5}],
    }
