"""LLaVA in transformers. Oracles: its own loader, loss and gradients; our tokens; the language model before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image


@pytest.mark.parametrize(("layer", "size"), [(-1, 56), (-2, 84)])
def test_it_trains_a_step_on_our_features(run, language_model: Path, layer: int, size: int, tmp_path: Path) -> None:
    from transformers import AutoProcessor, LlamaForCausalLM, LlavaForConditionalGeneration

    flags = ["--language-model", str(language_model), "--image-size", str(size)]
    folder = run.export("llava", tmp_path / "llava", *flags, *([] if layer == -1 else ["--feature-layer", str(layer)]))
    llava, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    processor, ours = AutoProcessor.from_pretrained(folder), run.at(size)
    assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
    config, count = llava.config, (size // 14) ** 2
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (layer, "default")
    assert config.image_seq_length == count
    picture = Image.effect_noise((90, 70), 70).convert("RGB")
    batch = processor(images=picture, text="<image> what is this ?", return_tensors="pt")
    assert int((batch["input_ids"] == config.image_token_index).sum()) == count
    with torch.no_grad():
        found = llava.model.get_image_features(batch["pixel_values"])
        found = getattr(found, "pooler_output", found)[0]
        expected = llava.model.multi_modal_projector(ours.features(batch["pixel_values"], layer=layer))[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    before = LlamaForCausalLM.from_pretrained(language_model).state_dict()
    after = llava.model.language_model.state_dict()
    assert all(torch.equal(after[key.removeprefix("model.")], before[key]) for key in before if ".layers." in key)
    embeddings = llava.get_input_embeddings().weight[: len(before["model.embed_tokens.weight"])]
    assert torch.equal(embeddings, before["model.embed_tokens.weight"])
    _step(llava, batch)


def _step(llava, batch) -> None:
    """Alignment training as LLaVA has it: the projector alone learns, and the loss falls."""
    llava.requires_grad_(False)
    llava.model.multi_modal_projector.requires_grad_(True)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == llava.config.image_token_index, -100)
    optimizer = torch.optim.SGD(llava.model.multi_modal_projector.parameters(), lr=0.1)
    loss = llava(**batch, labels=labels).loss
    loss.backward()
    gradients = [parameter.grad for parameter in llava.model.multi_modal_projector.parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    optimizer.step()
    with torch.no_grad():
        assert llava(**batch, labels=labels).loss < loss
