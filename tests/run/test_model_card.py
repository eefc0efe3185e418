"""The model card: what it says, that its lines work, and that prompts can't break it."""

from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from am_diffusers.evaluation.held_out import Evaluation
from am_diffusers.evaluation.statistics import Comparison, Diversity, Estimate
from am_diffusers.models.base import Model
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.run.card import CardFacts, Loading, write_card
from am_diffusers.system.text import escape_markdown
from conftest import tiny_pipeline

FACTS = CardFacts(
    title="my_lora",
    base_model="owner/base-model",
    hub_base="owner/base-model",
    rewards=["pickscore (weight 1)", "hpsv2 (weight 0.5)"],
    method="Adjoint Matching",
    paper="2409.08861",
    law="10 iterations of 4 pictures.",
    source="prompts/train.txt",
    prompts=[f"prompt {i}" for i in range(40)],
    settings="output_dir: out\nrank: 4\n",
    resolution="64 x 64",
    loading=Loading(
        pipeline="StableDiffusion3Pipeline",
        base="owner/base-model",
        base_options={"revision": "'abc'"},
        load_from="out",
        subfolder="ema",
        prompt="a red fox",
        call={
            "height": 64,
            "width": 64,
            "max_sequence_length": 8,
            "num_inference_steps": 3,
            "guidance_scale": 1.5,
        },
    ),
)
EVALUATION = Evaluation(
    16,
    4,
    {"hpsv2": "held-out"},
    {
        "hpsv2": Comparison(
            num_prompts=16,
            images_per_prompt=4,
            base_mean=0.8,
            tuned_mean=0.82,
            base_sd=0.05,
            difference=Estimate(0.014, 0.009, 0.019),
            gain=Estimate(0.281, 0.18, 0.38),
            win_rate=Estimate(0.6, 0.5, 0.7),
            p_value=0.01,
        )
    },
    Diversity("hpsv2", 0.5, 0.48, Estimate(0.97, 0.87, 1.09)),
)


def make_card(folder, facts=FACTS, evaluation=EVALUATION):
    return ModelCard.load(write_card(folder, facts, evaluation))


def rendered(card):
    """HTML as a viewer of plain Markdown makes it."""
    return MarkdownIt("commonmark").render(card.text)


def code_block(card, language):
    (block,) = [t.content for t in MarkdownIt("commonmark").parse(card.text) if t.info == language]
    return block


def test_a_card_says_everything(tmp_path):
    for name in ("iteration-000000.png", "iteration-000010.png", "panel.png", "pictures.json"):
        (tmp_path / "samples").mkdir(exist_ok=True)
        (tmp_path / "samples" / name).touch()
    card = make_card(tmp_path)
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("owner/base-model", "adapter")
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert {"lora", "text-to-image", "adjoint-matching"} <= set(data["tags"])
    assert data["widget"] == [{"text": "a red fox", "output": {"url": "samples/iteration-000010.png"}}]
    html = rendered(card)
    for text in (
        "<h1>my_lora</h1>",
        'fine-tuned by Adjoint Matching (<a href="https://arxiv.org/abs/2409.08861">arXiv 2409.08861</a>)',
        '<img src="samples/iteration-000010.png"',
        '<img src="samples/panel.png"',
        '<a href="https://huggingface.co/owner/base-model">owner/base-model</a>',
        "pickscore (weight 1), hpsv2 (weight 0.5)",
        "<li>held-out reward hpsv2: +0.28 base sd [+0.18, +0.38] (0.8 -&gt; 0.82)</li>",
        "<li>diversity kept (hpsv2 image features): 97% [87%, 109%]</li>",
        "16 held-out prompts, 4 images",
        "Prompts: 40 from prompts/train.txt",
        "<li>prompt 4</li>",
        "pipe.load_lora_weights(&quot;out&quot;, subfolder=&quot;ema&quot;)",
        "averaged weights (EMA)",
        "64 x 64 pixels",
    ):
        assert text in html, text
    assert "prompt 5<" not in html
    assert code_block(card, "yaml") == "output_dir: out\nrank: 4\n"
    assert "revision='abc'" in code_block(card, "python")


