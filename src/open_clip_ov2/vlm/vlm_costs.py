"""FLOPs, memory and hours of a run of `ov2 vlm train`, before a GPU is asked for.

The estimate is that of `recipe/model_costs.py`: equal blocks, matrix products, and what autograd keeps of a block. One
image there is a conversation with its picture here; with any-resolution grids, every picture takes the largest.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import UserError, first_line
from open_clip_ov2.recipe.costs import Machine, Plan, StageCost
from open_clip_ov2.recipe.model_costs import PRECISION, Flops, Memory, Precision, Stack, Tokens, Tower, fixed_bytes
from open_clip_ov2.tables import from_table, key, read_toml, whole
from open_clip_ov2.vlm.conversations import read_rows
from open_clip_ov2.vlm.vlm_options import FP32, VlmPlan
from open_clip_ov2.vlm.vlm_recipe import LANGUAGE_MODEL, PROJECTOR, TOWER, VlmStage

LANGUAGE_MODELS = Path(__file__).with_name("language_models.toml")
TEXT_TOKENS = {"align": 24, "knowledge": 160, "tune": 256}  # ours: of a conversation's text, if its data is not given
TOKENS_PER_WORD = 4 / 3  # ours


@dataclass(frozen=True)
class LanguageModelSizes:
    """Of a Llama: three matrices in the MLP, and `kv_heads` heads for keys and values."""

    width: int = key(whole(1))
    layers: int = key(whole(1))
    heads: int = key(whole(1))
    kv_heads: int = key(whole(1))
    mlp_width: int = key(whole(1))
    vocabulary: int = key(whole(1))

    @property
    def block(self) -> int:
        """Weights of a block's matrices."""
        return 2 * self.width**2 * (self.heads + self.kv_heads) // self.heads + 3 * self.width * self.mlp_width

    @property
    def tower(self) -> Tower:
        """Blocks with as many weights, of which four matrices are square and two are the MLP."""
        return Tower(self.width, self.layers, self.heads, (self.block - 4 * self.width**2) // (2 * self.width))

    def block_bytes(self, tokens: int, precision: Precision) -> float:
        """What autograd keeps of a block: of both norms their inputs and what the weight multiplies, in float32; then
        their outputs, query, key, value, what attention gives and its copy, a residual, and the MLP's four tensors."""
        width = self.width * (4 * precision.norm + 8 * precision.activation)
        return float(tokens * (width + 4 * self.mlp_width * precision.activation + 4 * self.heads))

    @property
    def parameters(self) -> int:
        return self.layers * self.block + 2 * self.vocabulary * self.width


def language_model_sizes(name: str) -> LanguageModelSizes:
    """Of a name in language_models.toml, a folder or a hub name. Raises UserError."""
    known = read_toml(LANGUAGE_MODELS)
    if name in known:
        return from_table(LanguageModelSizes, str(LANGUAGE_MODELS), known[name])
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=Path(name).is_dir())
        heads = config.num_attention_heads
        return LanguageModelSizes(
            config.hidden_size, config.num_hidden_layers, heads, getattr(config, "num_key_value_heads", heads),
            config.intermediate_size, config.vocab_size,
        )  # fmt: skip
    except Exception as error:  # OSError, ValueError, the hub's own, AttributeError of another kind of model
        raise UserError(f"--language-model {name}: its sizes cannot be read ({first_line(error)})") from error


