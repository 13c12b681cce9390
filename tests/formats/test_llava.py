"""LLaVA in transformers. Oracles: its own loader, loss and gradients; our tokens; the language model before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from open_clip_ov2.formats.llava import open_language_model


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


def test_a_gguf_file_is_a_model_that_can_be_trained(tmp_path: Path) -> None:
    """As SmolLM2 comes by pip, with blocks of Q8_0. Oracle: the blocks, unpacked by the package gguf; Trainer refuses a
    model that is called quantized, and one that is opened again from a config that says so."""
    gguf = pytest.importorskip("gguf")
    writer, rng = gguf.GGUFWriter(tmp_path / "words.gguf", "llama"), np.random.default_rng(0)
    width, hidden, words = 32, 64, ["<s>", "</s>", "a", "b", "ab", "c"]
    for add, value in (
        (writer.add_context_length, 64), (writer.add_embedding_length, width), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, hidden), (writer.add_head_count, 2), (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_dimension_count, 16), (writer.add_vocab_size, 6),
        (writer.add_tokenizer_model, "gpt2"), (writer.add_token_list, words), (writer.add_token_merges, ["a b"]),
        (writer.add_bos_token_id, 0), (writer.add_eos_token_id, 1),
    ):  # fmt: skip
        add(value)
    kind, packed = gguf.GGMLQuantizationType.Q8_0, {}
    shapes = {f"attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
    shapes |= {"ffn_gate": (hidden, width), "ffn_up": (hidden, width), "ffn_down": (width, hidden)}
    for name, shape in {"token_embd": (6, width), **{f"blk.0.{name}": one for name, one in shapes.items()}}.items():
        packed[name] = gguf.quantize(rng.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", packed[name], raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model, _ = open_language_model(tmp_path, "words.gguf")
    assert not getattr(model, "is_quantized", False)
    assert "quantization_config" not in model.config.to_dict()
    state = model.state_dict()
    for ours, theirs in (("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        found = state[f"model.layers.0.{ours}.weight"]
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), gguf.dequantize(packed[f"blk.0.{theirs}"], kind))


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