def test_a_card_without_pictures_evaluation_and_hub_model(tmp_path):
    loading = replace(FACTS.loading, subfolder=None)
    facts = replace(FACTS, base_model="asset:tiny_sd3", hub_base=None, loading=loading)
    card = make_card(tmp_path, facts, None)
    assert not {"base_model", "base_model_relation", "widget"} & set(card.data.to_dict())
    html = rendered(card)
    assert "A LoRA for asset:tiny_sd3, fine-tuned" in html
    assert "Not evaluated on held-out prompts." in html
    for text in ("<img", "EMA", "subfolder", "None", "bootstrap"):
        assert text not in html


@pytest.mark.parametrize(
    "nasty",
    [
        "</details><script>alert(1)</script>",
        "a [link](http://evil) and ![image](http://evil/x.png)",
        "# heading * _star_ `code` ``` | ~~x~~ {{ jinja }} {% raw %}",
        "---\nline\n\n- list\n> quote",
        "1. one\n2) two &amp; <b>",
    ],
)
def test_prompts_are_shown_and_not_interpreted(tmp_path, nasty):
    loading = replace(FACTS.loading, prompt=nasty, load_from=nasty, base=nasty)
    facts = replace(
        FACTS, title=nasty, rewards=[nasty], source=nasty, prompts=[nasty], settings=nasty, loading=loading
    )
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/iteration-000001.png").touch()
    card = make_card(tmp_path, facts)
    assert card.data.to_dict()["widget"][0]["text"] == nasty
    body = rendered(card)
    code = [t for t in MarkdownIt("commonmark").parse(card.text) if t.type == "fence"]
    assert [t.info for t in code] == ["python", "yaml"]
    assert code[1].content.strip() == nasty.strip()
    compile(code[0].content, "card", "exec")
    ours = rendered(make_card(tmp_path))
    for tag in (
        "<script",
        "<b>",
        "<h1",
        "<h2",
        "<hr",
        "<em",
        "<blockquote",
        "<ol",
        "<li",
        "<a ",
        "<img",
        "<details",
    ):
        assert body.count(tag) == ours.count(tag) - (4 if tag == "<li" else 0), tag


@pytest.mark.parametrize("text", ["a_b*c", "[x](y)", "<b> & &lt;", "#1 - 2. + ~3~ | `4` !5 {6} \\7 a:b @me"])
def test_escaping_shows_the_text_itself(text):
    shown = MarkdownIt("commonmark").parseInline(escape_markdown(text))[0].children
    assert "".join(token.content for token in shown) == text


def test_secrets_stay_out(tmp_path, monkeypatch):
    secret = "hf_" + "A1b2" * 8
    monkeypatch.setenv("SERVICE_TOKEN", "opensesame")
    facts = replace(
        FACTS,
        title=secret,
        base_model=f"https://me:{secret}@host/model",
        hub_base=None,
        prompts=["opensesame"],
        source=f"/data/{secret}",
        settings=f"output_dir: {secret}\n",
        loading=replace(FACTS.loading, prompt="opensesame", load_from=f"out/{secret}"),
    )
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/iteration-000001.png").touch()
    text = str(make_card(tmp_path, facts))
    assert secret not in text
    assert "opensesame" not in text
    assert text.count("\\*\\*\\*") >= 4


@pytest.mark.parametrize("subfolder", [None, "ema"])
def test_the_lines_of_the_card_make_the_tuned_picture(tmp_path, monkeypatch, subfolder):
    """A base model with all its text encoders, as the released ones: they load by one plain line."""
    tiny_pipeline(t5=True).save_pretrained(tmp_path / "base")
    model = Model.from_pretrained(Pretrained(str(tmp_path / "base")))
    model.attach_lora(rank=4)
    for parameter in model.lora_parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    model.save_lora(tmp_path / "out" / (subfolder or ""))
    paths = {"base": str(tmp_path / "base"), "load_from": str(tmp_path / "out"), "subfolder": subfolder}
    loading = replace(FACTS.loading, base_options={}, **paths)
    card = make_card(tmp_path / "out", replace(FACTS, loading=loading))
    monkeypatch.chdir(tmp_path)
    exec(code_block(card, "python"), {})
    made = torch.tensor(list(Image.open("picture.png").get_flattened_data()), dtype=torch.float32)

    def expected(pipe):
        call = FACTS.loading.call | {"generator": torch.Generator().manual_seed(0)}
        picture = pipe("a red fox", **call).images[0]
        return torch.tensor(list(picture.get_flattened_data()), dtype=torch.float32)

    assert (made - expected(model.pipeline())).abs().max() <= 1
    base = StableDiffusion3Pipeline.from_pretrained(tmp_path / "base")
    assert (made - expected(base)).abs().max() > 10
