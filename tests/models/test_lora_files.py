"""LoRA files of other programs: read exactly, or refused with one line that says what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from am_diffusers.models.adapters import lora_layers
from am_diffusers.models.base import Model
from am_diffusers.models.export import FORMS as TARGETS
from am_diffusers.models.export import ExportOptions, export_lora
from am_diffusers.models.pretrained import Pretrained
from families import direct, point, redraw_lora
from lora_forms import FORMS, bad_files, write_forms


@pytest.fixture(scope="module")
def forms(tiny_sd3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_forms(tiny_sd3_dir, tmp_path_factory.mktemp("forms"))


@pytest.fixture(scope="module")
def bad(forms: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    return bad_files(forms["own"], tmp_path_factory.mktemp("bad"))


def policy(model: Model) -> Tensor:
    with torch.no_grad():
        return model.policy(*point(model))


def loaded(base: Path, file: Path, scale: float = 1.0) -> Model:
    model = Model.from_pretrained(Pretrained(str(base)))
    model.load_lora(file, scale=scale)
    return model


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_lora_that_this_program_writes(
    forms: dict[str, Path], tiny_sd3_dir: Path, form: str, scale: float
) -> None:
    expected = policy(loaded(tiny_sd3_dir, forms["own"], scale))
    base = policy(Model.from_pretrained(Pretrained(str(tiny_sd3_dir))))
    assert (expected - base).abs().max() > 0.1 * base.abs().max()
    assert (policy(loaded(tiny_sd3_dir, forms[form], scale)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_patterns_mean_what_they_mean_to_peft(
    tiny_sd3_dir: Path, tmp_path: Path, use_rslora: bool
) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["attn.to_q", "attn.to_v", "proj_out"],
        rank_pattern={"attn.to_v": 2, "transformer_blocks.1.attn.to_q": 3},
        alpha_pattern={"transformer_blocks.0.attn.to_q": 10},
        use_rslora=use_rslora,
    )
    model = Model.from_pretrained(Pretrained(str(tiny_sd3_dir)))
    peft = get_peft_model(model.network, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in peft.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(str(tmp_path))
    with torch.no_grad():
        expected = direct(peft, *point(model))
    other = loaded(tiny_sd3_dir, tmp_path)
    assert torch.allclose(policy(other), expected, atol=1e-5)
    # As this program writes it, with one rank for all layers: loaders without metadata take alpha = rank.
    again = other.save_lora(tmp_path / "again")
    assert len({len(v) for k, v in load_file(again).items() if "lora_A" in k}) == 1
    assert torch.allclose(policy(loaded(tiny_sd3_dir, again)), expected, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", ["peft", "kohya", "comfyui"])
def test_every_form_is_exported(
    forms: dict[str, Path], tiny_sd3_dir: Path, tmp_path: Path, form: str, target: str
) -> None:
    file = tmp_path / ("merged" if target == "merged" else "x.safetensors")
    proof = export_lora(Pretrained(str(tiny_sd3_dir)), ExportOptions(forms[form]), file, target)
    assert proof.error < 1e-4
    made = Model.from_pretrained(Pretrained(str(file if target == "merged" else tiny_sd3_dir)))
    if target != "merged":
        made.load_lora(file)
    expected = policy(loaded(tiny_sd3_dir, forms["own"]))
    assert (policy(made) - expected).abs().max() < 1e-4 * expected.abs().max()


BAD = (
    *("dora", "peft_dora", "loha", "lokr", "difference", "native", "kohya_native", "text", "kohya_text"),
    *("wide", "deep", "half", "ranks", "nan", "empty", "cut", "page", "pointer", "nothing", "missing"),
    "pickle",
)


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(bad, tiny_sd3_dir: Path, name: str) -> None:
    file, message = bad[name]
    fresh = Model.from_pretrained(Pretrained(str(tiny_sd3_dir)))
    with pytest.raises(ValueError, match=message) as error:
        fresh.load_lora(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert not lora_layers(fresh.network)


def edited_peft(forms: dict[str, Path], folder: Path, **changes: object) -> Path:
    shutil.copytree(forms["peft"], folder / "peft")
    file = folder / "peft/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder / "peft"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "is a DoRA"),
        ({"peft_type": "LOHA"}, "is a LOHA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa changes the base too"),
        ({"r": 8}, "says rank 8 for .*, its weights have 4"),
        ({"lora_alpha": None}, "no number lora_alpha"),
    ],
)
def test_peft_configs_that_mean_something_else_are_refused(
    forms: dict[str, Path], tiny_sd3_dir: Path, tmp_path: Path, changes, message: str
) -> None:
    folder = edited_peft(forms, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        loaded(tiny_sd3_dir, folder)


def test_a_peft_file_without_its_config_is_refused(
    forms: dict[str, Path], tiny_sd3_dir: Path, tmp_path: Path
) -> None:
    shutil.copy(forms["peft_file"], tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config.json.* holds the strength"):
        loaded(tiny_sd3_dir, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is no JSON"):
        loaded(tiny_sd3_dir, tmp_path)


def test_a_file_of_two_strengths_is_refused(
    forms: dict[str, Path], tiny_sd3_dir: Path, tmp_path: Path
) -> None:
    with safe_open(forms["metadata"], "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(forms["alphas"]), tmp_path / "same.safetensors", metadata=metadata)
    loaded(tiny_sd3_dir, tmp_path / "same.safetensors")
    state = {k: v / 2 if k.endswith(".alpha") else v for k, v in load_file(forms["alphas"]).items()}
    save_file(state, tmp_path / "two.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="two strengths"):
        loaded(tiny_sd3_dir, tmp_path / "two.safetensors")


def test_loading_leaves_the_global_generator_alone(forms: dict[str, Path], tiny_sd3_dir: Path) -> None:
    model = Model.from_pretrained(Pretrained(str(tiny_sd3_dir)))
    before = torch.get_rng_state()
    model.load_lora(forms["peft"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("form", ["own", *FORMS])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 8), (6, 3)])
def test_a_lora_starts_as_that_of_a_file(
    forms: dict[str, Path], tiny_sd3_dir: Path, form: str, rank: int, alpha: int
) -> None:
    """Whatever its alpha is; ranks and layers that the file lacks start as the identity."""
    model = Model.from_pretrained(Pretrained(str(tiny_sd3_dir)))
    base = policy(model)
    model.attach_lora(rank=rank, lora_alpha=alpha, layers=(*model.family.lora_layers, "proj_out"))
    model.start_lora(forms[form])
    assert torch.allclose(policy(model), policy(loaded(tiny_sd3_dir, forms["own"])), atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model.base(*point(model)), base)
    more = [layer.lora_A["default"].weight[4:] for layer in lora_layers(model.network).values()]
    assert all(bool(rows.any()) for rows in more) == (rank > 4)  # they can be trained


@pytest.mark.parametrize(
    ("rank", "layers", "message"),
    [
        (3, None, "has rank 4, this one 3: set --rank 4 or more"),
        (4, ("attn.to_q",), r"set --lora_layers '\[.*\"attn.to_v\".*\]'"),
    ],
)
def test_a_lora_that_a_run_has_no_room_for_is_refused(
    forms: dict[str, Path], model: Model, rank: int, layers, message: str
) -> None:
    model.attach_lora(rank=rank, layers=layers)
    with pytest.raises(ValueError, match=message):
        model.start_lora(forms["peft"])


def test_a_fused_lora_is_in_the_base_and_in_what_is_saved(
    forms: dict[str, Path], tiny_sd3_dir: Path, tmp_path: Path
) -> None:
    model = Model.from_pretrained(Pretrained(str(tiny_sd3_dir)))
    model.fuse_lora(forms["peft"])
    expected = policy(loaded(tiny_sd3_dir, forms["own"]))
    with torch.no_grad():
        assert torch.allclose(model.base(*point(model)), expected, atol=1e-5)
    model.attach_lora(rank=3, lora_alpha=5, layers=("attn.to_q", "attn.to_v", "proj_out"))
    redraw_lora(model, 1)
    tuned = policy(model)
    assert (tuned - expected).abs().max() > 0.1 * expected.abs().max()
    file = model.save_lora(tmp_path)
    assert torch.allclose(policy(loaded(tiny_sd3_dir, file)), tuned, atol=1e-5)
    pipe = Model.from_pretrained(Pretrained(str(tiny_sd3_dir))).pipeline()
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        assert torch.allclose(direct(pipe.transformer, *point(model)), tuned, atol=1e-5)
