"""README.md of an output folder: what the LoRA is, how to load it, how it was made and what it is worth.

By `huggingface_hub`'s card classes and a template of our own: Diffusers' leaves TODOs to the user, and
its helper asks the hub whether there is a card already.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData

from am_diffusers.evaluation.held_out import Evaluation
from am_diffusers.system.files import ASSETS, write_text
from am_diffusers.system.text import escape_markdown, redact_values

TEMPLATE = ASSETS / "model_card.md.jinja"
TAGS = (
    "text-to-image",
    "diffusers-training",
    "diffusers",
    "lora",
    "template:sd-lora",
    "reward-fine-tuning",
)
EXAMPLES = 5
LONGEST_EXAMPLE = 160


@dataclass(frozen=True)
class Loading:
    """Diffusers code that makes images with the result of a run.

    Attributes:
        pipeline: class of the pipeline.
        base: hub id or folder of the base model.
        base_options: further arguments of its `from_pretrained`, as Python source by name.
        load_from: hub id or folder of the LoRA.
        subfolder: subfolder of `load_from` with the LoRA that images and evaluation use; None = none.
        prompt: example prompt.
        call: numbers and texts of the pipeline call, by argument.
    """

    pipeline: str
    base: str
    base_options: dict[str, str]
    load_from: str
    subfolder: str | None
    prompt: str
    call: dict[str, float | str]

    def snippet(self) -> str:
        """Return Python source that renders one image."""
        options = "".join(f", {name}={value}" for name, value in self.base_options.items())
        inside = f", subfolder={json.dumps(self.subfolder)}" if self.subfolder else ""
        return "\n".join(
            [
                "import torch",
                f"from diffusers import {self.pipeline}",
                "",
                f"pipe = {self.pipeline}.from_pretrained({json.dumps(self.base)}{options})",
                f"pipe.load_lora_weights({json.dumps(self.load_from)}{inside})",
                "pipe(",
                f"    {_python(self.prompt)},",
                *(f"    {name}={_python(value)}," for name, value in self.call.items()),
                "    generator=torch.Generator().manual_seed(0),",
                ').images[0].save("picture.png")',
            ]
        )


@dataclass(frozen=True)
class CardFacts:
    """Content of a card, besides the files in the output folder.

    Attributes:
        title: heading.
        base_model: the base model as the user named it.
        hub_base: hub id of the base model; None for a folder, which the metadata of a card can't name.
        rewards: what was trained, one text each.
        method: name of the fine-tuning method; also a tag.
        paper: arXiv number of the method's paper.
        law: sentence on what the training aims at.
        source: where the training prompts come from.
        prompts: the training prompts.
        settings: the resolved config as YAML.
        resolution: width and height of the images in pixels, for instance `832 x 480`.
        loading: code that makes an image.
    """

    title: str
    base_model: str
    hub_base: str | None
    rewards: list[str]
    method: str
    paper: str
    law: str
    source: str
    prompts: list[str]
    settings: str
    resolution: str
    loading: Loading


def write_card(folder: Path, facts: CardFacts, evaluation: Evaluation | None) -> Path:
    """Write `folder/README.md`, with the newest grid and the training curves in `folder/samples`.

    Args:
        folder: output folder of the run.
        facts: facts about the run; secrets in them are redacted.
        evaluation: results of the evaluation; None if there was none.
    """
    # Before anything is quoted or escaped: afterwards a secret might not be recognised.
    clean = cast(dict[str, Any], redact_values(asdict(facts)))
    clean["loading"] = Loading(**clean["loading"])
    facts = CardFacts(**clean)
    grids = sorted((folder / "samples").glob("iteration-*.png"))
    grid = f"samples/{grids[-1].name}" if grids else None
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=facts.hub_base,
        base_model_relation="adapter" if facts.hub_base else None,
        widget=[{"text": facts.loading.prompt, "output": {"url": grid}}] if grid else None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        grid=grid,
        **_texts(facts),
        **_files(folder),
        **_results(evaluation),
    )
    populate_model_card(card, [*TAGS, facts.method.lower().replace(" ", "-")])
    file = folder / "README.md"
    write_text(file, str(card))
    return file


def _texts(facts: CardFacts) -> dict[str, Any]:
    named = escape_markdown(facts.base_model)
    backticks = max((len(run) for run in re.findall("`+", facts.settings)), default=0)
    return {
        "title": escape_markdown(facts.title),
        "base": f"[{named}](https://huggingface.co/{facts.hub_base})" if facts.hub_base else named,
        "rewards": ", ".join(escape_markdown(reward) for reward in facts.rewards),
        "method": facts.method,
        "paper": facts.paper,
        "law": facts.law,
        "snippet": facts.loading.snippet(),
        "averaged": facts.loading.subfolder is not None,
        "num_train": len(facts.prompts),
        "source": escape_markdown(facts.source),
        "examples": [escape_markdown(_shorten(prompt)) for prompt in facts.prompts[:EXAMPLES]],
        "settings": facts.settings.rstrip("\n"),
        "fence": "`" * max(3, backticks + 1),
        "resolution": facts.resolution,
    }


def _files(folder: Path) -> dict[str, Any]:
    def present(name: str) -> str | None:
        return name if (folder / name).exists() else None

    return {
        "seeds": present("samples/pictures.json"),
        "panel": present("samples/panel.png"),
    }


def _results(evaluation: Evaluation | None) -> dict[str, Any]:
    if evaluation is None:
        return {"headline": []}
    return {
        "headline": [escape_markdown(line) for line in evaluation.headline()],
        "num_prompts": evaluation.num_prompts,
        "images_per_prompt": evaluation.images_per_prompt,
    }


def _python(value: float | str) -> str:
    """Return a number or a text as Python source; JSON would write characters beyond 16 bits as two."""
    return json.dumps(value, ensure_ascii=False)


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_EXAMPLE else text[:LONGEST_EXAMPLE].rstrip() + " ..."