def encoder_sizes(name: str, image_size: int | None) -> tuple[Tower, int, int, int]:
    """(blocks, px of a side, patches of a side, parameters). A model of OpenCLIP's registry is not loaded; all else is
    opened. Raises UserError."""
    from open_clip_ov2 import training

    if (facts := training.registered_facts(name.partition(":")[0], image_size)) is not None:
        encoder = facts.sizes.encoder
        return encoder.tower, facts.resolution, facts.resolution // encoder.patch_size, facts.parameters["encoder"]
    from open_clip_ov2.vlm.towers import open_tower

    opened = open_tower(name, image_size)
    config = opened.model.config
    tower = Tower(config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    count = sum(value.numel() for value in opened.model.parameters())
    return tower, opened.image_size, opened.image_size // opened.patch_size, count


def samples_of(plan: VlmPlan, stage: VlmStage) -> int:
    """Rows of the stage's file or, if it was not given, of its published data. Raises UserError."""
    samples = _counted(plan, stage)[0] or stage.samples
    if not samples:
        raise UserError(
            f"--{stage.data}-data is missing: recipe {plan.options.recipe} does not say how many rows it has"
        )
    return samples


def _counted(plan: VlmPlan, stage: VlmStage) -> tuple[int, int]:
    """Rows and words of the stage's file; zeros if it was not given. Raises UserError."""
    file = getattr(plan.options, f"{stage.data}_data")
    return _counted_in(file, changed_ns=file.stat().st_mtime_ns) if file is not None and file.is_file() else (0, 0)


@functools.cache
def _counted_in(file: Path, changed_ns: int) -> tuple[int, int]:
    """Parsed once; again if the file has changed."""
    rows = read_rows(file)
    turns = (turn for row in rows if isinstance(row, dict) for turn in row.get("conversations") or ())
    return len(rows), sum(len(str(turn.get("value")).split()) for turn in turns if isinstance(turn, dict))


def plan_costs(plan: VlmPlan, machine: Machine, sharded: bool | None = None) -> Plan:
    """`sharded`: whether the weights are split over the GPUs (default: as the plan says). Raises UserError if the sizes
    of a part, or the length of a stage, are unknown."""
    words, recipe = language_model_sizes(plan.language_model), plan.recipe
    tower, size, side, encoder = encoder_sizes(plan.encoder, recipe.image_size)
    projector = (tower.width + words.width + 2) * words.width
    parameters = {TOWER: encoder, PROJECTOR: projector, LANGUAGE_MODEL: words.parameters}
    images, seen = 1, side**2
    if recipe.grids:  # the picture and its parts, and a newline after each row of tokens
        rows, columns = max(recipe.grids, key=lambda cells: cells[0] * cells[1])
        images, seen = 1 + rows * columns, side**2 + rows * side * (columns * side + 1)
    sharded = plan.sharded if sharded is None else sharded
    remedy = "more GPUs" if sharded else "--trainer FILE.toml with fsdp, which splits the weights over the GPUs,"
    stages = []
    for number, stage in enumerate(recipe.stages):
        samples, text = samples_of(plan, stage), min(_text_tokens(plan, stage), max(1, stage.max_length - seen))
        batch, accumulated = plan.accumulation(stage, machine.gpus)
        blocks = {
            TOWER: Stack(TOWER, tower, images * tower.layers, side**2 + 1, side**2 + 1, (side**2 + 1) ** 2),
            LANGUAGE_MODEL: Stack(
                LANGUAGE_MODEL, words.tower, words.layers, seen + text, seen + text, (seen + text) ** 2
            ),
        }
        head = 2.0 * text * words.width * words.vocabulary
        stages.append(
            StageCost(
                title=f"{number + 1} {stage.data}", images=f"{size} px", resolution=size,
                samples=samples * stage.epochs,
                tokens=Tokens(images * (side**2 + 1), seen, text, text), batch_size=batch, accum_freq=accumulated,
                lr=stage.lr, warmup_steps=round(stage.warmup_ratio * stage.steps(samples)),
                precision=plan.options.precision or "bf16", grad_checkpointing=plan.options.grad_checkpointing,
                context_length=stage.max_length, parts=_flops(stage, blocks, 2.0 * seen * projector, head),
                memory=_memory(plan, stage, parameters, blocks[TOWER], words, seen + text, machine.gpus, sharded),
                machine=machine, speed=machine.speed(number, len(recipe.stages)), remedy=remedy,
            )
        )  # fmt: skip
    return Plan(f"{plan.encoder} and {plan.language_model}", parameters, tuple(stages), {}, machine)


def _text_tokens(plan: VlmPlan, stage: VlmStage) -> int:
    """The mean of a conversation."""
    rows, words = _counted(plan, stage)
    return max(1, round(TOKENS_PER_WORD * words / rows)) if rows else TEXT_TOKENS[stage.data]


def _flops(stage: VlmStage, blocks: Mapping[str, Stack], projector: float, head: float) -> dict[str, Flops]:
    """Of a conversation. The gradients of weights cost as much as the forward pass, and so do those of what goes in,
    which a frozen language model has to give as well. Attention has no weights, and costs both in any case."""
    words = blocks[LANGUAGE_MODEL]
    forward = {TOWER: blocks[TOWER].flops(), PROJECTOR: projector, LANGUAGE_MODEL: words.flops() + head}
    attention = words.blocks * 4.0 * words.pairs * words.tower.width
    frozen = {
        TOWER: forward[TOWER], PROJECTOR: 2 * projector, LANGUAGE_MODEL: 2 * forward[LANGUAGE_MODEL] + attention
    }  # fmt: skip
    return {
        part: Flops(
            3 * value if part in stage.trains else frozen[part],
            value if part in (*stage.trains, LANGUAGE_MODEL) else 0.0,
        )
        for part, value in forward.items()
    }


def _memory(
    plan: VlmPlan, stage: VlmStage, parameters: Mapping[str, int], tower: Stack, words: LanguageModelSizes,
    length: int, gpus: int, sharded: bool,
) -> Memory:  # fmt: skip
    """What trains is float32, with its gradient and two moments. What is frozen is of the low precision; where the
    weights are split over the GPUs it is float32 too (one dtype), and gathered are two blocks at a time, the embedding
    and the head, with their gradients."""
    precision = PRECISION["fp32" if plan.options.precision == FP32 else "amp"]
    trained = sum(parameters[part] for part in stage.trains)
    frozen = sum(parameters.values()) - trained
    if sharded:
        fixed = (fixed_bytes(trained, 0, PRECISION["fp32"], 1) + 4.0 * frozen) / gpus
        fixed += 2.0 * words.block * (precision.weight + precision.copy)
        fixed += 4.0 * words.vocabulary * words.width * (precision.copy or precision.weight)
    else:
        fixed = fixed_bytes(trained, 0, precision, gpus) + float(frozen) * precision.activation
    kept = 0.0
    for part, blocks, rows, width, block in (
        (LANGUAGE_MODEL, words.layers, length, words.width, words.block_bytes(length, precision)),
        (TOWER, tower.blocks, tower.keys, tower.tower.width, tower.block_bytes(precision)),
    ):
        if part in (*stage.trains, LANGUAGE_MODEL):
            inputs = blocks * rows * width * precision.activation
            kept += block + inputs if plan.options.grad_checkpointing else blocks * block
    return Memory(fixed, kept)
