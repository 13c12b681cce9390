"""What `ov2 plan --vlm` estimates. Oracles: FlopCounterMode, what autograd keeps, transformers' own models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from open_clip_ov2.cli import main
from open_clip_ov2.recipe.costs import Machine
from open_clip_ov2.recipe.model_costs import PRECISION, Stack
from open_clip_ov2.vlm.vlm_costs import LANGUAGE_MODELS, _flops, language_model_sizes, plan_costs
from open_clip_ov2.vlm.vlm_plan import commands, plan_of_recipe
from open_clip_ov2.vlm.vlm_recipe import LANGUAGE_MODEL, TOWER, load_vlm_recipe


def llama(device: str, **sizes: int) -> LlamaForCausalLM:
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="eager"))


@pytest.mark.parametrize("number", [0, 1])
def test_flops_of_the_language_model(number: int, tmp_path: Path) -> None:
    """Oracle: FlopCounterMode of forward and backward; in the first stage the language model is frozen."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = llama("cpu", **sizes, num_key_value_heads=1, vocab_size=50)
    model.config.save_pretrained(tmp_path)
    words, stage, length = language_model_sizes(str(tmp_path)), load_vlm_recipe("llava-1.5").stages[number], 24
    model.requires_grad_(LANGUAGE_MODEL in stage.trains)
    embeddings = torch.randn(1, length, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embeddings).logits.sum().backward()
    stack = Stack(LANGUAGE_MODEL, words.tower, words.layers, length, length, length**2)
    blocks = {LANGUAGE_MODEL: stack, TOWER: stack}
    found = _flops(stage, blocks, 0.0, 2.0 * length * words.width * words.vocabulary)
    assert found[LANGUAGE_MODEL].total == counter.get_total_flops()


@pytest.mark.parametrize("name", ["lmsys/vicuna-7b-v1.5", "meta-llama/Meta-Llama-3-8B-Instruct"])
def test_known_language_models(name: str) -> None:
    """Oracle: transformers' model of these sizes, without memory. Norms are left out."""
    sizes = language_model_sizes(name)
    model = llama(
        "meta", hidden_size=sizes.width, intermediate_size=sizes.mlp_width, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, vocab_size=sizes.vocabulary,
    )  # fmt: skip
    assert sizes.parameters == sum(value.numel() for value in model.parameters() if value.dim() > 1)
    assert f'["{name}"]' in LANGUAGE_MODELS.read_text()


@contextmanager
def kept_bytes(model: torch.nn.Module) -> Iterator[list[int]]:
    """Bytes that autograd keeps beside the weights."""
    own, seen, total = {value.data_ptr() for value in model.parameters()}, {}, [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and seen.setdefault(storage.data_ptr(), tensor) is tensor:
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def test_memory_of_activations(tmp_path: Path) -> None:
    """Oracle: what autograd keeps of a Llama in float32, without fusion."""
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50, attn_implementation="sdpa"))
    model.config.save_pretrained(tmp_path)
    words, length = language_model_sizes(str(tmp_path)), 64
    with kept_bytes(model) as total:
        outputs = model.model(inputs_embeds=torch.randn(2, length, 128, requires_grad=True))
    assert outputs.last_hidden_state.requires_grad
    estimated = 2 * words.layers * words.block_bytes(length, PRECISION["fp32"])
    assert estimated == pytest.approx(total[0], rel=0.1)


def test_llava_15_on_eight_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the published steps; weights, gradients, moments, buckets and bf16 copies of DistributedDataParallel by
    hand; hours from the table's own FLOP; commands that do not fit are replaced by some whose own plan fits."""
    argv = ["ViT-L-14-336-quickgelu:openai", "--gpus", "8"]
    assert main(["plan", "--vlm", "llava-1.5", *argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    stages, parameters = found["stages"], found["parameters"]
    assert [stage["steps"] for stage in stages] == [2181, 5198]
    trained = parameters["projector"] + parameters["language-model"]
    expected = trained * (4 * 4 + 2 + 4) + parameters["tower"] * 2
    assert stages[1]["memory_bytes"]["fixed"] == pytest.approx(expected, rel=1e-9)
    for stage in stages:
        assert stage["hours"] == pytest.approx(stage["flop"] / (8 * 0.5 * 790e12) / 3600)
    assert main(["plan", "--vlm", "llava-1.5", *argv]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "not even one image fits; use --trainer FILE.toml with fsdp" in shown
    data = "--align-data FILE --align-images FOLDER --tune-data FILE --tune-images FOLDER"
    more = "--trainer fsdp.toml --grad-checkpointing"
    words = f"vlm train {argv[0]} --recipe llava-1.5 --out vlm/llava-1.5 {more} {data}"
    assert f"torchrun --nproc-per-node 8 -m open_clip_ov2 -- {words} ov2 submit --nodes 1" in shown
    assert "echo 'fsdp = true' > fsdp.toml" in shown
    (tmp_path / "fsdp.toml").write_text("fsdp = true\n")
    smaller = [argv[0], "--trainer", str(tmp_path / "fsdp.toml"), "--grad-checkpointing"]
    assert all(stage.fits for stage in plan_costs(plan_of_recipe("llava-1.5", smaller), Machine(8)).stages)
    assert main(["plan", "--vlm", "llava-1.5", *smaller, "--gpus", "8"]) == 0
    assert "echo" not in capsys.readouterr().out


def test_a_plan_counts_the_data_that_is_given(parts: Path) -> None:
    """Oracle: the rows of the fixture, and words times 4 / 3; grids by LLaVA-NeXT's formula."""
    names = ("align", "tune")
    data = [word for name in names for word in (f"--{name}-data", str(parts / "data" / f"{name}.json"))]
    more = ["--language-model", str(parts / "lm"), "--batch-size", "2"]
    plan = plan_of_recipe(str(parts / "recipe.toml"), [str(parts / "encoder"), *data, *more])
    costs = plan_costs(plan, Machine(1))
    assert [stage.samples for stage in costs.stages] == [20, 20]
    rows = json.loads((parts / "data" / "align.json").read_text())
    words = sum(len(turn["value"].split()) for row in rows for turn in row["conversations"])
    assert (costs.stages[0].tokens.encoder, costs.stages[0].tokens.kept) == (17, 16)
    assert costs.stages[0].tokens.text == round(4 / 3 * words / 20)
    grids = plan_of_recipe("open-llava-next", ["ov2-vit-l-14"])
    tokens = plan_costs(grids, Machine(8)).stages[1].tokens
    assert (tokens.encoder, tokens.kept) == (5 * 257, 256 + 32 * 33)


def test_commands_are_for_as_many_gpus_as_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: nodes times GPUs of each."""
    for gpus, nodes in ((4, 1), (12, 1), (16, 2)):
        plan = plan_of_recipe("llava-1.5", ["ViT-L-14-336-quickgelu:openai"])
        *here, submitted = commands(plan, gpus)
        assert f"--nodes {nodes} --gpus-per-node {gpus // nodes} " in submitted
        assert len(here) == (nodes == 1)
